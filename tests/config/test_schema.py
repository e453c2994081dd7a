"""The published JSON Schema: complete, described, and true."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mlora.adapters import METHODS
from mlora.config import parse_config
from mlora.config.check import check
from mlora.config.schema import DRAFT, entry_schema, file_schema, job_keys


def test_every_key_of_every_method_is_described() -> None:
    schema = file_schema()
    assert schema["$schema"] == DRAFT
    assert {key for key, part in schema["properties"].items() if not part.get("description")} == {"$schema"}
    for name, cls in METHODS.items():
        properties = schema["$defs"][name]["properties"]
        assert set(properties) == {*job_keys(), *cls.model_fields, "routing_strategy", "peft_type"}
        for key, part in properties.items():
            assert part.get("description"), f"{name}.{key} has no docstring"
            assert "\n" not in part["description"]
    assert all(part.get("description") for part in schema["$defs"]["ExpertLora"]["properties"].values())


@pytest.mark.parametrize(
    ("name", "default", "meaning"),
    [
        ("loramoe", False, "Whether the load balancing loss is trained."),
        ("mola", True, "Whether the auxiliary losses of the router are trained."),
    ],
)
def test_a_key_of_two_parents_is_described_by_the_one_it_is_of(name: str, default: bool, meaning: str) -> None:
    key = entry_schema(METHODS[name])["properties"]["router_loss"]
    assert (key["default"], key["description"]) == (default, meaning)


def test_a_method_without_a_source_has_a_schema() -> None:
    module: dict[str, Any] = {"__name__": "typed_in"}
    exec("from mlora.adapters.lora import LoraConfig\nclass Typed(LoraConfig):\n    extra: int = 1\n", module)
    properties = entry_schema(module["Typed"])["properties"]
    assert properties["extra"] == {"default": 1, "type": "integer"}
    assert properties["r"]["description"]


def test_it_is_json_and_every_reference_leads_somewhere() -> None:
    schema = file_schema()
    assert json.loads(json.dumps(schema)) == schema

    def references(part: Any) -> list[str]:
        if isinstance(part, dict):
            own = [part["$ref"]] if "$ref" in part else []
            return own + [ref for value in part.values() for ref in references(value)]
        return [ref for value in part for ref in references(value)] if isinstance(part, list) else []

    assert references(schema)
    assert all(ref.removeprefix("#/$defs/") in schema["$defs"] for ref in references(schema))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj"], {"q_proj": True, "k_proj": False}])
def test_it_allows_what_loads(targets: Any) -> None:
    entry = {"name": "a", "target_modules": targets, "warmup_steps": 3.0, "expert_lora": {"r": 4}, "data": None}
    entry |= {"routing_strategy": "mixlora"}
    parse_config({"lora": [entry]})
    schema = entry_schema(METHODS["mixlora"])
    assert list(check(entry, schema, "", schema["$defs"])) == []
