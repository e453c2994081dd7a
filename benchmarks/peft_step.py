"""The step of `benchmarks.step` by transformers and PEFT: the same model, tokens, adapter and optimizer.

    python -m benchmarks.peft_step 7b lora dora [--recompute]

sdpa attention, bf16 base, float32 adapters under autocast, padded batch without padding, fused AdamW.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.step import SHAPES

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def measure(shape: str, kind: str, recompute: bool, steps: int, device: str) -> dict:
    settings, rows, length = SHAPES[shape]
    cuda = device != "cpu"
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if cuda else torch.float32)
    with torch.device(device):
        base = LlamaForCausalLM._from_config(LlamaConfig(**settings), attn_implementation="sdpa")
    torch.set_default_dtype(torch.float32)
    base.config.use_cache = False
    config = peft.LoraConfig(
        r=80, lora_alpha=160, lora_dropout=0.05, target_modules=LINEARS, use_dora=kind == "dora", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=True).to(device)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps):
        ids = torch.randint(1, settings["vocab_size"], (rows, length), device=device)
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=cuda):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        norm = sum(float(p.grad.norm()) for p in trained if p.grad is not None)
        optimizer.zero_grad()
    median = statistics.median(seconds[2:])
    row = {"program": f"peft {peft.__version__}", "kinds": kind, "step_s": round(median, 4)}
    row |= {"us_per_token": round(median / rows / length * 1e6, 2), "gradient_norms": round(norm, 3)}
    row |= {"recompute": recompute}
    if cuda:
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("kinds", nargs="*", default=["lora"], choices=["lora", "dora"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--steps", type=int, default=8)
    options = parser.parse_args()
    for kind in options.kinds:
        print(json.dumps(measure(options.shape, kind, options.recompute, options.steps, options.device)), flush=True)


if __name__ == "__main__":
    main()
