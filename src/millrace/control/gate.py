"""The gate: a challenger must be non-inferior to the champion on the same frozen rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np

from millrace.core.facts import GateFacts, Task
from millrace.core.spec import Register
from millrace.stats.paired import PairedVerdict, noninferior, noninferior_errors

Verdict = Literal["first", "promoted", "kept", "undecided", "same"]


def judge_challenger(
    rule: Register,
    task: Task,
    labels: np.ndarray,
    *,
    challenger: Mapping[str, np.ndarray],
    champion: Mapping[str, np.ndarray],
    champion_name: str,
    looks: int,
    confidence: float,
) -> GateFacts:
    """Compare two models' answers row by row.

    Args:
        rule: `register.promote_if` and `register.margin`.
        task: classification (0/1 answers, Tango's bound) or regression (absolute errors, paired t).
        labels: Expected class indices or values, [rows].
        challenger: The new model's outputs.
        champion: The present model's outputs on the same rows.
        champion_name: For people.
        looks: How often these rows have judged, this time included.
        confidence: One-sided.

    Returns:
        The verdict with the numbers and the sentence that explains it.
    """
    if task == "classification":
        answers = [outputs["probabilities"].argmax(axis=1) for outputs in (challenger, champion)]
        right = [answer == labels for answer in answers]
        paired = noninferior(right[0], right[1], float(rule.margin), confidence)
    else:
        errors = [np.abs(outputs["value"].reshape(-1) - labels) for outputs in (challenger, champion)]
        paired = noninferior_errors(errors[0], errors[1], float(rule.margin), confidence)
    same = paired.wins == 0 and paired.losses == 0
    verdict, text = _decide(rule, paired, champion_name, looks, same=same)
    return GateFacts(
        verdict=verdict, champion=champion_name, rows=len(labels), wins=paired.wins, losses=paired.losses,
        ties=paired.ties, difference=paired.difference, bound=paired.bound, margin=float(rule.margin),
        confidence=confidence, looks=looks, rows_needed=paired.rows_needed, explanation=text,
    )  # fmt: skip


def _decide(rule: Register, paired: PairedVerdict, champion: str, looks: int, *, same: bool) -> tuple[Verdict, str]:
    again = f"; these rows have judged {looks} times" if looks > 1 else ""
    lost = f"loses at most {paired.bound * 100:.2f} points against {champion}"
    if rule.promote_if == "never":
        return "kept", f"promote_if: never; {champion} stays{again}"
    if rule.promote_if == "always":
        return "promoted", f"promote_if: always{again}"
    if rule.promote_if == "better":
        if paired.bound < 0:
            return "promoted", f"better than {champion} on the same rows{again}"
        return "kept", f"not shown to be better than {champion}{again}"
    if same or paired.bound <= float(rule.margin):
        return "promoted", f"{lost} (limit {float(rule.margin) * 100:g}){again}"
    if paired.verdict == "inferior":
        return "kept", f"worse than {champion} by {-paired.difference * 100:.2f} points{again}"
    needed = f"; about {paired.rows_needed} rows needed" if paired.rows_needed else ""
    return "undecided", f"too few rows to tell: {lost}, limit {float(rule.margin) * 100:g}{needed}{again}"
