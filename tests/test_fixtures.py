"""The public predecessors and PEFT as oracles: tensors recorded by running them (`../shared/fixtures`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mlora.adapters import METHODS
from mlora.model.batch import Batch
from mlora.model.files import read
from mlora.model.multi import MultiAdapterModel

FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
HAVE = {"lora", "rslora", "mixlora"}


def cases() -> list[str]:
    found = []
    for path in sorted(FIXTURES.glob("cases/*/case.json")):
        case = json.loads(path.read_text())
        methods = {adapter.get("method", "") for adapter in case.get("adapters", [])}
        dora = "dora" in path.parent.name
        if not dora and (path.parent.name.startswith("peft-") or methods <= HAVE):
            found.append(path.parent.name)
    return found


def load(case: Path, record: dict) -> tuple[MultiAdapterModel, dict[str, slice]]:
    model = MultiAdapterModel.from_pretrained(str(FIXTURES / record["base_model"]))
    if case.name.startswith("peft-"):
        model.load_adapter(case / "adapter", "adapter")
        return model, {"adapter": slice(None)}
    for adapter in record["adapters"]:
        method, tensors, _ = read(case / adapter["name"], allow_pickle=True)
        given = {k: v for k, v in adapter["config_given"].items() if k in METHODS[method.method].model_fields}
        model.add_adapter(adapter["name"], METHODS[method.method](**given))  # files lack the coefficients
        model.restore_adapter(adapter["name"], tensors, case.name)
    return model, {a["name"]: slice(*a["rows"]) for a in record["adapters"]}


@pytest.mark.skipif(
    not FIXTURES.is_dir(), reason="needs ../shared/fixtures: tensors recorded from the predecessors and PEFT"
)
def test_every_case_of_these_methods_is_there() -> None:
    assert len(cases()) >= 17


@pytest.mark.parametrize("name", cases() or [pytest.param("", marks=pytest.mark.skip("needs ../shared/fixtures"))])
def test_values_and_gradients(name: str) -> None:
    case = FIXTURES / "cases" / name
    record, recorded = json.loads((case / "case.json").read_text()), load_file(case / "tensors.safetensors")
    model, rows = load(case, record)
    ids, mask = recorded["input_ids"], recorded["attention_mask"]
    owners = [next(n for n, own in rows.items() if i in range(len(ids))[own]) for i in range(len(ids))]
    logits = model.logits(ids, mask, owners)
    out = model(Batch.from_rows(ids, mask, None, owners))
    sum(o.loss + o.aux_loss for o in out.values()).backward()
    peft = name.startswith("peft-")
    for adapter, own in rows.items():
        prefix = f"{adapter}." if len(rows) > 1 else ""
        expected = recorded[f"{prefix}{'logits_infer' if peft else 'logits_train'}"]
        real = mask[own, : expected.shape[1]].bool()
        difference = (logits[own, : expected.shape[1]] - expected)[real].abs().max()
        assert difference <= 1e-4 * expected[real].abs().max()
        losses = record if peft else next(a for a in record["adapters"] if a["name"] == adapter)
        if losses.get("loss_masked") is not None:
            assert out[adapter].loss.item() == pytest.approx(losses["loss_masked"], rel=1e-5)
        if losses.get("aux_loss") is not None:
            assert out[adapter].aux_loss.item() == pytest.approx(losses["aux_loss"], rel=1e-4)
        gradients = model.adapter_gradients(adapter)
        wanted = {
            k.removeprefix(f"grad_masked.{prefix}"): v
            for k, v in recorded.items()
            if k.startswith(f"grad_masked.{prefix}")
        }
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
