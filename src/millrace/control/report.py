"""report.html: one self-contained file that says what a run found, a sentence and a picture at a time."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from markupsafe import Markup

from millrace.control import charts, pictures
from millrace.control.pareto import pareto
from millrace.core import facts as structs
from millrace.core.states import STEP_DONE_STATES
from millrace.core.units import format_duration, format_size

Facts = Mapping[str, Any]
SHARES = frozenset({"accuracy", "macro_f1", "balanced_accuracy", "f1", "precision", "recall", "auc", "r2"})

KINDS: dict[str, type] = {
    "data": structs.DataFacts,
    "train": structs.TrainFacts,
    "export": structs.ExportFacts,
    "evaluate": structs.EvaluateFacts,
    "compress": structs.CompressFacts,
    "register": structs.RegisterFacts,
    "serve": structs.ServeFacts,
    "monitor": structs.MonitorFacts,
}


def render_report(
    *,
    facts: Mapping[str, Facts],
    name: str,
    state: str,
    error: Mapping[str, Any] | None,
    spec_text: str,
    overrides: list[str],
    steps: Mapping[str, tuple[str, float]],
    digests: Mapping[str, str],
    environment: Mapping[str, str],
) -> str:
    """The report of a run, complete or not.

    Args:
        facts: By step; sections whose step has none are left out.
        name: The run's name.
        state: succeeded, failed or cancelled.
        error: Of a run that failed.
        spec_text: The spec as written.
        overrides: What `--set` changed.
        steps: State and duration in seconds by step.
        digests: Outputs by `step.name`.
        environment: Versions and processor flags.

    Returns:
        HTML; every text from outside is escaped.
    """
    facts, unreadable = decode_facts(facts)
    sections = [
        section
        for build in (_data, _training, _mistakes, _smaller, _promotion, _live)
        if (section := build(facts)) is not None
    ]
    commands = [" \\\n  ".join(["millrace run", *(f"--set {shlex.quote(override)}" for override in overrides)])]
    model = facts.get("register", {}).get("model")
    if model:
        commands += [f"millrace serve {model}", f"millrace predict {model} --input rows.csv"]
    return _template().render(
        name=name,
        state=state,
        error=error,
        tiles=_tiles(facts, state, [status for status, _ in steps.values()]),
        verdict=_verdict(facts, state),
        sections=sections,
        unreadable=unreadable,
        lineage=_lineage(digests),
        steps=[(step, status, format_duration(took)) for step, (status, took) in steps.items()],
        spec_text=spec_text,
        commands="\n".join(commands),
        digests=digests,
        environment=environment,
    )


def decode_facts(facts: Mapping[str, Facts]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Facts with every field that the report reads, and why others cannot be shown: an old record is no reason to fail.

    Example:
        >>> decode_facts({"train": {"framework": "torch"}, "own step": {}})
        ({}, {'train': 'Object missing required field `model`'})
    """
    readable, unreadable = {}, {}
    for name, value in facts.items():
        if name not in KINDS:
            continue
        try:
            struct = msgspec.convert(_no_null_losses(value), KINDS[name], strict=False)
        except msgspec.ValidationError as error:
            unreadable[name] = str(error)
        else:
            readable[name] = msgspec.to_builtins(struct)
    for name, needed in (("evaluate", "metrics"), ("compress", "variants")):
        if name in readable and not readable[name][needed]:
            unreadable[name] = f"it has no {needed}"
            del readable[name]
    return readable, unreadable


def _no_null_losses(value: Facts) -> Facts:
    """JSON has no NaN: a loss that became one is stored as null."""
    epochs = value.get("epochs")
    if not isinstance(epochs, list):
        return value
    return {**value, "epochs": [one if one.get("loss") is not None else {**one, "loss": math.nan} for one in epochs]}


def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "report_templates")
    return jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(
        "report.html"
    )


def _section(title: str, sentence: str, *pictures: str, more: Any = None) -> dict[str, Any]:
    return {"title": title, "sentence": sentence, "pictures": [Markup(picture) for picture in pictures], "more": more}


def _drawn(chart: Callable[..., str], *arguments: Any) -> str:
    """A chart for wide and one for narrow screens; the page shows one of them."""
    wide, narrow = chart(*arguments, width=charts.WIDE), chart(*arguments, width=charts.NARROW)
    return f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'


def _value(metric: str, value: float) -> str:
    return f"{value * 100:.1f} %" if metric in SHARES else charts.number(value)


def _tiles(facts: Mapping[str, Facts], state: str, statuses: list[str]) -> list[dict[str, str]]:
    tiles = []
    evaluate, compress = facts.get("evaluate"), facts.get("compress")
    if evaluate:
        metric = evaluate["metrics"][0]
        interval = f"{_value(metric['name'], metric['low'])} to {_value(metric['name'], metric['high'])}"
        tiles.append({"name": metric["name"], "value": _value(metric["name"], metric["value"]), "note": interval})
    if compress:
        chosen = _chosen(compress)
        fastest = max((one["speedup"] for one in chosen["latency"]), default=1.0)
        note = f"{chosen['size_ratio']:.1f}x smaller, up to {fastest:.1f}x faster"
        tiles.append({"name": "served", "value": chosen["name"], "note": note})
    serve, monitor = facts.get("serve"), facts.get("monitor")
    if serve:
        note = f"{serve['answered']} of {serve['requests']} requests answered"
        tiles.append({"name": "median answer", "value": format_duration(serve["p50_s"]), "note": note})
    if monitor:
        wrong = [one for one in monitor["windows"] if one["is_alert"] == (one["label"] == "clean")]
        note = "quiet on clean rows, loud on damaged ones" if not wrong else "see below"
        tiles.append({"name": "drift watch", "value": "works" if not wrong else "check", "note": note})
    if tiles:
        return tiles
    done = sum(status in STEP_DONE_STATES for status in statuses)
    return [{"name": "run", "value": state, "note": f"{done} of {len(statuses)} steps finished"}]


def _chosen(compress: Facts) -> dict[str, Any]:
    return next((one for one in compress["variants"] if one["name"] == compress["chosen"]), compress["variants"][0])


def _verdict(facts: Mapping[str, Facts], state: str) -> str:
    register = facts.get("register")
    if state != "succeeded" or not register:
        return f"The run {state}." if state != "succeeded" else "The run succeeded."
    gate = register["gate"]
    if register.get("promoted"):
        return f"{register['model']} v{register['number']} is the {register['alias']} now: {gate['explanation']}."
    return f"{register['model']} v{register['number']} is kept, {gate['champion']} stays: {gate['explanation']}."


def _data(facts: Mapping[str, Facts]) -> dict[str, Any] | None:
    data = facts.get("data")
    if not data:
        return None
    split = ", ".join(f"{rows:,} to {name}" for name, rows in data["split"].items())
    sentence = f"{data['rows_in']:,} rows in = {data['rows_kept']:,} kept + {data['rejected']} rejected; {split}."
    drawings = [_drawn(charts.flow, data["rows_in"], data["rows_kept"], list(data["rejected_by_reason"].items()))]
    if data.get("classes"):
        drawings.append(_drawn(charts.bars, list(data["classes"].items())[:24], "rows per class"))
    elif data.get("label_histogram"):
        edges, counts = data["label_histogram"]["edges"], data["label_histogram"]["counts"]
        names = [f"{charts.number(low)} to {charts.number(high)}" for low, high in itertools.pairwise(edges)]
        drawings.append(_drawn(charts.bars, list(zip(names, counts, strict=False)), "rows per value of the label"))
    header = ["why", "file", "row", "column", "value"]
    rows = [
        [one["reason"], one["file"], one["row"], one["column"] or "", one["value"]] for one in data.get("samples", [])
    ]
    return _section("Data", sentence, *drawings, more={"title": "rejected samples", "header": header, "rows": rows})


def _training(facts: Mapping[str, Facts]) -> dict[str, Any] | None:
    train = facts.get("train")
    if not train:
        return None
    epochs = train.get("epochs") or []
    score = train.get("best_score")
    shown = f", {train['metric']} {_value(train['metric'], score)} on validation rows" if score is not None else ""
    if epochs:
        size = f" with {train['parameters']:,} parameters" if train.get("parameters") else ""
        sentence = f"{train['model']}{size}: {len(epochs)} epochs in {format_duration(train['duration_s'])}{shown}."
        series = [("loss", [one["loss"] for one in epochs])]
        if any(one.get("validation_loss") is not None for one in epochs):
            series.append(("validation loss", [one.get("validation_loss") for one in epochs]))
        if any(one.get("validation_score") is not None for one in epochs):
            series.append((train["metric"], [one.get("validation_score") for one in epochs]))
        drawings = [_drawn(charts.lines, series, "training curves", train.get("best_epoch"))]
    else:
        sentence = f"{train['model']} ({train['framework']}) in {format_duration(train['duration_s'])}{shown}."
        candidates = [(str(one.get("name")), float(one.get("score") or 0)) for one in train.get("candidates", [])]
        drawings = [_drawn(charts.bars, candidates, "candidates")] if candidates else []
    export = facts.get("export")
    if export:
        sentence += (
            f" The ONNX graph equals it on {export['rows']} rows (largest difference {export['max_difference']:.0e})."
        )
    return _section("Training", sentence, *drawings)


def _mistakes(facts: Mapping[str, Facts]) -> dict[str, Any] | None:
    evaluate = facts.get("evaluate")
    if not evaluate:
        return None
    metric = evaluate["metrics"][0]
    value = _value(metric["name"], metric["value"])
    sentence = f"{metric['name']} {value} on {evaluate['rows']} held-out rows."
    drawings, more = [], None
    if evaluate.get("confusion"):
        wrong = sum(n for i, row in enumerate(evaluate["confusion"]) for j, n in enumerate(row) if i != j)
        sentence = f"{wrong} of {evaluate['rows']} held-out rows are wrong: {metric['name']} {value}."
        if len(evaluate["classes"]) <= 30:
            drawings.append(_drawn(charts.matrix, evaluate["confusion"], [str(one) for one in evaluate["classes"]]))
    elif evaluate.get("scatter"):
        drawings.append(_drawn(charts.scatter, evaluate["scatter"]))
    shape = evaluate.get("image")
    mistakes = evaluate.get("mistakes", [])
    if shape and mistakes and mistakes[0].get("pixels"):
        cells = "".join(_mistake(one, shape) for one in mistakes)
        drawings.append(f'<div class="images">{cells}</div>')
    elif mistakes:
        columns = list(mistakes[0].get("record", {}))[:6]
        rows = [
            [one["expected"], one["predicted"], *(one["record"].get(column, "") for column in columns)]
            for one in mistakes
        ]
        more = {"title": "the worst answers", "header": ["expected", "predicted", *columns], "rows": rows}
    return _section("Mistakes", sentence, *drawings, more=more)


def _mistake(one: Facts, shape: list[int]) -> str:
    words = f"{one['expected']} taken for {one['predicted']}"
    return (
        f"<figure>{pictures.image(one['pixels'] or [], shape, words)}<figcaption>{_escape(words)}</figcaption></figure>"
    )


def _escape(value: Any) -> str:
    return str(Markup.escape(str(value)))


def _smaller(facts: Mapping[str, Facts]) -> dict[str, Any] | None:
    compress = facts.get("compress")
    if not compress:
        return None
    regression = facts.get("evaluate", {}).get("task") == "regression"
    unit = "% of the error" if regression else "pp"
    header = ["variant", "verdict", "error grows by" if regression else "loses at most", "changed", "size"]
    header += [f"b{one['batch_size']}" for one in compress["variants"][0]["latency"]]
    rows = []
    for index, variant in enumerate(compress["variants"]):
        guarantee = variant.get("guarantee") or {}
        bound = guarantee.get("bound")
        cells = [variant["name"] + (" (served)" if variant["name"] == compress["chosen"] else "")]
        cells.append("base" if index == 0 else str(guarantee.get("status", "-")))
        cells.append("-" if bound is None or index == 0 else f"{bound * 100:.2f} {unit.split()[0]}")
        cells.append("-" if index == 0 or not guarantee else f"{guarantee['changed']}/{guarantee['rows']}")
        cells.append(format_size(variant["size_bytes"]))
        for one in variant["latency"]:
            spread = f"{one['speedup']:.2f}x ({one['low']:.2f}–{one['high']:.2f})"
            cells.append(format_duration(one["p50_s"]) if index == 0 else spread)
        rows.append(cells)
    why = compress["why"]
    sentence = f"Serving {compress['chosen']}: {why}" + ("" if why.endswith(".") else ".")
    chart = _drawn(pareto, compress["variants"], compress["chosen"], compress["max_drop"], unit)
    return _section("Smaller", sentence, chart, more={"title": "every variant", "header": header, "rows": rows})


def _promotion(facts: Mapping[str, Facts]) -> dict[str, Any] | None:
    register = facts.get("register")
    if not register:
        return None
    gate = register["gate"]
    if gate["verdict"] == "first":
        return _section("Promotion", f"{register['model']} v{register['number']} is the first: nothing to beat.")
    sentence = f"Against {gate['champion']} on the same {gate['rows']} rows: {gate['explanation']}."
    return _section("Promotion", sentence, _drawn(charts.wins, gate) if gate["rows"] else "")


def _live(facts: Mapping[str, Facts]) -> dict[str, Any] | None:
    monitor, serve = facts.get("monitor"), facts.get("serve")
    if not monitor and not serve:
        return None
    parts, drawings = [], []
    if serve:
        parts.append(
            f"{serve['answered']} of {serve['requests']} real requests were answered, {serve['wrong']} unlike "
            f"the offline answer; half within {format_duration(serve['p50_s'])}."
        )
    if monitor:
        loud = [window["label"] for window in monitor["windows"] if window["is_alert"]]
        quiet = [window["label"] for window in monitor["windows"] if not window["is_alert"]]
        parts.append(f"Quiet on: {', '.join(quiet) or 'nothing'}; alert on: {', '.join(loud) or 'nothing'}.")
        drawings.append(_drawn(charts.drift, monitor["windows"]))
        parts.append(
            f"At most {monitor['false_alarms'] * 100:g} % of clean windows may alarm; "
            f"{monitor['measured_false_alarms'] * 100:.1f} % of the reference's own did."
        )
        loudest = max(monitor["windows"], key=lambda window: window["score"], default=None)
        if loudest and loudest.get("scores"):
            drawings.append(_heat(loudest, monitor.get("image")))
    return _section("Live", " ".join(parts), *drawings)


def _heat(window: Facts, shape: list[int] | None) -> str:
    """Where the window drifted: as the image, or the strongest features as bars."""
    pixels = [score for name, score in window["scores"].items() if name.startswith("pixel ")]
    if shape and len(pixels) == shape[0] * shape[1]:
        caption = f"<figcaption>{_escape(window['label'])}: drift of every pixel</figcaption>"
        drawn = pictures.image(pixels, shape[:2], "drift of every pixel", size=176, is_heat=True)
        return f'<div class="images"><figure>{drawn}{caption}</figure></div>'
    strongest = sorted(window["scores"].items(), key=lambda item: -item[1])[:12]
    return _drawn(charts.bars, [(name, round(score, 2)) for name, score in strongest], "strongest features")


def _lineage(digests: Mapping[str, str]) -> Markup:
    order = ("data.dataset", "train.model", "export.onnx", "compress.variants", "register.bundle")
    names = [(name.split(".")[1], digests[name].removeprefix("sha256:")[:8]) for name in order if name in digests]
    return Markup(_drawn(charts.lineage, names)) if names else Markup("")
