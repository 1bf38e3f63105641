"""Deployed endpoints: what is wanted is written by people, what is served is made to match by the loop."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec

from millrace.control.authorisation import acting_as
from millrace.control.callers import Callers
from millrace.control.canaries import PRINCIPAL, Action, Canary, Facts, decide
from millrace.control.dispatch import Dispatcher, handles
from millrace.control.endpoints import calibrations_of, captures_of, sections_of, wanted_number
from millrace.control.models import open_version, resolve_model
from millrace.control.seen import seen
from millrace.control.services import Services
from millrace.control.traffic import Traffic, added
from millrace.control.watching import Watch
from millrace.core.errors import (
    ApprovalNeededError,
    ConflictError,
    InputError,
    MillraceError,
    NotFoundError,
    UntrustedError,
)
from millrace.core.operations import live as ops
from millrace.core.principals import Principal
from millrace.core.refs import Ref
from millrace.core.types import Endpoint, Lease, ModelVersion, Rollout
from millrace.formats.bundle import open_bundle
from millrace.serve.access import Denied
from millrace.serve.hosting import HostConfig, HostedModel, HostProcess, ModelState
from millrace.serve.listen import bind
from millrace.serve.telemetry import TelemetryFrame
from millrace.store.leases import check_fence

WANTED, STARTING, READY, FAILED, STOPPED = "wanted", "starting", "ready", "failed", "stopped"
BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
STEADY_S = 30.0
PORT_WAIT_S = 15.0  # longer than a host drains
RETRY_S = 5.0  # between looks at a version that cannot be served
CRASHES_OF_A_LOOP = 5
SHARED = ""  # the key of the process that hosts all endpoints but isolated ones
log = logging.getLogger(__name__)


@handles(ops.DEPLOY_ENDPOINT)
def deploy_endpoint(services: Services, body: ops.DeployRequest) -> Endpoint:
    """Write what is wanted; a server's loop serves it within a second."""
    ref = Ref.parse(body.model, kind="model")
    Ref.parse(body.endpoint, kind="endpoint")
    version = resolve_model(services, body.model)
    if version.format != "bundle":
        raise InputError(
            f"{version.name} v{version.number} is kept as it was logged and is never loaded",
            hint="register an ONNX file: `millrace models register model.onnx`",
        )
    variant = body.variant or version.chosen_variant
    bundle = open_bundle(
        open_version(services, version), signature=None, verifier=None, expected_digest=version.bundle.digest
    )
    bundle.model_path(variant)
    alias = ref.at if ref.number is None else None
    with services.records.transaction() as transaction:
        old = transaction.get(Endpoint, body.endpoint)
        if old is not None and not old.is_managed and seen(services, old).state == READY:
            raise ConflictError(
                f"the endpoint {body.endpoint!r} is served by process {old.pid}",
                hint="stop that `millrace serve`, or choose another name",
            )
        ended = old.rollout if old is not None else None
        if ended is not None and ended.is_active:
            ended = msgspec.structs.replace(
                ended, state="aborted", reason="the endpoint was deployed anew", ended_at=services.clock.now()
            )
        return transaction.put(
            Endpoint(
                id=body.endpoint, project=version.project, name=body.endpoint, model=version.name,
                created_at=old.created_at if old else 0.0,
                alias=alias or (None if ref.number is not None else "champion"), number=version.number,
                variant=body.variant or "", state=WANTED, is_managed=True, is_isolated=body.isolate,
                threads=body.threads, slo_p99_ms=body.slo_p99_ms,
                facts=old.facts if old else {}, url=old.url if old and old.is_managed else None,
                rollout=ended,
            )
        )  # fmt: skip


@handles(ops.DELETE_ENDPOINT)
def delete_endpoint(services: Services, body: ops.NameRequest) -> Endpoint:
    """Forget it; the loop stops serving it."""
    with services.records.transaction() as transaction:
        endpoint = transaction.get(Endpoint, body.name)
        if endpoint is None:
            raise NotFoundError(f"there is no endpoint {body.name!r} in {services.home}", hint="`millrace endpoints`")
        if not endpoint.is_managed and seen(services, endpoint).state == READY:
            raise ConflictError(f"the endpoint {body.name!r} is served by process {endpoint.pid}", hint="stop that one")
        transaction.delete(Endpoint, body.name)
    return endpoint


class Host:
    """A serving process with the endpoints that it hosts, restarted when it dies."""

    def __init__(self, key: str, port: int) -> None:
        self.key, self.port = key, port
        self.process: HostProcess | None = None
        self.applied: dict[str, list[HostedModel]] = {}
        self.began = 0.0
        self.crashes = 0
        self.due_at = 0.0
        self.waits_for_port_until = 0.0

    @property
    def is_in_crash_loop(self) -> bool:
        """It died so often, so soon, that something is wrong with what it serves."""
        return self.crashes >= CRASHES_OF_A_LOOP

    def note_death(self) -> None:
        """Plan the restart: later each time, as long as it keeps dying early."""
        now = time.monotonic()
        self.crashes = 1 if now - self.began > STEADY_S else self.crashes + 1
        self.due_at = now + BACKOFF_S[min(self.crashes, len(BACKOFF_S) - 1)]
        self.process, self.applied = None, {}

    def waits_for_port(self, place: HostConfig) -> bool:
        """Whether the port is still held by the process before, which drains; not for ever."""
        if self.port == 0:
            return False
        try:
            bind(place.host, self.port, is_guarded=place.wants_token).close()
        except MillraceError:
            now = time.monotonic()
            self.waits_for_port_until = self.waits_for_port_until or now + PORT_WAIT_S
            if now < self.waits_for_port_until:
                self.due_at = now + 2 * BACKOFF_S[1]
                return True
        self.waits_for_port_until = 0.0
        return False


class Wish(NamedTuple):
    """What an endpoint asks for, its alias resolved: equal wishes are served by equal models."""

    model: str
    number: int
    variant: str
    threads: int
    slo_p99_ms: float | None


class Reconciler:
    """Makes what is served match what is wanted. Used by the leader's loop only; not thread-safe.

    Args:
        services: The home.
        place: Where processes listen, and whether they want tokens. Its port is the shared process's; 0 takes
            that of the server before, or a free one, and keeps it. Clients use the first of the allowed hosts.
    """

    def __init__(self, services: Services, place: HostConfig | None = None) -> None:
        self._services, self._place = services, place or HostConfig()
        self._callers = Callers(services)
        self._denied: queue.Queue[Denied] = queue.Queue()
        self._lease: Lease | None = None
        self._hosts: dict[str, Host] = {SHARED: Host(SHARED, self._place.port)}
        self._watches: dict[str, Watch] = {}
        self._traffic = Traffic(self._count)
        self._frames: queue.Queue[tuple[str, TelemetryFrame]] = queue.Queue()
        self._states: queue.Queue[tuple[str, ModelState]] = queue.Queue()
        self._models: dict[str, tuple[Wish, ModelVersion, HostedModel]] = {}
        self._refused: dict[str, tuple[Wish, float]] = {}  # what cannot be served, and when to try it again
        self._proofs: dict[str, bytes] = {}  # signatures of served versions, by their id
        self._canaries: dict[str, Canary] = {}  # of the rollouts that are on
        self._candidates: dict[str, tuple[str, ModelVersion, HostedModel]] = {}  # with the id of their rollout
        self._rollouts = Dispatcher(services)
        self._mended: set[str] = set()  # these want again what is served

    def __call__(self, lease: Lease) -> None:
        """One round."""
        endpoints = [one for one in self._services.records.find(Endpoint) if one.is_managed]
        if self._lease is None or self._lease.token != lease.token:
            self._lease = lease
            self._take_over(endpoints)
        self._forget_all_but({endpoint.name for endpoint in endpoints})
        wanted: dict[str, dict[str, list[HostedModel]]] = {SHARED: {}}
        for endpoint in endpoints:
            model = self._model_of(endpoint)
            if model is not None:
                key = endpoint.name if endpoint.is_isolated else SHARED
                wanted.setdefault(key, {})[endpoint.name] = self._revisions_of(endpoint, model)
        fresh = {endpoint.name for endpoint in endpoints if endpoint.state in (WANTED, STOPPED)} - self._refused.keys()
        fresh |= self._mended
        self._mended = set()
        for key in {*self._hosts, *wanted}:
            self._keep(self._hosts.setdefault(key, Host(key, 0)), wanted.get(key, {}), fresh)
        if self._place.wants_token:
            self._callers.tell([host.process for host in self._hosts.values() if host.process is not None])
        self._drain(self._denied, self._callers.record)
        self._drain(self._states, self._take_state)
        self._drain(self._frames, self._take_frame)
        for endpoint in endpoints:
            if endpoint.name in self._canaries:
                self._judge(endpoint)
        self._traffic.tick()
        for name, watch in self._watches.items():
            self._log(name, watch.tick())

    def close(self) -> None:
        """Drain and stop every serving process, and say so."""
        pids = self._stop_all()
        if self._lease is None or not pids:
            return
        self._drain(self._frames, self._take_frame)
        self._traffic.tick(is_last=True)
        for endpoint in self._services.records.find(Endpoint):
            if endpoint.is_managed and endpoint.pid in pids:
                self._write(endpoint.name, state=STOPPED, pid=None, text="the server was stopped")

    def step_down(self) -> None:
        """Drain and stop every serving process: another server's endpoints take their place."""
        self._stop_all()
        self._lease = None

    def _stop_all(self) -> set[int]:
        processes = [host.process for host in self._hosts.values() if host.process is not None]
        for process in processes:  # all at once: each drains
            process.terminate()
        for process in processes:
            process.stop()
        for host in self._hosts.values():
            host.process, host.applied = None, {}
        return {process.pid for process in processes}

    def _take_over(self, endpoints: list[Endpoint]) -> None:
        """What another leader served is not served any more; clients know its port, so it is taken again."""
        own = {host.process.pid for host in self._hosts.values() if host.process is not None}
        for endpoint in endpoints:
            if endpoint.pid in own:
                continue
            host = self._hosts.setdefault(endpoint.name, Host(endpoint.name, 0)) if endpoint.is_isolated else (
                self._hosts[SHARED]
            )  # fmt: skip
            if endpoint.url is not None and host.port == 0:
                host.port = urlsplit(endpoint.url).port or 0
            if endpoint.state == READY:
                text = "the process that served it is gone; it is started again"
                self._write(endpoint.name, state=STARTING, text=text, pid=None)

    def _forget_all_but(self, names: set[str]) -> None:
        known: tuple[dict[str, Any], ...] = (
            self._models, self._watches, self._refused, self._canaries, self._candidates
        )  # fmt: skip
        for one in known:
            for name in one.keys() - names:
                del one[name]

    # ------------------------------------------------------------------ wanted

    def _model_of(self, endpoint: Endpoint) -> HostedModel | None:
        """What an endpoint is to serve now. What cannot be served is this endpoint's trouble alone.

        A version that is corrupt does not take the place of the one before. One that was deleted, or whose key
        counts no more, is served no longer.
        """
        wish = self._wish_of(endpoint)
        known = self._models.get(endpoint.name)
        if known is not None and not (self._is_registered(known[1]) and self._is_trusted(known[1])):
            del self._models[endpoint.name]
            known = None
        if known is not None and known[0] == wish:
            if self._refused.pop(endpoint.name, None) is not None:
                self._mended.add(endpoint.name)
            return known[2]
        refused = self._refused.get(endpoint.name)
        if refused is None or refused[0] != wish or time.monotonic() > refused[1] or endpoint.state == WANTED:
            try:
                known = self._models[endpoint.name] = (wish, *self._open(endpoint, wish))
            except MillraceError as error:
                self._refused[endpoint.name] = (wish, time.monotonic() + RETRY_S)
                self._say_refused(endpoint, error, known[1] if known is not None else None)
            else:
                self._refused.pop(endpoint.name, None)
        return known[2] if known is not None else None

    def _wish_of(self, endpoint: Endpoint) -> Wish:
        """With an alias, whatever that points to."""
        number = wanted_number(self._services, endpoint)
        return Wish(endpoint.model, number, endpoint.variant, endpoint.threads, endpoint.slo_p99_ms)

    def _is_registered(self, version: ModelVersion) -> bool:
        return self._services.records.get(ModelVersion, version.id) is not None

    def _is_trusted(self, version: ModelVersion) -> bool:
        """Asked in every round: a key may have been revoked, or its time be over."""
        proof = self._proofs.get(version.id)
        if proof is None and version.signature is not None:
            proof = self._proofs[version.id] = self._services.blobs.read(version.signature.digest)
        try:
            self._services.signer.verify(version.bundle.digest, proof or b"")
        except UntrustedError:
            return False
        return True

    def _open(self, endpoint: Endpoint, wish: Wish) -> tuple[ModelVersion, HostedModel]:
        version, model = self._hosted(endpoint, wish)
        _, monitor = sections_of(self._services.home)
        self._watches[endpoint.name] = Watch(
            self._services, endpoint.name, version, model.reference or {}, monitor
        )  # fmt: skip
        return version, model

    def _hosted(self, endpoint: Endpoint, wish: Wish) -> tuple[ModelVersion, HostedModel]:
        version = resolve_model(self._services, f"{wish.model}@{wish.number}")
        if version.project != endpoint.project:  # its own was renamed or deleted, and somebody has taken the name
            raise ConflictError(
                f"the model {version.name!r} is of the project {version.project!r}, the endpoint {endpoint.name!r} "
                f"of {endpoint.project!r}",
                hint="deploy a model of its project to it, or delete it",
            )
        folder = open_version(self._services, version)
        bundle = open_bundle(folder, signature=None, verifier=None, expected_digest=version.bundle.digest)
        serve, _ = sections_of(self._services.home)
        model = HostedModel(
            endpoint=endpoint.name, project=version.project, bundle_dir=str(folder), digest=version.bundle.digest,
            version=str(wish.number), variant=wish.variant or version.chosen_variant, asked_variant=wish.variant,
            threads=wish.threads,
            max_batch=serve.max_batch, queue=serve.queue, queue_s=serve.queue_s, reference=bundle.reference or None,
            slo_p99_ms=serve.slo_p99_ms if wish.slo_p99_ms is None else wish.slo_p99_ms,
            calibrations=str(calibrations_of(self._services.home)),
            cache=serve.cache, capture=serve.capture, captures=str(captures_of(self._services.home)),
        )  # fmt: skip
        return version, model

    def _say_refused(self, endpoint: Endpoint, error: MillraceError, served: ModelVersion | None) -> None:
        if served is None:
            self._write(endpoint.name, state=FAILED, text=error.message, url=None, pid=None)
        else:
            text = f"{error.message}; {served.name} v{served.number} is still served"
            self._write(endpoint.name, state=FAILED, text=text)

    # ------------------------------------------------------------------ rollouts

    def _revisions_of(self, endpoint: Endpoint, base: HostedModel) -> list[HostedModel]:
        """The candidate, if it can be served, before the baseline: a growing share then takes no key from it."""
        rollout = endpoint.rollout
        if rollout is None or not rollout.is_active:
            self._canaries.pop(endpoint.name, None)
            self._candidates.pop(endpoint.name, None)
            return [base]
        canary = self._canaries.get(endpoint.name)
        if canary is None or canary.id != rollout.id:
            canary = self._canaries[endpoint.name] = Canary(rollout)
        if canary.error or base.version != str(rollout.base):
            return [base]
        try:
            candidate = self._candidate_of(endpoint, rollout)
        except MillraceError as error:
            canary.error = error.message
            return [base]
        candidate = msgspec.structs.replace(candidate, weight=rollout.weight, is_shadow=rollout.is_shadow)
        return [candidate, msgspec.structs.replace(base, weight=100.0 - rollout.weight)]

    def _candidate_of(self, endpoint: Endpoint, rollout: Rollout) -> HostedModel:
        known = self._candidates.get(endpoint.name)
        if known is None or known[0] != rollout.id:
            wish = Wish(endpoint.model, rollout.number, rollout.variant, endpoint.threads, endpoint.slo_p99_ms)
            version, model = self._hosted(endpoint, wish)
            model = msgspec.structs.replace(model, version=rollout.label)
            known = self._candidates[endpoint.name] = (rollout.id, version, model)
        if not (self._is_registered(known[1]) and self._is_trusted(known[1])):
            raise UntrustedError(f"{endpoint.model} v{rollout.number} was deleted, or its key counts no more")
        return known[2]

    def _judge(self, endpoint: Endpoint) -> None:
        """Look at the evidence of a rollout, and do what it says."""
        canary, rollout = self._canaries[endpoint.name], endpoint.rollout
        if rollout is None or rollout.id != canary.id:
            return
        now_s, now = time.monotonic(), self._services.clock.now()
        if rollout.state == "running":
            canary.look(now_s, self._services.setting("rollout_look_s"))
        else:
            canary.forget()
        facts = Facts(
            rollout=rollout, number=wanted_number(self._services, endpoint), evidence=canary.evidence,
            is_loaded=canary.is_loaded, error=canary.error, step_s=self._services.setting("rollout_step_s"),
        )  # fmt: skip
        action = decide(now, facts)
        if action is not None:
            log.info("the rollout of %s: %s %s", endpoint.name, action.kind, action.reason)
            self._act(endpoint.name, canary, rollout, action)
        elif canary.is_to_save(now_s):
            self._write_rollout(endpoint.name, rollout.id, facts=canary.facts(now_s))

    def _act(self, name: str, canary: Canary, rollout: Rollout, action: Action) -> None:
        """What ends a rollout goes through the door that people use, as a principal of its own."""
        now_s, now = time.monotonic(), self._services.clock.now()
        if action.kind == "run":
            self._write_rollout(name, rollout.id, state="running", stepped_at=now)
        elif action.kind == "step":
            canary.step()
            facts = canary.facts(now_s)
            self._write_rollout(name, rollout.id, step=rollout.step + 1, stepped_at=now, facts=facts)
        elif action.kind == "settle":
            self._write_rollout(name, rollout.id, state="promoted", reason=action.reason, ended_at=now)
        else:
            self._write_rollout(name, rollout.id, facts=canary.facts(now_s))
            body = {"name": name, "rollout": rollout.id, "reason": action.reason}
            try:
                with acting_as(Principal(id=PRINCIPAL)):
                    self._rollouts.call(f"endpoint.{action.kind}", body)
            except ApprovalNeededError as error:
                self._write_rollout(name, rollout.id, is_held=True, reason=f"{error.message}; {error.hint}")
            except MillraceError as error:  # somebody was quicker, or it is tried again
                log.warning("the rollout of %s: %s", name, error.message)

    def _write_rollout(self, name: str, rollout: str, **changes: Any) -> None:
        """Change a rollout that is still on."""
        assert self._lease is not None
        with self._services.records.transaction() as transaction:
            check_fence(transaction, self._lease)
            endpoint = transaction.get(Endpoint, name)
            if endpoint is None or endpoint.rollout is None or endpoint.rollout.id != rollout:
                return
            if endpoint.rollout.is_active:
                changed = msgspec.structs.replace(endpoint.rollout, **changes)
                transaction.put(msgspec.structs.replace(endpoint, rollout=changed), expect_version=endpoint.version)

    # ------------------------------------------------------------------ served

    def _keep(self, host: Host, wanted: dict[str, list[HostedModel]], fresh: set[str]) -> None:
        """Start, restart, feed or stop one process. `fresh`: endpoints that were deployed since the last round."""
        process = host.process
        if process is not None and process.exit_code is not None:
            log.warning("the serving process %s ended with %s", host.key or "of all endpoints", process.exit_code)
            process.wait()
            host.note_death()
            for name in wanted:
                self._say_died(host, name)
            if self._blame_candidates(wanted):
                return  # the next round starts it without them
            process = None
        if not wanted:
            if process is not None:
                process.stop()
                host.process, host.applied = None, {}
            return
        if process is None:
            is_due = time.monotonic() >= host.due_at or not fresh.isdisjoint(wanted)  # a new deployment may mend it
            if not is_due or host.waits_for_port(self._place):
                return
            process = self._start(host, wanted)
        if process is not None and (wanted != host.applied or fresh & {*wanted}):
            for name in fresh & {*wanted}:
                self._write(name, state=STARTING, text="")
            process.apply([model for revisions in wanted.values() for model in revisions])
            host.applied = dict(wanted)

    def _blame_candidates(self, wanted: dict[str, list[HostedModel]]) -> bool:
        """A process that dies may have died of a candidate: it does not get a second one. Whether there was one."""
        tried = [name for name, revisions in wanted.items() if len(revisions) > 1]
        for name in tried:
            self._canaries[name].error = "the serving process died while it was being tried"
        return bool(tried)

    def _start(self, host: Host, wanted: dict[str, list[HostedModel]]) -> HostProcess | None:
        host.began = time.monotonic()
        try:
            process = HostProcess(
                msgspec.structs.replace(
                    self._place, port=host.port, grpc_port=self._place.grpc_port if host.key == SHARED else None
                ),
                on_frame=lambda name, frame: self._frames.put((name, frame)),
                on_state=lambda state: self._states.put((host.key, state)),
                on_denied=self._denied.put,
            )
            host.port = process.wait_ready()
        except (MillraceError, OSError) as error:
            host.note_death()
            text = error.message if isinstance(error, MillraceError) else f"no process could be started: {error}"
            for name in wanted:
                self._write(name, state=FAILED, text=text, url=None, pid=None)
            return None
        host.process = process
        return process

    def _say_died(self, host: Host, name: str) -> None:
        text = "the serving process died; it is started again"
        if host.is_in_crash_loop:
            text = f"the serving process died {host.crashes} times in a row; tried again every {BACKOFF_S[-1]:.0f} s"
        self._write(name, state=FAILED if host.is_in_crash_loop else STARTING, text=text, url=None, pid=None)

    # ------------------------------------------------------------------ seen

    def _take_state(self, item: tuple[str, ModelState]) -> None:
        """A host has loaded a model, or not. What it says of a model that is wanted no longer is old news."""
        key, state = item
        host, known = self._hosts.get(key), self._models.get(state.endpoint)
        if host is None or host.process is None or known is None:
            return
        canary = self._canaries.get(state.endpoint)
        if canary is not None and canary.label == state.version:
            canary.is_loaded = state.error is None
            canary.error = canary.error if state.error is None else state.error["message"]
        if known[2].version != state.version:
            return
        where = {"url": self._url(host.port), "pid": host.process.pid}
        if state.endpoint in self._refused:  # the version before is served on
            self._write(state.endpoint, **where)
        elif state.error is not None:
            self._write(state.endpoint, state=FAILED, text=state.error["message"], url=None, pid=None)
        else:
            self._write(state.endpoint, state=READY, text="", number=known[1].number, **where)

    def _url(self, port: int) -> str:
        name = self._place.allowed_hosts[0] if self._place.allowed_hosts else self._place.host
        scheme = "https" if self._place.tls_cert else "http"
        return f"{scheme}://{f'[{name}]' if ':' in name else name}:{port}"

    def _take_frame(self, item: tuple[str, TelemetryFrame]) -> None:
        name, frame = item
        self._traffic.take(name, frame)
        if (canary := self._canaries.get(name)) is not None:
            canary.take(frame)
        watch, known = self._watches.get(name), self._models.get(name)
        if watch is not None and known is not None and frame.version == known[2].version:
            self._log(name, watch.take(frame))

    def _count(self, name: str, more: dict[str, float]) -> None:
        assert self._lease is not None
        with self._services.records.transaction() as transaction:
            check_fence(transaction, self._lease)
            endpoint = transaction.get(Endpoint, name)
            if endpoint is not None and endpoint.is_managed:
                traffic = added(endpoint.facts.get("traffic", {}), more, self._services.clock.now())
                facts = {**endpoint.facts, "traffic": traffic}
                transaction.put(msgspec.structs.replace(endpoint, facts=facts), expect_version=endpoint.version)

    def _write(self, name: str, **changes: Any) -> None:
        assert self._lease is not None
        with self._services.records.transaction() as transaction:
            check_fence(transaction, self._lease)
            endpoint = transaction.get(Endpoint, name)
            if endpoint is not None and endpoint.is_managed:
                if endpoint.state == WANTED and changes.get("state") == READY:
                    return  # deployed anew since: the next round tells what becomes of that
                changed = msgspec.structs.replace(endpoint, **changes)
                if changed != endpoint:
                    transaction.put(changed, expect_version=endpoint.version)

    @staticmethod
    def _drain(items: queue.Queue[Any], take: Callable[[Any], None]) -> None:
        while not items.empty():
            take(items.get())

    @staticmethod
    def _log(name: str, events: list[ops.ServeEvent]) -> None:
        for event in events:
            log.warning("%s: %s", name, event.text)
