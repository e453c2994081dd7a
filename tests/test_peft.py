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
