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
from millrace.control.deploying import READY, WANTED
from millrace.control.dispatch import Dispatcher
from millrace.control.endpoints import calibrations_of, captures_of, sections_of, wanted_number
from millrace.control.hosts import BACKOFF_S, SHARED, Host, News, Replica, Wanted, key_of
from millrace.control.models import open_version, resolve_model
from millrace.control.scaling import Bounds
from millrace.control.services import Services
from millrace.control.traffic import Traffic, added
from millrace.control.watching import Watch
from millrace.core.errors import ApprovalNeededError, ConflictError, MillraceError, UntrustedError
from millrace.core.operations import live as ops
from millrace.core.principals import Principal
from millrace.core.types import Endpoint, Lease, ModelVersion, Rollout
from millrace.formats.bundle import open_bundle
from millrace.serve.admission import QUEUE_S
from millrace.serve.hosting import HostConfig, HostedModel, ModelState
from millrace.serve.telemetry import TelemetryFrame
from millrace.store.leases import check_fence

STARTING, FAILED, STOPPED = "starting", "failed", "stopped"
RETRY_S = 5.0  # between looks at a version that cannot be served
AT_ZERO = "nobody has asked for a while: no replica runs, the next request starts one"
log = logging.getLogger(__name__)


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
        processes: How many host the endpoints that are not isolated.
    """

    def __init__(self, services: Services, place: HostConfig | None = None, processes: int = 1) -> None:
        self._services, self._place, self._processes = services, place or HostConfig(), processes
        self.news = News()
        self._callers = Callers(services)
        self._lease: Lease | None = None
        self._hosts: dict[str, Host] = {SHARED: Host(SHARED, self._place.port, self._place, self.news)}
        self._bounds: dict[str, Bounds] = {}  # of isolated endpoints
        self._ready: set[Replica] = set()  # those that know whom to answer
        self._watches: dict[str, Watch] = {}
        self._traffic = Traffic(self._count)
        self._models: dict[str, tuple[Wish, ModelVersion, HostedModel]] = {}
        self._refused: dict[str, tuple[Wish, float]] = {}  # what cannot be served, and when to try it again
        self._proofs: dict[str, bytes] = {}  # signatures of served versions, by their id
        self._canaries: dict[str, Canary] = {}  # of the rollouts that are on
        self._candidates: dict[str, tuple[str, ModelVersion, HostedModel]] = {}  # with the id of their rollout
        self._rollouts = Dispatcher(services)
        self._mended: set[str] = set()  # these want again what is served
        self._written: set[str] = set()  # in this round: what was read of them at its begin is old

    def __call__(self, lease: Lease) -> None:
        """One round."""
        endpoints = [one for one in self._services.records.find(Endpoint) if one.is_managed]
        if self._lease is None or self._lease.token != lease.token:
            self._lease = lease
            self._take_over(endpoints)
        self._written.clear()
        self._forget_all_but({endpoint.name for endpoint in endpoints})
        wanted: dict[str, dict[str, list[HostedModel]]] = {SHARED: {}}
        for endpoint in endpoints:
            model = self._model_of(endpoint)
            if model is not None:
                wanted.setdefault(key_of(endpoint), {})[endpoint.name] = self._revisions_of(endpoint, model)
        fresh = {endpoint.name for endpoint in endpoints if endpoint.state in (WANTED, STOPPED)} - self._refused.keys()
        fresh |= self._mended
        self._mended = set()
        self._bounds = {one.name: self._bounds_of(one) for one in endpoints if one.is_isolated}
        self._ready = {replica for host in self._hosts.values() for replica in host.ready}
        if self._place.wants_token:  # before they are told what to serve
            self._callers.tell([replica.process for replica in self._ready])
        for key in {*self._hosts, *wanted}:
            self._keep(self._host(key), wanted.get(key, {}), fresh)
        self._drain(self.news.denied, self._callers.record)
        self._drain(self.news.states, self._take_state)
        self._drain(self.news.frames, self._take_frame)
        for endpoint in endpoints:
            self._count_replicas(endpoint)
            if endpoint.name in self._canaries:
                self._judge(endpoint)
        self._traffic.tick()
        for name, watch in self._watches.items():
            self._log(name, watch.tick())

    def close(self) -> None:
        """Drain and stop every serving process, and say so."""
        served = {name for host in self._hosts.values() for name in host.applied}
        self._stop_all()
        if self._lease is None or not served:
            return
        self._drain(self.news.frames, self._take_frame)
        self._traffic.tick(is_last=True)
        for endpoint in self._services.records.find(Endpoint):
            if endpoint.is_managed and endpoint.name in served and (endpoint.pid or endpoint.state == READY):
                self._write(endpoint.name, state=STOPPED, pid=None, replicas=0, text="the server was stopped")

    def step_down(self) -> None:
        """Drain and stop every serving process: another server's endpoints take their place."""
        self._stop_all()
        self._lease = None

    def _stop_all(self) -> None:
        leaving = [replica for host in self._hosts.values() for replica in host.stop()]  # all at once: each drains
        for replica in leaving:
            replica.finish()
        for host in self._hosts.values():
            host.forget()

    def _take_over(self, endpoints: list[Endpoint]) -> None:
        """What another leader served is not served any more; clients know its port, so it is taken again."""
        own = {replica.pid for host in self._hosts.values() for replica in host.replicas}
        for endpoint in endpoints:
            host = self._host(key_of(endpoint))
            if endpoint.pid in own or (endpoint.pid is None and endpoint.name in host.applied):
                continue
            if endpoint.url is not None and host.port == 0:
                host.port = urlsplit(endpoint.url).port or 0
            if endpoint.state == READY:
                text = "the process that served it is gone; it is started again"
                self._write(endpoint.name, state=STARTING, text=text, pid=None, replicas=0)

    def _host(self, key: str) -> Host:
        if key not in self._hosts:
            self._hosts[key] = Host(key, 0, self._place, self.news)
        return self._hosts[key]

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

    def _keep(self, host: Host, wanted: Wanted, fresh: set[str]) -> None:
        """Start, restart, feed or stop a group. `fresh`: endpoints that were deployed since the last round."""
        ended = host.take_ended()
        for replica in ended:
            log.warning("a serving process of %s ended with %s", host.key or "all endpoints", replica.code)
            for name in wanted:
                self._say_ended(host, name, replica)
        if any(replica.error is None and replica.code != 0 for replica in ended) and self._blame_candidates(wanted):
            return  # the next round starts it without them
        if not wanted:
            host.rest()
            return
        anew = fresh & {*wanted}
        if anew:
            host.hurry()
        bounds = self._bounds.get(host.key) or Bounds(least=self._processes, most=self._processes)
        host.resize(host.count(bounds, is_anew=bool(anew) or wanted != host.applied))
        self._start(host, wanted, bounds)
        known = [replica for replica in host.ready if replica in self._ready]
        to_feed = [replica for replica in known if anew or replica.applied != wanted]
        if to_feed:
            for name in anew:
                self._write(name, state=STARTING, text="")
        for replica in to_feed:
            host.feed(replica, wanted)

    def _blame_candidates(self, wanted: Wanted) -> bool:
        """A process that dies may have died of a candidate: it does not get a second one. Whether there was one."""
        tried = [name for name, revisions in wanted.items() if len(revisions) > 1]
        for name in tried:
            self._canaries[name].error = "the serving process died while it was being tried"
        return bool(tried)

    def _start(self, host: Host, wanted: Wanted, bounds: Bounds) -> None:
        """What is due. Who comes where others serve, or while connections are held, takes none before it can serve."""
        is_group = bounds.most > 1 or bounds.least == 0
        is_patient = any(host.serving(name) for name in wanted) or (is_group and host.key != SHARED)
        try:
            host.start_due(is_group, is_patient)
        except (MillraceError, OSError) as error:
            text = error.message if isinstance(error, MillraceError) else f"no process could be started: {error}"
            self._say_unserved(host, [*wanted], FAILED, text)

    def _say_ended(self, host: Host, name: str, replica: Replica) -> None:
        if replica.error is not None:
            self._say_unserved(host, [name], FAILED, replica.error.message)
            return
        text = "the serving process died; it is started again"
        if host.is_in_crash_loop:
            text = f"the serving process died {host.crashes} times in a row; tried again every {BACKOFF_S[-1]:.0f} s"
        self._say_unserved(host, [name], FAILED if host.is_in_crash_loop else STARTING, text)

    def _say_unserved(self, host: Host, names: list[str], state: str, text: str) -> None:
        """Why endpoints are not served; where other replicas serve one it is."""
        for name in names:
            if serving := host.serving(name):
                text = text if state == FAILED else ""
                self._write(name, text=text, pid=serving[0].pid, replicas=len(serving))
            else:
                self._write(name, state=state, text=text, url=None, pid=None, replicas=0)

    def _bounds_of(self, endpoint: Endpoint) -> Bounds:
        known, setting = self._models.get(endpoint.name), self._services.setting
        queue_s = self._place.queue_s or (known[2].queue_s if known is not None else 0.0)
        return Bounds(
            least=endpoint.min_replicas, most=endpoint.max_replicas, in_flight=setting("scale_in_flight"),
            window_s=setting("scale_window_s"), down_s=setting("scale_down_s"), zero_s=setting("scale_to_zero_s"),
            queue_s=queue_s or QUEUE_S,
        )  # fmt: skip

    # ------------------------------------------------------------------ seen

    def _take_state(self, item: tuple[Replica, ModelState]) -> None:
        """A replica has loaded a model, or not. What it says of a model that is wanted no longer is old news."""
        replica, state = item
        host, known = self._hosts.get(replica.key), self._models.get(state.endpoint)
        if host is None or replica not in host.ready or known is None:
            return
        canary = self._canaries.get(state.endpoint)
        if canary is not None and canary.label == state.version:
            canary.is_loaded = state.error is None
            canary.error = canary.error if state.error is None else state.error["message"]
        if known[2].version != state.version:
            return
        replica.is_loading = False
        if state.error is None:
            replica.loaded[state.endpoint] = state.version
        serving = host.serving(state.endpoint)
        where = {
            "url": self._url(host.port), "pid": serving[0].pid if serving else replica.pid, "replicas": len(serving),
        }  # fmt: skip
        if state.endpoint in self._refused:  # the version before is served on
            self._write(state.endpoint, **where)
        elif state.error is None:
            self._write(state.endpoint, state=READY, text="", number=known[1].number, **where)
        elif any(one.loaded[state.endpoint] == state.version for one in serving):
            self._write(state.endpoint, text=f"one of its replicas cannot serve: {state.error['message']}")
        else:
            self._write(state.endpoint, state=FAILED, text=state.error["message"], url=None, pid=None)

    def _count_replicas(self, endpoint: Endpoint) -> None:
        """Write how many serve, and which is the first, where that has changed since the round began."""
        if endpoint.name in self._written:
            return  # the next round does
        host = self._hosts.get(key_of(endpoint))
        serving = host.serving(endpoint.name) if host is not None else []
        changes: dict[str, Any] = {"replicas": len(serving)}
        if endpoint.state == READY:
            changes["pid"] = serving[0].pid if serving else None
            if host is not None and not host.slots and endpoint.name in host.applied:
                changes["text"] = AT_ZERO
        if any(getattr(endpoint, name) != value for name, value in changes.items()):
            self._write(endpoint.name, **changes)

    def _url(self, port: int) -> str:
        name = self._place.allowed_hosts[0] if self._place.allowed_hosts else self._place.host
        scheme = "https" if self._place.tls_cert else "http"
        return f"{scheme}://{f'[{name}]' if ':' in name else name}:{port}"

    def _take_frame(self, item: tuple[Replica, str, TelemetryFrame]) -> None:
        replica, name, frame = item
        self._traffic.take(name, frame)
        if (host := self._hosts.get(replica.key)) is not None and host.scaler is not None:
            host.meter.take(replica.pid, frame)
        if (canary := self._canaries.get(name)) is not None:
            canary.take(frame, replica.pid)
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
        self._written.add(name)
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
