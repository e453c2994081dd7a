"""GLUE (https://arxiv.org/abs/1804.07461), answered by a classification head.

As in the published m-LoRA (https://github.com/TUDB-Labs/mLoRA, tasks/glue_tasks.py), the model reads the bare sentence
or both sentences, and the classes are those of the columns. It joins the tokens of two sentences, which leaves nothing
between them where a tokenizer adds no BOS; here a line break parts them, on every tokenizer. Metrics are GLUE's own;
the published test labels are hidden, so results are those of the validation split.
"""

from __future__ import annotations

from collections.abc import Callable

from mlora.tasks import fields
from mlora.tasks.base import Question, Row, Source, register

ENTAILMENT = ("entailment", "not_entailment")

_ROWS = {
    "cola": (8_551, 1_043),
    "mnli": (392_702, 9_815),
    "mrpc": (3_668, 408),
    "qnli": (104_743, 5_463),
    "qqp": (363_846, 40_430),
    "rte": (2_490, 277),
    "sst2": (67_349, 872),
    "wnli": (635, 71),
}
"""Published sizes of the splits that are trained on and evaluated on."""


def glue(
    subset: str,
    *texts: str,
    labels: tuple[str, ...],
    metrics: tuple[str, ...] = ("accuracy",),
    test: str = "validation",
) -> Callable[[Row], Question]:
    """Register a subset of GLUE as `glue:subset` and return its row function.

    Args:
        subset: its name on the hub.
        texts: columns that the model reads, a line each.
        labels: names of the classes, in the order of the numbers in the column "label".
        metrics: of the published benchmark.
        test: split that is evaluated on.
    """
    numbers = [str(number) for number in range(len(labels))]
    train_rows, test_rows = _ROWS[subset]
    source = Source("nyu-mll/glue", subset, test=test, train_rows=train_rows, test_rows=test_rows)

    @register(f"glue:{subset}", "classification", source, metrics=metrics, labels=labels)
    def build(row: Row) -> Question:
        prompt = "\n".join(fields.text(row, column).strip() for column in texts)
        return Question(prompt, (), fields.index(row, "label", numbers))

    return build


cola = glue("cola", "sentence", labels=("unacceptable", "acceptable"), metrics=("matthews_correlation",))
mnli = glue(
    "mnli", "premise", "hypothesis", labels=("entailment", "neutral", "contradiction"), test="validation_matched"
)
mrpc = glue("mrpc", "sentence1", "sentence2", labels=("not_equivalent", "equivalent"), metrics=("accuracy", "f1"))
qnli = glue("qnli", "question", "sentence", labels=ENTAILMENT)
qqp = glue("qqp", "question1", "question2", labels=("not_duplicate", "duplicate"), metrics=("accuracy", "f1"))
rte = glue("rte", "sentence1", "sentence2", labels=ENTAILMENT)
sst2 = glue("sst2", "sentence", labels=("negative", "positive"))
wnli = glue("wnli", "sentence1", "sentence2", labels=("not_entailment", "entailment"))
