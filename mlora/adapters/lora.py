"""LoRA, rsLoRA, LoRA+, DoRA and PiSSA.

LoRA   y = W x + b + s B A d(x), with A [r, D] random, B [O, r] zero, s = lora_alpha / r and d dropout.
rsLoRA s = lora_alpha / sqrt(r).
DoRA   y = m * (W x + s B A d(x)) / n + b, m [O] trained and |W|'s row norms at the start, n the row norms of W + s B A.
LoRA+  a higher learning rate for B.
PiSSA  y = W x + b + s (B A - B0 A0) d(x), where A and B start at A0 and B0 and s B0 A0 is W's best approximation of
       rank r: the update trains W's principal directions, and the shared base stays as it is. Saved as a LoRA of
       rank 2 r, [B, -B0] [A; A0].

Input embeddings that a LoRA or rsLoRA names are looked up as E[ids] + s A^T[ids] B^T, with A [r, V] zero, B [D, r]
normal and no dropout, as PEFT's.

https://arxiv.org/abs/2106.09685, https://arxiv.org/abs/2312.03732, https://arxiv.org/abs/2402.09353,
https://arxiv.org/abs/2402.12354, https://arxiv.org/abs/2404.02948
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from mlora import ops
from mlora.adapters.base import (
    BlockSite,
    Distribution,
    EmbeddingSite,
    Init,
    LinearSite,
    Method,
    Segment,
    Tensors,
    register,
    scaling,
)

if TYPE_CHECKING:
    from torch import Tensor

    from mlora.ops.lowrank import BlockUpdate, LowRankUpdate


class LowRank(Method):
    """What every method made of low-rank updates can set."""

    r: int = Field(8, ge=1)
    """Rank of an update."""
    lora_alpha: float = Field(16, gt=0)
    """Numerator of the scaling: lora_alpha / r."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping an entry of an update's input in training."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""
    lora_init: Literal["original", "gaussian", "pissa"] = "original"
    """Distribution of A at the start: "original" is kaiming uniform with a = sqrt(5), "gaussian" normal(0, 1/r);
    "pissa" starts A and B at the principal directions of the frozen weight."""

    @property
    def scaling(self) -> float:
        """s, the factor on B A x."""
        return scaling(self.r, self.lora_alpha, self.use_rslora)

    def linear_parameters(self, site: LinearSite) -> dict[str, Init]:
        return self.low_rank_parameters(site)

    def update(self, p: Tensors, x: Tensor, site: LinearSite, segment: Segment) -> LowRankUpdate | None:
        return ops.LowRankUpdate(p["lora_A"], p["lora_B"], self.scaling, self.lora_dropout)

    def low_rank_parameters(self, site: LinearSite, num_experts: int | None = None) -> dict[str, Init]:
        """Declare A and B of a linear layer, stacked [E, ...] for E experts."""
        lead = () if num_experts is None else (num_experts,)
        kind: Distribution
        kind, scale = ("kaiming", math.sqrt(5)) if self.lora_init == "original" else ("normal", 1 / self.r)
        return {
            "lora_A": Init((*lead, self.r, site.in_features), kind, scale, stacked=bool(lead)),
            "lora_B": Init((*lead, site.out_features, self.r), stacked=bool(lead)),
        }


@register("lora")
class LoraConfig(LowRank):
    """A low-rank update of each targeted linear layer."""

    peft_type: ClassVar[str] = "LORA"
    file_prefix: ClassVar[str] = "base_model.model"

    use_dora: bool = False
    """Train the norms of the updated weight's rows apart from their directions (DoRA)."""

    @field_validator("use_dora")
    @classmethod
    def _one_start(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("lora_init") == "pissa":
            raise ValueError('expected false where lora_init is "pissa"')
        return value

    def low_rank_parameters(self, site: LinearSite, num_experts: int | None = None) -> dict[str, Init]:
        declared = super().low_rank_parameters(site, num_experts)
        if self.lora_init == "pissa":
            a = replace(declared["lora_A"], kind="principal_A", scale=self.scaling)
            b = replace(declared["lora_B"], kind="principal_B", scale=self.scaling)
            frozen = {"start_A": replace(a, trainable=False), "start_B": replace(b, trainable=False)}
            return {"lora_A": a, "lora_B": b} | frozen
        if self.use_dora:
            shape = (*declared["lora_B"].shape[:-2], site.out_features)
            declared["lora_magnitude_vector"] = Init(shape, "row_norms", stacked=num_experts is not None)
        return declared

    def update(self, p: Tensors, x: Tensor, site: LinearSite, segment: Segment) -> LowRankUpdate | None:
        plain = super().update(self.to_file(p), x, site, segment)
        if plain is None or not self.use_dora:
            return plain
        norm = ops.dora_norm(site.module, plain.a, plain.b, self.scaling)
        return plain._replace(factor=p["lora_magnitude_vector"] / norm)

    def embedding_parameters(self, site: EmbeddingSite) -> dict[str, Init]:
        if self.use_dora or self.lora_init == "pissa":
            return {}
        return {
            "lora_embedding_A": Init((self.r, site.num_embeddings)),
            "lora_embedding_B": Init((site.hidden_size, self.r), "normal", 1.0),
        }

    def embedding(self, p: Tensors, ids: Tensor, out: Tensor, site: EmbeddingSite) -> Tensor:
        a, b = p["lora_embedding_A"], p["lora_embedding_B"]
        return ops.embedding_update(a, b, ids, out, self.scaling * site.scale, site.padding_idx)

    def block_update(
        self, p: Tensors, experts: Mapping[str, Tensors], x: Tensor, site: BlockSite, segment: Segment
    ) -> BlockUpdate | None:
        return None if self.use_dora else self.gated(experts, site, 1)

    def gated(self, experts: Mapping[str, Tensors], site: BlockSite, num_experts: int) -> BlockUpdate:
        """Return the updates of a gated block's three layers, without routing."""
        found = [experts.get(layer.name) for layer in (*site.ups, site.down)]
        files = [None if own is None else self.to_file(own) for own in found]
        pairs = (None if own is None else (own["lora_A"], own["lora_B"]) for own in files)
        return ops.BlockUpdate(*pairs, num_experts, self.scaling, self.lora_dropout)

    def as_saved(self) -> LoraConfig:
        if self.lora_init != "pissa":
            return self
        doubled = {"r": 2 * self.r, "lora_alpha": self.lora_alpha * (math.sqrt(2) if self.use_rslora else 2)}
        return self.model_copy(update={**doubled, "lora_init": "original"})

    def to_file(self, tensors: Tensors) -> dict[str, Tensor]:
        if "start_A" not in tensors:
            return dict(tensors)
        import torch

        a, b, start_a, start_b = (tensors[name] for name in ("lora_A", "lora_B", "start_A", "start_B"))
        return {"lora_A": torch.cat([a, start_a]), "lora_B": torch.cat([b, -start_b], dim=1)}

    def from_file(self, tensors: Tensors) -> dict[str, Tensor]:
        if self.lora_init != "pissa":
            return dict(tensors)
        (a, start_a), (b, start_b) = tensors["lora_A"].chunk(2), tensors["lora_B"].chunk(2, dim=1)
        return {"lora_A": a, "lora_B": b, "start_A": start_a, "start_B": -start_b}
