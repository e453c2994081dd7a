"""Adapters in other programs' forms: what is written computes what the adapter computes."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mlora import MultiAdapterModel
from mlora.adapters import METHODS
from mlora.config import ConfigError
from mlora.export import export
from mlora.export.mixtral import SAME
from mlora.model import card
from mlora.model.errors import ModelError
from tests import tinybase
from tests.families import awaken, rows
from tests.test_laws import VARIANTS

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT.parent / "shared" / "fixtures"
MIXTURE = {"r": 4, "num_experts": 4, "router_init_range": 0.5}
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 5000.0, "original_max_position_embeddings": 1024}


class Case:
    """A tiny base with an awakened adapter, saved."""

    def __init__(self, place: Path, method: dict | str, family: str = "llama", **settings: object) -> None:
        self.base = tinybase.save(place / "tiny", family, **settings)
        self.folder, self.output = place / "x", place / "out"
        self.model = MultiAdapterModel.from_pretrained(str(self.base))
        self.model.add_adapter("x", VARIANTS[method] if isinstance(method, str) else method)
        awaken(self.model)
        draw = torch.Generator().manual_seed(3)
        for kind, parameter in self.model.adapter_parameters("x"):
            if kind == "lora_magnitude_vector":
                parameter.data.mul_(torch.rand(parameter.shape, generator=draw) + 0.5)
        self.model.save_adapter("x", self.folder, card.Making(("org/data", "/home/me/rows.jsonl")))

    def export(self, format: str, **settings: object) -> Path:
        return export(format, str(self.base), self.folder, self.output, **settings)

    def logits(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        ids, mask = rows(3)
        return ids, mask, mask.bool(), self.model.logits(ids, mask, ["x"] * 3)


@torch.no_grad()
def difference(case: Case, model) -> float:
    """Largest difference of logits to the adapter's, which must have an effect."""
    ids, mask, real, expected = case.logits()
    frozen = case.model.logits(ids, mask, [None] * 3)
    assert (expected - frozen)[real].abs().max() > 1e-2
    found = model(input_ids=ids, attention_mask=mask).logits.float()
    return (found - expected)[real].abs().max().item()


def loaded(folder: Path, architecture: str | None = None):
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert architecture is None or type(model).__name__ == architecture
    return model.eval()


@pytest.mark.parametrize(
    ("method", "family", "settings"),
    [
        ("mixlora", "llama", {}),
        ("mixlora", "llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3, "head_dim": 16}),
        ("mixlora", "llama", {"rope_parameters": YARN, "hidden_act": "gelu_pytorch_tanh"}),
        ("mixlora", "mistral", {"sliding_window": 4}),
        ("mixlora", "mistral", {"sliding_window": None, "head_dim": 4}),
        ("mixlora-experts", "llama", {}),
        ("mixlora-attention", "mistral", {}),
        ("mixdora", "llama", {}),
        ("mixdora-ups", "mistral", {}),
        ({"routing_strategy": "mixlora", **MIXTURE, "top_k": 1, "target_modules": ["up_proj", "q_proj"]}, "llama", {}),
        ({"routing_strategy": "mixlora", **MIXTURE, "top_k": 4, "use_rslora": True, "act_fn": "relu"}, "llama", {}),
        ("mixlora", "qwen3", {"head_dim": 16}),
        ("mixdora", "qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ],
)
def test_mixtral(
    method: dict | str, family: str, settings: dict, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    case = Case(tmp_path, method, family, **settings)
    folder = case.export("mixtral")
    architecture = "Qwen3MoeForCausalLM" if family == "qwen3" else "MixtralForCausalLM"
    found = difference(case, loaded(folder, architecture))
    record_property("as Mixtral", found)
    assert found < 1e-5
    assert json.loads((folder / "config.json").read_text())["architectures"] == [architecture]
    prompt = "one two"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), loaded(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    text = tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0, len(ids["input_ids"][0]) :])
    assert text == case.model.generate([prompt], ["x"], max_new_tokens=8, do_sample=False)[0]


@pytest.mark.parametrize(
    ("method", "family", "settings", "why"),
    [
        ("lora", "llama", {}, "not top-k.*formats for lora: peft, merged"),
        ("mixlora-dynamic", "llama", {}, "not top-k.*formats for mixlora-dynamic: none"),
        ("mixlora-switch", "llama", {}, "not top-k"),
        ("mola", "llama", {}, "not top-k"),
        ("mixlora", "llama", {"attention_bias": True}, "MixtralForCausalLM has no attention_bias"),
        ("mixlora", "llama", {"mlp_bias": True}, "has no mlp_bias"),
        ("mixlora", "qwen2", {}, "Qwen2ForCausalLM.*allowed: LlamaForCausalLM"),
        (
            "mixlora",
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            "layer_types",
        ),
    ],
)
def test_mixtral_refuses(method: str, family: str, settings: dict, why: str, tmp_path: Path) -> None:
    case = Case(tmp_path, method, family, **settings)
    with pytest.raises(ModelError, match=why):
        case.export("mixtral")
    assert {p.name for p in tmp_path.iterdir()} == {"tiny", "x"}, "nothing is left behind"


def test_mixtral_compares_what_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path, "mixlora", rms_norm_eps=0.1)
    monkeypatch.setattr("mlora.export.mixtral.SAME", tuple(name for name in SAME if name != "rms_norm_eps"))
    with pytest.raises(ModelError, match="the written model is not the adapter's: logits after one layer differ"):
        case.export("mixtral")
    assert {p.name for p in tmp_path.iterdir()} == {"tiny", "x"}, "nothing is left behind"


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "phi3", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "pissa"])
def test_merged(variant: str, family: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    case = Case(tmp_path, variant, family)
    folder = case.export("merged")
    model = loaded(folder, type(case.model.hf_model).__name__)
    found = difference(case, model)
    record_property("merged", found)
    assert found < 1e-4
    before, after = (json.loads((f / "config.json").read_text()) for f in (case.base, folder))
    assert before == after
    assert AutoTokenizer.from_pretrained(folder)("abc") == AutoTokenizer.from_pretrained(case.base)("abc")


@pytest.mark.parametrize(("format", "variant"), [("merged", "lora"), ("mixtral", "mixlora")])
def test_short_dtypes_say_what_rounding_costs(
    format: str, variant: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = Case(tmp_path, variant)
    with caplog.at_level(logging.WARNING):
        folder = case.export(format, dtype="bf16")
    (warning,) = [r.getMessage() for r in caplog.records if r.name.startswith("mlora.export")]
    assert "differ by up to" in warning
    model = loaded(folder)
    assert model.dtype == torch.bfloat16 and difference(case, model) < 0.5


@pytest.mark.parametrize("variant", ["mixlora", "loramoe", "mola"])
def test_merged_and_peft_refuse_mixtures(variant: str, tmp_path: Path) -> None:
    case = Case(tmp_path, variant)
    with pytest.raises(ModelError, match="--format merged: its updates differ from token to token"):
        case.export("merged")
    formats = "mixlora, mixtral" if variant == "mixlora" else "none"
    with pytest.raises(ModelError, match=f"--format peft: PEFT has no such method; formats for {variant}: {formats}"):
        case.export("peft")


def test_no_format_holds_a_mixture_with_a_head(tmp_path: Path) -> None:
    case = Case(tmp_path, "mixlora")
    case.model.add_adapter("h", VARIANTS["mixlora"], num_labels=2)
    case.model.save_adapter("h", tmp_path / "h")
    for format in ("peft", "mixlora", "mixtral", "merged"):
        with pytest.raises(ModelError, match="no format holds a mixlora with a classification head"):
            export(format, str(case.base), tmp_path / "h", case.output)


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "pissa", "lora-mlp"])
def test_peft(variant: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    case = Case(tmp_path, variant)
    folder = case.export("peft")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    assert difference(case, theirs) < 1e-5


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="needs ../shared/fixtures")
def test_peft_from_a_predecessors_bin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peft = pytest.importorskip("peft")
    from safetensors.torch import load_file

    monkeypatch.chdir(FIXTURES)
    folder = export("peft", "base/llama-tiny", "cases/llama-rslora/rslora", tmp_path / "out")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()
    recorded = load_file("cases/llama-rslora/tensors.safetensors")
    with torch.no_grad():
        found = theirs(input_ids=recorded["input_ids"], attention_mask=recorded["attention_mask"]).logits
    assert (found - recorded["logits_train"])[recorded["attention_mask"].bool()].abs().max() < 1e-4


READABLE = [
    ("mixlora", "llama"),
    ("mixlora", "mistral"),
    ("mixlora", "qwen2"),
    ("mixlora", "gemma"),
    ("mixlora", "gemma2"),
    ("mixlora", "phi"),
    ("mixlora", "phi3"),
    ("mixlora-attention", "llama"),
    ({"routing_strategy": "mixlora", **MIXTURE, "top_k": 3, "use_rslora": True, "act_fn": "relu"}, "llama"),
    (
        {"routing_strategy": "mixlora", **MIXTURE, "jitter_noise": 0.3, "target_modules": ["down_proj", "q_proj"]},
        "llama",
    ),
]


@pytest.mark.parametrize(("method", "family"), READABLE)
def test_mixlora_is_read_back(method: dict | str, family: str, tmp_path: Path) -> None:
    case = Case(tmp_path, method, family)
    folder = case.export("mixlora")
    assert {p.name for p in folder.iterdir()} == {"README.md", "adapter_config.json", "adapter_model.bin"}
    case.model.load_adapter(folder, "again", allow_pickle=True)
    ids, mask, _, expected = case.logits()
    assert torch.equal(case.model.logits(ids, mask, ["again"] * 3), expected)


PUBLIC = ROOT / ".venv" / "public"
"""Where `make test-all` puts the public package, apart from what the project itself can import."""
READER = """
import sys
import mixlora, torch
from safetensors.torch import load_file, save_file
rows = load_file(sys.argv[1])
for folder in sys.argv[2:]:
    model, config = mixlora.MixLoraModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model.eval()(input_ids=rows["ids"], attention_mask=rows["mask"]).logits
    save_file({"logits": logits}, f"{folder}/logits.safetensors", {"base": config.base_model_name_or_path})
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not PUBLIC.is_dir() and importlib.util.find_spec("mixlora") is None,
    reason="needs the public package mixlora 0.2.3: `make test-all` installs it into .venv/public",
)
def test_mixlora_is_read_by_the_public_package(tmp_path: Path) -> None:
    cases = [Case(tmp_path / str(i), method, family) for i, (method, family) in enumerate(READABLE)]
    ids, mask, real, _ = cases[0].logits()
    save_file({"ids": ids, "mask": mask}, tmp_path / "rows.safetensors")
    folders = [str(case.export("mixlora")) for case in cases]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(PUBLIC), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", READER, str(tmp_path / "rows.safetensors"), *folders]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    for case, folder, what in zip(cases, folders, READABLE, strict=True):
        expected = case.logits()[3]
        assert (expected - case.model.logits(ids, mask, [None] * 3))[real].abs().max() > 1e-2, what
        with safe_open(f"{folder}/logits.safetensors", "pt") as file:
            assert file.metadata()["base"] == str(case.base)
            assert (file.get_tensor("logits").float() - expected)[real].abs().max() < 1e-4, what


@pytest.mark.parametrize(
    ("method", "family", "why"),
    [
        ("mixlora-experts", "llama", "the package ignores expert_lora.r, expert_lora.lora_alpha"),
        ("mixdora", "llama", "use_dora"),
        ("mixdora-ups", "llama", "expert_lora.use_dora"),
        ("mixlora-dynamic", "llama", "top-k MixLoRA only"),
        ("mixlora-switch", "llama", "top-k MixLoRA only"),
        ("lora", "llama", "top-k MixLoRA only; formats for lora: peft, merged"),
        ("mixlora", "qwen3", "knows no qwen3 models"),
        ({"routing_strategy": "mixlora", **MIXTURE, "lora_alpha": 2.5}, "llama", "lora_alpha: 2.5"),
    ],
)
def test_mixlora_refuses_what_would_be_misread(method: dict | str, family: str, why: str, tmp_path: Path) -> None:
    case = Case(tmp_path, method, family)
    with pytest.raises(ModelError, match=why):
        case.export("mixlora")


def test_expert_settings_that_change_nothing_are_no_obstacle(tmp_path: Path) -> None:
    same = {"routing_strategy": "mixlora", **MIXTURE, "expert_lora": {"r": 4, "lora_dropout": 0.5}}
    folder = Case(tmp_path, same).export("mixlora")
    assert "expert_lora" not in json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("format", "variant", "library"),
    [
        ("peft", "dora", "peft"),
        ("merged", "lora", "transformers"),
        ("mixlora", "mixlora", "mixlora"),
        ("mixtral", "mixlora", "transformers"),
    ],
)
def test_cards(format: str, variant: str, library: str, tmp_path: Path) -> None:
    folder = Case(tmp_path, variant).export(format)
    front, text = card.read(folder)
    assert front["base_model"] == "tiny" and front["library_name"] == library
    assert front["datasets"] == ["org/data", "rows.jsonl"] and text.startswith("# out\n")
    assert str(tmp_path) not in (folder / "README.md").read_text() and "/home" not in text


class TestOutput:
    def test_existing_output_is_refused_or_replaced(self, tmp_path: Path) -> None:
        case = Case(tmp_path, "lora")
        case.export("peft")
        with pytest.raises(ConfigError, match="exists already; --overwrite replaces it"):
            case.export("merged")
        case.export("merged", overwrite=True)
        assert (case.output / "config.json").exists() and not (case.output / "adapter_config.json").exists()

    def test_only_an_export_is_overwritten(self, tmp_path: Path) -> None:
        case = Case(tmp_path, "lora")
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("no copy")
        with pytest.raises(ConfigError, match="no model or adapter"):
            export("peft", str(case.base), case.folder, tmp_path / "mine", overwrite=True)
        for holder in (case.folder, case.base, tmp_path):
            with pytest.raises(ConfigError, match="holds .* which is read"):
                export("peft", str(case.base), case.folder, holder, overwrite=True)
        assert (tmp_path / "mine" / "thesis.txt").exists() and (case.folder / "adapter_config.json").exists()

    @pytest.mark.parametrize(
        ("settings", "why"),
        [
            ({"format": "onnx"}, "'onnx' is not allowed; allowed: peft, mixlora, mixtral, merged"),
            ({"format": "peft", "dtype": "bf16"}, "allowed: none for peft"),
            ({"format": "merged", "dtype": "int8"}, "allowed: fp32, fp16, bf16"),
        ],
    )
    def test_values(self, settings: dict, why: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=why):
            export(base_model="b", adapter="a", output=tmp_path / "out", **settings)

    def test_an_adapter_of_another_model(self, tmp_path: Path) -> None:
        case = Case(tmp_path, "lora")
        other = tinybase.save(tmp_path / "other", intermediate_size=96)
        for format in ("peft", "merged"):
            with pytest.raises(ModelError, match="does not fit this base model"):
                export(format, str(other), case.folder, case.output)


def test_command(tmp_path: Path) -> None:
    case = Case(tmp_path, "lora")

    def launch(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(ROOT / "launch.py"), "export", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    arguments = ["--base_model", "tiny", "--adapter", "x", "--output", "out"]
    done = launch("--format", "merged", *arguments)
    assert done.returncode == 0 and "Wrote out: x as merged" in done.stdout, done.stderr
    assert difference(case, loaded(case.output)) < 1e-4
    again = launch("--format", "merged", *arguments)
    assert again.returncode == 2 and "--overwrite" in again.stderr and "Traceback" not in again.stderr
    wrong = launch("--format", "mixtral", *arguments, "--overwrite")
    assert wrong.returncode == 2 and "formats for lora: peft, merged" in wrong.stderr
    assert launch("--format", "onnx", *arguments).returncode == 2
    assert (case.output / "config.json").exists(), "a refused export leaves the earlier one"


def test_names_of_m_lora_0_3_2(tmp_path: Path) -> None:
    case = Case(tmp_path, "mixlora")
    folder = case.export("mixlora")
    tensors = torch.load(folder / "adapter_model.bin", weights_only=True)
    older = {}
    for name, tensor in tensors.items():
        _, _, layer, place, *rest = name.split(".")
        if rest[0] == "moe_gate":
            name = f"mixlora.layers.{layer}.gate.weight"
        elif place == "mlp":
            projection, _, expert, *leaf = rest
            name = ".".join(["mixlora.layers", layer, "experts", expert, projection, *leaf])
        older[name] = tensor
    assert older.keys() != tensors.keys()
    torch.save(older, folder / "adapter_model.bin")
    case.model.load_adapter(folder, "older", allow_pickle=True)
    ids, mask, _, expected = case.logits()
    assert torch.equal(case.model.logits(ids, mask, ["older"] * 3), expected)


def test_methods_are_all_in_the_table_or_ours_alone() -> None:
    from mlora.export.refusal import FORMATS_OF

    assert FORMATS_OF.keys() <= METHODS.keys()
