"""TensorBoard: event files in the run folder, one writer for each adapter, so that adapters share charts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class TensorBoard:
    """Writes event files that `tensorboard --logdir RUN/tensorboard` shows.

    Args:
        folder: that gets a folder for each adapter.
        config: kept as text beside each adapter.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._folder, self._config = folder, config
        self._writers: dict[str, Any] = {}

    def log(self, adapter: str, step: int, values: Mapping[str, float]) -> None:
        writer = self._writers.get(adapter)
        if writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # a run that goes on from a checkpoint does its last steps again: what was written of them is passed over
            writer = self._writers[adapter] = SummaryWriter(str(self._folder / adapter), purge_step=step)
            text = json.dumps(self._config, indent=4, default=str).replace("\n", "\n    ")
            writer.add_text("config", f"    {text}", step)
        for key, value in values.items():
            writer.add_scalar(key, value, step)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


def open_tracker(folder: Path, run: str, config: Mapping[str, Any]) -> TensorBoard:
    """Open the tracker of a run."""
    return TensorBoard(folder / "tensorboard", config)
