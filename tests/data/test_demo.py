"""The project's own data sets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mlora.data import load_questions
from mlora.data.demo import THINGS, write_demo_data
from mlora.data.sources import task_rows
from mlora.tasks import find_task

WORDS = {name for names in THINGS.values() for name in names.split()}


def words(folder: Path, task: str, split: str) -> set[str]:
    """Things named in a split."""
    text = " ".join(str(dict(row.values)) for row in task_rows(find_task(task), str(folder / task), split))
    return WORDS & set(re.findall(r"\w+", text))


def test_no_thing_of_an_evaluation_row_is_in_a_training_row(tmp_path: Path) -> None:
    written = write_demo_data(tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for files in written.values() for path in files} == {
        "openbookqa/train.jsonl",
        "openbookqa/test.jsonl",
        "arc_easy/train.jsonl",
        "arc_easy/test.jsonl",
    }
    seen = words(tmp_path, "openbookqa", "train") | words(tmp_path, "arc_easy", "train")
    held_out = words(tmp_path, "openbookqa", "test") | words(tmp_path, "arc_easy", "test")
    assert seen
    assert held_out
    assert not seen & held_out


@pytest.mark.parametrize(("task", "kind"), [("arc_easy", "vehicle"), ("openbookqa", "clothing")])
def test_the_rule_decides_and_guessing_is_right_at_chance(tmp_path: Path, task: str, kind: str) -> None:
    write_demo_data(tmp_path)
    questions = load_questions(task, str(tmp_path))
    assert len(questions) == 120
    for question in questions:
        right = [choice.strip() in THINGS[kind].split() for choice in question.choices]
        assert right == [number == question.answer for number in range(4)]
    assert all(15 <= [question.answer for question in questions].count(i) <= 45 for i in range(4))


def test_the_same_seed_writes_the_same_files(tmp_path: Path) -> None:
    first, second, other = (write_demo_data(tmp_path / str(i), seed) for i, seed in enumerate([0, 0, 1]))
    for task, files in first.items():
        for number, path in enumerate(files):
            assert path.read_bytes() == second[task][number].read_bytes()
            assert path.read_bytes() != other[task][number].read_bytes()


def test_every_thing_is_listed_once() -> None:
    assert len(WORDS) == sum(len(names.split()) for names in THINGS.values())
