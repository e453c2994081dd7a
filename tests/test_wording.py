"""Numbers with their nouns, and the command that a message advises: one that works from where the user stands."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from mlora import wording

ROOT = Path(__file__).resolve().parents[1]


def test_one_is_singular() -> None:
    assert [wording.counted(n, "row") for n in (0, 1, 2, 4000)] == ["0 rows", "1 row", "2 rows", "4,000 rows"]


def test_a_checkout_is_named_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert wording.install("quant") == f"pip install -e '{ROOT}[quant]'"
    monkeypatch.chdir(ROOT)
    assert wording.install("quant") == "pip install -e '.[quant]'"


def test_an_installed_package_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wording, "_CHECKOUT", tmp_path)
    assert wording.install("web") == "pip install 'mlora[web]'"


def test_every_extra_that_is_advised_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    advised = {
        name for file in (ROOT / "mlora").rglob("*.py") for name in re.findall(r"install\([\"'](\w+)", file.read_text())
    }
    assert {"quant", "web"} <= advised <= set(project["optional-dependencies"])
