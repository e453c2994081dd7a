"""What packing wins on rows of real lengths: those of the eight tasks, packed by ours, padded by ours and by PEFT.

    python -m benchmarks.packing 7b packed+graphs packed padded peft [--rows 32] [--batches 6] [--adapters 8]
    python -m benchmarks.packing 135m packed padded peft --base_model smollm2 --rows 8 --batches 3 --device cpu
    python -m benchmarks.packing --lengths --data_path FOLDER --base_model smollm2   (writes lengths.json anew)

Lengths of rows and of their labels are real, the tokens are drawn at random: no arithmetic depends on them.
`lengths.json` holds [tokens, label tokens] of rows of each task's training split by SmolLM2's tokenizer. A batch draws
its rows from all tasks for one adapter; with `--adapters 8` each adapter has rows of its own task. Every batch comes
twice and the second time counts: what depends on a batch's size is compiled and recorded before. Microseconds are of
real tokens; `filled` is the share of real tokens in padded rows. Padded rows of ours are computed without graphs.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch

from benchmarks.step import build, equip, gradients
from benchmarks.work import SHAPES, Clock, Work, norms
from mlora import MultiAdapterModel
from mlora.data import load_training_samples
from mlora.model.batch import IGNORED, Row
from mlora.model.graphs import Graphs
from mlora.training.update import Updates

TASKS = ("arc-e", "arc-c", "boolq", "obqa", "piqa", "siqa", "hellaswag", "winogrande")
LENGTHS = Path(__file__).with_name("lengths.json")
KEPT, LONGEST = 128, 512
"""Rows of each task in the file, and where they are cut off."""
Batches = list[dict[str, list[Row]]]


def read_lengths(data: str, base_model: str) -> dict[str, list[list[int]]]:
    """Return [tokens, label tokens] of the first rows of each task."""
    tokenizer = MultiAdapterModel.from_pretrained(base_model).tokenizer
    found = {}
    for task in TASKS:
        samples = load_training_samples(task, data, tokenizer, LONGEST, limit=KEPT)
        found[task] = [[len(s.input_ids), sum(label != IGNORED for label in s.labels)] for s in samples]
    return found


def draw(lengths: dict[str, list[list[int]]], names: list[str], rows: int, batches: int, vocabulary: int) -> Batches:
    """Return batches of so many rows: of all tasks for one adapter, of its own task for each of several."""
    source = random.Random(0)
    pools = [lengths[task] for task in TASKS] if len(names) > 1 else [list(chain.from_iterable(lengths.values()))]
    found: Batches = []
    for _ in range(batches):
        batch = {}
        for number, name in enumerate(names):
            chosen = source.sample(pools[number % len(pools)], rows // len(names))
            ids = [[source.randrange(1, vocabulary) for _ in range(tokens)] for tokens, _ in chosen]
            labels = [[IGNORED] * (tokens - wanted) + own[tokens - wanted :]
                      for own, (tokens, wanted) in zip(ids, chosen, strict=True)]  # fmt: skip
            batch[name] = [Row(*row, name, index) for index, row in enumerate(zip(ids, labels, strict=True))]
        found.append(batch)
    return found


Step = Callable[[dict[str, list[Row]], int, Clock], None]
Made = tuple[Step, dict[str, torch.optim.Optimizer], list[torch.nn.Parameter]]


def ours(options: argparse.Namespace, program: str) -> Made:
    """Return our model's step, its optimizers by adapter, and their parameters."""
    if options.base_model:
        dtype = options.dtype or "float32"
        model = MultiAdapterModel.from_pretrained(options.base_model, dtype, options.device)
    else:
        model = build(options.shape, options.device, options.dtype)
    how, _, extra = program.partition("+")
    if how == "padded":
        model.hf_model.set_attn_implementation("sdpa")
        model.padded = True
    if options.device != "cpu":
        model.compile()
    optimizers = equip(model, [options.method] * options.adapters)
    graphs = Graphs(model) if extra == "graphs" else None

    def step(rows: dict[str, list[Row]], number: int, clock: Clock) -> None:
        gradients(model, graphs if graphs is not None and graphs.suits(rows) else None, rows, number, clock)

    return step, optimizers, [p for name in optimizers for _, p in model.adapter_parameters(name)]


def peft(options: argparse.Namespace) -> Made:
    """Return the step of transformers and PEFT, its optimizer and parameters."""
    from benchmarks.peft_step import build as build_peft

    options.recompute = False
    model = build_peft(options, options.method)
    half = next(model.parameters()).dtype == torch.bfloat16
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, fused=True)

    def step(rows: dict[str, list[Row]], number: int, clock: Clock) -> None:
        own = rows["peft"]
        longest = max(len(row.input_ids) for row in own)
        ids, mask, labels = (
            torch.tensor([[*values(row), *[filler] * (longest - len(row.input_ids))] for row in own]).to(options.device)
            for values, filler in (
                (lambda row: row.input_ids, 0),
                (lambda row: [1] * len(row.input_ids), 0),
                (lambda row: row.labels, IGNORED),
            )
        )
        with torch.autocast(options.device, torch.bfloat16, enabled=half):
            loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()

    return step, {"peft": optimizer}, trained


def measure(options: argparse.Namespace, program: str) -> dict:
    """Time every batch of a program and return its line."""
    lengths = json.loads(LENGTHS.read_text(encoding="utf-8"))
    step, optimizers, parameters = peft(options) if program == "peft" else ours(options, program)
    vocabulary = SHAPES[options.shape].settings["vocab_size"]
    batches = draw(lengths, list(optimizers), options.rows, options.batches, vocabulary)
    clock, updates = Clock(options.device), Updates()
    found = 0.0
    for number, rows in enumerate(batches + batches):
        clock.begin()
        step(rows, number, clock)
        if program == "peft":
            optimizers["peft"].step()
        else:
            updates.step([*optimizers.values()], [None] * len(optimizers))
        clock.end()
        found = norms(parameters)
        for optimizer in optimizers.values():
            optimizer.zero_grad()
    every = [[len(row.input_ids) for own in batch.values() for row in own] for batch in batches]
    tokens = sum(map(sum, every))
    seconds = sum(clock.seconds[len(batches) :])
    work = Work((options.method,) * len(optimizers), options.rows // len(optimizers), tokens // sum(map(len, every)))
    figures = {
        "program": "PEFT" if program == "peft" else "ours",
        "variant": "padded" if program == "peft" else program,
        "shape": options.shape,
        "work": str(work),
        "us_per_token": round(seconds / tokens * 1e6, 2),
        "tokens_per_s": round(tokens / seconds, 1),
        "filled": round(tokens / sum(len(batch) * max(batch) for batch in every), 3),
        "first_step_s": round(clock.seconds[0], 2),
        "gradient_norms": round(found, 6),
    }
    if clock.cuda:
        figures["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="?", choices=SHAPES, default="tiny")
    parser.add_argument("programs", nargs="*", help="packed, packed+graphs, padded or peft")
    parser.add_argument("--lengths", action="store_true", help="write lengths.json anew")
    parser.add_argument("--data_path", help="folder with a folder for each task")
    parser.add_argument("--base_model", help="a model of this shape in place of random weights")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--method", default="lora")
    parser.add_argument("--adapters", type=int, default=1)
    parser.add_argument("--rows", type=int, default=32, help="of a batch, all adapters together")
    parser.add_argument("--batches", type=int, default=6)
    options = parser.parse_args()
    if options.lengths:
        found = read_lengths(options.data_path, options.base_model or "smollm2")
        lines = ",\n".join(f"{json.dumps(task)}: {json.dumps(rows)}" for task, rows in found.items())
        LENGTHS.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
        return
    for program in options.programs:
        print(json.dumps(measure(options, program)), flush=True)
        gc.collect()
        if options.device != "cpu":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
