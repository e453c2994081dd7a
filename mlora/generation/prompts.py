"""Files of prompts: text with one on each line, or JSON lines with `instruction` and, where there is one, `input`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from mlora.data import DataError


class Prompt(NamedTuple):
    """What is asked, and what it is about."""

    instruction: str
    input: str = ""


def read_prompts(path: str) -> list[Prompt]:
    """Read a file of prompts.

    Raises:
        DataError: the file cannot be read or holds no prompt; the message names the line.
    """
    file = Path(path).expanduser()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise DataError(f"--prompts {path}: {reason}") from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise DataError(f"--prompts {path}: holds no prompt")
    if file.suffix != ".jsonl":
        return [Prompt(line.strip()) for _, line in numbered]
    return [_from_json(f"--prompts {path}, line {number}", line) for number, line in numbered]


def _from_json(where: str, line: str) -> Prompt:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: is not JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("instruction"), str) or not row["instruction"].strip():
        raise DataError(f'{where}: expected {{"instruction": "..."}} and, where there is one, "input"; got {line[:60]}')
    if not isinstance(given := row.get("input") or "", str):
        raise DataError(f"{where}: key 'input' is no text")
    return Prompt(row["instruction"], given)
