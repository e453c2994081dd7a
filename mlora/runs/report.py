"""Writing the report of runs to a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlora.config import ConfigError, Problem
from mlora.config.jsonfile import write_atomically


def write_report(folders: Sequence[str | Path], output: str | Path) -> None:
    """Write the report of the runs in these folders, in place of an older report.

    Raises:
        ConfigError: a folder is of no run, or the file exists and is no report.
    """
    from mlora.report.page import is_report, report

    output = Path(output)
    if output.exists() and not is_report(output):
        raise _refusal(output, "exists already and is no report; --output FILE writes elsewhere")
    try:
        page = report(folders)
    except FileNotFoundError as error:
        raise _refusal("RUN", str(error)) from None
    try:
        write_atomically(output, page)
    except OSError as error:
        raise _refusal(output, f"cannot be written: {error.strerror}") from error


def _refusal(what: object, message: str) -> ConfigError:
    return ConfigError(str(what), [Problem("", message)])
