"""Triton kernels for accelerators: low-rank products and experts with counter-based dropout, regenerated in backward.

Each has its definition in plain torch elsewhere in this room (`lowrank.py`, `random.py`) or in `adapters/mixture.py`,
and tests hold it to that. Import this package only where `ops.fused_available` says so: it needs triton.
"""

from mlora.ops.fused.copies import FusedCopies
from mlora.ops.fused.dropped import dropout
from mlora.ops.fused.feedforward import activation_name, block_part, feed_forward
from mlora.ops.fused.gated import gate
from mlora.ops.fused.linear import Layer, Part, Tensors, adapted_linears
from mlora.ops.fused.loss import cross_entropy
from mlora.ops.fused.masks import dropout_of
from mlora.ops.fused.rotary import rotary

__all__ = [
    "FusedCopies",
    "Layer",
    "Part",
    "Tensors",
    "activation_name",
    "adapted_linears",
    "block_part",
    "cross_entropy",
    "dropout",
    "dropout_of",
    "feed_forward",
    "gate",
    "rotary",
]
