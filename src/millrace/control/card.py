"""The model card: what a version is, with its numbers and its limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def render_card(facts: Mapping[str, Mapping[str, Any]], project: str) -> str:
    """MODEL_CARD.md from the facts of a run's steps.

    Args:
        facts: By stage: data, train, evaluate, compress, register; missing ones are left out.
        project: The project's name.
    """
    register = facts.get("register", {})
    parts = [f"# {_cell(register.get('model', project))}\n"]
    for section, write in (("data", _data), ("train", _train), ("evaluate", _evaluate), ("compress", _compress)):
        if facts.get(section):
            parts.append(write(facts[section]))
    gate = register.get("gate", {})
    if gate:
        parts.append(f"## Promotion\n\n{gate.get('verdict')}: {_cell(gate.get('explanation'))}\n")
    parts.append("## Limits\n\n" + "".join(f"- {limit}\n" for limit in _limits(facts)))
    return "\n".join(parts)


def _limits(facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What the figures do not say, with the numbers that say how far they go."""
    evaluate, compress = facts.get("evaluate") or {}, facts.get("compress") or {}
    rows = evaluate.get("rows")
    limits = [
        f"The figures hold for rows like the {rows or ''} held-out ones above, and for no others.".replace("  ", " ")
    ]
    if evaluate.get("slices"):
        worst = min(evaluate["slices"], key=lambda one: one["score"])
        where = f"{_cell(worst['column'])} = {_cell(worst['value'])}"
        limits.append(f"Lowest slice: {where}, {worst['score']:.4g} on {worst['rows']} rows.")
    if evaluate.get("baseline") is not None:
        limits.append(f"Always giving the same answer scores {evaluate['baseline']:.4g} on these rows.")
    if compress:
        limits.append(
            "A guarantee bounds what a variant loses against its base on such rows "
            f"({compress.get('confidence', 0) * 100:g} % sure), not the base's own mistakes."
        )
        vnni = [_cell(one["name"]) for one in compress.get("variants", []) if one.get("needs_vnni")]
        if vnni:
            limits.append(f"Only on processors with VNNI: {', '.join(vnni)}. Elsewhere answers change.")
    return [
        *limits,
        "Drift alerts say when rows stop being like the held-out ones; they do not say that answers are wrong.",
    ]


def _cell(value: Any) -> str:
    """Text from outside as Markdown shows it: no markup, no new lines, no new columns.

    Example:
        >>> _cell("a|b <i>\\n# c")
        'a\\\\|b &lt;i> # c'
    """
    text = " ".join(str(value).split())
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def _data(facts: Mapping[str, Any]) -> str:
    split = ", ".join(f"{name} {rows}" for name, rows in (facts.get("split") or {}).items())
    return f"## Data\n\n{facts.get('task')} of `{_cell(facts.get('label'))}`; {facts.get('rows_kept')} rows: {split}.\n"


def _train(facts: Mapping[str, Any]) -> str:
    size = f", {facts['parameters']} parameters" if facts.get("parameters") else ""
    return f"## Training\n\n{_cell(facts.get('model'))} ({facts.get('framework')}{size}, {facts.get('precision')}).\n"


def _evaluate(facts: Mapping[str, Any]) -> str:
    lines = ["## Held-out figures\n", f"{facts.get('rows')} rows.\n", "| metric | value | interval |", "|---|---|---|"]
    for metric in facts.get("metrics", []):
        lines.append(f"| {metric['name']} | {metric['value']:.4g} | {metric['low']:.4g} to {metric['high']:.4g} |")
    if facts.get("slices"):
        lines.extend(["", "| slice | rows | score | interval |", "|---|---|---|---|"])
        for one in facts["slices"]:
            interval = f"{one['low']:.4g} to {one['high']:.4g}"
            lines.append(
                f"| {_cell(one['column'])} = {_cell(one['value'])} | {one['rows']} | {one['score']:.4g} | {interval} |"
            )
    return "\n".join(lines) + "\n"


def _compress(facts: Mapping[str, Any]) -> str:
    lines = ["## Variants\n", "| variant | size | verdict | loses at most |", "|---|---|---|---|"]
    for variant in facts.get("variants", []):
        guarantee = variant.get("guarantee") or {}
        bound = guarantee.get("bound")
        shown = "-" if bound is None else f"{bound * 100:.2f} %"
        lines.append(f"| {variant['name']} | {variant['size_bytes']} | {guarantee.get('status', 'base')} | {shown} |")
    return "\n".join(lines) + f"\n\n{facts.get('why', '')}\n"
