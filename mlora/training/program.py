"""What `launch.py run` starts: config and data to trained adapters, results and a run folder."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mlora.config import ConfigError, JobConfig, Problem, RunConfig, RunOptions, load_config, resolved
from mlora.data import (
    DataError,
    Sample,
    Samples,
    UnreachableError,
    find_prompt,
    load_training_samples,
    split_paths,
    task_names,
)
from mlora.evaluation import Examination, evaluate
from mlora.model import card, files, load
from mlora.model.errors import ModelError, UnreachableModelError
from mlora.model.multi import MultiAdapterModel
from mlora.report.progress import Progress, Rows
from mlora.report.table import results_table
from mlora.tasks import UnknownTaskError, find_task
from mlora.training import checkpoint
from mlora.training.folder import RunFolder, command_line, write_json
from mlora.training.heldout import HeldOut, split
from mlora.training.job import Job
from mlora.training.plan import Plan, PlannedJob
from mlora.training.stop import Stop, Stopped
from mlora.training.trainer import train

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BAD_INPUT = (ConfigError, DataError, ModelError, UnknownTaskError)
CASUAL = "casual"

log = logging.getLogger("mlora")


def main(options: RunOptions) -> int:
    """Run, and return the exit status: 0 done, 1 failed, 2 bad input, 130 interrupted after a checkpoint."""
    logs = _log_to(options)
    try:
        Run(options).run()
        return 0
    except BAD_INPUT as error:
        return _fail(error, 2, options)
    except (KeyboardInterrupt, Stopped) as error:
        print(str(error) or "interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # the last resort of a program: one line for the user, all of it in the log
        return _fail(error, 1, options, f"; the traceback is in {logs}")


def _fail(error: Exception, status: int, options: RunOptions, hint: str = "") -> int:
    log.debug("failed", exc_info=error)
    if options.debug:
        raise error
    kind = "" if isinstance(error, BAD_INPUT) else f"{type(error).__name__}: "
    print(f"Error: {kind}{error}{hint}", file=sys.stderr)
    return status


def _log_to(options: RunOptions) -> Path:
    """Write everything to the log file, warnings to standard error."""
    path = Path(options.log_file)
    if options.dir != "." and options.log_file == RunOptions(base_model="").log_file:
        path = Path(options.dir) / "log.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    to_file, to_user = logging.FileHandler(path, encoding="utf-8"), logging.StreamHandler()
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_user.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    to_user.setLevel(logging.WARNING)
    log.handlers[:] = [to_file, to_user]
    log.setLevel(logging.DEBUG)
    log.propagate = False
    return path


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
        self._require_possible()

    def run(self) -> None:
        """Do what the options ask for."""
        if self.options.dry_run:
            print(self._dry_plan())
            return
        _set_determinism(self.options)
        training = not (self.options.evaluate or self.options.inference)
        tokenizer = load.load_tokenizer(self.origin)
        rows = {job.name: self._samples_of(job, tokenizer) for job in self.config.lora} if training else {}
        model = self._load_model()
        model.use_tokenizer(tokenizer)
        self._add_adapters(model)
        if training:
            self._prepare_folder()
            jobs = [self._job(job, rows[job.name], model) for job in self.config.lora]
            self._resume(model, jobs)
            self._print_plan(model, {job.name: job.samples for job in jobs})
            self._train(model, jobs)
        if self.options.inference:
            self._answer(model)
        else:
            self._evaluate(model)

    # -- before ----------------------------------------------------------------------------------------------------

    def _require_possible(self) -> None:
        names = [job.name for job in self.config.lora]
        for name in names:
            files.clear_leftovers(self.folder.adapter(name))
        options = self.options
        if options.num_gpus > 1 or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise _bad("--num_gpus", "training on several GPUs is not built yet; leave it at 1")
        if options.evaluate or options.inference or options.load_adapter:
            missing = [str(self.folder.adapter(name)) for name in names if not self.folder.adapter(name).is_dir()]
            if missing:
                raise _bad("--load_adapter", f"no adapter folder {', '.join(missing)}; train it first, or set --dir")
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
        saved = self.options.evaluate or self.options.inference or self.options.load_adapter
        for job in self.config.lora:
            if saved:
                model.load_adapter(self.folder.adapter(job.name), job.name)
            else:
                model.add_adapter(job.name, job.method.for_length(self._cutoff))

    def _prepare_folder(self) -> None:
        if self.options.overwrite and not self.options.resume:
            for job in self.config.lora:
                shutil.rmtree(self.folder.checkpoints / job.name, ignore_errors=True)
        self.folder.begin(resolved(self.config), command_line(), asdict(self.options))

    def _job(self, config: JobConfig, samples: Samples, model: MultiAdapterModel) -> Job:
        seed, rows, held_out = self.options.random_seed, list(samples), None
        if config.eval_data is not None:
            read = load_training_samples(
                config.task_name,
                config.eval_data,
                model.tokenizer,
                self._cutoff,
                split=_held_out_split(config.task_name),
                prompt=config.prompt,
                train_on_inputs=config.train_on_inputs,
                limit=config.limit,
            )
            held_out = HeldOut(config.name, read, config.evaluate_batch_size)
        elif config.val_set_size:
            if config.val_set_size >= len(rows):
                raise _bad(f"{config.name}: val_set_size", f"{config.val_set_size} of {len(rows)} rows leaves none")
            rows, chosen = split(rows, config.val_set_size, seed, config.name)
            held_out = HeldOut(config.name, chosen, config.evaluate_batch_size)
        return Job(config, rows, model, seed, held_out)

    def _resume(self, model: MultiAdapterModel, jobs: Sequence[Job]) -> None:
        if self.options.resume and checkpoint.restore(self.folder.checkpoints, jobs, model):
            for job in jobs:
                print(f"{job.name}: goes on after step {job.step} of {job.total_steps}")
        if not self.options.load_adapter:
            for job in jobs:
                self.folder.forget_steps(job.name, job.step)

    # -- the plan --------------------------------------------------------------------------------------------------

    def _print_plan(self, model: MultiAdapterModel, samples: Mapping[str, Sequence[Sample]]) -> None:
        jobs = [PlannedJob.of(job, samples[job.name], model.num_parameters(job.name)) for job in self.config.lora]
        print(self._plan(model.num_parameters(None), jobs), flush=True)

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
            samples = None
            if tokenizer is not None:
                read = partial(self._samples_of, job, tokenizer)
                samples = _unless_unreachable(read, f"rows of {job.name}", notes)
            parameters = None
            if model is not None:
                model.add_adapter(job.name, job.method)
                parameters = model.num_parameters(job.name)
            jobs.append(PlannedJob.of(job, samples, parameters))
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

    def _evaluate(self, model: MultiAdapterModel) -> None:
        wanted = [e for job in self.config.lora for e in self._examinations(job)]
        if not wanted:
            return
        if self.options.evaluate_base:
            places = {(e.task, e.data, e.limit): e.batch_size for e in wanted}
            wanted += [Examination(None, *place, batch_size=size) for place, size in places.items()]
        results = []
        with Rows() as progress:
            for result in evaluate(
                model, wanted, self._cutoff, self.config.eval_lora_simultaneously_num, progress.show
            ):
                self.folder.add_result(result.as_dict())
                results.append(result.as_dict())
        for job in self.config.lora:
            card.add_results(self.folder.adapter(job.name), [r for r in results if r["adapter"] == job.name])
        if self.config.evaluate_result:
            write_json(Path(self.config.evaluate_result), results)
        print(results_table(results), flush=True)


def _limited(config: RunConfig, limit: int | None) -> RunConfig:
    if limit is None:
        return config
    return config.model_copy(update={"lora": tuple(job.model_copy(update={"limit": limit}) for job in config.lora)})


def _set_determinism(options: RunOptions) -> None:
    torch.manual_seed(options.random_seed)
    if options.tf32:
        torch.set_float32_matmul_precision("high")
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
