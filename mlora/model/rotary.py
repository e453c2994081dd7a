"""Rotary embeddings by a kernel, in attention layers whose family turns the halves of every head.

A family's attention calls a function of its own module, `apply_rotary_pos_emb`. A layer of this model calls ours in its
place, which asks the family's own wherever the kernel does not do the same; other models of the family are left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from mlora import ops

NAME = "apply_rotary_pos_emb"
Apply = Callable[..., Any]


def fuse_rotary(model: nn.Module) -> Callable[[], None]:
    """Let the attention layers of a model use the kernel where it is theirs.

    Returns:
        What keeps torch's compiler out of it.
    """
    known: dict[Apply, dict[str, Any] | None] = {}
    for module in model.modules():
        forward: Any = type(module).forward
        if not isinstance(forward, FunctionType) or NAME not in forward.__code__.co_names:
            continue
        own: Apply | None = forward.__globals__.get(NAME)
        if own is None:
            continue
        if own not in known:
            known[own] = forward.__globals__ | {NAME: _fused(own)} if _turns_halves(own) else None
        if (around := known[own]) is not None:
            ours = FunctionType(forward.__code__, around, forward.__name__, forward.__defaults__, forward.__closure__)
            ours.__kwdefaults__ = forward.__kwdefaults__
            module.forward = MethodType(ours, module)

    def exclude_from_compilation() -> None:
        for around in known.values():
            if around is not None:
                around[NAME] = torch.compiler.disable(around[NAME])

    return exclude_from_compilation


def _turns_halves(apply: Apply) -> bool:
    """Whether a family's function is the one of `ops.fused.rotary`, on random input."""
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 3, 8, generator=draw) for heads in (4, 2))
    cos, sin = (torch.randn(2, 3, 8, generator=draw) for _ in range(2))
    try:
        found = apply(q, k, cos, sin)
        return all(torch.allclose(own, _turned(x, cos, sin)) for own, x in zip(found, (q, k), strict=True))
    except Exception:  # another function of this name, with other arguments, shapes or results
        return False


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


def _fused(apply: Apply) -> Apply:
    @wraps(apply)
    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **keywords: Any) -> Any:
        plain = not args and not keywords and ops.fused_available(q) and q.ndim == 4 and cos.ndim == 3
        alike = q.shape[-1] == k.shape[-1] == cos.shape[-1] and cos.stride() == sin.stride() and q.dtype == cos.dtype
        if not (plain and alike and all(x.stride(-1) == 1 for x in (q, k, cos))) or cos.requires_grad:
            return apply(q, k, cos, sin, *args, **keywords)
        from mlora.ops import fused

        return fused.rotary(q, k, cos, sin)

    return rotary
