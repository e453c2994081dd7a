"""Matrices copied together are what each is alone, cast or turned; on the CPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")

from mlora import ops  # noqa: E402
from mlora.ops import fused  # noqa: E402
from mlora.ops.fused.copies import ELEMENTS  # noqa: E402
from mlora.ops.fused.products import narrow, wide  # noqa: E402

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
"""The interpreter cuts to bfloat16 where a GPU rounds."""


@pytest.fixture(params=[True, False], ids=["kernel", "plain"], autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "fused_available", lambda x: request.param)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


SOURCES = {
    "whole": lambda: draw(3, ELEMENTS + 5),
    "vector": lambda: draw(7),
    "turned": lambda: draw(300, 5).mT,
    "turned experts": lambda: draw(3, 270, 16).mT,
    "columns of a matrix": lambda: draw(517, 48)[:, 16:32],
    "wide columns": lambda: draw(17, 700)[:, 100:400],
    "experts side by side": lambda: draw(65, 4 * 24).unflatten(1, (4, 24)).transpose(0, 1),
    "every other": lambda: draw(10, 40)[:, ::2],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_equal_those_of_torch(dtype: torch.dtype) -> None:
    sources = [make() for make in SOURCES.values() for _ in range(2)]
    targets = [torch.full(source.shape, torch.nan, device=DEVICE, dtype=dtype) for source in sources]
    pairs = list(zip(sources, targets, strict=True))
    ops.joint_copies(pairs).launch(pairs)
    for name, source, target in zip([n for n in SOURCES for _ in range(2)], sources, targets, strict=True):
        assert torch.equal(target, source.to(dtype)), name


def test_a_target_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) cannot be copied onto \(3, 2\)"):
        ops.joint_copies([(draw(2, 3), draw(3, 2))])


def test_a_recorded_launch_copies_what_it_is_told_of_afterwards(monkeypatch, kernel) -> None:
    """As in a graph, whose launch is recorded before the tables say where the tensors lie."""
    sources = [make() for make in SOURCES.values()]
    targets = [torch.zeros(source.shape, device=DEVICE) for source in sources]
    pairs = list(zip(sources, targets, strict=True))
    elsewhere = [(torch.empty_strided(s.shape, s.stride(), device=DEVICE), t.clone()) for s, t in pairs]
    copies = fused.FusedCopies(elsewhere)
    monkeypatch.setattr(fused.copies, "_recording", lambda x: True)
    complete = copies.launch(pairs)
    assert not any(target.any() for target in targets)
    complete()
    copies.launch(pairs)  # as a replay does
    assert all(torch.equal(source, target) for source, target in pairs)
    with pytest.raises(RuntimeError, match="other forms"):
        copies.launch(elsewhere[1:])


def test_casts_follow_their_parameters() -> None:
    """What was cast once is found again, renewed in place; what is computed of parameters is never kept."""
    casts = ops.Casts()
    a = [torch.nn.Parameter(draw(4, 130)) for _ in range(2)]
    b = [torch.nn.Parameter(draw(3, 130, 4)) for _ in range(2)]
    first, second = narrow(a, torch.float16, casts), wide(b, torch.float16, casts)
    for p in (*a, *b):
        p.data.mul_(-2)
    assert torch.equal(narrow(a, torch.float16, casts), first)
    assert torch.equal(narrow(a[:1], torch.float16, casts), narrow(a[:1], torch.float16))
    assert narrow(a, torch.float32, casts).dtype == torch.float32
    ops.joint_copies(casts.pairs()).launch(casts.pairs())
    assert torch.equal(narrow(a, torch.float16, casts), narrow(a, torch.float16))
    assert torch.equal(first, narrow(a, torch.float16)) and torch.equal(second, wide(b, torch.float16))
    computed = [a[0] * 2]
    narrow(computed, torch.float16, casts)
    computed[0].data.zero_()
    assert not narrow(computed, torch.float16, casts).any()


def test_a_place_is_taken_once_a_step_and_by_one_stack() -> None:
    """Whoever asks for it again, or for some of a stack, gets none: what it computes is added up elsewhere."""
    sums = ops.Sums()
    one, two, other = (torch.nn.Parameter(draw(3, 4)) for _ in range(3))
    taken = sums.take([one, two])
    assert taken is not None and taken.shape == (2, 3, 4)
    assert sums.take([two]) is None and sums.take([other, None]) is None
    assert sums.take([torch.nn.Parameter(draw(4, 3).mT)]) is None  # an optimizer wants one layout of both
    assert sums.take([torch.nn.Parameter(draw(2)), torch.nn.Parameter(draw(3))]) is None
    sums.begin()
    assert sums.take([two, one]) is None and sums.take([one, two]) is taken
    taken[1].fill_(5)
    assert torch.equal(sums[two], taken[1]) and sums.get(other) is None
    assert sums[other].shape == other.shape and sums.get(other) is sums[other]
