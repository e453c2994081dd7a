"""Which form of an operation runs: Triton's kernels on an NVIDIA GPU, plain torch elsewhere."""

from __future__ import annotations

import importlib.util
import logging
from functools import cache

import torch
from torch import Tensor

from mlora import ops
from mlora.ops import random

log = logging.getLogger(__name__)


def fused_available(x: Tensor) -> bool:
    """Return whether the kernels of `ops.fused` can work on a tensor."""
    return x.is_cuda and _triton()


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
