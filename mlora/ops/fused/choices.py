"""The experts that each token chose, and codes of all experts reduced to those.

With one-hot rows o_j of the chosen experts, repeated over the r columns of each, and weights w_j:

    apart   c -> c o_1 and c (o_2 - o_1)      what the first choice adds, and the second more than the first
    join    p, q -> p o_1 + q (o_2 - o_1)     the gradient of that
    alone   c -> c o_j and c w_j o_j          of every choice
    sum     c_j -> sum_j w_j c_j o_j

Shapes: G adapters of n tokens each, N = G n; k choices, one or two; R = E * r columns.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from mlora.ops.fused.products import columns_block

APART, JOIN, ALONE, SUM = (tl.constexpr(i) for i in range(4))


@triton.jit(do_not_specialize=["tokens"])
def _select(
    one, two, weights, experts, out, more, tokens, columns, rank, K: tl.constexpr, MODE: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0) * BT + tl.arange(0, BT)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    live = own < tokens
    both = live[:, None] & (c < columns)[None, :]
    group = tl.program_id(2).to(tl.int64)
    t = group * tokens + own
    flat = t[:, None] * columns + c[None, :]
    choice = (group * K * tokens + own)[:, None] * columns + c[None, :]
    step = tokens.to(tl.int64) * columns
    hit = (c // rank)[None, :] == tl.load(experts + t * K, mask=live, other=0)[:, None]
    weight = tl.load(weights + t * K, mask=live, other=0.0)[:, None]
    other_hit, other_weight = hit, weight
    if K == 2:
        other_hit = (c // rank)[None, :] == tl.load(experts + t * K + 1, mask=live, other=0)[:, None]
        other_weight = tl.load(weights + t * K + 1, mask=live, other=0.0)[:, None]
    dtype = out.dtype.element_ty
    if MODE == SUM:
        total = tl.where(hit, tl.load(one + choice, mask=both, other=0.0).to(tl.float32), 0.0) * weight
        if K == 2:
            code = tl.load(one + choice + step, mask=both, other=0.0).to(tl.float32)
            total += tl.where(other_hit, code, 0.0) * other_weight
        tl.store(out + flat, total.to(dtype), mask=both)
    else:
        code = tl.load(one + flat, mask=both, other=0.0).to(tl.float32)
        first = tl.where(hit, code, 0.0)
        if MODE == JOIN:
            if K == 2:
                code = tl.load(two + flat, mask=both, other=0.0).to(tl.float32)
                first += tl.where(other_hit, code, 0.0) - tl.where(hit, code, 0.0)
            tl.store(out + flat, first.to(dtype), mask=both)
        else:
            second = tl.where(other_hit, code, 0.0)
            if MODE == APART:
                tl.store(out + flat, first.to(dtype), mask=both)
                if K == 2:
                    tl.store(more + flat, (second - first).to(dtype), mask=both)
            else:
                tl.store(out + choice, first.to(dtype), mask=both)
                tl.store(more + choice, (first * weight).to(dtype), mask=both)
                if K == 2:
                    tl.store(out + choice + step, second.to(dtype), mask=both)
                    tl.store(more + choice + step, (second * other_weight).to(dtype), mask=both)


class Choices(NamedTuple):
    """Whose updates count for a token.

    Attributes:
        weights: [N, k] float32.
        experts: [N, k].
        rank: columns of one expert.
        groups: G.
    """

    weights: Tensor
    experts: Tensor
    rank: int
    groups: int

    @property
    def per_token(self) -> int:
        """Choices, k."""
        return self.experts.shape[1]

    def apart(self, codes: Tensor) -> Tensor:
        """Return what the first choice has of codes [L, N, R], and what the second has more: [L, k, N, R]."""
        out = codes.new_empty((len(codes), self.per_token, *codes.shape[1:]))
        for given, made in zip(codes, out, strict=True):
            self._select(APART, given, given, made[0], made[-1])
        return out

    def join(self, parts: Tensor) -> Tensor:
        """Return the gradient of codes [L, N, R] from those of `apart`."""
        out = parts.new_empty((len(parts), *parts.shape[2:]))
        for given, made in zip(parts, out, strict=True):
            self._select(JOIN, given[0], given[-1], made, made)
        return out

    def alone(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes [N, R] for every choice [G k n, R], zero but for its expert; and these times its weight."""
        out, weighted = (codes.new_empty((len(codes) * self.per_token, codes.shape[1])) for _ in range(2))
        self._select(ALONE, codes, codes, out, weighted)
        return out, weighted

    def sum(self, codes: Tensor) -> Tensor:
        """Return the weighted sum [N, R] of codes of every choice [G k n, R], of its expert alone."""
        out = codes.new_empty((len(codes) // self.per_token, codes.shape[1]))
        self._select(SUM, codes, codes, out, out)
        return out

    def _select(self, mode: tl.constexpr, one: Tensor, two: Tensor, out: Tensor, more: Tensor) -> None:
        tokens, columns = len(self.experts) // self.groups, out.shape[1]
        block = columns_block(columns)
        if tokens:
            _select[(triton.cdiv(tokens, 16), triton.cdiv(columns, block), self.groups)](
                one.contiguous(), two.contiguous(), self.weights, self.experts, out, more, tokens, columns, self.rank,
                K=self.per_token, MODE=mode, BT=16, BC=block,
            )  # fmt: skip
