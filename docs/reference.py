"""Writes the page on configuration from the typed config: `python docs/reference.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlora.adapters import METHODS
from mlora.config.job import JobConfig
from mlora.config.run import RunConfig
from mlora.config.schema import NO_EFFECT, entry_schema, file_schema, job_keys, run_schema

PAGE = Path(__file__).parent / "pages" / "configuration.md"
START = """\
# Configuration

<!-- Written by docs/reference.py from the typed config. -->

A run is described by one JSON file, which `launch.py gen` writes from a template. `launch.py schema` prints its JSON
Schema; an editor that is given it completes keys and marks mistakes:

```bash
python launch.py schema > mlora.schema.json
```

A key that does not exist is an error that names the nearest one that does. All errors of a file are told at once.
`launch.py run` writes the file with every default filled in to `config.json` in the run folder.
"""
METHODS_START = """\
## Methods

`routing_strategy` names the method; without it an entry is plain LoRA. `peft_type` is a synonym of older files. Keys of
the method stand beside those above. [Methods](methods.md) has the mathematics.
"""


def page() -> str:
    """Return the page."""
    parts = [START]
    run, entries = run_schema(), {name: entry_schema(cls) for name, cls in METHODS.items()}
    parts.append("## The run\n\nKeys at the top of the file.\n\n" + table(run, list(RunConfig.model_fields)))
    keys = [key for key in job_keys() if key in JobConfig.model_fields]
    parts.append(
        "## An adapter\n\nKeys of each entry of `lora`, whatever its method.\n\n" + table(entries["lora"], keys)
    )
    parts.append(METHODS_START)
    for name, cls in METHODS.items():
        text = " ".join((cls.__doc__ or "").split())
        parts.append(f"### {name}\n\n{text}\n\n" + table(entries[name], list(cls.model_fields)))
    for name, definition in file_schema()["$defs"].items():
        if name not in METHODS and "properties" in definition:
            parts.append(f"### {name}\n\n{definition.get('description', '')}\n\n" + table(definition))
    return "\n".join(parts).rstrip() + "\n"


def table(schema: dict[str, Any], keys: list[str] | None = None) -> str:
    """Return keys of an object as a Markdown table."""
    properties, required = schema["properties"], schema.get("required", [])
    lines = ["| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for key in keys or list(properties):
        spec = properties[key]
        default = "required" if key in required else f"`{json.dumps(spec.get('default'))}`"
        if spec.get("default") is None and key not in required:
            default = "left out"
        meaning = " ".join(spec.get("description", "").split())
        if key in NO_EFFECT and "No effect" not in meaning:
            meaning = f"No effect. {meaning}"
        lines.append(f"| `{key}` | {value(spec)} | {default} | {meaning} |".replace(" |  |", " | |"))
    return "\n".join(lines) + "\n"


def value(spec: dict[str, Any]) -> str:
    """Return what a key may hold, in words."""
    if "$ref" in spec:
        return f"[{(name := spec['$ref'].rpartition('/')[2])}](#{name.lower()})"
    if "anyOf" in spec or "oneOf" in spec:
        forms = [form for form in spec.get("anyOf", spec.get("oneOf")) if form.get("type") != "null"]
        return " or ".join(dict.fromkeys(value(form) for form in forms))
    if "enum" in spec or "const" in spec:
        options = [option for option in spec.get("enum", [spec.get("const")]) if option is not None]
        return ", ".join(f"`{json.dumps(option)}`" for option in options)
    kind = spec.get("type")
    if kind == "array":
        return f"list of {value(spec['items'])}" if spec.get("items") else "list"
    names = {"boolean": "`true`, `false`", "string": "text", None: "any"}
    return names.get(kind, str(kind)) + bounds(spec)


def bounds(spec: dict[str, Any]) -> str:
    """Return the least and greatest value of a number."""
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    found = [f"{sign} {spec[key]:g}" for key, sign in signs.items() if key in spec]
    return " " + ", ".join(found) if found else ""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
