"""Prompts, choices and answers of every task, on real rows and on invented ones."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from mlora.config.names import subfolder
from mlora.data.sources import task_rows
from mlora.tasks import TASKS, Protocol, Question, RowError, find_task, known_tasks
from tests.tasks.rows import ARC, ROWS

ABCD = (" A", " B", " C", " D")
# The first row of the published evaluation split in the published prompt form.
FIRST_LETTER_QUESTIONS = {
    "arc-e": Question(
        "Please choose the correct answer to the question: Which statement best explains why photosynthesis is the "
        "foundation of most food webs? (A) Sunlight is the source of energy for nearly all ecosystems. (B) Most "
        "ecosystems are found on land instead of in water. (C) Carbon dioxide is more available than other gases. "
        "(D) The producers in all ecosystems are plants.\nAnswer:",
        ABCD,
        0,
    ),
    "obqa": Question(
        "Please choose the correct answer to the question: A person wants to start saving money so that they can "
        "afford a nice vacation at the end of the year. After looking over their budget and expenses, they decide the "
        "best way to save money is to (A) make more phone calls (B) quit eating lunch out (C) buy less with monopoly "
        "money (D) have lunch with friends\nAnswer:",
        ABCD,
        1,
    ),
    "boolq": Question(
        "Please answer the following question with true or false: does ethanol take more energy make that produces?"
        "\nAnswer:",
        (" true", " false"),
        1,
    ),
    "piqa": Question(
        "Below is a common task along with two possible solutions labeled (A) and (B). Please select the appropriate "
        "solution to achieve the task:\nHow do I ready a guinea pig cage for it's new occupants?\n\n(A) Provide the "
        "guinea pig with a cage full of a few inches of bedding made of ripped paper strips, you will also need to "
        "supply it with a water bottle and a food dish.\n(B) Provide the guinea pig with a cage full of a few inches "
        "of bedding made of ripped jeans material, you will also need to supply it with a water bottle and a food "
        "dish.\n\nCorrect solution:",
        (" A", " B"),
        0,
    ),
    "siqa": Question(
        "Please choose the correct answer to the question.\nQuestion: Tracy didn't go home that evening and resisted "
        "Riley's attacks. What does Tracy need to do before this?\n(A) make a new plan\n(B) Go home and see Riley\n"
        "(C) Find somewhere to go\nAnswer:",
        (" A", " B", " C"),
        2,
    ),
    "hellaswag": Question(
        "Please choose the correct ending to complete the given sentence.\nSentence: Roof shingle removal. A man is "
        "sitting on a roof. he\n(A) is using wrap to wrap a pair of skis.\n(B) is ripping level tiles off.\n(C) is "
        "holding a rubik's cube.\n(D) starts pulling up roofing on a roof.\nAnswer:",
        ABCD,
        3,
    ),
    "winogrande": Question(
        "Please choose the correct answer to fill in the blank to complete the given sentence.\nSentence: Sarah was a "
        "much better surgeon than Maria so _ always got the easier cases.\n(A) Sarah\n(B) Maria\nAnswer:",
        (" A", " B"),
        1,
    ),
}
# As lm-evaluation-harness 0.4.13 renders its templates on the same rows.
FIRST_LOGLIKELIHOOD_QUESTIONS = {
    "arc_easy": Question(
        "Question: Which statement best explains why photosynthesis is the foundation of most food webs?\nAnswer:",
        (
            " Sunlight is the source of energy for nearly all ecosystems.",
            " Most ecosystems are found on land instead of in water.",
            " Carbon dioxide is more available than other gases.",
            " The producers in all ecosystems are plants.",
        ),
        0,
    ),
    "openbookqa": Question(
        "A person wants to start saving money so that they can afford a nice vacation at the end of the year. After "
        "looking over their budget and expenses, they decide the best way to save money is to",
        (
            " make more phone calls",
            " quit eating lunch out",
            " buy less with monopoly money",
            " have lunch with friends",
        ),
        1,
    ),
    "social_iqa": Question(
        "Q: Tracy didn't go home that evening and resisted Riley's attacks. What does Tracy need to do before this?"
        "\nA:",
        (" make a new plan", " Go home and see Riley", " Find somewhere to go"),
        2,
    ),
}


def questions(shared: Path, name: str, protocol: Protocol) -> list[Question]:
    task = find_task(name, protocol)
    return [task.build(row.values) for row in task_rows(task, str(subfolder(shared / "data", name)), "test")]


@pytest.mark.parametrize(("task", "expected"), FIRST_LETTER_QUESTIONS.items())
def test_first_published_row_has_the_published_prompt(shared: Path, task: str, expected: Question) -> None:
    assert questions(shared, task, "letter")[0] == expected


@pytest.mark.parametrize(("task", "expected"), FIRST_LOGLIKELIHOOD_QUESTIONS.items())
def test_first_published_row_has_the_harness_s_prompt(shared: Path, task: str, expected: Question) -> None:
    assert questions(shared, task, "loglikelihood")[0] == expected


def test_every_published_arc_row_has_the_options_it_names(shared: Path) -> None:
    found = questions(shared, "arc-e", "letter") + questions(shared, "arc-c", "letter")
    assert Counter(len(q.choices) for q in found) == {4: 2268 + 97 + 1144 + 21, 3: 7 + 3 + 1, 5: 4 + 3}
    assert {q.choices for q in found} == {(" A", " B", " C"), ABCD, (*ABCD, " E")}


GLUE = {
    "glue:cola": ("The sailors rode the breeze clear of the rocks.", "acceptable"),
    "glue:mrpc": (
        "He said the foodservice pie business doesn 't fit the company 's long-term growth strategy .\n\" The "
        "foodservice pie business does not fit our long-term growth strategy .",
        "equivalent",
    ),
    "glue:rte": (
        "Dana Reeve, the widow of the actor Christopher Reeve, has died of lung cancer at age 44, according to the "
        "Christopher Reeve Foundation.\nChristopher Reeve had an accident.",
        "not_entailment",
    ),
    "glue:sst2": ("it 's a charming and often affecting journey .", "positive"),
}
"""The first published row of the evaluation split, and its class."""


@pytest.mark.parametrize("task", GLUE)
def test_glue_shows_the_bare_sentences(shared: Path, task: str) -> None:
    row = next(iter(task_rows(find_task(task), str(shared / "data" / task.replace(":", "-")), "test")))
    prompt, label = GLUE[task]
    assert find_task(task).build(row.values) == Question(prompt, (), find_task(task).labels.index(label))


@pytest.mark.parametrize("task", [name for name in known_tasks() if name.startswith("glue:")])
def test_invented_row_of_glue(task: str) -> None:
    question, row = find_task(task).build(ROWS[task]), ROWS[task]
    texts = [value.strip() for value in row.values() if isinstance(value, str)]
    assert question == Question("\n".join(texts), (), row["label"])
    # as in GLUE's test split, whose labels are hidden
    with pytest.raises(RowError, match="field 'label' is -1, expected one of 0, 1"):
        find_task(task).build(row | {"label": -1})


RIGHT = {
    "letter": {"boolq": "true", "pubmedqa": "yes", "winogrande": "A", "piqa": "A", "siqa": "A", "hellaswag": "B"},
    "loglikelihood": {
        "boolq": "yes",
        "winogrande": "shook.",
        "piqa": "Turn the lid",
        "social_iqa": "glad",
        "hellaswag": "whisks it.",
    },
}


@pytest.mark.parametrize(("protocol", "name"), [key for key in TASKS if key[0] in RIGHT])
def test_invented_row(protocol: Protocol, name: str) -> None:
    question = TASKS[protocol, name].build(ROWS[name])
    assert all(choice.startswith(" ") and choice.strip() for choice in question.choices)
    right = RIGHT[protocol].get(name, "C" if protocol == "letter" else "a leaf")
    assert question.choices[question.answer] == f" {right}"


def test_winogrande_s_fillers_are_read_and_what_follows_them_is_scored() -> None:
    question = find_task("winogrande", "loglikelihood").build(ROWS["winogrande"])
    assert [question.parts(i) for i in (0, 1)] == [
        ("The cup fell off the desk as desk", " shook."),
        ("The cup fell off the desk as cup", " shook."),
    ]


def test_hellaswag_loses_wikihow_s_marks() -> None:
    row = {
        "activity_label": "Home",
        "ctx_a": "[header] How to sit [title] Find a chair.",
        "ctx_b": "",
        "endings": ["[step] Sit  down.", "[substeps] Stand up. [title] Run."],
        "label": "0",
    }
    question = find_task("hellaswag", "loglikelihood").build(row)
    assert question.prompt == "Home: How to sit. Find a chair."
    assert question.choices == ("  Sit down.", "  Stand up.. Run.")


def test_boolq_reads_both_published_columns() -> None:
    row = {"passage": "Leaves are green.", "question": "is a leaf green"}
    task = find_task("boolq", "loglikelihood")
    assert task.build({**row, "label": 1}) == task.build({**row, "answer": True})
    assert task.build({**row, "label": 0}) == task.build({**row, "answer": "false"})
    assert task.build({**row, "label": 0}).answer == 0


def test_numbers_become_letters() -> None:
    numbered = {**ARC, "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "3"}
    question = find_task("arc-e").build(numbered)
    assert question.prompt.endswith("? (A) x (B) y (C) z\nAnswer:")
    assert (question.choices, question.answer) == ((" A", " B", " C"), 2)


def test_pubmedqa_shows_sections_and_not_the_long_answer() -> None:
    prompt = find_task("pubmedqa").build(ROWS["pubmedqa"]).prompt
    assert prompt.endswith(
        "Question:\nDoes salt raise blood pressure?\nContext:\n(METHODS) Salt was given.\n(RESULTS) It rose.\nAnswer:"
    )


def test_cells_of_a_csv_file_are_read_as_the_hub_types() -> None:
    assert find_task("piqa").build({**ROWS["piqa"], "label": "1"}).answer == 1
    assert find_task("boolq").build({**ROWS["boolq"], "answer": "false"}).answer == 1
    nested = '{"text": ["x", "y"], "label": ["A", "B"]}'
    assert find_task("arc-e").build({**ARC, "choices": nested, "answerKey": "B"}).answer == 1


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("arc-e", {"answerKey": "F"}, "field 'answerKey' is 'F', expected one of A, B, C, D"),
        ("csqa", {"answerKey": ""}, "field 'answerKey' is '', expected one of"),
        ("arc-e", {"question": None}, "field 'question' is missing; there are id, question"),
        ("arc-e", {"question": "  "}, "field 'question' is empty"),
        ("arc-e", {"question": "half \ud800"}, "not valid Unicode"),
        (
            "arc-e",
            {"choices": {"text": ["a", "b"], "label": ["A"]}},
            "field 'choices' has 2 in 'text' but 1 in 'label'",
        ),
        ("arc-e", {"choices": {"text": ["a", "b"], "label": ["A", "A"]}}, "has a label twice"),
        ("arc-e", {"choices": {"text": ["a"], "label": ["A"]}}, "has 1 options, expected two or more"),
        ("arc-e", {"choices": {"label": ["A", "B"]}}, "field 'choices.text' is missing"),
        ("arc-e", {"choices": {"text": ["a", 3], "label": ["A", "B"]}}, "field 'choices.text[1]' is 3, expected text"),
        ("arc-e", {"choices": "nothing"}, "expected a nested value or its JSON"),
        ("hellaswag", {"label": "4"}, "field 'label' is '4', expected one of 0, 1, 2, 3"),
        ("siqa", {"label": "0"}, "field 'label'"),
        ("boolq", {"answer": "perhaps"}, "field 'answer' is 'perhaps', expected one of true, false"),
        ("piqa", {"label": -1}, "field 'label' is -1"),
    ],
)
def test_an_unusable_row_names_its_field(task: str, change: dict[str, object], message: str) -> None:
    with pytest.raises(RowError) as raised:
        find_task(task).build({**ROWS[task], **change})
    assert message in str(raised.value)
