"""Updates of several adapters as one: the same sums, whatever their ranks, with and without factors."""

from __future__ import annotations

import pytest
import torch

from mlora import ops
from mlora.ops.lowrank import LowRankUpdate

D, O = 5, 7  # noqa: E741


@pytest.mark.parametrize("factors", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_stacked_updates_are_each_by_itself(factors: bool, bias: bool) -> None:
    torch.manual_seed(0)

    def update(rank: int, scaling: float, factor: bool) -> LowRankUpdate:
        a, b = torch.randn(rank, D), torch.randn(O, rank)
        return LowRankUpdate(a, b, scaling, 0.0, factor=torch.rand(O) + 0.5 if factor else None)

    updates = [update(2, 0.5, False), None, update(3, 2.0, factors)]
    added = torch.randn(O) if bias else None
    x, out = torch.randn(6, D), torch.randn(6, O)
    found = ops.apply_stack(ops.stacked(updates, D, O, x), x, out, added)
    for i, own in enumerate(updates):
        here = slice(2 * i, 2 * i + 2)
        expected = out[here] if own is None else ops.apply_update(own, x[here], out[here], added)
        assert torch.allclose(found[here], expected, atol=1e-6)
