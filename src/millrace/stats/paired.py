"""Paired comparisons on the same rows: how much can the second model lose at most?

Wins are rows that only the new model gets right, losses rows that only the old one does. Every bound
is one-sided: with the stated confidence the true loss is not larger. Evidence: docs/notes/guard.md.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np
from scipy.special import betaincinv, ndtri, stdtrit

from millrace.core.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Verdict = Literal["non_inferior", "inferior", "undecided"]
_POWER = 0.8  # the chance of a certificate that `rows_needed` plans for
_BISECTIONS = 60


class PairedVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """A challenger against a champion on the same rows.

    `difference` is challenger minus champion (positive: the challenger is better); `bound` is the most
    that the challenger loses, at the confidence. Accuracy: shares of one. Regression: shares of the
    champion's mean absolute error, wins and losses counting rows with a smaller or larger error.
    """

    wins: int
    losses: int
    ties: int
    rows: int
    difference: float
    bound: float
    margin: float
    confidence: float
    verdict: Verdict
    rows_needed: int | None = None


def tango_statistic(losses: int, wins: int, rows: int, drop: float) -> float:
    """Tango's score statistic for the hypothesis that the true drop is `drop`.

    Standard normal under the hypothesis, falling in `drop`; at minus the normal quantile the bound is
    reached. T. Tango (1998), Statistics in Medicine 17, 891-908, equations 9 to 12.

    Args:
        losses: Rows that only the base gets right.
        wins: Rows that only the variant gets right.
        rows: All rows.
        drop: Hypothesised loss in accuracy, -1 to 1.

    Returns:
        (losses − wins − rows·drop) over its standard error at the restricted maximum likelihood.

    Example:
        >>> round(tango_statistic(losses=0, wins=1, rows=44, drop=-0.1), 3)  # Tango 1998: Z = 1.709
        1.709
    """
    quadratic = 2.0 * rows
    linear = -losses - wins + (2.0 * rows - losses + wins) * drop
    constant = -wins * drop * (1.0 - drop)
    root = math.sqrt(max(linear * linear - 4.0 * quadratic * constant, 0.0))
    wins_rate = max((root - linear) / (2.0 * quadratic), 0.0)
    variance = rows * (2.0 * wins_rate + drop * (1.0 - drop))
    distance = losses - wins - rows * drop
    if variance <= 0.0:
        return 0.0 if distance == 0.0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def tango_upper(losses: int, wins: int, rows: int, confidence: float = 0.95) -> float:
    """One-sided upper bound of the drop in accuracy between two models on the same rows.

    Args:
        losses: Rows that only the base gets right.
        wins: Rows that only the variant gets right.
        rows: All rows; 0 rows bound nothing (1.0).
        confidence: For example 0.95.

    Returns:
        The largest drop that the data do not reject, between -1 and 1.

    Raises:
        InputError: Counts that cannot be, or a confidence outside 0.5 to 1.

    Example:
        >>> round(tango_upper(losses=0, wins=0, rows=600), 4)
        0.0045
    """
    _check_counts(losses, wins, rows, confidence)
    if rows == 0:
        return 1.0
    quantile = -float(ndtri(confidence))
    low, high = (losses - wins) / rows, 1.0
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if tango_statistic(losses, wins, rows, middle) > quantile:
            low = middle
        else:
            high = middle
    return high


def tango_interval(losses: int, wins: int, rows: int, confidence: float = 0.95) -> tuple[float, float]:
    """The two-sided score interval of the drop; see `tango_upper`.

    Example:
        >>> [round(value, 3) for value in tango_interval(1, 7, 21)]  # Fagerland et al. 2014, table II
        [-0.517, -0.026]
    """
    one_sided = 0.5 + confidence / 2.0
    return -tango_upper(wins, losses, rows, one_sided), tango_upper(losses, wins, rows, one_sided)


def clopper_pearson_upper(count: int, rows: int, confidence: float = 0.95) -> float:
    """Exact one-sided upper bound of a share.

    Args:
        count: Rows that have the property (for example, a changed answer).
        rows: All rows; 0 rows bound nothing (1.0).
        confidence: For example 0.95.

    Returns:
        The largest share that the data do not reject.

    Example:
        >>> round(clopper_pearson_upper(0, 59), 3), clopper_pearson_upper(5, 5)
        (0.05, 1.0)
    """
    _check_counts(count, 0, rows, confidence)
    if count >= rows:
        return 1.0
    return float(betaincinv(count + 1, rows - count, confidence))


def wilson_interval(count: int, rows: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's two-sided score interval of a share (Wilson 1927).

    Example:
        >>> [round(value, 3) for value in wilson_interval(81, 263)]  # Newcombe 1998, table I
        [0.255, 0.366]
    """
    _check_counts(count, 0, rows, 0.5 + confidence / 2.0)
    if rows == 0:
        return 0.0, 1.0
    quantile = float(ndtri(0.5 + confidence / 2.0))
    share, spread = count / rows, quantile * quantile / rows
    centre = (share + spread / 2.0) / (1.0 + spread)
    half = quantile * math.sqrt(share * (1.0 - share) / rows + spread / (4.0 * rows)) / (1.0 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_t_upper(
    old_errors: NDArray[np.floating], new_errors: NDArray[np.floating], confidence: float = 0.95
) -> float:
    """One-sided upper bound of the mean rise of the error, by Student's t on paired differences.

    Args:
        old_errors: Absolute errors of the base, [rows].
        new_errors: Absolute errors of the variant on the same rows, [rows].
        confidence: For example 0.95.

    Returns:
        The bound in the unit of the errors; infinity for fewer than two rows.

    Example:
        >>> round(paired_t_upper(np.array([1.0, 2.0, 3.0]), np.array([1.1, 2.0, 3.2])), 3)
        0.269
    """
    _check_pair(old_errors, new_errors)
    return _mean_upper(np.asarray(new_errors, np.float64) - np.asarray(old_errors, np.float64), confidence)


def paired_ratio_upper(
    old_errors: NDArray[np.floating], new_errors: NDArray[np.floating], confidence: float = 0.95
) -> float:
    """One-sided upper bound of the mean error's rise as a share of the base's own mean error.

    The smallest r for which the paired t-bound of |new| − (1 + r)·|old| is not above zero: the base's
    mean is estimated too, and this way of asking (Fieller's) counts that uncertainty.

    Args:
        old_errors: Absolute errors of the base, [rows].
        new_errors: Absolute errors of the variant on the same rows, [rows].
        confidence: For example 0.95.

    Returns:
        The bound as a share (0.02 = 2 % more error); infinity when nothing can be said.

    Example:
        >>> old = np.linspace(1.0, 2.0, 50)
        >>> round(paired_ratio_upper(old, 1.1 * old), 4)  # every row 10 % worse
        0.1
    """
    _check_pair(old_errors, new_errors)
    old, new = np.asarray(old_errors, np.float64), np.asarray(new_errors, np.float64)
    if old.size < 2 or old.mean() <= 0.0:
        return 0.0 if old.size >= 2 and not new.any() else math.inf
    low = float(new.mean() / old.mean() - 1.0)
    high, limit = low + 1e-6, low + 1e4
    while _mean_upper(new - (1.0 + high) * old, confidence) > 0.0:
        high = low + (high - low) * 4.0
        if high > limit:
            return math.inf
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        if _mean_upper(new - (1.0 + middle) * old, confidence) > 0.0:
            low = middle
        else:
            high = middle
    return high


def rows_needed(
    discordant: float, margin: float, confidence: float = 0.95, drop: float = 0.0, power: float = _POWER
) -> int | None:
    """About how many rows a certificate needs, if the true drop is `drop`.

    Args:
        discordant: Share of rows that exactly one of the two models gets right.
        margin: The drop that may not be exceeded.
        confidence: Of the one-sided bound.
        drop: The true drop to plan for; 0 means that the variant loses nothing.
        power: The chance that so many rows certify it.

    Returns:
        Rows, or None when no number is enough (the drop is the margin or more).

    Example:
        >>> rows_needed(0.02, 0.01), rows_needed(0.0, 0.01), rows_needed(0.02, 0.01, drop=0.01)
        (1237, 268, None)
    """
    if drop >= margin:
        return None
    z_bound, z_power = float(ndtri(confidence)), float(ndtri(power))
    least = z_bound * z_bound * (1.0 - margin) / margin  # no discordant row at all: the score bound itself
    variance = max(discordant - drop * drop, 0.0)
    planned = (z_bound + z_power) ** 2 * variance / (margin - drop) ** 2
    return math.ceil(max(least, planned))


def rows_needed_for_share(share: float, limit: float, confidence: float = 0.95, power: float = _POWER) -> int | None:
    """About how many rows bound a share below `limit`, if the true share is `share`.

    Example:
        >>> rows_needed_for_share(0.0, 0.05), rows_needed_for_share(0.05, 0.05)
        (59, None)
    """
    if share >= limit:
        return None
    least = math.log(1.0 - confidence) / math.log1p(-limit)
    spread = float(ndtri(confidence)) * math.sqrt(limit * (1 - limit)) + float(ndtri(power)) * math.sqrt(
        share * (1 - share)
    )
    planned = (spread / (limit - share)) ** 2 if share > 0.0 else 0.0
    return math.ceil(max(least, planned))


def plan_rows(discordant: float, margin: float, confidence: float, drop: float, rows: int) -> int | None:
    """Rows needed for an undecided test: as if nothing were lost, else with the drop as measured.

    A plan that names no more rows than there are already would be nonsense, hence the second try.

    Example:
        >>> plan_rows(discordant=0.02, margin=0.01, confidence=0.95, drop=0.0, rows=600)
        1237
    """
    for assumed in (min(drop, 0.0), max(drop, 0.0)):
        needed = rows_needed(discordant, margin, confidence, assumed)
        if needed is None or needed > rows:
            return needed
    return 2 * rows


def noninferior(
    challenger_correct: NDArray[np.bool_],
    champion_correct: NDArray[np.bool_],
    margin: float,
    confidence: float = 0.95,
) -> PairedVerdict:
    """Whether a challenger's accuracy is not lower than the champion's by more than the margin.

    Args:
        challenger_correct: Per row, whether the challenger is right, [rows] of bool.
        champion_correct: The same of the champion on the same rows.
        margin: The largest acceptable loss, a share of one.
        confidence: Of the one-sided bounds.

    Returns:
        `non_inferior` when the bound of the loss is within the margin, `inferior` when the data show
        that the loss is larger than the margin, else `undecided` with the rows that would be needed.

    Raises:
        InputError: The two do not have the same length.

    Example:
        >>> same = np.ones(600, bool)
        >>> verdict = noninferior(same, same, margin=0.01)
        >>> verdict.verdict, verdict.ties, round(verdict.bound, 4)
        ('non_inferior', 600, 0.0045)
    """
    _check_pair(challenger_correct, champion_correct)
    challenger, champion = np.asarray(challenger_correct, bool), np.asarray(champion_correct, bool)
    rows = int(challenger.size)
    wins, losses = int(np.sum(challenger & ~champion)), int(np.sum(champion & ~challenger))
    difference = (wins - losses) / rows if rows else 0.0
    bound = tango_upper(losses, wins, rows, confidence)
    least = -tango_upper(wins, losses, rows, confidence)  # the loss is at least this, at the same confidence
    verdict = decide(bound, least, margin)
    needed = None
    if verdict == "undecided":
        needed = plan_rows((wins + losses) / max(rows, 1), margin, confidence, -difference, rows)
    return PairedVerdict(
        wins=wins,
        losses=losses,
        ties=rows - wins - losses,
        rows=rows,
        difference=difference,
        bound=bound,
        margin=margin,
        confidence=confidence,
        verdict=verdict,
        rows_needed=needed,
    )


def noninferior_errors(
    challenger_errors: NDArray[np.floating],
    champion_errors: NDArray[np.floating],
    margin: float,
    confidence: float = 0.95,
) -> PairedVerdict:
    """Whether a challenger's mean absolute error is not higher by more than a share of the champion's.

    Args:
        challenger_errors: Absolute errors, [rows].
        champion_errors: Absolute errors on the same rows.
        margin: A share of the champion's mean error (0.02 = 2 %).
        confidence: Of the one-sided bounds.

    Returns:
        The verdict; `difference` is the share of error saved (positive: the challenger is better).

    Raises:
        InputError: The two do not have the same length.

    Example:
        >>> errors = np.linspace(0.1, 1.0, 100)
        >>> noninferior_errors(errors * 1.001, errors, margin=0.02).verdict
        'non_inferior'
    """
    _check_pair(challenger_errors, champion_errors)
    challenger, champion = np.asarray(challenger_errors, np.float64), np.asarray(champion_errors, np.float64)
    rows = int(challenger.size)
    wins, losses = int(np.sum(challenger < champion)), int(np.sum(challenger > champion))
    bound = paired_ratio_upper(champion, challenger, confidence)
    is_shown = rows >= 2 and _mean_upper((1.0 + margin) * champion - challenger, confidence) < 0.0
    verdict = decide(bound, math.inf if is_shown else -math.inf, margin)
    mean = float(champion.mean()) if rows else 0.0
    difference = (mean - float(challenger.mean())) / mean if mean > 0.0 else 0.0
    return PairedVerdict(
        wins=wins,
        losses=losses,
        ties=rows - wins - losses,
        rows=rows,
        difference=difference,
        bound=bound,
        margin=margin,
        confidence=confidence,
        verdict=verdict,
        rows_needed=plan_error_rows(champion, challenger, margin, confidence) if verdict == "undecided" else None,
    )


def plan_error_rows(
    old_errors: NDArray[np.floating], new_errors: NDArray[np.floating], margin: float, confidence: float
) -> int | None:
    """About how many rows certify a mean absolute error within `margin` of the base's.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> old = rng.random(50)
        >>> needed = plan_error_rows(old, old + 0.1 * rng.normal(size=50), 0.02, 0.95)
        >>> needed is not None and needed > 50
        True
    """
    rows = int(old_errors.size)
    if rows < 2 or float(np.mean(old_errors)) <= 0.0:
        return None
    difference = np.asarray(new_errors, np.float64) - (1.0 + margin) * np.asarray(old_errors, np.float64)
    spread = (float(ndtri(confidence)) + float(ndtri(_POWER))) * float(difference.std(ddof=1))
    for room in (margin * float(np.mean(old_errors)), -float(difference.mean())):
        if room > 0.0 and (needed := math.ceil((spread / room) ** 2)) > rows:
            return needed
    return None


def decide(bound: float, least: float, margin: float) -> Verdict:
    """The verdict from an upper and a lower bound of the loss.

    Example:
        >>> decide(0.004, -0.001, 0.01), decide(0.05, 0.02, 0.01), decide(0.02, -0.001, 0.01)
        ('non_inferior', 'inferior', 'undecided')
    """
    if bound <= margin:
        return "non_inferior"
    return "inferior" if least > margin else "undecided"


def _mean_upper(differences: NDArray[np.float64], confidence: float) -> float:
    rows = differences.size
    if rows < 2:
        return math.inf
    error = float(differences.std(ddof=1)) / math.sqrt(rows)
    return float(differences.mean()) + float(stdtrit(rows - 1, confidence)) * error


def _check_counts(count: int, other: int, rows: int, confidence: float) -> None:
    if count < 0 or other < 0 or count + other > rows:
        raise InputError(f"want counts between 0 and the rows, got {count} and {other} of {rows}")
    if not 0.5 <= confidence < 1.0:
        raise InputError(f"want a confidence between 0.5 and 1, got {confidence!r}")


def _check_pair(first: NDArray[np.generic], second: NDArray[np.generic]) -> None:
    if np.shape(first) != np.shape(second) or np.ndim(first) != 1:
        raise InputError(
            f"want one number per row of both models on the same rows, got {np.shape(first)} and {np.shape(second)}"
        )
