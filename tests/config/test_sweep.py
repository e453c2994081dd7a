"""Sweeps: every combination once, and everything that is wrong with one said at once."""

from __future__ import annotations

import pytest

from mlora.config import ConfigError, parse_config
from mlora.config.sweep import parse_sweep

ENTRY = {"name": "a", "task_name": "arc-e", "r": 8}


def test_every_combination_once_the_first_key_changing_last() -> None:
    assert parse_sweep(" lr=1e-4, 2e-4 ; r=8,16;", [ENTRY]) == [
        {"lr": lr, "r": r} for lr in (1e-4, 2e-4) for r in (8, 16)
    ]
    assert parse_sweep("use_dora=true,False;optim=sgd", [ENTRY]) == [
        {"use_dora": value, "optim": "sgd"} for value in (True, False)
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr_rate=1", 'lr_rate: unknown key; did you mean "lr"?'),
        ("lr=1e-4,fast", 'lr: "fast" is not allowed; allowed: a number > 0'),
        ("r=8,0", "r: 0 is not allowed; allowed: a whole number >= 1"),
        ("optim=adam", 'optim: "adam" is not allowed'),
        ("num_experts=4", "num_experts: is a key of"),
        ("cutoff_len=64", "cutoff_len: belongs at the top level"),
        ("name=b", "name: is not swept; give it by --adapter_name"),
        ("r=8;r=16", "r: is given more than once"),
        ("r=8,8", "r: 8 is given more than once"),
        ("r", '"r" is not allowed; allowed: KEY=VALUE,VALUE'),
        ("=4", "is not allowed"),
        ("", "is not allowed"),
        ("r=", "is not allowed"),
    ],
)
def test_what_is_wrong_is_named(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_sweep(text, [ENTRY])
    assert caught.value.source == "--sweep" and said in str(caught.value)


def test_all_faults_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_sweep("lr=0,-1;r=x", [ENTRY, {**ENTRY, "name": "b"}])
    assert len(caught.value.problems) == 3


def test_a_config_names_keys_of_adapters() -> None:
    with pytest.raises(ConfigError, match='"lrr" is no key of an adapter; did you mean "lr"'):
        parse_config({"sweep": ["lrr"], "lora": [ENTRY]})
