"""An environment with the oldest versions that the project asks for, beside the one that this runs in.

    python -m tests.oldest FOLDER

Only what differs is installed; torch and whatever else is not asked for comes from here.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BOUND = re.compile(r"([\w-]+)>=([\d.]+)")


def dependencies() -> list[str]:
    """Return what the project asks for, as pyproject.toml says it."""
    return list(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])


def oldest() -> dict[str, str]:
    """Return the oldest version of each package but torch, of which no old build for CPUs can be had everywhere."""
    bounds = dict(BOUND.fullmatch(asked).groups() for asked in dependencies())  # type: ignore[union-attr]
    return {name: version for name, version in bounds.items() if name != "torch"}


def make(folder: Path) -> None:
    """Make the environment."""
    venv.create(folder, with_pip=False, clear=True)
    here = sysconfig.get_path("purelib")
    inside = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    (inside / "newest.pth").write_text(here + "\n")
    wanted = [f"{name}=={version}.*" for name, version in oldest().items()]
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", *wanted], check=True)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
