"""A step rehearsed without data takes the memory that the step itself takes, as torch's allocator counts it."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity, profile

from mlora import ops
from mlora.adapters import METHODS
from mlora.model.batch import Batch, Row
from mlora.model.load import Origin
from mlora.model.multi import MultiAdapterModel
from mlora.model.recompute import Recompute
from mlora.model.rehearsal import Rehearsal
from tests.families import tiny

SETTINGS = {"hidden_size": 64, "intermediate_size": 160, "vocab_size": 400}
VARIANTS = {
    "lora": METHODS["lora"](r=4, lora_dropout=0.1),
    "embeddings": METHODS["lora"](r=4, target_modules=("embed_tokens", "q_proj", "down_proj")),
    "dora": METHODS["lora"](r=4, lora_dropout=0.1, use_dora=True),
    "pissa": METHODS["lora"](r=4, lora_init="pissa"),
    "mixlora": METHODS["mixlora"](r=4, lora_dropout=0.1, num_experts=4),
    "mixdora": METHODS["mixlora"](r=4, num_experts=3, use_dora=True),
    "loramoe": METHODS["loramoe"](r=4, lora_dropout=0.1, num_experts=3),
    "mola": METHODS["mola"](r=4, num_experts=4),
    "mixlora-dynamic": METHODS["mixlora-dynamic"](r=4, num_experts=4),
    "mixlora-switch": METHODS["mixlora-switch"](r=4, num_experts=4, expert_capacity=16),
}
CASES = [(variant, "llama") for variant in VARIANTS]
CASES += [
    ("embeddings", "gemma2"),
    ("lora", "gemma2"),
    ("mixlora", "gemma2"),
    ("dora", "gemma2"),
    ("lora", "phi"),
    ("mixlora", "qwen3"),
]


def rows(lengths: tuple[int, ...]) -> dict[str, list[Row]]:
    draw = torch.Generator().manual_seed(0)
    ids = [tuple(torch.randint(3, 400, (n,), generator=draw).tolist()) for n in lengths]
    return {name: [Row(row, row, name, i) for i, row in enumerate(ids)] for name in ("x", "y")}


def real(variant: str, family: str) -> MultiAdapterModel:
    model = MultiAdapterModel(tiny(family, 3, **SETTINGS), Origin("tiny", "tiny"))
    model.check_packing()
    return with_adapters(model, variant)


def shapes(variant: str, family: str, layers: int = 3) -> MultiAdapterModel:
    with torch.device("meta"):
        base = tiny(family, layers, **SETTINGS)
        return with_adapters(MultiAdapterModel(base, Origin("tiny", "tiny")), variant)


def with_adapters(model: MultiAdapterModel, variant: str) -> MultiAdapterModel:
    model.add_adapter("x", VARIANTS[variant])
    model.add_adapter("y", METHODS["lora"](r=2))
    return model


def objective(model: MultiAdapterModel, batch: dict[str, list[Row]]) -> torch.Tensor:
    packed = Batch.pack([row for own in batch.values() for row in own], dict.fromkeys(batch, 0))
    return torch.stack([o.loss + o.aux_loss for o in model(packed).values()]).sum()


def kept_bytes(model: MultiAdapterModel, batch: dict[str, list[Row]]) -> int:
    """Return what autograd keeps of a forward, each storage once."""
    there = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, tuple[int, StorageWeakRef]] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = storage.nbytes(), StorageWeakRef(storage)
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        end = objective(model, batch)
    found = sum(size for size, storage in kept.values() if not storage.expired())
    end.backward()
    return found


def peak_bytes(model: MultiAdapterModel, batch: dict[str, list[Row]]) -> int:
    """Return the most that the step takes beside what is there before, from what torch's allocator tells."""
    for name in batch:
        for _, parameter in model.adapter_parameters(name):
            parameter.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        objective(model, batch).backward()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def assert_kept(found: int, expected: int, batch: dict[str, list[Row]]) -> None:
    """Within 2%, beside the batch and router logits, which autograd need not keep: some 100 bytes a token."""
    tokens = sum(len(row.input_ids) for own in batch.values() for row in own)
    assert 0.98 * expected <= found <= 1.02 * expected + 170 * tokens


POLICIES = [Recompute("none"), Recompute("middle"), Recompute("all"), Recompute("all", 1)]


@pytest.mark.parametrize(("variant", "family"), CASES)
def test_a_rehearsal_takes_what_the_step_takes(variant: str, family: str) -> None:
    model, rehearsal = real(variant, family), Rehearsal(shapes(variant, family), "cpu")
    model.train()
    batch = rows((32, 27, 40, 33))
    totals = []
    for model.recompute in POLICIES:
        found = rehearsal.step(batch, model.recompute)
        assert_kept(found.activations, kept_bytes(model, batch), batch)
        measured = max(peak_bytes(model, batch) for _ in range(2))  # the profiler loses an event now and then
        assert found.activations + found.rest == pytest.approx(measured, rel=0.05)
        totals.append(found.total)
    assert totals[0] > max(totals[1:]) and totals[2] == min(totals)
    parameters = sum(t.numel() for t in model.hf_model.parameters()), sum(map(model.num_parameters, batch))
    assert found.base == pytest.approx(4 * parameters[0], rel=0.01)  # beside frequencies of rotary embeddings
    assert found.adapters == pytest.approx(4 * sum(p.numel() for p in model.adapter_modules.parameters()), rel=1e-6)
    assert parameters[1] * 4 <= found.adapters


@pytest.mark.parametrize(("variant", "family"), [("lora", "llama"), ("loramoe", "llama"), ("mixlora", "gemma2")])
def test_kernels_keep_what_a_rehearsal_says(variant: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(ops, "fused_available", lambda x: True)
    from mlora.ops.fused.masks import unlaunched

    model, rehearsal = real(variant, family), Rehearsal(shapes(variant, family), "cpu")
    model.train()
    batch = rows((9, 6))
    for model.recompute in (Recompute(), Recompute("middle", 1)):
        with unlaunched():
            found = rehearsal.step(batch, model.recompute)
        assert_kept(found.activations, kept_bytes(model, batch), batch)


@pytest.mark.parametrize("lengths", [(32, 27), (3,)], ids=["activations", "gradients"])
@pytest.mark.parametrize(("device", "accumulates"), [("cpu", True), ("cpu", False), ("cuda", False)])
def test_three_layers_tell_what_six_take(
    device: str, accumulates: bool, lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where activations are most, and where gradients are, which backward has all of only at its end."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    batch, rehearsal = rows(lengths), Rehearsal(shapes("lora", "llama", 6), device)
    policies = [Recompute(), Recompute("middle", 3), Recompute("all"), Recompute("all", 1)]
    told = [rehearsal.step(batch, policy, 1000, accumulates) for policy in policies]
    rehearsal._layers_are_alike = False
    for policy, found in zip(policies, told, strict=True):
        expected = rehearsal.step(batch, policy, 1000, accumulates)
        assert found[:2] == expected[:2], policy
        assert found.activations == pytest.approx(expected.activations, rel=0.02), policy
        assert found.total == pytest.approx(expected.total, rel=0.02), policy


def test_what_layers_take_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsal, batch, measured = Rehearsal(shapes("lora", "llama", 5), "cpu"), rows((3,)), []
    measure = rehearsal._measure
    monkeypatch.setattr(rehearsal, "_measure", lambda *asked: measured.append(asked[1:]) or measure(*asked))
    first = rehearsal.step(batch, Recompute())
    assert rehearsal.step(batch, Recompute()) == first and len(measured) == 2


def test_layers_that_are_not_alike_all_take_the_step() -> None:
    assert Rehearsal(shapes("mixlora", "llama", 5), "cpu")._layers_are_alike
    assert not Rehearsal(shapes("mixlora", "gemma2", 5), "cpu")._layers_are_alike  # some have a window
    model = shapes("mixlora", "llama", 5)
    model.add_adapter("z", METHODS["lora"](r=2, target_modules=("layers.4.self_attn.q_proj",)))
    assert not Rehearsal(model, "cpu")._layers_are_alike


def test_gradients_that_are_there_already_are_counted() -> None:
    rehearsal = Rehearsal(shapes("mixlora", "llama"), "cpu")
    batch = rows((5, 3))
    first, second = (rehearsal.step(batch, Recompute(), accumulates=accumulates) for accumulates in (False, True))
    parameters = 4 * sum(rehearsal.model.num_parameters(name) for name in batch)
    assert second.adapters - first.adapters == pytest.approx(parameters, rel=0.01)
    assert parameters <= second.total - first.total + first.rest, "what backward makes is added to what is there"


def test_a_step_on_a_gpu_is_rehearsed_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels, a graph's filled-up sizes and lasting gradients, compiled norms: less is kept than in plain torch."""
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    batch = rows((32, 27, 40, 33))
    found = {}
    for device, compiled in (("cpu", False), ("cuda", False), ("cuda", True)):
        model = shapes("mixlora", "llama")
        model.hf_model.to(torch.bfloat16)
        rehearsal = Rehearsal(model, device, compiled)
        found[device, compiled] = rehearsal.step(batch, Recompute(), optimizer_bytes=1000)
    plain, eager, compiled_ = found.values()
    assert compiled_.activations < eager.activations < plain.activations
    parameters = 4 * sum(p.numel() for p in model.adapter_modules.parameters())
    assert plain.adapters == parameters + 1000
    assert compiled_.adapters == pytest.approx(2 * parameters + 1000, rel=0.1), "gradients last; 512 bytes are a block"
