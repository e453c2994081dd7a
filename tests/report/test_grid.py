"""The grid's means and deviations, by hand and by the standard library."""

from __future__ import annotations

from statistics import mean, stdev

import pytest

from mlora.report.grid import Grid, Place, ranked, ranking, ranking_table


def result(adapter: str, task: str, value: float, **more: object) -> dict:
    own = {"adapter": adapter, "task": task, "metric": "accuracy", "protocol": "letter", "value": value}
    return own | {"standard_error": 0.02, "n": 400, "chance": 0.25} | more


VALUES = {("lora", 1, "a"): 0.5, ("lora", 2, "a"): 0.6, ("lora", 1, "b"): 0.3, ("lora", 2, "b"): 0.26,
          ("mix", 1, "a"): 0.7, ("mix", 2, "a"): 0.8, ("mix", 1, "b"): 0.9, ("mix", 2, "b"): 0.7}  # fmt: skip
PLACES = {f"{group}{seed}{task}": Place((group,), seed) for group, seed, task in VALUES}
RESULTS = [result(f"{group}{seed}{task}", task, value) for (group, seed, task), value in VALUES.items()]


def test_means_and_deviations_are_over_seeds() -> None:
    grid = Grid([*RESULTS, result("other", "a", 0.1), result("lora1a", "a", 0.2, metric="f1")], PLACES)
    cell = grid.cell(("lora",), "a")
    assert (cell.mean, cell.spread, cell.seeds) == pytest.approx((mean([0.5, 0.6]), stdev([0.5, 0.6]), 2))
    average = grid.average(("mix",))
    assert (average.mean, average.spread) == pytest.approx((mean([0.8, 0.75]), stdev([0.8, 0.75])))
    assert str(cell) == "55.0 ± 7.1" and grid.header("method") == ["method", "a", "b", "AVG"]
    assert grid.cell(("lora",), "b").at_chance and str(grid.cell(("lora",), "b")).endswith("~")
    assert not cell.at_chance and "2 seeds" in grid.notes[0]


def test_a_group_that_lacks_a_task_has_no_average_and_comes_last() -> None:
    grid = Grid([r for r in RESULTS if r["adapter"] not in ("mix1b", "mix2b")], PLACES)
    assert grid.average(("mix",)) is None and ranked(grid) == [("lora",), ("mix",)]
    assert grid.rows()[1] == ["mix", "75.0 ± 7.1", "-", "-"]


def test_one_seed_shows_the_standard_error() -> None:
    grid = Grid([r for r in RESULTS if "1" in r["adapter"]], PLACES)
    assert str(grid.cell(("lora",), "a")) == "50.0 ± 2.0" and "standard error" in grid.notes[0]


def test_the_ranking_is_by_the_average() -> None:
    first, second = ranking(RESULTS, PLACES, ["method"])
    assert (first["rank"], first["settings"], second["settings"]) == (1, {"method": "mix"}, {"method": "lora"})
    assert first["adapters"] == ["mix1a", "mix2a", "mix1b", "mix2b"] and first["average"] == pytest.approx(0.775)
    lines = ranking_table(RESULTS, PLACES, ["method"]).splitlines()
    assert lines[3].split()[:2] == ["1", "mix"] and lines[4].split()[:2] == ["2", "lora"]
