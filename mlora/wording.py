"""Words that the messages of all rooms share."""

from __future__ import annotations

from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[1]


def counted(count: int, thing: str) -> str:
    """Return a number with what it counts: "1 row", "2,000 rows"."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def install(extra: str) -> str:
    """Return the command that adds an extra to this installation: a checkout by its path, a package by its name."""
    if not (_CHECKOUT / "pyproject.toml").exists():
        return f"pip install 'mlora[{extra}]'"
    return f"pip install -e '{'.' if Path.cwd() == _CHECKOUT else _CHECKOUT}[{extra}]'"
