"""The public predecessors and PEFT as oracles: tensors recorded by running them (`../shared/fixtures`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mlora.adapters import Segment
from mlora.config import parse_adapter
from mlora.model.batch import Batch
from mlora.model.files import read
from mlora.model.multi import MultiAdapterModel
from mlora.model.scope import Flight

FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
SCALED_BIAS = {"qwen2-dora", "phi-dora"}
"""The predecessor scales the bias with the weight; PEFT does not, nor do we: see the case peft-qwen2-dora."""
PADDED_AUX = ("mixlora-dynamic", "mixlora-switch")
"""The predecessor counts padding in the auxiliary losses of these, and so in the recorded gradients."""


def cases() -> list[str]:
    return sorted(p.parent.name for p in FIXTURES.glob("cases/*/case.json") if p.parent.name not in SCALED_BIAS)


def set_magnitudes(model: MultiAdapterModel, name: str, recorded: dict, prefix: str) -> None:
    """Set DoRA's magnitudes, drawn at random in the recordings and missing from the predecessor's files."""
    for path, tensors in model._adapters[name].tensors.items():
        if "lora_magnitude_vector" in tensors and f"{prefix}magnitude.{path}" in recorded:
            tensors["lora_magnitude_vector"].data.copy_(recorded[f"{prefix}magnitude.{path}"])
        elif "lora_magnitude_vector" in tensors:
            for expert, magnitude in enumerate(tensors["lora_magnitude_vector"].data):
                magnitude.copy_(recorded[f"{prefix}magnitude.{path}.experts.{expert}"])


def as_in_file(key: str, file_names: set[str]) -> str:
    """Return the tensor name of a recorded gradient; magnitudes are recorded under their module's path."""
    if not key.startswith("magnitude."):
        return key
    path = key.removeprefix("magnitude.").removeprefix("model.")
    return next(name for name in file_names if name.endswith(f"{path}.lora_magnitude_vector"))


def padded_losses(model: MultiAdapterModel, ids: torch.Tensor, mask: torch.Tensor, name: str) -> torch.Tensor:
    """Return loss + auxiliary loss of padded rows as transformers runs them, padding counted in the latter."""
    logits: dict[str, torch.Tensor] = {}
    lengths = (ids.shape[1],) * len(ids)
    segment = Segment(name, 0, ids.numel(), sequence_lengths=lengths, router_logits=logits)
    with model.scope.use(Flight([segment])):
        out = model.hf_model(ids, attention_mask=mask, use_cache=False).logits
    labels = ids.masked_fill(mask == 0, -100)[:, 1:]
    loss = torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), labels.flatten())
    return loss + model.adapters[name].aux_loss(list(logits.values()))


def load(case: Path, record: dict) -> tuple[MultiAdapterModel, dict[str, slice]]:
    model = MultiAdapterModel.from_pretrained(str(FIXTURES / record["base_model"]))
    if case.name.startswith("peft-"):
        model.load_adapter(case / "adapter", "adapter")
        return model, {"adapter": slice(None)}
    recorded = load_file(case / "tensors.safetensors")
    for adapter in record["adapters"]:
        name = model.load_adapter(case / adapter["name"], allow_pickle=True)
        prefix = f"{name}." if len(record["adapters"]) > 1 else ""
        set_magnitudes(model, name, recorded, prefix)
        given = adapter["config_given"]  # files lack the coefficients
        model._adapters[name].method = parse_adapter(given)
    return model, {a["name"]: slice(*a["rows"]) for a in record["adapters"]}


@pytest.mark.skipif(
    not FIXTURES.is_dir(), reason="needs ../shared/fixtures: tensors recorded from the predecessors and PEFT"
)
def test_every_case_of_these_methods_is_there() -> None:
    assert len(cases()) >= 33


@pytest.mark.parametrize("name", cases() or [pytest.param("", marks=pytest.mark.skip("needs ../shared/fixtures"))])
def test_values_and_gradients(name: str) -> None:
    case = FIXTURES / "cases" / name
    record, recorded = json.loads((case / "case.json").read_text()), load_file(case / "tensors.safetensors")
    peft = name.startswith("peft-")
    model, rows = load(case, record)
    ids, mask = recorded["input_ids"], recorded["attention_mask"]
    owners = [next(n for n, own in rows.items() if i in range(len(ids))[own]) for i in range(len(ids))]
    logits = model.logits(ids, mask, owners)
    out = model(Batch.from_rows(ids, mask, None, owners))
    padded_aux = len(rows) == 1 and record["adapters"][0]["method"].startswith(PADDED_AUX) if not peft else False
    if padded_aux:
        total = padded_losses(model, ids, mask, next(iter(rows)))
        assert total.item() == pytest.approx(record["total_loss_masked"], rel=1e-5)
        total.backward()
    else:
        sum(o.loss + o.aux_loss for o in out.values()).backward()
    for adapter, own in rows.items():
        prefix = f"{adapter}." if len(rows) > 1 else ""
        expected = recorded[f"{prefix}{'logits_infer' if peft else 'logits_train'}"]
        real = mask[own, : expected.shape[1]].bool()
        difference = (logits[own, : expected.shape[1]] - expected)[real].abs().max()
        assert difference <= 1e-4 * expected[real].abs().max()
        losses = record if peft else next(a for a in record["adapters"] if a["name"] == adapter)
        if losses.get("loss_masked") is not None:
            assert out[adapter].loss.item() == pytest.approx(losses["loss_masked"], rel=1e-5)
        if losses.get("aux_loss") is not None and not padded_aux:
            assert out[adapter].aux_loss.item() == pytest.approx(losses["aux_loss"], rel=1e-4)
        gradients = model.adapter_gradients(adapter)
        own_keys = [k for k in recorded if k.startswith(f"grad_masked.{prefix}")]
        wanted = {as_in_file(k.removeprefix(f"grad_masked.{prefix}"), set(gradients)): recorded[k] for k in own_keys}
        assert wanted.keys() == gradients.keys()
        for key, gradient in wanted.items():
            assert (gradients[key] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), key


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="needs ../shared/fixtures")
def test_files_are_written_as_they_were_read(tmp_path: Path) -> None:
    case = FIXTURES / "cases" / "llama-mixlora-expertlora"
    model, _ = load(case, json.loads((case / "case.json").read_text()))
    model.save_adapter("mixlora", tmp_path / "again")
    method, tensors, _ = read(tmp_path / "again", allow_pickle=False)
    _, before, _ = read(case / "mixlora", allow_pickle=True)
    assert tensors.keys() == before.keys() and all(torch.equal(tensors[k], before[k]) for k in before)
    assert method.model_dump(exclude={"target_modules"}) == model.adapters["mixlora"].model_dump(
        exclude={"target_modules"}
    )
