"""A server over a home with two projects, for attacks on every route: they are enumerated from the router."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import httpx
from starlette.routing import Route

from millrace.api.app import build_app
from millrace.api.mlflow.calls import FixedRoutes
from millrace.control.dispatch import Dispatcher
from millrace.core.principals import new_secret, token_id
from millrace.core.types import MetricPoint, Token

OPEN = {"/healthz", "/readyz", "/login", "/logout"}
BASE = "http://127.0.0.1"


class Client:
    """Requests to the application, without a socket between."""

    def __init__(self, app: Any, headers: dict[str, str], runner: asyncio.Runner) -> None:
        self._app, self._headers, self._runner = app, headers, runner

    def request(self, method: str, url: str, **options: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self._app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url=BASE, headers=self._headers) as client:
                return await client.request(method, url, **options)

        return self._runner.run(ask())

    def get(self, url: str, **options: Any) -> httpx.Response:
        return self.request("GET", url, **options)

    def post(self, url: str, **options: Any) -> httpx.Response:
        return self.request("POST", url, **options)


class Site:
    """A server that wants tokens, with a run of the project `secret` and one of `mine`."""

    def __init__(self, home: Dispatcher, folder: Path) -> None:
        self.home = home
        self.app = build_app(home, wants_token=True)
        self.runner = asyncio.Runner()  # one for all requests: to make a loop costs more than most answers
        self.ids = {project: self._fill(project, folder) for project in ("secret", "mine")}
        self.tokens = {name: self._token(name, scope) for name, scope in {
            "owner": "owner", "dev": "developer:mine", "main": "maintainer:mine", "look": "viewer:mine", "worker": "worker", "plain": "developer:default",
        }.items()}  # fmt: skip

    def _fill(self, project: str, folder: Path) -> str:
        run = self.home.call("run.track", {"name": f"run-of-{project}", "project": project, "params": {"k": project}})
        self.home.call("run.log", {"run": run.id, "points": [MetricPoint(run.id, "loss", 0, 0.5, 1.0)]})
        (folder / project).write_text(f"canary-{project}")
        self.home.call("run.artifact", {"run": run.id, "name": "notes", "path": str(folder / project)})
        return run.id

    def _token(self, name: str, scope: str, **changes: Any) -> str:
        secret = new_secret()
        token = Token(id=token_id(secret), name=name, prefix=secret[:9], scopes=(scope,), **changes)
        self.home.services.records.put(token)
        return secret

    def client(self, secret: str = "") -> Client:
        return Client(self.app, {"Authorization": f"Bearer {secret}"} if secret else {}, self.runner)

    def routes(self) -> list[tuple[str, str]]:
        """Method and path of everything that is mounted."""
        found: set[tuple[str, str]] = set()
        for route in self.app.routes:
            inner = list(route._by_path.values()) if isinstance(route, FixedRoutes) else [route]
            for one in inner:
                assert isinstance(one, Route), one
                found |= {(method, one.path) for method in one.methods or ()}
        assert len(found) > 150
        return sorted(found)


def filled(path: str, value: str) -> str:
    """A route's path with every parameter filled."""
    return re.sub(r"{(\w+):int}", "1", re.sub(r"{(\w+)(:path)?}", value, path))
