"""How an instruction is put to a model: in its chat template, in a prompt template, or as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlora.data import DataError, find_prompt
from mlora.data.prompts import PromptTemplate
from mlora.data.tokenize import encode

CHAT, PLAIN = "chat", "none"
"""Names of the forms that are no prompt template."""


@dataclass(frozen=True)
class Form:
    """A way to put an instruction.

    Attributes:
        tokenizer: of the base model.
        template: None for the tokenizer's chat template, or the text as it is.
        chat: whether the tokenizer's chat template is used.
    """

    tokenizer: Any
    template: PromptTemplate | None = None
    chat: bool = False

    @property
    def name(self) -> str:
        """What `--template` calls it."""
        return self.template.name if self.template else CHAT if self.chat else PLAIN

    def encode(self, instruction: str, input: str = "") -> list[int]:
        """Return the token ids of a prompt."""
        if self.template is not None:
            return encode(self.tokenizer, self.template.render(instruction, input))
        text = f"{instruction}\n\n{input}" if input else instruction
        if not self.chat:
            return encode(self.tokenizer, text)
        return self.encode_messages([{"role": "user", "content": text}])

    def encode_messages(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Return the token ids of a conversation that the model is to go on with.

        A prompt template is repeated for every turn, and a system message precedes the first instruction.
        """
        if self.chat:
            try:
                text = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
            except Exception as error:  # a template is a program of the model's makers, and raises what it likes
                raise DataError(f"messages: the model's chat template refuses them: {error}") from error
            return encode(self.tokenizer, text, add_bos=False)
        written, system = "", ""
        for message in messages:
            content = message["content"]
            if message["role"] == "assistant":
                written += f"{content}\n\n"
            elif message["role"] == "user":
                asked, system = f"{system}{content}", ""
                written += asked if self.template is None else self.template.render(asked)
            else:
                system += f"{content}\n\n"
        return encode(self.tokenizer, written + system)


def find_form(wanted: str | None, tokenizer: Any) -> Form:
    """Return the form of a name or a template file; without one the model's chat template where it has one.

    Raises:
        DataError: there is none.
    """
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if wanted == CHAT and not has_chat:
        raise DataError(f"--template {CHAT}: this model has no chat template; name a prompt template, or {PLAIN}")
    if wanted == CHAT or (wanted is None and has_chat):
        return Form(tokenizer, chat=True)
    if wanted == PLAIN:
        return Form(tokenizer)
    return Form(tokenizer, _prompt(wanted))


def check_form(wanted: str | None) -> None:
    """Refuse a form that no model has, before one is loaded.

    Raises:
        DataError: it is neither a name nor a template file.
    """
    if wanted not in (None, CHAT, PLAIN):
        _prompt(wanted)


def _prompt(wanted: str | None) -> PromptTemplate:
    return find_prompt(wanted, "--template", (CHAT, PLAIN))


def form_names(tokenizer: Any) -> list[str]:
    """Return the names of all forms that a model can take."""
    from mlora.config.templates import TEMPLATES

    chat = [CHAT] if getattr(tokenizer, "chat_template", None) else []
    return [*chat, *sorted(file.stem for file in (TEMPLATES / "prompts").glob("*.json")), PLAIN]
