"""The settings of one adapter's training: what an entry of `lora` holds besides the method's own keys."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from mlora.adapters import Method
from mlora.config.errors import did_you_mean, show
from mlora.config.names import name_problem
from mlora.tasks import Protocol, UnknownTaskError, find_task, known_tasks
from mlora.wording import launcher

CASUAL = "casual"
"""Task name of plain instruction data, which has no benchmark."""

Scheduler = Literal[
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"
]
"""Schedules of transformers that need no argument besides the numbers of steps."""


def _labels(task_name: str, protocol: Protocol | None) -> tuple[str, ...]:
    return find_task(task_name, protocol).labels if task_name in known_tasks() else ()


OnBadRow = Literal["error", "skip"]
"""What an unusable row does: stop everything, or be left out and reported."""


def _whole_batch(earlier: dict[str, Any]) -> int:
    return int(earlier.get("batch_size", 1))  # it is missing where it is wrong


class JobConfig(BaseModel):
    """One adapter: what it learns from, how it is optimized, and its method."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    name: str
    """Name of the adapter and of its folder: letters, digits and ._- only, at most 64, unlike the others' even in
    lower case."""
    protocol: Protocol | None = None
    """How its tasks are put and scored: "letter", "classification" or "loglikelihood"; where left out, by letters
    where a task of that name has them."""
    task_name: str = CASUAL
    """A task of `launch.py avail`, several joined by ";" to train on their mixture, or "casual": instruction data."""
    data: str | None = None
    """Where the rows come from: a hub id, `id:subset`, a local file or folder, several joined by ";"; the task's
    published data set where left out."""
    eval_data: str | None = None
    """Data in the same form for a held-out loss; the checkpoint with the lowest is kept as best."""
    val_set_size: int = Field(0, ge=0)
    """Rows held out of the training data for that loss, chosen by the seed; 0 holds none out."""
    limit: int | None = Field(None, ge=1)
    """Rows read of each split, for quick looks; all where left out."""
    eval_limit: int | None = Field(None, ge=1)
    """Rows of each task that results are of; those of limit where left out."""
    prompt: str | None = None
    """Prompt template of instruction data, by name or path."""
    on_bad_row: OnBadRow = "error"
    """What an unusable row of its data does: stop the run before it begins, or be left out and reported."""
    train_on_inputs: bool = False
    """Whether the loss covers the prompt too, rather than the answer alone."""
    optim: Literal["adamw", "sgd", "adamw8bit"] = "adamw"
    """Optimizer; "adamw8bit" keeps its state in 8 bits, by bitsandbytes."""
    lr: float = Field(2e-4, gt=0)
    """Learning rate at the peak of the schedule."""
    loraplus_lr_ratio: float = Field(1.0, ge=1)
    """Learning rate of B divided by that of A (LoRA+)."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Momentum of sgd; adamw has its own."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay, per unit of learning rate."""
    max_grad_norm: float | None = Field(None, gt=0)
    """Largest norm of the adapter's gradient, clipped beyond; unclipped where left out."""
    scheduler_type: Scheduler = "constant"
    """Schedule of the learning rate, by transformers' name."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps in which the learning rate rises from 0, whatever the schedule."""
    warmup_ratio: float = Field(0.0, ge=0, le=1)
    """The same as a share of all optimizer steps; only one of the two."""
    batch_size: int = Field(16, ge=1)
    """Sequences of an optimizer step."""
    micro_batch_size: int = Field(default_factory=_whole_batch, ge=1)
    """Sequences of a forward pass; divides batch_size, and equals it where left out."""
    evaluate_batch_size: int = Field(16, ge=1)
    """Rows of a forward pass in evaluation."""
    num_epochs: int = Field(2, ge=1)
    """Passes over the training data."""
    evaluate_steps: int | None = Field(None, ge=1)
    """Optimizer steps between evaluations during training, on the rows of val_set_size or eval_data, or else on the
    task's validation split: never on those that results are of. None during training where left out."""
    group_by_length: bool = False
    """Whether sequences of similar length are drawn together."""
    sparse_step: int | None = None
    """No effect: accepted because the predecessors' files have it."""
    seed: int | None = Field(None, ge=0)
    """Seed of the adapter's initial values, order of rows, held-out rows and dropout; --random_seed where left out."""
    method: Method
    """The adapter's method with its own settings."""

    def seed_or(self, random_seed: int) -> int:
        """Return the adapter's own seed, or the run's where it has none."""
        return random_seed if self.seed is None else self.seed

    @property
    def num_labels(self) -> int | None:
        """Classes of the adapter's classification head; None where it has none, as all but GLUE's."""
        return len(_labels(self.task_name, self.protocol)) or None

    @field_validator("name")
    @classmethod
    def _safe(cls, value: str) -> str:
        problem = name_problem(value)
        if problem is not None:
            raise ValueError(problem)
        return value

    @field_validator("task_name")
    @classmethod
    def _registered(cls, value: str, info: ValidationInfo) -> str:
        names = [] if value == CASUAL else value.split(";")
        unknown = [name for name in names if name not in known_tasks()]
        if unknown:
            hint = did_you_mean(unknown[0], [*known_tasks(), CASUAL])
            raise ValueError(f"{show(unknown[0])} is no task, `{launcher()} avail` lists them{hint}")
        try:
            for name in names:
                find_task(name, info.data.get("protocol"))
        except UnknownTaskError as error:
            raise ValueError(str(error)) from None
        if len(set(value.split(";"))) < len(value.split(";")):
            raise ValueError("expected every task once")
        heads = [name for name in names if _labels(name, info.data.get("protocol"))]
        if heads and value != heads[0]:
            raise ValueError(f"{show(heads[0])} trains a classification head of its own; expected it alone")
        return value

    @field_validator("data")
    @classmethod
    def _one_for_each_task(cls, value: str | None, info: ValidationInfo) -> str | None:
        tasks = info.data.get("task_name", CASUAL).split(";")
        if value is None:
            return value
        paths = value.split(";")
        if not all(path.strip() for path in paths):
            raise ValueError('expected paths or hub ids joined by ";"')
        if tasks != [CASUAL] and len(paths) not in (1, len(tasks)):
            raise ValueError(f"expected one for each of the {len(tasks)} tasks, or a folder with a subfolder for each")
        return value

    @field_validator("val_set_size")
    @classmethod
    def _one_held_out_set(cls, value: int, info: ValidationInfo) -> int:
        if value and info.data.get("eval_data") is not None:
            raise ValueError("expected only one of eval_data and val_set_size")
        return value

    @field_validator("train_on_inputs")
    @classmethod
    def _has_answers(cls, value: bool, info: ValidationInfo) -> bool:
        if value and _labels(info.data.get("task_name", CASUAL), info.data.get("protocol")):
            raise ValueError(f"expected false: {show(info.data['task_name'])} trains a classification head, not tokens")
        return value

    @field_validator("warmup_ratio")
    @classmethod
    def _one_warmup(cls, value: float, info: ValidationInfo) -> float:
        if value and info.data.get("warmup_steps"):
            raise ValueError(f"expected only one of warmup_steps ({info.data['warmup_steps']}) and warmup_ratio")
        return value

    @field_validator("micro_batch_size")
    @classmethod
    def _divides(cls, value: int, info: ValidationInfo) -> int:
        if value >= 1 and info.data.get("batch_size", value) % value:
            raise ValueError(f"expected a divisor of batch_size ({info.data['batch_size']})")
        return value
