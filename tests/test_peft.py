"""PEFT as a live oracle: the same files, the same logits and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mlora.adapters import METHODS
from mlora.model.batch import Batch
from tests.families import awaken, multi, rows, tiny

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi", "phi3", "gemma", "gpt_neox"])
@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"target_modules": "attention"}], ids=["lora", "rslora", "attention"]
)
def test_ours_loads_in_peft_and_agrees(family: str, settings: dict, tmp_path: Path) -> None:
    model = multi(family)
    model.add_adapter("x", METHODS["lora"](r=4, lora_alpha=6, **settings))
    awaken(model)
    model.save_adapter("x", tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny(family).requires_grad_(True), tmp_path, is_trainable=True).eval()
    ids, mask = rows(3)
    batch = Batch.from_rows(ids, mask, None, ["x"] * 3)
    out = model(batch)["x"]
    out.loss.backward()
    labels = ids.masked_fill(mask == 0, -100)
    theirs.set_attn_implementation("eager") if hasattr(theirs, "set_attn_implementation") else None
    result = theirs(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
    result.loss.backward()
    real = mask.bool()
    assert (model.logits(ids, mask, ["x"] * 3) - result.logits)[real].abs().max() < 1e-5
    assert out.loss.item() == pytest.approx(result.loss.item(), rel=1e-5)
    gradients = model.adapter_gradients("x")
    expected = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if "lora_" in n}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-5 * max(gradient.abs().max(), 1e-3), name


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_pissa_starts_and_saves_as_in_peft(family: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights="pissa")
    theirs = peft.get_peft_model(tiny(family).requires_grad_(True), config).eval()
    model = multi(family)
    model.add_adapter("x", METHODS["lora"](r=4, lora_alpha=6, lora_init="pissa"))
    ids, mask = rows(3)
    out = model(Batch.from_rows(ids, mask, None, ["x"] * 3))["x"]
    out.loss.backward()
    result = theirs(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    result.loss.backward()
    assert out.loss.item() == pytest.approx(result.loss.item(), rel=1e-5)
    gradients = {
        n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if "lora_" in n and p.requires_grad
    }
    for name, found in model.adapter_gradients("x").items():
        # the directions are unique up to sign, so compare what is: products with the same sign in A and B
        own = found[:4] if "lora_A" in name else found[:, :4]
        assert (own.abs() - gradients[name].abs()).abs().max() <= 1e-4 * gradients[name].abs().max(), name
        frozen = found[4:] if "lora_A" in name else found[:, 4:]
        assert (frozen == 0).all()

    for _, parameter in model.adapter_parameters("x"):
        parameter.data.mul_(1.1)
    model.save_adapter("x", tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny(family), tmp_path).eval()
    real = mask.bool()
    difference = loaded(input_ids=ids, attention_mask=mask).logits - model.logits(ids, mask, ["x"] * 3)
    assert difference[real].abs().max() < 1e-5
    assert (model.logits(ids, mask, ["x"] * 3) - model.logits(ids, mask, [None] * 3))[real].abs().max() > 1e-3


def test_theirs_loads_here_and_agrees(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(tiny("llama"), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = multi("llama")
    assert model.load_adapter(tmp_path / "theirs") == "theirs"
    ids, mask = rows(3)
    expected = theirs(input_ids=ids, attention_mask=mask).logits
    real = mask.bool()
    assert (model.logits(ids, mask, ["theirs"] * 3) - expected)[real].abs().max() < 1e-5
    assert torch.any((model.logits(ids, mask, [None] * 3) - expected)[real].abs() > 1e-2)
