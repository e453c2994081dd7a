"""One training step of ours on random weights and synthetic tokens: forward, backward and optimizer.

    python -m benchmarks.step 7b lora mixlora mixlora+mixlora [--device cuda] [--recompute all] [--compile] [--graphs]

Prints a line of JSON for each: median seconds of a step, microseconds per token, peak memory. Dropout 0.05, adapters on
all linear layers, AdamW included, the norm of all gradients beside it, which must not be 0. Rows have one length, so
batches are not filled up.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mlora import Batch, MultiAdapterModel
from mlora.config import JobConfig, parse_adapter
from mlora.model.attention import PACKED
from mlora.model.batch import Row
from mlora.model.graphs import Graphs, Weights
from mlora.model.load import Origin
from mlora.model.recompute import WHATS, Recompute
from mlora.training.job import build_optimizer


def _llama(hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int, vocabulary: int) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocabulary,
    }


SHAPES = {
    "tiny": (_llama(64, 128, 2, 4, 4, 256), 2, 32),
    "135m": (_llama(576, 1536, 30, 9, 3, 49152), 16, 128),
    "7b": (_llama(4096, 11008, 32, 32, 32, 32000), 8, 512),
}
"""Settings of the model, rows of a batch for each adapter, tokens of a row."""
MIXTURE = {"routing_strategy": "mixlora", "num_experts": 8, "top_k": 2, "r": 16, "lora_alpha": 32}
METHODS = {
    "lora": {"r": 80, "lora_alpha": 160},
    "dora": {"r": 80, "lora_alpha": 160, "use_dora": True},
    "mixlora": MIXTURE,
    "mixdora": MIXTURE | {"use_dora": True},
    "loramoe": {"routing_strategy": "loramoe", "num_experts": 6, "r": 24, "lora_alpha": 48, "target_modules": "mlp"},
    "mola": {"routing_strategy": "mola", "num_experts": 8, "top_k": 2, "r": 10, "lora_alpha": 20},
}


def build(shape: str, device: str) -> MultiAdapterModel:
    """Return a Llama of random bf16 weights."""
    settings, _, _ = SHAPES[shape]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if device != "cpu" else torch.float32)
    with torch.device(device):
        base = LlamaForCausalLM._from_config(LlamaConfig(**settings), attn_implementation=PACKED)
    torch.set_default_dtype(torch.float32)
    model = MultiAdapterModel(base.requires_grad_(False).eval(), Origin(shape, shape))
    model.check_packing()
    return model


def measure(
    model: MultiAdapterModel,
    shape: str,
    kinds: list[str],
    steps: int,
    device: str,
    profiled: int,
    graphs: Graphs | None,
) -> dict:
    """Time steps of adapters of these kinds in one batch; print the kernels that took longest in a further one."""
    settings, rows, length = SHAPES[shape]
    cuda = device != "cpu"
    optimizers, names = [], []
    for number, kind in enumerate(kinds):
        name = model.add_adapter(f"{kind}_{number}", parse_adapter(METHODS[kind] | {"lora_dropout": 0.05}))
        names.append(name)
        job = JobConfig(name=name, method=model.adapters[name])
        optimizers.append(build_optimizer(job, job.method, model.adapter_parameters(name)))
    model.train()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    profiler = torch.profiler.profile()
    for step in range(steps + bool(profiled)):
        if step == steps:
            profiler.start()
        tokens = torch.randint(1, settings["vocab_size"], (rows * len(kinds), length)).tolist()
        packed = [Row(t, t, names[i // rows], i % rows) for i, t in enumerate(tokens)]
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        if graphs is None:
            batch = Batch.pack(packed, dict.fromkeys(names, step), model.device)
            sum(o.loss + o.aux_loss for o in model(batch).values()).backward()
        else:
            by_name = {name: packed[i * rows : (i + 1) * rows] for i, name in enumerate(names)}
            weights = dict.fromkeys(names, Weights(1 / rows / (length - 1), 1.0))
            if graphs.losses_and_gradients(by_name, dict.fromkeys(names, step), weights) is None:
                raise SystemExit("the step could not be recorded")
        for optimizer in optimizers:
            optimizer.step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        norm = sum(float(p.grad.norm()) for n in names for _, p in model.adapter_parameters(n) if p.grad is not None)
        for optimizer in optimizers:
            optimizer.zero_grad()
    if profiled:
        profiler.stop()
        by = "self_device_time_total" if cuda else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=by, row_limit=profiled, max_name_column_width=60))
    median = statistics.median(seconds[2:steps])
    parameters = sum(model.num_parameters(name) for name in names)
    row = {
        "kinds": "+".join(kinds),
        "step_s": round(median, 4),
        "us_per_token": round(median / len(tokens) / length * 1e6, 2),
    }
    row |= {"parameters": parameters, "gradient_norms": round(norm, 3), "recompute": model.recompute.what}
    row |= {"compiled": model.compiled, "graphs": graphs is not None}
    if cuda:
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    for name in names:
        model.remove_adapter(name)
    del optimizers
    gc.collect()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("kinds", nargs="*", default=list(METHODS), help="methods, several joined by + for one batch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recompute", choices=WHATS, default="none")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--graphs", action="store_true", help="record the step as a CUDA graph")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--profile", type=int, default=0, help="kernels to list")
    options = parser.parse_args()
    model = build(options.shape, options.device)
    model.recompute = Recompute(options.recompute)
    if options.compile:
        model.compile()
    for spec in options.kinds:
        graphs = Graphs(model) if options.graphs else None
        try:
            print(
                json.dumps(
                    measure(
                        model, options.shape, spec.split("+"), options.steps, options.device, options.profile, graphs
                    )
                ),
                flush=True,
            )
        except torch.cuda.OutOfMemoryError as error:
            print(json.dumps({"kinds": spec, "error": str(error)[:100]}), flush=True)
            for name in list(model.adapters):
                model.remove_adapter(name)
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
