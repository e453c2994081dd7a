"""The next-token loss at label positions, without ever holding the logits of all of them.

loss_n = logsumexp(z_n) - z_n[y_n],  z_n = W h_n + b,  in chunks of positions: a chunk's logits become their gradient in
place and then the gradient of h, so that memory holds one chunk's logits and no more. W and b are frozen.

Shapes: N label positions, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlora import ops
from mlora.ops.dora import frozen_weight

CHUNK_BYTES = 1 << 28
"""Of one chunk's logits, in float32 where no kernel reads them as they are."""


def _cross_entropy(logits: Tensor, targets: Tensor, gradient: bool, fused: bool) -> tuple[Tensor, Tensor]:
    """Return losses [n] float32 and, where it is wanted, the gradient [n, V] of logits, which are used up."""
    if fused:
        from mlora.ops.fused import cross_entropy

        return cross_entropy(logits, targets, gradient), logits
    z, wanted = logits.float(), targets[:, None]
    norm = z.logsumexp(-1, keepdim=True)
    losses = (norm - z.gather(1, wanted))[:, 0]
    if gradient:
        z.sub_(norm).exp_().scatter_add_(1, wanted, -torch.ones_like(norm))
    return losses, z


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
        weight = frozen_weight(head).to(hidden.dtype)
        bias: Any = getattr(head, "bias", None)
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        fused = ops.fused_available(hidden)
        size = max(1, CHUNK_BYTES // ((hidden.element_size() if fused else 4) * len(weight)))
        for start in range(0, len(hidden), size):
            chunk = slice(start, start + size)
            logits = F.linear(hidden[chunk], weight, bias)
            losses[chunk], of_logits = _cross_entropy(logits, targets[chunk], gradient is not None, fused)
            if gradient is not None:
                gradient[chunk] = of_logits.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        (gradient,) = ctx.saved_tensors
        return None if gradient is None else gradient * grad[:, None].to(gradient.dtype), None, None


def token_losses(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """Return the cross-entropy of each position [N] in float32.

    Args:
        hidden: [N, D] last hidden states.
        head: the frozen output layer.
        targets: [N] the tokens that follow.
    """
    return _TokenLosses.apply(hidden, head, targets)
