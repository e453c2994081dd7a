"""Words that the messages of all rooms share."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

COMMAND = "MLORA_COMMAND"
"""The variable by which a program that starts others hands down what the user typed."""
_CHECKOUT = Path(__file__).resolve().parents[1]


def counted(count: int, thing: str) -> str:
    """Return a number with what it counts: "1 row", "2,000 rows"."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def command_line() -> list[str]:
    """Return the command that the user typed, its program's path shortened to its name.

    What torchrun was given is not handed down; the number of its processes is what counts.
    """
    if COMMAND in os.environ:
        return shlex.split(os.environ[COMMAND])
    own = [Path(sys.argv[0]).name, *sys.argv[1:]]
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return own
    nodes = os.environ["GROUP_WORLD_SIZE"]
    count = [*([] if nodes == "1" else [f"--nnodes={nodes}"]), f"--nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"]
    return ["torchrun", *count, *own]


def launcher() -> str:
    """Return how commands are started where this one was: by the installed program or by the checkout's script."""
    return "mlora" if Path(command_line()[0]).stem == "mlora" else "python launch.py"


def install(extra: str) -> str:
    """Return the command that adds an extra to this installation: a checkout by its path, a package by its name."""
    if not (_CHECKOUT / "pyproject.toml").exists():
        return f"pip install 'mlora[{extra}]'"
    return f"pip install -e '{'.' if Path.cwd() == _CHECKOUT else _CHECKOUT}[{extra}]'"
