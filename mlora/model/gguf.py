"""GGUF files read once, where transformers reads them anew for the tokenizer, the config and the weights.

A file of 49,152 tokens took five seconds each time, most of it for single numbers taken out of a `memmap`, and naming
the tensors five more, since the table of names is made again for every module of the model.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from typing import Any


@contextmanager
def read_once() -> Iterator[None]:
    """Within the block, hand transformers the file that was read last rather than let it read the same again."""
    if importlib.util.find_spec("gguf") is None:  # transformers will say so
        yield
        return
    import gguf

    ours = {"GGUFReader": _reader, "get_tensor_name_map": cache(gguf.get_tensor_name_map)}
    theirs = {name: getattr(gguf, name) for name in ours}
    vars(gguf).update(ours)
    try:
        yield
    finally:
        vars(gguf).update(theirs)


def _reader(path: str | os.PathLike[str]) -> Any:
    return _read(os.fspath(path), os.stat(path).st_mtime_ns)


@lru_cache(maxsize=1)  # of 49,152 tokens it is 65 MB of small arrays
def _read(path: str, written: int) -> Any:
    import numpy
    from gguf.gguf_reader import GGUFReader

    class Reader(GGUFReader):
        """A reader whose data is a plain array: the same bytes, several times as quick to index."""

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = numpy.asarray(mapped)

    return Reader(path)
