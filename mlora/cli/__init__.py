"""The command line: launch.py, train.py, generate.py and the installed `mlora`. Imports neither torch nor transformers.

A command is one function in the file of its group, which is imported here.
"""

from mlora.cli import (  # noqa: F401  each registers its commands
    config,
    data,
    doctor,
    evaluate,
    export,
    report,
    reproduce,
    run,
)
from mlora.cli.program import main

__all__ = ["main"]
