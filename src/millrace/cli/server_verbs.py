"""The verbs of a server: up, deploy."""

from __future__ import annotations

import logging
import time
from typing import Any

import click

from millrace.cli.derive import json_option
from millrace.cli.session import Session
from millrace.core import extras
from millrace.core.errors import StageError, UnavailableError

DEPLOY_TIMEOUT_S = 60.0


@click.command(short_help="Serve this home to a team: API, MLflow clients, pages, endpoints.")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Loopback only, as long as nobody is asked who they are."
)
@click.option("--port", type=click.IntRange(0, 65535), default=7070, show_default=True, help="0 takes a free one.")
@click.option(
    "--serve-port",
    type=click.IntRange(0, 65535),
    default=0,
    show_default=True,
    help="Of deployed endpoints; 0: a free one.",
)
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="API processes.")
@json_option
@click.pass_obj
def up(session: Session, as_json: bool, **options: Any) -> None:
    """Serve this home: API, MLflow's protocol, pages, endpoints. Ctrl-C stops it; runs go on.

    Commands in this folder, and MILLRACE_URL elsewhere, then talk to it.

    \b
    Examples:
      millrace up
      millrace up --port 9000 --workers 4
    """
    session.as_json = as_json
    logging.getLogger("millrace").setLevel(logging.INFO)

    def on_ready(url: str) -> None:
        if as_json:
            session.print_json({"url": url})
        else:
            click.echo(f" ready     {url}  (API {url}/openapi.json; MLflow clients: MLFLOW_TRACKING_URI={url})")

    click.get_current_context().exit(extras.load("millrace.wiring:run_server")(session.home, on_ready, **options))


@click.command(short_help="Keep a model served at an endpoint of the server.")
@click.argument("model")
@click.option("--endpoint", required=True, metavar="NAME", help="The endpoint; requests name it as their model.")
@click.option("--variant", help="Default: the one that the version chose.")
@click.option("--threads", type=click.IntRange(1, 256), default=1, show_default=True, help="Threads of the runtime.")
@click.option("--isolate", is_flag=True, help="A serving process of its own.")
@click.option("--wait/--no-wait", default=True, show_default=True, help="Until it is ready.")
@json_option
@click.pass_obj
def deploy(session: Session, model: str, wait: bool, as_json: bool, **options: Any) -> None:
    """Keep a model served; with an alias the endpoint follows it when it moves.

    \b
    Examples:
      millrace deploy digits@champion --endpoint digits
      millrace deploy digits@2 --endpoint shadow --isolate
    """
    session.as_json = as_json
    endpoint = session.call("endpoint.deploy", model=model, **options)
    deadline = time.monotonic() + DEPLOY_TIMEOUT_S
    while wait and endpoint.state not in ("ready", "failed"):
        if time.monotonic() > deadline:
            raise UnavailableError(
                f"{endpoint.name} is still {endpoint.state} after {DEPLOY_TIMEOUT_S:.0f} s",
                hint="is a server running? `millrace up` starts one; it serves what is deployed",
            )
        time.sleep(0.1)
        endpoint = session.call("endpoint.get", name=endpoint.name)
    if endpoint.state == "failed":
        raise StageError(f"{endpoint.name} is not served: {endpoint.text}")
    if as_json:
        session.print_json(endpoint)
    else:
        where = f" at {endpoint.url}/v2/models/{endpoint.name}" if endpoint.url else ""
        click.echo(f"{endpoint.name} {endpoint.state}: {endpoint.model} v{endpoint.number}{where}")


COMMANDS: tuple[click.Command, ...] = (up, deploy)
