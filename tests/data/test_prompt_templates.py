"""Prompt templates by name, by path, and by a path that does not exist."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlora.data import DataError, find_prompt

GOOD = {"prompt_input": "{instruction} {input}:", "prompt_no_input": "{instruction}:", "response_split": ":"}


def test_shipped_templates() -> None:
    assert find_prompt().name == "mlora"
    assert find_prompt("template/alpaca.json") == find_prompt("alpaca")
    for name in ("mlora", "alpaca"):
        prompt = find_prompt(name)
        text = prompt.render("Add {x}.", "1 {y}")
        assert "Add {x}." in text
        assert "1 {y}" in text
        assert prompt.response(text + " two ") == "two"
        assert "Input" not in prompt.render("Add.")


def test_a_file_goes_before_a_name(tmp_path: Path) -> None:
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps(GOOD))
    assert find_prompt(str(path)).render("do", "it") == "do it:"


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(DataError, match=r"'alpacca': no such file or name; did you mean alpaca\? Known: alpaca, mlora"):
        find_prompt("alpacca")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response_split": None}, "key 'response_split' is missing or no text"),
        ({"prompt_input": "{instruction}"}, "key 'prompt_input' must have the placeholders"),
        (
            {"prompt_no_input": "{instruction} {secret}"},
            "key 'prompt_no_input' must have the placeholders .instruction.",
        ),
        ({"prompt_no_input": "{instruction.__class__}"}, "key 'prompt_no_input' must have the placeholders"),
        ({"prompt_no_input": "{instruction"}, "key 'prompt_no_input'"),
    ],
)
def test_a_file_that_is_no_template(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(DataError, match=message):
        find_prompt(str(path))
