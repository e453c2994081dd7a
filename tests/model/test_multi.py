"""MultiAdapterModel: adapters at run time, generation, packing, files that do not fit."""

from __future__ import annotations

import gc
import json
import os
import pickle
import shutil
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mlora import Batch, MultiAdapterModel
from mlora.adapters import METHODS, Segment
from mlora.config import ConfigError
from mlora.model import attention, files, load
from mlora.model.errors import AdapterFileError, ModelError
from mlora.model.probe import keeps_apart
from mlora.model.recompute import Recompute
from mlora.model.scope import apart
from mlora.model.sites import Sites
from tests import tinybase
from tests.families import FAMILIES, awaken, multi, rows, tiny


def test_public_surface(tmp_path: Path) -> None:
    model = MultiAdapterModel.from_pretrained(str(tinybase.save(tmp_path / "base")))
    assert model.add_adapter("a", {"r": 4, "lora_alpha": 8}) == "a"
    model.add_adapter(
        "b", {"routing_strategy": "mixlora", "num_experts": 3, "top_k": 1, "r": 2, "name": "b", "lr": 1e-3}
    )
    assert model.adapters["a"] == METHODS["lora"](r=4, lora_alpha=8) and model.adapters["b"].num_experts == 3
    ids, mask = rows(3)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    out = model(Batch.from_rows(ids, mask, labels, ["b", None, "a"]))
    assert list(out) == ["b", "a"]
    assert out["a"].num_tokens == int((labels[2, 1:] != -100).sum())
    assert out["a"].aux_loss == 0 and out["b"].aux_loss > 0
    trainable = {id(p) for n in "ab" for _, p in model.adapter_parameters(n)}
    assert {id(p) for p in model.parameters() if p.requires_grad} == trainable
    model.save_adapter("b", tmp_path / "b")
    assert model.load_adapter(tmp_path / "b", "again") == "again"
    model.remove_adapter("b")
    assert list(model.adapters) == ["a", "again"]
    with pytest.raises(ModelError, match="'b' is not loaded; loaded: a, again"):
        model(Batch.from_rows(ids, mask, None, ["b"] * 3))
    with pytest.raises(ModelError, match="exists already"):
        model.add_adapter("a", {"r": 8})


def test_no_label_tokens_give_zero_not_nan() -> None:
    model = multi()
    model.add_adapter("a", {"r": 4})
    ids, mask = rows(2)
    out = model(Batch.from_rows(ids, mask, torch.full_like(ids, -100), ["a", "a"]))["a"]
    assert out.loss == 0 and out.num_tokens == 0


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "phi3"])
def test_generation_in_company_is_generation_alone(family: str, tmp_path: Path) -> None:
    model = MultiAdapterModel.from_pretrained(str(tinybase.save(tmp_path / "base", family)))
    model.add_adapter("a", {"r": 4, "lora_dropout": 0.5})
    model.add_adapter("m", {"routing_strategy": "mixlora", "num_experts": 4, "r": 4, "router_init_range": 0.5})
    model.add_adapter("s", {"routing_strategy": "mixlora-switch", "num_experts": 2, "r": 4, "expert_capacity": 5})
    awaken(model, std=0.5)
    model.train()
    prompts = ["one", "seventeen tokens?", "three", "x", "five is next", "seven", "more than capacity"]
    owners = ["a", "m", None, "m", "a", "s", "s"]
    together = model.generate(prompts, owners, max_new_tokens=12, do_sample=False)
    alone = [
        model.generate([p], [o], max_new_tokens=12, do_sample=False)[0] for p, o in zip(prompts, owners, strict=True)
    ]
    assert together == alone
    assert model.generate([prompts[0]], ["m"], max_new_tokens=12, do_sample=False) != alone[:1]
    assert model.generate([], [], max_new_tokens=3) == []


def test_renamed_at_run_time() -> None:
    model = multi()
    for name in ("a", "b"):
        model.add_adapter(name, {"r": 4, "lora_dropout": 0.5})
    awaken(model)
    ids, mask = rows(2)
    before = model.logits(ids, mask, ["a", "b"])
    model(Batch.from_rows(ids, mask, None, ["a", "b"]))["a"].loss.backward()
    parameters, gradients = [p for _, p in model.adapter_parameters("a")], model.adapter_gradients("a")
    model.rename_adapter("a", "c.2")
    assert list(model.adapters) == ["b", "c.2"]
    assert all(own is was for (_, own), was in zip(model.adapter_parameters("c.2"), parameters, strict=True))
    assert all(torch.equal(g, gradients[name]) for name, g in model.adapter_gradients("c.2").items())
    assert torch.equal(model.logits(ids, mask, ["c.2", "b"]), before)
    assert {id(p) for p in parameters} <= {id(p) for p in model.parameters()}
    with pytest.raises(ModelError, match="'a' is not loaded; loaded: b, c.2"):
        model.logits(ids, mask, ["a", "b"])
    for old, new, error in (("a", "d", ModelError), ("b", "c.2", ModelError), ("b", "../d", ConfigError)):
        with pytest.raises(error):
            model.rename_adapter(old, new)
    assert list(model.adapters) == ["b", "c.2"]
    model.add_adapter("a", {"r": 2})  # the name is free again


def test_a_hundred_adapters_in_one_batch(tmp_path: Path) -> None:
    model = multi()
    methods = [{"r": 1 + i % 3} for i in range(97)] + [{"r": 2, "routing_strategy": "mixlora", "num_experts": 3}] * 3
    for i, method in enumerate(methods):
        model.add_adapter(f"a{i}", method)
    awaken(model)
    for name in list(model.adapters):
        model.save_adapter(name, tmp_path / name)
        model.remove_adapter(name)
    for i in range(100):
        model.load_adapter(tmp_path / f"a{i}")
    ids, mask = rows(100)
    owners = [f"a{i}" for i in range(100)]
    together = model.logits(ids, mask, owners)
    losses = model(Batch.from_rows(ids, mask, None, owners))
    assert list(losses) == owners
    for i in (0, 1, 50, 98, 99):
        alone = model.logits(ids[i : i + 1], mask[i : i + 1], [owners[i]])[0]
        assert (alone - together[i])[mask[i].bool()].abs().max() < 1e-5
    distinct = model.logits(ids[:1].expand(100, -1), mask[:1].expand(100, -1), owners)[:, 0]
    assert len(distinct.unique(dim=0)) == 100


def test_memory_returns_when_an_adapter_is_removed() -> None:
    model = multi()

    def tensors() -> int:
        gc.collect()
        return sum(isinstance(o, torch.nn.Parameter) for o in gc.get_objects())

    before = tensors()
    for i in range(100):
        model.add_adapter(f"a{i}", {"r": 2})
    assert tensors() > before
    ids, mask = rows(4)
    owners = ["a0", "a1", "a2", None]
    torch.stack([o.loss for o in model(Batch.from_rows(ids, mask, None, owners)).values()]).sum().backward()
    memory = [weakref.ref(p) for _, p in model.adapter_parameters("a0")]
    model.scope.default = "a0"
    for i in range(100):
        model.remove_adapter(f"a{i}")
    assert tensors() == before and all(p() is None for p in memory)
    model.hf_model(ids)  # nobody's default any more


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_attention_fits(family: str) -> None:
    model = multi(family)
    # stablelm's attention takes no keywords, so it never hears of sequence lengths
    expected = "sdpa" if family == "stablelm" else attention.PACKED
    assert model.hf_model.config._attn_implementation == expected
    assert not model.sites.refused and not model.sites.unspanned and not model.sites.uncalled


def test_a_leak_between_packed_sequences_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = multi()
    own = model._inputs
    monkeypatch.setattr(model, "_inputs", lambda batch: own(batch) | {"packed_lengths": (sum(batch.lengths),)})
    assert not keeps_apart(model)
    model.check_packing()  # falls back on transformers' block masks, which this leak does not reach
    assert model.hf_model.config._attn_implementation == "sdpa" and not model.padded

    def leaking(batch: Batch) -> dict:
        return own(batch) | {"position_ids": torch.arange(len(batch.input_ids[0]))[None]}

    monkeypatch.setattr(model, "_inputs", lambda batch: own(batch) if model.padded else leaking(batch))
    model.check_packing()  # falls back on padded rows
    assert model.padded
    monkeypatch.setattr(model, "_inputs", lambda batch: own(batch) | {"input_ids": own(batch)["input_ids"].roll(1)})
    with pytest.raises(ModelError, match="LlamaForCausalLM cannot train several sequences at once: the logits of"):
        model.check_packing()


def test_a_leak_is_told_from_the_rounding_of_a_deep_model_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits move by a tenth when attention is rounded elsewhere, and by as much as they are when it leaks."""
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=60, num_attention_heads=4, vocab_size=500,
        initializer_range=0.25,
    )  # fmt: skip
    torch.manual_seed(0)
    base = LlamaForCausalLM._from_config(config, attn_implementation=attention.PACKED, dtype=torch.bfloat16)
    model = MultiAdapterModel(base.requires_grad_(False).eval(), load.Origin("deep", "deep"))
    model.check_packing()
    assert model.hf_model.config._attn_implementation == attention.PACKED
    own = model._inputs
    monkeypatch.setattr(model, "_inputs", lambda batch: own(batch) | {"packed_lengths": (sum(batch.lengths),)})
    assert not keeps_apart(model)


@pytest.mark.parametrize(
    "method",
    [
        {},
        {"routing_strategy": "mixlora", "num_experts": 3, "jitter_noise": 0.1},
        {"routing_strategy": "mixlora-switch", "num_experts": 3, "expert_capacity": 2, "ffn_dropout": 0.1},
        {"routing_strategy": "loramoe", "num_experts": 3, "router_loss": True},
    ],
)
def test_padded_rows_compute_what_the_packed_stream_does(method: dict) -> None:
    model = multi()
    for name in ("a", "b"):
        model.add_adapter(name, {"r": 4, "lora_dropout": 0.2, **method})
    awaken(model)
    ids, mask = rows(5)
    batch = Batch.from_rows(ids, mask, None, ["b", None, "a", "b", "a"], step=3)
    positions, options = torch.tensor([3, 20]), torch.tensor([[5, 6], [7, 8]])
    found = []
    for model.padded in (False, True):
        model.train()
        model.zero_grad()
        out = model(batch)
        torch.stack([o.loss + o.aux_loss for o in out.values()]).sum().backward()
        gradients = [g.clone() for name in "ab" for g in model.adapter_gradients(name).values()]
        found.append([*(v for o in out.values() for v in o[:3]), *gradients, model.score(batch, positions, options)])
        assert model.shares_prompts(None) != model.padded
        found[-1] += [model.logits(ids, mask, ["a"] * 5), *model.log_likelihoods(batch, positions, options[:, 0])]
    for packed, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, packed, rtol=1e-4, atol=1e-6)


def test_a_model_whose_tokens_see_what_follows_is_refused() -> None:
    model = tiny("llama")
    forward = model.model.layers[0].forward

    def backwards(x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return forward(x + x.mean(1, keepdim=True), *args, **kwargs)

    model.model.layers[0].forward = backwards
    with pytest.raises(ModelError, match="LlamaForCausalLM is no causal language model"):
        MultiAdapterModel(model, load.Origin("x", "x")).check_packing()


def test_sliding_windows_are_kept() -> None:
    model = multi("mistral", sliding_window=4)
    ids, mask = rows(3, length=14)
    packed = model.logits(ids, mask, [None] * 3)
    other = tiny("mistral", sliding_window=4)
    other.set_attn_implementation("eager")
    expected = other(ids, attention_mask=mask, use_cache=False).logits
    assert (packed - expected)[mask.bool()].abs().max() < 1e-5
    full = multi("mistral", sliding_window=None).logits(ids, mask, [None] * 3)
    assert (packed - full)[mask.bool()].abs().max() > 1e-3


def test_a_block_that_computes_something_else_is_refused() -> None:
    model = tiny("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: 2 * mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
    sites = Sites(model)
    assert list(sites.unspanned) == ["model.layers.1.mlp"] and not sites.refused
    assert len(sites.targets("all-linear")) == 14, "its linear layers can be adapted one by one"
    with pytest.raises(ModelError, match="cannot take experts: model.layers.1.mlp"):
        sites.all_blocks()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./nowhere", "no such file or folder"),
        ("/nowhere/at/all", "no such file or folder"),
        ("nowhere.gguf", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
    ],
)
def test_a_missing_base_model_is_never_looked_up_on_the_hub(name: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        MultiAdapterModel.from_pretrained(name)


def test_an_unreachable_hub_model_says_what_to_do() -> None:
    with pytest.raises(
        ModelError, match="--base_model nobody/nothing: is no folder here, hub offline mode .*Without a"
    ):
        MultiAdapterModel.from_pretrained("nobody/nothing")


def test_wrong_arguments_name_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="dtype: 'float8'"):
        MultiAdapterModel.from_pretrained("smollm2", dtype="float8")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="neither config.json nor a GGUF file"):
        load.find(str(tmp_path / "empty"))


def test_a_base_model_without_all_of_its_weights_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tinybase.save(tmp_path / "b")
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "layers.1.mlp" not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="lack weights of LlamaForCausalLM: model.layers.1.mlp.down_proj.weight"):
        MultiAdapterModel.from_pretrained(str(folder))


def test_names_are_checked_before_anything_happens() -> None:
    model = multi()
    for name in ("../up", "/abs", ".hidden", "a/b", "con", "x" * 65, ""):
        with pytest.raises(ConfigError):
            model.add_adapter(name, {"r": 2})
    model.add_adapter("with.dot-and_more", {"r": 2})
    assert list(model.adapters) == ["with.dot-and_more"]


def test_tokens_are_parted_by_one_operation() -> None:
    """Of slices each would have a gradient as long as the stream."""
    x = torch.randn(5, 3, requires_grad=True)
    segments = [Segment("a", 0, 2), Segment("b", 2, 5)]
    parts = apart(x, segments)
    assert all(torch.equal(part, x[s.start : s.stop]) for part, s in zip(parts, segments, strict=True))
    assert len({part.grad_fn for part in parts}) == 1
    assert apart(x, [Segment("a", 0, 5)]) == (x,)


class TestFiles:
    @pytest.fixture
    def saved(self, tmp_path: Path) -> Path:
        model = multi()
        model.add_adapter("a", {"r": 4})
        model.save_adapter("a", tmp_path / "a")
        return tmp_path / "a"

    def refused(self, folder: Path, said: str, **settings: object) -> None:
        model = multi(**settings)
        with pytest.raises(ModelError, match=said):
            model.load_adapter(folder)
        assert not model.adapters

    def test_missing_and_broken_files_are_named(self, saved: Path) -> None:
        self.refused(saved / "no", "no such adapter folder")
        (saved / "adapter_model.safetensors").rename(saved / "gone")
        self.refused(saved, "neither adapter_model.safetensors nor adapter_model.bin")
        (saved / "adapter_model.safetensors").write_bytes((saved / "gone").read_bytes()[:1000])
        self.refused(saved, "adapter_model.safetensors: cannot be read")
        (saved / "adapter_config.json").write_text("{")
        self.refused(saved, "adapter_config.json: is not JSON")

    def test_a_base_of_another_shape_is_refused(self, saved: Path) -> None:
        self.refused(
            saved, r"does not fit this base model: .*is \[4, 32\], the base model needs \[4, 48\]", hidden_size=48
        )
        self.refused(saved, "trained on tiny-llama, loaded on .*missing base_model.model.model.layers.2", layers=3)

    @pytest.mark.parametrize("method", ["lora", "mixlora"])
    @pytest.mark.parametrize("family", ["mistral", "gpt_neox"])
    def test_r16_a_base_of_another_architecture_is_refused(self, tmp_path: Path, family: str, method: str) -> None:
        """A mistral of the same shape takes the very same tensors, and would compute something else."""
        model = multi("llama")
        model.add_adapter("a", METHODS[method](r=4))
        model.save_adapter("a", tmp_path / "a")
        self.refused(tmp_path / "a", "on tiny-llama, a llama model; tiny-.* is a", family=family)

    def test_r3_an_adapter_is_one_sequence_of_bytes(self, tmp_path: Path) -> None:
        model = multi()
        model.add_adapter("a", {"r": 2}, num_labels=3)
        model.adapter_module("a").head_task = "glue:\N{EURO SIGN}"
        written = set()
        for number in range(20):
            model.save_adapter("a", tmp_path / str(number))
            written.add((tmp_path / str(number) / files.TENSORS).read_bytes())
        assert len(written) == 1
        assert multi().load_adapter(tmp_path / "0", "b") and files.head_task(tmp_path / "0") == "glue:\N{EURO SIGN}"

    def test_r16_another_name_alone_is_a_warning(self, saved: Path, caplog: pytest.LogCaptureFixture) -> None:
        model = multi()
        model.load_adapter(saved, "a")
        assert not caplog.text
        model.origin = replace(model.origin, given="elsewhere/llama")
        model.load_adapter(saved, "b")
        assert "was trained on tiny-llama and is loaded on elsewhere/llama" in caplog.text

    def test_r16_a_packaged_base_has_its_hub_s_name_for_others_and_ours_for_us(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        hub = "HuggingFaceTB/SmolLM2-135M-Instruct"
        model = multi()
        model.origin = replace(model.origin, given="smollm2")
        model.add_adapter("a", {"r": 2})
        model.save_adapter("a", tmp_path / "a")
        config = json.loads((tmp_path / "a" / files.CONFIG).read_text())
        assert config["base_model_name_or_path"] == hub
        assert f"base_model: {hub}\n" in (tmp_path / "a" / "README.md").read_text()
        assert files.base_model(tmp_path / "a") == ("smollm2", None), "what it was trained on, to the bit"
        model.load_adapter(tmp_path / "a", "same")
        model.origin = replace(model.origin, given=hub)
        model.load_adapter(tmp_path / "a", "b")
        model.save_adapter("b", tmp_path / "b")
        assert files.base_model(tmp_path / "b") == (hub, None)
        config["base_model_name_or_path"] = "smollm2"  # as it was written until now
        (tmp_path / "b" / files.CONFIG).write_text(json.dumps(config))
        model.load_adapter(tmp_path / "b", "c")
        assert not caplog.text

    def test_what_we_cannot_compute_is_refused(self, saved: Path) -> None:
        config = json.loads((saved / "adapter_config.json").read_text())
        for key, value in (
            ("bias", "all"),
            ("rank_pattern", {"q_proj": 2}),
            ("modules_to_save", ["lm_head"]),
            ("layer_replication", [[0, 2], [1, 2]]),
            ("alora_invocation_tokens", [1]),
        ):
            (saved / "adapter_config.json").write_text(json.dumps(config | {key: value}))
            self.refused(saved, f"{key}: .* is not supported")
        for start in ("pissa_niter_4", "loftq", "lora_ga"):
            (saved / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": start}))
            self.refused(saved, f"{start}' belongs to a base model that PEFT has changed")
        (saved / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA3"}))
        self.refused(saved, "method 'ia3' is unknown")

    def test_pickles_are_read_only_where_allowed_and_never_run(self, saved: Path, tmp_path: Path) -> None:
        tensors = multi()
        tensors.load_adapter(saved, "a")
        torch.save(tensors.adapter_tensors("a"), saved / "adapter_model.bin")
        (saved / "adapter_model.safetensors").unlink()
        self.refused(saved, "is a pickle and is read only where you allow it")
        model = multi()
        model.load_adapter(saved, "b", allow_pickle=True)

        class Payload:
            def __reduce__(self) -> tuple:
                return Path.touch, (tmp_path / "owned",)

        (saved / "adapter_model.bin").write_bytes(pickle.dumps(Payload()))
        with pytest.raises(AdapterFileError, match="is not a file of plain tensors"):
            model.load_adapter(saved, "c", allow_pickle=True)
        shutil.copy(saved / "adapter_model.bin", saved / "adapter_model.safetensors")
        with pytest.raises(AdapterFileError, match="cannot be read"):
            model.load_adapter(saved, "c")
        assert not (tmp_path / "owned").exists()


class TestWholeFolders:
    def leave(self, path: Path, content: str) -> None:
        path.mkdir()
        (path / "file").write_text(content)

    def test_a_crash_between_the_renames_loses_nothing(self, tmp_path: Path) -> None:
        place = tmp_path / "a"
        self.leave(tmp_path / ".a.old", "old")  # set aside, and the new one not yet in its place
        self.leave(tmp_path / ".a.0123abcd", "new")
        self.leave(tmp_path / ".a.b.0123abcd", "another adapter's")
        files.clear_leftovers(place)
        assert {p.name: (p / "file").read_text() for p in tmp_path.iterdir()} == {
            "a": "old",
            ".a.b.0123abcd": "another adapter's",
        }

    def test_what_was_replaced_goes_and_what_failed_leaves_nothing(self, tmp_path: Path) -> None:
        place = tmp_path / "a"
        for content in ("one", "two"):
            with files.whole_folder(place) as folder:
                (folder / "file").write_text(content)
        with pytest.raises(RuntimeError), files.whole_folder(place) as folder:
            (folder / "file").write_text("three")
            raise RuntimeError
        assert [p.name for p in tmp_path.iterdir()] == ["a"] and (place / "file").read_text() == "two"


@pytest.mark.parametrize(
    ("recompute", "attention", "block"),
    [
        (Recompute(), (1, 1), (1, 1)),
        (Recompute("middle"), (1, 1), (2, 2)),
        (Recompute("all"), (2, 2), (2, 2)),
        (Recompute("middle", 1), (1, 1), (2, 1)),
        (Recompute("all", 1), (2, 1), (2, 1)),
        (Recompute("all", 0), (1, 1), (1, 1)),
    ],
    ids=str,
)
def test_what_is_recomputed_runs_again_in_backward(
    recompute: Recompute, attention: tuple[int, int], block: tuple[int, int]
) -> None:
    ids, mask = rows(3)
    model = multi()
    model.add_adapter("a", {"r": 4, "routing_strategy": "mixlora", "num_experts": 3})
    model.recompute = recompute
    runs: Counter[str] = Counter()
    for number, layer in enumerate(model.hf_model.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, n=number: runs.update([f"attention {n}"]))
        layer.mlp.frozen.down_proj.frozen.register_forward_hook(lambda *_, n=number: runs.update([f"block {n}"]))
    model(Batch.from_rows(ids, mask, None, ["a"] * 3))["a"].loss.backward()
    assert tuple(runs[f"attention {n}"] for n in range(2)) == attention
    assert tuple(runs[f"block {n}"] for n in range(2)) == block


def test_the_middle_of_a_family_without_it_is_refused() -> None:
    model = multi("mamba")
    with pytest.raises(ModelError, match="MambaForCausalLM has no feed-forward block.*allowed: none, all"):
        model.recompute = Recompute("middle")


@pytest.mark.parametrize("method", [{}, {"routing_strategy": "mixlora", "num_experts": 3, "top_k": 3}])
def test_dropout_depends_on_seed_adapter_step_row_and_nothing_else(method: dict) -> None:
    def loss(seed: int = 1, name: str = "a", step: int | None = 0, first: bool = True) -> float:
        model = multi(seed=seed)
        for other in ("a", "b"):
            model.add_adapter(other, {"r": 4, "lora_dropout": 0.5, **method})
            drawn = torch.Generator().manual_seed(3)  # the same values whatever seed and name
            for _, parameter in model.adapter_parameters(other):
                parameter.data.copy_(torch.empty(parameter.shape).normal_(0, 0.3, generator=drawn))
        model.train()
        ids, mask = rows(1)
        if first:
            batch = Batch.from_rows(ids, mask, None, [name], step=step)
        else:  # the same row as the second of its adapter, the first without labels
            labels = torch.cat([torch.full_like(ids, -100), ids.masked_fill(mask == 0, -100)])
            batch = Batch.from_rows(ids.repeat(2, 1), mask.repeat(2, 1), labels, [name, name], step=step)
        return model(batch)[name].loss.item()

    plain = loss()
    assert loss() == plain
    for change in ({"seed": 2}, {"name": "b"}, {"step": 1}, {"first": False}):
        assert abs(loss(**change) - plain) > 1e-4, change
    assert loss(step=None) == pytest.approx(loss(step=None, first=False), rel=1e-6)


@pytest.mark.parametrize("name", ["train", "type", "items", "forward", "half"])
def test_any_allowed_name_is_a_name(name: str) -> None:
    model = multi()
    model.add_adapter(name, {"r": 2})
    model.remove_adapter(name)
    assert not model.adapters


def test_a_window_that_is_switched_off_can_be_turned_on(tmp_path: Path) -> None:
    folder = tinybase.save(tmp_path / "b", "qwen2", max_window_layers=0, use_sliding_window=False)
    config = json.loads((folder / "config.json").read_text())  # transformers does not write a window that is off
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 4}))
    ids, mask = rows(2, length=14)
    plain, windowed = (MultiAdapterModel.from_pretrained(str(folder), sliding_window=on) for on in (False, True))
    difference = plain.logits(ids, mask, [None] * 2) - windowed.logits(ids, mask, [None] * 2)
    assert difference[mask.bool()].abs().max() > 1e-4


def test_a_layer_that_is_read_without_being_called_is_left_out() -> None:
    model = multi("mamba")
    assert {path.rpartition(".")[2] for path in model.sites.uncalled} == {"dt_proj"}
    model.add_adapter("a", {"r": 2})
    assert {path.rpartition(".")[2] for path in model._adapters["a"].tensors} == {"in_proj", "x_proj", "out_proj"}
    with pytest.raises(ModelError, match="never calls backbone.layers.0.mixer.dt_proj"):
        model.add_adapter("b", {"r": 2, "target_modules": ["dt_proj"]})


@pytest.mark.parametrize("method", [{}, {"routing_strategy": "mola", "num_experts": 3}])
def test_names_that_stand_in_two_places_are_saved_with_what_tells_them_apart(method: dict, tmp_path: Path) -> None:
    model = multi("gpt_bigcode")
    for group, names in (("mlp", ["c_fc", "mlp.c_proj"]), ("attention", ["attn.c_proj", "c_attn"])):
        model.add_adapter(group, {"r": 2, "target_modules": group, **method})
        awaken(model)
        model.save_adapter(group, tmp_path / group)
        assert json.loads((tmp_path / group / "adapter_config.json").read_text())["target_modules"] == names
        model.load_adapter(tmp_path / group, f"{group}-again")
        again = model.adapter_tensors(f"{group}-again")
        assert all(torch.equal(tensor, again[name]) for name, tensor in model.adapter_tensors(group).items())


def test_a_gguf_s_config_is_read_once_and_again_where_the_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[load.Origin] = []
    monkeypatch.setattr(load, "_read_config", lambda origin: reads.append(origin) or LlamaConfig())
    (tmp_path / "m.gguf").write_bytes(b"")
    origin = load.find(str(tmp_path / "m.gguf"))
    load.read_config(origin).num_hidden_layers = 1
    assert load.read_config(origin).num_hidden_layers == LlamaConfig().num_hidden_layers and len(reads) == 1
    os.utime(tmp_path / "m.gguf", ns=(1, 1))
    load.read_config(origin)
    assert len(reads) == 2
