"""Runs that are killed, told to stop, or run out of disk: nothing is lost, and resuming ends in the same bits."""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlora.config import RunOptions
from mlora.runs.folder import alone
from mlora.runs.program import main
from mlora.training.checkpoint import damage
from tests.test_program import MIXTURE, ROOT, adapter, base, here, launch, losses, write_config  # noqa: F401

ADAPTERS = [
    adapter("a", num_epochs=4, evaluate_steps=5, val_set_size=6),
    adapter("b", num_epochs=3, batch_size=6, micro_batch_size=3, **MIXTURE),
    adapter("c", num_epochs=2, batch_size=12, micro_batch_size=2, lora_dropout=0.2, val_set_size=6),
]


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that a run leaves, without the times at which it did."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((folder / "results.json").read_text())
    for entry in [*lines, *results]:
        for key in ("seconds", "date", "max_memory_bytes"):
            entry.pop(key, None)
    by_adapter = {name: [line for line in lines if line["adapter"] == name] for name in "abc"}
    weights = {p.parent.name: p.read_bytes() for p in folder.glob("adapters/*/adapter_model.safetensors")}
    return {"metrics": by_adapter, "results": results, "weights": weights}


@pytest.fixture(scope="module")
def straight(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:  # noqa: F811
    """What the uninterrupted run leaves."""
    place = tmp_path_factory.mktemp("straight")
    with pytest.MonkeyPatch.context() as patch:
        here.__wrapped__(place, patch)  # type: ignore[attr-defined]
        write_config(*ADAPTERS, save_step=2)
        assert main(RunOptions(str(base), dir="out")) == 0
        return outcome(place / "out")


PHASES = {
    "loading": ("mlora.model.multi.MultiAdapterModel.from_pretrained", 1),
    "step": ("mlora.training.job.Job.share", 12),
    "backward": ("torch.Tensor.backward", 7),
    "save": ("mlora.training.checkpoint.save_file", 5),
    "held-out loss": ("mlora.training.heldout.HeldOut.loss", 1),
    "evaluation while training": ("mlora.model.multi.MultiAdapterModel.score", 2),
    "best state": ("mlora.training.checkpoint.Checkpoints.save_best", 1),
    "last evaluation": ("mlora.runs.assess.examine", 1),
}


@contextmanager
def signal_at(place: str, call: int, number: int = signal.SIGTERM) -> Iterator[list[float]]:
    """Send this process a signal in the middle of so many calls of a function; yields when that was."""
    module, names = place, []
    while True:
        with suppress(ImportError):
            owner: Any = importlib.import_module(module)
            break
        module, _, name = module.rpartition(".")
        names.insert(0, name)
    for name in names[:-1]:
        owner = getattr(owner, name)
    own, sent, calls = getattr(owner, names[-1]), list[float](), 0

    def told(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            sent.append(time.monotonic())
            os.kill(os.getpid(), number)
        return own(*arguments, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, names[-1], told)
        yield sent


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_r10_told_to_stop_in_the_middle(
    here: Path,
    base: Path,  # noqa: F811
    straight: dict[str, Any],
    phase: str,
    number: int,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    write_config(*ADAPTERS, save_step=2)
    with signal_at(*PHASES[phase], number) as sent:
        assert main(RunOptions(str(base), dir="out")) == 130
        taken = time.monotonic() - sent[0]
    record_property("seconds to the end at most", taken)
    assert taken < 5, f"{taken:.1f} s"
    assert "Traceback" not in capsys.readouterr().err
    assert main(RunOptions(str(base), dir="out", resume=True)) == 0
    assert outcome(here / "out") == straight


def test_r10_a_signal_breaks_an_evaluation_off(
    here: Path,
    base: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is not computed to its end first: with many rows that would take longer than a user waits."""
    from mlora.model.multi import MultiAdapterModel

    calls = []
    own = MultiAdapterModel.score
    monkeypatch.setattr(MultiAdapterModel, "score", lambda *a: calls.append(1) or own(*a))
    write_config(adapter("a", num_epochs=4, evaluate_steps=3, evaluate_batch_size=1, val_set_size=6))
    with signal_at("mlora.runs.session.examine", 1):
        assert main(RunOptions(str(base), dir="out")) == 130
    assert not calls


def test_r8_a_damaged_best_state_is_said_when_resuming(
    here: Path,
    base: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_config(adapter("a", num_epochs=6, evaluate_steps=2, val_set_size=6))
    with signal_at("mlora.training.job.Job.share", 9):
        assert main(RunOptions(str(base), dir="out")) == 130
    file = here / "out/checkpoints/a/best/adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    capsys.readouterr()
    assert main(RunOptions(str(base), dir="out", resume=True)) == 0
    assert "best is damaged (adapter_model.safetensors)" in capsys.readouterr().err
    assert not damage(file.parent), "the best state from there on is kept"


def test_two_runs_do_not_write_to_one_folder(
    here: Path,
    base: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("mlora.runs.folder.ENDING", 0.2)
    write_config(adapter("a", num_epochs=1))
    with alone("out"):
        for settings in ({}, {"resume": True}, {"overwrite": True}):
            assert main(RunOptions(str(base), dir="out", **settings)) == 2
            assert "out: another run writes here" in capsys.readouterr().err
        assert [p.name for p in Path("out").iterdir()] == ["log.txt"]
        assert main(RunOptions(str(base), dir="out", dry_run=True)) == 0
        assert main(RunOptions(str(base), dir="elsewhere")) == 0
    assert main(RunOptions(str(base), dir="out")) == 0
    assert not list(Path("out").glob("**/.*"))


def test_two_runs_started_at_once_leave_one(here: Path, base: Path) -> None:  # noqa: F811
    write_config(adapter("a"))
    children = [Forked(RunOptions(str(base), dir="out")) for _ in range(2)]
    statuses = []
    for child in children:
        while (status := child.poll()) is None:
            time.sleep(0.01)
        statuses.append(status)
    assert sorted(statuses) == [0, 2], Path("shown.txt").read_text()
    assert len(losses(here / "out")["a"]) == 6


SPOILT = b'5\n[]\nnull\n{}\n{"a": 1}\n{"adapter": "a", "step": "x"}\n\xff\xfe\n{"adapter": "a", "st'


@pytest.mark.parametrize("file", ["metrics.jsonl", "router.jsonl"])
def test_lines_that_a_crash_or_a_disk_has_spoilt_stop_nothing(
    here: Path,
    base: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    file: str,
) -> None:
    write_config(adapter("a", num_epochs=4, **MIXTURE), save_step=2)
    with signal_at("mlora.training.job.Job.share", 9):
        assert main(RunOptions(str(base), dir="out")) == 130
    shutil.copytree("out", "stopped")
    assert main(RunOptions(str(base), dir="out", resume=True)) == 0
    whole = (here / "out" / file).read_text()
    for way in ("resume", "evaluate", "overwrite"):
        shutil.copytree("stopped" if way == "resume" else "out", way)
        with (here / way / file).open("ab") as lines:
            lines.write(SPOILT)
        assert main(RunOptions(str(base), dir=way, **{way: True})) == 0, (way, capsys.readouterr().err)
        if way == "resume" and file == "router.jsonl":
            assert (here / way / file).read_text() == whole


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=["SIGHUP", "SIGINT"])
def test_r10_what_was_turned_off_stops_nothing(here: Path, base: Path, number: int) -> None:  # noqa: F811
    """A run under nohup outlives its terminal."""
    write_config(adapter("a", num_epochs=1))
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with signal_at("mlora.training.job.Job.share", 1, number) as sent:
            assert main(RunOptions(str(base), dir="out")) == 0 and sent
        assert signal.getsignal(number) is signal.SIG_IGN
        child = "import signal; print(signal.getsignal({0}).name, flush=True)"
        program = f"""
import signal, sys
from mlora.cli.start import wait
signal.signal({number}, signal.SIG_IGN)
sys.exit(wait([sys.executable, "-c", {child.format(int(number))!r}], {{}}))
"""
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        assert done.stdout == "SIG_IGN\n"
    finally:
        signal.signal(number, before)


def test_r10_told_twice_it_ends_at_once(here: Path, base: Path) -> None:  # noqa: F811
    """Even where a checkpoint is being written, on a disk that takes for ever."""
    write_config(adapter("a", num_epochs=50), save_step=1)
    program = f"""
import sys, time
from mlora.model import files
from mlora.training import checkpoint
from mlora.config import RunOptions
from mlora.runs.program import main
checkpoint.save_file = lambda *a: (print("saving", flush=True), time.sleep(60))
sys.exit(main(RunOptions({str(base)!r}, dir="out")))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("saving"):
            break
    child.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert child.poll() is None, "the first signal waits for the checkpoint"
    child.send_signal(signal.SIGINT)
    _, error = child.communicate(timeout=10)
    assert child.returncode == 130 and "Traceback" not in error, error


class Forked:
    """The training program in a process made from this one, which has everything loaded already."""

    def __init__(self, options: RunOptions) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            for stream in (1, 2):
                os.dup2(os.open("shown.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            os._exit(main(options))
        self.status: int | None = None

    def poll(self) -> int | None:
        if self.status is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if done else None
        return self.status

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == -signal.SIGKILL


class Launched:
    """The real command, of which the training program is a child."""

    def __init__(self, options: RunOptions) -> None:
        command = [
            sys.executable,
            str(ROOT / "launch.py"),
            "run",
            *options.arguments(),
            f"--base_model={options.base_model}",
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open("shown.txt", "a") as shown:
            self.process = subprocess.Popen(command, env=environment, stdout=shown, stderr=shown)
        self.poll = self.process.poll

    def kill(self) -> None:
        own = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        while not (programs := own.read_text().split()):
            time.sleep(0.01)
        for program in programs:
            os.kill(int(program), signal.SIGKILL)
        assert self.process.wait(60) == 128 + signal.SIGKILL


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the training program through /proc")
@pytest.mark.parametrize(("program", "share"), [(Forked, 1), (Launched, 5)])
def test_r2_killed_at_random_and_resumed_ends_in_the_same_bits(
    here: Path,
    base: Path,  # noqa: F811
    kills: int,
    seed: int,
    program: type[Forked | Launched],
    share: int,
    record_property: Callable[[str, object], None],
) -> None:
    """One kill in ten while it still loads, the others while it trains and saves."""
    draw, kills = random.Random(seed), max(kills // share, 1)
    entries = [entry | {"num_epochs": 6 + kills, "evaluate_steps": None} for entry in ADAPTERS]
    write_config(*entries, save_step=1)
    assert main(RunOptions(str(base), dir="straight")) == 0
    expected = outcome(here / "straight")
    metrics = here / "broken" / "metrics.jsonl"
    reached = []

    def lines() -> int:
        return metrics.read_text().count("\n") if metrics.exists() else 0

    for number in range(kills):
        child = program(RunOptions(str(base), dir="broken", resume=metrics.exists()))
        if number % 10 == 9:
            time.sleep(draw.uniform(0, 1))
        else:
            begun, wanted = lines(), draw.randint(1, 7)
            while (now := lines()) < begun + wanted:
                begun = min(begun, now)  # steps after the last checkpoint are taken again
                assert child.poll() is None, Path("shown.txt").read_text()
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.03))
        child.kill()
        reached.append(lines())
    assert main(RunOptions(str(base), dir="broken", resume=True)) == 0
    found = outcome(here / "broken")
    assert found["weights"].keys() == {"a", "b", "c"} and found == expected
    assert not list((here / "broken").glob("**/.*")), "a temporary file was left"
    record_property("kills resumed to equal bits", kills)
    print(f"{kills} of {kills} resumed; steps of all adapters done at each kill: {reached}")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "small", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_r9_a_disk_that_fills_up(
    here: Path,
    base: Path,  # noqa: F811
    small_disk: Path,
    capsys: pytest.CaptureFixture[str],
    straight: dict[str, Any],
) -> None:
    write_config(*ADAPTERS, save_step=2)
    options = RunOptions(str(base), dir=str(small_disk / "out"))

    def fill() -> None:
        """Leave less than a checkpoint needs once the first is there."""
        while not list(small_disk.glob("out/checkpoints/c/step-*")):
            time.sleep(0.001)
        with suppress(OSError), (small_disk / "others").open("wb") as file:
            while True:
                file.write(b"\0" * 4096)
                file.flush()

    filler = threading.Thread(target=fill, daemon=True)
    filler.start()
    status = main(options)
    error = capsys.readouterr().err
    assert status == 1 and "No space left on device" in error and "Traceback" not in error
    assert len(error.splitlines()) <= 15
    filler.join(10)
    (small_disk / "others").unlink()
    assert main(RunOptions(str(base), dir=options.dir, resume=True)) == 0
    assert "no complete checkpoint" not in capsys.readouterr().out
    assert outcome(small_disk / "out") == straight
    assert not list(small_disk.glob("out/**/.*")), "a temporary file was left"


def test_r9_results_are_shown_where_no_disk_takes_them(
    here: Path,
    base: Path,  # noqa: F811
    small_disk: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_config(adapter("a", num_epochs=1))
    options = RunOptions(str(base), dir=str(small_disk / "out"))
    assert main(options) == 0
    table = capsys.readouterr().out.partition("adapter  task")[2].partition("report")[0]
    (small_disk / "out/results.json").unlink()
    with suppress(OSError), (small_disk / "others").open("wb") as file:
        while True:
            file.write(b"\0" * 512)
            file.flush()
    assert main(replace(options, evaluate=True)) == 1
    shown = capsys.readouterr()
    assert table in shown.out and "±" in table
    assert "No space left on device" in shown.err and "Traceback" not in shown.err and len(shown.err.splitlines()) <= 15
    (small_disk / "others").unlink()
    assert main(replace(options, evaluate=True)) == 0
    assert not list(small_disk.glob("out/**/.*")), "a temporary file was left"


def test_folders_that_are_links_stay_links(here: Path, base: Path) -> None:  # noqa: F811
    """Adapters and checkpoints on another disk: what lies there is replaced, and the checkpoints are the new run's."""
    write_config(adapter("a", num_epochs=1, val_set_size=6), save_step=1)
    for name in ("adapters", "checkpoints"):
        (here / "disk" / name / "a").mkdir(parents=True)
        (here / "out" / name).mkdir(parents=True)
        (here / "out" / name / "a").symlink_to(here / "disk" / name / "a")
    (here / "disk/adapters/a/adapter_config.json").write_text("{}")
    (here / "disk/checkpoints/a/step-000099").mkdir()
    for _ in range(2):
        assert main(RunOptions(str(base), dir="out", overwrite=True)) == 0
        assert all((here / "out" / name / "a").is_symlink() for name in ("adapters", "checkpoints"))
        assert (here / "disk/adapters/a/adapter_model.safetensors").exists()
        assert {p.name for p in (here / "disk/checkpoints/a").iterdir()} == {"best", "step-000002", "step-000003"}
        assert not list(here.glob("out/**/.*")) + list(here.glob("disk/**/.*"))


@pytest.mark.parametrize(
    "changed", [{"evaluate_steps": None}, {"evaluate_steps": 1}, {"evaluate_batch_size": 3}], ids=str
)
def test_r3_evaluation_changes_no_adapter(
    here: Path,
    base: Path,  # noqa: F811
    straight: dict[str, Any],
    changed: dict[str, Any],
) -> None:
    write_config(
        *[entry | changed if "val_set_size" in entry else entry for entry in ADAPTERS], save_step=1, keep_last=1
    )
    assert main(RunOptions(str(base), dir="out")) == 0
    found = outcome(here / "out")
    assert found["weights"]["b"] == straight["weights"]["b"]  # the others keep their best state, as evaluations say
    for name in "abc":
        steps, expected = ([e for e in run["metrics"][name] if "loss" in e] for run in (found, straight))
        assert steps == expected, name


def test_r3_the_log_changes_no_adapter(here: Path, base: Path) -> None:  # noqa: F811
    write_config(*[entry | {"num_epochs": 1} for entry in ADAPTERS[:2]])
    assert main(RunOptions(str(base), dir="quiet", limit=12)) == 0
    assert main(RunOptions(str(base), dir="loud", limit=12, debug=True, log_file="elsewhere.log")) == 0
    assert outcome(here / "quiet") == outcome(here / "loud")


def test_deterministic_kernels_compute_the_same(here: Path, base: Path, straight: dict[str, Any]) -> None:  # noqa: F811
    import torch

    write_config(*ADAPTERS, save_step=2)
    try:
        assert main(RunOptions(str(base), dir="out", deterministic=True)) == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert outcome(here / "out") == straight
