"""One adapter's trainable tensors, and their names in files."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mlora import ops
from mlora.adapters import BlockSite, EmbeddingSite, Init, LinearSite, Method
from mlora.model.errors import ModelError
from mlora.model.head import HEAD, head_name

EMBEDDINGS = ("lora_embedding_A", "lora_embedding_B")
"""Tensors of input embeddings, parameters and no modules in PEFT, whose names in files so end there."""

Site = LinearSite | BlockSite | EmbeddingSite

log = logging.getLogger(__name__)


class Adapter(nn.Module):
    """The tensors that a method declares at the sites it takes, and a classification head, all float32.

    Attributes:
        name: of the adapter.
        method: its typed config.
        seed: of its initial values and of its dropout.
        tensors: by site path and declared name.
        blocks: feed-forward blocks it spans, by path.
        head: [labels, D], without a bias, as `score` of transformers' sequence classifiers; None where there is none.
        head_task: name of the task that the head is trained for; None where that is not known.
    """

    head: nn.Parameter | None

    def __init__(
        self,
        name: str,
        method: Method,
        singles: Sequence[LinearSite | EmbeddingSite],
        blocks: list[BlockSite],
        seed: int,
        device: torch.device,
        head: Init | None = None,
    ) -> None:
        super().__init__()
        self.name, self.method, self.seed = name, method, seed
        self.tensors: dict[str, dict[str, nn.Parameter]] = {}
        self.inits: dict[str, dict[str, Init]] = {}
        self.layers: dict[str, int] = {}
        self.blocks = {b.path: _with_activation(b, method.activation) for b in blocks}
        declared: list[tuple[Site, dict[str, Init]]] = [(site, _single(method, site)) for site in singles]
        declared += [(block, method.block_parameters(block)) for block in blocks]
        for site, inits in declared:
            if inits:
                self._add(site, inits, seed, device)
        self.blocks = {path: block for path, block in self.blocks.items() if path in self.tensors}
        key = ops.stable_hash(seed, name, HEAD)
        self.head = None if head is None else nn.Parameter(initial(head, key, device))
        self.head_task: str | None = None

    @property
    def num_labels(self) -> int | None:
        """Classes of the head; None where there is none."""
        return None if self.head is None else len(self.head)

    def _add(self, site: Site, inits: dict[str, Init], seed: int, device: torch.device) -> None:
        self.inits[site.path], self.layers[site.path] = inits, site.layer
        self.tensors[site.path] = {}
        for name, init in inits.items():
            key = ops.stable_hash(seed, self.name, site.path, name)
            # contiguous, as what a checkpoint brings back of an optimizer: a fused one takes both for laid out alike
            parameter = nn.Parameter(initial(init, key, device, site).contiguous(), requires_grad=init.trainable)
            self.tensors[site.path][name] = parameter
            self.register_parameter(f"{site.path}.{name}".replace(".", ":"), parameter)

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Return (declared name, parameter) of what an optimizer changes, stacked tensors whole."""
        named = [(name, p) for tensors in self.tensors.values() for name, p in tensors.items() if p.requires_grad]
        return named if self.head is None else [*named, (HEAD, self.head)]

    def _unpacked(self, tensors: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
        """Return something of every parameter under the names of a file, stacked ones taken apart."""
        unpacked = {}
        for path, own in self.tensors.items():
            found = {name: tensors(p) for name, p in own.items()}
            if all(tensor is None for tensor in found.values()):
                continue
            filled = {name: torch.zeros_like(own[name]) if t is None else t for name, t in found.items()}
            for name, tensor in self.method.to_file(filled).items():
                parts = tensor if self.inits[path][name].stacked else [tensor]
                for number, part in enumerate(parts):
                    expert = f"experts.{number}." if self.inits[path][name].stacked else ""
                    unpacked[self._file_name(path, name, expert)] = part
        if self.head is not None and (head := tensors(self.head)) is not None:
            unpacked[head_name(self.method)] = head
        return unpacked

    def _file_name(self, path: str, name: str, expert: str = "") -> str:
        prefix = self.method.file_prefix
        if self.method.peft_type != "LORA":  # the predecessors' names leave out what lies above the decoder layers
            layer = self.layers[path]
            path = f"layers.{layer}.{path.partition(f'.{layer}.')[2]}"
        whole = name if name in ("lora_magnitude_vector", *EMBEDDINGS) else f"{name}.weight"
        leaf = "moe_gate.weight" if name == "router" else whole
        return f"{prefix}.{path}.{expert}{leaf}"

    def file_tensors(self) -> dict[str, Tensor]:
        """Return the tensors as files hold them."""
        return self._unpacked(lambda parameter: parameter.detach())

    def file_gradients(self) -> dict[str, Tensor]:
        """Return the gradients under the names of `file_tensors`; zero where a layer's tensor got none."""
        return self._unpacked(lambda parameter: parameter.grad)

    @torch.no_grad()
    def load_file_tensors(self, tensors: dict[str, Tensor], source: str) -> None:
        """Copy tensors named as in a file into the adapter.

        The predecessors leave DoRA's magnitudes out of their files; where all are missing, each stays at the row
        norms of its frozen weight, with a warning.

        Raises:
            ModelError: tensors are missing, superfluous, or of another shape.
        """
        own = self.file_tensors()
        magnitudes = {name for name in own if name.endswith("lora_magnitude_vector")}
        if magnitudes and magnitudes.isdisjoint(tensors):
            log.warning("%s: holds no DoRA magnitudes; each starts at the row norms of its frozen weight", source)
            own = {name: tensor for name, tensor in own.items() if name not in magnitudes}
        problems = [f"missing {name}" for name in own if name not in tensors]
        problems += [f"unexpected {name}" for name in tensors if name not in own]
        problems += [
            f"{name} is {list(tensors[name].shape)}, the base model needs {list(own[name].shape)}"
            for name in own
            if name in tensors and tensors[name].shape != own[name].shape
        ]
        if problems:
            more = f" ... and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ModelError(f"{source} does not fit this base model: {'; '.join(problems[:5])}{more}")
        for path, parameters in self.tensors.items():
            stored = self._stored(path, tensors, own)
            for name, tensor in self.method.from_file(stored).items():
                parameters[name].copy_(tensor)
        if self.head is not None:
            self.head.copy_(tensors[head_name(self.method)])

    def _stored(self, path: str, tensors: dict[str, Tensor], wanted: Container[str]) -> dict[str, Tensor]:
        """Return what a file holds of one site, by declared name, experts stacked again."""
        stored = {}
        for name in self.method.to_file(self.tensors[path]):
            if not self.inits[path][name].stacked:
                names = [self._file_name(path, name)]
            else:
                names = [self._file_name(path, name, f"experts.{i}.") for i in range(self.inits[path][name].shape[0])]
            if names[0] in wanted:
                parts = [tensors[n] for n in names]
                stored[name] = torch.stack(parts) if self.inits[path][name].stacked else parts[0]
        return stored


def _single(method: Method, site: LinearSite | EmbeddingSite) -> dict[str, Init]:
    """Declare the tensors of what is adapted by itself."""
    return method.linear_parameters(site) if isinstance(site, LinearSite) else method.embedding_parameters(site)


def initial(init: Init, key: int, device: torch.device, site: Site | None = None) -> Tensor:
    """Return a tensor drawn from its declared distribution; drawn on the CPU, so equal on every device."""
    if device.type == "meta":
        return torch.empty(init.shape, device=device)
    if init.kind == "row_norms" and isinstance(site, LinearSite):
        return ops.squared_row_norms(site.module).sqrt().expand(init.shape).clone()
    if init.kind in ("principal_A", "principal_B") and isinstance(site, LinearSite):
        a, b = ops.principal_directions(site.module, min(init.shape), init.scale)
        return a if init.kind == "principal_A" else b
    generator = torch.Generator().manual_seed(key & 0xFFFFFFFF)
    tensor = torch.zeros(init.shape)
    if init.kind == "normal":
        tensor.normal_(0.0, init.scale, generator=generator)
    elif init.kind == "kaiming":
        bound = (6 / ((1 + init.scale**2) * init.shape[-1])) ** 0.5
        tensor.uniform_(-bound, bound, generator=generator)
    return tensor.to(device)


def _with_activation(block: BlockSite, name: str | None) -> BlockSite:
    if name is None:
        return block
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ModelError(f"act_fn: {name!r} is not an activation of transformers; allowed: {', '.join(sorted(ACT2FN))}")
    return replace(block, activation=ACT2FN[name])
