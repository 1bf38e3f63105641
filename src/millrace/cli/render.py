"""Tables and values for people."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from millrace.cli.lines import flat, step_line, variant_rows, verdict_line
from millrace.cli.session import plain
from millrace.cli.terminal import plain_stdout
from millrace.core.units import format_duration, format_size
from millrace.core.visible import visible

_UNSHOWN = frozenset({"version"})
_TIMES = frozenset({"WHEN", "SINCE", "CREATED", "CREATED AT", "EXPIRES", "LAST USED", "STARTED"})
_STYLES = {"succeeded": "green", "ready": "green", "failed": "red", "open": "red", "running": "cyan"}


class VisibleConsole(Console):
    """Colours and tables of ours, with texts that are shown as they are."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The parts; their texts may be of anybody."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def console() -> Console:
    """A console on the present stdout, wide enough for its lines when it is not a terminal."""
    made = VisibleConsole(highlight=False, file=plain_stdout())
    return made if made.is_terminal else VisibleConsole(highlight=False, width=160, file=plain_stdout())


def print_table(header: list[str], rows: list[list[Any]]) -> None:
    """A plain table."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold", no_wrap=name in _TIMES)
    for row in rows:
        table.add_row(*(Text(str(cell), style=_STYLES.get(str(cell), "")) for cell in row))
    console().print(table)


def when(at: float | None) -> str:
    """A local time, to the second."""
    return datetime.datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M:%S") if at else "-"


def render_value(value: Any) -> None:
    """Any answer: its fields, one per line."""
    data = plain(value)
    if isinstance(data, dict):
        print_table(["FIELD", "VALUE"], [[key, _field(key, item)] for key, item in data.items()])
    elif isinstance(data, list):
        for item in data:
            render_value(item)
    else:
        console().print(str(data))


def _field(name: str, value: Any) -> str:
    if isinstance(value, str | bool | list | tuple | dict | None):
        return when(None) if value is None else _cell(value) or "-"
    for ending, show in (("_at", when), ("_bytes", format_size), ("_s", format_duration)):
        if name.endswith(ending) and name != "requests_per_s":
            return show(value)
    return _cell(value)


def _cell(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "-" if value is None else "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_cell(item)}" for key, item in list(value.items())[:12]) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value[:8]) + (" …" if len(value) > 8 else "")
    return str(value)


def render_erasure(answer: Any) -> None:
    """What was, or would be, erased."""
    render_value(answer)
    if not answer.applied:
        console().print("nothing was changed yet: --apply does it")


def render_runs(runs: list[Any]) -> None:
    """Runs, newest first."""
    rows = []
    for run in runs:
        took = format_duration(run.ended_at - run.started_at) if run.ended_at and run.started_at else "-"
        rows.append([run.id[:16], run.name, run.state, when(run.created_at), took])
    print_table(["RUN", "NAME", "STATE", "STARTED", "TOOK"], rows)


def render_projects(projects: list[Any]) -> None:
    """Projects, newest first."""
    rows = [[one.name, one.project, one.id, when(one.created_at)] for one in projects]
    print_table(["PROJECT", "KEY", "ID", "CREATED"], rows)


def render_run(view: Any) -> None:
    """A run with the line of every step."""
    render_runs([view.run])
    framework = next((step.facts.get("framework", "torch") for step in view.steps if step.stage == "train"), "torch")
    rows = []
    for step in view.steps:
        text = step_line(step.name, step.facts, framework) if step.facts else (step.error or {}).get("message", "-")
        rows.append([step.name, step.state, text, step.reason])
    print_table(["STEP", "STATE", "RESULT", "WHY"], rows)
    if view.report_path:
        console().print(f"report {view.report_path}")


def render_datasets(versions: list[Any]) -> None:
    """Dataset versions, newest first."""
    rows = [
        [f"{one.name}@{one.number}", one.facts.get("rows_kept"), one.facts.get("rejected"), one.facts.get("task"),
         when(one.created_at)]
        for one in versions
    ]  # fmt: skip
    print_table(["DATASET", "ROWS", "REJECTED", "TASK", "CREATED"], rows)


def render_dataset(version: Any) -> None:
    """One dataset version with its columns."""
    render_datasets([version])
    columns = version.facts.get("columns", [])
    header = ["name", "type", "role", "missing", "distinct", "mean", "sd", "min", "max"]
    rows = [[_number(column.get(key)) for key in header] for column in columns]
    print_table([name.upper() for name in header], rows)


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def render_models(views: list[Any]) -> None:
    """Model versions, newest first."""
    rows = [
        [f"{view.name}@{view.version}", ", ".join(view.aliases) or "-", view.variant, view.source, view.digest[:19],
         when(view.created_at)]
        for view in views
    ]  # fmt: skip
    print_table(["MODEL", "ALIASES", "VARIANT", "SOURCE", "DIGEST", "CREATED"], rows)


def render_model(detail: Any) -> None:
    """A version, its aliases' history, its card."""
    render_models([detail.view])
    _print_moves(detail.aliases)
    if detail.view.card:
        console().print(detail.view.card, markup=False)


def render_alias(alias: Any) -> None:
    """One alias, and how it moved."""
    _print_moves([alias])


def _print_moves(aliases: list[Any]) -> None:
    rows = [
        [alias.name, move.get("from") or "-", move["to"], when(move["at"]), move.get("reason", "")]
        for alias in aliases
        for move in alias.history
    ]
    print_table(["ALIAS", "FROM", "TO", "WHEN", "WHY"], rows)


def render_endpoints(endpoints: list[Any]) -> None:
    """Endpoints."""
    rows = [
        [one.name, one.state, f"{one.model}@{one.number}", one.variant or "chosen", _replicas(one), one.url or "-",
         one.text] for one in endpoints
    ]  # fmt: skip
    print_table(["ENDPOINT", "STATE", "MODEL", "VARIANT", "REPLICAS", "URL", "WHY"], rows)


def _replicas(endpoint: Any) -> str:
    """How many serve now, and how few and how many there may be."""
    if not endpoint.is_managed:
        return "-"
    least, most = endpoint.min_replicas, endpoint.max_replicas
    return str(endpoint.replicas) if (least, most) == (1, 1) else f"{endpoint.replicas}/{least}..{most}"


def render_endpoint(endpoint: Any) -> None:
    """One endpoint."""
    render_endpoints([endpoint])


def render_forecast(forecast: Any) -> None:
    """How long it takes, as a sentence."""
    click.echo(forecast.text)


def render_rollout(endpoint: Any) -> None:
    """An endpoint, and how its candidate compares with what it serves."""
    render_endpoints([endpoint])
    rollout = endpoint.rollout
    if rollout is None:
        return
    click.echo()
    evidence, mirrored = rollout.facts.get("evidence", {}), rollout.facts.get("mirrored", {})
    share = rollout.weight if rollout.is_active else 100.0 if rollout.state == "promoted" else 0.0
    arms = [(f"v{rollout.base}", "baseline", 100.0 - share, "base"),
            (f"v{rollout.label}", "shadow" if rollout.is_shadow else "candidate", share, "candidate")]  # fmt: skip
    rows = [[name, what, f"{weight:g} %", *_rates(evidence.get(key, {}))] for name, what, weight, key in arms]
    print_table(["VERSION", "AS", "SHARE", "REQUESTS", "FAILED", "SLOW"], rows)
    if mirrored:
        seen, changed, largest, failed, dropped = (
            mirrored.get(f"mirrored_{name}", 0) for name in ("rows", "changed", "max_difference", "failed", "dropped")
        )
        share = f"{changed / seen:.2%}" if seen else "-"
        rows = [[f"{seen:.0f}", share, f"{largest:.3g}", f"{failed:.0f}", f"{dropped:.0f}"]]
        print_table(["COPIED ROWS", "OTHER ANSWER", "LARGEST DIFFERENCE", "FAILED", "DROPPED"], rows)
    console().print(f"rollout {rollout.state}{f': {rollout.reason}' if rollout.reason else ''}", markup=False)
    if rollout.state == "running" and not rollout.is_shadow:
        steps = ", ".join(f"{step:g}" for step in rollout.steps)
        against = rollout.facts.get("against", 1.0)
        console().print(
            f"step {rollout.step + 1} of {len(rollout.steps)} ({steps} %); evidence against it {against:.2g}, "
            "rolled back at 20",
            markup=False,
        )


def _rates(arm: Any) -> list[str]:
    requests, timed = arm.get("requests", 0), arm.get("timed", 0)
    return [
        str(requests),
        f"{arm['errors'] / requests:.2%}" if requests else "-",
        f"{arm['slow'] / timed:.2%}" if timed else "-",
    ]


def render_alerts(alerts: list[Any]) -> None:
    """Alerts, newest first."""
    rows = [
        [one.id[:16], one.state, one.endpoint, f"{one.score:.2f} > {one.threshold:.2f}", one.title,
         when(one.created_at)]
        for one in alerts
    ]  # fmt: skip
    print_table(["ALERT", "STATE", "ENDPOINT", "SCORE", "WHAT", "WHEN"], rows)


def render_alert(alert: Any) -> None:
    """One alert with its strongest features."""
    render_alerts([alert])
    top = alert.facts.get("top", [])
    if top:
        rows = [[one["name"], f"{one['score']:.2f}", f"{one['threshold']:.2f}"] for one in top]
        print_table(["FEATURE", "SCORE", "THRESHOLD"], rows)


def render_rows(values: list[Any]) -> None:
    """Records as a table of their own fields."""
    rows = [{key: value for key, value in plain(one).items() if key not in _UNSHOWN} for one in values]
    header = [key for key in rows[0] if any(row[key] not in ("", None, []) for row in rows)] if rows else []
    cells = [[_field(key, row[key]) for key in header] for row in rows]
    print_table([name.replace("_", " ").upper() for name in header], cells)


def render_users(users: Any) -> None:
    """Users, or one: how they sign in, what they may, since when, and whether they are refused."""
    rows = [
        [one.name, _signs_in(one), ", ".join(one.roles) or "none", ", ".join(one.groups) or "-",
         "disabled" if one.disabled_at else when(one.created_at)]
        for one in _several(users)
    ]  # fmt: skip
    print_table(["USER", "SIGNS IN WITH", "ROLES", "GROUPS", "SINCE"], rows)


def _signs_in(user: Any) -> str:
    if user.is_service:
        return "tokens"
    first = "a password" if user.has_password else "a provider" if user.external else "nothing yet"
    return f"{first}, code" if user.has_totp else first


def render_roles(roles: Any) -> None:
    """Roles, or one."""
    rows = [
        [
            one.name,
            one.description or "-",
            _cell([*one.allow, *(["reading"] if one.reads else [])]) or "-",
            _cell(one.deny) or "-",
        ]
        for one in _several(roles)
    ]
    print_table(["ROLE", "WHAT FOR", "ALLOWS", "DENIES"], rows)


def render_bindings(bindings: Any) -> None:
    """Who has which role where."""
    rows = [
        [one.principal.removeprefix("user:"), one.role, "everywhere" if one.where == "*" else one.where,
         when(one.created_at)]
        for one in _several(bindings)
    ]  # fmt: skip
    print_table(["WHO", "ROLE", "PROJECT", "SINCE"], rows)


def render_approvals(approvals: Any) -> None:
    """Promotions that waited, or wait."""
    rows = [
        [one.id, f"{one.model}@{one.number} -> {one.alias}", one.asked_by, ", ".join(one.approved_by) or "-", one.state]
        for one in _several(approvals)
    ]
    print_table(["APPROVAL", "PROMOTION", "ASKED BY", "AGREED", "STATE"], rows)


def render_approval_rules(rules: Any) -> None:
    """Which promotions want other people."""
    rows = [[one.project, one.alias, one.needed, when(one.created_at)] for one in _several(rules)]
    print_table(["PROJECT", "ALIAS", "OTHERS NEEDED", "SINCE"], rows)


def render_quotas(quotas: Any) -> None:
    """Bounds of projects."""
    rows = [
        [one.project, "-" if one.storage_bytes is None else format_size(one.storage_bytes), _number(one.runs),
         _number(one.requests_per_s)]
        for one in _several(quotas)
    ]  # fmt: skip
    print_table(["PROJECT", "STORAGE", "RUNS AT ONCE", "REQUESTS/S"], rows)


def render_secrets(secrets: Any) -> None:
    """Names of secrets, and when their values changed."""
    print_table(["SECRET", "PROJECT", "CHANGED"], [[s.name, s.project, when(s.changed_at)] for s in _several(secrets)])


def _several(answer: Any) -> list[Any]:
    return answer if isinstance(answer, list) else [answer]


def render_tokens(tokens: Any) -> None:
    """A table of tokens, or of one."""
    rows = [
        [
            token.name,
            token.prefix + "…",
            " ".join(token.scopes),
            _token_ends(token),
            when(token.last_used_at),
        ]
        for token in _several(tokens)
    ]
    print_table(["TOKEN", "BEGINS WITH", "SCOPES", "EXPIRES", "LAST USED"], rows)


def _token_ends(token: Any) -> str:
    if token.revoked_at:
        return "revoked"
    if token.expires_at is None:
        return "never"
    return "expired" if token.expires_at < time.time() else when(token.expires_at)


def render_created_token(created: Any) -> None:
    """The secret alone on the last line, so that it can be piped."""
    click.echo(f"token {created.token.name} ({' '.join(created.token.scopes)}); shown this once:", err=True)
    click.echo(created.secret)


def render_gc(answer: Any) -> None:
    """What was, or would be, freed."""
    would = "" if answer.applied else "would be "
    rows = [
        [f"{would}deleted", str(answer.purged), format_size(answer.purged_bytes), "put aside long enough ago"],
        [f"{would}put aside", str(answer.blobs), format_size(answer.size_bytes), "nothing refers to them"],
        [f"{would}kept", str(answer.kept), "", "referred to, or young"],
    ]
    print_table(["BLOBS", "COUNT", "SIZE", "WHY"], rows)
    if answer.runs:
        console().print(f"{answer.runs} deleted runs {would or 'were '}removed for good")
    for count, what in ((answer.uploads, "unfinished uploads"), (answer.values, "values of runs that are gone")):
        if count:
            console().print(f"{count} {what} {would or 'were '}removed")
    if not answer.applied:
        console().print("`millrace system gc --apply` does it")
    elif answer.blobs and not answer.purged:
        console().print("what is put aside comes back to whoever asks for it; a later gc deletes it")


def render_du(answer: Any) -> None:
    """Bytes by folder."""
    rows = [[name, format_size(size)] for name, size in answer.parts.items()]
    print_table(["PART", "SIZE"], [*rows, ["total", format_size(answer.total_bytes)]])
    console().print(answer.home)


def render_backups(backups: list[Any]) -> None:
    """Backups, newest first."""
    rows = [
        [one.id, when(one.created_at), one.rows, one.blobs, format_size(one.size_bytes), one.problem or "-"]
        for one in backups
    ]
    print_table(["BACKUP", "MADE", "ROWS", "BLOBS", "SIZE", "PROBLEM"], rows)


def render_plan(plan: Any) -> None:
    """What would run, and why."""
    print_table(["STEP", "ACTION", "WHY"], [[step.name, step.action, step.reason] for step in plan.steps])


def render_status(answer: Any) -> None:
    """Counts at a glance."""
    rows = [["home", answer.home], ["runs", f"{answer.runs} ({len(answer.running)} running)"],
            ["datasets", answer.datasets], ["models", answer.models], ["open alerts", answer.open_alerts]]  # fmt: skip
    print_table(["WHAT", ""], rows)
    if answer.endpoints:
        render_endpoints(answer.endpoints)


def render_checks(checks: list[Any]) -> None:
    """One line per check."""
    rows = [
        ["ok" if check.ok else "NOT OK", check.name, check.text, "" if check.ok else check.hint] for check in checks
    ]
    print_table(["", "CHECK", "FOUND", "DO"], rows)


def render_settings(values: list[Any], home: Path) -> None:
    """Settings with their origin."""
    in_home = {"home": home, "records_url": home / "records.db", "blobs_url": home / "blobs"}
    rows = [
        [value.name, value.value if value.value != "" else in_home.get(value.name, "-"), value.origin, value.summary]
        for value in values
    ]
    print_table(["SETTING", "VALUE", "FROM", "WHAT"], rows)


def render_answers(answers: list[dict[str, Any]], total: int) -> None:
    """The first answers, and how many there are."""
    rows = [flat(answer) for answer in answers]
    if rows:
        print_table([key.upper() for key in rows[0]], [[_number(cell) for cell in row.values()] for row in rows])
    if total > len(answers):
        console().print(f"… {total} answers in all; --output FILE writes them")


def render_compressed(answer: Any) -> None:
    """The table of variants of a foreign model."""
    header, *rows = variant_rows(answer.facts)
    print_table(header, [list(row) for row in rows])
    console().print(verdict_line(answer.facts).replace("Serving", "Best:"))
    console().print(f"variants {answer.folder}")


def render_calibration(event: Any) -> None:
    """How a model is called, and what was measured for it."""
    said = event.facts
    found = said["calibration"]
    rows = [
        [
            f"{one['layout']['callers']} x {one['layout']['threads']}", "yes" if one["layout"]["is_spinning"] else "no",
            str(one["rows"]), f"{one['row_s'] * one['rows'] * one['layout']['callers'] * 1e3:.3f} ms",
            f"{1 / one['row_s']:,.0f}", str(one["times"]), _prize(one, found),
        ]
        for one in found["timings"]
    ]  # fmt: skip
    if rows:
        print_table(["CALLS x THREADS", "SPINNING", "ROWS", "A CALL", "ROWS/S", "MEASURED", ""], rows)
    cost, out = found["deep_cost"], console()
    out.print(event.text)
    out.print(
        f"a call takes {cost['base_s'] * 1e3:.3f} ms + {cost['per_row_s'] * 1e3:.4f} ms a row ({found['source']})"
    )
    where = "on the event loop" if said["is_inline"] else "on threads"
    out.print(f"calls run {where}; {said['cores']} cores of {said['processor']}")
    if said["slo_p99_ms"] is not None:
        out.print(f"within {said['slo_p99_ms']:g} ms: {said['rows']} rows a call at most")


def _prize(timing: dict[str, Any], found: dict[str, Any]) -> str:
    """What a cell is used for."""
    is_alone = timing["layout"] == found["shallow"] and timing["rows"] == 1
    is_many = timing["layout"] == found["deep"] and timing["rows"] == found["deep_cost"]["best_rows"]
    return ", ".join([name for name, holds in (("alone", is_alone), ("many", is_many)) if holds])
