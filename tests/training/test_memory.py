"""Running out of memory changes what is computed together, never what comes out."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch

from mlora.adapters import METHODS
from mlora.config import JobConfig
from mlora.data import EncodedQuestion
from mlora.evaluation import Request, predict
from mlora.model.memory import in_batches
from mlora.model.multi import MultiAdapterModel
from mlora.training.heldout import HeldOut
from mlora.training.job import Job
from mlora.training.trainer import train
from tests.families import awaken, multi
from tests.training.test_promises import GAUSSIAN, LORA, MIXTURE, apart, losses_apart, samples

CONFIGS = [
    JobConfig(name="a", method=LORA, batch_size=4, micro_batch_size=2, num_epochs=2, lr=3e-3),
    JobConfig(name="b", method=MIXTURE.model_copy(update={"router_loss": False}), batch_size=6, num_epochs=2, lr=2e-3),
    JobConfig(name="c", method=GAUSSIAN, batch_size=3, micro_batch_size=1, num_epochs=2, lr=2e-3),
]
ROWS = [samples(18, 1), samples(20, 2), samples(13, 3)]


def limit(model: MultiAdapterModel, place: str, tokens: int) -> list[int]:
    """Let more tokens than these run out of memory at the end of the first layer, on the way there or back."""
    refused: list[int] = []

    def check(layer: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        count = output.shape[:-1].numel()

        def refuse(_: torch.Tensor | None = None) -> None:
            refused.append(count)
            raise torch.OutOfMemoryError("injected")

        if count > tokens:
            if place == "forward":
                refuse()
            output.register_hook(refuse)

    model.hf_model.model.layers[0].register_forward_hook(check)
    return refused


def outcome(place: str | None, tokens: int = 0) -> tuple[list[float], dict[str, torch.Tensor], list[int], list[Job]]:
    model = multi()
    for config in CONFIGS:
        model.add_adapter(config.name, config.method)
    refused = limit(model, place, tokens) if place else []
    jobs = [Job(config, rows, model, seed=5) for config, rows in zip(CONFIGS, ROWS, strict=True)]
    losses: dict[str, list[float]] = {job.name: [] for job in jobs}

    def note(stepped: list[Job]) -> bool:
        for job in stepped:
            losses[job.name].append(job.measured["loss"])
        return False

    train(model, jobs, None, note)
    tensors = {f"{n}.{k}": t.clone() for n in losses for k, t in model.adapter_tensors(n).items()}
    return [value for name in losses for value in losses[name]], tensors, refused, jobs


@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize(("tokens", "sizes", "said"), [(60, [1, 3, 1], "is now"), (27, [1, 1, 1], "share a forward")])
def test_r13_training_out_of_memory_ends_as_ever(
    place: str,
    tokens: int,
    sizes: list[int],
    said: str,
    caplog: pytest.LogCaptureFixture,
    record_property: Callable[[str, object], None],
) -> None:
    losses, tensors, _, _ = outcome(None)
    with caplog.at_level(logging.WARNING, "mlora"):
        again, others, refused, jobs = outcome(place, tokens)
    assert refused and [job.micro_batch_size for job in jobs] == sizes
    assert said in caplog.text
    by_losses, by_weights = losses_apart(again, losses), apart(tensors, others)
    record_property("losses within", by_losses)
    record_property("weights", by_weights)
    assert by_losses <= 1e-5 and by_weights <= 1e-4


def test_a_backward_that_broke_off_leaves_no_gradient() -> None:
    """Bit for bit what the smaller micro-batch alone would have computed, in the middle of an accumulation too."""
    ends = []
    for broken in (False, True):
        model = multi()
        model.add_adapter("a", LORA)
        config = JobConfig(name="a", method=LORA, batch_size=6, micro_batch_size=2, num_epochs=1)
        job = Job(config, samples(6, 5), model, seed=5)
        lengths = [len(row.input_ids) for row in job.rows_of(0)]
        first, second = sum(lengths[:2]), sum(lengths[2:4])
        assert second > first, "it is the second micro-batch that does not fit"
        if broken:
            refused = limit(model, "backward", first)
        else:
            job.micro_batch_size = 1
        train(model, [job], None, lambda stepped: False)
        ends.append(model.adapter_tensors("a"))
    assert refused == [second] and job.micro_batch_size == 1
    for key, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][key]), key


def test_a_row_that_does_not_fit_ends_the_run_with_advice() -> None:
    model = multi()
    model.add_adapter("a", LORA)
    job = Job(JobConfig(name="a", method=LORA), samples(4, 1), model, seed=5)
    limit(model, "forward", 2)
    with pytest.raises(torch.OutOfMemoryError, match="one row of a does not fit.*gradient_checkpointing"):
        train(model, [job], None, lambda stepped: False)


def test_other_errors_are_no_shortage_of_memory() -> None:
    model = multi()
    model.add_adapter("a", LORA)
    job = Job(JobConfig(name="a", method=LORA), samples(4, 1), model, seed=5)

    def refuse(*_: object) -> None:
        raise RuntimeError("shapes differ")

    model.hf_model.model.layers[0].register_forward_hook(refuse)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(model, [job], None, lambda stepped: False)
    assert job.micro_batch_size == 16


def questions(count: int) -> list[EncodedQuestion]:
    rows = samples(count, 8)
    choices, unscored = ((5, 6), (7,), (8, 9, 10)), (0, 0, 1)
    return [EncodedQuestion(r.input_ids, choices, unscored, (2, 1, 3), i % 3) for i, r in enumerate(rows)]


@pytest.mark.parametrize("protocol", ["letter", "loglikelihood"])
def test_r6_evaluation_out_of_memory_scores_as_ever(protocol: str, caplog: pytest.LogCaptureFixture) -> None:
    model = multi()
    model.add_adapter("a", METHODS["lora"](r=4))
    model.add_adapter("b", MIXTURE)
    awaken(model)
    requests = [Request(name, question) for question in questions(9) for name in ("a", "b", None)]
    expected = list(predict(model, requests, protocol, 12))
    refused = limit(model, "forward", 60)
    found = list(predict(model, requests, protocol, 12))
    assert refused and "goes on with" in caplog.text
    assert [(p.chosen, p.chosen_by_length) for p in found] == [(p.chosen, p.chosen_by_length) for p in expected]
    for one, other in zip(expected, found, strict=True):
        assert one.scores == pytest.approx(other.scores, rel=1e-5, abs=1e-5)


def test_held_out_loss_out_of_memory_is_the_same() -> None:
    model = multi()
    model.add_adapter("a", LORA)
    awaken(model)
    held_out = HeldOut("a", samples(11, 4), 8)
    expected = held_out.loss(model)
    assert not limit(model, "forward", 10**6)
    refused = limit(model, "forward", 30)
    assert held_out.loss(model) == pytest.approx(expected, rel=1e-6) and refused


@pytest.mark.parametrize("capacity", [1, 2, 3, 7])
def test_every_item_is_computed_once_and_in_order(capacity: int) -> None:
    def compute(capacity: int) -> Callable[[list[int]], list[int]]:
        def result(items: list[int]) -> list[int]:
            if len(items) > capacity:
                raise torch.OutOfMemoryError("injected")
            return items

        return result

    batches = list(in_batches(list(range(23)), 16, compute(capacity)))
    assert [i for batch in batches for i in batch] == list(range(23))
    assert max(map(len, batches)) <= capacity
    with pytest.raises(torch.OutOfMemoryError):
        list(in_batches([1], 1, compute(0)))
