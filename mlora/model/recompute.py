"""Activation checkpointing: keep what goes into a module, run it again in backward.

What of a decoder layer is run again is a policy of the whole model: nothing, the middle (the feed-forward block, whose
wide hidden units are about half of what a layer keeps), or all of it. It may hold for the first layers only. These are
the ones to choose: backward comes to them last, when what the others kept is gone.

transformers' own switch needs `train()`, which would wake the frozen base's dropout, and what is run again must see
the segments of its own forward; so forwards are wrapped here. Never the reentrant kind: it drops the gradient of
whatever leaves a layer by the side, the router logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mlora.model.scope import Flight, Scope

What = Literal["none", "middle", "all"]
WHATS: tuple[What, ...] = get_args(What)


class Recompute(NamedTuple):
    """What backward computes again rather than finds kept.

    Attributes:
        what: of a decoder layer.
        layers: how many of the first ones; None for all.
    """

    what: What = "none"
    layers: int | None = None

    def of(self, layer: int) -> What:
        """Return what is computed again of a decoder layer, by its number."""
        return self.what if self.layers is None or layer < self.layers else "none"

    def __str__(self) -> str:
        part = {"none": "nothing", "middle": "the feed-forward block", "all": "everything"}[self.what]
        return part if self.layers is None or self.what == "none" else f"{part} of the first {self.layers} layers"


def recompute_in_backward(module: nn.Module, scope: Scope, enabled: Callable[[], bool]) -> None:
    """Let a module keep only its input for backward, while `enabled()` and gradients are on."""
    forward = module.forward

    @wraps(forward)
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        flight = scope.flight
        if flight is None or not torch.is_grad_enabled() or not enabled():
            return forward(*args, **kwargs)
        runs: list[None] = []
        return checkpoint(
            partial(_run, forward, scope, flight, runs), *args, use_reentrant=False, preserve_rng_state=False, **kwargs
        )

    module.forward = checkpointed


def _run(forward: Callable[..., Any], scope: Scope, flight: Flight, runs: list[None], *args: Any, **kwargs: Any) -> Any:
    runs.append(None)
    with scope.use(flight if len(runs) == 1 else flight.again()):
        return forward(*args, **kwargs)
