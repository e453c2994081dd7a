"""The loop: rows of several jobs in one batch, one forward, one backward, each job's own step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

import torch

from mlora.model.batch import Batch
from mlora.model.graphs import Graphs
from mlora.model.memory import peak_bytes, ran_out
from mlora.model.multi import MultiAdapterModel
from mlora.training.job import Job

log = logging.getLogger(__name__)


def train(
    model: MultiAdapterModel,
    jobs: Sequence[Job],
    simultaneously: int | None,
    after_round: Callable[[list[Job]], bool],
) -> None:
    """Train jobs to their ends, at most so many at once; one that ends makes room for the next that waits.

    Where memory does not suffice, micro-batches are halved, then fewer jobs share a forward; neither changes what a
    step computes, except that auxiliary losses of routers are means over a micro-batch by definition.

    Args:
        model: that holds the jobs' adapters.
        jobs: in the order in which they come in.
        simultaneously: adapters in one forward; None for all.
        after_round: called after every forward and backward with the jobs that have thereby taken an optimizer step;
            their `measured` tells of it. Returning True stops the training there.

    Raises:
        torch.OutOfMemoryError: a single row does not fit.
    """
    graphs = graphs_for(model)
    started = dict[str, float]()
    together = simultaneously or len(jobs)
    while active := [job for job in jobs if not job.done][:together]:
        now = time.perf_counter()
        for job in active:
            started.setdefault(job.name, now)
        if not _computed(model, active, graphs):
            if graphs is not None:
                graphs.forget()
            together = _relieve(active)
            continue
        stepped = [job for job in active if job.advance()]
        for job in stepped:
            job.measured["seconds"] = time.perf_counter() - started.pop(job.name)
            job.measured["max_memory_bytes"] = peak_bytes(model.device)
        if after_round(stepped):
            break
    model.eval()


def graphs_for(model: MultiAdapterModel) -> Graphs | None:
    """Return what records steps; None where nothing waits for the device."""
    return Graphs(model) if model.device.type == "cuda" else None


def _computed(model: MultiAdapterModel, jobs: Sequence[Job], graphs: Graphs | None) -> bool:
    """Add the gradients of each job's next micro-batch; False where memory does not suffice for them."""
    try:
        model.train()
        rows = {job.name: job.next_rows() for job in jobs}
        steps: dict[str | None, int] = {job.name: job.step for job in jobs}
        if graphs is not None and graphs.suits(rows):
            computed = graphs.losses_and_gradients(rows, steps, {job.name: job.weights() for job in jobs})
            if computed is not None:
                for job in jobs:
                    job.count(*computed[job.name])
                return True
        outputs = model(Batch.pack([row for own in rows.values() for row in own], steps, model.device))
        torch.stack([job.share(outputs[job.name]) for job in jobs]).sum().backward()
        return True
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        return False


def _relieve(jobs: Sequence[Job]) -> int:
    """Let steps for which memory did not suffice begin again in smaller parts; return how many jobs go together."""
    for job in jobs:
        job.restart_step()
    torch.cuda.empty_cache()
    large = [job for job in jobs if job.micro_batch_size > 1]
    for job in large:
        job.micro_batch_size = (job.micro_batch_size + 1) // 2
    if large:
        sizes = ", ".join(f"{job.micro_batch_size} ({job.name})" for job in large)
        log.warning("out of memory: micro_batch_size is now %s; batch_size stays", sizes)
        return len(jobs)
    if len(jobs) == 1:
        raise torch.OutOfMemoryError(
            f"one row of {jobs[0].name} does not fit into memory; --gradient_checkpointing, --quantize 4bit "
            "or a smaller cutoff_len needs less"
        )
    together = (len(jobs) + 1) // 2
    log.warning("out of memory: %d adapters share a forward now, in place of %d", together, len(jobs))
    return together
