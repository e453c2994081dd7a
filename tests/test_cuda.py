"""The same numbers on a GPU as on the CPU; skipped where there is none."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mlora import Batch, MultiAdapterModel
from mlora.config import JobConfig, RunOptions
from mlora.data import Sample
from mlora.data.demo import write_demo_data
from mlora.model.recompute import WHATS, Recompute, What
from mlora.runs.program import main
from mlora.training.job import Job
from mlora.training.trainer import train
from tests import tinybase
from tests.families import awaken, rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

METHODS = {
    "lora": {"r": 4},
    "dora": {"r": 4, "use_dora": True},
    "mixlora": {"r": 4, "routing_strategy": "mixlora", "num_experts": 4, "router_init_range": 0.5},
    "mixdora": {"r": 4, "routing_strategy": "mixlora", "num_experts": 4, "use_dora": True},
    "dynamic": {"r": 4, "routing_strategy": "mixlora-dynamic", "num_experts": 4},
    "switch": {"r": 4, "routing_strategy": "mixlora-switch", "num_experts": 4, "expert_capacity": 2},
    "loramoe": {"r": 4, "routing_strategy": "loramoe", "num_experts": 3},
    # fourteen routers whose default start leaves most tokens near a tie: wider, so that bf16 routes most alike
    "mola": {"r": 4, "routing_strategy": "mola", "num_experts": 4, "router_init_range": 0.0},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinybase.save(tmp_path_factory.mktemp("base") / "tiny", hidden_size=64, intermediate_size=128)


def outcome(base: Path, device: str, dtype: str, recompute: What = "none") -> dict:
    """Return losses and gradients of all methods in one batch, dropout on."""
    model = MultiAdapterModel.from_pretrained(str(base), dtype=dtype, device=device)
    model.recompute = Recompute(recompute)
    for name, settings in METHODS.items():
        model.add_adapter(name, settings | {"lora_dropout": 0.1, "lora_alpha": 8})
    awaken(model)
    ids, mask = rows(2 * len(METHODS), length=17)
    model.train()
    out = model(Batch.from_rows(ids.to(device), mask.to(device), None, [*METHODS, *METHODS]))
    sum(o.loss + o.aux_loss for o in out.values()).backward()
    return {
        name: (
            out[name].loss.item(),
            out[name].aux_loss.item(),
            {key: gradient.cpu() for key, gradient in model.adapter_gradients(name).items()},
        )
        for name in METHODS
    }


@pytest.mark.parametrize("recompute", WHATS)
def test_gpu_equals_cpu(base: Path, recompute: What) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    expected, found = outcome(base, "cpu", "float32"), outcome(base, "cuda", "float32", recompute)
    for name, (loss, aux, gradients) in expected.items():
        assert found[name][0] == pytest.approx(loss, rel=2e-5), name
        assert found[name][1] == pytest.approx(aux, rel=2e-4), name
        largest = max(g.norm() for g in gradients.values())
        for key, gradient in gradients.items():
            difference = (found[name][2][key] - gradient).norm()
            assert difference <= 2e-4 * max(gradient.norm(), 0.2 * largest), f"{name} {key}"


def test_bf16_points_where_float32_does(base: Path) -> None:
    """Tensor by tensor they cannot agree: a token near a tie goes to another expert in bf16."""
    expected, found = outcome(base, "cpu", "float32"), outcome(base, "cuda", "bfloat16")
    for name, (loss, _, gradients) in expected.items():
        assert found[name][0] == pytest.approx(loss, rel=1e-2), name
        one, other = (torch.cat([g[key].float().flatten() for key in gradients]) for g in (gradients, found[name][2]))
        assert torch.cosine_similarity(one, other, dim=0) > 0.97, name
        assert other.norm().item() == pytest.approx(one.norm().item(), rel=0.1), name


def test_a_whole_run_on_the_gpu(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    write_demo_data("data", train=48, test=12)
    entry = {"task_name": "arc_easy", "data": "data", "r": 4, "batch_size": 8, "num_epochs": 3, "lr": 5e-3}
    mixture = {"routing_strategy": "mixlora", "num_experts": 4}
    Path("mlora.json").write_text(json.dumps({"lora": [{"name": "a"} | entry, {"name": "b"} | entry | mixture]}))
    assert main(RunOptions(str(base), evaluate_base=True)) == 0
    assert "unknown: memory" not in capsys.readouterr().out
    lines = [json.loads(line) for line in Path("metrics.jsonl").read_text().splitlines()]
    for name in "ab":
        losses = [line["loss"] for line in lines if line["adapter"] == name]
        assert len(losses) == 18 and losses[-1] < losses[0]
    assert len(json.loads(Path("results.json").read_text())) == 6


def test_generation_on_the_gpu(base: Path) -> None:
    model = MultiAdapterModel.from_pretrained(str(base), device="cuda", dtype="bfloat16")
    model.add_adapter("m", METHODS["mixlora"])
    texts = model.generate(["one", "two words"], ["m", None], max_new_tokens=5, do_sample=False)
    assert len(texts) == 2


def test_resuming_under_deterministic_ends_in_the_same_bits(base: Path, tmp_path: Path) -> None:
    """Through the real command: what makes cuBLAS deterministic must be set before its first use in a process."""
    write_demo_data(tmp_path / "data", train=48, test=4)
    entry = {"task_name": "arc_easy", "data": "data", "r": 4, "batch_size": 8, "micro_batch_size": 4, "lr": 5e-3}
    entry |= {"num_epochs": 30, "lora_dropout": 0.05}
    mixture = {"routing_strategy": "mixlora", "num_experts": 4}
    adapters = [{"name": "a"} | entry, {"name": "b"} | entry | mixture]
    (tmp_path / "mlora.json").write_text(json.dumps({"save_step": 10, "lora": adapters}))
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, str(root / "launch.py"), "run", "--base_model", str(base), "--deterministic"]
    straight = subprocess.run(
        [*command, "--dir", "straight"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert straight.returncode == 0, straight.stderr
    child = subprocess.Popen([*command, "--dir", "broken"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "broken/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") >= 50):
        assert child.poll() is None, "it ended before it was stopped"
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    assert child.wait(60) == 130
    again = [*command, "--dir", "broken", "--resume"]
    resumed = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert resumed.returncode == 0, resumed.stderr
    for name in "ab":
        files = [tmp_path / run / "adapters" / name / "adapter_model.safetensors" for run in ("straight", "broken")]
        one, other = (load_file(file) for file in files)
        largest = max(float((one[key] - other[key]).abs().max()) for key in one)
        assert files[0].read_bytes() == files[1].read_bytes(), f"{name}: up to {largest:.1e} apart"


def test_looking_at_routers_and_scores_changes_no_bit(base: Path, tmp_path: Path) -> None:
    """However often a run is evaluated and its routing recorded, every step is the same graph."""
    write_demo_data(tmp_path / "data", train=48, test=4)
    entry = {"task_name": "arc_easy", "data": "data", "r": 4, "batch_size": 16, "num_epochs": 6, "lr": 5e-3}
    entry |= {"val_set_size": 16}
    mixture = {"routing_strategy": "mixlora", "num_experts": 4}
    root = Path(__file__).resolve().parents[1]
    found = []
    for steps in (1, 7):
        adapters = [{"name": "a"} | entry, {"name": "b"} | entry | mixture]
        config = {"lora": [adapter | {"evaluate_steps": steps} for adapter in adapters]}
        (tmp_path / "mlora.json").write_text(json.dumps(config))
        command = [sys.executable, str(root / "launch.py"), "run", "--base_model", str(base), "--deterministic"]
        command += ["--dir", f"every-{steps}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        log = (tmp_path / f"every-{steps}" / "log.txt").read_text()
        assert "steps run as CUDA graphs" in log and "without CUDA graphs" not in log, log
        lines = map(json.loads, (tmp_path / f"every-{steps}" / "metrics.jsonl").read_text().splitlines())
        found.append([(line["adapter"], line["step"], line["loss"]) for line in lines if "loss" in line])
    assert len(found[0]) == 24 and found[0] == found[1]  # which state is kept depends on what is measured


def test_running_out_of_memory_on_the_gpu_ends_as_ever(base: Path) -> None:
    """A real shortage: torch may take only so much of the GPU that the whole micro-batch does not fit."""
    ends = []
    for scarce in (False, True):
        model = MultiAdapterModel.from_pretrained(str(base), device="cuda", dtype="float32")
        model.add_adapter("a", {"r": 4, "lora_alpha": 8})
        draw = random.Random(0)
        rows = [tuple(draw.randrange(3, 200) for _ in range(512)) for _ in range(64)]
        samples = [Sample(row, row, "t") for row in rows]
        # AdamW would make whole steps of gradients that are nothing but rounding
        settings = {"batch_size": 64, "num_epochs": 2, "optim": "sgd", "lr": 10.0}
        job = Job(JobConfig(name="a", method=model.adapters["a"], **settings), samples, model, 0)
        torch.cuda.empty_cache()
        if scarce:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 100 * 2**20) / total)
        try:
            train(model, [job], None, lambda stepped: False)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert (job.micro_batch_size < 64) == scarce
        ends.append({key: tensor.cpu() for key, tensor in model.adapter_tensors("a").items()})
    for key, tensor in ends[0].items():
        apart = float((tensor - ends[1][key]).abs().max()) / max(float(tensor.abs().max()), 1e-3)
        assert apart <= 1e-4, f"{key}: {apart:.1e}"
