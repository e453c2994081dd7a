"""Imports run one way between the rooms, and the command line's rooms never load torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mlora"
MAY_IMPORT = {
    "wording": set(),
    "network": set(),
    "ops": set(),
    "tasks": set(),
    "report": set(),
    "tracking": set(),
    "parallel": set(),
    "adapters": {"ops"},
    "config": {"adapters", "tasks"},
    "data": {"tasks", "config"},
    "model": {"config", "adapters", "ops", "parallel"},
    "evaluation": {"model", "data", "tasks", "parallel"},
    "export": {"model", "config", "adapters", "ops"},
    "generation": {"model", "data", "config"},
    "serving": {"generation", "model", "data"},
    "training": {"model", "data", "config", "adapters", "ops", "parallel"},
    "runs": {"training", "evaluation", "report", "tracking", "model", "data", "tasks", "config", "adapters"}
    | {"parallel"},
    "cli": {"generation", "serving", "runs", "export", "config", "tasks", "adapters", "report", "data", "model"},
    "__init__": set(),
}
"""Rooms that the files of a room may import, besides their own, the words of `wording` and `network`."""


def imported(file: Path) -> set[str]:
    """Return the full names of all modules that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_run_one_way(file: Path) -> None:
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    others = {name.split(".")[1] for name in imported(file) if name.startswith("mlora.")} - {room, "wording", "network"}
    rooms = others & MAY_IMPORT.keys()
    assert rooms <= MAY_IMPORT[room], f"{file} imports {rooms - MAY_IMPORT[room]}"


def test_every_room_is_in_the_table() -> None:
    rooms = {p.name.removesuffix(".py") for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert rooms <= MAY_IMPORT.keys()


@pytest.mark.parametrize("room", ["adapters", "config", "tasks", "data", "report", "ops", "cli"])
def test_rooms_of_the_command_line_load_no_torch(room: str) -> None:
    program = f"import sys, mlora.{room}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_no_assert_guards_input(file: Path) -> None:
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(file.read_text())))
