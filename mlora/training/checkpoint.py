"""Checkpoints: whole or absent, checked when read, of all jobs at one moment, written while the training goes on.

    checkpoints/<adapter>/step-000500/
        adapter_config.json  adapter_model.safetensors     the adapter, loadable as it is
        optimizer.safetensors  state.json                  what training goes on from
        manifest.json                                      size and SHA-256 of each file, written last
    checkpoints/<adapter>/best/                            its best state by held-out loss: adapter and manifest

Each is written into a temporary folder, synced, and renamed. Jobs are independent, but which of them share a forward
decides in what order floats are summed; so a resumed run goes back to one moment of all its jobs, in the middle of
an accumulation if need be, and ends in the same bits. The moment is the number of micro-batches that all jobs have
done together.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mlora.config import ConfigError, Problem
from mlora.model import files
from mlora.model.multi import MultiAdapterModel
from mlora.training.job import Job

MANIFEST = "manifest.json"

log = logging.getLogger(__name__)


class CheckpointError(Exception):
    """A checkpoint that could not be written; those before it are intact."""


class Checkpoints:
    """The checkpoints of a run.

    As a context it waits at its end for what is being written, except where Ctrl-C ends it.

    Args:
        root: folder of all checkpoints.
        jobs: of the run, those included that wait or are done.
        model: that holds their adapters.
        keep: moments kept; more than one, so that there is another where the newest is damaged.

    Attributes:
        damaged: checkpoints that `restore` found other than they were written.
    """

    def __init__(self, root: Path, jobs: Sequence[Job], model: MultiAdapterModel, keep: int = 2) -> None:
        self.root, self.jobs, self.model, self.keep = root, jobs, model, keep
        self.damaged: list[Path] = []
        self._writing: _Writing | None = None
        self._passed_over: set[Path] = set()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, KeyboardInterrupt):
            self.wait()

    def save(self) -> None:
        """Copy the state of every job that has begun and is not yet kept at its end, and begin to write it.

        Raises:
            CheckpointError: the checkpoint before this one could not be written.
        """
        self.wait()  # one at a time: they end in order, and no second copy takes memory
        moment = sum(job.micro_batches for job in self.jobs)
        begun = [job for job in self.jobs if job.micro_batches and not (job.done and self._place(job).exists())]
        shared = {"moment": moment, "jobs": [job.name for job in begun]}
        copies = [(self._place(job), _copy(job, self.model, shared)) for job in begun]
        self._writing = _Writing(partial(self._write, copies))
        self._writing.start()

    def wait(self) -> None:
        """Return when nothing is being written any more.

        Raises:
            CheckpointError: what was written could not be.
        """
        if self._writing is not None:
            self._writing.join()
            self.check()

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._writing is not None and self._writing.is_alive()

    def check(self) -> None:
        """Raise CheckpointError where writing has failed meanwhile."""
        if self._writing is not None and not self.writing:
            error, self._writing = self._writing.error, None
            if error is not None:
                raise CheckpointError(
                    f"{self.root}: no checkpoint could be written: {error}; the one before is intact, "
                    "and --resume goes on from it"
                ) from error

    def restore(self) -> bool:
        """Bring all jobs back to the newest moment of which every checkpoint is good; False where there is none.

        Damaged checkpoints are named in a warning. What is newer than that moment goes with the next `save`.

        Raises:
            ConfigError: a checkpoint was made with other settings; which, is said.
        """
        for job in self.jobs:
            files.clear_leftovers(self._best(job))
            for unfinished in (self.root / job.name).glob(".step-*"):
                shutil.rmtree(unfinished)
        names = {job.name for job in self.jobs}
        found = {path: _read_good(path, job) for job in self.jobs for path in self._paths(job)}
        self.damaged = [path for path, saved in found.items() if saved is None]
        self._passed_over = set(found)
        good = [saved for saved in found.values() if saved is not None]
        for moment in sorted({saved.moment for saved in good}, reverse=True):
            chosen = [saved for saved in good if saved.moment == moment or (saved.done and saved.moment < moment)]
            needed = {name for saved in chosen if saved.moment == moment for name in saved.jobs}
            if needed & names <= {saved.job.name for saved in chosen}:
                for saved in chosen:
                    saved.require_same()
                for saved in chosen:
                    saved.apply(self.model)
                    self._require_best(saved.job)
                self._passed_over -= {saved.path for saved in good if saved.moment <= moment}
                return True
        return False

    def save_best(self, job: Job) -> None:
        """Keep an adapter's state of now as its best by held-out loss."""
        with files.whole_folder(self._best(job)) as folder:
            self.model.save_adapter(job.name, folder)
            _seal(folder)

    def restore_best(self, job: Job) -> None:
        """Bring an adapter back to its best state by held-out loss; one that is damaged is named and left alone."""
        if self._is_whole(self._best(job), "the adapter stays as its last step left it"):
            tensors = load_file(self._best(job) / files.TENSORS)
            self.model.restore_adapter(job.name, tensors, str(self._best(job)))

    def _require_best(self, job: Job) -> None:
        """Forget how good a job's best state was where that state is lost, so that the next one is kept."""
        if job.best_loss < math.inf and not self._is_whole(self._best(job), "it is sought again from here on"):
            job.best_loss = math.inf

    def _is_whole(self, place: Path, otherwise: str) -> bool:
        broken = damage(place)
        if broken:
            log.warning("%s is damaged (%s); %s", place, ", ".join(broken), otherwise)
        return not broken

    def _write(self, copies: Sequence[tuple[Path, Callable[[Path], None]]]) -> None:
        for place, write in copies:
            with files.whole_folder(place) as temporary:
                write(temporary)
                _seal(temporary)
        self._passed_over -= {place for place, _ in copies}
        self._drop_old()

    def _drop_old(self) -> None:
        """Keep the last moments and the end of every job that is done."""
        states = {path: _state(path) for job in self.jobs for path in self._paths(job)}
        moments = {state.get("moment", -1) for path, state in states.items() if path not in self._passed_over}
        kept = sorted(moments)[-self.keep :]
        for path, state in states.items():
            if path in self._passed_over or not (state.get("moment", -1) in kept or state.get("done")):
                # out of sight first: half-removed, it would look damaged
                shutil.rmtree(path.rename(path.with_name(f".{path.name}")))

    def _place(self, job: Job) -> Path:
        within = f"-{job.row}" if job.row else ""
        return self.root / job.name / f"step-{job.step:06d}{within}"

    def _best(self, job: Job) -> Path:
        return self.root / job.name / "best"

    def _paths(self, job: Job) -> list[Path]:
        return sorted(path for path in (self.root / job.name).glob("step-*") if path.is_dir())


class _Writing(threading.Thread):
    """The writing of one moment. A daemon: the program does not wait for it where it is told twice to stop."""

    def __init__(self, write: Callable[[], None]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._write = write
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._write()
        except Exception as error:  # raised again in the thread that trains
            self.error = error


def _copy(job: Job, model: MultiAdapterModel, shared: dict[str, Any]) -> Callable[[Path], None]:
    """Copy what a checkpoint holds of a job to the CPU, and return what writes it to a folder."""
    adapter = model.adapter_module(job.name)
    own = {name: tensor.to("cpu", copy=True) for name, tensor in adapter.file_tensors().items()}
    tensors, state = _flatten(job.state())
    text = json.dumps(state | shared | {"done": job.done, "identity": job.identity})
    method, origin, about = adapter.method.as_saved(), model.origin, (adapter.head_task, model.architecture)

    def write(folder: Path) -> None:
        files.write(folder, method, own, origin.given, origin.revision, job.name, None, *about)
        save_file(tensors, folder / "optimizer.safetensors")
        (folder / "state.json").write_text(text)

    return write


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


def _state(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / "state.json").read_text())
    except (OSError, ValueError):
        return {}


def damage(path: Path) -> list[str]:
    """Return the names of a checkpoint's files that are not as they were written."""
    try:
        found = _digests(path)
        text = (path / MANIFEST).read_text()
        expected = json.loads(text)["files"]
        if _manifest(expected) != text:
            return [MANIFEST]
    except (OSError, ValueError, TypeError, KeyError):
        return [MANIFEST]
    return [name for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]


def _seal(folder: Path) -> None:
    """Write the manifest of what lies in a folder."""
    (folder / MANIFEST).write_text(_manifest(_digests(folder)))


def _manifest(digests: dict[str, Any]) -> str:
    """Return the text of a manifest, which holds a digest of itself: safe from a flipped bit as what it lists."""
    own = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    return json.dumps({"files": digests, "sha256": own}, indent=1)


def _digests(path: Path) -> dict[str, Any]:
    return {file.name: _digest(file) for file in sorted(path.iterdir()) if file.name != MANIFEST}


def _digest(file: Path) -> dict[str, Any] | None:
    try:
        with file.open("rb") as content:
            return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}
    except OSError:  # unreadable, or no file at all: as good as damaged
        return None


def _flatten(state: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split a job's state into tensors and JSON values."""
    tensors, plain = {}, {}
    for index, values in state["optimizer"]["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.detach().to("cpu", copy=True).contiguous()
            else:
                plain[f"{index}.{name}"] = value
    tensors |= {f"gradient.{i}": g.detach().to("cpu", copy=True).contiguous() for i, g in state["gradients"].items()}
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
    return state | {"optimizer": optimizer, "gradients": gradients}
