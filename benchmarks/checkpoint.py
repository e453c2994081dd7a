"""What saving checkpoints beside the training costs.

    python -m benchmarks.checkpoint 7b mixlora [--device cuda] [--steps 30]

Prints a line of JSON: seconds of a step, what `save` takes of the training thread, how much slower steps are while it
is written, the whole cost of a checkpoint in seconds, and that cost as a share of `save_step` steps.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.step import build
from benchmarks.work import METHODS, SHAPES
from mlora.config import JobConfig, RunConfig, parse_adapter
from mlora.data import Sample
from mlora.training.checkpoint import Checkpoints
from mlora.training.job import Job
from mlora.training.trainer import train


def measure(shape: str, method: str, device: str, steps: int, folder: Path) -> dict:
    """Train so many steps without a checkpoint, then save one and train until it is written."""
    model = build(shape, device)
    model.add_adapter("a", parse_adapter(METHODS[method]))
    settings, rows, length = SHAPES[shape]
    draw = random.Random(0)
    ids = [tuple(draw.randrange(3, settings["vocab_size"]) for _ in range(length)) for _ in range(rows)]
    samples = [Sample(row, row, "t") for row in ids]
    job = Job(JobConfig(name="a", method=model.adapters["a"], batch_size=rows, num_epochs=10**6), samples, model, 0)
    checkpoints = Checkpoints(folder, [job], model)

    def seconds(wanted: int) -> list[float]:
        taken: list[float] = []
        train(model, [job], None, lambda _: _noted(job, taken, lambda: len(taken) == wanted))
        return taken

    seconds(3)
    alone = seconds(steps)
    checkpoints.save()  # the first one also makes torch and the allocator ready for the copies
    checkpoints.wait()
    usual = statistics.median(alone)
    begun = time.perf_counter()
    checkpoints.save()
    saving = time.perf_counter() - begun
    beside: list[float] = []
    train(model, [job], None, lambda _: _noted(job, beside, lambda: _finished(checkpoints)))
    written = time.perf_counter() - begun
    cost = saving + sum(beside) - usual * len(beside)
    interval = RunConfig.model_fields["save_step"].default
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {
        "shape": shape,
        "method": method,
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "parameters": model.num_parameters("a"),
        "checkpoint_bytes": size // len(list(folder.glob("*/step-*"))),
        "step_seconds": usual,
        "save_call_seconds": saving,
        "written_after_seconds": written,
        "steps_meanwhile": len(beside),
        "step_seconds_meanwhile": statistics.median(beside),
        "cost_seconds": cost,
        "save_step": interval,
        "cost_share": cost / (interval * usual),
    }


def _noted(job: Job, taken: list[float], ends: object) -> bool:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    taken.append(job.measured["seconds"])
    return bool(ends())  # type: ignore[operator]


def _finished(checkpoints: Checkpoints) -> bool:
    checkpoints.check()
    return not checkpoints.writing


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("method", choices=METHODS, nargs="?", default="lora")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as place:
        print(json.dumps(measure(given.shape, given.method, given.device, given.steps, Path(place)), indent=1))
