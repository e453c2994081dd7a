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
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.work import DROPOUT, METHODS, SHAPES, WARM, Clock, Work, norms, row
from mlora import Batch, MultiAdapterModel
from mlora.config import JobConfig, parse_adapter
from mlora.model.attention import PACKED
from mlora.model.batch import Row
from mlora.model.graphs import Graphs, Weights
from mlora.model.load import Origin
from mlora.model.recompute import WHATS, Recompute
from mlora.training.job import build_optimizer


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


def measure(
    model: MultiAdapterModel, shape: str, work: Work, steps: int, profiled: int = 0, graphs: Graphs | None = None
) -> dict:
    """Time steps of a work; print the kernels that took longest in a further one."""
    names, optimizers = [], []
    for number, method in enumerate(work.methods):
        name = model.add_adapter(f"{method}_{number}", parse_adapter(METHODS[method] | {"lora_dropout": DROPOUT}))
        names.append(name)
        job = JobConfig(name=name, method=model.adapters[name])
        optimizers.append(build_optimizer(job, job.method, model.adapter_parameters(name)))
    model.train()
    clock = Clock(model.device.type)
    profiler = torch.profiler.profile()
    step = _plain(model, names, work, clock) if graphs is None else _recorded(graphs, names, work, clock)
    vocabulary = SHAPES[shape].settings["vocab_size"]
    for number in range(WARM + steps + bool(profiled)):
        if number == WARM + steps:
            profiler.start()
        tokens = torch.randint(1, vocabulary, (work.rows * len(names), work.length)).tolist()
        rows = [Row(t, t, names[i // work.rows], i % work.rows) for i, t in enumerate(tokens)]
        clock.begin()
        step(rows, number)
        for optimizer in optimizers:
            optimizer.step()
        clock.mark("optimizer")
        clock.end()
        gradients = norms(p for name in names for _, p in model.adapter_parameters(name))
        for optimizer in optimizers:
            optimizer.zero_grad()
    if profiled:
        profiler.stop()
        clock.seconds.pop(), clock.parts.pop()
        by = "self_device_time_total" if clock.cuda else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=by, row_limit=profiled, max_name_column_width=60))
    how = {"recompute": model.recompute.what, "compiled": model.compiled, "graphs": graphs is not None}
    how["parameters"] = sum(model.num_parameters(name) for name in names)
    return row("ours", shape, work, clock, gradients, **how)


Step = Callable[[list[Row], int], None]


def _plain(model: MultiAdapterModel, names: list[str], work: Work, clock: Clock) -> Step:
    def step(rows: list[Row], number: int) -> None:
        outputs = model(Batch.pack(rows, dict.fromkeys(names, number), model.device))
        loss = torch.stack([output.loss + output.aux_loss for output in outputs.values()]).sum()
        clock.mark("forward")
        loss.backward()
        clock.mark("backward")

    return step


def _recorded(graphs: Graphs, names: list[str], work: Work, clock: Clock) -> Step:
    weights = dict.fromkeys(names, Weights(1 / work.rows / (work.length - 1), 1.0))

    def step(rows: list[Row], number: int) -> None:
        by_name = {name: [row for row in rows if row.adapter == name] for name in names}
        if graphs.losses_and_gradients(by_name, dict.fromkeys(names, number), weights) is None:
            raise SystemExit("the step could not be recorded")
        clock.mark("forward and backward")

    return step


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
