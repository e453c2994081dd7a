"""Files that ship with the project: beside the package in a checkout, inside it when installed."""

from __future__ import annotations

from pathlib import Path

from mlora.config.errors import ConfigError, Problem, did_you_mean, show

_PACKAGE = Path(__file__).parents[1]
ROOT = _PACKAGE if (_PACKAGE / "templates").is_dir() else _PACKAGE.parent
"""Folder that holds `templates/` and `configs/`."""
TEMPLATES = ROOT / "templates"


def template_names() -> list[str]:
    """Return the names of the templates that ship with the project."""
    return sorted(file.stem for file in TEMPLATES.glob("*.json"))


def prompt_names() -> list[str]:
    """Return the names of the prompt templates that ship with the project."""
    return sorted(file.stem for file in (TEMPLATES / "prompts").glob("*.json"))


def find_template(name_or_path: str) -> Path:
    """Return the file of a template.

    Args:
        name_or_path: a name that ships with the project, hyphens and underscores alike, or a path; a path that does
            not exist falls back on its stem.

    Raises:
        ConfigError: there is no such template.
    """
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    names = template_names()
    stem = path.name.removesuffix(".json").replace("-", "_")
    if stem in names:
        return TEMPLATES / f"{stem}.json"
    message = f"{show(name_or_path)} is no template and no file; templates: {', '.join(names)}"
    raise ConfigError("--template", [Problem("", message + did_you_mean(stem, names))])
