"""Every method at once on SST-2: eleven adapters with classification heads over SmolLM2-135M, on the CPU.

    python -m benchmarks.methods [--data FOLDER] [--distinct 12] [--epochs 4] [--rows 2] [--base_model smollm2]

Trains them together, then times each alone, and prints a table: trainable parameters, mean loss of the first and the
last epoch, which are of the same rows, and each method's share of the time that all need one after the other.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from itertools import pairwise
from typing import Any

import torch

from mlora import MultiAdapterModel
from mlora.config import JobConfig, RunConfig, parse_config
from mlora.data import Samples, load_training_samples
from mlora.training.job import Job
from mlora.training.trainer import train

TASK = "glue:sst2"
SMALL = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05}
MIXTURE = SMALL | {"routing_strategy": "mixlora", "num_experts": 8, "top_k": 2}
METHODS: dict[str, dict[str, Any]] = {
    "lora": SMALL,
    "rslora": SMALL | {"use_rslora": True},
    "dora": SMALL | {"use_dora": True},
    "pissa": SMALL | {"lora_init": "pissa"},
    "lora-plus": SMALL | {"loraplus_lr_ratio": 16.0, "lr": 1e-4},
    "mixlora": MIXTURE,
    "mixdora": MIXTURE | {"use_dora": True},
    "mixlora-dynamic": SMALL | {"routing_strategy": "mixlora-dynamic", "num_experts": 8, "top_p": 0.8},
    "mixlora-switch": SMALL | {"routing_strategy": "mixlora-switch", "num_experts": 8},
    "loramoe": SMALL | {"routing_strategy": "loramoe", "num_experts": 6, "target_modules": "mlp"},
    "mola": SMALL | {"routing_strategy": "mola", "num_experts": 8, "top_k": 2},
}
"""Settings by name; all on every linear layer but LoRAMoE, whose own choice is the feed-forward block."""
TIMED = 4
"""Steps that a method is timed alone for; the first is not counted."""


def config(rows: int, epochs: int) -> RunConfig:
    """Return the typed config of all adapters."""
    shared = {"task_name": TASK, "batch_size": rows, "num_epochs": epochs, "lr": 5e-4}
    entries = [shared | {"name": name} | settings for name, settings in METHODS.items()]
    return parse_config({"cutoff_len": 64, "lora": entries})


def run(model: MultiAdapterModel, jobs: list[JobConfig], samples: Samples) -> tuple[dict[str, list[float]], float]:
    """Train new adapters together; return each one's losses and the median seconds of a step."""
    for job in jobs:
        model.add_adapter(job.name, job.method, num_labels=job.num_labels)
    losses: dict[str, list[float]] = {job.name: [] for job in jobs}
    ended = [time.perf_counter()]

    def after_round(stepped: list[Job]) -> bool:
        ended.append(time.perf_counter())
        for job in stepped:
            losses[job.name].append(job.measured["loss"])
        print(
            f"{len(jobs)} adapters, step {len(ended) - 1}: {ended[-1] - ended[-2]:.2f} s", file=sys.stderr, flush=True
        )
        return False

    train(model, [Job(job, samples, model, seed=42) for job in jobs], None, after_round)
    return losses, statistics.median(b - a for a, b in pairwise(ended[1:]))


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", default="smollm2")
    parser.add_argument("--data", help="folder with SST-2's train split; the hub's where left out")
    parser.add_argument("--distinct", type=int, default=12, help="rows of an epoch")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rows", type=int, default=2, help="of each adapter in a step")
    options = parser.parse_args()
    torch.manual_seed(42)
    model = MultiAdapterModel.from_pretrained(options.base_model)
    jobs = list(config(options.rows, options.epochs).lora)
    samples = load_training_samples(TASK, options.data, model.tokenizer, 64, limit=options.distinct)
    losses, together = run(model, jobs, samples)
    print(losses, file=sys.stderr)
    parameters = {job.name: model.num_parameters(job.name) for job in jobs}
    few = Samples(samples[: TIMED * options.rows])
    alone = {}
    for job in jobs:
        model.remove_adapter(job.name)
        alone[job.name] = run(model, [job.model_copy(update={"num_epochs": 1})], few)[1]
        model.remove_adapter(job.name)
    own = options.distinct // options.rows
    print(f"{len(jobs)} adapters, {options.epochs} x {own} steps of {options.rows} rows: {together:.2f} s a step,")
    print(f"{sum(alone.values()):.2f} s for one of each after the other\n")
    print("| method | trainable | first loss | last loss | s alone | share |\n| --- | --- | --- | --- | --- | --- |")
    means = {name: (statistics.mean(each[:own]), statistics.mean(each[-own:])) for name, each in losses.items()}
    for name, (first, last) in means.items():
        share = alone[name] / sum(alone.values())
        print(f"| {name} | {parameters[name]:,} | {first:.3f} | {last:.3f} | {alone[name]:.2f} | {share:.0%} |")
    print(
        f"\nlosses that did not fall: {', '.join(n for n, (first, last) in means.items() if last >= first) or 'none'}"
    )


if __name__ == "__main__":
    main()
