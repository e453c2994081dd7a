"""The group that all commands of launch.py belong to, and how bad input ends them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from mlora import __version__
from mlora.cli.options import CONTEXT
from mlora.config import ConfigError
from mlora.wording import launcher

STORY = """\
Fine-tune several adapters at once over one frozen language model.

\b
1. gen       python launch.py gen --template mixlora --tasks "arc-e;arc-c"
             writes mlora.json: one adapter for each task
2. edit      open mlora.json; `python launch.py schema` lists every key
3. run       python launch.py run --base_model BASE_MODEL
             trains all adapters together, then evaluates each
4. evaluate  python launch.py evaluate --base_model BASE_MODEL \\
               --adapter FOLDER --tasks "boolq;piqa"
             scores saved adapters on any tasks
5. compare   python launch.py report RUN...
             makes one page of tables and charts
"""


class _Program(click.Group):
    """A group whose commands report bad input on standard error and exit with 2, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            if any(argument.startswith("--debug") for argument in sys.argv):
                raise
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2)


@click.group(
    cls=_Program,
    help=STORY.replace("python launch.py", launcher()),
    invoke_without_command=True,
    context_settings=CONTEXT,
)
@click.version_option(__version__)
@click.pass_context
def program(ctx: click.Context) -> None:  # noqa: D103
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@program.command(name="help")
@click.argument("command", required=False)
@click.pass_context
def help_(ctx: click.Context, command: str | None) -> None:
    """Show this help, or that of a COMMAND."""
    parent = ctx.parent or ctx
    if command is None:
        click.echo(parent.get_help())
        return
    name, found, _ = program.resolve_command(parent, [command])
    if found is not None:
        click.echo(found.get_help(click.Context(found, info_name=name, parent=parent)))


def main() -> None:
    """Run the command line."""
    program(prog_name="launch.py" if Path(sys.argv[0]).name == "launch.py" else None)
