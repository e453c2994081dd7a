"""The commands, end to end: from a template and tasks to trained adapters, results and exit statuses."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mlora.config import RunOptions
from mlora.model import card
from mlora.runs import assess
from mlora.runs.program import main
from mlora.training.heldout import HeldOut
from tests import taskdata, tinybase

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinybase.save(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with a little task data of the project's own making."""
    from mlora.data.demo import write_demo_data

    monkeypatch.chdir(tmp_path)
    write_demo_data(tmp_path / "data", train=24, test=12)
    taskdata.write(tmp_path / "data" / "boolq", {"train": taskdata.boolq(24), "validation": taskdata.boolq(12)})
    return tmp_path


def adapter(name: str, **settings: object) -> dict:
    entry = {"name": name, "task_name": "boolq", "data": "data", "r": 4, "lora_alpha": 8, "lora_dropout": 0.05}
    return entry | {"batch_size": 8, "micro_batch_size": 4, "num_epochs": 2, "lr": 5e-3} | settings


def write_config(*adapters: dict, **settings: object) -> None:
    Path("mlora.json").write_text(json.dumps({"cutoff_len": 256, **settings, "lora": list(adapters)}))


def launch(*arguments: str, **settings: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "launch.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **settings)


def losses(folder: Path) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "loss" in entry:
            found.setdefault(entry["adapter"], []).append(entry["loss"])
    return found


MIXTURE = {"routing_strategy": "mixlora", "num_experts": 4, "top_k": 2}


def test_a_whole_run(here: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(
        adapter("plain"),
        adapter("mixture", **MIXTURE, batch_size=6, micro_batch_size=6, num_epochs=3),
        adapter("likelihood", task_name="arc_easy", num_epochs=1),
        train_lora_simultaneously_num=2,
    )
    assert main(RunOptions(str(base), evaluate_base=True)) == 0
    shown = capsys.readouterr().out
    steps = {name: len(values) for name, values in losses(here).items()}
    assert steps == {"plain": 6, "mixture": 12, "likelihood": 3}
    for name, values in losses(here).items():
        assert values[-1] < values[0], name
    results = json.loads(Path("results.json").read_text())
    assert {(r["adapter"], r["task"], r["metric"]) for r in results} == {
        (name, task, metric)
        for task, names, metrics in (
            ("boolq", ("plain", "mixture", "base model"), ("accuracy",)),
            ("arc_easy", ("likelihood", "base model"), ("acc", "acc_norm")),
        )
        for name in names
        for metric in metrics
    }
    assert all(r["n"] == 12 and r["limit"] is None for r in results)
    assert "likelihood  arc_easy  acc_norm" in shown and "±" in shown
    for name in ("plain", "mixture", "likelihood"):
        written = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        assert {p.name for p in Path(name).iterdir()} == written
        front, text = card.read(Path(name))
        assert front["base_model"] == "tiny" and front["datasets"] == ["data"] and front["model-index"]
        assert str(base.parent) not in text and str(here) not in text and "Seed 42" in text
    assert {"config.json", "environment.json", "mlora.log", "report.html"} <= {p.name for p in here.iterdir()}
    page = Path("report.html").read_text(encoding="utf-8")
    assert "report: report.html" in shown and "Router entropy" in page and "likelihood" in page

    before = {(r["adapter"], r["metric"]): r["value"] for r in results}
    Path("results.json").unlink()
    assert main(RunOptions(str(base), evaluate=True, config="config.json")) == 0
    again = {(r["adapter"], r["metric"]): r["value"] for r in json.loads(Path("results.json").read_text())}
    assert again == {key: value for key, value in before.items() if key[0] != "base model"}


def test_a_run_goes_on_where_nobody_reads_its_output(here: Path, base: Path) -> None:
    """`launch.py run ... | head -1`."""
    write_config(adapter("a", num_epochs=1))
    command = [sys.executable, str(ROOT / "launch.py"), "run", "--base_model", str(base)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        running.stdout.close()
        assert "BrokenPipe" not in running.stderr.read()
        assert running.wait(120) == 0
    assert Path("results.json").exists() and Path("report.html").exists()
    assert "nobody reads the output" in Path("mlora.log").read_text()
    typed = ["launch.py", "run", "--base_model", str(base)]
    assert json.loads(Path("environment.json").read_text())["command"] == typed
    assert "launch.py run --base_model tiny\n" in Path("a/README.md").read_text()


def test_a_file_that_is_no_report_stays_and_the_run_is_done_all_the_same(
    here: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(adapter("a", num_epochs=1))
    Path("report.html").write_text("mine")
    assert main(RunOptions(str(base))) == 0
    assert Path("report.html").read_text() == "mine" and Path("results.json").exists()
    assert "no report was written" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["banana", "0,", "-1", "4711", "0,4711"])
def test_a_gpu_that_is_not_there_is_refused(
    here: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], device: str
) -> None:
    write_config(adapter("a"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert main(RunOptions(str(base), cuda_device=device)) == 2
    shown = capsys.readouterr().err
    assert "--cuda_device" in shown and device in shown and not Path("a").exists()


def test_limit_is_said_in_every_result(here: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(adapter("a"))
    assert main(RunOptions(str(base), limit=5, dir="out")) == 0
    assert [r["limit"] for r in json.loads(Path("out/results.json").read_text())] == [5]
    assert "5 *" in capsys.readouterr().out and Path("out/adapters/a").is_dir() and Path("out/log.txt").exists()


def test_load_adapter_goes_on_from_a_saved_adapter(here: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(adapter("a", num_epochs=6))
    assert main(RunOptions(str(base))) == 0
    Path("a/notes.txt").write_text("kept")
    first = losses(here)["a"]
    write_config(adapter("a", num_epochs=6, lora_dropout=0.2))
    assert main(RunOptions(str(base), load_adapter=True)) == 0
    assert losses(here)["a"][len(first)] < first[0] - 0.1
    assert json.loads(Path("a/adapter_config.json").read_text())["lora_dropout"] == 0.2
    assert Path("a/notes.txt").read_text() == "kept"
    # the checkpoints are this training's and no earlier one's
    ends = [json.loads(p.read_text())["step"] for p in Path("checkpoints/a").glob("*/state.json")]
    assert ends and min(ends) > 0
    states = {p.parent.name for p in Path("checkpoints/a").glob("*/state.json")}
    assert states == {"step-000018"}
    write_config(adapter("a", lora_alpha=64))
    assert main(RunOptions(str(base), load_adapter=True)) == 2
    assert "lora_alpha 64" in capsys.readouterr().err


def test_resuming_asks_for_the_same_settings_and_a_checkpoint(
    here: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(adapter("a"), adapter("b", num_epochs=1))
    assert main(RunOptions(str(base), resume=True)) == 0
    assert "starts at the beginning" in capsys.readouterr().out
    saved = Path("a/adapter_model.safetensors").read_bytes()
    for options, entries, said in (
        ({"random_seed": 1}, {}, "random_seed 42 then, 1 now"),
        ({}, {"lr": 1e-5}, "lr 0.005 then, 1e-05 now"),
        ({}, {"batch_size": 4}, "batch_size 8 then, 4 now"),
    ):
        write_config(adapter("a", **entries))
        assert main(RunOptions(str(base), resume=True, **options)) == 2
        assert said in capsys.readouterr().err
    write_config(adapter("a"))  # b is no longer in the config: a goes on all the same, and has nothing left to do
    shutil.rmtree("a")
    assert main(RunOptions(str(base), resume=True)) == 0
    assert Path("a/adapter_model.safetensors").read_bytes() == saved
    for state in Path("checkpoints/a").glob("*/state.json"):
        state.write_text("{}")
    assert main(RunOptions(str(base), resume=True)) == 2
    assert "no usable checkpoint" in capsys.readouterr().err
    assert Path("a/adapter_model.safetensors").read_bytes() == saved


def test_resuming_is_refused_where_what_was_read_has_changed(
    here: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And what the folder says of the first run stays."""
    write_config(adapter("a"))
    assert main(RunOptions(str(base), dir="out")) == 0
    begun = {file: file.read_bytes() for file in Path("out").rglob("*") if file.is_file() and file.name != "log.txt"}
    rows = here / "data/boolq/train.jsonl"
    content = rows.read_text()
    rows.write_text(content.replace("is 5 an", "is 7 an"))
    assert main(RunOptions(str(base), dir="out", resume=True)) == 2
    assert "a: was begun with other settings: digest of rows" in capsys.readouterr().err
    rows.write_text(content)
    write_config(adapter("a", lr=1e-5))
    assert main(RunOptions(str(base), dir="out", resume=True)) == 2
    assert "lr 0.005 then" in capsys.readouterr().err
    write_config(adapter("a"))
    other = tinybase.save(here / "other", initializer_range=0.05)
    assert main(RunOptions(str(other), dir="out", resume=True)) == 2
    assert "digest of base model" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in begun} == begun
    shutil.copytree(base, here / "moved")
    assert main(RunOptions("moved", dir="out", resume=True)) == 0


def test_a_failure_is_a_line_for_the_user_and_a_traceback_in_the_log(
    here: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(adapter("a", num_epochs=1))
    monkeypatch.setattr(assess, "examine", lambda *_: 1 / 0)
    assert main(RunOptions(str(base), dir="out")) == 1
    assert "Traceback" not in capsys.readouterr().err and "Traceback" in Path("out/log.txt").read_text()


def test_bad_data_is_found_before_anything_is_lost(here: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(adapter("a"))
    assert main(RunOptions(str(base))) == 0
    before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file() and p.name != "mlora.log"}
    write_config(adapter("a", eval_data="missing.json"))
    before[here / "mlora.json"] = Path("mlora.json").read_bytes()
    assert main(RunOptions(str(base), overwrite=True)) == 2
    evaluated = here / "data" / "boolq" / "validation.jsonl"
    content = evaluated.read_text()
    write_config(adapter("a"))
    before[here / "mlora.json"] = Path("mlora.json").read_bytes()
    evaluated.write_text(content + '{"question": 5}\n')
    assert main(RunOptions(str(base), overwrite=True)) == 2
    assert "validation.jsonl" in capsys.readouterr().err
    evaluated.write_text(content)
    assert {p: p.read_bytes() for p in here.rglob("*") if p.is_file() and p.name != "mlora.log"} == before


def test_an_evaluation_that_fails_loses_nothing_else(
    here: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(adapter("a", num_epochs=1), adapter("b", task_name="arc_easy", num_epochs=1))
    own = assess.examine

    def failing(model: object, group: list, *rest: object) -> object:
        return own(model, group, *rest) if group[0].task != "boolq" else 1 / 0

    monkeypatch.setattr(assess, "examine", failing)
    assert main(RunOptions(str(base))) == 1
    shown = capsys.readouterr()
    assert "evaluation of boolq failed: ZeroDivisionError" in shown.err and "arc_easy" in shown.out
    assert {r["task"] for r in json.loads(Path("results.json").read_text())} == {"arc_easy"}
    assert Path("a/adapter_config.json").exists()


def test_an_adapter_that_diverges_is_stopped_and_its_neighbour_is_not_touched(
    here: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = adapter("good", num_epochs=4)
    write_config(good)
    assert main(RunOptions(str(base), dir="alone")) == 0
    write_config(good, adapter("bad", num_epochs=4, lr=1e30))
    assert main(RunOptions(str(base), dir="beside")) == 1
    assert "bad was stopped" in capsys.readouterr().err
    one, two = (losses(here / d)["good"] for d in ("alone", "beside"))
    assert one == pytest.approx(two, rel=1e-5) and len(two) == 12
    from safetensors.torch import load_file

    kept = load_file("beside/adapters/bad/adapter_model.safetensors")
    assert all(t.isfinite().all() for t in kept.values())


def test_recomputing_changes_no_loss(here: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(adapter("a"), adapter("b", **MIXTURE))
    given: dict[str, dict[str, Any]] = {
        "kept": {"recompute": "none"},
        "middle": {"recompute": "middle"},
        "all": {"recompute": "all"},
        "checkpointed": {"gradient_checkpointing": True},
    }
    for folder, options in given.items():
        assert main(RunOptions(str(base), dir=folder, **options)) == 0
        assert losses(here / folder) == losses(here / "kept")
    assert main(RunOptions(str(base), dir="x", gradient_checkpointing=True, recompute="middle")) == 2
    assert "--gradient_checkpointing: cannot be combined with --recompute middle" in capsys.readouterr().err


def test_files_can_be_read_by_others(here: Path, base: Path) -> None:
    write_config(adapter("a", num_epochs=1))
    assert main(RunOptions(str(base))) == 0
    (here / "plain").write_text("")
    usual = (here / "plain").stat().st_mode
    for name in ("results.json", "config.json", "a/adapter_config.json", "a/adapter_model.safetensors"):
        assert (here / name).stat().st_mode & 0o044 == usual & 0o044, name


def test_generate_answers_with_every_adapter(here: Path, base: Path) -> None:
    write_config(adapter("a", num_epochs=1), adapter("b", num_epochs=1, **MIXTURE))
    assert main(RunOptions(str(base))) == 0
    command = [
        sys.executable,
        str(ROOT / "generate.py"),
        "--base_model",
        str(base),
        "--template",
        "template/alpaca.json",
    ]
    command += ["--instruction", "What is m-LoRA?", "--max_new_tokens", "4"]
    for extra, count in (
        ([], 1),
        (["--lora_weights", "a", "--lora_weights", "b"], 2),
        (["--lora_weights", "a", "--stream"], 1),
    ):
        done = subprocess.run([*command, *extra], capture_output=True, text=True, check=False)
        assert done.returncode == 0 and done.stdout.count("== ") == count, done.stderr
    bad = subprocess.run([*command, "--lora_weights", "./nowhere"], capture_output=True, text=True, check=False)
    assert bad.returncode == 2 and "nowhere" in bad.stderr and "Traceback" not in bad.stderr


def test_embeddings_are_trained_where_they_are_named(
    here: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = {"embed_tokens": True, "q_proj": True, "v_proj": False}
    write_config(adapter("named", target_modules=named), adapter("other"), train_lora_simultaneously_num=2)
    assert main(RunOptions(str(base), dry_run=True)) == 0
    planned = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("named "))
    assert main(RunOptions(str(base))) == 0
    tensors = load_file("named/adapter_model.safetensors")
    assert int(planned[7].replace(",", "")) == sum(tensor.numel() for tensor in tensors.values())
    learnt = tensors["base_model.model.model.embed_tokens.lora_embedding_A"]
    assert learnt.any() and (learnt == 0).all(0).any()  # tokens that came, and tokens that did not
    found = losses(here)
    assert found["named"][-1] < found["named"][0]
    assert "named" in {result["adapter"] for result in json.loads(Path("results.json").read_text())}
    assert "embed_tokens, q_proj" in card.read(Path("named"))[1]


def test_dry_run_loads_no_weights_and_writes_nothing(
    here: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (weights := here / "shapes-only").mkdir()
    for file in base.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, weights)
    write_config(adapter("a", **MIXTURE))
    before = sorted(here.rglob("*"))
    assert main(RunOptions(str(weights), dry_run=True)) == 0
    shown = capsys.readouterr().out
    row = next(line.split() for line in shown.splitlines() if line.startswith("a "))
    assert row[1:6] == ["mixlora", "4", "4", "24", "6"] and int(row[7].replace(",", "")) > 10_000
    assert sorted(here.rglob("*")) == before
    assert "checkpoints" in shown and "mlora.log" in shown and "router.jsonl" in shown
    assert all(len(line) <= 80 for line in shown[shown.index("writes to") :].splitlines())


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("base_model", "settings", "said"),
    [
        ("nobody/nothing", {}, "--base_model nobody/nothing: is no folder here"),
        (None, {"task_name": "arc-e", "data": None}, "adapter a: task arc-e: cannot load the split 'train' of allenai"),
        (None, {"task_name": "casual", "data": "x/y"}, "adapter a: cannot load the split 'train' of x/y from"),
    ],
    ids=["base model", "task", "instruction data"],
)
def test_a_hub_that_does_not_answer_is_asked_once(
    here: Path, base: Path, base_model: str | None, settings: dict, said: str, dry_run: bool
) -> None:
    write_config(adapter("a", **settings))
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(here / "hf")}
    done = launch("run", "--base_model", base_model or base, *["--dry_run"] * dry_run, env=environment)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    assert said in done.stderr and "http://127.0.0.1:9 cannot be reached (" in done.stderr
    assert "Without a network name" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "--lora_weights", "no/where", "--instruction", "x"], "adapter no/where: neither a folder nor"),
        (["evaluate", "--protocol", "lm-eval", "--tasks", "lambada_openai"], "evaluation of lambada_openai failed: "),
    ],
    ids=["adapter", "task of the harness"],
)
def test_nor_is_it_asked_for_adapters_and_the_harness_again_and_again(
    here: Path, base: Path, words: list[str], said: str
) -> None:
    if "lm-eval" in words:
        pytest.importorskip("lm_eval", reason="needs the package lm-eval")
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(here / "hf")}
    done = launch(*words, "--base_model", base, env=environment)
    assert done.returncode and "Retrying" not in done.stderr and said in done.stderr
    assert "http://127.0.0.1:9 cannot be reached (" in done.stderr and "no cached copy was found" in done.stderr


def test_a_dry_run_is_refused_where_the_run_is_and_names_only_what_is_written(
    here: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(adapter("a"))
    assert main(RunOptions(str(base), dry_run=True, dir="out")) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"memory: \d+ MiB of [\d.]+ GiB free on cpu: base model .* backward computes nothing again", shown)
    assert "writes to out: config.json," in shown and "adapters/a, checkpoints, log.txt" in shown
    assert "router.jsonl" not in shown and not Path("out").exists()
    assert main(RunOptions(str(base), dry_run=True, dir="out", log_file=str(here / "own.log"))) == 0
    assert "checkpoints; and /" in " ".join(capsys.readouterr().out.split())
    Path("a").mkdir()
    Path("a/adapter_config.json").write_text("{}")
    assert main(RunOptions(str(base), dry_run=True)) == 2
    assert "a: exists already" in capsys.readouterr().err and not Path("mlora.log").exists()


@pytest.mark.parametrize("broken", ["alone", "beside"])
def test_bad_input_is_exit_2_names_the_fault_and_loses_nothing(
    here: Path, base: Path, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    Path("empty.jsonl").write_text("")
    Path("bad.jsonl").write_text('{"question": "is it", "answer": true, "passage": ""}\n{"question": 5}\n')
    Path("kept").mkdir()
    (here / "kept" / "adapter_config.json").write_text("precious")
    gpt2 = tinybase.save(here / "gpt2", "gpt2", n_embd=32, n_layer=2, n_head=4)
    moe = tinybase.save(here / "mixtral", "mixtral", num_local_experts=2)
    cases = [
        (base, adapter("a", lr_rate=1), ["mlora.json", "lora[0].lr_rate", "unknown key"]),
        (base, adapter("a", data="nowhere/x.jsonl"), ["nowhere/x.jsonl"]),
        (base, adapter("a", task_name="arc-esy"), ["arc-esy", "arc-e"]),
        (base, adapter("kept"), ["kept", "--overwrite", "--resume"]),
        (base, adapter("a", data="empty.jsonl"), ["mlora.json: adapter a: ", "no data rows", "empty.jsonl"]),
        (base, adapter("a", data="bad.jsonl"), ["mlora.json: adapter a: ", "bad.jsonl", "2", "question"]),
        (
            base,
            adapter("a", task_name="casual", data="rows.json", prompt="alpacca"),
            ["mlora.json: adapter a: prompt", "alpacca", "alpaca"],
        ),
        (base, adapter("a", target_modules=["q_prj"]), ["mlora.json: adapter a: ", "q_prj", "q_proj"]),
        (base, adapter("a", act_fn="sillu", **MIXTURE), ["mlora.json: adapter a: ", "act_fn", "sillu", "silu"]),
        (gpt2, adapter("a"), ["mlora.json: adapter ", "GPT2LMHeadModel", "Conv1D"]),
        (moe, adapter("a"), ["MixtralForCausalLM", "mixture of experts", "target_modules"]),
        (moe, adapter("a", **MIXTURE, target_modules="attention"), ["MixtralForCausalLM", "experts"]),
        (here / "no-model", adapter("a"), ["no-model", "no such"]),
        (here / "kept", adapter("a"), ["kept", "config.json"]),
    ]
    for model, entry, said in cases:
        write_config(*([entry] if broken == "alone" else [adapter("good"), entry]))
        before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file() and p.name not in ("mlora.log",)}
        assert main(RunOptions(str(model))) == 2, entry
        error = capsys.readouterr().err
        said = [part.replace("lora[0]", f"lora[{broken == 'beside':d}]") for part in said]
        missing = [part for part in said if part not in error]
        assert not missing, f"{missing} not in: {error}"
        assert "Traceback" not in error and error.count("\n") <= 15
        after = {p: p.read_bytes() for p in here.rglob("*") if p.is_file() and p.name not in ("mlora.log",)}
        assert after == before, sorted(set(after) ^ set(before))


def test_a_folder_of_something_else_is_left_alone(here: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(adapter("a"))
    Path("config.json").write_text("{}")
    assert main(RunOptions(str(base), overwrite=True)) == 2
    assert "config.json" in capsys.readouterr().err and Path("config.json").read_text() == "{}"
    Path("config.json").unlink()
    Path("a").mkdir()
    Path("a/thesis.tex").write_text("precious")
    assert main(RunOptions(str(base), overwrite=True)) == 2
    assert "is no adapter" in capsys.readouterr().err and Path("a/thesis.tex").read_text() == "precious"


def test_results_of_other_adapters_stay(here: Path, base: Path) -> None:
    for name in ("a", "b"):
        write_config(adapter(name, num_epochs=1))
        assert main(RunOptions(str(base))) == 0
    assert [r["adapter"] for r in json.loads(Path("results.json").read_text())] == ["a", "b"]
    assert set(losses(here)) == {"a", "b"}


def test_sigterm_saves_a_checkpoint_and_resuming_ends_in_the_same_bits(here: Path, base: Path) -> None:
    entries = [adapter("a", num_epochs=12), adapter("b", num_epochs=9, batch_size=6, micro_batch_size=3, **MIXTURE)]
    write_config(*entries)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    assert launch("run", "--base_model", base, "--dir", "straight", env=environment).returncode == 0
    command = [sys.executable, str(ROOT / "launch.py"), "run", "--base_model", str(base), "--dir", "broken"]
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = here / "broken" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 9):
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGTERM)
    _, error = child.communicate(timeout=60)
    assert child.returncode == 130 and "--resume" in error
    assert not (here / "broken" / "adapters" / "a").exists(), "the run ended before it was stopped"
    again = launch("run", "--base_model", base, "--dir", "broken")
    assert again.returncode == 2 and "--resume" in again.stderr
    resumed = launch("run", "--base_model", base, "--dir", "broken", "--resume", env=environment)
    assert resumed.returncode == 0 and "goes on after step" in resumed.stdout
    for name in ("a", "b"):
        files = [here / run / "adapters" / name / "adapter_model.safetensors" for run in ("straight", "broken")]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    assert losses(here / "straight") == losses(here / "broken")


def test_a_time_limit_stops_at_a_checkpoint_and_resuming_ends_in_the_same_bits(
    here: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(adapter("a", num_epochs=6), adapter("b", num_epochs=5, seed=7, **MIXTURE))
    assert main(RunOptions(str(base), dir="straight")) == 0
    assert main(RunOptions(str(base), dir="sliced", time_limit=1e-9)) == 0
    assert "time is up" in capsys.readouterr().out and not (here / "sliced/results.json").exists()
    assert main(RunOptions(str(base), dir="sliced", resume=True)) == 0
    for name in ("a", "b"):
        files = [here / run / "adapters" / name / "adapter_model.safetensors" for run in ("straight", "sliced")]
        assert files[0].read_bytes() == files[1].read_bytes(), name


def test_an_adapter_has_its_own_seed_whatever_the_runs(here: Path, base: Path) -> None:
    write_config(adapter("a", seed=7, val_set_size=4), adapter("b"))
    assert main(RunOptions(str(base), dir="one", random_seed=1)) == 0
    write_config(adapter("a", val_set_size=4))
    for folder, seed in (("two", 7), ("three", 1)):
        assert main(RunOptions(str(base), dir=folder, random_seed=seed)) == 0
    trained = {f: losses(here / f)["a"] for f in ("one", "two", "three")}
    assert trained["one"] == pytest.approx(trained["two"], rel=1e-5)
    assert trained["one"] != pytest.approx(trained["three"], rel=1e-3)
    assert "Seed 7." in Path("one/adapters/a/README.md").read_text()
    assert [job["seed"] for job in json.loads(Path("one/config.json").read_text())["lora"]] == [7, 1]


def evaluations(folder: Path, key: str) -> list[float]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry[key] for entry in entries if key in entry]


@pytest.mark.parametrize("held_out", [{"val_set_size": 8}, {"eval_data": "other.json"}])
def test_the_best_state_by_held_out_loss_is_kept(
    here: Path, base: Path, monkeypatch: pytest.MonkeyPatch, held_out: dict
) -> None:
    told = iter([3.0, 2.0, 1.0, 2.0])
    own = HeldOut.loss
    monkeypatch.setattr(HeldOut, "loss", lambda self, *given: own(self, *given) * 0 + next(told))
    for file, count in (("rows.json", 24), ("other.json", 8)):
        rows = [{"instruction": "Go", "input": "", "output": f"{file} {i}"} for i in range(count)]
        Path(file).write_text(json.dumps(rows))
    settings = {"task_name": "casual", "data": "rows.json", "num_epochs": 4}
    write_config(adapter("a", **settings, **held_out), save_step=1, keep_last=9)
    assert main(RunOptions(str(base), dir="out")) == 0
    assert evaluations(here / "out", "eval_loss") == [3.0, 2.0, 1.0, 2.0]
    steps = 2 if "val_set_size" in held_out else 3  # of an epoch
    assert len(losses(here / "out")["a"]) == 4 * steps
    kept = {p.parent.name: p.read_bytes() for p in here.glob("out/checkpoints/a/*/adapter_model.safetensors")}
    final = (here / "out/adapters/a/adapter_model.safetensors").read_bytes()
    assert final == kept["best"] == kept[f"step-{3 * steps:06d}"] != kept[f"step-{3 * steps - 1:06d}"]
    write_config(adapter("a", val_set_size=24))
    assert main(RunOptions(str(base), dir="other")) == 2


def test_evaluate_steps_scores_rows_that_are_neither_learnt_nor_judged_by(
    here: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(adapter("a", num_epochs=4, evaluate_steps=5))
    assert main(RunOptions(str(base))) == 2
    assert "boolq has no labelled validation split" in capsys.readouterr().err
    write_config(
        adapter("a", num_epochs=4, evaluate_steps=5, val_set_size=8),
        adapter("b", num_epochs=4, evaluate_steps=5, eval_data=str(here / "data/boolq/train.jsonl")),
    )
    assert main(RunOptions(str(base))) == 0
    scored = [entry for entry in map(json.loads, Path("metrics.jsonl").read_text().splitlines()) if "task" in entry]
    own = [entry for entry in scored if entry["adapter"] == "a"]
    assert [(e["step"], e["task"], e["split"], e["n"]) for e in own] == [(s, "boolq", "validation", 8) for s in (5, 8)]
    assert {(e["step"], e["split"], e["n"]) for e in scored if e["adapter"] == "b"} == {
        (step, "validation", 24) for step in (5, 10, 12)
    }


def test_the_routers_of_a_training_are_recorded(here: Path, base: Path) -> None:
    every = {"num_epochs": 4, "evaluate_steps": 5, "val_set_size": 4}
    write_config(adapter("a", **every), adapter("b", **every, **MIXTURE))
    assert main(RunOptions(str(base))) == 0
    lines = [json.loads(line) for line in Path("router.jsonl").read_text().splitlines()]
    training = [line for line in lines if line["split"] == "train"]
    assert [(line["adapter"], line["step"], line["task"]) for line in training] == [
        ("b", 5, "boolq"),
        ("b", 10, "boolq"),
    ]
    for line in training:
        assert line["tokens"] > 100 and [layer["layer"] for layer in line["layers"]] == [0, 1]
        assert all(sum(layer["share"]) == pytest.approx(1, abs=1e-4) for layer in line["layers"])
    assert [(line["adapter"], line["step"], line["split"], line["task"]) for line in lines if line not in training] == [
        ("b", None, "test", "boolq")
    ]
    assert main(RunOptions(str(base), overwrite=True)) == 0
    assert len(Path("router.jsonl").read_text().splitlines()) == len(lines)


def test_a_sweep_trains_every_combination_and_ranks_them(
    here: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "gen",
        "--template",
        "lora",
        "--tasks",
        "boolq",
        "--data_path",
        "data",
        "--sweep",
        "lr=1e-4,0.05;seed=1,2",
    ]
    done = launch(*command, "--num_epochs", "1")
    assert done.returncode == 0, done.stderr
    entries = json.loads(Path("mlora.json").read_text())["lora"]
    assert [(e["name"], e["lr"], e["seed"]) for e in entries] == [
        ("boolq_0", 1e-4, 1), ("boolq_1", 1e-4, 2), ("boolq_2", 0.05, 1), ("boolq_3", 0.05, 2)
    ]  # fmt: skip
    assert main(RunOptions(str(base))) == 0
    shown = capsys.readouterr().out.partition("ranked by lr")[2]
    values = {r["adapter"]: r["value"] for r in json.loads(Path("results.json").read_text())}
    low, high = (values[f"boolq_{i}"] / 2 + values[f"boolq_{i + 1}"] / 2 for i in (0, 2))
    first, second = json.loads(Path("ranking.json").read_text())
    assert [first["average"], second["average"]] == pytest.approx(sorted([low, high], reverse=True))
    assert first["adapters"] in (["boolq_0", "boolq_1"], ["boolq_2", "boolq_3"])
    row = next(line for line in shown.splitlines() if line.startswith("1 "))
    assert first["settings"]["lr"] in row and "over 2 seeds" in shown


def test_overwriting_starts_the_metrics_of_an_adapter_anew(here: Path, base: Path) -> None:
    write_config(adapter("a", num_epochs=1), adapter("b", num_epochs=1))
    assert main(RunOptions(str(base))) == 0
    write_config(adapter("b", num_epochs=2))
    assert main(RunOptions(str(base), overwrite=True)) == 0
    assert {name: len(values) for name, values in losses(here).items()} == {"a": 3, "b": 6}


def test_inference_answers_every_line_with_every_adapter(
    here: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(adapter("a", num_epochs=1), adapter("b", num_epochs=1, **MIXTURE), inference_lora_simultaneously_num=1)
    assert main(RunOptions(str(base))) == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("What is m-LoRA?\nAnd then?\n\nnever read\n"))
    capsys.readouterr()
    assert main(RunOptions(str(base), inference=True)) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("a: ", "b: "))]
    assert len(lines) >= 4


SEED_ADAPTER = {
    "name": "lora_0", "optim": "adamw", "lr": 1e-5, "batch_size": 16, "micro_batch_size": 2, "num_epochs": 3, "r": 8,
    "lora_alpha": 16, "lora_dropout": 0.05,
    "target_modules": {"q_proj": True, "k_proj": False, "v_proj": True, "o_proj": False, "gate_proj": True,
                       "down_proj": True, "up_proj": True},
    "data": "yahma/alpaca-cleaned", "prompt": "alpaca", "group_by_length": False,
}  # fmt: skip
SEED_ROUTING = {
    "routing_strategy": "mixlora", "router_init_range": 0.02, "num_experts": 8, "top_k": 2, "router_loss": True,
    "router_aux_loss_coef": 0.01,
}  # fmt: skip


@pytest.mark.parametrize(
    "extra", [{}, SEED_ROUTING, SEED_ROUTING | {"expert_lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.05}}]
)
def test_config_blocks_of_the_original_train(here: Path, base: Path, extra: dict) -> None:
    rows = [{"instruction": f"Say {w}", "input": "", "output": w * 3} for w in ("yes", "no", "perhaps", "never")]
    Path("alpaca.json").write_text(json.dumps(rows))
    write_config(SEED_ADAPTER | extra | {"data": "alpaca.json", "lr": 1e-2})
    assert main(RunOptions(str(base))) == 0
    values = losses(here)["lora_0"]
    assert len(values) == 3 and values[-1] < values[0]
    tensors = json.loads(Path("lora_0/adapter_config.json").read_text())
    assert tensors["target_modules"] == ["down_proj", "gate_proj", "q_proj", "up_proj", "v_proj"]


def test_commands_of_the_original_multi_task(here: Path, base: Path, shared: Path) -> None:
    tasks = ["arc-c", "arc-e", "boolq", "obqa", "piqa"]
    for task in tasks:
        for file in (shared / "data" / task).iterdir():
            (here / "real" / task).mkdir(parents=True, exist_ok=True)
            shutil.copy(file, here / "real" / task)
    generated = launch(
        "gen", "--template", "mixlora", "--tasks", ";".join(tasks), "--multi_task", "True", "--adapter_name", "mixlora",
        "--data_path", "real", "--num_epochs", "1",
    )  # fmt: skip
    assert generated.returncode == 0, generated.stderr
    run = launch("run", "--base_model", base, "--limit", "6")
    assert run.returncode == 0, run.stderr
    results = json.loads(Path("results.json").read_text())
    assert [(r["adapter"], r["task"], r["n"]) for r in results] == [("mixlora_0", task, 6) for task in tasks]
    assert Path("mixlora_0/adapter_model.safetensors").exists() and "mixlora_0" in run.stdout
