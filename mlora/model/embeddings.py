"""The frozen input embeddings and the adapters injected at them.

    out = c (E[ids] + s A^T[ids] B^T)

Shapes: n tokens, V vocabulary, D hidden, E [V, D], A [r, V], B [D, r]. c is 1, but for families that scale what they
look up (gemma's: sqrt(D)).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlora.adapters import EmbeddingSite, Segment
from mlora.model.scope import apart
from mlora.model.wrapper import Wrapper


class AdaptedEmbedding(Wrapper):
    """The frozen input embeddings and the adapters injected at them; without an adapter of its own it only looks up."""

    site: EmbeddingSite

    def forward(self, ids: Tensor) -> Tensor:
        out = self.frozen(ids)
        if not any(self._holds(name) for name in self.scope.names()):
            return out
        segments = self.scope.split(ids.shape)
        each = zip(apart(ids.flatten(), segments), apart(out.flatten(0, -2), segments), segments, strict=True)
        parts = [self._adapt(*own) for own in each]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(out.shape)

    def _adapt(self, ids: Tensor, out: Tensor, segment: Segment) -> Tensor:
        if not self._holds(segment.adapter):
            return out
        adapter = self.adapters[segment.adapter]  # type: ignore[index]
        return adapter.method.embedding(adapter.tensors[self.site.path], ids, out, self.site)


def obstacle(module: Any) -> str | None:
    """Return why adapters cannot be injected at input embeddings; None where what they compute is understood."""
    kind = type(module).__name__
    if not isinstance(module, nn.Embedding):
        return f"they are a {kind}, not an nn.Embedding"
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return "they have max_norm, scale_grad_by_freq or sparse set"
    if type(module) is nn.Embedding:
        return None
    scale = getattr(module, "embed_scale", None)
    number = isinstance(scale, int | float) or (isinstance(scale, Tensor) and scale.numel() == 1)
    if number and (module.weight.device.type == "meta" or _agrees(module)):
        return None
    return f"they are a {kind}, which does more than look up and scale by a number"


@torch.no_grad()
def _agrees(module: Any) -> bool:
    """Compare the module's own forward with the description, on some tokens."""
    ids = torch.arange(0, module.num_embeddings, max(1, module.num_embeddings // 64), device=module.weight.device)
    found, expected = module(ids[None])[0].float(), F.embedding(ids, module.weight).float() * module.embed_scale
    return bool(torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())))
