"""A LoRA, rsLoRA or DoRA adapter as a folder of PEFT's: ours is one; this rewrites the predecessors' too."""

from __future__ import annotations

from pathlib import Path

from mlora.export.refusal import refusal
from mlora.export.source import NAME, Source
from mlora.model import files


def write(source: Source, folder: Path, title: str) -> None:
    """Write the adapter as PEFT does.

    Raises:
        ModelError: PEFT has no such method, or the adapter does not fit the base model.
    """
    if source.method.peft_type != "LORA":
        raise refusal("peft", source.method, "PEFT has no such method")
    method = source.shapes().saved_config(NAME)
    place = source.origin
    about = files.head_task(source.folder), files.architecture(source.folder)
    files.write(folder, method, source.tensors, place.given, place.revision, title, source.making(), *about)
