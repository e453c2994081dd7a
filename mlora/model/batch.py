"""Rows of several adapters packed into one stream of tokens.

Shapes: B rows of L tokens given, T tokens packed: [1, T], sorted by adapter, no padding.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mlora.model.branches import Branches

IGNORED = -100
"""Label of a position that is no target."""


def integers(parts: Iterable[Iterable[int]]) -> Tensor:
    """Return numbers one after the other, [n] int64; by an array, since torch takes eight times as long for a list."""
    values = array("q", [*chain.from_iterable(parts)])
    return torch.frombuffer(values, dtype=torch.int64) if values else torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Row:
    """One sequence of one adapter.

    Attributes:
        input_ids: its tokens.
        labels: the token at each position where it is a target of the position before, `IGNORED` elsewhere; as many.
        adapter: name; None for the plain base model.
        index: number of the row within its adapter's optimizer step, a part of its random stream.
        class_id: index of its class, where the adapter has a classification head; its token labels are not read then.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    adapter: str | None = None
    index: int = 0
    class_id: int | None = None


def check_lengths(rows: Sequence[Row]) -> None:
    """Refuse rows without tokens, and those with another number of labels.

    Raises:
        ValueError: there is one.
    """
    for i, row in enumerate(rows):
        if not len(row.input_ids) or len(row.labels) != len(row.input_ids):
            raise ValueError(f"row {i} has {len(row.input_ids)} tokens and {len(row.labels)} labels")


@dataclass(frozen=True)
class Span:
    """Tokens [start, stop) of a packed batch that belong to one adapter.

    Attributes:
        adapter: its name; None for the plain base model.
        start, stop: tokens.
        lengths: of its sequences.
        targets: how many of its tokens have one.
        class_ids: of its sequences, where they have classes.
    """

    adapter: str | None
    start: int
    stop: int
    lengths: tuple[int, ...]
    targets: int
    class_ids: tuple[int, ...] = ()

    @property
    def ends(self) -> tuple[int, ...]:
        """Position of each sequence's last token in the packed batch."""
        return tuple(self.start + end - 1 for end in accumulate(self.lengths))


@dataclass(frozen=True)
class Batch:
    """What `MultiAdapterModel` computes in one forward.

    Attributes:
        input_ids, position_ids: [1, T] int64; positions restart at 0 in every sequence.
        targets: [T] int64, the token that follows where it is a label, `IGNORED` elsewhere.
        positions: [N] the tokens that have a target, in order.
        offsets: [B + 1] int32, where packed sequences begin and the last ends.
        rows: [T] row number of each token within its adapter's optimizer step.
        spans: the adapters' tokens, in order.
        steps: optimizer step of each adapter, a part of its random streams.
        order: order[i] is the given row that was packed as i-th sequence.
        branches: of sequences that branch; None where all are ordinary.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    positions: Tensor
    offsets: Tensor
    rows: Tensor
    spans: tuple[Span, ...]
    steps: dict[str | None, int]
    order: tuple[int, ...]
    branches: Branches | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each packed sequence, in order."""
        return tuple(length for span in self.spans for length in span.lengths)

    @property
    def adapters(self) -> tuple[str | None, ...]:
        """Names of the adapters, in order."""
        return tuple(span.adapter for span in self.spans)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device."""
        return self.map(lambda tensor: tensor.to(device))

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return the batch with each tensor changed."""
        changed: Any = {name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changed)

    @classmethod
    def pack(
        cls, rows: Sequence[Row], steps: dict[str | None, int] | None = None, device: torch.device | str = "cpu"
    ) -> Batch:
        """Pack rows into one stream, those of one adapter side by side, in the order given.

        Raises:
            ValueError: no row, a row without tokens, labels of another length, or an adapter of whose rows some have
                a class and some have not.
        """
        if not rows:
            raise ValueError("a batch needs at least one row")
        check_lengths(rows)
        adapters = list(dict.fromkeys(row.adapter for row in rows))
        order = tuple(sorted(range(len(rows)), key=lambda i: adapters.index(rows[i].adapter)))
        packed = [rows[i] for i in order]
        targets = [_targets(row) for row in packed]
        spans, start = [], 0
        for adapter in adapters:
            own = [i for i, row in enumerate(packed) if row.adapter == adapter]
            lengths = tuple(len(packed[i].input_ids) for i in own)
            wanted = sum(target != IGNORED for i in own for target in targets[i])
            class_ids = tuple(row.class_id for row in packed if row.adapter == adapter and row.class_id is not None)
            if class_ids and len(class_ids) < len(own):
                raise ValueError(f"{len(own) - len(class_ids)} of {len(own)} rows of adapter {adapter!r} have no class")
            spans.append(Span(adapter, start, start + sum(lengths), lengths, wanted, class_ids))
            start += sum(lengths)

        def tensor(values: Iterable[Iterable[int]]) -> Tensor:
            made = integers(values)
            if torch.device(device).type == "cuda":
                made = made.pin_memory()  # otherwise the copy waits for the device
            return made.to(device, non_blocking=True)

        flat = (target for part in targets for target in part)
        return cls(
            input_ids=tensor(r.input_ids for r in packed)[None],
            position_ids=tensor(range(len(r.input_ids)) for r in packed)[None],
            targets=tensor(targets),
            offsets=tensor([accumulate((len(row.input_ids) for row in packed), initial=0)]).to(torch.int32),
            positions=tensor([[i for i, target in enumerate(flat) if target != IGNORED]]),
            rows=tensor([r.index] * len(r.input_ids) for r in packed),
            spans=tuple(spans),
            steps=steps or {},
            order=order,
        )

    @classmethod
    def from_rows(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        adapters: Sequence[str | None] = (),
        step: int | None = None,
        classes: Sequence[int | None] | None = None,
    ) -> Batch:
        """Pack padded rows, padded on either side.

        Args:
            input_ids: [B, L].
            attention_mask: [B, L], 1 at real tokens.
            labels: [B, L], the token where it is a target, `IGNORED` elsewhere; None takes every real token.
            adapters: name for each row; None for the plain base model.
            step: number of your optimizer step, which dropout then differs by. Without it a row's dropout depends on
                its tokens: the same row has the same mask at every call.
            classes: index of each row's class, None for rows of adapters without a classification head; None where
                no adapter has one.
        """
        if len(adapters) != len(input_ids):
            raise ValueError(f"{len(input_ids)} rows need as many adapters, got {len(adapters)}")
        labels = input_ids if labels is None else labels
        classes = [None] * len(adapters) if classes is None else classes
        rows, seen = [], dict[str | None, int]()
        given = zip(input_ids, attention_mask.bool(), labels, adapters, classes, strict=True)
        for ids, mask, label, adapter, class_id in given:
            tokens = ids[mask].tolist()
            index = seen[adapter] = seen.get(adapter, -1) + 1
            if step is None:
                index = zlib.crc32(str(tokens).encode()) >> 1  # fits a signed number of 32 bits
            rows.append(Row(tokens, label[mask].tolist(), adapter, index, class_id))
        return cls.pack(rows, dict.fromkeys(adapters, step or 0), input_ids.device)


def _targets(row: Row) -> list[int]:
    if row.class_id is not None:
        return [IGNORED] * len(row.input_ids)
    return [*list(row.labels)[1:], IGNORED]
