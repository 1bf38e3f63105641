"""The short verbs: init, demo, run, compress, serve, predict, open, status, logs, doctor, config."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Any

import click

from millrace.cli.derive import client_rate_option, json_option, queue_s_option
from millrace.cli.session import Session, plain
from millrace.core import extras
from millrace.core.errors import ConflictError, InputError, NotFoundError, from_dict
from millrace.core.settings import SPEC_NAME, find_home, resolve_settings

pass_session = click.pass_obj
RENDER = "millrace.cli.render"


@click.command(short_help="Write a spec: from a template or for your own table.")
@click.argument("template", required=False)
@click.argument("folder", required=False)
@click.option("--data", metavar="FILE", help="Your own table (CSV, Parquet, JSONL).")
@click.option("--label", metavar="COLUMN", help="The column to predict.")
@click.option("--force", is_flag=True, help="Overwrite an existing spec.")
@json_option
@pass_session
def init(
    session: Session, template: str | None, folder: str | None, data: str | None, label: str | None, force: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Write a spec: `init digits FOLDER` from a template, `init --data FILE --label COLUMN` for your own table.

    \b
    Examples:
      millrace init digits ./digits
      millrace init --data churn.csv --label churned
    """
    session.as_json = as_json
    if data is not None:
        if label is None:
            raise InputError("--data needs --label: the column to predict", hint="--label COLUMN")
        written = init_data(Path(data), label, Path(folder or template or "."), force=force)
    elif template is not None:
        written = init_template(template, Path(folder or template), force=force)
    else:
        raise InputError("want a template or --data FILE --label COLUMN", hint="templates: digits")
    if as_json:
        session.print_json({"files": [str(path) for path in written]})
        return
    for path in written:
        click.echo(f"wrote {path}")
    target = written[-1].parent
    step = "" if target == Path(".") or target == Path.cwd() else f"cd {target} && "
    click.echo(f"next: {step}millrace run")


def init_template(name: str, folder: Path, *, force: bool = False) -> list[Path]:
    """Copy a template; its data is made there and then."""
    templates = Path(__file__).parent.parent / "templates"
    source = templates / name
    known = sorted(path.name for path in templates.iterdir() if (path / SPEC_NAME).is_file())
    if name not in known:
        raise NotFoundError(f"there is no template {name!r}", hint=f"templates: {', '.join(known)}")
    extras.require([("polars", "data"), ("torch", "torch"), ("sklearn", "sklearn")], f"the template {name}")
    refuse_overwrite(folder / SPEC_NAME, force=force)
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "digits.csv"]
    extras.load("millrace.data.digits:write_digits_csv")(written[0])
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in (".py", ".yaml", ".md"):
            (folder / path.name).write_bytes(path.read_bytes())
            written.append(folder / path.name)
    return sorted(written, key=lambda path: path.name == SPEC_NAME)


def init_data(data: Path, label: str, folder: Path, *, force: bool = False) -> list[Path]:
    """Read a table and write the spec that fits it."""
    extras.require([("polars", "data")], "reading a table")
    if not data.exists() and not str(data).startswith("builtin:") and not any(one in str(data) for one in "*?["):
        raise NotFoundError(f"there is no file {data}", hint="check the path")
    refuse_overwrite(folder / SPEC_NAME, force=force)
    text = extras.load("millrace.data.propose:propose")(data, label)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SPEC_NAME).write_text(text, encoding="utf-8")
    return [folder / SPEC_NAME]


def refuse_overwrite(path: Path, *, force: bool) -> None:
    """A spec is never overwritten unasked."""
    if path.exists() and not force:
        raise ConflictError(f"{path} exists", hint="name another folder, or --force to overwrite it")


@click.command()
@click.option("--keep", is_flag=True, help="Then stay as `millrace serve` until Ctrl-C (exit code 0).")
@click.option("--folder", default="digits", show_default=True, help="Where to write it.")
@json_option
@pass_session
def demo(session: Session, keep: bool, folder: str, as_json: bool) -> None:
    """Watch the whole life cycle on real data: init digits and run, in half a minute.

    \b
    Examples:
      millrace demo
      millrace demo --keep
    """
    session.as_json = as_json
    target = Path(folder)
    if not (target / SPEC_NAME).is_file():
        init_template("digits", target)
    session.home = str(find_home(target.absolute()))
    code = drive(session, target / SPEC_NAME, ())
    if code == 0 and keep:
        serve_until_stopped(session, "digits")
    click.get_current_context().exit(code)


@click.command(short_help="Run the spec of this folder.")
@click.argument("spec", required=False)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a value: train.epochs=5.")
@click.option("--dry-run", is_flag=True, help="Say what would run again, and why.")
@click.option("--detach", is_flag=True, help="Run in the background.")
@json_option
@pass_session
def run(
    session: Session, spec: str | None, overrides: tuple[str, ...], dry_run: bool, detach: bool, as_json: bool
) -> None:
    """Run a spec: data, training, export, compression, registration, a served probe, drift.

    Finished steps are kept: only what changed runs again. Ctrl-C cancels gracefully, twice at once.

    \b
    Examples:
      millrace run
      millrace run --set train.epochs=5
      millrace run --dry-run
    """
    session.as_json = as_json
    path = find_spec(spec)
    if session.home is None:
        session.home = str(find_home(path.parent))
    if dry_run:
        plan = session.call("run.plan", spec_path=str(path), overrides=list(overrides))
        if as_json:
            session.print_json(plan)
        else:
            extras.load(f"{RENDER}:render_plan")(plan)
        return
    if detach:
        submitted = session.call("run.submit", spec_path=str(path), overrides=list(overrides), detach=True)
        if as_json:
            session.print_json({"run": submitted.run.id, "is_joined": submitted.is_joined})
        else:
            click.echo(f"running in the background: millrace logs, millrace runs show {submitted.run.id[:12]}")
        return
    click.get_current_context().exit(drive(session, path, overrides))


def find_spec(spec: str | None) -> Path:
    """The spec named, or millrace.yaml here or above."""
    if spec is not None:
        path = Path(spec).absolute()
        return path / SPEC_NAME if path.is_dir() else path
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / SPEC_NAME).is_file():
            return folder / SPEC_NAME
    return here / SPEC_NAME


def drive(session: Session, path: Path, overrides: tuple[str, ...]) -> int:
    """Submit, show events, return the exit code."""
    submitted = session.call("run.submit", spec_path=str(path.absolute()), overrides=list(overrides))
    events = session.stream("run.drive", run=submitted.run.id)
    if submitted.is_joined and not session.as_json:
        click.echo("this spec is running already: following it")
    error = extras.load("millrace.cli.progress:show_run")(events, path, as_json=session.as_json)
    if error is None:
        return 0
    return session.fail(from_dict(error))


@click.command(hidden=True)
@click.argument("run_id")
@pass_session
def drive_detached(session: Session, run_id: str) -> None:
    """Drive a run that was submitted before."""
    for event in session.stream("run.drive", run=run_id):
        if event.kind == "end" and event.error is not None:
            raise from_dict(event.error)


@click.command(short_help="Make a smaller ONNX file under a guarantee.")
@click.argument("path")
@click.option("--data", required=True, metavar="FILE", help="Labelled rows (CSV, Parquet, JSONL).")
@click.option("--label", required=True, metavar="COLUMN", help="The column with the right answers.")
@click.option("--to", metavar="FOLDER", help="Where to write the variants; default: NAME-variants.")
@click.option("--max-drop", metavar="SHARE", help="What may be lost, e.g. 1pp.")
@click.option("--max-changed", metavar="SHARE", help="How many answers may change, e.g. 5%.")
@click.option("--threads", type=int, default=1, show_default=True, help="Threads when measuring.")
@json_option
@pass_session
def compress(session: Session, path: str, as_json: bool, **options: Any) -> None:
    """Make smaller variants of an ONNX file, each with a bound on what it loses.

    \b
    Example:
      millrace compress model.onnx --data rows.parquet --label y
    """
    session.as_json = as_json
    answer = session.call("model.compress", path=path, **options)
    if as_json:
        session.print_json(answer)
    else:
        extras.load(f"{RENDER}:render_compressed")(answer)


@click.command(short_help="Serve models and watch them.")
@click.argument("models", nargs=-1, metavar="MODEL…")
@click.option("--port", type=int, help="Default: the spec's serve.port, else 8080; 0 takes a free one.")
@click.option("--grpc-port", type=click.IntRange(0, 65535), help="Answer gRPC as well; 0 takes a free one.")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Only loopback, as long as nobody is asked who they are."
)
@click.option("--processes", type=click.IntRange(1, 64), default=1, help="So many share the port: for small models.")
@click.option("--tls-cert", metavar="FILE", help="The server's certificate (PEM): it speaks HTTPS then.")
@click.option("--tls-key", metavar="FILE", help="Its private key (PEM), where it does not stand with the certificate.")
@click.option("--tls-client-ca", metavar="FILE", help="Every client must bring a certificate of this authority.")
@click.option("--token-file", metavar="FILE", help="Every request must bring one of these tokens, a line each.")
@click.option("--allowed-host", multiple=True, metavar="NAME", help="Clients call the server by this name too.")
@click.option("--threads", type=click.IntRange(0, 256), help="Of one call; 0, the default: found out by measuring.")
@click.option("--slo-p99-ms", type=float, metavar="MS", help="Of 100 requests 99 within that: batches take half of it.")
@client_rate_option
@queue_s_option
@click.option("--explain", is_flag=True, help="Say how the model is called best on this machine, and exit.")
@click.option("--variant", help="Default: the variant that the version chose.")
@click.option("--name", help="Of the endpoint, for one path. Default: from the class, the folder, the ensemble.")
@click.option("--all", "all_models", is_flag=True, help="Every model of the registry, loaded when first asked for.")
@click.option("--cache", type=click.IntRange(min=0), metavar="N", help="Keep so many answers for equal inputs.")
@click.option(
    "--capture", type=click.FloatRange(0, 1), metavar="SHARE", help="Keep this share of requests with their answers."
)
@click.option("--access-log", metavar="FILE", help="A line of JSON for each request; - is the standard error.")
@click.option("--trace", type=click.FloatRange(0, 1), metavar="SHARE", help="Begin a trace for this share of requests.")
@click.option("--memory-budget", metavar="SIZE", help="Of all loaded models; idle ones are unloaded, the oldest first.")
@json_option
@pass_session
def serve(session: Session, models: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Serve models in the foreground: Open Inference Protocol, rows, metrics, drift alerts.

    MODEL is one of the registry, or your own: file.py:Class, a folder with model.py and model.safetensors, or an
    ensemble.yaml. Ctrl-C (or SIGTERM) answers what is in flight and stops: exit code 0.

    \b
    Examples:
      millrace serve digits
      millrace serve digits@champion --port 9000
      millrace serve service.py:Fraud --name fraud
      millrace serve --all --memory-budget 2GB
      millrace serve digits --capture 0.01 --access-log requests.jsonl
      millrace serve digits --slo-p99-ms 50 --queue-s 0.2 --client-rate 100
      millrace serve digits --explain
      millrace serve digits --host 0.0.0.0 --tls-cert server.pem --tls-client-ca clients.pem
    """
    session.as_json = as_json
    if not models and not options["all_models"]:
        raise click.UsageError("want a MODEL, or --all")
    options["all"] = options.pop("all_models")
    serve_until_stopped(session, *(models[:1] or [""]), more=models[1:], **options)


def serve_until_stopped(session: Session, model: str, **options: Any) -> None:
    """Print what the endpoint's supervisor says."""
    for event in session.stream("endpoint.serve", model=model, **options):
        if session.as_json:
            session.print_json(event.facts if event.kind == "calibration" else event)
        elif event.kind == "calibration":
            extras.load(f"{RENDER}:render_calibration")(event)
        else:
            click.echo(f" {event.kind:<9} {event.text}")


@click.command(short_help="Answers for rows of files.")
@click.argument("model")
@click.argument("more", nargs=-1, metavar="[FILE]...")
@click.option("--input", "inputs", required=True, multiple=True, metavar="FILE", help="Rows: CSV, JSONL or Parquet.")
@click.option("--output", metavar="PLACE", help="Write them here: a file, or a folder of parts.")
@click.option(
    "--format", type=click.Choice(["parquet", "csv", "jsonl"]), help="Default: the file's; Parquet in a folder."
)
@click.option(
    "--on-error", type=click.Choice(["fail", "skip"]), default="fail", show_default=True,
    help="What becomes of a bad row.",
)  # fmt: skip
@click.option("--part-rows", type=int, metavar="N", help="Rows in each part of a folder; default: 262144.")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Processes; default: one for each core.")
@json_option
@pass_session
def predict(
    session: Session, model: str, more: tuple[str, ...], inputs: tuple[str, ...], output: str | None, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Answer every row of files; a bare name means its champion. Columns that the model does not read are dropped.

    Into a folder: on all cores, in parts that are written once and whole. The same command goes on where it stopped.

    \b
    Examples:
      millrace predict digits --input rows.csv
      millrace predict digits@champion --input rows.csv --output answers.csv
      millrace predict digits --input 'data/*.parquet' --output answers/
      millrace predict digits --input rows.jsonl --output answers/ --on-error skip --format csv
    """
    session.as_json = as_json
    predicting, paths = "millrace.cli.predicting", [*inputs, *more]
    if output is None and (len(paths) > 1 or extras.load(f"{predicting}:is_folder")("one.csv", paths)):
        raise InputError("answers for several files want a folder", hint="--output answers/")
    opened = session.call("model.open", model=model)
    name = f"{opened.name} v{opened.number} ({opened.variant})"
    if output is None and as_json:
        session.print_json(extras.load(f"{predicting}:predict_file")(opened, Path(paths[0])))
    elif output is None:
        extras.load(f"{RENDER}:render_answers")(*extras.load(f"{predicting}:first_answers")(opened, Path(paths[0])))
    elif extras.load(f"{predicting}:is_folder")(output, paths):
        summary = extras.load(f"{predicting}:predict_to_folder")(opened, paths, output, options, as_json=as_json)
        session.print_json(summary) if as_json else extras.load(f"{predicting}:render_summary")(summary, name)
    else:
        count = extras.load(f"{predicting}:predict_to_file")(opened, paths, Path(output), options)
        session.print_json({"answers": count, "output": output}) if as_json else click.echo(
            f"{count} answers of {name} -> {output}"
        )


@click.command("open")
@click.argument("run", default="last")
@json_option
@pass_session
def open_report(session: Session, run: str, as_json: bool) -> None:
    """Open a run's report in the browser.

    \b
    Example:
      millrace open
    """
    session.as_json = as_json
    view = session.call("run.get", run=run)
    if view.report_path is None:
        why = "it is written when the run ends" if view.run.spec_path else "only runs of a spec have one: `millrace up`"
        raise NotFoundError(f"run {run!r} has no report", hint=why)
    if as_json:
        session.print_json({"report": view.report_path})
        return
    click.echo(view.report_path)
    is_page = view.report_path.startswith(("http://", "https://"))  # of a server on another machine
    webbrowser.open(view.report_path if is_page else Path(view.report_path).as_uri())


@click.command()
@json_option
@pass_session
def status(session: Session, as_json: bool) -> None:
    """What there is, at a glance.

    \b
    Example:
      millrace status
    """
    session.as_json = as_json
    answer = session.call("system.status")
    if as_json:
        session.print_json(answer)
    else:
        extras.load(f"{RENDER}:render_status")(answer)


@click.command(short_help="What a step printed.")
@click.argument("run", default="last")
@click.option("--step", help="Default: the failed one, else the last.")
@click.option("--follow", "-f", is_flag=True, help="Go on until the step ends.")
@json_option
@pass_session
def logs(session: Session, run: str, step: str | None, follow: bool, as_json: bool) -> None:
    """What a step printed.

    \b
    Examples:
      millrace logs
      millrace logs --step train --follow
    """
    session.as_json = as_json
    offset = 0
    while True:
        answer = session.call("run.logs", run=run, step=step, offset=offset)
        if as_json:
            session.print_json(answer)
            return
        click.echo(answer.text, nl=False)
        offset = answer.next_offset
        if not follow or answer.is_finished:
            return
        if not answer.text:
            extras.load("time:sleep")(0.2)


@click.command()
@json_option
@pass_session
def doctor(session: Session, as_json: bool) -> None:
    """Check this machine and home: packages, disk, records, every bundle's digest.

    \b
    Example:
      millrace doctor
    """
    session.as_json = as_json
    checks = session.call("system.doctor")
    if as_json:
        session.print_json(checks)
    else:
        extras.load(f"{RENDER}:render_checks")(checks)
    if not all(check.ok for check in checks if not check.name.startswith("extra ")):
        click.get_current_context().exit(1)


@click.command()
@json_option
@pass_session
def config(session: Session, as_json: bool) -> None:
    """Settings, and where each value comes from.

    \b
    Example:
      millrace config
    """
    session.as_json = as_json
    home = Path(session.home) if session.home else find_home(Path.cwd())
    values = list(resolve_settings({"home": session.home}, home=home).values())
    if as_json:
        session.print_json([plain(value) for value in values])
    else:
        extras.load(f"{RENDER}:render_settings")(values, home)


drive_detached.name = "drive"
COMMANDS: tuple[click.Command, ...] = (
    init, demo, run, compress, serve, predict, open_report, status, logs, doctor, config, drive_detached,
)  # fmt: skip
