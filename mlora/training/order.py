"""In which order a job's rows come: nothing but its config, seed and rows decides."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice

from mlora.config import JobConfig
from mlora.data import Sample, epoch_order
from mlora.model.batch import Row

LOOKED_AT = 100_000
"""Forwards among which the heaviest is sought; in longer trainings later epochs draw from the same rows."""


class Order:
    """The rows of a job, step by step.

    Args:
        config: the adapter's entry of the config.
        samples: its training rows.
        seed: of the adapter; with its name and the epoch it fixes the order.
    """

    def __init__(self, config: JobConfig, samples: Sequence[Sample], seed: int) -> None:
        self.config, self.samples, self.seed = config, samples, seed
        self.steps_per_epoch = math.ceil(len(samples) / config.batch_size)
        self.total_steps = self.steps_per_epoch * config.num_epochs
        self._epoch: tuple[int, list[int]] = (-1, [])

    def rows_of(self, step: int) -> list[Row]:
        """Return all rows of an optimizer step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        size, name = self.config.batch_size, self.config.name
        if self._epoch[0] != epoch:
            lengths = [len(s.input_ids) for s in self.samples] if self.config.group_by_length else None
            order = epoch_order(len(self.samples), self.seed, name, epoch, lengths=lengths, batch_size=size)
            self._epoch = (epoch, order)
        chosen = self._epoch[1][position * size : (position + 1) * size]
        samples = [self.samples[i] for i in chosen]
        return [Row(s.input_ids, s.labels, name, index, s.class_id) for index, s in enumerate(samples)]

    def forwards(self, size: int) -> int:
        """Return how many micro-batches of so many rows there are in all."""
        full, rest = divmod(len(self.samples), self.config.batch_size)
        return self.config.num_epochs * (full * math.ceil(self.config.batch_size / size) + math.ceil(rest / size))

    def micro_batches(self, size: int) -> Iterator[list[Row]]:
        """Yield the rows of every forward of so many rows."""
        for step in range(self.total_steps):
            rows = self.rows_of(step)
            for start in range(0, len(rows), size):
                yield rows[start : start + size]


def heaviest(orders: Sequence[Order], simultaneously: int | None) -> dict[str, list[Row]]:
    """Return the rows of the forward with the most tokens, by adapter.

    Args:
        orders: of all jobs, in the order in which they come in.
        simultaneously: adapters in one forward; None for all.
    """
    most, found = 0, dict[str, list[Row]]()
    for rows in islice(forwards(orders, simultaneously), LOOKED_AT):
        tokens = sum(len(row.input_ids) for own in rows.values() for row in own)
        if tokens > most:
            most, found = tokens, rows
    return found


def forwards(
    orders: Sequence[Order], simultaneously: int | None, sizes: Sequence[int] | None = None
) -> Iterator[dict[str, list[Row]]]:
    """Yield the rows of every forward of a training, by adapter.

    Args:
        orders: of all jobs, in the order in which they come in; one that ends makes room for the next.
        simultaneously: adapters in one forward; None for all.
        sizes: rows of each in a forward; None for each config's `micro_batch_size`.
    """
    sizes = sizes or [order.config.micro_batch_size for order in orders]
    jobs = [
        (order.config.name, order.micro_batches(size), order.forwards(size))
        for order, size in zip(orders, sizes, strict=True)
    ]
    while active := jobs[: simultaneously or len(orders)]:
        yield {name: next(rows) for name, rows, _ in active}
        jobs = [*((name, rows, left - 1) for name, rows, left in active if left > 1), *jobs[len(active) :]]
