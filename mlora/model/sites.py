"""The places of a frozen Hugging Face model that adapters can take, found by what they are and do, not by family.

Every family's attention, cache, norms and generation stay transformers' own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlora.adapters import BlockSite, EmbeddingSite, LinearSite
from mlora.model.adapter import Adapter
from mlora.model.block import AdaptedBlock
from mlora.model.embeddings import AdaptedEmbedding, obstacle
from mlora.model.errors import ModelError
from mlora.model.linear import AdaptedLinear
from mlora.model.scope import Scope

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
