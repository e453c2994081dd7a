"""A packed batch as padded rows, for families whose layers let the sequences of a packed stream see each other.

Padding stands on the right: no token of a causal model looks there, recurrent layers and convolutions included.

Shapes: B sequences of at most L tokens, T packed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mlora.adapters import Segment
from mlora.model.batch import Batch


@dataclass(frozen=True)
class PaddedRows:
    """Where the tokens of a packed batch stand in padded rows.

    Attributes:
        mask: [B, L] bool, True at real tokens.
        place: [T] of each packed token in the B * L flattened ones.
    """

    mask: Tensor
    place: Tensor

    @classmethod
    def of(cls, batch: Batch) -> PaddedRows:
        """Lay out a batch."""
        lengths = torch.tensor(batch.lengths, device=batch.input_ids.device)
        mask = torch.arange(max(batch.lengths), device=lengths.device) < lengths[:, None]
        return cls(mask, mask.flatten().nonzero()[:, 0])

    def spread(self, packed: Tensor) -> Tensor:
        """Return [B * L, ...] of a value for each packed token [T, ...], zero at padding."""
        return packed.new_zeros(self.mask.numel(), *packed.shape[1:]).index_copy(0, self.place, packed)

    def gather(self, rows: Tensor) -> Tensor:
        """Return [T, ...] of the packed tokens from rows [B, L, ...]."""
        return rows.flatten(0, 1)[self.place]

    def segment(self, packed: Segment) -> Segment:
        """Return a segment of packed tokens as one of rows."""
        length = self.mask.shape[1]
        first, last = (int(self.place[i]) // length for i in (packed.start, packed.stop - 1))
        start, stop = first * length, (last + 1) * length
        keys = packed.keys
        if keys is not None:
            own = self.place[packed.start : packed.stop] - start
            keys = keys.new_zeros(stop - start).index_copy(0, own, keys)
        return replace(
            packed,
            start=start,
            stop=stop,
            keys=keys,
            real=self.mask.flatten()[start:stop],
            sequence_lengths=(length,) * (last + 1 - first),
        )
