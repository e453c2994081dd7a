"""Reading and writing JSON files, stricter than the standard library: a key given twice is an error."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlora.config.check import join
from mlora.config.errors import ConfigError, Problem


class _Object(dict[str, Any]):
    """A JSON object that remembers which keys it was given more than once."""

    repeated: tuple[str, ...] = ()


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        ConfigError: it cannot be read, is no JSON (with line and column), or gives a key twice.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(str(path), [Problem("", f"cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), [Problem("", f"is not UTF-8 text: byte {error.start}")]) from None
    return parse_json(text, str(path))


def parse_json(text: str, source: str) -> Any:
    """Return the value of a JSON text; `source` names it in errors."""
    try:
        value = json.loads(text, object_pairs_hook=_remember)
        problems = list(_repeated(value, ""))
    except json.JSONDecodeError as error:
        message = f"is not JSON: line {error.lineno}, column {error.colno}: {error.msg}{_reason(text, error.pos)}"
        message = message if text.strip() else "is empty"
        raise ConfigError(source, [Problem("", message)]) from None
    except RecursionError:
        raise ConfigError(source, [Problem("", "is nested too deeply")]) from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(source, [Problem("", f"is not JSON: {error}")]) from None
    if problems:
        raise ConfigError(source, problems)
    return value


def _reason(text: str, place: int) -> str:
    """Return what Python's words for the commonest slip leave out."""
    ends = text[place : place + 1] in ("]", "}") and text[:place].rstrip().endswith(",")
    return "; a comma stands before it, after which another value has to come" if ends else ""


def write_json(path: str | Path, value: Any, indent: int = 4) -> None:
    """Write a JSON file in one step: whoever reads it finds the old content or the new."""
    write_atomically(Path(path), json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Write a whole file or nothing: a temporary file beside it, synced, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # not mkstemp: what it makes is closed to everyone but its owner
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(text.encode("utf-8", "backslashreplace"))  # half a surrogate pair, as JSON escapes it
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _remember(pairs: list[tuple[str, Any]]) -> _Object:
    value = _Object(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        value.repeated = tuple(key for key in value if keys.count(key) > 1)
    return value


def _repeated(value: Any, path: str) -> Iterator[Problem]:
    if isinstance(value, _Object):
        for key in value.repeated:
            yield Problem(join(path, key), "is given more than once")
        for key, item in value.items():
            yield from _repeated(item, join(path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _repeated(item, join(path, i))
