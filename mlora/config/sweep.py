"""`gen --sweep "lr=1e-4,2e-4;r=8,16"`: one entry for every combination of values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from mlora.config.errors import ConfigError, Problem, show
from mlora.config.load import parse_adapter

FLAG = "--sweep"
_GIVEN_ELSEWHERE = {"name": "--adapter_name", "task_name": "--tasks", "data": "--data_path"}


def parse_sweep(text: str, entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the keys and values of every combination, the first key changing last.

    Args:
        text: keys with their values, `key=value,value;key=value`.
        entries: adapters that the values are for.

    Raises:
        ConfigError: with every key and value that cannot be swept.
    """
    values: dict[str, list[Any]] = {}
    problems: list[Problem] = []
    for part in filter(None, map(str.strip, text.split(";"))):
        key, equals, listed = map(str.strip, part.partition("="))
        options = [_value(word.strip()) for word in listed.split(",") if word.strip()]
        if not key or not equals or not options:
            problems.append(Problem("", f"{show(part)} is not allowed; allowed: KEY=VALUE,VALUE"))
        elif key in _GIVEN_ELSEWHERE:
            problems.append(Problem(key, f"is not swept; give it by {_GIVEN_ELSEWHERE[key]}"))
        elif key in values:
            problems.append(Problem(key, "is given more than once"))
        elif repeated := [option for i, option in enumerate(options) if option in options[:i]]:
            problems.append(Problem(key, f"{show(repeated[0])} is given more than once"))
        else:
            values[key] = options
            problems += [p for entry in entries for option in options for p in _problems(entry, key, option)]
    if not values and not problems:
        problems.append(Problem("", f"{show(text)} is not allowed; allowed: KEY=VALUE,VALUE;KEY=VALUE"))
    if problems:
        raise ConfigError(FLAG, list(dict.fromkeys(problems)))
    return [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]


def _value(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(word, word)


def _problems(entry: Mapping[str, Any], key: str, value: Any) -> list[Problem]:
    """Return what is wrong with one value of one key; what it does to other keys is found in the finished config."""
    try:
        parse_adapter({**entry, key: value})
    except ConfigError as error:
        return [problem for problem in error.problems if problem.path.split(".")[0] == key]
    return []
