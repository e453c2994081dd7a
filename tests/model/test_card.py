"""Model cards: front matter that parses, results, and no path of this machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from mlora.adapters import METHODS
from mlora.model import card

MIXTURE = METHODS["mixlora"](r=4, num_experts=4, expert_lora={"r": 2}, use_rslora=True)


def front_matter(folder: Path) -> dict:
    text = (folder / "README.md").read_text()
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("gpt2", "gpt2"),
        ("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("/home/someone/models/tiny", "tiny"),
        ("/home/someone/models/tiny/", "tiny"),
        ("models/of/mine", "mine"),
        ("~/tiny.gguf", "tiny.gguf"),
        ("./tiny", "tiny"),
        ("data/rows.jsonl", "rows.jsonl"),
        (r"C:\Users\someone\tiny", "tiny"),
    ],
)
def test_names(given: str, expected: str) -> None:
    assert card.shown(given) == expected


def test_names_that_exist_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert card.shown("models/tiny") == "tiny" and card.shown("models/none") == "models/none"
    assert card.shown(".") == tmp_path.name


def test_card(tmp_path: Path) -> None:
    command = ("train.py", "--base_model=/home/me/tiny", "--config=/tmp/a b.json", "--lr", "/x/y;/z/w", "--lr=1e-4")
    making = card.Making(("yahma/alpaca-cleaned", "super_glue:boolq", "/home/me/rows.jsonl"), command, 42)
    card.write_for_adapter(tmp_path, "mixture", MIXTURE, "/home/me/tiny", making)
    front, text = front_matter(tmp_path), (tmp_path / "README.md").read_text()
    assert front == {
        "base_model": "tiny",
        "library_name": "mlora",
        "pipeline_tag": "text-generation",
        "tags": ["m-lora", "lora", "mixlora", "rslora"],
        "datasets": ["yahma/alpaca-cleaned", "super_glue", "rows.jsonl"],
    }
    assert "# mixture\n" in text and "Seed 42." in text and "torch 2" in text and "transformers" in text
    assert "train.py --base_model=tiny '--config=a b.json' --lr 'y;w' --lr=1e-4" in text
    assert "/home" not in text and "/tmp" not in text and str(tmp_path) not in text


def test_results_replace_earlier_ones(tmp_path: Path) -> None:
    row = {"task": "boolq", "metric": "acc", "value": 0.5, "standard_error": 0.1, "n": 20}
    card.add_results(tmp_path, [row])
    assert not list(tmp_path.iterdir()), "a card is only changed, not made"
    card.write_for_adapter(tmp_path, "plain", METHODS["lora"](), "org/base", None)
    before = (tmp_path / "README.md").read_text()
    card.add_results(tmp_path, [])
    assert (tmp_path / "README.md").read_text() == before
    for value in (0.5, 0.75):
        card.add_results(tmp_path, [row | {"value": value}, row | {"metric": "f1", "standard_error": None}])
    (entry,) = front_matter(tmp_path)["model-index"]
    assert entry["name"] == "plain"
    assert [r["metrics"] for r in entry["results"]] == [
        [{"type": "acc", "value": 0.75}],
        [{"type": "f1", "value": 0.5}],
    ]
    text = (tmp_path / "README.md").read_text()
    assert text.count("## Results") == 1 and "| boolq | acc | 0.7500 | 0.1000 | 20 |" in text
    assert front_matter(tmp_path)["library_name"] == "peft"


def test_a_card_of_somebody_else_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# My adapter\n")
    card.add_results(tmp_path, [{"task": "boolq", "metric": "acc", "value": 0.5, "standard_error": None, "n": 2}])
    assert (tmp_path / "README.md").read_text() == "# My adapter\n"
