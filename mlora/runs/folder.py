"""The run folder: what a run writes, where, and never half."""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import platform
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mlora.config import ConfigError, JobConfig, Problem, RunOptions
from mlora.config.jsonfile import write_atomically, write_json
from mlora.evaluation import BASE, Conditions, Examination, Outcome
from mlora.model.profile import RouterProfile
from mlora.tasks import find_task
from mlora.tracking import Trackers

PACKAGES = ("mlora", "torch", "transformers", "datasets", "accelerate", "safetensors", "bitsandbytes", "peft")

log = logging.getLogger(__name__)

ENDING = 5.0
"""Seconds that a run which was just killed may take to let go of its folder."""
EVALUATION = ("task", "protocol", "metric", "value", "standard_error", "n")
"""What metrics.jsonl holds of a result that was measured during training."""


@contextmanager
def alone(path: str) -> Iterator[None]:
    """Keep other runs from writing to a folder within this block; the lock ends with the process and is no file.

    Raises:
        ConfigError: another run holds it, or the folder cannot be made.
    """
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise _refusal(path, f"cannot be written: {error.strerror}") from error
    try:
        _lock(handle, path)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, path: str) -> None:
    patience = time.monotonic() + ENDING
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= patience:
                message = "another run writes here; wait for its end, or --dir DIR writes elsewhere"
                raise _refusal(path, message) from error
            time.sleep(0.1)
        except OSError as error:  # a file system of another machine that knows no locks
            return log.debug("%s: cannot be locked: %s", path, error)


class RunFolder:
    """Files of one run.

    With "." as the folder, adapters lie side by side in the current folder, where the predecessors put them.

    Args:
        path: as given on the command line.
        writes: whether this process is the one that writes; of the others nothing reaches the disk.
    """

    def __init__(self, path: str, writes: bool = True) -> None:
        self.path, self.writes = Path(path), writes
        self.adapters = self.path if path == "." else self.path / "adapters"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.router = self.path / "router.jsonl"
        self.results = self.path / "results.json"
        self.ranking = self.path / "ranking.json"
        self.config = self.path / "config.json"
        self.environment = self.path / "environment.json"
        self.trackers = Trackers()
        self.report = self.path / "report.html"

    def adapter(self, name: str) -> Path:
        """Folder of one adapter."""
        return self.adapters / name

    def files(self, names: Iterable[str], routed: bool = True) -> list[Path]:
        """Return the files and the adapters that a run of these adapters leaves; `routed`: any of them has routers."""
        own = [self.config, self.environment, self.metrics, self.results, self.report]
        return [*own, *([self.router] if routed else []), *map(self.adapter, names)]

    def require_free(self, names: Iterable[str]) -> None:
        """Refuse to write over what lies there.

        Raises:
            ConfigError: an adapter's folder or checkpoints exist.
        """
        places = [place for name in names for place in (self.adapter(name), self.checkpoints / name)]
        taken = [str(place) for place in places if place.exists()]
        if taken:
            raise _refusal(
                ", ".join(taken),
                "exists already; --overwrite replaces it, --resume goes on from its last checkpoint, "
                "--load_adapter starts from it, --dir DIR writes elsewhere",
            )

    def require_own(self, names: Iterable[str]) -> None:
        """Refuse to touch what no run wrote: a config.json, or a folder that only shares an adapter's name."""
        for folder in map(self.adapter, names):
            if folder.exists() and not (folder / "adapter_config.json").exists():
                raise _refusal(str(folder), "exists already and is no adapter; choose another name or --dir DIR")
        self.read_results()
        if self.config.exists() and not self.environment.exists():
            raise _refusal(str(self.config), "exists already and is not of a run; --dir DIR writes elsewhere")

    def begin(self, config: dict[str, Any], command: list[str], options: dict[str, Any]) -> None:
        """Write the resolved config and what it runs on."""
        if not self.writes:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._clear_leftovers()
        write_json(self.environment, environment(command, options))
        write_json(self.config, config)

    def _clear_leftovers(self) -> None:
        """Remove what a crash within `write_atomically` left beside our files."""
        own = [file.name for file in self.files(())]
        left = [path for name in own for path in self.path.glob(f".{name}.????????")]
        for path in [*left, *self.adapters.glob("*/.README.md.????????")]:
            path.unlink()

    def log_step(self, adapter: str, step: int, measured: dict[str, Any]) -> None:
        """Append one optimizer step of one adapter to metrics.jsonl."""
        if not self.writes:
            return
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in measured.items()}
        _append(self.metrics, {"adapter": adapter, "step": step} | finite)
        self.trackers.log(adapter, step, measured)

    def log_routing(self, adapter: str, step: int, job: JobConfig, profile: RouterProfile) -> None:
        """Append how an adapter's routers spread the tokens of a training step to router.jsonl, if it has any."""
        layers = profile.layers() if self.writes else []
        if layers:
            described = {"step": step, "split": "train", "task": job.task_name, "protocol": job.protocol}
            _append(self.router, {"adapter": adapter} | described | {"tokens": profile.tokens, "layers": layers})

    def forget_steps(self, adapter: str, after: int, examined: bool = True) -> None:
        """Drop an adapter's lines of later steps, those of a training that is done again from there.

        Args:
            adapter: its name.
            after: the last step that stands.
            examined: whether the evaluation after that step stands too.
        """
        for file in (self.metrics, self.router):
            if not self.writes or not file.exists():
                continue
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if not _is_later(line, adapter, after, examined)]
            if len(kept) < len(lines):
                write_atomically(file, "".join(kept))

    def log_evaluation(self, adapter: str, step: int, result: dict[str, Any]) -> None:
        """Append a result on validation rows that was measured during training to metrics.jsonl."""
        if not self.writes:
            return
        described = {"adapter": adapter, "step": step, "split": "validation"}
        _append(self.metrics, described | {key: result[key] for key in EVALUATION})
        self.trackers.log(adapter, step, _tracked(result))

    def add_outcome(self, outcome: Outcome, with_samples: bool = False) -> None:
        """Write all that an examination has brought, in place of what an earlier one has.

        Args:
            outcome: of the examination.
            with_samples: whether to write what was answered to each row as well.
        """
        if with_samples:
            write_atomically(self.samples(outcome.examination), "".join(_sample_lines(outcome)))
        if outcome.routing is not None:
            self._replace_routing(outcome, outcome.routing)
        for result in outcome.results:
            self.add_result(result.as_dict())

    def samples(self, examination: Examination) -> Path:
        """File of what an adapter has answered to each row of a task."""
        task = find_task(examination.task, examination.protocol)
        file = f"{task.name.replace(':', '-')}.{task.protocol}.jsonl"
        return self.path / "samples" / (examination.adapter or BASE) / file

    def _replace_routing(self, outcome: Outcome, profile: RouterProfile) -> None:
        task, asked = outcome.questions.task, outcome.examination
        entry = {"adapter": asked.adapter, "step": None, "split": asked.split, "task": task.name}
        entry |= {"protocol": task.protocol}
        lines = (
            self.router.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            if self.router.exists()
            else []
        )
        kept = [line for line in lines if (told := _entry(line)) is not None and not entry.items() <= told.items()]
        whole = entry | {"tokens": profile.tokens, "layers": profile.layers()}
        write_atomically(self.router, "".join([*kept, json.dumps(whole) + "\n"]))

    def known_results(self, examination: Examination, conditions: Conditions) -> list[dict[str, Any]]:
        """Return the results that an examination under these conditions had before; [] where one is missing."""
        task = find_task(examination.task, examination.protocol)
        name = examination.adapter or BASE
        wanted: dict[str, Any] = {"adapter": name, "task": task.name, "protocol": task.protocol}
        wanted |= {"version": task.version, "conditions": conditions}
        found = [r for r in self.read_results() if all(r.get(key) == value for key, value in wanted.items())]
        return found if {r["metric"] for r in found} == set(task.metrics) else []

    def read_results(self) -> list[dict[str, Any]]:
        """Return the results so far.

        Raises:
            ConfigError: results.json is no list of results.
        """
        if not self.results.exists():
            return []
        try:
            found = json.loads(self.results.read_text(encoding="utf-8"))
        except ValueError:
            found = None
        if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
            raise _refusal(str(self.results), "holds no results of runs; move it away, or --dir DIR writes elsewhere")
        return found

    def add_result(self, result: dict[str, Any]) -> None:
        """Write one result as soon as it exists, in place of an older one of the same adapter, task and metric."""
        same = ("adapter", "task", "protocol", "metric")
        kept = [r for r in self.read_results() if any(r.get(key) != result.get(key) for key in same)]
        write_json(self.results, [*kept, result])
        self.trackers.log(result["adapter"], None, _tracked(result))


def _tracked(result: dict[str, Any]) -> dict[str, Any]:
    return {"/".join(result[key] for key in ("protocol", "task", "metric")): result["value"]}


def _sample_lines(outcome: Outcome) -> Iterator[str]:
    questions, adapter = outcome.questions, outcome.examination.adapter or BASE
    for row, (question, prediction) in enumerate(zip(questions.questions, outcome.predictions, strict=True)):
        sample = {
            "row": row,
            "adapter": adapter,
            "prompt": question.prompt,
            "choices": question.choices or questions.task.labels,
            "scores": prediction.scores,
            "chosen": prediction.chosen,
            "answer": question.answer,
            "correct": prediction.chosen == question.answer,
        }
        yield json.dumps(sample, ensure_ascii=False) + "\n"


def _append(file: Path, entry: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(entry) + "\n")


def _entry(line: str) -> dict[str, Any] | None:
    """Return what a line of metrics.jsonl or router.jsonl tells; None where it is damaged, by a crash say."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(entry, dict) and "adapter" in entry and isinstance(entry.get("step", ""), int | None)
    return entry if whole else None


def _is_later(line: str, adapter: str, step: int, examined: bool) -> bool:
    """Whether a line is of a later step of the adapter, or damaged; step null is after the last."""
    entry = _entry(line)
    if entry is None:
        return True
    if entry["adapter"] != adapter:
        return False
    if entry["step"] == step and not examined:
        return "eval_loss" in entry or "value" in entry
    return bool(entry["step"] is None or entry["step"] > step)


def _refusal(what: str, message: str) -> ConfigError:
    return ConfigError(what, [Problem("", message)])


def environment(command: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """Return what a run depends on besides its config."""
    import torch

    return {
        "date": now(),
        "command": command,
        "options": options,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "versions": {name: installed for name in PACKAGES if (installed := _version(name))},
    }


def log_path(folder: str, log_file: str) -> Path:
    """Return where the log goes: beside the rest of a run that has a folder, unless a place of its own is asked for."""
    beside = folder != "." and log_file == RunOptions(base_model="").log_file
    return Path(folder) / "log.txt" if beside else Path(log_file)


def now() -> str:
    """Return the time as ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
