"""Which tokens belong to which adapter: the one object that all injected modules of a model read.

A module sees its input flattened to n tokens. The scope's segments cover `total` units: the tokens of a packed or
padded batch, or the rows of a batch in generation, where a module sees n / total tokens per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from mlora.adapters import Segment


@dataclass
class Flight:
    """One batch in flight.

    Attributes:
        segments: of every adapter, in order, without gaps.
        sequence_lengths: tokens of each packed sequence, in order; None where rows are padded.
    """

    segments: Sequence[Segment]
    sequence_lengths: tuple[int, ...] | None = None

    def split(self, tokens: int) -> Sequence[Segment]:
        """Return the segments in units of a module that sees this many tokens."""
        total = self.segments[-1].stop
        if tokens == total:
            return self.segments
        per_unit, rest = divmod(tokens, total)
        if rest:
            raise RuntimeError(f"segments cover {total} rows or tokens, but a layer received {tokens} tokens")
        return [replace(s, start=s.start * per_unit, stop=s.stop * per_unit) for s in self.segments]

    def again(self) -> Flight:
        """Return the flight for recomputing a layer: the same random streams, router logits left nowhere else."""
        segments = [replace(s, router_logits=None if s.router_logits is None else {}) for s in self.segments]
        return replace(self, segments=segments)


class Scope:
    """The batch in flight, shared by the injected modules of one model."""

    def __init__(self) -> None:
        self.flight: Flight | None = None
        self.default: str | None = None

    def split(self, tokens: int) -> Sequence[Segment]:
        """Return the segments of a module that sees this many tokens; all of the default adapter outside a flight."""
        if self.flight is None:
            return [Segment(self.default, 0, tokens)]
        return self.flight.split(tokens)

    @contextmanager
    def use(self, flight: Flight) -> Iterator[None]:
        """Run the model on this batch inside the `with` block."""
        previous, self.flight = self.flight, flight
        try:
            yield
        finally:
            self.flight = previous
