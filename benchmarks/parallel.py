"""Steps on several GPUs: how much of each is used, and a base model that lies on all of them together.

    python -m benchmarks.parallel 7b lora mixlora --gpus 2            # on one, then on two: efficiency
    python -m benchmarks.parallel 30b lora mixlora --gpus 2 --shard   # a sharded base of random weights
    python -m benchmarks.parallel tiny lora mixlora --gpus 2 --device cpu

Every rank computes as many rows as `benchmarks.step` does (8 of 512 tokens at 7B), so a step of N ranks has N times the
rows. Efficiency is the seconds of a step on one GPU over those of a step on N. A line of JSON for each: median seconds
of a step, tokens per second of all ranks, the last loss, and the peak memory of each rank.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import time
from itertools import pairwise
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.step import build
from benchmarks.work import DROPOUT, METHODS, SHAPES
from mlora import MultiAdapterModel
from mlora.config import JobConfig, parse_adapter
from mlora.data import Sample
from mlora.model.attention import PACKED
from mlora.model.load import Origin
from mlora.model.recompute import WHATS, Recompute
from mlora.parallel import Ranks
from mlora.parallel.shard import mesh_of
from mlora.training.job import Job
from mlora.training.trainer import train

WARM = 3
"""Steps that are not counted: kernels are compiled, graphs recorded."""


def build_sharded(shape: str, ranks: Ranks, device: str) -> MultiAdapterModel:
    """Return a Llama of random weights of which this rank holds its part; none ever holds all."""
    config = LlamaConfig(**SHAPES[shape].settings)
    torch.set_default_dtype(torch.bfloat16 if device != "cpu" else torch.float32)
    with torch.device("meta"):
        base: Any = LlamaForCausalLM._from_config(config, attn_implementation=PACKED)
    torch.set_default_dtype(torch.float32)
    model = MultiAdapterModel(base.requires_grad_(False).eval(), Origin(shape, shape))
    base.to_empty(device="cpu")  # pages that nobody has written to take no memory
    base.model.rotary_emb = type(base.model.rotary_emb)(config)
    model.shard(mesh_of(ranks.count, device))
    torch.manual_seed(0)
    for name, parameter in base.named_parameters():
        own = parameter.to_local() if hasattr(parameter, "to_local") else parameter.data
        own.fill_(1) if "norm" in name else own.normal_(std=0.02)
    model.check_packing()
    return model


def measure(model: MultiAdapterModel, shape: str, kind: str, ranks: Ranks, steps: int) -> dict[str, Any]:
    """Train one adapter of a kind and return what a step takes."""
    settings, rows, length = SHAPES[shape]
    rows *= ranks.count
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(1, settings["vocab_size"], (rows * (steps + WARM), length), generator=draw).tolist()
    samples = [Sample(tuple(row), tuple(row), "synthetic") for row in ids]
    method = parse_adapter(METHODS[kind] | {"lora_dropout": DROPOUT})
    model.add_adapter(kind, method)
    config = JobConfig(name=kind, method=method, batch_size=rows, micro_batch_size=rows // ranks.count, num_epochs=1)
    job = Job(config, samples, model, 42, ranks=ranks)
    ended = [time.perf_counter()]
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def after_round(stepped: list[Job]) -> bool:
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        ended.append(time.perf_counter())
        return False

    train(model, [job], None, after_round, ranks)
    median = statistics.median(b - a for a, b in pairwise(ended[WARM:]))
    peak = torch.cuda.max_memory_allocated() / 2**30 if model.device.type == "cuda" else None
    model.remove_adapter(kind)
    return {
        "kind": kind,
        "gpus": ranks.count,
        "sharded": model.sharded,
        "rows": rows,
        "step_s": round(median, 4),
        "tokens_per_s": round(rows * length / median),
        "loss": round(job.measured["loss"], 4),
        "gradient_norm": round(job.measured["grad_norm"], 3),
        "recompute": model.recompute.what,
        "compiled": model.compiled,
        "peak_gib": [None if peak is None else round(peak, 2) for peak in ranks.gather(peak)],
    }


def rank(number: int, count: int, port: int, options: argparse.Namespace, answers: Any) -> None:
    """Be one of the ranks: measure all kinds."""
    if count > 1:
        said = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in said.items()} | {"MASTER_ADDR": "127.0.0.1"}
    ranks = Ranks.from_environment()
    with ranks.joined(options.device):
        device = options.device
        model = build_sharded(options.shape, ranks, device) if options.shard else build(options.shape, device)
        model.recompute = Recompute(options.recompute)
        if options.compile:
            model.compile()
        for kind in options.kinds:
            measured = measure(model, options.shape, kind, ranks, options.steps)
            if ranks.first:
                answers.put(measured)


def main() -> None:
    """Run the benchmark and print its lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("kinds", nargs="*", default=["lora", "mixlora"], help=", ".join(METHODS))
    parser.add_argument("--gpus", type=int, nargs="+", default=[2], help="numbers of ranks to compare with one")
    parser.add_argument("--shard", action="store_true", help="spread the base over them; not run on one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recompute", choices=WHATS, default="none")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    alone: dict[str, float] = {}
    for count in options.gpus if options.shard else [1, *options.gpus]:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        answers = torch.multiprocessing.get_context("spawn").SimpleQueue()
        torch.multiprocessing.spawn(rank, (count, port, options, answers), nprocs=count)
        while not answers.empty():
            line = answers.get()
            if count == 1:
                alone[line["kind"]] = line["step_s"]
            elif line["kind"] in alone:
                line["efficiency"] = round(alone[line["kind"]] / line["step_s"], 3)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
