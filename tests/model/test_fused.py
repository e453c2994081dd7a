"""A model whose adapters run in kernels equals the same model in plain torch: losses, gradients, router logits."""

from __future__ import annotations

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytest.importorskip("triton")

from mlora import ops  # noqa: E402
from mlora.adapters import METHODS  # noqa: E402
from mlora.model.batch import Batch  # noqa: E402
from mlora.model.recompute import WHATS, Recompute, What  # noqa: E402
from tests.families import FAMILIES, awaken, multi, rows  # noqa: E402
from tests.test_laws import VARIANTS, assert_same, losses_and_gradients  # noqa: E402

CASES = [
    *((variant, "llama") for variant in VARIANTS),
    ("mixlora", "gemma2"),
    ("lora", "phi3"),
    ("lora", "phi"),
    ("lora", "qwen2"),
]


@pytest.mark.parametrize(("variant", "family"), CASES)
@pytest.mark.parametrize("recompute", WHATS)
def test_kernels_change_nothing(variant: str, family: str, recompute: What, monkeypatch) -> None:
    if recompute != "none" and variant not in ("lora", "mixlora"):
        pytest.skip("recomputing is the same for every method")
    model = multi(family).to(DEVICE)
    ids, mask = rows(6)
    model.add_adapter("x", VARIANTS[variant])
    model.add_adapter("plain", METHODS["lora"](r=2, lora_dropout=0.2))
    awaken(model)
    model.train()
    model.recompute = Recompute(recompute)
    batch = Batch.from_rows(ids, mask, None, ["plain", "x", None, "x", "plain", None], step=3).to(DEVICE)
    monkeypatch.setattr(ops, "fused_available", lambda x: False)
    expected = losses_and_gradients(model, batch, ["x", "plain"])
    calls = count_calls(monkeypatch)
    monkeypatch.setattr(ops, "fused_available", lambda x: True)
    found = losses_and_gradients(model, batch, ["x", "plain"])
    assert calls, "no kernel ran"
    for name in ("x", "plain"):
        assert_same(found[name], expected[name], 1e-4)


def count_calls(monkeypatch) -> list[str]:
    """Return a list that grows with every operation that runs in kernels."""
    from mlora.ops import fused

    calls: list[str] = []
    for name in ("adapted_linears", "feed_forward"):
        function = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, _f=function, _n=name: calls.append(_n) or _f(*a))
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_rotary_embeddings_of_families(family: str, monkeypatch) -> None:
    """The kernel where halves of whole heads are turned, else the family's function; other models keep theirs."""
    from mlora.ops import fused

    model, calls, rotary = multi(family).to(DEVICE), [], fused.rotary
    monkeypatch.setattr(fused, "rotary", lambda *tensors: calls.append(1) or rotary(*tensors))
    ids = rows(2)[0].to(DEVICE)
    monkeypatch.setattr(ops, "fused_available", lambda x: False)
    expected = model.hf_model(input_ids=ids).logits
    assert not calls
    monkeypatch.setattr(ops, "fused_available", lambda x: True)
    found = model.hf_model(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert bool(calls) == (family not in ("cohere", "glm", "glm4", "gpt_neox"))
    calls.clear()
    other = type(model.hf_model)(model.hf_model.config).to(DEVICE).eval()
    other(input_ids=ids)
    assert not calls


TOGETHER = {"llama": [3, 1, 2, 1], "phi3": [1, 1, 1, 1], "phi": [3, 1, 1, 1], "cohere": [3, 1, 2, 1]}
"""Layers of each operation of a decoder layer."""


@pytest.mark.parametrize(("family", "each"), TOGETHER.items(), ids=TOGETHER)
def test_layers_that_read_one_input_are_computed_together(family: str, each: list[int], monkeypatch) -> None:
    from mlora.ops import fused

    model, counts, function = multi(family, layers=1).to(DEVICE), [], fused.adapted_linears
    monkeypatch.setattr(
        fused, "adapted_linears", lambda x, layers, casts: counts.append(len(layers)) or function(x, layers)
    )
    monkeypatch.setattr(ops, "fused_available", lambda x: True)
    model.add_adapter("x", METHODS["lora"](r=4, use_dora=True, target_modules="all-linear"))
    model.add_adapter("part", METHODS["lora"](r=4, target_modules=["o_proj" if family != "phi" else "dense"]))
    ids, mask = rows(2)
    for _ in range(2):  # nothing is left over from one batch to the next
        counts.clear()
        model(Batch.from_rows(ids, mask, None, ["x", "part"]).to(DEVICE))
        assert counts == each and not model.scope.ready


def test_features_that_lie_apart_in_memory(monkeypatch) -> None:
    """Mamba's mixers hand a transposed view to their last layer."""
    model = multi("falcon_mamba").to(DEVICE)
    model.add_adapter("x", METHODS["lora"](r=4, lora_dropout=0.1))
    awaken(model)
    model.train()
    ids, mask = rows(1)
    batch = Batch.from_rows(ids, mask, None, ["x"], step=3).to(DEVICE)
    monkeypatch.setattr(ops, "fused_available", lambda x: False)
    expected = losses_and_gradients(model, batch, ["x"])
    monkeypatch.setattr(ops, "fused_available", lambda x: True)
    assert_same(losses_and_gradients(model, batch, ["x"])["x"], expected["x"], 1e-4)


def test_a_method_that_overrides_arithmetic_is_not_taken_for_its_parent(monkeypatch) -> None:
    class Halved(METHODS["lora"]):
        def linear(self, p, x, out, site, segment):
            return out + (super().linear(p, x, out, site, segment) - out) / 2

    class Doubled(METHODS["mixlora"]):
        def block(self, p, experts, x, site, segment):
            return 2 * (yield from super().block(p, experts, x, site, segment))

    model = multi("llama").to(DEVICE)
    model.add_adapter("halved", Halved(r=4))
    model.add_adapter("doubled", Doubled(r=4, num_experts=3))
    awaken(model)
    ids, mask = rows(2)
    found = []
    for fused in (False, True):
        monkeypatch.setattr(ops, "fused_available", lambda x, fused=fused: fused)
        found.append(model.logits(ids.to(DEVICE), mask.to(DEVICE), ["halved", "doubled"])[mask.bool().to(DEVICE)])
    assert torch.allclose(*found, atol=1e-5)
