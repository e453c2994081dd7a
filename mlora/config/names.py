"""Names of adapters, which become folders and so must be safe as such on every system, and folders of tasks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from mlora.config.errors import ConfigError, Problem, show
from mlora.tasks import folder_names

MAX_LENGTH = 64
_ALLOWED = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
# Windows opens the device whatever the extension: nul.txt is nul.
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(10))}
# Adapter folders lie beside these, see the layout of a run folder.
_RUN_FILES = {
    "adapters",
    "checkpoints",
    "config.json",
    "environment.json",
    "log.txt",
    "metrics.jsonl",
    "mlora.json",
    "mlora.log",
    "readme.md",
    "report.html",
    "ranking.json",
    "results.json",
    "router.jsonl",
    "samples",
}


def name_problem(name: str) -> str | None:
    """Return why a name cannot be an adapter's; None where it can."""
    if len(name) > MAX_LENGTH:
        return f"expected at most {MAX_LENGTH} characters, not {len(name)}"
    if not _ALLOWED.fullmatch(name):
        return "expected letters, digits and ._- only, and no leading dot"
    if name.endswith("."):
        return "expected no dot at the end, which some file systems drop"
    if name.partition(".")[0].lower() in _DEVICES:
        return "expected another name: this one is a device on Windows"
    if name.lower() in _RUN_FILES:
        return "expected another name: the run writes a file or folder of this name"
    return None


def check_name(name: str) -> None:
    """Refuse a name that is not safe as a folder.

    Raises:
        ConfigError: the message says what is allowed.
    """
    problem = name_problem(name)
    if problem is not None:
        raise ConfigError("adapter name", [Problem("", f"{show(name)} is not allowed; {problem}")])


def same_folder(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the first two names that would share a folder where case does not count; None where no two do."""
    seen: dict[str, str] = {}
    for name in names:
        if name.lower() in seen:
            return seen[name.lower()], name
        seen[name.lower()] = name
    return None


def subfolder(folder: Path, task: str) -> Path | None:
    """Return the subfolder with a task's rows, which has its name or its data set's; None where there is none."""
    return next((place for name in folder_names(task) if (place := folder / name).is_dir()), None)
