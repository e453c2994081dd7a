"""Adapters in the forms that other programs read: `launch.py export`."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch

from mlora.config import ConfigError, Problem
from mlora.export import merged, mixlora, mixtral, peft
from mlora.export.refusal import FORMATS_OF
from mlora.export.source import Source
from mlora.model import files, load
from mlora.model.errors import ModelError

__all__ = ["export", "main"]

ADAPTERS = {"peft": peft.write, "mixlora": mixlora.write}
"""Formats that hold the adapter alone, in float32."""
MODELS = {"mixtral": mixtral.write, "merged": merged.write}
"""Formats that hold the adapter and its base as one model."""


def export(
    format: str,
    base_model: str,
    adapter: str | Path,
    output: str | Path,
    dtype: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write a saved adapter in another program's form, whole or not at all, and return the folder.

    Args:
        format: "peft", "mixlora", "mixtral" or "merged".
        base_model: local folder, hub id, GGUF file, or "smollm2".
        adapter: its folder.
        output: folder to write.
        dtype: "fp32", "bf16" or "fp16" of a written model; None for fp32. Adapters are always float32.
        revision: of the base model on the hub.
        trust_remote_code: let code from the base model's repository run.
        overwrite: replace an earlier export.

    Raises:
        ConfigError: the output exists, or a value is not allowed.
        ModelError: the adapter, its base or the format do not go together; the message says why.
    """
    place, folder = Path(output).expanduser().resolve(), Path(adapter).expanduser()
    if format not in ADAPTERS | MODELS:
        raise _bad("--format", f"{format!r} is not allowed; allowed: {', '.join(ADAPTERS | MODELS)}")
    if dtype is not None and (format in ADAPTERS or dtype not in load.DTYPES):
        allowed = f"none for {format}" if format in ADAPTERS else ", ".join(load.DTYPES)
        raise _bad("--dtype", f"{dtype!r} is not allowed; allowed: {allowed}")
    _require_free(place, overwrite, folder, Path(base_model).expanduser())
    source = Source.read(base_model, folder, revision, trust_remote_code)
    if files.num_labels(source.method, source.tensors) is not None:
        if "peft" not in FORMATS_OF.get(source.method.method, ()):
            raise ModelError(f"--format {format}: no format holds a {source.method.method} with a classification head")
        if format != "peft":
            raise ModelError(f"--format {format}: has no place for the classification head of {folder}; peft alone has")
    with files.whole_folder(place) as whole:
        if format in ADAPTERS:
            ADAPTERS[format](source, whole, place.name)
        else:
            MODELS[format](source, whole, place.name, getattr(torch, load.DTYPES[dtype or "fp32"]))
    return place


def main(
    format: str,
    base_model: str,
    adapter: str,
    output: str,
    dtype: str | None,
    revision: str | None,
    trust_remote_code: bool,
    overwrite: bool,
) -> int:
    """Export, say so, and return the exit status: 0 done, 2 bad input."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        export(format, base_model, adapter, output, dtype, revision, trust_remote_code, overwrite)
    except (ConfigError, ModelError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(f"Wrote {output}: {adapter} as {format}")
    return 0


def _require_free(output: Path, overwrite: bool, *inputs: Path) -> None:
    """Refuse to write over what lies there, and with `overwrite` over what no export can have written."""
    if not output.exists():
        return
    if not overwrite:
        raise _bad(f"--output {output}", "exists already; --overwrite replaces it")
    for path in inputs:
        if path.exists() and path.resolve().is_relative_to(output):
            raise _bad(f"--output {output}", f"holds {path}, which is read")
    empty = output.is_dir() and not any(output.iterdir())
    if not (empty or any((output / name).exists() for name in (files.CONFIG, "config.json"))):
        raise _bad(f"--output {output}", "exists already and is no model or adapter; choose another folder")


def _bad(what: str, message: str) -> ConfigError:
    return ConfigError(what, [Problem("", message)])
