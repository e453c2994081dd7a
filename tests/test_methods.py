"""What single methods promise beyond the laws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from mlora import Batch
from mlora.adapters import METHODS
from mlora.config import ConfigError, JobConfig, parse_adapter
from mlora.data import Sample
from mlora.model.errors import ModelError
from mlora.training.job import Job
from mlora.training.trainer import train
from tests.families import awaken, multi, rows


def steps(model, name: str, count: int = 3, **settings: object) -> Job:
    ids, mask = rows(count)
    samples = [
        Sample(tuple(r[m.bool()].tolist()), (-100, *r[m.bool()].tolist()[1:]), "t")
        for r, m in zip(ids, mask, strict=True)
    ]
    config = JobConfig(name=name, method=model.adapters[name], batch_size=1, num_epochs=1, lr=1e-2, **settings)
    job = Job(config, samples, model, seed=1)
    train(model, [job], None, lambda stepped: False)
    return job


@pytest.mark.parametrize(
    "method", [{"use_dora": True}, {"use_dora": True, "routing_strategy": "mixlora", "num_experts": 4}]
)
def test_doras_magnitude_is_trained_and_saved(method: dict, tmp_path: Path) -> None:
    model = multi()
    model.add_adapter("d", {"r": 4, **method})
    start = {k: t.clone() for k, t in model.adapter_tensors("d").items() if "magnitude" in k}
    assert len(start) == (14 if len(method) == 1 else 8 + 6 * 4)
    steps(model, "d")
    after = model.adapter_tensors("d")
    moved = [(after[k] - t).abs().max() > 1e-4 for k, t in start.items()]
    # an expert that no token chose keeps its magnitude
    assert all(moved) if len(method) == 1 else sum(moved) > len(moved) / 2
    model.save_adapter("d", tmp_path / "d")
    other = multi()
    other.load_adapter(tmp_path / "d")
    assert all(torch.equal(other.adapter_tensors("d")[k], t) for k, t in after.items())
    ids, mask = rows(4)
    assert torch.equal(other.logits(ids, mask, ["d"] * 4), model.logits(ids, mask, ["d"] * 4))


@pytest.mark.parametrize("capacity", [1, 3, 32])
def test_switch_evaluates_as_it_trains(capacity: int) -> None:
    model = multi()
    settings = {
        "routing_strategy": "mixlora-switch",
        "num_experts": 3,
        "expert_capacity": capacity,
        "jitter_noise": 0.0,
    }
    model.add_adapter("s", {"r": 4, "lora_dropout": 0.0, **settings})
    awaken(model)
    ids, mask = rows(4)
    batch = Batch.from_rows(ids, mask, None, ["s"] * 4)
    losses = []
    for mode in (True, False):
        model.train(mode)
        losses.append(model(batch)["s"].loss.item())
    labels = ids.masked_fill(mask == 0, -100)[:, 1:]
    logits = model.logits(ids, mask, ["s"] * 4)[:, :-1]
    losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item())
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-6)


def test_capacity_binds_and_counts_within_each_sequence() -> None:
    results = []
    ids, mask = rows(4)
    for capacity in (1, 32):
        model = multi()
        model.add_adapter(
            "s", {"r": 4, "routing_strategy": "mixlora-switch", "num_experts": 3, "expert_capacity": capacity}
        )
        awaken(model)
        results.append(model.logits(ids, mask, ["s"] * 4))
        alone = model.logits(ids[2:3], mask[2:3], ["s"])
        assert torch.allclose(alone[mask[2:3].bool()], results[-1][2:3][mask[2:3].bool()], atol=1e-5)
    assert (results[0] - results[1])[mask.bool()].abs().max() > 1e-2


def test_capacity_factor_is_a_share_of_the_longest_sequence() -> None:
    method = METHODS["mixlora-switch"](num_experts=8, capacity_factor=1.25)
    assert method.for_length(512).expert_capacity == 80 and method.for_length(512).capacity_factor is None
    model = multi()
    model.add_adapter("s", method)
    assert model.adapters["s"].expert_capacity == 10  # 64 positions / 8 * 1.25
    with pytest.raises(ConfigError, match="only one of"):
        parse_adapter({"routing_strategy": "mixlora-switch", "expert_capacity": 16, "capacity_factor": 1.0})


def test_loraplus_raises_the_rate_of_b_alone() -> None:
    model = multi()
    model.add_adapter("m", {"r": 4, "routing_strategy": "mixlora", "num_experts": 4, "use_dora": True})
    job = steps(model, "m", loraplus_lr_ratio=8.0)
    rates = {id(p): g["lr"] for g in job.optimizer.param_groups for p in g["params"]}
    for name, parameter in model.adapter_parameters("m"):
        expected = 8e-2 if name in ("lora_B", "lora_magnitude_vector") else 1e-2
        assert rates[id(parameter)] == pytest.approx(expected), name


@pytest.mark.parametrize(("routing", "top_k"), [("mixlora", 2), ("mixlora", 1), ("mixlora-switch", 1), ("mola", 2)])
def test_balance_loss_is_that_of_transformers(routing: str, top_k: int) -> None:
    model = multi()
    config = {"routing_strategy": routing, "num_experts": 4, "r": 4, "router_loss": True, "router_aux_loss_coef": 0.5}
    if routing == "mixlora-switch":
        config |= {"router_z_loss_coef": 0.0}
    else:
        config |= {"top_k": top_k}
    model.add_adapter("m", config)
    ids, mask = rows(5)
    out = model(Batch.from_rows(ids, mask, None, ["m"] * 5))["m"]
    expected = 0.5 * load_balancing_loss_func(tuple(out.router_logits.values()), 4, top_k)
    assert out.aux_loss.item() == pytest.approx(expected.item(), rel=1e-5)
    silent = multi()
    silent.add_adapter("m", config | {"router_loss": False})
    assert silent(Batch.from_rows(ids, mask, None, ["m"] * 5))["m"].aux_loss == 0


def test_uniform_top_p_keeps_everything_at_one_and_one_expert_at_nought() -> None:
    from mlora.ops import top_p_routing

    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    p = logits.softmax(-1)
    weights, experts = top_p_routing(logits, 1.0)
    assert torch.equal(weights, p.sort(-1, descending=True).values) and experts[0].tolist() == [0, 1, 2, 3]
    weights, _ = top_p_routing(logits, 1e-9)
    assert (weights > 0).sum(-1).tolist() == [1, 1]
    weights, _ = top_p_routing(logits, 0.7)  # 0.644, then 0.881 exceeds; 0.25, 0.5, 0.75
    assert (weights > 0).sum(-1).tolist() == [2, 3]
    weights, _ = top_p_routing(logits, 0.7, temperature=2.0)  # halved: 0.322, 0.440, 0.484, 0.5 never exceeds
    assert (weights > 0).sum(-1).tolist() == [4, 4] and weights[1, 0].item() == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("attention", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("mlp", {"gate_proj", "up_proj", "down_proj"}),
        (["v_proj", "up_proj"], {"v_proj", "up_proj"}),
        ({"v_proj": True, "up_proj": False}, {"v_proj"}),
    ],
)
def test_target_modules(targets: object, names: set[str]) -> None:
    model = multi()
    model.add_adapter("a", {"r": 2, "target_modules": targets})
    assert {path.rpartition(".")[2] for path in model._adapters["a"].tensors} == names
    with pytest.raises(ModelError, match="'dense' not in LlamaForCausalLM; its linear layers are down_proj"):
        model.add_adapter("b", {"r": 2, "target_modules": ["dense"]})
    assert list(model.adapters) == ["a"]


def test_activation_of_the_experts_can_be_another() -> None:
    found = []
    ids, mask = rows(3)
    for act_fn in (None, "silu", "gelu"):
        model = multi()
        model.add_adapter("m", {"routing_strategy": "mixlora", "num_experts": 2, "act_fn": act_fn})
        found.append(model.logits(ids, mask, ["m"] * 3))
    assert torch.equal(found[0], found[1]) and (found[0] - found[2])[mask.bool()].abs().max() > 1e-4
