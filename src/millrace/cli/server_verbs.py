"""The verbs of a server: up, deploy."""

from __future__ import annotations

import logging
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import click

from millrace.cli.derive import client_rate_option, json_option, queue_s_option
from millrace.cli.session import Session
from millrace.core import extras
from millrace.core.errors import StageError, UnavailableError

DEPLOY_TIMEOUT_S = 60.0
MAX_REPLICAS = 64


class Replicas(click.ParamType):
    """`2`, or `0..4`: the least and the most.

    Example:
        >>> Replicas().convert("0..4", None, None)
        (0, 4)
    """

    name = "N or N..M"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """The two numbers."""
        found = re.fullmatch(r"(\d{1,3})(?:\.\.(\d{1,3}))?", str(value))
        least, most = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not 0 <= least <= most or not 1 <= most <= MAX_REPLICAS:
            self.fail(
                f"want N or N..M, the least not above the most, the most from 1 to {MAX_REPLICAS}; got {value!r}"
                " (such as 2, or 0..4)",
                param, ctx,
            )  # fmt: skip
        return least, most


@click.command(short_help="Serve this home to a team: API, MLflow clients, pages, endpoints.")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Any but a loopback address wants TLS, and asks for tokens."
)
@click.option("--port", type=click.IntRange(0, 65535), default=7070, show_default=True, help="0 takes a free one.")
@click.option(
    "--serve-port",
    type=click.IntRange(0, 65535),
    default=0,
    show_default=True,
    help="Of deployed endpoints; 0: a free one.",
)
@click.option("--grpc-port", type=click.IntRange(1, 65535), help="Of deployed endpoints over gRPC, if any.")
@click.option(
    "--serving-processes", type=click.IntRange(1, 64), default=1, show_default=True,
    help="That share the endpoints which have none of their own.",
)  # fmt: skip
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="API processes.")
@click.option("--tls-cert", default="", metavar="FILE", help="The server's certificate (PEM): it speaks HTTPS then.")
@click.option("--tls-key", default="", metavar="FILE", help="Its private key, where that is not in the same file.")
@click.option(
    "--tls-client-ca", default="", metavar="FILE", help="Clients of endpoints must bring a certificate of it."
)
@click.option(
    "--tls-terminated-by-proxy",
    "proxies",
    multiple=True,
    metavar="NETWORK",
    help="A proxy at this address or in this network speaks HTTPS; nobody else is answered. May be repeated.",
)
@client_rate_option
@queue_s_option
@click.option("--access-log", default="", metavar="FILE", help="A line of JSON for each request of an endpoint.")
@click.option(
    "--trace", type=click.FloatRange(0, 1), default=0.0, metavar="SHARE", help="Begin a trace for this share of them."
)
@click.option("--name", "names", multiple=True, metavar="HOST", help="A host name that clients use; may be repeated.")
@json_option
@click.pass_obj
def up(session: Session, as_json: bool, **options: Any) -> None:
    """Serve this home: API, MLflow's protocol, pages, endpoints. Ctrl-C stops it; runs go on.

    Commands in this folder, and MILLRACE_URL elsewhere, then talk to it.

    \b
    Examples:
      millrace up
      millrace up --port 9000 --workers 4
      millrace up --host 10.0.0.5 --tls-cert cert.pem --tls-key key.pem
      millrace up --host 10.0.0.5 --tls-terminated-by-proxy 10.0.0.7 --name models.example.org
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
@click.option("--threads", type=click.IntRange(0, 256), default=0, help="Of one call; 0, the default: by measuring.")
@click.option("--slo-p99-ms", type=float, metavar="MS", help="Of 100 requests 99 within that: batches take half of it.")
@click.option("--isolate", is_flag=True, help="A serving process of its own.")
@click.option(
    "--replicas", type=Replicas(), default="1", show_default=True,
    help="Processes of its own: how many, or how few and how many as load needs; 0: none while nobody asks.",
)  # fmt: skip
@click.option("--wait/--no-wait", default=True, show_default=True, help="Until it is ready.")
@json_option
@click.pass_obj
def deploy(
    session: Session, model: str, replicas: tuple[int, int], wait: bool, as_json: bool, **options: Any
) -> None:  # fmt: skip
    """Keep a model served; with an alias the endpoint follows it when it moves.

    \b
    Examples:
      millrace deploy digits@champion --endpoint digits
      millrace deploy digits@2 --endpoint shadow --isolate
      millrace deploy digits@champion --endpoint digits --replicas 0..4
    """
    session.as_json = as_json
    least, most = replicas
    endpoint = session.call("endpoint.deploy", model=model, min_replicas=least, max_replicas=most, **options)
    if wait:
        endpoint = _wait_until_served(session, endpoint.name)
    if endpoint.state == "failed":
        raise StageError(f"{endpoint.name} is not served: {endpoint.text}")
    if as_json:
        session.print_json(endpoint)
    else:
        where = f" at {endpoint.url}/v2/models/{endpoint.name}" if endpoint.url else ""
        click.echo(f"{endpoint.name} {endpoint.state}: {endpoint.model} v{endpoint.number}{where}")


def _wait_until_served(session: Session, name: str) -> Any:
    """The endpoint once it is ready or has failed."""
    deadline = time.monotonic() + DEPLOY_TIMEOUT_S
    patient = hasattr(session.transport, "url")  # a server has answered: it leads soon, if none leads now
    while True:
        endpoint = session.call("endpoint.get", name=name)
        if endpoint.state in ("ready", "failed"):
            return endpoint
        if endpoint.state == "stopped" and not patient:
            raise UnavailableError(
                f"{name} is deployed, but nothing serves it: no server is running",
                hint="start one with `millrace up`: it serves what is deployed; `--no-wait` only writes what is wanted",
            )
        if time.monotonic() > deadline:
            raise UnavailableError(
                f"{name} is still {endpoint.state} after {DEPLOY_TIMEOUT_S:.0f} s",
                hint=f"`millrace endpoints show {name}` says why; the server's log says more",
            )
        time.sleep(0.1)


@click.command(short_help="Do works of a server on this machine.")
@click.argument("url")
@click.option("--token-file", metavar="FILE", help="A token with the scope `worker`; default: MILLRACE_TOKEN.")
@click.option("--ca-file", default="", metavar="FILE", help="The server's certificate, where no authority signed it.")
@click.option("--folder", default="millrace-worker", show_default=True, metavar="FOLDER", help="Everything goes there.")
@click.option("--name", default=platform.node, help="What people call this worker; default: the host's name.")
@json_option
@click.pass_obj
def worker(
    session: Session, url: str, token_file: str | None, ca_file: str, folder: str, name: str, as_json: bool
) -> None:
    """Ask a server for training steps and run them here; it wants `compute: workers` in its settings.

    Ctrl-C gives back what is being done. Steps run as this user: use one that owns nothing else.

    \b
    Examples:
      millrace worker https://10.0.0.5:7070 --token-file token.txt --ca-file cert.pem
    """
    if token_file is not None:
        token = Path(token_file).read_text(encoding="utf-8").strip()
    else:
        token = os.environ.pop("MILLRACE_TOKEN", "")  # so that no step inherits it

    session.as_json = as_json

    def say(text: str) -> None:
        if as_json:
            session.print_json({"worker": name, "text": text})
        else:
            click.echo(f" worker    {text}")

    say(f"{name} asks {url} for works")
    extras.load("millrace.wiring:run_worker")(
        say,
        url=url,
        token=token,
        ca_file=str(Path(ca_file).absolute()) if ca_file else "",
        folder=Path(folder),
        name=name,
    )


COMMANDS: tuple[click.Command, ...] = (up, deploy, worker)
