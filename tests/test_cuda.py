"""The same numbers on a GPU as on the CPU; skipped where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mlora import Batch, MultiAdapterModel
from mlora.config import RunOptions
from mlora.data.demo import write_demo_data
from mlora.runs.program import main
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


def outcome(base: Path, device: str, dtype: str, recompute: bool = False) -> dict:
    """Return losses and gradients of all methods in one batch, dropout on."""
    model = MultiAdapterModel.from_pretrained(str(base), dtype=dtype, device=device)
    model.recompute = recompute
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


@pytest.mark.parametrize("recompute", [False, True])
def test_gpu_equals_cpu(base: Path, recompute: bool) -> None:
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


def test_a_whole_run_on_the_gpu(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_demo_data("data", train=48, test=12)
    entry = {"task_name": "arc_easy", "data": "data", "r": 4, "batch_size": 8, "num_epochs": 3, "lr": 5e-3}
    mixture = {"routing_strategy": "mixlora", "num_experts": 4}
    Path("mlora.json").write_text(json.dumps({"lora": [{"name": "a"} | entry, {"name": "b"} | entry | mixture]}))
    assert main(RunOptions(str(base), evaluate_base=True)) == 0
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
