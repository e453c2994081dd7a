"""The rows that jobs learn from and are held out for them, each data set read once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mlora.config import ConfigError, JobConfig, Problem
from mlora.config.job import CASUAL
from mlora.data import DataError, Sample, Samples, Split, load_training_samples, split_paths, task_names
from mlora.evaluation import Examination
from mlora.model.errors import ModelError
from mlora.tasks import UnknownTaskError, find_task
from mlora.training.heldout import HeldOut, split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

SETTINGS = ("task_name", "protocol", "prompt", "train_on_inputs", "limit", "on_bad_row")
"""What a job's rows depend on besides their place."""


@contextmanager
def of_adapter(config: str, name: str) -> Iterator[None]:
    """Within the block, what is wrong with data or model is said of an adapter of a config file."""
    try:
        yield
    except (DataError, ModelError, UnknownTaskError) as error:
        error.args = (f"{config}: adapter {name}: {error}",)
        raise


class Reader:
    """Reads the rows of jobs.

    Args:
        tokenizer: of the base model.
        cutoff_len: tokens of a row.
        seed: that chooses the rows which are held out, of jobs without a seed of their own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, cutoff_len: int, seed: int) -> None:
        self.tokenizer, self.cutoff_len, self.seed = tokenizer, cutoff_len, seed
        self._samples = lru_cache(maxsize=None)(self._read)

    def rows_of(self, job: JobConfig) -> tuple[Sequence[Sample], HeldOut | None]:
        """Return a job's training rows, and the rows held out for it.

        Raises:
            ConfigError: more rows are to be held out than there are.
            DataError: data that is not there, or a row that cannot be used.
        """
        rows: Sequence[Sample] = self.samples_of(job)
        held_out: Sequence[Sample] = ()
        if job.eval_data is not None:
            held_out = self._samples(job.eval_data, _held_out_split(job), *_settings(job))
        elif job.val_set_size:
            if job.val_set_size >= len(rows):
                message = f"{job.val_set_size} of {len(rows)} rows leaves none"
                raise ConfigError(f"{job.name}: val_set_size", [Problem("", message)])
            rows, held_out = split(rows, job.val_set_size, job.seed_or(self.seed), job.name)
        return rows, HeldOut(job.name, held_out, job.evaluate_batch_size) if held_out else None

    def validation(self, job: JobConfig, held_out: HeldOut | None) -> list[Examination]:
        """Return what an adapter is scored on every `evaluate_steps`: rows that it neither learns nor is judged by.

        They are those held out for its loss, or the published validation split.

        Raises:
            ConfigError: there are no such rows.
        """
        if not job.evaluate_steps or job.task_name == CASUAL:
            return []
        tasks = [find_task(name, job.protocol) for name in task_names(job.task_name)]
        split: Split = "train" if job.val_set_size else _held_out_split(job) if job.eval_data else "validation"
        lacking = [task.name for task in tasks if split == "validation" and task.source.validation is None]
        if lacking:
            message = (
                f"{', '.join(lacking)} has no labelled validation split besides the rows that results are of; "
                "set val_set_size, or eval_data, or leave evaluate_steps out"
            )
            raise ConfigError(f"{job.name}: evaluate_steps", [Problem("", message)])
        wanted = []
        for task, path in zip(
            tasks, split_paths(job.eval_data or job.data, [task.name for task in tasks]), strict=True
        ):
            rows = None
            if split == "train" and held_out is not None:
                rows = tuple(sample.row for sample in held_out.samples if sample.task == task.name)
            if rows != ():
                size = job.evaluate_batch_size
                wanted.append(
                    Examination(job.name, task.name, path, job.limit, size, task.protocol, split, rows, job.on_bad_row)
                )
        return wanted

    def samples_of(self, job: JobConfig) -> Samples:
        """Return all rows of a job's training data that can be used, and what became of the others."""
        samples = self._samples(job.data, "train", *_settings(job))
        log.info("%s: %s", job.name, samples.report)
        if samples.report.dropped or samples.report.truncated or samples.report.bad_rows:
            log.warning("%s: %s", job.name, samples.report)
        return samples

    def _read(self, data: str | None, split: Split, *settings: Any) -> Samples:
        named = dict(zip(SETTINGS, settings, strict=True))
        return load_training_samples(
            data=data, split=split, tokenizer=self.tokenizer, cutoff_len=self.cutoff_len, **named
        )


def _settings(job: JobConfig) -> list[Any]:
    return [getattr(job, key) for key in SETTINGS]


def _held_out_split(job: JobConfig) -> Split:
    """Return which split of `eval_data` to read: validation, or what the tasks are scored on where one has none."""
    names = [] if job.task_name == CASUAL else task_names(job.task_name)
    return "validation" if all(find_task(name, job.protocol).source.validation for name in names) else "test"
