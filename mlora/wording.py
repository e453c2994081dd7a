"""How the packages that may be left out are installed."""

from __future__ import annotations

from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[1]


def install(extra: str) -> str:
    """Return the command that adds an extra to this installation: a checkout by its path, a package by its name."""
    if not (_CHECKOUT / "pyproject.toml").exists():
        return f"pip install 'mlora[{extra}]'"
    return f"pip install -e '{'.' if Path.cwd() == _CHECKOUT else _CHECKOUT}[{extra}]'"
