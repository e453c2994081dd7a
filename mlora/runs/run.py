"""One run: config and data to trained adapters, results and a run folder."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from mlora import tracking
from mlora.config import ConfigError, Problem, RunConfig, RunOptions, load_config, resolved
from mlora.config.job import CASUAL
from mlora.config.jsonfile import write_json
from mlora.data import task_names
from mlora.evaluation import Examination, Library, check_heads
from mlora.model import card, files, load
from mlora.model.memory import free_bytes
from mlora.model.multi import MultiAdapterModel
from mlora.model.recompute import WHATS, Recompute
from mlora.parallel import Ranks
from mlora.report.grid import ranking, ranking_table
from mlora.report.table import results_table
from mlora.runs.answer import answer_lines
from mlora.runs.assess import assess, examinations, of_base
from mlora.runs.folder import RunFolder, log_path
from mlora.runs.forecast import Forecast, Setting
from mlora.runs.plan import Plan, PlannedJob, dry_plan, shapes
from mlora.runs.report import write_report
from mlora.runs.rows import Reader, of_adapter
from mlora.runs.session import Session
from mlora.runs.sweep import swept
from mlora.tasks import find_task
from mlora.tracking import Trackers
from mlora.training.job import MAX_SKIPPED, Job
from mlora.training.stop import Deadline
from mlora.wording import command_line

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
        self.deadline = Deadline(options.time_limit)
        self.config = _with_options(load_config(options.config), options)
        self.ranks = Ranks.from_environment()
        self.folder = RunFolder(options.dir, writes=self.ranks.first)
        self.origin = load.find(options.base_model, options.revision, options.trust_remote_code)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = load.DTYPES[options.dtype or ("bf16" if self.device == "cuda" else "fp32")]
        self._require_possible()

    def run(self) -> None:
        """Do what the options ask for.

        Raises:
            RunError: a job or an evaluation failed, the others are done.
            Stopped: a signal asked to stop.
        """
        try:
            with self.ranks.joined(self.device):
                failures = self._do()
        finally:
            self.folder.trackers.close()
        if failures:
            raise RunError("\n".join(failures))

    def _do(self) -> list[str]:
        """Do it, and return what failed."""
        options, configs = self.options, self.config.lora
        routed = any(hasattr(job.method, "num_experts") for job in configs)
        written = [*self.folder.files([job.name for job in configs], routed), self.folder.checkpoints]
        written += [log_path(options.dir, options.log_file)]
        if options.dry_run:
            print(dry_plan(options, self.config, self.origin, self._setting(), self._cutoff, written))
            return []
        _set_determinism(options)
        training = not (options.evaluate or options.inference)
        tokenizer = load.load_tokenizer(self.origin)
        # all data is read before the weights are, and before anything is written
        reader = Reader(tokenizer, self._cutoff, options.random_seed)
        rows, validation = [], {}
        for job in configs if training else ():
            with of_adapter(options.config, job.name):
                rows.append(reader.rows_of(job))
                validation[job.name] = reader.validation(job, rows[-1][1])
        library = Library(tokenizer, self._cutoff)
        for examination in [] if options.inference else [*self._wanted(), *chain(*validation.values())]:
            library.questions(examination)
        setting = self._setting()
        model = self._load_model()
        model.use_tokenizer(tokenizer)
        if not model.sharded and setting.compiles(model.num_parameters(None)):
            model.compile()
        self._add_adapters(model)
        check_heads(model, self._wanted())
        failures: list[str] = []
        if training:
            jobs = [
                Job(config, samples, model, config.seed_or(options.random_seed), held_out, self.ranks)
                for config, (samples, held_out) in zip(self.config.lora, rows, strict=True)
            ]
            notes: list[str] = []
            memory = self._forecast(setting, model, jobs, notes)
            self._train(model, jobs, validation, library, partial(self._plan, model, jobs, written, memory, notes))
            failures += [_diverged(job) for job in jobs if job.diverged]
        if options.inference:
            answer_lines(model, self.config, options.use_cache)
        else:
            failures += self._evaluate(model, library)
            self._report()
        return failures

    # -- before ----------------------------------------------------------------------------------------------------

    def _require_possible(self) -> None:
        names = [job.name for job in self.config.lora]
        for name in names if self.ranks.first else ():
            files.clear_leftovers(self.folder.adapter(name))
        options = self.options
        self._require_ranks()
        wanted = options.cuda_device
        if wanted is not None and not re.fullmatch(r"\d+(,\d+)*", wanted):
            raise _bad("--cuda_device", f"{wanted!r} is not allowed; allowed: numbers of GPUs, such as 0 or 0,1")
        visible = torch.cuda.device_count()
        if wanted is not None and visible < len(wanted.split(",")):
            raise _bad("--cuda_device", f"{wanted}: {visible or 'none'} of these GPUs can be seen here")
        for one, other in (("resume", "overwrite"), ("evaluate", "inference"), ("resume", "evaluate")):
            if getattr(options, one) and getattr(options, other):
                raise _bad(f"--{one}", f"cannot be combined with --{other}")
        if options.gradient_checkpointing and options.recompute in ("none", "middle"):
            raise _bad("--gradient_checkpointing", f"cannot be combined with --recompute {options.recompute}")
        silent = [job for job in self.config.lora if options.inference and job.num_labels is not None]
        if silent:
            raise _bad("--inference", f"{silent[0].name} has a classification head ({silent[0].task_name}): no answers")
        reading = [flag for flag in ("evaluate", "inference", "load_adapter") if getattr(options, flag)]
        if reading:
            missing = [str(self.folder.adapter(name)) for name in names if not self.folder.adapter(name).is_dir()]
            if missing:
                raise _bad(f"--{reading[0]}", f"no adapter folder {', '.join(missing)}; train it first, or set --dir")
        elif not (options.resume or options.overwrite):
            self.folder.require_free(names)
        trackers = tracking.problem(self._trackers)
        if trackers is not None:
            raise _bad("--tracker", trackers)
        self.folder.require_own(names)

    def _require_ranks(self) -> None:
        """Refuse numbers of processes that this machine, or what is asked for, does not allow."""
        options, gpus = self.options, torch.cuda.device_count()
        if options.num_gpus > 1 and options.num_processes > 1:
            raise _bad("--num_processes", "cannot be combined with --num_gpus")
        if options.num_gpus > max(gpus, 1):
            seen = f"{gpus} of them can be seen here" if gpus else "none can be seen here; on the CPU --num_processes"
            raise _bad("--num_gpus", f"{options.num_gpus} GPUs: {seen}")
        if options.num_processes > 1 and gpus:
            raise _bad("--num_processes", f"is for the CPU; {gpus} GPUs can be seen here: --num_gpus")
        if self.ranks.count > 1 and options.ranks not in (1, self.ranks.count):
            flag = "--num_gpus" if options.num_gpus > 1 else "--num_processes"
            raise _bad(flag, f"{options.ranks}, but {self.ranks.count} processes were started (WORLD_SIZE)")
        if gpus and self.ranks.local >= gpus:
            raise _bad("--num_gpus", f"process {self.ranks.rank} has no GPU: {gpus} can be seen here (LOCAL_RANK)")
        if options.shard_base:
            if self.ranks.count == 1 and not options.dry_run:
                raise _bad("--shard_base", "spreads the base model over several GPUs: --num_gpus says how many")
            for flag, value in (("quantize", options.quantize), ("compile", options.compile)):
                if value:
                    raise _bad("--shard_base", f"cannot be combined with --{flag}")
        if self.ranks.count > 1 and options.inference:
            raise _bad("--inference", "answers come from one process; leave --num_gpus away")

    @property
    def _trackers(self) -> list[str]:
        return [name.strip() for name in (self.options.tracker or "").split(",") if name.strip()]

    @property
    def _cutoff(self) -> int:
        if self.config.cutoff_len != -1:
            return self.config.cutoff_len
        return int(load.load_config(self.origin).get_text_config().max_position_embeddings)

    def _setting(self) -> Setting:
        options = self.options
        what = "all" if options.gradient_checkpointing else options.recompute
        return Setting(
            dtype=self.dtype,
            device=self.device,
            free=free_bytes(self.device),
            recompute=next((known for known in WHATS if known == what), None),
            compiled=options.compile,
            quantization=options.quantize,
            attention=options.attn_impl,
        )

    def _load_model(self) -> MultiAdapterModel:
        options = self.options
        load_it = partial(
            MultiAdapterModel.from_pretrained,
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
        if not options.shard_base:
            return load_it()
        from mlora.parallel.shard import mesh_of

        mesh = mesh_of(self.ranks.count, self.device)
        model = self.ranks.in_turn(lambda: load_it(mesh=mesh))  # the machine's memory holds one whole base at a time
        model.check_packing()
        return model

    def _add_adapters(self, model: MultiAdapterModel) -> None:
        options = self.options
        for job in self.config.lora:
            place, method = self.folder.adapter(job.name), job.method.for_length(self._cutoff)
            with of_adapter(options.config, job.name):
                if options.evaluate or options.inference:
                    model.load_adapter(place, job.name)
                elif options.load_adapter:
                    model.load_adapter(place, job.name)
                    model.train_as(job.name, method, job.seed, job.num_labels)
                else:
                    model.add_adapter(job.name, method, job.seed, job.num_labels)
            if job.num_labels is not None and not (options.evaluate or options.inference):
                model.adapter_module(job.name).head_task = find_task(job.task_name, job.protocol).name

    # -- training --------------------------------------------------------------------------------------------------

    def _train(
        self,
        model: MultiAdapterModel,
        jobs: Sequence[Job],
        validation: Mapping[str, Sequence[Examination]],
        library: Library,
        plan: Callable[[], Plan],
    ) -> None:
        options = self.options
        for job in jobs:  # the same in theory; a factorisation on a GPU may differ in its last bits
            self.ranks.from_first_(job.parameters)
        session = Session(
            model, jobs, self.config, self.folder, validation, library, self._making, self.deadline, self.ranks
        )
        if options.resume:  # refused where settings differ, and then config.json still tells of the first
            session.resume()
        elif self.ranks.first:  # what an earlier training of these adapters has left would be taken for this one's
            for job in jobs:
                place = (self.folder.checkpoints / job.name).resolve()
                if place.exists():
                    shutil.rmtree(place)
            if not options.load_adapter:
                session.forget_metrics()
        self.folder.begin(resolved(self.config), command_line(), asdict(options))
        if self.ranks.first:
            self.folder.trackers = Trackers.opened(
                self._trackers, self.folder.path, self.folder.path.resolve().name, resolved(self.config)
            )
        print(plan(), flush=True)
        session.train()

    def _forecast(
        self, setting: Setting, model: MultiAdapterModel, jobs: Sequence[Job], notes: list[str]
    ) -> Forecast | None:
        """Find out what the training will take, and let backward compute again what memory does not suffice for."""
        if setting.recompute is not None:
            model.recompute = Recompute(setting.recompute)
        if model.padded or model.sharded:
            notes.append(f"memory: {'the family trains in padded rows' if model.padded else 'the base is sharded'}")
            return None
        twin = shapes(self.origin, self.dtype, model.hf_model.config._attn_implementation)
        for job in jobs:
            twin.add_adapter(job.name, job.method, num_labels=job.config.num_labels)
        orders = [job.order for job in jobs]
        found = setting.forecast(twin, orders, self.config.train_lora_simultaneously_num, notes)
        if found is not None:
            model.recompute = found.recompute
            log.info("%s", found)
        return found

    def _plan(
        self,
        model: MultiAdapterModel,
        jobs: Sequence[Job],
        written: Sequence[Path],
        memory: Forecast | None,
        notes: Sequence[str],
    ) -> Plan:
        planned = [PlannedJob.of(job.config, job.samples, model.num_parameters(job.name)) for job in jobs]
        base = model.num_parameters(None)
        return Plan(self.options.base_model, self.dtype, self.device, base, planned, written, memory, notes)

    def _making(self, name: str) -> card.Making:
        job = next(job for job in self.config.lora if job.name == name)
        tasks = [] if job.task_name == CASUAL else task_names(job.task_name)
        data = [find_task(task, job.protocol).source.hub for task in tasks] if job.data is None else job.data.split(";")
        return card.Making(tuple(data), tuple(command_line()), job.seed)

    # -- evaluation ------------------------------------------------------------------------------------------------

    def _wanted(self) -> list[Examination]:
        """Return everything to be evaluated in the end."""
        wanted = [e for job in self.config.lora for e in examinations(job)]
        return wanted + of_base(wanted) if self.options.evaluate_base else wanted

    def _evaluate(self, model: MultiAdapterModel, library: Library) -> list[str]:
        """Evaluate all adapters, show and write the results, and return what failed."""
        simultaneously = self.config.eval_lora_simultaneously_num
        results, failures = assess(
            model,
            self._wanted(),
            self.folder,
            library,
            simultaneously,
            deadline=self.deadline,
            keep=self.options.resume,
            ranks=self.ranks,
        )
        if not self.ranks.first:
            return failures
        none = "nothing was evaluated" if failures else "nothing was evaluated: instruction data has no benchmark"
        print(results_table(results) if results else none, flush=True)
        for job in self.config.lora:
            card.add_results(self.folder.adapter(job.name), [r for r in results if r["adapter"] == job.name])
        if self.config.evaluate_result:
            write_json(Path(self.config.evaluate_result), results)
        if self.config.sweep and results:
            self._rank(results)
        return failures

    def _rank(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Show and write which values of the swept keys do best."""
        keys, places = swept(self.config)
        text = ranking_table(results, places, keys)
        log.info("%s", text)
        print(f"\n{text}", flush=True)
        write_json(self.folder.ranking, ranking(results, places, keys))

    def _report(self) -> None:
        """Write the report; the run is done and saved, so nothing that goes wrong here may fail it."""
        if not self.ranks.first:
            return
        try:
            write_report([self.folder.path], self.folder.report)
            print(f"report: {self.folder.report}", flush=True)
        except Exception as error:  # whatever it is
            log.debug("no report", exc_info=error)
            log.warning("no report was written: %s", error)


def _diverged(job: Job) -> str:
    return (
        f"{job.name} was stopped at step {job.step}: {MAX_SKIPPED} steps in a row had no finite gradient; "
        "its last good state is saved. A lower lr or max_grad_norm may help"
    )


def _with_options(config: RunConfig, options: RunOptions) -> RunConfig:
    """Return the config with what the command line says of every adapter, so that the saved one is complete."""
    limit = {} if options.limit is None else {"limit": options.limit}
    jobs = (job.model_copy(update=limit | {"seed": job.seed_or(options.random_seed)}) for job in config.lora)
    return config.model_copy(update={"lora": tuple(jobs)})


def _set_determinism(options: RunOptions) -> None:
    torch.manual_seed(options.random_seed)
    if options.tf32:
        torch.set_float32_matmul_precision("high")
    torch.autograd.set_detect_anomaly(options.debug, check_nan=options.debug)
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _bad(what: str, message: str) -> ConfigError:
    return ConfigError(what, [Problem("", message)])
