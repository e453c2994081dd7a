"""Which tokens belong to which adapter: the one object that all injected modules of a model read.

A module sees its input flattened to n tokens. The scope's segments cover `total` units: the tokens of a packed or
padded batch, or the rows of a batch in generation, where a module sees n / total tokens per row.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mlora.adapters import Segment

if TYPE_CHECKING:
    from mlora.ops import Lasting


def apart(x: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, ...]:
    """Return the tokens of each segment, of x [n, ...] of all.

    As one operation: its gradient is written once, where those of as many slices would each be padded to the length of
    the stream and added up.
    """
    return (x,) if len(segments) == 1 else x.split([s.stop - s.start for s in segments])


@dataclass
class Flight:
    """One batch in flight.

    Attributes:
        segments: of every adapter, in order, without gaps.
    """

    segments: Sequence[Segment]

    def split(self, rows: int, length: int) -> Sequence[Segment]:
        """Return the segments in tokens, for a module whose input is [rows, length, D]."""
        total, tokens = self.segments[-1].stop, rows * length
        if tokens == total:
            return self.segments
        if tokens % total:
            raise RuntimeError(f"segments cover {total} rows or tokens, but a layer received {tokens} tokens")
        unit = tokens // total
        return [
            replace(s, start=s.start * unit, stop=s.stop * unit, sequence_lengths=(unit,) * (s.stop - s.start))
            for s in self.segments
        ]

    def again(self) -> Flight:
        """Return the flight for recomputing a layer: the same random streams, router logits left nowhere else."""
        segments = [replace(s, router_logits=None if s.router_logits is None else {}) for s in self.segments]
        return replace(self, segments=segments)


class Scope:
    """The batch in flight, shared by the injected modules of one model.

    Attributes:
        flight: the batch; None outside of one.
        default: adapter of all tokens where there is none.
        observe: called with every batch that has gone through.
        kept: what layers have made of adapters; None where these may change.
        lasting: casts of matrices and places of gradients; None where no step is to be recorded.
        ready: outputs that layers have left for others, with the input that they are of.
    """

    def __init__(self) -> None:
        self.kept: dict[Hashable, Any] | None = None
        self.lasting: Lasting | None = None
        self.ready: dict[str, tuple[Tensor, Tensor]] = {}
        self.flight: Flight | None = None
        self.default: str | None = None
        self.observe: Callable[[Flight], None] | None = None

    def leave(self, path: str, x: Tensor, out: Tensor) -> None:
        """Leave a layer's output for when it is called with this input."""
        self.ready[path] = x, out

    def take(self, path: str, x: Tensor) -> Tensor | None:
        """Return the output that was left for a layer and this input, once; None where there is none."""
        of, out = self.ready.pop(path, (None, None))
        return out if of is x else None

    def names(self) -> set[str | None]:
        """Return the adapters of the batch in flight; outside a flight the default one."""
        return {self.default} if self.flight is None else {segment.adapter for segment in self.flight.segments}

    def split(self, shape: Sequence[int]) -> Sequence[Segment]:
        """Return the segments of an input [rows, length]; outside a flight all of it is the default adapter's."""
        rows, length = shape if len(shape) == 2 else (1, prod(shape))
        if self.flight is None:
            return [Segment(self.default, 0, rows * length, sequence_lengths=(length,) * rows)]
        return self.flight.split(rows, length)

    @contextmanager
    def part(self, segments: Sequence[Segment]) -> Iterator[None]:
        """Run modules on some segments' tokens alone inside the `with` block, in the midst of a batch."""
        previous, self.flight = self.flight, Flight(segments)
        try:
            yield
        finally:
            self.flight = previous

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Let layers keep what they make of adapters inside the `with` block, in which no adapter changes."""
        self.kept = {}
        try:
            yield
        finally:
            self.kept = None

    @contextmanager
    def with_lasting(self, lasting: Lasting) -> Iterator[None]:
        """Let kernels take casts of matrices and places of gradients from here inside the `with` block."""
        self.lasting = lasting
        try:
            yield
        finally:
            self.lasting = None

    @contextmanager
    def use(self, flight: Flight) -> Iterator[None]:
        """Run the model on this batch inside the `with` block."""
        previous, self.flight = self.flight, flight
        try:
            yield
        finally:
            self.flight = previous
            self.ready.clear()
        if self.observe is not None:
            self.observe(flight)
