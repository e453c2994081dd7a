"""Numeric kernels. Knows torch only, and imports it when the first one is used."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "random": ("dropout", "fold", "jitter", "stable_hash", "stream_keys"),
    "lowrank": ("expand", "low_rank", "reduce", "select_expert"),
    "routing": ("balance_loss", "router_logits", "top_k_routing"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(importlib.import_module(f"{__name__}.{_MODULE[name]}"), name)
    globals()[name] = function
    return function
