"""A report says what the run folder says, needs nothing but itself, and survives damaged files."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlora import cli
from mlora.report import facts, figures, record
from mlora.report.axes import Axis, duration, number, short, size, spanning
from mlora.report.chart import HeatMap
from mlora.report.curve import Curve
from mlora.report.page import is_report, report
from mlora.report.routing import routing_note
from mlora.report.standings import standings
from tests.report.runs import adapter, mixture, profile, result, write_run

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Takes a page apart and fails where tags do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes what it did not open"

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open:
            self.texts.append((self.open[-1], data.strip()))

    def all(self, *tags: str) -> list[str]:
        return [text for tag, text in self.texts if tag in tags]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "first", [adapter("plain"), mixture("mixture")], evaluations=(10, 20))


def test_the_page_needs_nothing_else(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "second", [adapter("plain", lr=1e-3)], seed=1)
    for text in (report([run]), report([run, other])):
        page = Page(text)
        assert len(text) < 2_000_000
        assert not re.findall(r"https?://", text.replace("http://www.w3.org/2000/svg", ""))
        assert not re.findall(r"@import|url\(", text)
        for tag, attributes in page.tags:
            assert tag not in {"img", "iframe", "object", "embed"} and "src" not in attributes
            assert tag != "link" or attributes["href"] == "data:,"
            assert not any(key.startswith("on") for key in attributes)
        ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
        assert len(set(ids)) == len(ids)
        targets = {a["href"] for tag, a in page.tags if tag == "a"}
        assert targets == {f"#{id}" for id in [*ids] if id not in ("glance", "theme", "tip")}
        for tag, attributes in page.tags:
            assert tag != "svg" or attributes.get("aria-hidden") or len(attributes["aria-label"] or "") > 10


def test_every_promised_section_is_there(run: Path) -> None:
    page = Page(report([run]))
    assert page.all("h2") == [
        *("Results", "Training", "Accuracy over steps", "Routers", "Speed and memory", "Settings", "Environment")
    ]
    figures = page.all("h3")
    for title in (
        "Training loss",
        "Learning rate",
        "Gradient norm",
        "Router loss",
        "boolq: accuracy, letter",
        "Throughput",
    ):
        assert title in figures
    for title in (
        "Router entropy",
        "Balance of load",
        "mixture: load at step 30",
        "mixture: load by task",
        "Peak memory",
    ):
        assert title in figures
    assert "python train.py --base_model=tiny '--dir=a b'" in " ".join(page.all("span"))
    assert {"tiny", "cpu", "15 s", "400", "3.0 GiB"} <= set(page.all("dd"))  # 60 steps of 100 tokens in 15 s
    assert {"2.13.0", "3.11.7"} <= set(page.all("dd"))
    assert "Experts that no token chose in the last profile: mixture (3)." in " ".join(page.all("p"))


def test_results_have_the_papers_shape(tmp_path: Path) -> None:
    names = {"lora_boolq": "boolq", "lora_obqa": "obqa"}
    adapters = [adapter(name, task_name=task, data=task) for name, task in names.items()] + [mixture("all")]
    results = [result("lora_boolq", "boolq", 0.7), result("lora_obqa", "obqa", 0.5)]
    results += [result("all", "boolq", 0.6), result("all", "obqa", 0.64), result("base model", "boolq", 0.3)]
    results += [
        result("all", "arc_easy", 0.9, protocol="loglikelihood", metric=metric) for metric in ("acc", "acc_norm")
    ]
    read = record.read(write_run(tmp_path / "run", adapters, results))
    letter, *likelihood = standings([read])
    assert [(t.protocol, t.metric, t.tasks) for t in likelihood] == [
        ("loglikelihood", "acc", ["arc_easy"]),
        ("loglikelihood", "acc_norm", ["arc_easy"]),
    ]
    assert letter.tasks == ["boolq", "obqa"]
    rows = {row.label: (scores, average) for row, scores, average in letter.rows}
    assert list(rows) == ["base model", "lora", "all"]
    assert [score and score.value for score in rows["lora"][0]] == [0.7, 0.5]
    assert rows["base model"][0][1] is None and rows["base model"][1] is None
    assert rows["all"][1].value == pytest.approx(0.62) and rows["all"][1].error == pytest.approx(0.02 / math.sqrt(2))
    best = {
        label: [bool(score and score.best) for score in (*scores, average)] for label, (scores, average) in rows.items()
    }
    assert best == {"base model": [False] * 3, "lora": [True, False, False], "all": [False, True, True]}
    page = Page(report([tmp_path / "run"]))
    assert page.all("b") == ["70.0", "64.0", "62.0"]


def test_adapters_that_share_a_task_or_differ_in_settings_have_their_own_rows(tmp_path: Path) -> None:
    adapters = [adapter("a"), adapter("b"), adapter("c", task_name="obqa", lr=1e-3)]
    results = [result("a", "boolq", 0.5), result("b", "boolq", 0.6), result("c", "obqa", 0.7)]
    (table,) = standings([record.read(write_run(tmp_path / "run", adapters, results))])
    assert [row.label for row, _, _ in table.rows] == ["a", "b", "c"]


def test_seeds_are_one_row_with_their_spread(tmp_path: Path) -> None:
    adapters = [adapter(f"a{seed}", seed=seed) for seed in (1, 2, 3)] + [adapter("b", seed=1, r=4)]
    results = [result(f"a{seed}", "boolq", value) for seed, value in ((1, 0.5), (2, 0.6), (3, 0.7))]
    folder = write_run(tmp_path / "run", adapters, [*results, result("b", "boolq", 0.52, chance=0.5)])
    (table,) = standings([record.read(folder)])
    (seeds, (mean,), _), (other, (low,), _) = table.rows
    assert (seeds.adapters, seeds.detail, mean.value) == (
        ("a1", "a2", "a3"),
        "lora · r 8 · 3 seeds",
        pytest.approx(0.6),
    )
    assert mean.error == pytest.approx(0.1) and mean.best and not mean.at_chance
    assert other.label == "b" and low.error == 0.02 and low.at_chance
    page = Page(report([folder]))
    assert "of several seeds ± their standard deviation" in " ".join(page.all("caption"))
    assert "~ No better than chance by two standard errors." in page.all("p")


def test_rows_of_different_size_and_limited_ones_are_said(tmp_path: Path) -> None:
    results = [result("a", "boolq", 0.5, n=10, limit=10), result("b", "boolq", 0.6)]
    text = " ".join(Page(report([write_run(tmp_path / "run", [adapter("a"), adapter("b", r=4)], results)])).all("p"))
    assert "Scores of boolq are over different numbers of rows" in text and "Limited to the first rows" in text


def test_idle_experts_are_counted_by_run(tmp_path: Path) -> None:
    first = record.read(write_run(tmp_path / "first", [mixture("one"), mixture("two")]))
    second = record.read(write_run(tmp_path / "second", [mixture("one")]))
    note = routing_note([first], figures.Styles([first]))
    assert note.endswith("no token chose in the last profile: one (3), two (3).")
    note = routing_note([second, first], figures.Styles([second, first]))
    assert note.endswith("last profile: second: one (3), first: one (3), first: two (3).")


def test_settings_that_differ_are_apart_from_those_that_do_not(run: Path) -> None:
    settings = facts.settings([record.read(run)])
    assert dict(settings.differing.rows)["routing_strategy"] == ["lora", "mixlora"]
    assert dict(settings.differing.rows)["num_experts"] == ["", "4"]
    assert ("r", "8") in settings.common and "r" not in dict(settings.differing.rows)


def test_several_runs_stand_side_by_side(run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "second", [adapter("plain", lr=1e-3)], seed=1)
    page = Page(report([run, other]))
    assert page.all("h1") == ["first and second"] and {"first: plain", "second: plain"} <= set(page.all("th", "span"))
    styles = figures.Styles([record.read(run), record.read(other)])
    mine, other_look = styles.of("first", "plain"), styles.of("second", "plain")
    assert mine.colour == other_look.colour and mine.dash != other_look.dash
    twice = Page(report([run, run]))
    assert twice.all("h1") == [f"{run} and {run}"]


@pytest.mark.parametrize("name", ["config.json", "environment.json", "results.json", "metrics.jsonl", "router.jsonl"])
@pytest.mark.parametrize("damage", ["missing", "cut", "bytes", "list", "null", "deep", "entries"])
def test_a_damaged_file_costs_only_what_it_held(run: Path, name: str, damage: str) -> None:
    file = run / name
    whole = file.read_bytes()
    damaged = {
        "cut": whole[: len(whole) // 2 - 9],
        "bytes": bytes(range(256)),
        "list": b"[1, 2]",
        "null": b"null",
        "deep": b"[" * 100_000,
        "entries": b'[{"adapter": "plain", "task": 3}, 7]\n{"adapter": "plain", "step": "x"}\n',
    }
    file.unlink() if damage == "missing" else file.write_bytes(damaged[damage])
    read = record.read(run)
    if (name, damage) != ("router.jsonl", "missing"):  # runs without mixtures have none
        assert any(name in note for note in read.notes), read.notes
    page = Page(report([run]))
    assert "Environment" in page.all("h2")
    assert name == "results.json" or "Results" in page.all("h2")
    assert name == "metrics.jsonl" or "Training" in page.all("h2")


ODD = (None, True, -1, 0, 1e308, 1e-320, "x", "", [], {}, [1], {"a": 1}, [[]], 10**30, math.nan, math.inf)


def mangled(value: object, draw: random.Random, chance: float) -> object:
    """Return a JSON value of which parts are left out or replaced."""
    if draw.random() < chance:
        return draw.choice(ODD)
    if isinstance(value, dict):
        return {k: mangled(v, draw, chance) for k, v in value.items() if draw.random() > chance / 2}
    if isinstance(value, list):
        return [mangled(item, draw, chance) for item in value]
    return value


@pytest.mark.parametrize("chance", [0.01, 0.05, 0.2])
def test_mangled_values_never_fail_a_report(tmp_path: Path, chance: float) -> None:
    for seed in range(40):
        draw = random.Random(seed)
        folder = write_run(tmp_path / "run", [adapter("plain"), mixture("mixture")], steps=6, evaluations=(2, 4))
        for file in folder.glob("*.json*"):
            texts = file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]
            file.write_text("".join(json.dumps(mangled(json.loads(text), draw, chance)) + "\n" for text in texts))
        Page(report([folder]))


def test_the_command_loads_no_torch(run: Path) -> None:
    program = (
        f"import sys; from mlora.runs.report import write_report; write_report([{str(run)!r}], {str(run / 'a')!r})"
    )
    program += "; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_what_is_no_run_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, said in (("absent", "no such folder"), (".", "no run folder")):
        result = CliRunner().invoke(cli.program.program, ["report", folder])
        assert result.exit_code == 2 and said in result.output
    assert not list(tmp_path.iterdir())


def test_the_command_writes_over_reports_only(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        result = CliRunner().invoke(cli.program.program, ["report", "first"])
        assert result.exit_code == 0 and result.output.startswith("Wrote first/report.html"), result.output
    assert is_report(run / "report.html")
    Path("report.html").write_text("<html>mine</html>")
    result = CliRunner().invoke(cli.program.program, ["report", "first", "first"])
    assert result.exit_code == 2 and "is no report" in result.output
    assert Path("report.html").read_text() == "<html>mine</html>"
    result = CliRunner().invoke(cli.program.program, ["report", "first", "first", "--output", "both.html"])
    assert result.exit_code == 0 and Path("both.html").exists()


def test_what_a_file_says_is_text_and_never_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><b>&\"'"
    entries = [adapter("a", data=evil, prompt=evil), mixture("b", data=evil)]
    results = [result("a", evil, 0.5, metric=evil, protocol=evil), result(evil, "boolq", 0.5)]
    folder = write_run(tmp_path / "run", entries, results)
    (folder / "environment.json").write_text(json.dumps({"device": evil, "command": ["train.py", evil], "options": {}}))
    lines = [profile(evil, 3), {"adapter": evil, "step": 1, "loss": 1.0}]
    for name, line in zip(("router.jsonl", "metrics.jsonl"), lines, strict=True):
        with (folder / name).open("a") as file:
            file.write(json.dumps(line) + "\n")
    text = report([folder])
    scripts = Counter(tag for tag, _ in Page(text).tags)["script"]
    assert "alert(1)</script>" not in text and scripts == 1 + text.count('<script type="application/json">')
    assert evil in Page(text).all("dd", "td", "th", "h3", "span")


def test_a_long_run_makes_a_small_page_quickly(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [mixture(f"a{i}") for i in range(12)], steps=2_000)
    started = time.process_time()
    text = report([folder])
    assert len(text) < 2_000_000 and time.process_time() - started < 10
    assert "Training loss" in text


def test_many_mixtures_stay_below_two_megabytes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [mixture(f"a{i}") for i in range(60)], steps=40)
    layers = [{"layer": i, "path": f"model.layers.{i}.mlp", "share": [1 / 16] * 16, "entropy": 1.0} for i in range(40)]
    lines = [profile(f"a{i}", 40, layers=layers) for i in range(60)]
    (folder / "router.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert len(report([folder])) < 2_000_000


def test_charts_stay_inside_their_drawing(run: Path) -> None:
    records = [record.read(run)]
    styles = figures.Styles(records)
    charts = [*figures.training_charts(records, styles), *figures.accuracy_charts(records, styles)]
    assert len(charts) == 5
    for chart in charts:
        x, y = chart.x, chart.y
        for line in chart.lines:
            numbers = [float(n) for n in re.findall(r"[\d.]+", chart.path(line.curve, x, y))]
            assert all(0 <= n <= chart.width for n in numbers[::2]), chart.title
            assert all(0 <= n <= chart.height for n in numbers[1::2]), chart.title


def test_accuracy_ends_with_the_final_result(run: Path) -> None:
    records = [record.read(run)]
    (chart,) = figures.accuracy_charts(records, figures.Styles(records))
    (plain, _), ((base, level),) = chart.lines, chart.levels
    assert list(plain.curve) == [(10, 40), (20, 40), (30, 50)] and plain.errors == [3, 3, 2]
    assert base.label == "base model" and level == pytest.approx(70)


def test_a_value_that_is_not_finite_breaks_the_line_and_is_counted(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [adapter("a")], steps=3)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[1] |= {"loss": None, "grad_norm": None}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = [record.read(folder)]
    loss = figures.training_charts(records, figures.Styles(records))[0]
    path = loss.path(loss.lines[0].curve, loss.x, loss.y)
    assert path.count("M") == 2 and "L" not in path and "nan" not in report([folder])
    assert facts.paces(records[0])[0].skipped == 1


def test_adapters_that_take_turns_add_their_times(run: Path) -> None:
    read = record.read(run)
    assert facts.training_seconds(read) == 15
    read.config["train_lora_simultaneously_num"] = 1
    assert facts.training_seconds(read) == 30


def test_curves() -> None:
    curve = Curve()
    for step in range(1000):
        curve.add(step, math.nan if step == 7 else float(step == 500) - (step == 700))
    thin = curve.thinned(50)
    assert len(thin) <= 52 and {500, 700, 0, 999} <= set(thin.steps)
    constant = Curve()
    for step in range(9):
        constant.add(step, math.nan if step == 4 else 3.0)
    assert list(constant.smoothed(5).values) == [3.0] * 9
    again = Curve()
    for step, value in ((2, 1.0), (1, 5.0), (2, 9.0)):
        again.add(step, value)
    assert list(again.sorted()) == [(1, 5), (2, 9)]


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0, 10, ["0", "2", "4", "6", "8", "10"]),
        (0, 1, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0, 2e-4, ["0.0", "0.5", "1.0", "1.5", "2.0"]),
        (-1, 1, ["−1.0", "−0.5", "0.0", "0.5", "1.0"]),
        (0, 50_000, ["0", "10 k", "20 k", "30 k", "40 k", "50 k"]),
    ],
)
def test_ticks_are_round(low: float, high: float, texts: list[str]) -> None:
    axis = Axis("x", low, high, 0, 100)
    assert [tick.text for tick in axis.ticks] == texts
    assert all(-1e-6 <= tick.at <= 100 + 1e-6 for tick in axis.ticks)
    assert axis.title == ("x × 10⁻⁴" if high == 2e-4 else "x")


def test_rounding_noise_does_not_fill_a_chart() -> None:
    axis = spanning("x", [0.97, 0.9700001], 0, 100)
    assert axis is not None and axis.high - axis.low > 0.04
    assert spanning("x", [math.nan], 0, 100) is None


def test_numbers_read_well() -> None:
    assert [number(v) for v in (0, 2e-4, 0.0123, 1.5, 12_345, math.nan, None)] == [
        *("0", "2 × 10⁻⁴", "0.0123", "1.5", "12,345", "–", "–")
    ]
    assert [short(v) for v in (950, 15_300, 2_440_000, 7e9)] == ["950", "15.3 k", "2.44 M", "7 G"]
    assert [size(v) for v in (512, 5 * 2**20, 1.5 * 2**30)] == ["512 B", "5 MiB", "1.5 GiB"]
    assert [duration(v) for v in (1.26, 48, 725, 12_000)] == ["1.3 s", "48 s", "12 min 5 s", "3 h 20 min"]


def test_a_heat_map_is_plain_where_load_is_even() -> None:
    chart = HeatMap("load", ["0", "1"], [[0.25] * 4, [0.7, 0.1, 0.1, 0.1]])
    cells = list(chart.cells)
    assert [cell.strength for cell in cells[:4]] == [0.0] * 4
    assert (cells[4].over, cells[4].strength) == (True, 1.0) and not cells[5].over
    assert chart.even == 0.25 and chart.highest == 0.7
