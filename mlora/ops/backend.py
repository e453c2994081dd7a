"""Which form of an operation runs: Triton's kernels on an NVIDIA GPU, plain torch elsewhere.

It follows from the device that tensors lie on. Tensors without data lie nowhere; they may stand for those of a device,
so that what a step would do there can be looked at anywhere.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from mlora import ops
from mlora.ops import random

log = logging.getLogger(__name__)


_stood_for: list[str] = []


def device_type(x: Tensor) -> str:
    """Return the type of the device that a tensor lies on or stands for: "cpu", "cuda", ..."""
    return _stood_for[-1] if _stood_for else x.device.type


def has_data(x: Tensor) -> bool:
    """Return whether a tensor can be computed with, rather than stand for one."""
    return not _stood_for and not x.is_meta


@contextmanager
def standing_for(device: str) -> Iterator[None]:
    """Take every tensor for one of a type of device inside the `with` block, where none has data; no kernel runs."""
    _stood_for.append(device)
    try:
        if device == "cuda" and _triton():
            from mlora.ops.fused.masks import unlaunched

            with unlaunched():
                yield
        else:
            yield
    finally:
        _stood_for.pop()


def fused_available(x: Tensor) -> bool:
    """Return whether the kernels of `ops.fused` can work on a tensor."""
    return device_type(x) == "cuda" and _triton()


def dropout(x: Tensor, keys: Tensor, p: float, stream: str) -> Tensor:
    """Return `ops.random.dropout` of x [n, D]; a kernel makes its mask again in backward rather than keep it."""
    if ops.fused_available(x):
        from mlora.ops import fused

        return fused.dropout(x, fused.dropout_of(keys, p, stream))
    return random.dropout(x, keys, p, stream)


@cache
def _triton() -> bool:
    """Choose once, and say so."""
    found = importlib.util.find_spec("triton") is not None and torch.version.hip is None
    log.info("adapters run %s", "in Triton kernels" if found else "in plain torch: the package triton is not installed")
    return found
