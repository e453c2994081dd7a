"""Instruction data: a row's columns say its format, and every format becomes spans of prompt and answer.

- `instruction`, `input`, `output` (Alpaca): through a prompt template; the output is the answer.
- `messages` of {role, content}: through the tokenizer's chat template; every assistant turn is an answer.
- `conversations` of {from, value} (ShareGPT): likewise.
- `text`: answer from its first token on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlora.config.job import CASUAL
from mlora.data.errors import DataError
from mlora.data.prompts import PromptTemplate
from mlora.data.tokenize import Sample, Span, encode_spans
from mlora.tasks import Row, RowError, fields

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def encode_instruction(
    tokenizer: PreTrainedTokenizerBase,
    row: Row,
    prompt: PromptTemplate,
    cutoff_len: int,
    *,
    train_on_inputs: bool = False,
) -> Sample | None:
    """Return a row of instruction data as a training row; None where its last answer does not fit.

    Raises:
        RowError: the row has no known format or a column at fault.
        DataError: the tokenizer has no chat template that the format needs.
    """
    if "instruction" in row:
        text = prompt.render(fields.text(row, "instruction"), _optional(row, "input"))
        spans = [Span(text, False), Span(_optional(row, "output", required=True), True)]
        return encode_spans(tokenizer, spans, cutoff_len, CASUAL, add_eos=True, train_on_inputs=train_on_inputs)
    if "messages" in row or "conversations" in row:
        field = "messages" if "messages" in row else "conversations"
        spans = _chat_spans(tokenizer, _messages(row, field), field)
        return encode_spans(tokenizer, spans, cutoff_len, CASUAL, add_bos=False, train_on_inputs=train_on_inputs)
    if "text" in row:
        spans = [Span(fields.text(row, "text"), False)]
        return encode_spans(tokenizer, spans, cutoff_len, CASUAL, add_eos=True, train_on_inputs=True)
    raise RowError(
        "instruction", f"is missing, and so are messages, conversations and text; there are {', '.join(row)}"
    )


def _optional(row: Row, field: str, *, required: bool = False) -> str:
    value = row.get(field)
    if value is None and not required:
        return ""
    if not isinstance(value, str):
        raise RowError(field, f"is {value!r:.60}, expected text")
    fields.check_unicode(value, field)
    return value


def _messages(row: Row, field: str) -> list[dict[str, str]]:
    turns = row[field]
    role_key, text_key = ("role", "content") if field == "messages" else ("from", "value")
    if not isinstance(turns, list | tuple) or not turns:
        raise RowError(field, f"is {turns!r:.60}, expected a list of turns")
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, Mapping):
            raise RowError(f"{field}[{number}]", f"is {turn!r:.60}, expected {{{role_key!r}: ..., {text_key!r}: ...}}")
        try:
            role, content = fields.text(turn, role_key), _optional(turn, text_key, required=True)
        except RowError as error:
            raise RowError(f"{field}[{number}].{error.field}", error.problem) from None
        if field == "conversations" and role not in SHAREGPT_ROLES:
            raise RowError(f"{field}[{number}].from", f"is {role!r:.60}, expected one of {', '.join(SHAREGPT_ROLES)}")
        messages.append({"role": SHAREGPT_ROLES.get(role, role), "content": content})
    return messages


def _chat_spans(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], field: str) -> list[Span]:
    """Render turn by turn, because a template says where answers are only through what it adds."""
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"the tokenizer has no chat template, which the column {field!r} needs; use Alpaca columns")
    spans: list[Span] = []
    text = ""
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:number], field, add_generation_prompt=True)
        after = _render(tokenizer, messages[: number + 1], field)
        if not (before.startswith(text) and after.startswith(before)):
            raise RowError(f"{field}[{number}]", "is changed by the chat template depending on later turns")
        spans += [Span(before[len(text) :], False), Span(after[len(before) :], True)]
        text = after
    if not spans:
        raise RowError(field, "has no assistant turn to learn from")
    return spans


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], field: str, **options: Any) -> str:
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except TemplateError as error:
        raise RowError(field, f"is refused by the tokenizer's chat template: {error}") from None
