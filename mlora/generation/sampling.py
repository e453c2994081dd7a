"""How answers are drawn: the sampling flags of `generate.py`, the sliders of the page, the fields of the endpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_RANGES: dict[str, tuple[float, float, str]] = {
    "max_new_tokens": (1, float("inf"), "1 or more"),
    "temperature": (0, float("inf"), "0 or more; 0 is greedy"),
    "top_p": (0, 1, "more than 0 and at most 1"),
    "top_k": (0, float("inf"), "0 or more; 0 keeps every token"),
    "num_beams": (1, float("inf"), "1 or more"),
    "repetition_penalty": (0, float("inf"), "more than 0; 1 does nothing"),
    "seed": (0, 2**63 - 1, "0 to 2^63 - 1"),
}
_POSITIVE = ("top_p", "repetition_penalty")


@dataclass(frozen=True)
class Sampling:
    """Settings of one answer.

    Attributes:
        max_new_tokens: at most this many tokens are added.
        do_sample: draw tokens at random; None does so where temperature, top_p or top_k is given.
        temperature: logits are divided by it; 0 is greedy.
        top_p: draw from the fewest tokens whose probabilities sum to this.
        top_k: draw from this many tokens; 0 for all.
        num_beams: sequences that beam search keeps; 1 for none.
        repetition_penalty: logits of tokens that occurred are divided by it (multiplied where negative).
        seed: of drawing; None draws anew each time.
        stop: texts that end the answer.
    """

    max_new_tokens: int = 128
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    num_beams: int = 1
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, (least, most, allowed) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and (not least <= value <= most or (name in _POSITIVE and value == 0)):
                raise ValueError(f"{name}: {value} is not allowed; allowed: {allowed}")
        if self.temperature == 0 and self.do_sample:
            raise ValueError("temperature: 0 is not allowed with do_sample; allowed: more than 0")

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn at random."""
        if self.do_sample is None:
            return self.temperature != 0 and any(x is not None for x in (self.temperature, self.top_p, self.top_k))
        return self.do_sample

    def keywords(self) -> dict[str, Any]:
        """Arguments of `MultiAdapterModel.generate`; where one was not given, nothing is narrowed."""
        keywords: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "do_sample": self.draws,
            "num_beams": self.num_beams,
            "repetition_penalty": self.repetition_penalty,
            "stop": self.stop,
        }
        if self.draws:
            keywords |= {
                "temperature": 1.0 if self.temperature is None else self.temperature,
                "top_p": 1.0 if self.top_p is None else self.top_p,
                "top_k": self.top_k or 0,
                "seed": self.seed,
            }
        return keywords
