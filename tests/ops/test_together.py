"""What adapters and layers compute together is what each computes alone, wherever their gradients are left."""

from __future__ import annotations

import pytest
import torch
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")

from mlora import ops  # noqa: E402
from mlora.ops import fused  # noqa: E402

HIDDEN, INNER, RANK = 16, 20, 3


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, device=DEVICE) * 0.4)


def keys_of(tokens: int) -> torch.Tensor:
    place = torch.arange(tokens, device=DEVICE)
    return ops.stream_keys(7, "a", 3, place // 5, place % 5)


def frozen(inputs: int, outputs: int, dtype: torch.dtype, bias: bool = False) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=bias).to(DEVICE, dtype).requires_grad_(False)


def agree(run, expected: list[torch.Tensor], trained: list[nn.Parameter], dtype: torch.dtype) -> list[int]:
    """Compare outputs and gradients, without places and in two steps with them; return which lie in theirs."""
    tolerance = 2e-6 if dtype == torch.float32 else 2e-3
    if DEVICE == "cuda":  # products of one and of several matrices are added up otherwise
        tolerance *= 10
    lasting, found = ops.Lasting(ops.Casts(), ops.Sums()), []
    for given in (None, lasting, lasting):
        lasting.sums.begin()
        found = run(given)
        for own, wanted in zip(found, expected, strict=True):
            assert own.shape == wanted.shape and own.dtype == wanted.dtype
            if own.numel():
                assert float((own - wanted).detach().abs().max()) <= tolerance * max(
                    float(wanted.detach().abs().max()), 1e-6
                )
    gradients = found[-len(trained) :]
    return [i for i, p in enumerate(trained) if gradients[i].data_ptr() == lasting.sums[p].data_ptr()]


# experts (0 for a plain update), choices, adapted layers
BLOCKS = {
    "a dense one, mixtures of two and of one": [(0, 1, "gud")] * 2 + [(3, 2, "gud")] * 2 + [(3, 1, "gud")] * 2,
    "gate or up alone": [(3, 2, "g")] * 2 + [(3, 2, "u")] * 2 + [(0, 1, "g"), (0, 1, "d"), (0, 1, ""), (0, 1, "u")],
    "with down": [(3, 2, "gd"), (3, 2, "ud"), (3, 2, "d"), (3, 2, "gud")],
    "dense ones": [(0, 1, "gud")] * 3,
    "one mixture": [(3, 2, "gud")],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "p"), [(6, 0.3), (5, 0.0), (0, 0.3)])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_of_several_forms_in_one_batch(name: str, tokens: int, p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    total = tokens * len(BLOCKS[name])
    x, keys = torch.randn(total, HIDDEN, device=DEVICE).to(dtype).requires_grad_(), keys_of(total)
    layers = [frozen(HIDDEN, INNER, dtype, bias=True), frozen(HIDDEN, INNER, dtype), frozen(INNER, HIDDEN, dtype)]
    shapes, streams = {"g": (HIDDEN, INNER), "u": (HIDDEN, INNER), "d": (INNER, HIDDEN)}, ("gate", "up", "down")
    together, alone = [], []
    for number, (experts, k, adapted) in enumerate(BLOCKS[name]):
        lead, inside = (experts,) if experts else (), slice(number * tokens, (number + 1) * tokens)
        pairs = [
            (parameter(*lead, RANK, i), parameter(*lead, o, RANK)) if layer in adapted else None
            for layer, (i, o) in shapes.items()
        ]
        router = parameter(experts, HIDDEN) if experts else None
        update = ops.BlockUpdate(*pairs, max(experts, 1), 1.5, p, router, k)
        together.append(fused.block_part(update, inside.start, inside.stop, "silu", keys[inside], streams))
        alone.append((inside, *fused.block_part(update, 0, tokens, "silu", keys[inside], streams)))
    trained = [t for _, own in together for t in own if t is not None]
    upstream = torch.randn(total, HIDDEN, device=DEVICE).to(dtype)

    def run(lasting: ops.Lasting | None) -> list[torch.Tensor]:
        out, _ = fused.feed_forward(x, layers, *map(list, zip(*together, strict=True)), lasting)
        return [out, *torch.autograd.grad(out, [x, *trained], upstream)]

    out = torch.cat([fused.feed_forward(x[inside], layers, [part], [own])[0] for inside, part, own in alone])
    placed = agree(run, [out, *torch.autograd.grad(out, [x, *trained], upstream)], trained, dtype)
    if name.startswith("dense"):
        assert len(placed) == len(trained)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "p", "groups", "experts", "apart"),
    [(6, 0.3, 2, 0, True), (6, 0.0, 2, 3, True), (6, 0.2, 1, 3, False), (6, 0.0, 1, 0, False), (0, 0.2, 1, 0, False)],
)
def test_layers_that_read_one_input(
    tokens: int, p: float, groups: int, experts: int, apart: bool, dtype: torch.dtype
) -> None:
    """As queries with more outputs than keys and values, with a bias or a factor or neither; x not contiguous."""
    torch.manual_seed(0)
    total, outputs, lead = groups * tokens, (24, 8, 8), (experts,) if experts else ()
    x = torch.randn(total, 2 * HIDDEN if apart else HIDDEN, device=DEVICE).to(dtype)[:, :HIDDEN].requires_grad_()
    keys, layers, trained = keys_of(total), [], []
    for number, size in enumerate(outputs):
        parts, owned = [], []
        for group in range(groups):
            inside = slice(group * tokens, (group + 1) * tokens)
            parts.append(fused.Part(inside.start, inside.stop, 1.5, fused.dropout_of(keys[inside], p, f"l{number}")))
            weights = torch.rand(tokens, experts, device=DEVICE).requires_grad_() if experts else None
            factor = parameter(size) if number != 2 else None
            owned.append(fused.Tensors(parameter(*lead, RANK, HIDDEN), parameter(*lead, size, RANK), weights, factor))
        layers.append(fused.Layer(frozen(HIDDEN, size, dtype, bias=number != 1), parts, owned))
        trained += [t for own in owned for t in own if t is not None]
    upstream = [torch.randn(total, size, device=DEVICE).to(dtype) for size in outputs]

    def run(lasting: ops.Lasting | None) -> list[torch.Tensor]:
        outs = fused.adapted_linears(x, layers, lasting)
        return [*outs, *torch.autograd.grad(outs, [x, *trained], upstream)]

    outs = [fused.adapted_linears(x, [layer])[0] for layer in layers]
    expected = [*outs, *torch.autograd.grad(outs, [x, *trained], upstream)]
    placed = agree(run, expected, trained, dtype)
    matrices = [i for i, t in enumerate(trained) if t.ndim == 2 and isinstance(t, nn.Parameter)]
    assert set(matrices) <= set(placed)
