"""The step of `benchmarks.step` by transformers and PEFT: the same model, tokens, adapter and optimizer.

    python -m benchmarks.peft_step 7b lora dora [--recompute] [--liger]

sdpa attention, bf16 base, float32 adapters under autocast, padded batch without padding, fused AdamW.
"""

from __future__ import annotations

import argparse
import gc
import json
from typing import Any

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.work import DROPOUT, METHODS, SHAPES, WARM, Clock, Work, norms, row
from mlora.model import load

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(options: argparse.Namespace, method: str) -> Any:
    """Return the base model with one adapter, ready to train."""
    cuda = options.device != "cpu"
    dtype = getattr(torch, options.dtype or ("bfloat16" if cuda else "float32"))
    torch.manual_seed(0)
    if options.base_model:
        origin = load.find(options.base_model)
        base = load.load_model(origin, load.load_config(origin), dtype, options.device, None, "sdpa")
    else:
        torch.set_default_dtype(dtype)
        with torch.device(options.device):
            config = LlamaConfig(**SHAPES[options.shape].settings)
            base = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
        torch.set_default_dtype(torch.float32)
    base.config.use_cache = False
    config = peft.LoraConfig(
        **METHODS[method], lora_dropout=DROPOUT, target_modules=LINEARS, task_type="CAUSAL_LM"
    )  # fmt: skip
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=True).to(options.device)
    if options.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def measure(options: argparse.Namespace, work: Work) -> dict:
    """Time steps of one adapter."""
    model = build(options, work.methods[0])
    base_dtype = next(model.parameters()).dtype
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)
    clock = Clock(options.device)
    vocabulary = SHAPES[options.shape].settings["vocab_size"]
    for _ in range(WARM + options.steps):
        ids = torch.randint(1, vocabulary, (work.rows, work.length), device=options.device)
        clock.begin()
        with torch.autocast(options.device, torch.bfloat16, enabled=base_dtype == torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        clock.mark("forward")
        loss.backward()
        clock.mark("backward")
        optimizer.step()
        clock.mark("optimizer")
        clock.end()
        gradients = norms(trained)
        optimizer.zero_grad()
    how = {"recompute": "all" if options.recompute else "none", "liger": options.liger}
    how["parameters"] = sum(p.numel() for p in trained)
    return row(f"PEFT {peft.__version__}", options.shape, work, clock, gradients, **how)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("works", nargs="*", default=["lora"], help="lora or dora, one adapter each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--base_model", help="a model of this shape in place of random weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--liger", action="store_true", help="Liger's norms, rotary embedding, SwiGLU and loss")
    parser.add_argument("--steps", type=int, default=6, help=f"that are counted, after {WARM}")
    options = parser.parse_args()
    works = [Work.parse(text, options.shape) for text in options.works]
    if any(work.methods not in (("lora",), ("dora",)) for work in works):
        parser.error("PEFT trains one adapter at a time: lora or dora")
    if options.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    for work in works:
        try:
            figures = measure(options, work)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            figures = {"program": "PEFT", "shape": options.shape, "work": str(work), "error": str(error)[:200]}
        print(json.dumps(figures), flush=True)
        gc.collect()
        if options.device != "cpu":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
