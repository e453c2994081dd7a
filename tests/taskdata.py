"""Small task data in the hubs' columns that the programs are tried on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def boolq(count: int) -> list[dict[str, Any]]:
    """Return questions whose answer is a rule of their number."""
    return [{"question": f"is {i} an even number", "answer": i % 2 == 0, "passage": ""} for i in range(count)]


def write(folder: Path, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Write a file of JSON lines for each split, making the folder where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
