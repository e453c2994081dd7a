"""Checkpoints under damage, crashes, full disks and slow ones."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mlora.model import files
from mlora.model.multi import MultiAdapterModel
from mlora.training.checkpoint import CheckpointError, Checkpoints
from mlora.training.job import Job
from mlora.training.trainer import train
from tests.families import multi
from tests.training.test_promises import CONFIGS, ROWS


def begun(names: str = "bc") -> tuple[MultiAdapterModel, list[Job]]:
    model = multi()
    for name in names:
        model.add_adapter(name, CONFIGS[name].method)
    return model, [Job(CONFIGS[name], ROWS[name], model, seed=5) for name in names]


def advance(model: MultiAdapterModel, jobs: list[Job], rounds: int, after: Callable[[], None] = lambda: None) -> None:
    """Train so many rounds, calling something after each."""
    left = rounds

    def count(_: list[Job]) -> bool:
        nonlocal left
        left -= 1
        after()
        return left == 0

    train(model, jobs, None, count)


@pytest.fixture
def two_moments(tmp_path: Path) -> tuple[Checkpoints, Path]:
    """Checkpoints after 10 and 11 rounds: c takes three rounds for a step, b one."""
    model, jobs = begun()
    checkpoints = Checkpoints(tmp_path, jobs, model)
    advance(model, jobs, 11, checkpoints.save)
    checkpoints.wait()
    steps = {name: sorted(p.name for p in (tmp_path / name).iterdir()) for name in "bc"}
    assert steps == {"b": ["step-000010", "step-000011"], "c": ["step-000003-1", "step-000003-2"]}
    return checkpoints, tmp_path


def where(checkpoints: Checkpoints) -> list[tuple[int, int]]:
    return [(job.step, job.row) for job in checkpoints.jobs]


def test_r8_every_damage_is_named_and_the_checkpoint_before_it_loads(
    two_moments: tuple[Checkpoints, Path],
    caplog: pytest.LogCaptureFixture,
    seed: int,
    record_property: Callable[[str, object], None],
) -> None:
    checkpoints, root = two_moments
    draw = random.Random(seed)
    newest = [*(root / "b" / "step-000011").iterdir(), *(root / "c" / "step-000003-2").iterdir()]
    assert len(newest) == 12
    for number in range(200):
        file = newest[number % 12]
        content = file.read_bytes()
        place = draw.randrange(len(content))
        flipped = content[place] ^ draw.randrange(1, 256)
        file.write_bytes(content[:place] if number % 2 else content[:place] + bytes([flipped]) + content[place + 1 :])
        caplog.clear()
        assert checkpoints.restore() and where(checkpoints) == [(10, 0), (3, 1)]
        assert f"{file.parent} is damaged ({file.name})" in caplog.text, f"{file} at {place}"
        file.write_bytes(content)
    assert checkpoints.restore() and where(checkpoints) == [(11, 0), (3, 2)]
    record_property("flipped bytes named", 100)
    record_property("truncations named", 100)


def test_r8_a_damaged_best_state_is_named_and_sought_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, seed: int, record_property: Callable[[str, object], None]
) -> None:
    model, jobs = begun("b")
    job, checkpoints = jobs[0], Checkpoints(tmp_path, jobs, model)
    advance(model, jobs, 3)
    job.best_loss = 2.5
    checkpoints.save_best(job)
    kept = {key: tensor.clone() for key, tensor in model.adapter_tensors("b").items()}
    advance(model, jobs, 1, checkpoints.save)
    checkpoints.wait()
    last = {key: tensor.clone() for key, tensor in model.adapter_tensors("b").items()}
    draw, files_of_best = random.Random(seed), sorted((tmp_path / "b" / "best").iterdir())
    assert len(files_of_best) == 4
    for number in range(200):
        file = files_of_best[number % 4]
        content = file.read_bytes()
        place = draw.randrange(len(content))
        flipped = bytes([content[place] ^ draw.randrange(1, 256)])
        file.write_bytes(content[:place] + (b"" if number % 2 else flipped + content[place + 1 :]))
        caplog.clear()
        assert checkpoints.restore() and job.best_loss == float("inf")
        assert f"best is damaged ({file.name})" in caplog.text, f"{file} at {place}"
        checkpoints.restore_best(job)
        assert all(torch.equal(tensor, last[key]) for key, tensor in model.adapter_tensors("b").items())
        file.write_bytes(content)
    assert checkpoints.restore() and job.best_loss == 2.5
    checkpoints.restore_best(job)
    assert all(torch.equal(tensor, kept[key]) for key, tensor in model.adapter_tensors("b").items())
    shutil.rmtree(tmp_path / "b" / "best")
    assert checkpoints.restore() and job.best_loss == float("inf")
    record_property("flipped bytes named", 100)
    record_property("truncations named", 100)


def test_files_that_are_missing_or_foreign_are_named(
    two_moments: tuple[Checkpoints, Path], caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints, root = two_moments
    newest = root / "b" / "step-000011"
    for file in newest.iterdir():
        content = file.read_bytes()
        file.unlink()
        caplog.clear()
        assert checkpoints.restore() and where(checkpoints) == [(10, 0), (3, 1)]
        assert f"({file.name})" in caplog.text
        file.write_bytes(content)
    (newest / "extra.pt").write_bytes(b"")
    assert checkpoints.restore() and "(extra.pt)" in caplog.text


def test_what_was_passed_over_stays_until_the_next_checkpoint(two_moments: tuple[Checkpoints, Path]) -> None:
    checkpoints, root = two_moments
    (root / "b" / "step-000011" / "state.json").write_text("{}")
    again = Checkpoints(root, checkpoints.jobs, checkpoints.model)
    assert again.restore()
    assert (root / "b" / "step-000011").exists(), "a disk that cannot be read today may be read tomorrow"
    advance(again.model, checkpoints.jobs, 2)
    again.save()
    again.wait()
    steps = {name: sorted(p.name for p in (root / name).iterdir()) for name in "bc"}
    assert steps == {"b": ["step-000010", "step-000012"], "c": ["step-000003-1", "step-000004"]}


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_so_many_moments_are_kept(tmp_path: Path, keep: int) -> None:
    model, jobs = begun("b")
    checkpoints = Checkpoints(tmp_path, jobs, model, keep)
    advance(model, jobs, 5, checkpoints.save)
    checkpoints.wait()
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [f"step-00000{i}" for i in range(6 - keep, 6)]


def test_a_checkpoint_is_of_the_step_at_which_it_was_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on while it is written, and does not reach into it."""
    model, jobs = begun()
    checkpoints, go_on = Checkpoints(tmp_path, jobs, model), threading.Event()
    own = files.write

    def slow(*arguments: object, **settings: object) -> None:
        assert go_on.wait(60)
        own(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(files, "write", slow)
    advance(model, jobs, 5)
    before = {name: {k: t.clone() for k, t in model.adapter_tensors(name).items()} for name in "bc"}
    moments = {i: s["exp_avg"].clone() for i, s in jobs[0].optimizer.state_dict()["state"].items()}
    checkpoints.save()
    advance(model, jobs, 4)
    assert not list((tmp_path / "b").glob("step-*")), "nothing was written yet"
    go_on.set()
    checkpoints.wait()
    assert any(not torch.equal(t, before["b"][k]) for k, t in model.adapter_tensors("b").items())
    assert checkpoints.restore() and where(checkpoints) == [(5, 0), (1, 2)]
    for name in "bc":
        assert all(torch.equal(t, before[name][k]) for k, t in model.adapter_tensors(name).items())
    restored = jobs[0].optimizer.state_dict()["state"]
    assert all(torch.equal(moment, restored[i]["exp_avg"]) for i, moment in moments.items())


def test_r9_a_full_disk_is_said_and_loses_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, jobs = begun()
    checkpoints = Checkpoints(tmp_path, jobs, model)
    advance(model, jobs, 5)
    checkpoints.save()
    checkpoints.wait()
    good = sorted(p for p in tmp_path.rglob("*") if p.is_file())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("mlora.training.checkpoint.save_file", full)
        advance(model, jobs, 1)
        checkpoints.save()
        with pytest.raises(CheckpointError, match="No space left on device.*--resume"):
            checkpoints.wait()
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == good
    assert checkpoints.restore() and where(checkpoints) == [(5, 0), (1, 2)]


def saving_forever(root: Path, ready: Callable[[], None]) -> None:
    """Resume, and save after every round; ready once a checkpoint has begun that is not the first."""
    model, jobs = begun()
    checkpoints = Checkpoints(root, jobs, model)
    checkpoints.restore()

    def save() -> None:
        checkpoints.save()
        ready()

    advance(model, jobs, 10**6, save)


def ended(work: Callable[[Callable[[], None]], None], seconds: float | None = None) -> int:
    """Do work in a child process, kill it so many seconds after it says it is ready, and return how it ended."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        work(lambda: os.write(writer, b"ready"))  # type: ignore[arg-type,return-value]
        os._exit(0)
    if seconds is not None:
        for _ in range(2):
            os.read(reader, 5)
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    os.close(writer)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.slow
def test_r7_killed_while_saving_at_random(
    tmp_path: Path, kills: int, seed: int, record_property: Callable[[str, object], None]
) -> None:
    draw = random.Random(seed)
    model, jobs = begun()
    killed = last = furthest = 0
    while killed < kills:
        status = ended(lambda ready: saving_forever(tmp_path, ready), draw.uniform(0, 0.3))
        killed += status != 0
        checkpoints = Checkpoints(tmp_path, jobs, model)
        assert checkpoints.restore(), f"kill {killed}: nothing to go on from"
        assert not checkpoints.damaged, f"kill {killed}: {checkpoints.damaged}"
        assert not list(tmp_path.glob("*/.*")), "a temporary folder was left"
        moment = sum(job.micro_batches for job in jobs)
        assert moment >= last, f"kill {killed}: a complete checkpoint was lost"
        last, furthest = moment, max(moment, furthest)
        if status == 0 or jobs[0].done:  # trained to the end: once more from nothing
            for name in "bc":
                shutil.rmtree(tmp_path / name)
            last = 0
    assert furthest > 10
    record_property("random kills", killed)


def test_r7_killed_before_every_call_to_the_file_system(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """Each open, rename, mkdir and removal of a save is the last thing that the program did."""
    model, jobs = begun()
    first = Checkpoints(tmp_path, jobs, model, keep=1)
    advance(model, jobs, 4)
    first.save()
    first.wait()
    advance(model, jobs, 1)
    watched = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}
    outcomes = []
    for deadly in range(1, 10**6):
        copy = tmp_path.parent / f"{tmp_path.name}-{deadly}"
        shutil.copytree(tmp_path, copy)

        def save(_: Callable[[], None]) -> None:
            calls = 0

            def count(event: str, arguments: tuple) -> None:
                nonlocal calls
                if event in watched and str(copy) in str(arguments[0]):  # noqa: B023
                    calls += 1
                    if calls == deadly:  # noqa: B023
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            second = Checkpoints(copy, jobs, model, keep=1)  # noqa: B023
            second.save()
            second.wait()

        status = ended(save)
        there = begun()
        restored = Checkpoints(copy, there[1], there[0])
        assert restored.restore(), f"killed at call {deadly}: nothing to go on from"
        assert not restored.damaged, f"killed at call {deadly}: {restored.damaged}"
        outcomes.append(where(restored))
        assert not list(copy.glob("*/.*"))
        if status == 0:
            break
    assert len(outcomes) > 30, "the save made no calls"
    assert outcomes[0] == [(4, 0), (1, 1)] and outcomes[-1] == [(5, 0), (1, 2)]
    record_property("kills at calls of a save", len(outcomes) - 1)
    assert outcomes == sorted(outcomes), "once complete, a checkpoint is the one that loads"


def test_resuming_says_what_a_file_that_was_never_whole_left(tmp_path: Path) -> None:
    model, jobs = begun()
    (tmp_path / "b" / ".step-000004.0a1b2c3d").mkdir(parents=True)
    (tmp_path / "b" / ".best.0a1b2c3d").mkdir()
    assert not Checkpoints(tmp_path, jobs, model).restore()
    assert not list((tmp_path / "b").iterdir())


def test_a_damaged_manifest_that_still_is_json_is_damaged(two_moments: tuple[Checkpoints, Path]) -> None:
    checkpoints, root = two_moments
    manifest = root / "b" / "step-000011" / "manifest.json"
    content = json.loads(manifest.read_text())
    for other in ([], {}, {"files": {}}, {"files": None}, content | {"sha256": "0"}, 5, content["files"]):
        manifest.write_text(json.dumps(other))
        assert checkpoints.restore() and where(checkpoints) == [(10, 0), (3, 1)]
    manifest.write_text(manifest.read_text() + "\n")
    assert checkpoints.restore() and where(checkpoints) == [(10, 0), (3, 1)]
