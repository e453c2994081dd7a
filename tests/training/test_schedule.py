"""What a job's settings promise of its steps: how many, at which rate, with which gradient."""

from __future__ import annotations

import pytest
import torch

from mlora import MultiAdapterModel
from mlora.adapters import METHODS
from mlora.config import JobConfig
from mlora.model.batch import Batch
from mlora.training.job import Job
from mlora.training.trainer import train
from tests import tinybase
from tests.families import awaken, multi, rows
from tests.training.test_promises import samples


def measured(count: int = 10, **settings: object) -> list[dict]:
    """Train one adapter and return what each of its steps measured."""
    config = JobConfig(name="x", method=METHODS["lora"](r=2), lr=0.1, **settings)
    model = multi()
    model.add_adapter("x", config.method)
    steps: list[dict] = []

    def note(stepped: list[Job]) -> bool:
        steps.extend(dict(job.measured) for job in stepped)
        return False

    train(model, [Job(config, samples(count, 1), model, 5)], None, note)
    return steps


@pytest.mark.parametrize("warmup", [{"warmup_steps": 4}, {"warmup_ratio": 0.4}])
def test_the_rate_rises_in_the_steps_of_the_warmup(warmup: dict) -> None:
    rates = [step["lr"] for step in measured(batch_size=1, num_epochs=1, **warmup)]
    assert rates == pytest.approx([0, 0.025, 0.05, 0.075, *[0.1] * 6])


def test_an_epoch_ends_with_a_step_of_what_is_left() -> None:
    """Rows of two epochs never share a step: 7 rows by 3 are 3 steps in each."""
    assert len(measured(7, batch_size=3, micro_batch_size=1, num_epochs=4)) == 12


def test_gradients_are_clipped_where_asked() -> None:
    def moved(limit: float | None) -> float:
        settings = {"optim": "sgd", "weight_decay": 0.0, "max_grad_norm": limit}
        config = JobConfig(name="x", method=METHODS["lora"](r=2), lr=1.0, batch_size=10, num_epochs=1, **settings)
        model = multi()
        model.add_adapter("x", config.method)
        awaken(model)
        before = [p.detach().clone() for _, p in model.adapter_parameters("x")]
        train(model, [Job(config, samples(10, 1), model, 5)], None, lambda done: False)
        steps = [(p - b).flatten() for (_, p), b in zip(model.adapter_parameters("x"), before, strict=True)]
        return torch.cat(steps).norm().item()

    assert moved(0.01) == pytest.approx(0.01, rel=1e-3) and moved(None) > 0.02


def test_a_name_that_is_used_again_is_a_new_adapter_also_after_an_evaluation() -> None:
    model = multi()
    ids, mask = rows(2)
    for r, alpha in ((2, 4), (5, 50)):
        model.add_adapter("x", {"r": r, "lora_alpha": alpha})
        model.eval()
        model.logits(ids, mask, ["x", "x"])
        model.train()
        model(Batch.from_rows(ids, mask, None, ["x", "x"]))["x"].loss.backward()
        shapes = {tensor.shape[0] for name, tensor in model.adapter_tensors("x").items() if "lora_A" in name}
        assert shapes == {r} and model.adapters["x"].scaling == alpha / r
        model.remove_adapter("x")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_is_the_one_asked_for(dtype: str, tmp_path) -> None:
    model = MultiAdapterModel.from_pretrained(str(tinybase.save(tmp_path / "b")), dtype=dtype)
    model.add_adapter("x", {"r": 2})
    assert {p.dtype for p in model.hf_model.parameters() if not p.requires_grad} == {getattr(torch, dtype)}
    assert all(p.dtype == torch.float32 for _, p in model.adapter_parameters("x"))
