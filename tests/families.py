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
"""Families of dense transformers that train packed."""
PADDED = ("falcon", "qwen3_5_text")
"""Families that need padded rows; the second has recurrent layers."""
TABLE = (
    *FAMILIES, *PADDED,
    "apertus", "arcee", "bitnet", "bloom", "codegen", "cohere2", "ctrl", "deepseek_v3", "doge", "ernie4_5", "exaone4",
    "falcon_h1", "falcon_mamba", "gemma4_text", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_oss", "gptj",
    "granitemoe", "helium", "hunyuan_v1_dense", "internlm3", "jamba", "jetmoe", "lfm2", "llama4_text", "mamba",
    "minimax", "ministral", "mixtral", "modernbert-decoder", "mpt", "nanochat", "nemotron", "olmo", "olmo3", "olmoe",
    "opt", "persimmon", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next", "recurrent_gemma", "rwkv", "seed_oss",
    "vaultgemma", "xglm",
)  # fmt: skip
"""Families that `docs/pages/families.md` lists."""
VOCABULARY = 160
NO_HEAD_DIM = {"falcon", "gpt_neox", "phi", "stablelm", "starcoder2"}
DROPOUTS = (
    *("attention_dropout", "hidden_dropout", "embd_pdrop", "resid_pdrop", "residual_dropout", "embedding_dropout"),
    *("attn_pdrop", "dropout", "activation_dropout", "summary_first_dropout"),
)
MOE = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
SIZES: dict[str, dict[str, object]] = {
    "codegen": {"rotary_dim": 4},
    "deepseek_v3": MOE
    | {
        "num_key_value_heads": 4,
        "head_dim": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
    }
    | {"v_head_dim": 8, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 4},
    "gemma4_text": {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "glm4_moe": MOE | {"moe_intermediate_size": 16, "n_group": 1, "topk_group": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "gpt_oss": MOE,
    "gptj": {"rotary_dim": 4},
    "jamba": MOE,
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8},
    "qwen2_moe": MOE | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
    "qwen3_moe": MOE | {"moe_intermediate_size": 16},
    "qwen3_next": MOE
    | {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    | {"layer_types": ["linear_attention", "full_attention"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
}
"""What a family needs besides the sizes that all share."""


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
    if family not in NO_HEAD_DIM:
        keywords["head_dim"] = 8
    keywords |= dict.fromkeys(DROPOUTS, 0.0)
    config = AutoConfig.for_model(family, **keywords | SIZES.get(family, {}) | settings)
    try:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=PACKED, dtype=torch.float32)
    except KeyError:  # as `load_model` does, for families that look attention up in a table of their own
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
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
            if kind == "lora_B" or not parameter.any():
                parameter.data.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=draw))
