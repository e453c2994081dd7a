"""The report of one run or several as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mlora import __version__
from mlora.report import facts, figures
from mlora.report.axes import short
from mlora.report.chart import BOTTOM, LEFT, RIGHT, TOP, WIDTH
from mlora.report.record import Record, read
from mlora.report.routing import routing_charts, routing_note
from mlora.report.standings import standings

GENERATOR = "m-LoRA"
"""What names the maker in a page; a file that lacks it is not ours to write over."""


def report(paths: Sequence[str | Path]) -> str:
    """Return the page of the runs in these folders.

    Raises:
        FileNotFoundError: one of them is no run folder.
    """
    records = [read(path) for path in paths]
    names = [record.name for record in records]
    for record in records:
        if names.count(record.name) > 1:
            record.name = str(record.path)
    return render(records)


def render(records: Sequence[Record]) -> str:
    """Return the page of runs that have been read."""
    return str(_templates().get_template("page.html").render(_content(records)))


def _content(records: Sequence[Record]) -> dict[str, Any]:
    styles, several = figures.Styles(records), len(records) > 1
    tables = standings(records)
    charts = {
        ("training", "Training", ""): figures.training_charts(records, styles),
        ("accuracy", "Accuracy over steps", ""): figures.accuracy_charts(records, styles),
        ("routers", "Routers", routing_note(records, styles)): routing_charts(records, styles),
    }
    chart_sections = [(*head, drawn, note) for (*head, note), drawn in charts.items() if drawn]
    paces = [pace for record in records for pace in facts.paces(record)]
    content: dict[str, Any] = {
        "title": " and ".join(record.name for record in records) if len(records) < 4 else f"{len(records)} runs",
        "generator": f"{GENERATOR} {__version__}",
        "several": several,
        "notes": [f"{r.name}: {note}" if several else note for r in records for note in r.notes],
        "glance": facts.glance(records),
        "tables": tables,
        "any_average": any(table.several for table in tables),
        "result_charts": figures.result_charts(tables, styles),
        "chart_sections": chart_sections,
        "paces": paces,
        "pace_header": facts.PACE_HEADER,
        "speed_charts": figures.speed_charts(records, styles),
        "settings": facts.settings(records),
        "run_settings": facts.run_settings(records),
        "environment": facts.environment(records),
        "commands": [(record.name, facts.command(record)) for record in records],
    }
    sections = [("results", "Results")] if tables else []
    sections += [(str(id), str(name)) for id, name, _, _ in chart_sections]
    sections += [("speed", "Speed")] if paces else []
    sections += [("settings", "Settings")] if content["settings"].columns else []
    return content | {"sections": [*sections, ("environment", "Environment")]}


@cache
def _templates() -> Any:
    import jinja2

    here = Path(__file__).parent
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    templates.filters["short"] = short
    templates.globals["box"] = {"width": WIDTH, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}
    templates.globals["css"] = (here / "page.css").read_text(encoding="utf-8")
    templates.globals["js"] = (here / "page.js").read_text(encoding="utf-8")
    return templates


def is_report(path: Path) -> bool:
    """Return whether a file is a report, which may be written over."""
    try:
        with path.open("rb") as file:
            return f'<meta name="generator" content="{GENERATOR}'.encode() in file.read(2000)
    except OSError:
        return False
