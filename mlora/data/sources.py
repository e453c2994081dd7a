"""Where rows come from: local files and folders, else the Hugging Face hub.

`--data_path` names a file (json, jsonl, csv, parquet, gzipped or not), a folder with one file per split, a folder
written by `datasets.save_to_disk`, or a hub id, `id:subset`. Whatever looks like a local path is never looked up on
the hub, so that a misspelt file name is an error about that file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal

from mlora.config.names import subfolder
from mlora.data.errors import DataError
from mlora.data.readers import SourceRow, is_data_file, read_file
from mlora.network import ask_hub, why_offline
from mlora.tasks import Source, Task, folder_names
from mlora.wording import counted

Split = Literal["train", "validation", "test"]
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


def is_local(data: str) -> bool:
    """Return whether `data` names something on this machine rather than a data set on the hub."""
    return data.startswith((".", "/", "~")) or is_data_file(data) or _path(data).exists() or not HUB_ID.fullmatch(data)


def split_paths(data: str | None, names: Sequence[str]) -> list[str | None]:
    """Return the data of each task: nothing, one path per task by position, or one folder with a subfolder each.

    Raises:
        DataError: the numbers differ, or a subfolder is missing.
    """
    if data is None:
        return [None] * len(names)
    paths = [part.strip() for part in data.split(";") if part.strip()]
    if len(paths) == len(names) > 1:
        return list(paths)
    if len(paths) != 1:
        given = counted(len(paths), "data path")
        raise DataError(f"{given} for {counted(len(names), 'task')} ({'; '.join(names)}): {data}")
    folder = _path(paths[0])
    inside = [subfolder(folder, name) for name in names]
    if None not in inside:
        return list(map(str, inside))
    if len(names) == 1:
        return [paths[0]]
    missing = [folder_names(name)[0] for name, found in zip(names, inside, strict=True) if found is None]
    raise DataError(
        f"{folder}: no subfolder {', '.join(missing)}; several tasks need one data path each, joined by ';', "
        f"or a folder with a subfolder per task. There are: {_listing(folder)}"
    )


def task_rows(task: Task, data: str | None, split: Split, limit: int | None = None) -> Iterator[SourceRow]:
    """Yield the rows of a task's split, from local data where given.

    Args:
        task: the task; its source says which published split each of ours is.
        data: local path, hub id, `id:subset`, or None for the published data set. A bare id gets the task's subset.
        split: "test" is the split that published results are evaluated on.
        limit: rows; None for all. Of the hub's data sets only these are then fetched.

    Raises:
        DataError: the data or the split is not there.
    """
    source = task.source
    if split == "validation" and source.validation is None:
        raise DataError(f"{task.name}: no labelled validation split besides the one that results are evaluated on")
    if data is not None and is_local(data):
        # PubMedQA is evaluated on a hub split called "train"; no file can be both.
        published = source.test if source.test != source.train else "test"
        yield from islice(local_rows(data, {"train": source.train, "test": published}.get(split, split)), limit)
        return
    if data is not None:
        hub, _, subset = data.partition(":")
        source = replace(source, hub=hub)
        if subset:
            source = replace(source, subset=subset, train_subset=None)
    try:
        yield from _published(source, split, limit)
    except DataError as error:
        raise DataError(f"task {task.name}: {error}") from error


def instruction_rows(data: str, split: Split = "train", limit: int | None = None) -> Iterator[SourceRow]:
    """Yield the rows of instruction data at a local path, hub id or `id:subset`, the first `limit` of them."""
    if is_local(data):
        yield from islice(local_rows(data, split), limit)
    else:
        hub, _, subset = data.partition(":")
        yield from hub_rows(hub, subset or None, split, limit)


def local_rows(data: str, split: str) -> Iterator[SourceRow]:
    """Yield the rows of a file, or of the file or files of a split in a folder.

    Raises:
        DataError: nothing is there, or the folder lacks the split.
    """
    path = _path(data)
    if not path.is_dir():
        yield from read_file(path)
    elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        yield from _saved_rows(path, split)
    else:
        pattern = re.compile(rf"{re.escape(split)}(-\d+-of-\d+)?\.")
        files = sorted(file for file in path.iterdir() if pattern.match(file.name) and is_data_file(file))
        if not files:
            raise DataError(
                f"{path}: no file for the split {split!r} ({split}.jsonl, say); there are: {_listing(path)}"
            )
        for file in files:
            yield from read_file(file)


def hub_rows(hub: str, subset: str | None, split: str, limit: int | None = None) -> Iterator[SourceRow]:
    """Yield the rows of a data set on the hub, or in the cache of `datasets`.

    The whole data set goes into the cache, but for a limit: then rows are streamed, and no more fetched than wanted.

    Raises:
        DataError: there is no network and no copy in the cache, or no such id, subset or split.
    """
    ask_hub()
    from datasets import load_dataset
    from huggingface_hub import is_offline_mode

    name = f"{hub}:{subset}" if subset else hub
    streams = limit is not None and not is_offline_mode()  # what is streamed is never in the cache
    number = 0
    try:
        for values in islice(load_dataset(hub, subset, split=split, streaming=streams), limit):
            number += 1
            yield SourceRow(f"{name}, split {split}, row {number}", values)
    except Exception as error:  # network, hub and format errors of many kinds share no base class
        offline = why_offline()
        reason = _first_line(error) if offline is None else f"{offline}, and no cached copy was found"
        raise DataError(
            f"cannot load the split {split!r} of {name} from the Hugging Face hub"
            f"{f' after row {number}' if number else ''}: {reason}. "
            f"Without a network name a local file, or a folder with {split}.jsonl, in the hub's columns, by gen "
            '--data_path or as "data" in the config, or fill the cache of `datasets` (HF_HOME) beforehand, which '
            "--hub_offline reads without asking the hub"
        ) from error


def _published(source: Source, split: Split, limit: int | None) -> Iterator[SourceRow]:
    if split == "train":
        return hub_rows(source.hub, source.train_subset or source.subset, source.train, limit)
    return hub_rows(source.hub, source.subset, source.test if split == "test" else str(source.validation), limit)


def _saved_rows(path: Path, split: str) -> Iterator[SourceRow]:
    from datasets import DatasetDict, load_from_disk

    try:
        saved = load_from_disk(str(path))
    except Exception as error:  # a damaged folder fails in many ways
        raise DataError(f"{path}: cannot be read as a folder of datasets.save_to_disk: {_first_line(error)}") from error
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise DataError(f"{path}: no split {split!r}; there are: {', '.join(saved)}")
        saved = saved[split]
    for number, values in enumerate(saved, 1):
        yield SourceRow(f"{path}, split {split}, row {number}", values)


def _path(data: str) -> Path:
    return Path(data).expanduser()


def _listing(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    return (", ".join(names[:20]) + (", ..." if len(names) > 20 else "")) or "nothing"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}".rstrip(".")
