"""What a run shows while it trains: one table on a terminal, few plain lines elsewhere."""

from __future__ import annotations

import sys

import pytest

from mlora.report import progress
from mlora.report.progress import Progress

MEASURED = {"loss": 2.0, "lr": 1e-3, "num_tokens": 100.0, "seconds": 0.5}


def test_r25_without_a_terminal_a_line_for_each_adapter_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with Progress({"a": 200, "bb": 200}) as shown:
        for step in range(1, 101):
            now += 0.5
            for adapter in ("a", "bb"):
                shown.step(adapter, step, MEASURED)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 2 * (50 / 10 + 2)
    assert lines[-2] == "a   step 100/200  loss 2.0000  lr 1.0e-03  200 tokens/s  ETA 0:50"


def test_r25_on_a_terminal_one_table_of_all_adapters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with Progress({"a": 2, "bb": 2}) as shown:
        shown.step("a", 1, MEASURED)
        table = shown._table()
    assert table.row_count == 2
    assert [next(iter(column.cells)).split(" ")[0] for column in table.columns] == [
        "a", "step", "loss", "lr", next(iter(table.columns[4].cells)).split(" ")[0], "ETA",
    ]  # fmt: skip
    assert "step 1/2" in capsys.readouterr().out


def test_an_adapter_that_has_not_begun_has_no_time_left_to_show() -> None:
    with Progress({"a": 200, "waits": 200, "done": 5}, {"done": 5}) as shown:
        shown.step("a", 1, MEASURED)
        assert [cells[-1] == "ETA -" for cells in shown._cells()] == [False, True, False]
