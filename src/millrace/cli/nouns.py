"""The noun groups: `millrace runs` lists, `show` and the other verbs are derived."""

from __future__ import annotations

from typing import Any

import click

from millrace.cli import (
    audit_verbs,
    backup_verbs,
    compliance_verbs,
    endpoint_verbs,
    secret_verbs,
    trusted_key_verbs,
    user_verbs,
)
from millrace.cli.derive import derive_command, json_option, plural, print_answer
from millrace.cli.session import Session
from millrace.core.errors import DeniedError
from millrace.core.operations.table import OPERATIONS

NOUNS: dict[str, tuple[str, ...]] = {
    "run": ("list", "get", "diff", "cancel", "delete", "restore"),
    "project": ("list", "create", "update", "delete", "restore"),
    "dataset": ("list", "get", "diff"),
    "model": ("list", "get", "register", "promote", "rollback", "export"),
    "endpoint": ("list", "get", "delete", "promote", "abort", "forecast", "captured"),
    "alert": ("list", "get", "resolve"),
    "token": ("list", "create", "revoke"),
    "approval": ("list", "approve", "refuse"),
    "approval_rule": ("list", "set", "delete"),
    "quota": ("list", "set"),
    "key": ("list", "rotate", "drop"),
    "secret": ("list", "delete"),
    "trusted_key": ("list", "revoke"),
    "user": ("list", "get", "disable_totp", "disable", "enable", "who_can"),
    "role": ("list", "create", "delete", "bindings", "grant", "revoke"),
}
_TABLES = {"key": "render_rows", "trusted_key": "render_rows"}
_RENDERERS = {
    ("token", "create"): "render_created_token",
    ("token", "revoke"): "render_tokens",
    ("model", "promote"): "render_alias",
    ("endpoint", "promote"): "render_rollout",
    ("endpoint", "abort"): "render_rollout",
    ("endpoint", "forecast"): "render_forecast",
    ("endpoint", "captured"): "render_value",
    ("model", "rollback"): "render_alias",
    ("user", "get"): "render_value",
    ("user", "who_can"): "render_rows",
    ("user", "disable"): "render_users",
    ("user", "enable"): "render_users",
    ("user", "disable_totp"): "render_users",
    ("role", "bindings"): "render_bindings",
    ("role", "grant"): "render_bindings",
    ("role", "revoke"): "render_bindings",
    ("role", "create"): "render_roles",
    ("role", "delete"): "render_roles",
    ("approval", "approve"): "render_approvals",
    ("approval", "refuse"): "render_approvals",
    ("approval_rule", "set"): "render_approval_rules",
    ("approval_rule", "delete"): "render_approval_rules",
    ("quota", "set"): "render_quotas",
    ("secret", "delete"): "render_secrets",
}
_EXAMPLES = {
    ("token", "create"): ("gpu-1", "deploy-bot-1 --user deploy-bot --scope operator:digits --expires 720h"),
    ("endpoint", "abort"): ("digits --reason 'fails on old clients'",),
    ("endpoint", "forecast"): ("digits --weight 10",),
    ("endpoint", "captured"): ("digits",),
    ("role", "create"): ("releaser --allow 'model.*,endpoint.deploy' --deny model.register",),
    ("role", "grant"): ("ada developer --project digits", "group:ml-team viewer"),
    ("role", "revoke"): ("ada developer --project digits",),
    ("user", "who_can"): ("model.promote --project digits",),
    ("quota", "set"): ("digits --storage 50GB --runs 4", "digits      # no bounds any more"),
    ("secret", "delete"): ("DB_PASSWORD --in-project digits",),
}
_SUMMARIES = {
    "run": "Runs: what was executed, with every step.",
    "project": "Projects: what runs belong to.",
    "dataset": "Dataset versions.",
    "model": "Model versions, aliases, promotion and roll-back.",
    "endpoint": "Served models, and rollouts of new versions.",
    "alert": "What needs a look.",
    "approval": "Promotions that wait for a second person.",
    "approval_rule": "Which promotions want a second person.",
    "quota": "What projects may use.",
    "key": "Keys of keys: what blobs and secrets are encrypted with.",
    "secret": "Secrets: values that only steps see which name them.",
    "trusted_key": "Keys whose signatures count: of models, of the audit, of backups.",
    "user": "Users and service accounts; who may do what.",
    "role": "Roles: built in, your own, and who has which.",
    "token": "Tokens: what clients and workers prove themselves with.",
}


_OWN_VERBS = {"user": user_verbs.COMMANDS, "secret": secret_verbs.SECRETS, "key": secret_verbs.KEYS,
              "trusted_key": trusted_key_verbs.COMMANDS, "endpoint": endpoint_verbs.COMMANDS,
              "model": compliance_verbs.MODELS, "run": compliance_verbs.RUNS}  # fmt: skip


def groups() -> list[click.Group]:
    """One group per noun, and `system`."""
    return [*(_group(noun, verbs) for noun, verbs in NOUNS.items()), _system()]


def _group(noun: str, verbs: tuple[str, ...]) -> click.Group:
    listing = OPERATIONS[f"{noun}.list"]
    show = _TABLES.get(noun, f"render_{plural(noun).replace('-', '_')}")

    def callback(as_json: bool, limit: int) -> None:
        context = click.get_current_context()
        session: Session = context.obj
        session.as_json = as_json
        if context.invoked_subcommand is None:
            _print_list(session, session.call(listing.name, limit=limit), noun, show)

    help_text = f"{_SUMMARIES[noun]}\n\n\b\nExamples:\n  millrace {plural(noun)}\n  millrace {plural(noun)} --json"
    group = click.Group(plural(noun), callback=callback, invoke_without_command=True, help=help_text)
    group.params.append(click.Option(["--limit"], type=int, default=100, show_default=True, help="At most so many."))
    json_option(group)
    for verb in verbs:
        name = "show" if verb == "get" else verb.replace("_", "-")
        renderer = _RENDERERS.get((noun, verb), show if verb == "list" else f"render_{noun}" if verb == "get" else None)
        group.add_command(derive_command(OPERATIONS[f"{noun}.{verb}"], name, renderer, _EXAMPLES.get((noun, verb), ())))
    for command in _OWN_VERBS.get(noun, ()):
        group.add_command(command)
    return group


def _print_list(session: Session, answer: list[Any], noun: str, show: str) -> None:
    if not answer and not session.as_json:
        try:
            place = session.call("system.status").home
        except DeniedError:  # who may look at a project need not know where the home is
            place = "what you may see"
        click.echo(f"no {plural(noun)} in {place}")
        return
    print_answer(session, answer, show)


def _system() -> click.Group:
    group = click.Group("system", help="The home: disk, garbage, backups, audit.\n\n\b\nExample:\n  millrace system du")
    group.add_command(derive_command(OPERATIONS["system.gc"], "gc", "render_gc"))
    group.add_command(derive_command(OPERATIONS["system.du"], "du", "render_du"))
    places = ("--records-to postgresql://millrace@db.example.com/millrace", "--blobs-to s3://bucket/millrace",
              "--records-to home --blobs-to home")  # fmt: skip
    group.add_command(derive_command(OPERATIONS["system.migrate"], "migrate", examples=places))
    for command in (*backup_verbs.commands(), audit_verbs.audit):
        group.add_command(command)
    return group
