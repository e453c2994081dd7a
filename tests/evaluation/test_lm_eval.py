"""The harness's tasks on our adapters: what it measures of its own model class, for several adapters at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval", reason="needs the package lm-eval")

from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from mlora.adapters import METHODS
from mlora.evaluation import lm_eval as bridge
from mlora.evaluation.evaluate import BASE
from mlora.model.multi import MultiAdapterModel
from tests import tinybase
from tests.families import awaken

ROWS = [
    {"q": "What is red?", "a": ["blood", "the sea", "grass"], "right": 0, "text": "A rose is red. " * 3},
    {"q": "What is wet?", "a": ["dust", "rain"], "right": 1, "text": "Rain is wet, " * 12},
    {"q": "What flies?", "a": ["a bird", "a stone", "a mole", "a fish"], "right": 0, "text": "Birds fly."},
]
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "Q: {{q}}\nA:",
        "doc_to_choice": "a",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "blank": {
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_choice": "a",
        "doc_to_target": "right",
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "Q: {{q}}\nA:",
        "doc_to_target": "{{a[right]}}",
        "generation_kwargs": {"until": ["e"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinybase.save(tmp_path_factory.mktemp("tiny"), max_position_embeddings=96)


@pytest.fixture(scope="module")
def model(folder: Path) -> MultiAdapterModel:
    model = MultiAdapterModel.from_pretrained(str(folder))
    model.add_adapter("x", METHODS["lora"](r=4))
    model.add_adapter("m", METHODS["mixlora"](r=4, num_experts=2, router_init_range=0.5))
    awaken(model)
    return model


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    place = tmp_path_factory.mktemp("rows") / "test.jsonl"
    place.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place)}, "cache_dir": str(place.parent)},
        "test_split": "test",
        "metadata": {"version": 3},
    }
    return [{"task": name, **shared, **settings} for name, settings in TASKS.items()]


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager(include_defaults=False)


def responses(found: dict[str, Any]) -> dict[str, list[Any]]:
    return {task: [sample["filtered_resps"] for sample in rows] for task, rows in found["samples"].items()}


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    own, other = responses(ours), responses(theirs)
    for task in ("choices", "blank"):
        for mine, yours in zip(own[task], other[task], strict=True):
            assert [bool(greedy) for _, greedy in mine] == [bool(greedy) for _, greedy in yours]
            assert [float(s) for s, _ in mine] == pytest.approx([float(s) for s, _ in yours], abs=1e-4)
    assert own["rolling"] == [pytest.approx(value, abs=1e-3) for value in other["rolling"]]
    assert own["answers"] == other["answers"]
    for task, measured in theirs["results"].items():
        for metric, value in measured.items():
            if isinstance(value, float):
                assert ours["results"][task][metric] == pytest.approx(value, rel=1e-5), (task, metric)


def test_every_kind_of_request_equals_the_harness_s_own_model(
    folder: Path, model: MultiAdapterModel, tasks: list[dict[str, Any]], manager: TaskManager
) -> None:
    settings = {"task_manager": manager, "bootstrap_iters": 0}
    ours = bridge.evaluate(model, ["x", None, "m"], tasks, batch_size=2, **settings)
    plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    theirs = HFLM(pretrained=plain, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=1)
    compare(ours[None], evaluator.simple_evaluate(theirs, tasks=tasks, **settings))
    for name in ("x", "m"):
        model.scope.default = name
        theirs = HFLM(pretrained=model.hf_model, tokenizer=model.tokenizer, batch_size=1)
        compare(ours[name], evaluator.simple_evaluate(theirs, tasks=tasks, **settings))
    model.scope.default = None
    assert responses(ours["x"]) != responses(ours[None])


def test_adapters_share_the_batches(
    model: MultiAdapterModel, tasks: list[dict[str, Any]], manager: TaskManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    own = MultiAdapterModel.log_likelihoods
    monkeypatch.setattr(
        MultiAdapterModel,
        "log_likelihoods",
        lambda self, batch, *rest: batches.append([span.adapter for span in batch.spans]) or own(self, batch, *rest),
    )
    found = bridge.evaluate(model, ["x", None, "m"], tasks[:1], task_manager=manager, bootstrap_iters=0)
    assert batches == [["x", None, "m"]]
    rows = bridge.results(found)
    assert [(r.adapter, r.task, r.version, r.protocol, r.metric, r.n) for r in rows] == [
        (adapter, "choices", 3, "lm-eval", metric, 3) for adapter in ("x", BASE, "m") for metric in ("acc", "acc_norm")
    ]


def test_repeated_draws_differ(model: MultiAdapterModel) -> None:
    panel = bridge.Panel(model, ["x"])
    lm = bridge.AdapterLM(panel, "x")
    drawn = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 2.0}
    requests = [bridge.Instance("generate_until", {}, ("Q:", drawn), i) for i in range(4)]
    torch.manual_seed(0)
    assert len(set(lm.generate_until(requests))) > 1


def test_a_long_context_is_cut_as_the_harness_does(folder: Path, model: MultiAdapterModel) -> None:
    requests = [bridge.Instance("loglikelihood", {}, ("word " * 40, " end"), 0)]
    theirs = HFLM(pretrained=model.hf_model, tokenizer=model.tokenizer, batch_size=1).loglikelihood(requests)
    ours = bridge.AdapterLM(bridge.Panel(model, [None]), None).loglikelihood(requests)
    assert ours[0][0] == pytest.approx(theirs[0][0], abs=1e-4)
