"""One adapter in training: its rows in order, its optimizer, its schedule.

Where a job stands is two numbers, the optimizer steps it has done and the rows of the step in progress;
everything else (epoch, order, rows, random streams, learning rate) follows from them, so a job never depends on its
company and resumes exactly.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import math
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mlora.adapters.routed import Routed
from mlora.config import JobConfig
from mlora.data import Sample
from mlora.model.batch import IGNORED, Row
from mlora.model.errors import ModelError
from mlora.model.graphs import Losses
from mlora.model.inputs import Weights
from mlora.model.multi import AdapterOutput, MultiAdapterModel
from mlora.model.profile import RouterProfile
from mlora.parallel import ALONE, Ranks
from mlora.training.heldout import HeldOut
from mlora.training.order import Order
from mlora.training.schedule import build_schedule
from mlora.wording import install

MAX_SKIPPED = 5
"""Steps in a row without a finite gradient after which a job is given up."""
PROFILES = 20
"""Steps of a training whose routing is recorded where `evaluate_steps` does not say."""

log = logging.getLogger(__name__)


class Job:
    """Trains one adapter of a model.

    Args:
        config: the adapter's entry of the config.
        samples: its training rows.
        model: that holds the adapter under the config's name.
        seed: of the adapter; with its name and the epoch it fixes the order of rows.
        held_out: rows that decide which state of the adapter is kept; None keeps the last.
        ranks: processes that train this job together, each on rows of its own.

    Attributes:
        order: in which the rows come.
        step: optimizer steps done.
        row: rows of the step in progress that are done.
        micro_batches: computed so far, in all steps; those that ranks compute at the same time count once.
        micro_batch_size: rows of a forward pass: the config's, or fewer where memory did not suffice.
        counted: [2] the losses of this rank's part of the micro-batch in progress, weighted; None without rows.
        measured: of the step in progress, or of the last where none is.
        to_examine: whether an evaluation is due after the step just taken: every `evaluate_steps`, else at the end of
            an epoch, and at the very end. Who evaluates resets it.
    """

    def __init__(
        self,
        config: JobConfig,
        samples: Sequence[Sample],
        model: MultiAdapterModel,
        seed: int,
        held_out: HeldOut | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        self.config, self.name, self.samples, self.seed = config, config.name, samples, seed
        self.order = Order(config, samples, seed)
        self.steps_per_epoch, self.total_steps = self.order.steps_per_epoch, self.order.total_steps
        self.held_out, self.best_loss = held_out, math.inf
        self.step = self.row = self.micro_batches = self.skipped = 0
        self.micro_batch_size = config.micro_batch_size
        self.method = model.adapters[self.name]
        self._digest, self._base = digest(samples), model.fingerprint
        self.to_examine = False
        named = model.adapter_parameters(self.name)
        self.parameters = [parameter for _, parameter in named]
        self.optimizer = build_optimizer(config, self.method, named)
        self.schedule = build_schedule(config, self.optimizer, self.total_steps)
        self._step: _Step | None = None
        self.measured: dict[str, float] = {}
        self.counted: torch.Tensor | None = None
        self.routing: RouterProfile | None = None

    @property
    def done(self) -> bool:
        """Whether every step of every epoch is taken, or the job was given up."""
        return self.diverged or self.step >= self.total_steps

    @property
    def diverged(self) -> bool:
        """Whether the job was given up, because no step could be taken several times in a row."""
        return self.skipped >= MAX_SKIPPED

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint can only be resumed with."""
        only_measured = {"evaluate_steps", "evaluate_batch_size", "eval_data", "eval_limit"}
        described = self.config.model_dump(mode="json", exclude=only_measured)
        read = {"rows": len(self.samples), "digest of rows": self._digest, "digest of base model": self._base}
        return described | {"random_seed": self.seed} | read

    @property
    def epoch(self) -> int:
        """Epoch of the step to come, from 0."""
        return self.step // self.steps_per_epoch

    def next_rows(self) -> list[Row]:
        """Return the micro-batch to compute next: up to `micro_batch_size` rows for each rank."""
        if self._step is None:
            self._step = _Step.of(self.rows_of(self.step))
            if self.row == 0:
                self.measured = {"loss": 0.0, "aux_loss": 0.0, "num_tokens": float(self._step.tokens)}
            self.routing = RouterProfile(self.method) if self._is_profiled(self.step + 1) else None
        self.counted = None
        return self._step.rows[self.row : self._next_row]

    def _is_profiled(self, step: int) -> bool:
        if not isinstance(self.method, Routed):
            return False
        return step % (self.config.evaluate_steps or max(1, self.total_steps // PROFILES)) == 0

    def rows_of(self, step: int) -> list[Row]:
        """Return all rows of an optimizer step."""
        return self.order.rows_of(step)

    @property
    def _next_row(self) -> int:
        """Where the micro-batch in progress ends."""
        return min(self.row + self.micro_batch_size * self.ranks.count, len(self._require_step().rows))

    @property
    def ends_step(self) -> bool:
        """Whether the micro-batch in progress is the last of its step."""
        return self._next_row == len(self._require_step().rows)

    def share(self, output: AdapterOutput, rows: Sequence[Row]) -> torch.Tensor:
        """Return what rows of the micro-batch bring to the step's objective.

        The loss of a step is the sum over its micro-batches divided by the label tokens of the whole step, or by its
        rows in classification; auxiliary losses are weighted by real tokens, since they are means over tokens.
        """
        weights = self.weights(rows)
        loss = output.loss * (int(output.num_tokens) * weights.target)
        aux = output.aux_loss * weights.auxiliary
        self.count(Losses(loss.detach(), aux.detach()), output.router_logits)
        return loss + aux

    def weights(self, rows: Sequence[Row]) -> Weights:
        """Return the factors of the losses of rows of the micro-batch in the step's objective."""
        step = self._require_step()
        tokens = sum(len(row.input_ids) for row in rows)
        return Weights(1 / max(step.targets, 1), tokens / step.tokens)

    def count(self, losses: Losses, router_logits: Mapping[str, torch.Tensor]) -> None:
        """Take in this rank's part of the step's losses and what routers saw, without waiting for the device.

        Args:
            losses: of its rows of the micro-batch, weighted.
            router_logits: [n, E] of each router, by site path.
        """
        self.counted = torch.stack(list(losses))
        if self.routing is not None:
            self.routing.add(router_logits)

    def count_losses(self, losses: Sequence[float]) -> None:
        """Count the micro-batch as done.

        Args:
            losses: what all ranks together have counted.
        """
        for name, value in zip(Losses._fields, losses, strict=True):
            self.measured[name] += value
        self.row = self._next_row
        self.micro_batches += 1

    def end_step(self, norm: float) -> None:
        """Go on after the adapter was updated; it was not where the norm of its gradient is not finite."""
        self.measured |= {"lr": self.optimizer.param_groups[0]["lr"], "grad_norm": norm}
        if math.isfinite(norm):
            self.skipped = 0
        else:
            self.skipped += 1
            log.warning("%s: step %d is left out, its gradient is not finite", self.name, self.step + 1)
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        self.step, self.row, self._step = self.step + 1, 0, None
        self.to_examine = self.done or self.step % (self.config.evaluate_steps or self.steps_per_epoch) == 0

    def restart_step(self) -> None:
        """Forget what was computed of the step in progress: a backward that broke off has added to some gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        self.row, self._step = 0, None

    def _require_step(self) -> _Step:
        if self._step is None:
            raise RuntimeError(f"job {self.name!r} has no step in progress: call next_rows() first")
        return self._step

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps besides the adapter's tensors."""
        return {
            "step": self.step,
            "row": self.row,
            "micro_batches": self.micro_batches,
            "micro_batch_size": self.micro_batch_size,
            "skipped": self.skipped,
            "to_examine": self.to_examine,
            "best_loss": self.best_loss,
            "measured": self.measured,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "gradients": {i: p.grad for i, p in enumerate(self.parameters) if self.row and p.grad is not None},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go back to where a checkpoint was made."""
        self.step, self.row, self._step = state["step"], state["row"], None
        self.micro_batches, self.micro_batch_size = state["micro_batches"], state["micro_batch_size"]
        self.skipped, self.to_examine = state["skipped"], state["to_examine"]
        self.measured, self.best_loss = state["measured"], state["best_loss"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        for i, gradient in state["gradients"].items() if self.ranks.first else ():  # what all ranks had added up
            self.parameters[i].grad = gradient.to(self.parameters[i].device)


@dataclass(frozen=True)
class _Step:
    """The rows of an optimizer step.

    Attributes:
        rows: in order.
        targets: their label tokens, or their number in classification.
        tokens: all of their tokens.
    """

    rows: list[Row]
    targets: int
    tokens: int

    @classmethod
    def of(cls, rows: list[Row]) -> _Step:
        return cls(rows, sum(map(_targets, rows)), sum(len(row.input_ids) for row in rows))


def digest(samples: Sequence[Sample]) -> str:
    """Return a digest of rows in their order."""
    found = hashlib.sha256()
    for sample in samples:
        for numbers in (sample.input_ids, sample.labels, (-1 if sample.class_id is None else sample.class_id,)):
            found.update(array("q", [len(numbers), *numbers]).tobytes())
    return found.hexdigest()[:16]


def _targets(row: Row) -> int:
    return sum(label != IGNORED for label in row.labels[1:]) if row.class_id is None else 1


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
            bnb: Any = importlib.import_module("bitsandbytes.optim")
        except ImportError as error:
            raise ModelError(f"optim: 'adamw8bit' needs bitsandbytes: {install('quant')}") from error
        return bnb.AdamW8bit(params, lr=config.lr, weight_decay=decay)
    return torch.optim.AdamW(params, lr=config.lr, weight_decay=decay, fused=True)


def optimizer_bytes(config: JobConfig, parameters: int) -> int:
    """Return the bytes that an optimizer keeps of so many parameters: means and squares, or momentum."""
    eight_bits = 2 + 2 * 4 / 256  # and a float32 for every block of 256
    each = {"sgd": 4 if config.momentum else 0, "adamw8bit": eight_bits}.get(config.optim, 8)
    return round(each * parameters)
