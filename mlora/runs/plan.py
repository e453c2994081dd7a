"""What a run will do, before it does it."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mlora.adapters import Method
from mlora.config import JobConfig, RunConfig, RunOptions
from mlora.data import Sample
from mlora.model import load
from mlora.model.attention import PACKED
from mlora.model.multi import MultiAdapterModel
from mlora.report.table import columns
from mlora.runs.forecast import Forecast, Setting
from mlora.runs.rows import Reader, of_adapter
from mlora.training.order import Order


@dataclass(frozen=True)
class PlannedJob:
    """One adapter of the plan.

    Attributes:
        name, method: of the adapter.
        rows: training rows.
        steps: optimizer steps.
        tokens: trained in all epochs.
        parameters: trainable ones.
    """

    name: str
    method: Method
    rows: int
    steps: int
    tokens: int
    parameters: int

    @classmethod
    def of(cls, job: JobConfig, samples: Sequence[Sample], parameters: int) -> PlannedJob:
        """Plan a job from its rows and its number of parameters."""
        steps = math.ceil(len(samples) / job.batch_size) * job.num_epochs
        tokens = sum(len(s.input_ids) for s in samples) * job.num_epochs
        return cls(job.name, job.method, len(samples), steps, tokens, parameters)


@dataclass(frozen=True)
class Plan:
    """A run.

    Attributes:
        base_model: as given.
        dtype, device: of the base model.
        base_parameters: frozen ones.
        jobs: the adapters.
        files: that will be written.
        memory: that the training takes; None where it is not known, or nothing is trained.
        notes: what is unknown, and why.
    """

    base_model: str
    dtype: str
    device: str
    base_parameters: int
    jobs: Sequence[PlannedJob]
    files: Sequence[Path]
    memory: Forecast | None = None
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        header = ["adapter", "method", "experts", "rank", "rows", "steps", "tokens", "trainable", "share"]
        return "\n".join(
            [
                f"base model {self.base_model}: {self.base_parameters:,} frozen parameters, "
                f"{self.dtype} on {self.device}",
                "",
                columns(header, [self._row(job) for job in self.jobs], left=2),
                "",
                *([] if self.memory is None else [str(self.memory), ""]),
                _written(self.files),
                *(_in_lines(f"unknown: {note}") for note in self.notes),
            ]
        )

    def _row(self, job: PlannedJob) -> list[str]:
        settings = job.method.model_dump()
        return [
            job.name,
            job.method.method,
            str(settings.get("num_experts", "-")),
            str(settings.get("r", "-")),
            *(f"{n:,}" for n in (job.rows, job.steps, job.tokens, job.parameters)),
            f"{100 * job.parameters / self.base_parameters:.2f}%",
        ]


def _written(files: Sequence[Path]) -> str:
    """Return what is written: the folder, then the names within."""
    folder = files[0].parent
    names = ", ".join(str(file.relative_to(folder)) for file in files if file.is_relative_to(folder))
    elsewhere = "".join(f"; and {file}" for file in files if not file.is_relative_to(folder))
    return _in_lines(f"writes to {folder}: {names}{elsewhere}")


def _in_lines(text: str) -> str:
    """Return a text in lines of a terminal's width."""
    return textwrap.fill(text, 80, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def dry_plan(
    options: RunOptions,
    config: RunConfig,
    origin: load.Origin,
    setting: Setting,
    cutoff_len: int,
    files: Sequence[Path],
) -> Plan:
    """Plan from the data and the model without its weights."""
    notes: list[str] = []
    model = shapes(origin, setting.dtype, setting.attention)
    seed, training = options.random_seed, not (options.evaluate or options.inference)
    reader = Reader(load.load_tokenizer(origin), cutoff_len, seed)
    jobs, orders = [], []
    for job in config.lora:
        with of_adapter(options.config, job.name):
            rows, _ = reader.rows_of(job)
            model.add_adapter(job.name, job.method, num_labels=job.num_labels)
        jobs.append(PlannedJob.of(job, rows, model.num_parameters(job.name)))
        orders.append(Order(job, rows, job.seed_or(seed)))
    base, memory = model.num_parameters(None), None
    if training:
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
