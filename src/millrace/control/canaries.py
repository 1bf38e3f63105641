"""The controller of rollouts: telemetry becomes evidence, evidence becomes a step, a promotion or a roll-back."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import msgspec
import numpy as np

from millrace.core.types import Rollout, Struct
from millrace.serve.telemetry import TelemetryFrame
from millrace.stats.canary import FINAL, FIRST, LEAST_REQUESTS, Arm, Evidence, judge, observe, restored
from millrace.stats.latency import Threshold, threshold_of

PRINCIPAL = "system:rollout"
LEARNT_REQUESTS = 100  # of the baseline: what slow means is known after so many
SAVE_S = 2.0  # what was gathered since is lost when the loop dies


class Facts(Struct, frozen=True, kw_only=True):
    """What a decision is made of. `number`: what the endpoint is to serve now, its alias resolved."""

    rollout: Rollout
    number: int
    evidence: Evidence = Evidence()
    is_loaded: bool = False
    error: str = ""
    step_s: float = 60.0


class Action(Struct, frozen=True, kw_only=True):
    """What to do: `run` (it is loaded), `step` (more requests), `promote`, `abort`, or `settle` (it is done)."""

    kind: Literal["run", "step", "promote", "abort", "settle"]
    reason: str = ""


def decide(now: float, facts: Facts) -> Action | None:
    """What becomes of a rollout; None: it goes on.

    Args:
        now: In seconds since 1970.
        facts: All that counts.

    Example:
        >>> rollout = Rollout(id="r", number=2, label="2", base=1)
        >>> decide(0.0, Facts(rollout=rollout, number=1, error="no such file"))
        Action(kind='abort', reason='it cannot be served: no such file')
    """
    rollout = facts.rollout
    if not rollout.is_active:
        return None
    if facts.number == rollout.number != rollout.base:
        return Action(kind="settle", reason="the alias that the endpoint follows was moved to it")
    if facts.number != rollout.base:
        reason = f"the endpoint serves v{facts.number} now, not v{rollout.base}, with which it was compared"
        return Action(kind="abort", reason=reason)
    if facts.error:
        return Action(kind="abort", reason=f"it cannot be served: {facts.error}")
    if rollout.state == "starting":
        return Action(kind="run") if facts.is_loaded else None
    if rollout.is_shadow:
        return None
    is_last = rollout.step == len(rollout.steps) - 1
    verdict = judge(facts.evidence, FINAL if is_last else FIRST)
    if verdict.decision == "roll back":
        return Action(kind="abort", reason=verdict.reason)
    if verdict.decision == "go on" or now - rollout.stepped_at < facts.step_s:
        return None
    if not is_last:
        return Action(kind="step", reason=verdict.reason)
    return None if rollout.is_held else Action(kind="promote", reason=verdict.reason)


class Canary:
    """Gathers the evidence of one rollout. Not thread-safe.

    Args:
        rollout: With the facts that an earlier leader has stored.
        chance: Picks what is compared.
    """

    def __init__(self, rollout: Rollout, chance: np.random.Generator | None = None) -> None:
        self.id, self.label = rollout.id, rollout.label
        self.evidence = restored(rollout.facts.get("evidence", {}))
        self.is_loaded = False
        self.error = ""  # why the candidate cannot be served
        self._base = str(rollout.base)
        self._chance = chance or np.random.default_rng()
        stored = rollout.facts.get("threshold")
        self._threshold = msgspec.convert(stored, Threshold) if stored else None
        self._learnt: Counter[int] = Counter()
        self._mirrored: dict[str, float] = {**rollout.facts.get("mirrored", {})}
        self._largest: dict[int, float] = {}  # by process
        self._counters: dict[str, Counter[str]] = {self._base: Counter(), self.label: Counter()}
        self._bins: dict[str, Counter[int]] = {self._base: Counter(), self.label: Counter()}
        self._looked_at = self._saved_at = 0.0
        self._is_saved = True

    def take(self, frame: TelemetryFrame, process: int = 0) -> None:
        """Add a frame of a process; one of another version says nothing about the two."""
        counters = self._counters.get(frame.version)
        if counters is None:
            return
        for name, value in frame.counters.items():
            if name in ("answered", "failed"):
                counters[name] += int(value)
            elif name == "mirrored_max_difference":  # of a process: its increments add up to the largest
                self._largest[process] = self._largest.get(process, 0.0) + value
                self._mirrored[name] = max(self._mirrored.get(name, 0.0), self._largest[process])
            elif name.startswith("mirrored_"):
                self._mirrored[name] = self._mirrored.get(name, 0.0) + value
                self._is_saved = self._is_saved and not value
        self._bins[frame.version].update(frame.latencies)
        if self._threshold is None and frame.version == self._base:
            self._learnt.update(frame.latencies)

    def forget(self) -> None:
        """What was counted of a window that is not over: the candidate was not served yet."""
        for counted in (*self._counters.values(), *self._bins.values()):
            counted.clear()

    def look(self, now_s: float, look_s: float) -> None:
        """Close the window if it is long enough, which what it says has no influence on."""
        base, candidate = self._arm(self._base), self._arm(self.label)
        if now_s - self._looked_at < look_s or min(base.requests, candidate.requests) < LEAST_REQUESTS:
            return
        self._looked_at = now_s
        self.evidence = observe(self.evidence, base, candidate, self._chance)
        self.forget()
        self._is_saved = False
        if self._threshold is None and self._learnt.total() >= LEARNT_REQUESTS:
            self._threshold = threshold_of(self._learnt)

    def _arm(self, version: str) -> Arm:
        counters, bins = self._counters[version], self._bins[version]
        requests = counters["answered"] + counters["failed"]
        if self._threshold is None:
            return Arm(requests=requests, errors=counters["failed"])
        slow = self._threshold.count(bins, is_candidate=version == self.label)
        return Arm(requests=requests, errors=counters["failed"], timed=bins.total(), slow=slow)

    def step(self) -> None:
        """The weights change."""
        self.evidence = self.evidence.at_next_step()
        self._is_saved = False

    def is_to_save(self, now_s: float) -> bool:
        """Whether there is something new to store, and it is time to."""
        return not self._is_saved and now_s - self._saved_at >= SAVE_S

    def facts(self, now_s: float) -> dict[str, Any]:
        """What to store: an heir goes on from there."""
        self._saved_at, self._is_saved = now_s, True
        found: dict[str, Any] = {"evidence": msgspec.to_builtins(self.evidence), "against": self.evidence.against}
        if self._threshold is not None:
            found["threshold"] = msgspec.to_builtins(self._threshold)
            found["slow_above_s"] = self._threshold.seconds
        if self._mirrored:
            found["mirrored"] = dict(self._mirrored)
        return found
