"""What is wrong with a config, said so that it can be mended in one go."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

MAX_LINES = 15
MAX_VALUE_LENGTH = 60
LIKE_ENOUGH = 0.5
ELSEWHERE = {
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "epochs": "num_epochs",
    "gradient_accumulation_steps": "micro_batch_size",
    "learning_rate": "lr",
    "lr_scheduler": "scheduler_type",
    "lr_scheduler_type": "scheduler_type",
    "max_length": "cutoff_len",
    "optimizer": "optim",
    "per_device_train_batch_size": "micro_batch_size",
    "rank": "r",
}
"""What other programs call our keys."""


@dataclass(frozen=True)
class Problem:
    """One fault of a config.

    Attributes:
        path: of the key, `lora[0].lr` say; empty where the whole file is meant.
        message: what was given and what is allowed.
    """

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}" if self.path else self.message


class ConfigError(ValueError):
    """All faults of one config; the command line prints it and exits with 2.

    Attributes:
        source: the file, or whatever else the values came from.
        problems: those of the top level first.
    """

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        super().__init__(source, tuple(problems))
        self.source = source
        self.problems = tuple(problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return f"{self.source}: {self.problems[0]}"
        shown = self.problems
        if len(shown) > MAX_LINES - 1:
            shown = shown[: MAX_LINES - 2]
        lines = [f"{self.source}: {len(self.problems)} problems", *(f"  {problem}" for problem in shown)]
        if len(shown) < len(self.problems):
            lines.append(f"  ... and {len(self.problems) - len(shown)} more")
        return "\n".join(lines)


def show(value: object) -> str:
    """Return a value as JSON on one line, cut where it is long."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = repr(value)
    text = text.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair cannot be printed
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[: MAX_VALUE_LENGTH - 3]}..."


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that is most like the one given, by letters and by parts; None where none is."""
    words = set(known)
    meant = {other: other for other in sorted(words)} | {o: ours for o, ours in ELSEWHERE.items() if ours in words}
    scores = {other: _likeness(word, other) for other in meant}
    best = max(scores, key=scores.__getitem__, default="")
    return meant[best] if scores.get(best, 0.0) >= LIKE_ENOUGH else None


def _likeness(word: str, other: str) -> float:
    parts, others = set(word.split("_")), set(other.split("_"))
    return difflib.SequenceMatcher(None, word, other).ratio() + len(parts & others) / len(parts | others)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return a hint to append to a message about an unknown word; empty where nothing is like it."""
    match = nearest(word, known)
    return "" if match is None else f"; did you mean {show(match)}?"
