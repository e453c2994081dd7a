"""Wrapping a frozen Hugging Face model in place: linear layers, feed-forward blocks and the input embeddings.

Every family's attention, cache, norms and generation stay transformers' own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlora import ops
from mlora.adapters import BlockSite, EmbeddingSite, LinearSite, Segment
from mlora.adapters.base import BlockSteps
from mlora.model.adapter import Adapter
from mlora.model.embeddings import AdaptedEmbedding, obstacle
from mlora.model.errors import ModelError
from mlora.model.scope import Scope
from mlora.model.wrapper import Wrapper
from mlora.ops.lowrank import BlockUpdate, LowRankUpdate

if TYPE_CHECKING:
    from mlora.ops import fused

BLOCK_NAME = re.compile(r"(^|\.)(mlp|feed_forward|feedforward|ffn)$")
FEED_FORWARD = re.compile(r"mlp|ffn|feed_?forward|moe")
UP_NAMES = (
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("gate_up_proj",),
    ("fc1",),
    ("fc_in",),
    ("c_fc",),
    ("dense_h_to_4h",),
    ("up_proj",),
)
DOWN_NAMES = ("down_proj", "w2", "fc2", "fc_out", "c_proj", "dense_4h_to_h")
ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation")
ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (F.silu, F.gelu, F.relu)
"""What a block without an activation of its own may call instead; the one that agrees is taken."""


_NONE = BlockUpdate(None, None, None, 1, 1.0, 0.0)
"""Of tokens without an adapter."""


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
        updates = self._updates(flat, segments) if ops.fused_available(x) else {}
        out = self._fused(x, flat, updates, segments) if updates else self.frozen(flat)
        if len(updates) < len(segments):
            parts = [
                part if i in updates else self.adapt(flat[s.start : s.stop], part, s)
                for i, (s, part) in enumerate(
                    zip(segments, out.split([s.stop - s.start for s in segments]), strict=True)
                )
            ]
            out = parts[0] if len(parts) == 1 else torch.cat(parts)
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
        updates = self._updates(x, segments)
        held = [i for i, s in enumerate(segments) if self._holds(s.adapter)]
        if len(updates) < len(held) or any(update.weights is not None for update in updates.values()):
            return None
        every = [updates.get(i) for i in range(len(segments))]
        return ops.stacked(every, self.site.in_features, self.site.out_features, x)

    def _updates(self, x: Tensor, segments: Sequence[Segment]) -> dict[int, LowRankUpdate]:
        """Return the updates that kernels can compute, by the number of their segment."""
        updates = {}
        for i, s in enumerate(segments):
            if self._holds(s.adapter):
                adapter = self.adapters[s.adapter]  # type: ignore[index]
                own = adapter.tensors[self.site.path]
                known = adapter.method.linear_as_data
                update = adapter.method.update(own, x[s.start : s.stop], self.site, s) if known else None
                if update is not None:
                    updates[i] = update
        return updates

    def _fused(
        self, x: Tensor, flat: Tensor, updates: Mapping[int, LowRankUpdate], segments: Sequence[Segment]
    ) -> Tensor:
        """Return the frozen output [n, O] with updates; followers' are left in the scope."""
        from mlora.ops import fused

        layers = [self._layer(updates, segments)]
        following = []
        for follower in self.followers:
            own = follower._updates(flat, segments)
            if own and all(i in own or not follower._holds(s.adapter) for i, s in enumerate(segments)):
                layers.append(follower._layer(own, segments))
                following.append(follower.site.path)
        out, *others = fused.adapted_linears(flat, layers)
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
        outputs: dict[int, Tensor] = {}
        for compute, members in kinds.items():
            own = [segments[i] for i in members]
            part = torch.cat([flat[s.start : s.stop] for s in own])
            shifted = list(_from_zero(own))
            out = compute(part, shifted, [updates[i] for i in members if i in updates])
            outputs |= zip(members, out.split([s.stop - s.start for s in shifted]), strict=True)
        return torch.cat([outputs[i] for i in range(len(segments))]).view(x.shape)

    def _updates(self, x: Tensor, segments: Sequence[Segment]) -> dict[int, tuple[str, BlockUpdate]]:
        """Return activations and updates that kernels know, by the number of their segment; {} without adapters."""
        gated = len(self.site.ups) == 2 and self.site.down.bias is None
        if not gated or not ops.fused_available(x) or all(s.adapter is None for s in segments):
            return {}
        from mlora.ops import fused

        found = {}
        for i, s in enumerate(segments):
            adapter = None if s.adapter is None else self.adapters[s.adapter]
            site = self.site if adapter is None else adapter.blocks.get(self.site.path, self.site)
            activation = fused.activation_name(site.activation)
            if activation is not None:
                update = _NONE if adapter is None else self._update(adapter, x[s.start : s.stop], site, s)
                if update is not None:
                    found[i] = activation, update
        return found

    def _update(self, adapter: Adapter, x: Tensor, site: BlockSite, segment: Segment) -> BlockUpdate | None:
        if not adapter.method.block_as_data:
            return None
        experts = {s.name: adapter.tensors[s.path] for s in (*site.ups, site.down) if s.path in adapter.tensors}
        return adapter.method.block_update(adapter.tensors.get(site.path, {}), experts, x, site, segment)

    def _fused(self, x: Tensor, segments: Sequence[Segment], updates: Sequence[tuple[str, BlockUpdate]]) -> Tensor:
        """Return the output from kernels."""
        from mlora.ops import fused

        streams = [layer.path for layer in (*self.site.ups, self.site.down)]
        parts = [
            fused.block_part(update, s.start, s.stop, activation, s.keys, streams)
            for s, (activation, update) in zip(segments, updates, strict=True)
        ]
        layers = tuple(self._linear(layer).frozen for layer in (*self.site.ups, self.site.down))
        return fused.feed_forward(x, layers, *zip(*parts, strict=True))

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
        steps = [self._steps(x[s.start : s.stop], s) for s in segments]
        inputs = [next(step) for step in steps]
        ups = [self._frozen(site, inputs) for site in self.site.ups]
        hidden = [step.send(outs) for step, outs in zip(steps, zip(*ups, strict=True), strict=True)]
        outputs = [_finish(step, out) for step, out in zip(steps, self._frozen(self.site.down, hidden), strict=True)]
        return torch.cat(outputs)

    def _steps(self, x: Tensor, segment: Segment) -> BlockSteps:
        if not self._holds(segment.adapter):
            return self._singly(x, segment)
        adapter = self.adapters[segment.adapter]  # type: ignore[index]
        site, tensors = adapter.blocks[self.site.path], adapter.tensors
        experts = {s.name: tensors[s.path] for s in (*site.ups, site.down) if s.path in tensors}
        return adapter.method.block(tensors[site.path], experts, x, site, segment)

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


class Sites:
    """The places of a model that adapters can take, and why others cannot be.

    Attributes:
        linears: linear layers of the decoder layers, by path.
        blocks: feed-forward blocks that a method can span, by path.
        refused: parts of decoder layers that have weights and are no linear layers, with the reason, by path.
        unspanned: feed-forward blocks whose linear layers can be adapted one by one only, with the reason, by path.
        uncalled: linear layers that the model never calls as such, by path; groups leave them out.
        layers: the decoder layers.
        output: the output layer, by its path, where it is linear; only asking for it by name adapts it.
        embeddings: the input embeddings, by their path, where they are understood; only asking for them by name adapts
            them.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.output: dict[str, LinearSite] = {}
        self.embeddings: dict[str, EmbeddingSite] = {}
        self.linears: dict[str, LinearSite] = {}
        self.blocks: dict[str, BlockSite] = {}
        self.refused: dict[str, str] = {}
        self.unspanned: dict[str, str] = {}
        self.uncalled: set[str] = set()
        self.layers: list[nn.Module] = _decoder_layers(model)
        self._wrapped: dict[str, AdaptedLinear] = {}
        self._find()

    def _find(self) -> None:
        modules = dict(self.model.named_modules())
        self._paths = tuple(modules)
        for path, module in modules.items():
            layer = _layer_of(path)
            if layer is None:
                continue
            if isinstance(module, nn.Linear):
                size = module.in_features, module.out_features
                self.linears[path] = LinearSite(path, layer, *size, module, _in_feed_forward(path))
            elif type(module).__name__ == "Conv1D":
                self.refused[path] = "is a Conv1D, not a linear layer"
            elif path.rpartition(".")[2] in ("experts", "router") or type(module).__name__.endswith("Experts"):
                self.refused[path] = "is a mixture of experts of the base model's own"
        inputs, output = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        self._inputs = [path for path, module in modules.items() if module is inputs]
        if obstacle(inputs) is None:
            size = inputs.num_embeddings, inputs.embedding_dim
            self.embeddings = {path: EmbeddingSite(path, -1, *size, inputs) for path in self._inputs}
        for path, module in modules.items():
            if module is output and isinstance(module, nn.Linear) and path not in self.linears:
                self.output[path] = LinearSite(path, -1, module.in_features, module.out_features, module, False)
        for path, module in modules.items():
            if BLOCK_NAME.search(path) and _layer_of(path) is not None:
                self._find_block(path, module)

    def _find_block(self, path: str, module: nn.Module) -> None:
        """Describe a feed-forward block, when its own forward agrees with the description."""
        names = {name for name, child in module.named_children() if isinstance(child, nn.Linear)}
        ups = next((ups for ups in UP_NAMES if names.issuperset(ups)), None)
        down = next((name for name in DOWN_NAMES if name in names), None)
        if ups is None or down is None:
            self.unspanned[path] = "is a feed-forward block of an unknown form"
            return
        own = next((getattr(module, name) for name in ACTIVATION_NAMES if hasattr(module, name)), None)
        linears = [self.linears[f"{path}.{name}"] for name in (*ups, down)]
        for activation in (own,) if callable(own) else ACTIVATIONS:
            size = linears[0].in_features
            site = BlockSite(path, linears[0].layer, size, tuple(linears[:-1]), linears[-1], activation)
            if _agrees(module, site):
                self.blocks[path] = site
                return
        self.unspanned[path] = "is a feed-forward block that computes something else than act(up) or act(gate) * up"

    @property
    def single(self) -> dict[str, LinearSite | EmbeddingSite]:
        """Everything that can be named to be adapted by itself, by path."""
        return {**self.linears, **self.output, **self.embeddings}

    def targets(self, wanted: str | tuple[str, ...]) -> Sequence[LinearSite | EmbeddingSite]:
        """Return what `target_modules` names: a group of linear layers, or endings of paths.

        Raises:
            ModelError: a name matches nothing, or the group has parts that cannot be wrapped.
        """
        if isinstance(wanted, str):
            return self._group(wanted)
        sites = self.single
        found = {name: [site for path, site in sites.items() if _ends(path, name)] for name in wanted}
        unknown = [name for name, own in found.items() if not own]
        family = type(self.model).__name__
        if unknown:
            names = sorted({site.name for site in (self.linears | self.output).values()})
            asked = any(_ends(path, name) for path in self._inputs for name in unknown)
            inputs = f"its embeddings are {', '.join(site.name for site in self.embeddings.values())}"
            why = f"its embeddings cannot be adapted: {obstacle(self.model.get_input_embeddings())}"
            raise ModelError(
                f"target_modules: {', '.join(map(repr, unknown))} not in {family}; "
                f"its linear layers are {', '.join(names) or 'none'}"
                + (f"; {inputs}" if self.embeddings else f"; {why}" if asked else "")
            )
        taken = {site.path for own in found.values() for site in own}
        for path in sorted(taken & self.uncalled):
            raise ModelError(f"target_modules: {family} never calls {path}, so an adapter there would have no effect")
        return [site for path, site in sites.items() if path in taken]

    def _group(self, name: str) -> list[LinearSite]:
        inside = {"all-linear": (True, False), "mlp": (True,), "attention": (False,)}[name]
        sites = [site for path, site in self.linears.items() if site.in_block in inside and path not in self.uncalled]
        refused = [(path, why) for path, why in self.refused.items() if _in_feed_forward(path) in inside]
        if sites and not refused:
            return sites
        where, why = refused[0] if refused else ("its decoder", "has no linear layer there")
        hint = f" {self._others()}" if self.linears else ""
        raise ModelError(f'{type(self.model).__name__} cannot take target_modules "{name}": {where} {why}.{hint}')

    def _others(self) -> str:
        names = self.names_of(self.linears.keys() - self.uncalled)
        return f"Its linear layers are {', '.join(names)}: name those to adapt."

    def names_of(self, paths: Iterable[str]) -> tuple[str, ...]:
        """Return the shortest endings of paths that name these modules and no other, as PEFT's `target_modules`."""
        wanted = set(paths)
        names: set[str] = set()
        for path in wanted:
            if any(_ends(path, name) for name in names):
                continue
            parts = path.split(".")
            endings = (".".join(parts[i:]) for i in reversed(range(len(parts))))
            names.add(next(e for e in endings if wanted.issuperset(p for p in self._paths if _ends(p, e))))
        return tuple(sorted(names))

    def all_blocks(self) -> list[BlockSite]:
        """Return every feed-forward block, for methods that span them.

        Raises:
            ModelError: some layer has none that is understood.
        """
        if len(self.blocks) < len(self.layers):
            unknown = ("its decoder layers", "have no feed-forward block of a known name")
            where, why = next(iter((self.refused | self.unspanned).items()), unknown)
            raise ModelError(f"{type(self.model).__name__} cannot take experts: {where} {why}")
        return list(self.blocks.values())

    @contextmanager
    def only_called(self) -> Iterator[None]:
        """Leave out from now on the linear layers that the `with` block does not call as such.

        A model may read a layer's weight without calling it, and an adapter there would change nothing, in silence.
        Layers of one module that are called one after the other with one tensor follow the first of them.
        """
        called: dict[str, Tensor] = {}

        def note(path: str, site: LinearSite, x: Tensor, out: object) -> None:
            if isinstance(out, Tensor) and out.shape == (*x.shape[:-1], site.out_features):
                called[path] = x

        hooks = [
            site.module.register_forward_hook(lambda _, args, out, path=path, site=site: note(path, site, args[0], out))
            for path, site in self.linears.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.uncalled = self.linears.keys() - called
        first = ""
        for path, x in called.items():
            self._wrapped[path].followers = ()
            if first and x is called[first] and path.rpartition(".")[0] == first.rpartition(".")[0]:
                self._wrapped[first].followers += (self._wrapped[path],)
            else:
                first = path

    def wrap(self, scope: Scope, adapters: Mapping[str, Adapter]) -> None:
        """Put wrappers around every linear layer, block and the embeddings; without adapters they change nothing."""
        for path, site in (self.linears | self.output).items():
            self._wrapped[path] = AdaptedLinear(site.module, site, scope, adapters)
            _replace(self.model, path, self._wrapped[path])
        for path, block in self.blocks.items():
            _replace(self.model, path, AdaptedBlock(self.model.get_submodule(path), block, scope, adapters))
        for path, inputs in self.embeddings.items():
            _replace(self.model, path, AdaptedEmbedding(inputs.module, inputs, scope, adapters))

    def exclude_from_compilation(self) -> None:
        """Keep torch's compiler out of the wrappers, which do what the segments of a batch ask for."""
        for wrapper in self.model.modules():
            if isinstance(wrapper, AdaptedLinear | AdaptedBlock):
                wrapper.forward = torch.compiler.disable(wrapper.forward)  # type: ignore[method-assign]

    def unwrap(self) -> None:
        """Take the wrappers away again, so that the model's own names are back."""
        for path in (*self.blocks, *self.single):
            wrapper: Any = self.model.get_submodule(path)
            _replace(self.model, path, wrapper.frozen)


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _in_feed_forward(path: str) -> bool:
    """Return whether a part of a decoder layer belongs to its feed-forward block, which may be the layer itself."""
    parts = path.split(".")
    layer = next(i for i, part in enumerate(parts) if part.isdigit())
    above = parts[layer + 1 : -1]
    return not above or any(FEED_FORWARD.search(part) for part in above)


def _layer_of(path: str) -> int | None:
    return next((int(part) for part in path.split(".") if part.isdigit()), None)


def _decoder_layers(model: Any) -> list[nn.Module]:
    """Return the first list of modules below the model that is as long as the config says it is deep."""
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return list(module)
    raise ModelError(f"{type(model).__name__} cannot be wrapped: no list of {depth} decoder layers found")


def _agrees(module: nn.Module, site: BlockSite) -> bool:
    """Compare the block's own forward with the description, on random input."""
    frozen: Any = site.down.module
    weight, bias = frozen.weight, frozen.bias
    if weight.device.type == "meta":
        return True
    dtype = bias.dtype if bias is not None else weight.dtype if weight.is_floating_point() else torch.float32
    x = torch.randn(3, site.hidden_size, generator=torch.Generator().manual_seed(0)).to(weight.device, dtype)
    with torch.no_grad():
        try:
            expected = module(x[None])[0].float()
        except TypeError:  # its forward takes more than the input, a residual say
            return False
        found = site.down.module(site.activate([up.module(x) for up in site.ups])).float()
    return bool(torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())))


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
