"""`launch.py reproduce`: the paper's grid of methods, tasks and seeds, as few passes as memory allows.

DIR/reproduce.json    what the grid is; the same command goes on with it
DIR/pass-01/          a run folder: adapters that are trained and evaluated together
DIR/table.txt         the tables over all passes, DIR/results.json the results
"""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from mlora.config import ConfigError, JobConfig, Problem, RunConfig, RunOptions, parse_config, resolved
from mlora.config.errors import did_you_mean, show
from mlora.config.jsonfile import read_json, write_atomically, write_json
from mlora.config.templates import find_template
from mlora.data import split_paths, task_names
from mlora.model import load
from mlora.model.memory import free_bytes
from mlora.report.paper import TASKS
from mlora.report.table import BASE
from mlora.runs.folder import RunFolder
from mlora.runs.paper import cost, paper_tables
from mlora.runs.plan import shapes
from mlora.runs.run import Run, RunError
from mlora.tasks import PROTOCOLS, find_task, known_tasks
from mlora.training.stop import Deadline, Paused, Stopped
from mlora.wording import counted

_FALLING = {"lr": 5e-4, "scheduler_type": "linear", "max_grad_norm": 1.0}
SMALL = {
    "lora": {"r": 16, "lora_alpha": 32} | _FALLING,
    "mixlora": {"r": 6, "lora_alpha": 12, "num_experts": 4} | _FALLING,
}
"""Settings of `--scale small`, by whether a template has experts; what they leave out is the paper's.

The rate falls and gradients are clipped: at the paper's constant rate one of twelve adapters of a 135M model diverged
at the end of its epoch (benchmarks/RESULTS.md).
"""
BYTES_PER_PARAMETER = 16
"""Of a trained number in float32: itself, its gradient and AdamW's two moments."""
MEMORY_SHARE = 0.4
"""Of the memory that the base model leaves free, for adapters; the rest is for activations."""


@dataclass(frozen=True)
class Reproduction:
    """What is to be reproduced, the flags of `launch.py reproduce` under their own names.

    Attributes:
        base_model: local folder, hub id, GGUF file, or "smollm2".
        methods: templates, joined by ",".
        tasks: joined by ",".
        seeds: joined by ",".
        protocols: ways to train and to score, joined by ","; None for each task's first.
        multi_task: one adapter for the mixture of the tasks, rather than one for each.
        scale: "paper" or "small" adapters.
        data_path: local data, as for `gen`.
        train_limit, test_limit: rows of each task; None for all.
        num_epochs, batch_size, micro_batch_size, learning_rate, cutoff_len: in place of the templates'.
        evaluate_batch_size: rows of each adapter in a forward of an evaluation.
        at_once: adapters of a pass; None for as many as memory allows.
        dir: folder that everything is written to.
        time_limit: minutes after which it stops at a checkpoint; None for no limit.
        overwrite: begin again.
        dry_run: print the grid and stop.
        dtype, quantize, attn_impl, gradient_checkpointing, revision, trust_remote_code: of the base model.
        log_file, debug: as for `launch.py run`.
    """

    base_model: str
    methods: str = "lora,dora,mixlora,mixdora"
    tasks: str = ",".join(TASKS)
    seeds: str = "1,2,3"
    protocols: str | None = None
    multi_task: bool = False
    scale: str = "paper"
    data_path: str | None = None
    train_limit: int | None = None
    test_limit: int | None = None
    num_epochs: int | None = None
    batch_size: int | None = None
    micro_batch_size: int | None = None
    learning_rate: float | None = None
    cutoff_len: int = 512
    evaluate_batch_size: int = 16
    at_once: int | None = None
    dir: str = "runs/reproduce"
    time_limit: float | None = None
    overwrite: bool = False
    dry_run: bool = False
    dtype: str | None = None
    quantize: str | None = None
    attn_impl: str | None = None
    gradient_checkpointing: bool = False
    revision: str | None = None
    trust_remote_code: bool = False
    log_file: str = "mlora.log"
    debug: bool = False

    def run(self) -> None:
        """Train and evaluate what is missing, and print the tables.

        Raises:
            ConfigError: the grid cannot be run, or is another than the one begun here.
            RunError: a job or an evaluation failed; the others are done.
            Paused: the time is up; the same command goes on.
        """
        deadline, place = Deadline(self.time_limit), Path(self.dir)
        jobs = self.jobs()
        grid: dict[str, Any] = {"base_model": self.base_model, "dtype": self.dtype, "quantize": self.quantize}
        grid |= {"cutoff_len": self.cutoff_len, "lora": resolved(jobs)["lora"]}
        sizes = self._sizes(jobs)
        passes = self._passes(jobs, grid, sizes)
        count = "one pass" if len(passes) == 1 else f"{len(passes)} passes of at most {max(map(len, passes))}"
        print(f"{counted(len(jobs.lora), 'adapter')} in {count}", flush=True)
        if self.dry_run:
            print("\n".join(f"  {job.name}: {job.task_name}, seed {job.seed}" for job in jobs.lora))
            return
        if self.overwrite:
            for old in place.glob("pass-*"):
                shutil.rmtree(old)
        write_json(place / "reproduce.json", grid | {"passes": passes})
        failures = []
        for number, names in enumerate(passes, 1):
            try:
                self._pass(place / f"pass-{number:02d}", jobs, names, deadline)
            except RunError as error:
                failures.append(str(error))
        self._show(place, jobs, sizes, len(passes))
        if failures:
            raise RunError("\n".join(failures))

    # -- the grid --------------------------------------------------------------------------------------------------

    def jobs(self) -> RunConfig:
        """Return the config of all adapters of the grid.

        Raises:
            ConfigError: a flag names what there is not.
        """
        names, seeds = _listed("--tasks", self.tasks), _listed("--seeds", self.seeds)
        protocols: list[Any] = [None] if self.protocols is None else _listed("--protocols", self.protocols)
        self._check(names, seeds, protocols)
        paths = dict(zip(names, split_paths(self.data_path, names), strict=True))
        entries = []
        groups = [names] if self.multi_task else [[name] for name in names]
        for group, protocol, seed, method in product(groups, protocols, seeds, _listed("--methods", self.methods)):
            tasks = [find_task(name, protocol) for name in group]
            data = ";".join(filter(None, (paths[name] for name in group)))
            stem = "multi" if self.multi_task else tasks[0].name.rpartition(":")[2].replace("-", "_")
            name = "_".join([method, stem, *([protocol] if len(protocols) > 1 else []), f"s{seed}"])
            own: dict[str, Any] = {
                "name": name,
                "task_name": ";".join(task.name for task in tasks),
                "protocol": tasks[0].protocol,
            }
            own |= {"seed": int(seed), "limit": self.train_limit}
            own |= {"data": data or None, "eval_limit": self.test_limit or self.train_limit}
            entries.append(self._template(method) | own)
        return parse_config({"cutoff_len": self.cutoff_len, "lora": entries}, "reproduce")

    def _check(self, names: Sequence[str], seeds: Sequence[str], protocols: Sequence[Any]) -> None:
        """Refuse what a flag cannot mean, before a grid multiplies it."""
        wanted: list[tuple[str, Any, Sequence[str]]] = [
            ("--protocols", name, PROTOCOLS) for name in protocols if name is not None
        ]
        wanted += [("--tasks", name, known_tasks()) for name in names]
        for flag, name, known in wanted:
            if name not in known:
                hint = did_you_mean(name, known)
                raise ConfigError(
                    flag, [Problem("", f"{show(name)} is not allowed; allowed: {', '.join(known)}{hint}")]
                )
        for seed in seeds:
            if not (seed.isascii() and seed.isdigit()):
                raise ConfigError("--seeds", [Problem("", f"{show(seed)} is not allowed; allowed: whole numbers >= 0")])
        for method in _listed("--methods", self.methods):
            try:
                find_template(method)
            except ConfigError as error:
                raise ConfigError("--methods", error.problems) from None

    def _template(self, method: str) -> dict[str, Any]:
        """Return the settings of a method's adapters."""
        entry = dict(read_json(find_template(method))["lora"][0])
        if self.scale == "small":
            entry |= SMALL["mixlora" if "num_experts" in entry else "lora"]
        asked = {
            "num_epochs": self.num_epochs,
            "batch_size": self.batch_size,
            "micro_batch_size": self.micro_batch_size or self.batch_size,
            "lr": self.learning_rate,
            "evaluate_batch_size": self.evaluate_batch_size,
        }
        return entry | {key: value for key, value in asked.items() if value is not None}

    def _sizes(self, jobs: RunConfig) -> dict[str | None, int]:
        """Return the trainable numbers of each adapter, and those of the base model (None)."""
        origin = load.find(self.base_model, self.revision, self.trust_remote_code)
        model, sizes, known = shapes(origin), dict[str | None, int](), dict[Any, int]()
        sizes[None] = model.num_parameters(None)
        for job in jobs.lora:
            key = job.method.model_dump_json(), job.num_labels
            if key not in known:
                model.add_adapter(job.name, job.method, num_labels=job.num_labels)
                known[key] = model.num_parameters(job.name)
            sizes[job.name] = known[key]
        return sizes

    def _passes(self, jobs: RunConfig, grid: Mapping[str, Any], sizes: Mapping[str | None, int]) -> list[list[str]]:
        """Return the names of each pass's adapters: those of the grid begun here, or a new division."""
        begun = Path(self.dir) / "reproduce.json"
        if begun.exists() and not self.overwrite:
            saved = read_json(begun)
            if {key: saved.get(key) for key in grid} != json.loads(json.dumps(grid)):
                message = "holds a grid with other settings; --overwrite begins again, --dir DIR writes elsewhere"
                raise ConfigError(self.dir, [Problem("", message)])
            return saved["passes"]
        names = [job.name for job in jobs.lora]
        largest = BYTES_PER_PARAMETER * max(sizes[name] for name in names)
        free = free_bytes("cuda" if torch.cuda.is_available() else "cpu") - 2 * sizes[None]
        fit = self.at_once or max(1, int(MEMORY_SHARE * free / largest))
        count = -(-len(names) // min(fit, len(names)))
        each, alike = -(-len(names) // count), _alike(jobs.lora)
        each -= each % alike if each > alike else 0
        return [names[start : start + each] for start in range(0, len(names), each)]

    # -- a pass ----------------------------------------------------------------------------------------------------

    def _pass(self, place: Path, jobs: RunConfig, names: Sequence[str], deadline: Deadline) -> None:
        folder, own = RunFolder(str(place)), [job for job in jobs.lora if job.name in names]
        if _missing(folder, own) == 0:
            return
        if deadline.passed:
            raise Paused(self._goes_on)
        config = place / "mlora.json"
        settings = {"lora": tuple(own), "save_step": 100, "train_lora_simultaneously_num": _alike(own)}
        write_json(config, resolved(jobs.model_copy(update=settings)))
        begun = any(place.glob("checkpoints/*/step-*"))
        options = RunOptions(
            self.base_model,
            config=str(config),
            dir=str(place),
            resume=begun,
            overwrite=not begun,
            evaluate_base=True,
            time_limit=deadline.minutes_left,
            **{name: getattr(self, name) for name in _PASSED_ON},
        )
        started = time.monotonic()
        try:
            Run(options).run()
            shutil.rmtree(place / "checkpoints")  # nothing goes on from them any more, and they are large
        except Stopped as error:
            raise type(error)(self._goes_on) from None
        finally:
            with (place / "slices.jsonl").open("a", encoding="utf-8") as slices:
                slices.write(json.dumps({"seconds": round(time.monotonic() - started, 1)}) + "\n")
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    @property
    def _goes_on(self) -> str:
        return "stopped; everything so far is saved: go on with the same command"

    def _show(self, place: Path, jobs: RunConfig, sizes: Mapping[str | None, int], passes: int) -> None:
        """Print and write the tables over all passes."""
        folders = [RunFolder(str(place / f"pass-{number:02d}")) for number in range(1, passes + 1)]
        results = [result for folder in folders for result in folder.read_results()]
        write_json(place / "results.json", results)
        methods = _listed("--methods", self.methods)
        text = "\n\n".join([*paper_tables(results, jobs, sizes, methods, self.base_model), cost(folders)])
        write_atomically(place / "table.txt", text + "\n")
        print(f"\n{text}", flush=True)


_PASSED_ON = (
    "dtype",
    "quantize",
    "attn_impl",
    "gradient_checkpointing",
    "revision",
    "trust_remote_code",
    "log_file",
    "debug",
)


def _listed(flag: str, text: str) -> list[str]:
    names = list(dict.fromkeys(part.strip() for part in text.replace(";", ",").split(",") if part.strip()))
    if not names:
        raise ConfigError(flag, [Problem("", "names nothing")])
    return names


def _alike(jobs: Sequence[JobConfig]) -> int:
    """Return how many adapters learn from the same rows.

    These are trained together and the other tasks' adapters after them: rows of one length fill a recorded step, and
    beside a task whose rows are twice as long most steps could not be recorded.
    """
    return max(Counter((job.task_name, job.protocol) for job in jobs).values())


def _missing(folder: RunFolder, jobs: Sequence[JobConfig]) -> int:
    """Return how many results of a pass are not there."""
    found = {(r["adapter"], r["task"], r["metric"]) for r in folder.read_results()}
    asked = {(job.name, find_task(task, job.protocol)) for job in jobs for task in task_names(job.task_name)}
    asked |= {(BASE, task) for _, task in asked if not task.labels}
    return len({(name, task.name, metric) for name, task in asked for metric in task.metrics} - found)
