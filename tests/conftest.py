"""Shared fixtures: tiny random models of many families, the recorded oracles, the packaged model."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).resolve().parents[2] / "shared"


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
