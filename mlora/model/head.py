"""Classification heads: logits = W h, h the last hidden state (after the final norm) at a sequence's last token.

As transformers' sequence classifiers over causal models (`GenericForSequenceClassification`), whose `score` W is: no
bias, float32 here. One belongs to an adapter, which trains it and is saved with it.

Shapes: T packed tokens, D hidden, n sequences, W [labels, D].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlora.adapters import Init, Method
from mlora.model.batch import Span
from mlora.model.errors import ModelError

HEAD = "score"
"""Declared name of a head, transformers' and PEFT's own."""


def head_name(method: Method) -> str:
    """Return what files call the head of an adapter."""
    return f"{method.file_prefix}.{HEAD}.weight"


def declare(config: Any, num_labels: int) -> Init:
    """Return the head's shape and its distribution at the start, that of transformers' own heads.

    Args:
        config: transformers' config of the base model.
        num_labels: classes, at least one.
    """
    text = config.get_text_config()
    return Init((num_labels, text.hidden_size), "normal", getattr(text, "initializer_range", None) or 0.02)


def check_classes(span: Span, num_labels: int | None) -> None:
    """Refuse rows with classes for an adapter without a head, and the other way round.

    Args:
        span: rows of one adapter.
        num_labels: classes of its head; None where it has none.

    Raises:
        ModelError: they do not go together.
    """
    if num_labels is None and span.class_ids:
        raise ModelError(f"adapter {span.adapter!r} has no classification head, but its rows have classes")
    if num_labels is not None and not span.class_ids:
        raise ModelError(f"adapter {span.adapter!r} has a classification head, but its rows have no classes")
    wrong = [i for i in span.class_ids if not 0 <= i < (num_labels or 0)]
    if wrong:
        raise ModelError(f"adapter {span.adapter!r} has {num_labels} classes; a row is of class {wrong[0]}")


def class_logits(hidden: Tensor, span: Span, head: Tensor) -> Tensor:
    """Return the logits [n, labels] float32 of a span's sequences from the hidden states [T, D] of the batch."""
    return F.linear(hidden[torch.tensor(span.ends, device=hidden.device)].float(), head)


def class_losses(hidden: Tensor, span: Span, head: Tensor) -> Tensor:
    """Return the cross-entropy [n] of a span's sequences."""
    classes = torch.tensor(span.class_ids, device=hidden.device)
    return F.cross_entropy(class_logits(hidden, span, head), classes, reduction="none")


def decoder(model: Any) -> Any:
    """Return the part of a transformers model below its output layer."""
    base = model.base_model
    return model.model if base is model else base  # llama4 names its own otherwise than its prefix says


@contextmanager
def last_hidden_states(model: Any) -> Iterator[list[Tensor]]:
    """Collect what the output layer reads [B, L, D] of every forward of a transformers model in the `with` block."""
    kept: list[Tensor] = []
    hook = decoder(model).register_forward_hook(lambda _, __, out: kept.append(out.last_hidden_state))
    try:
        yield kept
    finally:
        hook.remove()
