"""LoRA learnt by transformers and PEFT where `launch.py reproduce` learns it: scores to hold ours against.

    python -m benchmarks.peft_task glue:sst2 --base_model MODEL --data_path DATA --train_limit 16000 --batch_size 32

A task with classes, the grid's own settings of one seed, the same tokens in the same order; forward, backward,
dropout, optimizer and head are transformers', PEFT's and torch's, on padded rows. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import peft
import torch
from transformers import AutoModelForSequenceClassification

from benchmarks.peft_step import LINEARS
from mlora.adapters.lora import LoraConfig
from mlora.config import JobConfig
from mlora.data import load_training_samples
from mlora.evaluation.questions import Examination, QuestionSet
from mlora.model import load
from mlora.runs.reproduce import Reproduction
from mlora.tasks import METRICS, find_task
from mlora.training.order import Order
from mlora.training.schedule import build_schedule


def build(base_model: str, job: JobConfig, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the tokenizer and the base model with a head and an adapter, ready to train."""
    if not isinstance(job.method, LoraConfig):
        raise TypeError(f"{job.name} is no LoRA")
    origin = load.find(base_model)
    causal = load.load_model(origin, load.load_config(origin), dtype, device, None, "sdpa")
    tokenizer = load.load_tokenizer(origin)
    config = causal.config
    config.num_labels, config.pad_token_id, config.use_cache = job.num_labels, 0, False
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa")
    setattr(model, model.base_model_prefix, causal.base_model)
    model.score.float()  # as adapters are
    settings = {"r": job.method.r, "lora_alpha": job.method.lora_alpha, "lora_dropout": job.method.lora_dropout}
    lora = peft.LoraConfig(**settings, target_modules=LINEARS, task_type="SEQ_CLS")
    return tokenizer, peft.get_peft_model(model, lora).to(device).train()


def logits(model: Any, rows: Sequence[Sequence[int]], device: str, dtype: torch.dtype) -> torch.Tensor:
    """Return the logits of padded rows, [rows, classes] float32."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    inner = model.base_model.model
    with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        hidden = inner.base_model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state
    ends = hidden[torch.arange(len(rows)), mask.sum(-1) - 1]  # its own way to the last token goes by the padding's id
    return inner.score(ends.float())


def batches(order: Order) -> Iterator[tuple[list[Sequence[int]], list[int]]]:
    """Yield the token ids and the classes of every step."""
    for step in range(order.total_steps):
        rows = order.rows_of(step)
        yield [row.input_ids for row in rows], [int(row.class_id or 0) for row in rows]


def measure(grid: Reproduction, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Train and score the grid's one adapter by PEFT."""
    (job,) = grid.jobs().lora
    torch.manual_seed(job.seed or 0)
    tokenizer, model = build(grid.base_model, job, device, dtype)
    cutoff = grid.cutoff_len
    samples = load_training_samples(job.task_name, job.data, tokenizer, cutoff, limit=job.limit)
    asked = Examination(None, job.task_name, job.data, job.eval_limit)
    questions = QuestionSet.load(asked, tokenizer, cutoff)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job.lr, weight_decay=job.weight_decay, fused=True)
    order = Order(job, samples, job.seed or 0)
    schedule = build_schedule(job, optimizer, order.total_steps)
    began = time.perf_counter()
    for rows, classes in batches(order):
        loss = torch.nn.functional.cross_entropy(
            logits(model, rows, device, dtype), torch.tensor(classes, device=device)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, job.max_grad_norm or float("inf"))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - began
    model.eval()
    chosen: list[int] = []
    with torch.no_grad():
        prompts = [question.prompt_ids for question in questions.encoded]
        for start in range(0, len(prompts), 64):
            chosen += logits(model, prompts[start : start + 64], device, dtype).argmax(-1).tolist()
    scores = {metric: METRICS[metric](chosen, questions.answers) for metric in find_task(job.task_name).metrics}
    return {
        "task": job.task_name,
        "rows": len(questions.answers),
        "steps": order.total_steps,
        **{metric: [round(s.value, 4), s.stderr and round(s.stderr, 4)] for metric, s in scores.items()},
        "train_s": round(seconds, 1),
        "loss": round(loss.item(), 4),
        "parameters": sum(p.numel() for p in trained),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+")
    parser.add_argument("--base_model", default="smollm2")
    parser.add_argument("--data_path")
    parser.add_argument("--seed", default="1")
    for flag in "train_limit", "test_limit", "num_epochs", "batch_size":
        parser.add_argument(f"--{flag}", type=int)
    parser.add_argument("--scale", choices=("paper", "small"), default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = vars(parser.parse_args())
    device, tasks, seed = given.pop("device"), given.pop("tasks"), given.pop("seed")
    for task in tasks:
        grid = Reproduction(**given, methods="lora", tasks=task, seeds=seed)
        line = measure(grid, device, torch.bfloat16 if device == "cuda" else torch.float32)
        print(json.dumps({"program": f"PEFT {peft.__version__}", "seed": seed, **line}), flush=True)
