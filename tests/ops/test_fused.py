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
from mlora.ops import fused, loss  # noqa: E402
from mlora.ops.fused.groups import grouped, joined  # noqa: E402
from mlora.ops.fused.products import summed_products  # noqa: E402
from mlora.ops.fused.router import fused_router_logits, routes_of  # noqa: E402
from mlora.ops.random import dropout  # noqa: E402

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 8 * 3e-3}
"""Largest difference, relative to the largest value of a tensor; bfloat16 rounds eight times as roughly as float16."""
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
    (out,) = fused.adapted_linears(x, [fused.Layer(layer, [part], [fused.Tensors(a, b, weights, None)])])

    own = dropout(x[2 : tokens + 2], keys, p, "q")
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_groups_and_factors(bias: bool, dtype: torch.dtype) -> None:
    """Adapters of one form go together, and each gets what it gets alone; a factor leaves the bias out."""
    torch.manual_seed(3)
    n, inputs, outputs = 66, 40, 34
    layer = nn.Linear(inputs, outputs, bias=bias).to(DEVICE, dtype).requires_grad_(False)
    # rank, experts, dropout, whether rescaled: three of one form, two of another, one with experts twice
    forms = [(4, 0, 0.3, False)] * 3 + [(6, 0, 0.1, True)] * 2 + [(4, 3, 0.0, False)] * 2 + [(4, 0, 0.3, False)]
    x = draw(len(forms) * n + 2, inputs, dtype=dtype).requires_grad_()
    keys = keys_of(len(forms) * n)
    parts, owned, expected = [], [], [layer(x[:1]).float()]
    for number, (rank, experts, p, rescaled) in enumerate(forms):
        lead, start = (experts,) if experts else (), 1 + number * n
        a = draw(*lead, rank, inputs, scale=0.2).requires_grad_()
        b = draw(*lead, outputs, rank, scale=0.2).requires_grad_()
        weights = draw(n, experts).softmax(-1).requires_grad_() if experts else None
        factor = draw(outputs).requires_grad_() if rescaled else None
        own_keys = keys[number * n : (number + 1) * n]
        parts.append(fused.Part(start, start + n, 1.5, fused.dropout_of(own_keys, p, "q")))
        owned.append(fused.Tensors(a, b, weights, factor))
        own = x[start : start + n]
        update = ops.LowRankUpdate(a, b, 1.5, p, weights, factor)
        wide = dropout(own, own_keys, p, "q").float()
        expected.append(ops.apply_update(update, wide, layer(own).float(), layer.bias))
    expected = torch.cat([*expected, layer(x[-1:]).float()])
    (out,) = fused.adapted_linears(x, [fused.Layer(layer, parts, owned)])
    same(out, expected, dtype)
    upstream = draw(*out.shape, dtype=dtype)
    tensors = [x, *(t for own in owned for t in own if t is not None)]
    pairs = zip(gradients(out, upstream, tensors), gradients(expected, upstream.float(), tensors), strict=True)
    for found, wanted in pairs:
        same(found, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "features"), [(33, 300), (5, 17), (0, 8)])
def test_dropout(tokens: int, features: int, dtype: torch.dtype) -> None:
    x, keys = draw(tokens, features, dtype=dtype).requires_grad_(), keys_of(tokens)
    found = fused.dropout(x, fused.dropout_of(keys, 0.3, "q"))
    expected = dropout(x, keys, 0.3, "q")
    assert torch.equal(found == 0, expected == 0)
    torch.testing.assert_close(found, expected)
    upstream = draw(tokens, features, dtype=dtype)
    torch.testing.assert_close(gradients(found, upstream, [x]), gradients(expected, upstream, [x]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "hidden", "experts"), [(70, 200, 8), (5, 33, 3), (33, 64, 20)])
def test_router_logits(tokens: int, hidden: int, experts: int, dtype: torch.dtype) -> None:
    """In float32 whatever the dtype of x, whose own gradient alone is rounded to it."""
    torch.manual_seed(tokens)
    x, router = draw(tokens, hidden, dtype=dtype).requires_grad_(), draw(experts, hidden).requires_grad_()
    found = fused_router_logits(x, router)
    expected = nn.functional.linear(x.float(), router)
    same(found, expected, torch.float32)
    upstream = draw(tokens, experts)
    (of_x, of_router), (wanted_x, wanted_router) = (gradients(y, upstream, [x, router]) for y in (found, expected))
    same(of_router, wanted_router, torch.float32)
    same(of_x, wanted_x.float(), dtype)


@pytest.mark.parametrize("k", [1, 2])
def test_a_router_that_is_not_a_number_says_so(k: int) -> None:
    """As in plain torch: a training that has come apart must not look well."""
    router = draw(5, 16)
    router[3] = torch.nan
    routes = routes_of(draw(9, 16), router[None], k)
    assert routes.weights.isnan().all() and int(routes.experts.max()) < 5
    assert routes_of(draw(9, 16), draw(1, 5, 16), k).weights.isfinite().all()


@pytest.mark.parametrize("several", [1, 2])
def test_sums_of_tensors_without_data_ask_torch_for_nothing(several: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch 2.11 knows no form of products in another dtype that are added or written somewhere."""
    for name in ("mm", "bmm", "addmm", "baddbmm"):
        monkeypatch.setattr(torch, name, lambda *_, **__: pytest.fail("asked"))
    left = torch.empty(several, 6, 4, dtype=torch.bfloat16, device="meta")
    place = torch.empty(several, 4, 4, device="meta")
    with ops.standing_for("cuda"):
        assert summed_products(left, left, place).shape == place.shape
        assert summed_products(left, left).dtype == torch.float32
        assert summed_products(left, left, out=place) is place


def test_a_router_of_experts_that_are_alike_learns_nothing() -> None:
    """Of rounding AdamW would make whole steps; here B is 0, as at the start, and its own gradient is not."""
    torch.manual_seed(0)
    layers = [nn.Linear(i, o, bias=False).to(DEVICE) for i, o in ((16, 24), (16, 24), (24, 16))]
    pairs = [(draw(8, 3, i), torch.zeros(8, o, 3, device=DEVICE)) for i, o in ((16, 24), (16, 24), (24, 16))]
    router = draw(8, 16).requires_grad_()
    update = ops.BlockUpdate(*pairs, 8, 1.0, 0.0, router, 2)
    pairs[0][1].requires_grad_()
    part, own = fused.block_part(update, 0, 50, "silu", None, ("gate", "up", "down"))
    out, _ = fused.feed_forward(draw(50, 16), layers, [part], [own])
    of_router, of_b = gradients(out, draw(50, 16), [router, pairs[0][1]])
    assert not of_router.any() and of_b.any()


def test_only_neighbours_of_one_form_and_length_are_a_group() -> None:
    spans = [slice(0, 4), slice(4, 8), slice(8, 11), slice(11, 14), slice(15, 18), slice(18, 21)]
    forms = ["a", "a", "a", "a", "a", "b"]
    found = list(grouped(spans, forms.__getitem__))
    assert found == [slice(0, 2), slice(2, 4), slice(4, 5), slice(5, 6)]


def test_joined_copies_only_what_lies_apart() -> None:
    keys = torch.arange(12)
    assert joined([keys[2:5], keys[5:8]]).data_ptr() == keys[2:].data_ptr()
    for parts in ([keys[2:5], keys[6:9]], [keys[2:5], keys.clone()[5:8]], [keys[::2][:2], keys[4:6]]):
        assert torch.equal(joined(parts), torch.cat(parts))
    assert torch.equal(joined([keys[2:5], keys[5:8]]), keys[2:8])


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
            narrow = dropout(wide, own_keys, p, stream)
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
        (20, 16, 40, 8, 2, 20, 0.1, "silu", ""),
    ],
)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_feed_forward(tokens, hidden, inner, num_experts, k, rank, p, activation, without, groups, dtype) -> None:
    torch.manual_seed(tokens)
    layers = [
        nn.Linear(i, o, bias=False).to(DEVICE, dtype) for i, o in ((hidden, inner), (hidden, inner), (inner, hidden))
    ]
    for layer in layers:
        layer.requires_grad_(False)
    x = draw(groups * tokens, hidden, dtype=dtype).requires_grad_()
    wide = x.detach().float().requires_grad_()
    keys = keys_of(groups * tokens)
    functions = {
        "silu": nn.functional.silu,
        "gelu": nn.functional.gelu,
        "gelu_tanh": lambda g: nn.functional.gelu(g, approximate="tanh"),
    }
    parts, owned, expected, trained, logits = [], [], [], [], []
    for group in range(groups):
        inside = slice(group * tokens, (group + 1) * tokens)
        pairs = []
        for name, i, o in (("gate", hidden, inner), ("up", hidden, inner), ("down", inner, hidden)):
            a = draw(num_experts, rank, i, scale=0.5 / rank**0.5).requires_grad_()
            b = draw(num_experts, o, rank, scale=0.5 / rank**0.5).requires_grad_()
            pairs.append(None if name in without.split() else (a, b))
        routed = num_experts > 1
        router = draw(num_experts, hidden, scale=0.3).requires_grad_() if routed else None
        weights, picked = torch.ones(tokens, 1, device=DEVICE), torch.zeros(tokens, 1, dtype=torch.int64, device=DEVICE)
        if router is not None:
            logits.append(nn.functional.linear(wide[inside], router))
            weights, picked = ops.top_k_routing(logits[-1], k)
        update = ops.BlockUpdate(*pairs, num_experts, 1.5, p, router, k)
        part, own = fused.block_part(
            update, inside.start, inside.stop, activation, keys[inside], ("gate", "up", "down")
        )
        parts.append(part)
        owned.append(own)
        flat = [t for pair in pairs for t in (pair or (None, None))]
        function = functions[activation]
        expected.append(
            reference_block(wide[inside], layers, function, *flat, weights, picked, 1.5, p, keys[inside], routed)
        )
        trained += [t for t in (*flat, router) if t is not None]
    if not trained and dtype != torch.float32:
        pytest.skip("nothing to compare but the frozen block")
    (out, said), expected = fused.feed_forward(x, layers, parts, owned), torch.cat(expected)

    same(out, expected, dtype)
    upstream = draw(*out.shape, dtype=dtype)
    loss, definition = (out * upstream).sum(), (expected * upstream.float()).sum()
    for number, (found, wanted) in enumerate(zip(said, logits, strict=bool(logits))):
        same(found, wanted, torch.float32)
        if number != 1:  # an adapter without a router loss among others that have one
            aux = draw(*wanted.shape)
            loss, definition = loss + (found * aux).sum(), definition + (wanted * aux).sum()
    pairs = zip(
        torch.autograd.grad(loss, [x, *trained]), torch.autograd.grad(definition, [wide, *trained]), strict=True
    )
    for found, wanted in pairs:
        same(found, wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "heads", "groups", "tokens", "width", "part"),
    [(1, 4, 4, 37, 64, 64), (2, 9, 3, 5, 12, 12), (1, 33, 1, 3, 128, 32), (1, 2, 2, 1, 2, 2)],
)
def test_rotary(
    rows: int, heads: int, groups: int, tokens: int, width: int, part: int, dtype: torch.dtype
) -> None:  # fmt: skip
    """Values, gradients, and that both lie by tokens; of a part of each head, too."""
    torch.manual_seed(tokens)
    q, k = (draw(rows, tokens, n, width, dtype=dtype).requires_grad_() for n in (heads, groups))
    cos, sin = (draw(rows, tokens, part, dtype=dtype) for _ in range(2))
    turned = [x.transpose(1, 2)[..., :part] for x in (q, k)]
    found = fused.rotary(*turned, cos, sin)
    expected = []
    for x in turned:
        first, second = x.float().chunk(2, -1)
        expected.append(x.float() * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None])
    upstream = [draw(*x.shape) for x in expected]
    ours = torch.autograd.grad(found, turned, [u.to(dtype) for u in upstream])
    theirs = torch.autograd.grad(expected, turned, upstream)
    for own, other in zip((*found, *ours), (*expected, *theirs), strict=True):
        same(own, other, dtype)
    assert all(x.transpose(1, 2).is_contiguous() for x in (*found, *ours))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 2), (5, 33), (19, 300)], ids=str)
def test_gate(shape: tuple[int, int], activation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    g, u, upstream = (draw(*shape, dtype=dtype) for _ in range(3))
    g.requires_grad_(), u.requires_grad_()
    found = fused.gate(g, u, activation)
    wide_g, wide_u = (x.detach().float().requires_grad_() for x in (g, u))
    act = nn.functional.silu if activation == "silu" else nn.GELU("tanh" if activation == "gelu_tanh" else "none")
    expected = act(wide_g) * wide_u
    ours, theirs = gradients(found, upstream, [g, u]), gradients(expected, upstream.float(), [wide_g, wide_u])
    for own, other in zip((found, *ours), (expected, *theirs), strict=True):
        same(own, other, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_layers_that_read_one_input(count: int, dtype: torch.dtype) -> None:
    """Together they are what each is alone, masks included; one without dropout, one whose adapters cover less."""
    torch.manual_seed(count)
    x, keys = draw(30, 24, dtype=dtype).requires_grad_(), keys_of(30)
    layers, trained = [], []
    for number in range(count):
        frozen = nn.Linear(24, 16 + 8 * number, bias=number == 1).to(DEVICE, dtype).requires_grad_(False)
        p = 0.0 if number == 2 else 0.3
        spans = ((0, 10), (10, 20)) if number == 0 else ((0, 10), (10, 20), (20, 30))
        parts = [fused.Part(i, j, 1.5, fused.dropout_of(keys[i:j], p, f"layer {number}")) for i, j in spans]
        own = [(draw(8, 24).requires_grad_(), draw(len(frozen.weight), 8).requires_grad_()) for _ in spans]
        layers.append(fused.Layer(frozen, parts, [fused.Tensors(a, b, None, None) for a, b in own]))
        trained += [tensor for pair in own for tensor in pair]
    found = fused.adapted_linears(x, layers)
    alone = [fused.adapted_linears(x, [layer])[0] for layer in layers]
    upstream = [draw(*out.shape, dtype=dtype) for out in found]
    ours, theirs = (torch.autograd.grad(outs, [x, *trained], upstream) for outs in (found, alone))
    for own, other in zip((*found, *ours), (*alone, *theirs), strict=True):
        same(own, other.float(), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 3), (6, 130), (3, 4099), (2, 8192)])
def test_the_cross_entropy_of_chunks(rows: int, vocabulary: int, dtype: torch.dtype, monkeypatch) -> None:
    torch.manual_seed(vocabulary)
    monkeypatch.setattr(ops, "fused_available", lambda _: True)
    monkeypatch.setattr(loss, "CHUNK_BYTES", 2 * vocabulary * dtype.itemsize)  # two rows
    head = nn.Linear(8, vocabulary).to(DEVICE, dtype).requires_grad_(False)
    hidden = draw(rows, 8, scale=30, dtype=dtype).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=DEVICE)
    found = ops.token_losses(hidden, head, targets)
    logits = head(hidden).float()
    same(found, nn.functional.cross_entropy(logits, targets, reduction="none"), dtype)
    upstream = torch.rand(rows, device=DEVICE)
    (of_hidden,) = gradients(found, upstream, [hidden])
    expected = (logits.softmax(-1) - nn.functional.one_hot(targets, vocabulary)) * upstream[:, None]
    same(of_hidden, expected @ head.weight.float(), dtype)


def test_a_target_beyond_the_vocabulary_has_no_loss() -> None:
    logits = torch.zeros(3, 5, device=DEVICE)
    losses = fused.cross_entropy(logits, torch.tensor([5, -1, 4], device=DEVICE), False)
    assert losses[:2].isnan().all() and losses[2].item() == pytest.approx(torch.tensor(5.0).log().item())
