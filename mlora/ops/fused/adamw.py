"""AdamW of many small tensors of several adapters in four launches: squares of gradients, factors, rates, updates.

    norm_a = |g_a|,  c_a = min(1, limit_a / (norm_a + 1e-6)); nothing of an adapter changes whose norm is not finite
    m' = m + (1 - b1) (c g - m),  v' = v + (1 - b2) ((c g)^2 - v)
    p' = p - lr wd p - lr / (1 - b1^t) m' / (sqrt(v' / (1 - b2^t)) + eps)

as torch.optim.AdamW, whose state these are. Tables say where each tensor lies, as in `copies.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlora.ops.fused.copies import shared_out

BLOCK = 1024
"""Numbers of a tile; of larger ones fewer are under way at once."""


class Moving(NamedTuple):
    """A parameter and what AdamW keeps of it, contiguous and float32.

    Attributes:
        parameter, gradient, mean, square: of the same shape.
        step: taken of it, one number.
        group: number of the group of parameters that it is in.
        adapter: number of its adapter; neighbours have the same.
    """

    parameter: Tensor
    gradient: Tensor
    mean: Tensor
    square: Tensor
    step: Tensor
    group: int
    adapter: int


@triton.jit
def _aligned(number, ALIGNED: tl.constexpr):
    return tl.multiple_of(number, 16) if ALIGNED else number


@triton.jit
def _place(places, tensor, which: tl.constexpr, ALIGNED: tl.constexpr):
    return _aligned(tl.load(places + 5 * tensor + which), ALIGNED).to(tl.pointer_type(tl.float32))


@triton.jit
def _squares(places, forms, owners, sums, BLOCK: tl.constexpr):
    tensor = tl.load(owners + tl.program_id(0)).to(tl.int64)
    at = (tl.program_id(0) - tl.load(forms + 4 * tensor + 1)) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(_place(places, tensor, 1, False) + at, mask=at < tl.load(forms + 4 * tensor), other=0.0)
    tl.store(sums + tl.program_id(0), tl.sum(g * g, 0))


@triton.jit
def _factors(bounds, sums, limits, norms, factors, BLOCK: tl.constexpr):
    adapter = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    stop = tl.load(bounds + adapter + 1)
    for first in range(tl.load(bounds + adapter), stop, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(sums + at, mask=at < stop, other=0.0)
    norm = tl.sqrt(tl.sum(total, 0))
    factor = tl.minimum(1.0, tl.load(limits + adapter) / (norm + 1e-6))
    tl.store(norms + adapter, norm)
    tl.store(factors + adapter, tl.where(norm < float("inf"), factor, -1.0))  # NaN is not less either


@triton.jit
def _rates(places, forms, settings, rates):
    """Leave what the update of a tensor takes, computed in float64, since 1 - b^t is small."""
    tensor = tl.program_id(0).to(tl.int64)
    given, rate = settings + 7 * tl.load(forms + 4 * tensor + 2), rates + 7 * tensor
    count = tl.load(_place(places, tensor, 4, False)).to(tl.float64) + 1
    lr = tl.load(given)
    tl.store(rate, count.to(tl.float32))
    tl.store(rate + 1, (lr / (1 - tl.exp(tl.load(given + 5) * count))).to(tl.float32))
    tl.store(rate + 2, (1 / tl.sqrt(1 - tl.exp(tl.load(given + 6) * count))).to(tl.float32))
    tl.store(rate + 3, (lr * tl.load(given + 4)).to(tl.float32))
    for i in tl.static_range(3):  # 1 - b1, 1 - b2, epsilon
        tl.store(rate + 4 + i, tl.load(given + 1 + i).to(tl.float32))


@triton.jit
def _adamw(places, forms, owners, factors, rates, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    tensor = tl.load(owners + tl.program_id(0)).to(tl.int64)
    form = forms + 4 * tensor
    factor = tl.load(factors + tl.load(form + 3))
    if factor >= 0:
        rate = rates + 7 * tensor
        tile = tl.program_id(0) - tl.load(form + 1)
        at = tile * BLOCK + tl.arange(0, BLOCK)
        inside = at < _aligned(tl.load(form), ALIGNED)
        parameter, mean = _place(places, tensor, 0, ALIGNED), _place(places, tensor, 2, ALIGNED)
        square = _place(places, tensor, 3, ALIGNED)
        g = tl.load(_place(places, tensor, 1, ALIGNED) + at, mask=inside, other=0.0) * factor
        p = tl.load(parameter + at, mask=inside, other=0.0)
        m = tl.load(mean + at, mask=inside, other=0.0)
        v = tl.load(square + at, mask=inside, other=0.0)
        m += tl.load(rate + 4) * (g - m)
        v += tl.load(rate + 5) * (g * g - v)
        p -= tl.load(rate + 3) * p
        p -= tl.load(rate + 1) * m / (tl.sqrt(v) * tl.load(rate + 2) + tl.load(rate + 6))
        tl.store(parameter + at, p, mask=inside)
        tl.store(mean + at, m, mask=inside)
        tl.store(square + at, v, mask=inside)
        if tile == 0:
            tl.store(_place(places, tensor, 4, False), tl.load(rate))


class JointAdamW:
    """Steps of the same parameters, again and again.

    Args:
        moving: of all adapters, in order.
    """

    def __init__(self, moving: Sequence[Moving]) -> None:
        device = moving[0].parameter.device
        self._sizes = torch.tensor([own.parameter.numel() for own in moving])
        firsts, owners = shared_out(-(-self._sizes // BLOCK))
        begins = [i for i, own in enumerate(moving) if i == 0 or own.adapter != moving[i - 1].adapter]
        self._host = torch.tensor([[tensor.data_ptr() for tensor in own[:5]] for own in moving])
        self._places = self._host.to(device)
        belongs = torch.tensor([own[5:] for own in moving])
        self._forms = torch.cat([self._sizes[:, None], firsts[:, None], belongs], 1).to(device)
        self._owners = owners.to(device)
        self._bounds = torch.tensor([*firsts[begins].tolist(), len(self._owners)]).to(device)
        self._sums = torch.empty(len(self._owners), device=device)
        self._factors, self._norms = (torch.empty(len(begins), device=device) for _ in range(2))
        self._rates = torch.empty(len(moving), 7, device=device)
        self._aligned = self._are_aligned()

    def step(self, gradients: Sequence[Tensor] | None, groups: Sequence[Any], limits: Sequence[float]) -> Tensor:
        """Take a step and return the norm of each adapter's gradient [adapters] float32, without waiting.

        Args:
            gradients: of all parameters, contiguous, where they lie elsewhere than in the step before; else None.
            groups: an optimizer's, each a mapping of settings.
            limits: of the norm of each adapter's gradient; infinite for none.
        """
        if gradients is not None:
            self._host[:, 1] = torch.tensor([gradient.data_ptr() for gradient in gradients])
            self._places.copy_(self._pinned(self._host), non_blocking=True)
            self._aligned = self._are_aligned()
        table = [
            [g["lr"], *(1 - beta for beta in g["betas"]), g["eps"], g["weight_decay"], *map(math.log, g["betas"])]
            for g in groups
        ]
        settings, bounds = (
            self._pinned(own).to(self._places.device, non_blocking=True)
            for own in (torch.tensor(table, dtype=torch.float64), torch.tensor(limits, dtype=torch.float32))
        )
        tiles, tensors = (len(self._owners),), (self._places, self._forms, self._owners)
        _squares[tiles](*tensors, self._sums, BLOCK=BLOCK)
        _factors[(len(limits),)](self._bounds, self._sums, bounds, self._norms, self._factors, BLOCK=1024)
        _rates[(len(self._forms),)](self._places, self._forms, settings, self._rates)
        _adamw[tiles](*tensors, self._factors, self._rates, BLOCK=BLOCK, ALIGNED=self._aligned)
        return self._norms

    def _are_aligned(self) -> bool:
        """Return whether all tensors lie so that several of their numbers are read at once."""
        return not (self._host[:, :4] % 16).any() and not (self._sizes % 16).any()

    def _pinned(self, tensor: Tensor) -> Tensor:
        """Return a tensor from where a copy to the device need not wait for it."""
        return tensor.pin_memory() if self._places.is_cuda else tensor
