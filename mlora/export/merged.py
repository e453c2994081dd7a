"""A LoRA, rsLoRA or DoRA adapter merged into its base: an ordinary transformers model with its tokenizer."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from mlora.adapters import LinearSite
from mlora.adapters.lora import LoraConfig
from mlora.export.merge import merged, merged_embeddings
from mlora.export.refusal import refusal
from mlora.export.source import NAME, Source, probe
from mlora.export.tokenizer import write_tokenizer
from mlora.model import card, load
from mlora.model.errors import ModelError
from mlora.model.multi import MultiAdapterModel

EXACT = 1e-4
"""Largest difference of float32 logits, as a share of the largest logit, that rounding explains."""

log = logging.getLogger(__name__)


def write(source: Source, folder: Path, title: str, dtype: torch.dtype) -> None:
    """Write the merged model, and warn of what rounding to a short dtype has changed.

    Raises:
        ModelError: the method is no single update of weights, or the adapter does not fit the base model.
    """
    method = source.method
    if type(method) is not LoraConfig:
        raise refusal("merged", method, "its updates differ from token to token, so no one weight holds them")
    model = source.weights(dtype)
    sites, adapted = model.sites, model.adapter_module(NAME).tensors.keys()
    if model.hf_model.config.get_text_config().tie_word_embeddings:
        if sites.output.keys() & adapted:
            raise refusal("merged", method, "it adapts an output layer that shares its weight with the embeddings")
        if sites.embeddings.keys() & adapted:
            raise refusal("merged", method, "it adapts embeddings that share their weight with the output layer")
    before = probe(model)
    merge_singles(model, method)
    _report(before, probe(model, None), dtype)
    model.sites.unwrap()
    model.hf_model.config = load.read_config(source.origin)  # with the dropout that the base was published with
    model.hf_model.save_pretrained(folder)
    write_tokenizer(source.origin, folder)
    base = source.origin.given
    text = f"`{card.shown(base)}` with a {method.method} adapter merged into its weights by m-LoRA."
    card.write(folder, title, text, "transformers", method, base, source.making())


@torch.no_grad()
def merge_singles(model: MultiAdapterModel, config: LoraConfig) -> None:
    """Merge the adapter's updates of single layers into their frozen weights; experts stay as they are."""
    for path, tensors in model.adapter_module(NAME).tensors.items():
        site = model.sites.single.get(path)
        if site is None or (isinstance(site, LinearSite) and tensors["lora_A"].ndim != 2):
            continue
        weight: Any = site.module.weight
        merge = merged if isinstance(site, LinearSite) else merged_embeddings
        weight.copy_(merge(weight, tensors, config))


def _report(before: torch.Tensor, after: torch.Tensor, dtype: torch.dtype) -> None:
    difference, largest = (before - after).abs().max().item(), before.abs().max().item()
    measured = (
        f"logits differ by up to {difference:.2g} (largest logit {largest:.2g}) on {before[..., 0].numel()} tokens"
    )
    if dtype != torch.float32:
        log.warning("merging in %s rounds every weight: %s; --dtype fp32 does not", dtype, measured)
    elif not difference <= EXACT * largest:
        raise ModelError(f"--format merged: the merged model is not the adapter's: {measured}; nothing is written")
