"""Fine-tune several adapters at once over one frozen language model.

The names below are imported when first used, so that the command line starts without torch.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Batch": "mlora.model.batch",
    "MixLoraModelForCausalLM": "mlora.model.integration",
    "MultiAdapterModel": "mlora.model.multi",
}
__all__ = ["Batch", "MixLoraModelForCausalLM", "MultiAdapterModel"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
