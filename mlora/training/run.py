"""One run: config and data to trained adapters, results and a run folder."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mlora.config import ConfigError, JobConfig, Problem, RunConfig, RunOptions, load_config, resolved
from mlora.config.job import CASUAL
from mlora.config.jsonfile import write_json
from mlora.data import (
    Sample,
    Samples,
    UnreachableError,
    find_prompt,
    load_training_samples,
    split_paths,
    task_names,
)
from mlora.evaluation import Examination, by_questions, check, evaluate
from mlora.model import card, files, load
from mlora.model.errors import UnreachableModelError
from mlora.model.multi import MultiAdapterModel
from mlora.report.progress import Progress, Rows
from mlora.report.table import results_table
from mlora.tasks import find_task
from mlora.training import checkpoint
from mlora.training.folder import RunFolder, command_line
from mlora.training.heldout import HeldOut, split
from mlora.training.job import MAX_SKIPPED, Job
from mlora.training.plan import Plan, PlannedJob
from mlora.training.stop import Stop, Stopped
from mlora.training.trainer import train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


class RunError(Exception):
    """A run of which a part failed; what could be done was, and is on the disk."""


class Run:
    """One run from config to results.

    Args:
        options: of the command line.

    Raises:
        ConfigError: the config or the combination of flags cannot be run.
    """

    def __init__(self, options: RunOptions) -> None:
        self.options = options
        self.config = _limited(load_config(options.config), options.limit)
        self.folder = RunFolder(options.dir)
        self.origin = load.find(options.base_model, options.revision, options.trust_remote_code)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = load.DTYPES[options.dtype or ("bf16" if self.device == "cuda" else "fp32")]
        self._samples = lru_cache(maxsize=None)(self._read_samples)
        self._failures: list[str] = []
        self._require_possible()

    def run(self) -> None:
        """Do what the options ask for."""
        if self.options.dry_run:
            print(self._dry_plan())
            return
        _set_determinism(self.options)
        training = not (self.options.evaluate or self.options.inference)
        tokenizer = load.load_tokenizer(self.origin)
        # all data is read before the weights are, and before anything is written
        rows = [self._rows_of(job, tokenizer) for job in self.config.lora] if training else []
        if not self.options.inference:
            check(self._wanted(), tokenizer, self._cutoff)
        model = self._load_model()
        model.use_tokenizer(tokenizer)
        self._add_adapters(model)
        if training:
            seed = self.options.random_seed
            jobs = [
                Job(c, samples, model, seed, held_out)
                for c, (samples, held_out) in zip(self.config.lora, rows, strict=True)
            ]
            self._prepare_folder()
            self._resume(model, jobs)
            self._print_plan(model, jobs)
            self._train(model, jobs)
            self._failures += [_diverged(job) for job in jobs if job.diverged]
        if self.options.inference:
            self._answer(model)
        else:
            self._evaluate(model)
        if self._failures:
            raise RunError("\n".join(self._failures))

    # -- before ----------------------------------------------------------------------------------------------------

    def _require_possible(self) -> None:
        names = [job.name for job in self.config.lora]
        for name in names:
            files.clear_leftovers(self.folder.adapter(name))
        options = self.options
        if options.num_gpus > 1 or os.environ.get("WORLD_SIZE", "1") != "1":
            raise _bad("--num_gpus", "training on several GPUs is not built yet; leave it at 1")
        for one, other in (("resume", "overwrite"), ("evaluate", "inference"), ("resume", "evaluate")):
            if getattr(options, one) and getattr(options, other):
                raise _bad(f"--{one}", f"cannot be combined with --{other}")
        reading = [flag for flag in ("evaluate", "inference", "load_adapter") if getattr(options, flag)]
        if reading:
            missing = [str(self.folder.adapter(name)) for name in names if not self.folder.adapter(name).is_dir()]
            if missing:
                raise _bad(f"--{reading[0]}", f"no adapter folder {', '.join(missing)}; train it first, or set --dir")
        elif not (options.resume or options.overwrite or options.dry_run):
            self.folder.require_free(names)
        self.folder.require_own(names)

    def _samples_of(self, job: JobConfig, tokenizer: PreTrainedTokenizerBase) -> Samples:
        samples = self._samples(tokenizer, job.task_name, job.data, job.prompt, job.train_on_inputs, job.limit)
        log.info("%s: %s", job.name, samples.report)
        if samples.report.dropped or samples.report.truncated:
            log.warning("%s: %s", job.name, samples.report)
        return samples

    def _read_samples(
        self, tokenizer: Any, task: str, data: str | None, prompt: str | None, train_on_inputs: bool, limit: int | None
    ) -> Samples:
        return load_training_samples(
            task, data, tokenizer, self._cutoff, prompt=prompt, train_on_inputs=train_on_inputs, limit=limit
        )

    @property
    def _cutoff(self) -> int:
        if self.config.cutoff_len != -1:
            return self.config.cutoff_len
        return int(load.load_config(self.origin).get_text_config().max_position_embeddings)

    def _load_model(self) -> MultiAdapterModel:
        options = self.options
        return MultiAdapterModel.from_pretrained(
            options.base_model,
            dtype=self.dtype,
            device=self.device,
            quantization=options.quantize,
            attn_implementation=options.attn_impl,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
            seed=options.random_seed,
            sliding_window=options.sliding_window,
        )

    def _add_adapters(self, model: MultiAdapterModel) -> None:
        options = self.options
        model.recompute = options.gradient_checkpointing
        for job in self.config.lora:
            place, method = self.folder.adapter(job.name), job.method.for_length(self._cutoff)
            if options.evaluate or options.inference:
                model.load_adapter(place, job.name)
            elif options.load_adapter:
                model.load_adapter(place, job.name)
                model.train_as(job.name, method)
            else:
                model.add_adapter(job.name, method)

    def _prepare_folder(self) -> None:
        if not self.options.resume:  # what an earlier training of these adapters has left would be taken for this one's
            for job in self.config.lora:
                shutil.rmtree(self.folder.checkpoints / job.name, ignore_errors=True)
        self.folder.begin(resolved(self.config), command_line(), asdict(self.options))

    def _rows_of(
        self, config: JobConfig, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Sequence[Sample], HeldOut | None]:
        """Return a job's training rows, and the rows held out for it."""
        rows: Sequence[Sample] = self._samples_of(config, tokenizer)
        held_out: Sequence[Sample] = ()
        if config.eval_data is not None:
            held_out = load_training_samples(
                config.task_name,
                config.eval_data,
                tokenizer,
                self._cutoff,
                split=_held_out_split(config.task_name),
                prompt=config.prompt,
                train_on_inputs=config.train_on_inputs,
                limit=config.limit,
            )
        elif config.val_set_size:
            if config.val_set_size >= len(rows):
                raise _bad(f"{config.name}: val_set_size", f"{config.val_set_size} of {len(rows)} rows leaves none")
            rows, held_out = split(rows, config.val_set_size, self.options.random_seed, config.name)
        return rows, HeldOut(config.name, held_out, config.evaluate_batch_size) if held_out else None

    def _resume(self, model: MultiAdapterModel, jobs: Sequence[Job]) -> None:
        if not self.options.resume:
            if not self.options.load_adapter:
                for job in jobs:
                    self.folder.forget_steps(job.name, job.step)
            return
        if not checkpoint.restore(self.folder.checkpoints, jobs, model):
            begun = [job.name for job in jobs if self.folder.adapter(job.name).exists()]
            begun += [job.name for job in jobs if (self.folder.checkpoints / job.name).exists()]
            if begun:
                raise _bad(
                    "--resume", f"no usable checkpoint of {', '.join(begun)}; --overwrite starts again from nothing"
                )
            print("no checkpoint yet: starts at the beginning")
        for job in jobs:
            print(f"{job.name}: goes on after step {job.step} of {job.total_steps}")
            self.folder.forget_steps(job.name, job.step)
            if job.done and not self.folder.adapter(job.name).exists():
                self._finish(model, job)

    # -- the plan --------------------------------------------------------------------------------------------------

    def _print_plan(self, model: MultiAdapterModel, jobs: Sequence[Job]) -> None:
        planned = [PlannedJob.of(job.config, job.samples, model.num_parameters(job.name)) for job in jobs]
        print(self._plan(model.num_parameters(None), planned), flush=True)

    def _plan(self, base: int | None, jobs: Sequence[PlannedJob], notes: Sequence[str] = ()) -> Plan:
        files = self.folder.files(job.name for job in self.config.lora)
        return Plan(self.options.base_model, self.dtype, self.device, base, jobs, files, notes)

    def _dry_plan(self) -> Plan:
        """Plan without weights: the model as shapes only, and the data where it can be had."""
        notes: list[str] = []
        model = self._shapes(notes)
        tokenizer = _unless_unreachable(lambda: load.load_tokenizer(self.origin), "rows and steps", notes)
        jobs = []
        for job in self.config.lora:
            rows = None
            if tokenizer is not None:
                rows = _unless_unreachable(partial(self._rows_of, job, tokenizer), f"rows of {job.name}", notes)
            parameters = None
            if model is not None:
                model.add_adapter(job.name, job.method)
                parameters = model.num_parameters(job.name)
            jobs.append(PlannedJob.of(job, None if rows is None else rows[0], parameters))
        return self._plan(None if model is None else model.num_parameters(None), jobs, notes)

    def _shapes(self, notes: list[str]) -> MultiAdapterModel | None:
        from transformers import AutoModelForCausalLM

        config = _unless_unreachable(lambda: load.load_config(self.origin), "parameters", notes)
        if config is None:
            return None
        with torch.device("meta"):
            return MultiAdapterModel(AutoModelForCausalLM.from_config(config), self.origin)

    # -- training --------------------------------------------------------------------------------------------------

    def _train(self, model: MultiAdapterModel, jobs: Sequence[Job]) -> None:
        totals, done = {j.name: j.total_steps for j in jobs}, {j.name: j.step for j in jobs}
        saved = dict(done)
        with Stop() as stop, Progress(totals, done) as progress:

            def after_round(stepped: list[Job]) -> bool:
                for job in stepped:
                    self.folder.log_step(job.name, job.step, job.measured)
                    progress.step(job.name, job.step, job.measured)
                    if job.examined:
                        self._examine(model, job)
                    if job.done:
                        self._finish(model, job)
                due = any(job.done or job.step - saved[job.name] >= self.config.save_step for job in stepped)
                if due or stop.requested:
                    checkpoint.save(self.folder.checkpoints, jobs, model)
                    saved.update((job.name, job.step) for job in jobs)
                return stop.requested

            train(model, jobs, self.config.train_lora_simultaneously_num, after_round)
        if stop.requested and not all(job.done for job in jobs):
            raise Stopped("interrupted; a checkpoint is saved: the same command with --resume goes on")

    def _examine(self, model: MultiAdapterModel, job: Job) -> None:
        """Measure the held-out loss and keep the adapter where it is the best; score its tasks where asked to."""
        if job.held_out is not None:
            loss = job.held_out.loss(model)
            self.folder.log_step(job.name, job.step, {"eval_loss": loss})
            if loss < job.best_loss:
                job.best_loss = loss
                self._save(model, job.name, self._best(job))
        if job.config.evaluate_steps and not job.done:
            for result in evaluate(model, self._examinations(job.config), self._cutoff):
                self.folder.log_evaluation(job.name, job.step, result.as_dict())

    def _finish(self, model: MultiAdapterModel, job: Job) -> None:
        """Save an adapter at its end, in its best state where rows were held out."""
        if job.held_out is not None and self._best(job).exists():
            _, tensors, _ = files.read(self._best(job), allow_pickle=False)
            model.restore_adapter(job.name, tensors, str(self._best(job)))
        self._save(model, job.name, self.folder.adapter(job.name))

    def _best(self, job: Job) -> Path:
        return self.folder.checkpoints / job.name / "best"

    def _save(self, model: MultiAdapterModel, name: str, place: Path) -> None:
        with files.whole_folder(place) as folder:
            for foreign in place.iterdir() if place.is_dir() else ():
                if foreign.is_file() and foreign.name not in files.OWN:
                    shutil.copy2(foreign, folder)
            model.save_adapter(name, folder, self._making(name))

    def _making(self, name: str) -> card.Making:
        job = next(job for job in self.config.lora if job.name == name)
        tasks = [] if job.task_name == CASUAL else task_names(job.task_name)
        data = [find_task(task).source.hub for task in tasks] if job.data is None else job.data.split(";")
        return card.Making(tuple(data), tuple(command_line()), self.options.random_seed)

    # -- answering -------------------------------------------------------------------------------------------------

    def _answer(self, model: MultiAdapterModel) -> None:
        """Read instructions from standard input, a line each, and print what every adapter answers."""
        if sys.stdin.isatty():
            print("one instruction a line; an empty line ends", flush=True)
        names = [job.name for job in self.config.lora]
        size = self.config.inference_lora_simultaneously_num or len(names)
        for line in iter(sys.stdin.readline, ""):
            if not line.strip():
                break
            prompts = [find_prompt(job.prompt).render(line.strip()) for job in self.config.lora]
            for start in range(0, len(names), size):
                together = slice(start, start + size)
                answers = model.generate(prompts[together], names[together], use_cache=self.options.use_cache)
                for name, answer in zip(names[together], answers, strict=True):
                    print(f"{name}: {answer.strip()}", flush=True)

    # -- evaluation ------------------------------------------------------------------------------------------------

    def _examinations(self, job: JobConfig) -> list[Examination]:
        if job.task_name == CASUAL:
            return []
        tasks = task_names(job.task_name)
        paths = split_paths(job.data, tasks)
        return [
            Examination(job.name, task, path, job.limit, job.evaluate_batch_size)
            for task, path in zip(tasks, paths, strict=True)
        ]

    def _wanted(self) -> list[Examination]:
        """Return everything to be evaluated in the end."""
        wanted = [e for job in self.config.lora for e in self._examinations(job)]
        if self.options.evaluate_base:
            places = {(e.task, e.data, e.limit): e.batch_size for e in wanted}
            wanted += [Examination(None, *place, batch_size=size) for place, size in places.items()]
        return wanted

    def _evaluate(self, model: MultiAdapterModel) -> None:
        results = []
        with Rows() as progress:
            for group in by_questions(self._wanted()):
                try:
                    for result in evaluate(
                        model, group, self._cutoff, self.config.eval_lora_simultaneously_num, progress.show
                    ):
                        self.folder.add_result(result.as_dict())
                        results.append(result.as_dict())
                except Exception as error:  # whatever one task fails by, the others' results must not be lost
                    log.exception("evaluation of %s failed", group[0].task)
                    self._failures.append(f"evaluation of {group[0].task} failed: {type(error).__name__}: {error}")
        for job in self.config.lora:
            card.add_results(self.folder.adapter(job.name), [r for r in results if r["adapter"] == job.name])
        if self.config.evaluate_result:
            write_json(Path(self.config.evaluate_result), results)
        print(
            results_table(results) if results else "nothing was evaluated: instruction data has no benchmark",
            flush=True,
        )


def _diverged(job: Job) -> str:
    return (
        f"{job.name} was stopped at step {job.step}: {MAX_SKIPPED} steps in a row had no finite gradient; "
        "its last good state is saved. A lower lr or max_grad_norm may help"
    )


def _limited(config: RunConfig, limit: int | None) -> RunConfig:
    if limit is None:
        return config
    return config.model_copy(update={"lora": tuple(job.model_copy(update={"limit": limit}) for job in config.lora)})


def _set_determinism(options: RunOptions) -> None:
    torch.manual_seed(options.random_seed)
    if options.tf32:
        torch.set_float32_matmul_precision("high")
    torch.autograd.set_detect_anomaly(options.debug, check_nan=options.debug)
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _held_out_split(task_name: str) -> Literal["validation", "test"]:
    """Return which split of `eval_data` to read: validation, or what the tasks are scored on where one has none."""
    if task_name == CASUAL or all(find_task(name).source.validation for name in task_names(task_name)):
        return "validation"
    return "test"


def _unless_unreachable(read: Callable[[], Any], what: str, notes: list[str]) -> Any:
    """Return what is read; None, with a note, where it lies on a hub that cannot be reached."""
    try:
        return read()
    except (UnreachableModelError, UnreachableError) as error:
        notes.append(f"{what}: {error}")
        return None


def _bad(what: str, message: str) -> ConfigError:
    return ConfigError(what, [Problem("", message)])
