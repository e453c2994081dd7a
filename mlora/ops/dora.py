"""DoRA's row norms, without ever forming B A.

n^2 = |W|^2 + 2 s <W A^T, B> + s^2 <B (A A^T), B>, row by row (https://arxiv.org/abs/2402.09353, section 4.3: n is a
constant in backward). Shapes: W [O, D], A [r, D], B [O, r]; stacked A [E, r, D] and B [E, O, r] give n [E, O].
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

_squares = WeakTensorKeyDictionary()
"""By the frozen weight: its squared row norms."""


def frozen_weight(layer: nn.Module) -> Tensor:
    """Return the weight [O, D] of a frozen linear layer, dequantised where it is quantised by bitsandbytes.

    Of a base that ranks share it is whole within the layer's forward and backward; elsewhere all ranks have to ask.
    """
    weight: Any = layer.weight
    if hasattr(weight, "full_tensor"):
        return cast("Tensor", weight.full_tensor())
    state = getattr(weight, "quant_state", None)
    if state is not None:
        import bitsandbytes.functional as bnb

        return bnb.dequantize_4bit(weight.data, state)
    if weight.dtype == torch.int8:
        scale: Any = getattr(weight, "SCB", None)
        if scale is None:  # bitsandbytes moves it there in the first forward
            scale = cast("Any", layer).state.SCB
        return weight.data.float() * (scale.float()[:, None] / 127)
    return weight


@torch.no_grad()
def squared_row_norms(layer: nn.Module) -> Tensor:
    """Return |W|^2 of each row [O], float32."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if weight not in _squares:
        _squares[weight] = frozen_weight(layer).float().pow(2).sum(1)
    return _squares[weight]


@torch.no_grad()
def dora_norm(layer: nn.Module, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Return the row norms of W + s B A, [O] or [E, O], float32."""
    weight = frozen_weight(layer)
    rows = a.flatten(0, -2).to(weight.dtype)
    crossed = (rows @ weight.T).float().unflatten(0, a.shape[:-1])  # [.., r, O]
    gram = a @ a.transpose(-1, -2)
    mixed = (crossed.transpose(-1, -2) * b).sum(-1)
    own = ((b @ gram) * b).sum(-1)
    return (squared_row_norms(layer) + 2 * scaling * mixed + scaling**2 * own).clamp(min=0).sqrt()
