"""A model without weights, whose tensors have shapes and no data, and a count of the bytes that they stand for."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from mlora import ops
from mlora.model.block import AdaptedBlock
from mlora.model.linear import AdaptedLinear
from mlora.model.multi import MultiAdapterModel


class Count(TorchDispatchMode):
    """Adds up the storages that operations make while they live.

    Attributes:
        now, peak: bytes, and the most there were.
        kept: bytes when the first backward began.
    """

    def __init__(self, block: int) -> None:
        super().__init__()
        self.now = self.peak = self.kept = 0
        self._block, self._turned, self._ignores = block, False, False
        self._live: dict[int, weakref.ref[Any]] = {}

    def add(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors that are there; return the bytes that they add."""
        before = self.now
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._live:
                size = 0 if self._ignores else -(-storage.nbytes() // self._block) * self._block
                self._live[key] = weakref.ref(storage, partial(self._drop, key, size))
                self.now += size
        self.peak = max(self.peak, self.now)
        return self.now - before

    def empty(self, *shape: Any, **how: Any) -> Tensor:
        """Return a tensor as `torch.empty` does which is not counted."""
        self._ignores = True
        try:
            return torch.empty(*shape, **how)
        finally:
            self._ignores = False

    def _drop(self, key: int, size: int, _: object) -> None:
        del self._live[key]
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._turned and torch._C._current_autograd_node() is not None:
            self._turned, self.kept = True, self.now
        if func is torch.ops.aten.logsumexp.default:  # makes x - max(x) inside
            self.peak = max(self.peak, self.now + args[0].nbytes)
        out = func(*args, **kwargs or {})
        self.add(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


def replace_tensors(model: MultiAdapterModel, mode: FakeTensorMode) -> None:
    """Put tensors without data, which take the CPU for their device, in place of a model's on the meta device."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # what was replaced lives as long, so that its id is its own

    def replaced(tensor: Any) -> Any:
        if tensor is None:
            return None
        if id(tensor) not in made:
            fake: Any = FakeTensor(mode, torch.empty_like(tensor, requires_grad=False), torch.device("cpu"))
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            made[id(tensor)] = fake, tensor
        return made[id(tensor)][0]

    held: list[dict[str, Any]] = [own for m in model.modules() for own in (m._parameters, m._buffers)]
    held += [own for name in model.adapters for own in model.adapter_module(name).tensors.values()]
    for own in held:
        own.update({name: replaced(tensor) for name, tensor in own.items()})


def keep_inputs_alone(module: nn.Module) -> None:
    """Let what torch's compiler gets of a decoder layer keep what it reads: its modules without adapted ones inside."""
    for child in module.children():
        if isinstance(child, AdaptedLinear | AdaptedBlock):
            continue
        if any(isinstance(inner, AdaptedLinear | AdaptedBlock) for inner in child.modules()):
            keep_inputs_alone(child)
        elif next(child.parameters(), None) is not None:
            child.forward = partial(checkpoint, child.forward, use_reentrant=False, preserve_rng_state=False)


def quantise(hf_model: Any, quantization: str) -> list[Tensor]:
    """Give every linear layer but the output layer a weight as bitsandbytes keeps it; return what belongs to these."""
    scales = []
    output = hf_model.get_output_embeddings()
    output = output.frozen if isinstance(output, AdaptedLinear) else output
    for layer in hf_model.modules():
        if not isinstance(layer, nn.Linear) or layer is output:
            continue
        shape, dtype, count = layer.weight.shape, layer.weight.dtype, layer.weight.numel()
        quantised: Any
        if quantization == "8bit":
            quantised = nn.Parameter(torch.empty(shape, dtype=torch.int8), requires_grad=False)
            quantised.SCB = torch.empty(shape[0])
            scales.append(quantised.SCB)
        else:
            from bitsandbytes.functional import QuantState

            quantised = nn.Parameter(torch.empty(-(-count // 2), 1, dtype=torch.uint8), requires_grad=False)
            blocks = -(-count // 64)
            second = QuantState(torch.empty(-(-blocks // 256)), None, torch.empty(256), 256, dtype=torch.float32)
            of_blocks = torch.empty(blocks, dtype=torch.uint8)
            quantised.quant_state = QuantState(
                of_blocks, shape, torch.empty(16), 64, "nf4", dtype, offset=torch.empty(()), state2=second
            )
            scales += [of_blocks, second.absmax]
        layer.weight = quantised
        layer.forward = partial(_Dequantised.apply, layer)  # type: ignore[method-assign]
    return scales


class _Dequantised(torch.autograd.Function):
    """W x + b with the weight made whole in both directions, and not kept."""

    @staticmethod
    def forward(ctx: Any, layer: nn.Linear, x: Tensor) -> Tensor:
        ctx.layer = layer
        return F.linear(x, ops.frozen_weight(layer).to(x.dtype), layer.bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad @ ops.frozen_weight(ctx.layer).to(grad.dtype)


def passes_outputs_on(hf_model: Any) -> bool:
    """Return whether a model's logits are what its output layer returns."""
    returned: list[Tensor] = []
    hook = hf_model.get_output_embeddings().register_forward_hook(lambda _, __, out: returned.append(out))
    try:
        logits = hf_model(input_ids=torch.zeros(1, 3, dtype=torch.int64), use_cache=False).logits
    finally:
        hook.remove()
    return [out.untyped_storage()._cdata for out in returned] == [logits.untyped_storage()._cdata]


@contextmanager
def first_layers(layers: Sequence[nn.Module], model: nn.Module, count: int) -> Iterator[None]:
    """Leave only the first decoder layers in a model, within the block."""
    holder = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and list(m) == list(layers))
    every = holder._modules
    holder._modules = dict(islice(every.items(), count))
    try:
        yield
    finally:
        holder._modules = every
