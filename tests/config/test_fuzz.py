"""Broken configs and hostile names: only ever a ConfigError, and no name that leaves its folder."""

from __future__ import annotations

import copy
import json
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlora.config import ConfigError, parse_config
from mlora.config.jsonfile import parse_json
from mlora.config.names import name_problem, same_folder

VALID: dict[str, Any] = {
    "cutoff_len": 512,
    "save_step": 1000,
    "train_strategy": "optim",
    "lora": [
        {"name": "a", "task_name": "arc-e", "lr": 2e-4, "r": 8, "target_modules": {"q_proj": True}, "warmup_steps": 0},
        {"name": "b", "routing_strategy": "mixlora", "top_k": 2, "expert_lora": {"r": 4}, "batch_size": 8, "data": "x"},
    ],
}
JUNK: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        0.5,
        1e308,
        -1e-308,
        10**400,
        float("nan"),
        float("inf"),
        "",
        "x",
        "\ud800",
        "\0",
        ";",
    ),
    *([], {}, [[]], [None], {"": None}, {"r": {"r": {}}}, ["x"] * 50, {str(i): i for i in range(50)}, "x" * 10_000),
]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of the config with every key or index in it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield value, key
        yield from places(item)


def mutate(rng: random.Random) -> Any:
    config = copy.deepcopy(VALID)
    for _ in range(rng.randint(1, 4)):
        container, key = rng.choice(list(places(config)) or [(config, "lora")])
        kind = rng.random()
        if kind < 0.6:
            container[key] = copy.deepcopy(rng.choice(JUNK))
        elif kind < 0.75:
            del container[key]
        elif isinstance(container, dict):
            container["".join(rng.choices(string.printable + "é\u2028\ud800", k=rng.randint(0, 12)))] = copy.deepcopy(
                rng.choice(JUNK)
            )
        else:
            container.append(copy.deepcopy(rng.choice(JUNK)))
    return config


def test_mutated_configs_raise_only_config_errors(seed: int, record_property: Callable[[str, object], None]) -> None:
    rng = random.Random(seed)
    refused = 0
    for _ in range(500):
        try:
            parse_config(mutate(rng), "mlora.json")
        except ConfigError as error:
            refused += 1
            text = str(error)
            assert len(text.splitlines()) <= 15
            text.encode()
    record_property("configs", 500)
    record_property("of them refused", refused)
    assert refused > 400


def test_mutated_texts_raise_only_config_errors(seed: int) -> None:
    rng = random.Random(seed + 1)
    original = json.dumps(VALID, indent=1)
    for _ in range(500):
        text = list(original)
        for _ in range(rng.randint(1, 5)):
            text[rng.randrange(len(text))] = rng.choice(['"', "{", "}", ",", "", "\n", "1", "e", "\\", "\ud800", "NaN"])
        try:
            parse_config(parse_json("".join(text), "mlora.json"))
        except ConfigError as error:
            str(error).encode()


def test_a_thousand_names_stay_in_their_folder(
    tmp_path: Path, seed: int, record_property: Callable[[str, object], None]
) -> None:
    rng = random.Random(seed + 2)
    parts = [
        "..",
        "/",
        "\\",
        "a",
        "B",
        "0",
        ".",
        "_",
        "-",
        "~",
        "$(id)",
        "`id`",
        ";",
        " ",
        "\n",
        "\0",
        "é",
        "%2e",
        "con",
        "nul",
    ]
    parts += ["C:", "|", "&", "*", "mlora.json", "adapters", "\u202e", "٣", "A" * 30]
    accepted = 0
    for _ in range(1000):
        name = "".join(rng.choices(parts, k=rng.randint(0, 4)))
        if name_problem(name) is None:
            accepted += 1
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            assert folder.parent == tmp_path and folder.resolve().parent == tmp_path.resolve()
            assert len(name) <= 64 and set(name) <= set(string.ascii_letters + string.digits + "._-") and name[0] != "."
    record_property("names", 1000)
    record_property("of them accepted", accepted)
    assert accepted > 50


def test_plain_names_are_accepted() -> None:
    for name in ["a", "arc_e_0", "mixlora", "A-1.5", "x" * 64, "-", "_", "0", "console", "com10", "v1..2"]:
        assert name_problem(name) is None, name


def test_reserved_names_are_refused() -> None:
    for name in ["", ".", "..", ".a", "a.", "x" * 65, "CON", "nul.txt", "Lpt1", "com9.x", "mlora.json", "MLORA.LOG"]:
        assert name_problem(name), name
    for name in ["config.json", "adapters", "Checkpoints", "README.md", "log.txt", "results.json", "report.html"]:
        assert name_problem(name), name


def test_names_of_one_folder() -> None:
    assert same_folder(["a", "b", "A"]) == ("a", "A")
    assert same_folder(["a", "b"]) is None
