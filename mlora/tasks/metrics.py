"""Metrics over the rows of a task, with their standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Score(NamedTuple):
    """A mean over rows.

    Attributes:
        value: the mean.
        stderr: its standard error; None for a single row.
        n: rows.
    """

    value: float
    stderr: float | None
    n: int


def accuracy(correct: Sequence[bool]) -> Score:
    """Return the share p of right answers and its standard error sqrt(p (1 - p) / (n - 1)).

    The error is the sample standard deviation over sqrt(n), which lm-evaluation-harness reports.

    Raises:
        ValueError: there is no answer.
    """
    n = len(correct)
    if n == 0:
        raise ValueError("accuracy of no answers")
    p = sum(map(bool, correct)) / n
    return Score(p, math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None, n)
