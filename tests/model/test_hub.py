"""The hub: pushing, what its refusals say, and no socket in offline mode."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants, errors

from mlora.cli.program import program
from mlora.model import hub, load
from mlora.model.errors import ModelError
from tests import tinybase
from tests.families import multi

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = multi()
    model.add_adapter("mine", {"r": 2})
    model.save_adapter("mine", tmp_path / "mine")
    (tmp_path / "mine" / "optimizer.bin").write_bytes(b"not to be published")
    return tmp_path / "mine"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """An API that notes what it is asked; what it is handed as files is what the real one would upload."""
    noted: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def create_repo(self, repo_id: str, **settings: Any) -> SimpleNamespace:
            noted.append(("create_repo", {"repo_id": repo_id, **settings}))
            return SimpleNamespace(repo_id=repo_id)

        def create_branch(self, repo_id: str, **settings: Any) -> None:
            noted.append(("create_branch", {"repo_id": repo_id, **settings}))

        def upload_folder(self, *, folder_path: Path, allow_patterns: list[str], **settings: Any) -> SimpleNamespace:
            kept = huggingface_hub.utils.filter_repo_objects(os.listdir(folder_path), allow_patterns=allow_patterns)
            noted.append(("upload_folder", {"files": sorted(kept), **settings}))
            return SimpleNamespace(commit_url=f"https://huggingface.co/{settings['repo_id']}/commit/1")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "ask_hub", lambda: None)
    return noted


def push(*words: str, status: int = 0) -> Result:
    result = CliRunner().invoke(program, ["push", *words])
    assert result.exit_code == status, result.output
    return result


def test_an_adapter_is_pushed_with_its_card_and_nothing_else(folder: Path, calls: list) -> None:
    (folder / "README.md").unlink()
    done = push("--adapter", str(folder), "--repo", "me/mine", "--private", "--revision", "v1", "--message", "First")
    assert "https://huggingface.co/me/mine/commit/1" in done.stdout
    assert calls == [
        ("create_repo", {"repo_id": "me/mine", "private": True, "exist_ok": True}),
        ("create_branch", {"repo_id": "me/mine", "branch": "v1", "exist_ok": True}),
        ("upload_folder", {
            "files": ["README.md", "adapter_config.json", "adapter_model.safetensors"],
            "repo_id": "me/mine", "commit_message": "First", "revision": "v1",
        }),
    ]  # fmt: skip
    assert "base_model" in (folder / "README.md").read_text()


def test_what_cannot_be_pushed_is_said_before_the_hub_is_asked(folder: Path, calls: list) -> None:
    said = push("--adapter", str(folder.parent), "--repo", "me/mine", status=2).stderr
    assert "adapter_config.json is missing" in said
    assert "allowed: user/name" in push("--adapter", str(folder), "--repo", "a/b/c", status=2).stderr
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "is a pickle" in push("--adapter", str(folder), "--repo", "me/mine", status=2).stderr
    assert calls == []


def test_offline_nothing_is_pushed(folder: Path, calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline mode is set" in push("--adapter", str(folder), "--repo", "me/mine", status=2).stderr
    assert calls == []


def refusal(kind: type[Exception], status: int) -> Exception:
    import httpx

    request = httpx.Request("GET", "https://huggingface.co")
    return kind("refused", response=httpx.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (refusal(errors.GatedRepoError, 403), "me/mine is gated: ask for access at https://huggingface.co/me/mine"),
        (refusal(errors.RepositoryNotFoundError, 404), "no such repository"),
        (refusal(errors.RevisionNotFoundError, 404), "--revision names no"),
        (refusal(errors.HfHubHTTPError, 401), "hf auth login"),
        (errors.LocalTokenNotFoundError("no token"), "hf auth login"),
        (OSError("no route"), "needs a connection or a cached copy"),
    ],
)
def test_refusals_say_what_to_do(error: Exception, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(load, "ask_hub", lambda: None)
    wrapped = OSError("You are trying to access something")
    wrapped.__cause__ = error
    assert expected in hub.advice(error, "me/mine") and expected in hub.advice(wrapped, "me/mine")
    with pytest.raises(ModelError, match="hf auth login|revision"), load._explained(load.Origin("me/mine", "me/mine")):
        raise wrapped
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    offline = hub.advice(OSError("nothing cached"), "me/mine")
    assert "offline mode is set" in offline


SOCKETLESS = """
import socket, sys

def refuse(*a, **k):
    sys.stderr.write("SOCKET OPENED\\n")
    raise OSError("a socket was opened")

class Refused(socket.socket):
    __init__ = refuse

socket.socket = socket.SocketType = Refused
socket.create_connection = socket.getaddrinfo = refuse
program, *arguments = sys.argv[1:]
sys.argv = [program, *arguments]
import runpy
runpy.run_path(program, run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("by_flag", [True, False], ids=["--hub_offline", "HF_HUB_OFFLINE"])
@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["generate.py", "--base_model", "BASE", "--instruction", "x", "--max_new_tokens", "2"], 0, "== base model"),
        (["generate.py", "--base_model", "no/where", "--instruction", "x"], 2, "offline mode is set"),
        (
            ["generate.py", "--base_model", "BASE", "--lora_weights", "no/where", "--instruction", "x"],
            2,
            "offline mode",
        ),
        (["train.py", "--base_model", "BASE", "--config", "CONFIG", "--log_file", "LOG"], 2, "offline mode is set"),
        (["launch.py", "push", "--adapter", "BASE", "--repo", "no/where"], 2, "adapter_config.json is missing"),
    ],
    ids=["answers", "base from the hub", "adapter from the hub", "data from the hub", "push"],
)
def test_offline_no_socket_is_opened(tmp_path: Path, by_flag: bool, words: list[str], status: int, said: str) -> None:
    base = tinybase.save(tmp_path / "tiny")
    (tmp_path / "c.json").write_text('{"cutoff_len": 64, "lora": [{"name": "a", "task_name": "arc-c"}]}')
    places = {"BASE": str(base), "CONFIG": str(tmp_path / "c.json"), "LOG": str(tmp_path / "log")}
    command = [str(ROOT / words[0]), *(places.get(word, word) for word in words[1:])]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
    command, environment = (
        ([*command, "--hub_offline"], environment) if by_flag else (command, environment | {"HF_HUB_OFFLINE": "1"})
    )
    done = subprocess.run(
        [sys.executable, "-c", SOCKETLESS, *command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "SOCKET OPENED" not in done.stderr
    assert done.returncode == status and said in done.stdout + done.stderr, done.stderr
