"""The error of data that cannot be used."""

from __future__ import annotations


class DataError(Exception):
    """Bad input data; the message names the file, line and field and says what is allowed (exit status 2)."""
