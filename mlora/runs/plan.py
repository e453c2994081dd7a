"""What a run will do, before it does it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mlora.adapters import Method
from mlora.config import JobConfig, RunConfig, RunOptions
from mlora.data import Sample, UnreachableError
from mlora.model import load
from mlora.model.attention import PACKED
from mlora.model.errors import UnreachableModelError
from mlora.model.multi import MultiAdapterModel
from mlora.report.table import columns
from mlora.runs.forecast import Forecast, Setting
from mlora.runs.rows import Reader, of_adapter
from mlora.training.order import Order


@dataclass(frozen=True)
class PlannedJob:
    """One adapter of the plan; None where something is not known.

    Attributes:
        name, method: of the adapter.
        rows: training rows.
        steps: optimizer steps.
        tokens: trained in all epochs.
        parameters: trainable ones.
    """

    name: str
    method: Method
    rows: int | None
    steps: int | None
    tokens: int | None
    parameters: int | None

    @classmethod
    def of(cls, job: JobConfig, samples: Sequence[Sample] | None, parameters: int | None) -> PlannedJob:
        """Plan a job from its rows, where they could be read, and its number of parameters."""
        if samples is None:
            return cls(job.name, job.method, None, None, None, parameters)
        steps = math.ceil(len(samples) / job.batch_size) * job.num_epochs
        tokens = sum(len(s.input_ids) for s in samples) * job.num_epochs
        return cls(job.name, job.method, len(samples), steps, tokens, parameters)


@dataclass(frozen=True)
class Plan:
    """A run.

    Attributes:
        base_model: as given.
        dtype, device: of the base model.
        base_parameters: frozen ones; None where they are not known.
        jobs: the adapters.
        files: that will be written.
        memory: that the training takes; None where it is not known, or nothing is trained.
        notes: what is unknown, and why.
    """

    base_model: str
    dtype: str
    device: str
    base_parameters: int | None
    jobs: Sequence[PlannedJob]
    files: Sequence[Path]
    memory: Forecast | None = None
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        size = "unknown" if self.base_parameters is None else f"{self.base_parameters:,}"
        header = ["adapter", "method", "experts", "rank", "rows", "steps", "tokens", "trainable", "share"]
        return "\n".join(
            [
                f"base model {self.base_model}: {size} frozen parameters, {self.dtype} on {self.device}",
                "",
                columns(header, [self._row(job) for job in self.jobs], left=2),
                "",
                *([] if self.memory is None else [str(self.memory), ""]),
                _written(self.files),
                *(f"unknown: {note}" for note in self.notes),
            ]
        )

    def _row(self, job: PlannedJob) -> list[str]:
        settings = job.method.model_dump()
        share = job.parameters / self.base_parameters if job.parameters and self.base_parameters else None
        return [
            job.name,
            job.method.method,
            str(settings.get("num_experts", "-")),
            str(settings.get("r", "-")),
            *(("unknown" if n is None else f"{n:,}") for n in (job.rows, job.steps, job.tokens, job.parameters)),
            "unknown" if share is None else f"{100 * share:.2f}%",
        ]


def _written(files: Sequence[Path]) -> str:
    """Return what is written in lines of a terminal's width: the folder, then the names within."""
    folder = files[0].parent
    names = ", ".join(str(file.relative_to(folder)) for file in files if file.is_relative_to(folder))
    elsewhere = "".join(f"; and {file}" for file in files if not file.is_relative_to(folder))
    text = f"writes to {folder}: {names}{elsewhere}"
    return textwrap.fill(text, 80, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def dry_plan(
    options: RunOptions,
    config: RunConfig,
    origin: load.Origin,
    setting: Setting,
    cutoff_len: int,
    files: Sequence[Path],
) -> Plan:
    """Plan without weights: the model as shapes only, and the data where it can be had."""
    notes: list[str] = []
    model = _unless_unreachable(lambda: shapes(origin, setting.dtype, setting.attention), "parameters", notes)
    tokenizer = _unless_unreachable(lambda: load.load_tokenizer(origin), "rows and steps", notes)
    seed, training = options.random_seed, not (options.evaluate or options.inference)
    reader = None if tokenizer is None else Reader(tokenizer, cutoff_len, seed)
    jobs, orders = [], []
    for job in config.lora:
        rows = parameters = None
        with of_adapter(options.config, job.name):
            if reader is not None:
                rows = _unless_unreachable(partial(reader.rows_of, job), f"rows of {job.name}", notes)
            if model is not None:
                model.add_adapter(job.name, job.method, num_labels=job.num_labels)
                parameters = model.num_parameters(job.name)
        jobs.append(PlannedJob.of(job, None if rows is None else rows[0], parameters))
        orders += [] if rows is None else [Order(job, rows[0], job.seed_or(seed))]
    base = None if model is None else model.num_parameters(None)
    memory = None
    if model is not None and training and len(orders) == len(jobs):
        memory = setting.forecast(model, orders, config.train_lora_simultaneously_num, notes)
    return Plan(origin.given, setting.dtype, setting.device, base, jobs, files, memory, notes)


def shapes(origin: load.Origin, dtype: str = "float32", attention: str | None = None) -> MultiAdapterModel:
    """Return a base model without its weights.

    Args:
        origin: where it lies.
        dtype: of the weights that it would have.
        attention: transformers' name of an implementation; None for packed attention.
    """
    from transformers import AutoModelForCausalLM

    keywords = {"dtype": getattr(torch, dtype), "trust_remote_code": origin.trust_remote_code}
    config = load.load_config(origin)
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, attn_implementation=attention or PACKED, **keywords)
        except KeyError:  # as `load_model` does, for families that look attention up in a table of their own
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", **keywords)
        return MultiAdapterModel(model.requires_grad_(False), origin)


def _unless_unreachable(read: Callable[[], Any], what: str, notes: list[str]) -> Any:
    """Return what is read; None, with a note, where it lies on a hub that cannot be reached."""
    try:
        return read()
    except (UnreachableModelError, UnreachableError) as error:
        notes.append(f"{what}: {error}")
        return None
