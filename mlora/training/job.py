"""One adapter in training: its rows in order, its optimizer, its schedule.

Where a job stands is one number, the optimizer steps it has done; everything else (epoch, order, rows, random
streams, learning rate) follows from it, so a job resumes exactly, and never depends on its company.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mlora.config import JobConfig
from mlora.data import Sample, epoch_order
from mlora.model.batch import IGNORED, Row
from mlora.model.errors import ModelError
from mlora.model.multi import AdapterOutput, MultiAdapterModel


class Job:
    """Trains one adapter of a model.

    Args:
        config: the adapter's entry of the config.
        samples: its training rows.
        model: that holds the adapter under the config's name.
        seed: of the run; with the adapter's name and the epoch it fixes the order of rows.
    """

    def __init__(self, config: JobConfig, samples: Sequence[Sample], model: MultiAdapterModel, seed: int) -> None:
        self.config, self.name, self.samples, self.seed = config, config.name, samples, seed
        self.batch_size = config.batch_size
        self.micro_batch_size = min(config.micro_batch_size, self.batch_size)
        self.steps_per_epoch = math.ceil(len(samples) / self.batch_size)
        self.total_steps = self.steps_per_epoch * config.num_epochs
        self.step = 0
        named = model.adapter_parameters(self.name)
        self.parameters = [parameter for _, parameter in named]
        self.optimizer = build_optimizer(config, model.adapters[self.name], named)
        self.schedule = build_schedule(config, self.optimizer, self.total_steps)
        self._order: tuple[int, list[int]] = (-1, [])
        self._pending: list[list[Row]] = []
        self._step_targets = self._step_tokens = 0
        self.measured: dict[str, float] = {}

    @property
    def done(self) -> bool:
        """Whether every step of every epoch is taken."""
        return self.step >= self.total_steps

    @property
    def epoch(self) -> int:
        """Epoch of the step to come, from 0."""
        return self.step // self.steps_per_epoch

    def next_rows(self) -> list[Row]:
        """Return the micro-batch to compute next."""
        if not self._pending:
            rows = self.rows_of(self.step)
            self._step_targets = sum(_targets(row) for row in rows)
            self._step_tokens = sum(len(row.input_ids) for row in rows)
            size = self.micro_batch_size
            self._pending = [rows[i : i + size] for i in range(0, len(rows), size)]
            self.measured = {"loss": 0.0, "aux_loss": 0.0, "num_tokens": float(self._step_tokens)}
        return self._pending[0]

    def rows_of(self, step: int) -> list[Row]:
        """Return all rows of an optimizer step."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            lengths = [len(sample.input_ids) for sample in self.samples]
            self._order = (
                epoch,
                epoch_order(
                    len(self.samples),
                    seed=self.seed,
                    adapter=self.name,
                    epoch=epoch,
                    batch_size=self.batch_size,
                    lengths=lengths,
                    group_by_length=self.config.group_by_length,
                ),
            )
        chosen = self._order[1][position * self.batch_size : (position + 1) * self.batch_size]
        samples = [self.samples[i] for i in chosen]
        return [Row(s.input_ids, s.labels, self.name, index) for index, s in enumerate(samples)]

    def share(self, output: AdapterOutput) -> torch.Tensor:
        """Return the micro-batch's part of the step's objective.

        The token loss of a step is the sum over its micro-batches divided by the label tokens of the whole step;
        auxiliary losses are weighted by real tokens, since they are means over tokens.
        """
        tokens = sum(len(row.input_ids) for row in self._pending[0])
        loss = output.loss * (int(output.num_tokens) / max(self._step_targets, 1))
        aux = output.aux_loss * (tokens / self._step_tokens)
        self.measured["loss"] += float(loss.detach())
        self.measured["aux_loss"] += float(aux.detach())
        return loss + aux

    def advance(self) -> bool:
        """Count the micro-batch as done; after the last of a step, update the adapter and return True."""
        self._pending.pop(0)
        if self._pending:
            return False
        limit = self.config.max_grad_norm
        norm = nn.utils.clip_grad_norm_(self.parameters, math.inf if limit is None else limit)
        self.measured |= {"lr": self.optimizer.param_groups[0]["lr"], "grad_norm": float(norm)}
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.step += 1
        return True

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps besides the adapter's tensors."""
        return {"step": self.step, "optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go back to where a checkpoint was made."""
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self._pending = []


def _targets(row: Row) -> int:
    return sum(label != IGNORED for label in row.labels[1:])


def build_optimizer(config: JobConfig, method: Any, named: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    """Return the optimizer that a config asks for; LoRA+ gives some tensors a learning rate of their own."""
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named:
        groups.setdefault(method.learning_rate_scale(name, config.loraplus_lr_ratio), []).append(parameter)
    params = [{"params": tensors, "lr": config.lr * scale} for scale, tensors in sorted(groups.items())]
    decay = config.weight_decay
    if config.optim == "sgd":
        return torch.optim.SGD(params, lr=config.lr, momentum=config.momentum, weight_decay=decay)
    if config.optim == "adamw8bit":
        try:
            import bitsandbytes
        except ImportError as error:
            raise ModelError("optim: 'adamw8bit' needs bitsandbytes: pip install 'mlora[quant]'") from error
        return bitsandbytes.optim.AdamW8bit(params, lr=config.lr, weight_decay=decay)
    return torch.optim.AdamW(params, lr=config.lr, weight_decay=decay, fused=True)


def build_schedule(config: JobConfig, optimizer: torch.optim.Optimizer, total_steps: int) -> Any:
    """Return transformers' learning-rate schedule of the config's name."""
    from transformers import get_scheduler

    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    return get_scheduler(config.scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=total_steps)
