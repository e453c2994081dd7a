"""Prompt templates of instruction data: JSON files with `prompt_input`, `prompt_no_input` and `response_split`."""

from __future__ import annotations

import difflib
import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlora.config.templates import TEMPLATES
from mlora.data.errors import DataError

DEFAULT_PROMPT = "mlora"


@dataclass(frozen=True)
class PromptTemplate:
    """How an instruction is put to the model.

    Attributes:
        name: name of the file without its ending.
        prompt_input: text with {instruction} and {input}.
        prompt_no_input: text with {instruction}, where a row has no input.
        response_split: what precedes the response in generated text.
    """

    name: str
    prompt_input: str
    prompt_no_input: str
    response_split: str

    def render(self, instruction: str, input: str = "") -> str:
        """Return the prompt, which the response follows."""
        if input:
            return self.prompt_input.format(instruction=instruction, input=input)
        return self.prompt_no_input.format(instruction=instruction)

    def response(self, text: str) -> str:
        """Return the response in a text that begins with the prompt."""
        return text.rpartition(self.response_split)[2].strip()


def find_prompt(name_or_path: str | None = None, key: str = "prompt", others: Sequence[str] = ()) -> PromptTemplate:
    """Return a prompt template by name or file; a path that does not exist falls back on the name in it.

    Args:
        name_or_path: None for the default.
        key: what errors call the setting.
        others: names that it may have besides, which are no templates.

    Raises:
        DataError: there is none, or its file is not one.
    """
    wanted = name_or_path or DEFAULT_PROMPT
    path = Path(wanted).expanduser()
    if path.is_file():
        return _load(path)
    known = {file.stem: file for file in (TEMPLATES / "prompts").glob("*.json")}
    stem = path.name.removesuffix(".json")
    if stem in known:
        return _load(known[stem])
    names = [*sorted(known), *others]
    nearest = difflib.get_close_matches(stem, names, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else "."
    raise DataError(f"{key}: {wanted!r}: no such file or name{hint} Known: {', '.join(names) or 'none'}")


def _load(path: Path) -> PromptTemplate:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"prompt template {path}: {error}") from None
    fields = {
        "prompt_input": {"instruction", "input"},
        "prompt_no_input": {"instruction"},
        "response_split": set[str](),
    }
    texts = {field: content.get(field) if isinstance(content, dict) else None for field in fields}
    for field, allowed in fields.items():
        if not isinstance(texts[field], str):
            raise DataError(f"prompt template {path}: key {field!r} is missing or no text")
        if field != "response_split" and _placeholders(path, field, str(texts[field])) != allowed:
            wanted = " and ".join(f"{{{name}}}" for name in sorted(allowed))
            raise DataError(f"prompt template {path}: key {field!r} must have the placeholders {wanted} and no other")
    return PromptTemplate(path.stem, *map(str, texts.values()))


def _placeholders(path: Path, field: str, text: str) -> set[str]:
    try:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name is not None}
    except ValueError as error:
        raise DataError(f"prompt template {path}: key {field!r}: {error}") from None
