"""The Triton kernels equal their definitions in plain torch: values, gradients, dropout masks.

On the CPU they run in Triton's interpreter, on a GPU compiled.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")

from mlora import ops  # noqa: E402
from mlora.ops import fused  # noqa: E402

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Largest difference, relative to the largest value of a tensor."""
DTYPES = list(TOLERANCE) if DEVICE == "cuda" else [torch.float32, torch.float16]  # the interpreter has no bf16 products


def same(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.shape == expected.shape
    scale = max(float(expected.detach().abs().max()), 1e-6)
    assert float((found.detach().float() - expected.detach()).abs().max()) <= TOLERANCE[dtype] * scale


def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def keys_of(tokens: int) -> torch.Tensor:
    place = torch.arange(tokens, device=DEVICE)
    return ops.stream_keys(7, "a", 3, place // 5, place % 5)


def gradients(out: torch.Tensor, upstream: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return list(torch.autograd.grad(out, inputs, upstream))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "rank", "experts", "p"),
    [
        (5, 24, 17, 3, 0, 0.0),
        (70, 65, 131, 8, 0, 0.5),
        (33, 130, 40, 80, 0, 0.1),
        (67, 48, 72, 4, 3, 0.3),
        (1, 16, 16, 16, 8, 0.05),
    ],
)
def test_adapted_linear(
    tokens: int, inputs: int, outputs: int, rank: int, experts: int, p: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(tokens)
    layer = nn.Linear(inputs, outputs).to(DEVICE, dtype).requires_grad_(False)
    lead = (experts,) if experts else ()
    x = draw(tokens + 3, inputs, dtype=dtype).requires_grad_()
    a, b = draw(*lead, rank, inputs, scale=0.2).requires_grad_(), draw(*lead, outputs, rank, scale=0.2).requires_grad_()
    weights = draw(tokens, experts).softmax(-1).requires_grad_() if experts else None
    keys = keys_of(tokens)

    part = fused.Part(2, tokens + 2, 1.5, fused.dropout_of(keys, p, "q"))  # a token before and after: frozen
    out = fused.adapted_linear(x, layer, [part], [a, b, weights])

    own = ops.dropout(x[2 : tokens + 2], keys, p, "q")
    codes = torch.einsum("nd,erd->ner", own.float(), a.reshape(-1, rank, inputs))
    if weights is not None:
        codes = codes * weights[..., None]
    update = 1.5 * torch.einsum("ner,eor->no", codes, b.reshape(-1, outputs, rank))
    expected = layer(x).float()
    expected = torch.cat([expected[:2], expected[2 : tokens + 2] + update, expected[tokens + 2 :]])

    same(out, expected, dtype)
    upstream = draw(tokens + 3, outputs, dtype=dtype)
    tensors = [t for t in (x, a, b, weights) if t is not None]
    for found, wanted in zip(
        gradients(out, upstream, tensors), gradients(expected, upstream.float(), tensors), strict=True
    ):
        same(found, wanted, dtype)


def reference_block(x, layers, activation, a1, b1, a3, b3, a2, b2, weights, experts, scaling, p, keys, fold):
    """The definition, expert by expert, in float32."""
    gate, up, down = (layer.weight.float() for layer in layers)
    total = 0
    tokens = range(len(x))
    for slot in range(experts.shape[1]):
        e = experts[:, slot]

        def update(wide, a, b, stream, own_keys, e=e):
            if a is None:
                return 0
            narrow = ops.dropout(wide, own_keys, p, stream)
            return scaling * torch.einsum("nor,nr->no", b[e], torch.einsum("nrd,nd->nr", a[e], narrow))

        g = x @ gate.T + update(x, a1, b1, "gate", keys)
        u = x @ up.T + update(x, a3, b3, "up", keys)
        h = activation(g) * u
        y = h @ down.T + update(h, a2, b2, "down", ops.fold(keys, e) if fold else keys)
        total = total + weights[tokens, slot, None] * y
    return total


@pytest.mark.parametrize(
    ("tokens", "hidden", "inner", "num_experts", "k", "rank", "p", "activation", "without"),
    [
        (70, 32, 80, 4, 2, 3, 0.3, "silu", ""),
        (130, 16, 70, 1, 1, 20, 0.1, "gelu_tanh", ""),
        (40, 24, 33, 3, 1, 16, 0.0, "gelu", "down"),
        (65, 16, 64, 8, 2, 4, 0.5, "silu", "gate"),
        (3, 16, 17, 2, 2, 2, 0.2, "silu", "up"),
        (9, 16, 20, 1, 1, 1, 0.0, "silu", "gate up down"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_feed_forward(tokens, hidden, inner, num_experts, k, rank, p, activation, without, dtype) -> None:
    torch.manual_seed(tokens)
    layers = [
        nn.Linear(i, o, bias=False).to(DEVICE, dtype) for i, o in ((hidden, inner), (hidden, inner), (inner, hidden))
    ]
    for layer in layers:
        layer.requires_grad_(False)
    x = draw(tokens, hidden, dtype=dtype).requires_grad_()
    named = {}
    for name, i, o in (("gate", hidden, inner), ("up", hidden, inner), ("down", inner, hidden)):
        absent = name in without.split()
        named[name] = (
            [None, None]
            if absent
            else [
                draw(num_experts, rank, i, scale=0.3).requires_grad_(),
                draw(num_experts, o, rank, scale=0.3).requires_grad_(),
            ]
        )
    routed = num_experts > 1
    chosen, picked = draw(tokens, num_experts).softmax(-1).topk(k)
    weights = chosen.detach().requires_grad_() if routed else torch.ones(tokens, 1, device=DEVICE)
    keys = keys_of(tokens)
    functions = {
        "silu": nn.functional.silu,
        "gelu": nn.functional.gelu,
        "gelu_tanh": lambda g: nn.functional.gelu(g, approximate="tanh"),
    }
    flat = [t for name in ("gate", "up", "down") for t in named[name]]

    update = ops.BlockUpdate(
        *(None if a is None else (a, b) for a, b in named.values()),
        num_experts,
        1.5,
        p,
        weights if routed else None,
        picked if routed else None,
    )
    part, own = fused.block_part(update, 0, tokens, activation, keys, ("gate", "up", "down"))
    if own.gate_a is None and own.up_a is None and own.down_a is None and dtype != torch.float32:
        pytest.skip("nothing to compare but the frozen block")
    out = fused.feed_forward(x, layers, [part], [own])
    wide = x.detach().float().requires_grad_()
    expected = reference_block(wide, layers, functions[activation], *flat, weights, picked, 1.5, p, keys, routed)

    same(out, expected, dtype)
    upstream = draw(tokens, hidden, dtype=dtype)
    trained = [t for t in flat if t is not None] + ([weights] if routed else [])
    pairs = zip(
        gradients(out, upstream, [x, *trained]), gradients(expected, upstream.float(), [wide, *trained]), strict=True
    )
    for found, wanted in pairs:
        same(found, wanted, dtype)
