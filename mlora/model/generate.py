"""Generation for several adapters in one batch, by transformers' own `generate()`.

Rows are padded on the left and run together, whichever adapter is theirs. Where tokens are drawn at random, each row
draws from a generator of its own, so its answer depends on its seed and not on its neighbours; beams that sample are
left to transformers, which draws for all of them at once.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import logits_process

from mlora.adapters import Segment
from mlora.model.errors import ModelError
from mlora.model.scope import Flight

if TYPE_CHECKING:
    from mlora.model.multi import MultiAdapterModel

Finish = Literal["stop", "length", "cancelled"]

_WARPERS = {
    "temperature": (logits_process.TemperatureLogitsWarper, 1.0),
    "top_k": (logits_process.TopKLogitsWarper, 0),
    "top_p": (logits_process.TopPLogitsWarper, 1.0),
    "min_p": (logits_process.MinPLogitsWarper, 0.0),
    "typical_p": (logits_process.TypicalLogitsWarper, 1.0),
}
"""What narrows the distribution that a row draws from, in transformers' order, and the value that leaves it be."""


class Piece(NamedTuple):
    """One token of an answer.

    Attributes:
        row: number of the prompt.
        token: its id.
        text: what it adds; empty while a character or a possible stop text is incomplete.
        finish: why the row ends with this token, at its end of text or a stop text ("stop"), or its longest length
            ("length"); None where it goes on.
    """

    row: int
    token: int
    text: str
    finish: Finish | None


@dataclass(frozen=True)
class Completion:
    """The answer to one prompt.

    Attributes:
        text: without special tokens, up to a stop text.
        token_ids: all new tokens, an end of text included.
        prompt_tokens: tokens of the prompt.
        finish: see `Piece`; "cancelled" where somebody stopped it.
    """

    text: str
    token_ids: tuple[int, ...]
    prompt_tokens: int
    finish: Finish


def row_flight(adapters: Sequence[str | None], copies: int = 1) -> tuple[list[int], Flight]:
    """Return an order of rows that brings each adapter's together, and the segments of rows in that order.

    Args:
        adapters: of each row.
        copies: rows that transformers makes of each (beams).
    """
    names = list(dict.fromkeys(adapters))
    order = sorted(range(len(adapters)), key=lambda i: names.index(adapters[i]))
    segments, start = [], 0
    for name in names:
        count = list(adapters).count(name) * copies
        segments.append(Segment(name, start, start + count, sequence_lengths=(1,) * count))  # where a row is a token
        start += count
    return order, Flight(segments)


def generate(
    model: MultiAdapterModel,
    prompts: Sequence[str | Sequence[int]],
    adapters: Sequence[str | None],
    max_new_tokens: int,
    **generation: Any,
) -> list[str]:
    """Continue prompts; see `MultiAdapterModel.generate`."""
    return [completion.text for completion in complete(model, prompts, adapters, max_new_tokens, **generation)]


def stream(
    model: MultiAdapterModel,
    prompts: Sequence[str | Sequence[int]],
    adapters: Sequence[str | None],
    max_new_tokens: int,
    **generation: Any,
) -> Iterator[Piece]:
    """Continue prompts and yield tokens as they come; leaving the loop stops the generation.

    Takes what `complete` takes, and computes in a thread of its own.
    """
    arrived: queue.SimpleQueue[Piece | BaseException | None] = queue.SimpleQueue()
    left = threading.Event()

    def work() -> None:
        try:
            complete(
                model, prompts, adapters, max_new_tokens, on_piece=arrived.put, cancelled=left.is_set, **generation
            )
            arrived.put(None)
        except BaseException as error:  # raised where somebody listens
            arrived.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (piece := arrived.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        left.set()
        if thread is not threading.current_thread():  # one that nobody holds any more may be closed anywhere
            thread.join()


@torch.no_grad()
def complete(
    model: MultiAdapterModel,
    prompts: Sequence[str | Sequence[int]],
    adapters: Sequence[str | None],
    max_new_tokens: int,
    *,
    seed: int | Sequence[int] | None = None,
    stop: Sequence[str] = (),
    on_piece: Callable[[Piece], None] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    **generation: Any,
) -> list[Completion]:
    """Continue prompts, each with its adapter, and say how each answer ended.

    Args:
        model: holds the adapters.
        prompts: texts, or token ids where the special tokens are in place.
        adapters: name for each prompt; None for the plain base model.
        max_new_tokens: at most this many tokens are added, fewer where the model's longest sequence ends before.
        seed: of drawing tokens, one for all prompts, so that equal ones draw alike with every adapter, or one for each;
            None takes one for each from torch's generator.
        stop: texts that end an answer; they are not part of it.
        on_piece: is told every token as it comes; with beams, all of them in the end.
        cancelled: asked after every token; stops all rows once it says so.
        generation: what transformers' `generate()` takes.

    Raises:
        ModelError: an adapter is not loaded, or a prompt fills the model's longest sequence.
    """
    if len(prompts) != len(adapters):
        raise ValueError(f"{len(prompts)} prompts need as many adapters, got {len(adapters)}")
    for name in {name for name in adapters if name is not None}:
        if model.num_labels(name) is not None:
            raise ModelError(f"adapter {name!r} has a classification head: it names classes and generates no text")
    tokens = [_encode(model.tokenizer, prompt) for prompt in prompts]
    ends = _ends(model, generation)
    limits = _limits(model, tokens, max_new_tokens)
    seeds = torch.randint(2**31, (len(prompts),)).tolist() if seed is None else seed
    seeds = [seeds] * len(prompts) if isinstance(seeds, int) else seeds
    rows = [
        _Row(number, ids, adapter, limit, own, model.tokenizer, ends, tuple(stop), on_piece or (lambda piece: None))
        for number, (ids, adapter, limit, own) in enumerate(zip(tokens, adapters, limits, seeds, strict=True))
    ]
    counting = {name for name, method in model.adapters.items() if method.counts_tokens}
    groups: dict[int | None, list[_Row]] = {}
    for row in rows:
        groups.setdefault(len(row.prompt) if row.adapter in counting else None, []).append(row)
    for length, group in groups.items():
        settings = generation if length is None else generation | {"use_cache": False}
        _batch(model, group, settings | {"eos_token_id": sorted(ends) or None}, cancelled)
    return [Completion(row.text, tuple(row.new), len(row.prompt), row.finish or "cancelled") for row in rows]


@dataclass
class _Row:
    """One prompt and what has been added to it."""

    number: int
    prompt: list[int]
    adapter: str | None
    limit: int
    seed: int
    tokenizer: Any
    ends: frozenset[int]
    stop: tuple[str, ...]
    on_piece: Callable[[Piece], None]
    text: str = ""
    shown: str = ""
    finish: Finish | None = None

    def __post_init__(self) -> None:
        self.new: list[int] = []

    def push(self, token: int) -> None:
        """Add a token, unless the row has ended."""
        if self.finish is not None:
            return
        self.new.append(token)
        whole = self.tokenizer.decode(self.new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        cut = min((whole.index(text) for text in self.stop if text in whole), default=None)
        self.text = whole[:cut]
        if cut is not None or token in self.ends:
            self.finish = "stop"
        elif len(self.new) >= self.limit:
            self.finish = "length"
        self.on_piece(Piece(self.number, token, self._fresh(), self.finish))

    def _fresh(self) -> str:
        """Return what can be shown now: no character whose bytes are still to come, nothing that may become a stop."""
        sure = self.text
        if self.finish is None:
            sure = sure.rstrip("\ufffd")
            held = (n for text in self.stop for n in range(1, len(text)) if sure.endswith(text[:n]))
            sure = sure[: len(sure) - max(held, default=0)]
        if not sure.startswith(self.shown):
            return ""
        fresh, self.shown = sure[len(self.shown) :], sure
        return fresh


class _Watch(StoppingCriteria):
    """Hands the newest token of every row to it and says which have ended."""

    def __init__(self, rows: Sequence[_Row], copies: int, beams: bool, cancelled: Callable[[], bool]) -> None:
        self.rows, self.copies, self.beams, self.cancelled = rows, copies, beams, cancelled

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.cancelled():
            return torch.ones(len(input_ids), dtype=torch.bool, device=input_ids.device)
        if self.beams:  # no beam has won yet
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for row, token in zip(self.rows, input_ids[:: self.copies, -1].tolist(), strict=True):
            row.push(token)
        ended = torch.tensor([row.finish is not None for row in self.rows], device=input_ids.device)
        return ended.repeat_interleave(self.copies)


class _Draw(LogitsProcessor):
    """Draws each row's next token with its own generator and leaves nothing else to choose.

    The largest p_i / e_i, with e_i exponential, is i with probability p_i (the "exponential races" form of Gumbel-max).
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        p = scores.float().softmax(-1)
        races = [torch.empty_like(row).exponential_(generator=own) for row, own in zip(p, self.generators, strict=True)]
        drawn = (p / torch.stack(races)).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(-1, drawn, 0.0)


def _batch(
    model: MultiAdapterModel, rows: Sequence[_Row], generation: Mapping[str, Any], cancelled: Callable[[], bool]
) -> None:
    """Continue rows in one batch, padded on the left."""
    beams = int(_setting(model, generation, "num_beams", 1))
    copies = max(beams, int(_setting(model, generation, "num_return_sequences", 1)))
    order, flight = row_flight([row.adapter for row in rows], copies)
    rows = [rows[i] for i in order]
    tokenizer = model.tokenizer
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    width = max(len(row.prompt) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row.prompt)) + row.prompt for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row.prompt)) + [1] * len(row.prompt) for row in rows], device=model.device)
    settings = dict(generation)
    if beams == 1 and _setting(model, generation, "do_sample", False):
        seeds = [row.seed + copy for row in rows for copy in range(copies)]
        settings = _drawn_by_row(model, settings, _Draw(seeds, model.device))
    watch = StoppingCriteriaList([_Watch(rows, copies, beams > 1, cancelled), *settings.pop("stopping_criteria", ())])
    with model.scope.use(flight), model.scope.keeping():
        out = model.hf_model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max(row.limit for row in rows),
            pad_token_id=pad,
            stopping_criteria=watch,
            **settings,
        )
    if beams > 1 and not cancelled():
        for row, tokens in zip(rows, out[:: out.shape[0] // len(rows), width:].tolist(), strict=True):
            for token in tokens:
                row.push(token)
            row.finish = row.finish or "stop"


def _drawn_by_row(model: MultiAdapterModel, generation: dict[str, Any], draw: _Draw) -> dict[str, Any]:
    """Return settings by which transformers takes the one token that each row drew.

    transformers applies custom processors before what narrows the distribution, so that is applied here as well.
    """
    chain = list(generation.pop("logits_processor", ()))
    for name, (warper, neutral) in _WARPERS.items():
        value = _setting(model, generation, name, 50 if name == "top_k" else neutral)
        generation.pop(name, None)
        if value != neutral:
            chain.append(warper(value))
    plain = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0}
    return generation | plain | {"logits_processor": LogitsProcessorList([*chain, draw])}


def _setting(model: MultiAdapterModel, generation: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return a setting as transformers would find it: given, the model's own, or its default."""
    value = generation.get(name)
    value = getattr(model.hf_model.generation_config, name, None) if value is None else value
    return default if value is None else value


def _encode(tokenizer: Any, prompt: str | Sequence[int]) -> list[int]:
    ids = list(tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt)
    if ids:
        return ids
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise ModelError("an empty prompt: this model has no token that starts a text, so give it one word at least")
    return [start]


def _ends(model: MultiAdapterModel, generation: Mapping[str, Any]) -> frozenset[int]:
    """Return the tokens that end a row: those asked for, else the model's and its tokenizer's."""
    asked = generation.get("eos_token_id")
    found = [asked] if asked is not None else [model.hf_model.generation_config.eos_token_id]
    if asked is None:
        found.append(model.tokenizer.eos_token_id)
    flat = [end for some in found for end in (some if isinstance(some, list | tuple) else [some])]
    return frozenset(end for end in flat if end is not None)


def _limits(model: MultiAdapterModel, tokens: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    longest = getattr(model.hf_model.config.get_text_config(), "max_position_embeddings", None)
    if longest is None:
        return [max_new_tokens] * len(tokens)
    for ids in tokens:
        if len(ids) >= longest:
            raise ModelError(
                f"a prompt has {len(ids)} tokens; {model.origin.given} takes at most {longest}, answer included"
            )
    return [min(max_new_tokens, longest - len(ids)) for ids in tokens]
