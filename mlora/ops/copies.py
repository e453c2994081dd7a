"""Copies of many matrices at once: what a step casts of its adapters, and the gradients that it adds up."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mlora import ops

Pairs = Sequence[tuple[Tensor, Tensor]]
"""A source of up to three dimensions and a contiguous target of the same shape, each."""


class Copies(Protocol):
    """Copies of tensors of certain forms."""

    def launch(self, pairs: Pairs) -> Callable[[], None]:
        """Copy, and return what is to be called where a CUDA graph records this, after it has."""
        ...


def joint_copies(pairs: Pairs) -> Copies:
    """Return copies of these pairs and others of the same forms; to be made outside of any graph that they serve."""
    for source, target in pairs:
        if source.shape != target.shape or source.ndim > 3 or not target.is_contiguous():
            raise ValueError(f"{tuple(source.shape)} cannot be copied onto {tuple(target.shape)}, {target.stride()}")
    if pairs and ops.fused_available(pairs[0][1]):
        from mlora.ops.fused import FusedCopies

        return FusedCopies(pairs)
    return _PlainCopies()


class _PlainCopies:
    """One by one."""

    def launch(self, pairs: Pairs) -> Callable[[], None]:
        for source, target in pairs:
            target.copy_(source)
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


class Sums:
    """Places for the gradients of parameters that last; who computes a whole stack of them may write there.

    Args:
        empty: makes them, as `torch.empty` does.
    """

    def __init__(self, empty: Callable[..., Tensor] = torch.empty) -> None:
        self._empty = empty
        self._of: dict[nn.Parameter, Tensor] = {}
        self._stacks: dict[tuple[nn.Parameter, ...], Tensor] = {}
        self._taken: set[nn.Parameter] = set()

    def __getitem__(self, parameter: nn.Parameter) -> Tensor:
        """Return the place of one parameter, of its layout, which a fused optimizer wants of both."""
        if parameter not in self._of:
            self._of[parameter] = torch.empty_like(parameter)
        return self._of[parameter]

    def get(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the place of a parameter that has one."""
        return self._of.get(parameter)

    def begin(self) -> None:
        """Begin a step: every place may be taken once."""
        self._taken.clear()

    def take(self, parameters: Sequence[nn.Parameter | None]) -> Tensor | None:
        """Return the places of parameters of one shape [number, *shape], to be written.

        None where one is not a parameter of its own but computed, does not lie beside the one before, or was taken:
        its gradient is a sum then, which autograd adds up elsewhere.
        """
        known = tuple(p for p in parameters if p is not None and _is_plain(p))
        if len(known) < len(parameters) or not self._taken.isdisjoint(known):
            return None
        if known not in self._stacks:
            if any(p in self._of for p in known) or len({p.shape for p in known}) > 1:
                return None
            made = self._empty((len(known), *known[0].shape), dtype=known[0].dtype, device=known[0].device)
            self._stacks[known] = made
            self._of |= zip(known, made, strict=True)
        self._taken |= {*known}
        return self._stacks[known]


def _is_plain(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and parameter.dtype == torch.float32 and parameter.is_contiguous()


class Lasting(NamedTuple):
    """What lasts from step to step.

    Attributes:
        casts: None where each operation casts its own.
        sums: of gradients.
    """

    casts: Casts | None
    sums: Sums


def place(lasting: Lasting | None, parameters: Sequence[nn.Parameter | None]) -> Tensor | None:
    """Return where the gradients of a stack are to be written [number, *shape]; None for anywhere."""
    return None if lasting is None else lasting.sums.take(parameters)


def leaves(tensors: Sequence[object]) -> list[nn.Parameter | None]:
    """Return those that are parameters, None for what is computed of them."""
    return [tensor if isinstance(tensor, nn.Parameter) else None for tensor in tensors]
