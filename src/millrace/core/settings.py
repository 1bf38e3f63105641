"""Settings: flag > environment > project file > user file > default, and where each came from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from millrace.core.errors import InputError
from millrace.core.spec_source import parse_yaml

HOME_NAME = ".millrace"
SPEC_NAME = "millrace.yaml"


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """One setting: its name, type, default and what it does."""

    name: str
    type: type
    default: Any
    summary: str

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return "MILLRACE_" + self.name.upper()


SETTINGS: tuple[Setting, ...] = (
    Setting(name="home", type=str, default="", summary="Folder of the home; default: .millrace beside the spec."),
    Setting(name="url", type=str, default="", summary="A running server to talk to; default: the one in server.json."),
    Setting(name="ca_file", type=str, default="", summary="Certificates (PEM) to trust when talking to that server."),
    Setting(
        name="compute",
        type=str,
        default="local",
        summary="Where training steps run: local, or workers (`millrace worker` on other machines).",
    ),
    Setting(name="records_url", type=str, default="", summary="postgresql://… for the records; default: in the home."),
    Setting(name="blobs_url", type=str, default="", summary="s3://…, gs://… or az://… for blobs; default: the home."),
    Setting(
        name="encryption_key",
        type=str,
        default="",
        summary="Encrypts blobs: file:PATH, env:NAME or command:PROGRAM ARGS, which give the key of keys.",
    ),
    Setting(name="color", type=str, default="auto", summary="auto, always or never; NO_COLOR is honoured too."),
    Setting(name="heartbeat_timeout_s", type=float, default=60.0, summary="A step silent for so long is hung."),
    Setting(
        name="parallel_steps",
        type=int,
        default=0,
        summary="How many steps of a run may run at once; 0: as many as processors, for own steps.",
    ),
    Setting(name="gc_min_age_s", type=float, default=3600.0, summary="`system gc` keeps blobs younger than this."),
    Setting(name="gc_keep_runs", type=int, default=50, summary="`system gc` keeps the outputs of so many runs."),
    Setting(name="gc_keep_days", type=float, default=30.0, summary="`system gc` keeps the outputs of runs this young."),
    Setting(
        name="audit_head_interval_s",
        type=float,
        default=60.0,
        summary="A server signs a head of the audit tree so often, when there are new events; 0: never.",
    ),
    Setting(
        name="audit_publish",
        type=str,
        default="",
        summary="Where signed heads are published: a file to append to, or an https:// webhook.",
    ),
    Setting(
        name="audit_publish_local",
        type=int,
        default=0,
        summary="1: the webhook may be this machine's own address.",
    ),
    Setting(
        name="owner_password_file",
        type=str,
        default="",
        summary="A file with the first owner's password; default: a one-time secret is printed.",
    ),
    Setting(
        name="session_idle_s", type=float, default=1800.0, summary="A page's session not used for so long has ended."
    ),
    Setting(name="session_max_s", type=float, default=43200.0, summary="How long a session lasts at most."),
    Setting(name="oidc_issuer", type=str, default="", summary="The identity provider (https://…) to sign in with."),
    Setting(name="oidc_client_id", type=str, default="", summary="What this server is called there."),
    Setting(
        name="oidc_client_secret_file",
        type=str,
        default="",
        summary="A file with the secret of this client; default: none, PKCE alone.",
    ),
    Setting(name="oidc_groups_claim", type=str, default="groups", summary="The claim that names somebody's groups."),
    Setting(
        name="isolate_steps",
        type=str,
        default="auto",
        summary="on: a step sees neither the home's keys nor other steps' scratch and processes, where Linux lets it. "
        "auto: on, but off for root, whose steps could read closed files of other users no more. off.",
    ),
    Setting(name="request_head_s", type=float, default=10.0, summary="A client may take so long for a request's head."),
    Setting(
        name="request_stall_s", type=float, default=30.0, summary="Some of a request's body has to come within this."
    ),
    Setting(name="gc_deleted_days", type=float, default=30.0, summary="How long deleted runs can be restored."),
    Setting(name="rollout_look_s", type=float, default=1.0, summary="A rollout is judged at most so often."),
    Setting(name="rollout_step_s", type=float, default=60.0, summary="Each step of a rollout lasts at least so long."),
    Setting(
        name="scale_in_flight",
        type=float,
        default=32.0,
        summary="So many requests at once are one replica's; with more there is another one.",
    ),
    Setting(name="scale_window_s", type=float, default=15.0, summary="Load is averaged over so long."),
    Setting(name="scale_down_s", type=float, default=300.0, summary="What was needed so long ago still runs."),
    Setting(
        name="scale_to_zero_s",
        type=float,
        default=300.0,
        summary="An endpoint whose least is no replica has none when nobody has asked for so long.",
    ),
    Setting(name="backup_to", type=str, default="", summary="Where backups go: an absolute folder or s3://…"),
    Setting(name="backup_key", type=str, default="", summary="What encrypts backups: file:PATH or env:NAME."),
    Setting(
        name="backup_every_s", type=float, default=0.0, summary="A server makes a backup so often; 0: only when asked."
    ),
    Setting(name="backup_include", type=str, default="", summary="What else a server backs up: keys, logs."),
    Setting(name="backup_keep_daily", type=int, default=7, summary="The newest backups of so many days are kept."),
    Setting(name="backup_keep_weekly", type=int, default=4, summary="The newest backups of so many weeks are kept."),
)


class Value(msgspec.Struct, frozen=True, kw_only=True):
    """A setting's value and its origin: a flag, a variable, a file, or the default."""

    name: str
    value: Any
    origin: str
    summary: str


def user_file() -> Path:
    """Where a person's own settings stand."""
    root = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(root) / "millrace" / "settings.yaml"


def resolve_settings(
    flags: Mapping[str, Any] | None = None, environ: Mapping[str, str] | None = None, home: Path | None = None
) -> dict[str, Value]:
    """Every setting with its value and origin.

    Raises:
        InputError: A file names an unknown setting, or a value has the wrong type.

    Example:
        >>> resolve_settings({"color": "never"}, environ={})["color"].origin
        'flag --color'
    """
    environ = os.environ if environ is None else environ
    files = [(path, _read(path)) for path in ([home / "settings.yaml"] if home else []) + [user_file()]]
    resolved: dict[str, Value] = {}
    for setting in SETTINGS:
        value, origin = setting.default, "default"
        if flags and flags.get(setting.name) is not None:
            value, origin = flags[setting.name], f"flag --{setting.name.replace('_', '-')}"
        elif setting.variable in environ:
            value, origin = environ[setting.variable], f"environment {setting.variable}"
        else:
            for path, content in files:
                if setting.name in content:
                    value, origin = content[setting.name], str(path)
                    break
        resolved[setting.name] = Value(
            name=setting.name, value=_convert(setting, value, origin), origin=origin, summary=setting.summary
        )
    return resolved


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = parse_yaml(path.read_text(encoding="utf-8"), str(path)).value or {}
    unknown = set(value) - {setting.name for setting in SETTINGS} if isinstance(value, dict) else {"?"}
    if unknown:
        names = ", ".join(setting.name for setting in SETTINGS)
        raise InputError(f"{path}: unknown setting {sorted(unknown)[0]!r}", hint=f"known settings: {names}")
    return value


def _convert(setting: Setting, value: Any, origin: str) -> Any:
    try:
        return setting.type(value)
    except (TypeError, ValueError):
        raise InputError(f"{origin}: {setting.name} wants {setting.type.__name__}, got {value!r}") from None


def find_home(start: Path, environ: Mapping[str, str] | None = None) -> Path:
    """The home for a folder: MILLRACE_HOME, else the nearest `.millrace` or spec upwards, else here.

    Args:
        start: Where to begin, usually the working directory.
        environ: The environment; `os.environ` when absent.

    Example:
        >>> find_home(Path("/"), environ={"MILLRACE_HOME": "/tmp/h"})
        PosixPath('/tmp/h')
    """
    environ = os.environ if environ is None else environ
    if environ.get("MILLRACE_HOME"):
        return Path(environ["MILLRACE_HOME"]).expanduser().absolute()
    start = start.absolute()
    for folder in (start, *start.parents):
        if (folder / HOME_NAME).is_dir() or (folder / SPEC_NAME).is_file():
            return folder / HOME_NAME
    return start / HOME_NAME
