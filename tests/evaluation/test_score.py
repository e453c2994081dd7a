"""Packed scoring equals a slow, independent scorer: one row at a time, plain transformers, full softmax."""

from __future__ import annotations

import random

import pytest
import torch

from mlora.adapters import METHODS
from mlora.data import EncodedQuestion
from mlora.evaluation import Request, predict
from mlora.model.multi import MultiAdapterModel
from tests.families import VOCABULARY, awaken, multi


@pytest.fixture(scope="module", params=["llama", "gemma2", "phi"])
def model(request: pytest.FixtureRequest) -> MultiAdapterModel:
    model = multi(request.param)
    model.add_adapter("x", METHODS["lora"](r=4, lora_dropout=0.5))
    model.add_adapter("m", METHODS["mixlora"](r=4, lora_dropout=0.5, num_experts=4, router_init_range=0.5))
    awaken(model)
    model.train()  # scoring must not drop out whatever the mode
    return model


def questions(count: int, longest_choice: int) -> list[EncodedQuestion]:
    draw = random.Random(0)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, VOCABULARY) for _ in range(n))

    made = []
    for _ in range(count):
        options = draw.randrange(2, 6)
        firsts = draw.sample(range(3, VOCABULARY), options)
        choices = tuple((first, *tokens(draw.randrange(longest_choice))) for first in firsts)
        unscored = tuple(draw.randrange(len(choice)) for choice in choices)
        lengths = tuple(draw.randrange(1, 20) for _ in choices)
        made.append(EncodedQuestion(tokens(draw.randrange(2, 12)), choices, unscored, lengths, draw.randrange(options)))
    return made


def slow_log_likelihood(
    model: MultiAdapterModel, adapter: str | None, prompt: tuple, choice: tuple, unscored: int
) -> float:
    model.scope.default = adapter
    ids = torch.tensor([[*prompt, *choice]])
    with torch.no_grad():
        logits = model.hf_model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].double()
    model.scope.default = None
    log_p = logits.log_softmax(-1)
    return sum(log_p[len(prompt) + i - 1, token].item() for i, token in enumerate(choice) if i >= unscored)


@pytest.mark.parametrize("batch_size", [1, 7, 32])
@pytest.mark.parametrize("protocol", ["letter", "loglikelihood"])
def test_equals_the_slow_scorer(model: MultiAdapterModel, protocol: str, batch_size: int) -> None:
    asked = questions(20, 1 if protocol == "letter" else 4)
    requests = [Request(adapter, q) for q in asked for adapter in ("x", None, "m")]
    predictions = list(predict(model, requests, protocol, batch_size))
    assert len(predictions) == len(requests)
    for request, prediction in zip(requests, predictions, strict=True):
        q = request.question
        choices = zip(q.choice_ids, q.unscored, strict=True)
        expected = [slow_log_likelihood(model, request.adapter, q.prompt_ids, ids, skip) for ids, skip in choices]
        if protocol == "loglikelihood":
            assert prediction.scores == pytest.approx(expected, abs=1e-3)
            normed = [e / n for e, n in zip(expected, q.choice_characters, strict=True)]
            assert prediction.answer("acc_norm") == normed.index(max(normed))
        assert prediction.answer("accuracy" if protocol == "letter" else "acc") == expected.index(max(expected))
