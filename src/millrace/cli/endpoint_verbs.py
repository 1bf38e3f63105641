"""`millrace endpoints …`: verbs of rollouts."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from millrace.cli.derive import json_option, print_answer
from millrace.cli.session import Session, is_terminal
from millrace.core.errors import InputError, StageError, UnavailableError
from millrace.core.operations import live as ops

LOAD_TIMEOUT_S = 60.0


def read_steps(context: click.Context, parameter: click.Parameter, value: str | None) -> list[float] | None:
    """`10,50,100` as numbers."""
    if value is None:
        return None
    try:
        return [float(step) for step in value.split(",")]
    except ValueError:
        raise InputError(f"--steps: want percentages such as 10,50,100, got {value!r}") from None


@click.command()
@click.argument("name")
@click.argument("model")
@click.option("--weight", type=float, metavar="PERCENT", help="The candidate's share of the requests, all the time.")
@click.option("--steps", callback=read_steps, metavar="PERCENTS", help="Its shares one after another; default: 10,50.")
@click.option("--variant", help="Default: the one that the version chose.")
@click.option("--shadow", is_flag=True, help="Copies of requests only: nobody sees its answers, they are compared.")
@click.option("--hold", is_flag=True, help="Never promote by itself: `endpoints promote` does.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Until the candidate is loaded.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@click.pass_obj
def rollout(
    session: Session, name: str, model: str, weight: float | None, steps: list[float] | None, shadow: bool, wait: bool,
    yes: bool, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Try a candidate on a share of an endpoint's requests. A test of errors and latency promotes it or rolls it back.

    \b
    Examples:
      millrace endpoints rollout digits digits@2
      millrace endpoints rollout digits digits@2 --steps 5,25,50 --yes
      millrace endpoints rollout digits digits@2 --weight 20 --hold
      millrace endpoints rollout digits digits@2 --shadow
    """
    session.as_json = as_json
    if (weight is not None) + (steps is not None) + shadow > 1:
        raise InputError("want one of --weight, --steps and --shadow")
    shares = [weight] if weight is not None else steps
    if not shadow:
        _say_forecast(session, name, shares[0] if shares else ops.DEFAULT_STEPS[0])
    if not yes and not as_json and is_terminal() and sys.stdin.isatty():
        click.confirm("Start it?", abort=True, err=True)
    body = {**options, "steps": shares, "shadow": shadow or None}
    answer = session.call(ops.START_ROLLOUT.name, name=name, model=model, **body)
    if wait:
        answer = _wait_until_loaded(session, name, answer.rollout.id)
    print_answer(session, answer, "render_rollout")
    if answer.rollout.state == "aborted":
        raise StageError(f"the rollout was aborted: {answer.rollout.reason}")


def _say_forecast(session: Session, name: str, weight: float) -> None:
    click.echo(session.call(ops.FORECAST_ROLLOUT.name, name=name, weight=weight).text, err=True)


def _wait_until_loaded(session: Session, name: str, rollout: str) -> Any:
    """The endpoint once its candidate is loaded or refused."""
    deadline = time.monotonic() + LOAD_TIMEOUT_S
    while True:
        endpoint = session.call("endpoint.get", name=name)
        found = endpoint.rollout
        if found is None or found.id != rollout or found.state != "starting":
            return endpoint
        if endpoint.state == "stopped" or time.monotonic() > deadline:
            reason = endpoint.text if endpoint.state == "stopped" else f"not loaded after {LOAD_TIMEOUT_S:.0f} s"
            raise UnavailableError(
                f"the rollout of {name} is wanted, and waits: {reason}",
                hint="`millrace up` serves what is deployed; `millrace endpoints abort` takes it back",
            )
        time.sleep(0.1)


@click.command()
@click.argument("name")
@json_option
@click.pass_obj
def status(session: Session, name: str, as_json: bool) -> None:
    """How an endpoint and its rollout are doing.

    \b
    Example:
      millrace endpoints status digits
    """
    session.as_json = as_json
    print_answer(session, session.call("endpoint.get", name=name), "render_rollout")


@click.command()
@click.argument("name", metavar="ENDPOINT|MODEL")
@click.option("--output", default="k8s", show_default=True, metavar="FOLDER", help="Where the files go.")
@click.option("--image", help="What the container file is built as. Default: NAME:VERSION.")
@click.option("--namespace", default="default", show_default=True, help="Of all objects.")
@click.option("--min-replicas", type=click.IntRange(1), default=2, show_default=True, help="At least so many pods.")
@click.option("--max-replicas", type=click.IntRange(1), default=4, show_default=True, help="At most so many pods.")
@click.option("--kserve", is_flag=True, help="An InferenceService with its ServingRuntime.")
@json_option
@click.pass_obj
def manifests(session: Session, name: str, output: str, as_json: bool, **options: Any) -> None:
    """Write files for Kubernetes that serve a model. Nothing is applied.

    \b
    Examples:
      millrace endpoints manifests digits
      millrace endpoints manifests digits@3 --output k8s --image registry.example/digits:3
      millrace endpoints manifests digits --kserve
    """
    session.as_json = as_json
    answer = session.call(ops.WRITE_MANIFESTS.name, name=name, **options)
    if as_json:
        session.print_json(answer)
        return
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text in answer.files.items():
            (folder / file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}", hint="--output names a folder") from None
    click.echo(f"{len(answer.files)} files in {folder}: {', '.join(answer.files)}")
    click.echo(f"Then: millrace models export {answer.model} --to {folder / 'bundle'}")


COMMANDS: tuple[click.Command, ...] = (rollout, status, manifests)
