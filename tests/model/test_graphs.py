"""A batch brought to a fixed size computes what it would as it is: losses and gradients; recorded graphs too."""

from __future__ import annotations

import pytest
import torch

from mlora import ops
from mlora.adapters import METHODS
from mlora.config import JobConfig
from mlora.data import Sample
from mlora.model import attention, graphs, inputs, sizes
from mlora.model.batch import IGNORED, Batch, Row
from mlora.model.recompute import Recompute
from mlora.training import trainer
from mlora.training.job import Job
from tests.families import VOCABULARY, awaken, multi
from tests.test_laws import VARIANTS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNTING = {name for name, method in VARIANTS.items() if method.counts_tokens}


def draw_rows(name: str, count: int, seed: int, classes: bool = False) -> list[Row]:
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        length = int(torch.randint(3, 9, (1,), generator=draw))
        ids = torch.randint(3, VOCABULARY, (length,), generator=draw).tolist()
        labels = [IGNORED] * length if classes else [IGNORED, *ids[1:]]
        rows.append(Row(ids, labels, name, index, index % 2 if classes else None))
    return rows


def ordinary(model, rows, steps, weights):
    batch = Batch.pack([row for own in rows.values() for row in own], steps, model.device)
    outputs = model(batch)
    parts = {
        name: (outputs[name].loss * int(outputs[name].num_tokens) * weights[name].target,
               outputs[name].aux_loss * weights[name].auxiliary)
        for name in rows
    }  # fmt: skip
    sum(loss + aux for loss, aux in parts.values()).backward()
    return {name: (loss.item(), aux.item()) for name, (loss, aux) in parts.items()}  # no graph stays alive


def collect(model, names):
    found = {name: model.adapter_gradients(name) for name in names}
    for name in names:
        for _, parameter in model.adapter_parameters(name):
            parameter.grad = None
    return found


def assert_close(found, expected, tolerance):
    for name, gradients in expected.items():
        largest = max(float(g.abs().max()) for g in gradients.values())
        for key, gradient in gradients.items():
            assert float((found[name][key] - gradient).abs().max()) <= tolerance * largest, (name, key)


def by_offsets(query, key, value, offsets, longest, scaling):
    lengths = tuple(n for n in offsets.diff().tolist() if n)
    return attention.packed_attention(None, query, key, value, None, scaling, packed_lengths=lengths)[0]


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in COUNTING])
def test_filling_up_changes_nothing(variant: str, monkeypatch) -> None:
    monkeypatch.setattr(attention, "_varlen", by_offsets)
    model = multi("llama")
    model.add_adapter("x", VARIANTS[variant])
    model.add_adapter("judge", METHODS["lora"](r=2, lora_dropout=0.2), num_labels=2)
    awaken(model)
    model.train()
    rows = {"x": draw_rows("x", 5, 1), "judge": draw_rows("judge", 3, 2, classes=True)}
    steps, weights = {"x": 4, "judge": 9}, {"x": inputs.Weights(0.05, 0.7), "judge": inputs.Weights(0.3, 1.0)}
    expected = ordinary(model, rows, steps, weights)
    gradients = collect(model, rows)
    size = sizes.size_for(rows)
    given = inputs.prepare(model, rows, steps, weights, size)
    computed, parameters, found = graphs.compute(model, list(rows), size, given)
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.grad = gradient
    for name, own in zip(rows, computed, strict=True):
        assert own.losses.loss.item() == pytest.approx(expected[name][0], rel=2e-5)
        assert own.losses.aux_loss.item() == pytest.approx(expected[name][1], rel=2e-5)
    assert_close(collect(model, rows), gradients, 2e-5)


def test_much_is_filled_up_only_where_it_costs_nothing(monkeypatch) -> None:
    model = multi("llama")
    rows = {"x": draw_rows("x", 12, 1), "y": draw_rows("y", 2, 2)}
    for name in rows:
        model.add_adapter(name, VARIANTS["lora"])
    assert Rerun(model).suits(rows)
    monkeypatch.setattr(graphs, "FREE_PRODUCTS", 0)
    assert not Rerun(model).suits(rows)
    assert Rerun(model).suits({"x": rows["x"]})


class Rerun(graphs.Graphs):
    """Graphs on the CPU: a replay computes again into the same tensors and leaves rubbish where a graph would."""

    obstacle = None

    def _capture(self, run, inputs):
        kept: list[graphs.Computed] = []

        def replay() -> None:
            for recorded in self._recorded.values():
                for tensor in left(recorded.computed):
                    tensor.fill_(torch.nan)
            computed, _ = run()
            kept[:] = kept or computed
            for tensor, new in zip(left(kept), left(computed), strict=True):
                tensor.copy_(new)

        return replay, inputs, kept


@pytest.mark.parametrize("recompute", ["none", "all"])
@pytest.mark.parametrize(
    ("variant", "casts", "elsewhere"),
    [("mixlora", 10, {2, 3}), ("lora", 10, set()), ("dora", 11, {1})],  # routers and B of experts, magnitudes
)
def test_casts_follow_their_parameters_and_gradients_are_in_place(
    variant: str, casts: int, elsewhere: set[int], recompute: str, monkeypatch
) -> None:
    """In kernels, interpreted: steps of two micro-batches in float16, parameters changed in between."""
    pytest.importorskip("triton")
    model = multi("llama", layers=1).to(DEVICE)
    monkeypatch.setattr(ops, "fused_available", lambda x: True)
    monkeypatch.setattr(attention, "_varlen", by_offsets)
    model.hf_model.to(torch.float16)
    for name in "xy":
        model.add_adapter(name, VARIANTS[variant])
    awaken(model)
    model.train()
    model.recompute = Recompute(recompute)
    recorded, weights = Rerun(model), dict.fromkeys("xy", inputs.Weights(0.05, 0.7))
    copied, find = set(), recorded._elsewhere

    def note(parameters, gradients):
        pairs = find(parameters, gradients)
        copied.update(place.ndim for _, place in pairs)
        return pairs

    recorded._elsewhere = note
    for step in range(2):
        steps = dict.fromkeys("xy", step)
        parts = [{name: draw_rows(name, 4, ord(name) + step + n) for name in "xy"} for n in (0, 5)]
        for rows in parts:
            ordinary(model, rows, steps, weights)
        gradients = collect(model, "xy")
        for rows in parts:
            assert recorded.losses_and_gradients(rows, steps, weights) is not None
        assert_close(collect(model, "xy"), gradients, 1e-2)
        for name in "xy":
            for _, parameter in model.adapter_parameters(name):
                parameter.data.mul_(1.5)
    # of every layer and both adapters at once
    assert len(recorded._casts._made) == (casts if recompute == "none" else 0)
    assert max(map(len, recorded.sums._stacks)) == 6  # queries, keys and values of both
    assert copied == elsewhere


def left(computed):
    return [tensor for own in computed for tensor in (*own.losses, *own.router_logits.values())]


def test_gradients_of_several_sizes_add_up(monkeypatch) -> None:
    monkeypatch.setattr(attention, "_varlen", by_offsets)
    model = multi("llama")
    model.add_adapter("x", VARIANTS["mixlora"])
    awaken(model)
    model.train()
    recorded, weights = Rerun(model), {"x": inputs.Weights(0.05, 0.7)}
    parts = [{"x": draw_rows("x", count, seed)} for count, seed in ((5, 1), (11, 2), (4, 3), (12, 4))]
    for part in parts:  # an ordinary micro-batch comes between
        ordinary(model, part, {"x": 4}, weights)
    expected = collect(model, ["x"])
    for part in (parts[0], parts[1]):
        recorded.losses_and_gradients(part, {"x": 1}, weights)
    collect(model, ["x"])
    for number, part in enumerate(parts):
        if number == 2:
            ordinary(model, part, {"x": 4}, weights)
        else:
            assert recorded.losses_and_gradients(part, {"x": 4}, weights) is not None
    assert len(recorded._recorded) >= 2
    assert_close(collect(model, ["x"]), expected, 2e-5)
    alone = recorded.losses_and_gradients(parts[3], {"x": 4}, weights)
    assert alone is not None and alone["x"].losses.loss.isfinite()
    recorded.forget()
    assert recorded.losses_and_gradients(parts[2], {"x": 4}, weights) is not None


def test_batches_of_a_training_share_graphs(monkeypatch) -> None:
    """Where recording costs more than filling up, one graph serves them all; what fits into none has its own."""
    monkeypatch.setattr(attention, "_varlen", by_offsets)
    model = multi("llama")
    model.add_adapter("x", VARIANTS["lora"])
    awaken(model)
    model.train()
    parts = [{"x": draw_rows("x", count, seed)} for count, seed in ((5, 1), (11, 2), (7, 3))]
    recorded = Rerun(model, sizes.sizes_of(parts, model.num_parameters(None)))
    weights = {"x": inputs.Weights(0.05, 0.7)}
    for step, part in enumerate([*parts, {"x": draw_rows("x", 40, 4)}]):
        expected = ordinary(model, part, {"x": step}, weights)
        gradients = collect(model, part)
        found = recorded.losses_and_gradients(part, {"x": step}, weights)
        assert found is not None and found["x"].losses.loss.item() == pytest.approx(expected["x"][0], rel=2e-5)
        assert_close(collect(model, part), gradients, 2e-5)
        assert len(recorded._recorded) == (1 if step < 3 else 2)


def trained(monkeypatch, made, variant="mixlora", **settings):
    """Train a mixture and its neighbour; return losses, their tensors and what was seen of the routers, by step."""
    monkeypatch.setattr(attention, "_varlen", by_offsets)
    monkeypatch.setattr(trainer, "graphs_for", lambda model, *_: made and made(model))
    model = multi("llama")
    jobs = []
    for name, count in (("x", 7), ("y", 12)):
        samples = [Sample(row.input_ids, row.labels, "t") for row in draw_rows(name, count, count)]
        model.add_adapter(name, VARIANTS[variant if name == "x" else "lora"])
        sizes = {"batch_size": 4, "micro_batch_size": 2, "num_epochs": 3, "lr": 1e-2} | settings
        jobs.append(Job(JobConfig(name=name, method=model.adapters[name], **sizes), samples, model, seed=1))
    losses, seen = [], {}

    def after(stepped):
        losses.extend(job.measured["loss"] for job in stepped)
        seen.update({j.step: (j.routing.tokens, j.routing.layers()) for j in stepped if j.routing is not None})
        return False

    trainer.train(model, jobs, None, after)
    return losses, {name: {key: t.clone() for key, t in model.adapter_tensors(name).items()} for name in "xy"}, seen


@pytest.mark.parametrize("variant", ["mixlora", "mixdora", "mola-balanced"])
def test_training_by_graphs_ends_where_ordinary_training_ends(monkeypatch, variant: str) -> None:
    (losses, ends, _), (replayed, others, _) = (trained(monkeypatch, made, variant) for made in (None, Rerun))
    assert losses == pytest.approx(replayed, rel=1e-5)
    assert_close(others, ends, 1e-4)


def test_r3_looking_at_routers_changes_no_step(monkeypatch) -> None:
    """A step whose routing is recorded is computed as any other, so how often it is makes no difference to the bits."""
    (_, seldom, few), (_, often, all_steps) = (trained(monkeypatch, Rerun, evaluate_steps=n) for n in (5, 1))
    assert list(few) == [5] and list(all_steps) == [1, 2, 3, 4, 5, 6]
    assert few[5] == all_steps[5]
    for name in "xy":
        assert all(torch.equal(tensor, often[name][key]) for key, tensor in seldom[name].items())


def test_graphs_leave_what_routers_saw(monkeypatch) -> None:
    (*_, expected), (*_, found) = (trained(monkeypatch, made, evaluate_steps=1) for made in (None, Rerun))
    for step, (tokens, layers) in expected.items():
        assert found[step][0] == tokens
        for one, other in zip(layers, found[step][1], strict=True):
            assert one["path"] == other["path"]
            for key in ("share", "probability", "entropy"):
                assert one[key] == pytest.approx(other[key], abs=1e-4), (step, key)


def test_what_cannot_be_recorded_is_named() -> None:
    model = multi("gemma2")
    assert "more to its logits" in str(graphs.Graphs(model).obstacle)
    assert "float32" in str(graphs.Graphs(multi("llama")).obstacle)
    assert "packed" in str(graphs.Graphs(multi("lfm2")).obstacle)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("variant", ["lora", "dora", "mixlora", "mixlora-dynamic", "loramoe-balanced", "mola-balanced"])
def test_replayed_graphs_equal_ordinary_steps(variant: str) -> None:
    model = multi("llama", num_attention_heads=4, head_dim=16)
    model.to("cuda")
    model.hf_model.to(torch.bfloat16)
    model.add_adapter("x", VARIANTS[variant])
    model.add_adapter("judge", METHODS["lora"](r=2, lora_dropout=0.2), num_labels=2)
    awaken(model)
    model.train()
    recorded = graphs.Graphs(model)
    for step in range(6):
        rows = {"x": draw_rows("x", 16, step), "judge": draw_rows("judge", 16, 10 + step, classes=True)}
        weights = {"x": inputs.Weights(0.05, 0.7), "judge": inputs.Weights(0.3, 1.0)}
        steps = {"x": step, "judge": 2 * step}
        assert recorded.suits(rows)
        expected = ordinary(model, rows, steps, weights)
        gradients = collect(model, rows)
        losses = recorded.losses_and_gradients(rows, steps, weights)
        assert losses is not None, "not recorded"
        for name in rows:
            assert losses[name].losses.loss.item() == pytest.approx(expected[name][0], rel=2e-2)
        assert_close(collect(model, rows), gradients, 6e-2)
        again = recorded.losses_and_gradients(rows, steps, weights)
        assert again is not None and again["x"].losses.loss.item() == pytest.approx(expected["x"][0], rel=2e-2)
        assert_close(collect(model, rows), gradients, 6e-2)
