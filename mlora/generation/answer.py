"""What `generate.py` does: one instruction, answered by the base model or by adapters."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch

from mlora.data import DataError, find_prompt
from mlora.model import load
from mlora.model.errors import ModelError
from mlora.model.integration import find_adapter
from mlora.model.multi import MultiAdapterModel

BASE = "base model"


@dataclass(frozen=True)
class Asked:
    """The flags of `generate.py`.

    Attributes:
        base_model: local folder, hub id, GGUF file, or "smollm2".
        instruction: what is asked.
        input: that the instruction is about.
        lora_weights: adapter folders or hub ids; the base model answers where there is none.
        template: prompt template, by name or path.
        max_new_tokens: at most this many tokens are added.
        dtype: "bf16", "fp16" or "fp32"; None for bf16 on CUDA and fp32 on the CPU.
        quantize: "4bit" or "8bit"; None for full weights.
        device: "cpu", "cuda", ...; None for a GPU where there is one.
        stream: print tokens as they come.
        revision: of the base model on the hub.
        trust_remote_code: run code from the base model's repository.
    """

    base_model: str
    instruction: str
    input: str = ""
    lora_weights: tuple[str, ...] = ()
    template: str | None = None
    max_new_tokens: int = 128
    dtype: str | None = None
    quantize: str | None = None
    device: str | None = None
    stream: bool = False
    revision: str | None = None
    trust_remote_code: bool = False


def main(asked: Asked) -> int:
    """Answer, and return the exit status."""
    try:
        answer(asked)
        return 0
    except (ModelError, DataError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2


def answer(asked: Asked) -> None:
    """Print what every adapter answers, greedily."""
    prompt = find_prompt(asked.template).render(asked.instruction, asked.input)
    folders = [find_adapter(name) for name in asked.lora_weights]
    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    model = MultiAdapterModel.from_pretrained(
        asked.base_model,
        dtype=load.DTYPES[asked.dtype or ("bf16" if device.startswith("cuda") else "fp32")],
        device=device,
        quantization=asked.quantize,
        revision=asked.revision,
        trust_remote_code=asked.trust_remote_code,
    )
    # the user has named these folders, so the predecessors' .bin may be read: tensors only
    names: list[str | None] = [model.load_adapter(folder, f"adapter_{i}", True) for i, folder in enumerate(folders)]
    names = names or [None]
    shown = [str(name) for name in asked.lora_weights] or [BASE]
    settings: dict[str, Any] = {"max_new_tokens": asked.max_new_tokens, "do_sample": False}
    if not asked.stream:
        for name, text in zip(shown, model.generate([prompt] * len(names), names, **settings), strict=True):
            print(f"== {name}\n{text.strip()}\n", flush=True)
        return
    from transformers import TextStreamer

    for name, adapter in zip(shown, names, strict=True):
        print(f"== {name}", flush=True)
        streamer = TextStreamer(model.tokenizer, skip_prompt=True, skip_special_tokens=True)
        model.generate([prompt], [adapter], streamer=streamer, **settings)
