"""Which forward of a training has the most tokens."""

from __future__ import annotations

import pytest
import torch

from mlora.adapters import METHODS
from mlora.config import JobConfig
from mlora.model.multi import MultiAdapterModel
from mlora.training.job import Job, build_optimizer, optimizer_bytes
from mlora.training.order import Order, heaviest
from mlora.training.trainer import train
from tests.families import multi
from tests.training.test_promises import samples

LORA = METHODS["lora"](r=2)
CONFIGS = [
    JobConfig(name="a", method=LORA, batch_size=6, micro_batch_size=2, num_epochs=2),
    JobConfig(name="b", method=LORA, batch_size=4, micro_batch_size=2, num_epochs=1),
    JobConfig(name="c", method=LORA, batch_size=3, micro_batch_size=3, num_epochs=3, group_by_length=True),
]


@pytest.mark.parametrize("together", [1, 2, None])
def test_the_heaviest_forward_is_the_one_of_a_training(together: int | None, monkeypatch) -> None:
    rows = [samples(count, seed) for count, seed in ((13, 1), (9, 2), (7, 3))]
    expected = heaviest([Order(config, own, 5) for config, own in zip(CONFIGS, rows, strict=True)], together)
    model = multi()
    for config in CONFIGS:
        model.add_adapter(config.name, config.method)
    seen = []
    forward = MultiAdapterModel.forward

    def note(self, batch):
        seen.append({span.adapter: span.lengths for span in batch.spans})
        return forward(self, batch)

    monkeypatch.setattr(MultiAdapterModel, "forward", note)
    jobs = [Job(config, own, model, seed=5) for config, own in zip(CONFIGS, rows, strict=True)]
    assert [job.order.forwards(job.micro_batch_size) for job in jobs] == [2 * (3 + 3 + 1), 2 + 2 + 1, 3 * 3]
    train(model, jobs, together, lambda stepped: False)
    heaviest_seen = max(seen, key=lambda lengths: sum(map(sum, lengths.values())))
    assert {name: tuple(len(r.input_ids) for r in own) for name, own in expected.items()} == heaviest_seen


@pytest.mark.parametrize("settings", [{}, {"optim": "sgd"}, {"optim": "sgd", "momentum": 0.9}], ids=str)
def test_what_an_optimizer_keeps(settings: dict) -> None:
    config = JobConfig(name="a", method=LORA, **settings)
    parameters = [("lora_A", torch.nn.Parameter(torch.zeros(50, 40))), ("lora_B", torch.nn.Parameter(torch.zeros(30)))]
    optimizer = build_optimizer(config, LORA, parameters)
    for _, parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor) and t.ndim]
    assert optimizer_bytes(config, 2030) == sum(t.nbytes for t in kept)
