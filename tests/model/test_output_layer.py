"""Adapters of the output layer, where a user names it: PEFT's values and gradients, on every path to logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from mlora.export import main as export
from mlora.model.batch import Batch
from mlora.model.errors import ModelError
from mlora.model.multi import MultiAdapterModel
from tests import tinybase
from tests.families import awaken, multi, rows, tiny

peft = pytest.importorskip("peft")
TARGETS = ("lm_head", "q_proj")


def saved(folder: Path, targets: list[str], **settings: object) -> tuple[MultiAdapterModel, dict[str, str]]:
    """Return a model with an adapter "x" that has an effect, and the paths of an export of it from a folder."""
    base = tinybase.save(folder / "base", **settings)
    model = MultiAdapterModel.from_pretrained(str(base))
    model.add_adapter("x", {"r": 4, "target_modules": targets})
    awaken(model)
    model.save_adapter("x", folder / "x")
    return model, {"base_model": str(base), "adapter": str(folder / "x"), "output": str(folder / "out")}


def export_as(form: str, places: dict[str, str]) -> int:
    """Return the status of an export."""
    return export(form, **places, dtype=None, revision=None, trust_remote_code=False, overwrite=False)


def assert_merged(model: MultiAdapterModel, folder: Path) -> None:
    """Hold what was exported to the folder `out` to the adapter "x"."""
    ids, mask = rows(2)
    merged = AutoModelForCausalLM.from_pretrained(folder / "out")(ids[:1, :4]).logits
    assert (merged - model.logits(ids[:1, :4], mask[:1, :4], ["x"])).abs().max() < 1e-4


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_it_is_pefts(tied: bool, settings: dict, tmp_path: Path) -> None:
    model = multi("llama", tie_word_embeddings=tied)
    model.add_adapter("x", {"r": 4, "target_modules": list(TARGETS), **settings})
    awaken(model)
    model.save_adapter("x", tmp_path)
    base = tiny("llama", tie_word_embeddings=tied).requires_grad_(True)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    theirs.set_attn_implementation("eager")
    ids, mask = rows(3)
    labels = ids.masked_fill((mask == 0) | (torch.arange(ids.shape[1]) < 3), -100)  # a loss over some tokens only
    out = model(Batch.from_rows(ids, mask, labels, ["x"] * 3))["x"]
    out.loss.backward()
    result = theirs(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False)
    result.loss.backward()
    real = mask.bool()
    assert (model.logits(ids, mask, ["x"] * 3) - result.logits)[real].abs().max() < 1e-5
    assert out.loss.item() == pytest.approx(result.loss.item(), rel=1e-5)
    gradients = model.adapter_gradients("x")
    expected = {n.replace(".default", ""): p.grad for n, p in theirs.named_parameters() if "lora_" in n}
    expected = {n.replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): g for n, g in expected.items()}
    assert gradients.keys() == expected.keys() and any("lm_head" in name for name in gradients)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-5 * max(gradient.abs().max(), 1e-3), name


def test_every_path_to_logits_reads_it_and_neighbours_do_not() -> None:
    model = multi()
    model.add_adapter("x", {"r": 4, "target_modules": ["lm_head"]})
    model.add_adapter("y", {"r": 4})
    awaken(model, std=0.5)
    ids, mask = rows(4)
    owners = ["x", None, "y", "x"]
    together = model.logits(ids, mask, owners)
    real = mask.bool()
    for i, owner in enumerate(owners):
        alone = model.logits(ids[i : i + 1], mask[i : i + 1], [owner])
        assert (together[i] - alone[0])[real[i]].abs().max() < 1e-5
    plain = model.logits(ids, mask, [None] * 4)
    assert (together[0] - plain[0])[real[0]].abs().max() > 0.1
    losses = model(Batch.from_rows(ids, mask, None, owners))
    for name, keep in (("x", [0, 3]), ("y", [2])):
        alone = model(Batch.from_rows(ids[keep], mask[keep], None, [name] * len(keep)))
        assert losses[name].loss.item() == pytest.approx(alone[name].loss.item(), rel=1e-5)
    batch = Batch.from_rows(ids[:1], mask[:1], None, ["x"])
    positions, options = torch.tensor([1, 2]), torch.tensor([[5, 6], [7, 8]])
    logits = together[0][positions]
    assert torch.allclose(model.score(batch, positions, options), logits.gather(1, options), atol=1e-5)
    found, _ = model.log_likelihoods(batch, positions, options[:, 0])
    assert torch.allclose(found, logits.log_softmax(-1).gather(1, options[:, :1])[:, 0], atol=1e-5)


def test_groups_leave_it_out_and_what_cannot_be_adapted_is_named() -> None:
    model = multi()
    model.add_adapter("all", {"r": 2, "target_modules": "all-linear"})
    assert not any("lm_head" in name for name in model.adapter_tensors("all"))
    with pytest.raises(ModelError, match="only methods lora"):
        model.add_adapter("m", {"routing_strategy": "mixlora", "r": 2, "target_modules": ["lm_head", "down_proj"]})
    assert "m" not in model.adapters


@pytest.mark.parametrize("tied", [False, True])
def test_it_is_merged_where_the_embeddings_stay_as_they_are(
    tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, places = saved(tmp_path, list(TARGETS), tie_word_embeddings=tied)
    status = export_as("merged", places)
    if tied:
        assert status == 2 and "shares its weight with the embeddings" in capsys.readouterr().err
        return
    assert_merged(model, tmp_path)


def test_losses_of_others_still_pass_the_wrapper_by(monkeypatch: pytest.MonkeyPatch) -> None:
    model = multi()
    assert model.outputs_plainly
    model.add_adapter("x", {"r": 4, "target_modules": ["lm_head"]})
    model.add_adapter("y", {"r": 4})
    ids, mask = rows(2)
    whole = [model(Batch.from_rows(ids, mask, None, ["y", owner])) for owner in ("x", "y")]
    monkeypatch.setattr(type(model), "_run", None)
    model(Batch.from_rows(ids, mask, None, ["y", "y"]))  # computes no whole logits
    assert whole[0]["y"].num_tokens < whole[1]["y"].num_tokens


def test_weights_can_be_tied_again() -> None:
    model = multi(tie_word_embeddings=True)
    ids, mask = rows(2)
    before = model.logits(ids, mask, [None, None])
    model.hf_model.tie_weights()
    assert torch.equal(model.logits(ids, mask, [None, None]), before)
    assert model.hf_model.get_output_embeddings().weight is model.hf_model.get_input_embeddings().weight


def test_a_peft_file_of_an_output_layer_is_read(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    theirs = peft.get_peft_model(tiny("llama").requires_grad_(True), config).eval()
    theirs.save_pretrained(tmp_path / "x")
    model = multi()
    model.load_adapter(tmp_path / "x")
    ids, mask = rows(2)
    expected = theirs(input_ids=ids, attention_mask=mask).logits
    assert (model.logits(ids, mask, ["x", "x"]) - expected)[mask.bool()].abs().max() < 1e-5


def test_a_peft_file_of_a_base_that_was_changed_is_refused(tmp_path: Path) -> None:
    base = tiny("llama").requires_grad_(True)
    base.lm_head.weight.data[7] += 1
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["lm_head"])).save_pretrained(tmp_path / "x")
    model = multi()
    with pytest.raises(ModelError, match=r"lm_head.base_layer.weight is not the base model's"):
        model.load_adapter(tmp_path / "x")
    assert not model.adapters
