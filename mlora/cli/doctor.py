"""The state of the installation."""

from __future__ import annotations

import click

from mlora.cli.program import program


@program.command()
@click.pass_context
def doctor(ctx: click.Context) -> None:
    """Look at versions, GPU, disk, hub and optional packages.

    Ends with status 1 where something keeps runs from working. With
    HF_HUB_OFFLINE=1 no connection is tried.
    """
    from mlora.runs.doctor import main

    ctx.exit(main())
