"""What a run will do, before it does it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlora.adapters import Method
from mlora.config import JobConfig
from mlora.data import Sample
from mlora.report.table import columns


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
        notes: what is unknown, and why.
    """

    base_model: str
    dtype: str
    device: str
    base_parameters: int | None
    jobs: Sequence[PlannedJob]
    files: Sequence[Path]
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
                "writes " + ", ".join(map(str, self.files)),
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
