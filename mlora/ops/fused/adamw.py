"""AdamW of many small tensors of several adapters in three launches: squares of gradients, factors, updates.

    norm_a = |g_a|,  c_a = min(1, limit_a / (norm_a + 1e-6)); nothing of an adapter changes whose norm is not finite
    m' = m + (1 - b1) (c g - m),  v' = v + (1 - b2) ((c g)^2 - v)
    p' = p - lr wd p - lr / (1 - b1^t) m' / (sqrt(v' / (1 - b2^t)) + eps)

as torch.optim.AdamW, whose state these are. Tables say where each tensor lies, as in `copies.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Numbers of a tile; of larger ones fewer are under way at once."""


class Moving(NamedTuple):
    """A parameter and what AdamW keeps of it, contiguous and float32.

    Attributes:
        parameter, gradient, mean, square: of the same shape.
        step: steps taken, one number.
        group: number of its settings.
        adapter: number of its adapter; neighbours have the same.
    """

    parameter: Tensor
    gradient: Tensor
    mean: Tensor
    square: Tensor
    step: Tensor
    group: int
    adapter: int


class Settings(NamedTuple):
    """Of a group of parameters."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


@triton.jit
def _aligned(number, ALIGNED: tl.constexpr):
    return tl.multiple_of(number, 16) if ALIGNED else number


@triton.jit
def _place(places, tensor, which: tl.constexpr, ALIGNED: tl.constexpr):
    return _aligned(tl.load(places + 5 * tensor + which), ALIGNED).to(tl.pointer_type(tl.float32))


@triton.jit
def _squares(places, forms, owners, sums, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    tensor = tl.load(owners + tl.program_id(0)).to(tl.int64)
    at = (tl.program_id(0) - tl.load(forms + 4 * tensor + 1)) * BLOCK + tl.arange(0, BLOCK)
    inside = at < _aligned(tl.load(forms + 4 * tensor), ALIGNED)
    g = tl.load(_place(places, tensor, 1, ALIGNED) + at, mask=inside, other=0.0)
    tl.store(sums + tl.program_id(0), tl.sum(g * g, 0))


@triton.jit
def _factors(places, adapters, sums, limits, settings, norms, factors, rates, BLOCK: tl.constexpr):
    own = adapters + 3 * tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    stop = tl.load(own + 4)
    for first in range(tl.load(own + 1), stop, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(sums + at, mask=at < stop, other=0.0)
    norm = tl.sqrt(tl.sum(total, 0))
    factor = tl.minimum(1.0, tl.load(limits + tl.program_id(0)) / (norm + 1e-6))
    tl.store(norms + tl.program_id(0), norm)
    tl.store(factors + tl.program_id(0), tl.where(norm < float("inf"), factor, -1.0))  # NaN is not less either
    count = tl.load(_place(places, tl.load(own), 4, False)).to(tl.float64) + 1
    for group in range(tl.load(own + 2), tl.load(own + 5)):
        given, rate = settings + 7 * group, rates + 7 * group
        lr = tl.load(given)
        tl.store(rate, count.to(tl.float32))
        tl.store(rate + 1, (lr / (1 - tl.exp(tl.load(given + 5) * count))).to(tl.float32))
        tl.store(rate + 2, (1 / tl.sqrt(1 - tl.exp(tl.load(given + 6) * count))).to(tl.float32))
        tl.store(rate + 3, (lr * tl.load(given + 4)).to(tl.float32))
        for i in tl.static_range(3):  # of the mean, of the square, epsilon
            tl.store(rate + 4 + i, tl.load(given + 1 + i).to(tl.float32))


@triton.jit
def _adamw(places, forms, owners, factors, rates, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    tensor = tl.load(owners + tl.program_id(0)).to(tl.int64)
    form = forms + 4 * tensor
    factor = tl.load(factors + tl.load(form + 3))
    if factor >= 0:
        rate = rates + 7 * tl.load(form + 2)
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
        groups: how many there are, those of an adapter side by side.
    """

    def __init__(self, moving: Sequence[Moving], groups: int) -> None:
        device = moving[0].parameter.device
        sizes = torch.tensor([own.parameter.numel() for own in moving])
        tiles = -(-sizes // BLOCK)
        firsts = tiles.cumsum(0) - tiles
        begins = [i for i, own in enumerate(moving) if i == 0 or own.adapter != moving[i - 1].adapter]
        self._host = torch.tensor([[tensor.data_ptr() for tensor in own[:5]] for own in moving])
        self._places = self._host.to(device)
        belongs = torch.tensor([own[5:] for own in moving])
        self._sizes = sizes
        self._forms = torch.cat([sizes[:, None], firsts[:, None], belongs], 1).to(device)
        self._owners = torch.arange(len(moving), dtype=torch.int32).repeat_interleave(tiles).to(device)
        bounds = [part for i in begins for part in (i, int(firsts[i]), moving[i].group)]
        self._adapters = torch.tensor([*bounds, len(moving), len(self._owners), groups]).to(device)
        self._sums = torch.empty(len(self._owners), device=device)
        self._factors, self._norms = (torch.empty(len(begins), device=device) for _ in range(2))
        self._rates = torch.empty(groups, 7, device=device)
        self._tiles = {"BLOCK": BLOCK, "ALIGNED": self._aligned()}

    def move(self, gradients: Sequence[Tensor]) -> None:
        """Take the gradients of all parameters from elsewhere from now on."""
        self._host[:, 1] = torch.tensor([gradient.data_ptr() for gradient in gradients])
        self._places.copy_(self._pinned(self._host), non_blocking=True)
        self._tiles["ALIGNED"] = self._aligned()

    def _aligned(self) -> bool:
        """Return whether all tensors lie so that several of their numbers are read at once."""
        return not (self._host[:, :4] % 16).any() and not (self._sizes % 16).any()

    def step(self, settings: Sequence[Settings], limits: Sequence[float]) -> Tensor:
        """Take a step and return the norm of each adapter's gradient [adapters] float32, without waiting.

        Args:
            settings: of each group of parameters.
            limits: of the norm of each adapter's gradient; infinite for none.
        """
        table = torch.tensor(
            [[s.lr, 1 - s.beta1, 1 - s.beta2, *s[3:], math.log(s.beta1), math.log(s.beta2)] for s in settings],
            dtype=torch.float64,
        )
        device, tiles = self._places.device, (len(self._owners),)
        values = self._pinned(table).to(device, non_blocking=True)
        bounds = self._pinned(torch.tensor(limits, dtype=torch.float32)).to(device, non_blocking=True)
        tensors = self._places, self._forms, self._owners
        _squares[tiles](*tensors, self._sums, **self._tiles)
        _factors[(len(limits),)](
            self._places, self._adapters, self._sums, bounds, values, self._norms, self._factors, self._rates,
            BLOCK=1024,
        )  # fmt: skip
        _adamw[tiles](*tensors, self._factors, self._rates, **self._tiles)
        return self._norms

    def _pinned(self, tensor: Tensor) -> Tensor:
        """Return a tensor from where a copy to the device need not wait for it."""
        return tensor.pin_memory() if self._places.is_cuda else tensor
