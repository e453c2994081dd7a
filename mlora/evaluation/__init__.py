"""Scoring adapters on tasks: letters, log-likelihoods, classification heads, and what is reported of them."""

from mlora.evaluation.evaluate import BASE, Conditions, Outcome, Result, check_heads, evaluate, examine
from mlora.evaluation.questions import Examination, Library, QuestionSet, by_questions
from mlora.evaluation.score import Prediction, Request, predict

__all__ = [
    "BASE",
    "Conditions",
    "Examination",
    "Library",
    "Outcome",
    "Prediction",
    "QuestionSet",
    "Request",
    "Result",
    "by_questions",
    "check_heads",
    "evaluate",
    "examine",
    "predict",
]
