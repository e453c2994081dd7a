"""A top-k MixLoRA adapter and its base as a mixture of experts that transformers and vLLM run without code of ours.

MixLoRA's routing (softmax, the k largest, made to sum to one) is Mixtral's, so each expert's updates are merged into a
copy of the frozen feed-forward block, those of the attention into its weights, and the router stays as it is:

    Llama, Mistral -> MixtralForCausalLM        Qwen3 -> Qwen3MoeForCausalLM with norm_topk_prob

The model is written layer by layer, since with all experts it may be larger than memory, and then compared with the
adapter on random tokens through its first layer.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from mlora.adapters import BlockSite
from mlora.adapters.mixlora import MixLoraConfig
from mlora.export.merge import merged
from mlora.export.merged import EXACT, merge_singles
from mlora.export.refusal import refusal
from mlora.export.source import NAME, Source, probe, probe_ids
from mlora.export.tokenizer import write_tokenizer
from mlora.model import card, load
from mlora.model.errors import ModelError
from mlora.model.multi import MultiAdapterModel

log = logging.getLogger(__name__)

SAME = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters"),
    *("attention_dropout",),
)
"""Settings that mean the same in a base model's config and in the mixture's."""


@dataclass(frozen=True)
class Target:
    """A mixture that transformers has.

    Attributes:
        model_type: transformers' name of the family.
        architecture: of its class.
        block: name of the feed-forward block in checkpoints.
        projections: its experts' names of gate, up and down.
        settings: of its config that the base's lacks, from the base's config and the method.
    """

    model_type: str
    architecture: str
    block: str
    projections: tuple[str, str, str]
    settings: Callable[[Any, MixLoraConfig], dict[str, Any]]


def _mixtral(base: Any, method: MixLoraConfig) -> dict[str, Any]:
    return {
        "num_local_experts": method.num_experts,
        "router_jitter_noise": method.jitter_noise,
        "sliding_window": getattr(base, "sliding_window", None),
    }


def _qwen3_moe(base: Any, method: MixLoraConfig) -> dict[str, Any]:
    return {
        "num_experts": method.num_experts,
        "moe_intermediate_size": base.intermediate_size,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": base.attention_bias,
        "use_sliding_window": base.sliding_window is not None,
        "sliding_window": base.sliding_window,
    }


MIXTRAL = Target("mixtral", "MixtralForCausalLM", "block_sparse_moe", ("w1", "w3", "w2"), _mixtral)
QWEN3_MOE = Target("qwen3_moe", "Qwen3MoeForCausalLM", "mlp", ("gate_proj", "up_proj", "down_proj"), _qwen3_moe)
TARGETS = {"LlamaForCausalLM": MIXTRAL, "MistralForCausalLM": MIXTRAL, "Qwen3ForCausalLM": QWEN3_MOE}
"""By transformers' class of the base model."""


def write(source: Source, folder: Path, title: str, dtype: torch.dtype) -> None:
    """Write the mixture.

    Raises:
        ModelError: the method or the base model has no exact counterpart, or the written model computes otherwise.
    """
    method = source.method
    if not isinstance(method, MixLoraConfig):
        raise refusal("mixtral", method, "its routing is not top-k with weights that sum to one")
    target, config = _target(source, method)
    model = source.weights(dtype)
    with _first_layer_only(model):
        expected = probe(model)
    merge_singles(model, method)
    model.sites.unwrap()
    _write_shards(model, method, target, folder, dtype)
    config.architectures, config.dtype = [target.architecture], dtype
    config.save_pretrained(folder)
    if model.hf_model.can_generate() and model.hf_model.generation_config is not None:
        model.hf_model.generation_config.save_pretrained(folder)
    write_tokenizer(source.origin, folder)
    _compare(expected, folder, dtype)
    base = source.origin.given
    text = f"A {target.architecture}: `{card.shown(base)}` with a MixLoRA adapter merged into its experts by m-LoRA."
    card.write(folder, title, text, "transformers", method, base, source.making())


def _target(source: Source, method: MixLoraConfig) -> tuple[Target, PreTrainedConfig]:
    """Return the mixture that computes the same, and its config.

    Raises:
        ModelError: there is none; the message names the setting that it lacks.
    """
    model: Any = load.load_shapes(source.origin)
    base: Any = load.read_config(source.origin)
    target = TARGETS.get(type(model).__name__)
    if target is None or not type(model).__module__.startswith("transformers."):
        known = ", ".join(TARGETS)
        raise refusal("mixtral", method, f"no mixture computes as {type(model).__name__} does; allowed: {known}")
    lacking = [name for name in _biases(base, target) if getattr(base, name, False)]
    if len(set(getattr(base, "layer_types", None) or ())) > 1:
        lacking.append("layer_types (of several kinds)")
    if lacking:
        raise refusal("mixtral", method, f"{target.architecture} has no {', '.join(lacking)}")
    settings = {name: getattr(base, name) for name in SAME} | target.settings(base, method)
    config = AutoConfig.for_model(
        target.model_type,
        **settings,
        hidden_act=method.act_fn or base.hidden_act,
        num_experts_per_tok=method.top_k,
        router_aux_loss_coef=method.router_aux_loss_coef,
        output_router_logits=False,
    )
    return target, config


def _biases(base: Any, target: Target) -> tuple[str, ...]:
    return ("mlp_bias",) if target is QWEN3_MOE else ("attention_bias", "mlp_bias")


def _write_shards(
    model: MultiAdapterModel, method: MixLoraConfig, target: Target, folder: Path, dtype: torch.dtype
) -> None:
    """Write one file for each layer's block, and one for everything else, with the index that names them."""
    places: dict[str, str] = {}
    size = 0
    shards = _shards(model, method, target)
    count = len(model.sites.blocks) + 1
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        tensors = {key: tensor.detach().to(dtype).contiguous() for key, tensor in shard.items()}
        save_file(tensors, folder / name, {"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(model: MultiAdapterModel, method: MixLoraConfig, target: Target) -> Iterator[dict[str, Tensor]]:
    blocks = model.sites.blocks
    kept = {n: t for n, t in model.hf_model.state_dict().items() if not n.startswith(tuple(f"{p}." for p in blocks))}
    if model.hf_model.config.tie_word_embeddings:
        kept.pop("lm_head.weight", None)
    yield kept
    for path, block in blocks.items():
        place = f"{path.rpartition('.')[0]}.{target.block}"
        tensors = model.adapter_module(NAME).tensors
        shard: dict[str, Tensor] = {f"{place}.gate.weight": tensors[path]["router"]}
        for expert in range(method.num_experts):
            weights = _expert(block, tensors, method, expert)
            names = (f"{place}.experts.{expert}.{projection}.weight" for projection in target.projections)
            shard |= dict(zip(names, weights, strict=True))
        yield shard


def _expert(block: BlockSite, tensors: Any, method: MixLoraConfig, expert: int) -> Iterator[Tensor]:
    """Yield an expert's gate, up and down weights."""
    for site in (*block.ups, block.down):
        weight: Any = site.module.weight
        own = tensors.get(site.path)
        # cloned, since files hold no tensor twice: an expert without updates is the frozen layer itself
        yield weight.clone() if own is None else merged(weight, own, method.experts, expert)


@contextmanager
def _first_layer_only(model: MultiAdapterModel) -> Iterator[None]:
    decoder = model.hf_model.base_model
    layers = decoder.layers
    decoder.layers = nn.ModuleList(layers[:1])
    try:
        yield
    finally:
        decoder.layers = layers


@torch.no_grad()
def _compare(expected: Tensor, folder: Path, dtype: torch.dtype) -> None:
    """Read the written model's first layer back and compare its logits with the adapter's."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # which would list the layers left out, one by one
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=1, dtype=dtype).eval()
    finally:
        transformers.logging.set_verbosity(verbosity)
    found = model(probe_ids(model.get_input_embeddings().weight.shape[0])).logits.float()
    difference, largest = (found - expected).abs().max().item(), expected.abs().max().item()
    measured = f"logits after one layer differ by up to {difference:.2g} (largest logit {largest:.2g})"
    if dtype != torch.float32:
        log.warning("%s rounds the experts and the router, so tokens may change experts: %s", dtype, measured)
    elif not difference <= EXACT * largest:
        raise ModelError(f"--format mixtral: the written model is not the adapter's: {measured}; nothing is written")
