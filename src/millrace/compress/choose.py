"""Which certified variant is served: the fastest that pays, else the base."""

from __future__ import annotations

import math

from millrace.core.facts import VariantFacts
from millrace.core.spec import Compress
from millrace.formats.cpu import has_vnni

FASTER = 1.05  # a speed-up worth having, at some batch size …
NOT_SLOWER = 0.95  # … while no other batch size loses more than this
SMALLER = 1.5  # or a file that much smaller …
NOT_MUCH_SLOWER = 0.9  # … at a speed that hardly changes
_ALIKE = 1.02  # speeds this close are the same: the smaller file wins


def choose(variants: list[VariantFacts], options: Compress) -> tuple[str, str]:
    """The variant to serve, and why, in one sentence.

    Args:
        variants: The base first, then the candidates in the order of the guard.
        options: The spec's `compress` section.

    Returns:
        Name and reason; the base's name when no variant is certified, or none of these pays.

    Example:
        >>> base = VariantFacts(name="fp32", size_bytes=100, size_ratio=1.0, snr_db=None, guarantee=None)
        >>> choose([base], Compress(variants="none"))
        ('fp32', 'no variant was made: compress.variants is none')
    """
    base, candidates = variants[0].name, variants[1:]
    if options.variants == "none":
        return base, "no variant was made: compress.variants is none"
    if not candidates:
        return base, "no recipe applies to this graph"
    certified = [variant for variant in candidates if variant.guarantee and variant.guarantee.status == "certified"]
    if not certified:
        return base, _why_none_certified(candidates)
    usable = [
        variant
        for variant in certified
        if (options.allow_replacement or not variant.is_replacement) and (not variant.needs_vnni or has_vnni())
    ]
    paying = [variant for variant in usable if pays(variant)]
    if not paying:
        closest = max(certified, key=lambda variant: (mean_speedup(variant), variant.size_ratio))
        return base, f"no variant pays: the best certified one, {closest.name}, is {_figures(closest)}"
    fastest = max(mean_speedup(variant) for variant in paying)
    alike = [variant for variant in paying if mean_speedup(variant) * _ALIKE >= fastest]
    best = min(alike, key=lambda variant: (variant.needs_vnni, variant.size_bytes, variant.name))
    return best.name, f"{best.name} is the fastest certified variant that pays: {_figures(best)}"


def pays(variant: VariantFacts) -> bool:
    """Whether a variant is worth serving: faster somewhere and slower nowhere, or much smaller.

    Example:
        >>> pays(VariantFacts(name="same", size_bytes=1, size_ratio=1.0, snr_db=None, guarantee=None))
        False
    """
    slowest = min((entry.speedup for entry in variant.latency), default=1.0)
    is_faster = any(entry.speedup >= FASTER and entry.low > 1.0 for entry in variant.latency)
    return (is_faster and slowest >= NOT_SLOWER) or (variant.size_ratio >= SMALLER and slowest >= NOT_MUCH_SLOWER)


def mean_speedup(variant: VariantFacts) -> float:
    """The geometric mean of the speed-ups over the batch sizes; 1 without any.

    Example:
        >>> mean_speedup(VariantFacts(name="x", size_bytes=1, size_ratio=1.0, snr_db=None, guarantee=None))
        1.0
    """
    if not variant.latency:
        return 1.0
    return math.exp(math.fsum(math.log(entry.speedup) for entry in variant.latency) / len(variant.latency))


def describe(variant: VariantFacts, depends_on_batch: bool = False) -> str:
    """What a reader of the table must not overlook: where it is slower, that it is a replacement."""
    notes = [
        f"slower at batch {entry.batch_size} ({entry.speedup:.2f}x)" for entry in variant.latency if entry.high < 1.0
    ]
    if variant.is_replacement:
        notes.append("a replacement: another model")
    if depends_on_batch:
        notes.append("a row's answer depends a little on the rows beside it in a batch")
    if variant.needs_vnni:
        notes.append("only for processors with VNNI")
    return "; ".join(notes)


def _why_none_certified(candidates: list[VariantFacts]) -> str:
    first = candidates[0].guarantee
    if first is None:
        return "no variant was tested"
    if first.status == "undecided":
        needed = f"about {first.rows_needed} rows needed" if first.rows_needed else "more rows needed"
        return f"no variant is certified: not enough test rows ({first.rows} there, {needed})"
    return f"no variant is certified: {candidates[0].name} {first.explanation}"


def _figures(variant: VariantFacts) -> str:
    speeds = ", ".join(f"{entry.speedup:.2f}x at batch {entry.batch_size}" for entry in variant.latency)
    return f"{speeds or 'not timed'}, {variant.size_ratio:.1f}x smaller"
