"""A frozen weight and its low-rank update as one matrix.

LoRA W + s B A; DoRA the same with each row brought to its magnitude m; embeddings E + s (B A)^T. All in float32, then
rounded to the dtype that is written. Shapes: W [O, D], A [r, D], B [O, r], m [O]; E [V, D], A [r, V], B [D, r].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mlora.adapters.lora import LowRank


@torch.no_grad()
def merged(weight: Tensor, p: Mapping[str, Tensor], config: LowRank, expert: int | None = None) -> Tensor:
    """Return the weight that computes what the frozen one and the update compute together, float32.

    Args:
        weight: frozen, [O, D].
        p: lora_A, lora_B and, for DoRA, lora_magnitude_vector; stacked where `expert` is given.
        config: that has the scaling.
        expert: which of stacked updates.
    """
    own = p if expert is None else {name: tensor[expert] for name, tensor in p.items() if name != "router"}
    whole = weight.float() + config.scaling * (own["lora_B"].float() @ own["lora_A"].float())
    magnitude = own.get("lora_magnitude_vector")
    return whole if magnitude is None else whole * (magnitude / whole.norm(dim=1))[:, None]


@torch.no_grad()
def merged_embeddings(weight: Tensor, p: Mapping[str, Tensor], config: LowRank) -> Tensor:
    """Return the embeddings that compute what the frozen ones and the update compute together, float32.

    Args:
        weight: frozen, [V, D].
        p: lora_embedding_A and lora_embedding_B.
        config: that has the scaling.
    """
    a, b = p["lora_embedding_A"].float(), p["lora_embedding_B"].float()
    return weight.float() + config.scaling * (b @ a).mT
