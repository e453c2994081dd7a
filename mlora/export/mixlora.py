"""A top-k MixLoRA adapter as a folder that the public package `mixlora` 0.2.3 loads.

That package reads a .bin only and wants every key that it knows. It never turns its dropout and its jitter off, not
even in evaluation mode, and refuses a dropout of 0; so both are written as nothing, which changes no result of the
trained adapter. What it would load and compute otherwise than it was trained is refused.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from mlora.adapters.mixlora import MixLoraConfig
from mlora.export.refusal import refusal
from mlora.export.source import NAME, Source
from mlora.model import card, files, load
from mlora.model.errors import ModelError
from mlora.model.multi import MultiAdapterModel

FAMILIES = ("gemma", "gemma2", "llama", "mistral", "phi", "phi3", "qwen2")
"""Families of base models that the package knows, by transformers' `model_type`."""
MODULES = {
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    *("dense", "fc1", "fc2", "qkv_proj", "gate_up_proj"),
}
"""Linear layers that it knows; it drops the updates of others without a word."""
NO_DROPOUT = 1e-30
"""Small enough that float32 rounds the scaling of what is kept to 1."""


def write(source: Source, folder: Path, title: str) -> None:
    """Write the adapter as `adapter_config.json` and `adapter_model.bin`.

    Raises:
        ModelError: the package would misread it, or it does not fit the base model.
    """
    method = source.method
    if not isinstance(method, MixLoraConfig):
        raise refusal("mixlora", method, "the package knows top-k MixLoRA only")
    _require_readable(method)
    model = source.shapes()
    family = model.hf_model.config.model_type
    if family not in FAMILIES:
        raise refusal("mixlora", method, f"the package knows no {family} models, only {', '.join(FAMILIES)}")
    adapted = {path.rpartition(".")[2] for path in model.adapter_module(NAME).tensors if path in model.sites.linears}
    if not adapted <= MODULES:
        raise refusal("mixlora", method, f"the package knows no {', '.join(sorted(adapted - MODULES))}")
    config = {
        "base_model_name_or_path": load.published(source.origin.given),
        "bias": "none",
        "peft_type": "MIXLORA",
        "task_type": "CAUSAL_LM",
        "routing_strategy": "mixlora",
        "target_modules": sorted(adapted),
        "r": method.r,
        "lora_alpha": int(method.lora_alpha),
        "lora_dropout": NO_DROPOUT,
        "use_rslora": method.use_rslora,
        "num_experts": method.num_experts,
        "top_k": method.top_k,
        "act_fn": method.act_fn or _activation(model),
        "jitter_noise": 0.0,
        "router_init_range": float(method.router_init_range),
        "router_loss": method.router_loss,
        "router_aux_loss_coef": float(method.router_aux_loss_coef),
    }
    (folder / files.CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    torch.save({name: tensor.contiguous() for name, tensor in source.tensors.items()}, folder / files.PICKLE)
    text = f"A MixLoRA adapter for `{card.shown(source.origin.given)}` that the package mixlora loads."
    card.write(folder, title, text, "mixlora", method, source.origin.given, source.making())


def _require_readable(method: MixLoraConfig) -> None:
    settings = ("r", "lora_alpha", "use_rslora", "use_dora")
    other = [name for name in settings if getattr(method.experts, name) != getattr(method, name)]
    if other:
        names = ", ".join(f"expert_lora.{name}" for name in other)
        raise refusal("mixlora", method, f"the package ignores {names} and would use the attention's")
    if method.use_dora:
        raise refusal("mixlora", method, "use_dora: the package forgets DoRA's magnitudes and computes plain LoRA")
    if method.lora_alpha != int(method.lora_alpha):
        raise refusal("mixlora", method, f"lora_alpha: {method.lora_alpha}: the package takes whole numbers only")


def _activation(model: MultiAdapterModel) -> str:
    """Return the name of the base's activation, which the package does not look up itself."""
    from transformers.activations import ACT2FN

    used = next(iter(model.sites.blocks.values())).activation
    x = torch.linspace(-4, 4, 33)
    for key in ("hidden_activation", "hidden_act"):
        name = getattr(model.hf_model.config, key, None)
        if name in ACT2FN and torch.equal(ACT2FN[name](x), used(x)):
            return str(name)
    raise ModelError(f"--format mixlora: {type(model.hf_model).__name__} has an activation without a name")
