"""Metrics against scikit-learn, and their standard errors against the spread of resampled rows."""

from __future__ import annotations

import numpy as np
import pytest

from mlora.tasks import METRICS

sklearn = pytest.importorskip("sklearn.metrics")
ORACLES = {
    "accuracy": sklearn.accuracy_score,
    "f1": sklearn.f1_score,
    "matthews_correlation": sklearn.matthews_corrcoef,
}


def rows(seed: int, n: int = 300) -> tuple[list[int], list[int]]:
    draw = np.random.default_rng(seed)
    answers = draw.random(n) < 0.3 + 0.1 * seed
    predicted = np.where(draw.random(n) < 0.8, answers, draw.random(n) < 0.6)
    return predicted.astype(int).tolist(), answers.astype(int).tolist()


@pytest.mark.parametrize("metric", ORACLES)
@pytest.mark.parametrize("seed", range(4))
def test_values_are_those_of_scikit_learn(metric: str, seed: int) -> None:
    predicted, answers = rows(seed)
    score = METRICS[metric](predicted, answers)
    assert score.value == pytest.approx(ORACLES[metric](answers, predicted), abs=1e-12) and score.n == len(answers)


@pytest.mark.parametrize("metric", ORACLES)
@pytest.mark.parametrize("seed", range(4))
def test_standard_errors_are_those_of_a_bootstrap(metric: str, seed: int) -> None:
    predicted, answers = map(np.array, rows(seed))
    draw = np.random.default_rng(7)
    values = []
    for _ in range(2000):
        chosen = draw.integers(0, len(answers), len(answers))
        values.append(METRICS[metric](predicted[chosen].tolist(), answers[chosen].tolist()).value)
    assert METRICS[metric](predicted.tolist(), answers.tolist()).stderr == pytest.approx(np.std(values), rel=0.07)


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews_correlation"])
def test_nothing_to_measure(metric: str) -> None:
    assert METRICS[metric]([1], [1]).stderr is None
    with pytest.raises(ValueError, match="no answers"):
        METRICS[metric]([], [])
    with pytest.raises(ValueError, match="2 predictions for 1"):
        METRICS[metric]([1, 1], [1])


def test_accuracy_of_four_rows() -> None:
    score = METRICS["accuracy"]([0, 1, 2, 0], [0, 1, 0, 0])
    # The sample standard deviation of 1, 1, 0, 1 is 0.5; over sqrt(4).
    assert (score.value, score.n) == (0.75, 4) and score.stderr == pytest.approx(0.25)


@pytest.mark.parametrize("metric", ["f1", "matthews_correlation"])
def test_undefined_is_zero_as_in_scikit_learn(metric: str) -> None:
    assert METRICS[metric]([0, 0, 0], [0, 0, 0]) == (0.0, None, 3)
    assert METRICS["matthews_correlation"]([1, 1, 1], [0, 1, 0]).value == 0.0
