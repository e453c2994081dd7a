"""Results of many adapters as one table: a row for each group of adapters, a column for each task.

A group's adapters differ in their seeds alone. A cell is the mean over them of the task's first metric, ± the sample
standard deviation over seeds; with a single seed, ± the standard error over the rows of the task. AVG is the mean over
tasks, worked out for each seed first; a group that lacks a task has none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from mlora.report.table import columns, wrapped

Group = tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Where the results of an adapter stand in a table.

    Attributes:
        group: texts that begin its row.
        seed: that tells it from the others of its group.
    """

    group: Group
    seed: int = 0


@dataclass(frozen=True)
class Cell:
    """A number of the table.

    Attributes:
        mean: over seeds.
        spread: standard deviation over seeds, or the standard error of a single one; None where it is not known.
        seeds: how many there are.
        at_chance: whether it is no better than chance by two standard errors.
    """

    mean: float
    spread: float | None
    seeds: int
    at_chance: bool = False

    def __str__(self) -> str:
        spread = "" if self.spread is None else f" ± {100 * self.spread:.1f}"
        return f"{100 * self.mean:.1f}{spread}{'~' if self.at_chance else ''}"


class Grid:
    """Results by group and task.

    Args:
        results: as in results.json, of one protocol.
        places: of adapters by name; results of others are left out.
    """

    def __init__(self, results: Sequence[Mapping[str, Any]], places: Mapping[str, Place]) -> None:
        self.tasks: dict[str, str] = {}
        self._found: dict[Group, dict[str, dict[int, Mapping[str, Any]]]] = {}
        for result in results:
            place = places.get(result["adapter"])
            if place is not None and self.tasks.setdefault(result["task"], result["metric"]) == result["metric"]:
                own = self._found.setdefault(place.group, {}).setdefault(result["task"], {})
                own[place.seed] = result

    @property
    def groups(self) -> list[Group]:
        """The groups that have a result, in the order of their first."""
        return list(self._found)

    def cell(self, group: Group, task: str) -> Cell | None:
        """Return a group's number for a task; None where there is none yet."""
        own = list(self._found.get(group, {}).get(task, {}).values())
        if not own:
            return None
        values = [r["value"] for r in own]
        error = fmean(r["standard_error"] or 0 for r in own)  # the rows are the same for all seeds
        chance = own[0].get("chance")
        at_chance = chance is not None and fmean(values) < chance + 2 * error
        spread = stdev(values) if len(own) > 1 else own[0]["standard_error"]
        return Cell(fmean(values), spread, len(own), at_chance)

    def average(self, group: Group) -> Cell | None:
        """Return a group's mean over all tasks; None where it lacks one."""
        found = self._found.get(group, {})
        seeds = set[int].intersection(*(set(own) for own in found.values())) if found else set()
        if not seeds or set(found) != set(self.tasks):
            return None
        means = [fmean(own[seed]["value"] for own in found.values()) for seed in sorted(seeds)]
        return Cell(fmean(means), stdev(means) if len(means) > 1 else None, len(means))

    def rows(self, groups: Sequence[Group] | None = None) -> list[list[str]]:
        """Return the cells of each group as texts: its own, one for each task, the average over several."""
        lines = []
        for group in self.groups if groups is None else groups:
            cells = [*(self.cell(group, task) for task in self.tasks), *self._averages(group)]
            lines.append([*group, *("-" if cell is None else str(cell) for cell in cells)])
        return lines

    def _averages(self, group: Group) -> list[Cell | None]:
        return [self.average(group)] if len(self.tasks) > 1 else []

    def header(self, *group: str) -> list[str]:
        """Return the heads of the columns, those of the groups' texts first."""
        return [*group, *self.tasks, *(["AVG"] if len(self.tasks) > 1 else [])]

    @property
    def notes(self) -> list[str]:
        """What a reader must know of the numbers."""
        cells = [cell for group in self.groups for task in self.tasks if (cell := self.cell(group, task))]
        seeds = sorted({cell.seeds for cell in cells})
        over = "standard error"
        if seeds[-1:] > [1]:
            several = " or ".join(str(count) for count in seeds if count > 1)
            over = f"standard deviation over {several} seeds{', standard error of one' if 1 in seeds else ''}"
        notes = [f"%, ± {over}; {', '.join(f'{task} {metric}' for task, metric in self.tasks.items())}"]
        if any(cell.at_chance for cell in cells):
            notes.append("~ no better than chance by two standard errors")
        return notes


def ranked(grid: Grid) -> list[Group]:
    """Return the groups by their average, best first; those that lack a task last."""
    averages = {group: grid.average(group) for group in grid.groups}
    return sorted(averages, key=lambda group: -1.0 if (cell := averages[group]) is None else cell.mean, reverse=True)


def ranking(results: Sequence[Mapping[str, Any]], places: Mapping[str, Place], keys: Sequence[str]) -> list[Any]:
    """Return swept adapters as JSON, best first within each protocol; see `ranking_table`."""
    entries = []
    for protocol, grid in _by_protocol(results, places).items():
        for rank, group in enumerate(ranked(grid), 1):
            cells = {task: grid.cell(group, task) for task in grid.tasks}
            average = grid.average(group)
            entries.append(
                {
                    "protocol": protocol,
                    "rank": rank,
                    "settings": dict(zip(keys, group, strict=True)),
                    "average": None if average is None else average.mean,
                    "tasks": {task: None if cell is None else cell.mean for task, cell in cells.items()},
                    "adapters": [name for name, place in places.items() if place.group == group],
                }
            )
    return entries


def ranking_table(results: Sequence[Mapping[str, Any]], places: Mapping[str, Place], keys: Sequence[str]) -> str:
    """Return swept adapters as text, best first, a table for each protocol.

    Args:
        results: as in results.json.
        places: of adapters by name; groups are the values of `keys`.
        keys: that were swept, but for the seed.
    """
    tables = []
    for protocol, grid in _by_protocol(results, places).items():
        order = ranked(grid)
        rows = [[str(place), *row] for place, row in enumerate(grid.rows(order), 1)]
        text = columns(grid.header("rank", *keys), rows, left=1 + len(keys))
        title = wrapped(f"ranked by {', '.join(keys) or 'seed'}; protocol: {protocol}")
        tables.append("\n".join([title, text, *map(wrapped, grid.notes)]))
    return "\n\n".join(tables)


def _by_protocol(results: Sequence[Mapping[str, Any]], places: Mapping[str, Place]) -> dict[str, Grid]:
    protocols = dict.fromkeys(r["protocol"] for r in results)
    return {protocol: Grid([r for r in results if r["protocol"] == protocol], places) for protocol in protocols}
