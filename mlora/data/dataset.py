"""Training rows and evaluation questions of a task, a mixture of tasks, or instruction data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar, overload

from mlora.config.job import CASUAL, OnBadRow
from mlora.data.errors import DataError
from mlora.data.instructions import encode_instruction
from mlora.data.prompts import find_prompt
from mlora.data.readers import SourceRow
from mlora.data.sources import Split, instruction_rows, split_paths, task_rows
from mlora.data.tokenize import Sample, encode_question
from mlora.tasks import Protocol, Question, Row, RowError, Task, find_task
from mlora.wording import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
log = logging.getLogger(__name__)
SHOWN_PROBLEMS = 10


@dataclass
class Report:
    """What became of the rows that were read.

    Attributes:
        rows: rows read.
        bad_rows: skipped, because a column or the line itself was unusable.
        truncated: kept with a prompt shortened to the cutoff.
        dropped: left out, because the cutoff has no room for the answer.
        problems: messages of the first bad rows.
    """

    rows: int = 0
    bad_rows: int = 0
    truncated: int = 0
    dropped: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{counted(self.rows, 'row')} read"]
        parts += [f"{counted(self.bad_rows, 'bad row')} skipped (first: {self.problems[0]})"] if self.bad_rows else []
        parts += [f"{counted(self.truncated, 'prompt')} truncated"] if self.truncated else []
        parts += [f"{self.dropped} dropped because their answer exceeds the cutoff"] if self.dropped else []
        return ", ".join(parts)


@dataclass
class Samples(Sequence[Sample]):
    """Training rows, in the order of the data.

    Attributes:
        samples: the rows.
        report: what became of the rows that were read.
    """

    samples: list[Sample] = field(default_factory=list)
    report: Report = field(default_factory=Report)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        return self.samples[index]

    def __len__(self) -> int:
        return len(self.samples)


def task_names(task_name: str) -> list[str]:
    """Return the names in a list joined by ";"."""
    return [name.strip() for name in task_name.split(";") if name.strip()]


def load_training_samples(
    task_name: str,
    data: str | None,
    tokenizer: PreTrainedTokenizerBase,
    cutoff_len: int,
    *,
    protocol: Protocol | None = None,
    split: Split = "train",
    prompt: str | None = None,
    train_on_inputs: bool = False,
    limit: int | None = None,
    on_bad_row: OnBadRow = "error",
) -> Samples:
    """Return the tokenized rows of a task, of several joined by ";" one after the other, or of instruction data.

    Args:
        task_name: a task, several joined by ";", or "casual" for instruction data.
        data: local path or hub id; several joined by ";" by position; one folder with a subfolder per task; None
            for the published data set.
        tokenizer: of the base model.
        cutoff_len: tokens of a row, > 0.
        protocol: of the tasks; None takes each name's first.
        split: "validation" for held-out loss.
        prompt: name or path of the prompt template of Alpaca columns; tasks have their own prompts.
        train_on_inputs: make the prompt labels too.
        limit: rows read of each task, or of each part of instruction data.
        on_bad_row: stop at an unusable row, or skip and count it.

    Raises:
        DataError: data that is not there, a bad row under "error", or no row left.
        UnknownTaskError: a name that no task has.
    """
    if cutoff_len < 1:
        raise ValueError(f"cutoff_len is {cutoff_len}, expected a positive number")
    result = Samples()
    if task_name == CASUAL:
        parts = _instruction_parts(data, tokenizer, cutoff_len, split, prompt, train_on_inputs, limit)
    else:
        tasks = [find_task(name, protocol) for name in task_names(task_name)]
        parts = _task_parts(tasks, data, tokenizer, cutoff_len, split, train_on_inputs, limit)
    for rows, encode, where in parts:
        before, dropped = len(result), result.report.dropped
        for number, sample in enumerate(_built(rows, encode, result.report, on_bad_row)):
            if sample is None:
                result.report.dropped += 1
            else:
                result.report.truncated += sample.truncated
                result.samples.append(replace(sample, row=number))
        if len(result) == before:
            lost = result.report.dropped - dropped
            reason = f"; {counted(lost, 'row')} lost the answer to cutoff_len {cutoff_len}" if lost else ""
            raise DataError(f"no data rows in {where}{reason}")
    return result


def load_questions(
    task_name: str,
    data: str | None = None,
    split: Split = "test",
    limit: int | None = None,
    on_bad_row: OnBadRow = "error",
    protocol: Protocol | None = None,
) -> list[Question]:
    """Return the questions of one task; "test" is the split that published results are evaluated on.

    Raises:
        DataError: data that is not there, a bad row under "error", or no row left.
        UnknownTaskError: a name that no task has.
    """
    task = find_task(task_name, protocol)
    path = split_paths(data, [task.name])[0]
    rows = task_rows(task, path, split, limit)
    report = Report()
    questions = list(_built(rows, task.build, report, on_bad_row))
    if not questions:
        raise DataError(f"no data rows in {_where(task, path, split)}")
    if report.bad_rows:
        log.warning("%s: %s", _where(task, path, split), report)
    return questions


Part = tuple[Iterator[SourceRow], Callable[[Row], "Sample | None"], str]


def _instruction_parts(
    data: str | None,
    tokenizer: PreTrainedTokenizerBase,
    cutoff_len: int,
    split: Split,
    prompt: str | None,
    train_on_inputs: bool,
    limit: int | None,
) -> Iterator[Part]:
    """Yield rows, how to encode one, and their name, for every part of instruction data."""
    paths = task_names(data or "")
    if not paths:
        raise DataError('data: instruction data (task "casual") needs `data`: a file, a folder or a hub id')
    template = find_prompt(prompt)

    def encode_row(row: Row) -> Sample | None:
        return encode_instruction(tokenizer, row, template, cutoff_len, train_on_inputs=train_on_inputs)

    for path in paths:
        yield instruction_rows(path, split, limit), encode_row, path


def _task_parts(
    tasks: Sequence[Task],
    data: str | None,
    tokenizer: PreTrainedTokenizerBase,
    cutoff_len: int,
    split: Split,
    train_on_inputs: bool,
    limit: int | None,
) -> Iterator[Part]:
    """Yield rows, how to encode one, and their name, for every task."""
    for task, path in zip(tasks, split_paths(data, [task.name for task in tasks]), strict=True):

        def encode_row(row: Row, task: Task = task) -> Sample | None:
            question = task.build(row)
            return encode_question(tokenizer, question, cutoff_len, task.name, train_on_inputs=train_on_inputs)

        yield task_rows(task, path, split, limit), encode_row, _where(task, path, split)


def _built(rows: Iterator[SourceRow], build: Callable[[Row], T], report: Report, on_bad_row: OnBadRow) -> Iterator[T]:
    for row in rows:
        report.rows += 1
        try:
            if row.problem:
                raise RowError("", row.problem)
            built = build(row.values)
        except RowError as error:
            problem = f"{row.origin}: {error if error.field else error.problem}"
            if on_bad_row == "error":
                raise DataError(problem) from None
            report.bad_rows += 1
            if len(report.problems) < SHOWN_PROBLEMS:
                report.problems.append(problem)
        else:
            yield built


def _where(task: Task, path: str | None, split: Split) -> str:
    return f"{path or task.source.hub} (task {task.name}, split {split})"
