"""Activation checkpointing of decoder layers: keep a layer's input, run the layer again in backward.

transformers' own switch needs `train()`, which would wake the frozen base's dropout, and a recomputed layer must see
the segments of its own forward; so each layer's forward is wrapped here. Never the reentrant kind: it drops the
gradient of whatever leaves a layer by the side, the router logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mlora.model.scope import Flight, Scope


def recompute_in_backward(
    layer: nn.Module, scope: Scope, enabled: Callable[[], bool], compiled: Callable[[], bool]
) -> None:
    """Let a decoder layer keep only its input for backward, while `enabled()` and gradients are on.

    While `compiled()`, the layer's own operations around the adapted modules are compiled by torch.
    """
    eager = layer.forward

    @cache
    def fast() -> Callable[..., Any]:
        return torch.compile(eager)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (fast() if compiled() else eager)(*args, **kwargs)

    @wraps(eager)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        flight = scope.flight
        if not enabled() or flight is None or not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        runs: list[None] = []
        return checkpoint(
            partial(_run, forward, scope, flight, runs), *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )

    layer.forward = checkpointed


def _run(forward: Callable[..., Any], scope: Scope, flight: Flight, runs: list[None], *args: Any, **kwargs: Any) -> Any:
    runs.append(None)
    with scope.use(flight if len(runs) == 1 else flight.again()):
        return forward(*args, **kwargs)
