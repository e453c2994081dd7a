"""Results in the shape of the paper's tables: a row for each method, a column for each task, and their average."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from mlora.report.record import BASE, Record

_NOT_HOW = ("name", "task_name", "data", "eval_data", "limit", "seed")
"""Keys in which adapters differ that are one row of a table: what they learn and by which seed, not how."""


@dataclass(frozen=True)
class Score:
    """A value between 0 and 1 with its standard error.

    Attributes:
        value, error, n: the mean, its standard error, and over how many rows; of several seeds, their mean and sample
            standard deviation.
        limited: whether only the first rows of the split were read.
        at_chance: whether it is no better than chance by two standard errors.
        best: whether no other row of the table is better.
    """

    value: float
    error: float | None
    n: int | None
    limited: bool
    at_chance: bool = False
    best: bool = False


@dataclass(frozen=True)
class Competitor:
    """A row: one adapter, or adapters that differ only in their tasks and seeds.

    Attributes:
        run: name of the run.
        label: name of the row.
        detail: its method and size.
        adapters: which results are its own.
        parameters: trained numbers of one adapter; None where none is saved.
        seeds: of how many there are results.
    """

    run: str
    label: str
    detail: str
    adapters: tuple[str, ...]
    parameters: int | None
    seeds: int = 1


@dataclass(frozen=True)
class Standings:
    """One table: results of one metric of one protocol, over all runs.

    Attributes:
        protocol, metric: what is compared.
        tasks: columns.
        rows: competitors with a score or None for each task, and the average where each has one.
    """

    protocol: str
    metric: str
    tasks: list[str]
    rows: list[tuple[Competitor, list[Score | None], Score | None]]

    @property
    def several(self) -> bool:
        """Whether there is an average to show."""
        return len(self.tasks) > 1 and any(average is not None for _, _, average in self.rows)

    @property
    def seeded(self) -> bool:
        """Whether a row is of several seeds."""
        return any(row.seeds > 1 for row, _, _ in self.rows)

    @property
    def at_chance(self) -> bool:
        """Whether a score is no better than chance."""
        return any(score and score.at_chance for _, scores, _ in self.rows for score in scores)

    @property
    def sized(self) -> bool:
        """Whether the size of any adapter is known."""
        return any(row.parameters for row, _, _ in self.rows)

    @property
    def uneven(self) -> list[str]:
        """Tasks that not all were scored on the same number of rows of."""
        columns = zip(*(scores for _, scores, _ in self.rows), strict=True)
        counts = [{score.n for score in column if score} for column in columns]
        return [task for task, sizes in zip(self.tasks, counts, strict=True) if len(sizes) > 1]

    @property
    def limited(self) -> bool:
        """Whether a score is of the first rows of a split only."""
        return any(score and score.limited for _, scores, _ in self.rows for score in scores)


def standings(records: Sequence[Record]) -> list[Standings]:
    """Return a table for each protocol and metric, in the order in which results have them."""
    kinds = dict.fromkeys((_protocol(r), r["metric"]) for record in records for r in record.results)
    rows = [(record, competitor) for record in records for competitor in competitors(record)]
    return [_table(protocol, metric, rows) for protocol, metric in kinds]


def competitors(record: Record) -> list[Competitor]:
    """Return the rows of a run: the base model, then adapters, those that differ only in task and seed as one."""
    scored = {result["adapter"] for result in record.results}
    found = [Competitor(record.name, BASE, "", (BASE,), None)] if BASE in scored else []
    for group in _groups(record):
        first = record.entries.get(group[0])
        label = group[0] if len(group) == 1 else _stem(group, record) or str(_method(first))
        seeds = len({_seed(record, name) for name in group})
        detail = describe(first) + (f" · {seeds} seeds" if seeds > 1 else "")
        found.append(Competitor(record.name, label, detail, tuple(group), record.parameters(group[0]), seeds))
    return found


def describe(entry: dict[str, Any] | None) -> str:
    """Return the method of an adapter and its size in few words."""
    if entry is None:
        return ""
    parts = [str(_method(entry)) + (" + DoRA" if entry.get("use_dora") else "")]
    parts += [f"r {entry['r']}"] if "r" in entry else []
    if "num_experts" in entry:
        chosen = (
            f"top-{entry['top_k']}" if entry.get("top_k") else f"top-p {entry['top_p']}" if "top_p" in entry else ""
        )
        parts.append(f"{entry['num_experts']} experts" + (f", {chosen}" if chosen else ""))
    return " · ".join(parts)


def _method(entry: dict[str, Any] | None) -> Any:
    return "adapter" if entry is None else entry.get("routing_strategy") or "lora"


def _groups(record: Record) -> list[list[str]]:
    """Return adapters in groups of equal settings, none of which has two scores for one task and seed."""
    groups: list[tuple[str, set[tuple[str, str]], list[str]]] = []
    for name in record.adapters:
        entry = record.entries.get(name)
        tasks = {(r["task"], _seed(record, name)) for r in record.results if r["adapter"] == name}
        if not tasks:
            continue
        same = name if entry is None else json.dumps({k: v for k, v in entry.items() if k not in _NOT_HOW})
        for key, seen, members in groups:
            if key == same and not seen & tasks:
                seen |= tasks
                members.append(name)
                break
        else:
            groups.append((same, tasks, [name]))
    return [members for _, _, members in groups]


def _seed(record: Record, adapter: str) -> str:
    return str(record.entries.get(adapter, {}).get("seed"))


def _stem(group: Sequence[str], record: Record) -> str:
    """Return what the names of a row's adapters share once their tasks are taken away."""
    stems = []
    for name in group:
        tasks = {r["task"] for r in record.results if r["adapter"] == name}
        for task in tasks:
            name = name.replace(re.sub(r"\W", "_", task), "").replace(task, "")
        stems.append(re.sub(r"_\d+$", "", name).strip("._-"))
    return stems[0] if len(set(stems)) == 1 else ""


def _protocol(result: dict[str, Any]) -> str:
    return str(result.get("protocol") or "")


def _table(protocol: str, metric: str, rows: Sequence[tuple[Record, Competitor]]) -> Standings:
    def score(record: Record, competitor: Competitor, task: str) -> Score | None:
        own = {}
        for r in record.results:
            same = r["adapter"] in competitor.adapters and r["task"] == task
            if same and r["metric"] == metric and _protocol(r) == protocol:
                own[r["adapter"]] = r
        return _score(list(own.values())) if own else None

    of_kind = [r for record, _ in rows for r in record.results if (_protocol(r), r["metric"]) == (protocol, metric)]
    tasks = list(dict.fromkeys(r["task"] for r in of_kind))
    table = [(competitor, [score(record, competitor, task) for task in tasks]) for record, competitor in rows]
    table = [(competitor, scores) for competitor, scores in table if any(scores)]
    averages = [_average(scores) for _, scores in table]
    columns = [_with_best(column) for column in zip(*(scores for _, scores in table), strict=True)]
    averages = _with_best(averages)
    return Standings(
        protocol,
        metric,
        tasks,
        [(competitor, [column[i] for column in columns], averages[i]) for i, (competitor, _) in enumerate(table)],
    )


def _score(results: Sequence[dict[str, Any]]) -> Score:
    """Return the score of one adapter, or of several that differ in their seeds."""
    value = fmean(r["value"] for r in results)
    errors = [r["standard_error"] for r in results if r.get("standard_error") is not None]
    error = fmean(errors) if errors else None
    chance = results[0].get("chance")
    at_chance = isinstance(chance, int | float) and value < chance + 2 * (error or 0)
    spread = error if len(results) == 1 else stdev(r["value"] for r in results)
    return Score(value, spread, results[0].get("n"), any(r.get("limit") for r in results), at_chance)


def _average(scores: Sequence[Score | None]) -> Score | None:
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        return None
    value = sum(score.value for score in known) / len(known)
    squares = [score.error**2 for score in known if score.error is not None]
    error = math.sqrt(sum(squares)) / len(known) if len(squares) == len(known) else None
    return Score(value, error, None, any(score.limited for score in known))


def _with_best(column: Sequence[Score | None]) -> list[Score | None]:
    values = [score.value for score in column if score is not None]
    if len(values) < 2:
        return list(column)
    best = max(values)
    return [None if score is None else replace(score, best=score.value == best) for score in column]
