"""The loop: rows of several jobs in one batch, one forward, one backward, each job's own step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from mlora.model.batch import Batch
from mlora.model.multi import MultiAdapterModel
from mlora.training.job import Job


def train(
    model: MultiAdapterModel,
    jobs: Sequence[Job],
    simultaneously: int | None,
    after_step: Callable[[Job, dict[str, float]], None],
) -> None:
    """Train jobs to their ends, at most so many at once; one that ends makes room for the next that waits.

    Args:
        model: that holds the jobs' adapters.
        jobs: in the order in which they come in.
        simultaneously: adapters in one forward; None for all.
        after_step: called with the job and its measurements whenever one has taken an optimizer step.
    """
    started = dict[str, float]()
    model.train()
    for active in _rounds(jobs, simultaneously):
        now = time.perf_counter()
        for job in active:
            started.setdefault(job.name, now)
        rows = [row for job in active for row in job.next_rows()]
        batch = Batch.pack(rows, {job.name: job.step for job in active}, model.device)
        outputs = model(batch)
        torch.stack([job.share(outputs[job.name]) for job in active]).sum().backward()
        del outputs
        for job in active:
            if job.advance():
                seconds = time.perf_counter() - started.pop(job.name)
                after_step(job, job.measured | {"seconds": seconds})
                model.train()
    model.eval()


def _rounds(jobs: Sequence[Job], simultaneously: int | None) -> Iterator[list[Job]]:
    """Yield the jobs of each forward."""
    waiting = [job for job in jobs if not job.done]
    active: list[Job] = []
    while waiting or active:
        active = [job for job in active if not job.done]
        while waiting and (simultaneously is None or len(active) < simultaneously):
            active.append(waiting.pop(0))
        if active:
            yield active
