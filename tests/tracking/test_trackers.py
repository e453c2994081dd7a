"""Trackers hold what metrics.jsonl holds, read back by their own readers, and none can fail a run."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import socket
import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mlora.config import RunOptions
from mlora.runs.program import main
from mlora.tracking import PACKAGES, Trackers, problem
from mlora.wording import install
from tests import tinybase

CONFIG = {"cutoff_len": 64, "lora": [{"name": "a", "lr": 2e-4, "r": 8}, {"name": "b", "lr": 1e-3, "r": 4}]}
VARIABLES = ("WANDB_MODE", "WANDB_ERROR_REPORTING", "WANDB_PROJECT", "WANDB_DIR", "TRACKIO_DIR", "TRACKIO_PROJECT")
VARIABLES += ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_DISABLE_TELEMETRY", "GRADIO_ANALYTICS_ENABLED")


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "")  # so that what a tracker sets is taken back after the test
        monkeypatch.delenv(name)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Addresses off this machine that were asked for."""
    asked: list[object] = []
    connect = socket.socket.connect

    def watched(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            asked.append(address)
            raise OSError("no network in tests")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    return asked


def track(name: str, folder: Path) -> None:
    """Send two adapters' measurements to a tracker."""
    if importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"needs the package {PACKAGES[name]}")
    trackers = Trackers.opened([name], folder, "first", CONFIG)
    assert trackers._trackers, "it was dropped when it was opened"
    for step in (1, 2, 3):
        trackers.log("a", step, {"loss": 1 / step, "lr": 2e-4, "grad_norm": math.nan, "num_tokens": 100})
    trackers.log("b", 1, {"loss": 5.0})
    trackers.log("a", None, {"letter/boolq/accuracy": 0.75})
    assert trackers._trackers, "it was dropped"
    trackers.close()


def test_tensorboard(tmp_path: Path, no_network: list[object]) -> None:
    track("tensorboard", tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tmp_path / "tensorboard" / "a"))
    read.Reload()
    assert set(read.Tags()["scalars"]) == {"loss", "lr", "num_tokens", "letter/boolq/accuracy"}
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(s, pytest.approx(1 / s)) for s in (1, 2, 3)]
    assert [(e.step, e.value) for e in read.Scalars("letter/boolq/accuracy")] == [(3, 0.75)]
    assert b'"cutoff_len": 64' in read.Tensors("config/text_summary")[0].tensor_proto.string_val[0]
    assert (tmp_path / "tensorboard" / "b").is_dir() and not no_network


def test_tensorboard_forgets_steps_that_are_done_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, loss in ((1, 4, 1.0), (3, 6, 2.0)):
        trackers = Trackers.opened(["tensorboard"], tmp_path, "first", CONFIG)
        for step in range(first, last + 1):
            trackers.log("a", step, {"loss": loss})
        trackers.close()
    read = EventAccumulator(str(tmp_path / "tensorboard" / "a"))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("loss")] == [(1, 1), (2, 1), (3, 2), (4, 2), (5, 2), (6, 2)]


def leveldb_records(log: bytes) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format: blocks of 32 KiB; checksum, length, and which part it is.

    Source: https://github.com/google/leveldb/blob/main/doc/log_format.md; wandb puts seven bytes before it.
    """
    whole, at = b"", 0
    while at + 7 <= len(log):
        left = 32_768 - (at + 7) % 32_768
        if left < 7:
            at += left
            continue
        length, part = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        if at + 7 + length > len(log):  # still being written
            return
        whole += log[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # a whole record, or the last part of one
            yield whole
            whole = b""


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, no_network: list[object]) -> None:
    track("wandb", tmp_path)
    from wandb.proto import wandb_internal_pb2

    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    history, config = [], {}
    deadline = time.monotonic() + 30
    kinds: list[str] = []
    while "exit" not in kinds and time.monotonic() < deadline:  # the last; a process of wandb's own writes them
        records = [wandb_internal_pb2.Record.FromString(data) for data in leveldb_records(file.read_bytes()[7:])]
        kinds = [record.WhichOneof("record_type") for record in records]
        time.sleep(0.1)
    assert "exit" in kinds and "history" in kinds, kinds
    for record in records:
        if record.HasField("history"):
            items = record.history.item
            history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        if record.HasField("run"):
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            assert (record.run.project, record.run.display_name) == ("mlora", "first")
    assert [(h["a/step"], h["a/loss"]) for h in history if "a/loss" in h] == [(1, 1), (2, 0.5), (3, 1 / 3)]
    assert [(h["b/step"], h["b/loss"]) for h in history if "b/loss" in h] == [(1, 5.0)]
    assert [(h["a/step"], h["a/letter/boolq/accuracy"]) for h in history if "a/letter/boolq/accuracy" in h] == [
        (3, 0.75)
    ]
    assert config["cutoff_len"] == 64 and not no_network


@pytest.mark.slow
def test_trackio_in_the_run_folder(tmp_path: Path, no_network: list[object]) -> None:
    track("trackio", tmp_path)
    with sqlite3.connect(tmp_path / "trackio" / "mlora.db") as database:
        rows = [(step, json.loads(values)) for step, values in database.execute("SELECT step, metrics FROM metrics")]
    losses = sorted((step, values["a/loss"]) for step, values in rows if "a/loss" in values)
    assert losses == [(1, 1), (2, 0.5), (3, pytest.approx(1 / 3))] and not no_network


@pytest.mark.slow
def test_mlflow_in_the_run_folder(tmp_path: Path, no_network: list[object]) -> None:
    pytest.importorskip("sqlalchemy", reason="needs the package sqlalchemy")
    track("mlflow", tmp_path)
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("mlora")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "a/loss")
    assert [(m.step, m.value) for m in history] == [(1, 1), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert run.data.metrics["a/letter/boolq/accuracy"] == 0.75 and run.data.metrics["b/loss"] == 5.0
    assert run.data.params["cutoff_len"] == "64" and run.data.params["lora.b.lr"] == "0.001"
    assert run.info.run_name == "first" and run.info.status == "FINISHED" and not no_network


class Failing:
    """A tracker that fails where it is told to."""

    def __init__(self, at: str) -> None:
        self.at, self.calls = at, 0

    def log(self, adapter: str, step: int, values: Mapping[str, float]) -> None:
        self.calls += 1
        if self.at == "log":
            raise RuntimeError("the server\nis gone")

    def close(self) -> None:
        self.calls += 1
        if self.at == "close":
            raise OSError("disk full")


@pytest.mark.parametrize("at", ["log", "close"])
def test_one_that_fails_is_dropped_with_one_warning(at: str, caplog: pytest.LogCaptureFixture) -> None:
    bad, good = Failing(at), Failing("never")
    trackers = Trackers({"bad": bad, "good": good})
    with caplog.at_level(logging.WARNING, "mlora"):
        for step in range(4):
            trackers.log("a", step, {"loss": 1.0})
        trackers.close()
    assert good.calls == 5 and bad.calls == (1 if at == "log" else 5)
    (warning,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert warning.startswith("tracker bad is off from here on") and "\n" not in warning


def test_one_that_cannot_be_opened_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = ModuleType("mlora.tracking.wandb")
    monkeypatch.setitem(sys.modules, "mlora.tracking.wandb", broken)
    with caplog.at_level(logging.WARNING, "mlora"):
        trackers = Trackers.opened(["wandb"], tmp_path, "first", CONFIG)
    trackers.log("a", 1, {"loss": 1.0})
    assert "tracker wandb is off" in caplog.text


def test_what_cannot_be_used_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert problem([]) is None
    assert "'tensorbord' is no tracker; expected tensorboard, wandb" in str(problem(["tensorbord"]))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert problem(["wandb"]) == f"wandb is not installed: {install('wandb')}"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    tinybase.save(tmp_path / "base")
    rows = [{"instruction": f"say {i}", "input": "", "output": str(i)} for i in range(12)]
    Path("rows.json").write_text(json.dumps(rows))
    entry = {"name": "a", "data": "rows.json", "r": 4, "lora_alpha": 8, "batch_size": 4, "num_epochs": 1}
    Path("mlora.json").write_text(json.dumps({"cutoff_len": 128, "lora": [entry]}))
    yield tmp_path


def test_a_run_sends_its_metrics(here: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(RunOptions("base", dir="out", tracker="tensorboard")) == 0
    read = EventAccumulator("out/tensorboard/a")
    read.Reload()
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    for key in ("loss", "lr", "grad_norm", "num_tokens", "max_memory_bytes"):
        assert [e.value for e in read.Scalars(key)] == pytest.approx([line[key] for line in lines], rel=1e-6), key


def test_a_tracker_that_fails_never_loses_a_run(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = ModuleType("mlora.tracking.tensorboard")
    broken.open_tracker = lambda folder, run, config: Failing("log")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlora.tracking.tensorboard", broken)
    assert main(RunOptions("base", dir="out", tracker="tensorboard")) == 0
    assert len(Path("out/metrics.jsonl").read_text().splitlines()) == 3
    assert capsys.readouterr().err.count("tracker tensorboard is off") == 1


def test_an_unknown_tracker_is_bad_input(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(RunOptions("base", dir="out", tracker="tensorboard,mlfow")) == 2
    assert "--tracker: 'mlfow' is no tracker" in capsys.readouterr().err and not Path("out/adapters").exists()
