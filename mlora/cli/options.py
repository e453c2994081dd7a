"""Flags, spelt with underscores as in the predecessors.

A truth value may be given as `--flag`, `--flag True` or `--flag false`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

_Command = TypeVar("_Command", bound=Callable[..., Any])
Decorator = Callable[[_Command], _Command]

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 80}
"""Settings of every program."""
DTYPES = click.Choice(["bf16", "fp16", "fp32"])
PATH = click.Path(readable=False)
"""A file or folder, which a shell completes; whether it is there is asked by whoever reads it."""
Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def option(flag: str, help: str, kind: Any = str, **settings: Any) -> Decorator:
    """Return the decorator that gives a command a flag; `kind` and `settings` are click's."""
    if kind is bool:  # click's own flags take no value
        settings = {"is_flag": False, "flag_value": "True", "metavar": "[True|False]"} | settings
    elif isinstance(kind, click.IntRange | click.FloatRange):  # "INTEGER RANGE" reads as if two were wanted
        settings = {"metavar": "INTEGER" if isinstance(kind, click.IntRange) else "FLOAT"} | settings
    return click.option(f"--{flag}", type=kind, help=help, **settings)


def names_or_path(known: Callable[[], Iterable[str]] = tuple, separators: str = "") -> Completer:
    """Return how a shell completes a value of names, each once, that `separators` join; else it completes paths."""

    def complete(ctx: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
        before = re.sub(rf"[^{separators}]*$", "", begun) if separators else ""
        taken = re.split(rf"[{separators}]", before) if separators else ()
        names = [name for name in known() if name.startswith(begun[len(before) :]) and name not in taken]
        return [CompletionItem(before + name) for name in names] or [CompletionItem(begun, type="file")]

    return complete


def all_of(decorators: Sequence[Decorator]) -> Decorator:
    """Return the decorator that gives a command several flags."""

    def decorate(command: _Command) -> _Command:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


class SeveralValues(click.Command):
    """A command whose flags that may be repeated take several values at once: `--lora_weights a b c`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        several = {flag for p in self.params if isinstance(p, click.Option) and p.multiple for flag in p.opts}
        spread, latest = [], ""
        for before, word in zip(["", *args], args, strict=False):
            if word.startswith("--"):
                latest = word.partition("=")[0]
            elif latest in several and before != latest:
                spread.append(latest)
            spread.append(word)
        return super().parse_args(ctx, spread)


def _go_offline(ctx: click.Context, parameter: click.Parameter, value: bool) -> bool:
    if value:  # read when the hub's package is imported, and handed to every program started from here
        os.environ["HF_HUB_OFFLINE"] = "1"
    return value


hub_offline = option(
    "hub_offline", "Open no connection: cached copies and local files only.", bool, default=False,
    expose_value=False, is_eager=True, callback=_go_offline,
)  # fmt: skip
log_file = option(
    "log_file", "Where the log goes. [default: mlora.log; with --dir, its log.txt]", PATH, default="mlora.log"
)  # fmt: skip
base_model = option(
    "base_model", 'Local folder, hub id, GGUF file, or "smollm2".', required=True, shell_complete=names_or_path()
)
base_source = all_of(
    [
        option("revision", "Of the base model on the hub."),
        hub_offline,
        option("trust_remote_code", "Run code from the model's repository.", bool, default=False),
    ]
)
"""Where a base model comes from, besides its name."""
