"""`launch.py reproduce`: the whole grid, in passes, stopped and killed anywhere, and its table."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import pytest

from mlora.config import load_config
from mlora.report.paper import AVERAGES, SINGLE_TASK, TASKS, paper_rows
from mlora.runs.program import finish
from mlora.runs.reproduce import Reproduction
from tests import tinybase
from tests.test_evaluate import write_data

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinybase.save(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path / "data", count=16)
    return tmp_path


def grid(base: Path, **flags: object) -> Reproduction:
    small = {"tasks": "boolq,piqa", "methods": "lora,mixdora", "seeds": "1,2", "scale": "small", "num_epochs": 1}
    return Reproduction(str(base), **small | {"data_path": "data", "cutoff_len": 256} | flags)


def run(base: Path, **flags: object) -> int:
    asked = grid(base, **flags)
    return finish(asked.run, asked)


def test_the_whole_grid_and_its_table(base: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, at_once=5, train_limit=16, test_limit=10) == 0
    shown = capsys.readouterr().out
    assert "8 adapters in 2 passes of at most 4" in shown
    first = json.loads(Path("runs/reproduce/pass-01/config.json").read_text())
    assert first["train_lora_simultaneously_num"] == 4 == len({job["name"] for job in first["lora"]})
    assert len({job["task_name"] for job in first["lora"]}) == 1
    results = json.loads(Path("runs/reproduce/results.json").read_text())
    assert all(r["n"] == 10 for r in results)
    values = {(r["adapter"], r["task"]): r["value"] for r in results}
    assert len(values) == 8 + 2
    table = Path("runs/reproduce/table.txt").read_text()
    assert table.strip() in shown
    assert max(map(len, table.splitlines())) <= 80
    rows = {line.split()[0]: line for line in table.splitlines() if line and "(paper)" not in line}
    for method, label in (("lora", "LoRA"), ("mixdora", "MixDoRA")):
        for task in ("boolq", "piqa"):
            seeds = [values[f"{method}_{task}_s{seed}", task] for seed in (1, 2)]
            assert f"{100 * mean(seeds):.1f} ± {100 * stdev(seeds):.1f}" in rows[label]
    words = " ".join(table.split())
    assert all(said in words for said in ("62.2", "(paper)", "another base model", "tokens/s"))
    written = {p: p.stat().st_mtime_ns for p in here.rglob("adapter_model.safetensors")}
    assert run(base, at_once=5, train_limit=16, test_limit=10) == 0
    assert {p: p.stat().st_mtime_ns for p in here.rglob("adapter_model.safetensors")} == written
    assert run(base, at_once=5, train_limit=15, test_limit=10) == 2
    assert "other settings" in capsys.readouterr().err


@pytest.mark.parametrize(("limit", "said"), [(30, None), (16, 16), (5, 5)])
def test_a_limit_that_takes_away_no_row_limits_nothing(base: Path, here: Path, limit: int, said: int | None) -> None:
    assert run(base, tasks="piqa", methods="lora", seeds="1", train_limit=limit) == 0
    results = json.loads(Path("runs/reproduce/results.json").read_text())
    assert {(r["n"], r["limit"]) for r in results} == {(min(limit, 16), said)}
    words = " ".join(Path("runs/reproduce/table.txt").read_text().split())
    assert (f"{limit} of test" in words) == (said is not None)


def test_slices_and_a_kill_end_where_one_piece_ends(base: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"multi_task": True, "tasks": "boolq,piqa", "num_epochs": 3, "batch_size": 8}
    started = time.monotonic()
    assert run(base, dir="straight", **flags) == 0
    slice_minutes = 0.5 * (time.monotonic() - started) / 60
    slices = 0
    while not Path("sliced/table.txt").exists():
        assert run(base, dir="sliced", time_limit=slice_minutes, **flags) == 0
        slices += 1
        assert slices < 20
    assert "go on with the same command" in capsys.readouterr().out
    command = [sys.executable, str(ROOT / "launch.py"), "reproduce", "--base_model", str(base), "--dir", "killed"]
    command += ["--tasks", "boolq,piqa", "--methods", "lora,mixdora", "--seeds", "1,2", "--scale", "small"]
    command += ["--data_path", "data", "--cutoff_len", "256", "--multi_task", "--num_epochs", "3", "--batch_size", "8"]
    child = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    metrics, deadline = here / "killed/pass-01/metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 8):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert run(base, dir="killed", **flags) == 0
    straight = here / "straight/pass-01/adapters"
    for other in ("sliced", "killed"):
        for folder in straight.iterdir():
            again = here / other / "pass-01/adapters" / folder.name / "adapter_model.safetensors"
            assert again.read_bytes() == (folder / "adapter_model.safetensors").read_bytes(), (other, folder.name)
    results = [json.loads((here / d / "results.json").read_text()) for d in ("straight", "sliced", "killed")]
    named = [sorted((r["adapter"], r["task"], r["value"]) for r in found) for found in results]
    assert named[0] == named[1] == named[2] and len(named[0]) == 4 * 2 + 2


def test_adapters_of_one_task_train_together(base: Path, here: Path) -> None:
    """Beside rows of another length a step could not be recorded; nor do passes part such adapters."""
    assert run(base, at_once=8, batch_size=8) == 0
    steps = [json.loads(line) for line in Path("runs/reproduce/pass-01/metrics.jsonl").read_text().splitlines()]
    assert [step["adapter"].split("_")[1] for step in steps] == ["boolq"] * 8 + ["piqa"] * 8


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"tasks": "boolk"}, "boolq"),
        ({"methods": "lorra"}, 'did you mean "lora"'),
        ({"protocols": "letters"}, "letters"),
        ({"seeds": "one"}, "seed"),
        ({"seeds": ","}, "--seeds"),
        ({"batch_size": 8, "micro_batch_size": 3}, "micro_batch_size"),
        ({"data_path": "nowhere"}, "nowhere"),
        ({"base_model": "./none"}, "./none"),
    ],
)
def test_bad_input_is_exit_2(
    base: Path, here: Path, capsys: pytest.CaptureFixture[str], flags: dict, said: str
) -> None:
    flags = {"base_model": str(base)} | flags
    assert run(flags.pop("base_model"), **flags) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and error.count("\n") <= 15


@pytest.mark.parametrize(
    ("file", "flags"),
    [
        ("paper-single-task", {"tasks": ",".join(TASKS)}),
        ("paper-multi-task", {"tasks": "arc-c,arc-e,boolq,obqa,piqa", "multi_task": True}),
    ],
)
def test_the_ready_configs_are_what_is_reproduced(base: Path, file: str, flags: dict) -> None:
    own = Reproduction(str(base), seeds="42", **flags).jobs()
    ready = load_config(str(ROOT / "configs" / f"{file}.json"))
    given = {"name", "data", "seed", "limit", "eval_limit", "protocol"}
    expected, found = (
        [job.model_copy(update=dict.fromkeys(given)).model_dump() for job in jobs.lora] for jobs in (own, ready)
    )
    assert found == expected and ready.cutoff_len == own.cutoff_len == 512
    methods = {job.name.rpartition("_")[2]: job.method for job in ready.lora}
    assert [(m.r, m.lora_alpha, m.use_dora) for m in methods.values()] == [
        (80, 160, False), (80, 160, True), (16, 32, False), (16, 32, True)
    ]  # fmt: skip
    assert all((methods[name].num_experts, methods[name].top_k) == (8, 2) for name in ("mixlora", "mixdora"))
    assert {(job.lr, job.batch_size, job.num_epochs) for job in ready.lora} == {(2e-4, 16, 2)}


@pytest.mark.parametrize("file", sorted(file.name for file in (ROOT / "configs").iterdir()))
def test_every_ready_config_loads(file: str) -> None:
    assert load_config(str(ROOT / "configs" / file)).lora


def test_the_published_averages_are_those_of_the_published_figures() -> None:
    for method, values in SINGLE_TASK.items():
        assert mean(values) == pytest.approx(AVERAGES[method], abs=0.06)
    assert [row[-1] for row in paper_rows(TASKS)] == ["71.8", "75.3", "77.6", "78.2"]
    assert paper_rows(["glue:sst2"]) == [] and paper_rows(["boolq"])[0] == ["LoRA (paper)", "2.9%", "62.2"]


@pytest.mark.parametrize("flag", ["seeds", "protocols", "tasks", "methods"])
def test_a_flag_is_told_once_and_by_name(base: Path, here: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert run(base, **{flag: "foo"}) == 2
    said = capsys.readouterr().err
    assert said.startswith(f'Error: --{flag}: "foo" is ') and said.count("foo") == 1
