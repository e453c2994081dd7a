"""generate.py: what is asked, in which form, and what is printed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlora.cli.generate import generate
from mlora.data import DataError
from mlora.generation.form import find_form, form_names
from mlora.generation.opened import name_folders
from mlora.generation.prompts import Prompt, read_prompts
from mlora.generation.sampling import Sampling
from mlora.model.multi import MultiAdapterModel
from tests import tinybase
from tests.families import awaken

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinybase.save(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    model = MultiAdapterModel.from_pretrained(str(base))
    model.add_adapter("a", {"r": 4})
    model.add_adapter("m", {"routing_strategy": "mixlora", "num_experts": 4, "r": 4, "router_init_range": 0.5})
    awaken(model, std=0.5)
    place = tmp_path_factory.mktemp("adapters")
    for name in ("a", "m"):
        model.save_adapter(name, place / name)
    return [str(place / name) for name in ("a", "m")]


def ask(base: Path, *words: str, status: int = 0) -> Result:
    result = CliRunner().invoke(generate, ["--base_model", str(base), "--max_new_tokens", "6", *words])
    assert result.exit_code == status, result.output
    return result


def records(result: Result) -> list[dict]:
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_several_adapters_follow_one_flag_or_several(base: Path, folders: list[str]) -> None:
    words = ["--instruction", "What is m-LoRA?", "--base", "--json"]
    together = records(ask(base, *words, "--lora_weights", *folders, "--template", "template/alpaca.json"))
    apart = [word for folder in folders for word in ("--lora_weights", folder)]
    assert together == records(ask(base, *apart, *words, "--template", "alpaca"))
    assert [r["adapter"] for r in together] == [None, *folders]
    assert len({r["text"] for r in together}) == 3
    alone = [records(ask(base, *words[:2], "--json", "--lora_weights", f, "--template", "alpaca"))[0] for f in folders]
    assert alone == together[1:]


def test_a_run_s_folder_is_all_of_its_adapters(base: Path, folders: list[str]) -> None:
    words = ["--instruction", "What is m-LoRA?", "--json", "--template", "alpaca", "--lora_weights"]
    assert records(ask(base, *words, str(Path(folders[0]).parent))) == records(ask(base, *words, *folders))


def test_a_template_that_is_none_is_refused_before_a_model_is_sought() -> None:
    done = ask(Path("nowhere"), "--instruction", "x", "--template", "wrong", status=2)
    assert "--template: 'wrong': no such file or name. Known: alpaca, mlora, chat, none" in done.stderr


def test_the_model_is_asked_in_its_chat_template(base: Path, tmp_path: Path) -> None:
    model = MultiAdapterModel.from_pretrained(str(base))
    tokenizer = model.tokenizer
    assert form_names(tokenizer) == ["alpaca", "mlora", "none"]
    assert find_form(None, tokenizer).name == "mlora"
    with pytest.raises(DataError, match="no chat template"):
        find_form("chat", tokenizer)
    tokenizer.chat_template = CHAT
    form = find_form(None, tokenizer)
    assert form.name == "chat" and form_names(tokenizer)[0] == "chat"
    assert tokenizer.decode(form.encode("Say", "yes")) == "<user>Say\n\nyes<answer>"
    assert tokenizer.decode(find_form("none", tokenizer).encode("Say", "yes")) == "Say\n\nyes"
    assert tokenizer.decode(find_form("mlora", tokenizer).encode("Say")).endswith("Say\n\n### Output:\n")
    talk = [("system", "Be short."), ("user", "Hi"), ("assistant", "Ho"), ("user", "And?")]
    messages = [{"role": role, "content": content} for role, content in talk]
    assert tokenizer.decode(form.encode_messages(messages)).count("<") == 5
    written = tokenizer.decode(find_form("mlora", tokenizer).encode_messages(messages))
    assert written.startswith("### Instruction:\nBe short.\n\nHi\n\n### Output:\nHo\n\n### Instruction:\nAnd?")


def test_streaming_prints_what_is_printed_without_it(base: Path, folders: list[str], tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    rows = [{"instruction": "One", "input": "about"}, {"instruction": "Two"}, {"instruction": "Three"}]
    file.write_text("\n".join(map(json.dumps, rows)))
    words = ["--prompts", str(file), "--lora_weights", *folders, "--batch_size", "4"]
    whole, live = ask(base, *words).stdout, ask(base, *words, "--stream").stdout
    assert [line.strip() for line in whole.split()] == [line.strip() for line in live.split()]
    assert whole.count("== ") == live.count("== ") == 6 and whole.count("[2] Two\n") == 1
    answers = records(ask(base, *words, "--json"))
    assert [(r["instruction"], r["input"]) for r in answers[::2]] == [("One", "about"), ("Two", ""), ("Three", "")]
    assert {r["new_tokens"] for r in answers if r["finish_reason"] == "length"} == {6}


def test_prompts_come_from_text_or_json_lines(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\n two \n")
    assert read_prompts(str(tmp_path / "p.txt")) == [Prompt("one"), Prompt("two")]
    file = tmp_path / "p.jsonl"
    for content, message in [
        ("", "holds no prompt"),
        ('{"instruction": "a"}\n{bad', "line 2: is not JSON"),
        ('{"prompt": "a"}', 'line 1: expected {"instruction"'),
        ('{"instruction": "a", "input": 3}', "key 'input'"),
    ]:
        file.write_text(content)
        with pytest.raises(DataError, match=message):
            read_prompts(str(file))
    with pytest.raises(DataError, match="No such file"):
        read_prompts(str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing is asked"),
        (["--instruction", "x", "--stream", "--json"], "--stream cannot be combined with --json"),
        (["--instruction", "x", "--top_p", "1.5"], "--top_p: 1.5 is not allowed; allowed: more than 0 and at most 1"),
        (["--instruction", "x", "--temperature", "-1"], "--temperature: -1.0 is not allowed"),
        (["--instruction", "x", "--load_8bit", "--load_4bit"], "cannot be combined"),
        (["--instruction", "x", "--lora_weights", "./nowhere"], "nowhere: no such adapter folder"),
        (["--instruction", "x", "--template", "alpca"], "did you mean alpaca?"),
        (["--prompts", "none.txt"], "none.txt: No such file"),
    ],
)
def test_bad_input_is_named(base: Path, words: list[str], message: str) -> None:
    assert message in ask(base, *words, status=2).stderr


def test_sampling_is_greedy_until_something_is_asked() -> None:
    assert not Sampling().draws and not Sampling(temperature=0).draws and not Sampling(temperature=0, top_p=0.5).draws
    assert not Sampling(temperature=1.0, do_sample=False).draws
    assert Sampling(temperature=0.5).draws and Sampling(top_k=5).draws and Sampling(do_sample=True).draws
    assert "temperature" not in Sampling(temperature=0.5, do_sample=False).keywords()
    assert Sampling(do_sample=True).keywords()["top_k"] == 0  # transformers' own default of 50 is not asked for


def test_folders_of_one_name_are_told_apart(folders: list[str], tmp_path: Path) -> None:
    for place in ("x", "y"):
        (tmp_path / place / "lora").mkdir(parents=True)
    (tmp_path / "bad name").mkdir()
    given = [str(tmp_path / "x" / "lora"), str(tmp_path / "y" / "lora"), str(tmp_path / "bad name")]
    assert list(name_folders(given)) == ["lora", "lora-2", "adapter"]


def test_an_adapter_that_classifies_is_refused(base: Path, tmp_path: Path) -> None:
    model = MultiAdapterModel.from_pretrained(str(base))
    model.add_adapter("c", {"r": 2}, num_labels=2)
    model.save_adapter("c", tmp_path / "c")
    done = ask(base, "--instruction", "x", "--lora_weights", str(tmp_path / "c"), status=2)
    assert "has a classification head" in done.stderr
