"""Results as text."""

from __future__ import annotations

from typing import Any

from mlora.report.table import results_table


def result(adapter: str, protocol: str, metric: str, value: float) -> dict[str, Any]:
    return {
        "adapter": adapter,
        "task": "piqa",
        "protocol": protocol,
        "metric": metric,
        "value": value,
        "standard_error": None,
        "n": 10,
    }


def test_protocols_never_share_a_table() -> None:
    results = [
        result("base model", "loglikelihood", "acc", 0.6),
        result("a", "letter", "accuracy", 0.5),
        result("a", "loglikelihood", "acc", 0.7),
    ]
    letter, loglikelihood = results_table(results).split("\n\n")[::-1]
    assert "letter" in letter
    assert "loglikelihood" not in letter
    assert "base model" not in letter  # it was not scored by letters
    assert loglikelihood.splitlines()[2].split() == ["a", "piqa", "acc", "60.0", "70.0", "10"]
