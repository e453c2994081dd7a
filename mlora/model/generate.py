"""Generation for several adapters in one batch, by transformers' own `generate()`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    rows = [model.tokenizer(prompt)["input_ids"] for prompt in prompts]
    counting = {name for name, method in model.adapters.items() if method.counts_tokens}
    groups: dict[int | None, list[int]] = {}
    for i, (row, adapter) in enumerate(zip(rows, adapters, strict=True)):
        groups.setdefault(len(row) if adapter in counting else None, []).append(i)
    texts: dict[int, str] = {}
    for length, group in groups.items():
        settings = generation if length is None else generation | {"use_cache": False}
        found = _batch(model, [rows[i] for i in group], [adapters[i] for i in group], max_new_tokens, settings)
        texts.update(zip(group, found, strict=True))
    return [texts[i] for i in range(len(prompts))]


def _batch(
    model: MultiAdapterModel,
    rows: Sequence[Sequence[int]],
    adapters: Sequence[str | None],
    max_new_tokens: int,
    generation: Mapping[str, Any],
) -> list[str]:
    """Continue tokenized prompts in one batch, padded on the left."""
    tokenizer = model.tokenizer
    order, flight = row_flight(adapters)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(rows[i])) + list(rows[i]) for i in order], device=model.device)
    mask = torch.tensor([[0] * (width - len(rows[i])) + [1] * len(rows[i]) for i in order], device=model.device)
    with model.scope.use(flight):
        out = model.hf_model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, pad_token_id=pad, **generation
        )
    per_row = out.shape[0] // len(rows)
    texts = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return [texts[order.index(i) * per_row] for i in range(len(rows))]
