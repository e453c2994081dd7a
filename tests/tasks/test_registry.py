"""The table of tasks, and its metric."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mlora.tasks import TASKS, Source, UnknownTaskError, accuracy, find_task
from mlora.tasks.base import register


def test_tasks_are_registered_under_their_names() -> None:
    letters = {name for name, task in TASKS.items() if task.protocol == "letter"}
    paper = {"arc-e", "arc-c", "boolq", "obqa", "piqa", "siqa", "hellaswag", "winogrande"}
    assert letters >= paper | {"csqa", "pubmedqa"}
    assert all(name == task.name and task.version >= 1 for name, task in TASKS.items())


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(UnknownTaskError, match="unknown task 'hellaswang'; did you mean hellaswag"):
        find_task("hellaswang")
    assert find_task("boolq") is TASKS["boolq"]


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="'boolq' is already registered"):
        register("boolq", "letter", Source("x/y"), metrics=("accuracy",))(TASKS["boolq"].build)


def test_tasks_and_data_load_without_heavy_packages() -> None:
    heavy = "{'torch', 'transformers', 'datasets', 'pyarrow', 'pandas'}"
    check = f"import sys, mlora.tasks, mlora.data; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_accuracy_and_its_standard_error() -> None:
    score = accuracy([True, True, False, True])
    assert (score.value, score.n) == (0.75, 4)
    # The sample standard deviation of 1, 1, 0, 1 is 0.5; over sqrt(4).
    assert score.stderr == pytest.approx(0.25)
    assert accuracy([True]).stderr is None
    with pytest.raises(ValueError, match="no answers"):
        accuracy([])
