"""Scoring questions, rows of several adapters packed into one forward.

letter: the logits after the prompt, of the options' own tokens only; the largest is the answer.
loglikelihood: the summed log-probability of each choice; the largest is the answer (acc), or the largest divided by
the choice's length in characters (acc_norm), as lm-evaluation-harness has it.
classification: the logits of the adapter's own head; the largest is the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch

from mlora.data import EncodedQuestion
from mlora.model.batch import IGNORED, Batch, Row
from mlora.model.branches import Tree, pack
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
        scores: of each choice, or of each label in classification: a logit, or a log-likelihood.
        chosen: index of the largest score.
        chosen_by_length: index of the largest score per character of the choice; None but for log-likelihoods.
    """

    scores: tuple[float, ...]
    chosen: int
    chosen_by_length: int | None = None

    def answer(self, metric: str) -> int:
        """Return the index that a metric takes for the model's answer."""
        if metric != "acc_norm":
            return self.chosen
        if self.chosen_by_length is None:
            raise ValueError("acc_norm needs log-likelihoods")
        return self.chosen_by_length


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
    for predictions in in_batches(requests, batch_size, partial(_SCORERS[protocol], model)):
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
        predictions.append(Prediction(scores, _largest(scores)))
    return predictions


def _log_likelihoods(model: MultiAdapterModel, requests: Sequence[Request]) -> list[Prediction]:
    questions = [r.question for r in requests]
    trees = [Tree(q.prompt_ids, q.choice_ids, q.unscored, r.adapter) for q, r in zip(questions, requests, strict=True)]
    predictions = []
    for question, found in zip(questions, log_likelihoods(model, trees), strict=True):
        scores = tuple(score for score, _ in found)
        normed = [score / length for score, length in zip(scores, question.choice_characters, strict=True)]
        predictions.append(Prediction(scores, _largest(scores), _largest(normed)))
    return predictions


def _classes(model: MultiAdapterModel, requests: Sequence[Request]) -> list[Prediction]:
    prompts = [Row(r.question.prompt_ids, [IGNORED] * len(r.question.prompt_ids), r.adapter) for r in requests]
    batch = Batch.pack(prompts, device=model.device)
    own = model.class_logits(batch)
    logits = [row for span in batch.spans for row in own[str(span.adapter)].tolist()]
    by_request = dict(zip(batch.order, logits, strict=True))
    return [Prediction(tuple(by_request[i]), _largest(by_request[i])) for i in range(len(requests))]


def log_likelihoods(model: MultiAdapterModel, trees: Sequence[Tree]) -> list[list[tuple[float, bool]]]:
    """Return each branch's summed log-likelihood after its prompt, and whether it is what greedy decoding says.

    Args:
        model: that holds the adapters.
        trees: of any adapters; each prompt is computed once for all of its branches, where that changes nothing.
    """
    parts = [part for t in trees for part in ([t] if model.shares_prompts(t.adapter) else t.apart())]
    batch, targets = pack(parts, model.device)
    own, greedy = model.log_likelihoods(batch, targets.positions, targets.tokens)
    sums = [part.sum().item() for part in own.double().cpu().split(targets.counts)]
    alike = [bool(part.all()) for part in greedy.cpu().split(targets.counts)]
    branches = iter(zip(sums, alike, strict=True))
    return [list(islice(branches, len(tree.branches))) for tree in trees]


def _largest(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


_SCORERS: dict[Protocol, Callable[[MultiAdapterModel, Sequence[Request]], list[Prediction]]] = {
    "letter": _letters,
    "loglikelihood": _log_likelihoods,
    "classification": _classes,
}
