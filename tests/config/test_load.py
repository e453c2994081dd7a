"""The config file: what it accepts, what each key changes, and how it says no."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from mlora.adapters import METHODS
from mlora.config import (
    ConfigError,
    JobConfig,
    RunConfig,
    check_name,
    load_config,
    parse_adapter,
    parse_config,
    resolved,
)
from mlora.config.jsonfile import parse_json, read_json, write_json
from mlora.config.schema import METHOD_KEYS, NO_EFFECT, entry_schema, job_keys, run_schema

ROOT = Path(__file__).parents[2]
SEED = ROOT.parent / "shared" / "seed" / "mixlora-readme.md"

LORA: dict[str, Any] = {"name": "a", "r": 8, "lora_alpha": 16}
MIXLORA: dict[str, Any] = {**LORA, "name": "b", "routing_strategy": "mixlora"}

# Values for keys whose type does not suggest one.
OTHERS: dict[str, Any] = {
    "sweep": ["lr"],
    "act_fn": "gelu",
    "cutoff_len": -1,
    "data": "yahma/alpaca-cleaned",
    "eval_data": "held-out.jsonl",
    "evaluate_result": "results.json",
    "expert_lora": {"r": 4},
    "micro_batch_size": 4,
    "name": "another",
    "prompt": "alpaca",
    "target_modules": {"q_proj": True, "k_proj": False},
    "task_name": "arc-e;arc-c",
    "top_k": 1,
}


def another(key: str, schema: dict[str, Any]) -> Any:
    """A value that the key may have and does not have by default."""
    if key in OTHERS:
        return OTHERS[key]
    default = schema.get("default")
    for option in schema.get("anyOf", [schema]):
        match option.get("type"):
            case "boolean":
                return not default
            case "integer":
                return (default or 0) + 2
            case "number":
                upper = option.get("maximum", option.get("exclusiveMaximum"))
                return (default or 0) + 2 if upper is None else (default + upper) / 2
            case "string" if "enum" in option:
                return next(value for value in option["enum"] if value != default)
    raise LookupError(f"add a value for {key} to OTHERS")


def one(**entry: Any) -> RunConfig:
    return parse_config({"lora": [{"name": "a", **entry}]})


def problems(obj: Any) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        parse_config(obj, "mlora.json")
    return {problem.path: problem.message for problem in caught.value.problems}


@pytest.mark.parametrize("key", [key for key in run_schema()["properties"] if key != "lora"])
def test_every_key_of_a_run_changes_it(key: str) -> None:
    value = another(key, run_schema()["properties"][key])
    assert parse_config({key: value, "lora": [LORA]}) != parse_config({"lora": [LORA]})


@pytest.mark.parametrize("key", job_keys())
def test_every_key_of_a_job_changes_it(key: str) -> None:
    value = another(key, entry_schema(METHODS["lora"])["properties"][key])
    assert parse_config({"lora": [{**LORA, key: value}]}) != parse_config({"lora": [LORA]})


@pytest.mark.parametrize(("method", "key"), [(name, key) for name, cls in METHODS.items() for key in cls.model_fields])
def test_every_key_of_a_method_changes_it(method: str, key: str) -> None:
    schema = entry_schema(METHODS[method])
    value = another(key, schema["properties"][key])
    assert parse_adapter({"routing_strategy": method, key: value}) != parse_adapter({"routing_strategy": method})


def test_the_keys_of_a_job_and_a_method_differ() -> None:
    for cls in METHODS.values():
        assert not {*job_keys(), *METHOD_KEYS, "method"} & set(cls.model_fields)


DOCUMENTED = """name protocol task_name data prompt optim scheduler_type warmup_steps warmup_ratio lr momentum
    weight_decay max_grad_norm loraplus_lr_ratio batch_size micro_batch_size evaluate_batch_size num_epochs
    evaluate_steps on_bad_row group_by_length train_on_inputs eval_data val_set_size limit eval_limit seed
    sparse_step""".split()
DOCUMENTED_FOR_RUN = """cutoff_len save_step keep_last train_lora_candidate_num train_lora_simultaneously_num
    train_strategy inference_lora_simultaneously_num eval_lora_simultaneously_num evaluate_result
    sweep lora""".split()


def test_documented_keys_are_there() -> None:
    assert set(job_keys()) == set(DOCUMENTED)
    assert set(run_schema()["properties"]) == set(DOCUMENTED_FOR_RUN)


@pytest.mark.parametrize("fragment", range(3))
def test_the_seed_files_blocks_load_verbatim(fragment: int) -> None:
    if not SEED.exists():
        pytest.skip("the seed's text is not beside this checkout")
    blocks = re.findall(r"```json\n(.*?)```", SEED.read_text(encoding="utf-8"), re.S)
    complete, *parts = [json.loads(re.sub(r"\n\s*\.\.\.|,(?=\s*\n\s*\.\.\.)", "", block)) for block in blocks]
    entry = [complete, {**complete, **parts[0]}, {**complete, **parts[0], **parts[-1]}][fragment]
    method = parse_config({"cutoff_len": 512, "lora": [entry]}).lora[0].method
    assert type(method) is METHODS[entry.get("routing_strategy", "lora")]
    assert method.target_modules == ("down_proj", "gate_proj", "q_proj", "up_proj", "v_proj")  # type: ignore[attr-defined]


def test_resolved_is_read_back_unchanged() -> None:
    config = parse_config(
        {"cutoff_len": -1, "lora": [LORA, {**MIXLORA, "expert_lora": {"r": 2}, "warmup_steps": 3.0, "sparse_step": 1}]}
    )
    assert parse_config(json.loads(json.dumps(resolved(config)))) == config
    assert set(job_keys()) - set(NO_EFFECT) <= set(resolved(config)["lora"][0])


def test_defaults() -> None:
    job = one().lora[0]
    assert (job.task_name, job.weight_decay, job.max_grad_norm, job.train_on_inputs) == ("casual", 0.01, None, False)
    assert one(batch_size=12).lora[0].micro_batch_size == 12
    assert one().train_lora_simultaneously_num is None
    assert one(warmup_steps=100.0).lora[0].warmup_steps == 100


@pytest.mark.parametrize(
    ("entry", "method"),
    [
        ({}, "lora"),
        ({"routing_strategy": "mixlora"}, "mixlora"),
        ({"peft_type": "MIXLORA"}, "mixlora"),
        ({"peft_type": "MIXLORA", "routing_strategy": "mixlora"}, "mixlora"),
        ({"peft_type": "LORA"}, "lora"),
        ({"peft_type": "LORA", "routing_strategy": None}, "lora"),
    ],
)
def test_the_method_is_chosen(entry: dict[str, Any], method: str) -> None:
    assert parse_adapter(entry).method == method


def test_methods_that_are_none() -> None:
    assert (
        "did you mean" in problems({"lora": [{"name": "a", "routing_strategy": "mixlroa"}]})["lora[0].routing_strategy"]
    )
    assert '"MIXLORA"' in problems({"lora": [{"name": "a", "peft_type": "IA3"}]})["lora[0].peft_type"]
    both = {"name": "a", "peft_type": "LORA", "routing_strategy": "mixlora"}
    assert '"MIXLORA"' in problems({"lora": [both]})["lora[0].peft_type"]
    assert "lora[0].routing_strategy" in problems({"lora": [{"name": "a", "routing_strategy": ["mixlora"]}]})


def test_an_adapter_alone_checks_and_drops_the_jobs_keys() -> None:
    assert parse_adapter({"r": 4}) == parse_adapter({"r": 4, "name": "x", "lr": 1.0, "batch_size": 3})
    with pytest.raises(ConfigError, match="lr: -1 is not allowed; allowed: a number > 0"):
        parse_adapter({"r": 4, "lr": -1})


def test_unknown_keys_are_named_with_path_and_nearest_name() -> None:
    found = problems(
        {
            "cutof_len": 1,
            "lr": 1,
            "lora": [
                {"name": "a", "lr_rate": 1, "learning_rate": 1, "top_k": 1, "save_step": 1},
                {"name": "b", "routing_strategy": "mixlora", "expert_lora": {"lora_alhpa": 1}, "method": "x"},
            ],
        }
    )
    assert found["cutof_len"] == 'unknown key; did you mean "cutoff_len"?'
    assert found["lora[0].lr_rate"] == found["lora[0].learning_rate"] == 'unknown key; did you mean "lr"?'
    assert re.fullmatch("is a key of .*mixlora.* only, this adapter is lora", found["lora[0].top_k"])
    assert found["lora[1].expert_lora.lora_alhpa"] == 'unknown key; did you mean "lora_alpha"?'
    assert "top level" in found["lora[0].save_step"]
    assert "adapters" in found["lr"]
    assert found["lora[1].method"].startswith("unknown key")


def test_keys_of_no_method_are_named_where_the_method_is_misspelt() -> None:
    entry = {"name": "a", "routing_strategy": "mixlra", "num_experts": 2, "task_nam": "piqa", "lerning_rate": 1}
    found = problems({"lora": [entry]})
    assert found.keys() == {"lora[0].routing_strategy", "lora[0].task_nam", "lora[0].lerning_rate"}
    assert found["lora[0].task_nam"] == 'unknown key; did you mean "task_name"?'
    assert found["lora[0].lerning_rate"] == 'unknown key; did you mean "lr"?', "as others call it, and misspelt"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", "8"),
        ("r", True),
        ("r", 0),
        ("r", 1.5),
        ("r", None),
        ("lr", "2e-4"),
        ("lr", float("inf")),
        ("lr", float("nan")),
        ("lr", 10**400),
        ("lr", 0),
        ("lora_dropout", 1.0),
        ("lora_dropout", False),
        ("use_rslora", "false"),
        ("use_rslora", 1),
        ("optim", "adam"),
        ("scheduler_type", "cosinus"),
        ("warmup_steps", 1.5),
        ("task_name", "arc_e"),
        ("task_name", ""),
        ("task_name", "arc-e;;arc-c"),
        ("task_name", "arc-e;casual"),
        ("data", ";"),
        ("target_modules", []),
        ("target_modules", {"q_proj": 1}),
        ("target_modules", "everything"),
        ("target_modules", [1]),
        ("name", "../a"),
        ("name", 3),
        ("expert_lora", {}),
        ("loraplus_lr_ratio", 0.5),
    ],
)
def test_a_wrong_value_is_shown_with_what_is_allowed(key: str, value: Any) -> None:
    found = problems({"lora": [{"name": "a", key: value}]})
    assert list(found) == [f"lora[0].{key}"]
    assert len(found[f"lora[0].{key}"]) > 20


@pytest.mark.parametrize(
    ("entry", "path"),
    [
        ({"batch_size": 16, "micro_batch_size": 3}, "micro_batch_size"),
        ({"warmup_steps": 3, "warmup_ratio": 0.1}, "warmup_ratio"),
        ({"eval_data": "x.jsonl", "val_set_size": 3}, "val_set_size"),
        ({"task_name": "arc-e;arc-c;piqa", "data": "a;b"}, "data"),
        ({"protocol": "loglikelihood", "task_name": "arc-e;csqa"}, "task_name"),
    ],
)
def test_keys_that_do_not_go_together(entry: dict[str, Any], path: str) -> None:
    assert list(problems({"lora": [{"name": "a", **entry}]})) == [f"lora[0].{path}"]


@pytest.mark.parametrize("obj", [None, [], 3, "x", {}, {"lora": []}, {"lora": {}}, {"lora": [3]}, {"lora": None}])
def test_what_is_no_config_at_all(obj: Any) -> None:
    assert problems(obj)


def test_every_error_at_once_in_plain_words_and_at_most_15_lines() -> None:
    entry = {"name": "a b", "r": -1, "lr": "x", "optim": "adam", "nope": 1, "batch_size": 0, "num_epochs": 0}
    obj = {"save_step": 0, "lora": [{**entry, "name": f"a {i}"} for i in range(5)]}
    with pytest.raises(ConfigError) as caught:
        parse_config(obj, "mlora.json")
    text = str(caught.value)
    assert len(caught.value.problems) == 1 + 5 * len(entry)
    assert len(text.splitlines()) == 15
    assert text.startswith("mlora.json: 36 problems") and text.endswith("... and 23 more")
    assert not re.search("pydantic|http|input_value|validation error|Input should", text)


def test_names_must_not_share_a_folder() -> None:
    for pair in [("a", "a"), ("a", "A")]:
        assert "differ by more than case" in problems({"lora": [{"name": name} for name in pair]})["lora[1].name"]
    with pytest.raises(ValueError, match="more than case"):
        RunConfig(lora=(one().lora[0], one().lora[0]))


def test_keys_without_effect_warn_once_for_each_file(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        parse_config(
            {"train_strategy": "optim", "lora": [{**LORA, "sparse_step": 1}, {**MIXLORA, "sparse_step": 1}]}, "x"
        )
    assert [record.getMessage() for record in caplog.records] == [
        "x: accepted for older files, without effect: train_strategy, sparse_step"
    ]
    caplog.clear()
    parse_config({"lora": [LORA]})
    assert not caplog.records


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"lora": [\n  {"name": "a",}\n]}', "line 2, column"),
        ('{"lora": [{"name": "a", "r": 1, "r": 2}]}', "lora[0].r: is given more than once"),
        ('{"lora": [\n  {"name": "a",}\n]}', "comma"),
        ('{"lora": [\n  {"name": "a"}, \n]}', "comma"),
        ("", "is empty"),
        ("lora: []", "is not JSON: line 1, column 1"),
        ("[" * 100_000, "nested too deeply"),
        ('{"lora": ' + "1" * 5000 + "}", "is not JSON"),
        ("\xff", "not UTF-8"),
    ],
)
def test_broken_files_say_where(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mlora.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(path)


def test_a_missing_file_names_gen(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file; `python launch.py gen` writes one"):
        load_config(tmp_path / "mlora.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


def test_an_editors_schema_line_and_byte_order_mark_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "mlora.json"
    path.write_text('\ufeff{"$schema": "x", "lora": [{"name": "a"}]}', encoding="utf-8")
    assert load_config(path) == one()


def test_writing_is_atomic(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert [file.name for file in path.parent.iterdir()] == ["x.json"]
    assert path.read_text().endswith("}\n")


def test_parse_json_names_its_source() -> None:
    with pytest.raises(ConfigError, match="^--config: is not JSON"):
        parse_json("{", "--config")


@pytest.mark.parametrize("path", [*(ROOT / "configs").glob("*.json"), *(ROOT / "templates").glob("*.json")], ids=str)
def test_shipped_files_load_without_a_warning(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(path)
    assert config.lora
    assert not caplog.records


def test_the_templates_keep_the_predecessors_values() -> None:
    for name, r, alpha in [("lora", 80, 160), ("mixlora", 16, 32)]:
        config = load_config(ROOT / "templates" / f"{name}.json")
        job: JobConfig = config.lora[0]
        method: Any = job.method
        assert (config.cutoff_len, config.save_step, config.train_lora_simultaneously_num) == (512, 1000, 2)
        assert (job.batch_size, job.micro_batch_size, job.evaluate_batch_size, job.num_epochs) == (16, 8, 16, 2)
        assert (job.lr, job.optim, job.scheduler_type, method.lora_dropout) == (2e-4, "adamw", "constant", 0.05)
        assert (method.method, method.r, method.lora_alpha) == (name, r, alpha)


def test_check_name_says_what_is_allowed() -> None:
    check_name("mixlora_0")
    with pytest.raises(ConfigError, match="adapter name: .* expected letters, digits"):
        check_name("../x")


def test_a_name_twice_is_told_beside_the_other_faults() -> None:
    found = problems({"cutoff": 1, "lora": [{**LORA, "name": "a"}, {**LORA, "name": "A"}]})
    assert found["lora[1].name"].startswith('"A" is not allowed') and "lora[0] has it" in found["lora[1].name"]
    assert set(found) == {"cutoff", "lora[1].name"}


def test_no_adapters() -> None:
    assert problems({"lora": []})["lora"] == "[] is not allowed; allowed: a list of at least one adapter"
