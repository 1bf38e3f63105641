"""Load tests: one endpoint, or two that are measured by turns, and what came of it."""

from __future__ import annotations

import asyncio
import math
import signal
from collections.abc import Callable
from contextlib import suppress

import uvloop

from millrace.core.errors import InputError
from millrace.core.types import Struct
from millrace.loadtest.client import Client, Load, Measured, Phase, Target
from millrace.stats.hdr import ratio_interval

QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999, 1.0)
COMPARED = (0.5, 0.9, 0.99)
_SLICES = 40
_TURNS = 20  # of each of two endpoints


class Verdict(Struct, frozen=True, kw_only=True):
    """Whether the wanted percentile was kept. What failed counts as slower than everything."""

    wanted_ms: float
    p99_ms: float | None  # None: more than 1 % failed
    is_kept: bool


class Row(Struct, frozen=True, kw_only=True):
    """What an endpoint did; latencies in milliseconds, of what was answered with 2xx."""

    endpoint: str
    seconds: float
    requests: int
    answered_per_s: float
    latency_ms: dict[str, float | None]
    mean_ms: float | None
    statuses: dict[str, int]
    errors: dict[str, int]
    unsent: int
    failures: int
    send_lag_p99_ms: float | None  # open loop: how long after they were due requests were sent
    generator_cpu: float  # share of one core that the load itself took
    verdict: Verdict | None = None


class Ratio(Struct, frozen=True, kw_only=True):
    """How many times slower the second is at a percentile; `low` and `high`: 95 % interval."""

    percentile: str
    ratio: float | None
    low: float | None
    high: float | None


class Report(Struct, frozen=True, kw_only=True):
    """A load test. `text`: what was done, in words."""

    text: str
    rows: list[Row]
    ratios: list[Ratio] = []
    is_interrupted: bool = False


def run_load(
    targets: list[Target], load: Load, duration_s: float, warmup_s: float, on_slice: Callable[[Measured], None]
) -> tuple[list[Measured], bool]:
    """Send load, and measure.

    Two targets are measured by turns (A B B A …), each for `duration_s` in all: what changes on the machine
    meanwhile meets both alike.

    Args:
        targets: One or two.
        load: How much, on each.
        duration_s: How long, each.
        warmup_s: How long before that, unmeasured.
        on_slice: Called with what the present stretch has measured so far.

    Returns:
        What was measured of each, and whether it was interrupted (Ctrl-C ends it, with what there is).

    Raises:
        InputError: The load or its time is none.
    """
    if load.rate is not None and not 0 < load.rate <= 1e6:
        raise InputError(f"--rate: want requests a second, above 0 and up to a million, got {load.rate:g}")
    if not 1 <= load.concurrency <= 10_000:
        raise InputError(f"--concurrency: want 1 to 10000, got {load.concurrency}")
    if not (duration_s > 0 and math.isfinite(duration_s)) or warmup_s < 0:
        raise InputError(f"--duration: want a time above 0, got {duration_s:g} s")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_drive(targets, load, duration_s, warmup_s, on_slice))


async def _drive(
    targets: list[Target], load: Load, duration_s: float, warmup_s: float, on_slice: Callable[[Measured], None]
) -> tuple[list[Measured], bool]:
    stop = asyncio.Event()
    with suppress(ValueError, RuntimeError):  # only the main thread takes signals
        for one in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(one, stop.set)
    clients = [Client(target, load) for target in targets]
    results = [Measured(name=target.name) for target in targets]
    try:
        if warmup_s:
            for client in clients:
                await Phase(client, warmup_s, warmup_s, lambda _: None).run(stop)
        if len(clients) == 1:
            results[0].add(await Phase(clients[0], duration_s, duration_s / _SLICES, on_slice).run(stop))
        else:
            part = duration_s / _TURNS
            for turn in range(_TURNS):
                for place in (0, 1) if turn % 2 == 0 else (1, 0):
                    if not stop.is_set():
                        results[place].add(await Phase(clients[place], part, part * 2, on_slice).run(stop))
    finally:
        for client in clients:
            client.close()
    return results, stop.is_set()


def summarise(results: list[Measured], load: Load, slo_p99_ms: float | None, *, is_interrupted: bool = False) -> Report:
    """What is told of a load test.

    Args:
        results: Of one or two endpoints.
        load: What was sent.
        slo_p99_ms: What the 99th percentile may be, failures included.
        is_interrupted: Whether it ended early.
    """
    ratios: list[Ratio] = []
    if len(results) == 2:
        turns = min(len(one.slices) for one in results)
        for share in COMPARED if turns else ():
            found = ratio_interval(results[0].slices[:turns], results[1].slices[:turns], share)
            ratio, low, high = map(_finite, found)
            ratios.append(Ratio(percentile=_name(share), ratio=ratio, low=low, high=high))
    how = (
        f"{load.rate:g} requests/s, {'Poisson' if load.is_poisson else 'equal gaps'}, latency from when each was due"
        if load.rate
        else f"{load.concurrency} clients, each sends when it is answered"
    )
    return Report(
        text=how, rows=[_row(one, load, slo_p99_ms) for one in results], ratios=ratios, is_interrupted=is_interrupted
    )  # fmt: skip


def _row(measured: Measured, load: Load, slo_p99_ms: float | None) -> Row:
    histogram = measured.histogram
    verdict = None
    if slo_p99_ms is not None:
        p99 = histogram.quantile(0.99, measured.failures) * 1e3
        verdict = Verdict(wanted_ms=slo_p99_ms, p99_ms=_finite(p99), is_kept=p99 <= slo_p99_ms)
    return Row(
        endpoint=measured.name, seconds=measured.seconds,
        requests=measured.statuses.total() + measured.errors.total() + measured.unsent,
        answered_per_s=measured.answered / max(measured.seconds, 1e-9),
        latency_ms={_name(share): _finite(histogram.quantile(share) * 1e3) for share in QUANTILES},
        mean_ms=_finite(histogram.sum / histogram.total * 1e3) if histogram.total else None,
        statuses={str(status): count for status, count in sorted(measured.statuses.items())},
        errors=dict(measured.errors), unsent=measured.unsent, failures=measured.failures,
        send_lag_p99_ms=_finite(measured.lag.quantile(0.99) * 1e3) if load.rate else None,
        generator_cpu=measured.cpu_s / max(measured.seconds, 1e-9), verdict=verdict,
    )  # fmt: skip


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _name(share: float) -> str:
    """A percentile's name.

    Example:
        >>> [_name(share) for share in (0.5, 0.999, 1.0)]
        ['p50', 'p99.9', 'max']
    """
    return "max" if share == 1.0 else f"p{share * 100:g}"
