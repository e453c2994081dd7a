"""Published figures of MixLoRA, to stand beside one's own.

Accuracies in percent by letters, one adapter for each task, over LLaMA-2 7B; of one run each.
Source: Li et al. 2024, https://arxiv.org/abs/2404.15159, as given in the README of https://github.com/TUDB-Labs/MixLoRA.
"""

from __future__ import annotations

from collections.abc import Sequence

TASKS = ("arc-e", "arc-c", "boolq", "obqa", "piqa", "siqa", "hellaswag", "winogrande")
"""The eight tasks, in the order of the paper's table."""
BASE = "LLaMA-2 7B"
TRAINABLE = "2.9%"
SINGLE_TASK = {
    "LoRA": (73.8, 50.9, 62.2, 80.4, 82.1, 69.9, 88.4, 66.8),
    "DoRA": (76.5, 59.8, 71.7, 80.6, 82.7, 74.1, 89.6, 67.3),
    "MixLoRA": (77.7, 58.1, 72.7, 81.6, 83.2, 78.0, 93.1, 76.8),
    "MixDoRA": (77.5, 58.2, 72.6, 80.9, 82.2, 80.4, 90.6, 83.4),
}
AVERAGES = {"LoRA": 71.8, "DoRA": 75.3, "MixLoRA": 77.6, "MixDoRA": 78.2}
"""As printed there."""


def paper_rows(tasks: Sequence[str]) -> list[list[str]]:
    """Return the published rows for these columns, with an average where they are all eight; [] where none is known."""
    if not set(tasks) & set(TASKS):
        return []
    rows = []
    for method, values in SINGLE_TASK.items():
        known = dict(zip(TASKS, values, strict=True))
        cells = [f"{known[task]:.1f}" if task in known else "-" for task in tasks]
        if len(tasks) > 1:
            cells.append(f"{AVERAGES[method]:.1f}" if set(tasks) == set(TASKS) else "-")
        rows.append([f"{method} (paper)", TRAINABLE, *cells])
    return rows
