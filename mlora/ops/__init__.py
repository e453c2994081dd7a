"""Numeric kernels. Knows torch only, and imports it when the first one is used."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "dora": ("dora_norm", "frozen_weight", "squared_row_norms"),
    "backend": ("device_type", "dropout", "fused_available", "standing_for"),
    "copies": ("Casts", "Copies", "Lasting", "Pairs", "Sums", "joint_copies"),
    "cudnn": ("ragged_attention",),
    "loss": ("token_losses",),
    "lowrank": (
        "BlockUpdate",
        "LowRankUpdate",
        "Stack",
        "apply_stack",
        "apply_update",
        "embedding_update",
        "expand",
        "of_expert",
        "reduce",
        "rescale",
        "select_expert",
        "stacked",
    ),
    "pissa": ("principal_directions",),
    "random": ("fold", "jitter", "stable_hash", "stream_keys", "token_keys"),
    "routing": (
        "balance_loss",
        "multi_hot",
        "router_logits",
        "switch_routing",
        "top_k_routing",
        "top_p_routing",
        "z_loss",
    ),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE)


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(importlib.import_module(f"{__name__}.{_MODULE[name]}"), name)
    globals()[name] = function
    return function
