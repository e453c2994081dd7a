"""`launch.py gen`: a template and task names make a config file.

A task that is no registered name is instruction data: a file or folder that exists, or a hub id of the form owner/name.
The hub is not asked, so any other name is taken for a misspelt task and refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from mlora.config.errors import ConfigError, Problem, show
from mlora.config.job import CASUAL
from mlora.config.jsonfile import read_json, write_json
from mlora.config.load import parse_config
from mlora.config.names import subfolder
from mlora.config.run import RunConfig
from mlora.config.schema import run_schema
from mlora.config.sweep import parse_sweep
from mlora.config.templates import find_template
from mlora.tasks import folder_names, known_tasks
from mlora.wording import counted, launcher

_MISSPELT, _ALIKE = 0.8, 0.5
_FILES = (".json", ".jsonl", ".csv", ".parquet", ".gz")


@dataclass(frozen=True)
class _Subject:
    """What one adapter learns.

    Attributes:
        stem: of its name.
        values: keys of its entry.
    """

    stem: str
    values: dict[str, Any]


def generate(
    template: str,
    tasks: str,
    file_name: str | Path = "mlora.json",
    *,
    adapter_name: str | None = None,
    data_path: str | None = None,
    multi_task: bool = False,
    append: bool = False,
    sweep: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Write a config file with one adapter for each task, or one for all of them, and return what it says.

    Args:
        template: name or path.
        tasks: task names, or paths and hub ids of instruction data, joined by ";".
        file_name: of the config.
        adapter_name: stem of the adapters' names; the tasks' own where left out.
        data_path: one for each task joined by ";", or a folder with a subfolder for each task.
        multi_task: train one adapter on the mixture of the tasks.
        append: add to the config in the file, where there is one, rather than replace it.
        sweep: keys and values of which every combination gets an adapter, `key=value,value;key=value`.
        overrides: keys of the file that replace the template's, where not None.

    Raises:
        ConfigError: for anything that cannot be trained as asked; nothing is written then.
    """
    source = find_template(template)
    config = read_json(source)
    parse_config(config, str(source))
    entries = config["lora"]
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    for_run = {key: value for key, value in given.items() if key in run_schema()["properties"]}
    for_each = {key: value for key, value in given.items() if key not in for_run}

    if append and Path(file_name).exists():
        config = read_json(file_name)
        parse_config(config, str(file_name))
    else:
        config["lora"] = []
    config |= for_run
    combinations = parse_sweep(sweep, [entry | for_each for entry in entries]) if sweep is not None else [{}]
    if sweep is not None:
        config.pop("train_lora_simultaneously_num", None)  # all of them side by side
        config["sweep"] = list(dict.fromkeys([*config.get("sweep", []), *combinations[0]]))
    names = [part.strip() for part in tasks.split(";") if part.strip()]
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise _wrong("--tasks", f"{show(twice)} is named twice")
    subjects = _subjects(names, _data_of_each(names, data_path), multi_task)
    for entry, subject, combination in product(entries, subjects, combinations):
        name = f"{adapter_name or subject.stem}_{len(config['lora'])}"
        values = entry | {"name": name} | subject.values | for_each | combination
        config["lora"].append({"name": name, "task_name": CASUAL} | values)
    typed = parse_config(config, str(file_name))
    write_json(file_name, config)
    return typed


def _subjects(names: list[str], paths: list[str | None], multi_task: bool) -> list[_Subject]:
    if multi_task:
        data = {} if paths[0] is None else {"data": ";".join(map(str, paths))}
        return [_Subject("multi_task", {"task_name": ";".join(names)} | data)]
    return [_subject(name, path) for name, path in zip(names, paths, strict=True)]


def _subject(name: str, path: str | None) -> _Subject:
    if name in known_tasks():
        stem = name.rpartition(":")[2].replace("-", "_")
        return _Subject(stem, {"task_name": name} | ({} if path is None else {"data": path}))
    if name == CASUAL and path is None:
        raise _wrong("--tasks", f"{show(CASUAL)} needs --data_path: the instruction data to train on")
    if name != CASUAL:
        check_data(name)
    return _Subject(CASUAL, {"task_name": CASUAL, "data": path or name, "prompt": "alpaca"})


def check_data(name: str, flag: str = "--tasks") -> None:
    """Refuse instruction data that is neither a file or folder that exists nor a hub id: misspelt task names above all.

    Raises:
        ConfigError: the message has the nearest names of tasks.
    """
    if Path(name).expanduser().exists():
        return
    if name.endswith(_FILES) or name.startswith((".", "/", "~")):
        raise _wrong(flag, f"{show(name)}: no such file or folder")
    if name.count("/") > 1:
        raise _wrong(flag, f"{show(name)}: no such file or folder, and no hub id has more than one /")
    if "/" in name:
        return
    tasks = known_tasks()
    spellings = {task: task for task in tasks} | {task.rpartition(":")[2]: task for task in tasks}
    alike = difflib.get_close_matches(name.lower(), spellings, n=1, cutoff=_MISSPELT)
    alike = alike or difflib.get_close_matches(name.lower(), spellings, n=3, cutoff=_ALIKE)
    nearest = " or ".join(dict.fromkeys(show(spellings[spelling]) for spelling in alike))
    hint = f"did you mean {nearest}?" if alike else f"`{launcher()} avail` lists the tasks"
    message = f"{show(name)} is no task, no file or folder, and no data set of the hub, which is owner/name; {hint}"
    raise _wrong(flag, message)


def _data_of_each(names: list[str], data_path: str | None) -> list[str | None]:
    if not names:
        raise _wrong("--tasks", f"names no task; `{launcher()} avail` lists them")
    if data_path is None:
        return [None] * len(names)
    paths = [path.strip() for path in data_path.split(";")]
    if len(paths) == len(names) > 1:
        return list(paths)
    if len(paths) > 1:
        given = f"{counted(len(paths), 'path')} for {counted(len(names), 'task')}"
        raise _wrong("--data_path", f"{given}; expected one for each, or one folder")
    folder = Path(paths[0]).expanduser()
    inside = [subfolder(folder, name) for name in names]
    missing = [folder_names(name)[0] for name, found in zip(names, inside, strict=True) if found is None]
    if not missing:
        return list(map(str, inside))
    if len(names) == 1:
        return [paths[0]]
    message = f"{paths[0]} has no folder {', '.join(missing)}; several tasks need one path each, or a subfolder each"
    raise _wrong("--data_path", message)


def _wrong(flag: str, message: str) -> ConfigError:
    return ConfigError(flag, [Problem("", message)])
