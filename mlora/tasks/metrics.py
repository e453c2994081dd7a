"""Metrics over the rows of a task, with their standard errors.

A metric f depends on the shares p of four kinds of row (right, missed, ...). Its standard error is the delta method's:
the sample standard deviation over the rows of df/dp of each row's kind, divided by sqrt(n). For a mean that is the
usual error, for F1 and Matthews' correlation it is what a bootstrap of the rows tends to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Score(NamedTuple):
    """A metric over rows.

    Attributes:
        value: of the metric.
        stderr: its standard error; None for a single row, and where the metric is undefined and set to 0.
        n: rows.
    """

    value: float
    stderr: float | None
    n: int


class Confusion(NamedTuple):
    """Shares of the rows by prediction and answer, class 1 being the positive one."""

    tp: float
    fp: float
    fn: float
    tn: float


def accuracy(predicted: Sequence[int], answers: Sequence[int]) -> Score:
    """Return the share p of right answers and its standard error sqrt(p (1 - p) / (n - 1)).

    The error is the sample standard deviation over sqrt(n), which lm-evaluation-harness reports.

    Raises:
        ValueError: there is no answer.
    """
    n = _rows(predicted, answers)
    p = sum(one == other for one, other in zip(predicted, answers, strict=True)) / n
    return Score(p, _error([p, 1 - p], [1.0, 0.0], n), n)


def f1(predicted: Sequence[int], answers: Sequence[int]) -> Score:
    """Return the harmonic mean of precision and recall of class 1; 0 where no row is or is called positive.

    Raises:
        ValueError: there is no answer.
    """
    shares = _confusion(predicted, answers)
    positive = 2 * shares.tp + shares.fp + shares.fn
    if positive == 0:
        return Score(0.0, None, len(answers))
    wrong = -2 * shares.tp / positive**2
    slopes = Confusion(2 * (shares.fp + shares.fn) / positive**2, wrong, wrong, 0.0)
    return Score(2 * shares.tp / positive, _error(shares, slopes, len(answers)), len(answers))


def matthews_correlation(predicted: Sequence[int], answers: Sequence[int]) -> Score:
    """Return the correlation of predictions and answers of two classes; 0 where either is the same for all rows.

    Raises:
        ValueError: there is no answer.
    """
    tp, fp, fn, tn = shares = _confusion(predicted, answers)
    called, are, not_called, are_not = tp + fp, tp + fn, tn + fn, tn + fp
    root = math.sqrt(called * are * not_called * are_not)
    if root == 0:
        return Score(0.0, None, len(answers))
    value = (tp * tn - fp * fn) / root
    slopes = Confusion(
        tn / root - value / 2 * (1 / called + 1 / are),
        -fn / root - value / 2 * (1 / called + 1 / are_not),
        -fp / root - value / 2 * (1 / are + 1 / not_called),
        tp / root - value / 2 * (1 / not_called + 1 / are_not),
    )
    return Score(value, _error(shares, slopes, len(answers)), len(answers))


METRICS: dict[str, Callable[[Sequence[int], Sequence[int]], Score]] = {
    "accuracy": accuracy,
    "acc": accuracy,
    "acc_norm": accuracy,
    "f1": f1,
    "matthews_correlation": matthews_correlation,
}
"""From the index that was chosen for each row and that of its answer to a score, by the names that tasks give.
acc and acc_norm are lm-evaluation-harness's names; they differ in what is chosen."""


def _rows(predicted: Sequence[int], answers: Sequence[int]) -> int:
    if not answers:
        raise ValueError("a metric of no answers")
    if len(predicted) != len(answers):
        raise ValueError(f"{len(predicted)} predictions for {len(answers)} answers")
    return len(answers)


def _confusion(predicted: Sequence[int], answers: Sequence[int]) -> Confusion:
    n = _rows(predicted, answers)
    pairs = [(one == 1, other == 1) for one, other in zip(predicted, answers, strict=True)]
    return Confusion(*(pairs.count(kind) / n for kind in ((True, True), (True, False), (False, True), (False, False))))


def _error(shares: Sequence[float], slopes: Sequence[float], n: int) -> float | None:
    """Return the sample standard deviation of the rows' slopes over sqrt(n); None for a single row."""
    if n < 2:
        return None
    mean = sum(p * slope for p, slope in zip(shares, slopes, strict=True))
    variance = sum(p * (slope - mean) ** 2 for p, slope in zip(shares, slopes, strict=True))
    return math.sqrt(variance / (n - 1))
