"""The order of training rows in an epoch, the same on every platform and whatever else trains beside."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

MEGABATCH_BATCHES = 50
"""Batches that are sorted by length together, as in transformers' LengthGroupedSampler."""


def epoch_order(
    n: int, seed: int, adapter: str, epoch: int, *, lengths: Sequence[int] | None = None, batch_size: int = 1
) -> list[int]:
    """Return a permutation of n rows that depends on seed, adapter and epoch only.

    Args:
        n: rows.
        seed: of the run.
        adapter: its name.
        epoch: counted from 0.
        lengths: tokens of each row, to group rows of like length into batches: the rows of 50 batches at a time
            are sorted by length, and the batches shuffled. A short batch stays last.
        batch_size: rows of an optimizer step; used with `lengths`.
    """
    # hashlib and not hash(), which differs from one process to the next.
    digest = hashlib.sha256(f"{seed}\n{epoch}\n{adapter}".encode()).digest()
    generator = random.Random(int.from_bytes(digest[:8], "big"))
    order = list(range(n))
    generator.shuffle(order)
    if lengths is None:
        return order
    size = MEGABATCH_BATCHES * batch_size
    by_length = [i for start in range(0, n, size) for i in sorted(order[start : start + size], key=lengths.__getitem__)]
    batches = [by_length[start : start + batch_size] for start in range(0, n, batch_size)]
    short = [batches.pop()] if batches and len(batches[-1]) < batch_size else []
    generator.shuffle(batches)
    return [i for batch in batches + short for i in batch]
