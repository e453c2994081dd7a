"""The whole config file: what all adapters of a run share, and the adapters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from mlora.adapters import METHODS
from mlora.config.errors import did_you_mean, show
from mlora.config.job import JobConfig
from mlora.config.names import same_folder

Positive = Annotated[int, Field(ge=1)]


class RunConfig(BaseModel):
    """Settings of a run, and one job for each of its adapters."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    cutoff_len: Literal[-1] | Positive = 512
    """Longest sequence in tokens; -1 is the base model's maximum."""
    save_step: Positive = 1000
    """Optimizer steps between checkpoints of an adapter."""
    keep_last: Positive = 2
    """Newest checkpoints kept; with one there is none to go back to where it is damaged."""
    train_lora_simultaneously_num: Positive | None = None
    """Adapters that share a forward pass in training; all where left out."""
    eval_lora_simultaneously_num: Positive | None = None
    """Adapters that share a forward pass in evaluation; all where left out."""
    inference_lora_simultaneously_num: Positive | None = None
    """Adapters that share a forward pass in generation; all where left out."""
    evaluate_result: str | None = None
    """File that the results of an evaluation are written to as well, as JSON."""
    sweep: tuple[str, ...] = ()
    """Keys of the adapters whose values are compared: the results are ranked by them. `gen --sweep` writes it."""
    train_lora_candidate_num: Positive | None = None
    """No effect: accepted because the predecessors' files have it."""
    train_strategy: Literal["optim", "none"] | None = None
    """No effect: both fill batches alike, because packed sequences need no padding to be saved."""
    lora: tuple[JobConfig, ...] = Field(min_length=1)
    """The adapters, trained independently of each other."""

    @field_validator("sweep")
    @classmethod
    def _keys_of_adapters(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        known = {*JobConfig.model_fields, *(key for method in METHODS.values() for key in method.model_fields)}
        unknown = [key for key in value if key not in known]
        if unknown:
            raise ValueError(f"{show(unknown[0])} is no key of an adapter{did_you_mean(unknown[0], known)}")
        return value

    @field_validator("lora")
    @classmethod
    def _own_folders(cls, value: tuple[JobConfig, ...]) -> tuple[JobConfig, ...]:
        pair = same_folder(job.name for job in value)
        if pair is not None:
            raise ValueError(f"expected names that differ by more than case, not {show(pair[0])} and {show(pair[1])}")
        return value
