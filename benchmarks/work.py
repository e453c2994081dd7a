"""What the steps of all programs share: models' shapes, methods, the work of a step as a word, its clock and its row.

A work is written `lora`, `mixlora+lora`, `lora*8` or `lora*8@2x128`: the adapters of one batch and, after the @, the
rows of each and the tokens of a row, the shape's own where left out.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import torch


class Shape(NamedTuple):
    """A model and a batch: settings of a Llama, rows of each adapter, tokens of a row."""

    settings: dict[str, int]
    rows: int
    length: int

    def flops_per_token(self, length: int) -> float:
        """Return the operations of a training step that the frozen model alone needs for a token of such a row.

        A frozen weight is multiplied forward and for the gradient of its input, but has no gradient of its own; causal
        attention reads half the row on average. What adapters add is not counted, so that all programs and methods
        are held to the same.
        """
        s = self.settings
        width = s["hidden_size"]
        narrow = width * s["num_key_value_heads"] // s["num_attention_heads"]
        weights = 2 * width * (width + narrow) + 3 * width * s["intermediate_size"]
        attention = 6 * length * width
        return s["num_hidden_layers"] * (4 * weights + attention) + 4 * width * s["vocab_size"]


def _llama(hidden: int, intermediate: int, layers: int, heads: int, key_value_heads: int, vocabulary: int) -> dict:
    return {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocabulary,
    }


SHAPES = {
    "tiny": Shape(_llama(64, 128, 2, 4, 4, 256), 2, 32),
    "135m": Shape(_llama(576, 1536, 30, 9, 3, 49152), 16, 128),
    "7b": Shape(_llama(4096, 11008, 32, 32, 32, 32000), 8, 512),
    "30b": Shape(_llama(6656, 17920, 60, 52, 52, 32000), 4, 512),
}
MIXTURE = {"routing_strategy": "mixlora", "num_experts": 8, "top_k": 2, "r": 16, "lora_alpha": 32}
METHODS = {
    "lora": {"r": 80, "lora_alpha": 160},
    "dora": {"r": 80, "lora_alpha": 160, "use_dora": True},
    "mixlora": MIXTURE,
    "mixdora": MIXTURE | {"use_dora": True},
    "loramoe": {"routing_strategy": "loramoe", "num_experts": 6, "r": 24, "lora_alpha": 48, "target_modules": "mlp"},
    "mola": {"routing_strategy": "mola", "num_experts": 8, "top_k": 2, "r": 10, "lora_alpha": 20},
}
DROPOUT = 0.05
WARM = 2
"""Steps that are not counted: kernels are compiled, graphs recorded and memory is asked for in them."""


class Work(NamedTuple):
    """The adapters of one batch, the rows of each, the tokens of a row."""

    methods: tuple[str, ...]
    rows: int
    length: int

    @classmethod
    def parse(cls, text: str, shape: str) -> Work:
        """Read a work as this module's docstring describes it.

        Raises:
            ValueError: an unknown method, or numbers that are none.
        """
        adapters, _, batch = text.partition("@")
        methods: list[str] = []
        for part in adapters.split("+"):
            name, _, times = part.partition("*")
            if name not in METHODS:
                raise ValueError(f"{text!r}: {name!r} is none of {', '.join(METHODS)}")
            methods += [name] * int(times or 1)
        _, rows, length = SHAPES[shape]
        if batch:
            rows, length = (int(number) for number in batch.split("x"))
        return cls(tuple(methods), rows, length)

    @property
    def tokens(self) -> int:
        """Of a step of all adapters."""
        return len(self.methods) * self.rows * self.length

    def __str__(self) -> str:
        counts = {name: self.methods.count(name) for name in self.methods}
        adapters = "+".join(name if count == 1 else f"{name}*{count}" for name, count in counts.items())
        return f"{adapters}@{self.rows}x{self.length}"


class Clock:
    """Times steps and their parts: by the device's events on CUDA, by the processor's clock elsewhere."""

    def __init__(self, device: str) -> None:
        self.cuda = device != "cpu"
        self.seconds: list[float] = []
        self.parts: list[dict[str, float]] = []
        self._marks: list[tuple[str, Any]] = []
        self._began = 0.0
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self) -> None:
        """A step begins."""
        if self.cuda:
            torch.cuda.synchronize()
        self._began = time.perf_counter()
        self._marks = [("", self._now())]

    def mark(self, part: str) -> None:
        """The part of this name ends."""
        self._marks.append((part, self._now()))

    def end(self) -> None:
        """The step ends."""
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._began)
        pairs = pairwise(self._marks)
        took = {name: a.elapsed_time(b) if self.cuda else (b - a) * 1e3 for (_, a), (name, b) in pairs}
        self.parts.append(took)


def norms(parameters: Iterable[torch.Tensor]) -> float:
    """Return the sum of the gradients' norms."""
    return sum(float(p.grad.norm()) for p in parameters if p.grad is not None)


def row(program: str, shape: str, work: Work, clock: Clock, gradient_norms: float, **more: Any) -> dict:
    """Return a step's figures: a line of JSON that `benchmarks.compare` reads."""
    counted = clock.parts[WARM:]
    step = statistics.median(clock.seconds[WARM:])
    figures: dict[str, Any] = {"program": program, "shape": shape, "work": str(work), **more}
    figures["step_s"] = round(step, 4)
    figures["us_per_token"] = round(step / work.tokens * 1e6, 2)
    for name, average in ("parts_ms", statistics.median), ("mean_parts_ms", statistics.mean):
        figures[name] = {part: round(average([took[part] for took in counted]), 3) for part in counted[0]}
    figures["first_step_s"] = round(clock.seconds[0], 2)
    figures["gradient_norms"] = round(gradient_norms, 6)
    if clock.cuda:
        figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return figures


def matmul_rate(size: int = 8192, times: int = 30) -> float:
    """Return the operations per second of a large bf16 product, the best of three measurements on this GPU."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(times):
            a @ b
        torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - start) / times)
    return 2 * size**3 / best


if __name__ == "__main__":
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(json.dumps({"flops_per_second": matmul_rate(), **machine}))
