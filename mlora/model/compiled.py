"""Compilation of what decoder layers do around the adapted modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch import nn


def compile_forward(layer: nn.Module, enabled: Callable[[], bool]) -> None:
    """Let torch compile a decoder layer's own operations, while `enabled()`."""
    eager = layer.forward

    @cache
    def fast() -> Callable[..., Any]:
        return torch.compile(eager)

    @wraps(eager)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (fast() if enabled() else eager)(*args, **kwargs)

    layer.forward = forward
