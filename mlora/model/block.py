"""A frozen feed-forward block and the adapters whose experts or routers span it.

Shapes: n tokens, D hidden, I intermediate, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mlora import ops
from mlora.adapters import BlockSite, LinearSite, Segment
from mlora.adapters.base import BlockSteps, Tensors
from mlora.model.adapter import Adapter
from mlora.model.linear import FEW, AdaptedLinear
from mlora.model.scope import apart
from mlora.model.wrapper import Wrapper
from mlora.ops.lowrank import BlockUpdate

_NONE = BlockUpdate(None, None, None, 1, 1.0, 0.0)
"""Of tokens without an adapter."""


class AdaptedBlock(Wrapper):
    """A frozen feed-forward block and the adapters whose experts or routers span it.

    Segments that kernels know are one operation; those that need the block as a whole are coroutines which advance
    together, so that each frozen product runs once for all of them; for the rest the base's own forward runs over its
    adapted linears.
    """

    site: BlockSite

    def forward(self, x: Tensor) -> Tensor:
        segments = self.scope.split(x.shape[:-1])
        flat = x.flatten(0, -2)
        few = self.scope.kept is not None and len(flat) <= FEW * len(segments)
        if few and not any(self._holds(s.adapter) for s in segments):
            return self.frozen(x)  # its layers keep more than kernels could
        updates = self._updates(flat, segments)
        kinds: dict[Callable[[Tensor, Sequence[Segment], Sequence[Any]], Tensor], list[int]] = {}
        for i, segment in enumerate(segments):
            rest = self._spanned if self._holds(segment.adapter) else self._plain
            kinds.setdefault(self._fused if i in updates else rest, []).append(i)
        if not updates and self._spanned in kinds:  # one frozen product for all
            kinds = {self._spanned: list(range(len(segments)))}
        if kinds.keys() <= {self._plain}:
            return self._base(x, segments)
        if len(kinds) == 1:
            (compute,) = kinds
            return compute(flat, segments, list(updates.values())).view(x.shape)
        parts, outputs = apart(flat, segments), dict[int, Tensor]()
        for compute, members in kinds.items():
            own = [segments[i] for i in members]
            part = torch.cat([parts[i] for i in members])
            shifted = list(_from_zero(own))
            out = compute(part, shifted, [updates[i] for i in members if i in updates])
            outputs |= zip(members, apart(out, shifted), strict=True)
        return torch.cat([outputs[i] for i in range(len(segments))]).view(x.shape)

    def _updates(self, x: Tensor, segments: Sequence[Segment]) -> dict[int, tuple[str, BlockUpdate]]:
        """Return activations and updates that kernels know, by the number of their segment; {} without adapters."""
        gated = len(self.site.ups) == 2 and self.site.down.bias is None
        if not gated or not ops.fused_available(x) or all(s.adapter is None for s in segments):
            return {}
        from mlora.ops import fused

        found = {}
        for i, (part, s) in enumerate(zip(apart(x, segments), segments, strict=True)):
            adapter = None if s.adapter is None else self.adapters[s.adapter]
            site = self.site if adapter is None else adapter.blocks.get(self.site.path, self.site)
            activation = fused.activation_name(site.activation)
            if activation is not None:
                update = _NONE if adapter is None else self._update(adapter, part, site, s)
                if update is not None:
                    found[i] = activation, update
        return found

    def _update(self, adapter: Adapter, x: Tensor, site: BlockSite, segment: Segment) -> BlockUpdate | None:
        if not adapter.method.block_as_data:
            return None
        experts = _experts(adapter, site)
        return adapter.method.block_update(adapter.tensors.get(site.path, {}), experts, x, site, segment)

    def _fused(self, x: Tensor, segments: Sequence[Segment], updates: Sequence[tuple[str, BlockUpdate]]) -> Tensor:
        """Return the output from kernels, and leave what routers said with the segments."""
        from mlora.ops import fused

        streams = [layer.path for layer in (*self.site.ups, self.site.down)]
        parts = [
            fused.block_part(update, s.start, s.stop, activation, s.keys, streams)
            for s, (activation, update) in zip(segments, updates, strict=True)
        ]
        layers = tuple(self._linear(layer).frozen for layer in (*self.site.ups, self.site.down))
        every, owned = zip(*parts, strict=True)
        out, logits = fused.feed_forward(x, layers, every, owned, self.scope.lasting)
        for s, own in zip(segments, logits, strict=True):
            if own is not None:
                s.record(self.site.path, own)
        return out

    def _plain(self, x: Tensor, segments: Sequence[Segment], updates: object) -> Tensor:
        """Return the output of the base's own forward over its adapted linears."""
        with self.scope.part(segments):
            return self._base(x[None], segments)[0]

    def _base(self, x: Tensor, segments: Sequence[Segment]) -> Tensor:
        """Return what the base's own forward does; for adapters in one pass between its layers, where a kernel can."""
        gated = len(self.site.ups) == 2 and ops.fused_available(x)
        if gated and any(s.adapter is not None for s in segments):
            from mlora.ops import fused

            if (activation := fused.activation_name(self.site.activation)) is not None:
                gate, up = (self._linear(layer)(x) for layer in self.site.ups)
                hidden = fused.gate(gate.flatten(0, -2), up.flatten(0, -2), activation)
                return self._linear(self.site.down)(hidden.view(gate.shape))
        return self.frozen(x)

    def _spanned(self, x: Tensor, segments: Sequence[Segment], updates: object) -> Tensor:
        """Return the output of coroutines."""
        steps = [self._steps(*own) for own in zip(apart(x, segments), segments, strict=True)]
        inputs = [next(step) for step in steps]
        ups = [self._frozen(site, inputs) for site in self.site.ups]
        hidden = [step.send(outs) for step, outs in zip(steps, zip(*ups, strict=True), strict=True)]
        outputs = [_finish(step, out) for step, out in zip(steps, self._frozen(self.site.down, hidden), strict=True)]
        return torch.cat(outputs)

    def _steps(self, x: Tensor, segment: Segment) -> BlockSteps:
        if not self._holds(segment.adapter):
            return self._singly(x, segment)
        adapter = self.adapters[segment.adapter]  # type: ignore[index]
        site = adapter.blocks[self.site.path]
        return adapter.method.block(adapter.tensors[site.path], _experts(adapter, site), x, site, segment)

    def _singly(self, x: Tensor, segment: Segment) -> BlockSteps:
        """The block of an adapter that adapts single linears, or none."""
        frozen = yield x
        ups = [self._linear(s).adapt(x, out, segment) for s, out in zip(self.site.ups, frozen, strict=True)]
        hidden = self.site.activate(ups)
        out = yield hidden
        return self._linear(self.site.down).adapt(hidden, out, segment)

    def _frozen(self, site: LinearSite, parts: list[Tensor]) -> tuple[Tensor, ...]:
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self._linear(site).frozen(joined).split([len(part) for part in parts])

    def _linear(self, site: LinearSite) -> AdaptedLinear:
        return getattr(self.frozen, site.name)


def _experts(adapter: Adapter, site: BlockSite) -> dict[str, Tensors]:
    """Return an adapter's tensors at the linear layers of a block, by the layers' names."""
    return {s.name: adapter.tensors[s.path] for s in (*site.ups, site.down) if s.path in adapter.tensors}


def _from_zero(segments: Sequence[Segment]) -> Iterator[Segment]:
    """Yield segments as they lie when only they are put one after the other."""
    start = 0
    for s in segments:
        stop = start + s.stop - s.start
        yield replace(s, start=start, stop=stop)
        start = stop


def _finish(step: BlockSteps, out: Tensor) -> Tensor:
    try:
        step.send(out)
    except StopIteration as stop:
        return stop.value
    raise RuntimeError("a method's block yielded more than twice")
