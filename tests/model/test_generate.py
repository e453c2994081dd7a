"""Several adapters in one batch answer as each alone, drawn, streamed, stopped and cut off."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from mlora import ops
from mlora.model import generate
from mlora.model.errors import ModelError
from mlora.model.generate import Piece, complete, stream
from mlora.model.multi import MultiAdapterModel
from tests import tinybase
from tests.families import awaken

PROMPTS = ["one", "seventeen tokens?", "three", "x", "five is next", "seven"]
OWNERS = ["a", "m", None, "m", "a", "l"]


@pytest.fixture(scope="module", params=["llama", "gemma2", "qwen3", "phi3"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MultiAdapterModel:
    folder = tinybase.save(tmp_path_factory.mktemp(request.param), request.param)
    return with_adapters(MultiAdapterModel.from_pretrained(str(folder)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> MultiAdapterModel:
    folder = tinybase.save(tmp_path_factory.mktemp("llama"), max_position_embeddings=64)
    return with_adapters(MultiAdapterModel.from_pretrained(str(folder)))


def with_adapters(model: MultiAdapterModel) -> MultiAdapterModel:
    model.add_adapter("a", {"r": 4, "use_dora": True})
    model.add_adapter("l", {"r": 2, "target_modules": "attention"})
    model.add_adapter("m", {"routing_strategy": "mixlora", "num_experts": 4, "r": 4, "router_init_range": 0.5})
    model.add_adapter("s", {"routing_strategy": "mixlora-switch", "num_experts": 2, "r": 4, "expert_capacity": 5})
    awaken(model, std=0.5)
    return model


def test_layers_keep_what_they_make_of_adapters_for_one_generation(
    model: MultiAdapterModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DoRA, a smaller rank on fewer layers, a mixture and none, a row each; and the adapter after it has changed."""
    stacks, apply = [], ops.apply_stack
    monkeypatch.setattr(ops, "apply_stack", lambda stack, *rest: stacks.append(stack) or apply(stack, *rest))
    prompts, owners = PROMPTS[:4], ["a", "l", None, "m"]
    together = complete(model, prompts, owners, 10)
    layers = len(model.sites.layers)
    assert len({id(stack) for stack in stacks}) >= 2 * layers and len(stacks) >= 9 * len({id(s) for s in stacks})
    monkeypatch.setattr(type(model.scope), "keeping", nullcontext)  # every step anew
    assert together == complete(model, prompts, owners, 10)
    monkeypatch.undo()
    ups = [parameter for name, parameter in model.adapter_parameters("a") if name == "lora_B"]
    for parameter in ups:
        parameter.data.mul_(-1)
    try:
        assert complete(model, prompts, owners, 10)[0] != together[0]
    finally:
        for parameter in ups:
            parameter.data.mul_(-1)
    assert model.scope.kept is None and complete(model, prompts, owners, 10) == together


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": True, "seed": 3, "temperature": 1.5, "top_k": 40, "top_p": 0.95},
        {"num_beams": 3},
        {"do_sample": False, "repetition_penalty": 1.4},
    ],
    ids=["greedy", "drawn", "beams", "penalty"],
)
def test_a_row_does_not_depend_on_its_neighbours(model: MultiAdapterModel, settings: dict) -> None:
    prompts, owners = [*PROMPTS, "more than capacity"], [*OWNERS, "s"]
    together = complete(model, prompts, owners, 10, **settings)
    alone = [complete(model, [p], [o], 10, **settings)[0] for p, o in zip(prompts, owners, strict=True)]
    assert together == alone
    assert complete(model, PROMPTS[:1], ["m"], 10, **settings)[0] != alone[0]


def test_tokens_are_those_of_transformers(model: MultiAdapterModel) -> None:
    """The base's rows, padded among adapters' rows, equal transformers' own greedy search on the prompt alone."""
    found = complete(model, PROMPTS, [None, "a", None, "m", None, "l"], 12)
    for i in (0, 2, 4):
        ids = torch.tensor([model.tokenizer(PROMPTS[i])["input_ids"]])
        own = model.hf_model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        assert list(found[i].token_ids) == own[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "seed": 1}, {"num_beams": 2}, {"stop": ["e", "\x00b"]}])
def test_streamed_text_is_the_text(llama: MultiAdapterModel, settings: dict) -> None:
    prompts, owners = [*PROMPTS, "more"], [*OWNERS, "s"]
    whole = complete(llama, prompts, owners, 30, **settings)
    pieces = list(stream(llama, prompts, owners, 30, **settings))
    for row, completion in enumerate(whole):
        own = [piece for piece in pieces if piece.row == row]
        assert "".join(piece.text for piece in own) == completion.text
        assert tuple(piece.token for piece in own) == completion.token_ids
        assert [piece.finish for piece in own] == [None] * (len(own) - 1) + [completion.finish]


def test_tokens_are_streamed_before_the_last_is_known(llama: MultiAdapterModel) -> None:
    order = []
    complete(llama, ["a", "b"], ["a", None], 3, on_piece=lambda piece: order.append(piece.row), eos_token_id=2)
    assert order == [0, 1] * 3


def test_characters_of_several_tokens_come_whole(llama: MultiAdapterModel) -> None:
    from mlora.model.generate import _Row

    pieces: list[Piece] = []
    text = "né 日本 🙂 |END| not shown"
    row = _Row(0, [5], None, 100, 0, llama.tokenizer, frozenset({2}), ("|END|",), pieces.append)
    for token in llama.tokenizer(text, add_special_tokens=False)["input_ids"]:
        row.push(token)
    shown = [piece.text for piece in pieces]
    assert "".join(shown) == row.text == "né 日本 🙂 " and row.finish == "stop"
    assert "🙂" in shown and not any("\ufffd" in text or "|" in text for text in shown)


def test_a_seed_draws_alike_for_every_adapter_and_none_draws_anew(llama: MultiAdapterModel) -> None:
    drawn: dict[str, Any] = {"do_sample": True, "top_k": 0}
    again = [complete(llama, ["one"] * 2, [None, None], 12, seed=5, **drawn) for _ in range(2)]
    assert again[0] == again[1] and again[0][0] == again[0][1]
    assert complete(llama, ["one"], [None], 12, seed=6, **drawn)[0] != again[0][0]
    torch.manual_seed(0)
    free = complete(llama, ["one"] * 2, [None, None], 12, **drawn)
    assert free[0] != free[1]
    torch.manual_seed(0)
    assert complete(llama, ["one"] * 2, [None, None], 12, **drawn) == free


def test_drawn_tokens_follow_the_distribution_of_transformers(llama: MultiAdapterModel) -> None:
    """Frequencies over 4,000 draws against the probabilities after transformers' own temperature, top-k and top-p."""
    ids = llama.tokenizer("one")["input_ids"]
    settings = {"temperature": 0.7, "top_k": 6, "top_p": 0.9, "repetition_penalty": 1.2}
    asked = {**settings, "do_sample": True, "max_new_tokens": 1, "output_scores": True, "return_dict_in_generate": True}
    expected = llama.hf_model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), **asked)
    p = expected.scores[0][0].softmax(-1)
    found = complete(llama, [ids] * 4000, [None] * 4000, 1, do_sample=True, **settings)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in found]), minlength=len(p))
    assert (counts[p == 0] == 0).all() and 2 <= (p > 0).sum() <= 6
    assert ((counts / 4000 - p).abs() <= 4.5 * (p * (1 - p) / 4000).sqrt()).all()


def test_an_end_is_said(llama: MultiAdapterModel) -> None:
    plain = complete(llama, ["one"], ["a"], 8, eos_token_id=-1)[0]
    assert (plain.finish, len(plain.token_ids), plain.prompt_tokens) == ("length", 8, 3)
    third = plain.token_ids[2]
    first = plain.token_ids.index(third)
    ended = complete(llama, ["one"], ["a"], 8, eos_token_id=third)[0]
    assert ended.finish == "stop" and ended.token_ids == plain.token_ids[: first + 1]
    stopped = complete(llama, ["one", "three"], ["a", "m"], 8, stop=[plain.text[1:3]], eos_token_id=-1)[0]
    assert stopped.finish == "stop" and stopped.text == plain.text[:1]


def test_the_models_longest_sequence_is_kept(llama: MultiAdapterModel) -> None:
    long, short = complete(llama, ["x" * 60, "y"], ["a", "m"], 10, eos_token_id=-1)
    assert (len(long.token_ids), long.finish, len(short.token_ids)) == (4, "length", 10)
    with pytest.raises(ModelError, match="70 tokens.*at most 64"):
        complete(llama, ["x" * 70], [None], 1)


def test_leaving_a_stream_stops_it(llama: MultiAdapterModel) -> None:
    before = threading.active_count()
    pieces = stream(llama, ["one", "two"], ["a", None], 50, eos_token_id=-1)
    next(pieces)
    pieces.close()
    assert threading.active_count() == before
    stopped = complete(llama, ["one"], [None], 50, eos_token_id=-1, cancelled=iter([False, True]).__next__)[0]
    assert stopped.finish == "cancelled" and len(stopped.token_ids) == 1


def test_a_stream_raises_where_it_is_read(llama: MultiAdapterModel) -> None:
    with pytest.raises(ModelError, match="'nobody' is not loaded"):
        list(stream(llama, ["one"], ["nobody"], 4))


def test_a_stream_may_be_closed_by_its_own_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector runs in any thread, and closes a stream that nobody holds any more."""
    streams: list[Any] = []
    kept, closed = threading.Event(), threading.Event()

    def complete(*given: Any, on_piece: Any, cancelled: Any) -> None:
        on_piece("a token")
        assert kept.wait(10)
        streams.pop().close()
        closed.set()

    monkeypatch.setattr(generate, "complete", complete)
    streams.append(generate.stream(None, [], [], 1))
    assert next(streams[0]) == "a token"
    kept.set()
    assert closed.wait(10)
