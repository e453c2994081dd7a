"""Trackers: what a run measures, sent on to other programs beside metrics.jsonl.

Each keeps its data in the run folder and opens no connection, unless its own environment variables ask for it. No
tracker is imported before it is asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mlora.wording import install

log = logging.getLogger(__name__)

PROJECT = "mlora"
"""What runs are filed under where a tracker's own environment variable names no other project."""
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
"""Trackers by name, each a module of this room, with the package it needs."""


class Tracker(Protocol):
    """One program that keeps what a run measures."""

    def log(self, adapter: str, step: int, values: Mapping[str, float]) -> None:
        """Keep finite values of an adapter at an optimizer step."""

    def close(self) -> None:
        """Write what is still in memory."""


class Trackers:
    """Several trackers as one, none of which can fail a run: one that raises is dropped with a warning.

    Args:
        trackers: by name.
    """

    def __init__(self, trackers: Mapping[str, Tracker] | None = None) -> None:
        self._trackers = dict(trackers or {})
        self._steps: dict[str, int] = {}

    @classmethod
    def opened(cls, names: Sequence[str], folder: Path, run: str, config: Mapping[str, Any]) -> Trackers:
        """Open trackers for a run.

        Args:
            names: keys of `PACKAGES`.
            folder: of the run, where they keep their data.
            run: name of the run.
            config: all settings of the run, to be kept beside the measurements.
        """
        opened: dict[str, Tracker] = {}
        for name in names:
            try:
                opened[name] = importlib.import_module(f"mlora.tracking.{name}").open_tracker(folder, run, config)
            except Exception as error:  # whatever another program fails by
                _warn(name, error)
        return cls(opened)

    def log(self, adapter: str, step: int | None, values: Mapping[str, Any]) -> None:
        """Keep what of the values is a finite number.

        Args:
            adapter: whose.
            step: optimizer step; None for the last that was kept of the adapter.
            values: by name.
        """
        at = self._steps.get(adapter, 0) if step is None else step
        self._steps[adapter] = at
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float) and math.isfinite(v)}
        self._each(lambda tracker: tracker.log(adapter, at, numbers))

    def close(self) -> None:
        """Close all; nothing is kept afterwards."""
        self._each(lambda tracker: tracker.close())
        self._trackers.clear()

    def _each(self, do: Any) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                do(tracker)
            except Exception as error:  # whatever another program fails by
                del self._trackers[name]
                _warn(name, error)


def problem(names: Sequence[str]) -> str | None:
    """Return why these trackers cannot be used; None where they can."""
    for name in names:
        if name not in PACKAGES:
            return f"{name!r} is no tracker; expected {', '.join(PACKAGES)}, several joined by a comma"
        if importlib.util.find_spec(PACKAGES[name]) is None:
            return f"{name} is not installed: {install(name)}"
    return None


def _warn(name: str, error: Exception) -> None:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    log.warning("tracker %s is off from here on, metrics.jsonl goes on: %s", name, text)
    log.debug("tracker %s failed", name, exc_info=error)
