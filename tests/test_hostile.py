"""Hostile files: no payload runs, no traceback reaches the user, no socket is opened."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from mlora.config import RunOptions
from mlora.data import DataError, load_training_samples
from mlora.model.errors import ModelError
from mlora.model.multi import MultiAdapterModel
from mlora.runs.program import main
from tests import tinybase
from tests.test_program import MIXTURE, adapter, base, here, write_config  # noqa: F401


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


def pickles(mark: Path) -> list[bytes]:
    """The payload as a pickle, and as torch writes one."""
    archive = io.BytesIO()
    torch.save({"weight": torch.zeros(1), "payload": Payload(mark)}, archive)
    old = io.BytesIO()
    torch.save({"payload": Payload(mark)}, old, _use_new_zipfile_serialization=False)
    return [pickle.dumps(Payload(mark)), archive.getvalue(), old.getvalue()]


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The folder of a run."""
    place = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        here.__wrapped__(place, patch)  # type: ignore[attr-defined]
        write_config(adapter("a", num_epochs=1), adapter("b", num_epochs=1, **MIXTURE))
        assert main(RunOptions(str(base), dir="out", limit=8)) == 0
    return place


EXTRA = [
    *(f"adapters/a/{name}" for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin", "optimizer.pt")),
    *(f"checkpoints/a/{name}" for name in ("best/adapter_model.bin", "step-000009/optimizer.bin", "rng_state.pth")),
    "scheduler.pt",
]
"""Files that the project never writes, but another program might read."""


def written(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_the_payload_would_run(tmp_path: Path) -> None:
    for number, content in enumerate(pickles(mark := tmp_path / "ran")):
        if number == 0:
            pickle.loads(content)
        else:
            torch.load(io.BytesIO(content), weights_only=False)
        mark.rmdir()


def test_r17_no_pickle_runs_under_any_name(
    finished: Path,
    base: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    record_property: Callable[[str, object], None],
) -> None:
    shutil.copytree(finished, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    mark, out = tmp_path / "ran", Path("out")
    names = [*written(out), *EXTRA]
    assert len(names) > 20
    for number, name in enumerate(names):
        shutil.rmtree(out)
        shutil.copytree(finished / "out", out)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(pickles(mark)[number % 3])
        ways = [{"evaluate": True}, {"resume": True}] if "adapters" in name else [{"resume": True}]
        if name.endswith(("adapter_model.bin", "adapter_model.safetensors")):
            (out / name).with_name("adapter_model.safetensors").unlink(missing_ok=True)
            (out / name).write_bytes(pickles(mark)[number % 3])
            ways.append({"load_adapter": True})
        for way in ways:
            status = main(RunOptions(str(base), dir="out", limit=8, **way))
            error = capsys.readouterr().err
            assert status in (0, 1, 2) and "Traceback" not in error, f"{name} {way}: {error}"
            assert not mark.exists(), f"{name}: the payload ran"
    record_property("names of files", len(names))


@pytest.mark.parametrize("allow_pickle", [False, True])
def test_r17_adapters_from_elsewhere(finished: Path, base: Path, tmp_path: Path, allow_pickle: bool) -> None:  # noqa: F811
    model = MultiAdapterModel.from_pretrained(str(base))
    for name in ("adapter_model.bin", "adapter_model.safetensors", "adapter_config.json"):
        for content in pickles(mark := tmp_path / "ran"):
            shutil.copytree(finished / "out/adapters/a", folder := tmp_path / "copy")
            (folder / "adapter_model.safetensors").unlink()
            (folder / name).write_bytes(content)
            with pytest.raises(ModelError):
                model.load_adapter(folder, allow_pickle=allow_pickle)
            assert not mark.exists()
            shutil.rmtree(folder)


def test_r17_a_base_model_of_pickles_runs_nothing(
    here: Path,
    base: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_config(adapter("a", num_epochs=1))
    for name in ("pytorch_model.bin", "model.safetensors"):
        for content in pickles(here / "ran"):
            shutil.copytree(base, here / "bad")
            (here / "bad/model.safetensors").unlink()
            (here / "bad" / name).write_bytes(content)
            assert main(RunOptions("bad", dir="out")) in (1, 2)
            assert "Traceback" not in capsys.readouterr().err and not (here / "ran").exists()
            shutil.rmtree(here / "bad")


def test_r18_code_of_a_base_model_runs_only_where_asked_for(
    here: Path,
    base: Path,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(base, here / "bad")
    config = json.loads((here / "bad/config.json").read_text())
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (here / "bad/config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": names}))
    (here / "bad/evil.py").write_text(f"import os\nos.mkdir({str(here / 'ran')!r})\n")
    write_config(adapter("a", num_epochs=1))
    assert main(RunOptions("bad", dir="out")) == 2
    error = capsys.readouterr().err
    assert not (here / "ran").exists()
    assert "Traceback" not in error and "trust_remote_code" in error, error


@pytest.fixture
def sockets() -> Iterator[list[str]]:
    """Connections that are begun and names that are asked for."""
    seen: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple) -> None:
        if watching and event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
            seen.append(f"{event} {arguments}")

    sys.addaudithook(watch)
    yield seen
    watching = False


def test_r21_a_run_on_a_local_model_opens_no_socket(here: Path, base: Path, sockets: list[str]) -> None:  # noqa: F811
    write_config(adapter("a", num_epochs=1))
    assert main(RunOptions(str(base), evaluate_base=True)) == 0
    assert main(RunOptions(str(base), evaluate=True)) == 0
    assert main(RunOptions(str(base), resume=True)) == 0
    assert not sockets


def test_sockets_would_be_seen(sockets: list[str]) -> None:
    import socket

    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", 9), timeout=0.2):
        pass
    assert sockets


ROWS = [{"question": f"is {i} even", "answer": i % 2 == 0, "passage": "about numbers"} for i in range(12)]


JUNK = [None, 5, -1.5, "", "x" * 5000, [], {}, ["a"], {"text": 1}, "\ud800", "\0", float("nan"), True]


def mutated(draw: random.Random) -> tuple[str, bytes]:
    """Return a file of rows with something wrong in it, or not: its ending and its content."""
    rows: list = [dict(row) for row in ROWS]
    for _ in range(draw.randint(0, 4)):
        row = draw.randrange(len(rows))
        junk = draw.choice(
            [None, 5, -1.5, "", "x" * 5000, [], {}, ["a"], {"text": 1}, "\ud800", "\0", float("nan"), True]
        )
        match draw.randrange(4):
            case 0:
                rows[row] = junk
            case 1 if isinstance(rows[row], dict):
                rows[row][draw.choice(["question", "answer", "passage", "other"])] = junk
            case 2 if isinstance(rows[row], dict):
                rows[row].pop(draw.choice(["question", "answer", "passage"]), None)
            case _:
                rows.insert(row, junk)
    ending = draw.choice(["json", "jsonl", "csv"])
    if ending == "csv":
        lines = [",".join(str(v) for v in row.values()) if isinstance(row, dict) else str(row) for row in rows]
        text = "\n".join(["question,answer,passage", *lines])
    else:
        text = json.dumps(rows) if ending == "json" else "\n".join(json.dumps(row) for row in rows)
    content = bytearray(text.encode(errors="surrogatepass"))
    for _ in range(draw.choice([0, 0, 1, 5])):
        content[draw.randrange(len(content))] = draw.randrange(256)
    if draw.random() < 0.2:
        del content[draw.randrange(len(content)) :]
    return ending, bytes(content)


def test_r14_mutated_data_files_raise_only_data_errors(
    tmp_path: Path, seed: int, record_property: Callable[[str, object], None]
) -> None:
    draw, tokenizer = random.Random(seed), tinybase.byte_tokenizer()
    refused = read = 0
    for number in range(200):
        ending, content = mutated(draw)
        file = tmp_path / f"rows-{number}.{ending}"
        file.write_bytes(content)
        for policy in ("error", "skip"):
            try:
                samples = load_training_samples("boolq", str(file), tokenizer, 128, on_bad_row=policy)
                read += 1
                assert all(any(label != -100 for label in sample.labels) for sample in samples)
            except DataError as error:
                refused += 1
                str(error).encode()
                assert len(str(error).splitlines()) <= 15
    record_property("readings", refused + read)
    record_property("of them refused", refused)
    assert refused > 60 and read > 60, (refused, read)
