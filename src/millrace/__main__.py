"""The command `millrace`."""

from __future__ import annotations

from millrace.cli.main import cli
from millrace.cli.session import Session
from millrace.cli.terminal import guard_terminal
from millrace.core import extras


def open_transport(home: str | None, *, embedded: bool = False) -> object:
    """The transport, imported only when a command needs it."""
    return extras.load("millrace.wiring:open_transport")(home, embedded=embedded)


def main() -> None:
    """Run the command line."""
    guard_terminal()
    cli(obj=Session(open_transport), prog_name="millrace")


if __name__ == "__main__":
    main()
