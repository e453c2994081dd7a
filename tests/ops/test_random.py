"""Counter-based streams: right probabilities, no dependence on neighbours, no correlation that matters."""

from __future__ import annotations

import pytest
import torch

from mlora.ops import dropout, fold, jitter, stream_keys


def keys(n: int, seed: int = 0, adapter: str = "a", step: int = 0, row: int = 0) -> torch.Tensor:
    return stream_keys(seed, adapter, step, torch.full((n,), row), torch.arange(n))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_rate_and_scale(p: float) -> None:
    x = torch.ones(2000, 513)
    out = dropout(x, keys(2000), p, "m")
    kept = out != 0
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=2e-3)
    assert out[kept].unique().item() == pytest.approx(1 / (1 - p), rel=1e-3)
    assert out.mean().item() == pytest.approx(1, abs=5e-3)
    # rows and columns vary as independent coins do: the variance of their means is p (1 - p) / count
    for dim, count in ((0, 2000), (1, 513)):
        assert kept.float().mean(dim).var().item() == pytest.approx(p * (1 - p) / count, rel=0.35)


@pytest.mark.parametrize("other", [{"seed": 1}, {"adapter": "b"}, {"step": 1}, {"row": 1}])
def test_streams_differ_and_are_uncorrelated(other: dict) -> None:
    x = torch.ones(500, 256)
    masks = [dropout(x, keys(500, **kw), 0.5, "m").flatten() for kw in ({}, other)]
    assert abs(torch.corrcoef(torch.stack(masks))[0, 1].item()) < 0.02


def test_modules_and_experts_have_streams_of_their_own() -> None:
    x, k = torch.ones(500, 256), keys(500)
    masks = [dropout(x, k, 0.5, "m"), dropout(x, k, 0.5, "n")]
    masks += [dropout(x, fold(k, torch.full((500,), e)), 0.5, "m") for e in range(3)]
    table = torch.corrcoef(torch.stack([m.flatten() for m in masks]))
    assert (table - torch.eye(5)).abs().max() < 0.02


def test_a_token_keeps_its_mask_in_any_company() -> None:
    x, k = torch.randn(10, 33), keys(10)
    assert torch.equal(dropout(x, k, 0.3, "m")[3:7], dropout(x[3:7], k[3:7], 0.3, "m"))


def test_zero_probability_is_the_identity_and_gradients_follow_the_mask() -> None:
    x = torch.randn(10, 33, requires_grad=True)
    assert dropout(x, keys(10), 0.0, "m") is x and dropout(x, keys(10), 1e-30, "m") is x
    out = dropout(x, keys(10), 0.5, "m")
    out.sum().backward()
    assert torch.equal(x.grad == 0, out == 0) and set(x.grad.unique().tolist()) == {0.0, 2.0}


def test_jitter_is_uniform_and_out_of_place() -> None:
    x = torch.ones(1000, 200)
    out = jitter(x, keys(1000), 0.1, "m")
    assert torch.equal(x, torch.ones(1000, 200))
    assert out.min() >= 0.9 and out.max() <= 1.1 and out.mean().item() == pytest.approx(1, abs=1e-3)
    assert out.var().item() == pytest.approx(0.2**2 / 12, rel=0.02)
