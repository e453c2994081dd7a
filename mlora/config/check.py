"""Holding JSON values to a schema: unknown and missing keys, and the JSON type of each value.

pydantic reads "8" and true as numbers; a config file that says so is mistaken, and a schema-aware editor would mark
it. So structure and types are checked here against the published schema, limits and rules by pydantic afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard, TypeVar

from pydantic import BaseModel, ValidationError

from mlora.config.errors import Problem, did_you_mean, show
from mlora.config.schema import Schema

_LIMITS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_LARGEST = 1e308
_Model = TypeVar("_Model", bound=BaseModel)


def check(value: object, schema: Schema, path: str, defs: Schema) -> Iterator[Problem]:
    """Yield every key that is unknown or missing and every value of a wrong JSON type.

    Args:
        value: as parsed from JSON.
        schema: that it is held to.
        path: of the value, for messages.
        defs: what `$ref` refers to.
    """
    schema = _resolve(schema, defs)
    if isinstance(value, dict):
        schema = next((s for s in map(_resolver(defs), schema.get("anyOf", [])) if "properties" in s), schema)
    if not isinstance(value, dict) or "properties" not in schema:
        if not _fits(value, schema, defs):
            yield Problem(path, f"{show(value)} is not allowed; allowed: {allowed(schema, defs)}")
        return
    properties = schema["properties"]
    for key, item in value.items():
        if key in properties:
            yield from check(item, properties[key], join(path, key), defs)
        else:
            yield Problem(join(path, key), f"unknown key{did_you_mean(key, properties)}")
    for key in schema.get("required", []):
        if key not in value:
            yield Problem(join(path, key), f"missing; allowed: {allowed(properties[key], defs)}")


def construct(
    cls: type[_Model], values: dict[str, Any], schema: Schema, path: str
) -> tuple[_Model | None, list[Problem]]:
    """Return the typed values, or what pydantic finds wrong with them, in the words of `check`."""
    try:
        return cls.model_validate(values), []
    except ValidationError as error:
        problems: dict[str, Problem] = {}
        for fault in error.errors(include_url=False):
            if fault["type"] == "default_factory_not_called":  # what it depends on is reported itself
                continue
            keys, value, part = _follow(fault["loc"], values, schema)
            reason = fault.get("ctx", {}).get("error")
            said = f"allowed: {allowed(part, schema.get('$defs', {}))}" if reason is None else str(reason)
            where = join(path, *keys)
            problems.setdefault(where, Problem(where, f"{show(value)} is not allowed; {said}"))
        return None, list(problems.values())


def allowed(schema: Schema, defs: Schema) -> str:
    """Return in words what a schema allows."""
    schema = _resolve(schema, defs)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(allowed(option, defs) for option in schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(show(option) for option in schema["enum"])
    if "const" in schema:
        return show(schema["const"])
    limits = " and ".join(f"{sign} {show(schema[key])}" for key, sign in _LIMITS.items() if key in schema)
    kind = {
        "integer": "a whole number",
        "number": "a number",
        "string": "text",
        "boolean": "true or false",
        "null": "null",
        "array": "a list",
        "object": "an object",
    }.get(schema.get("type", ""), "another value")
    if kind == "a list" and schema.get("minItems"):
        kind = "a list of at least one adapter"
    if kind == "a list" and schema.get("items", {}).get("type") == "string":
        kind = "a list of texts"
    return f"{kind} {limits}".rstrip()


def join(path: str, *keys: str | int) -> str:
    """Return the path of a key within an object, or of an index within a list."""
    for key in keys:
        if isinstance(key, int):
            path = f"{path}[{key}]"
        else:
            plain = key if key.isprintable() and key and len(key) <= 40 else show(key)
            path = f"{path}.{plain}" if path else plain
    return path


def _fits(value: object, schema: Schema, defs: Schema) -> bool:
    schema = _resolve(schema, defs)
    if "anyOf" in schema:
        return any(_fits(value, option, defs) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        options = schema.get("enum", [schema.get("const")])
        return any(value == option and isinstance(value, bool) == isinstance(option, bool) for option in options)
    match schema.get("type"):
        case "integer":
            return _is_number(value) and float(value).is_integer()
        case "number":
            return _is_number(value)
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "array":
            items = schema.get("items", {})
            return isinstance(value, list | tuple) and all(_fits(item, items, defs) for item in value)
        case "object":
            return isinstance(value, dict)
    return True


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_LARGEST < value < _LARGEST


def _resolve(schema: Schema, defs: Schema) -> Schema:
    ref = schema.get("$ref")
    return schema if ref is None else defs[ref.rpartition("/")[2]] | {k: v for k, v in schema.items() if k != "$ref"}


def _resolver(defs: Schema) -> Any:
    return lambda schema: _resolve(schema, defs)


def _follow(loc: tuple[str | int, ...], value: Any, schema: Schema) -> tuple[list[str | int], Any, Schema]:
    """Follow pydantic's location into values and schema as far as it names keys, not branches of a union."""
    defs, keys = schema.get("$defs", {}), []
    for key in loc:
        schema = _resolve(schema, defs)
        options = [schema, *map(_resolver(defs), schema.get("anyOf", []))]
        inner = next((s["properties"][key] for s in options if key in s.get("properties", {})), None)
        if inner is None or not isinstance(value, dict):
            break
        keys.append(key)
        value, schema = value.get(str(key)), inner
    return keys, value, schema
