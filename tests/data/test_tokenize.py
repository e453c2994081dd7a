"""Where the prompt ends, what is a label, what the cutoff takes, what is scored."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from mlora.data import NO_LABEL, DataError, Sample, encode_choices, encode_question
from mlora.data.tokenize import Span, common_prefix, encode, encode_spans
from mlora.tasks import Question

QUESTION = Question("Is it so?\nAnswer:", (" A", " B"), 1)
ABC = Question("Which? (A) x (B) y (C) z\nAnswer:", (" A", " B", " C"), 2)
Tok = PreTrainedTokenizerBase


def labelled(tokenizer: Tok, sample: Sample | None) -> str:
    assert sample is not None
    assert len(sample.input_ids) == len(sample.labels)
    assert sample.labels[0] == NO_LABEL
    kept = [(token, label) for token, label in zip(sample.input_ids, sample.labels, strict=True) if label != NO_LABEL]
    assert all(token == label for token, label in kept)
    return tokenizer.decode([label for _, label in kept])


def test_only_the_answer_is_a_label(smollm2: Tok) -> None:
    sample = encode_question(smollm2, QUESTION, 64, "t")
    assert labelled(smollm2, sample) == " B"
    assert sample is not None
    assert smollm2.decode(sample.input_ids) == "Is it so?\nAnswer: B"
    assert (sample.task, sample.truncated) == ("t", False)


def test_train_on_inputs_labels_all_but_the_first_token(smollm2: Tok) -> None:
    sample = encode_question(smollm2, QUESTION, 64, "t", train_on_inputs=True)
    assert sample is not None
    assert sample.labels == (NO_LABEL, *sample.input_ids[1:])


@pytest.mark.parametrize("name", ["characters", "merging", "closing"])
def test_bos_once_and_no_eos(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    for text in ("abc", "<s>abc"):
        assert tokenizer.convert_ids_to_tokens(encode(tokenizer, text)) == ["<s>", "a", "b", "c"]
    assert encode(tokenizer, "a</s>")[-1] == tokenizer.eos_token_id
    sample = encode_question(tokenizer, QUESTION, 64, "t")
    assert sample is not None
    assert sample.input_ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in sample.input_ids


def test_boundary_is_lm_evals_where_the_prompt_is_a_prefix(smollm2: Tok) -> None:
    for prompt in ("Q: why?\nA:", "ends with a space ", "ends with a line\n"):
        question = Question(prompt, (" because", " two words", " 12"), 0)
        found = encode_choices(smollm2, question, "loglikelihood", 64)
        stripped = prompt.rstrip()
        context = smollm2.encode(stripped)
        wholes = [smollm2.encode(prompt + choice) for choice in question.choices]
        assert found.prompt_ids == tuple(context)
        assert found.choice_ids == tuple(tuple(whole[len(context) :]) for whole in wholes)
        assert found.choice_characters == (7, 9, 2)


def test_a_token_across_the_boundary_belongs_to_the_answer(merging: Tok) -> None:
    question = Question("So:", (" A", " B"), 0)
    sample = encode_question(merging, question, 64, "t")
    assert sample is not None
    assert merging.convert_ids_to_tokens(sample.input_ids) == ["<s>", "S", "o", ": A"]
    assert [label != NO_LABEL for label in sample.labels] == [False, False, False, True]
    scored = encode_choices(merging, question, "letter", 64)
    assert merging.convert_ids_to_tokens(scored.prompt_ids) == ["<s>", "S", "o"]
    assert [merging.convert_ids_to_tokens(ids) for ids in scored.choice_ids] == [[": A"], [":"]]


def test_letters_share_their_leading_tokens_with_the_prompt(characters: Tok, smollm2: Tok) -> None:
    scored = encode_choices(characters, ABC, "letter", 64)
    assert characters.convert_ids_to_tokens(scored.prompt_ids)[-2:] == [":", " "]
    assert [characters.decode(ids) for ids in scored.choice_ids] == ["A", "B", "C"]
    assert scored.answer == 2
    scored = encode_choices(smollm2, ABC, "letter", 64)
    assert [smollm2.decode(ids) for ids in scored.choice_ids] == [" A", " B", " C"]
    assert smollm2.decode(scored.prompt_ids) == ABC.prompt


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ((" 1", " 12"), "is the beginning of all"),
        ((" 11", " 12", " 2"), "go on with the same token"),
        ((" A", " A"), "is the beginning of all"),
    ],
)
def test_letters_that_one_token_cannot_tell_apart(characters: Tok, choices: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        encode_choices(characters, Question("Q:", choices, 0), "letter", 64)


def test_loglikelihood_keeps_whole_choices_and_counts_characters(characters: Tok) -> None:
    scored = encode_choices(characters, Question("Q:", (" no", " nobody"), 0), "loglikelihood", 64)
    assert [characters.decode(ids).replace(" ", "") for ids in scored.choice_ids] == ["no", "nobody"]
    assert scored.choice_characters == (2, 6)
    assert encode_choices(characters, Question("Q:", (" é", " ü"), 0), "loglikelihood", 64).choice_characters == (1, 1)


@pytest.mark.parametrize("cutoff_len", range(1, 30))
def test_truncation_takes_the_prompt_from_the_left_and_never_the_answer(characters: Tok, cutoff_len: int) -> None:
    question = Question("0123456789:", (" abc", " x"), 0)
    sample = encode_question(characters, question, cutoff_len, "t")
    if cutoff_len < 5:
        assert sample is None
        return
    assert sample is not None
    assert len(sample.input_ids) == min(cutoff_len, 16)
    assert sample.input_ids[0] == characters.bos_token_id
    assert characters.convert_ids_to_tokens([x for x in sample.labels if x != NO_LABEL]) == [" ", "a", "b", "c"]
    assert sample.truncated == (cutoff_len < 16)
    scored = encode_choices(characters, question, "loglikelihood", cutoff_len)
    # What is trained on is what is scored.
    assert scored.prompt_ids + scored.choice_ids[0] == sample.input_ids


def test_a_choice_beyond_the_cutoff_cannot_be_scored(characters: Tok) -> None:
    with pytest.raises(DataError, match="a choice of 4 tokens does not fit .cutoff_len 4."):
        encode_choices(characters, Question("Q:", (" abc", " x"), 0), "loglikelihood", 4)


def test_an_empty_prompt_cannot_be_scored(smollm2: Tok) -> None:
    with pytest.raises(DataError, match="the prompt has no token"):
        encode_choices(smollm2, Question("", (" yes", " no"), 0), "letter", 64)


def test_spans_label_every_answer_and_the_eos(characters: Tok) -> None:
    spans = [Span("a:", False), Span("bc", True), Span("d:", False), Span("ef", True)]
    sample = encode_spans(characters, spans, 64, "t", add_eos=True)
    assert sample is not None
    kept = [x for x in sample.labels if x != NO_LABEL]
    assert characters.convert_ids_to_tokens(kept) == ["b", "c", "e", "f", "</s>"]
    assert sample.input_ids[-1] == characters.eos_token_id


def test_nothing_to_predict_is_no_sample(characters: Tok, smollm2: Tok) -> None:
    assert encode_spans(smollm2, [Span("one", True)], 64, "t", train_on_inputs=True) is None
    assert encode_spans(characters, [Span("abc", False)], 64, "t") is None


def test_common_prefix() -> None:
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == (1, 2)
    assert common_prefix([[1], [2]]) == ()
