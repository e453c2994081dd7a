"""One training step of ours on random weights and synthetic tokens: forward, backward and optimizer.

    python -m benchmarks.step 7b lora mixlora mixlora+mixlora [--device cuda] [--recompute all] [--compile] [--graphs]

Prints a line of JSON for each work (`benchmarks.work` says how one is written): median seconds of a step,
microseconds per token, its parts, peak memory. Dropout 0.05, adapters on all linear layers, AdamW included, the norm of
all gradients beside it, which must not be 0. Rows have one length, so batches are not filled up.
"""

from __future__ import annotations

import argparse
import gc
import json
from collections.abc import Sequence

import torch
from torch.optim import Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.work import DROPOUT, METHODS, SHAPES, WARM, Clock, Work, norms, row
from mlora import Batch, MultiAdapterModel
from mlora.config import JobConfig, parse_adapter
from mlora.model.attention import PACKED
from mlora.model.batch import IGNORED, Row
from mlora.model.graphs import Graphs
from mlora.model.inputs import Weights
from mlora.model.load import Origin
from mlora.model.recompute import WHATS, Recompute
from mlora.training.job import build_optimizer
from mlora.training.update import Updates


def build(shape: str, device: str, dtype: str | None = None) -> MultiAdapterModel:
    """Return a Llama of random weights, bf16 on a GPU and float32 elsewhere unless said otherwise."""
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16")))
    with torch.device(device):
        base = LlamaForCausalLM._from_config(LlamaConfig(**SHAPES[shape].settings), attn_implementation=PACKED)
    torch.set_default_dtype(torch.float32)
    model = MultiAdapterModel(base.requires_grad_(False).eval(), Origin(shape, shape))
    model.check_packing()
    return model


def equip(model: MultiAdapterModel, methods: Sequence[str]) -> dict[str, Optimizer]:
    """Add an adapter of each method and return their optimizers by name."""
    optimizers = {}
    for number, method in enumerate(methods):
        name = model.add_adapter(f"{method}_{number}", parse_adapter(METHODS[method] | {"lora_dropout": DROPOUT}))
        job = JobConfig(name=name, method=model.adapters[name])
        optimizers[name] = build_optimizer(job, job.method, model.adapter_parameters(name))
    model.train()
    return optimizers


def gradients(
    model: MultiAdapterModel, graphs: Graphs | None, rows: dict[str, list[Row]], number: int, clock: Clock
) -> None:
    """Compute the gradients of each adapter's rows, by a graph or plainly; the clock's step is under way."""
    steps = dict.fromkeys(rows, number)
    if graphs is None:
        outputs = model(Batch.pack([row for own in rows.values() for row in own], steps, model.device))
        loss = torch.stack([output.loss + output.aux_loss for output in outputs.values()]).sum()
        clock.mark("forward")
        loss.backward()
        clock.mark("backward")
        return
    weights = {name: Weights(1 / sum(len(row.labels) - row.labels.count(IGNORED) for row in own), 1.0)
               for name, own in rows.items()}  # fmt: skip
    if graphs.losses_and_gradients(rows, steps, weights) is None:
        raise RuntimeError("the step could not be recorded")
    clock.mark("forward and backward")


def measure(
    model: MultiAdapterModel, shape: str, work: Work, steps: int, profiled: int = 0, graphs: Graphs | None = None
) -> dict:
    """Time steps of a work; print the kernels that took longest in a further one."""
    optimizers, updates = equip(model, work.methods), Updates()
    clock = Clock(model.device.type)
    profiler = torch.profiler.profile()
    vocabulary = SHAPES[shape].settings["vocab_size"]
    for number in range(WARM + steps + bool(profiled)):
        if number == WARM + steps:
            profiler.start()
        rows = {}
        for name in optimizers:
            tokens = torch.randint(1, vocabulary, (work.rows, work.length)).tolist()
            rows[name] = [Row(t, t, name, index) for index, t in enumerate(tokens)]
        clock.begin()
        gradients(model, graphs, rows, number, clock)
        updates.step([*optimizers.values()], [None] * len(optimizers))
        clock.mark("optimizer")
        clock.end()
        found = norms(p for name in optimizers for _, p in model.adapter_parameters(name))
        for optimizer in optimizers.values():
            optimizer.zero_grad()
    if profiled:
        profiler.stop()
        clock.seconds.pop(), clock.parts.pop()
        by = "self_device_time_total" if clock.cuda else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=by, row_limit=profiled, max_name_column_width=60))
    how = {"recompute": model.recompute.what, "compiled": model.compiled, "graphs": graphs is not None}
    how["parameters"] = sum(model.num_parameters(name) for name in optimizers)
    return row("ours", shape, work, clock, found, **how)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("works", nargs="*", default=list(METHODS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--base_model", help="a model of this shape in place of random weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--recompute", choices=WHATS, default="none")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--graphs", action="store_true", help="record the step as a CUDA graph")
    parser.add_argument("--steps", type=int, default=6, help=f"that are counted, after {WARM}")
    parser.add_argument("--profile", type=int, default=0, help="kernels to list")
    options = parser.parse_args()
    works = [Work.parse(text, options.shape) for text in options.works]
    if options.base_model:
        dtype = options.dtype or "float32"
        model = MultiAdapterModel.from_pretrained(options.base_model, dtype, options.device)
    else:
        model = build(options.shape, options.device, options.dtype)
    model.recompute = Recompute(options.recompute)
    if options.compile:
        model.compile()
    for work in works:
        graphs = Graphs(model) if options.graphs else None
        try:
            figures = measure(model, options.shape, work, options.steps, options.profile, graphs)
        except (torch.OutOfMemoryError, RuntimeError) as error:  # the next work may do
            figures = {"program": "ours", "shape": options.shape, "work": str(work), "error": str(error)[:200]}
        print(json.dumps(figures), flush=True)
        del graphs
        for name in list(model.adapters):
            model.remove_adapter(name)
        gc.collect()
        if options.device != "cpu":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
