"""Attention by cuDNN equals its definition in float64, gradients too, and is the same from call to call."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch

from mlora import ops
from mlora.ops import cudnn

AVAILABLE = torch.cuda.is_available() and cudnn._available(torch.device("cuda", 0))


def definition(q, k, v, lengths, scaling):
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    found = []
    for q_own, k_own, v_own in zip(*(t.split(lengths) for t in (q, k, v)), strict=True):
        scores = torch.einsum("ihd,jhd->hij", q_own, k_own) * scaling
        seen = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).tril()
        found.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v_own))
    return torch.cat(found)


@pytest.mark.skipif(not AVAILABLE, reason="needs a Hopper GPU and the package nvidia-cudnn-frontend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("lengths", "longest", "heads", "groups", "width", "scaling"),
    [
        ([64, 1, 30], 64, 4, 4, 128, None),
        ([17, 130, 0, 77, 0], 256, 9, 3, 64, None),
        ([100, 28], 128, 8, 2, 96, 0.3),
        ([5, 200], 1024, 4, 1, 256, 1.0),
    ],
)
def test_equal_to_its_definition(lengths, longest, heads, groups, width, scaling, dtype) -> None:
    torch.manual_seed(0)
    shapes = [(sum(lengths), n, width) for n in (heads, groups, groups, heads)]
    q, k, v, upstream = (torch.randn(shape, device="cuda", dtype=dtype) for shape in shapes)
    inputs = [t.requires_grad_() for t in (q, k, v)]
    doubles = [t.detach().double().requires_grad_() for t in inputs]
    expected = definition(*doubles, lengths, width**-0.5 if scaling is None else scaling)
    wanted = [expected, *torch.autograd.grad(expected, doubles, upstream.double())]
    runs = []
    for _ in range(2):
        offsets = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")
        out = ops.ragged_attention(*inputs, offsets, longest, scaling)
        runs.append([out, *torch.autograd.grad(out, inputs, upstream)])
    for found, again, own in zip(*runs, wanted, strict=True):
        assert torch.equal(found, again)
        assert float((found.double() - own).norm() / own.norm()) < (8e-3 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.skipif(not AVAILABLE, reason="needs a Hopper GPU and the package nvidia-cudnn-frontend")
def test_what_would_take_much_memory_is_left_to_torch() -> None:
    q = torch.zeros(4096, 32, 128, device="cuda", dtype=torch.bfloat16)
    offsets = torch.tensor([0, *range(512, 4097, 512)], dtype=torch.int32, device="cuda")
    assert ops.ragged_attention(q, q, q, offsets, 4096, None) is None  # 8 GiB of workspace
    assert ops.ragged_attention(q, q, q, offsets, 512, None) is not None


def test_what_it_cannot_read_is_left_to_torch(monkeypatch) -> None:
    """Values of another width (deepseek_v3), float32: asked of no plan."""
    monkeypatch.setattr(cudnn, "_available", lambda device: True)
    monkeypatch.setattr(cudnn, "_plan", lambda shape: pytest.fail("planned"))
    q, offsets = torch.zeros(4, 2, 24, dtype=torch.bfloat16), torch.tensor([0, 4], dtype=torch.int32)
    for k, v in ((q, q[..., :16]), (q[..., :16], q), (q.half(), q), (q, q.half())):
        assert ops.ragged_attention(q, k, v, offsets, 4, None) is None
    assert ops.ragged_attention(q.float(), q.float(), q.float(), offsets, 4, None) is None


def test_other_devices_have_none() -> None:
    q = torch.zeros(4, 2, 8)
    assert ops.ragged_attention(q, q, q, torch.tensor([0, 4], dtype=torch.int32), 4, None) is None
