"""The command line: launch.py, train.py, generate.py and the installed `mlora`. Imports neither torch nor transformers.

A command is one function in the file of its group, which is imported here.
"""

import sys

try:
    from mlora.cli import (  # noqa: F401  each registers its commands
        config,
        data,
        doctor,
        evaluate,
        export,
        generate,
        inference,
        report,
        reproduce,
        run,
    )
    from mlora.cli.program import main
except ModuleNotFoundError as error:  # a Python without what `make setup` installs is the first thing that users meet
    if error.name is None or error.name.partition(".")[0] == "mlora":
        raise
    sys.exit(
        f"Error: {sys.executable} has no package {error.name}.\n"
        "After `make setup`, `source .venv/bin/activate` chooses the Python that has all;\n"
        "`pip install .` in the checkout adds it to this one."
    )

__all__ = ["main"]
