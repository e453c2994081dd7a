"""Run folders as runs write them, without running anything."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "date": "2026-01-02T03:04:05+00:00",
    "command": ["train.py", "--base_model=tiny", "--dir=a b"],
    "options": {"base_model": "tiny"},
    "device": "cpu",
    "python": "3.11.7",
    "versions": {"torch": "2.13.0"},
}


def adapter(name: str, **settings: Any) -> dict[str, Any]:
    return {"name": name, "task_name": "boolq", "routing_strategy": "lora", "r": 8, "lr": 2e-4} | settings


def mixture(name: str, **settings: Any) -> dict[str, Any]:
    return adapter(name, routing_strategy="mixlora", num_experts=4, top_k=2, **settings)


def result(adapter: str, task: str, value: float, **settings: Any) -> dict[str, Any]:
    made = {"adapter": adapter, "task": task, "metric": "accuracy", "protocol": "letter", "value": value}
    return made | {"standard_error": 0.02, "n": 500, "limit": None} | settings


def profile(adapter: str, step: int | None, **settings: Any) -> dict[str, Any]:
    layers = [
        {
            "layer": i,
            "path": f"model.layers.{i}.mlp",
            "share": [0.4, 0.3, 0.3, 0.0],
            "balance": 0.79,
            "entropy": 0.6,
            "dead": [3],
        }
        for i in range(3)
    ]
    made = {"adapter": adapter, "step": step, "split": "train", "task": "boolq", "protocol": "letter", "tokens": 64}
    return made | {"layers": layers} | settings


def write_run(
    folder: Path,
    adapters: list[dict[str, Any]],
    results: list[dict[str, Any]] | None = None,
    steps: int = 30,
    evaluations: tuple[int, ...] = (),
    seed: int = 0,
) -> Path:
    """Write a run of adapters whose losses fall; mixtures have routers."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = [entry["name"] for entry in adapters]
    (folder / "config.json").write_text(json.dumps({"cutoff_len": 512, "lora": adapters}))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    if results is None:
        results = [result(name, "boolq", 0.5 + 0.1 * i) for i, name in enumerate([*names, "base model"])]
    (folder / "results.json").write_text(json.dumps(results))
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            for entry in adapters:
                line = {"adapter": entry["name"], "step": step, "loss": 1 + math.exp(-step / 9) + 0.1 * draw.random()}
                line |= {"aux_loss": 0.002 if "num_experts" in entry else 0.0, "num_tokens": 100.0, "lr": 2e-4 * step}
                line |= {"grad_norm": 1.0 + draw.random(), "seconds": 0.5, "max_memory_bytes": 3.0 * 2**30}
                file.write(json.dumps(line) + "\n")
                if step in evaluations:
                    measured = {
                        "adapter": entry["name"],
                        "step": step,
                        "task": "boolq",
                        "protocol": "letter",
                        "metric": "accuracy",
                    }
                    file.write(json.dumps(measured | {"value": 0.4, "standard_error": 0.03, "n": 500}) + "\n")
    routed = [entry["name"] for entry in adapters if "num_experts" in entry]
    if routed:
        lines = [profile(name, step) for name in routed for step in (steps // 2, steps)]
        lines += [profile(name, None, split="test", task=task) for name in routed for task in ("boolq", "obqa")]
        (folder / "router.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
