"""Scoring multiple-choice questions, rows of several adapters packed into one forward.

letter: the logits after the prompt, of the options' own tokens only; the largest is the answer.
loglikelihood: the summed log-probability of each choice; the largest is the answer (acc), or the largest divided by
the choice's length in characters (acc_norm), as lm-evaluation-harness has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from mlora.data import EncodedQuestion
from mlora.model.batch import IGNORED, Batch, Row
from mlora.model.memory import in_batches
from mlora.model.multi import MultiAdapterModel
from mlora.tasks import Protocol


@dataclass(frozen=True)
class Request:
    """One question put to one adapter.

    Attributes:
        adapter: name; None for the plain base model.
        question: encoded for its protocol.
    """

    adapter: str | None
    question: EncodedQuestion


@dataclass(frozen=True)
class Prediction:
    """What a model makes of a question.

    Attributes:
        scores: of each choice: a logit, or a log-likelihood.
        correct: by metric, whether the answer is the right one.
    """

    scores: tuple[float, ...]
    correct: dict[str, bool]


def predict(
    model: MultiAdapterModel, requests: Sequence[Request], protocol: Protocol, batch_size: int
) -> Iterator[Prediction]:
    """Yield the prediction of each request, in order.

    Args:
        model: in evaluation, whatever its mode: nothing here drops out.
        requests: rows; neighbours and batch size change no prediction.
        protocol: how to score.
        batch_size: questions in one forward, fewer where memory does not suffice.
    """
    score = _letters if protocol == "letter" else _log_likelihoods
    for predictions in in_batches(requests, batch_size, partial(score, model)):
        yield from predictions


def _letters(model: MultiAdapterModel, requests: Sequence[Request]) -> list[Prediction]:
    prompts = [r.question.prompt_ids for r in requests]
    batch = Batch.pack(
        [Row(ids, [IGNORED] * len(ids), r.adapter) for r, ids in zip(requests, prompts, strict=True)],
        device=model.device,
    )
    ends = torch.tensor(batch.lengths, device=model.device).cumsum(0) - 1
    options = max(len(r.question.choice_ids) for r in requests)
    tokens = [[ids[0] for ids in requests[i].question.choice_ids] for i in batch.order]
    padded = torch.tensor([row + row[:1] * (options - len(row)) for row in tokens], device=model.device)
    logits = model.score(batch, ends, padded).tolist()
    by_request = dict(zip(batch.order, logits, strict=True))
    predictions = []
    for i, request in enumerate(requests):
        scores = tuple(by_request[i][: len(request.question.choice_ids)])
        predictions.append(Prediction(scores, {"accuracy": _largest(scores) == request.question.answer}))
    return predictions


def _log_likelihoods(model: MultiAdapterModel, requests: Sequence[Request]) -> list[Prediction]:
    rows = [
        Row(
            (*r.question.prompt_ids, *ids),
            [IGNORED] * (len(r.question.prompt_ids) + skipped) + list(ids[skipped:]),
            r.adapter,
        )
        for r in requests
        for ids, skipped in zip(r.question.choice_ids, r.question.unscored, strict=True)
    ]
    batch = Batch.pack(rows, device=model.device)
    sums, _ = model.log_likelihoods(batch)
    by_row = dict(zip(batch.order, sums.tolist(), strict=True))
    predictions, first = list[Prediction](), 0
    for request in requests:
        question = request.question
        scores = tuple(by_row[first + i] for i in range(len(question.choice_ids)))
        first += len(scores)
        normed = [score / length for score, length in zip(scores, question.choice_characters, strict=True)]
        correct = {"acc": _largest(scores) == question.answer, "acc_norm": _largest(normed) == question.answer}
        predictions.append(Prediction(scores, correct))
    return predictions


def _largest(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)
