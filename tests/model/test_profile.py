"""Router profiles count what routers do, as a slow count of every token does."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from mlora.adapters import METHODS
from mlora.model.batch import Batch, Row
from mlora.model.profile import RouterProfile
from tests.families import multi

ROUTED = ["mixlora", "mixlora-dynamic", "mixlora-switch", "loramoe", "mola"]


@pytest.mark.parametrize("method", ROUTED)
def test_a_profile_equals_a_slow_count(method: str) -> None:
    model = multi("llama")
    model.add_adapter("x", METHODS[method](r=2, num_experts=4, router_init_range=1.0))
    draw = torch.Generator().manual_seed(1)
    profile, kept = RouterProfile(model.adapters["x"]), []
    for length in (7, 3):
        ids = torch.randint(3, 100, (length,), generator=draw).tolist()
        logits = model(Batch.pack([Row(ids, ids, "x")]))["x"].router_logits
        profile.add(logits)
        kept.append(logits)
    layers = profile.layers()
    assert profile.tokens == 10 and [layer["path"] for layer in layers] == list(kept[0])
    assert {layer["layer"] for layer in layers} == {0, 1}
    for layer in layers:
        chosen, entropies = Counter[int](), []
        for logits in kept:
            for row in logits[layer["path"]].softmax(-1).tolist():
                ranked = sorted(range(4), key=lambda e: -row[e])
                count = {"mixlora": 2, "mola": 2}.get(method, 1)
                if method == "mixlora-dynamic":
                    count = next(n for n in range(1, 5) if sum(row[e] for e in ranked[:n]) > 0.8)
                chosen.update(ranked[:count])
                entropies.append(-sum(p * math.log(p) for p in row) / math.log(4))
        total = sum(chosen.values())
        assert layer["share"] == pytest.approx([chosen[e] / total for e in range(4)], abs=1e-5)
        assert layer["dead"] == [e for e in range(4) if not chosen[e]]
        assert layer["entropy"] == pytest.approx(sum(entropies) / 10, abs=1e-4)
        assert layer["balance"] == pytest.approx(
            -sum(c / total * math.log(c / total) for c in chosen.values()) / math.log(4), abs=1e-4
        )
        assert sum(layer["probability"]) == pytest.approx(1, abs=1e-4)


def test_adapters_without_routers_have_none() -> None:
    model = multi("llama")
    model.add_adapter("x", METHODS["lora"](r=2))
    profile = RouterProfile(model.adapters["x"])
    profile.add(model(Batch.pack([Row([1, 2, 3], [1, 2, 3], "x")]))["x"].router_logits)
    assert profile.layers() == []
