"""Words that the messages of all rooms share."""

from __future__ import annotations

import sys
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[1]


def counted(count: int, thing: str) -> str:
    """Return a number with what it counts: "1 row", "2,000 rows"."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def launcher() -> str:
    """Return how commands are started where this one was: by the installed program or by the checkout's script."""
    return "mlora" if Path(sys.argv[0]).stem == "mlora" else "python launch.py"


def install(extra: str) -> str:
    """Return the command that adds an extra to this installation: a checkout by its path, a package by its name."""
    if not (_CHECKOUT / "pyproject.toml").exists():
        return f"pip install 'mlora[{extra}]'"
    return f"pip install -e '{'.' if Path.cwd() == _CHECKOUT else _CHECKOUT}[{extra}]'"
