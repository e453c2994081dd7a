"""Weights & Biases: an offline run in the run folder, which `wandb sync` uploads; WANDB_MODE=online does at once."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlora.tracking import PROJECT


class Wandb:
    """One run of wandb; each adapter's values lie under its name, over its own optimizer steps.

    Args:
        run: wandb's.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        self._adapters: set[str] = set()

    def log(self, adapter: str, step: int, values: Mapping[str, float]) -> None:
        if adapter not in self._adapters:
            self._adapters.add(adapter)
            self._run.define_metric(f"{adapter}/step", hidden=True)
            self._run.define_metric(f"{adapter}/*", step_metric=f"{adapter}/step")
        self._run.log({f"{adapter}/step": step, **{f"{adapter}/{key}": value for key, value in values.items()}})

    def close(self) -> None:
        self._run.finish()


def open_tracker(folder: Path, run: str, config: Mapping[str, Any]) -> Wandb:
    """Open the tracker of a run."""
    os.environ.setdefault("WANDB_MODE", "offline")
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    project = os.environ.get("WANDB_PROJECT", PROJECT)
    settings = wandb.Settings(silent=True, console="off", disable_git=True)
    return Wandb(wandb.init(project=project, name=run, dir=folder, config=dict(config), settings=settings))
