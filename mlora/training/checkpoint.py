"""Checkpoints: whole or absent, checked when read, each job's own.

    checkpoints/<adapter>/step-000500/
        adapter_config.json  adapter_model.safetensors     the adapter, loadable as it is
        optimizer.safetensors  state.json                  what training goes on from
        manifest.json                                      size and SHA-256 of each file, written last

A checkpoint is written into a temporary folder, synced, and renamed; jobs are independent, so each has its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mlora.model.multi import MultiAdapterModel
from mlora.training.job import Job

KEPT = 2
"""Checkpoints kept of each adapter; the older one is there in case the newest is damaged."""
MANIFEST = "manifest.json"

log = logging.getLogger(__name__)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `path` when the block ends well, and vanishes when not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        old = None
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            os.rename(path, old / path.name)
        os.rename(temporary, path)
        _sync(path.parent)
        if old is not None:
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def save(folder: Path, job: Job, model: MultiAdapterModel) -> Path:
    """Write a checkpoint of a job at its present step, and drop the ones before the last `KEPT`.

    Args:
        folder: of the job's checkpoints.
        job: at a step's end.
        model: that holds its adapter.

    Returns:
        The checkpoint's folder.
    """
    path = folder / f"step-{job.step:06d}"
    with whole_folder(path) as temporary:
        model.save_adapter(job.name, temporary)
        tensors, state = _flatten(job.state())
        save_file(tensors, temporary / "optimizer.safetensors")
        (temporary / "state.json").write_text(json.dumps(state))
        (temporary / MANIFEST).write_text(json.dumps(_digests(temporary), indent=1))
    for old in _found(folder)[:-KEPT]:
        shutil.rmtree(old)
    return path


def restore(folder: Path, job: Job, model: MultiAdapterModel) -> bool:
    """Bring a job back to its newest good checkpoint; False where there is none.

    A damaged checkpoint is named in a warning and the one before it is taken.
    """
    for path in reversed(_found(folder)):
        broken = damage(path)
        if broken:
            log.warning("%s is damaged (%s); going back to the checkpoint before it", path, ", ".join(broken))
            continue
        tensors = load_file(path / "adapter_model.safetensors")
        model.restore_adapter(job.name, tensors, str(path))
        state = json.loads((path / "state.json").read_text())
        job.load_state(_unflatten(load_file(path / "optimizer.safetensors"), state))
        return True
    return False


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


def _found(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir()) if folder.is_dir() else []


def _digests(path: Path) -> dict[str, dict[str, Any]]:
    files = sorted(file for file in path.iterdir() if file.name != MANIFEST)
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()} for file in files
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
    groups = state["optimizer"]["param_groups"]
    return tensors, {"step": state["step"], "plain": plain, "groups": groups, "schedule": state["schedule"]}


def _unflatten(tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> dict[str, Any]:
    moments: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **state["plain"]}.items():
        index, _, name = key.partition(".")
        moments.setdefault(int(index), {})[name] = value
    optimizer = {"state": moments, "param_groups": state["groups"]}
    return {"step": state["step"], "optimizer": optimizer, "schedule": state["schedule"]}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

