"""Steps of several optimizers at once are those that each takes alone; in kernels, interpreted on the CPU, or not."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from mlora import ops
from mlora.training.update import Updates

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(3, 5), (4097,), (2, 64, 70), (1,)]
ALIGNED = [(3, 16), (4112,), (2, 64, 72), (16,)]
TOLERANCE = 2e-5 if DEVICE == "cuda" else 2e-6
"""Torch's kernel takes 1 - b2 in float32, which is 1.3e-5 away."""


@pytest.fixture(params=[True, False], ids=["kernels", "torch"])
def updates(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Updates:
    if request.param:
        pytest.importorskip("triton")
    monkeypatch.setattr(ops, "fused_available", lambda x: request.param)
    return Updates()


def optimizer(seed: int, lr: float, shapes=SHAPES, **settings) -> torch.optim.AdamW:
    """Two groups of parameters, as LoRA+ has them."""
    torch.manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(shape, device=DEVICE)) for shape in shapes]
    groups = [{"params": parameters[:2], "lr": lr}, {"params": parameters[2:], "lr": 4 * lr}]
    return torch.optim.AdamW(groups, lr=lr, fused=True, **settings)


def parameters(of: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in of.param_groups for p in group["params"]]


def draw_gradients(one: torch.optim.Optimizer, other: torch.optim.Optimizer, seed: int, scale: float = 1.0) -> None:
    torch.manual_seed(seed)
    for p, q in zip(parameters(one), parameters(other), strict=True):
        p.grad = torch.randn(p.shape, device=DEVICE) * scale
        q.grad = p.grad.clone()


def same(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> None:
    for p, q in zip(parameters(one), parameters(other), strict=True):
        torch.testing.assert_close(p, q, rtol=TOLERANCE, atol=TOLERANCE / 10)
        for key, value in other.state[q].items():
            torch.testing.assert_close(one.state[p][key], value, rtol=TOLERANCE, atol=1e-6 * float(value.abs().max()))


@pytest.mark.parametrize("shapes", [SHAPES, ALIGNED], ids=["odd", "aligned"])
def test_they_are_those_of_torch(updates: Updates, shapes: list[tuple[int, ...]]) -> None:
    """Learning rates fall, gradients are clipped or not, optimizers come and go, one starts from what it has saved."""
    ours = [optimizer(1, 1e-2, shapes), optimizer(2, 3e-3, shapes, weight_decay=0.3, betas=(0.8, 0.95), eps=1e-5)]
    theirs = copy.deepcopy(ours)
    limits = [None, 0.7]
    for step in range(7):
        for i, (own, their) in enumerate(zip(ours, theirs, strict=True)):
            draw_gradients(own, their, 10 * step + i, scale=10.0 ** (step - 3))
        chosen = [0, 1] if step != 4 else [1]
        norms = updates.step([ours[i] for i in chosen], [limits[i] for i in chosen])
        for i, norm in zip(chosen, norms, strict=True):
            expected = nn.utils.clip_grad_norm_(parameters(theirs[i]), limits[i] or math.inf)
            assert norm == pytest.approx(float(expected), rel=1e-5)
            theirs[i].step()
        for own, their in zip(ours, theirs, strict=True):
            same(own, their)
            for group in (*own.param_groups, *their.param_groups):
                group["lr"] *= 0.9
        if step == 2:
            ours[1].load_state_dict(copy.deepcopy(ours[1].state_dict()))


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_changes_nothing_of_its_own_alone(updates: Updates, value: float) -> None:
    ours, theirs = ([optimizer(1, 1e-2), optimizer(2, 1e-2)] for _ in range(2))
    for step in range(3):
        for own, their in zip(ours, theirs, strict=True):
            draw_gradients(own, their, step)
        if step == 1:
            parameters(ours[0])[2].grad[1, 3, 5] = value
        norms = updates.step(ours, [1.0, None])
        assert [math.isfinite(norm) for norm in norms] == [step != 1, True]
        for i, their in enumerate(theirs):
            if (i, step) != (0, 1):
                nn.utils.clip_grad_norm_(parameters(their), 1.0 if i == 0 else math.inf)
                their.step()
    for own, their in zip(ours, theirs, strict=True):
        same(own, their)


def test_what_has_no_gradient_stays(updates: Updates) -> None:
    ours, theirs = optimizer(1, 1e-2), optimizer(1, 1e-2)
    draw_gradients(ours, theirs, 0)
    updates.step([ours], [None]), theirs.step()
    draw_gradients(ours, theirs, 1)
    for own in (ours, theirs):
        parameters(own)[1].grad = None
    updates.step([ours], [None]), theirs.step()
    same(ours, theirs)
    for step in range(2, 5):  # whose corrections are of fewer steps since
        draw_gradients(ours, theirs, step)
        updates.step([ours], [None]), theirs.step()
        same(ours, theirs)
    ours.zero_grad()
    assert updates.step([ours], [None]) == [0.0] and updates.step([], []) == []


def test_schedules_of_torch_see_a_step(updates: Updates, recwarn: pytest.WarningsRecorder) -> None:
    one = optimizer(1, 1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(one, lambda step: 0.5)
    draw_gradients(one, optimizer(1, 1e-2), 0)
    updates.step([one], [None])
    schedule.step()
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_few_sets_of_optimizers_are_remembered(updates: Updates) -> None:
    ours = [optimizer(i, 1e-2) for i in range(4)]
    theirs = copy.deepcopy(ours)
    for step in range(12):
        chosen = [i for i in range(4) if (step + 1) >> i & 1]
        for i in chosen:
            draw_gradients(ours[i], theirs[i], step)
            theirs[i].step()
        updates.step([ours[i] for i in chosen], [None] * len(chosen))
    assert len(updates._joint) <= 4
    for own, their in zip(ours, theirs, strict=True):
        same(own, their)


@pytest.mark.parametrize("updates", [True], ids=["kernels"], indirect=True)
def test_gradients_of_another_layout_are_read_as_they_are(updates: Updates) -> None:
    ours, theirs = optimizer(1, 1e-2), optimizer(1, 1e-2)
    for step in range(2):
        draw_gradients(ours, theirs, step)
        for p in parameters(ours):
            p.grad = p.grad.mT.contiguous().mT if p.ndim > 1 else p.grad
        updates.step([ours], [None])
        theirs.step()
    same(ours, theirs)


def test_other_optimizers_take_their_own_steps(updates: Updates) -> None:
    """Among those that go together, in the order in which they were given."""
    plain = [nn.Parameter(torch.ones(3, device=DEVICE)), nn.Parameter(torch.ones(2, device=DEVICE))]
    ours, theirs = optimizer(1, 1e-2), optimizer(1, 1e-2)
    sgd, moved = torch.optim.SGD(plain[:1], lr=0.5), torch.optim.AdamW(plain[1:], lr=0.1, amsgrad=True)
    draw_gradients(ours, theirs, 0)
    for p in plain:
        p.grad = torch.full_like(p, 2.0)
    norms = updates.step([sgd, ours, moved], [math.sqrt(3), None, None])
    theirs.step()
    same(ours, theirs)
    assert norms[0] == pytest.approx(2 * math.sqrt(3)) and norms[2] == pytest.approx(2 * math.sqrt(2))
    torch.testing.assert_close(plain[0].detach(), torch.full((3,), 0.5, device=DEVICE))
    assert (plain[1] < 0.91).all()
