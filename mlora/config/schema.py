"""The config file as JSON Schema (draft 2020-12): editors read it, and `check` holds files to it.

An adapter entry is one flat object, its job's keys beside its method's, so each method has a definition of its own.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from mlora.adapters import METHODS, Method
from mlora.config.job import JobConfig
from mlora.config.run import RunConfig

DRAFT = "https://json-schema.org/draft/2020-12/schema"
DEFAULT_METHOD = "lora"
METHOD_KEYS = ("routing_strategy", "peft_type")
"""Keys that choose the method; the second is the predecessors' synonym."""
NO_EFFECT = ("train_lora_candidate_num", "train_strategy", "sparse_step")
"""Keys of the predecessors' files that change nothing here."""

Schema = dict[str, Any]


def file_schema() -> Schema:
    """Return the schema of the whole file."""
    entries = {name: entry_schema(cls) for name, cls in METHODS.items()}
    shared = {key: value for entry in entries.values() for key, value in entry["$defs"].items()}
    methods = {name: {k: v for k, v in entry.items() if k != "$defs"} for name, entry in entries.items()}
    schema = run_schema()
    lora = schema["properties"]["lora"] | {"items": {"anyOf": [{"$ref": f"#/$defs/{name}"} for name in entries]}}
    properties = {"$schema": {"type": "string"}} | schema["properties"] | {"lora": lora}
    return {"$schema": DRAFT, "title": "m-LoRA config"} | schema | {"properties": properties, "$defs": methods | shared}


@cache
def run_schema() -> Schema:
    """Return the schema of the top level, entries of `lora` left open."""
    schema = _of(RunConfig)
    lora = schema["properties"]["lora"]
    return _object(schema | {"properties": schema["properties"] | {"lora": lora | {"items": {}}}, "$defs": {}})


@cache
def entry_schema(cls: type[Method]) -> Schema:
    """Return the schema of an adapter entry with a given method."""
    job, method = _of(JobConfig), _of(cls)
    chosen: Schema = {
        "routing_strategy": {"enum": [cls.method, None], "description": "Method of the adapter."},
        "peft_type": {"enum": [cls.peft_type, None], "description": "Synonym of routing_strategy in older files."},
    }
    named = {} if cls.method == DEFAULT_METHOD else {"anyOf": [{"required": [key]} for key in METHOD_KEYS]}
    return named | _object(
        {
            "description": method.get("description", ""),
            "properties": {k: v for k, v in job["properties"].items() if k != "method"} | chosen | method["properties"],
            "required": [key for key in job["required"] if key != "method"] + method.get("required", []),
            "$defs": {k: v for k, v in job.get("$defs", {}).items() if k != "Method"} | method.get("$defs", {}),
        }
    )


def job_keys() -> list[str]:
    """Return the keys of an adapter entry that are not its method's."""
    return [key for key in JobConfig.model_fields if key != "method"]


def _object(schema: Schema) -> Schema:
    return {"type": "object", "additionalProperties": False} | {k: v for k, v in schema.items() if k != "title"}


@cache
def _of(cls: type[BaseModel]) -> Schema:
    schema: Schema = _tidy(cls.model_json_schema(schema_generator=_WithDocstrings))
    targets = schema["properties"].get("target_modules")
    if targets is not None:  # the predecessors' form, which the method turns into names before it is validated
        targets["anyOf"].append({"type": "object", "additionalProperties": {"type": "boolean"}})
    return schema


class _WithDocstrings(GenerateJsonSchema):
    """Keys are described by the docstrings below them.

    Pydantic itself would read every source whenever its class is made, which is at the start of every command.
    """

    def model_schema(self, schema: Any) -> Schema:
        described: Schema = super().model_schema(schema)
        texts = _docstrings(schema["cls"])
        for key, part in described.get("properties", {}).items():
            if key in texts:
                part.setdefault("description", texts[key])
        return described


@cache
def _docstrings(cls: type) -> dict[str, str]:
    """Return the docstrings of a model's keys; of several parents' the first's, from which pydantic has the key."""
    if not issubclass(cls, BaseModel) or cls is BaseModel:
        return {}
    inherited = {key: text for base in reversed(cls.__bases__) for key, text in _docstrings(base).items()}
    return inherited | _docstrings_in(cls.__module__).get(cls.__qualname__, {})


@cache
def _docstrings_in(module: str) -> dict[str, dict[str, str]]:
    """Return the docstrings below the annotated attributes of a module's classes; none of what was typed in."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError):
        return {}
    return {cls.name: dict(_pairs(cls)) for cls in tree.body if isinstance(cls, ast.ClassDef)}


def _pairs(cls: ast.ClassDef) -> Iterator[tuple[str, str]]:
    for above, below in pairwise(cls.body):
        match above, below:
            case ast.AnnAssign(target=ast.Name(id=key)), ast.Expr(value=ast.Constant(value=str(text))):
                yield key, text


def _tidy(schema: Any) -> Any:
    """Drop the titles that pydantic makes from field names, and the line breaks of docstrings."""
    if isinstance(schema, dict):
        tidy = {k: _tidy(v) for k, v in schema.items() if k != "title" or not isinstance(v, str)}
        if isinstance(tidy.get("description"), str):
            tidy["description"] = " ".join(tidy["description"].split())
        return tidy
    if isinstance(schema, list):
        return [_tidy(item) for item in schema]
    return schema
