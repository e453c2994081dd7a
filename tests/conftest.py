"""Shared fixtures: tiny random models of many families, the recorded oracles, the packaged model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():  # before anything imports triton, whose own functions are decided upon then
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=10, help="processes that a test kills at random moments")
    parser.addoption("--seed", type=int, default=0, help="of what tests draw at random")


@pytest.fixture
def kills(request: pytest.FixtureRequest) -> int:
    """How many processes a test kills at random moments."""
    return int(request.config.getoption("--kills"))


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Seed of what a test draws at random."""
    return int(request.config.getoption("--seed"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Recorded oracles and real data, kept outside the project."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared: recorded tensors and real data that are not part of the project")
    return SHARED


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
