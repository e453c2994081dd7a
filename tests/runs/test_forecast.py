"""The memory of a training is told before it, and backward computes again what there is no room to keep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mlora.adapters import METHODS
from mlora.config import JobConfig, RunOptions
from mlora.data.demo import write_demo_data
from mlora.model.errors import ModelError
from mlora.model.load import Origin
from mlora.model.multi import MultiAdapterModel
from mlora.model.recompute import Recompute
from mlora.model.rehearsal import Rehearsal
from mlora.runs.forecast import USABLE, Setting, forecast
from mlora.runs.program import main
from mlora.training.order import Order, heaviest
from tests import tinybase
from tests.families import tiny
from tests.training.test_promises import samples

CONFIGS = [
    JobConfig(name="a", method=METHODS["lora"](r=4), batch_size=8, micro_batch_size=8),
    JobConfig(name="b", method=METHODS["mixlora"](r=4, num_experts=3), batch_size=8, micro_batch_size=4, optim="sgd"),
]
ORDERS = [Order(config, samples(20, 1), 5) for config in CONFIGS]
LAYERS = 4


def shapes(family: str = "llama") -> MultiAdapterModel:
    with torch.device("meta"):
        model = MultiAdapterModel(tiny(family, LAYERS), Origin("tiny", "tiny"))
        for config in CONFIGS if family == "llama" else CONFIGS[:1]:
            model.add_adapter(config.name, config.method)
    return model


@pytest.fixture(scope="module")
def rehearsal() -> Rehearsal:
    return Rehearsal(shapes(), "cpu")


def total(rehearsal: Rehearsal, recompute: Recompute) -> int:
    kept = 8 * rehearsal.model.num_parameters("a")
    return rehearsal.step(heaviest(ORDERS, None), recompute, kept, accumulates=True).total


def test_nothing_is_computed_again_where_all_fits(rehearsal: Rehearsal) -> None:
    free = int(total(rehearsal, Recompute()) / USABLE) + 1
    found = forecast(rehearsal, ORDERS, None, None, free)
    assert found.recompute == Recompute() and found.fits and not found.instead
    assert found.footprint.total == total(rehearsal, Recompute())


@pytest.mark.parametrize("share", [0.4, 0.95])
def test_the_fewest_layers_are_computed_again(rehearsal: Rehearsal, share: float) -> None:
    most, least = total(rehearsal, Recompute()), total(rehearsal, Recompute("all"))
    free = int((most - share * (most - least)) / USABLE) + 1
    found = forecast(rehearsal, ORDERS, None, None, free)
    what, layers = found.recompute
    layers = LAYERS if layers is None else layers
    assert found.footprint.total <= USABLE * free
    assert what != "none" and 1 <= layers <= LAYERS
    assert total(rehearsal, Recompute(what, layers - 1)) > USABLE * free, "one layer less would do"


def test_too_little_memory_is_said_with_what_helps(rehearsal: Rehearsal) -> None:
    found = forecast(rehearsal, ORDERS, None, "none", 1000)
    text = " ".join(str(found).split())
    assert not found.fits and found.recompute == Recompute()
    assert "too little memory: micro-batches will be halved" in text and "--recompute all would take" in text
    assert found.instead["--recompute all"] < found.footprint.total
    assert found.instead["half the micro_batch_size"] < found.footprint.total
    assert all(len(line) <= 80 for line in str(found).splitlines())
    assert forecast(rehearsal, ORDERS, None, None, 1000).recompute == Recompute("all")


def test_what_a_family_has_not_is_refused_and_what_it_does_is_no_obstacle() -> None:
    setting = Setting("float32", "cpu", 10**12, "middle")
    with pytest.raises(ModelError, match="no feed-forward block"):
        setting.forecast(shapes("mamba"), ORDERS[:1], None, [])
    model = shapes()
    model.hf_model.model.layers[0].register_forward_hook(lambda _, __, out: print(float(out.sum())))
    notes: list[str] = []
    assert Setting("float32", "cpu", 10**12).forecast(model, ORDERS, None, notes) is None
    assert notes and notes[0].startswith("memory: ")


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_a_quantised_base_takes_less(quantization: str) -> None:
    pytest.importorskip("bitsandbytes")
    rows = heaviest(ORDERS, None)
    whole, less = (Rehearsal(shapes(), "cpu", quantization=q).step(rows, Recompute()) for q in (None, quantization))
    linears = sum(s.in_features * s.out_features for s in shapes().sites.linears.values())
    share = {"4bit": 0.5 + 1 / 64 + 4 / 64 / 256, "8bit": 1.0}[quantization]
    assert whole.base - less.base == pytest.approx((4 - share) * linears, rel=0.05)
    assert less.activations == pytest.approx(whole.activations, rel=0.01)


def test_a_run_chooses_by_the_memory_that_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    base = tinybase.save(tmp_path / "tiny")
    write_demo_data("data", train=24, test=4)
    entry = {"task_name": "arc_easy", "data": "data", "r": 4, "batch_size": 8, "num_epochs": 1, "lora_dropout": 0.1}
    mixture = {"routing_strategy": "mixlora", "num_experts": 4}
    Path("mlora.json").write_text(json.dumps({"lora": [{"name": "a"} | entry, {"name": "b"} | entry | mixture]}))
    losses = []
    for folder, free in (("much", 10**10), ("little", 5 * 10**5)):
        monkeypatch.setattr("mlora.runs.run.free_bytes", lambda device, free=free: free)
        assert main(RunOptions(str(base), dir=folder)) == 0
        lines = [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
        said = " ".join(capsys.readouterr().out.split())
        assert f"backward computes {'nothing' if folder == 'much' else 'everything'} again" in said
        logged = " ".join((tmp_path / folder / "log.txt").read_text().split())
        assert logged.count("backward computes") == 1
    assert losses[0] == losses[1]
