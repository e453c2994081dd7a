"""What a task is: a published data set, and a function from its rows to a prompt, continuations and the answer.

The choices of a question are continuations of its prompt, leading space included, so that prompt + choice is the
text a model reads. The protocol says how a model is scored on them:

- letter: the next-token logits after the prompt, read at the options' own tokens only (the MixLoRA paper's way).
- loglikelihood: the summed log-probability of each whole continuation (lm-evaluation-harness's way).

Results of the two are never comparable, so the same data set has a name in each.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Protocol = Literal["letter", "loglikelihood", "classification"]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """One row of a task, ready to be tokenized.

    Attributes:
        prompt: what the model reads.
        choices: continuations with their leading space, " A" say; only those that the row has.
        answer: index of the right one.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Source:
    """Where the rows of a task are published.

    Attributes:
        hub: id of the data set on the Hugging Face hub.
        subset: its configuration; None where it has one only.
        train: split that is trained on.
        test: split that published results are evaluated on, often named "validation".
        validation: a further labelled split for held-out loss; None where `test` is the only one besides `train`.
        train_subset: configuration of the `train` split where it is another one.
    """

    hub: str
    subset: str | None = None
    train: str = "train"
    test: str = "test"
    validation: str | None = None
    train_subset: str | None = None


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Attributes:
        name: as on the command line and in results.
        version: raised when prompts, choices or splits change, because results then cannot be compared.
        protocol: how a model is scored.
        metrics: names of what is reported.
        source: the published data set.
        build: from a row in the published columns to a question; raises RowError.
    """

    name: str
    version: int
    protocol: Protocol
    metrics: tuple[str, ...]
    source: Source
    build: Callable[[Row], Question]


class RowError(Exception):
    """A row that a task cannot use.

    Attributes:
        field: the column at fault.
        problem: what is wrong with it.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"field {field!r} {problem}")
        self.field = field
        self.problem = problem


class UnknownTaskError(ValueError):
    """A name that no task has."""


TASKS: dict[str, Task] = {}


def register(
    name: str, protocol: Protocol, source: Source, *, metrics: tuple[str, ...], version: int = 1
) -> Callable[[Callable[[Row], Question]], Callable[[Row], Question]]:
    """Make a task of the decorated row function; may be stacked where data sets share a form."""

    def add(build: Callable[[Row], Question]) -> Callable[[Row], Question]:
        if name in TASKS:
            raise ValueError(f"task {name!r} is already registered")
        TASKS[name] = Task(name, version, protocol, metrics, source, build)
        return build

    return add


def find_task(name: str) -> Task:
    """Return the task of a name.

    Raises:
        UnknownTaskError: no task has that name; the message has the nearest names and all of them.
    """
    if name in TASKS:
        return TASKS[name]
    nearest = difflib.get_close_matches(name, TASKS, n=3)
    hint = f"; did you mean {' or '.join(nearest)}?" if nearest else "."
    raise UnknownTaskError(f"unknown task {name!r}{hint} Known tasks: {', '.join(sorted(TASKS))}")
