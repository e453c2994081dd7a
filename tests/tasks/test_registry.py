"""The table of tasks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mlora.tasks import METRICS, TASKS, Source, UnknownTaskError, find_task, folder_names, known_tasks
from mlora.tasks.base import register

HARNESS = {
    "arc_easy": "arc-e",
    "arc_challenge": "arc-c",
    "boolq": "boolq",
    "openbookqa": "obqa",
    "piqa": "piqa",
    "social_iqa": "siqa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
}
"""Names of the eight in lm-evaluation-harness and in the paper."""


def test_tasks_are_registered_under_their_names() -> None:
    paper = {"arc-e", "arc-c", "boolq", "obqa", "piqa", "siqa", "hellaswag", "winogrande"}
    assert {name for protocol, name in TASKS if protocol == "letter"} >= paper | {"csqa", "pubmedqa"}
    assert {name for protocol, name in TASKS if protocol == "loglikelihood"} == HARNESS.keys()
    assert all(key == (task.protocol, task.name) and task.version >= 1 for key, task in TASKS.items())
    assert all(metric in METRICS for task in TASKS.values() for metric in task.metrics)
    assert all((protocol == "classification") == bool(task.labels) for (protocol, _), task in TASKS.items())
    assert {name for protocol, name in TASKS if protocol == "classification"} == {
        f"glue:{subset}" for subset in ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "wnli")
    }
    assert known_tasks() == sorted({name for _, name in TASKS})


def test_a_name_of_two_protocols_is_the_letter_one_unless_the_other_is_asked_for() -> None:
    assert find_task("piqa") is TASKS["letter", "piqa"]
    assert find_task("piqa", "loglikelihood") is TASKS["loglikelihood", "piqa"]
    assert find_task("arc_easy") is TASKS["loglikelihood", "arc_easy"]


def test_each_of_the_eight_is_found_in_both_protocols_by_either_name() -> None:
    for harness, paper in HARNESS.items():
        assert find_task(paper, "loglikelihood") is find_task(harness, "loglikelihood")
        assert find_task(harness, "letter") is find_task(paper, "letter")
        assert folder_names(harness) == ((harness, paper) if harness != paper else (paper,))


def test_a_task_without_the_protocol_names_those_that_have_it() -> None:
    message = "task 'csqa' has no form of the protocol 'loglikelihood'; tasks that have one: arc_challenge, arc_easy, "
    with pytest.raises(UnknownTaskError, match=message):
        find_task("csqa", "loglikelihood")


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(UnknownTaskError, match="unknown task 'hellaswang'; did you mean hellaswag"):
        find_task("hellaswang")


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="'boolq' of protocol 'letter' is already registered"):
        register("boolq", "letter", Source("x/y"), metrics=("accuracy",))(find_task("boolq").build)


def test_tasks_and_data_load_without_heavy_packages() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'pyarrow', 'pandas'}"
    check = f"import sys, mlora.tasks, mlora.data; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
