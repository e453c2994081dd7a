"""Adapters of the same form whose tokens follow one another: a group, which one launch of a kernel serves."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mlora.ops.fused.masks import Dropout


class Span(Protocol):
    """Something that covers the tokens [start, stop)."""

    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int: ...


def grouped(parts: Sequence[Span], form: Callable[[int], Hashable]) -> Iterator[slice]:
    """Yield slices of parts that are one group each.

    Args:
        parts: of a batch, in order.
        form: what is alike in a group, of the part with this number.
    """
    first = 0
    for number in range(1, len(parts) + 1):
        if number < len(parts):
            last, part = parts[number - 1], parts[number]
            adjacent = part.start == last.stop and part.stop - part.start == last.stop - last.start
            if adjacent and form(number) == form(first):
                continue
        yield slice(first, number)
        first = number


def form_of(tensor: Tensor | None) -> Hashable:
    """Return what must be alike of a tensor in a group."""
    return None if tensor is None else (tensor.shape, tensor.stride())


def dropout_form(dropout: Dropout | None) -> Hashable:
    """Return what must be alike of a dropout in a group."""
    return None if dropout is None else dropout[1:]


def joined_dropout(dropouts: Sequence[Dropout | None]) -> Dropout | None:
    """Return a group's dropout, from those of its parts."""
    known = [dropout for dropout in dropouts if dropout is not None]
    return known[0]._replace(keys=joined([dropout.keys for dropout in known])) if known else None


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors [n, ...] one after the other; as a view where they lie so already."""
    first = parts[0]
    if len(parts) == 1:
        return first
    end = first.storage_offset()
    for part in parts:
        together = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (together and part.is_contiguous() and part.storage_offset() == end):
            return torch.cat(list(parts))
        end += part.numel()
    return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride(), first.storage_offset())
