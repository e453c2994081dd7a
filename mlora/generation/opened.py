"""A base model with the adapters that a user named, ready to answer."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mlora.config.names import name_problem
from mlora.model import files, load
from mlora.model.errors import ModelError
from mlora.model.integration import find_adapter
from mlora.model.multi import MultiAdapterModel

BASE = "base model"


@dataclass(frozen=True)
class ModelOptions:
    """What is to be loaded.

    Attributes:
        base_model: local folder, hub id, GGUF file, or "smollm2".
        lora_weights: adapter folders or hub ids.
        dtype: "bf16", "fp16" or "fp32"; None for bf16 on CUDA and fp32 on the CPU.
        quantize: "4bit" or "8bit"; None for full weights.
        device: "cpu", "cuda", ...; None for a GPU where there is one.
        revision: of the base model on the hub.
        trust_remote_code: run code from the base model's repository.
    """

    base_model: str
    lora_weights: tuple[str, ...] = ()
    dtype: str | None = None
    quantize: str | None = None
    device: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False


def open_model(options: ModelOptions) -> tuple[MultiAdapterModel, dict[str, Path]]:
    """Load the base model and its adapters.

    Returns:
        The model, and the folder of each adapter by its name in the model, in the order given.

    Raises:
        ModelError: something cannot be loaded; the message says what to do.
    """
    folders = name_folders(options.lora_weights)
    for folder in folders.values():
        files.base_model(folder)  # a folder that is no adapter's is found before the base model's gigabytes
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = MultiAdapterModel.from_pretrained(
        options.base_model,
        dtype=load.DTYPES[options.dtype or ("bf16" if device.startswith("cuda") else "fp32")],
        device=device,
        quantization=options.quantize,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
    )
    for name, folder in folders.items():
        load_answerer(model, name, folder)
    return model, folders


def load_answerer(model: MultiAdapterModel, name: str, folder: Path) -> None:
    """Load an adapter that is to write text.

    Raises:
        ModelError: it cannot be loaded, or classifies.
    """
    # the user has named this folder, so the predecessors' .bin may be read: tensors only
    model.load_adapter(folder, name, allow_pickle=True)
    if model.num_labels(name) is not None:
        model.remove_adapter(name)
        raise ModelError(f"{folder}: has a classification head: it names classes and generates no text")


def name_folders(given: Sequence[str]) -> dict[str, Path]:
    """Return a name for each adapter folder: its own where it can be a name, numbered where two have the same."""
    folders: dict[str, Path] = {}
    for words in given:
        folder = find_adapter(words)
        # a snapshot of the hub is named by its hash
        own = Path(words).name if not Path(words).expanduser().exists() else folder.resolve().name
        folders[free_name(own, folders)] = folder
    return folders


def free_name(own: str, taken: Container[str]) -> str:
    """Return a name for an adapter: its folder's own where it can be one, numbered where it is taken."""
    stem = own if name_problem(own) is None and own != BASE else "adapter"
    number, name = 1, stem
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    return name


def adapters_within(folder: Path) -> list[Path]:
    """Return the adapter folders of a run's folder, or of any that holds some; none of an adapter's own."""
    if not folder.is_dir() or (folder / files.CONFIG).exists():
        return []
    return sorted(
        config.parent for pattern in ("*", "adapters/*") for config in folder.glob(f"{pattern}/{files.CONFIG}")
    )
