"""Text to token ids, with the labels of training and the choices of scoring.

Where a prompt ends inside the whole text is read off the tokens: the longest prefix that the tokens of the prompt
alone and of the whole text share. Where the prompt's tokens are such a prefix, as with nearly every tokenizer, this
is lm-evaluation-harness's rule (`_encode_pair`), which moves trailing spaces of the prompt to the continuation; where
a tokenizer merges across the boundary, the tokens stay those of the whole text.

Truncation shortens from the left, never the answer, and keeps a leading BOS.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlora.data.errors import DataError
from mlora.tasks import Protocol, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LABEL = -100


@dataclass(frozen=True)
class Sample:
    """A training row.

    Attributes:
        input_ids: tokens.
        labels: the token id at each position that is to be predicted, -100 elsewhere; not shifted. The first is
            always -100, so a label never crosses from one row into the next of a packed stream. At least one is set,
            but in classification, where none is.
        task: name of the task that the row is of; "casual" for instruction data.
        truncated: whether the cutoff shortened the prompt.
        class_id: index of the row's class in classification.
        row: its number within the split of its task, or within its part of instruction data.
    """

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    task: str
    truncated: bool = False
    class_id: int | None = None
    row: int = 0


@dataclass(frozen=True)
class Span:
    """A part of a training text.

    Attributes:
        text: what it says.
        is_answer: whether its tokens are labels.
    """

    text: str
    is_answer: bool


@dataclass(frozen=True)
class EncodedQuestion:
    """A question as a model is scored on it.

    Attributes:
        prompt_ids: tokens that all choices follow; for letters also the leading tokens that the choices share.
        choice_ids: tokens of each choice after the prompt: exactly one for letters, all of them for log-likelihood;
            no choices in classification.
        unscored: how many leading tokens of each choice are read and not scored: those of its context.
        choice_characters: length of each choice's text in characters, without the leading space. lm-eval's acc_norm
            divides by this (and not by bytes, which is its acc_bytes; lm_eval/api/task.py, 0.4.13).
        answer: index of the right choice.
    """

    prompt_ids: tuple[int, ...]
    choice_ids: tuple[tuple[int, ...], ...]
    unscored: tuple[int, ...]
    choice_characters: tuple[int, ...]
    answer: int


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, add_bos: bool = True) -> list[int]:
    """Return the tokens of a text, with one BOS where the tokenizer adds one and no EOS that the text does not have."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=add_bos)
    if add_bos:
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        if len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos:
            ids = ids[1:]
        if ids and ids[-1] == eos and not text.endswith(str(tokenizer.eos_token)):
            ids = ids[:-1]
    return ids


def encode_spans(
    tokenizer: PreTrainedTokenizerBase,
    spans: Sequence[Span],
    cutoff_len: int,
    task: str,
    *,
    add_bos: bool = True,
    add_eos: bool = False,
    train_on_inputs: bool = False,
) -> Sample | None:
    """Return a training row whose labels are the tokens of its answers.

    Args:
        tokenizer: of the base model.
        spans: consecutive parts of the text.
        cutoff_len: tokens that may remain, > 0.
        task: name that the row is filed under.
        add_bos: let the tokenizer add its special tokens; a chat template writes them itself.
        add_eos: end with EOS, as a label.
        train_on_inputs: make every token a label.

    Returns:
        The row, or None where the last answer and one token before it do not fit into the cutoff, or nothing is
        left to predict.
    """
    whole = encode(tokenizer, "".join(span.text for span in spans), add_bos=add_bos)
    is_answer = [False] * len(whole)
    start, text, boundary = len(whole), "", 0
    for number, span in enumerate(spans):
        text += span.text
        last = number == len(spans) - 1
        end = len(whole) if last else len(common_prefix([encode(tokenizer, text, add_bos=add_bos), whole]))
        if span.is_answer:
            is_answer[boundary:end] = [True] * (end - boundary)
            start = boundary
        boundary = end
    if add_eos and tokenizer.eos_token_id is not None:
        whole, is_answer = [*whole, tokenizer.eos_token_id], [*is_answer, True]
    if train_on_inputs:
        is_answer = [True] * len(whole)
    return _cut(tokenizer, whole, is_answer, start, cutoff_len, task)


def encode_question(
    tokenizer: PreTrainedTokenizerBase, question: Question, cutoff_len: int, task: str, *, train_on_inputs: bool = False
) -> Sample | None:
    """Return a question with its right choice as a training row, without EOS; None where the choice does not fit.

    A question without choices is a row of classification.
    """
    if not question.choices:
        ids = encode(tokenizer, question.prompt.rstrip())
        kept = _keep(tokenizer, ids, cutoff_len) if ids else ()
        labels = (NO_LABEL,) * len(kept)
        return Sample(kept, labels, task, len(kept) < len(ids), question.answer) if kept else None
    context, choice = question.parts(question.answer)
    spans = (Span(context, False), Span(choice, True))
    return encode_spans(tokenizer, spans, cutoff_len, task, train_on_inputs=train_on_inputs)


def encode_choices(
    tokenizer: PreTrainedTokenizerBase, question: Question, protocol: Protocol, cutoff_len: int
) -> EncodedQuestion:
    """Return a question's tokens for scoring.

    Args:
        tokenizer: of the base model.
        question: prompt and choices.
        protocol: "letter" compares the choices' first differing tokens, "loglikelihood" all of them; in
            "classification" there are none.
        cutoff_len: tokens of the prompt and the longest choice that may remain, > 0.

    Raises:
        DataError: two letters have the same next token, or the prompt is empty, or a choice does not fit.
    """
    if protocol == "classification":
        ids = encode(tokenizer, question.prompt.rstrip())
        if not ids:
            raise DataError(f"the prompt has no token: {question.prompt[:60]!r}")
        return EncodedQuestion(_keep(tokenizer, ids, cutoff_len), (), (), (), question.answer)
    parts = [question.parts(number) for number in range(len(question.choices))]
    wholes = [encode(tokenizer, context + choice) for context, choice in parts]
    if protocol == "letter":
        prompt_ids = common_prefix(wholes)
        choice_ids = tuple(tuple(whole[len(prompt_ids) :][:1]) for whole in wholes)
        unscored = (0,) * len(wholes)
        _check_distinct(tokenizer, question, choice_ids)
    else:
        contexts = {context: encode(tokenizer, context) for context, _ in parts}
        read = [common_prefix([contexts[part[0]], whole]) for part, whole in zip(parts, wholes, strict=True)]
        prompt_ids = common_prefix(read)
        choice_ids = tuple(tuple(whole[len(prompt_ids) :]) for whole in wholes)
        unscored = tuple(len(ids) - len(prompt_ids) for ids in read)
        if not all(len(ids) > skipped for ids, skipped in zip(choice_ids, unscored, strict=True)):
            raise DataError(f"a choice of {question.choices} has no token of its own after {question.prompt[-40:]!r}")
    room = cutoff_len - max(map(len, choice_ids))
    if not prompt_ids and not all(unscored):
        raise DataError(f"the prompt has no token: {question.prompt[:60]!r}, {question.choices}")
    if room < bool(prompt_ids):
        raise DataError(
            f"a choice of {cutoff_len - room} tokens does not fit (cutoff_len {cutoff_len}): "
            f"{question.prompt[:60]!r}, {question.choices}"
        )
    # the text after the one-character delimiter
    characters = tuple(len(choice) - 1 for choice in question.choices)
    return EncodedQuestion(_keep(tokenizer, prompt_ids, room), choice_ids, unscored, characters, question.answer)


def common_prefix(sequences: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """Return the longest prefix that all sequences share."""
    prefix: list[int] = []
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        prefix.append(column[0])
    return tuple(prefix)


def _cut(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], is_answer: list[bool], start: int, cutoff_len: int, task: str
) -> Sample | None:
    """Drop tokens from the left, but for a BOS, if ids exceed the cutoff; the last answer begins at `start`."""
    excess = len(ids) - cutoff_len
    if excess > 0:
        if len(ids) - start + 1 > cutoff_len:
            return None
        head = 1 if ids[0] == tokenizer.bos_token_id else 0
        ids, is_answer = ids[:head] + ids[head + excess :], is_answer[:head] + is_answer[head + excess :]
    labels = [token if labelled else NO_LABEL for token, labelled in zip(ids, is_answer, strict=True)]
    labels[:1] = [NO_LABEL]
    if all(label == NO_LABEL for label in labels):
        return None
    return Sample(tuple(ids), tuple(labels), task, truncated=excess > 0)


def _keep(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], room: int) -> tuple[int, ...]:
    if len(ids) <= room:
        return tuple(ids)
    head = 1 if ids[0] == tokenizer.bos_token_id else 0
    return (*ids[:head], *ids[len(ids) - room + head :])


def _check_distinct(
    tokenizer: PreTrainedTokenizerBase, question: Question, choice_ids: Sequence[tuple[int, ...]]
) -> None:
    for number, ids in enumerate(choice_ids):
        if not ids:
            raise DataError(f"choice {question.choices[number]!r} is the beginning of all of {question.choices}")
        twin = choice_ids.index(ids)
        if twin != number:
            raise DataError(
                f"choices {question.choices[twin]!r} and {question.choices[number]!r} go on with the same token "
                f"({tokenizer.convert_ids_to_tokens(ids[0])!r}), so one token cannot tell them apart; "
                "score such a task by log-likelihood"
            )
