"""Evaluating adapters in the end: what is asked of each, and every result on the disk as soon as it exists."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from mlora.config import JobConfig
from mlora.config.job import CASUAL
from mlora.data import split_paths, task_names
from mlora.evaluation import Conditions, Examination, Library, by_questions, examine
from mlora.model.multi import MultiAdapterModel
from mlora.parallel import ALONE, Lost, Ranks
from mlora.report.progress import Rows
from mlora.runs.folder import RunFolder
from mlora.tasks import find_task
from mlora.training.stop import Deadline, Paused

log = logging.getLogger(__name__)


def examinations(job: JobConfig) -> list[Examination]:
    """Return what an adapter is evaluated on: each of its tasks, on the rows that published results are of."""
    if job.task_name == CASUAL:
        return []
    tasks = task_names(job.task_name)
    paths = split_paths(job.data, tasks)
    return [
        Examination(
            job.name,
            task,
            path,
            job.eval_limit or job.limit,
            job.evaluate_batch_size,
            job.protocol,
            on_bad_row=job.on_bad_row,
        )
        for task, path in zip(tasks, paths, strict=True)
    ]


def of_base(wanted: Sequence[Examination]) -> list[Examination]:
    """Return examinations of the plain base model on the same questions, but for those that need a head."""
    groups = [group[0] for group in by_questions(wanted)]
    return [replace(e, adapter=None) for e in groups if not find_task(e.task, e.protocol).labels]


def assess(
    model: MultiAdapterModel,
    wanted: Sequence[Examination],
    folder: RunFolder,
    library: Library,
    simultaneously: int | None = None,
    *,
    deadline: Deadline | None = None,
    keep: bool = False,
    with_samples: bool = False,
    ranks: Ranks = ALONE,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Evaluate, write each result as soon as it exists, and return the results and what failed.

    Args:
        model: that holds the adapters.
        wanted: what to evaluate.
        folder: of the results.
        library: that has the questions.
        simultaneously: adapters in one forward; None for all.
        deadline: end of the time limit.
        keep: whether results of the same adapters on the same questions are kept rather than found again.
        with_samples: whether to write what was answered to each row.
        ranks: that share the questions; the first writes.

    Raises:
        Paused: the time is up; the results so far are written.
    """
    results: list[dict[str, Any]] = []
    failures: list[str] = []

    def known(examination: Examination, under: Conditions) -> bool:
        found = ranks.as_first(lambda: folder.known_results(examination, under)) if keep else []
        if with_samples and not folder.samples(examination).exists():
            return False
        results.extend(found)
        return bool(found)

    sharing = ALONE if model.sharded else ranks  # else each answers all: it takes part in every forward
    with Rows() as progress:

        def report(task: str, done: int, rows: int) -> None:
            if deadline is not None and (ranks.any(deadline.passed) if model.sharded else deadline.passed):
                raise Paused("time is up; all results so far are written")
            progress.show(task, done, rows)

        for group in by_questions(wanted):
            try:
                for outcome in examine(model, group, library, simultaneously, report, known, sharing):
                    results += [result.as_dict() for result in outcome.results]  # shown even where the disk is full
                    ranks.as_first(partial(folder.add_outcome, outcome, with_samples))
            except (Paused, Lost):
                raise
            except Exception as error:  # whatever one task fails by, the others' results must not be lost
                log.exception("evaluation of %s failed", group[0].task)
                failures.append(f"evaluation of {group[0].task} failed: {type(error).__name__}: {error}")
    return results, failures
