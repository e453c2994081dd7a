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
    after_round: Callable[[list[Job]], bool],
) -> None:
    """Train jobs to their ends, at most so many at once; one that ends makes room for the next that waits.

    Args:
        model: that holds the jobs' adapters.
        jobs: in the order in which they come in.
        simultaneously: adapters in one forward; None for all.
        after_round: called after every forward and backward with the jobs that have thereby taken an optimizer step;
            their `measured` tells of it. Returning True stops the training there.
    """
    started = dict[str, float]()
    for active in _rounds(jobs, simultaneously):
        now = time.perf_counter()
        for job in active:
            started.setdefault(job.name, now)
        model.train()
        rows = [row for job in active for row in job.next_rows()]
        outputs = model(Batch.pack(rows, {job.name: job.step for job in active}, model.device))
        torch.stack([job.share(outputs[job.name]) for job in active]).sum().backward()
        stepped = [job for job in active if job.advance()]
        for job in stepped:
            job.measured["seconds"] = time.perf_counter() - started.pop(job.name)
        if after_round(stepped):
            break
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
