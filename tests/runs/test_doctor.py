"""The doctor says what is wrong, fits a terminal, and asks nobody in offline mode."""

from __future__ import annotations

import builtins
import shutil
import socket
import urllib.request
from email.message import Message
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn
from urllib.error import HTTPError, URLError

import pytest
from huggingface_hub import constants

from mlora.runs import doctor
from mlora.wording import install


@pytest.fixture(autouse=True)
def _no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **settings: Any) -> NoReturn:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def found(capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[str, str]]:
    """Return what the doctor printed: state and text by what was looked at."""
    lines: dict[str, tuple[str, str]] = {}
    what = ""
    for line in capsys.readouterr().out.splitlines():
        assert len(line) <= 80, line
        if line[2:6].strip() in ("ok", "off", "bad"):
            what = line[6:24].strip()
            lines[what] = (line[2:6].strip(), line[24:])
        elif line.startswith(" " * 24):
            lines[what] = (lines[what][0], f"{lines[what][1]} {line.strip()}")
    return lines


def test_a_machine_that_can_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0
    lines = found(capsys)
    assert {"python", "mlora", "torch", "transformers", "processors", "disk, here", "hub", "triton"} <= lines.keys()
    assert lines["torch"] == ("ok", metadata.version("torch"))
    assert lines["hub"][0] == "off" and "nothing was asked" in lines["hub"][1]
    assert not any(state == "bad" for state, _ in lines.values())


def test_a_package_that_is_missing_or_too_old(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = {"transformers": "4.1.0"}

    def version(name: str) -> str:
        if name == "click":
            raise metadata.PackageNotFoundError(name)
        return installed.get(name) or metadata.version(name)

    monkeypatch.setattr(doctor, "version", version)
    assert doctor.main() == 1
    output = capsys.readouterr().out
    assert "2 things keep runs from working." in output
    assert "bad click             not installed: pip install 'click>=" in output
    assert "bad transformers      4.1.0, but >=" in output


def test_a_torch_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    importing = builtins.__import__

    def broken(name: str, *rest: Any) -> Any:
        if name == "torch":
            raise ImportError("libcudart.so.12: cannot open shared object file")
        return importing(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    assert doctor.main() == 1
    assert "cannot be imported: libcudart.so.12" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("answer", "state", "says"),
    [
        (None, "ok", "answers"),
        (HTTPError("https://hub", 404, "not found", Message(), None), "ok", "answers"),
        (URLError("no route to host"), "off", "no route to host"),
        (TimeoutError("timed out"), "off", "timed out"),
    ],
)
def test_the_hub(
    answer: Exception | None, state: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Answer:
        def close(self) -> None: ...

    def asked(request: urllib.request.Request, timeout: float) -> Answer:
        assert request.full_url == constants.ENDPOINT and timeout <= 5
        if answer is not None:
            raise answer
        return Answer()

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", asked)
    assert doctor.main() == 0
    line = found(capsys)["hub"]
    assert line[0] == state and says in line[1]


def test_a_disk_that_is_full_or_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(Path.cwd())
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: usage._replace(free=2**30))
    assert doctor.main() == 0
    assert "less than the 20 GiB" in found(capsys)["disk, here"][1]

    def refuse(**settings: Any) -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    assert doctor.main() == 1
    assert found(capsys)["disk, models"] == (
        "bad",
        f"{doctor._hub_folder()} cannot be written: No space left on device",
    )


def test_optional_packages_name_their_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    assert doctor.main() == 0
    assert found(capsys)["bitsandbytes"] == (
        "off",
        f"4-bit and 8-bit base models, adamw8bit: {install('quant')}",
    )


def test_every_extra_exists() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert {extra for _, extra in doctor.OPTIONAL.values()} <= project["optional-dependencies"].keys()
