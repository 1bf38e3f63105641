"""What it costs to ask who somebody is and what they may do.

Run: `python benchmarks/trust.py`. `authorise` is asked once for every operation, whatever the door; `token check`
once for every request of a served model where others can reach it. A hit is a header that came before for the
same target; a miss is parsed, its secret digested, looked up and judged. Each figure is the best of 7 rounds.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable

from millrace.control.authorisation import acting_as, authenticate, authorise
from millrace.control.callers import living_callers
from millrace.control.dispatch import Dispatcher
from millrace.core.operations.table import OPERATIONS
from millrace.core.principals import Grant, Principal, RoleRule, new_secret, token_id
from millrace.core.types import Token
from millrace.serve.access import Caller, Guard
from millrace.wiring import open_dispatcher

ROUNDS, CALLS = 7, 20_000
TOKENS = 1000
RULE = RoleRule(description="", allow=("run.*", "model.*", "event.list"), deny=("endpoint.delete", "key.*"))
OWN = tuple((f"role-{number}", RULE) for number in range(5))


def cost_us(work: Callable[[], object], calls: int = CALLS) -> float:
    """Microseconds of one call: the best of a few rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter_ns()
        for _ in range(calls):
            work()
        best = min(best, (time.perf_counter_ns() - began) / calls / 1e3)
    return best


def principals() -> dict[str, Principal]:
    """Whose requests are measured."""
    twenty = tuple(Grant.parse(f"role-{number % 5}:project-{number}") for number in range(20))
    return {
        "a role": Principal(id="user:a", grants=(Grant(role="viewer", where="digits"),)),
        "20 grants of custom roles": Principal(id="user:b", grants=twenty, custom=OWN),
        "the same, by a token with 20 scopes": Principal(id="user:b/token:t", grants=twenty, within=twenty, custom=OWN),
    }


def fresh(principal: Principal) -> Principal:
    """An equal one, made as `authenticate` makes it for every request."""

    def copies(grants: tuple[Grant, ...]) -> tuple[Grant, ...]:
        return tuple(Grant.parse(f"{one.role}:{one.where}") for one in grants)

    custom = tuple(
        (name, RoleRule(description=one.description, allow=tuple(one.allow), deny=tuple(one.deny)))
        for name, one in principal.custom
    )
    within = None if principal.within is None else copies(principal.within)
    return Principal(id=principal.id, grants=copies(principal.grants), within=within, custom=custom)


def measure_dispatch(home: Dispatcher) -> None:
    """Authorisation alone, and what a whole dispatched read costs."""
    operation, services = OPERATIONS["event.list"], home.services
    home.call("run.track", {"name": "x"})
    for name, principal in principals().items():
        cost = cost_us(lambda one=principal: authorise(services, one, operation, None))
        print(f"authorise, {name:<37} {cost:8.2f} us")
        many = iter([fresh(principal) for _ in range(ROUNDS * 2000)])
        cost = cost_us(lambda many=many: authorise(services, next(many), operation, None), 2000)
        print(f"  of one that was just made {cost:29.2f} us")
    for _ in range(TOKENS):
        one = token_id(new_secret())
        services.records.put(Token(id=one, name=one, prefix="mr_", scopes=("caller:digits",)))
    cost = cost_us(lambda: living_callers(services), 5)
    print(f"(what serving processes are told, {TOKENS} tokens {cost:13.0f} us, once a second)")
    secret = home.call("token.create", {"name": "t", "scope": "viewer"}).secret
    cost = cost_us(lambda: authenticate(services, secret), 1000)
    print(f"(authenticate, by records in SQLite {cost:21.2f} us, once for each HTTP request)")
    with acting_as(principals()["a role"]):
        cost = cost_us(lambda: home.call("event.list", {"limit": 0}), 1000)
    print(f"(dispatch of event.list, an empty page {cost:18.2f} us, authorisation within)")


def measure_guard() -> None:
    """The data plane's check, with a thousand tokens living."""
    secrets = [new_secret() for _ in range(TOKENS)]
    guard = Guard()
    guard.serve({f"model-{number}": f"project-{number}" for number in range(20)})
    guard.believe(
        [Caller(digest=token_id(one), who=f"token:{number}", where=(f"project-{number % 20}",))
         for number, one in enumerate(secrets)]
    )  # fmt: skip
    target = b"/v2/models/model-0/infer"
    headers = {b"authorization": f"Bearer {secrets[0]}".encode()}
    wrong = {b"authorization": f"Bearer {new_secret()}".encode()}
    assert guard.check(target, headers) is None
    assert guard.check(target, wrong) is not None
    print(f"token check, hit                                {cost_us(lambda: guard.check(target, headers)):9.2f} us")
    targets = iter([b"%s?%d" % (target, number) for number in range(ROUNDS * 2000)])
    missed = cost_us(lambda: guard.check(next(targets), headers), 2000)
    print(f"token check, miss that passes                   {missed:9.2f} us")
    print(f"token check, unknown token, denied              {cost_us(lambda: guard.check(target, wrong)):9.2f} us")


def main() -> None:
    """Print the figures."""
    print("aims: authorise 5 us, token check 2 us (what a client repeats: a hit)")
    with tempfile.TemporaryDirectory() as folder:
        home = open_dispatcher(f"{folder}/home")
        measure_dispatch(home)
        home.close()
    measure_guard()


if __name__ == "__main__":
    main()
