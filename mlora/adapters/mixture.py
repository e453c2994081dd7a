"""Mixtures of LoRA experts around a shared frozen feed-forward block; routers differ from method to method.

    h_j = act(W1 x + s B1_e A1_e d(x)) * (W3 x + s B3_e A3_e d(x)),  e = e_j
    y = sum_j w_j (W2 h_j + s B2_e A2_e d(h_j))

The frozen W2 is linear, so W2 sum_j w_j h_j = sum_j w_j W2 h_j: each frozen product runs once per token, whatever k
is, and a mixture costs what the dense block costs. MixDoRA (`use_dora`) scales what each expert's layer returns, so
there W2 runs once for every choice.

Shapes: n tokens, D hidden, I intermediate, r rank, E experts, k choices per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from mlora import ops
from mlora.adapters.base import BlockSite, BlockSteps, Init, LinearSite, Segment, Tensors
from mlora.adapters.lora import LoraConfig
from mlora.adapters.routed import Routed

if TYPE_CHECKING:
    from torch import Tensor

    from mlora.ops.lowrank import BlockUpdate


class ExpertLora(BaseModel):
    """LoRA settings of the experts alone; what is left out is taken from the adapter."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    r: int | None = Field(None, ge=1)
    """Rank of an expert's updates."""
    lora_alpha: float | None = Field(None, gt=0)
    """Numerator of an expert's scaling."""
    lora_dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout on the input of an expert's updates."""
    use_rslora: bool | None = None
    """Scale an expert's updates by lora_alpha / sqrt(r)."""
    use_dora: bool | None = None
    """Train the norms of an expert's rows apart from their directions."""


class Routes(NamedTuple):
    """Who computes which token.

    Attributes:
        weights: [n, k], 0 where a choice is not taken.
        experts: [n, k].
        overflow: [n] bool, tokens that skip the block; None where none do.
    """

    weights: Tensor
    experts: Tensor
    overflow: Tensor | None = None


class Mixture(Routed, LoraConfig):
    """Routed LoRA experts in every feed-forward block, plain LoRA on targeted attention layers."""

    peft_type: ClassVar[str] = "MIXLORA"
    file_prefix: ClassVar[str] = "mixlora"
    spans_blocks: ClassVar[bool] = True

    lora_init: Literal["original", "gaussian"] = "original"
    """Distribution of A at the start: "original" is kaiming uniform with a = sqrt(5), "gaussian" normal(0, 1/r)."""
    router_init_range: float = Field(0.02, ge=0)
    """Standard deviation of the router's initial weights."""
    jitter_noise: float = Field(0.0, ge=0, lt=1)
    """In training, the block's input is multiplied by uniform(1 - jitter_noise, 1 + jitter_noise)."""
    act_fn: str | None = None
    """Activation of the experts by transformers' name, e.g. "silu"; the base model's own where left out."""
    expert_lora: ExpertLora | None = None
    """LoRA settings of the experts where they differ from the attention's."""

    @cached_property
    def experts(self) -> LoraConfig:
        """LoRA settings of one expert."""
        given = {} if self.expert_lora is None else self.expert_lora.model_dump(exclude_none=True)
        own = {name: getattr(self, name) for name in LoraConfig.model_fields}
        return LoraConfig.model_construct(**own | given)

    @property
    def activation(self) -> str | None:
        return self.act_fn

    def linear_parameters(self, site: LinearSite) -> dict[str, Init]:
        if site.in_block:
            return self.experts.low_rank_parameters(site, self.num_experts)
        return self.low_rank_parameters(site)

    def block_parameters(self, site: BlockSite) -> dict[str, Init]:
        return {"router": Init((self.num_experts, site.hidden_size), "normal", self.router_init_range)}

    def route(self, logits: Tensor, segment: Segment) -> Routes:
        """Return who computes which token, from router logits [n, E]."""
        raise NotImplementedError

    def block_update(
        self, p: Tensors, experts: Mapping[str, Tensors], x: Tensor, site: BlockSite, segment: Segment
    ) -> BlockUpdate | None:
        if self.experts.use_dora or self.choices not in (1, 2) or (self.jitter_noise and segment.keys is not None):
            return None
        plain = self.experts.gated(experts, site, self.num_experts)
        return plain._replace(router=p["router"], choices=self.choices)

    @property
    def choices(self) -> int | None:
        """k, where `route` sends each token to its k most probable experts and no other thing; None otherwise."""
        return None

    def block(
        self, p: Tensors, experts: Mapping[str, Tensors], x: Tensor, site: BlockSite, segment: Segment
    ) -> BlockSteps:
        x = segment.jitter(x, self.jitter_noise, site.path)
        return (yield from self.mix(x, x, p, experts, site, segment))

    def mix(
        self, x: Tensor, routed: Tensor, p: Tensors, experts: Mapping[str, Tensors], site: BlockSite, segment: Segment
    ) -> BlockSteps:
        """Compute the block of `x` with the router reading `routed`, both [n, D]; see `Method.block`."""
        logits = ops.router_logits(routed, p["router"])
        segment.record(site.path, logits)
        routes = self.route(logits, segment)
        frozen = yield x
        layers = [_ExpertLayer(self.experts, up, experts.get(up.name)) for up in site.ups]
        down = _ExpertLayer(self.experts, site.down, experts.get(site.down.name))
        codes = [layer.codes(x, segment) for layer in layers]
        choices = [
            _Choice(expert, weight[:, None].to(x.dtype))
            for expert, weight in zip(routes.experts.unbind(1), routes.weights.unbind(1), strict=True)
        ]
        hidden = []
        for choice in choices:
            outs = zip(layers, frozen, codes, strict=True)
            hidden.append(site.activate([layer.out(out, code, choice.expert) for layer, out, code in outs]))
        if down.rescales:
            y = yield from self._apart(hidden, choices, down, segment)
        else:
            y = yield from self._summed(hidden, choices, routes.weights, down, segment)
        if routes.overflow is None:
            return y
        # tokens that overflow pass the block by: their output is their own input, weighted like the rest
        return y.where(~routes.overflow[:, None], x * routes.weights.to(x.dtype))

    def _summed(
        self, hidden: list[Tensor], choices: list[_Choice], weights: Tensor, down: _ExpertLayer, segment: Segment
    ) -> BlockSteps:
        """Return sum_j w_j down_j(h_j) with one frozen product."""
        total = hidden[0].new_zeros(())
        codes = None
        for (expert, weight), h in zip(choices, hidden, strict=True):
            total = total + weight * h
            own = down.codes(h, segment.fold(expert))
            if own is not None:
                own = weight[..., None] * ops.select_expert(own, expert)
                codes = own if codes is None else codes + own
        out = yield total
        if down.site.bias is not None:  # the one product has added it once, not sum_j w_j times
            out = out + (weights.sum(1, keepdim=True) - 1).to(out.dtype) * down.site.bias.to(out.dtype)
        return out if codes is None else out + down.expand(codes, out)

    def _apart(self, hidden: list[Tensor], choices: list[_Choice], down: _ExpertLayer, segment: Segment) -> BlockSteps:
        """Return sum_j w_j down_j(h_j) with a frozen product for each choice, whose outputs are scaled apart."""
        import torch

        outs = yield torch.cat(hidden)
        y = outs.new_zeros(())
        for (expert, weight), h, out in zip(choices, hidden, outs.chunk(len(hidden)), strict=True):
            y = y + weight * down.out(out, down.codes(h, segment.fold(expert)), expert)
        return y


class _Choice(NamedTuple):
    """The j-th choice of every token: expert [n], weight [n, 1]."""

    expert: Tensor
    weight: Tensor


class _ExpertLayer:
    """One linear layer of a block with the updates of all experts; without any where it is not targeted."""

    def __init__(self, config: LoraConfig, site: LinearSite, p: Tensors | None) -> None:
        self.config, self.site, self.p = config, site, p
        self._factor: Tensor | None = None

    @property
    def rescales(self) -> bool:
        """Whether an expert scales the layer's output (DoRA)."""
        return self.p is not None and self.config.use_dora

    def codes(self, x: Tensor, segment: Segment) -> Tensor | None:
        """Return A d(x) of every expert [n, E, r]."""
        if self.p is None:
            return None
        return ops.reduce(segment.dropout(x, self.config.lora_dropout, self.site.path), self.p["lora_A"])

    def expand(self, codes: Tensor, out: Tensor) -> Tensor:
        """Return s sum_e B_e c_e [n, O], from codes [n, E, r] that are zero for the experts not chosen."""
        if self.p is None:
            raise RuntimeError(f"{self.site.path} has no experts")
        return ops.expand(codes, self.p["lora_B"], self.config.scaling).to(out.dtype)

    def out(self, frozen: Tensor, codes: Tensor | None, expert: Tensor) -> Tensor:
        """Return the layer's output [n, O] for one expert [n] per token, from the frozen output."""
        if self.p is None or codes is None:
            return frozen
        update = self.expand(ops.select_expert(codes, expert), frozen)
        if not self.config.use_dora:
            return frozen + update
        return ops.rescale(frozen, update, ops.of_expert(self._dora_factor(self.p), expert), self.site.bias)

    def _dora_factor(self, p: Tensors) -> Tensor:
        """Return m / n of every expert [E, O], computed once for all choices."""
        if self._factor is None:
            norm = ops.dora_norm(self.site.module, p["lora_A"], p["lora_B"], self.config.scaling)
            self._factor = p["lora_magnitude_vector"] / norm
        return self._factor
