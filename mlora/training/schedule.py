"""The learning rate over a training, as a factor of the config's.

In the w steps of the warmup the factor rises from 0 along a line. Afterwards p = (t - w) / (n - w) is how far step t
of n has come:

constant              1
linear                1 - p
cosine                (1 + cos pi p) / 2
cosine_with_restarts  the same, of one cycle
polynomial            1 - p, ending at a rate of 1e-7 rather than 0
inverse_sqrt          sqrt(w / t); without a warmup sqrt(10000 / (10000 + t))

These are transformers' schedules of the same names and their defaults. They are written out because its module of them
imports PEFT, and with it every quantisation package that is installed: seconds of each start, and their notices.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR

from mlora.config import JobConfig

POLYNOMIAL_END = 1e-7
"""Learning rate that "polynomial" ends at."""
TIMESCALE = 10_000
"""Steps over which "inverse_sqrt" falls where there is no warmup."""


def build_schedule(config: JobConfig, optimizer: torch.optim.Optimizer, total_steps: int) -> LambdaLR:
    """Return the schedule that a config asks for, its warmup included.

    Args:
        config: of the job.
        optimizer: whose learning rates follow it.
        total_steps: optimizer steps of the whole training.
    """
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    after = _factor(config, warmup, total_steps)
    return LambdaLR(optimizer, lambda step: step / warmup if step < warmup else after(step))


def _factor(config: JobConfig, warmup: int, total_steps: int) -> Callable[[int], float]:
    """Return the factor of a step after the warmup."""

    def rest(step: int) -> float:
        return max(0.0, (total_steps - step) / max(1, total_steps - warmup))

    name = config.scheduler_type
    if name == "linear":
        return rest
    if name in ("cosine", "cosine_with_restarts"):
        return lambda step: (1 + math.cos(math.pi * (1 - rest(step)))) / 2
    if name == "polynomial":
        end = POLYNOMIAL_END / config.lr
        return lambda step: (1 - end) * rest(step) + end
    if name == "inverse_sqrt":
        scale = warmup or TIMESCALE
        return lambda step: math.sqrt(scale / (step + scale - warmup))
    return lambda step: 1.0
