"""One invented row of every task, in its published columns."""

from __future__ import annotations

from typing import Any

OPTIONS = {"text": ["a stone", "a cup", "a leaf", "a cloud"], "label": ["A", "B", "C", "D"]}
ARC = {"id": "1", "question": "What grows on a tree?", "choices": OPTIONS, "answerKey": "C"}
OBQA = {"id": "1", "question_stem": "On a tree grows", "choices": OPTIONS, "answerKey": "C"}
SIQA = {
    "context": "Ann sang.",
    "question": "How did Bo feel?",
    "answerA": "glad",
    "answerB": "sad",
    "answerC": "cold",
    "label": "1",
}

ROWS: dict[str, dict[str, Any]] = {
    "arc-e": ARC,
    "arc-c": ARC,
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "csqa": {**ARC, "question_concept": "tree"},
    "obqa": OBQA,
    "openbookqa": OBQA,
    "boolq": {"question": "is a leaf green", "answer": True, "passage": "Leaves are green."},
    "piqa": {"goal": "Open a jar", "sol1": "Turn the lid", "sol2": "Turn the table", "label": 0},
    "siqa": SIQA,
    "social_iqa": SIQA,
    "hellaswag": {
        "activity_label": "Cooking",
        "ctx_a": "A man cracks an egg.",
        "ctx_b": "he",
        "ctx": "A man cracks an egg. he",
        "endings": ["eats a car.", "whisks it.", "flies off.", "sleeps."],
        "label": "1",
    },
    "winogrande": {
        "sentence": "The cup fell off the desk as _ shook.",
        "option1": "desk",
        "option2": "cup",
        "answer": "1",
    },
    "pubmedqa": {
        "question": "Does salt raise blood pressure?",
        "context": {"contexts": ["Salt was given.", "It rose."], "labels": ["METHODS", "RESULTS"], "meshes": []},
        "long_answer": "It does.",
        "final_decision": "yes",
    },
    "glue:cola": {"sentence": "Ann sang. ", "label": 1, "idx": 0},
    "glue:sst2": {"sentence": "a joy to watch ", "label": 1, "idx": 0},
    "glue:mnli": {"premise": "Ann sang.", "hypothesis": "Ann was silent.", "label": 2, "idx": 0},
    "glue:qnli": {"question": "Who sang?", "sentence": "Ann sang.", "label": 0, "idx": 0},
    "glue:qqp": {"question1": "Who sang?", "question2": "Who was it that sang?", "label": 1, "idx": 0},
} | {
    f"glue:{subset}": {"sentence1": "Ann sang.", "sentence2": "Somebody sang.", "label": 1, "idx": 0}
    for subset in ("mrpc", "rte", "wnli")
}
