"""What saving checkpoints beside the training costs.

    python -m benchmarks.checkpoint 7b lora [--device cuda] [--steps 20]

Trains one adapter in one go: so many steps alone, then a checkpoint that only makes everything ready, then two that are
measured, each until it is on the disk. Prints a line of JSON: seconds of a step, what `save` takes of the training
thread, how many steps were slower by how much meanwhile, the whole cost of a checkpoint in seconds, and that cost as a
share of `save_step` steps. `best_seconds` is what the best state takes, which is written between two steps.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.step import build
from benchmarks.work import METHODS, SHAPES
from mlora.config import JobConfig, RunConfig, parse_adapter
from mlora.data import Sample
from mlora.training.checkpoint import Checkpoints
from mlora.training.job import Job
from mlora.training.trainer import train

WARM = 4
"""Steps in which kernels are compiled and graphs recorded."""


class Save(NamedTuple):
    """One checkpoint.

    Attributes:
        begun, written: when it was begun, and seen to be on the disk.
        call: seconds that the training waited for `save`.
        steps: taken meanwhile.
    """

    begun: float
    call: float
    written: float
    steps: int


def measure(shape: str, method: str, device: str, steps: int, folder: Path) -> dict:
    """Return what a checkpoint costs; the loop is entered once, so that its graphs are recorded once."""
    model = build(shape, device)
    model.add_adapter("a", parse_adapter(METHODS[method]))
    settings, rows, length = SHAPES[shape]
    draw = random.Random(0)
    ids = [tuple(draw.randrange(3, settings["vocab_size"]) for _ in range(length)) for _ in range(rows)]
    samples = [Sample(row, row, "t") for row in ids]
    job = Job(JobConfig(name="a", method=model.adapters["a"], batch_size=rows, num_epochs=10**6), samples, model, 0)
    checkpoints = Checkpoints(folder, [job], model)
    ends: list[float] = []
    saves: list[Save] = []

    def after_round(_: list[Job]) -> bool:
        if device != "cpu":
            torch.cuda.synchronize()
        checkpoints.check()
        now = time.perf_counter()
        ends.append(now)
        if len(ends) < WARM + steps or checkpoints.writing:
            return False
        if saves and not saves[-1].written:
            saves[-1] = saves[-1]._replace(written=now, steps=len(ends) - saves[-1].steps)
        if len(saves) == 3:
            return True
        checkpoints.save()
        saves.append(Save(now, time.perf_counter() - now, 0.0, len(ends)))
        return False

    train(model, [job], None, after_round)
    usual = statistics.median(later - earlier for earlier, later in pairwise(ends[WARM - 1 : WARM + steps]))
    measured = saves[1:]
    begun = time.perf_counter()
    checkpoints.save_best(job)
    best = time.perf_counter() - begun
    cost = statistics.mean(save.written - save.begun - save.steps * usual for save in measured)
    interval = RunConfig.model_fields["save_step"].default
    size = sum(file.stat().st_size for file in folder.rglob("step-*/*"))
    return {
        "shape": shape,
        "method": method,
        "device": torch.cuda.get_device_name() if device != "cpu" else device,
        "parameters": model.num_parameters("a"),
        "checkpoint_bytes": size // len(list(folder.glob("*/step-*"))),
        "step_seconds": usual,
        "save_call_seconds": [save.call for save in measured],
        "written_after_seconds": [save.written - save.begun for save in measured],
        "steps_meanwhile": [save.steps for save in measured],
        "cost_seconds": cost,
        "save_step": interval,
        "cost_share": cost / (interval * usual),
        "best_seconds": best,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("method", choices=METHODS, nargs="?", default="lora")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as place:
        print(json.dumps(measure(given.shape, given.method, given.device, given.steps, Path(place)), indent=1))
