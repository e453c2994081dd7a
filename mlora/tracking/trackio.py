"""Trackio: a database in the run folder, or where TRACKIO_DIR says, which `trackio show` shows."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlora.tracking import PROJECT


class Trackio:
    """One run of trackio; each adapter's values lie under its name.

    Args:
        run: trackio's.
    """

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, adapter: str, step: int, values: Mapping[str, float]) -> None:
        self._run.log({f"{adapter}/{key}": value for key, value in values.items()}, step=step)

    def close(self) -> None:
        import trackio

        with _quietly():
            trackio.finish()  # the run's own finish would be called again when the program ends


def open_tracker(folder: Path, run: str, config: Mapping[str, Any]) -> Trackio:
    """Open the tracker of a run."""
    os.environ.setdefault("TRACKIO_DIR", str(folder.resolve() / "trackio"))
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import trackio

    project = os.environ.get("TRACKIO_PROJECT", PROJECT)
    with _quietly():
        opened = trackio.init(
            project=project, name=run, config=dict(config), embed=False, auto_log_cpu=False, auto_log_gpu=False
        )
    return Trackio(opened)


def _quietly() -> contextlib.AbstractContextManager[Any]:
    return contextlib.redirect_stdout(None)
