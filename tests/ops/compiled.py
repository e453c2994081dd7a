"""Compile every kernel for a GPU that need not be there; a program of its own, since interpreted kernels cannot be.

    python -m tests.ops.compiled

The interpreter runs Python: it takes what the compiler refuses, types that change in a loop say. So the operations run
on tensors of the CPU up to each launch, where the kernel is compiled for compute capability 9.0 and not started.
"""

from __future__ import annotations

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mlora import ops
from mlora.ops import fused
from mlora.ops.fused.adamw import JointAdamW, Moving
from mlora.ops.fused.router import fused_router_logits


class NoGpu:
    """What Triton asks of a driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def main() -> None:
    driver.set_active(NoGpu())
    run, compiled = JITFunction.run, []

    def compile_only(self, *args, warmup=False, **kwargs):
        compiled.append(self.fn.__name__)
        return run(self, *args, warmup=True, **kwargs)

    JITFunction.run = compile_only
    for dtype in (torch.bfloat16, torch.float32):
        for routed, dropout in ((False, 0.1), (True, 0.1), (True, 0.0)):
            linear(dtype, routed, dropout)
            block(dtype, routed, dropout)
        router(dtype)
        rotary(dtype)
        for gradient in (True, False):
            fused.cross_entropy(torch.zeros(2, 5000, dtype=dtype), torch.zeros(2, dtype=torch.int64), gradient)
    copies()
    adamw()
    print(*sorted(set(compiled)))


def copies() -> None:
    sources = (torch.zeros(3, 40), torch.zeros(40, 16).mT, torch.zeros(40, 48)[:, :16], torch.zeros(8, 8)[:, ::2])
    for dtype in (torch.float32, torch.bfloat16):
        pairs = [(source, torch.zeros(source.shape, dtype=dtype)) for source in sources]
        fused.FusedCopies(pairs).launch(pairs)


def adamw() -> None:
    own = (*(torch.zeros(5000) for _ in range(4)), torch.zeros(()))
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    JointAdamW([Moving(*own, 0, 0)]).step(None, [group], [1.0])


def rotary(dtype: torch.dtype) -> None:
    q, k = (torch.zeros(1, 8, heads, 64, dtype=dtype, requires_grad=True).transpose(1, 2) for heads in (4, 2))
    q, k = fused.rotary(q, k, *torch.zeros(2, 1, 8, 64, dtype=dtype))
    (q.sum() + k.sum()).backward()


def router(dtype: torch.dtype) -> None:
    x = torch.zeros(64, 96, dtype=dtype, requires_grad=True)
    fused_router_logits(x, torch.zeros(8, 96, requires_grad=True)).sum().backward()


def linear(dtype: torch.dtype, routed: bool, p: float) -> None:
    n, layer, lead = 64, nn.Linear(64, 96, bias=False).to(dtype).requires_grad_(False), (3,) if routed else ()
    keys = torch.zeros(2 * n, dtype=torch.int32)
    parts, owned = [], []
    for group in range(2):
        span = slice(group * n, (group + 1) * n)
        parts.append(fused.Part(span.start, span.stop, 1.0, fused.dropout_of(keys[span], p, "q")))
        a, b = torch.zeros(*lead, 16, 64, requires_grad=True), torch.zeros(*lead, 96, 16, requires_grad=True)
        owned.append(fused.Tensors(a, b, torch.zeros(n, 3) if routed else None, None if routed else torch.zeros(96)))
    x = torch.zeros(2 * n, 64, dtype=dtype, requires_grad=True)
    fused.adapted_linears(x, [fused.Layer(layer, parts, owned)])[0].sum().backward()


def block(dtype: torch.dtype, routed: bool, p: float) -> None:
    n, hidden, inner, experts = 64, 64, 96, 4 if routed else 1
    layers = [nn.Linear(i, o, bias=False).to(dtype) for i, o in ((hidden, inner), (hidden, inner), (inner, hidden))]
    sizes = ((hidden, inner), (hidden, inner), (inner, hidden))
    for k in (1, 2) if routed else (1,):
        pairs = [(torch.zeros(experts, 8, i, requires_grad=True), torch.zeros(experts, o, 8)) for i, o in sizes]
        router = torch.zeros(experts, hidden, requires_grad=True) if routed else None
        update = ops.BlockUpdate(*pairs, experts, 1.0, p, router, k)
        keys = torch.zeros(n, dtype=torch.int32)
        for activation in ("silu", "gelu", "gelu_tanh") if dtype == torch.bfloat16 and p else ("silu",):
            part, own = fused.block_part(update, 0, n, activation, keys, ("gate", "up", "down"))
            x = torch.zeros(n, hidden, dtype=dtype, requires_grad=True)
            frozen = [layer.requires_grad_(False) for layer in layers]
            out, logits = fused.feed_forward(x, frozen, [part], [own])
            sum(t.sum() for t in (out, *logits) if t is not None).backward()


if __name__ == "__main__":
    triton.knobs.runtime.interpret = False
    main()
