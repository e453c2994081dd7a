"""Tiny random models of transformers' families."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from mlora.model.attention import PACKED
from mlora.model.load import Origin
from mlora.model.multi import MultiAdapterModel

transformers.logging.set_verbosity_error()

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "glm", "glm4", "gpt_neox",
    "olmo2", "stablelm", "granite", "smollm3", "cohere", "starcoder2",
)  # fmt: skip
VOCABULARY = 160


def tiny(family: str, layers: int = 2, **settings: object) -> transformers.PreTrainedModel:
    """Return a random model of a family, float32, without dropout."""
    torch.manual_seed(0)
    keywords: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family.startswith("glm"):
        keywords["partial_rotary_factor"] = 0.5
    if family not in ("phi", "gpt_neox", "stablelm", "starcoder2"):
        keywords["head_dim"] = 8
    for name in (
        "attention_dropout",
        "hidden_dropout",
        "embd_pdrop",
        "resid_pdrop",
        "residual_dropout",
        "embedding_dropout",
    ):
        keywords[name] = 0.0
    config = AutoConfig.for_model(family, **keywords | settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED, dtype=torch.float32)
    return model.float().requires_grad_(False).eval()


def multi(family: str = "llama", layers: int = 2, seed: int = 42, **settings: object) -> MultiAdapterModel:
    """Return a random model of a family, ready for adapters."""
    model = MultiAdapterModel(tiny(family, layers, **settings), Origin(f"tiny-{family}", f"tiny-{family}"), seed)
    model.check_packing()
    return model


def rows(count: int, length: int = 9, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (input_ids, attention_mask) of rows of different lengths, padded on the right."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, length), generator=draw)
    lengths = torch.randint(length // 2, length + 1, (count, 1), generator=draw)
    mask = (torch.arange(length) < lengths).long()
    return ids * mask, mask


def awaken(model: MultiAdapterModel, std: float = 0.2) -> None:
    """Give the zero matrices of every adapter random values, so that adapters have an effect."""
    draw = torch.Generator().manual_seed(7)
    for name in model.adapters:
        for kind, parameter in model.adapter_parameters(name):
            if kind == "lora_B":
                parameter.data.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=draw))
