"""Copies of many matrices at once: what a step casts of its adapters, and the gradients that it adds up."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mlora import ops

Pairs = Sequence[tuple[Tensor, Tensor]]
"""A source of up to three dimensions and a contiguous target of the same shape, each."""


class Copies(Protocol):
    """Copies of tensors of certain forms."""

    def launch(self, pairs: Pairs) -> Callable[[], None]:
        """Copy, and return what is to be called where a CUDA graph records this, after it has."""
        ...


def joint_copies(pairs: Pairs, keep: Tensor | None = None) -> Copies:
    """Return copies of these pairs and others of the same forms; to be made outside of any graph that they serve.

    Args:
        pairs: any.
        keep: [number of pairs] int32, 1 where the source is added to the target, else 0; None for nowhere.
    """
    for source, target in pairs:
        if source.shape != target.shape or source.ndim > 3 or not target.is_contiguous():
            raise ValueError(f"{tuple(source.shape)} cannot be copied onto {tuple(target.shape)}, {target.stride()}")
    if pairs and ops.fused_available(pairs[0][1]):
        from mlora.ops.fused import FusedCopies

        return FusedCopies(pairs, keep)
    return _PlainCopies(keep)


class _PlainCopies:
    """One by one."""

    def __init__(self, keep: Tensor | None) -> None:
        self._keep = keep

    def launch(self, pairs: Pairs) -> Callable[[], None]:
        for number, (source, target) in enumerate(pairs):
            target.copy_(source if self._keep is None else torch.where(self._keep[number] > 0, target + source, source))
        return lambda: None


class Casts:
    """Adapters' matrices in the dtype that products run in, kept from step to step and cast again all at once.

    What is asked for the first time is cast by who asks.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, tuple[Sequence[Tensor], Sequence[Tensor], Tensor]] = {}

    def get(self, parameters: Sequence[Tensor], dtype: torch.dtype) -> Tensor | None:
        """Return what was made of G parameters; None for nothing."""
        return self._made.get((dtype, *map(id, parameters)), (None, None, None))[2]

    def add(self, parameters: Sequence[Tensor], stack: Sequence[Tensor], made: Tensor) -> None:
        """Keep [G, ...] that was made of views of G parameters, which live as long."""
        self._made[made.dtype, *map(id, parameters)] = parameters, stack, made

    def pairs(self) -> Pairs:
        """Return the copies that bring all that was made up to date."""
        return [pair for _, stack, made in self._made.values() for pair in zip(stack, made, strict=True)]
