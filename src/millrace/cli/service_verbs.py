"""`millrace service`: a systemd unit that keeps `millrace up` running."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import msgspec

from millrace.cli.derive import json_option
from millrace.cli.session import Session
from millrace.core.addresses import check_networks, loopback_address
from millrace.core.errors import ConflictError, InputError, NotFoundError, UnavailableError
from millrace.core.settings import SETTINGS, find_home

SYSTEM_UNITS = Path("/etc/systemd/system")
SYSTEM_SECRETS = Path("/etc/millrace")
STOP_TIMEOUT_S = 30  # more than the grace that `millrace up` gives its processes
_MARK = "# Written by `millrace service install` for "
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_BARE = re.compile(r"[A-Za-z0-9_./:=,+%$-]+")
_HARDENING = """\
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
SystemCallArchitectures=native
UMask=0077
"""
# What needs the system's manager. Homes and projects may lie anywhere, and models may want a GPU: no
# ProtectHome, PrivateTmp, PrivateDevices; compilers of models write code at run time: no MemoryDenyWriteExecute.
_SYSTEM_HARDENING = """\
CapabilityBoundingSet=
RestrictNamespaces=yes
ProtectSystem=full
ProtectClock=yes
ProtectHostname=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
"""
_SECRETS_TEMPLATE = """\
# Variables of the Millrace service, one NAME=value a line, readable by their owner alone.
#MILLRACE_RECORDS_URL=postgresql://millrace@db.example.com/millrace?sslmode=verify-full
#PGPASSWORD=
#MILLRACE_BLOBS_URL=s3://bucket/prefix
#AWS_ACCESS_KEY_ID=
#AWS_SECRET_ACCESS_KEY=
#AWS_REGION=
"""


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a unit of this name stands, and who runs it."""

    name: str
    is_system: bool
    unit: Path
    secrets: Path

    @classmethod
    def of(cls, name: str, is_system: bool) -> Place:
        """The place of a name.

        Raises:
            InputError: It cannot be a unit's name.
        """
        if not _NAME.fullmatch(name):
            raise InputError(f"want a unit's name of letters, digits, - and _, got {name!r}")
        config = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
        units = SYSTEM_UNITS if is_system else config / "systemd" / "user"
        secrets = SYSTEM_SECRETS if is_system else config / "millrace"
        return cls(name=name, is_system=is_system, unit=units / f"{name}.service", secrets=secrets / f"{name}.env")

    @property
    def systemctl(self) -> str:
        """The command that reaches its manager."""
        return "sudo systemctl" if self.is_system else "systemctl --user"


class Up(msgspec.Struct, frozen=True, kw_only=True):
    """What the unit runs: the options of `millrace up`."""

    home: Path
    host: str
    port: int
    serve_port: int
    workers: int
    tls_cert: str = ""
    tls_key: str = ""
    proxies: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """The command's arguments."""
        words = ["--home", str(self.home), "up", "--host", self.host, "--port", f"{self.port}"]
        words += ["--serve-port", f"{self.serve_port}", "--workers", f"{self.workers}"]
        for option, values in (
            ("--tls-cert", [self.tls_cert]), ("--tls-key", [self.tls_key]),
            ("--tls-terminated-by-proxy", self.proxies), ("--name", self.names),
        ):  # fmt: skip
            words += [word for value in values if value for word in (option, value)]
        return words

    @property
    def url(self) -> str:
        """Where clients find it."""
        name = self.names[0] if self.names else self.host
        scheme = "https" if self.tls_cert or self.proxies else "http"
        return f"{scheme}://{name}" + ("" if self.proxies else f":{self.port}")


def quote(word: str, *, is_command: bool = False) -> str:
    r"""A word of `ExecStart=`: systemd expands `%` in all of them and `$` in all but the command.

    Args:
        word: As the program is to see it.
        is_command: The first word, an absolute path.

    Raises:
        InputError: systemd has no way to write it: a control character, a backslash, a quote in the command.

    Example:
        >>> quote("/srv/100% mine"), quote("a$b"), quote("plain"), quote('say "hi"')
        ('"/srv/100%% mine"', 'a$$b', 'plain', '"say \\"hi\\""')
    """
    escaped = _specifiers(word)
    if is_command and set(word) & {'"', "'"}:
        raise InputError(f"systemd runs no program with a quote in its path, got {word}", hint="move the environment")
    if not is_command:
        escaped = escaped.replace("$", "$$")
    if _BARE.fullmatch(escaped):
        return escaped
    return '"' + escaped.replace('"', '\\"') + '"'


def _specifiers(value: str) -> str:
    """A value that systemd takes as it stands, but for `%`."""
    if "\\" in value or not value.isprintable() or value != value.strip() or not value:
        raise InputError(
            f"a unit cannot name {value!r}: want no control character, backslash or blank at the ends",
            hint="choose another folder for the home or the interpreter",
        )
    return value.replace("%", "%%")


def render_unit(place: Place, up: Up, interpreter: str = sys.executable) -> str:
    """The unit's text.

    Args:
        place: Its name and manager.
        up: What it runs.
        interpreter: Absolute path of the Python that has Millrace.

    Raises:
        InputError: A path cannot be written in a unit.

    Example:
        >>> up = Up(home=Path("/srv/m/.millrace"), host="127.0.0.1", port=7070, serve_port=7071, workers=2)
        >>> text = render_unit(Place.of("millrace", True), up, "/usr/bin/python3")
        >>> print(next(line for line in text.splitlines() if line.startswith("ExecStart=")))
        ExecStart=/usr/bin/python3 -P -m millrace --home /srv/m/.millrace up --host 127.0.0.1 --port 7070 --serve-port 7071 --workers 2
    """  # noqa: E501
    words = " ".join([quote(interpreter, is_command=True), *map(quote, ["-P", "-m", "millrace", *up.words])])
    account = f"User={_owner_of(up.home)}\n" if place.is_system else ""
    hardening = _HARDENING + (_SYSTEM_HARDENING if place.is_system else "")
    home = _specifiers(str(up.home))
    return f"""{_MARK}{up.home}
# `millrace service uninstall` removes it; a change of yours is lost when it is installed again.
[Unit]
Description=Millrace server of {home}
Documentation=https://millrace.readthedocs.io
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart={words}
WorkingDirectory={_specifiers(str(up.home.parent))}
EnvironmentFile=-{_specifiers(str(place.secrets))}
Environment=PYTHONUNBUFFERED=1
{account}Restart=on-failure
RestartSec=5
# Wrong input, denied, a missing package, a home of a newer version: trying again does not help.
RestartPreventExitStatus=2 6 7 11
# The server stops its processes itself; what is left afterwards (drivers of runs) is killed, and the next
# start takes their runs up again.
KillMode=mixed
TimeoutStopSec={STOP_TIMEOUT_S}
{hardening}
[Install]
WantedBy={"multi-user.target" if place.is_system else "default.target"}
"""


def _owner_of(home: Path) -> str:
    """The account that a system's unit runs as: the owner of the home, or of the folder that it will be in."""
    folder = next(path for path in (home, *home.parents) if path.exists())
    try:
        return folder.owner()
    except KeyError:
        return str(folder.stat().st_uid)


def home_of(unit: Path) -> str | None:
    """The home that an installed unit serves; None where there is none.

    Raises:
        ConflictError: The file is not one of ours.
    """
    if not os.path.lexists(unit):
        return None
    first = "" if unit.is_symlink() or not unit.is_file() else unit.read_text("utf-8", "replace").partition("\n")[0]
    if not first.startswith(_MARK):
        raise ConflictError(
            f"{unit} was not written by Millrace and is left as it is", hint="--name NAME takes another name"
        )
    return first.removeprefix(_MARK)


def complaints(name: str, text: str, is_system: bool) -> list[str] | None:
    """What `systemd-analyze verify` says of a unit, one line each; None where it cannot be asked."""
    program = shutil.which("systemd-analyze")
    if program is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        unit = Path(folder) / f"{name}.service"
        unit.write_text(text, encoding="utf-8")
        done = subprocess.run(
            [program, "verify", "--system" if is_system else "--user", "--man=no", str(unit)],
            env=os.environ | {"XDG_RUNTIME_DIR": folder}, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    # It also reports on other units of the machine, and on why it could not begin.
    said = (done.stdout + done.stderr).splitlines()
    ours = [line.replace(f"{folder}/", "") for line in said if f"{name}.service" in line]
    return None if done.returncode and not ours else ours


def _write(path: Path, text: str, mode: int) -> None:
    """All of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, new = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(new, mode)
        os.replace(new, path)
    except BaseException:
        os.unlink(new)
        raise


def _in_the_system(place: Place) -> str:
    return " --system" if place.is_system else ""


def _named(place: Place) -> str:
    return "" if place.name == "millrace" else f" --name {place.name}"


place_options = (
    click.option("--user/--system", "is_user", default=True, show_default=True, help="Whose manager runs it."),
    click.option("--name", default="millrace", show_default=True, help="The unit's; one for each home."),
    json_option,
)


@click.group(short_help="Keep `millrace up` running with systemd.")
def service() -> None:
    """A systemd unit that starts the server with the machine, and again when it fails.

    \b
    Examples:
      millrace service install
      millrace service show
    """


@service.command()
@click.option("--home", "chosen_home", metavar="FOLDER", help="The home to serve; default: the one of this folder.")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Any but a loopback address wants TLS, and asks for tokens."
)
@click.option("--port", type=click.IntRange(1, 65535), default=7070, show_default=True)
@click.option("--serve-port", type=click.IntRange(1, 65535), default=7071, show_default=True, help="Of endpoints.")
@click.option("--workers", type=click.IntRange(1, 64), default=1, show_default=True, help="API processes.")
@click.option("--tls-cert", default="", metavar="FILE", help="The server's certificate (PEM), read by its account.")
@click.option("--tls-key", default="", metavar="FILE", help="Its private key, where that is not in the same file.")
@click.option("--tls-terminated-by-proxy", "proxies", multiple=True, metavar="NETWORK", help="As of `millrace up`.")
@click.option("--host-name", "names", multiple=True, metavar="HOST", help="A name that clients use: `--name` of `up`.")
@click.option("--print", "only_print", is_flag=True, help="Print the unit, write nothing.")
@click.pass_obj
def install(
    session: Session, chosen_home: str | None, only_print: bool, is_user: bool, name: str, as_json: bool, **options: Any
) -> None:
    """Write the unit, check it, and say what to run next. A unit of another program is never replaced.

    \b
    Examples:
      millrace service install
      millrace service install --port 9000 --workers 4
      millrace service install --host 10.0.0.5 --tls-cert /etc/millrace/cert.pem --tls-key /etc/millrace/key.pem
      millrace service install --print
    """
    session.as_json = as_json
    place = Place.of(name, not is_user)
    up = _up(chosen_home or session.home, options)
    text = render_unit(place, up)
    if only_print:
        session.print_json({"unit": str(place.unit), "text": text}) if as_json else click.echo(text, nl=False)
        return
    was = home_of(place.unit)
    if was not in (None, str(up.home)):
        raise ConflictError(f"{place.unit} serves {was}", hint="--name NAME for a unit of its own, or uninstall that")
    said = complaints(name, text, place.is_system)
    if said:
        raise UnavailableError(f"systemd does not accept the unit: {said[0]}", hint="--print shows the unit")
    _write(place.unit, text, 0o644)
    if not place.secrets.exists():
        _write(place.secrets, _SECRETS_TEMPLATE, 0o600)
    if as_json:
        session.print_json({"unit": str(place.unit), "secrets": str(place.secrets), "home": str(up.home)})
        return
    click.echo(f"{'updated' if was else 'written'}   {place.unit}{'' if said is None else '  (checked by systemd)'}")
    click.echo(f"serves    {up.home} at {up.url}")
    click.echo(f"variables {place.secrets}")
    _say_what_is_only_here(place)
    _say_next(place, bool(was))


def _up(home: str | None, options: dict[str, Any]) -> Up:
    folder = Path(home).expanduser().absolute() if home else find_home(Path.cwd())
    if not folder.parent.is_dir():
        raise NotFoundError(f"there is no folder {folder.parent} for the home", hint="make it first")
    for option in ("tls_cert", "tls_key"):
        options[option] = str(Path(options[option]).expanduser().absolute()) if options[option] else ""
    found = msgspec.convert({**options, "home": folder}, Up)
    check_networks(found.proxies)
    if found.tls_cert or found.proxies:
        return found
    return msgspec.structs.replace(found, host=loopback_address(found.host))


def _say_what_is_only_here(place: Place) -> None:
    """A service does not see this terminal's variables."""
    names = [one.variable for one in SETTINGS if one.variable in os.environ and one.name not in ("home", "url")]
    if names:
        click.echo(f"note: {', '.join(names)} is set here but not in the service: write it into {place.secrets}")


def _say_next(place: Place, is_update: bool) -> None:
    start = f"restart {place.name}" if is_update else f"enable --now {place.name}"
    click.echo(f"\nnext:\n  {place.systemctl} daemon-reload\n  {place.systemctl} {start}")
    journal = f"sudo journalctl -u {place.name}" if place.is_system else f"journalctl --user -u {place.name}"
    click.echo(f"  {journal} -f")
    if not place.is_system:
        account = pwd.getpwuid(os.getuid()).pw_name
        click.echo(f"  loginctl enable-linger {account}   # to run without a login")
    if shutil.which("systemctl") is None:
        click.echo("note: systemctl was not found on this machine")


@service.command()
@click.pass_obj
def show(session: Session, is_user: bool, name: str, as_json: bool) -> None:
    """The unit as it is installed.

    \b
    Example:
      millrace service show
    """
    session.as_json = as_json
    place = Place.of(name, not is_user)
    home = _installed(place)
    text = place.unit.read_text(encoding="utf-8")
    if as_json:
        session.print_json({"unit": str(place.unit), "secrets": str(place.secrets), "home": home, "text": text})
    else:
        click.echo(f"# {place.unit}\n{text}", nl=False)


@service.command()
@click.pass_obj
def uninstall(session: Session, is_user: bool, name: str, as_json: bool) -> None:
    """Remove the unit; the home, and the file of variables, stay.

    \b
    Example:
      millrace service uninstall
    """
    session.as_json = as_json
    place = Place.of(name, not is_user)
    _installed(place)
    links = [link for link in place.unit.parent.glob(f"*.wants/{place.unit.name}") if link.is_symlink()]
    for path in (*links, place.unit):
        path.unlink()
    if as_json:
        session.print_json({"removed": [str(path) for path in (*links, place.unit)]})
        return
    click.echo(f"removed   {place.unit}\nkept      {place.secrets}")
    click.echo(f"\nnext:\n  {place.systemctl} stop {place.name}\n  {place.systemctl} daemon-reload")


def _installed(place: Place) -> str:
    home = home_of(place.unit)
    if home is None:
        hint = f"`millrace service install{_in_the_system(place)}{_named(place)}`"
        raise NotFoundError(f"there is no {place.unit}", hint=hint)
    return home


for _command in service.commands.values():
    for _option in place_options:
        _option(_command)

COMMANDS: tuple[click.Command, ...] = (service,)
