"""`millrace loadtest`: load on an endpoint, and what came of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from millrace.cli.derive import json_option
from millrace.cli.session import Session
from millrace.core import extras
from millrace.core.errors import InputError
from millrace.core.units import parse_duration

LOADING = "millrace.cli.loading"


@click.command(short_help="Load an endpoint, and measure.")
@click.argument("endpoint")
@click.option("--rate", type=float, metavar="N", help="Open loop: requests a second, whether they are answered or not.")
@click.option("--poisson", is_flag=True, help="Open loop with random gaps rather than equal ones.")
@click.option("--concurrency", type=int, metavar="N", help="Closed loop: clients that wait for answers; default: 16.")
@click.option("--duration", default="30s", show_default=True, help="How long is measured.")
@click.option("--warmup", default="2s", show_default=True, help="How long before that, unmeasured.")
@click.option("--slo-p99-ms", type=float, metavar="MS", help="Exit code 1 where the 99th percentile is above.")
@click.option("--compare", metavar="OTHER", help="Another endpoint, measured by turns with the first.")
@click.option("--dataset", metavar="NAME@VERSION", help="Real rows, chosen by chance from a dataset version.")
@click.option("--split", default="test", show_default=True, help="Of the dataset.")
@click.option("--input", "input_path", metavar="FILE", help="Real rows: CSV, JSONL or Parquet.")
@click.option("--rows", type=int, default=1, show_default=True, help="Rows of a request.")
@click.option(
    "--body", type=click.Choice(["binary", "json", "rows"]),
    help="V2 tensors, binary or JSON, or rows by column; default: binary where the model is known.",
)  # fmt: skip
@click.option("--timeout", default="10s", show_default=True, help="When an answer counts as none.")
@click.option(
    "--connections", type=click.IntRange(1), default=256, show_default=True, help="At most, in the open loop."
)
@click.option("--token-env", metavar="NAME", help="The environment variable with the token; default: MILLRACE_TOKEN.")
@click.option("--ca-file", metavar="FILE", help="Certificates (PEM) to trust; default: the setting.")
@click.option("--output", metavar="FILE", help="Write the numbers and pictures as a page here.")
@json_option
@click.pass_obj
def loadtest(
    session: Session, endpoint: str, token_env: str | None, ca_file: str | None, output: str | None, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Load an endpoint, by name or URL, and measure: percentiles, failures, a verdict.

    In the open loop latency begins when a request was due: a stalled server is not spared. Failures are counted by
    status, and count as slower than everything in the verdict. Ctrl-C tells what was measured until then.

    \b
    Examples:
      millrace loadtest digits --rate 200 --duration 30s --slo-p99-ms 50
      millrace loadtest digits --concurrency 16 --dataset digits@1 --output report.html
      millrace loadtest http://127.0.0.1:8080 --rate 500 --poisson --input rows.csv
      millrace loadtest digits --compare digits-candidate --concurrency 4
    """
    session.as_json = as_json
    if options["rate"] is not None and options["concurrency"] is not None:
        raise InputError("want one of --rate (open loop) and --concurrency (closed loop)")
    if options["dataset"] and options["input_path"]:
        raise InputError("want one of --dataset and --input")
    for name in ("duration", "warmup", "timeout"):
        options[name] = read_time(name, options[name])
    loading = extras.load(f"{LOADING}:Loading")(session, find_token(token_env), ca_file, options)
    report, page = loading.run(endpoint, options["compare"])
    if output is not None:
        Path(output).write_text(page, encoding="utf-8")
    if as_json:
        session.print_json(report)
    else:
        extras.load(f"{LOADING}:render_report")(report)
        if output is not None:
            click.echo(f"report {output}")
    is_missed = any(row.verdict is not None and not row.verdict.is_kept for row in report.rows)
    is_dead = any(row.requests == row.failures for row in report.rows)
    code = 1 if is_missed or is_dead else 130 if report.is_interrupted else 0
    click.get_current_context().exit(code)


def read_time(name: str, text: str) -> float:
    """Seconds of an option.

    Raises:
        InputError: It is no time.
    """
    try:
        return parse_duration(text)
    except ValueError as error:
        raise InputError(f"--{name}: {error}", hint="write it as 30s or 2m") from None


def find_token(variable: str | None) -> str:
    """The token of an environment variable; empty where none is wanted and none is there.

    Raises:
        InputError: The variable that was named is not set.
    """
    if variable is not None and not os.environ.get(variable):
        raise InputError(f"--token-env: the environment has no {variable}")
    return os.environ.get(variable or "MILLRACE_TOKEN", "")


COMMANDS: tuple[click.Command, ...] = (loadtest,)
