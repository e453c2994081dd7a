"""`launch.py data --preview`: the first rows of a task, of instruction data, or of every adapter of a config."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlora.config import ConfigError, JobConfig, load_config
from mlora.config.generate import check_data
from mlora.config.job import CASUAL
from mlora.config.jsonfile import read_json
from mlora.config.load import parse_config
from mlora.data import DataError
from mlora.data.preview import preview
from mlora.model import load
from mlora.model.errors import ModelError
from mlora.runs.rows import Reader
from mlora.tasks import UnknownTaskError, known_tasks


def main(
    what: str,
    base_model: str,
    rows: int,
    cutoff_len: int | None,
    revision: str | None,
    trust_remote_code: bool,
    **settings: Any,
) -> int:
    """Print rows, and return the exit status: 0 done, 2 bad input.

    Args:
        what: config file, task names joined by ";", or instruction data.
        base_model: whose tokenizer is used.
        rows: to show of each adapter.
        cutoff_len: tokens of a row; None for the config's.
        revision, trust_remote_code: of the base model.
        settings: keys of an adapter; None where not given.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    try:
        config_cutoff, jobs = _jobs(what, given)
        origin = load.find(base_model, revision, trust_remote_code)
        tokens = cutoff_len or config_cutoff
        if tokens == -1:
            tokens = int(load.load_config(origin).get_text_config().max_position_embeddings)
        for text in _shown(Reader(load.load_tokenizer(origin), tokens, seed=0), jobs, rows):
            print(text)
    except (ConfigError, DataError, ModelError, UnknownTaskError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    return 0


def _shown(reader: Reader, jobs: tuple[JobConfig, ...], rows: int) -> Iterator[str]:
    for job in jobs:
        few = job.model_copy(update={"limit": min(rows, job.limit or rows)})
        title = f"=== {job.name}: {job.task_name}" + (f", {job.data}" if job.data else "")
        yield f"{title}\n{preview(reader.tokenizer, reader.samples_of(few))}\n"


def _jobs(what: str, given: dict[str, Any]) -> tuple[int, tuple[JobConfig, ...]]:
    """Return the cutoff and the adapters of a config, or of one made up for tasks or data."""
    path = Path(what).expanduser()
    if path.suffix == ".json" and path.is_file():
        content = read_json(path)
        if isinstance(content, dict) and "lora" in content:
            config = load_config(path)
            return config.cutoff_len, tuple(job.model_copy(update=given) for job in config.lora)
    names = [name.strip() for name in what.split(";")]
    if set(names) <= set(known_tasks()):
        subject = {"task_name": ";".join(names)}
    else:
        for name in names:
            check_data(name, "--preview")
        subject = {"task_name": CASUAL, "data": what}
    config = parse_config({"lora": [{"name": "preview"} | subject | given]}, "--preview")
    return config.cutoff_len, config.lora
