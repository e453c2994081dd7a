"""generate.py: an instruction in, answers out."""

from __future__ import annotations

import sys
from typing import Any

import click

from mlora.cli.options import CONTEXT, base_model, base_source, option


@click.command(context_settings=CONTEXT)
@base_model
@option("instruction", "What is asked.", required=True)
@option("input", "What the instruction is about.", default="")
@option("lora_weights", "Adapter folder or hub id; may be given several times.", multiple=True)
@option("template", "Prompt template, by name or path.")
@option("max_new_tokens", "Tokens of the answer.", click.IntRange(1), default=128, show_default=True)
@option("load_16bit", "bf16 weights. [default: on CUDA]", bool, default=False)
@option("load_8bit", "8-bit weights.", bool, default=False)
@option("load_4bit", "4-bit weights.", bool, default=False)
@option("device", "cpu, cuda, ... [default: a GPU where there is one]")
@option("stream", "Print tokens as they come.", bool, default=False)
@base_source
def generate(load_16bit: bool, load_8bit: bool, load_4bit: bool, lora_weights: tuple[str, ...], **flags: Any) -> None:
    """Answer an instruction with the base model or with adapters."""
    if load_8bit and load_4bit:
        raise click.UsageError("--load_8bit cannot be combined with --load_4bit")
    from mlora.generation.answer import Asked
    from mlora.generation.answer import main as answer_main

    quantize = "4bit" if load_4bit else "8bit" if load_8bit else None
    asked = Asked(lora_weights=lora_weights, dtype="bf16" if load_16bit else None, quantize=quantize, **flags)
    sys.exit(answer_main(asked))
