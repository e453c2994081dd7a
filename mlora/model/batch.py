"""Rows of several adapters packed into one stream of tokens.

Shapes: B rows of L tokens given, T tokens packed: [1, T], sorted by adapter, no padding.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

IGNORED = -100
"""Label of a position that is no target."""


@dataclass(frozen=True)
class Row:
    """One sequence of one adapter.

    Attributes:
        input_ids: its tokens.
        labels: the token at each position where it is a target of the position before, `IGNORED` elsewhere.
        adapter: name; None for the plain base model.
        index: number of the row within its adapter's optimizer step, a part of its random stream.
    """

    input_ids: Sequence[int]
    labels: Sequence[int]
    adapter: str | None = None
    index: int = 0


@dataclass(frozen=True)
class Span:
    """Tokens [start, stop) of a packed batch that belong to one adapter, and its sequences' lengths."""

    adapter: str | None
    start: int
    stop: int
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """What `MultiAdapterModel` computes in one forward.

    Attributes:
        input_ids, position_ids: [1, T] int64; positions restart at 0 in every sequence.
        targets: [T] int64, the token that follows where it is a label, `IGNORED` elsewhere.
        rows: [T] row number of each token within its adapter's optimizer step.
        spans: the adapters' tokens, in order.
        steps: optimizer step of each adapter, a part of its random streams.
        order: order[i] is the given row that was packed as i-th sequence.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    rows: Tensor
    spans: tuple[Span, ...]
    steps: dict[str | None, int]
    order: tuple[int, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each packed sequence, in order."""
        return tuple(length for span in self.spans for length in span.lengths)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("input_ids", "position_ids", "targets", "rows")}
        return replace(self, **moved)

    @classmethod
    def pack(
        cls, rows: Sequence[Row], steps: dict[str | None, int] | None = None, device: torch.device | str = "cpu"
    ) -> Batch:
        """Pack rows into one stream, those of one adapter side by side, in the order given.

        Raises:
            ValueError: no row, a row without tokens, or labels of another length.
        """
        if not rows:
            raise ValueError("a batch needs at least one row")
        for i, row in enumerate(rows):
            if not len(row.input_ids) or len(row.labels) != len(row.input_ids):
                raise ValueError(f"row {i} has {len(row.input_ids)} tokens and {len(row.labels)} labels")
        adapters = list(dict.fromkeys(row.adapter for row in rows))
        order = tuple(sorted(range(len(rows)), key=lambda i: adapters.index(rows[i].adapter)))
        spans, start = [], 0
        for adapter in adapters:
            lengths = tuple(len(row.input_ids) for row in rows if row.adapter == adapter)
            spans.append(Span(adapter, start, start + sum(lengths), lengths))
            start += sum(lengths)

        def tensor(values: Iterable[Iterable[int]]) -> Tensor:
            return torch.tensor([v for part in values for v in part], dtype=torch.int64).to(device, non_blocking=True)

        packed = [rows[i] for i in order]
        return cls(
            input_ids=tensor(r.input_ids for r in packed)[None],
            position_ids=tensor(range(len(r.input_ids)) for r in packed)[None],
            targets=tensor([*list(r.labels)[1:], IGNORED] for r in packed),
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
    ) -> Batch:
        """Pack padded rows, padded on either side.

        Args:
            input_ids: [B, L].
            attention_mask: [B, L], 1 at real tokens.
            labels: [B, L], the token where it is a target, `IGNORED` elsewhere; None takes every real token.
            adapters: name for each row; None for the plain base model.
            step: number of your optimizer step, which dropout then differs by. Without it a row's dropout depends on
                its tokens: the same row has the same mask at every call.
        """
        if len(adapters) != len(input_ids):
            raise ValueError(f"{len(input_ids)} rows need as many adapters, got {len(adapters)}")
        labels = input_ids if labels is None else labels
        rows, seen = [], dict[str | None, int]()
        for ids, mask, label, adapter in zip(input_ids, attention_mask.bool(), labels, adapters, strict=True):
            tokens = ids[mask].tolist()
            index = seen[adapter] = seen.get(adapter, -1) + 1
            if step is None:
                index = zlib.crc32(str(tokens).encode()) >> 1  # fits a signed number of 32 bits
            rows.append(Row(tokens, label[mask].tolist(), adapter, index))
        return cls.pack(rows, dict.fromkeys(adapters, step or 0), input_ids.device)
