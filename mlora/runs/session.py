"""Jobs in training, and what is kept of them on the way: metrics, held-out measures, checkpoints, adapters."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

from mlora.config import ConfigError, Problem, RunConfig
from mlora.evaluation import Examination, Library, Result, examine
from mlora.model import card, files
from mlora.model.multi import MultiAdapterModel
from mlora.model.profile import RouterProfile
from mlora.parallel import ALONE, Ranks
from mlora.report.progress import Progress
from mlora.runs.folder import RunFolder
from mlora.training.checkpoint import Checkpoints
from mlora.training.job import Job
from mlora.training.stop import Deadline, Paused, Stop, Stopped
from mlora.training.trainer import gather_gradients, train


class Session:
    """The training of a run's jobs.

    Args:
        model: that holds the jobs' adapters.
        jobs: all of the run, in the order of the config.
        config: of the run.
        folder: that everything is written to.
        validation: what each job is scored on while it trains.
        library: that has the questions.
        making: how an adapter came to be, by name, for its card.
        deadline: end of the time limit.
        ranks: that train the jobs together; the first writes.
    """

    def __init__(
        self,
        model: MultiAdapterModel,
        jobs: Sequence[Job],
        config: RunConfig,
        folder: RunFolder,
        validation: Mapping[str, Sequence[Examination]],
        library: Library,
        making: Callable[[str], card.Making],
        deadline: Deadline,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.jobs, self.config, self.folder = model, jobs, config, folder
        self.validation, self.library, self.making, self.deadline = validation, library, making, deadline
        self.ranks, self.examiners = ranks, ALONE if model.sharded else ranks
        self.checkpoints = Checkpoints(folder.checkpoints, jobs, model, config.keep_last)

    def forget_metrics(self) -> None:
        """Drop what metrics.jsonl has of earlier trainings of the jobs."""
        for job in self.jobs:
            self.folder.forget_steps(job.name, job.step)

    def resume(self) -> None:
        """Bring every job back to the newest complete checkpoint.

        Raises:
            ConfigError: there was a training and none of its checkpoints can be used.
        """
        if not self.ranks.in_turn(self.checkpoints.restore):
            begun = [job.name for job in self.jobs if self.folder.adapter(job.name).exists()]
            begun += [path.parent.name for path in self.checkpoints.damaged]
            if begun:
                message = (
                    f"no usable checkpoint of {', '.join(dict.fromkeys(begun))}; --overwrite starts again from nothing"
                )
                raise ConfigError("--resume", [Problem("", message)])
            print("no complete checkpoint yet: starts at the beginning")
        for job in self.jobs:
            print(f"{job.name}: goes on after step {job.step} of {job.total_steps}")
            if job.done and not self.folder.adapter(job.name).exists():
                job.to_examine = True
            if not job.done or job.to_examine:
                self.folder.forget_steps(job.name, job.step, not job.to_examine)

    def train(self) -> None:
        """Train all jobs to their ends.

        Raises:
            Stopped: a signal asked to stop, or the time is up; a checkpoint is saved.
            CheckpointError: a checkpoint could not be written.
        """
        totals, done = {j.name: j.total_steps for j in self.jobs}, {j.name: j.step for j in self.jobs}
        saved = dict(done)
        with Stop() as stop, Progress(totals, done) as progress, self.checkpoints:

            def after_round(stepped: list[Job]) -> bool:
                self.checkpoints.check()
                for job in stepped:
                    self.folder.log_step(job.name, job.step, job.measured)
                    progress.step(job.name, job.step, job.measured)
                    if job.routing is not None:
                        self._log_routing(job, job.routing)
                with suppress(Stopped):
                    self._settle(stop)
                due = any(job.done or job.step - saved[job.name] >= self.config.save_step for job in stepped)
                ends = self.ranks.any(stop.requested or self.deadline.passed)
                if due or ends:
                    gather_gradients(self.jobs, self.ranks)
                    if self.ranks.first:
                        self.checkpoints.save()
                    saved.update((job.name, job.step) for job in self.jobs)
                return ends

            # an examination that an earlier signal broke off comes first
            if not after_round([]):
                train(self.model, self.jobs, self.config.train_lora_simultaneously_num, after_round, self.ranks)
        interrupted = self.ranks.any(stop.requested)
        if interrupted or not all(job.done for job in self.jobs):
            kind, why = (Stopped, "interrupted") if interrupted else (Paused, "time is up")
            raise kind(f"{why}; a checkpoint is saved: the same command with --resume goes on")

    def _settle(self, stop: Stop) -> None:
        """Examine every job that is due, and save the adapter of one that is done.

        Raises:
            Stopped: a signal came while it was examined; it is due still.
        """
        for job in (job for job in self.jobs if job.to_examine):
            loss, results = self._examine(job, stop)
            if loss is not None:
                self.folder.log_step(job.name, job.step, {"eval_loss": loss})
                if loss < job.best_loss:
                    job.best_loss = loss
                    if self.ranks.first:
                        self.checkpoints.save_best(job)
            for result in results:
                self.folder.log_evaluation(job.name, job.step, result.as_dict())
            if job.done:
                self._finish(job)
            job.to_examine = False

    def _examine(self, job: Job, stop: Stop) -> tuple[float | None, list[Result]]:
        """Return the held-out loss where rows are held out, and scores on validation rows where they are asked for.

        Raises:
            Stopped: on all ranks, where one of them was told to stop.
        """

        def still_wanted(*done: object) -> None:
            if self.ranks.any(stop.requested) if self.model.sharded else stop.requested:
                raise Stopped

        if self.ranks.any(stop.requested):
            raise Stopped
        # several ranks break off where they are told so together, between two batches; one may do so anywhere
        with stop.at_once() if self.ranks.count == 1 else nullcontext():
            loss = None if job.held_out is None else job.held_out.loss(self.model, self.examiners)
            outcomes = examine(
                self.model, self.validation[job.name], self.library, progress=still_wanted, ranks=self.examiners
            )
            return loss, [result for outcome in outcomes for result in outcome.results]

    def _log_routing(self, job: Job, profile: RouterProfile) -> None:
        if self.ranks.count > 1:
            own, profile = profile.on_cpu(), RouterProfile(profile.method)
            for part in self.ranks.gather(own):
                profile.merge(part)
        self.folder.log_routing(job.name, job.step, job.config, profile)

    def _finish(self, job: Job) -> None:
        """Save an adapter at its end, in its best state where rows were held out."""
        if job.best_loss < math.inf:
            if self.ranks.first:
                self.checkpoints.restore_best(job)
            self.ranks.from_first_(job.parameters)
        if self.ranks.first:
            self._save(job.name, self.folder.adapter(job.name))

    def _save(self, name: str, place: Path) -> None:
        with files.whole_folder(place) as folder:
            for foreign in place.iterdir() if place.is_dir() else ():
                if foreign.is_file() and foreign.name not in files.OWN:
                    shutil.copy2(foreign, folder)
            self.model.save_adapter(name, folder, self.making(name))
