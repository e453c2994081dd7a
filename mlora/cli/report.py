"""The report of runs."""

from __future__ import annotations

from pathlib import Path

import click

from mlora.cli.options import PATH, option
from mlora.cli.program import program


@program.command()
@click.argument("runs", nargs=-1, required=True, type=PATH, metavar="RUN...")
@option("output", "File to write. [default: report.html in the RUN, or here for several]", PATH)
def report(runs: tuple[str, ...], output: str | None) -> None:
    """Write a page of tables and charts of one RUN folder or several.

    The page is one HTML file that opens without a network.
    """
    from mlora.runs.report import write_report

    place = Path(output or (Path(runs[0]) / "report.html" if len(runs) == 1 else "report.html"))
    write_report(runs, place)
    click.echo(f"Wrote {place} ({place.stat().st_size / 1024:.0f} KiB)")
