"""What left the predecessor's adapters at chance with its own commands, each of it impossible here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from mlora.data import NO_LABEL, encode_choices, encode_question, load_training_samples
from mlora.model.batch import IGNORED, Batch, Row
from mlora.tasks import TASKS, Protocol
from tests.tasks.rows import ARC, ROWS

Tok = PreTrainedTokenizerBase
SCORED: list[tuple[Protocol, str]] = [key for key in TASKS if key[0] != "classification"]


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_neither_padding_nor_prompt_is_a_target_whatever_the_neighbours(tmp_path: Path, smollm2: Tok) -> None:
    """Its labels were the padded ids, and padding went to the longest row of any adapter."""
    long = {**ARC, "question": "word " * 200}
    short, neighbour = load_training_samples("arc-e", write(tmp_path / "t.jsonl", ARC, long), smollm2, 512)
    alone = Batch.pack([Row(short.input_ids, short.labels, "a")])
    beside = Batch.pack([Row(short.input_ids, short.labels, "a"), Row(neighbour.input_ids, neighbour.labels, "b")])
    assert smollm2.decode(alone.targets[alone.targets != IGNORED]) == " C"
    length = len(short.input_ids)
    assert torch.equal(beside.targets[:length], alone.targets)
    assert beside.input_ids.shape[1] == length + len(neighbour.input_ids)
    padded = torch.tensor([[*short.input_ids, *[smollm2.eos_token_id] * 9]])
    mask = (torch.arange(padded.shape[1]) < length)[None].long()
    assert Batch.from_rows(padded, mask, adapters=["a"]).input_ids.shape[1] == length


@pytest.mark.parametrize(("protocol", "name"), SCORED)
def test_the_cutoff_takes_the_prompt_and_leaves_the_answer(protocol: Protocol, name: str, characters: Tok) -> None:
    """It cut from the right: what was trained on had lost its answer."""
    question = TASKS[protocol, name].build(ROWS[name])
    whole = encode_question(characters, question, 4096, name)
    assert whole is not None
    trained = [label for label in whole.labels if label != NO_LABEL]
    cut = encode_question(characters, question, len(trained) + 9, name)
    assert cut is not None and cut.truncated and len(cut.input_ids) == len(trained) + 9
    assert [label for label in cut.labels if label != NO_LABEL] == trained
    assert list(cut.input_ids[-len(trained) :]) == trained
    asked = encode_choices(characters, question, protocol, 4096)
    room = max(map(len, asked.choice_ids)) + 9
    short = encode_choices(characters, question, protocol, room)
    assert short.choice_ids == asked.choice_ids and len(short.prompt_ids) == 9
    assert short.prompt_ids[-8:] == asked.prompt_ids[-8:]  # behind a BOS, where there is one


def test_an_answer_s_end_is_trained_on(tmp_path: Path, smollm2: Tok) -> None:
    """It had no end token, so its adapters never stopped; neither did the cutoff leave one."""
    data = write(tmp_path / "t.jsonl", {"instruction": "Say it. " * 99, "output": "it"})
    for cutoff_len in (32, 512):
        (sample,) = load_training_samples("casual", data, smollm2, cutoff_len)
        assert sample.labels[-1] == sample.input_ids[-1] == smollm2.eos_token_id


@pytest.mark.parametrize("tokenizer", ["smollm2", "characters"])
@pytest.mark.parametrize(("protocol", "name"), SCORED)
def test_what_is_trained_on_is_what_is_scored(
    protocol: Protocol, name: str, tokenizer: str, request: pytest.FixtureRequest
) -> None:
    """It scored the last token of a label: with some tokenizers the end token, or a digit that all labels share."""
    tok = request.getfixturevalue(tokenizer)
    question = TASKS[protocol, name].build(ROWS[name])
    sample, scored = encode_question(tok, question, 4096, name), encode_choices(tok, question, protocol, 4096)
    assert sample is not None
    right, unscored = scored.choice_ids[scored.answer], scored.unscored[scored.answer]
    read = len(scored.prompt_ids) + unscored
    assert sample.input_ids[: len(scored.prompt_ids) + len(right)] == scored.prompt_ids + right
    assert sample.labels[read : read + len(right) - unscored] == right[unscored:]
    first = [ids[skipped:] for ids, skipped in zip(scored.choice_ids, scored.unscored, strict=True)]
    assert len(set(first)) == len(first) or question.contexts
