"""What an adapter method is: a frozen config whose functions compute with tensors that it declared.

A method file holds one class. Its fields are the keys of the JSON config; `linear_parameters` and
`block_parameters` declare the tensors it adds at one place of the base model; `linear` and `block` are
pure functions of those tensors. It never imports torch at the top, so that the command line can
validate a config without paying for it; numeric work goes through `mlora.ops`.

Shapes: n tokens of a segment, D inputs, O outputs, I hidden units of a feed-forward block, r rank,
E experts, k experts per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from mlora import ops

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mlora.ops.lowrank import BlockUpdate, LowRankUpdate

GROUPS = ("all-linear", "attention", "mlp")
"""Groups of linear layers that `target_modules` may name."""
Distribution = Literal["zeros", "normal", "kaiming", "row_norms", "principal_A", "principal_B"]

METHODS: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[type[Method]], type[Method]]:
    """Make a method available under its name, the value of `routing_strategy` ("lora" where there is none).

    A method that says no `peft_type` and `file_prefix` of its own gets its name: those of a registered method that it
    extends would have its files read as that method's.
    """

    def add(cls: type[Method]) -> type[Method]:
        if name in METHODS:
            raise ValueError(f"method {name!r} is already registered by {METHODS[name].__qualname__}")
        cls.method = name
        owner = next(c for c in cls.__mro__ if "peft_type" in vars(c))
        if owner is Method or (owner is not cls and owner in METHODS.values()):
            cls.peft_type, cls.file_prefix = name.upper(), name
        METHODS[name] = cls
        return cls

    return add


@dataclass(frozen=True)
class Init:
    """Shape and initial distribution of one trainable tensor.

    Attributes:
        shape: full shape; a leading expert dimension where `stacked`.
        kind: "zeros", "normal" (standard deviation `scale`), "kaiming" (uniform, negative slope `scale`, fan-in the
            last dimension), "row_norms" (of the frozen weight), or "principal_A" and "principal_B" (the product of
            the two, times `scale`, is the frozen weight's best approximation of their rank).
        scale: see `kind`.
        stacked: the first dimension counts experts; files hold one tensor for each.
        trainable: whether an optimizer sees it.
    """

    shape: tuple[int, ...]
    kind: Distribution = "zeros"
    scale: float = 0.0
    stacked: bool = False
    trainable: bool = True


@dataclass(frozen=True, eq=False)
class LinearSite:
    """A linear layer of the frozen base model.

    Attributes:
        path: module path in the Hugging Face model as loaded.
        layer: index of its decoder layer.
        in_features, out_features: D and O.
        module: the frozen layer.
        in_block: whether it belongs to the feed-forward part of its decoder layer, not to what mixes tokens.
    """

    path: str
    layer: int
    in_features: int
    out_features: int
    module: nn.Module
    in_block: bool

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias [O]; None where the layer has none."""
        return self.module.bias  # type: ignore[return-value]

    @property
    def name(self) -> str:
        """Last part of the path, what `target_modules` names."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True, eq=False)
class EmbeddingSite:
    """The input embeddings of the frozen base model.

    Attributes:
        path: module path in the Hugging Face model as loaded.
        layer: -1, of no decoder layer.
        num_embeddings, hidden_size: V and D.
        module: the frozen embeddings, an nn.Embedding.
    """

    path: str
    layer: int
    num_embeddings: int
    hidden_size: int
    module: nn.Module

    @property
    def padding_idx(self) -> int | None:
        """The token whose embedding is not trained; None for none."""
        return self.module.padding_idx  # type: ignore[return-value]

    @property
    def scale(self) -> Tensor | float:
        """The number by which the family multiplies what it looks up."""
        return getattr(self.module, "embed_scale", 1.0)

    @property
    def name(self) -> str:
        """Last part of the path, what `target_modules` names."""
        return self.path.rpartition(".")[2]


@dataclass(frozen=True, eq=False)
class BlockSite:
    """A feed-forward block of the frozen base model, h = activate(ups(x)), y = down(h).

    Attributes:
        path: module path in the Hugging Face model as loaded.
        layer: index of its decoder layer.
        hidden_size: D.
        ups: the linear layers that read the block's input: (gate, up), (gate_up,) or (fc1,).
        down: the linear layer that writes its output.
        activation: the base's elementwise function.
    """

    path: str
    layer: int
    hidden_size: int
    ups: tuple[LinearSite, ...]
    down: LinearSite
    activation: Callable[[Tensor], Tensor]

    def activate(self, ups: Sequence[Tensor]) -> Tensor:
        """Return the hidden units [n, I] from the outputs of `ups`."""
        if len(ups) == 2:
            return self.activation(ups[0]) * ups[1]
        if self.ups[0].out_features == 2 * self.down.in_features:
            gate, up = ups[0].chunk(2, dim=-1)
            return self.activation(gate) * up
        return self.activation(ups[0])


@dataclass
class Segment:
    """The tokens [start, stop) of a flattened batch, all of one adapter.

    Attributes:
        adapter: its name; None for rows of the plain base model.
        start, stop: tokens.
        keys: [n] int32 random-stream key of each token; None where nothing random happens (evaluation).
        real: [n] bool, False at padding; None where every token is real.
        sequence_lengths: tokens of each sequence of the segment, in order.
        router_logits: where routers leave their logits ([tokens, E] float32 of real tokens, by site path),
            for the auxiliary loss and the routing profile; None where nobody asks.
    """

    adapter: str | None
    start: int
    stop: int
    keys: Tensor | None = None
    real: Tensor | None = None
    sequence_lengths: tuple[int, ...] = ()
    router_logits: dict[str, Tensor] | None = field(default=None, repr=False)

    def dropout(self, x: Tensor, p: float, stream: str) -> Tensor:
        """Drop entries of x [n, D] with probability p and scale the rest, by the tokens' keys and the stream's name."""
        if self.keys is None or p == 0.0:
            return x
        return ops.dropout(x, self.keys, p, stream)

    def jitter(self, x: Tensor, noise: float, stream: str) -> Tensor:
        """Multiply x [n, D] by uniform(1 - noise, 1 + noise), out of place, in training."""
        if self.keys is None or noise == 0.0:
            return x
        return ops.jitter(x, self.keys, noise, stream)

    def fold(self, index: Tensor) -> Segment:
        """Return the segment with an independent random stream for each value of index [n], an expert say."""
        return self if self.keys is None else replace(self, keys=ops.fold(self.keys, index))

    def record(self, site: str, logits: Tensor) -> None:
        """Leave router logits [n, E] of a site for the auxiliary loss."""
        if self.router_logits is not None:
            self.router_logits[site] = logits if self.real is None else logits[self.real]


Tensors = Mapping[str, Any]
"""Tensors of one adapter at one site, by their declared names."""

BlockSteps = Generator[Any, Any, Any]
"""`block` as a coroutine: yields what the frozen layers shall read, is sent what they return, returns [n, D]."""


class Method(BaseModel):
    """Base of all methods: what the adapters, the files and the trainer ask of one."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    method: ClassVar[str] = ""
    peft_type: ClassVar[str] = ""
    spans_blocks: ClassVar[bool] = False
    """Whether it computes feed-forward blocks as a whole, by `block`, rather than single linear layers."""
    counts_tokens: ClassVar[bool] = False
    """Whether what a token gets depends on how many came before it in its sequence, padding not among them; then
    generation computes whole sequences at every step, without a cache and without padding."""
    file_prefix: ClassVar[str] = ""
    """First part of tensor names in a saved file."""

    linear_as_data: ClassVar[bool] = True
    """Whether `update` says all that `linear` does; not where a subclass overrides the latter alone."""
    block_as_data: ClassVar[bool] = True
    """The same of `block_update` and `block`."""

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        own = vars(cls)
        if "update" in own or "linear" in own:
            cls.linear_as_data = "update" in own
        if "block_update" in own or not own.keys().isdisjoint(("block", "mix", "linear")):
            cls.block_as_data = "block_update" in own

    target_modules: tuple[str, ...] | Literal["all-linear", "attention", "mlp"] = "all-linear"
    """Names of linear layers, {name: bool}, or a group: "all-linear", "attention", "mlp". A plain LoRA also adapts the
    input embeddings where they are named."""

    @field_validator("target_modules", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        if isinstance(value, dict):
            wrong = [name for name, on in value.items() if not isinstance(on, bool)]
            if wrong:
                raise ValueError(f"expected true or false for {', '.join(map(repr, wrong))}")
            value = [name for name, on in value.items() if on]
        if isinstance(value, str) and value not in GROUPS:
            raise ValueError(f"expected a list of names, {{name: true}}, or one of {', '.join(GROUPS)}")
        if isinstance(value, list | tuple | set):
            if not value:
                raise ValueError("names no module to adapt")
            return tuple(sorted(value))
        return value

    def linear_parameters(self, site: LinearSite) -> dict[str, Init]:
        """Declare the tensors that a targeted linear layer gets; {} for none."""
        raise NotImplementedError

    def update(self, p: Tensors, x: Tensor, site: LinearSite, segment: Segment) -> LowRankUpdate | None:
        """Return what the adapter adds to a layer's output, given its input x [n, D], as data.

        A kernel then computes the updates of all adapters. None where the method does more than add: it overrides
        `linear`.
        """
        return None

    def linear(self, p: Tensors, x: Tensor, out: Tensor, site: LinearSite, segment: Segment) -> Tensor:
        """Return the layer's output [n, O], given its input x [n, D] and the frozen output [n, O]."""
        update = self.update(p, x, site, segment)
        if update is None:
            raise NotImplementedError(f"{type(self).__name__} needs update() or linear()")
        return ops.apply_update(update, segment.dropout(x, update.dropout, site.path), out, site.bias)

    def embedding_parameters(self, site: EmbeddingSite) -> dict[str, Init]:
        """Declare the tensors that input embeddings get where they are named; {} where the method cannot adapt them."""
        return {}

    def embedding(self, p: Tensors, ids: Tensor, out: Tensor, site: EmbeddingSite) -> Tensor:
        """Return the embeddings [n, D] of tokens ids [n] from the frozen ones out [n, D].

        For methods that declare `embedding_parameters`.
        """
        raise NotImplementedError

    def block_parameters(self, site: BlockSite) -> dict[str, Init]:
        """Declare the tensors that a feed-forward block gets; {} where the method adapts single linears only."""
        return {}

    def block(
        self, p: Tensors, experts: Mapping[str, Tensors], x: Tensor, site: BlockSite, segment: Segment
    ) -> BlockSteps:
        """Compute a feed-forward block for methods that declare `block_parameters`.

        A coroutine, so that the frozen products run once for the tokens of all adapters: first it yields the
        input x [n, D] and is sent the frozen outputs of `site.ups` (a tuple), then it yields rows [m, I] and is
        sent the frozen `site.down` of them [m, D]; it returns the block's output [n, D].

        Args:
            p: the tensors of `block_parameters`.
            experts: by linear name, the tensors of `linear_parameters` of the block's targeted linears.
            x: [n, D] input of the block.
            site: the block.
            segment: the tokens.
        """
        raise NotImplementedError

    def block_update(
        self, p: Tensors, experts: Mapping[str, Tensors], x: Tensor, site: BlockSite, segment: Segment
    ) -> BlockUpdate | None:
        """Return what the adapter changes in a gated feed-forward block as data, so that one kernel computes it.

        Takes what `block` takes; `p` is empty for a method that adapts single linears. None where the method does
        something that the kernel cannot: `block` or `linear` then computes it.
        """
        return None

    def for_length(self, tokens: int) -> Method:
        """Return the method with settings that depend on the longest sequence, in tokens, worked out."""
        return self

    @property
    def activation(self) -> str | None:
        """Name of the activation that replaces the base's in feed-forward blocks; None keeps it."""
        return None

    def aux_loss(self, router_logits: Sequence[Tensor], real: Tensor | None = None) -> Tensor | None:
        """Return the auxiliary loss, coefficients applied; None for a method without one.

        Args:
            router_logits: [tokens, E] of every router.
            real: [tokens], 1 at tokens that count; None where all do.
        """
        return None

    def as_saved(self) -> Method:
        """Return the config of what a file holds, where that is not the adapter as it is trained."""
        return self

    def to_file(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return what a file holds of one site's tensors; `from_file` undoes it."""
        return dict(tensors)

    def from_file(self, tensors: Tensors) -> dict[str, Tensor]:
        """Return one site's tensors from what a file holds of them."""
        return dict(tensors)

    def learning_rate_scale(self, parameter: str, loraplus_lr_ratio: float) -> float:
        """Return the factor on the learning rate of a tensor by its declared name (LoRA+)."""
        return loraplus_lr_ratio if parameter in ("lora_B", "lora_magnitude_vector") else 1.0


def scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """Return s of y = W x + s B A x: alpha / r, or alpha / sqrt(r) for rsLoRA (https://arxiv.org/abs/2312.03732)."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)
