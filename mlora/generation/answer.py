"""What `generate.py` does: prompts, answered by the base model and by adapters, all in one batch."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlora.data import DataError
from mlora.generation.form import check_form, find_form
from mlora.generation.opened import BASE, ModelOptions, adapters_within, open_model
from mlora.generation.prompts import Prompt, read_prompts
from mlora.generation.sampling import Sampling
from mlora.model.generate import Completion, Piece, complete
from mlora.model.multi import MultiAdapterModel


@dataclass(frozen=True)
class Asked:
    """The flags of `generate.py`.

    Attributes:
        model: what is loaded.
        sampling: how answers are drawn.
        instructions: what is asked.
        input: that the instructions are about.
        prompts: file of prompts, instead or besides.
        base: let the base model answer beside adapters; it does where there are none.
        template: prompt template, by name or path; "chat" or "none".
        batch_size: answers computed at a time.
        stream: print tokens as they come.
        json: print a line of JSON for each answer.
    """

    model: ModelOptions
    sampling: Sampling
    instructions: tuple[str, ...] = ()
    input: str = ""
    prompts: str | None = None
    base: bool = False
    template: str | None = None
    batch_size: int = 32
    stream: bool = False
    json: bool = False


def main(asked: Asked) -> int:
    """Answer, and return the exit status."""
    try:
        answer(asked)
        return 0
    except (DataError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def answer(asked: Asked) -> None:
    """Print what every adapter answers to every prompt."""
    prompts = [Prompt(instruction, asked.input) for instruction in asked.instructions]
    prompts += read_prompts(asked.prompts) if asked.prompts is not None else []
    check_form(asked.template)
    within = {words: adapters_within(Path(words).expanduser()) for words in asked.model.lora_weights}
    named = [path for words, inside in within.items() for path in (map(str, inside) if inside else (words,))]
    model, folders = open_model(replace(asked.model, lora_weights=tuple(named)))
    form = find_form(asked.template, model.tokenizer)
    who: list[tuple[str, str | None]] = list(zip(named, folders, strict=True))
    if asked.base or not who:
        who.insert(0, (BASE, None))
    if asked.template is None:
        print(f"prompts are put in the form {form.name!r}; --template chooses another", file=sys.stderr)
    rows = [
        _Row(number, prompt, form.encode(*prompt), shown, adapter)
        for number, prompt in enumerate(prompts)
        for shown, adapter in who
    ]
    printer = (_Json if asked.json else _Live if asked.stream else _Printer)(rows, len(prompts))
    for start in range(0, len(rows), asked.batch_size):
        chunk = rows[start : start + asked.batch_size]
        for row, done in zip(chunk, _complete(model, chunk, asked.sampling, printer, start), strict=True):
            printer.answered(row, done)


@dataclass(frozen=True)
class _Row:
    number: int
    prompt: Prompt
    tokens: list[int]
    shown: str
    adapter: str | None


def _complete(
    model: MultiAdapterModel, rows: Sequence[_Row], sampling: Sampling, printer: _Printer, start: int
) -> list[Completion]:
    prompts, adapters = [row.tokens for row in rows], [row.adapter for row in rows]
    on_piece = printer.live(start)
    keywords = sampling.keywords()
    return complete(model, prompts, adapters, keywords.pop("max_new_tokens"), on_piece=on_piece, **keywords)


class _Printer:
    """Prints each answer when it is whole."""

    def __init__(self, rows: Sequence[_Row], prompts: int) -> None:
        self.rows, self.prompts = rows, prompts

    def live(self, start: int) -> Any:
        """Return who is told each token of the rows from `start` on; None where nobody asks."""
        return None

    def answered(self, row: _Row, done: Completion) -> None:
        """Print an answer."""
        print(f"{self.heading(row)}{done.text.strip()}\n", flush=True)

    def heading(self, row: _Row) -> str:
        """Return the lines above an answer: the prompt, where there are several, and who answers."""
        first = self.prompts > 1 and row.shown == self.rows[0].shown
        asked = f"[{row.number + 1}] {row.prompt.instruction}\n" if first else ""
        return f"{asked}== {row.shown}\n"


class _Live(_Printer):
    """Prints tokens as they come, one answer below the other: those further down catch up when their turn comes."""

    def __init__(self, rows: Sequence[_Row], prompts: int) -> None:
        super().__init__(rows, prompts)
        self.turn = 0
        self.waiting: list[list[Piece]] = [[] for _ in rows]
        print(self.heading(rows[0]), end="", flush=True)

    def live(self, start: int) -> Any:
        def show(piece: Piece) -> None:
            self.waiting[piece.row + start].append(piece)
            self._catch_up()

        return show

    def _catch_up(self) -> None:
        while self.turn < len(self.rows):
            pieces, self.waiting[self.turn] = self.waiting[self.turn], []
            print("".join(piece.text for piece in pieces), end="", flush=True)
            if not any(piece.finish for piece in pieces):
                return
            self.turn += 1
            print("\n" if self.turn == len(self.rows) else f"\n\n{self.heading(self.rows[self.turn])}", end="")

    def answered(self, row: _Row, done: Completion) -> None:
        pass


class _Json(_Printer):
    """Prints a line of JSON for each answer."""

    def answered(self, row: _Row, done: Completion) -> None:
        record = {
            "instruction": row.prompt.instruction,
            "input": row.prompt.input,
            "adapter": None if row.adapter is None else row.shown,
            "text": done.text,
            "prompt_tokens": done.prompt_tokens,
            "new_tokens": len(done.token_ids),
            "finish_reason": done.finish,
        }
        print(json.dumps(record, ensure_ascii=False), flush=True)
