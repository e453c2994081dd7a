"""The wheel holds all that the installed command needs."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.report.runs import adapter, write_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def mlora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The console command, installed from a wheel into an environment of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    built = subprocess.run(
        [*pip, "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)], capture_output=True, text=True, check=False
    )
    if built.returncode != 0 and "hatchling" in built.stderr:
        pytest.skip("needs hatchling, from a package registry")
    assert built.returncode == 0, built.stderr[-2000:]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    (wheel,) = folder.glob("*.whl")
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "-q", "--no-deps", str(wheel)], check=True)
    (site,) = (folder / "venv").glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"])  # what it depends on is installed there
    return folder / "venv" / "bin" / "mlora"


@pytest.mark.slow
def test_the_installed_command(mlora: Path, tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    write_run(tmp_path / "run", [adapter("a")])
    for arguments in (
        ["gen", "--template", "mixlora", "--tasks", "arc-e"],
        ["avail"],
        ["schema"],
        ["report", "run"],
        ["run", "--help"],
    ):
        done = subprocess.run(
            [mlora, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0 and done.stdout, (arguments, done.stderr[-2000:])
    where = "import mlora; print(mlora.__file__)"
    python = mlora.with_name("python")
    found = subprocess.run([python, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert str(mlora.parents[1]) in found.stdout
    assert (tmp_path / "mlora.json").exists() and (tmp_path / "run" / "report.html").exists()
