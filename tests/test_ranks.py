"""Several processes that share every step: numbers and files as of one, and none waits for one that is gone."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mlora.cli import ranks
from mlora.config import ConfigError, Problem, RunOptions
from mlora.parallel import ALONE, Ranks, places
from mlora.runs.program import main
from tests import tinybase
from tests.test_program import MIXTURE, ROOT, adapter, base, here, launch, write_config  # noqa: F401

ADAPTERS = [
    adapter("a", num_epochs=3, evaluate_steps=5, val_set_size=5),
    adapter("b", num_epochs=3, batch_size=6, micro_batch_size=2, router_loss=False, lr=1e-3, **MIXTURE),
    adapter("c", num_epochs=1, batch_size=1, micro_batch_size=1, lr=1e-3, lora_init="pissa"),
    adapter("d", num_epochs=2, batch_size=9, micro_batch_size=3, lora_dropout=0.2, use_dora=True),
]
"""Fewer rows than ranks, ragged ends. A larger learning rate lets rounding errors tip a router's choice."""
KEYS = ("loss", "eval_loss", "aux_loss", "grad_norm", "num_tokens", "lr")


def measured(folder: Path) -> dict[tuple[str, str], list[float]]:
    """Return what metrics.jsonl holds, by adapter and key."""
    found: dict[tuple[str, str], list[float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        for key in KEYS:
            if key in entry:
                found.setdefault((entry["adapter"], key), []).append(entry[key])
    return found


def apart(folder: Path, other: Path) -> tuple[float, float]:
    """Return by how much the losses and the weights of two runs differ, relative to their size."""
    one, two = measured(folder), measured(other)
    assert one.keys() == two.keys() and one
    by_losses = 0.0
    for key, values in one.items():
        found = two[key]
        assert len(found) == len(values), key
        if key[1] == "grad_norm":
            assert found == pytest.approx(values, rel=1e-4), key
        else:
            own = [abs(x - y) / max(abs(x), 1e-9) for x, y in zip(values, found, strict=True)]
            by_losses = max(by_losses, *own)
    files = sorted(folder.glob("adapters/*/adapter_model.safetensors"))
    by_weights = 0.0
    for file in files:
        expected, tensors = load_file(file), load_file(other / file.relative_to(folder))
        assert expected.keys() == tensors.keys()
        for key, tensor in expected.items():
            size = max(float(tensor.abs().max()), 1e-3)
            by_weights = max(by_weights, float((tensor - tensors[key]).abs().max()) / size)
    assert files
    return by_losses, by_weights


def assert_same(folder: Path, other: Path) -> tuple[float, float]:
    """Compare two runs within the limits of R4; return by how much they differ."""
    by_losses, by_weights = apart(folder, other)
    assert by_losses <= 1e-5 and by_weights <= 1e-4
    first, second = (json.loads((place / "results.json").read_text()) for place in (folder, other))
    for results in (first, second):
        for result in results:
            del result["date"], result["conditions"]["adapter"]
    assert first == second and first
    return by_losses, by_weights


def assert_same_losses(folder: Path, other: Path) -> None:
    """Compare the losses of two runs on GPUs; what differs is shown with the step at which it first does."""
    one, two = measured(folder), measured(other)
    assert one.keys() == two.keys() and one
    apart = {}
    for key, values in one.items():
        assert len(values) == len(two[key]), key
        if key[1] in ("loss", "eval_loss", "num_tokens"):
            pairs = enumerate(zip(values, two[key], strict=True))
            apart[key] = [(step, x, y) for step, (x, y) in pairs if y != pytest.approx(x, rel=1e-4)][:1]
    assert not any(apart.values()), apart


def routed_tokens(folder: Path) -> list[int]:
    """Return how many tokens each line of router.jsonl tells of."""
    return [json.loads(line)["tokens"] for line in (folder / "router.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The run folder of one process."""
    place = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        here.__wrapped__(place, patch)  # type: ignore[attr-defined]
        write_config(*ADAPTERS, save_step=3)
        assert main(RunOptions(str(base), dir="out")) == 0
    return place / "out"


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_r4_several_ranks_are_one(
    here: Path,
    base: Path,  # noqa: F811
    one: Path,
    count: int,
    record_property: Callable[[str, object], None],
) -> None:
    write_config(*ADAPTERS, save_step=3)
    done = launch("run", "--base_model", base, "--dir", "out", "--num_processes", count)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report:") == 1 and "Traceback" not in done.stderr
    by_losses, by_weights = assert_same(one, here / "out")
    record_property("losses within", by_losses)
    record_property("weights", by_weights)
    assert routed_tokens(one) == routed_tokens(here / "out")


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "middle", "all"])
def test_a_sharded_base_is_the_base(here: Path, base: Path, one: Path, recompute: str) -> None:  # noqa: F811
    write_config(*ADAPTERS, save_step=3)
    flags = ["--num_processes", 2, "--shard_base", "--recompute", recompute]
    done = launch("run", "--base_model", base, "--dir", "out", *flags)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert_same(one, here / "out")
    assert routed_tokens(one) == routed_tokens(here / "out")


@pytest.mark.slow
def test_each_rank_holds_its_part_of_every_layer(
    base: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    code = f"""
import pathlib
from mlora.model.multi import MultiAdapterModel
from mlora.parallel import Ranks
from mlora.parallel.shard import mesh_of
ranks = Ranks.from_environment()
with ranks.joined("cpu"):
    mesh = mesh_of(2, "cpu")
    model = ranks.in_turn(lambda: MultiAdapterModel.from_pretrained({str(base)!r}, mesh=mesh))
    model.check_packing()
    layers = [parameter for layer in model.sites.layers for parameter in layer.parameters()]
    assert model.sharded and not any(parameter.requires_grad for parameter in layers)
    said = sum(p.to_local().numel() for p in layers), sum(p.numel() for p in layers), model.num_parameters(None)
    pathlib.Path({str(tmp_path)!r}, str(ranks.rank)).write_text(" ".join(map(str, said)))
"""
    environment = dict(os.environ) | {"PYTHONPATH": str(ROOT)}
    monkeypatch.setattr(ranks, "program", lambda options: ([sys.executable, "-c", code], environment))
    assert ranks.start_ranks(RunOptions("m", num_processes=2)) == 0
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base).parameters())
    for file in sorted(tmp_path.iterdir()):
        own, layers, parameters = map(int, file.read_text().split())
        assert 2 * own == layers and parameters == whole


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("shard", [False, True], ids=["whole", "sharded"])
def test_two_gpus_are_one(here: Path, tmp_path: Path, shard: bool) -> None:
    """With kernels and, where the base is whole, CUDA graphs; in float32, on a base whose heads have kernels."""
    large = tinybase.save(tmp_path / "large", hidden_size=256, intermediate_size=512)
    write_config(*ADAPTERS, save_step=3)
    flags = ["--base_model", large, "--dtype", "fp32"]
    for count, more in ((1, []), (2, ["--shard_base"] if shard else [])):
        done = launch("run", *flags, "--num_gpus", count, "--dir", f"out{count}", *more)
        assert done.returncode == 0, done.stderr
    assert_same_losses(here / "out1", here / "out2")


@pytest.mark.slow
def test_torchrun_may_start_them(here: Path, base: Path, one: Path) -> None:  # noqa: F811
    write_config(*ADAPTERS, save_step=3)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(ROOT / "train.py")]
    done = subprocess.run(
        [sys.executable, *start, "--base_model", str(base), "--dir", "out"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert_same(one, here / "out")
    command = json.loads((here / "out" / "environment.json").read_text())["command"]
    assert command[:3] == ["torchrun", "--nproc_per_node=2", "train.py"]


def begun(folder: Path, steps: int) -> bool:
    """Whether a run has written so many steps and a checkpoint."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().count("\n") if file.exists() else 0
    return lines >= steps and any(folder.glob("checkpoints/*/step-*/manifest.json"))


def children(pid: int) -> list[int]:
    """Return the processes that a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def ended(*flags: object, ending: str) -> tuple[subprocess.Popen, str]:
    """Start a run of two ranks, kill the second of them or tell the launcher to stop; return it and what it said."""
    command = [sys.executable, str(ROOT / "launch.py"), "run", *map(str, flags)]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        while not begun(Path("out"), 20):
            assert run.poll() is None
            time.sleep(0.01)
        (program,) = children(run.pid)
        if ending == "kill":
            os.kill(children(program)[1], signal.SIGKILL)
        else:
            run.send_signal(signal.SIGTERM)
        started = time.monotonic()
        _, said = run.communicate(timeout=60)
    finally:
        run.kill()
    assert time.monotonic() - started < 20 and "Traceback" not in said
    return run, said


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "count"), [("kill", 2), ("kill", 1), ("stop", 2)])
def test_a_rank_that_is_killed_ends_the_run_and_it_resumes(
    here: Path,
    base: Path,  # noqa: F811
    one: Path,
    ending: str,
    count: int,
) -> None:
    """A killed rank ends all; a signal to the launcher stops all at a checkpoint. One process may go on alone."""
    write_config(*ADAPTERS, save_step=3)
    run, said = ended("--base_model", base, "--dir", "out", "--num_processes", 2, ending=ending)
    if ending == "kill":
        assert run.returncode == 1 and "rank 1 of 2 processes was ended by SIGKILL" in said and "--resume" in said
    else:
        assert run.returncode == 130 and "a checkpoint is saved" in said
    assert not (here / "out" / "report.html").exists()
    again = launch("run", "--base_model", base, "--dir", "out", "--num_processes", count, "--resume")
    assert again.returncode == 0, again.stderr
    assert_same(one, here / "out")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_rank_that_is_killed_on_a_gpu_ends_the_run_and_it_resumes(here: Path, tmp_path: Path) -> None:
    large = tinybase.save(tmp_path / "large", hidden_size=256, intermediate_size=512)
    write_config(*ADAPTERS, save_step=3)
    flags = ["--base_model", large, "--dtype", "fp32", "--num_gpus", 2]
    run, said = ended(*flags, "--dir", "out", ending="kill")
    assert run.returncode == 1 and "rank 1 of 2 processes was ended by SIGKILL" in said and "--resume" in said
    for more in (["--dir", "out", "--resume"], ["--dir", "straight"]):
        done = launch("run", *flags, *more)
        assert done.returncode == 0, done.stderr
    assert_same_losses(here / "straight", here / "out")


# -- without other processes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "environment", "said"),
    [
        ({"num_gpus": 2}, {}, "2 GPUs: none can be seen here; on the CPU --num_processes"),
        ({"num_gpus": 2, "num_processes": 2}, {}, "cannot be combined with --num_gpus"),
        ({"num_processes": 3}, {"WORLD_SIZE": "2", "RANK": "0"}, "3, but 2 processes were started (WORLD_SIZE)"),
        ({"inference": True}, {"WORLD_SIZE": "2", "RANK": "0"}, "answers come from one process"),
        ({"shard_base": True}, {}, "--shard_base: spreads the base model over several GPUs: --num_gpus says how many"),
        ({"shard_base": True, "quantize": "4bit"}, {"WORLD_SIZE": "2", "RANK": "0"}, "combined with --quantize"),
        ({"shard_base": True, "compile": True}, {"WORLD_SIZE": "2", "RANK": "0"}, "combined with --compile"),
    ],
    ids=["no GPU", "both", "WORLD_SIZE", "inference", "shard alone", "shard quantised", "shard compiled"],
)
def test_what_cannot_be_is_refused(
    here: Path,
    base: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: dict,
    environment: dict[str, str],
    said: str,
) -> None:
    write_config(adapter("a"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(RunOptions(str(base), **options)) == 2
    assert said in capsys.readouterr().err
    assert not Path("a").exists()


def test_more_gpus_than_there_are(
    here: Path,
    base: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_config(adapter("a"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert main(RunOptions(str(base), num_gpus=3)) == 2
    assert "3 GPUs: 2 of them can be seen here" in capsys.readouterr().err
    assert main(RunOptions(str(base), num_processes=2)) == 2
    assert "is for the CPU; 2 GPUs can be seen here: --num_gpus" in capsys.readouterr().err


def test_rows_are_spread_evenly() -> None:
    assert places([[5], [5], [5, 5]], 2) == [[[0], [], [0]], [[], [0], [1]]]
    assert places([[9, 1, 1, 1]], 2) == [[[0, 3]], [[1, 2]]], "no more rows of a job than its even share"
    for sizes in ([], [[]], [[3]], [[4, 2, 7], [1], [8, 8, 8, 8, 1]]):
        for count in (1, 2, 3, 8):
            found = places(sizes, count)
            assert len(found) == count
            for group, own in enumerate(sizes):
                assert sorted(i for rank in found for i in rank[group]) == list(range(len(own)))
                assert all(len(rank[group]) <= -(-len(own) // count) for rank in found)


def test_alone_is_asked_nothing() -> None:
    assert Ranks.from_environment() is ALONE and ALONE.first
    assert list(ALONE.share([1, 2])) == [1, 2] and ALONE.sums([1.5]) == [1.5] and ALONE.gather("x") == ["x"]
    assert ALONE.any(True) and not ALONE.any(False)
    assert ALONE.in_turn(lambda: 3) == 3 and ALONE.as_first(lambda: 4) == 4


def test_errors_reach_other_ranks_as_they_are() -> None:
    error = ConfigError("--resume", [Problem("a", "was begun with other settings")])
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is ConfigError and str(again) == str(error)


SLEEP = "import time; time.sleep(60)"


@pytest.mark.parametrize(
    ("programs", "status", "said"),
    [
        (["", ""], 0, ""),
        ([SLEEP, "import os; os.kill(os.getpid(), 9)"], 1, "rank 1 of 2 processes was ended by SIGKILL"),
        (
            ["import sys; sys.exit(1)", "import os; os.kill(os.getpid(), 6)"],
            1,
            "rank 1 of 2 processes was ended by SIG",
        ),
        ([SLEEP, "import sys; sys.exit(3)"], 3, "rank 1 of 2 processes ended with status 3"),
        (["import sys; sys.exit(2)", "import sys; sys.exit(2)"], 2, ""),
        (["import sys; sys.exit(2)", SLEEP], 2, ""),
    ],
    ids=["done", "killed", "killed and lost", "failed", "bad input", "bad input of the first"],
)
def test_one_that_ends_ends_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], programs: list[str], status: int, said: str
) -> None:
    code = f"import os; exec({programs!r}[int(os.environ['RANK'])])"
    monkeypatch.setattr(ranks, "program", lambda options: ([sys.executable, "-c", code], dict(os.environ)))
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.5)
    started = time.monotonic()
    assert ranks.start_ranks(RunOptions("m", num_processes=2)) == status
    assert time.monotonic() - started < 5
    shown = capsys.readouterr().err
    assert said in shown and bool(said) == bool(shown)


def test_processes_are_told_which_of_how_many_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = f"""
import os, pathlib
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
pathlib.Path({str(tmp_path)!r}, os.environ["RANK"]).write_text(" ".join(os.environ[name] for name in names))
"""
    monkeypatch.setattr(ranks, "program", lambda options: ([sys.executable, "-c", code], dict(os.environ)))
    assert ranks.start_ranks(RunOptions("m", num_gpus=3)) == 0
    assert [file.read_text() for file in sorted(tmp_path.iterdir())] == [f"{i} {i} 3 127.0.0.1" for i in range(3)]
