"""What `millrace loadtest` needs of a home: addresses, tokens, rows; and how its result is shown."""

from __future__ import annotations

import math
import ssl
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import click
import msgspec
import numpy as np

from millrace.batch.rows import Chunk, json_rows, read_chunks, whole
from millrace.cli.render import print_table
from millrace.cli.session import Session, is_terminal
from millrace.client.logins import token_for
from millrace.core.errors import DeniedError, InputError, NotFoundError
from millrace.core.operations.registry import DatasetSample
from millrace.core.settings import find_home, resolve_settings
from millrace.formats.bundle import Bundle, open_bundle
from millrace.formats.rows import encode_rows
from millrace.loadtest.client import Load, Measured, Target
from millrace.loadtest.report import failures_of, milliseconds, render_page
from millrace.loadtest.requests import DISTINCT, Address, find_address, make_target, trust
from millrace.loadtest.run import Report, run_load, summarise

_NOTHING = Chunk({}, np.empty(0, np.int64), [])


class Loading:
    """A load test from the command line.

    Args:
        session: Reaches the home.
        token: Of whoever asks; may be empty.
        ca_file: None: the setting.
        options: Of the command.
    """

    def __init__(self, session: Session, token: str, ca_file: str | None, options: dict[str, Any]) -> None:
        self._session, self._options, self._token = session, options, token
        home = Path(session.home) if session.home else find_home(Path.cwd())
        settings = resolve_settings({"home": session.home}, home=home)
        self._ca_file = str(settings["ca_file"].value) if ca_file is None else ca_file
        self._url = str(settings["url"].value)
        self._sample = self._find_sample()

    def run(self, endpoint: str, other: str | None) -> tuple[Report, str]:
        """Measure; the report, and the same as a page."""
        options = self._options
        load = Load(
            rate=options["rate"], concurrency=options["concurrency"] or (16 if options["concurrency"] is None else 0),
            is_poisson=options["poisson"], timeout_s=options["timeout"], connections=options["connections"],
        )  # fmt: skip
        made = [self._target(one) for one in (endpoint, other) if one is not None]
        targets = [target for target, _ in made]
        results, is_interrupted = run_load(
            targets, load, options["duration"], options["warmup"], self._show if is_terminal() else _say_nothing
        )
        if is_terminal():
            click.echo("\r\x1b[K", nl=False, err=True)
        report = summarise(results, load, options["slo_p99_ms"], is_interrupted=is_interrupted)
        report = msgspec.structs.replace(report, text=f"{report.text}; {made[0][1]}")
        return report, render_page(report, results)

    def _show(self, measured: Measured) -> None:
        last = measured.slices[-1]
        failed = f", {measured.failures:,} failed" if measured.failures else ""
        p50, p99 = (milliseconds(last.quantile(share) * 1e3) if last.total else "-" for share in (0.5, 0.99))
        text = f"{measured.answered:,} answered{failed}, now p50 {p50} ms, p99 {p99} ms"
        click.echo(f"\r\x1b[K{text}", nl=False, err=True)

    def _target(self, endpoint: str) -> tuple[Target, str]:
        options = self._options
        address, tls, bundle = self._find(endpoint)
        rows, tensors, what = None, None, "random rows"
        if options["input_path"]:
            path, what = Path(options["input_path"]), f"rows of {Path(options['input_path']).name}"
            if bundle is not None and options["body"] != "rows":
                tensors = next(read_chunks(bundle.signature, whole(path)), _NOTHING).tensors
            else:
                rows = list(islice(json_rows(path), DISTINCT * max(options["rows"], 1)))
            if not (tensors or rows):
                raise InputError(f"{path.name}: has no rows")
        elif self._sample is not None:
            rows, what = self._sample.rows, f"rows of {self._sample.dataset}"
            if bundle is not None and options["body"] != "rows":
                tensors = encode_rows(bundle.signature, rows)
        elif bundle is not None and options["body"] != "rows":
            golden = bundle.golden.inputs
            if golden and len(next(iter(golden.values()))):
                tensors, what = golden, "held-out rows of the model"
        target = make_target(
            address, tls, rows=rows, tensors=tensors, each=options["rows"], body=options["body"],
            name="" if "://" in endpoint else endpoint,
        )  # fmt: skip
        count = len(target.requests)
        return target, f"{what}, {options['rows']} a request, {count} different {'body' if count == 1 else 'bodies'}"

    def _find(self, endpoint: str) -> tuple[Address, ssl.SSLContext | None, Bundle | None]:
        """Where an endpoint is, whom to believe there, and its model where that may be had."""
        bundle = None
        if "://" in endpoint:
            url = endpoint
        else:
            found = self._session.call("endpoint.predict", name=endpoint)
            url = found.infer
            bundle = self._bundle(endpoint)
            if found.wants_token and not self._token:
                self._token = token_for(self._url)
        tls = trust(self._ca_file) if url.startswith("https:") else None
        return find_address(url, self._token, tls), tls, bundle

    def _bundle(self, endpoint: str) -> Bundle | None:
        with suppress(DeniedError, NotFoundError):  # who may only call it sends rows as they are, or random ones
            served = self._session.call("endpoint.get", name=endpoint)
            opened = self._session.call("model.open", model=f"{served.model}@{served.number}")
            return open_bundle(Path(opened.folder), expected_digest=opened.digest)
        return None

    def _find_sample(self) -> DatasetSample | None:
        options = self._options
        if not options["dataset"]:
            return None
        most = min(DISTINCT * max(options["rows"], 1), 10_000)
        sample = self._session.call("dataset.sample", dataset=options["dataset"], rows=most, split=options["split"])
        if not sample.rows:
            raise InputError(f"{sample.dataset} has no rows in the split {options['split']!r}", hint="--split train")
        return sample


def _say_nothing(_: Measured) -> None:
    return


def render_report(report: Report) -> None:
    """The numbers for people."""
    click.echo(report.text)
    names = list(report.rows[0].latency_ms)
    print_table(
        ["ENDPOINT", "REQUESTS", "ANSWERED/S", "FAILED", *(f"{name.upper()} MS" for name in names)],
        [
            [row.endpoint, f"{row.requests:,}", f"{row.answered_per_s:,.0f}", f"{row.failures:,}",
             *(milliseconds(row.latency_ms[name]) for name in names)]
            for row in report.rows
        ],
    )  # fmt: skip
    for row in report.rows:
        for text in failures_of(row):
            click.echo(f"{row.endpoint}: {text}")
        if row.send_lag_p99_ms is not None and row.send_lag_p99_ms > 1:
            click.echo(f"{row.endpoint}: 1 % of requests were sent {row.send_lag_p99_ms:.3g} ms late or later")
        if row.generator_cpu > 0.9 and report.text.find("clients") >= 0:
            click.echo(f"{row.endpoint}: the load itself took {row.generator_cpu:.0%} of a core: it may be the limit")
        if row.verdict is not None:
            p99 = row.verdict.p99_ms
            shown = f"{milliseconds(p99)} ms" if p99 is not None else "none: more than 1 % failed"
            word = "kept" if row.verdict.is_kept else "MISSED"
            click.echo(f"{row.endpoint}: p99 of at most {row.verdict.wanted_ms:g} ms {word}: {shown}")
    for one in report.ratios:
        values = [value if value is not None else math.nan for value in (one.ratio, one.low, one.high)]
        click.echo("second / first, {}: {:.3f} (95 % interval {:.3f} to {:.3f})".format(one.percentile, *values))
    if report.is_interrupted:
        click.echo("interrupted: of what was measured until then")
