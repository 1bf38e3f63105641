"""The SDK: `millrace.connect()`."""

from __future__ import annotations

import html
import time
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from millrace.core import extras
from millrace.core.errors import NotFoundError, from_dict
from millrace.core.ports import Transport
from millrace.core.states import RUN_END_STATES
from millrace.core.types import Alert, DatasetVersion, MetricPoint, Step
from millrace.core.types import Run as RunRecord


def _table(title: str, rows: Sequence[tuple[str, Any]]) -> str:
    cells = "".join(
        f"<tr><th style='text-align:left'>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in rows
    )
    return f"<b>{html.escape(title)}</b><table>{cells}</table>"


class Report:
    """A run's report file; of a far server, its copy on this machine, made when it is first asked for."""

    def __init__(self, location: str | None, fetch: Callable[[str], Path] | None = None) -> None:
        self._location, self._fetch = location, fetch

    @property
    def url(self) -> str | None:
        """The page of a far server; None where the file is on this machine."""
        return self._location if self._fetch is not None else None

    @property
    def path(self) -> Path | None:
        """The file; None while there is none."""
        if self._location is None:
            return None
        return self._fetch(self._location) if self._fetch is not None else Path(self._location)

    def open(self) -> Path:
        """Open it in the browser; its path.

        Raises:
            NotFoundError: The run has not ended.
        """
        path = self.path
        if path is None:
            raise NotFoundError("this run has no report yet", hint="call wait() first")
        webbrowser.open(path.as_uri())
        return path

    def __repr__(self) -> str:
        return f"Report({self._location!r})"


class Run:
    """A run. Shows itself in notebooks."""

    def __init__(self, transport: Transport, run_id: str) -> None:
        self._transport = transport
        self.id = run_id

    def _view(self) -> Any:
        return self._transport.call("run.get", {"run": self.id})

    @property
    def record(self) -> RunRecord:
        """The present record."""
        return self._view().run

    @property
    def state(self) -> str:
        """pending, running, succeeded, failed or cancelled."""
        return self.record.state

    @property
    def steps(self) -> list[Step]:
        """Its steps with their facts."""
        return self._view().steps

    @property
    def facts(self) -> dict[str, dict[str, Any]]:
        """Facts by step name."""
        return {step.name: step.facts for step in self.steps}

    @property
    def report(self) -> Report:
        """The report."""
        return Report(self._view().report_path, getattr(self._transport, "fetch_page", None))

    def wait(self, timeout_s: float | None = None) -> Run:
        """Wait for the end.

        Args:
            timeout_s: At most so long; forever when absent.

        Raises:
            MillraceError: The error of a failed or cancelled run.
            TimeoutError: It has not ended in time.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            record = self.record
            if record.state in RUN_END_STATES:
                if record.error is not None:
                    raise from_dict(record.error)
                return self
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"run {self.id} is still {record.state} after {timeout_s} s")
            time.sleep(0.1)

    def cancel(self, *, now: bool = False) -> None:
        """Ask it to stop."""
        self._transport.call("run.cancel", {"run": self.id, "now": now})

    def metrics(self, name: str | None = None) -> list[MetricPoint]:
        """Points in the order of arrival."""
        return self._transport.call("run.metrics", {"run": self.id, "name": name})

    def logs(self, step: str | None = None) -> str:
        """What a step printed."""
        return self._transport.call("run.logs", {"run": self.id, "step": step}).text

    def __repr__(self) -> str:
        return f"Run({self.id[:12]!r}, {self.state})"

    def _repr_html_(self) -> str:
        return _table(f"run {self.id[:12]}", [("state", self.state), *((s.name, s.state) for s in self.steps)])


class Model:
    """A model version, opened and verified on first use. Shows itself in notebooks."""

    def __init__(self, transport: Transport, reference: str) -> None:
        self._transport = transport
        self.reference = reference
        self._detail = transport.call("model.get", {"model": reference})
        self._predictor: Any = None

    @property
    def name(self) -> str:
        """The model's name."""
        return self._detail.view.name

    @property
    def version(self) -> int:
        """The version's number."""
        return self._detail.view.version

    @property
    def aliases(self) -> list[str]:
        """Aliases that point here."""
        return self._detail.view.aliases

    @property
    def digest(self) -> str:
        """The bundle's digest."""
        return self._detail.view.digest

    @property
    def card(self) -> str:
        """The model card, Markdown."""
        return self._detail.view.card or ""

    def predict(self, rows: Any, variant: str | None = None) -> list[dict[str, Any]]:
        """Answers for rows.

        Args:
            rows: A list of dicts by column, a list of number lists, a NumPy array [rows, columns], or a
                data frame with `to_dicts` (Polars) or `to_dict("records")` (pandas).
            variant: Which variant; the version's chosen one when absent.

        Returns:
            Per row `{"label": …, "probabilities": {…}}`, or `{"value": …}`.

        Raises:
            InputError: A row does not fit the signature; the message names the field.
        """
        if self._predictor is None or variant is not None:
            opened = self._transport.call("model.open", {"model": f"{self.name}@{self.version}"})
            load = extras.load("millrace.client.predictor:Predictor")
            self._predictor = load(Path(opened.folder), opened.digest, variant or opened.variant)
        return self._predictor.predict(rows)

    def __repr__(self) -> str:
        return f"Model('{self.name}@{self.version}')"

    def _repr_html_(self) -> str:
        rows = [("aliases", ", ".join(self.aliases)), ("variant", self._detail.view.variant), ("digest", self.digest)]
        return _table(f"{self.name} v{self.version}", rows)


class Client:
    """One home, through a transport.

    Args:
        transport: In process, or HTTP.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def run(self, spec: str | Path = "millrace.yaml", overrides: Sequence[str] = ()) -> Run:
        """Start a run in a process of its own, or join the live one of this spec.

        Args:
            spec: The spec file.
            overrides: Like `--set`: `["train.epochs=5"]`.

        Raises:
            SpecError: The spec is not valid.
        """
        body = {"spec_path": str(Path(spec).absolute()), "overrides": list(overrides), "detach": True}
        return Run(self._transport, self._transport.call("run.submit", body).run.id)

    def runs(self, limit: int = 100) -> list[Run]:
        """Runs, newest first."""
        return [Run(self._transport, run.id) for run in self._transport.call("run.list", {"limit": limit})]

    def model(self, reference: str) -> Model:
        """A model version: `digits`, `digits@champion`, `digits@3`."""
        return Model(self._transport, reference)

    def models(self) -> list[Model]:
        """Every version, newest first."""
        found = self._transport.call("model.list", {})
        return [Model(self._transport, f"{view.name}@{view.version}") for view in found]

    def datasets(self) -> list[DatasetVersion]:
        """Dataset versions, newest first."""
        return self._transport.call("dataset.list", {})

    def alerts(self, state: str | None = None) -> list[Alert]:
        """Alerts, newest first."""
        return self._transport.call("alert.list", {"state": state})

    def call(self, operation: str, **body: Any) -> Any:
        """Any operation of the table by name."""
        return self._transport.call(operation, body)

    def stream(self, operation: str, **body: Any) -> Iterator[Any]:
        """Any streaming operation by name."""
        return self._transport.stream(operation, body)

    def close(self) -> None:
        """Let go of the home, or of the connections."""
        self._transport.close()

    def __repr__(self) -> str:
        return f"Client({self._transport.call('system.status', {}).home!r})"
