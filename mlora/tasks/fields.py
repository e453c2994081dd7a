"""Readers of one column of a row, which name the column when its value cannot be used.

Comma-separated files hold text only, so numbers and truth values are compared by their text, and a nested column may
be written as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from mlora.tasks.base import Row, RowError


def text(row: Row, field: str, *, blank: bool = False) -> str:
    """Return a column's text, which may be blank only where that is said."""
    return _text(_value(row, field), field, blank)


def texts(row: Row, field: str) -> tuple[str, ...]:
    """Return the texts of a column that holds a list of them, at least two."""
    found = _texts(_nested(_value(row, field), field), field)
    if len(found) < 2:
        raise RowError(field, f"has {len(found)} options, expected two or more")
    return found


def index(row: Row, field: str, labels: Sequence[str]) -> int:
    """Return the position of a column's value among labels; 1 counts as "1" and True as "true"."""
    value = _value(row, field)
    label = str(value).strip()
    label = label if label in labels else label.lower()
    if label not in labels:
        raise RowError(field, f"is {_excerpt(value)}, expected one of {', '.join(labels)}")
    return list(labels).index(label)


def options(row: Row, field: str = "choices", key: str = "answerKey") -> tuple[tuple[str, ...], int]:
    """Return the option texts of a column {"text": [...], "label": [...]} and the index of the right one.

    Labels differ between rows of one data set (A to E, or 1 to 4), so they are not returned: only the order counts.
    """
    contents, labels = _columns(row, field, "text", "label")
    if len(contents) < 2:
        raise RowError(field, f"has {len(contents)} options, expected two or more")
    if len(set(labels)) != len(labels):
        raise RowError(f"{field}.label", f"has a label twice: {', '.join(labels)}")
    return contents, index(row, key, labels)


def sections(row: Row, field: str) -> tuple[tuple[str, str], ...]:
    """Return (label, text) of each entry of a column {"contexts": [...], "labels": [...]}."""
    contexts, labels = _columns(row, field, "contexts", "labels")
    return tuple(zip(labels, contexts, strict=True))


def _columns(row: Row, field: str, first: str, second: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    columns = _nested(_value(row, field), field)
    if not isinstance(columns, dict):
        raise RowError(field, f"is {_excerpt(columns)}, expected {{{first!r}: [...], {second!r}: [...]}}")
    left = _texts(_value(columns, first, f"{field}."), f"{field}.{first}")
    right = _texts(_value(columns, second, f"{field}."), f"{field}.{second}")
    if len(left) != len(right):
        raise RowError(field, f"has {len(left)} in {first!r} but {len(right)} in {second!r}")
    return left, right


def _value(row: Row, field: str, inside: str = "") -> Any:
    if row.get(field) is None:
        raise RowError(inside + field, f"is missing; there are {', '.join(map(str, row)) or 'none'}")
    return row[field]


def _nested(value: Any, field: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise RowError(field, f"is {_excerpt(value)}, expected a nested value or its JSON") from None


def _texts(value: Any, field: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple):
        raise RowError(field, f"is {_excerpt(value)}, expected a list of texts")
    return tuple(_text(item, f"{field}[{i}]") for i, item in enumerate(value))


def _text(value: Any, field: str, blank: bool = False) -> str:
    if not isinstance(value, str):
        raise RowError(field, f"is {_excerpt(value)}, expected text")
    if not (blank or value.strip()):
        raise RowError(field, "is empty")
    check_unicode(value, field)
    return value


def check_unicode(value: str, field: str) -> None:
    """Refuse text that no tokenizer can encode: JSON may spell half of a surrogate pair."""
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise RowError(field, f"is {_excerpt(value)}, which is not valid Unicode")


def _excerpt(value: Any) -> str:
    shown = ascii(value) if isinstance(value, str) else repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
