"""`launch.py run --inference`: a line in, every adapter's answer out."""

from __future__ import annotations

import sys

from mlora.config import RunConfig
from mlora.data import find_prompt
from mlora.model.multi import MultiAdapterModel


def answer_lines(model: MultiAdapterModel, config: RunConfig, use_cache: bool) -> None:
    """Read instructions from standard input, a line each, and print what every adapter answers."""
    if sys.stdin.isatty():
        print("one instruction a line; an empty line ends", flush=True)
    names = [job.name for job in config.lora]
    size = config.inference_lora_simultaneously_num or len(names)
    for line in iter(sys.stdin.readline, ""):
        if not line.strip():
            break
        prompts = [find_prompt(job.prompt).render(line.strip()) for job in config.lora]
        for start in range(0, len(names), size):
            together = slice(start, start + size)
            answers = model.generate(prompts[together], names[together], use_cache=use_cache)
            for name, answer in zip(names[together], answers, strict=True):
                print(f"{name}: {answer.strip()}", flush=True)
