"""An adapter as an ordinary transformers model, for `generate()`, pipelines and whatever else takes one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlora.adapters import Method
from mlora.model import files, load
from mlora.model.errors import AdapterFileError, ModelError
from mlora.model.hub import advice
from mlora.model.multi import MultiAdapterModel
from mlora.network import ask_hub, why_offline

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LoadedAdapter:
    """What was loaded.

    Attributes:
        base_model_name_or_path: of the base model, where its tokenizer lies too.
        adapter_name: of the adapter in the model.
        method: the adapter's typed config.
    """

    base_model_name_or_path: str
    adapter_name: str
    method: Method


class MixLoraModelForCausalLM:
    """Loads an adapter of any method into the base model that it was trained on."""

    @staticmethod
    def from_pretrained(
        name_or_path: str | Path,
        *model_args: Any,
        adapter_name: str = "default",
        allow_pickle: bool = True,
        **kwargs: Any,
    ) -> tuple[PreTrainedModel, LoadedAdapter]:
        """Return a transformers model whose every forward runs the adapter, and what was loaded.

        The model is for inference: frozen, in evaluation mode. `model.to(device)` takes the adapter along.

        Args:
            name_or_path: adapter folder or hub id.
            model_args: what `AutoModelForCausalLM.from_pretrained` takes after the base model's name.
            adapter_name: to give to the adapter.
            allow_pickle: whether an `adapter_model.bin` may be read, the only form the predecessors wrote; nothing
                but tensors is read from it.
            kwargs: what `AutoModelForCausalLM.from_pretrained` takes, for the base model.

        Raises:
            ModelError: the adapter or its base model cannot be loaded; the message says why.
        """
        folder = find_adapter(str(name_or_path))
        base, revision = files.base_model(folder)
        if base is None:
            raise AdapterFileError(f"{folder / files.CONFIG}: base_model_name_or_path: missing; name the base model")
        if "torch_dtype" in kwargs:  # the name of `dtype` until transformers 4
            kwargs["dtype"] = kwargs.pop("torch_dtype")
        origin = load.find(base, kwargs.pop("revision", revision), kwargs.pop("trust_remote_code", False))
        model: Any = load.load_as_asked(origin, *model_args, **kwargs)
        multi = MultiAdapterModel(model, origin)
        multi.load_adapter(folder, adapter_name, allow_pickle)
        if multi.num_labels(adapter_name) is not None:
            raise AdapterFileError(
                f"{folder}: has a classification head, for which a causal language model has no place; "
                "MultiAdapterModel loads it, and PEFT over AutoModelForSequenceClassification a LoRA or DoRA"
            )
        multi.scope.default = adapter_name
        if multi.adapters[adapter_name].counts_tokens and model.generation_config is not None:
            model.generation_config.use_cache = False  # a cached step would not know what came before it
        # a part of the model, so that it moves between devices with it
        model.add_module("mlora_adapters", multi.adapter_modules.requires_grad_(False))
        model.save_pretrained = _refuse_to_save
        return model, LoadedAdapter(load.published(base), adapter_name, multi.adapters[adapter_name])


def find_adapter(name_or_path: str) -> Path:
    """Return the folder of an adapter, fetched from the hub where it is not a local one."""
    path = Path(name_or_path).expanduser()
    if path.exists() or path.is_absolute() or name_or_path.count("/") != 1 or name_or_path.startswith((".", "~")):
        return path
    from huggingface_hub import snapshot_download

    ask_hub()
    try:
        return Path(snapshot_download(name_or_path, allow_patterns=[files.CONFIG, files.TENSORS, files.PICKLE]))
    except (OSError, ValueError) as error:
        hint = advice(error, name_or_path)
        first, _, _ = str(error).strip().partition("\n")
        reason = hint if why_offline() else f"{first} ({hint})"
        raise ModelError(f"adapter {name_or_path}: neither a folder nor to be had: {reason}") from error


def _refuse_to_save(*args: Any, **kwargs: Any) -> None:
    """Raise: the names of a model with an adapter inside are no other program's."""
    raise ModelError(
        "a model with an adapter inside is not saved as a whole: its adapter folder is what is kept, "
        "`launch.py export --format merged` (or mixtral) writes a model that needs no adapter"
    )
