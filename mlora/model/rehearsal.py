"""What memory a training step takes, found by taking it with tensors that have shapes and no data.

The step is the real one, with its segments, kernels' buffers, recomputed layers and loss in chunks; only the arithmetic
is left out. Every storage is counted from the operation that makes it to the moment when nothing refers to it. So
nothing is estimated that the code itself decides, and what changes there changes here. Of decoder layers that are all
alike, three take the step: what the third adds to two, each further one adds; the first is not like the others, since
its input needs no gradient.

Not seen is what libraries take inside one operation, for the length of it. What torch's compiler would make of norms
is said by a rule: a compiled one keeps what it reads and computes the rest again, as its partitioner decides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mlora import ops
from mlora.model.batch import Batch, Row
from mlora.model.graphs import Graphs
from mlora.model.inputs import Inputs
from mlora.model.multi import MultiAdapterModel
from mlora.model.recompute import Recompute
from mlora.model.sizes import Sizes
from mlora.model.weightless import (
    Count,
    first_layers,
    keep_inputs_alone,
    passes_outputs_on,
    quantise,
    replace_tensors,
)

BLOCK_BYTES = 512
"""What torch's allocator rounds up to on a GPU."""
WORKSPACE_BYTES = 1 << 25
"""What torch sets aside for cuBLAS on an H100, beside the tensors."""

_NO_SIZES: Sizes = {}


class Footprint(NamedTuple):
    """Bytes at the peak of a training step, in parts.

    Attributes:
        base: frozen weights.
        adapters: trained weights, what the optimizer keeps of them, and gradients that last longer than a backward.
        activations: what a forward leaves for its backward.
        rest: what is needed for a moment, the loss and single operations, or gradients where they are more.
    """

    base: int
    adapters: int
    activations: int
    rest: int

    @property
    def total(self) -> int:
        """The peak."""
        return sum(self)


class Rehearsal:
    """Training steps of a model without weights.

    Args:
        model: on the meta device, its adapters added; its tensors are replaced.
        device: type of the device that steps will run on, "cpu" or "cuda".
        compiled: whether decoder layers will be compiled.
        quantization: of the base model, None, "4bit" or "8bit".
    """

    def __init__(
        self, model: MultiAdapterModel, device: str, compiled: bool = False, quantization: str | None = None
    ) -> None:
        self.model, self.device = model, device
        self._mode = FakeTensorMode()
        self._taken: dict[Any, tuple[_Situation, _Taken]] = {}
        replace_tensors(model, self._mode)
        self._scales: list[Tensor] = []
        if quantization is not None:
            with self._mode:
                self._scales = quantise(model.hf_model, quantization)
        if compiled:
            for layer in model.sites.layers:
                keep_inputs_alone(layer)
        with self._mode, ops.standing_for(device), model.sites.only_called():
            model.outputs_plainly = passes_outputs_on(model.hf_model)
        model.train()
        self._frozen = [*model.hf_model.parameters(), *model.hf_model.buffers()]

    def step(
        self,
        rows: Mapping[str, Sequence[Row]],
        recompute: Recompute,
        optimizer_bytes: int = 0,
        accumulates: bool = False,
        sizes: Sizes | None = None,
    ) -> Footprint:
        """Take a step and return its memory.

        Args:
            rows: of a micro-batch, for each adapter in it.
            recompute: what backward computes again.
            optimizer_bytes: that the optimizers of all adapters keep.
            accumulates: whether gradients of an earlier micro-batch are there already.
            sizes: that batches of the training are brought to where steps are recorded.
        """
        begun = _Situation(rows, accumulates, _NO_SIZES if sizes is None else sizes)
        layers = len(self.model.sites.layers)
        if layers < 5 or not self._layers_are_alike:
            taken = self._take(begun, layers, recompute)
            return Footprint(taken.base, taken.adapters + optimizer_bytes, taken.kept, taken.rest)

        def take(count: int, again: int | None) -> _Taken:
            return self._take(begun, count, Recompute("none") if again == 0 else Recompute(recompute.what, again))

        again = 0 if recompute.what == "none" else min(layers, recompute.layers or layers)
        near, more = take(3, 0), 0  # three layers, and what the others keep
        if again == layers:
            near = take(3, None)
            more = (layers - 3) * (near.kept - take(2, None).kept)
        else:
            each = near.kept - take(2, 0).kept
            near = take(3, min(again, 2))
            more = (layers - 3) * each
            if again > 2:
                more += (again - 2) * (near.kept - take(2, 1).kept - each)
        # at the end of the backward gradients of all layers are there, and what these have kept is not
        peak = near.kept + near.rest + max(more, near.fresh)
        return Footprint(near.base, near.adapters + optimizer_bytes, near.kept + more, peak - near.kept - more)

    def _take(self, begun: _Situation, layers: int, recompute: Recompute) -> _Taken:
        """Take a step of the first layers alone, or return what it took."""
        key = begun.key, layers, recompute
        if key not in self._taken:
            with first_layers(self.model.sites.layers, self.model.hf_model, layers):
                self._taken[key] = begun, self._measure(begun, layers, recompute)
        return self._taken[key][1]

    def _measure(self, begun: _Situation, layers: int, recompute: Recompute) -> _Taken:
        rows, accumulates, sizes = begun
        model, cuda = self.model, self.device == "cuda"
        model.recompute = recompute
        trained = [p for name in rows for _, p in model.adapter_parameters(name)]
        count = Count(BLOCK_BYTES if cuda else 1)
        base = count.add(chain(self._frozen, self._scales))
        adapters = count.add(model.adapter_modules.parameters())
        graphs = Graphs(model, sizes)
        graphs.sums = ops.Sums(count.empty)  # counted by the adapters, of all layers
        packed = Batch.pack([row for own in rows.values() for row in own], dict.fromkeys(rows, 0))
        with self._mode, ops.standing_for(self.device), count:
            recorded = cuda and graphs.suits(rows)
            lasting = [torch.empty_like(p) for p in trained * (recorded + accumulates)]
            adapters = count.now - base
            if recorded:
                size = graphs.size_for(rows)
                graphs.compute(list(rows), size, Inputs.of_size(len(rows), size, device=model.device))
            else:
                for parameter, gradient in zip(trained, lasting if accumulates else (), strict=False):
                    parameter.grad = gradient
                outputs = model(packed.map(self._mode.from_tensor)).values()
                torch.stack([output.loss + output.aux_loss for output in outputs]).sum().backward()
        for parameter in trained:
            parameter.grad = None
        kept = count.kept - base - adapters
        rest = count.peak - count.kept + (WORKSPACE_BYTES if cuda else 0)
        above = sum(p.nbytes for p in self._trained(rows, layers, math.inf))
        fresh = 0 if accumulates else above
        if recorded:  # gradients are fresh but for those in places, in layers above as in those that took the step;
            trained_here = self._trained(rows, 0, layers)
            elsewhere = sum(p.nbytes for p in trained_here if graphs.sums.get(p) is None)
            fresh = above * elsewhere // max(1, sum(p.nbytes for p in trained_here))
            if graphs.casts is not None:  # and casts, half of what they are made of
                fresh += above // 2
        return _Taken(base, adapters, kept, rest, fresh)

    def _trained(self, rows: Mapping[str, Sequence[Row]], first: int, stop: float) -> list[Tensor]:
        """Return what is trained in these layers."""
        adapters = [self.model.adapter_module(name) for name in rows]
        inside = ((a, path) for a in adapters for path, layer in a.layers.items() if first <= layer < stop)
        return [p for a, path in inside for p in a.tensors[path].values() if p.requires_grad]

    @cached_property
    def _layers_are_alike(self) -> bool:
        """Whether each of the decoder layers takes what any other does."""
        layers, config = self.model.sites.layers, self.model.hf_model.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or [None] * len(layers)
        trained: list[set[Any]] = [set() for _ in layers]
        for name in self.model.adapters:
            adapter = self.model.adapter_module(name)
            for path, number in adapter.layers.items():
                inside = path.partition(f".{number}.")[2]
                trained[number].update((name, inside, own, p.shape) for own, p in adapter.tensors[path].items())
        forms = [
            (type(layer), kind, own, [(name, p.shape, p.dtype) for name, p in layer.named_parameters()])
            for layer, kind, own in zip(layers, kinds, trained, strict=True)
        ]
        return all(form == forms[0] for form in forms)


class _Situation(NamedTuple):
    rows: Mapping[str, Sequence[Row]]
    accumulates: bool
    sizes: Sizes

    @property
    def key(self) -> tuple[int, bool, int]:
        """What tells it from others while it lives."""
        return id(self.rows), self.accumulates, id(self.sizes)


class _Taken(NamedTuple):
    """Bytes of a step of some layers, by the parts of `Footprint`.

    Attributes:
        fresh: gradients that the backward of the layers left out would make.
    """

    base: int
    adapters: int
    kept: int
    rest: int
    fresh: int
