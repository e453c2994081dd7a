"""Generation with 1, 4 and 8 LoRA adapters: ours in one batch, PEFT one adapter after the other and in its mixed batch.

    python -m benchmarks.generation --base_model smollm2 [--device cuda] [--adapters 1 4 8] [--new_tokens 32]
    python -m benchmarks.generation --shape 7b --device cuda        (random bf16 weights)

Each adapter gets one prompt of 32 tokens and answers greedily with exactly `--new_tokens`. Prints a line of JSON for
each program: seconds to the first token of the first and of the last adapter, tokens of all adapters per second of the
whole, and how many answers are ours token for token. Medians of rounds in which the programs take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks.step import build
from benchmarks.work import SHAPES
from mlora import MultiAdapterModel
from mlora.model import load
from mlora.model.generate import complete

RANK, PROMPT = 16, 32
Answers = list[list[int]]


class Clock(StoppingCriteria):
    """Notes when the first token is there, on the CPU."""

    def __init__(self) -> None:
        self.first: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        input_ids[:, -1].tolist()
        self.first = self.first or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def models(args: argparse.Namespace, count: int) -> tuple[MultiAdapterModel, PeftModel]:
    """Return our model and PEFT's with the same adapters over the same base."""
    if args.base_model:
        ours = MultiAdapterModel.from_pretrained(args.base_model, args.dtype, args.device)
    else:
        ours = build(args.shape, args.device)
    names = [f"a{i}" for i in range(count)]
    for name in names:
        ours.add_adapter(name, {"r": RANK, "lora_alpha": 2 * RANK})
        for kind, parameter in ours.adapter_parameters(name):
            if kind == "lora_B":
                parameter.data.normal_(0, 0.02)
    if args.base_model:
        origin = load.find(args.base_model)
        dtype = getattr(torch, args.dtype)
        base = load.load_model(origin, load.load_config(origin), dtype, args.device, None, "sdpa")
    else:
        base = build(args.shape, args.device)
        base.sites.unwrap()
        base = base.hf_model
        base.set_attn_implementation("sdpa")
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", init_lora_weights=False)
    theirs: Any = get_peft_model(base, config, names[0])
    for name in names[1:]:
        theirs.add_adapter(name, config)
    for name in names:
        tensors = ours.adapter_tensors(name)
        own = {n.replace(f".{name}.", "."): p for n, p in theirs.named_parameters() if f".{name}." in n}
        for path, tensor in tensors.items():
            own[path].data.copy_(tensor)
    return ours, theirs.eval().requires_grad_(False)


@torch.no_grad()
def programs(
    ours: MultiAdapterModel, theirs: Any, prompts: list[list[int]], new: int
) -> dict[str, Callable[[], tuple[float, float, Answers]]]:
    """Return what is measured: each gives the first and the last adapter's time to a first token, and the answers."""
    names = list(ours.adapters)
    exact = {"min_new_tokens": new, "do_sample": False}
    eos = ours.hf_model.generation_config.eos_token_id
    exact |= {} if eos is None else {"eos_token_id": eos}

    def batch() -> tuple[float, float, Answers]:
        seen: dict[int, float] = {}
        started = time.perf_counter()
        done = complete(
            ours, prompts, names, new, on_piece=lambda p: seen.setdefault(p.row, time.perf_counter()), **exact
        )
        return seen[0] - started, seen[len(names) - 1] - started, [list(answer.token_ids) for answer in done]

    def peft(rows: list[list[int]], **keywords: Any) -> tuple[float, Answers]:
        clock = Clock()
        ids = torch.tensor(rows, device=ours.device)
        out = theirs.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]), **exact, **keywords,
        )  # fmt: skip
        assert clock.first is not None
        return clock.first, out[:, PROMPT:].tolist()

    def in_turn() -> tuple[float, float, Answers]:
        started, firsts, answers = time.perf_counter(), [], []
        for name, prompt in zip(names, prompts, strict=True):
            theirs.set_adapter(name)
            first, answer = peft([prompt])
            firsts.append(first - started)
            answers += answer
        return firsts[0], firsts[-1], answers

    def mixed() -> tuple[float, float, Answers]:
        started = time.perf_counter()
        first, answers = peft(prompts, adapter_names=names)
        return first - started, first - started, answers

    return {"ours, one batch": batch, "PEFT, one adapter at a time": in_turn, "PEFT, adapter_names": mixed}


def measure(args: argparse.Namespace, count: int) -> None:
    """Print a line for each program with this many adapters."""
    ours, theirs = models(args, count)
    draw = torch.Generator().manual_seed(0)
    vocabulary = ours.hf_model.get_input_embeddings().weight.shape[0]
    prompts = torch.randint(10, vocabulary - 10, (count, PROMPT), generator=draw).tolist()
    if ours._tokenizer is None and not args.base_model:
        ours.use_tokenizer(_NoTokenizer())
    found = programs(ours, theirs, prompts, args.new_tokens)
    answers = {name: program()[2] for name, program in found.items()}  # warms up too
    first = next(iter(answers.values()))
    same = {name: sum(a == b for a, b in zip(own, first, strict=True)) for name, own in answers.items()}
    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in found}
    for _ in range(args.rounds):
        for name, program in found.items():
            started = time.perf_counter()
            head, tail, _ = program()
            taken[name].append((head, tail, time.perf_counter() - started))
    for name, rounds in taken.items():
        head, tail, whole = (statistics.median(column) for column in zip(*rounds, strict=True))
        line = {
            "program": name,
            "adapters": count,
            "first_token_s": round(head, 3),
            "last_adapters_first_token_s": round(tail, 3),
            "tokens_per_s": round(count * args.new_tokens / whole, 1),
            "answers_equal_to_ours": f"{same[name]} of {count}",
        }
        print(json.dumps(line), flush=True)


class _NoTokenizer:
    """Stands in where weights are random: token ids in, token ids out."""

    pad_token_id, eos_token_id, bos_token_id = 0, None, 1

    def decode(self, ids: list[int], **keywords: Any) -> str:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", help="of a named base model")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), **vars(args)}), flush=True)
    for count in args.adapters:
        measure(args, count)


if __name__ == "__main__":
    main()
