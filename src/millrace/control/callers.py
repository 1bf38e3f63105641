"""What serving processes are told of tokens: which live, and whose endpoints each may call."""

from __future__ import annotations

import time
from collections import defaultdict

from millrace.control.authorisation import custom_roles
from millrace.control.services import Services
from millrace.core.operations.live import PREDICT
from millrace.core.principals import Grant, Principal, grant_of
from millrace.core.types import Event, RoleBinding, Token, User
from millrace.serve.access import Caller, Denied
from millrace.serve.hosting import HostProcess

READ_S = 1.0  # how late a revocation is noticed
RENEW_S = 30.0  # what has not changed is said again, lest it counts no longer


def living_callers(services: Services) -> list[Caller]:
    """Every token that lives, with the projects whose endpoints it may call: none, for some.

    Args:
        services: The home.
    """
    custom, now = custom_roles(services), services.clock.now()
    users = {user.name: user for user in services.records.find(User) if user.disabled_at is None}
    given: defaultdict[str, set[Grant]] = defaultdict(set)
    for binding in services.records.find(RoleBinding):
        given[binding.principal].add(grant_of(binding.role, binding.where))
    found = []
    for token in services.records.find(Token, order="id"):
        is_over = token.expires_at is not None and token.expires_at <= now
        if token.work_id is not None or token.revoked_at is not None or is_over:
            continue
        grants, within, who = tuple(map(Grant.parse, token.scopes)), None, f"token:{token.name}"
        if token.user_name:
            user = users.get(token.user_name)
            if user is None:
                continue
            within, who = grants or None, f"user:{user.name}/token:{token.name}"
            names = (f"user:{user.name}", *(f"group:{group}" for group in user.groups))
            grants = tuple(grant for name in names for grant in sorted(given[name], key=str))
        principal = Principal(id=who, grants=grants, within=within, custom=custom)
        where = tuple(sorted(principal.where(PREDICT.name, PREDICT.is_write)))
        found.append(Caller(digest=token.id, who=who, where=where, expires_at=token.expires_at))
    return found


class Callers:
    """Tells serving processes at once what has changed. Used by the leader's loop only.

    Args:
        services: The home.
    """

    def __init__(self, services: Services) -> None:
        self._services = services
        self._living: list[Caller] = []
        self._read_at = -READ_S
        self._told: dict[int, tuple[list[Caller], float]] = {}

    def tell(self, processes: list[HostProcess]) -> None:
        """One round."""
        now = time.monotonic()
        if now - self._read_at >= READ_S:
            self._living = living_callers(self._services)
            self._read_at = now
        told = self._told
        self._told = {}
        for process in processes:
            before = told.get(process.pid)
            if before is None or before[0] != self._living or now - before[1] > RENEW_S:
                process.believe(self._living)
                before = (self._living, now)
            self._told[process.pid] = before

    def record(self, denied: Denied) -> None:
        """Denied attempts are events too: at most one a minute for each endpoint."""
        event = Event(
            at=self._services.clock.now(), actor="system:serving", verb=PREDICT.name,
            subject=f"endpoint:{denied.endpoint}",
            detail={"outcome": "auth.denied", "statuses": denied.statuses, "who": denied.who},
        )  # fmt: skip
        with self._services.records.transaction() as transaction:
            transaction.append(event)
