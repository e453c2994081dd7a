"""The seed's snippet: an adapter as an ordinary transformers model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from mlora import MixLoraModelForCausalLM, MultiAdapterModel
from mlora.adapters import METHODS
from mlora.model.errors import ModelError
from tests import tinybase
from tests.families import awaken, rows
from tests.test_laws import VARIANTS

FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "fixtures"
PROMPTS = ["one two three", "a"]
needs_fixtures = pytest.mark.skipif(not FIXTURES.is_dir(), reason="needs ../shared/fixtures")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinybase.save(tmp_path_factory.mktemp("base") / "tiny")


def trained(base: Path, variant: str, place: Path) -> MultiAdapterModel:
    model = MultiAdapterModel.from_pretrained(str(base))
    model.add_adapter("x", VARIANTS[variant])
    awaken(model, 0.5)
    model.save_adapter("x", place)
    return model


@pytest.mark.parametrize("variant", ["dora", "mixlora", "mixlora-dynamic", "mixlora-switch", "loramoe", "mola"])
def test_the_snippet_generates_what_our_model_does(variant: str, base: Path, tmp_path: Path) -> None:
    ours = trained(base, variant, tmp_path / "x")
    name_or_path_to_the_adapter = str(tmp_path / "x")

    model, config = MixLoraModelForCausalLM.from_pretrained(name_or_path_to_the_adapter)
    tokenizer = AutoTokenizer.from_pretrained(config.base_model_name_or_path)

    for prompt in PROMPTS:
        out = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=12, do_sample=False)
        text = tokenizer.decode(out[0, len(tokenizer(prompt)["input_ids"]) :], skip_special_tokens=True)
        assert text == ours.generate([prompt], ["x"], max_new_tokens=12, do_sample=False)[0]
    ids, mask = rows(3)
    plain = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        found, frozen = (m(input_ids=ids, attention_mask=mask).logits for m in (model, plain))
    real = mask.bool()
    assert (found - frozen)[real].abs().max() > 1e-2
    if variant != "mixlora-switch":  # whose capacity counts padding where rows are padded
        assert (found - ours.logits(ids, mask, ["x"] * 3))[real].abs().max() < 1e-5
    assert not found.requires_grad and config.method == ours.adapters["x"].model_copy(
        update={"target_modules": config.method.target_modules}
    )


def test_pipeline(base: Path, tmp_path: Path) -> None:
    ours = trained(base, "mixlora", tmp_path / "x")
    model, config = MixLoraModelForCausalLM.from_pretrained(tmp_path / "x", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(config.base_model_name_or_path)
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    answers = generator(PROMPTS, max_new_tokens=8, do_sample=False, return_full_text=False)
    expected = ours.generate(PROMPTS, ["x", "x"], max_new_tokens=8, do_sample=False)
    assert [answer[0]["generated_text"] for answer in answers] == expected


def test_adapter_moves_with_the_model(base: Path, tmp_path: Path) -> None:
    trained(base, "mixlora", tmp_path / "x")
    model, _ = MixLoraModelForCausalLM.from_pretrained(tmp_path / "x", torch_dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model(input_ids=torch.tensor([[3, 4]])).logits.isfinite().all()
    model.to("meta")
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    with pytest.raises(ModelError, match="export"):
        model.save_pretrained(tmp_path / "never")


@needs_fixtures
def test_a_folder_of_the_predecessor(monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    monkeypatch.chdir(FIXTURES)  # their base models are named relative to this folder
    model, config = MixLoraModelForCausalLM.from_pretrained("cases/llama-mixlora/mixlora")
    recorded = load_file("cases/llama-mixlora/tensors.safetensors")
    ids, mask = recorded["input_ids"], recorded["attention_mask"]
    difference = (model(input_ids=ids, attention_mask=mask).logits - recorded["logits_train"])[mask.bool()]
    assert difference.abs().max() < 1e-4 and config.base_model_name_or_path == "base/llama-tiny"


def test_errors(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="no such adapter folder"):
        MixLoraModelForCausalLM.from_pretrained(tmp_path / "none")
    with pytest.raises(ModelError, match="someone/something: neither a folder nor to be had"):
        MixLoraModelForCausalLM.from_pretrained("someone/something")
    folder = tmp_path / "x"
    model = MultiAdapterModel.from_pretrained(str(base))
    model.add_adapter("x", METHODS["lora"](r=2))
    model.save_adapter("x", folder)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), str(tmp_path / "gone")))
    with pytest.raises(ModelError, match="gone: no such file or folder"):
        MixLoraModelForCausalLM.from_pretrained(folder)
    shutil.rmtree(folder)
