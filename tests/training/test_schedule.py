"""What a job's settings promise of its steps: how many, at which rate, with which gradient."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch

from mlora import MultiAdapterModel
from mlora.adapters import METHODS
from mlora.config import JobConfig
from mlora.config.job import Scheduler
from mlora.model.batch import Batch
from mlora.training.job import Job
from mlora.training.schedule import build_schedule
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


@pytest.mark.parametrize("name", get_args(Scheduler))
@pytest.mark.parametrize(("warmup", "total"), [(0, 9), (4, 9), (10, 9), (20, 9)])
def test_rates_are_those_of_transformers(name: Any, warmup: int, total: int) -> None:
    from transformers import get_scheduler

    def rates(build: Callable[[torch.optim.Optimizer], Any]) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        schedule, found = build(optimizer), []
        for _ in range(total):
            found += schedule.get_last_lr()
            optimizer.step()
            schedule.step()
        return found

    config = JobConfig(name="x", method=METHODS["lora"](r=2), lr=0.1, scheduler_type=name, warmup_steps=warmup)
    # theirs passes over the warmup of "constant"
    theirs = "constant_with_warmup" if name == "constant" else name
    ours = rates(lambda optimizer: build_schedule(config, optimizer, total))
    assert ours == pytest.approx(rates(lambda o: get_scheduler(theirs, o, warmup, total)), rel=1e-12, abs=1e-18)


@pytest.mark.parametrize("name", get_args(Scheduler))
def test_a_training_may_be_all_warmup(name: Any) -> None:
    """transformers' "polynomial" divides by zero there."""
    rates = [step["lr"] for step in measured(batch_size=5, num_epochs=1, warmup_steps=2, scheduler_type=name)]
    assert rates == [0, 0.05]


def test_training_imports_no_package_that_it_does_not_use() -> None:
    """PEFT costs seconds of each start, and bitsandbytes prints notices."""
    script = """if True:
        import sys
        from tests.training.test_schedule import measured
        measured(2, batch_size=1, num_epochs=1, scheduler_type="cosine")
        print(sorted({"peft", "bitsandbytes"} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


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
