"""Every key of a method, and of a job's optimization, changes what a training computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mlora.adapters import METHODS
from mlora.config import JobConfig, parse_adapter
from mlora.config.schema import entry_schema
from mlora.training.job import Job
from mlora.training.trainer import train
from tests.config.test_load import another
from tests.families import multi
from tests.training.test_promises import samples

BESIDE: dict[str, dict[str, Any]] = {
    "momentum": {"optim": "sgd"},
    "weight_decay": {"lr": 0.05},
    "max_grad_norm": {"optim": "sgd"},
    "warmup_ratio": {"num_epochs": 3},
}
"""Settings that a key needs to have an effect."""
JOB = {
    "optim": "sgd", "lr": 1e-2, "loraplus_lr_ratio": 4.0, "momentum": 0.9, "weight_decay": 0.5, "max_grad_norm": 1e-3,
    "scheduler_type": "cosine", "warmup_steps": 3, "warmup_ratio": 0.5, "batch_size": 3, "micro_batch_size": 2,
    "num_epochs": 3, "group_by_length": True,
}  # fmt: skip


def outcome(method: Any, **settings: Any) -> tuple:
    """Return all that a short training leaves: its forwards, its losses, its rates and its tensors."""
    model = multi()
    model.add_adapter("a", method)
    forwards: list[int] = []
    model.hf_model.model.layers[0].register_forward_hook(lambda _, inputs, output: forwards.append(output.numel()))
    config = JobConfig(name="a", method=method, **{"batch_size": 4, "num_epochs": 2, "lr": 3e-3} | settings)
    job = Job(config, samples(10, 1), model, seed=5)
    measured: list[tuple] = []
    keys = ("loss", "aux_loss", "lr")
    train(model, [job], None, lambda s: measured.extend(tuple(float(job.measured[k]) for k in keys) for _ in s))
    return forwards, measured, {k: t.tolist() for k, t in model.adapter_tensors("a").items()}


@pytest.mark.parametrize("key", JOB)
def test_r15_a_key_of_a_job_changes_its_training(key: str) -> None:
    method, beside = METHODS["lora"](r=4, lora_dropout=0.1), BESIDE.get(key, {})
    assert outcome(method, **beside) != outcome(method, **beside | {key: JOB[key]})


WITH = {"r": 4, "lora_dropout": 0.1, "router_loss": True, "router_aux_loss_coef": 0.1, "num_experts": 3}
VALUES = {"expert_lora": {"r": 2}, "router_loss": False, "top_p": 0.3, "expert_capacity": 2, "capacity_factor": 0.1}
"""Values that tell where another one than the default would do the same on so little data."""


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, cls in METHODS.items() for key in cls.model_fields])
def test_r15_a_key_of_a_method_changes_its_training(name: str, key: str) -> None:
    torch.manual_seed(0)
    fields = METHODS[name].model_fields
    usual = {k: v for k, v in WITH.items() if k in fields} | {"routing_strategy": name}
    value = VALUES.get(key, another(key, entry_schema(METHODS[name])["properties"][key]))
    assert outcome(parse_adapter(usual)) != outcome(parse_adapter(usual | {key: value}))
