"""What the commands that need the model have in common: their log, and their exit status."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Protocol

from mlora.config import ConfigError, Problem, RunOptions
from mlora.data import DataError
from mlora.model.errors import ModelError
from mlora.parallel import ALONE, Lost, Ranks
from mlora.runs.folder import alone, log_path
from mlora.runs.output import outlives_its_readers
from mlora.runs.run import Run, RunError
from mlora.tasks import UnknownTaskError
from mlora.training.checkpoint import CheckpointError
from mlora.training.stop import Paused, Stopped, interruptible

BAD_INPUT = (ConfigError, DataError, ModelError, UnknownTaskError)
FAILED = (RunError, CheckpointError, Lost)

log = logging.getLogger("mlora")


class Told(Protocol):
    """Where a command writes, and whether it shows tracebacks."""

    @property
    def dir(self) -> str:
        """Folder of what it writes."""

    @property
    def log_file(self) -> str:
        """Where its log goes."""

    @property
    def debug(self) -> bool:
        """Whether tracebacks are shown."""


def main(options: RunOptions) -> int:
    """Run a config, and return the exit status; see `finish`. Of several ranks the first speaks to the user."""
    ranks = Ranks.from_environment()
    if ranks.first:
        return finish(lambda: Run(options).run(), options)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        return finish(lambda: Run(options).run(), options, ranks)


def finish(work: Callable[[], None], options: Told, ranks: Ranks = ALONE) -> int:
    """Do the work of a command, and return the exit status.

    Args:
        work: raises what has gone wrong.
        options: of the command.
        ranks: what the first finds out as well, the others keep to themselves; they have no log.

    Returns:
        0 done or out of time, 1 failed, 2 bad input, 130 interrupted.
    """
    with outlives_its_readers():
        return _finished(work, options, ranks)


def _finished(work: Callable[[], None], options: Told, ranks: Ranks) -> int:
    try:
        logs = _log_to(options, ranks)
        reads_only = getattr(options, "dry_run", False) or getattr(options, "inference", False) or not ranks.first
        with interruptible(), nullcontext() if reads_only else alone(options.dir):
            work()
        return 0
    except BAD_INPUT as error:
        return _fail(error, 2, options) if ranks.first else 2
    except FAILED as error:
        return _fail(error, 1, options) if ranks.first else 1
    except Paused as error:
        print(error)
        return 0
    except (KeyboardInterrupt, Stopped) as error:
        if ranks.first:
            print(str(error) or "interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # the last resort of a program: one line for the user, all of it in the log
        where = "--debug shows the traceback" if logs is None else f"the traceback is in {logs}"
        return _fail(error, 1, options, f"; {where}", "" if ranks.first else f"process {ranks.rank}: ")


def _fail(error: Exception, status: int, options: Told, hint: str = "", who: str = "") -> int:
    log.debug("failed", exc_info=error)
    if options.debug:
        traceback.print_exception(error)
    kind = "" if isinstance(error, (*BAD_INPUT, *FAILED)) else f"{type(error).__name__}: "
    print(f"Error: {who}{kind}{error}{hint}", file=sys.stderr)
    return status


class _Line(logging.Formatter):
    """Messages without the tracebacks that belong to them."""

    def format(self, record: logging.LogRecord) -> str:
        record.message = record.getMessage()
        return self.formatMessage(record)


class _LogFile(logging.FileHandler):
    """A log that says once, in a line, that it cannot be written."""

    said = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.said:
            self.said = True
            print(f"WARNING: {self.baseFilename}: cannot be written: {sys.exc_info()[1]}", file=sys.stderr)


def _log_to(options: Told, ranks: Ranks) -> Path | None:
    """Write everything to the log file, whose path is returned, and warnings to standard error; a dry run has no file.

    Nor has a rank other than the first, of which nothing but errors is shown.

    Raises:
        ConfigError: the file cannot be written.
    """
    to_user = logging.StreamHandler()
    to_user.setFormatter(_Line("%(levelname)s: %(message)s"))
    to_user.setLevel(logging.WARNING if ranks.first else logging.ERROR)
    log.handlers[:] = [to_user]
    log.setLevel(logging.DEBUG)
    log.propagate = False
    if getattr(options, "dry_run", False) or not ranks.first:
        return None
    path = log_path(options.dir, options.log_file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        to_file = _LogFile(path, encoding="utf-8")
    except OSError as error:
        raise ConfigError(str(path), [Problem("", f"cannot be written: {error.strerror}")]) from error
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    log.handlers.insert(0, to_file)
    return path
