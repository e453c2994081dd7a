"""Attention over a packed stream: every sequence attends to itself alone, without a [T, T] mask.

Registered with transformers under the name "packed". A packed forward hands the sequence lengths down as the keyword
`packed_lengths`, or as data alone where a step is recorded (`packed_offsets`, `packed_longest`), beside a mask that no
one reads; without them (generation) rows and their mask are ordinary.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from mlora import ops
from mlora.ops import device_type

if TYPE_CHECKING:
    from mlora.model.branches import Branches

PACKED = "packed"
CAUSAL: Any = (
    {"is_causal": True} if "is_causal" in inspect.signature(varlen_attn).parameters else {"window_size": (-1, 0)}
)
"""How the installed torch spells causality for sequences of any length."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed_lengths: tuple[int, ...] | None = None,
    packed_branches: Branches | None = None,
    packed_offsets: Tensor | None = None,
    packed_longest: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend causally within each sequence.

    Args:
        module: the attention layer, asked for nothing.
        query: [B, H, T, d]; key, value: [B, H or fewer, T, d].
        attention_mask: [B, 1, T, S] for rows; not read in a packed batch.
        scaling: factor on the scores.
        dropout: must be 0, as in a frozen base.
        sliding_window: tokens that a token sees, itself included; None for all.
        softcap: scores s become softcap * tanh(s / softcap) (gemma2).
        packed_lengths: tokens of each sequence of a packed batch.
        packed_branches: who sees whom in its sequences, where these branch.
        packed_offsets: [B + 1] int32, where sequences begin and the last ends: the lengths as data, for one kernel.
        packed_longest: tokens of the longest sequence that may come, where the lengths are known as data only.

    Returns:
        [B, T, H, d] and None for the weights that other implementations return.
    """
    unknown = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown or dropout:
        raise NotImplementedError(f"packed attention knows no {', '.join(unknown) or 'dropout'}")
    if packed_longest is not None and packed_offsets is not None:
        out = ops.ragged_attention(*_by_tokens(query, key, value), packed_offsets, packed_longest, scaling)
        if out is None:
            return _varlen(query, key, value, packed_offsets, packed_longest, scaling), None
        return out[None], None
    if packed_lengths is None:
        mask = (
            attention_mask
            if attention_mask is not None or query.shape[2] == 1
            else _window(query.shape[2], sliding_window, query)
        )
        return _attend(query, key, value, mask, scaling, softcap).transpose(1, 2), None
    if packed_branches is not None:
        found = []
        for places, mask in packed_branches.blocks(sliding_window):
            q, k, v = (t[0][:, places].transpose(0, 1) for t in (query, key, value))
            found.append(_attend(q, k, v, mask, scaling, softcap).transpose(1, 2).flatten(0, 1))
        return torch.cat(found)[packed_branches.order][None], None
    if len(set(packed_lengths)) == 1:
        q, k, v = (t.unflatten(2, (-1, packed_lengths[0])).transpose(1, 2).flatten(0, 1) for t in (query, key, value))
        out = _attend(q, k, v, _window(packed_lengths[0], sliding_window, query), scaling, softcap)
        return out.transpose(1, 2).flatten(0, 1)[None], None
    longest = max(packed_lengths)
    if packed_offsets is not None and fits_varlen(query, value, sliding_window, softcap, longest):
        return _varlen(query, key, value, packed_offsets, longest, scaling), None
    masks = [_window(length, sliding_window, query) for length in packed_lengths]
    parts = [
        _attend(q, k, v, mask, scaling, softcap)
        for q, k, v, mask in zip(*(t.split(packed_lengths, dim=2) for t in (query, key, value)), masks, strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def fits_varlen(query: Tensor, value: Tensor, sliding_window: int | None, softcap: float | None, longest: int) -> bool:
    """Return whether torch's attention over sequences of any length can compute this: flash attention's limits."""
    plain = softcap is None and (sliding_window is None or longest <= sliding_window)
    width = query.shape[-1]
    heads = width % 8 == 0 and width <= 256 and value.shape[-1] == width
    half = query.dtype in (torch.bfloat16, torch.float16)
    on_gpu = device_type(query) == "cuda"
    capability = torch.cuda.get_device_capability(query.device if query.is_cuda else None) if on_gpu else (0, 0)
    return plain and heads and half and capability >= (8, 0)


def _by_tokens(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return [T, H, d] of tensors [1, H, T, d]; indexing [0] would copy all gradients."""
    return tuple(t.transpose(1, 2).squeeze(0) for t in (q, k, v))  # type: ignore[return-value]


def _varlen(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, scaling: float | None) -> Tensor:
    """Return [1, T, H, d]; heads of keys and values are repeated, since torch 2.11 knows no groups here."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if scaling is not None and scaling != q.shape[-1] ** -0.5:
        q = q * (scaling * q.shape[-1] ** 0.5)
    q, k, v = _by_tokens(q, k, v)
    out: Any = varlen_attn(q, k, v, offsets, offsets, longest, longest, **CAUSAL)
    return out[None]


def _window(length: int, window: int | None, like: Tensor) -> Tensor | None:
    """Return the mask [length, length] of a sliding window; None where plain causality says the same."""
    if window is None or length <= window:
        return None
    position = torch.arange(length, device=like.device)
    distance = position[:, None] - position
    return (distance >= 0) & (distance < window)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None
) -> Tensor:
    causal = mask is None and q.shape[2] > 1
    if softcap is None:
        if mask is not None and q.is_cuda:  # with groups of heads, no kernel takes a mask without holding all scores
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=gqa)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        # not -inf: a row of padding sees nothing, and its NaN would reach others through the cache
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    return scores.float().softmax(-1).to(q.dtype) @ v


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def exclude_attention_from_compilation() -> None:
    """Keep torch's compiler out of packed attention, whose loop follows the lengths of a batch."""
    AttentionInterface.register(PACKED, torch.compiler.disable(packed_attention))
