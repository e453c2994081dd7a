"""What a run prints, whose reader may go away: `launch.py run ... | head`, a terminal that is closed."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

log = logging.getLogger(__name__)


@contextmanager
def outlives_its_readers() -> Iterator[None]:
    """Within the block, what nobody reads any more is dropped, and no error: a run is worth more than its output."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Unheard(sys.stdout), _Unheard(sys.stderr)
    try:
        yield
        sys.stdout.flush()
    finally:
        sys.stdout, sys.stderr = before


class _Unheard:
    """A stream of text; once its reader is gone it leads nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._or_nowhere():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._or_nowhere():
            self._stream.flush()

    @contextmanager
    def _or_nowhere(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            # the descriptor too: Python flushes what is left when it ends
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            log.info("nobody reads the output any more; what would be printed is dropped")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
