"""MLflow: a database in the run folder, or where MLFLOW_TRACKING_URI says, which `mlflow ui` shows."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlora.tracking import PROJECT


class Mlflow:
    """One run of mlflow; each adapter's values lie under its name.

    Args:
        client: mlflow's.
        run: its id.
    """

    def __init__(self, client: Any, run: str) -> None:
        self._client, self._run = client, run

    def log(self, adapter: str, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(f"{adapter}/{key}", value, now, step) for key, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._run)


def open_tracker(folder: Path, run: str, config: Mapping[str, Any]) -> Mlflow:
    """Open the tracker of a run."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.entities import Param

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    place = folder.resolve()
    client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", f"sqlite:///{place / 'mlflow.db'}"))
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        artifacts = None if "MLFLOW_TRACKING_URI" in os.environ else (place / "mlartifacts").as_uri()
        experiment = client.get_experiment(client.create_experiment(name, artifact_location=artifacts))
    started = client.create_run(experiment.experiment_id, run_name=run)
    client.log_batch(started.info.run_id, params=[Param(key, str(value)) for key, value in _flat(config)])
    return Mlflow(client, started.info.run_id)


def _flat(value: Any, key: str = "") -> list[tuple[str, Any]]:
    """Return settings as (path, value); adapters by their names."""
    if isinstance(value, Mapping):
        return [pair for name, item in value.items() for pair in _flat(item, f"{key}.{name}" if key else str(name))]
    if isinstance(value, list) and value and all(isinstance(item, Mapping) and "name" in item for item in value):
        return [pair for item in value for pair in _flat(item, f"{key}.{item['name']}")]
    return [(key, value)]
