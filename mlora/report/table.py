"""Results and plans as tables for a terminal of 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

BASE = "base model"
WIDTH = 80
"""Characters of a line."""


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return rows as aligned text, the first `left` columns on the left, numbers on the right.

    Columns for which a line has no room go on below, beside the first `left` again.
    """
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def part(shown: Sequence[int]) -> str:
        def line(cells: Sequence[str]) -> str:
            aligned = (cells[i].ljust(widths[i]) if i < left else cells[i].rjust(widths[i]) for i in shown)
            return "  ".join(aligned).rstrip()

        return "\n".join([line(header), line(["-" * w for w in widths]), *map(line, rows)])

    names = list(range(left))
    parts, room = [names], WIDTH - sum(widths[:left]) - 2 * left
    taken = 0
    for i in range(left, len(header)):
        if taken + widths[i] > room and parts[-1] != names:
            parts.append(names)
            taken = 0
        parts[-1] = [*parts[-1], i]
        taken += widths[i] + 2
    return "\n\n".join(map(part, parts))


def wrapped(text: str) -> str:
    """Return a line of words broken to a terminal's width; names and addresses stay whole."""
    return textwrap.fill(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def results_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return results as text: one line for each adapter, task and metric, beside the base model where it was scored.

    Results of different protocols are never comparable, so each has a table of its own.

    Args:
        results: as in results.json; values between 0 and 1, shown as percentages with their standard errors.
    """
    protocols = list(dict.fromkeys(r["protocol"] for r in results))
    tables = (_table([r for r in results if r["protocol"] == protocol], protocol) for protocol in protocols)
    limited = any(r.get("limit") for r in results)
    note = "\n* limited to the first rows of the split: not comparable with published results" if limited else ""
    return "\n\n".join(tables) + note


def _table(results: Sequence[Mapping[str, Any]], protocol: str) -> str:
    shown = [r for r in results if r["adapter"] != BASE] or list(results)
    base = {(r["task"], r["metric"]): r for r in results if r["adapter"] == BASE and r not in shown}
    rows = []
    for r in shown:
        row = [r["adapter"], r["task"], r["metric"]]
        if base:
            before = base.get((r["task"], r["metric"]))
            row.append("" if before is None else _percent(before))
        rows.append([*row, _percent(r), str(r["n"]) + (" *" if r.get("limit") else "")])
    header = ["adapter", "task", "metric", *(["base model %"] if base else []), "value %", "rows"]
    return f"{columns(header, rows, left=3)}\n± standard error; protocol: {protocol}"


def _percent(result: Mapping[str, Any]) -> str:
    error = result["standard_error"]
    return f"{100 * result['value']:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")
