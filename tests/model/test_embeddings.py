"""Adapters of the input embeddings, where a user names them: company, padding, generation, files, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from mlora.adapters import METHODS
from mlora.model.batch import Batch
from mlora.model.embeddings import obstacle
from mlora.model.errors import ModelError
from mlora.model.generate import complete
from mlora.model.load import Origin
from mlora.model.multi import MultiAdapterModel
from tests import tinybase
from tests.families import awaken, multi, rows, tiny
from tests.model.test_graphs import Rerun, draw_rows
from tests.model.test_output_layer import assert_merged, export_as, saved
from tests.test_laws import obeys
from tests.test_peft import gradients

peft = pytest.importorskip("peft")
TARGETS = {
    "gemma": ("embed_tokens", "q_proj"),  # scales what it looks up
    "gpt_neox": ("embed_in", "query_key_value"),
    "falcon": ("word_embeddings", "query_key_value"),  # padded rows
    "qwen3_5_text": ("embed_tokens", "down_proj"),  # recurrent layers
}


@pytest.mark.parametrize("family", TARGETS)
def test_laws_hold_in_other_families(family: str, tmp_path: Path) -> None:
    obeys(METHODS["lora"](r=4, lora_dropout=0.1, target_modules=TARGETS[family]), family, tmp_path)


def test_the_start_is_pefts_and_the_token_of_padding_gets_no_gradient(tmp_path: Path) -> None:
    model = multi()
    model.add_adapter("x", {"r": 4, "lora_alpha": 6, "lora_dropout": 0.5, "target_modules": {"embed_tokens": True}})
    own = model.adapter_module("x").tensors["model.embed_tokens"]
    assert not own["lora_embedding_A"].any() and own["lora_embedding_B"].std().item() == pytest.approx(1, rel=0.2)
    assert model.num_parameters("x") == 4 * (160 + 32)
    assert {model.adapters["x"].learning_rate_scale(name, 16) for name in own} == {1}, "LoRA+ is of linear layers"
    prefix = "base_model.model.model.embed_tokens.lora_embedding_"
    shapes = {name: list(tensor.shape) for name, tensor in model.adapter_tensors("x").items()}
    assert shapes == {f"{prefix}A": [4, 160], f"{prefix}B": [32, 4]}
    awaken(model)
    model.save_adapter("x", tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == ["embed_tokens"]
    theirs = peft.PeftModel.from_pretrained(tiny("llama").requires_grad_(True), tmp_path, is_trainable=True).train()
    ids, mask = rows(3)
    ids[:, 1] = model.hf_model.config.pad_token_id  # in the midst of a text
    model.train()  # neither drops anything out of embeddings
    out = model(Batch.from_rows(ids, mask, None, ["x"] * 3))["x"]
    out.loss.backward()
    result = theirs(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), use_cache=False)
    result.loss.backward()
    assert out.loss.item() == pytest.approx(result.loss.item(), rel=1e-5)
    found, expected = model.adapter_gradients("x"), gradients(theirs)
    assert found.keys() == expected.keys()
    assert not found[f"{prefix}A"][:, model.hf_model.config.pad_token_id].any()
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name


@pytest.mark.parametrize("family", ["llama", "gemma", "falcon"])
def test_generations_in_one_batch_are_those_of_each_alone(family: str) -> None:
    model = multi(family)
    model.add_adapter("x", {"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS.get(family, ("embed_tokens",)))})
    model.add_adapter("y", {"r": 4})
    awaken(model, std=0.5)
    prompts, owners = [[5, 9, 7], [11, 4, 8, 30, 6], [5, 9, 7], [5, 9, 7]], ["x", "x", "y", None]
    model.use_tokenizer(tinybase.byte_tokenizer())
    together = complete(model, prompts, owners, 6)
    for prompt, owner, found in zip(prompts, owners, together, strict=True):
        assert complete(model, [prompt], [owner], 6) == [found]
    assert together[0] != together[3] and together[0] != together[2]


def test_only_their_name_asks_for_them_and_what_cannot_adapt_them_is_named() -> None:
    model = multi()
    for group in ("all-linear", "attention", "mlp"):
        model.add_adapter(group, {"r": 2, "target_modules": group})
        assert not any("embed" in name for name in model.adapter_tensors(group))
    for number, settings in enumerate(
        (
            {"use_dora": True},
            {"lora_init": "pissa"},
            {"routing_strategy": "mixlora"},
            {"routing_strategy": "mola"},
            {"routing_strategy": "loramoe"},
        )
    ):
        with pytest.raises(ModelError, match=r"model.embed_tokens: only methods lora and rslora with lora_init"):
            model.add_adapter(f"no{number}", {"r": 2, "target_modules": ["embed_tokens", "down_proj"], **settings})
        assert f"no{number}" not in model.adapters
    with pytest.raises(
        ModelError, match=r"'embed' not in .*; its linear layers are .*; its embeddings are embed_tokens"
    ):
        model.add_adapter("e", {"r": 2, "target_modules": ["embed"]})


class Normed(nn.Embedding):
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(super().forward(ids))


class Doubled(nn.Embedding):
    embed_scale = 3.0

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return super().forward(ids) * 2


@pytest.mark.parametrize("kind", [Normed, Doubled])
def test_embeddings_that_are_not_understood_are_refused(kind: type[nn.Embedding]) -> None:
    base = tiny("llama")
    base.model.embed_tokens = kind(160, 32).requires_grad_(False)
    model = MultiAdapterModel(base, Origin("tiny", "tiny"))
    with pytest.raises(ModelError, match=f"'embed_tokens' not in .*cannot be adapted: they are a {kind.__name__}"):
        model.add_adapter("x", {"r": 2, "target_modules": ["embed_tokens"]})
    model.add_adapter("x", {"r": 2})
    assert obstacle(nn.Embedding(4, 2, max_norm=1.0)) and obstacle(nn.Linear(4, 2)) and not obstacle(nn.Embedding(4, 2))


def test_a_peft_file_of_a_base_that_was_changed_is_refused(tmp_path: Path) -> None:
    base = tiny("llama").requires_grad_(True)
    base.model.embed_tokens.weight.data[7] += 1
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"])
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "x")
    model = multi()
    with pytest.raises(ModelError, match=r"embed_tokens.base_layer.weight is not the base model's"):
        model.load_adapter(tmp_path / "x")
    assert not model.adapters


def test_a_peft_file_whose_output_layer_follows_is_refused(tmp_path: Path) -> None:
    base = tiny("llama", tie_word_embeddings=True).requires_grad_(True)
    config = peft.LoraConfig(r=2, target_modules=["embed_tokens"], ensure_weight_tying=True)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "x")
    with pytest.raises(ModelError, match=r"unexpected base_model.model.lm_head.lora_A.weight"):
        multi(tie_word_embeddings=True).load_adapter(tmp_path / "x")


@pytest.mark.parametrize("tied", [False, True])
def test_they_are_merged_where_the_output_layer_stays_as_it_is(
    tied: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, places = saved(tmp_path, ["embed_tokens", "q_proj"], tie_word_embeddings=tied)
    status = export_as("merged", places)
    if tied:
        assert status == 2 and "share their weight with the output layer" in capsys.readouterr().err
    else:
        assert_merged(model, tmp_path)
    assert export_as("peft", places | {"output": str(tmp_path / "peft")}) == 0
    model.load_adapter(tmp_path / "peft")
    assert torch.equal(model.logits(*rows(2), ["peft"] * 2), model.logits(*rows(2), ["x"] * 2))


def test_no_step_with_them_is_recorded() -> None:
    model = multi()
    model.add_adapter("x", {"r": 2, "target_modules": ["embed_tokens"]})
    model.add_adapter("y", {"r": 2})
    assert not Rerun(model).suits({"x": draw_rows("x", 6, 1), "y": draw_rows("y", 6, 2)})
    assert Rerun(model).suits({"y": draw_rows("y", 6, 2)})
