"""A whole forward and backward as one CUDA graph, launched once: a small model's thousands of kernels wait for Python.

A graph knows shapes, not values, so a batch is brought to one of a few sizes first (`sizes.py`): every adapter gets as
many tokens, sequences and targets as any other. What is missing is filled by more sequences without targets behind
the adapter's own, which no router loss counts and no other sequence sees. Lengths, targets, random keys and the
weights of the losses are data. The first batch of a size records its graph; later ones copy their data in and replay.

Shapes: S adapters, n tokens, m sequences and t targets of each; T = S n packed tokens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlora import ops
from mlora.adapters import Method, Segment
from mlora.model.attention import PACKED, fits_varlen
from mlora.model.batch import Row
from mlora.model.inputs import Inputs, Weights, prepare
from mlora.model.multi import MultiAdapterModel
from mlora.model.scope import Flight
from mlora.model.sizes import Size, Sizes, size_for

log = logging.getLogger(__name__)

FILLING = 1.5
"""Filled up, a batch may have this many times its own tokens; otherwise it is computed as it is."""
FREE_PRODUCTS = 10**12
"""Tokens filled up times parameters of the base model that matter nothing: 4 FLOP each are about 10 ms of a GPU, and a
batch of many adapters that is not recorded waits for Python for much longer."""

MOST = 64
"""Graphs of one training; beyond that batches differ too much to gain from them."""


class Losses(NamedTuple):
    """An adapter's part of the objective, its two terms apart."""

    loss: Tensor
    aux_loss: Tensor


class Computed(NamedTuple):
    """What a forward and backward leaves of an adapter besides gradients.

    Attributes:
        losses: its part of the objective.
        router_logits: [n, E] float32 of each router, by site path.
    """

    losses: Losses
    router_logits: Mapping[str, Tensor]


def compute(
    model: MultiAdapterModel, names: Sequence[str], size: Size, inputs: Inputs
) -> tuple[list[Computed], list[nn.Parameter], list[Tensor]]:
    """Return what is left of every adapter, and all trained parameters with their gradients; nothing waits."""
    segments = [
        Segment(name, i * size.tokens, (i + 1) * size.tokens, inputs.keys[i * size.tokens : (i + 1) * size.tokens],
                router_logits={})
        for i, name in enumerate(names)
    ]  # fmt: skip
    hidden = model.hidden_states(
        Flight(segments),
        input_ids=inputs.input_ids[None],
        position_ids=inputs.position_ids[None],
        attention_mask=torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=inputs.input_ids.device),
        packed_offsets=inputs.offsets.view(-1),  # a tensor of this run alone: layers share what is made of it
        packed_longest=size.longest,
        use_cache=False,
    )
    losses = model.token_losses(hidden[inputs.positions], inputs.targets) * inputs.counted
    found = []
    for i, (segment, name) in enumerate(zip(segments, names, strict=True)):
        tokens, targets, ends = (slice(i * n, (i + 1) * n) for n in (size.tokens, size.targets, size.sequences))
        score = model.adapter_module(name).head
        if score is None:
            own = losses[targets].sum()
        else:
            logits = F.linear(hidden[inputs.ends[ends]].float(), score)
            own = (F.cross_entropy(logits, inputs.classes[ends], reduction="none") * inputs.judged[ends]).sum()
        method = model.adapters[name]
        aux = method.aux_loss(list((segment.router_logits or {}).values()), inputs.real[tokens])
        found.append(Losses(own, own.new_zeros(()) if aux is None else aux * inputs.auxiliary[i]))
    parameters = [p for name in names for _, p in model.adapter_parameters(name)]
    objective = torch.stack([part for own in found for part in own]).sum()
    gradients = torch.autograd.grad(objective, parameters, allow_unused=True)
    used = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
    left = [
        Computed(
            Losses(own.loss.detach(), own.aux_loss.detach()),
            {path: logits.detach() for path, logits in (segment.router_logits or {}).items()},
        )
        for own, segment in zip(found, segments, strict=True)
    ]
    return left, [p for p, _ in used], [g for _, g in used]


class _Tools(NamedTuple):
    """What a graph works with besides its inputs.

    Attributes:
        parameters: that get gradients.
        casts: of matrices, renewed.
        sums: of gradients that were computed elsewhere than in their places.
    """

    parameters: list[nn.Parameter]
    casts: ops.Copies
    sums: ops.Copies


class _Recorded(NamedTuple):
    replay: Callable[[], None]
    inputs: Inputs
    computed: list[Computed]
    tools: _Tools


class Graphs:
    """The graphs of a model, by the adapters and the size of a batch.

    Args:
        model: on a CUDA device.
        sizes: that batches are brought to; one that fits into none of them is brought to a near one.
    """

    def __init__(self, model: MultiAdapterModel, sizes: Sizes | None = None) -> None:
        self.model, self.sizes = model, sizes or {}
        self._recorded: dict[tuple[Any, ...], _Recorded] = {}
        self.sums, self._casts = ops.Sums(), ops.Casts()
        self._copies: dict[nn.Parameter, Tensor] = {}  # of gradients to which others are added
        self._names: tuple[str, ...] = ()
        self._pool: Any = None
        self._broken = False

    @cached_property
    def obstacle(self) -> str | None:
        """Why no step of this model can be recorded; None where it can."""
        model = self.model
        config = model.hf_model.config.get_text_config()
        if model.sharded:
            return "the base model is sharded"
        if not model.outputs_plainly:
            return "the family does more to its logits than its output layer"
        if config._attn_implementation != PACKED or model.padded:
            return "its attention is not the packed one"
        if any(not parameter.is_floating_point() for parameter in model.hf_model.parameters()):
            return "the base model is quantised"
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") in ("longrope", "dynamic"):
            return "its rotary embedding asks for the longest position"
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        query = torch.empty(0, width, dtype=model.hf_model.dtype, device=model.device)
        if not fits_varlen(query, query, None, getattr(config, "attn_logit_softcapping", None), 1):
            return f"no attention kernel for sequences of any length in {query.dtype} with heads of {width}"
        return None

    @cached_property
    def _parameters(self) -> int:
        return self.model.num_parameters(None)

    def suits(self, rows: Mapping[str, Sequence[Row]]) -> bool:
        """Return whether a batch can be computed so, without being filled up beyond measure."""
        if self._broken or self.obstacle is not None:
            return False
        model, size = self.model, size_for(rows)
        own = sum(len(row.input_ids) for each in rows.values() for row in each)
        window = getattr(model.hf_model.config.get_text_config(), "sliding_window", None)
        longest = max(len(row.input_ids) for each in rows.values() for row in each)
        filled = size.tokens * len(rows)
        return (
            (filled <= FILLING * own or (filled - own) * self._parameters <= FREE_PRODUCTS)
            and (window is None or longest <= window)
            and not model.adapts_output(rows)
            and not model.adapts_embeddings(rows)  # the sort in their backward was never recorded on a device
            and not any(model.adapters[name].counts_tokens for name in rows)
        )

    @property
    def casts(self) -> ops.Casts | None:
        """Casts that last; None where layers are computed again: then their casts are as well, and take no memory."""
        return self._casts if self.model.recompute.what == "none" else None

    def compute(
        self, names: Sequence[str], size: Size, inputs: Inputs
    ) -> tuple[list[Computed], list[nn.Parameter], list[Tensor]]:
        """Compute a step once, as a graph of it would, and return what `compute` does."""
        self.sums.begin()
        with self.model.scope.with_lasting(ops.Lasting(self.casts, self.sums)):
            return compute(self.model, names, size, inputs)

    def size_for(self, rows: Mapping[str, Sequence[Row]]) -> Size:
        """Return the size that a batch is brought to."""
        near = size_for(rows)
        return next((size for size in self.sizes.get(frozenset(rows), ()) if size.holds(near)), near)

    def losses_and_gradients(
        self, rows: Mapping[str, Sequence[Row]], steps: Mapping[str | None, int], weights: Mapping[str, Weights]
    ) -> dict[str, Computed] | None:
        """Add the gradients of the weighted losses to the adapters' and return the rest; None where none is recorded.

        What is returned is good until the next call. Router logits are of the rows' own tokens, without filling.

        Args:
            rows: of each adapter.
            steps: optimizer step of each, a part of its random stream.
            weights: of its losses.
        """
        forms: dict[Method, int] = {}  # adapters of one form side by side: one launch then serves all of them
        order = sorted(rows, key=lambda name: forms.setdefault(self.model.adapters[name], len(forms)))
        rows = {name: rows[name] for name in order}
        if tuple(rows) != self._names:  # jobs end: what was recorded with them will not come again
            self.forget()
            self._names = tuple(rows)
        size = self.size_for(rows)
        inputs = prepare(self.model, rows, steps, weights, size)
        adapters = tuple(self.model.adapter_module(name) for name in rows)
        self._take_back(rows)
        key = (size, adapters, tuple(adapter.method for adapter in adapters), *self.model.modes)
        recorded = self._recorded.get(key)
        if recorded is None:
            recorded = self._record(list(rows), size, inputs) if len(self._recorded) < MOST else None
            if recorded is None:
                return None
            self._recorded[key] = recorded
        recorded.inputs.copy_(inputs)
        recorded.replay()
        sums = [(parameter, self.sums[parameter]) for parameter in recorded.tools.parameters]
        before = [(parameter.grad, own) for parameter, own in sums if parameter.grad is not None]
        if before:
            torch._foreach_add_(*map(list, zip(*before, strict=True)))
        for parameter, own in sums:
            if parameter.grad is None:
                parameter.grad = own  # lent until the next replay
        found = {}
        for name, computed in zip(rows, recorded.computed, strict=True):
            tokens = sum(len(row.input_ids) for row in rows[name])  # the filling lies behind them
            logits = {path: logits[:tokens] for path, logits in computed.router_logits.items()}
            found[name] = computed._replace(router_logits=logits)
        return found

    def _take_back(self, names: Iterable[str]) -> None:
        """Copy gradients of these adapters that were lent, before a replay writes others in their places."""
        every = [p for name in names for _, p in self.model.adapter_parameters(name)]
        lent = [p for p in every if p.grad is not None and p.grad is self.sums.get(p)]
        self._copies |= {p: torch.empty_like(p) for p in lent if p not in self._copies}
        if lent:
            torch._foreach_copy_([self._copies[p] for p in lent], [self.sums[p] for p in lent])
        for p in lent:
            p.grad = self._copies[p]

    def forget(self) -> None:
        """Give the memory of all graphs back."""
        self._recorded.clear()
        self.sums, self._casts, self._copies = ops.Sums(), ops.Casts(), {}
        self._pool = None

    def _record(self, names: list[str], size: Size, inputs: Inputs) -> _Recorded | None:
        began = time.perf_counter()
        try:
            own = Inputs.of_size(len(names), size, device=self.model.device)
            own.copy_(inputs)
            inputs = own
            tools = self._prepare(names, size, inputs)
            captured = self._capture(lambda: self._run(names, size, inputs, tools), inputs)
            recorded = _Recorded(*captured, tools)
            seconds = time.perf_counter() - began
            log.info("a step of %d adapters x %d tokens is recorded, in %.1f s", len(names), size.tokens, seconds)
            return recorded
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever cannot be recorded can still be computed
            self._broken = True
            self.forget()
            why = str(error).partition("\n")[0]
            log.warning("steps run without CUDA graphs: %s", why)
            return None

    def _prepare(self, names: list[str], size: Size, inputs: Inputs) -> _Tools:
        """Run once, so that kernels are compiled and libraries set up, and make what a graph reads and may not hold."""
        _, parameters, gradients = self.compute(names, size, inputs)
        casts, sums = self._cast(), self._elsewhere(parameters, gradients)
        tools = _Tools(parameters, ops.joint_copies(casts), ops.joint_copies(sums))
        tools.casts.launch(casts)
        tools.sums.launch(sums)
        return tools

    def _cast(self) -> ops.Pairs:
        return [] if self.casts is None else self.casts.pairs()

    def _elsewhere(self, parameters: list[nn.Parameter], gradients: list[Tensor]) -> ops.Pairs:
        """Return gradients that are not in their places, and these."""
        pairs = [(gradient, self.sums[p]) for p, gradient in zip(parameters, gradients, strict=True)]
        return [(gradient, own) for gradient, own in pairs if gradient.data_ptr() != own.data_ptr()]

    def _run(
        self, names: list[str], size: Size, inputs: Inputs, tools: _Tools
    ) -> tuple[list[Computed], list[Callable[[], None]]]:
        """Compute, leave the gradients in their places, and return what completes the copies once it is recorded."""
        first = tools.casts.launch(self._cast())
        computed, parameters, gradients = self.compute(names, size, inputs)
        return computed, [first, tools.sums.launch(self._elsewhere(parameters, gradients))]

    def _capture(
        self, run: Callable[[], tuple[list[Computed], list[Callable[[], None]]]], inputs: Inputs
    ) -> tuple[Callable[[], None], Inputs, list[Computed]]:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            computed, complete = run()
        for each in complete:
            each()
        return graph.replay, inputs, computed
