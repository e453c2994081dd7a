"""Rows of local files as a stream, each with the place that it came from.

A line that cannot be parsed is a row too, one with a problem, so that whoever reads decides whether it is an error or
skipped; only a file that cannot be read on raises.
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from mlora.data.errors import DataError

EXTENSIONS = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")


@dataclass(frozen=True)
class SourceRow:
    """A row and its origin.

    Attributes:
        origin: "train.jsonl, line 12", for messages.
        values: its columns.
        problem: why it could not be parsed; empty where it could.
    """

    origin: str
    values: Mapping[str, Any] = field(default_factory=dict)
    problem: str = ""


def is_data_file(path: str | Path) -> bool:
    """Return whether a name ends like a file that can be read."""
    return str(path).lower().endswith(EXTENSIONS)


def read_file(path: Path) -> Iterator[SourceRow]:
    """Yield the rows of a file, by its extension.

    Raises:
        DataError: the file cannot be opened, has another format than its name says, or breaks off.
    """
    name = path.name.lower().removesuffix(".gz")
    try:
        if not path.exists():
            raise FileNotFoundError
        if not is_data_file(path):
            raise DataError(f"{path}: cannot tell its format; expected a name ending with {', '.join(EXTENSIONS)}")
        if name.endswith(".parquet"):
            yield from _parquet(path)
        elif name.endswith(".csv"):
            yield from _csv(path)
        elif name.endswith(".json") and _starts_list(path):
            yield from _json_list(path)
        else:
            yield from _json_lines(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file or folder") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _open(path: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(path, "rb")) if path.name.lower().endswith(".gz") else path.open("rb")


def _starts_list(path: Path) -> bool:
    with _open(path) as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _row(origin: str, values: Any) -> SourceRow:
    if not isinstance(values, dict):
        return SourceRow(origin, problem=f"is {type(values).__name__}, expected an object with named columns")
    return SourceRow(origin, values)


def _json_lines(path: Path) -> Iterator[SourceRow]:
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            origin = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                yield _row(origin, json.loads(line.decode("utf-8-sig")))
            except (ValueError, RecursionError) as error:
                yield SourceRow(
                    origin, problem=f"is not JSON: {error or 'nested too deeply'}: {ascii(line[:60])[2:-1]}"
                )


def _json_list(path: Path) -> Iterator[SourceRow]:
    with _open(path) as file:
        try:
            rows = json.loads(file.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not a JSON list: {error or 'nested too deeply'}") from None
    for number, values in enumerate(rows, 1):
        yield _row(f"{path}, row {number}", values)


def _csv(path: Path) -> Iterator[SourceRow]:
    with _open(path) as file:
        lines = (line.decode("utf-8-sig" if number == 0 else "utf-8") for number, line in enumerate(file))
        reader = csv.DictReader(lines)
        try:
            for values in reader:
                origin = f"{path}, line {reader.line_num}"
                extra = None in values
                yield SourceRow(origin, problem="has more cells than the header") if extra else _row(origin, values)
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}, line {reader.line_num + 1}: not comma-separated text: {error}") from None


def _parquet(path: Path) -> Iterator[SourceRow]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        for batch in ParquetFile(path).iter_batches(1000):
            for values in batch.to_pylist():
                number += 1
                yield _row(f"{path}, row {number}", values)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file: {error}") from None
