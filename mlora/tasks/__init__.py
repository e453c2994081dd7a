"""Benchmarks: rows of published data sets as prompt, choices and answer. Knows neither tensors nor files."""

from mlora.tasks import glue, letter, loglikelihood  # noqa: F401  registers the tasks
from mlora.tasks.base import (
    HARNESS,
    PROTOCOLS,
    TASKS,
    Protocol,
    Question,
    Row,
    RowError,
    Source,
    Task,
    UnknownTaskError,
    find_task,
    folder_names,
    known_tasks,
)
from mlora.tasks.metrics import METRICS, Score, accuracy

__all__ = [
    "HARNESS",
    "METRICS",
    "PROTOCOLS",
    "TASKS",
    "Protocol",
    "Question",
    "Row",
    "RowError",
    "Score",
    "Source",
    "Task",
    "UnknownTaskError",
    "accuracy",
    "find_task",
    "folder_names",
    "known_tasks",
]
