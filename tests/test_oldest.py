"""The oldest versions that the project asks for, in an environment of their own; `make test-all` makes it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.oldest import BOUND, ROOT, dependencies, oldest

PYTHON = ROOT / ".venv" / "oldest" / "bin" / "python"
CORE = (
    "tests/config/test_load.py",
    "tests/config/test_fuzz.py",
    "tests/data/test_dataset.py",
    "tests/model/test_multi.py",
    "tests/test_cli.py::test_bad_input_exits_with_2_and_says_why",
    "tests/test_program.py::test_a_whole_run",
    "tests/test_program.py::test_the_best_state_by_held_out_loss_is_kept",
    "tests/test_program.py::test_resuming_asks_for_the_same_settings_and_a_checkpoint",
    "tests/training/test_promises.py::test_r1_trained_together_as_trained_alone",
    "tests/training/test_promises.py::test_r2_resumed_training_is_bit_identical",
)


def test_r23_there_are_no_upper_bounds() -> None:
    assert all(BOUND.fullmatch(asked) for asked in dependencies())


@pytest.mark.slow
def test_r23_the_core_on_the_oldest_versions(tmp_path: Path) -> None:
    if not PYTHON.exists():
        pytest.skip("needs the oldest versions: `make test-all` installs them into .venv/oldest")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [PYTHON, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )

    names = list(oldest())
    found = run("-c", f"from importlib.metadata import version\nfor name in {names}: print(name, version(name))")
    installed = dict(line.split() for line in found.stdout.splitlines())
    for name, bound in oldest().items():
        assert f"{installed[name]}.".startswith(f"{bound}."), (name, installed[name])
    place = f"--basetemp={tmp_path / 'inside'}"
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", place, *CORE)
    assert done.returncode == 0, done.stdout[-5000:]
