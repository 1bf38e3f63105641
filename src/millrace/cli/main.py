"""The command group: verbs, nouns, errors, exit codes."""

from __future__ import annotations

import logging
import signal
import sys
from typing import Any

import click

import millrace
from millrace.cli import (
    audit_verbs,
    import_verbs,
    loadtest_verbs,
    login_verbs,
    nouns,
    server_verbs,
    service_verbs,
    verbs,
)
from millrace.cli.session import Session
from millrace.core.errors import MillraceError, UnavailableError
from millrace.core.visible import LineFormatter

EXIT_CODE_HELP = """
\b
Exit codes: 0 done · 1 internal error · 2 invalid spec, input or data · 3 not found · 4 conflict
5 a step failed · 6 denied · 7 a package is missing · 8 corrupt or untrusted artifact
9 no capacity, disk full, quota · 10 unavailable · 11 home of a newer version · 130 cancelled
"""


class Cli(click.Group):
    """Turns every error into a message and an exit code: a traceback is never shown."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        session: Session = ctx.obj
        try:
            return super().invoke(ctx)
        except MillraceError as error:
            ctx.exit(session.fail(error))
        except (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            reason = f"{error.filename or 'a file'}: {error.strerror}"
            ctx.exit(session.fail(UnavailableError(reason, hint="check the path and its permissions")))
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)
        except BrokenPipeError:
            sys.stderr.close()
            ctx.exit(0)
        finally:
            session.close()

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Verbs first, in the order of the life cycle; then nouns."""
        return list(self.commands)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Exit codes."""
        formatter.write_paragraph()
        for line in EXIT_CODE_HELP.replace("\b", "").strip().splitlines():
            formatter.write_text(line)


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--home", metavar="FOLDER", help="The home; default: the nearest .millrace or millrace.yaml upwards.")
@click.option("--embedded", is_flag=True, hidden=True, help="Open the home here, even if a server has it open.")
@click.option("--verbose", "-v", is_flag=True, help="Log more to stderr.")
@click.version_option(millrace.__version__, prog_name="millrace")
@click.pass_obj
def cli(session: Session, home: str | None, embedded: bool, verbose: bool) -> None:
    """Millrace: data → train → compress → register → serve → monitor, from one spec.

    \b
    Examples:
      millrace demo                                   watch the whole life cycle in half a minute
      millrace init --data churn.csv --label churned  write a spec for your own table
      millrace run                                    run the spec of this folder
      millrace serve digits                           serve the champion, watch it for drift
      millrace up                                     a server for a team: runs, models, endpoints, pages
    """
    session.home, session.embedded = home, embedded
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, handlers=[handler])
    # A supervisor stops us with SIGTERM: the same graceful end as Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


for command in (
    *verbs.COMMANDS,
    *loadtest_verbs.COMMANDS,
    *server_verbs.COMMANDS,
    *login_verbs.COMMANDS,
    *service_verbs.COMMANDS,
    *import_verbs.COMMANDS,
    *nouns.groups(),
    *audit_verbs.COMMANDS,
):
    cli.add_command(command)
