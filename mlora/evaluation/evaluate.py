"""Evaluating adapters on tasks: each task's rows once through the model for all adapters that want it."""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from mlora.data import encode_choices, load_questions
from mlora.evaluation.score import Prediction, Request, predict
from mlora.model.errors import ModelError
from mlora.model.multi import MultiAdapterModel
from mlora.tasks import METRICS, Protocol, find_task

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examination:
    """One adapter to be evaluated on one task.

    Attributes:
        adapter: name; None for the plain base model.
        task: name.
        protocol: of the task; None for the first that has the name.
        data: local data; None for the published data set.
        limit: rows; None for all.
        batch_size: rows of this adapter in a forward.
    """

    adapter: str | None
    task: str
    data: str | None = None
    limit: int | None = None
    batch_size: int = 16
    protocol: Protocol | None = None


@dataclass(frozen=True)
class Result:
    """One number of the results table.

    Attributes:
        adapter: name; `BASE` for the plain base model.
        task, version, protocol, metric: what was measured.
        value: a share between 0 and 1; a Matthews correlation between -1 and 1.
        standard_error: of the value; None for a single row, and where the metric is undefined.
        n: rows.
        limit: rows that the evaluation was limited to; None where it was not.
        date: ISO 8601, UTC.
    """

    adapter: str
    task: str
    version: int
    protocol: str
    metric: str
    value: float
    standard_error: float | None
    n: int
    limit: int | None
    date: str

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


BASE = "base model"
"""What results call the plain base model: no adapter can have a name with a blank."""


def by_questions(examinations: Iterable[Examination]) -> list[list[Examination]]:
    """Return the examinations grouped by the questions that they ask."""
    groups: dict[tuple[Any, ...], list[Examination]] = defaultdict(list)
    for examination in examinations:
        groups[examination.task, examination.protocol, examination.data, examination.limit].append(examination)
    return list(groups.values())


def check(examinations: Iterable[Examination], tokenizer: Any, cutoff_len: int) -> None:
    """Read and encode all questions, so that bad data is found before the training and not after.

    Raises:
        DataError: data that is not there, or a row that cannot be used.
    """
    for group in by_questions(examinations):
        first = group[0]
        task = find_task(first.task, first.protocol)
        shortened = 0
        for question in load_questions(task.name, first.data, limit=first.limit, protocol=task.protocol):
            encoded = encode_choices(tokenizer, question, task.protocol, cutoff_len)
            if len(encoded.prompt_ids) + max(map(len, encoded.choice_ids), default=0) == cutoff_len:
                whole = encode_choices(tokenizer, question, task.protocol, sys.maxsize)
                shortened += len(encoded.prompt_ids) < len(whole.prompt_ids)
        if shortened:
            log.warning("%s: cutoff_len %d shortens %d of its evaluation prompts", task.name, cutoff_len, shortened)


def check_heads(model: MultiAdapterModel, examinations: Iterable[Examination]) -> None:
    """Refuse tasks that an adapter's classification head is not for, or that need one which is not there.

    Raises:
        ModelError: of the first such adapter.
    """
    for examination in examinations:
        task, name = find_task(examination.task, examination.protocol), examination.adapter
        labels = None if name is None else model.num_labels(name)
        if (labels or 0) != len(task.labels):
            has = "no classification head" if labels is None else f"a classification head of {labels} labels"
            needs = f"one of {len(task.labels)} labels" if task.labels else "none"
            raise ModelError(f"{BASE if name is None else name} has {has}; the task {task.name} needs {needs}")


def evaluate(
    model: MultiAdapterModel,
    examinations: Sequence[Examination],
    cutoff_len: int,
    simultaneously: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[Result]:
    """Yield every result as soon as it exists.

    Adapters that are evaluated on the same rows of a task share its forwards; which do, changes no result.

    Args:
        model: that holds the adapters.
        examinations: what to evaluate.
        cutoff_len: tokens of a prompt and its longest choice.
        simultaneously: adapters in one forward; None for all.
        progress: called with the task, the rows done and the rows in all.

    Raises:
        ModelError: an adapter's classification head is not for a task.
    """
    check_heads(model, examinations)
    for group in by_questions(examinations):
        task = group[0].task
        size = len(group) if simultaneously is None else simultaneously
        for start in range(0, len(group), size):
            together = group[start : start + size]
            report = None if progress is None else lambda done, rows, task=task: progress(task, done, rows)
            yield from _evaluate_together(model, together, cutoff_len, report)


def _evaluate_together(
    model: MultiAdapterModel, group: Sequence[Examination], cutoff_len: int, progress: Callable[[int, int], None] | None
) -> Iterator[Result]:
    first = group[0]
    task = find_task(first.task, first.protocol)
    questions = load_questions(task.name, first.data, limit=first.limit, protocol=task.protocol)
    encoded = [encode_choices(model.tokenizer, question, task.protocol, cutoff_len) for question in questions]
    requests = [Request(e.adapter, question) for question in encoded for e in group]
    found: dict[str | None, list[Prediction]] = {e.adapter: [] for e in group}
    predictions = predict(model, requests, task.protocol, sum(e.batch_size for e in group))
    for number, (request, prediction) in enumerate(zip(requests, predictions, strict=True), 1):
        found[request.adapter].append(prediction)
        if progress is not None and number % len(group) == 0:
            progress(number // len(group), len(questions))
    answers = [question.answer for question in questions]
    date = datetime.now(UTC).isoformat(timespec="seconds")
    for examination in group:
        for metric in task.metrics:
            score = METRICS[metric]([p.answer(metric) for p in found[examination.adapter]], answers)
            name = BASE if examination.adapter is None else examination.adapter
            limit = examination.limit
            yield Result(
                name, task.name, task.version, task.protocol, metric, score.value, score.stderr, score.n, limit, date
            )
