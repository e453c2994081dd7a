"""PiSSA's starting point: the principal directions of a frozen weight (https://arxiv.org/abs/2404.02948, eq. 2-4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mlora.ops.dora import frozen_weight


@torch.no_grad()
def principal_directions(layer: nn.Module, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Return (A [r, D], B [O, r]), float32, such that scaling * B A is the weight's best approximation of rank r."""
    u, s, v = torch.linalg.svd(frozen_weight(layer).float(), full_matrices=False)
    root = (s[:r] / scaling).sqrt()
    return root[:, None] * v[:r], u[:, :r] * root
