"""From the JSON file to frozen typed values, with every fault of the file in one error, and back.

An adapter entry is flat: `routing_strategy` chooses the method, whose keys stand beside the job's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlora.adapters import METHODS, Method
from mlora.config.check import check, construct, join
from mlora.config.errors import ConfigError, Problem, did_you_mean, show
from mlora.config.job import JobConfig
from mlora.config.jsonfile import read_json
from mlora.config.run import RunConfig
from mlora.config.schema import DEFAULT_METHOD, NO_EFFECT, entry_schema, job_keys, run_schema
from mlora.wording import launcher

_WRONG = object()
log = logging.getLogger(__name__)


def load_config(path: str | Path) -> RunConfig:
    """Read a config file.

    Raises:
        ConfigError: with all that is wrong with it.
    """
    if not Path(path).exists():
        hint = f"no such file; `{launcher()} gen` writes one"
        raise ConfigError(str(path), [Problem("", hint)])
    return parse_config(read_json(path), str(path))


def parse_config(obj: Any, source: str = "config") -> RunConfig:
    """Return the typed config of a parsed JSON file.

    Args:
        obj: the content of the file.
        source: its name, for messages.

    Raises:
        ConfigError: with all that is wrong with it.
    """
    if not isinstance(obj, dict):
        raise ConfigError(source, [Problem("", f"expected an object with the key lora, not {show(obj)}")])
    values = {key: value for key, value in obj.items() if key != "$schema"}
    schema = run_schema()
    misplaced = [_misplaced_in_run(key) for key in values if key not in schema["properties"]]
    values = {key: value for key, value in values.items() if key in schema["properties"]}
    problems = [*misplaced, *check(values, schema, "", schema["$defs"])]
    entries = values.get("lora")
    jobs: list[JobConfig] = []
    faults: list[Problem] = []
    for i, entry in enumerate(entries if isinstance(entries, list | tuple) else ()):
        job, found = _parse_entry(entry, f"lora[{i}]")
        jobs += [] if job is None else [job]
        faults += found
    faults += _same_folders(entries)
    config, found = construct(RunConfig, values | {"lora": tuple(jobs)}, schema, "")
    found = _unsaid(found, problems)
    if entries:  # the faults of each are enough
        found = [problem for problem in found if problem.path != "lora"]
    problems += found + faults
    if config is None or problems:
        raise ConfigError(source, problems)
    _warn_of_no_effect(config, source)
    return config


def parse_adapter(obj: Mapping[str, Any], source: str = "adapter config") -> Method:
    """Return the typed method of an adapter entry, or of a dict with the method's keys alone.

    Raises:
        ConfigError: with all that is wrong with it, the job's keys included.
    """
    job, problems = _parse_entry({"name": "adapter", **obj}, "")
    if job is None:
        raise ConfigError(source, problems)
    return job.method


def resolved(config: RunConfig) -> dict[str, Any]:
    """Return the config as its JSON file with every value written out; `parse_config` reads it back."""
    run = config.model_dump(mode="json", exclude={"lora"})
    return _given(run) | {"lora": [_flat(job) for job in config.lora]}


def _flat(job: JobConfig) -> dict[str, Any]:
    method = {"routing_strategy": job.method.method, **job.method.model_dump(mode="json")}
    return _given(job.model_dump(mode="json", exclude={"method"})) | method


def _given(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in NO_EFFECT or value is not None}


def _parse_entry(entry: object, path: str) -> tuple[JobConfig | None, list[Problem]]:
    if not isinstance(entry, dict):
        return None, [Problem(path, f"{show(entry)} is not allowed; allowed: an object")]
    cls, problems = _choose_method(entry, path)
    schema = entry_schema(cls or METHODS[DEFAULT_METHOD])
    known = set(schema["properties"]) if cls is not None else set(job_keys())
    if cls is not None:
        problems += [_unknown_in_entry(key, cls, path) for key in entry if key not in known]
    else:  # what is a key of no method is wrong whichever is meant
        every = {key for other in METHODS.values() for key in entry_schema(other)["properties"]}
        unknown = [key for key in entry if key not in every]
        problems += [Problem(join(path, key), f"unknown key{did_you_mean(key, every)}") for key in unknown]
    values = {key: value for key, value in entry.items() if key in known}
    problems += check(values, schema, path, schema["$defs"])
    # Validators are written for values of the right type; one of a wrong type must not reach them.
    values = {
        key: value if _unsaid([Problem(join(path, key), "")], problems) else _WRONG for key, value in values.items()
    }

    method: Method | None = None
    if cls is not None:
        own = {key: value for key, value in values.items() if key in cls.model_fields}
        method, found = construct(cls, own, schema, path)
        problems += _unsaid(found, problems)
    rest = {key: value for key, value in values.items() if key in job_keys()}
    stand_in = METHODS[DEFAULT_METHOD].model_construct()  # so that the job's own keys are checked all the same
    job, found = construct(JobConfig, rest | {"method": method or stand_in}, schema, path)
    problems += _unsaid(found, problems)
    return (None if problems else job), problems


def _same_folders(entries: object) -> list[Problem]:
    """Return a problem for every name that an earlier adapter has, where case does not count."""
    first: dict[str, str] = {}
    problems = []
    for i, entry in enumerate(entries if isinstance(entries, list | tuple) else ()):
        name = entry.get("name") if isinstance(entry, dict) else None
        if isinstance(name, str) and first.setdefault(name.lower(), f"lora[{i}]") != f"lora[{i}]":
            other = first[name.lower()]
            message = f"{show(name)} is not allowed; expected names that differ by more than case, and {other} has it"
            problems.append(Problem(f"lora[{i}].name", message))
    return problems


def _choose_method(entry: dict[str, Any], path: str) -> tuple[type[Method] | None, list[Problem]]:
    """Return the class that `routing_strategy` names, or `peft_type` in the files of the predecessors and of PEFT."""
    strategy, peft_type = entry.get("routing_strategy"), entry.get("peft_type")
    types = sorted({cls.peft_type for cls in METHODS.values()})
    if peft_type is not None and peft_type not in types:
        return None, [_not_one_of(join(path, "peft_type"), peft_type, types)]
    if strategy is None:
        strategy = DEFAULT_METHOD if peft_type is None else peft_type.lower()
    if not isinstance(strategy, str) or strategy not in METHODS:
        return None, [_not_one_of(join(path, "routing_strategy"), strategy, list(METHODS))]
    cls = METHODS[strategy]
    if peft_type is not None and peft_type != cls.peft_type:
        message = f"{show(peft_type)} is not allowed; the routing_strategy {show(strategy)} is {show(cls.peft_type)}"
        return None, [Problem(join(path, "peft_type"), message)]
    return cls, []


def _not_one_of(path: str, value: object, options: Sequence[str]) -> Problem:
    hint = did_you_mean(value, options) if isinstance(value, str) else ""
    return Problem(path, f"{show(value)} is not allowed; allowed: {', '.join(map(show, options))}{hint}")


def _unknown_in_entry(key: str, cls: type[Method], path: str) -> Problem:
    users = [name for name, other in METHODS.items() if key in other.model_fields]
    if users:
        message = f"is a key of {' and '.join(users)} only, this adapter is {cls.method}"
    elif key in RunConfig.model_fields:
        message = "belongs at the top level of the file, not in an adapter"
    else:
        message = f"unknown key{did_you_mean(key, entry_schema(cls)['properties'])}"
    return Problem(join(path, key), message)


def _misplaced_in_run(key: str) -> Problem:
    if any(key in entry_schema(cls)["properties"] for cls in METHODS.values()):
        return Problem(join("", key), "belongs in the adapters of lora, not at the top level")
    return Problem(join("", key), f"unknown key{did_you_mean(key, RunConfig.model_fields)}")


def _unsaid(found: list[Problem], said: list[Problem]) -> list[Problem]:
    """Leave out what an earlier stage has said of the same key."""
    paths = [problem.path for problem in said]
    return [p for p in found if not any(path == p.path or path.startswith(f"{p.path}.") for path in paths)]


def _warn_of_no_effect(config: RunConfig, source: str) -> None:
    jobs = [job.model_fields_set for job in config.lora]
    given = [key for key in NO_EFFECT if key in config.model_fields_set.union(*jobs)]
    if given:
        log.warning("%s: accepted for older files, without effect: %s", source, ", ".join(given))
