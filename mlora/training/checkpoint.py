"""Checkpoints: whole or absent, checked when read, of all jobs at one moment.

    checkpoints/<adapter>/step-000500/
        adapter_config.json  adapter_model.safetensors     the adapter, loadable as it is
        optimizer.safetensors  state.json                  what training goes on from
        manifest.json                                      size and SHA-256 of each file, written last

Each is written into a temporary folder, synced, and renamed. Jobs are independent, but which of them share a forward
decides in what order floats are summed; so a resumed run goes back to one moment of all its jobs, in the middle of
an accumulation if need be, and ends in the same bits. The moment is the number of micro-batches that all jobs have
done together.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mlora.config import ConfigError, Problem
from mlora.model.files import whole_folder
from mlora.model.multi import MultiAdapterModel
from mlora.training.job import Job

KEPT = 2
"""Moments kept; the older one is there in case the newest is damaged."""
MANIFEST = "manifest.json"

log = logging.getLogger(__name__)


def save(root: Path, jobs: Sequence[Job], model: MultiAdapterModel) -> None:
    """Write a checkpoint of every job that has begun and is not yet kept at its end; drop old ones.

    Args:
        root: folder of all checkpoints.
        jobs: of the run, those included that wait or are done.
        model: that holds their adapters.
    """
    moment = sum(job.micro_batches for job in jobs)
    begun = [job for job in jobs if job.micro_batches and not (job.done and _place(root, job).exists())]
    for job in begun:
        with whole_folder(_place(root, job)) as temporary:
            model.save_adapter(job.name, temporary)
            tensors, state = _flatten(job.state())
            state |= {"moment": moment, "jobs": [job.name for job in begun], "done": job.done, "identity": job.identity}
            save_file(tensors, temporary / "optimizer.safetensors")
            (temporary / "state.json").write_text(json.dumps(state))
            (temporary / MANIFEST).write_text(json.dumps(_digests(temporary), indent=1))
    _drop_old(root, jobs)


def restore(root: Path, jobs: Sequence[Job], model: MultiAdapterModel) -> bool:
    """Bring all jobs back to the newest moment of which every checkpoint is good; False where there is none.

    Damaged checkpoints are named in a warning.

    Raises:
        ConfigError: a checkpoint was made with other settings; which, is said.
    """
    names = {job.name for job in jobs}
    found = [_read_good(path, job) for job in jobs for path in _paths(root, job)]
    good = [saved for saved in found if saved is not None]
    for moment in sorted({saved.moment for saved in good}, reverse=True):
        chosen = [saved for saved in good if saved.moment == moment or (saved.done and saved.moment < moment)]
        needed = {name for saved in chosen if saved.moment == moment for name in saved.jobs}
        if needed & names <= {saved.job.name for saved in chosen}:
            for saved in chosen:
                saved.require_same()
            for saved in chosen:
                saved.apply(model)
            return True
    return False


@dataclass(frozen=True)
class _Saved:
    """A checkpoint on disk whose files are as they were written."""

    path: Path
    job: Job
    state: dict[str, Any]

    @property
    def moment(self) -> int:
        return self.state["moment"]

    @property
    def jobs(self) -> list[str]:
        return self.state["jobs"]

    @property
    def done(self) -> bool:
        return self.state["done"]

    def require_same(self) -> None:
        before, now = self.state["identity"], self.job.identity
        other = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if other:
            said = ", ".join(f"{key} {before.get(key)!r} then, {now.get(key)!r} now" for key in other)
            raise ConfigError("--resume", [Problem(self.job.name, f"was begun with other settings: {said}")])

    def apply(self, model: MultiAdapterModel) -> None:
        model.restore_adapter(self.job.name, load_file(self.path / "adapter_model.safetensors"), str(self.path))
        self.job.load_state(_unflatten(load_file(self.path / "optimizer.safetensors"), self.state))


def _read_good(path: Path, job: Job) -> _Saved | None:
    broken = damage(path)
    if broken:
        log.warning("%s is damaged (%s); going back to the checkpoint before it", path, ", ".join(broken))
        return None
    return _Saved(path, job, json.loads((path / "state.json").read_text()))


def _place(root: Path, job: Job) -> Path:
    within = f"-{job.row}" if job.row else ""
    return root / job.name / f"step-{job.step:06d}{within}"


def _paths(root: Path, job: Job) -> list[Path]:
    return sorted(path for path in (root / job.name).glob("step-*") if path.is_dir())


def _drop_old(root: Path, jobs: Sequence[Job]) -> None:
    """Keep the last `KEPT` moments, and the end of every job that is done; drop what a crash left half-written."""
    for job in jobs:
        for unfinished in (root / job.name).glob(".step-*"):
            shutil.rmtree(unfinished)
    states = {path: _state(path) for job in jobs for path in _paths(root, job)}
    moments = sorted({state.get("moment", -1) for state in states.values()})[-KEPT:]
    for path, state in states.items():
        if state.get("moment", -1) not in moments and not state.get("done"):
            shutil.rmtree(path)


def _state(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / "state.json").read_text())
    except (OSError, ValueError):
        return {}


def damage(path: Path) -> list[str]:
    """Return the names of a checkpoint's files that are not as they were written."""
    try:
        expected = json.loads((path / MANIFEST).read_text())
        if not isinstance(expected, dict):
            return [MANIFEST]
    except (OSError, ValueError):
        return [MANIFEST]
    found = _digests(path)
    return [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]


def _digests(path: Path) -> dict[str, dict[str, Any]]:
    files = sorted(file for file in path.iterdir() if file.name != MANIFEST)
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in files
    }


def _flatten(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split a job's state into tensors and JSON values."""
    tensors, plain = {}, {}
    for index, values in state["optimizer"]["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
            else:
                plain[f"{index}.{name}"] = value
    tensors |= {f"gradient.{i}": g.detach().cpu().contiguous() for i, g in enumerate(state["gradients"])}
    kept = {key: value for key, value in state.items() if key not in ("optimizer", "gradients")}
    return tensors, kept | {"plain": plain, "groups": state["optimizer"]["param_groups"]}


def _unflatten(tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> dict[str, Any]:
    gradients = {int(key.partition(".")[2]): t for key, t in tensors.items() if key.startswith("gradient.")}
    moments: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **state["plain"]}.items():
        index, _, name = key.partition(".")
        if index != "gradient":
            moments.setdefault(int(index), {})[name] = value
    optimizer = {"state": moments, "param_groups": state["groups"]}
    return state | {"optimizer": optimizer, "gradients": [gradients[i] for i in sorted(gradients)]}
