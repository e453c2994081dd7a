"""Adapter folders: PEFT's own form for LoRA, the predecessors' names in safetensors for mixtures."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlora.adapters import METHODS, Method
from mlora.model import card
from mlora.model.errors import AdapterFileError
from mlora.model.head import HEAD, head_name
from mlora.model.load import published

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
OWN = (CONFIG, TENSORS, PICKLE, "README.md")
"""Files of an adapter folder that are ours to replace."""

CLASSIFICATION = "SEQ_CLS"
"""PEFT's task type of adapters with a classification head."""
_HEADS = ["classifier", HEAD]
"""What PEFT lists in modules_to_save for them: names of heads in transformers, of which a model has one."""
_PREDECESSORS_HEAD = "classifier"
_HEAD_TASK, _ARCHITECTURE, _BASE = "head_task", "base_model_type", "base_model"

log = logging.getLogger(__name__)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of `path` when the block ends well, and vanishes when not.

    Where `path` is a link, that of the folder it points to.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path)
    # not mkdtemp: what it makes is closed to everyone but its owner, and so would the folder be at its place
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        old = _set_aside(path)
        if path.exists():
            os.rename(path, old)
        os.rename(temporary, path)
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def clear_leftovers(path: Path) -> None:
    """Undo what a crash within `whole_folder(path)` left: put the old folder back, or drop what is not needed."""
    path = path.resolve()
    old = _set_aside(path)
    if old.exists() and not path.exists():
        os.rename(old, path)
    shutil.rmtree(old, ignore_errors=True)
    if path.parent.is_dir():
        unfinished = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}")
        for folder in path.parent.iterdir():
            if unfinished.fullmatch(folder.name):
                shutil.rmtree(folder)


def _set_aside(path: Path) -> Path:
    return path.parent / f".{path.name}.old"


def write(
    folder: Path,
    method: Method,
    tensors: dict[str, Tensor],
    base_model: str,
    revision: str | None,
    name: str | None = None,
    making: card.Making | None = None,
    head_task: str | None = None,
    architecture: str | None = None,
) -> None:
    """Write an adapter folder and its model card.

    The config names a packaged base model by its id on the hub, where other programs find it.

    Args:
        folder: made where absent.
        method: typed config, target modules by name.
        tensors: named as in the file.
        base_model: name or path as the user gave it.
        revision: of the base model's repository.
        name: of the adapter, for the card; None for the folder's.
        making: how it was trained, for the card.
        head_task: what its classification head was trained for.
        architecture: of the base model, as its config's `model_type` says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = published(base_model)
    config = _to_file(method, tensors) | {"base_model_name_or_path": named, "revision": revision}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    # beside the tensors, because PEFT warns of keys in the config that it does not know
    own_name = None if named == base_model else base_model
    said = {"format": "pt", _HEAD_TASK: head_task, _ARCHITECTURE: architecture, _BASE: own_name}
    about = {key: value for key, value in said.items() if value is not None}
    save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, folder / TENSORS, about)
    _put_in_order(folder / TENSORS)
    shutil.copymode(folder / CONFIG, folder / TENSORS)  # safetensors closes its files to everyone but their owner
    card.write_for_adapter(folder, name, method, base_model, making, head_name(method) in tensors)


def _put_in_order(file: Path) -> None:
    """Sort what a safetensors file says of itself, which comes in any order: one adapter, one sequence of bytes."""
    with file.open("r+b") as content:
        size = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        content.seek(8)
        content.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size))


def read(folder: Path, allow_pickle: bool) -> tuple[Method, dict[str, Tensor], str | None]:
    """Read an adapter folder: typed config, tensors named as in the file, and the base model it was trained on.

    Raises:
        AdapterFileError: a file is missing or broken, or says what no method here can compute.
    """
    config = _read_json(folder)
    tensors = _read_tensors(folder, allow_pickle)
    method = _from_file(config, folder / CONFIG)
    if _PREDECESSORS_HEAD in tensors:
        tensors[head_name(method)] = tensors.pop(_PREDECESSORS_HEAD)
    if config.get("task_type") == CLASSIFICATION and num_labels(method, tensors) is None:
        raise AdapterFileError(f"{folder}: task_type is {CLASSIFICATION}, but there is no tensor {head_name(method)}")
    return method, tensors, _base(config, folder)


def num_labels(method: Method, tensors: dict[str, Tensor]) -> int | None:
    """Return the classes of the classification head among an adapter file's tensors; None where there is none."""
    head = tensors.get(head_name(method))
    return None if head is None else next(iter(head.shape), 0)


def head_task(folder: Path) -> str | None:
    """Return what an adapter folder's classification head was trained for; None where it does not say."""
    return _about(folder).get(_HEAD_TASK)


def architecture(folder: Path) -> str | None:
    """Return the `model_type` of the base model that an adapter folder was trained on; None where it does not say."""
    return _about(folder).get(_ARCHITECTURE)


def _about(folder: Path) -> dict[str, str]:
    if not (folder / TENSORS).exists():
        return {}
    try:
        with safe_open(folder / TENSORS, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise AdapterFileError(f"{folder / TENSORS}: cannot be read: {error}") from error


def base_model(folder: Path) -> tuple[str | None, str | None]:
    """Return the base model that an adapter folder names, a packaged one by our name, and its revision.

    Raises:
        AdapterFileError: the folder is no adapter's.
    """
    config = _read_json(folder)
    return _base(config, folder), config.get("revision")


def _base(config: dict[str, Any], folder: Path) -> str | None:
    return _about(folder).get(_BASE, config.get("base_model_name_or_path"))


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not folder.is_dir():
        raise AdapterFileError(f"{folder}: no such adapter folder")
    if not path.exists():
        raise AdapterFileError(f"{folder}: is no adapter folder, {CONFIG} is missing")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterFileError(f"{path}: is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterFileError(f"{path}: expected an object")
    return config


def _read_tensors(folder: Path, allow_pickle: bool) -> dict[str, Tensor]:
    if (folder / TENSORS).exists():
        try:
            return load_file(folder / TENSORS)
        except (SafetensorError, OSError) as error:
            raise AdapterFileError(f"{folder / TENSORS}: cannot be read: {error}") from error
    path = folder / PICKLE
    if not path.exists():
        raise AdapterFileError(f"{folder}: neither {TENSORS} nor {PICKLE} is there")
    if not allow_pickle:
        raise AdapterFileError(
            f"{path}: a .bin file is a pickle and is read only where you allow it (allow_pickle=True)"
        )
    log.warning("%s: reading a pickle, tensors only", path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a broken or hostile pickle raises, the answer is the same
        raise AdapterFileError(f"{path}: is not a file of plain tensors") from error
    if not isinstance(tensors, dict) or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise AdapterFileError(f"{path}: is not a mapping of names to tensors")
    return {_name_of_today(name): tensor.detach() for name, tensor in tensors.items()}


_RENAMED = (
    (re.compile(r"^mixlora\.layers\.(\d+)\.gate\.weight$"), r"mixlora.layers.\1.mlp.moe_gate.weight"),
    (re.compile(r"^mixlora\.layers\.(\d+)\.experts\.(\d+)\.(\w+)\."), r"mixlora.layers.\1.mlp.\3.experts.\2."),
    (re.compile(r"\.self_attn\.((?:gate|up|down|gate_up)_proj|fc1|fc2)\.lora_"), r".mlp.\1.lora_"),
)
"""Names of m-LoRA 0.3.2, which counted experts above the projections and put all plain LoRA under the attention."""


def _name_of_today(name: str) -> str:
    for pattern, today in _RENAMED:
        name = pattern.sub(today, name)
    return name


def _to_file(method: Method, tensors: dict[str, Tensor]) -> dict[str, Any]:
    fields = method.model_dump(mode="json", exclude_none=True)
    config = fields | {
        "peft_type": method.peft_type,
        "task_type": CLASSIFICATION if head_name(method) in tensors else "CAUSAL_LM",
        "bias": "none",
        "inference_mode": True,
    }
    if method.peft_type == "LORA":
        config["init_lora_weights"] = True if config.pop("lora_init") == "original" else "gaussian"
        whole = _HEADS if head_name(method) in tensors else None
        config |= {"rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": whole, "fan_in_fan_out": False}
    else:
        config["routing_strategy"] = method.method
    return config


_STARTS = ("gaussian", "orthogonal", "eva", "true", "false")
"""Starts of PEFT's that leave the base model as it is; the others (pissa, olora, loftq, ...) take from its weights."""

_NO_EFFECT: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None, []),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "lora_bias": (False, None),
    "exclude_modules": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
}
"""Keys that change what an adapter computes, with the values that leave it a plain one."""


def _from_file(config: dict[str, Any], path: Path) -> Method:
    peft_type = config.get("peft_type", "LORA")
    name = config.get("routing_strategy") or ("lora" if peft_type == "LORA" else str(peft_type).lower())
    if not isinstance(name, str) or name not in METHODS:
        raise AdapterFileError(f"{path}: method {name!r} is unknown; known: {', '.join(sorted(METHODS))}")
    method = METHODS[name]
    known = {key: value for key, value in config.items() if key in method.model_fields}
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start not in _STARTS:
        raise AdapterFileError(
            f"{path}: init_lora_weights: {start!r} belongs to a base model that PEFT has changed; save it there with "
            "path_initial_model_for_weight_conversion"
        )
    if start == "gaussian" and "lora_init" in method.model_fields:
        known["lora_init"] = "gaussian"
    if isinstance(known.get("expert_lora"), dict):  # the predecessors repeat their constant keys in it
        own = known["expert_lora"].items()
        known["expert_lora"] = {k: v for k, v in own if k not in _NO_EFFECT or k in METHODS["lora"].model_fields}
    if isinstance(whole := config.get("modules_to_save"), list):  # the head is read, whatever else is refused
        config = config | {"modules_to_save": [name for name in whole if name not in _HEADS]}
    for key, harmless in _NO_EFFECT.items():
        if key in config and key not in known and config[key] not in harmless:
            raise AdapterFileError(f"{path}: {key}: {config[key]!r} is not supported; allowed: {harmless[0]!r}")
    try:
        return method.model_validate(known)
    except ValueError as error:
        raise AdapterFileError(f"{path}: {_first_problem(error)}") from error


def _first_problem(error: ValueError) -> str:
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['input']!r}: {problem['msg']}"


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
