"""Memory: running out of it is recognised and answered with smaller batches; what was used at most."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

log = logging.getLogger(__name__)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory does not suffice, on any device."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError | MemoryError) or bool(should_reduce_batch_size(error))


def in_batches(items: Sequence[_Item], size: int, compute: Callable[[Sequence[_Item]], _Result]) -> Iterator[_Result]:
    """Yield the result of each batch until all items are computed; where memory does not suffice, batches are halved.

    Args:
        items: in order.
        size: of a batch at first.
        compute: what is done with a batch; it is called again with a smaller one after running out of memory.
    """
    start = 0
    while start < len(items):
        batch = items[start : start + size]
        try:
            result = compute(batch)
        except (RuntimeError, MemoryError) as error:
            if len(batch) == 1 or not ran_out(error):
                raise
            size = len(batch) // 2
            log.warning("out of memory: goes on with %d rows in a forward, in place of %d", size, len(batch))
            continue
        yield result
        start += len(batch)


def free_bytes(device: str) -> int:
    """Return the bytes that are free on a type of device, "cuda" or "cpu"."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    import psutil

    return int(psutil.virtual_memory().available)


def peak_bytes(device: torch.device) -> float:
    """Return the most bytes that tensors have taken on a GPU so far; on the CPU, the most of the whole process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(most if sys.platform == "darwin" else 1024 * most)
