"""Several adapters over one frozen base model, in one forward.

Shapes: B rows of L tokens, T packed tokens, V vocabulary, N label positions.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlora import ops
from mlora.adapters import EmbeddingSite, LinearSite, Method, Segment
from mlora.model import files, head, load, probe
from mlora.model.adapter import Adapter
from mlora.model.attention import PACKED, exclude_attention_from_compilation
from mlora.model.batch import Batch
from mlora.model.card import Making
from mlora.model.compiled import compile_forward
from mlora.model.errors import ModelError
from mlora.model.linear import AdaptedLinear
from mlora.model.padded import PaddedRows
from mlora.model.profile import RouterProfile
from mlora.model.recompute import Recompute, What, recompute_in_backward
from mlora.model.rotary import fuse_rotary
from mlora.model.scope import Flight, Scope
from mlora.model.sites import Sites

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from mlora.model.generate import Piece

log = logging.getLogger(__name__)

_TRAINING_ONLY = (
    "lora_dropout",
    "lora_init",
    "ffn_dropout",
    "jitter_noise",
    "router_init_range",
    "router_loss",
    "router_aux_loss_coef",
    "router_z_loss_coef",
)
"""Settings of methods that change how an adapter is trained and not what it computes."""


class AdapterOutput(NamedTuple):
    """What one adapter gets from a forward.

    Attributes:
        loss: mean next-token cross-entropy over the adapter's label positions, of an adapter with a classification
            head the mean cross-entropy over its rows; 0 where there is none.
        aux_loss: the method's auxiliary loss, coefficients applied; 0 for methods without one.
        num_tokens: label positions, or rows of a classification; int64.
        router_logits: [tokens, E] float32 of each router, by site path.
    """

    loss: Tensor
    aux_loss: Tensor
    num_tokens: Tensor
    router_logits: Mapping[str, Tensor]


class MultiAdapterModel(nn.Module):
    """A frozen transformers model and the adapters trained or served over it.

    Args:
        model: any transformers causal language model; wrapped in place.
        origin: where it was loaded from.
        seed: of initial adapter values and of dropout, where an adapter has none of its own.

    Attributes:
        padded: compute batches as padded rows; for families that let packed sequences see each other.
        sharded: ranks hold parts of the decoder layers, so all have to run every forward.
    """

    def __init__(self, model: nn.Module, origin: load.Origin, seed: int = 42) -> None:
        super().__init__()
        self.origin, self.seed = origin, seed
        self.hf_model: Any = model
        self._recompute = Recompute()
        self.padded = self.sharded = False
        self.compiled = False
        self.outputs_plainly = False
        self.scope = Scope()
        self._adapters: dict[str, Adapter] = {}
        self.adapter_modules = nn.ModuleDict()
        self.sites = Sites(model)
        self.sites.wrap(self.scope, self._adapters)
        self._exclude_rotary_from_compilation = fuse_rotary(model)
        for number, layer in enumerate(self.sites.layers):
            compile_forward(layer, lambda: self.compiled)
            recompute_in_backward(layer, self.scope, partial(self._recomputes, "all", number))
        for path, block in self.sites.blocks.items():
            middle = partial(self._recomputes, "middle", block.layer)
            recompute_in_backward(self.hf_model.get_submodule(path), self.scope, middle)
        self._tokenizer: Any = None
        self.train(False)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        dtype: str | torch.dtype = "float32",
        device: str = "cpu",
        quantization: str | None = None,
        attn_implementation: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        seed: int = 42,
        sliding_window: bool = False,
        mesh: DeviceMesh | None = None,
    ) -> MultiAdapterModel:
        """Load a base model, frozen.

        Args:
            name_or_path: folder, hub id, GGUF file, or "smollm2" (a 135M model that a package ships).
            dtype: "float32", "bfloat16" or "float16".
            device: "cpu", "cuda", ...
            quantization: None, "4bit" (nf4) or "8bit".
            attn_implementation: transformers' name; None takes packed attention.
            revision: of the hub repository.
            trust_remote_code: let code from the repository run.
            seed: of initial adapter values and of dropout.
            sliding_window: turn on the window of families that have one switched off (qwen2); a window that the
                model's config has on stays on either way.
            mesh: of ranks that each hold a part of every decoder layer; they call `check_packing` once all have
                loaded. None for the whole model here.

        Raises:
            ModelError: it cannot be loaded or wrapped; the message says what to do.
        """
        kind = getattr(torch, str(dtype).removeprefix("torch."), None)
        if not isinstance(kind, torch.dtype):
            raise ModelError(f"dtype: {dtype!r} is not allowed; allowed: 'float32', 'bfloat16', 'float16'")
        origin = load.find(name_or_path, revision, trust_remote_code)
        config = load.load_config(origin, sliding_window)
        at = device if mesh is None else "cpu"
        model = load.load_model(origin, config, kind, at, quantization, attn_implementation or PACKED)
        multi = cls(model, origin, seed)
        if mesh is None:
            multi.check_packing()
        else:
            multi.shard(mesh)
        return multi

    def shard(self, mesh: DeviceMesh) -> None:
        """Leave this rank its part of every decoder layer; the model lies on the CPU before."""
        from mlora.parallel.shard import shard

        log.debug("base model %s", self.fingerprint)  # asked for while the tensors are whole, and kept
        shard(head.decoder(self.hf_model), self.sites.layers, self.hf_model, mesh)
        self.sharded = True

    @property
    def recompute(self) -> Recompute:
        """What backward computes again rather than finds kept.

        Raises:
            ModelError: set to the middle, where no layer has a feed-forward block that is understood.
        """
        return self._recompute

    @recompute.setter
    def recompute(self, recompute: Recompute) -> None:
        if recompute.what == "middle" and not self.sites.blocks:
            family = type(self.hf_model).__name__
            raise ModelError(f"recompute: {family} has no feed-forward block that is understood; allowed: none, all")
        self._recompute = recompute

    def _recomputes(self, what: What, layer: int) -> bool:
        return self._recompute.of(layer) == what

    @property
    def modes(self) -> tuple[Recompute, bool]:
        """What is computed again in backward, and whether layers are compiled."""
        return self._recompute, self.compiled

    def compile(self) -> None:
        """Compile what decoder layers do around the adapted modules: norms and residual sums.

        The adapted modules, rotary embeddings and the packed attention stay as they are: they have kernels of their
        own, and what they do depends on the batch's segments.
        """
        if not self.compiled:
            self.compiled = True
            self.sites.exclude_from_compilation()
            exclude_attention_from_compilation()
            self._exclude_rotary_from_compilation()

    # -- adapters ------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> Mapping[str, Method]:
        """Typed config of each adapter, by name."""
        return MappingProxyType({name: adapter.method for name, adapter in self._adapters.items()})

    def add_adapter(
        self,
        name: str,
        config: Method | Mapping[str, Any],
        seed: int | None = None,
        num_labels: int | None = None,
    ) -> str:
        """Add a new adapter, which changes nothing yet.

        Args:
            name: letters, digits and `._-`.
            config: typed, or a dict in the keys of the JSON file.
            seed: of its initial values and of its dropout; None takes the model's.
            num_labels: classes of a classification head, which is trained with the adapter: `score` of transformers'
                sequence classifiers, a matrix that reads the last token's last hidden state. None for no head.

        Raises:
            ModelError: the name is taken, or target modules do not exist in this model.
        """
        from mlora.config import check_name, parse_adapter

        check_name(name)
        if name in self._adapters:
            raise ModelError(f"adapter {name!r} exists already; remove it or choose another name")
        method = config if isinstance(config, Method) else parse_adapter(dict(config))
        longest = self.hf_model.config.get_text_config().max_position_embeddings
        if num_labels is not None and num_labels < 1:
            raise ModelError(f"adapter {name!r}: num_labels: {num_labels} is not allowed; allowed: at least 1, or None")
        self._add(name, method.for_length(longest), seed, num_labels)
        return name

    def _add(self, name: str, method: Method, seed: int | None, num_labels: int | None) -> Adapter:
        singles = self.sites.targets(method.target_modules)
        self._require_able(method, singles)
        blocks = self.sites.all_blocks() if method.spans_blocks else []
        if blocks:  # what no block spans is adapted by itself, wherever it sits
            spanned = {site.path for block in blocks for site in (*block.ups, block.down)}
            singles = [
                replace(site, in_block=site.path in spanned) if isinstance(site, LinearSite) else site
                for site in singles
            ]
        score = None if num_labels is None else head.declare(self.hf_model.config, num_labels)
        adapter = Adapter(name, method, singles, blocks, self.seed if seed is None else seed, self.device, score)
        self.adapter_modules[_module_name(name)] = adapter
        self._adapters[name] = adapter
        return adapter

    def _require_able(self, method: Method, singles: Sequence[LinearSite | EmbeddingSite]) -> None:
        """Refuse a method that cannot adapt what lies outside of the decoder layers."""
        single = method.peft_type == "LORA"
        for site in singles:
            able = "lora, rslora and dora can adapt the output layer"
            allowed = single or site.path not in self.sites.output
            if isinstance(site, EmbeddingSite):
                able = 'lora and rslora with lora_init "original" or "gaussian" can adapt the embeddings'
                allowed = single and bool(method.embedding_parameters(site))
            if not allowed:
                raise ModelError(f"target_modules: {site.path}: only methods {able}")

    def load_adapter(self, path: str | Path, name: str | None = None, allow_pickle: bool = False) -> str:
        """Load an adapter folder and return its name, the folder's where none is given.

        Args:
            path: folder in PEFT's form or the predecessors'.
            name: to give it.
            allow_pickle: whether an `adapter_model.bin` may be read (tensors only).
        """
        from mlora.config import check_name

        folder = Path(path)
        name = folder.resolve().name if name is None else name
        check_name(name)
        if name in self._adapters:
            raise ModelError(f"adapter {name!r} exists already; remove it or choose another name")
        method, tensors, base = files.read(folder, allow_pickle)
        trained, own = files.architecture(folder), self.architecture
        if trained not in (None, own):
            raise ModelError(f"{folder} was trained on {base}, a {trained} model; {self.origin.given} is a {own} model")
        if base is not None and load.published(base) != load.published(self.origin.given):
            log.warning("%s was trained on %s and is loaded on %s", folder, base, self.origin.given)
        try:
            adapter = self._add(name, method, None, files.num_labels(method, tensors))
            adapter.load_file_tensors(self._without_frozen(method, tensors), str(folder))
        except ModelError as error:
            if name in self._adapters:
                self.remove_adapter(name)
            raise ModelError(f"trained on {base}, loaded on {self.origin.given}: {error}") from error
        adapter.head_task = None if adapter.head is None else files.head_task(folder)
        if adapter.head is not None and adapter.head_task is None:
            log.warning("%s does not say what its classification head was trained for: any task may be scored", folder)
        return name

    def _without_frozen(self, method: Method, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leave out the frozen weights that PEFT writes beside adapters of the embeddings and the output layer.

        Raises:
            ModelError: they are not this base model's.
        """
        own = dict(tensors)
        for path in (*self.sites.embeddings, *self.sites.output):
            name = f"{method.file_prefix}.{path}.base_layer.weight"
            if (saved := own.pop(name, None)) is not None and not _same(saved, self.sites.single[path].module.weight):
                raise ModelError(f"{name} is not the base model's: the adapter belongs to a base that was changed")
        return own

    def restore_adapter(self, name: str, tensors: dict[str, Tensor], source: str) -> None:
        """Set an adapter's tensors, all of them, from tensors named as in a file; `source` names it in errors."""
        self.adapter_module(name).load_file_tensors(tensors, source)

    def train_as(self, name: str, method: Method, seed: int | None = None, num_labels: int | None = None) -> None:
        """Go on training a loaded adapter with a config's settings.

        Args:
            name: of the adapter.
            method: its settings from now on.
            seed: of its dropout from now on; None keeps it.
            num_labels: classes of the head that it needs; None for no head.

        Raises:
            ModelError: they differ in what the adapter computes, not only in how it is trained.
        """
        adapter = self.adapter_module(name)
        before, now = (m.model_dump(exclude={*_TRAINING_ONLY, "target_modules"}) for m in (adapter.method, method))
        other = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if other or adapter.method.method != method.method:
            said = ", ".join(f"{key} {now.get(key)!r} (saved: {before.get(key)!r})" for key in other)
            kind = f"{method.method} (saved: {adapter.method.method}) {said}"
            raise ModelError(f"adapter {name!r} was saved with other settings than the config's: {kind}")
        if adapter.num_labels != num_labels:
            said = f"num_labels {num_labels} (saved: {adapter.num_labels})"
            raise ModelError(f"adapter {name!r} was saved with another classification head than its task needs: {said}")
        adapter.seed = adapter.seed if seed is None else seed
        kept = {"target_modules": adapter.method.target_modules}
        adapter.method = method.model_copy(update=kept)

    def save_adapter(self, name: str, path: str | Path, making: Making | None = None) -> None:
        """Write an adapter to a folder: `adapter_config.json`, `adapter_model.safetensors` and a model card.

        Args:
            name: of the adapter.
            path: of the folder, made where absent.
            making: how it was trained, for the card.
        """
        method, tensors, base = self.saved_config(name), self.adapter_tensors(name), self.origin
        task = self.adapter_module(name).head_task
        files.write(Path(path), method, tensors, base.given, base.revision, name, making, task, self.architecture)

    def saved_config(self, name: str) -> Method:
        """Return an adapter's config as its file says it: target modules by name, rather than by group."""
        adapter = self.adapter_module(name)
        targets = self.sites.names_of(self.sites.single.keys() & adapter.tensors.keys())
        return adapter.method.as_saved().model_copy(update={"target_modules": targets})

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; its memory returns once nothing else refers to its tensors."""
        self.adapter_module(name)
        del self._adapters[name], self.adapter_modules[_module_name(name)]
        if self.scope.default == name:
            self.scope.default = None

    def rename_adapter(self, old: str, new: str) -> None:
        """Give an adapter another name; its tensors, their gradients and its place in an optimizer stay.

        Dropout and jitter are keyed by name: renamed in the middle of a training, an adapter goes on with other masks,
        as good as the ones it would have had. What it computes outside training is the same.

        Raises:
            ModelError: there is no `old`, or `new` is taken.
            ConfigError: `new` cannot be a name.
        """
        from mlora.config import check_name

        adapter = self.adapter_module(old)
        check_name(new)
        if new in self._adapters:
            raise ModelError(f"adapter {new!r} exists already; remove it or choose another name")
        default = self.scope.default
        self.remove_adapter(old)
        adapter.name = new
        self.adapter_modules[_module_name(new)] = adapter
        self._adapters[new] = adapter
        if default == old:
            self.scope.default = new

    def adapter_tensors(self, name: str) -> dict[str, Tensor]:
        """Return an adapter's tensors, named and shaped as in its saved file."""
        return self.adapter_module(name).file_tensors()

    def adapter_gradients(self, name: str) -> dict[str, Tensor]:
        """Return the gradients of an adapter's tensors, named and shaped as in its saved file."""
        return self.adapter_module(name).file_gradients()

    def adapter_parameters(self, name: str) -> list[tuple[str, nn.Parameter]]:
        """Return (declared name, parameter) of every trainable tensor, stacked ones whole."""
        adapter = self.adapter_module(name)
        return adapter.trainable()

    def num_labels(self, name: str) -> int | None:
        """Return the classes of an adapter's classification head; None where it has none."""
        return self.adapter_module(name).num_labels

    def adapter_module(self, name: str) -> Adapter:
        """Return the tensors and the sites of an adapter."""
        if name not in self._adapters:
            known = ", ".join(self._adapters) or "none"
            raise ModelError(f"adapter {name!r} is not loaded; loaded: {known}")
        return self._adapters[name]

    # -- forward -------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> MultiAdapterModel:
        """Turn the adapters' dropout on or off; the base stays in evaluation mode."""
        self.training = mode
        return self

    @cached_property
    def fingerprint(self) -> str:
        """A digest of some values of each of the base model's tensors; not of packed ones, which differ by machine."""
        digest = hashlib.sha256()
        for parameter in self.hf_model.parameters():
            if parameter.is_floating_point() and parameter.numel():
                values = parameter.detach().flatten()[:: max(1, parameter.numel() // 16)].double().cpu()
                digest.update(f"{list(parameter.shape)} {values.tolist()}".encode())
        return digest.hexdigest()[:16]

    @property
    def architecture(self) -> str:
        """The base model's architecture, as its config's `model_type` says: "llama", say."""
        return str(self.hf_model.config.get_text_config().model_type)

    @property
    def device(self) -> torch.device:
        """Where the base model's input goes."""
        return self.hf_model.get_input_embeddings().weight.device

    @property
    def tokenizer(self) -> Any:
        """The base model's tokenizer, loaded when first asked for."""
        if self._tokenizer is None:
            self._tokenizer = load.load_tokenizer(self.origin)
        return self._tokenizer

    def use_tokenizer(self, tokenizer: Any) -> None:
        """Set the tokenizer, where it was loaded before the model."""
        self._tokenizer = tokenizer

    def num_parameters(self, name: str | None) -> int:
        """Return the trainable parameters of an adapter, or the frozen ones of the base model (None)."""
        if name is None:
            return sum(p.numel() for p in self.hf_model.parameters())
        return sum(parameter.numel() for _, parameter in self.adapter_parameters(name))

    def forward(self, batch: Batch) -> dict[str, AdapterOutput]:
        """Compute every adapter's losses in one pass; rows of the plain base model get no entry."""
        flight = self._flight(batch, self.training)
        heads = [self._head(span.adapter) for span in batch.spans]
        for span, score in zip(batch.spans, heads, strict=True):
            head.check_classes(span, None if score is None else len(score))
        hidden, losses = self._token_losses(flight, batch)
        outputs = {}
        by_adapter = losses.split([span.targets for span in batch.spans])
        for segment, span, score, own in zip(flight.segments, batch.spans, heads, by_adapter, strict=True):
            if segment.adapter is None:
                continue
            if score is not None:
                own = head.class_losses(hidden, span, score)
            aux = self._adapters[segment.adapter].method.aux_loss(list((segment.router_logits or {}).values()))
            outputs[segment.adapter] = AdapterOutput(
                loss=own.sum() / max(len(own), 1),
                aux_loss=losses.new_zeros(()) if aux is None else aux,
                num_tokens=torch.tensor(len(own)),
                router_logits=segment.router_logits or {},
            )
        return outputs

    @torch.no_grad()
    def class_logits(self, batch: Batch) -> dict[str, Tensor]:
        """Return the logits [n, labels] float32 of every adapter's n rows, in the order given; without dropout.

        Raises:
            ModelError: a row's adapter has no classification head.
        """
        heads = {str(span.adapter): self._head(span.adapter) for span in batch.spans}
        for name, score in heads.items():
            if score is None:
                raise ModelError(f"adapter {name!r} has no classification head")
        hidden = self.packed_hidden_states(batch)
        found = zip(batch.spans, heads.items(), strict=True)
        return {name: head.class_logits(hidden, span, score) for span, (name, score) in found if score is not None}

    def _head(self, adapter: str | None) -> Tensor | None:
        return None if adapter is None else self.adapter_module(adapter).head

    def hidden_states(self, flight: Flight, **inputs: Any) -> Tensor:
        """Return what the output layer would read of a packed stream [T, D].

        Args:
            flight: whose tokens they are.
            inputs: of the transformers model.
        """
        return self._decode(flight, inputs)[0]

    def token_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the cross-entropy [N] of targets [N] after hidden states [N, D]; where `outputs_plainly`."""
        return ops.token_losses(hidden, self.output_layer, targets)

    def _token_losses(self, flight: Flight, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return what the output layer reads [T, D] and the loss of each target [N]."""
        targets = batch.targets[batch.positions]
        if self.outputs_plainly and not self.adapts_output(batch.adapters):
            hidden = self._hidden_states(flight, batch)
            return hidden, self.token_losses(hidden[batch.positions], targets)
        with head.last_hidden_states(self.hf_model) as kept:
            logits = self._run(flight, batch, batch.positions)
        return self._packed(batch, kept[0]), F.cross_entropy(logits.float(), targets, reduction="none")

    @torch.no_grad()
    def logits(self, input_ids: Tensor, attention_mask: Tensor, adapters: Sequence[str | None]) -> Tensor:
        """Return next-token logits [B, L, V] in float32, without dropout; undefined at padding.

        Args:
            input_ids, attention_mask: [B, L].
            adapters: name for each row; None for the plain base model.
        """
        batch = Batch.from_rows(input_ids, attention_mask, None, adapters).to(self.device)
        packed = self.packed_logits(batch).float()
        out = packed.new_zeros(*input_ids.shape, packed.shape[-1])
        for row, tokens in zip(batch.order, packed.split(batch.lengths), strict=True):
            out[row, attention_mask[row].bool().to(out.device)] = tokens
        return out

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        adapters: Sequence[str | None],
        max_new_tokens: int = 128,
        **generation: Any,
    ) -> list[str]:
        """Continue prompts, each with its adapter, in one batch; without dropout.

        Args:
            prompts: texts, or token ids where the special tokens are in place.
            adapters: name for each prompt; None for the plain base model.
            max_new_tokens: at most this many tokens are added.
            generation: what transformers' `generate()` takes; `seed` and `stop`, see `mlora.model.generate.complete`.

        Returns:
            The continuations, in the order of the prompts.

        Raises:
            ModelError: an adapter is not loaded, or has a classification head.
        """
        from mlora.model.generate import generate

        return generate(self, prompts, adapters, max_new_tokens, **generation)

    def stream(
        self,
        prompts: Sequence[str | Sequence[int]],
        adapters: Sequence[str | None],
        max_new_tokens: int = 128,
        **generation: Any,
    ) -> Iterator[Piece]:
        """Continue prompts as `generate` does and yield tokens as they come; leaving the loop stops it."""
        from mlora.model.generate import stream

        return stream(self, prompts, adapters, max_new_tokens, **generation)

    @torch.no_grad()
    def score(self, batch: Batch, positions: Tensor, token_ids: Tensor) -> Tensor:
        """Return the logits of given tokens at given positions [N, C], computing no other row of the output layer.

        What a family does to logits afterwards (soft-capping, scaling) keeps their order and is left out.

        Args:
            batch: packed rows.
            positions: [N] into the packed tokens.
            token_ids: [N, C] of the options to compare.
        """
        if self.adapts_output(batch.adapters):
            return self.packed_logits(batch, positions).float().gather(1, token_ids)
        hidden = self.packed_hidden_states(batch)[positions]
        layer = self.output_layer
        logits = torch.einsum("nd,ncd->nc", hidden.float(), layer.weight[token_ids].float())
        bias = getattr(layer, "bias", None)
        return logits if bias is None else logits + bias[token_ids].float()

    @torch.no_grad()
    def log_likelihoods(self, batch: Batch, positions: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-likelihood [N] of tokens [N] after positions [N] of a batch, and whether each is greedy [N].

        Args:
            batch: packed rows.
            positions: [N] into the packed tokens; one may come several times.
            tokens: [N] that follow there.
        """
        unique, which = positions.unique(return_inverse=True)
        logits = self.packed_logits(batch, unique).float()
        own = logits[which, tokens] - logits.logsumexp(-1)[which]
        return own, logits.argmax(-1)[which] == tokens

    def shares_prompts(self, adapter: str | None) -> bool:
        """Whether sequences of an adapter may branch: not where attention is not ours or a method counts tokens."""
        counts = adapter is not None and self.adapter_module(adapter).method.counts_tokens
        return self.hf_model.config._attn_implementation == PACKED and not self.padded and not counts

    @contextmanager
    def profiling(self) -> Iterator[dict[str, RouterProfile]]:
        """Add up what the routers of every adapter do in the forwards inside the `with` block, by adapter."""
        profiles: dict[str, RouterProfile] = {}

        def observe(flight: Flight) -> None:
            for segment in flight.segments:
                if segment.adapter is not None and segment.router_logits:
                    method = self._adapters[segment.adapter].method
                    profiles.setdefault(segment.adapter, RouterProfile(method)).add(segment.router_logits)

        self.scope.observe = observe
        try:
            yield profiles
        finally:
            self.scope.observe = None

    def check_packing(self) -> None:
        """Find out how the family computes sequences side by side, and take the first way that keeps them apart.

        Raises:
            ModelError: the family mixes sequences all the same, or its tokens see those that follow.
        """
        probe.choose_attention(self)

    def packed_logits(self, batch: Batch, positions: Tensor | None = None) -> Tensor:
        """Return the logits [N, V] at positions [N] of the packed tokens, or at all, without dropout."""
        return self._run(self._flight(batch, False), batch, positions)

    def packed_hidden_states(self, batch: Batch) -> Tensor:
        """Return what the output layer reads of the packed tokens [T, D], without dropout."""
        return self._hidden_states(self._flight(batch, False), batch)

    def _run(self, flight: Flight, batch: Batch, positions: Tensor | None) -> Tensor:
        """Return logits [N, V] at positions [N] of the packed tokens, or at all."""
        # every logit is computed of padded rows, which have no positions in common, and where an adapter of the output
        # layer looks for its tokens among all
        whole = self.padded or self.adapts_output(batch.adapters)
        keep = {} if positions is None or whole else {"logits_to_keep": positions}
        with self.scope.use(flight):
            logits = self._packed(batch, self.hf_model(**self._inputs(batch), **keep).logits)
        return logits[positions] if whole and positions is not None else logits

    def adapts_output(self, adapters: Iterable[str | None]) -> bool:
        """Return whether one of these adapters changes the output layer."""
        return self._adapts(self.sites.output, adapters)

    def adapts_embeddings(self, adapters: Iterable[str | None]) -> bool:
        """Return whether one of these adapters changes the input embeddings."""
        return self._adapts(self.sites.embeddings, adapters)

    def _adapts(self, paths: Iterable[str], adapters: Iterable[str | None]) -> bool:
        held = [self.adapter_module(name).tensors for name in adapters if name is not None]
        return any(path in tensors for tensors in held for path in paths)

    @property
    def output_layer(self) -> Any:
        """The frozen output layer."""
        layer = self.hf_model.get_output_embeddings()
        return layer.frozen if isinstance(layer, AdaptedLinear) else layer

    def _hidden_states(self, flight: Flight, batch: Batch) -> Tensor:
        """Return what the output layer would read [T, D]."""
        return self._packed(batch, self._decode(flight, self._inputs(batch)))

    def _decode(self, flight: Flight, inputs: dict[str, Any]) -> Tensor:
        """Return the last hidden states of what the model is given."""
        with self.scope.use(flight):
            return head.decoder(self.hf_model)(**inputs).last_hidden_state

    def _packed(self, batch: Batch, out: Tensor) -> Tensor:
        """Return the packed tokens [T, ...] of what the model returned for `_inputs`."""
        return PaddedRows.of(batch).gather(out) if self.padded else out[0]

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        if self.padded:
            rows = PaddedRows.of(batch)
            ids = rows.spread(batch.input_ids[0]).view(rows.mask.shape)
            return {"input_ids": ids, "attention_mask": rows.mask.long(), "use_cache": False}
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
        if self.hf_model.config._attn_implementation == PACKED:
            # A mask of four dimensions is handed down as it is, which spares the [T, T] one that nobody would read.
            unread = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
            inputs |= {"attention_mask": unread, "packed_lengths": batch.lengths}
            if ops.device_type(batch.input_ids) == "cuda":
                inputs["packed_offsets"] = batch.offsets
            if batch.branches is not None:
                inputs["packed_branches"] = batch.branches
        return inputs

    def _flight(self, batch: Batch, training: bool) -> Flight:
        segments = []
        for span in batch.spans:
            keys = None
            if span.adapter is not None:
                seed = self.adapter_module(span.adapter).seed
                if training:
                    inside = slice(span.start, span.stop)
                    step = batch.steps.get(span.adapter, 0)
                    keys = ops.stream_keys(seed, span.adapter, step, batch.rows[inside], batch.position_ids[0, inside])
            segments.append(
                Segment(span.adapter, span.start, span.stop, keys, sequence_lengths=span.lengths, router_logits={})
            )
        if self.padded:
            rows = PaddedRows.of(batch)
            segments = [rows.segment(segment) for segment in segments]
        return Flight(segments)


def _same(saved: Tensor, weight: Any) -> bool:
    """Return whether a weight is a saved one, in the shorter dtype of the two; without data, of its shape."""
    if weight.device.type == "meta" or saved.shape != weight.shape:
        return bool(saved.shape == weight.shape)
    saved = saved.to(weight.device)
    return torch.equal(saved.to(weight.dtype), weight) or torch.equal(saved, weight.to(saved.dtype))


def _module_name(adapter: str) -> str:
    """Return a name that torch takes for a module: without dots, and none of nn.Module's own."""
    return f"adapter:{adapter.replace('.', ':')}"
