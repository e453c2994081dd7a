"""Tasks scored by log-likelihood, with the names, prompts and splits of lm-evaluation-harness 0.4.13.

Source: https://github.com/EleutherAI/lm-evaluation-harness, lm_eval/tasks/{arc,openbookqa,piqa,siqa,hellaswag,
winogrande,super_glue/boolq}. acc takes the choice of the largest summed log-probability, acc_norm divides it by the
choice's length in characters first.
"""

from __future__ import annotations

import re

from mlora.tasks import fields
from mlora.tasks.base import Question, Row, RowError, Source, register
from mlora.tasks.letter import ARC_C, ARC_E, HELLASWAG, OBQA, PIQA, SIQA

ACC = ("acc",)
BOTH = ("acc", "acc_norm")
BOOLQ = Source("aps/super_glue", "boolq", test="validation", train_rows=9427, test_rows=3270)
WINOGRANDE = Source("allenai/winogrande", "winogrande_xl", test="validation", train_rows=40398, test_rows=1267)


def spaced(*options: str) -> tuple[str, ...]:
    """Return the options as continuations."""
    return tuple(f" {option}" for option in options)


@register("arc_easy", "loglikelihood", ARC_E, metrics=BOTH, data_set="arc-e")
@register("arc_challenge", "loglikelihood", ARC_C, metrics=BOTH, data_set="arc-c")
def arc(row: Row) -> Question:
    """A science question; the options are not shown."""
    options, answer = fields.options(row)
    return Question(f"Question: {fields.text(row, 'question')}\nAnswer:", spaced(*options), answer)


@register("openbookqa", "loglikelihood", OBQA, metrics=BOTH, data_set="obqa")
def openbookqa(row: Row) -> Question:
    """The bare beginning of a sentence, continued by each option."""
    options, answer = fields.options(row)
    return Question(fields.text(row, "question_stem"), spaced(*options), answer)


@register("social_iqa", "loglikelihood", SIQA, metrics=ACC, data_set="siqa")
def social_iqa(row: Row) -> Question:
    """A social situation and a question about it."""
    answers = (fields.text(row, f"answer{letter}") for letter in "ABC")
    prompt = f"Q: {fields.text(row, 'context')} {fields.text(row, 'question')}\nA:"
    return Question(prompt, spaced(*answers), fields.index(row, "label", ("1", "2", "3")))


@register("piqa", "loglikelihood", PIQA, metrics=BOTH)
def piqa(row: Row) -> Question:
    """An everyday goal, continued by each of two ways to reach it."""
    solutions = spaced(fields.text(row, "sol1"), fields.text(row, "sol2"))
    return Question(f"Question: {fields.text(row, 'goal')}\nAnswer:", solutions, fields.index(row, "label", ("0", "1")))


@register("boolq", "loglikelihood", BOOLQ, metrics=ACC)
def boolq(row: Row) -> Question:
    """A passage and a yes-or-no question about it.

    The harness reads SuperGLUE's copy, whose passages begin with their title and whose label is a number; rows of
    google/boolq have neither, and their results differ a little.
    """
    prompt = f"{fields.text(row, 'passage')}\nQuestion: {fields.text(row, 'question')}?\nAnswer:"
    published = "label" in row
    answer = fields.index(row, "label", ("0", "1")) if published else fields.index(row, "answer", ("false", "true"))
    return Question(prompt, spaced("no", "yes"), answer)


@register("hellaswag", "loglikelihood", HELLASWAG, metrics=BOTH)
def hellaswag(row: Row) -> Question:
    """The beginning of a description, continued by each of four ways to go on."""
    second = fields.text(row, "ctx_b", blank=True).capitalize()
    prompt = without_marks(f"{fields.text(row, 'activity_label')}: {fields.text(row, 'ctx_a')} {second}")
    endings = spaced(*map(without_marks, fields.texts(row, "endings")))
    return Question(prompt, endings, fields.index(row, "label", [str(i) for i in range(len(endings))]))


@register("winogrande", "loglikelihood", WINOGRANDE, metrics=ACC)
def winogrande(row: Row) -> Question:
    """A sentence with a blank: what follows the blank is scored, after each of two fillers."""
    before, blank, after = fields.text(row, "sentence").partition("_")
    if not blank or not after.strip():
        raise RowError("sentence", "has no blank, written _, that words follow")
    fillers = (fields.text(row, "option1"), fields.text(row, "option2"))
    rest = f" {after.strip()}"
    return Question(before, (rest, rest), fields.index(row, "answer", ("1", "2")), fillers)


def without_marks(text: str) -> str:
    """Return a text of HellaSwag without the marks [header], [title], [step] that WikiHow's rows have."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
