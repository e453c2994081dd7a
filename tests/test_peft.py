"""PEFT as a live oracle: the same files both ways, the same logits and gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mlora.adapters import METHODS
from mlora.model.batch import Batch
from mlora.model.multi import MultiAdapterModel
from tests.families import awaken, multi, rows, tiny
from tests.training.test_promises import apart

peft = pytest.importorskip("peft")

FAMILIES = ["llama", "qwen3", "phi", "phi3", "gemma", "gpt_neox", "gpt_bigcode"]
METHOD = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rsdora": {"use_rslora": True, "use_dora": True},
}


def gradients(theirs: Any) -> dict[str, torch.Tensor]:
    """Return the gradients of PEFT's parameters under the names of a file."""
    named = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    return {n.removesuffix(".weight") if "magnitude" in n else n: gradient for n, gradient in named.items()}


def assert_agree(model: MultiAdapterModel, name: str, theirs: Any) -> dict[str, float]:
    """Hold logits, loss and every gradient to PEFT's, all to 1e-5; return how far they are off."""
    ids, mask = rows(3)
    out = model(Batch.from_rows(ids, mask, None, [name] * 3))[name]
    out.loss.backward()
    result = theirs(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False)
    result.loss.backward()
    real = mask.bool()
    logits = model.logits(ids, mask, [name] * 3)
    assert (logits - result.logits)[real].abs().max() < 1e-5
    assert (logits - model.logits(ids, mask, [None] * 3))[real].abs().max() > 1e-3
    assert out.loss.item() == pytest.approx(result.loss.item(), rel=1e-5)
    ours, expected = model.adapter_gradients(name), gradients(theirs)
    assert ours.keys() == expected.keys() and ours
    for tensor, gradient in expected.items():
        assert (ours[tensor] - gradient).abs().max() <= 1e-5 * max(gradient.abs().max(), 1e-3), tensor
    logits_off = float((logits - result.logits)[real].abs().max())
    return {"logits within": logits_off, "gradients": apart(expected, ours)}


def trainable_base(family: str) -> Any:
    return tiny(family).requires_grad_(True)


def move_magnitudes(parameters: list[tuple[str, torch.nn.Parameter]]) -> None:
    draw = torch.Generator().manual_seed(3)
    for name, parameter in parameters:
        if "magnitude" in name:
            parameter.data.mul_(torch.rand(parameter.shape, generator=draw) + 0.5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["all-linear", "attention", "mlp"])
@pytest.mark.parametrize("method", METHOD)
def test_ours_loads_in_peft_and_agrees(
    method: str, targets: str, family: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    model = multi(family)
    model.add_adapter("x", METHODS["lora"](r=4, lora_alpha=3, target_modules=targets, **METHOD[method]))
    awaken(model)
    move_magnitudes(model.adapter_parameters("x"))
    model.save_adapter("x", tmp_path)
    theirs = peft.PeftModel.from_pretrained(trainable_base(family), tmp_path, is_trainable=True).eval()
    for what, value in assert_agree(model, "x", theirs).items():
        record_property(what, value)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHOD)
def test_theirs_loads_here_and_agrees(method: str, family: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=3, lora_alpha=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM", **METHOD[method]
    )
    theirs = peft.get_peft_model(trainable_base(family), config).eval()
    move_magnitudes(list(theirs.named_parameters()))
    theirs.save_pretrained(tmp_path / "theirs")
    model = multi(family)
    assert model.load_adapter(tmp_path / "theirs") == "theirs"
    assert_agree(model, "theirs", theirs)


EMBEDDINGS = {"llama": "embed_tokens", "gemma": "embed_tokens", "gpt_neox": "embed_in", "gpt_bigcode": "wte"}
BESIDE = {"llama": "q_proj", "gemma": "down_proj", "gpt_neox": "query_key_value", "gpt_bigcode": "c_fc"}


@pytest.mark.parametrize("family", EMBEDDINGS)
@pytest.mark.parametrize("method", ["lora", "rslora"])
def test_embeddings_load_both_ways_and_agree(method: str, family: str, tmp_path: Path) -> None:
    names = [EMBEDDINGS[family], BESIDE[family]]
    model = multi(family)
    model.add_adapter("x", METHODS["lora"](r=4, lora_alpha=3, target_modules=names, **METHOD[method]))
    awaken(model)
    model.save_adapter("x", tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(trainable_base(family), tmp_path / "ours", is_trainable=True).eval()
    assert_agree(model, "x", theirs)
    config = peft.LoraConfig(r=3, lora_alpha=4, target_modules=names, init_lora_weights=False, **METHOD[method])
    theirs = peft.get_peft_model(trainable_base(family), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")  # with the frozen embeddings, where it knows their name
    model.load_adapter(tmp_path / "theirs")
    assert_agree(model, "theirs", theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_pissa_starts_trains_and_saves_as_in_peft(family: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights="pissa")
    theirs = peft.get_peft_model(trainable_base(family), config).eval()
    model = multi(family)
    model.add_adapter("x", METHODS["lora"](r=4, lora_alpha=6, lora_init="pissa"))
    # singular vectors are unique up to their sign, the same for A and B
    for path, tensors in model.adapter_module("x").tensors.items():
        module = theirs.base_model.model.get_submodule(path)
        a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
        for ours, other in ((tensors["start_A"], a), (tensors["start_B"], b)):
            assert (ours.abs() - other.abs()).abs().max() <= 1e-4 * other.abs().max()
        for kind, other in (("A", a), ("B", b)):
            tensors[f"start_{kind}"].data.copy_(other)
            tensors[f"lora_{kind}"].data.copy_(other)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"

    ids, mask = rows(3)
    out = model(Batch.from_rows(ids, mask, None, ["x"] * 3))["x"]
    out.loss.backward()
    result = theirs(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100))
    result.loss.backward()
    assert out.loss.item() == pytest.approx(result.loss.item(), rel=1e-5)
    expected = gradients(theirs)
    for name, found in model.adapter_gradients("x").items():
        own, frozen = found.chunk(2, dim=0 if "lora_A" in name else 1)
        assert (own - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name
        assert (frozen == 0).all()

    for parameters in (model.adapter_parameters("x"), theirs.named_parameters()):
        for name, parameter in parameters:
            if "lora_" in name:
                parameter.data.mul_(1.1)
    model.save_adapter("x", tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    model.load_adapter(tmp_path / "theirs", "theirs")
    loaded = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "ours").eval()
    real, expected_logits = mask.bool(), theirs(input_ids=ids, attention_mask=mask).logits
    assert (expected_logits - model.logits(ids, mask, [None] * 3))[real].abs().max() > 1e-3
    for logits in (
        model.logits(ids, mask, ["x"] * 3),
        model.logits(ids, mask, ["theirs"] * 3),
        loaded(input_ids=ids, attention_mask=mask).logits,
    ):
        assert (logits - expected_logits)[real].abs().max() < 1e-5
