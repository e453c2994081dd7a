"""The questions of an evaluation: read, encoded, and known by a digest."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

from mlora.data import EncodedQuestion, OnBadRow, Split, encode_choices, load_questions
from mlora.tasks import Protocol, Question, Task, find_task

log = logging.getLogger(__name__)

ACCURACIES = ("accuracy", "acc", "acc_norm")
"""Metrics whose value by chance is the share that guessing gets right."""


@dataclass(frozen=True)
class Examination:
    """One adapter to be evaluated on one task.

    Attributes:
        adapter: name; None for the plain base model.
        task: name.
        data: local data; None for the published data set.
        limit: rows; None for all.
        batch_size: rows of this adapter in a forward.
        protocol: of the task; None for the first that has the name.
        split: of the rows; published results are of "test".
        rows: numbers of the rows within the split; None for all.
        on_bad_row: what an unusable row does.
    """

    adapter: str | None
    task: str
    data: str | None = None
    limit: int | None = None
    batch_size: int = 16
    protocol: Protocol | None = None
    split: Split = "test"
    rows: tuple[int, ...] | None = None
    on_bad_row: OnBadRow = "error"

    @property
    def asks(self) -> tuple[Any, ...]:
        """What the questions depend on: adapters that agree in it can be examined together."""
        return self.task, self.protocol, self.data, self.limit, self.split, self.rows, self.on_bad_row


@dataclass(frozen=True)
class QuestionSet:
    """Questions of one task.

    Attributes:
        task: whose they are.
        questions: in the order of the data.
        encoded: the same, as a model is scored on them.
    """

    task: Task
    questions: Sequence[Question]
    encoded: Sequence[EncodedQuestion]

    @classmethod
    def load(cls, examination: Examination, tokenizer: Any, cutoff_len: int) -> QuestionSet:
        """Read and encode what an examination asks.

        Raises:
            DataError: data that is not there, or a row that cannot be used.
        """
        task = find_task(examination.task, examination.protocol)
        e = examination
        questions = load_questions(task.name, e.data, e.split, e.limit, e.on_bad_row, task.protocol)
        if examination.rows is not None:
            questions = [questions[row] for row in examination.rows]
        encoded = [encode_choices(tokenizer, question, task.protocol, cutoff_len) for question in questions]
        own = cls(task, questions, encoded)
        shortened = own._shortened(tokenizer, cutoff_len)
        if shortened:
            log.warning("%s: cutoff_len %d shortens %d of its evaluation prompts", task.name, cutoff_len, shortened)
        return own

    def _shortened(self, tokenizer: Any, cutoff_len: int) -> int:
        """Return how many prompts lost tokens to the cutoff; only those that fill it can have."""
        count = 0
        for question, encoded in zip(self.questions, self.encoded, strict=True):
            if len(encoded.prompt_ids) + max(map(len, encoded.choice_ids), default=0) == cutoff_len:
                whole = encode_choices(tokenizer, question, self.task.protocol, sys.maxsize)
                count += len(encoded.prompt_ids) < len(whole.prompt_ids)
        return count

    @cached_property
    def answers(self) -> list[int]:
        """Index of the right choice, or label, of every question."""
        return [question.answer for question in self.questions]

    @cached_property
    def digest(self) -> str:
        """What tells these questions from others, in 16 hexadecimal digits: tokens, order and answers."""
        return hashlib.sha256("\n".join(map(repr, self.encoded)).encode()).hexdigest()[:16]

    def chance(self, metric: str) -> float | None:
        """Return what a metric is for whoever guesses, or always gives the commonest answer, whichever is more.

        None where chance is not a share of right answers.
        """
        if metric not in ACCURACIES:
            return None
        commonest = Counter(self.answers).most_common(1)[0][1] / len(self.answers)
        return max(commonest, fmean(1 / (len(q.choices) or len(self.task.labels)) for q in self.questions))


def by_questions(examinations: Sequence[Examination]) -> list[list[Examination]]:
    """Return the examinations grouped by the questions that they ask."""
    groups: dict[tuple[Any, ...], list[Examination]] = {}
    for examination in examinations:
        groups.setdefault(examination.asks, []).append(examination)
    return list(groups.values())


class Library:
    """Questions, each set read and encoded once.

    Args:
        tokenizer: of the base model.
        cutoff_len: tokens of a prompt and its longest choice.
    """

    def __init__(self, tokenizer: Any, cutoff_len: int) -> None:
        self.tokenizer, self.cutoff_len = tokenizer, cutoff_len
        self._sets: dict[tuple[Any, ...], QuestionSet] = {}

    def questions(self, examination: Examination) -> QuestionSet:
        """Return what an examination asks.

        Raises:
            DataError: data that is not there, or a row that cannot be used.
        """
        if examination.asks not in self._sets:
            self._sets[examination.asks] = QuestionSet.load(examination, self.tokenizer, self.cutoff_len)
        return self._sets[examination.asks]
