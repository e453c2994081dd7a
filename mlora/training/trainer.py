"""The loop: rows of several jobs in one batch, one forward, one backward, each job's own step.

Ranks walk through it together. Each computes rows of its own of every micro-batch; of a step they add up the
gradients, in one message for all jobs that take one, and so take the same step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from itertools import chain, islice

import torch

from mlora.model.batch import Batch, Row
from mlora.model.graphs import Graphs
from mlora.model.memory import peak_bytes, ran_out
from mlora.model.multi import MultiAdapterModel
from mlora.model.sizes import sizes_of
from mlora.parallel import ALONE, Ranks, places
from mlora.training.job import Job
from mlora.training.order import forwards
from mlora.training.update import Updates

log = logging.getLogger(__name__)

LOOKED_AT = 10_000
"""Forwards of a training that decide to which sizes its batches are brought."""


def train(
    model: MultiAdapterModel,
    jobs: Sequence[Job],
    simultaneously: int | None,
    after_round: Callable[[list[Job]], bool],
    ranks: Ranks = ALONE,
) -> None:
    """Train jobs to their ends, at most so many at once; one that ends makes room for the next that waits.

    Where memory does not suffice, micro-batches are halved, then fewer jobs share a forward; neither changes what a
    step computes, except that auxiliary losses of routers are means over a micro-batch by definition.

    Args:
        model: that holds the jobs' adapters.
        jobs: in the order in which they come in.
        simultaneously: adapters in one forward; None for all.
        after_round: called after every forward and backward with the jobs that have thereby taken an optimizer step;
            their `measured` tells of it. Returning True stops the training there, and must on all ranks or none.
        ranks: that share every step; the jobs know them too.

    Raises:
        torch.OutOfMemoryError: a single row does not fit.
    """
    started = dict[str, float]()
    together = simultaneously or len(jobs)
    graphs, updates = graphs_for(model, jobs, together, ranks), Updates()
    if graphs is not None:
        log.info("steps run %s", f"without CUDA graphs: {graphs.obstacle}" if graphs.obstacle else "as CUDA graphs")
    while active := [job for job in jobs if not job.done][:together]:
        now = time.perf_counter()
        for job in active:
            started.setdefault(job.name, now)
        computed = _computed(model, active, graphs, ranks)
        stepped = [job for job in active if job.ends_step] if computed else []
        alone = ranks.count == 1
        norms = _update(updates, stepped) if alone else []  # sent to the device before anything is waited for
        losses = _losses(active, computed, ranks)
        if losses is None:
            if graphs is not None:
                graphs.forget()
            together = _relieve(active)
            graphs = graphs_for(model, jobs, together, ranks)
            continue
        if not alone:
            sum_gradients(stepped, ranks)
            norms = _update(updates, stepped)
        for job, own in zip(active, losses, strict=True):
            job.count_losses(own)
        for job, norm in zip(stepped, norms, strict=True):
            job.end_step(norm)
            job.measured["seconds"] = time.perf_counter() - started.pop(job.name)
            job.measured["max_memory_bytes"] = peak_bytes(model.device)
        if after_round(stepped):
            break
    model.eval()


def graphs_for(model: MultiAdapterModel, jobs: Sequence[Job], together: int, ranks: Ranks) -> Graphs | None:
    """Return what records steps of these jobs; None where nothing waits for the device."""
    if model.device.type != "cuda":
        return None
    graphs = Graphs(model)
    if graphs.obstacle is None:
        ahead = forwards([job.order for job in jobs], together, [job.micro_batch_size * ranks.count for job in jobs])
        own = filter(None, (_own(rows, ranks) for rows in islice(ahead, LOOKED_AT)))
        graphs.sizes = sizes_of(own, model.num_parameters(None))
    return graphs


def _update(updates: Updates, jobs: Sequence[Job]) -> list[float]:
    """Take the jobs' optimizer steps and return the norms of their gradients."""
    return updates.step([job.optimizer for job in jobs], [job.config.max_grad_norm for job in jobs])


def sum_gradients(jobs: Sequence[Job], ranks: Ranks) -> None:
    """Give every rank the sum of what all have computed of the jobs' steps in progress, in one message."""
    parameters = [parameter for job in jobs for parameter in job.parameters]
    if ranks.count == 1 or not parameters:
        return
    sizes = [parameter.numel() for parameter in parameters]
    flat = parameters[0].new_zeros(sum(sizes) + len(parameters))
    parts = [part.view_as(p) for p, part in zip(parameters, flat.split([*sizes, len(parameters)]), strict=False)]
    has = flat[-len(parameters) :]  # on how many ranks there is a gradient: none at all is something else than zero
    has.copy_(torch.tensor([float(p.grad is not None) for p in parameters]))
    known = [(part, p.grad) for part, p in zip(parts, parameters, strict=True) if p.grad is not None]
    if known:
        torch._foreach_copy_([part for part, _ in known], [gradient for _, gradient in known])
    ranks.sum_(flat)
    found = [(p, part) for p, part, count in zip(parameters, parts, has.tolist(), strict=True) if count]
    for parameter, _ in found:
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
    gradients = [parameter.grad for parameter, _ in found if parameter.grad is not None]
    if gradients:
        torch._foreach_copy_(gradients, [part for _, part in found])


def gather_gradients(jobs: Sequence[Job], ranks: Ranks) -> None:
    """Bring what all ranks have computed of steps in progress to the first, for a checkpoint to hold."""
    begun = [job for job in jobs if job.row]
    sum_gradients(begun, ranks)
    if not ranks.first:
        for job in begun:
            job.optimizer.zero_grad(set_to_none=True)


def _own(rows: dict[str, list[Row]], ranks: Ranks) -> dict[str, list[Row]]:
    """Return this rank's rows of a micro-batch, without the jobs of which it has none."""
    if ranks.count == 1:
        return rows
    chosen = places([[len(row.input_ids) for row in own] for own in rows.values()], ranks.count)[ranks.rank]
    return {name: [own[i] for i in mine] for (name, own), mine in zip(rows.items(), chosen, strict=True) if mine}


def _losses(jobs: Sequence[Job], computed: bool, ranks: Ranks) -> list[list[float]] | None:
    """Return what all ranks have counted of each job's losses; None where memory did not suffice on one."""
    known = [job.counted for job in jobs if computed and job.counted is not None]
    values = iter(torch.stack(known).tolist() if known else ())
    own = [next(values) if computed and job.counted is not None else [0.0, 0.0] for job in jobs]
    failures, *sums = ranks.sums([float(not computed), *chain(*own)])
    return None if failures else [sums[i : i + 2] for i in range(0, len(sums), 2)]


def _computed(model: MultiAdapterModel, jobs: Sequence[Job], graphs: Graphs | None, ranks: Ranks) -> bool:
    """Add the gradients of this rank's rows of each job's next micro-batch; False where memory does not suffice."""
    try:
        model.train()
        wanted = {job.name: job.next_rows() for job in jobs}
        rows = _own(wanted, ranks)
        jobs = [job for job in jobs if job.name in rows]
        if not jobs:
            if model.sharded:
                _stand_in(model, wanted)
            return True
        steps: dict[str | None, int] = {job.name: job.step for job in jobs}
        if graphs is not None and graphs.suits(rows):
            weights = {job.name: job.weights(rows[job.name]) for job in jobs}
            computed = graphs.losses_and_gradients(rows, steps, weights)
            if computed is not None:
                for job in jobs:
                    job.count(*computed[job.name])
                return True
        outputs = model(Batch.pack([row for own in rows.values() for row in own], steps, model.device))
        torch.stack([job.share(outputs[job.name], rows[job.name]) for job in jobs]).sum().backward()
        return True
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        if model.sharded:  # the others wait within a layer, and cannot be asked
            raise torch.OutOfMemoryError(
                f"{error}; a smaller micro_batch_size or --recompute all needs less"
            ) from error
        return False


def _stand_in(model: MultiAdapterModel, rows: dict[str, list[Row]]) -> None:
    """Run a forward and backward that changes nothing, for ranks that have rows: all gather a sharded layer."""
    row = next(iter(rows.values()))[0]
    output = model(Batch.pack([row], device=model.device))[str(row.adapter)]
    ((output.loss + output.aux_loss) * 0).backward()


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
