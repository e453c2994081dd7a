"""A frozen linear layer and the adapters injected at it.

Shapes: n tokens, D inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mlora import ops
from mlora.adapters import LinearSite, Segment
from mlora.model.adapter import Adapter
from mlora.model.scope import Scope, apart
from mlora.model.wrapper import Wrapper
from mlora.ops.lowrank import LowRankUpdate

if TYPE_CHECKING:
    from mlora.ops import fused

FEW = 16
"""Tokens of each adapter up to which a generation computes with what was kept of the adapters."""


class AdaptedLinear(Wrapper):
    """A frozen linear layer and the adapters injected at it.

    Attributes:
        followers: layers that are called with the same input after this one (keys and values after queries); where
            kernels know all updates, one operation computes all of them, and leaves theirs in the scope.
    """

    site: LinearSite

    def __init__(self, frozen: nn.Module, site: LinearSite, scope: Scope, adapters: Mapping[str, Adapter]) -> None:
        super().__init__(frozen, site, scope, adapters)
        self.followers: tuple[AdaptedLinear, ...] = ()

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.frozen.bias  # type: ignore[return-value]

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Hand a parameter to the frozen layer: transformers ties the output layer's weight by setting it."""
        self.frozen.register_parameter(name, param)

    def forward(self, x: Tensor) -> Tensor:
        # asked before the segments: without an adapter of its own, an output layer may be given any tokens
        if not any(self._holds(name) for name in self.scope.names()):
            return self.frozen(x)
        if (ready := self.scope.take(self.site.path, x)) is not None:
            return ready
        segments = self.scope.split(x.shape[:-1])
        flat = x.flatten(0, -2)
        if (stack := self._stack(flat, segments)) is not None:
            return ops.apply_stack(stack, flat, self.frozen(flat), self.bias).view(*x.shape[:-1], -1)
        parts = apart(flat, segments)
        updates = self._updates(parts, segments) if ops.fused_available(x) else {}
        out = self._fused(x, parts, updates, segments) if updates else self.frozen(flat)
        if len(updates) < len(segments):
            each = zip(parts, apart(out, segments), segments, strict=True)
            outs = [own[1] if i in updates else self.adapt(*own) for i, own in enumerate(each)]
            out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out.view(*x.shape[:-1], -1)

    def _stack(self, x: Tensor, segments: Sequence[Segment]) -> ops.Stack | None:
        """Return the updates of few tokens of each adapter, as every step of a generation asks for; else None."""
        kept, length = self.scope.kept, segments[0].stop - segments[0].start
        if kept is None or length > FEW or any(s.stop - s.start != length for s in segments):
            return None
        key = self.site.path, tuple(s.adapter for s in segments)
        if key not in kept:
            kept[key] = self._stacked(x, segments)
        return kept[key]

    def _stacked(self, x: Tensor, segments: Sequence[Segment]) -> ops.Stack | None:
        """Return the updates of all segments as one; None where one does more, or depends on its input."""
        updates = self._updates(apart(x, segments), segments)
        held = [i for i, s in enumerate(segments) if self._holds(s.adapter)]
        if len(updates) < len(held) or any(update.weights is not None for update in updates.values()):
            return None
        every = [updates.get(i) for i in range(len(segments))]
        return ops.stacked(every, self.site.in_features, self.site.out_features, x)

    def _updates(self, parts: Sequence[Tensor], segments: Sequence[Segment]) -> dict[int, LowRankUpdate]:
        """Return the updates that kernels can compute, by the number of their segment, whose tokens are [n, D] each."""
        updates = {}
        for i, (x, s) in enumerate(zip(parts, segments, strict=True)):
            if self._holds(s.adapter):
                adapter = self.adapters[s.adapter]  # type: ignore[index]
                own = adapter.tensors[self.site.path]
                known = adapter.method.linear_as_data
                update = adapter.method.update(own, x, self.site, s) if known else None
                if update is not None:
                    updates[i] = update
        return updates

    def _fused(
        self, x: Tensor, parts: Sequence[Tensor], updates: Mapping[int, LowRankUpdate], segments: Sequence[Segment]
    ) -> Tensor:
        """Return the frozen output [n, O] with updates; followers' are left in the scope."""
        from mlora.ops import fused

        layers = [self._layer(updates, segments)]
        following = []
        for follower in self.followers:
            own = follower._updates(parts, segments)
            if own and all(i in own or not follower._holds(s.adapter) for i, s in enumerate(segments)):
                layers.append(follower._layer(own, segments))
                following.append(follower.site.path)
        out, *others = fused.adapted_linears(x.flatten(0, -2), layers, self.scope.lasting)
        for path, other in zip(following, others, strict=True):
            self.scope.leave(path, x, other.view(*x.shape[:-1], -1))
        return out

    def _layer(self, updates: Mapping[int, LowRankUpdate], segments: Sequence[Segment]) -> fused.Layer:
        """Return the frozen layer and updates as kernels take them."""
        from mlora.ops import fused

        parts, tensors = [], []
        for i, update in updates.items():
            s = segments[i]
            dropout = fused.dropout_of(s.keys, update.dropout, self.site.path)
            parts.append(fused.Part(s.start, s.stop, update.scaling, dropout))
            tensors.append(fused.Tensors(update.a, update.b, update.weights, update.factor))
        return fused.Layer(self.frozen, parts, tensors)

    def adapt(self, x: Tensor, out: Tensor, segment: Segment) -> Tensor:
        """Return the output [n, O] of a segment's adapter from its input [n, D] and the frozen output [n, O]."""
        if not self._holds(segment.adapter):
            return out
        adapter = self.adapters[segment.adapter]  # type: ignore[index]
        return adapter.method.linear(adapter.tensors[self.site.path], x, out, self.site, segment)
