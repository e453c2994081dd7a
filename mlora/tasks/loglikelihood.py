"""Tasks scored by log-likelihood, with the names, prompts and splits of lm-evaluation-harness 0.4.13.

Source: https://github.com/EleutherAI/lm-evaluation-harness, lm_eval/tasks/{arc,openbookqa,siqa}. acc takes the choice
of the largest summed log-probability, acc_norm divides it by the choice's length in characters first.
"""

from __future__ import annotations

from mlora.tasks import fields
from mlora.tasks.base import Question, Row, Source, register

BOTH = ("acc", "acc_norm")
ARC_EASY = Source("allenai/ai2_arc", "ARC-Easy", validation="validation")
ARC_CHALLENGE = Source("allenai/ai2_arc", "ARC-Challenge", validation="validation")
OPENBOOKQA = Source("allenai/openbookqa", "main", validation="validation")


def spaced(options: tuple[str, ...]) -> tuple[str, ...]:
    """Return the options as continuations."""
    return tuple(f" {option}" for option in options)


@register("arc_easy", "loglikelihood", ARC_EASY, metrics=BOTH)
@register("arc_challenge", "loglikelihood", ARC_CHALLENGE, metrics=BOTH)
def arc(row: Row) -> Question:
    """A science question; the options are not shown."""
    options, answer = fields.options(row)
    return Question(f"Question: {fields.text(row, 'question')}\nAnswer:", spaced(options), answer)


@register("openbookqa", "loglikelihood", OPENBOOKQA, metrics=BOTH)
def openbookqa(row: Row) -> Question:
    """The bare beginning of a sentence, continued by each option."""
    options, answer = fields.options(row)
    return Question(fields.text(row, "question_stem"), spaced(options), answer)


@register("social_iqa", "loglikelihood", Source("lighteval/siqa", test="validation"), metrics=("acc",))
def social_iqa(row: Row) -> Question:
    """A social situation and a question about it."""
    answers = tuple(fields.text(row, f"answer{letter}") for letter in "ABC")
    prompt = f"Q: {fields.text(row, 'context')} {fields.text(row, 'question')}\nA:"
    return Question(prompt, spaced(answers), fields.index(row, "label", ("1", "2", "3")))
