"""Facts as one line for people, the same on a terminal and in a log."""

from __future__ import annotations

from typing import Any

from millrace.core.units import format_duration, format_size


def percent(value: float) -> str:
    """A share with one decimal.

    Example:
        >>> percent(0.99333)
        '99.3 %'
    """
    return f"{value * 100:.1f} %"


def score(name: str, value: float) -> str:
    """A metric's value: shares as percent, others with four digits."""
    return percent(value) if name in SHARES else f"{value:.4g}"


SHARES = frozenset({"accuracy", "macro_f1", "balanced_accuracy", "f1", "precision", "recall", "auc", "r2"})
_FRAMEWORKS = {"torch": "PyTorch", "sklearn": "scikit-learn", "lightgbm": "LightGBM"}


def short(value: float) -> str:
    """A number below 1 without its leading zero, two decimals.

    Example:
        >>> short(0.94), short(12.3)
        ('.94', '12.30')
    """
    text = f"{value:.2f}"
    return text[1:] if text.startswith("0.") else text


def data_line(facts: dict[str, Any]) -> str:
    """Rows in, rejected by reason, split."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in facts["rejected_by_reason"].items() if count)
    rejected = f"{facts['rejected']} rejected" + (f" ({reasons})" if reasons else "")
    split = ", ".join(f"{name} {rows}" for name, rows in facts["split"].items())
    warnings = "".join(f"; warning: {text}" for text in facts.get("warnings", []))
    return f"{facts['rows_in']} in, {rejected}; {split}{warnings}"


def train_line(facts: dict[str, Any]) -> str:
    """Epochs, or the chosen candidate."""
    best = facts.get("best_score")
    metric = facts.get("metric", "")
    value = f"val {score(metric, best)}" if best is not None else ""
    epochs = facts.get("epochs") or []
    if epochs:
        total = len(epochs)
        return f"epoch {total}/{total} {'#' * min(total, 8)} loss {short(epochs[-1]['loss'])} {value}".rstrip()
    return f"{facts.get('model', '')} chosen of {len(facts.get('candidates', [])) or 1}, {metric} {value}".rstrip()


def export_line(facts: dict[str, Any], framework: str = "torch") -> str:
    """ONNX against the framework."""
    name = _FRAMEWORKS.get(framework, framework)
    return f"ONNX equals {name} on {facts['rows']} rows (max diff {facts['max_difference']:.0e})".replace("e-0", "e-")


def evaluate_line(facts: dict[str, Any]) -> str:
    """Metrics with their intervals."""
    parts = []
    for metric in facts["metrics"]:
        low, high = score(metric["name"], metric["low"]), score(metric["name"], metric["high"])
        parts.append(f"{metric['name']} {score(metric['name'], metric['value'])} ({low} to {high})")
    return f"{facts['rows']} rows: " + ", ".join(parts)


def compress_line(facts: dict[str, Any]) -> str:
    """How many variants."""
    count = len(facts["variants"]) - 1
    return f"{count} variant{'' if count == 1 else 's'}, chosen {facts['chosen']}"


def register_line(facts: dict[str, Any]) -> str:
    """Version, signature, alias and verdict."""
    gate = facts["gate"]
    name = f"{facts['model']} v{facts['number']} signed"
    reason = gate["explanation"] or gate["verdict"]
    if facts["promoted"]:
        return f"{name} -> {facts['alias']} ({reason})"
    return f"{name}, {facts['alias']} stays {gate['champion']} ({gate['verdict']}: {reason})"


def serve_line(facts: dict[str, Any]) -> str:
    """Requests answered and the median."""
    wrong = f", {facts['wrong']} WRONG" if facts["wrong"] else ""
    return f"{facts['answered']}/{facts['requests']} requests answered{wrong}, p50 {facts['p50_s'] * 1e3:.2g} ms"


def monitor_line(facts: dict[str, Any]) -> str:
    """Each window: quiet or an alert with its strongest feature."""
    parts = []
    for window in facts["windows"]:
        if window["is_alert"]:
            top = window["top"][0]["name"] if window["top"] else ""
            text = f"ALERT {short(window['score'])} > {short(window['threshold'])}, {top}"
        else:
            text = "quiet"
        parts.append(f"{window['label']}: {text}")
    return " | ".join(parts)


_LINES = {
    "data": data_line,
    "train": train_line,
    "export": export_line,
    "evaluate": evaluate_line,
    "compress": compress_line,
    "register": register_line,
    "serve": serve_line,
    "monitor": monitor_line,
}


def step_line(name: str, facts: dict[str, Any], framework: str = "torch") -> str:
    """The line of any step; own steps show their facts."""
    if name == "export":
        return export_line(facts, framework)
    line = _LINES.get(name)
    if line is not None:
        return line(facts)
    return ", ".join(f"{key} {value}" for key, value in facts.items() if isinstance(value, str | int | float)) or "done"


def variant_rows(facts: dict[str, Any], evaluate: dict[str, Any] | None = None) -> list[list[str]]:
    """The table of variants, header first; the base's score comes from `evaluate` when no variant was tested."""
    base = facts["variants"][0]
    batches = [latency["batch_size"] for latency in base["latency"]]
    known = next((variant["guarantee"] for variant in facts["variants"] if variant["guarantee"]), None) or {}
    if not known and evaluate:
        metric = evaluate["metrics"][0]
        name = "accuracy" if evaluate["task"] == "classification" else metric["name"]
        known = {"metric": name, "base_score": metric["value"]}
    error = known.get("metric", "accuracy") != "accuracy"
    drop_name = f"DROP({facts['confidence'] * 100:.0f}%)"
    rows = [["VARIANT", "ERR" if error else "ACC", drop_name, "CHANGED", "SIZE", *(f"b{batch}" for batch in batches)]]
    for index, variant in enumerate(facts["variants"]):
        guarantee = variant["guarantee"] or (known if index == 0 else {})
        mark = "*" if variant["name"] == facts["chosen"] else " "
        rows.append([f"{mark}{variant['name']}", *_guarantee_cells(guarantee, error, is_base=index == 0),
                     format_size(variant["size_bytes"]), *_latency_cells(variant, is_base=index == 0)])  # fmt: skip
    return rows


def _guarantee_cells(guarantee: dict[str, Any], error: bool, *, is_base: bool) -> list[str]:
    if not guarantee:
        return ["-", "-", "-"]
    value = guarantee["base_score"] if is_base else guarantee["score"]
    shown = f"{value:.4g}" if error else f"{value * 100:.1f}"
    if is_base:
        return [shown, "-", "-"]
    bound = guarantee["bound"]
    unit = "%" if error else "pp"
    drop = guarantee["status"] if bound is None else f"<={bound * 100:.2f}{unit}"
    if bound is not None and guarantee["status"] != "certified":
        drop += f" {guarantee['status']}"
    return [shown, drop, f"{guarantee['changed']}/{guarantee['rows']}"]


def _latency_cells(variant: dict[str, Any], *, is_base: bool) -> list[str]:
    if is_base:
        return [format_duration(latency["p50_s"]) for latency in variant["latency"]]
    return [f"{latency['speedup']:.1f}x" for latency in variant["latency"]]


def verdict_line(facts: dict[str, Any]) -> str:
    """What is served and what it is sure to lose at most."""
    chosen = next((one for one in facts["variants"] if one["name"] == facts["chosen"]), facts["variants"][0])
    if chosen is facts["variants"][0]:
        return f"Serving {chosen['name']}: {facts['why']}"
    guarantee = chosen["guarantee"]
    error = guarantee["metric"] != "accuracy"
    unit, scale = (" % of the error", 100) if error else (" points", 100)
    smaller = f"{chosen['size_ratio']:.1f}x smaller"
    bound = max(guarantee["bound"], 0.0) * scale
    sure = f"{guarantee['confidence'] * 100:.0f} % sure; limit {guarantee['limit'] * scale:.1f}"
    return f"Serving {chosen['name']}: {smaller}, loses at most {bound:.2f}{unit} ({sure})."


def flat(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer without nesting.

    Example:
        >>> flat({"label": "a", "probabilities": {"a": 0.9, "b": 0.1}})
        {'label': 'a', 'probability_a': 0.9, 'probability_b': 0.1}
    """
    row = {key: value for key, value in answer.items() if not isinstance(value, dict)}
    for label, value in answer.get("probabilities", {}).items():
        row[f"probability_{label}"] = value
    return row
