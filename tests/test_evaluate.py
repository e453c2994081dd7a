"""`launch.py evaluate`, and evaluations that go on where they were killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mlora.adapters import METHODS
from mlora.config import RunOptions
from mlora.model.multi import MultiAdapterModel
from mlora.runs.evaluate import Evaluation
from mlora.runs.program import finish, main
from tests import taskdata, tinybase
from tests.families import awaken

ROOT = Path(__file__).resolve().parents[1]
TASKS = "boolq;arc_easy;piqa"
MIXTURE = {"routing_strategy": "mixlora", "num_experts": 4, "top_k": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model, two adapters of it that are not at their start, and data of three tasks."""
    place = tmp_path_factory.mktemp("made")
    base = tinybase.save(place / "tiny")
    model = MultiAdapterModel.from_pretrained(str(base))
    model.add_adapter("plain", METHODS["lora"](r=4))
    model.add_adapter("mixture", METHODS["mixlora"](r=4, num_experts=4, router_init_range=1.0))
    awaken(model)
    for name in ("plain", "mixture"):
        model.save_adapter(name, place / name)
    write_data(place / "data")
    return place


def write_data(place: Path, count: int = 12) -> None:
    arc = [
        {"id": str(i), "question": f"Which is number {i}?", "answerKey": "AB"[i % 2],
         "choices": {"text": [f"the {i}", f"not {i}"], "label": ["A", "B"]}} for i in range(count)
    ]  # fmt: skip
    piqa = [{"goal": f"count to {i}", "sol1": "one by one", "sol2": "two by two", "label": i % 2} for i in range(count)]
    for folder, test, data in (
        ("arc-e", "test", arc),
        ("boolq", "validation", taskdata.boolq(count)),
        ("piqa", "validation", piqa),
    ):
        taskdata.write(place / folder, {"train": data, test: data})


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(made: Path, *adapters: str, **flags: object) -> int:
    flags = {"base_model": str(made / "tiny"), "tasks": TASKS, "data_path": str(made / "data")} | flags
    asked = Evaluation(adapter=tuple(a if "=" in a else str(made / a) for a in adapters), **flags)
    return finish(asked.run, asked)


def results(folder: Path = Path()) -> list[dict]:
    return json.loads((folder / "results.json").read_text())


def test_several_adapters_at_once_equal_each_alone(made: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(made, "plain", "mixture", evaluate_base=True, samples=True, dir="together") == 0
    shown = capsys.readouterr().out
    assert "plain" in shown and "base model" in shown and "protocol: loglikelihood" in shown
    for name in ("plain", "mixture"):
        assert run(made, name, samples=True, dir=name) == 0
    assert run(made, samples=True, dir="base") == 0
    expected = {
        (r["adapter"], r["task"], r["metric"]): r["value"]
        for d in ("plain", "mixture", "base")
        for r in results(here / d)
    }
    found = {(r["adapter"], r["task"], r["metric"]): r["value"] for r in results(here / "together")}
    assert found == expected and len(found) == 3 * (1 + 2 + 1)
    for name, own in (("plain", "plain"), ("mixture", "mixture"), ("base model", "base")):
        for file in ("boolq.letter.jsonl", "arc_easy.loglikelihood.jsonl", "piqa.letter.jsonl"):
            one, other = (
                [json.loads(line) for line in (here / d / "samples" / name / file).read_text().splitlines()]
                for d in ("together", own)
            )
            assert len(one) == 12
            for a, b in zip(one, other, strict=True):
                assert a["scores"] == pytest.approx(b["scores"], abs=1e-4)
                assert a | {"scores": 0} == b | {"scores": 0}
                assert a["correct"] == (a["chosen"] == a["answer"])
    share = [r["value"] for r in results(here / "together") if (r["adapter"], r["task"]) == ("plain", "boolq")]
    lines = [json.loads(line) for line in (here / "together/samples/plain/boolq.letter.jsonl").read_text().splitlines()]
    assert share == [sum(line["correct"] for line in lines) / 12] and lines[1]["prompt"].count("is 1 an even number")
    routed = [json.loads(line) for line in (here / "together/router.jsonl").read_text().splitlines()]
    assert [(line["adapter"], line["task"], line["split"]) for line in routed] == [
        ("mixture", task, "test") for task in ("boolq", "arc_easy", "piqa")
    ]


def test_what_is_known_is_kept_and_what_has_changed_is_not(
    made: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    module = sys.modules["mlora.evaluation.evaluate"]
    own = module.predict

    def counted(model: object, requests: list, *rest: object) -> object:
        asked.append(len(requests))
        return own(model, requests, *rest)

    monkeypatch.setattr(module, "predict", counted)

    def rows_asked(*adapters: str, **flags: object) -> int:
        asked.clear()
        assert run(made, *adapters, **flags) == 0
        return sum(asked)

    shutil.copytree(made / "plain", here / "copy")
    assert rows_asked("plain", str(here / "copy")) == 2 * 36
    before = results()
    assert rows_asked("plain", str(here / "copy")) == 0 and results() == before
    assert rows_asked("plain", overwrite=True) == 36
    assert rows_asked("plain", limit=5) == 15
    assert rows_asked("plain", limit=5, dtype="bf16") == 15
    assert rows_asked("plain", limit=5, dtype="bf16", samples=True) == 15
    assert rows_asked("plain", limit=5, dtype="bf16", samples=True) == 0
    shutil.copytree(made / "mixture", here / "copy", dirs_exist_ok=True)  # another adapter under the same name
    assert rows_asked(str(here / "copy")) == 36
    assert {r["conditions"]["rows"] for r in results() if r["adapter"] == "copy"} == {
        r["conditions"]["rows"] for r in before
    }


def test_protocols_and_names(made: Path, here: Path) -> None:
    assert run(made, "plain", f"other={made / 'plain'}", tasks="arc-e", protocol=("letter", "loglikelihood")) == 0
    assert {(r["adapter"], r["task"], r["protocol"]) for r in results()} == {
        (name, *task) for name in ("plain", "other") for task in (("arc-e", "letter"), ("arc_easy", "loglikelihood"))
    }
    assert all(0.5 <= r["chance"] < 1 for r in results())


def test_an_adapter_of_peft(made: Path, here: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(made / "tiny"),
        peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    model.save_pretrained(here / "theirs")
    assert run(made, str(here / "theirs"), tasks="piqa", samples=True) == 0
    tokenizer = tinybase.byte_tokenizer()
    for line in map(json.loads, Path("samples/theirs/piqa.letter.jsonl").read_text().splitlines()):
        ids = torch.tensor([tokenizer.encode(line["prompt"].rstrip() + " ")])
        logits = model(ids).logits[0, -1]
        expected = [float(logits.detach()[tokenizer.encode(c.strip())[-1]]) for c in line["choices"]]
        assert line["scores"] == pytest.approx(expected, abs=1e-4)


def test_a_pickle_is_read_where_its_folder_is_named_with_one_warning(
    made: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file

    shutil.copytree(made / "mixture", here / "old")
    torch.save(load_file(here / "old/adapter_model.safetensors"), here / "old/adapter_model.bin")
    (here / "old/adapter_model.safetensors").unlink()
    assert run(made, "mixture", str(here / "old"), tasks="boolq") == 0
    assert capsys.readouterr().err.count("reading a pickle") == 1
    values = {r["adapter"]: r["value"] for r in results()}
    assert values["old"] == values["mixture"]


@pytest.mark.parametrize(
    ("adapters", "flags", "said"),
    [
        (["nowhere"], {}, "nowhere: no such adapter folder"),
        (["plain", "plain"], {}, "two adapters are named plain; NAME=FOLDER"),
        (["plain"], {"tasks": "arc_esy"}, "arc_easy"),
        (["plain"], {"tasks": ";"}, "names no task"),
        (["plain"], {"tasks": "glue:sst2", "data_path": None}, "glue"),
        (["plain"], {"data_path": "nowhere"}, "nowhere"),
    ],
)
def test_bad_input_is_exit_2(
    made: Path, here: Path, capsys: pytest.CaptureFixture[str], adapters: list[str], flags: dict, said: str
) -> None:
    assert run(made, *adapters, **flags) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and not Path("results.json").exists()


def test_the_command(made: Path, here: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "launch.py"),
        "evaluate",
        "--base_model",
        str(made / "tiny"),
        "--tasks",
        "piqa",
    ]
    command += ["--data_path", str(made / "data"), "--adapter", str(made / "plain"), str(made / "mixture")]
    done = subprocess.run([*command, "--dir", "out"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {r["adapter"] for r in results(here / "out")} == {"plain", "mixture"} and "mixture" in done.stdout
    assert (here / "out/log.txt").exists()


def test_a_run_killed_in_the_evaluation_of_its_third_task_goes_on_there(made: Path, here: Path) -> None:
    tasks = ["arc-e", "boolq", "piqa"]
    write_data(here / "data", count=300)
    entry = {"name": "multi", "task_name": ";".join(tasks), "data": "data", "r": 4, "num_epochs": 1, "limit": 300}
    entry |= {"batch_size": 64, "evaluate_batch_size": 1}
    Path("mlora.json").write_text(json.dumps({"lora": [entry]}))
    command = [sys.executable, str(ROOT / "launch.py"), "run", "--base_model", str(made / "tiny"), "--dir", "out"]
    child = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)
    deadline = time.monotonic() + 120
    while not (here / "out/results.json").exists() or len(results(here / "out")) < 2:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    for pid in [*_children_of(child.pid), child.pid]:
        os.kill(pid, signal.SIGKILL)
    child.wait()
    before = results(here / "out")
    assert [r["task"] for r in before] == tasks[:2], "the run was over before it was killed"
    assert main(RunOptions(str(made / "tiny"), dir="out", resume=True)) == 0
    after = results(here / "out")
    assert after[:2] == before and [r["task"] for r in after] == tasks
    assert main(RunOptions(str(made / "tiny"), dir="out", resume=True)) == 0
    assert results(here / "out") == after


def _children_of(pid: int) -> list[int]:
    """The training program has a session of its own."""
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout.split()
    return list(map(int, found))


HARNESS_TASK = """task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{q}}}}\\nA:"
doc_to_choice: a
doc_to_target: right
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 2}}
"""


@pytest.fixture
def harness_tasks(tmp_path: Path) -> Path:
    """A folder with a task of lm-evaluation-harness."""
    pytest.importorskip("lm_eval", reason="needs the package lm-eval")
    place = tmp_path / "own"
    place.mkdir()
    rows = [{"q": f"What is {i}?", "a": ["a number", "a colour", "rain"][: 2 + i % 2], "right": 0} for i in range(6)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = HARNESS_TASK.format(rows=place / "rows.jsonl", cache=tmp_path / "cache")
    (place / "colours.yaml").write_text(text)
    (place / "broken.yaml").write_text(text.replace("colours", "broken").replace("rows.jsonl", "none.jsonl"))
    return place


def test_tasks_of_the_harness(
    made: Path, here: Path, harness_tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = {"protocol": ("lm-eval",), "data_path": str(harness_tasks), "limit": 5, "evaluate_base": True}
    flags |= {"tasks": "broken;colours", "num_fewshot": 0}
    assert run(made, "plain", "mixture", **flags) == 1  # one task fails; the other's results are there
    shown = capsys.readouterr()
    assert "evaluation of broken failed" in shown.err and "protocol: lm-eval" in shown.out
    found = results(here)
    assert [(r["adapter"], r["task"], r["metric"], r["n"], r["limit"], r["version"]) for r in found] == [
        (name, "colours", metric, 5, 5, 2)
        for name in ("plain", "mixture", "base model")
        for metric in ("acc", "acc_norm")
    ]
    from mlora.evaluation import lm_eval as bridge

    held: list[list[str | None]] = []
    own = bridge.evaluate
    monkeypatch.setattr(
        bridge, "evaluate", lambda model, names, *a, **k: held.append(names) or own(model, names, *a, **k)
    )
    flags["tasks"] = "colours"
    assert run(made, "plain", "mixture", **flags) == 0
    assert held == [] and results(here) == found
    assert run(made, "plain", "mixture", **flags | {"num_fewshot": 1}) == 0
    assert held == [["plain", "mixture", None]]
    assert run(made, "plain", f"new={made / 'plain'}", **flags | {"num_fewshot": 1}) == 0
    assert held[1:] == [["new"]]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"tasks": "colour"}, '--tasks: "colour" is no task of lm-evaluation-harness; did you mean "colours"?'),
        ({"protocol": ("lm-eval", "letter")}, "--protocol: lm-eval cannot be combined"),
        ({"samples": True}, "--samples: cannot be combined"),
        ({"protocol": (), "num_fewshot": 2, "data_path": None}, "--num_fewshot: only with --protocol lm-eval"),
    ],
)
def test_what_the_harness_cannot_do(
    made: Path, here: Path, harness_tasks: Path, capsys: pytest.CaptureFixture[str], flags: dict, said: str
) -> None:
    given = {"protocol": ("lm-eval",), "data_path": str(harness_tasks), "tasks": "colours"} | flags
    assert run(made, "plain", **given) == 2
    assert said in capsys.readouterr().err


def test_the_harness_is_asked_for_where_it_is_missing(
    made: Path, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    assert run(made, "plain", protocol=("lm-eval",), data_path=None, tasks="gsm8k") == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: --protocol: lm-eval needs") and "[eval]" in error
