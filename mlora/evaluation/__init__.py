"""Scoring adapters on tasks: letters, log-likelihoods, classification heads, and what is reported of them."""

from mlora.evaluation.evaluate import Examination, Result, by_questions, check, check_heads, evaluate
from mlora.evaluation.score import Request, predict

__all__ = ["Examination", "Request", "Result", "by_questions", "check", "check_heads", "evaluate", "predict"]
