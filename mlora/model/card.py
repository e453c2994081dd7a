"""The model card beside a saved adapter or exported model: README.md with the front matter that hubs read.

It is meant to be published, so it never shows a path of this machine: what lies in a local folder is named by the
last part of its path.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from mlora.adapters import Method
from mlora.model.load import published

FILE = "README.md"
RESULTS = "## Results"
GENERATION = "text-generation"
_FILE = re.compile(r"\.(gguf|jsonl?|csv|parquet|txt|gz|bin|safetensors)$")
PACKAGES = ("mlora", "torch", "transformers")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Making:
    """How an adapter came to be, as far as is known.

    Attributes:
        datasets: hub ids, `id:subset`, or local places.
        command: that trained it.
        seed: of everything random.
    """

    datasets: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    seed: int | None = None


def write_for_adapter(
    folder: Path, name: str | None, method: Method, base_model: str, making: Making | None, classifies: bool = False
) -> None:
    """Write the card of an adapter folder.

    Args:
        folder: that holds the adapter.
        name: of the adapter; None for the folder's.
        method: its typed config.
        base_model: name or path as the user gave it.
        making: how it was trained; None where that is unknown.
        classifies: whether it has a classification head.
    """
    library = "peft" if method.peft_type == "LORA" else "mlora"
    text = f"A {method.method} adapter for `{shown(base_model)}`, trained with m-LoRA."
    use = "text-classification" if classifies else GENERATION
    write(folder, name or folder.resolve().name, text, library, method, base_model, making or Making(), use)


def write(
    folder: Path,
    title: str,
    text: str,
    library: str,
    method: Method,
    base_model: str,
    making: Making,
    use: str = GENERATION,
) -> None:
    """Write a card.

    Args:
        folder: to write it to.
        title: headline.
        text: what the folder holds, in a sentence.
        library: that loads it, a `library_name` of the hub.
        method: typed config of the adapter.
        base_model: name or path as the user gave it.
        making: how the adapter was trained.
        use: a `pipeline_tag` of the hub.
    """
    front: dict[str, Any] = {
        "base_model": shown(base_model),
        "library_name": library,
        "pipeline_tag": use,
        "tags": _tags(method),
    }
    if making.datasets:
        front["datasets"] = list(dict.fromkeys(_dataset_id(data) for data in making.datasets))
    parts = [f"# {title}", text, "## Settings", _settings(method)]
    if making.command or making.seed is not None:
        parts.append("## Training")
    if making.command:
        parts.append(f"```bash\n{shlex.join(shown_argument(argument) for argument in making.command)}\n```")
    if making.seed is not None:
        parts.append(f"Seed {making.seed}.")
    parts += ["## Versions", _versions()]
    (folder / FILE).write_text(_join(front, "\n\n".join(parts)), encoding="utf-8")


def add_results(folder: Path, results: Sequence[Mapping[str, Any]]) -> None:
    """Set the results in a folder's card, in place of earlier ones; without a card or results, do nothing.

    Args:
        folder: of the adapter.
        results: each with task, metric, value, standard_error and n.
    """
    front, body = read(folder)
    if not front or not results:
        return
    measured = [
        {
            "task": {"type": front.get("pipeline_tag", GENERATION)},
            "dataset": {"name": result["task"], "type": result["task"]},
            "metrics": [{"type": result["metric"], "value": result["value"]}],
        }
        for result in results
    ]
    title = re.search(r"^# (.+)$", body, re.MULTILINE)
    front["model-index"] = [{"name": title[1] if title else "adapter", "results": measured}]
    rows = ["| task | metric | value | standard error | rows |", "| --- | --- | --- | --- | --- |"]
    for result in results:
        error = result["standard_error"]
        shown_error = "" if error is None else f"{error:.4f}"
        cells = (result["task"], result["metric"], f"{result['value']:.4f}", shown_error, result["n"])
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    body = body.partition(RESULTS)[0].rstrip() + f"\n\n{RESULTS}\n\n" + "\n".join(rows)
    temporary = folder / f".{FILE}"
    try:
        temporary.write_text(_join(front, body), encoding="utf-8")
        os.replace(temporary, folder / FILE)
    except OSError as error:  # the results are in the run's own file; a folder that is read-only keeps its card
        log.warning("%s: the results could not be added: %s", folder / FILE, error)


def read(folder: Path) -> tuple[dict[str, Any], str]:
    """Return a card's front matter and text; empty where there is none that can be read."""
    try:
        found = re.fullmatch(r"---\n(.*?)\n---\n(.*)", (folder / FILE).read_text(encoding="utf-8"), re.DOTALL)
        front = yaml.safe_load(found[1]) if found else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}, ""
    return (front, found[2].strip()) if found and isinstance(front, dict) else ({}, "")


def shown(place: str) -> str:
    """Return a name as it may be published: hub ids as they are, the last part of what looks like a local path."""
    path = os.path.expanduser(place)
    local = place.startswith((".", "~")) or os.path.isabs(path) or "\\" in place or place.count("/") > 1
    if not (local or _FILE.search(place) or os.path.exists(path)):
        return published(place)
    if not place.strip("./"):  # "." has no part that names it
        path = os.path.realpath(path)
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def shown_argument(argument: str) -> str:
    """Return a command-line argument with its local paths shortened; `--flag=path` and `a;b` too."""
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    parts = (shown(part.strip()) if re.search(r"[\\/~]", part) else part for part in value.split(";"))
    return flag + equals + ";".join(parts)


def _dataset_id(data: str) -> str:
    name = shown(data.strip())
    return name if os.path.exists(os.path.expanduser(data.strip())) else name.partition(":")[0]


def _tags(method: Method) -> list[str]:
    flags = [name for name in ("dora", "rslora") if getattr(method, f"use_{name}", False)]
    return ["m-lora", *dict.fromkeys(["lora", method.method, *flags])]


def _settings(method: Method) -> str:
    fields = method.model_dump(mode="json", exclude_none=True)
    rows = [f"| {name} | {_cell(value)} |" for name, value in fields.items()]
    return "\n".join(["| setting | value |", "| --- | --- |", f"| method | {method.method} |", *rows])


def _cell(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return str(value)


def _versions() -> str:
    found = [f"{name} {number}" for name in PACKAGES if (number := _version(name))]
    return ", ".join([*found, f"Python {platform.python_version()}"])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _join(front: Mapping[str, Any], body: str) -> str:
    return f"---\n{yaml.safe_dump(dict(front), sort_keys=False, allow_unicode=True)}---\n\n{body}\n"
