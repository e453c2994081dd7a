"""Cross-entropy that leaves the gradient of the logits in their place: two passes over them.

loss_n = logsumexp(z_n) - z_n[y_n],  dz_n = softmax(z_n) - onehot(y_n)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOWEST = tl.constexpr(-3e38)
"""Of a maximum of nothing: what is finite can be subtracted from itself."""


@triton.jit
def _cross_entropy(logits, targets, losses, vocabulary, GRADIENT: tl.constexpr, BV: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    here = logits + row * vocabulary
    target = tl.load(targets + row)  # and its logit, before any other warp writes a gradient there
    known = (target >= 0) & (target < vocabulary)
    own = tl.load(here + target, mask=known, other=float("nan")).to(tl.float32)
    v = tl.arange(0, BV)
    most = tl.full((BV,), LOWEST, tl.float32)
    total = tl.zeros((BV,), tl.float32)
    for base in range(0, vocabulary, BV):
        z = tl.load(here + base + v, mask=base + v < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(most, z)
        total = total * tl.exp(most - higher) + tl.exp(z - higher)
        most = higher
    top = tl.max(most, 0)
    norm = top + tl.log(tl.sum(total * tl.exp(most - top), 0))
    norm = tl.where(known, norm, float("nan"))  # which a gradient is as well, so that no step is taken
    tl.store(losses + row, norm - own)
    if GRADIENT:
        for base in range(0, vocabulary, BV):
            inside = base + v < vocabulary
            z = tl.load(here + base + v, mask=inside, other=0.0).to(tl.float32)
            p = tl.exp(z - norm) - tl.where(base + v == target, 1.0, 0.0)
            tl.store(here + base + v, p.to(logits.dtype.element_ty), mask=inside)


def cross_entropy(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """Return the loss of each row [n] float32; NaN, and its gradient as well, where its target is none of the V.

    Args:
        logits: [n, V] contiguous; where `gradient`, theirs takes their place.
        targets: [n] int64.
        gradient: whether it is wanted.
    """
    rows, vocabulary = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    if rows:
        block = min(4096, triton.next_power_of_2(vocabulary))
        _cross_entropy[(rows,)](logits, targets, losses, vocabulary, GRADIENT=gradient, BV=block, num_warps=8)
    return losses
