"""Tasks answered by a letter or a word, as the MixLoRA paper evaluates them (https://arxiv.org/abs/2404.15159).

Prompt forms are word for word those of the published m-LoRA (https://github.com/TUDB-Labs/mLoRA, tasks/qa_tasks.py),
so that results can be compared; options are lettered in the row's order whatever it calls them, and only those that
the row has are choices.
"""

from __future__ import annotations

from string import ascii_uppercase

from mlora.tasks import fields
from mlora.tasks.base import Question, Row, RowError, Source, register

ACCURACY = ("accuracy",)
ARC_E = Source("allenai/ai2_arc", "ARC-Easy", validation="validation", train_rows=2251, test_rows=2376)
ARC_C = Source("allenai/ai2_arc", "ARC-Challenge", validation="validation", train_rows=1119, test_rows=1172)
OBQA = Source("allenai/openbookqa", "main", validation="validation", train_rows=4957, test_rows=500)
CSQA = Source("tau/commonsense_qa", test="validation", train_rows=9741, test_rows=1221)
BOOLQ = Source("google/boolq", test="validation", train_rows=9427, test_rows=3270)
PIQA = Source("baber/piqa", test="validation", train_rows=16113, test_rows=1838)
SIQA = Source("lighteval/siqa", test="validation", train_rows=33410, test_rows=1954)
HELLASWAG = Source("Rowan/hellaswag", test="validation", train_rows=39905, test_rows=10042)
WINOGRANDE = Source("allenai/winogrande", "winogrande_debiased", test="validation", train_rows=9248, test_rows=1267)
PUBMEDQA = Source(
    "qiaojin/PubMedQA",
    "pqa_labeled",
    test="train",
    train_subset="pqa_artificial",
    train_rows=211269,
    test_rows=1000,
)
PLEASE_CHOOSE = "Please choose the correct answer to the question: "


def lettered(head: str, options: tuple[str, ...], separator: str, tail: str, answer: int) -> Question:
    """Return head, then each option as separator + "(A) text", then tail; the choices are " A", " B", ..."""
    if len(options) > len(ascii_uppercase):
        raise RowError("choices", f"has {len(options)} options, expected at most {len(ascii_uppercase)}")
    body = "".join(f"{separator}({letter}) {text}" for letter, text in zip(ascii_uppercase, options, strict=False))
    return Question(head + body + tail, tuple(f" {letter}" for letter in ascii_uppercase[: len(options)]), answer)


@register("arc-e", "letter", ARC_E, metrics=ACCURACY)
@register("arc-c", "letter", ARC_C, metrics=ACCURACY)
@register("csqa", "letter", CSQA, metrics=ACCURACY)
def arc(row: Row) -> Question:
    """A science or common-sense question with three to five options."""
    options, answer = fields.options(row)
    return lettered(PLEASE_CHOOSE + fields.text(row, "question"), options, " ", "\nAnswer:", answer)


@register("obqa", "letter", OBQA, metrics=ACCURACY)
def obqa(row: Row) -> Question:
    """The beginning of a sentence, or a question, with four options."""
    options, answer = fields.options(row)
    return lettered(PLEASE_CHOOSE + fields.text(row, "question_stem"), options, " ", "\nAnswer:", answer)


@register("boolq", "letter", BOOLQ, metrics=ACCURACY)
def boolq(row: Row) -> Question:
    """A yes-or-no question; the passage is not shown."""
    prompt = f"Please answer the following question with true or false: {fields.text(row, 'question')}?\nAnswer:"
    return Question(prompt, (" true", " false"), fields.index(row, "answer", ("true", "false")))


@register("piqa", "letter", PIQA, metrics=ACCURACY)
def piqa(row: Row) -> Question:
    """An everyday goal and two ways to reach it."""
    head = (
        "Below is a common task along with two possible solutions labeled (A) and (B)."
        f" Please select the appropriate solution to achieve the task:\n{fields.text(row, 'goal')}\n"
    )
    solutions = (fields.text(row, "sol1"), fields.text(row, "sol2"))
    return lettered(head, solutions, "\n", "\n\nCorrect solution:", fields.index(row, "label", ("0", "1")))


@register("siqa", "letter", SIQA, metrics=ACCURACY)
def siqa(row: Row) -> Question:
    """A social situation and a question about it."""
    head = (
        "Please choose the correct answer to the question.\n"
        f"Question: {fields.text(row, 'context')} {fields.text(row, 'question')}"
    )
    answers = tuple(fields.text(row, f"answer{letter}") for letter in "ABC")
    return lettered(head, answers, "\n", "\nAnswer:", fields.index(row, "label", ("1", "2", "3")))


@register("hellaswag", "letter", HELLASWAG, metrics=ACCURACY)
def hellaswag(row: Row) -> Question:
    """The beginning of a description and four ways to go on."""
    head = (
        "Please choose the correct ending to complete the given sentence.\n"
        f"Sentence: {fields.text(row, 'activity_label')}. {fields.text(row, 'ctx')}"
    )
    endings = fields.texts(row, "endings")
    return lettered(head, endings, "\n", "\nAnswer:", fields.index(row, "label", [str(i) for i in range(len(endings))]))


@register("winogrande", "letter", WINOGRANDE, metrics=ACCURACY)
def winogrande(row: Row) -> Question:
    """A sentence with a blank and two fillers."""
    head = (
        "Please choose the correct answer to fill in the blank to complete the given sentence.\n"
        f"Sentence: {fields.text(row, 'sentence')}"
    )
    fillers = (fields.text(row, "option1"), fields.text(row, "option2"))
    return lettered(head, fillers, "\n", "\nAnswer:", fields.index(row, "answer", ("1", "2")))


@register("pubmedqa", "letter", PUBMEDQA, metrics=ACCURACY)
def pubmedqa(row: Row) -> Question:
    """A medical question with the sections of an abstract.

    The published form also trains on the long answer, which is not there at evaluation; here both see one prompt.
    """
    sections = fields.sections(row, "context")
    prompt = (
        "Instruction:\nPlease answer the following question with yes or no "
        "based on your medical knowledge and the following context.\n"
        f"Question:\n{fields.text(row, 'question')}\nContext:\n"
    )
    prompt += "".join(f"({label}) {text}\n" for label, text in sections) + "Answer:"
    answers = ("yes", "no", "maybe")
    return Question(prompt, tuple(f" {answer}" for answer in answers), fields.index(row, "final_decision", answers))
