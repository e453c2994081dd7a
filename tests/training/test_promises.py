"""Isolation, accumulation and resuming of jobs that train together, dropout on."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mlora.adapters import METHODS
from mlora.config import JobConfig
from mlora.data import Sample
from mlora.model.batch import Batch, Row
from mlora.model.recompute import WHATS, Recompute, What
from mlora.training.checkpoint import Checkpoints
from mlora.training.job import Job
from mlora.training.trainer import train
from tests.families import VOCABULARY, multi

LORA = METHODS["lora"](r=4, lora_dropout=0.1)
MIXTURE = METHODS["mixlora"](r=3, lora_dropout=0.05, num_experts=4, top_k=2, jitter_noise=0.05, router_init_range=0.3)
GAUSSIAN = METHODS["lora"](r=2, lora_dropout=0.2, lora_init="gaussian", target_modules="attention", use_rslora=True)


def samples(count: int, seed: int) -> list[Sample]:
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        ids = tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randrange(4, 14)))
        answer = draw.randrange(1, len(ids) - 1)
        rows.append(Sample(ids, (-100,) * answer + ids[answer:], "t"))
    return rows


CONFIGS = {
    "a": JobConfig(name="a", method=LORA, batch_size=4, micro_batch_size=2, num_epochs=4, lr=3e-3, warmup_steps=3),
    "b": JobConfig(
        name="b", method=MIXTURE, batch_size=6, micro_batch_size=6, num_epochs=7, lr=2e-3, scheduler_type="cosine"
    ),
    "c": JobConfig(
        name="c", method=GAUSSIAN, batch_size=3, micro_batch_size=1, num_epochs=3, lr=2e-3, max_grad_norm=0.5
    ),
}
ROWS = {"a": samples(41, 1), "b": samples(34, 2), "c": samples(22, 3)}  # 44, 42 and 24 steps


def run(names: str, together: int | None = None, recompute: What = "none") -> tuple[dict, dict]:
    """Train jobs together; return each one's losses by step and its final tensors."""
    model = multi()
    model.recompute = Recompute(recompute)
    for name in names:
        model.add_adapter(name, CONFIGS[name].method)
    jobs = [Job(CONFIGS[name], ROWS[name], model, seed=5) for name in names]
    losses: dict[str, list[float]] = {name: [] for name in names}
    train(model, jobs, together, lambda stepped: _note(stepped, losses))
    assert all(job.done for job in jobs)
    return losses, {name: {k: t.clone() for k, t in model.adapter_tensors(name).items()} for name in names}


def _note(stepped: list[Job], losses: dict[str, list[float]]) -> bool:
    for job in stepped:
        losses[job.name].append(job.measured["loss"] + job.measured["aux_loss"])
    return False


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Return how far the tensors of two runs differ, as a share of each one's largest value."""
    return max(float((t - other[key]).abs().max() / max(t.abs().max(), 1e-3)) for key, t in one.items())


def losses_apart(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(one, other, strict=True))


def assert_equal_runs(one: tuple[dict, dict], other: tuple[dict, dict], name: str) -> dict[str, float]:
    first = losses_apart(one[0][name][:1], other[0][name][:1])
    found = {
        "losses within": losses_apart(one[0][name], other[0][name]),
        "weights": apart(one[1][name], other[1][name]),
    }
    assert first <= 1e-6 and found["losses within"] <= 1e-5 and found["weights"] <= 1e-4, (first, found)
    return found


@pytest.mark.parametrize("name", "abc")
def test_r1_trained_together_as_trained_alone(name: str, record_property: Callable[[str, object], None]) -> None:
    together = run("abc")
    alone = run(name)
    assert len(alone[0][name]) >= 16
    for what, value in assert_equal_runs(alone, together, name).items():
        record_property(what, value)
    start = {k: t for k, t in _untrained(name).items() if "lora_B" in k}
    assert any((alone[1][name][k] - t).abs().max() > 1e-3 for k, t in start.items()), "nothing was trained"


def test_jobs_wait_for_a_place_and_end_as_ever() -> None:
    one_by_one, two_at_once = run("abc", together=1), run("cab", together=2)
    for name in "abc":
        assert_equal_runs(one_by_one, two_at_once, name)


@pytest.mark.parametrize("recompute", WHATS[1:])
def test_recomputed_training_is_the_same(recompute: What) -> None:
    plain, recomputed = run("ab"), run("ab", recompute=recompute)
    for name in "ab":
        assert_equal_runs(plain, recomputed, name)


def _untrained(name: str) -> dict:
    model = multi()
    model.add_adapter(name, CONFIGS[name].method)
    return model.adapter_tensors(name)


@pytest.mark.parametrize("method", [LORA, MIXTURE.model_copy(update={"router_loss": False})], ids=["lora", "mixlora"])
def test_r4_accumulation_changes_nothing(method, record_property: Callable[[str, object], None]) -> None:
    ends = []
    for micro in (8, 4, 1):
        config = JobConfig(name="x", method=method, batch_size=8, micro_batch_size=micro, num_epochs=2, lr=1e-3)
        model = multi()
        model.add_adapter("x", method)
        losses: dict[str, list[float]] = {"x": []}
        train(model, [Job(config, samples(21, 4), model, 5)], None, lambda stepped: _note(stepped, losses))  # noqa: B023
        ends.append((losses["x"], model.adapter_tensors("x")))
    assert len(ends[0][0]) == 6, "21 rows in batches of 8 are three steps an epoch, the last of five rows"
    by_losses = max(losses_apart(losses, ends[0][0]) for losses, _ in ends[1:])
    by_weights = max(apart(ends[0][1], tensors) for _, tensors in ends[1:])
    record_property("losses within", by_losses)
    record_property("weights", by_weights)
    assert by_losses <= 1e-5 and by_weights <= 1e-4


def test_gradient_of_a_step_is_normalised_by_its_label_tokens() -> None:
    """Two micro-batches with 1 and many labels: the mean over all labels, not the mean of the two means."""
    rows = [Sample((5, 6, 7), (-100, -100, 7), "t"), Sample(tuple(range(3, 13)), (-100, *range(4, 13)), "t")]
    config = JobConfig(name="x", method=METHODS["lora"](r=4), batch_size=2, micro_batch_size=1, num_epochs=1)
    model = multi()
    model.add_adapter("x", config.method)
    seen: dict[str, list[float]] = {"x": []}
    train(model, [Job(config, rows, model, 5)], None, lambda stepped: _note(stepped, seen))
    base = multi()
    base.add_adapter("x", config.method)
    out = base(Batch.pack([Row(s.input_ids, s.labels, "x") for s in rows]))["x"]
    assert out.num_tokens == 10 and seen["x"][0] == pytest.approx(out.loss.item(), rel=1e-6)


def test_auxiliary_losses_of_micro_batches_weigh_by_their_tokens() -> None:
    rows = [Sample(tuple(range(3, 3 + n)), (-100, *range(4, 3 + n)), "t") for n in (3, 40)]
    method = METHODS["mixlora"](r=2, num_experts=4, router_init_range=2.0, router_aux_loss_coef=1.0)
    config = JobConfig(name="x", method=method, batch_size=2, micro_batch_size=1, num_epochs=1)
    model = multi()
    model.add_adapter("x", method)
    apart = [float(model(Batch.pack([Row(s.input_ids, s.labels, "x")]))["x"].aux_loss) for s in rows]
    assert abs(apart[0] - apart[1]) > 1e-2
    job = Job(config, rows, model, 5)
    train(model, [job], None, lambda stepped: False)
    assert job.measured["aux_loss"] == pytest.approx((3 * apart[0] + 40 * apart[1]) / 43, rel=1e-5)


@pytest.mark.parametrize("stops", [(7, 23), (1, 2, 40), (3, 60, 61, 62)])
@pytest.mark.parametrize("together", [None, 2])
def test_r2_resumed_training_is_bit_identical(stops: tuple[int, ...], together: int | None, tmp_path: Path) -> None:
    straight = run("abc", together)
    losses: dict[str, list[float]] = {name: [] for name in "abc"}
    rounds = 0
    for stop in (*stops, 10**9):
        model = multi()
        for name in "abc":
            model.add_adapter(name, CONFIGS[name].method)
        jobs = [Job(CONFIGS[name], ROWS[name], model, seed=5) for name in "abc"]
        checkpoints = Checkpoints(tmp_path, jobs, model)
        assert checkpoints.restore() == (rounds > 0)

        def after(stepped: list[Job]) -> bool:
            nonlocal rounds
            rounds += 1
            _note(stepped, losses)
            if rounds >= stop or any(job.done for job in stepped):  # noqa: B023
                checkpoints.save()  # noqa: B023
            return rounds >= stop  # noqa: B023

        with checkpoints:
            train(model, jobs, together, after)
    assert losses == straight[0]
    for name in "abc":
        for key, tensor in model.adapter_tensors(name).items():
            assert torch.equal(tensor, straight[1][name][key]), key


def test_r2_pissa_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """Its initial values come from a factorisation, whose layout is not a file's."""
    method = METHODS["lora"](r=4, lora_init="pissa")
    config = JobConfig(name="p", method=method, batch_size=4, num_epochs=4, lr=1e-2)
    ends = []
    for folder, stops in (("straight", (10**9,)), ("resumed", (5, 10**9))):
        for stop in stops:
            model = multi()
            model.add_adapter("p", method)
            job = Job(config, ROWS["a"], model, seed=5)
            checkpoints = Checkpoints(tmp_path / folder, [job], model)
            checkpoints.restore()
            with checkpoints:
                train(model, [job], None, lambda stepped: job.step >= stop)  # noqa: B023
                checkpoints.save()
        ends.append(model.adapter_tensors("p"))
    assert all(torch.equal(tensor, ends[1][key]) for key, tensor in ends[0].items())


@pytest.mark.parametrize("place", ["weights", "gradient"])
def test_r12_a_nan_of_one_adapter_is_its_own(place: str) -> None:
    """Its step is left out; the others go on as if nothing had happened, to the bit."""
    ends = []
    for broken in (False, True):
        model = multi()
        for name in "abc":
            model.add_adapter(name, CONFIGS[name].method)
        jobs = [Job(CONFIGS[name], ROWS[name], model, seed=5) for name in "abc"]
        losses: dict[str, list[float]] = {name: [] for name in "abc"}
        spoilt = jobs[0].parameters[0]
        kept = spoilt.detach().clone()

        def after(stepped: list[Job]) -> bool:
            _note(stepped, losses)  # noqa: B023
            if broken:  # noqa: B023
                # step 4 of a, its second micro-batch, is computed with this; what was there before comes back after it
                if (jobs[0].step, jobs[0].row) == (3, 2):  # noqa: B023
                    kept.copy_(spoilt.detach())  # noqa: B023
                    (spoilt.data if place == "weights" else spoilt.grad).fill_(float("nan"))  # noqa: B023
                elif (jobs[0].step, jobs[0].row) == (4, 0):  # noqa: B023
                    spoilt.data.copy_(kept)  # noqa: B023
            return False

        train(model, jobs, None, after)
        assert all(job.done and not job.diverged for job in jobs)
        ends.append((losses, {n: {k: t.clone() for k, t in model.adapter_tensors(n).items()} for n in "abc"}))
    (healthy, tensors), (spoilt_losses, others) = ends
    assert spoilt_losses["a"] != healthy["a"]
    assert all(t.isfinite().all() for t in others["a"].values())
    for name in "bc":
        assert spoilt_losses[name] == healthy[name]
        assert all(torch.equal(tensor, others[name][key]) for key, tensor in tensors[name].items())
