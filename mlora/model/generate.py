"""Generation for several adapters in one batch, by transformers' own `generate()`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from mlora.adapters import Segment
from mlora.model.scope import Flight

if TYPE_CHECKING:
    from mlora.model.multi import MultiAdapterModel


def row_flight(adapters: Sequence[str | None]) -> tuple[list[int], Flight]:
    """Return an order of rows that brings each adapter's together, and the segments of rows in that order."""
    names = list(dict.fromkeys(adapters))
    order = sorted(range(len(adapters)), key=lambda i: names.index(adapters[i]))
    segments, start = [], 0
    for name in names:
        count = list(adapters).count(name)
        segments.append(Segment(name, start, start + count, sequence_lengths=(1,) * count))  # where a row is a token
        start += count
    return order, Flight(segments)


@torch.no_grad()
def generate(
    model: MultiAdapterModel,
    prompts: Sequence[str],
    adapters: Sequence[str | None],
    max_new_tokens: int,
    **generation: Any,
) -> list[str]:
    """Continue prompts; see `MultiAdapterModel.generate`."""
    if len(prompts) != len(adapters):
        raise ValueError(f"{len(prompts)} prompts need as many adapters, got {len(adapters)}")
    if not prompts:
        return []
    tokenizer = model.tokenizer
    order, flight = row_flight(adapters)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rows = [tokenizer(prompts[i])["input_ids"] for i in order]
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    with model.scope.use(flight):
        out = model.hf_model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad, **generation
        )
    per_row = out.shape[0] // len(rows)
    texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    back = {row: texts[i * per_row] for i, row in enumerate(order)}
    return [back[i] for i in range(len(prompts))]
