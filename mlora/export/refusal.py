"""Which method can be written in which format, and what to say of the rest."""

from __future__ import annotations

from mlora.adapters import Method
from mlora.model.errors import ModelError

FORMATS_OF = {"lora": ("peft", "merged"), "mixlora": ("mixlora", "mixtral")}
"""Formats of each method; the others are read by m-LoRA alone."""


def refusal(wanted: str, method: Method, why: str) -> ModelError:
    """Return the error for a method or setting that a format cannot hold.

    Args:
        wanted: the format.
        method: of the adapter.
        why: what the format lacks.
    """
    formats = ", ".join(FORMATS_OF.get(method.method, ())) or "none, it stays a folder that m-LoRA reads"
    return ModelError(f"--format {wanted}: {why}; formats for {method.method}: {formats}")
