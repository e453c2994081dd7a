"""What every method with a router shares: its experts, its balance loss, and the choice of k of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field, ValidationInfo, field_validator

from mlora import ops
from mlora.adapters.base import Method

if TYPE_CHECKING:
    from torch import Tensor


class Routed(Method):
    """Experts and a load balancing loss that keeps them in use."""

    num_experts: int = Field(8, ge=1)
    """Experts of each router."""
    router_loss: bool = True
    """Whether the auxiliary losses of the router are trained."""
    router_aux_loss_coef: float = Field(0.001, ge=0)
    """Coefficient of the load balancing loss."""

    def chosen(self, logits: Tensor) -> Tensor:
        """Return [n, E], 1 where the balance loss counts an expert as chosen: the most probable one."""
        return ops.multi_hot(*ops.top_k_routing(logits, 1), self.num_experts)

    def aux_loss(self, router_logits: Sequence[Tensor], real: Tensor | None = None) -> Tensor | None:
        if not self.router_loss or not router_logits:
            return None
        import torch

        logits = torch.cat(list(router_logits))
        if real is not None:
            real = real.repeat(len(router_logits))
        return self.router_aux_loss_coef * ops.balance_loss(logits.softmax(-1), self.chosen(logits), real)


class TopK(Routed):
    """Each token is computed by its k most probable experts."""

    top_k: int = Field(2, ge=1, validate_default=True)
    """Experts that compute each token."""

    @field_validator("top_k")
    @classmethod
    def _at_most_all(cls, value: int, info: ValidationInfo) -> int:
        if value > info.data.get("num_experts", value):
            raise ValueError(f"expected at most num_experts ({info.data['num_experts']})")
        return value

    def chosen(self, logits: Tensor) -> Tensor:
        return ops.multi_hot(*ops.top_k_routing(logits, self.top_k), self.num_experts)
