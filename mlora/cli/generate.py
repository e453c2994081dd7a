"""generate.py: prompts in, answers out."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from mlora.cli.options import CONTEXT, PATH, SeveralValues, all_of, base_model, base_source, names_or_path, option
from mlora.cli.program import program
from mlora.config.templates import prompt_names

answering = all_of(
    [
        base_model,
        option("lora_weights", "Adapter folders or hub ids, one or more.", PATH, multiple=True, metavar="PATH..."),
        option(
            "template",
            'Prompt template, by name or path; "chat"; "none". [default: chat where the model has it]',
            shell_complete=names_or_path(lambda: ["chat", "none", *prompt_names()]),
        ),
        option("load_16bit", "bf16 weights. [default: on CUDA]", bool, default=False),
        option("load_8bit", "8-bit weights.", bool, default=False),
        option("load_4bit", "4-bit weights.", bool, default=False),
        option("device", "cpu, cuda, ... [default: a GPU where there is one]"),
        base_source,
    ]
)
"""What generate.py and inference.py both take: the model and how it is asked."""


@program.command(cls=SeveralValues, context_settings=CONTEXT)
@answering
@option("instruction", "What is asked; several are answered together.", multiple=True)
@option("input", "What the instruction is about.", default="")
@option("prompts", "File of prompts: .txt, one a line, or .jsonl with instruction and input.", PATH)
@option("base", "Let the base model answer beside the adapters.", bool, default=False)
@option("max_new_tokens", "Tokens of an answer at most.", click.IntRange(1), default=128, show_default=True)
@option("do_sample", "Draw tokens at random. [default: where temperature, top_p or top_k is given]", bool)
@option("temperature", "Flattens the distribution above 1, sharpens it below; 0 is greedy.", float)
@option("top_p", "Draw from the likeliest tokens up to this probability.", float)
@option("top_k", "Draw from this many likeliest tokens.", int)
@option("num_beams", "Beam search with this many.", click.IntRange(1), default=1, show_default=True)
@option("repetition_penalty", "Above 1, tokens that occurred are less likely.", float, default=1.0, show_default=True)
@option("stop", "Text that ends an answer; may be given several times.", multiple=True)
@option("seed", "Of drawing: the same prompt and seed give the same answer.", int)
@option("batch_size", "Answers computed at a time.", click.IntRange(1), default=32, show_default=True)
@option("stream", "Print tokens as they come.", bool, default=False)
@option("json", "Print a line of JSON for each answer.", bool, default=False)
def generate(**flags: Any) -> None:
    """Answer prompts with the base model or adapters, in one batch."""
    if not flags["instruction"] and flags["prompts"] is None:
        raise click.UsageError("nothing is asked: give --instruction TEXT or --prompts FILE")
    if flags["stream"] and flags["json"]:
        raise click.UsageError("--stream cannot be combined with --json")
    from mlora.generation.sampling import Sampling

    names = [name for name in Sampling.__dataclass_fields__ if name in flags]
    try:
        sampling = Sampling(**{name: flags.pop(name) for name in names})
    except ValueError as error:
        raise click.UsageError(f"--{error}") from None
    model = model_options(flags)
    from mlora.generation.answer import Asked
    from mlora.generation.answer import main as answer_main

    sys.exit(answer_main(Asked(model, sampling, instructions=flags.pop("instruction"), **flags)))


def model_options(flags: dict[str, Any]) -> Any:
    """Take the flags of the model out of all flags and return them as `ModelOptions`."""
    half, eight, four = (flags.pop(f"load_{bits}bit") for bits in (16, 8, 4))
    if eight and four:
        raise click.UsageError("--load_8bit cannot be combined with --load_4bit")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    from mlora.generation.opened import ModelOptions

    own = {name: flags.pop(name) for name in list(flags) if name in ModelOptions.__dataclass_fields__}
    return ModelOptions(dtype="bf16" if half else None, quantize="4bit" if four else "8bit" if eight else None, **own)
