"""Adapters on a base model quantised by bitsandbytes: PEFT on the same base, live, values and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mlora import Batch, MultiAdapterModel
from mlora.model import load
from mlora.model.attention import PACKED
from mlora.ops.dora import frozen_weight
from tests import tinybase
from tests.families import awaken, rows
from tests.test_peft import gradients

pytest.importorskip("bitsandbytes", reason="needs the extra 'quant'")
peft = pytest.importorskip("peft")

METHODS = {
    "lora": {"r": 4},
    "dora": {"r": 4, "use_dora": True},
    "mixlora": {"r": 4, "routing_strategy": "mixlora", "num_experts": 4},
    "mixdora": {"r": 4, "routing_strategy": "mixlora", "num_experts": 4, "use_dora": True},
    "switch": {"r": 4, "routing_strategy": "mixlora-switch", "num_experts": 4},
    "mola": {"r": 4, "routing_strategy": "mola", "num_experts": 4},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinybase.save(tmp_path_factory.mktemp("base") / "tiny", hidden_size=64, intermediate_size=128)


PEFT_METHODS = {
    "lora": {"lora_alpha": 8},
    "rslora": {"lora_alpha": 4, "use_rslora": True},
    "pissa": {"lora_alpha": 8, "lora_init": "pissa"},
    "dora": {"lora_alpha": 8, "use_dora": True},
}


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
@pytest.mark.parametrize("method", PEFT_METHODS)
def test_agrees_with_peft(base: Path, method: str, bits: str, tmp_path: Path) -> None:
    model = MultiAdapterModel.from_pretrained(str(base), quantization=bits)
    model.add_adapter("x", {"r": 4, **PEFT_METHODS[method]})
    if method != "pissa":  # which has an effect as soon as A and B move
        awaken(model)
    for _, parameter in model.adapter_parameters("x"):
        parameter.data.mul_(1.25)
    model.save_adapter("x", tmp_path / "ours")
    origin = load.find(str(base))
    frozen = load.load_model(origin, load.load_config(origin), torch.float32, "cpu", bits, PACKED)
    theirs = peft.PeftModel.from_pretrained(frozen, tmp_path / "ours", is_trainable=True)
    model.load_adapter(tmp_path / "ours", "y")  # PiSSA is a LoRA of twice the rank in the file
    ids, mask = rows(1, length=12, seed=4)
    out = model(Batch.from_rows(ids, mask, None, ["y"]))["y"]
    out.loss.backward()
    real = mask.bool()
    result = theirs(input_ids=ids[real][None], labels=ids[real][None], use_cache=False)
    result.loss.backward()
    # On the CPU an int8 layer that trains multiplies its dequantised weight in float, so nothing is rounded to levels;
    # on CUDA it rounds its input to 8 bits, and what differs in a float's last bit may fall to the next level.
    logits = model.logits(ids, mask, ["y"])[real]
    assert (logits - result.logits[0]).abs().max() <= 1e-5 * result.logits.abs().max()
    assert (logits - model.logits(ids, mask, [None])[real]).abs().max() > 1e-2
    assert out.loss.item() == pytest.approx(result.loss.item(), rel=1e-5)
    ours, expected = model.adapter_gradients("y"), gradients(theirs)
    assert ours.keys() == expected.keys() and ours
    for name, gradient in expected.items():
        assert (ours[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name

    theirs.save_pretrained(tmp_path / "theirs")
    model.load_adapter(tmp_path / "theirs", "z")
    assert torch.equal(model.logits(ids, mask, ["z"])[real], logits)


@pytest.mark.parametrize("name", METHODS)
def test_nf4_equals_its_dequantised_weights(base: Path, name: str) -> None:
    """The gradient passes through frozen 4-bit layers as through the float layers that they stand for."""
    quantised = MultiAdapterModel.from_pretrained(str(base), quantization="4bit")
    plain = MultiAdapterModel.from_pretrained(str(base))
    for path, site in quantised.sites.linears.items():
        plain.sites.linears[path].module.weight.data.copy_(frozen_weight(site.module))
    ids, mask = rows(4)
    found = []
    for model in (quantised, plain):
        model.add_adapter("x", METHODS[name])
        awaken(model)
        out = model(Batch.from_rows(ids, mask, None, ["x"] * 4))["x"]
        (out.loss + out.aux_loss).backward()
        found.append((out.loss.item(), model.adapter_gradients("x")))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for key, gradient in found[1][1].items():
        assert (found[0][1][key] - gradient).abs().max() <= 1e-4 * max(gradient.abs().max(), 1e-4), key


def test_int8_trains_and_starts_unchanged(base: Path) -> None:
    model = MultiAdapterModel.from_pretrained(str(base), quantization="8bit")
    ids, mask = rows(6)
    before = model.logits(ids, mask, [None] * 6)
    for name in ("lora", "dora", "mixlora", "mola"):
        model.add_adapter(name, METHODS[name])
        after = model.logits(ids, mask, [name] * 6)
        # DoRA divides by norms of dequantised weights, the product is the quantised one: equal to rounding
        assert (after - before)[mask.bool()].abs().max() < 1e-5
