"""A batch brought to one size as data in one buffer: what a recorded step reads, and copies in at once.

Shapes: S adapters, n tokens, m sequences and t targets of each; T = S n packed tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlora import ops
from mlora.model.batch import IGNORED, Row, Span, check_lengths, integers
from mlora.model.head import check_classes
from mlora.model.multi import MultiAdapterModel
from mlora.model.sizes import Size

_ALIGNED = 16
"""Bytes that fields begin at a multiple of, since kernels read several numbers at once."""


class Weights(NamedTuple):
    """Factors of an adapter's losses in the objective.

    Attributes:
        target: of each target's loss, or that of each row's class.
        auxiliary: of the auxiliary loss.
    """

    target: float
    auxiliary: float


@dataclass(frozen=True)
class Inputs:
    """A batch as data; its tensors are views of one buffer.

    Attributes:
        buffer: [bytes] uint8.
        input_ids, position_ids: [T].
        offsets: [S m + 1] int32.
        keys: [T] int32.
        real: [T] float32, 1 at tokens of the batch's own.
        positions, targets: [S t] packed positions and what follows there.
        counted: [S t] float32, the weight of each target in the objective.
        ends, classes: [S m] last tokens of the sequences and their classes.
        judged: [S m] float32, the weight of each sequence's class.
        auxiliary: [S] float32.
    """

    buffer: Tensor
    input_ids: Tensor
    position_ids: Tensor
    offsets: Tensor
    keys: Tensor
    real: Tensor
    positions: Tensor
    targets: Tensor
    counted: Tensor
    ends: Tensor
    classes: Tensor
    judged: Tensor
    auxiliary: Tensor

    @classmethod
    def of_size(cls, adapters: int, size: Size, **how: Any) -> Inputs:
        """Return inputs of no values.

        Args:
            adapters: S.
            size: of each.
            how: arguments of `torch.empty`.
        """
        places, end = [], 0
        for name, dtype, count in _fields(adapters, size):
            stop = end + count * dtype.itemsize
            places.append((name, dtype, slice(end, stop)))
            end = -(-stop // _ALIGNED) * _ALIGNED
        buffer = torch.empty(end, dtype=torch.uint8, **how)
        return cls(buffer, **{name: buffer[place].view(dtype) for name, dtype, place in places})

    def copy_(self, other: Inputs) -> None:
        """Take over another batch of the same size, not waiting for it."""
        self.buffer.copy_(other.buffer, non_blocking=True)


def _fields(adapters: int, size: Size) -> Iterator[tuple[str, torch.dtype, int]]:
    """Yield name, dtype and length of each tensor."""
    tokens, targets, sequences = adapters * size.tokens, adapters * size.targets, adapters * size.sequences
    for dtype, lengths in (
        (torch.int64, {"input_ids": tokens, "position_ids": tokens, "positions": targets, "targets": targets}),
        (torch.int64, {"ends": sequences, "classes": sequences}),
        (torch.int32, {"offsets": sequences + 1, "keys": tokens}),
        (torch.float32, {"real": tokens, "counted": targets, "judged": sequences, "auxiliary": adapters}),
    ):
        for name, length in lengths.items():
            yield name, dtype, length


def prepare(
    model: MultiAdapterModel,
    rows: Mapping[str, Sequence[Row]],
    steps: Mapping[str | None, int],
    weights: Mapping[str, Weights],
    size: Size,
) -> Inputs:
    """Bring rows to a size; on the host, from where the model's device can read them.

    Args:
        model: that computes them.
        rows: of each adapter.
        steps: optimizer step of each, a part of its random stream.
        weights: of its losses.
        size: at least that of `size_for`.

    Raises:
        ValueError: a row has no tokens, or another number of labels.
        ModelError: classes do not go with the heads.
    """
    every = [row for own in rows.values() for row in own]
    check_lengths(every)
    for name, own in rows.items():
        classes = tuple(row.class_id for row in own if row.class_id is not None)
        check_classes(Span(name, 0, 0, (), 0, classes), model.adapter_module(name).num_labels)
    inputs = Inputs.of_size(len(rows), size, pin_memory=model.device.type == "cuda")
    count, starts = len(rows), torch.arange(len(rows)) * size.tokens
    counts, lengths = torch.tensor([len(own) for own in rows.values()]), torch.tensor([len(r.input_ids) for r in every])
    ids = integers(row.input_ids for row in every)
    labels = integers(row.labels for row in every)
    factors = torch.tensor([weights[name].target for name in rows])

    owner = torch.arange(count).repeat_interleave(counts)  # of each row
    row = torch.arange(len(every)).repeat_interleave(lengths)  # of each token
    begins = lengths.cumsum(0) - lengths  # of each row, among the tokens
    places = _places(owner[row], count, size.tokens)
    # filled up by tokens that are finite where the adapter's own are, at a position that any table has
    first = (owner[:, None] < torch.arange(count)).sum(0)  # row of each adapter
    cycle = begins[first, None] + torch.arange(size.tokens) % lengths[first, None]
    inputs.input_ids.copy_(ids[cycle.flatten()])
    inputs.input_ids[places] = ids
    _fill(inputs.position_ids, places, torch.arange(len(ids)) - begins[row])
    _fill(inputs.real, places, torch.ones(len(ids)))

    labels[begins] = IGNORED  # no token of the row's own comes before
    wanted = (labels != IGNORED).nonzero()[:, 0]
    of = owner[row[wanted]]
    slots = _places(of, count, size.targets)
    _fill(inputs.positions, slots, places[wanted] - 1, starts)
    _fill(inputs.targets, slots, labels[wanted])
    _fill(inputs.counted, slots, factors[of])

    slots = _places(owner, count, size.sequences)
    judged = torch.tensor([row.class_id is not None for row in every])
    _fill(inputs.ends, slots, places[begins + lengths - 1], starts)
    _fill(inputs.classes, slots, torch.tensor([row.class_id or 0 for row in every]))
    _fill(inputs.judged, slots, judged * factors[owner])
    inputs.auxiliary.copy_(torch.tensor([weights[name].auxiliary for name in rows]))

    filled = inputs.offsets.new_zeros(len(inputs.ends))
    _fill(filled, slots, lengths)
    for i, left in enumerate((size.tokens - filled.view(count, -1).sum(1)).tolist()):
        whole, part = divmod(left, size.longest)
        more = [*[size.longest] * whole, part][: size.sequences - int(counts[i])]
        at = i * size.sequences + int(counts[i])
        filled[at : at + len(more)] = torch.tensor(more)
    inputs.offsets[0] = 0
    torch.cumsum(filled, 0, out=inputs.offsets[1:])

    numbers = torch.empty_like(inputs.keys)
    _fill(numbers, places, torch.tensor([row.index for row in every])[row])
    streams = [ops.stable_hash(model.adapter_module(name).seed, name, steps[name]) for name in rows]
    bases = torch.tensor(streams, dtype=torch.int32).repeat_interleave(size.tokens)
    inputs.keys.copy_(ops.token_keys(bases, numbers, inputs.position_ids))
    return inputs


def _places(owners: Tensor, adapters: int, each: int) -> Tensor:
    """Return where items lie, sorted by the adapters that own them, if every adapter has room for so many."""
    counts = owners.bincount(minlength=adapters)
    return torch.arange(len(owners)) + (torch.arange(adapters) * each - counts.cumsum(0) + counts)[owners]


def _fill(out: Tensor, places: Tensor, values: Tensor, elsewhere: Tensor | None = None) -> None:
    """Write values at places, and elsewhere the same of each adapter, 0 without."""
    if elsewhere is None:
        out.zero_()
    else:
        out.view(len(elsewhere), -1).copy_(elsewhere[:, None])
    out[places] = values.to(out.dtype)
