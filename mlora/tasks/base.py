"""What a task is: a published data set, and a function from its rows to a prompt, continuations and the answer.

The choices of a question are continuations of its prompt, leading space included, so that prompt + choice is the
text a model reads. The protocol says how a model is scored on them:

- letter: the next-token logits after the prompt, read at the options' own tokens only (the MixLoRA paper's way).
- loglikelihood: the summed log-probability of each whole continuation (lm-evaluation-harness's way).
- classification: a head that the adapter trains reads the model's last hidden state after the prompt; a question has
  no choices then, and the answer is an index into the task's labels.

Results of different protocols are never comparable. A data set may have a task in each, under the same name (piqa) or
under another (arc-e by letters is arc_easy by log-likelihood); a task is found by protocol and name.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

Protocol = Literal["letter", "classification", "loglikelihood"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
"""In the order of preference: a name that several have is the first's where none is asked for."""
HARNESS: Final = "lm-eval"
"""Protocol of results that lm-evaluation-harness measures on tasks of its own."""
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """One row of a task, ready to be tokenized.

    Attributes:
        prompt: what the model reads.
        choices: continuations with their leading space, " A" say; only those that the row has. None in
            classification.
        answer: index of the right one; of the label, in classification.
        contexts: of each choice, what stands between prompt and choice and is read but not scored (the two names
            that may fill WinoGrande's blank); empty where nothing does.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int
    contexts: tuple[str, ...] = ()

    def parts(self, choice: int) -> tuple[str, str]:
        """Return what is read before a choice is scored, and what is scored; blanks between belong to the latter."""
        text = self.prompt + (self.contexts[choice] if self.contexts else "")
        context = text.rstrip()
        return context, text[len(context) :] + self.choices[choice]


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
        train_rows: published size of the `train` split.
        test_rows: published size of the `test` split.
    """

    hub: str
    subset: str | None = None
    train: str = "train"
    test: str = "test"
    validation: str | None = None
    train_subset: str | None = None
    train_rows: int | None = None
    test_rows: int | None = None


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
        data_set: name that the data set's tasks of all protocols share.
        labels: names of the classes, in the order of their indices; none but in classification.
    """

    name: str
    version: int
    protocol: Protocol
    metrics: tuple[str, ...]
    source: Source
    build: Callable[[Row], Question]
    data_set: str
    labels: tuple[str, ...] = ()


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
    """A name that no task has, or none of the protocol asked for."""


TASKS: dict[tuple[Protocol, str], Task] = {}
"""Every task by its protocol and name."""


def register(
    name: str,
    protocol: Protocol,
    source: Source,
    *,
    metrics: tuple[str, ...],
    labels: tuple[str, ...] = (),
    version: int = 1,
    data_set: str | None = None,
) -> Callable[[Callable[[Row], Question]], Callable[[Row], Question]]:
    """Make a task of the decorated row function; may be stacked where data sets share a form.

    Args:
        name, protocol, source, metrics, version: see `Task`.
        data_set: see `Task`; the name where left out.
    """

    def add(build: Callable[[Row], Question]) -> Callable[[Row], Question]:
        if (protocol, name) in TASKS:
            raise ValueError(f"task {name!r} of protocol {protocol!r} is already registered")
        TASKS[protocol, name] = Task(name, version, protocol, metrics, source, build, data_set or name, labels)
        return build

    return add


def known_tasks() -> list[str]:
    """Return the names of all tasks of all protocols, each once, in alphabetical order."""
    return sorted({name for _, name in TASKS})


def find_task(name: str, protocol: Protocol | None = None) -> Task:
    """Return the task of a name.

    Args:
        name: of a task, or of the same data set's task in another protocol: "arc-e" is found as "arc_easy".
        protocol: that it must be of; None takes the first of `PROTOCOLS` that has the name.

    Raises:
        UnknownTaskError: no task has that name; the message has the nearest names and all of them.
    """
    named = [TASKS[p, name] for p in PROTOCOLS if (p, name) in TASKS]
    if not named:
        nearest = difflib.get_close_matches(name, known_tasks(), n=3)
        hint = f"; did you mean {' or '.join(nearest)}?" if nearest else "."
        raise UnknownTaskError(f"unknown task {name!r}{hint} Known tasks: {', '.join(known_tasks())}")
    if protocol is None:
        return named[0]
    if (protocol, name) in TASKS:
        return TASKS[protocol, name]
    data_sets = {task.data_set for task in named}
    found = [task for task in TASKS.values() if task.protocol == protocol and task.data_set in data_sets]
    if not found:
        others = ", ".join(sorted(other for p, other in TASKS if p == protocol)) or "none"
        raise UnknownTaskError(f"task {name!r} has no form of the protocol {protocol!r}; tasks that have one: {others}")
    return found[0]


def folder_names(name: str) -> tuple[str, ...]:
    """Return the names that a folder with a task's rows may have: the task's own, then its data set's."""
    data_sets = sorted({task.data_set for (_, other), task in TASKS.items() if other == name})
    return tuple(dict.fromkeys(known.replace(":", "-") for known in (name, *data_sets)))
