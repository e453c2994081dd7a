"""The expert block that runs each frozen product once equals the one that runs every expert, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mlora import ops
from mlora.adapters import METHODS, BlockSite, LinearSite, Segment
from mlora.model.batch import Batch
from mlora.ops.reference import mixture_feed_forward
from tests.families import multi, rows

D, H, N = 12, 20, 17


def site(form: str) -> BlockSite:
    torch.manual_seed(0)
    outs = {"gated": (("gate_proj", H), ("up_proj", H)), "fused": (("gate_up_proj", 2 * H),), "plain": (("fc1", H),)}[
        form
    ]
    bias = form == "plain"
    linears = [LinearSite(f"l.0.mlp.{n}", 0, D, o, nn.Linear(D, o, bias=bias).double(), True) for n, o in outs]
    down = LinearSite("l.0.mlp.down_proj", 0, H, D, nn.Linear(H, D, bias=bias).double(), True)
    return BlockSite("l.0.mlp", 0, D, tuple(linears), down, nn.functional.silu)


def drive(method, p, experts, x, block, segment):
    steps = method.block(p, experts, x, block, segment)
    asked = next(steps)
    hidden = steps.send(tuple(up.module(asked) for up in block.ups))
    try:
        steps.send(block.down.module(hidden))
    except StopIteration as stop:
        return stop.value


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "router_logits", lambda x, r: x @ r.T)


@pytest.mark.parametrize("form", ["gated", "fused", "plain"])
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("without", ["", "down_proj"])
def test_block_equals_reference(form: str, top_k: int, without: str, float64: None) -> None:
    block, draw = site(form), torch.Generator().manual_seed(3)
    method = METHODS["mixlora"](r=3, lora_alpha=5, num_experts=4, top_k=top_k)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=draw, dtype=torch.float64) / shape[-1] ** 0.5).requires_grad_()

    x, router = random(N, D), random(4, D)
    linears = {s.name: s for s in (*block.ups, block.down) if s.name != without}
    experts = {
        n: {"lora_A": random(4, 3, s.in_features), "lora_B": random(4, s.out_features, 3)} for n, s in linears.items()
    }
    inputs = [x, router, *(t for p in experts.values() for t in p.values())]
    outer = torch.randn(N, D, generator=draw, dtype=torch.float64)

    fast = drive(method, {"router": router}, experts, x, block, Segment("a", 0, N))
    weights, chosen = ops.top_k_routing(x @ router.T, top_k)
    names = {up.name: str(i) for i, up in enumerate(block.ups)} | {"down_proj": "down"}
    updates = {names[n]: (p["lora_A"], p["lora_B"], 5 / 3) for n, p in experts.items()}
    slow = mixture_feed_forward(
        x, weights, chosen, [up.module for up in block.ups], block.down.module, block.activate, updates
    )
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=1e-13)
    # the weight of a single choice is the constant 1, which leaves the router without a gradient
    wanted = inputs if top_k > 1 else [t for t in inputs if t is not router]
    gradients = [torch.autograd.grad((y * outer).sum(), wanted, retain_graph=True) for y in (fast, slow)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_mixture_dropout_is_per_expert_and_repeatable() -> None:
    block = site("gated")
    for linear in (*block.ups, block.down):
        linear.module.float()
    method = METHODS["mixlora"](r=3, num_experts=4, top_k=2, lora_dropout=0.5)
    draw = torch.Generator().manual_seed(3)
    x = torch.randn(N, D, generator=draw)
    experts = {
        s.name: {
            "lora_A": torch.randn(4, 3, s.in_features, generator=draw),
            "lora_B": torch.randn(4, s.out_features, 3, generator=draw),
        }
        for s in (*block.ups, block.down)
    }
    router = {"router": torch.randn(4, D, generator=draw)}
    keys = ops.stream_keys(0, "a", 0, torch.zeros(N), torch.arange(N))
    one, two = (drive(method, router, experts, x, block, Segment("a", 0, N, keys)) for _ in range(2))
    still = drive(method, router, experts, x, block, Segment("a", 0, N))
    assert torch.equal(one, two) and not torch.allclose(one, still)


def test_values_of_each_tokens_expert_and_their_gradients_are_those_of_an_index() -> None:
    values, experts = torch.randn(3, 5, requires_grad=True), torch.tensor([2, 0, 2, 2])
    outer = torch.randn(4, 5)
    found, expected = ops.of_expert(values, experts), values[experts]
    assert torch.equal(found, expected)
    one, other = (torch.autograd.grad((out * outer).sum(), values)[0] for out in (found, expected))
    assert torch.allclose(one, other)


def test_experts_that_are_alike_leave_their_router_no_gradient() -> None:
    """Of which AdamW would make whole steps; where they differ, the gradient is softmax's."""
    torch.manual_seed(0)
    logits, upstream = torch.randn(50, 8, requires_grad=True), torch.randn(50, 2)
    weights, experts = ops.top_k_routing(logits, 2)
    (found,) = torch.autograd.grad(weights, logits, upstream[:, :1].expand(50, 2), retain_graph=True)
    assert not found.any()
    (found,) = torch.autograd.grad(weights, logits, upstream)
    probabilities = logits.softmax(-1).gather(1, experts)
    (expected,) = torch.autograd.grad(probabilities / probabilities.sum(-1, keepdim=True), logits, upstream)
    assert torch.allclose(found, expected, atol=1e-6)


def test_without_router_loss_the_first_step_leaves_a_router_alone() -> None:
    model = multi()
    model.add_adapter("x", METHODS["mixlora"](r=4, num_experts=4, top_k=2, router_loss=False))
    ids, mask = rows(4)
    model.train()
    out = model(Batch.from_rows(ids, mask, None, ["x"] * 4))["x"]
    out.loss.backward()
    routers = {path: g for path, g in model.adapter_gradients("x").items() if "moe_gate" in path or "router" in path}
    assert routers and not any(g.any() for g in routers.values())
