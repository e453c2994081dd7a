"""Rows to token ids: where data comes from, prompt templates, label masks, the order of an epoch."""

from mlora.config.job import OnBadRow
from mlora.data.dataset import Report, Samples, load_questions, load_training_samples, task_names
from mlora.data.errors import DataError
from mlora.data.order import epoch_order
from mlora.data.prompts import PromptTemplate, find_prompt
from mlora.data.sources import Split, split_paths
from mlora.data.tokenize import NO_LABEL, EncodedQuestion, Sample, encode, encode_choices, encode_question

__all__ = [
    "NO_LABEL",
    "DataError",
    "EncodedQuestion",
    "OnBadRow",
    "PromptTemplate",
    "Report",
    "Sample",
    "Samples",
    "Split",
    "encode",
    "encode_choices",
    "encode_question",
    "epoch_order",
    "find_prompt",
    "load_questions",
    "load_training_samples",
    "split_paths",
    "task_names",
]
