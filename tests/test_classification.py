"""Adapters with a classification head: laws, PEFT and transformers as live oracles, files, refusals."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification

from mlora import Batch, MixLoraModelForCausalLM, MultiAdapterModel
from mlora.adapters import METHODS
from mlora.config import JobConfig, RunOptions
from mlora.data import EncodedQuestion, Sample
from mlora.evaluation import Examination, Request, check_heads, predict
from mlora.export import export
from mlora.model import card, files
from mlora.model.batch import Row
from mlora.model.errors import AdapterFileError, ModelError
from mlora.model.recompute import Recompute
from mlora.runs.program import main
from mlora.training.job import Job
from mlora.training.trainer import train
from tests import taskdata, tinybase
from tests.families import PADDED, awaken, multi, rows, tiny

LABELS = 3
CLASSES = [2, 0, 1, 1, 0, 2]
SMALL = {"r": 4, "lora_dropout": 0.1}
VARIANTS = {
    "lora": METHODS["lora"](**SMALL),
    "dora": METHODS["lora"](**SMALL, use_dora=True),
    "pissa": METHODS["lora"](**SMALL, lora_init="pissa"),
    "mixlora": METHODS["mixlora"](**SMALL, num_experts=4, router_init_range=0.5),
    "loramoe": METHODS["loramoe"](**SMALL, num_experts=3),
    "mola": METHODS["mola"](**SMALL, num_experts=4),
}


def pair(family: str, variant: str = "lora") -> MultiAdapterModel:
    model = multi(family)
    model.add_adapter("x", VARIANTS[variant], num_labels=LABELS)
    model.add_adapter("words", METHODS["lora"](r=2, lora_dropout=0.2))
    awaken(model)
    return model


def packed(owners: list[str | None], chosen: list[int] | None = None) -> Batch:
    ids, mask = rows(len(owners))
    chosen = list(range(len(owners))) if chosen is None else chosen
    classes = [CLASSES[i] if owners[i] == "x" else None for i in chosen]
    return Batch.from_rows(ids[chosen], mask[chosen], None, [owners[i] for i in chosen], classes=classes)


def losses_and_gradients(model: MultiAdapterModel, batch: Batch) -> dict:
    model.zero_grad()
    out = model(batch)
    sum(o.loss + o.aux_loss for o in out.values()).backward()
    return {n: (o.loss.item(), int(o.num_tokens), model.adapter_gradients(n)) for n, o in out.items()}


def assert_same(one: tuple, other: tuple, tolerance: float = 2e-5) -> None:
    assert one[0] == pytest.approx(other[0], rel=tolerance) and one[1] == other[1]
    assert one[2].keys() == other[2].keys() and one[2]
    largest = max(g.abs().max() for g in one[2].values())
    for name, gradient in one[2].items():
        scale = max(gradient.abs().max(), 1e-3 * largest)
        assert (gradient - other[2][name]).abs().max() <= tolerance * 10 * scale, name


@pytest.mark.parametrize(
    ("variant", "family"),
    [(v, "llama") for v in VARIANTS] + [("lora", f) for f in ("gemma2", "phi", "gpt_neox", *PADDED)],
)
def test_laws(variant: str, family: str, tmp_path: Path) -> None:
    model = pair(family, variant)
    owners = ["words", "x", None, "x", "words", "x"]
    model.train()
    mixed = losses_and_gradients(model, packed(owners))
    assert mixed["x"][1] == 3, "labels are counted by rows"
    model.recompute = Recompute("all")
    recomputed = losses_and_gradients(model, packed(owners))
    model.recompute = Recompute()
    for name in ("x", "words"):
        alone = losses_and_gradients(model, packed(owners, [i for i, owner in enumerate(owners) if owner == name]))
        assert_same(alone[name], mixed[name])
        assert_same(recomputed[name], mixed[name])
    head = mixed["x"][2][f"{model.adapters['x'].file_prefix}.score.weight"]
    assert head.shape == (LABELS, 32) and head.abs().max() > 1e-3

    model.eval()
    logits = model.class_logits(packed(["x"] * 6))["x"]
    assert logits.shape == (6, LABELS)
    model.save_adapter("x", tmp_path / "x")
    model.load_adapter(tmp_path / "x", "copy")
    assert model.num_labels("copy") == LABELS
    ids, mask = rows(6)
    again = model.class_logits(Batch.from_rows(ids, mask, None, ["copy"] * 6))["copy"]
    assert torch.equal(again, logits)
    padded = Batch.from_rows(torch.cat([0 * ids, ids], 1), torch.cat([0 * mask, mask], 1), None, ["x"] * 6)
    assert torch.equal(model.class_logits(padded)["x"], logits)


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_predictions_are_those_of_one_row_at_a_time(batch_size: int) -> None:
    model = pair("llama")
    model.add_adapter("y", VARIANTS["mixlora"], num_labels=LABELS)
    awaken(model)
    model.train()  # scoring must not drop out whatever the mode
    ids, mask = rows(7)
    prompts = [tuple(tokens[real].tolist()) for tokens, real in zip(ids, mask.bool(), strict=True)]
    requests = [Request(name, EncodedQuestion(p, (), (), (), 0)) for p in prompts for name in ("y", "x")]
    found = list(predict(model, requests, "classification", batch_size))
    for request, prediction in zip(requests, found, strict=True):
        model.scope.default = request.adapter
        alone = model.hf_model.base_model(torch.tensor([request.question.prompt_ids]), use_cache=False)
        head = next(t for n, t in model.adapter_tensors(request.adapter).items() if n.endswith("score.weight"))
        expected = (head @ alone.last_hidden_state[0, -1]).tolist()
        assert prediction.scores == pytest.approx(expected, abs=1e-5)
        assert prediction.answer("f1") == expected.index(max(expected))


def test_rows_of_a_head_do_not_reach_the_output_layer(monkeypatch) -> None:
    model = pair("llama")
    seen = []
    losses = model.token_losses
    monkeypatch.setattr(model, "token_losses", lambda hidden, ids: seen.append(len(hidden)) or losses(hidden, ids))
    model.hf_model.lm_head.register_forward_hook(lambda module, inputs, out: seen.append(out.shape[1]))
    model(packed(["x"] * 6))
    assert seen == [0]
    assert not model.hf_model.base_model._forward_hooks


def test_micro_batches_change_nothing() -> None:
    ids, mask = rows(9)
    samples = [
        Sample(tuple(tokens[real].tolist()), (-100,) * int(real.sum()), "t", class_id=i % LABELS)
        for i, (tokens, real) in enumerate(zip(ids, mask.bool(), strict=True))
    ]
    ends = []
    for micro_batch_size in (6, 2, 1):
        model = multi()
        model.add_adapter("x", METHODS["lora"](r=4, lora_dropout=0.1), num_labels=LABELS)
        sizes = {"batch_size": 6, "micro_batch_size": micro_batch_size}
        config = JobConfig(name="x", method=model.adapters["x"], lr=1e-2, num_epochs=2, **sizes)
        job, losses = Job(config, samples, model, seed=1), []
        first = model(Batch.pack(job.rows_of(0)))["x"].loss.item()
        train(model, [job], None, lambda stepped, losses=losses: losses.extend(j.measured["loss"] for j in stepped))
        assert len(losses) == 4 and losses[0] == pytest.approx(first, rel=1e-5)  # the last step of an epoch has 3 rows
        ends.append((losses, model.adapter_tensors("x")))
    for losses, tensors in ends[1:]:
        assert losses == pytest.approx(ends[0][0], rel=1e-5)
        assert all(torch.allclose(t, ends[0][1][name], atol=1e-5) for name, t in tensors.items())


def test_the_head_starts_as_transformers_heads_do() -> None:
    model = multi("llama", initializer_range=0.05)
    model.add_adapter("x", {"r": 2}, num_labels=64)
    model.add_adapter("y", {"r": 2}, num_labels=64)
    head, other = (model.adapter_tensors(n)["base_model.model.score.weight"] for n in "xy")
    assert head.dtype == torch.float32 and head.std() == pytest.approx(0.05, rel=0.05) and abs(head.mean()) < 0.005
    assert not torch.equal(head, other)


# -- PEFT ----------------------------------------------------------------------------------------------------------

peft = pytest.importorskip("peft")


def classifier(family: str) -> torch.nn.Module:
    """Return transformers' sequence classifier over the tiny model of a family."""
    causal = tiny(family)
    config = AutoConfig.for_model(**causal.config.to_dict() | {"num_labels": LABELS})
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager").eval()
    model.base_model.load_state_dict(causal.base_model.state_dict())
    return model


def assert_agree(model: MultiAdapterModel, name: str, theirs: torch.nn.Module) -> None:
    ids, mask = rows(6)
    batch = Batch.from_rows(ids, mask, None, [name] * 6, classes=CLASSES)
    logits, out = model.class_logits(batch)[name], model(batch)[name]
    out.loss.backward()
    expected = theirs(input_ids=ids, attention_mask=mask, labels=torch.tensor(CLASSES))
    expected.loss.backward()
    assert (logits - expected.logits).abs().max() < 1e-5
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
    gradients = {
        n.replace(".default", "").replace("modules_to_save.", "").replace("vector.weight", "vector"): p.grad
        for n, p in theirs.named_parameters()
        if p.requires_grad and p.grad is not None
    }
    found = model.adapter_gradients(name)
    assert found.keys() == gradients.keys() and "base_model.model.score.weight" in found
    for key, gradient in gradients.items():
        assert (found[key] - gradient).abs().max() <= 1e-5 * max(gradient.abs().max(), 1e-3), key


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma", "gpt_neox"])
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_ours_loads_in_peft_and_agrees(family: str, settings: dict, tmp_path: Path) -> None:
    model = multi(family)
    model.add_adapter("x", METHODS["lora"](r=4, lora_alpha=6, **settings), num_labels=LABELS)
    awaken(model)
    model.save_adapter("x", tmp_path)
    theirs = peft.PeftModel.from_pretrained(classifier(family), tmp_path, is_trainable=True).eval()
    assert isinstance(theirs, peft.PeftModelForSequenceClassification)
    assert_agree(model, "x", theirs)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_theirs_loads_here_and_agrees(family: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="SEQ_CLS"
    )
    theirs = peft.get_peft_model(classifier(family), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    model = multi(family)
    assert model.load_adapter(tmp_path / "theirs") == "theirs"
    assert_agree(model, "theirs", theirs)
    model.save_adapter("theirs", tmp_path / "ours")
    written, read = (json.loads((tmp_path / n / "adapter_config.json").read_text()) for n in ("ours", "theirs"))
    assert written["task_type"] == read["task_type"] and set(written["modules_to_save"]) == set(read["modules_to_save"])
    assert load_file(tmp_path / "ours" / files.TENSORS).keys() == load_file(tmp_path / "theirs" / files.TENSORS).keys()


def test_the_predecessors_head_is_read(tmp_path: Path) -> None:
    model = multi()
    model.add_adapter("x", VARIANTS["mixlora"], num_labels=LABELS)
    model.save_adapter("x", tmp_path / "x")
    tensors = load_file(tmp_path / "x" / files.TENSORS)
    head = tensors.pop("mixlora.score.weight")
    torch.save(tensors | {"classifier": head}, tmp_path / "x" / files.PICKLE)
    (tmp_path / "x" / files.TENSORS).unlink()
    model.load_adapter(tmp_path / "x", "old", allow_pickle=True)
    assert torch.equal(model.adapter_tensors("old")["mixlora.score.weight"], head)


def test_a_folder_says_what_its_head_was_trained_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("mlora"), "propagate", True)
    model = multi()
    model.add_adapter("x", VARIANTS["lora"], num_labels=2)
    model.save_adapter("x", tmp_path / "unsaid")
    model.adapter_module("x").head_task = "glue:rte"
    model.save_adapter("x", tmp_path / "said")
    for name in ("unsaid", "said"):
        model.load_adapter(tmp_path / name)
    # a set: pytest listens at the logger itself, too, where an earlier test's run has told it not to propagate
    (message,) = {r.getMessage() for r in caplog.records}
    assert message.startswith(str(tmp_path / "unsaid"))
    check_heads(
        model, [Examination("said", "glue:rte"), *(Examination("unsaid", f"glue:{t}") for t in ("rte", "mrpc"))]
    )
    with pytest.raises(ModelError, match="said has a classification head for glue:rte, not for glue:mrpc"):
        check_heads(model, [Examination("said", "glue:mrpc")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft.PeftConfig.from_pretrained(tmp_path / "said")


# -- refusals ------------------------------------------------------------------------------------------------------


def test_rows_that_do_not_fit_the_head_are_refused() -> None:
    model = pair("llama")
    ids, mask = rows(2)
    with pytest.raises(ModelError, match="'x' has a classification head, but its rows have no classes"):
        model(Batch.from_rows(ids, mask, None, ["x", "x"]))
    with pytest.raises(ModelError, match="'words' has no classification head, but its rows have classes"):
        model(Batch.from_rows(ids, mask, None, ["words", "words"], classes=[0, 1]))
    with pytest.raises(ModelError, match="'x' has 3 classes; a row is of class 3"):
        model(Batch.from_rows(ids, mask, None, ["x", "x"], classes=[0, 3]))
    with pytest.raises(ModelError, match="'words' has no classification head"):
        model.class_logits(Batch.from_rows(ids, mask, None, ["x", "words"]))
    with pytest.raises(ValueError, match="1 of 2 rows of adapter 'x' have no class"):
        Batch.pack([Row([1], [1], "x", class_id=0), Row([1], [1], "x")])
    with pytest.raises(ModelError, match="num_labels: 0 is not allowed"):
        model.add_adapter("y", {"r": 2}, num_labels=0)


def test_a_head_generates_no_text_and_no_causal_model_holds_it(tmp_path: Path) -> None:
    base = tinybase.save(tmp_path / "base")
    model = MultiAdapterModel.from_pretrained(str(base))
    model.add_adapter("x", {"r": 2}, num_labels=2)
    with pytest.raises(ModelError, match="'x' has a classification head"):
        model.generate(["a", "b"], [None, "x"])
    model.save_adapter("x", tmp_path / "x")
    with pytest.raises(ModelError, match="a causal language model has no place"):
        MixLoraModelForCausalLM.from_pretrained(tmp_path / "x")
    with pytest.raises(ModelError, match="--format merged: has no place for the classification head"):
        export("merged", str(base), tmp_path / "x", tmp_path / "merged")
    export("peft", str(base), tmp_path / "x", tmp_path / "peft")
    assert load_file(tmp_path / "peft" / files.TENSORS).keys() == load_file(tmp_path / "x" / files.TENSORS).keys()
    with pytest.raises(ModelError, match="another classification head than its task needs: num_labels None"):
        model.train_as("x", model.adapters["x"])


def test_files_without_the_head_they_speak_of_are_refused(tmp_path: Path) -> None:
    model = multi()
    model.add_adapter("x", {"r": 2}, num_labels=2)
    model.save_adapter("x", tmp_path / "x")
    shutil.copytree(tmp_path / "x", tmp_path / "other")
    tensors = load_file(tmp_path / "x" / files.TENSORS)
    save_file({n: t for n, t in tensors.items() if "score" not in n}, tmp_path / "x" / files.TENSORS)
    with pytest.raises(AdapterFileError, match="task_type is SEQ_CLS, but there is no tensor"):
        model.load_adapter(tmp_path / "x", "y")
    tensors["base_model.model.score.weight"] = torch.zeros(2, 7)
    save_file(tensors, tmp_path / "other" / files.TENSORS)
    with pytest.raises(ModelError, match=r"score.weight is \[2, 7\], the base model needs \[2, 32\]"):
        model.load_adapter(tmp_path / "other", "y")
    tensors["base_model.model.score.weight"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "other" / files.TENSORS)
    with pytest.raises(ModelError, match="score.weight"):
        model.load_adapter(tmp_path / "other", "y")
    config = json.loads((tmp_path / "other" / files.CONFIG).read_text()) | {
        "modules_to_save": ["score", "embed_tokens"]
    }
    (tmp_path / "other" / files.CONFIG).write_text(json.dumps(config))
    with pytest.raises(AdapterFileError, match="modules_to_save: .'embed_tokens'. is not supported"):
        model.load_adapter(tmp_path / "other", "y")


# -- the commands --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinybase.save(tmp_path_factory.mktemp("base") / "tiny")


def entry(name: str, **settings: object) -> dict:
    entry = {"name": name, "task_name": "glue:mrpc", "data": "data", "r": 4, "lora_alpha": 8, "lr": 5e-3}
    return entry | {"batch_size": 8, "micro_batch_size": 4, "num_epochs": 4} | settings


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with rows whose class is the mark they end with."""
    monkeypatch.chdir(tmp_path)
    made = [{"sentence1": f"row {i}", "sentence2": "?!"[i % 3 == 0], "label": int(i % 3 == 0)} for i in range(32)]
    taskdata.write(tmp_path / "data" / "glue-mrpc", {"train": made, "validation": made[:12]})
    taskdata.write(tmp_path / "data" / "boolq", {"train": taskdata.boolq(16), "validation": taskdata.boolq(16)})
    return tmp_path


def write_config(*entries: dict) -> None:
    Path("mlora.json").write_text(json.dumps({"cutoff_len": 64, "lora": entries}))


def test_a_run_learns_scores_and_goes_on(here: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixture = {"routing_strategy": "mixlora", "num_experts": 4, "top_k": 2}
    write_config(
        entry("plain", val_set_size=8), entry("mixture", **mixture), entry("words", task_name="boolq", num_epochs=1)
    )
    assert main(RunOptions(str(base), evaluate_base=True)) == 0
    results = json.loads(Path("results.json").read_text())
    found = {(r["adapter"], r["metric"]): r["value"] for r in results if r["task"] == "glue:mrpc"}
    assert found == {(name, metric): 1.0 for name in ("plain", "mixture") for metric in ("accuracy", "f1")}
    shown = capsys.readouterr().out
    assert "glue:mrpc  f1" in shown and "classification" in shown
    lines = [json.loads(line) for line in Path("metrics.jsonl").read_text().splitlines()]
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(held_out) == 4 and held_out[-1] < 0.5 * held_out[0]
    losses = [line["loss"] for line in lines if line["adapter"] == "mixture" and "loss" in line]
    assert losses[0] == pytest.approx(0.69, abs=0.15) and losses[-1] < 0.1
    assert card.read(Path("plain"))[0]["pipeline_tag"] == "text-classification"
    assert json.loads(Path("plain/adapter_config.json").read_text())["task_type"] == "SEQ_CLS"

    Path("results.json").unlink()
    assert main(RunOptions(str(base), evaluate=True)) == 0
    again = {(r["adapter"], r["metric"]): r["value"] for r in json.loads(Path("results.json").read_text())}
    assert {key: value for key, value in again.items() if key in found} == found
    write_config(entry("plain"), entry("mixture", **mixture))
    assert main(RunOptions(str(base), load_adapter=True, dir=".")) == 0
    first = [json.loads(line) for line in Path("metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in first if line["adapter"] == "mixture" and "loss" in line][16] < 0.1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"task_name": "glue:mrpc;glue:rte"}, ["lora[0].task_name", "glue:mrpc", "classification head", "alone"]),
        ({"task_name": "boolq;glue:mrpc"}, ["lora[0].task_name", "glue:mrpc", "classification head", "alone"]),
        ({"train_on_inputs": True}, ["lora[0].train_on_inputs", "glue:mrpc", "expected false"]),
    ],
)
def test_what_a_head_cannot_share_is_exit_2(
    here: Path, base: Path, capsys: pytest.CaptureFixture[str], settings: dict, said: list[str]
) -> None:
    write_config(entry("a", **settings))
    assert main(RunOptions(str(base))) == 2
    error = capsys.readouterr().err
    assert all(part in error for part in said), error


def test_a_saved_adapter_of_another_kind_is_exit_2(here: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(entry("a", num_epochs=1), entry("b", task_name="boolq", num_epochs=1))
    assert main(RunOptions(str(base))) == 0
    write_config(entry("a", task_name="boolq"))
    for options in ({"evaluate": True}, {"load_adapter": True}):
        assert main(RunOptions(str(base), **options)) == 2
        error = capsys.readouterr().err
        assert "classification head" in error and "Traceback" not in error
    shutil.copytree("data/glue-mrpc", "data/glue-rte")
    write_config(entry("a", task_name="glue:rte"))
    assert main(RunOptions(str(base), evaluate=True)) == 2
    assert "a has a classification head for glue:mrpc, not for glue:rte" in capsys.readouterr().err
    write_config(entry("b"))
    assert main(RunOptions(str(base), evaluate=True)) == 2
    assert "b has no classification head; the task glue:mrpc needs one of 2 labels" in capsys.readouterr().err
    write_config(entry("a"))
    assert main(RunOptions(str(base), inference=True)) == 2
    assert "a has a classification head" in capsys.readouterr().err


def test_sst2_from_template_to_table(tmp_path: Path, base: Path, shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    launch = [sys.executable, str(Path(__file__).resolve().parents[1] / "launch.py")]
    generated = subprocess.run(
        [*launch, "gen", "--template", "lora", "--tasks", "glue:sst2;glue:cola", "--data_path", str(shared / "data")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert generated.returncode == 0 and "sst2_0: lora on glue:sst2" in generated.stdout, generated.stderr
    run = subprocess.run(
        [*launch, "run", "--base_model", str(base), "--limit", "24"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    results = json.loads(Path("results.json").read_text())
    assert [(r["adapter"], r["metric"], r["n"]) for r in results] == [
        ("sst2_0", "accuracy", 24),
        ("cola_1", "matthews_correlation", 24),
    ]
    assert "sst2_0" in run.stdout and "matthews_correlation" in run.stdout
