"""Results as text."""

from __future__ import annotations

from typing import Any

from mlora.report.table import columns, results_table


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


def test_a_table_wider_than_a_terminal_goes_on_below() -> None:
    tasks = [f"task{i}" for i in range(9)]
    rows = [[name, "2.90%", *(f"{i}{i}.0 ± 1.0" for i in range(9))] for name in ("LoRA", "MixLoRA (paper)")]
    text = columns(["method", "trainable", *tasks], rows, left=2)
    assert max(map(len, text.splitlines())) <= 80
    parts = [part.splitlines() for part in text.split("\n\n")]
    assert [part[0].split()[:2] for part in parts] == [["method", "trainable"]] * 3
    assert [name for part in parts for name in part[0].split()[2:]] == tasks
    assert all(part[3].startswith("MixLoRA (paper)  2.90%") for part in parts)


def test_a_column_wider_than_a_terminal_is_shown_all_the_same() -> None:
    assert columns(["a", "b", "c"], [["x", "y" * 90, "z"]]).split("\n\n")[0].splitlines()[2] == "x  " + "y" * 90
