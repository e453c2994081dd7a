"""What `launch.py run` starts: a run, its log, and its exit status."""

from __future__ import annotations

import logging
import sys
import traceback
from pathlib import Path

from mlora.config import ConfigError, Problem, RunOptions
from mlora.data import DataError
from mlora.model.errors import ModelError
from mlora.runs.run import Run, RunError
from mlora.tasks import UnknownTaskError
from mlora.training.checkpoint import CheckpointError
from mlora.training.stop import Paused, Stopped, interruptible

BAD_INPUT = (ConfigError, DataError, ModelError, UnknownTaskError)
FAILED = (RunError, CheckpointError)

log = logging.getLogger("mlora")


def main(options: RunOptions) -> int:
    """Run, and return the exit status: 0 done or out of time, 1 failed, 2 bad input, 130 interrupted."""
    try:
        logs = _log_to(options)
        with interruptible():
            Run(options).run()
        return 0
    except BAD_INPUT as error:
        return _fail(error, 2, options)
    except FAILED as error:
        return _fail(error, 1, options)
    except Paused as error:
        print(error)
        return 0
    except (KeyboardInterrupt, Stopped) as error:
        print(str(error) or "interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # the last resort of a program: one line for the user, all of it in the log
        return _fail(error, 1, options, f"; the traceback is in {logs}")


def _fail(error: Exception, status: int, options: RunOptions, hint: str = "") -> int:
    log.debug("failed", exc_info=error)
    if options.debug:
        traceback.print_exception(error)
    kind = "" if isinstance(error, (*BAD_INPUT, *FAILED)) else f"{type(error).__name__}: "
    print(f"Error: {kind}{error}{hint}", file=sys.stderr)
    return status


def _log_to(options: RunOptions) -> Path:
    """Write everything to the log file, warnings to standard error."""
    path = Path(options.log_file)
    if options.dir != "." and options.log_file == RunOptions(base_model="").log_file:
        path = Path(options.dir) / "log.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        to_file, to_user = logging.FileHandler(path, encoding="utf-8"), logging.StreamHandler()
    except OSError as error:
        raise ConfigError(str(path), [Problem("", f"cannot be written: {error.strerror}")]) from error
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_user.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    to_user.setLevel(logging.WARNING)
    log.handlers[:] = [to_file, to_user]
    log.setLevel(logging.DEBUG)
    log.propagate = False
    return path
