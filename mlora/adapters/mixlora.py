"""MixLoRA: LoRA on the attention, a mixture of LoRA experts around the shared frozen feed-forward block.

    l = R x,  p = softmax(l),  e_1 .. e_k = the k largest,  w_j = p_{e_j} / sum_i p_{e_i}
    h_j = act(W1 x + s B1_e A1_e d(x)) * (W3 x + s B3_e A3_e d(x)),  e = e_j
    y = sum_j w_j (W2 h_j + s B2_e A2_e d(h_j))

The frozen W2 is linear, so W2 sum_j w_j h_j = sum_j w_j W2 h_j: each frozen product runs once per token, whatever k
is, and a mixture costs what the dense block costs. Paper: https://arxiv.org/abs/2404.15159
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from mlora import ops
from mlora.adapters.base import BlockSite, BlockSteps, Init, LinearSite, Segment, Tensors, register
from mlora.adapters.lora import LoraConfig, low_rank_parameters

if TYPE_CHECKING:
    from torch import Tensor


class ExpertLora(BaseModel):
    """LoRA settings of the experts alone; what is left out is taken from the adapter."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    r: int | None = Field(None, ge=1)
    """Rank of an expert's updates."""
    lora_alpha: float | None = Field(None, gt=0)
    """Numerator of an expert's scaling."""
    lora_dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout on the input of an expert's updates."""
    use_rslora: bool | None = None
    """Scale an expert's updates by lora_alpha / sqrt(r)."""


@register("mixlora")
class MixLoraConfig(LoraConfig):
    """Top-k routed LoRA experts in every feed-forward block, plain LoRA on targeted attention layers."""

    peft_type: ClassVar[str] = "MIXLORA"
    file_prefix: ClassVar[str] = "mixlora"
    spans_blocks: ClassVar[bool] = True

    num_experts: int = Field(8, ge=1)
    """Experts in each feed-forward block."""
    top_k: int = Field(2, ge=1, validate_default=True)
    """Experts that compute each token."""
    router_init_range: float = Field(0.02, ge=0)
    """Standard deviation of the router's initial weights."""
    jitter_noise: float = Field(0.0, ge=0, lt=1)
    """In training, the block's input is multiplied by uniform(1 - jitter_noise, 1 + jitter_noise)."""
    router_loss: bool = True
    """Whether the load balancing loss is trained."""
    router_aux_loss_coef: float = Field(0.001, ge=0)
    """Coefficient of the load balancing loss."""
    act_fn: str | None = None
    """Activation of the experts by transformers' name, e.g. "silu"; the base model's own where left out."""
    expert_lora: ExpertLora | None = None
    """LoRA settings of the experts where they differ from the attention's."""

    @field_validator("top_k")
    @classmethod
    def _at_most_all(cls, value: int, info: ValidationInfo) -> int:
        if value > info.data.get("num_experts", value):
            raise ValueError(f"expected at most num_experts ({info.data['num_experts']})")
        return value

    @cached_property
    def experts(self) -> LoraConfig:
        """LoRA settings of one expert."""
        given = {} if self.expert_lora is None else self.expert_lora.model_dump(exclude_none=True)
        return self.model_copy(update=given)

    def linear_parameters(self, site: LinearSite) -> dict[str, Init]:
        if site.in_block:
            return low_rank_parameters(self.experts, site, self.num_experts)
        return low_rank_parameters(self, site)

    def block_parameters(self, site: BlockSite) -> dict[str, Init]:
        return {"router": Init((self.num_experts, site.hidden_size), "normal", self.router_init_range)}

    def block(
        self, p: Tensors, experts: Mapping[str, Tensors], x: Tensor, site: BlockSite, segment: Segment
    ) -> BlockSteps:
        x = segment.jitter(x, self.jitter_noise, site.path)
        logits = ops.router_logits(x, p["router"])
        segment.record(site.path, logits)
        weights, chosen = ops.top_k_routing(logits, self.top_k)
        frozen = yield x
        codes = [self._codes(x, experts.get(up.name), up, segment) for up in site.ups]
        down = experts.get(site.down.name)
        hidden = mixed = x.new_zeros(())
        for expert, weight in zip(chosen.unbind(1), weights.to(x.dtype).unbind(1), strict=True):
            ups = [
                out if code is None else out + self._expand(ops.select_expert(code, expert), experts[up.name], out)
                for out, code, up in zip(frozen, codes, site.ups, strict=True)
            ]
            h = site.activate(ups)
            hidden = hidden + weight[:, None] * h
            if down is not None:
                code = self._codes(h, down, site.down, segment.fold(expert))
                mixed = mixed + weight[:, None, None] * ops.select_expert(code, expert)
        out = yield hidden
        return out if down is None else out + self._expand(mixed, down, out)

    def _codes(self, x: Tensor, p: Tensors | None, site: LinearSite, segment: Segment) -> Tensor | None:
        """Return A d(x) of every expert [n, E, r]; None where the layer is not targeted."""
        return None if p is None else ops.reduce(segment.dropout(x, self.experts.lora_dropout, site.path), p["lora_A"])

    def _expand(self, codes: Tensor, p: Tensors, out: Tensor) -> Tensor:
        """Return s sum_e B_e c_e [n, O], from codes [n, E, r] that are zero for the experts not chosen."""
        return ops.expand(codes, p["lora_B"], self.experts.scaling).to(out.dtype)

    def aux_loss(self, router_logits: Sequence[Tensor]) -> Tensor | None:
        if not self.router_loss or not router_logits:
            return None
        return self.router_aux_loss_coef * ops.balance_loss(router_logits, self.top_k)

    @property
    def activation(self) -> str | None:
        return self.act_fn
