"""Continuations that share their prompt equal each after a prompt of its own."""

from __future__ import annotations

import random

import pytest
import torch

from mlora.adapters import METHODS
from mlora.model.branches import CELLS, Tree, pack
from mlora.model.multi import MultiAdapterModel
from tests.families import VOCABULARY, awaken, multi

FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 5},
    "gemma2": {"sliding_window": 4},
    "qwen3": {},
    "phi": {},
    "gpt_neox": {},
    "olmo2": {},
    "cohere": {},
    "glm4": {},
}


def trees(*adapters: str | None) -> list[Tree]:
    draw = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(3, VOCABULARY) for _ in range(count)]

    made = []
    for length, sizes in [(9, (3, 1, 4, 2)), (1, (2, 2)), (5, (1, 1)), (0, (4, 3)), (12, (6,)), (7, (2, 7, 1))]:
        branches = [tokens(size) for size in sizes]
        unscored = [draw.randrange(0 if length else 1, size) for size in sizes]
        made += [Tree(tokens(length), branches, unscored, adapter) for adapter in adapters]
    return made


def score(model: MultiAdapterModel, given: list[Tree]) -> tuple[list[float], list[bool]]:
    batch, targets = pack(given)
    own, greedy = model.log_likelihoods(batch, targets.positions, targets.tokens)
    assert sum(targets.counts) == len(own)
    return own.tolist(), greedy.tolist()


@pytest.mark.parametrize("cells", [0, 500, 10**6])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prompt_changes_nothing(family: str, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CELLS, "cpu", cells)
    model = multi(family, **FAMILIES[family])
    model.add_adapter("x", METHODS["lora"](r=4))
    model.add_adapter("m", METHODS["mixlora"](r=4, num_experts=4, router_init_range=0.5))
    awaken(model)
    given = trees("x", None, "m")
    batch, _ = pack(given)
    assert batch.branches is not None
    calls = len(batch.branches.blocks(None))
    assert calls == len(given) if cells == 0 else 1 < calls < len(given) if cells == 500 else calls == 1
    shared, greedy = score(model, given)
    apart, greedy_apart = score(model, [part for tree in given for part in tree.apart()])
    assert shared == pytest.approx(apart, abs=1e-5)
    assert greedy == greedy_apart


def test_equal_to_transformers_alone() -> None:
    model = multi("llama")
    given = trees(None)
    own, greedy = score(model, given)
    found = iter(zip(own, greedy, strict=True))
    for tree in given:
        for branch, unscored in zip(tree.branches, tree.unscored, strict=True):
            ids = torch.tensor([[*tree.prompt, *branch]])
            with torch.no_grad():
                logits = model.hf_model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0].double()
            for i in range(unscored, len(branch)):
                before = logits[len(tree.prompt) + i - 1]
                log_likelihood, is_greedy = next(found)
                assert log_likelihood == pytest.approx(before.log_softmax(-1)[branch[i]].item(), abs=1e-5)
                assert is_greedy == (before.argmax().item() == branch[i])
    assert next(found, None) is None


def test_a_prompt_is_packed_once_and_last_tokens_are_not_read() -> None:
    batch, targets = pack([Tree([3, 4, 5], [[6], [7, 8, 9], [10, 11]], (0, 0, 1))])
    assert batch.input_ids.tolist() == [[3, 4, 5, 7, 8, 10]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert targets.positions.tolist() == [2, 2, 3, 4, 5]
    assert targets.tokens.tolist() == [6, 7, 8, 9, 11]
    assert targets.counts == (1, 3, 1)
    assert batch.branches is not None
    ((_, mask),) = batch.branches.blocks(None)
    assert mask[0, 0, 5].tolist() == [True, True, True, False, False, True]
    ((_, windowed),) = batch.branches.blocks(2)
    assert windowed[0, 0, 5].tolist() == [False, False, True, False, False, True]


def test_what_counts_tokens_or_has_another_attention_shares_no_prompt() -> None:
    model = multi("llama")
    model.add_adapter("s", METHODS["mixlora-switch"](r=4, num_experts=2, expert_capacity=3))
    model.add_adapter("m", METHODS["mixlora"](r=4, num_experts=2))
    assert [model.shares_prompts(name) for name in ("s", "m", None)] == [False, True, True]
    model.hf_model.set_attn_implementation("sdpa")
    assert not model.shares_prompts("m")
