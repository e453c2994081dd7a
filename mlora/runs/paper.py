"""The tables of a reproduction, in the paper's shape, and what it has cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlora.config import JobConfig, RunConfig
from mlora.report.grid import Grid, Place
from mlora.report.paper import BASE as PAPER_BASE
from mlora.report.paper import paper_rows
from mlora.report.table import BASE, columns, wrapped
from mlora.runs.folder import RunFolder

LABELS = {"lora": "LoRA", "dora": "DoRA", "mixlora": "MixLoRA", "mixdora": "MixDoRA"}
"""The paper's names of methods; others go by their template's."""


def paper_tables(
    results: Sequence[Mapping[str, Any]],
    jobs: RunConfig,
    sizes: Mapping[str | None, int],
    methods: Sequence[str],
    base_model: str,
) -> list[str]:
    """Return one table for each protocol: methods by tasks, over seeds, beside the published figures.

    Args:
        results: of all passes.
        jobs: the whole grid.
        sizes: trainable numbers of each adapter, and those of the base model (None).
        methods: templates, with which adapters' names begin.
        base_model: as given.
    """
    places = {BASE: Place((BASE, "-"))}
    for job in jobs.lora:
        share = f"{100 * sizes[job.name] / sizes[None]:.2f}%"
        places[job.name] = Place((_label(job, methods), share), job.seed or 0)
    order = {name: number for number, name in enumerate(places)}
    ordered = sorted(results, key=lambda result: order[result["adapter"]])
    tables = []
    for protocol in dict.fromkeys(r["protocol"] for r in ordered):
        own = [r for r in ordered if r["protocol"] == protocol]
        tested = max((r.get("limit") or 0 for r in own), default=0)
        tables.append(_table(protocol, Grid(own, places), jobs, base_model, tested))
    return tables


def _label(job: JobConfig, methods: Sequence[str]) -> str:
    method = next(m for m in sorted(methods, key=len, reverse=True) if job.name.startswith(f"{m}_"))
    return LABELS.get(method, method)


def _table(protocol: str, grid: Grid, jobs: RunConfig, base_model: str, tested: int) -> str:
    multi_task, first = ";" in jobs.lora[0].task_name, jobs.lora[0]
    kind = "one adapter for all tasks" if multi_task else "one adapter for each task"
    rows, notes = grid.rows(), list(grid.notes)
    published = paper_rows(list(grid.tasks)) if protocol == "letter" and not multi_task else []
    if published:
        rows += published
        notes.append(f"(paper): published for {PAPER_BASE}, https://arxiv.org/abs/2404.15159; another base model")
    read = [f"{rows} of {split}" for rows, split in ((first.limit, "train"), (tested, "test")) if rows]
    if read:
        notes.append(f"only the first rows are read, {', '.join(read)}: not comparable with published results")
    table = columns(grid.header("method", "trainable"), rows)
    return "\n".join([wrapped(f"{base_model}, {kind}; protocol: {protocol}"), table, *map(wrapped, notes)])


def cost(folders: Sequence[RunFolder]) -> str:
    """Say what the passes have cost, over all slices."""
    tokens = seconds = 0.0
    for folder in folders:
        tokens += sum(step.get("num_tokens") or 0 for step in _lines(folder.metrics) if "loss" in step)
        seconds += sum(part["seconds"] for part in _lines(folder.path / "slices.jsonl"))
    rate = tokens / max(seconds, 1e-9)
    return f"{tokens:,.0f} tokens trained, {seconds:,.0f} s with loading and evaluation: {rate:,.0f} tokens/s"


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
