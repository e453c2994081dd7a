"""Rows as text: prompt, mask, end token and cut can be seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from transformers import PreTrainedTokenizerBase

from mlora.cli.program import program
from mlora.data import load_training_samples
from mlora.data.preview import preview, render
from tests import tinybase
from tests.tasks.rows import ARC

Tok = PreTrainedTokenizerBase


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_answer_and_its_end_are_marked(tmp_path: Path, smollm2: Tok) -> None:
    data = write(tmp_path / "t.jsonl", {"instruction": "Add.", "input": "1 1", "output": "It is 2."})
    (sample,) = load_training_samples("casual", data, smollm2, 512)
    shown = render(smollm2, sample)
    assert shown.endswith("⟦It is 2.<|im_end|>⟧")
    assert shown.count("⟦") == 1 and "Add." in shown.partition("⟦")[0]
    task = load_training_samples("arc-e", write(tmp_path / "train.jsonl", ARC), smollm2, 512)
    assert render(smollm2, task[0]).endswith("\nAnswer:⟦ C⟧")
    assert "row 1, arc-e, " in preview(smollm2, task) and "1 trained on" in preview(smollm2, task)


def test_a_cut_is_shown_where_it_is(tmp_path: Path, smollm2: Tok) -> None:
    data = write(tmp_path / "t.jsonl", {"instruction": "word " * 90, "output": "yes"}, {"text": "a b"})
    samples = load_training_samples("casual", data, smollm2, 24)
    assert render(smollm2, samples[0]).startswith("… ") and render(smollm2, samples[0]).endswith("⟦yes<|im_end|>⟧")
    assert "the prompt is cut" in preview(smollm2, samples)
    assert render(smollm2, samples[1]) == "a⟦ b<|im_end|>⟧"


def test_every_assistant_turn_is_marked(tmp_path: Path, smollm2: Tok) -> None:
    turns = [("user", "hi"), ("assistant", "yo"), ("user", "so"), ("assistant", "ok")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (sample,) = load_training_samples("casual", write(tmp_path / "t.jsonl", row), smollm2, 512)
    shown = render(smollm2, sample)
    assert "⟦yo<|im_end|>\n⟧<|im_start|>user\nso" in shown
    assert shown.endswith("assistant\n⟦ok<|im_end|>\n⟧")


@pytest.fixture
def base(tmp_path: Path) -> str:
    return str(tinybase.save(tmp_path / "base"))


def test_the_command_shows_a_task_data_and_a_config(tmp_path: Path, base: str) -> None:
    def shown(*arguments: str) -> str:
        result = CliRunner().invoke(program, ["data", "--base_model", base, "--preview", *arguments])
        assert result.exit_code == 0, result.output
        return result.output

    task = write(tmp_path / "train.jsonl", *[ARC] * 5)
    assert shown("arc-e", "--data_path", task).count("⟦ C⟧") == 3
    assert "⟦ a leaf⟧" in shown("arc-e", "--data_path", task, "--protocol", "loglikelihood", "--rows", "1")
    casual = write(tmp_path / "rows.jsonl", {"instruction": "a", "output": "b"}, {"instruction": "a"})
    assert "1 bad row skipped" in shown(casual, "--on_bad_row", "skip", "--prompt_template", "alpaca")
    config = tmp_path / "mlora.json"
    jobs = [{"name": "x", "task_name": "arc-e", "data": task}, {"name": "y", "data": casual, "on_bad_row": "skip"}]
    config.write_text(json.dumps({"cutoff_len": 64, "lora": jobs}))
    output = shown(str(config), "--rows", "2")
    assert "=== x: arc-e" in output and "=== y: casual" in output and "the prompt is cut" in output


def test_what_cannot_be_shown_is_bad_input(tmp_path: Path, base: str) -> None:
    casual = write(tmp_path / "rows.jsonl", {"instruction": "a"})
    for what, message in [(casual, "rows.jsonl, line 1: field 'output'"), (str(tmp_path / "no.jsonl"), "no such file")]:
        result = CliRunner().invoke(program, ["data", "--base_model", base, "--preview", what])
        assert result.exit_code == 2 and message in result.output
