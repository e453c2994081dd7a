"""Rows out of files, folders and the hub, each with its origin."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants

from mlora.data import DataError, load_questions, sources
from mlora.data.readers import read_file
from mlora.data.sources import instruction_rows, is_local, local_rows, task_rows
from mlora.tasks import find_task

ROWS = [{"question": "is a leaf green", "answer": True}, {"question": 'is "ice" hot,\nor é', "answer": False}]


def write(folder: Path, name: str) -> Path:
    path = folder / name
    plain = name.lower().removesuffix(".gz")
    if plain.endswith(".parquet"):
        datasets.Dataset.from_list(ROWS).to_parquet(path)
        return path
    with gzip.open(path, "wt", encoding="utf-8") if name.endswith(".gz") else path.open("w", encoding="utf-8") as file:
        if plain.endswith(".csv"):
            writer = csv.DictWriter(file, ["question", "answer"])
            writer.writeheader()
            writer.writerows(ROWS)
        elif plain.endswith(".jsonl"):
            file.write("".join(json.dumps(row) + "\n" for row in ROWS))
        else:
            json.dump(ROWS, file, indent=1)
    return path


@pytest.mark.parametrize(
    "name", ["a.json", "a.json.gz", "a.jsonl", "a.jsonl.gz", "a.csv", "a.csv.gz", "a.parquet", "A.JSONL"]
)
def test_every_format_gives_the_same_questions(tmp_path: Path, name: str) -> None:
    rows = list(read_file(write(tmp_path, name)))
    found = [find_task("boolq").build(row.values) for row in rows]
    assert found == [find_task("boolq").build(row) for row in ROWS]
    assert all(name in row.origin for row in rows)


def test_origins_count_lines_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n[1]\n{"a": \xff}\n{"a": 2}')
    rows = list(read_file(path))
    assert [row.origin.rpartition(" ")[2] for row in rows] == ["1", "3", "4", "5"]
    assert [bool(row.problem) for row in rows] == [False, True, True, False]
    table = tmp_path / "a.csv"
    table.write_text('a,b\n1,"x\ny"\n1,2,3\n5\n')
    rows = list(read_file(table))
    assert [row.origin.rpartition(" ")[2] for row in rows] == ["3", "4", "5"]
    assert rows[0].values == {"a": "1", "b": "x\ny"}
    assert rows[1].problem == "has more cells than the header"
    assert rows[2].values["b"] is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[1, 2", "not a JSON list"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("b.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 9, mtime=0)[:-9], "cannot be read"),
        ("a.parquet", b"not parquet", "a.parquet: not a Parquet file"),
        ("a.csv", b"a,b\n\xff,1\n", "a.csv, line 2: not comma-separated text"),
        ("a.txt", b"a", "cannot tell its format; expected a name ending with .json, .jsonl"),
    ],
)
def test_a_file_that_cannot_be_read_on(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_file(tmp_path / name))


def test_folders_have_a_file_or_files_per_split(tmp_path: Path) -> None:
    write(tmp_path, "train.csv")
    write(tmp_path, "validation-00000-of-00002.parquet")
    write(tmp_path, "validation-00001-of-00002.parquet")
    (tmp_path / "training_notes.jsonl").write_text("no data")
    assert len(list(local_rows(str(tmp_path), "train"))) == 2
    # BoolQ is evaluated on its published validation split.
    assert len(list(task_rows(find_task("boolq"), str(tmp_path), "test"))) == 4
    with pytest.raises(
        DataError, match="no file for the split 'test' .test.jsonl, say.; there are: train.csv, training"
    ):
        list(task_rows(find_task("arc-e"), str(tmp_path), "test"))
    with pytest.raises(DataError, match="boolq: no labelled validation split besides"):
        list(task_rows(find_task("boolq"), str(tmp_path), "validation"))


def test_pubmedqa_is_evaluated_on_a_file_called_test(tmp_path: Path) -> None:
    write(tmp_path, "test.jsonl")
    assert len(list(task_rows(find_task("pubmedqa"), str(tmp_path), "test"))) == 2


def test_saved_data_sets(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "dict"))
    rows.save_to_disk(str(tmp_path / "single"))
    assert [row.values for row in local_rows(str(tmp_path / "dict"), "train")] == ROWS
    assert [row.values for row in local_rows(str(tmp_path / "single"), "train")] == ROWS
    with pytest.raises(DataError, match="no split 'test'; there are: train"):
        list(local_rows(str(tmp_path / "dict"), "test"))


@pytest.mark.parametrize(
    ("data", "local"),
    [
        ("google/boolq", False),
        ("google/boolq:default", False),
        ("squad", False),
        ("./boolq", True),
        ("/data/boolq", True),
        ("data/boolq.jsonl", True),
        ("a/b/c", True),
        ("~/boolq", True),
    ],
)
def test_what_looks_like_a_path_is_never_looked_up(data: str, local: bool) -> None:
    assert is_local(data) == local


def test_an_existing_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "google" / "boolq").mkdir(parents=True)
    assert is_local("google/boolq")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was asked of the hub."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(hub: str, subset: str | None, split: str, streaming: bool) -> list[dict[str, Any]]:
        assert not streaming
        calls.append((hub, subset, split))
        return ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_published_ids_subsets_and_splits(asked: list[tuple[Any, ...]]) -> None:
    for task, data, split in [
        ("arc-e", None, "train"),
        ("arc-e", None, "validation"),
        ("winogrande", None, "test"),
        ("pubmedqa", None, "train"),
        ("pubmedqa", None, "test"),
        ("arc-c", "me/copy", "test"),
        ("pubmedqa", "me/copy:own", "train"),
    ]:
        assert len(list(task_rows(find_task(task), data, split))) == 2
    assert (
        list(instruction_rows("yahma/alpaca-cleaned:all"))[1].origin == "yahma/alpaca-cleaned:all, split train, row 2"
    )
    assert asked == [
        ("allenai/ai2_arc", "ARC-Easy", "train"),
        ("allenai/ai2_arc", "ARC-Easy", "validation"),
        ("allenai/winogrande", "winogrande_debiased", "validation"),
        ("qiaojin/PubMedQA", "pqa_artificial", "train"),
        ("qiaojin/PubMedQA", "pqa_labeled", "train"),
        ("me/copy", "ARC-Challenge", "test"),
        ("me/copy", "own", "train"),
        ("yahma/alpaca-cleaned", "all", "train"),
    ]


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach it"),
        datasets.exceptions.DatasetNotFoundError("no such id"),
        ValueError("BuilderConfig 'x' not found"),
    ],
)
@pytest.mark.parametrize("offline", [False, True])
def test_hub_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception, offline: bool) -> None:
    def load_dataset(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "ask_hub", lambda: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    reason = "hub offline mode is set .*no cached copy" if offline else str(error)
    with pytest.raises(
        DataError,
        match=f"task boolq: .*'validation' of google/boolq .*: .*{reason}.*Without a network .*validation.jsonl",
    ):
        list(task_rows(find_task("boolq"), None, "test"))


def test_what_is_not_there_is_no_question_of_format(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nosuch: no such file or folder"):
        list(instruction_rows(str(tmp_path / "nosuch")))


@pytest.mark.parametrize("offline", [False, True])
def test_a_limit_streams_from_the_hub_no_more_than_it_says(monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    taken: list[int] = []

    def load_dataset(hub: str, subset: str | None, split: str, streaming: bool) -> Any:
        assert streaming is not offline  # a stream cannot be read from the cache
        for number in range(100):
            taken.append(number)
            yield ROWS[number % 2]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda: offline)
    assert [row.values for row in task_rows(find_task("boolq"), "me/copy", "train", limit=3)] == [*ROWS, ROWS[0]]
    assert len(list(instruction_rows("me/copy", limit=2))) == 2
    questions = load_questions("boolq", "me/copy", limit=4)
    assert len(questions) == 4 and len(taken) == 3 + 2 + 4


def test_a_stream_that_breaks_off_says_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(hub: str, subset: str | None, split: str, streaming: bool) -> Any:
        yield from ROWS
        raise ConnectionError("gone")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "ask_hub", lambda: None)
    with pytest.raises(DataError, match="me/copy from the Hugging Face hub after row 2: ConnectionError: gone"):
        list(instruction_rows("me/copy", limit=9))


def test_a_stream_of_datasets_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` streams, here from a file, has the columns that its tables have."""
    file, own = str(write(tmp_path, "a.jsonl")), datasets.load_dataset

    def load_dataset(hub: str, subset: str | None, split: str, streaming: bool) -> Any:
        return own("json", data_files={split: file}, split=split, streaming=streaming, cache_dir=str(tmp_path))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for offline in (False, True):
        monkeypatch.setattr(huggingface_hub, "is_offline_mode", lambda offline=offline: offline)
        assert [row.values for row in instruction_rows("me/copy", limit=2)] == ROWS
