"""Evaluating adapters on tasks: each task's rows once through the model for all adapters that want it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from mlora.evaluation.questions import Examination, Library, QuestionSet, by_questions
from mlora.evaluation.score import Prediction, Request, predict
from mlora.model.errors import ModelError
from mlora.model.multi import MultiAdapterModel
from mlora.model.profile import RouterProfile
from mlora.parallel import ALONE, Ranks
from mlora.tasks import METRICS, find_task

Conditions = dict[str, str | None]


@dataclass(frozen=True)
class Result:
    """One number of the results table.

    Attributes:
        adapter: name; `BASE` for the plain base model.
        task, version, protocol, metric: what was measured.
        value: a share between 0 and 1; a Matthews correlation between -1 and 1.
        standard_error: of the value; None for a single row, and where the metric is undefined.
        n: rows.
        limit: rows that the evaluation was limited to; None where it was not, or there are fewer.
        date: ISO 8601, UTC.
        chance: the value of whoever guesses; None where the metric has none.
        conditions: what else the value depends on; results are comparable where these are equal.
    """

    adapter: str
    task: str
    version: int
    protocol: str
    metric: str
    value: float
    standard_error: float | None
    n: int
    limit: int | None
    date: str
    chance: float | None = None
    conditions: Conditions = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


BASE = "base model"
"""What results call the plain base model: no adapter can have a name with a blank."""


@dataclass(frozen=True)
class Outcome:
    """All that an examination brings.

    Attributes:
        examination: that was held.
        questions: that were asked.
        predictions: for each of them.
        results: one for each metric of the task.
        routing: what the adapter's routers did; None where it has none.
    """

    examination: Examination
    questions: QuestionSet
    predictions: Sequence[Prediction]
    results: Sequence[Result]
    routing: RouterProfile | None


def check_heads(model: MultiAdapterModel, examinations: Iterable[Examination]) -> None:
    """Refuse tasks that an adapter's classification head is not for, or that need one which is not there.

    Raises:
        ModelError: of the first such adapter.
    """
    for examination in examinations:
        task, name = find_task(examination.task, examination.protocol), examination.adapter
        labels = None if name is None else model.num_labels(name)
        if (labels or 0) != len(task.labels):
            has = "no classification head" if labels is None else f"a classification head of {labels} labels"
            needs = f"one of {len(task.labels)} labels" if task.labels else "none"
            raise ModelError(f"{BASE if name is None else name} has {has}; the task {task.name} needs {needs}")
        trained = None if name is None else model.adapter_module(name).head_task
        if trained is not None and trained != task.name:
            raise ModelError(f"{name} has a classification head for {trained}, not for {task.name}")


def conditions(model: MultiAdapterModel, adapter: str | None, rows: str) -> Conditions:
    """Return what a result depends on besides task and metric.

    base_model and precision are what the model was loaded as, adapter a digest of the adapter's settings and tensors.

    Args:
        model: that holds the adapter.
        adapter: name; None for the plain base model.
        rows: what tells the questions from others, a digest of them as the tokenizer and the cutoff leave them.
    """
    quantised = getattr(model.hf_model.config, "quantization_config", None)
    revision = model.origin.revision
    return {
        "base_model": model.origin.given if revision is None else f"{model.origin.given}@{revision}",
        "precision": str(model.hf_model.dtype).removeprefix("torch.") + (" quantised" if quantised else ""),
        "adapter": None if adapter is None else _digest(model, adapter),
        "rows": rows,
    }


def _digest(model: MultiAdapterModel, adapter: str) -> str:
    digest = hashlib.sha256(model.adapters[adapter].as_saved().model_dump_json().encode())
    for name, tensor in sorted(model.adapter_tensors(adapter).items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def evaluate(
    model: MultiAdapterModel,
    examinations: Sequence[Examination],
    cutoff_len: int,
    simultaneously: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[Result]:
    """Yield every result as soon as it exists; see `examine`."""
    library = Library(model.tokenizer, cutoff_len)
    for outcome in examine(model, examinations, library, simultaneously, progress):
        yield from outcome.results


def examine(
    model: MultiAdapterModel,
    examinations: Sequence[Examination],
    library: Library,
    simultaneously: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    known: Callable[[Examination, Conditions], bool] | None = None,
    ranks: Ranks = ALONE,
) -> Iterator[Outcome]:
    """Yield the outcome of every examination as soon as it exists.

    Adapters that are evaluated on the same rows of a task share its forwards; which do, changes no result. Nor does
    it which ranks answer which questions.

    Args:
        model: that holds the adapters.
        examinations: what to evaluate.
        library: that has the questions.
        simultaneously: adapters in one forward; None for all.
        progress: called with the task, the rows done and the rows in all.
        known: whether an examination need not be held, because its results under these conditions are there; the
            same on all ranks.
        ranks: that share the questions; every one yields all outcomes.

    Raises:
        ModelError: an adapter's classification head is not for a task.
    """
    check_heads(model, examinations)
    for group in by_questions(examinations):
        questions = library.questions(group[0])
        wanted = [(e, conditions(model, e.adapter, questions.digest)) for e in group]
        wanted = [pair for pair in wanted if known is None or not known(*pair)]
        size = len(wanted) if simultaneously is None else simultaneously
        for start in range(0, len(wanted), size or 1):
            together = dict(wanted[start : start + size])
            report = None if progress is None else lambda done, all, task=group[0].task: progress(task, done, all)
            yield from _examine_together(model, together, questions, report, ranks)


def _examine_together(
    model: MultiAdapterModel,
    group: dict[Examination, Conditions],
    questions: QuestionSet,
    progress: Callable[[int, int], None] | None,
    ranks: Ranks,
) -> Iterator[Outcome]:
    asked = range(len(questions.encoded))

    def answers() -> tuple[list[Prediction], dict[str, RouterProfile]]:
        """Return this rank's predictions, question by question, and what the routers did."""
        requests = [Request(e.adapter, questions.encoded[i]) for i in ranks.share(asked) for e in group]
        found = []
        with model.profiling() as profiles:
            for prediction in predict(model, requests, questions.task.protocol, sum(e.batch_size for e in group)):
                found.append(prediction)
                if progress is not None and len(found) % len(group) == 0:
                    progress(min(len(found) // len(group) * ranks.count, len(asked)), len(asked))
        return found, profiles if ranks.count == 1 else {name: own.on_cpu() for name, own in profiles.items()}

    parts = ranks.all_done(answers)
    for number, (examination, under) in enumerate(group.items()):
        own = [parts[i % ranks.count][0][i // ranks.count * len(group) + number] for i in asked]
        routing = None
        for _, profiles in parts:
            profile = None if examination.adapter is None else profiles.get(examination.adapter)
            if routing is None:
                routing = profile
            elif profile is not None:
                routing.merge(profile)
        yield Outcome(examination, questions, own, _results(examination, questions, own, under), routing)


def _results(
    examination: Examination, questions: QuestionSet, predictions: Sequence[Prediction], under: Conditions
) -> list[Result]:
    task, date = questions.task, datetime.now(UTC).isoformat(timespec="seconds")
    fewer = examination.on_bad_row == "error" and len(questions.encoded) != examination.limit
    limit = None if fewer else examination.limit
    results = []
    for metric in task.metrics:
        score = METRICS[metric]([prediction.answer(metric) for prediction in predictions], questions.answers)
        results.append(
            Result(
                adapter=BASE if examination.adapter is None else examination.adapter,
                task=task.name,
                version=task.version,
                protocol=task.protocol,
                metric=metric,
                value=score.value,
                standard_error=score.stderr,
                n=score.n,
                limit=limit,
                date=date,
                chance=questions.chance(metric),
                conditions=under,
            )
        )
    return results
