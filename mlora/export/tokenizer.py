"""The tokenizer that goes with a written model."""

from __future__ import annotations

import logging
from pathlib import Path

from mlora.model import load
from mlora.model.errors import ModelError

log = logging.getLogger(__name__)


def write_tokenizer(origin: load.Origin, folder: Path) -> None:
    """Write the base model's tokenizer; warn where it has none."""
    try:
        tokenizer = load.load_tokenizer(origin)
    except ModelError as error:
        log.warning("written without a tokenizer: %s", error)
    else:
        tokenizer.save_pretrained(folder)
