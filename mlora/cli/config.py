"""Config files: writing one, and what can stand in it."""

from __future__ import annotations

import json
from typing import Any

import click

from mlora.cli.options import PATH, all_of, names_or_path, option
from mlora.cli.program import program
from mlora.config.templates import template_names
from mlora.tasks import PROTOCOLS, TASKS, Protocol, known_tasks
from mlora.wording import launcher

OVERRIDES = [
    ("protocol", "protocol", click.Choice(PROTOCOLS), "How tasks are scored. [default: by letters where they can be]"),
    ("cutoff_len", "cutoff_len", int, "Longest sequence in tokens; -1: the model's maximum."),
    ("save_step", "save_step", int, "Optimizer steps between checkpoints."),
    ("prompt_template", "prompt", str, "Prompt template of instruction data."),
    ("lr_scheduler", "scheduler_type", str, "Schedule, by transformers' name."),
    ("warmup_steps", "warmup_steps", int, "Steps in which the learning rate rises."),
    ("learning_rate", "lr", float, "Learning rate."),
    ("loraplus_lr_ratio", "loraplus_lr_ratio", float, "Learning rate of B over that of A."),
    ("batch_size", "batch_size", int, "Sequences of an optimizer step."),
    ("micro_batch_size", "micro_batch_size", int, "Sequences of a forward pass."),
    ("evaluate_batch_size", "evaluate_batch_size", int, "Rows of a forward pass in evaluation."),
    ("evaluate_steps", "evaluate_steps", int, "Optimizer steps between evaluations."),
    ("num_epochs", "num_epochs", int, "Passes over the data."),
    ("use_dora", "use_dora", bool, "Weight-decomposed updates (DoRA)."),
    ("use_rslora", "use_rslora", bool, "Rank-stabilised scaling (rsLoRA)."),
    ("group_by_length", "group_by_length", bool, "Draw sequences of similar length together."),
]
"""Flags of `gen` that replace a value of the template: flag, key, type, help."""
HOW: dict[Protocol, str] = {
    "letter": "options have letters, and the next token is compared among them",
    "classification": "a head, trained with the adapter, names a class",
    "loglikelihood": "each answer's text is scored as a continuation",
}
"""What each protocol does."""


@program.command()
@option(
    "template",
    f"One of {', '.join(template_names())}, or a file.",
    required=True,
    shell_complete=names_or_path(template_names),
)
@option(
    "tasks",
    'Task names, paths or hub ids, joined by ";".',
    required=True,
    shell_complete=names_or_path(known_tasks, ";"),
)
@option("adapter_name", "Stem of the adapters' names. [default: the task's]")
@option("file_name", "File to write.", PATH, default="mlora.json", show_default=True)
@option("data_path", 'Local data: one path for each task, joined by ";", or one folder.', PATH)
@option("multi_task", "One adapter for the mixture of the tasks.", bool, default=False)
@option("sweep", 'Values to compare, one adapter each: "lr=1e-4,2e-4;r=8,16".')
@option("append", "Add to the file rather than replace it; begins one that is not there.", bool, default=False)
@all_of([option(flag, help, kind) for flag, _, kind, help in OVERRIDES])
def gen(
    template: str,
    tasks: str,
    adapter_name: str | None,
    file_name: str,
    data_path: str | None,
    multi_task: bool,
    append: bool,
    sweep: str | None,
    **flags: Any,
) -> None:
    """Write a config file from a template and task names.

    Flags below --append replace the template's values.
    """
    from mlora.config.generate import generate

    config = generate(
        template,
        tasks,
        file_name,
        adapter_name=adapter_name,
        data_path=data_path,
        multi_task=multi_task,
        append=append,
        sweep=sweep,
        overrides={key: flags[flag] for flag, key, _, _ in OVERRIDES},
    )
    click.echo(f"Wrote {file_name}:")
    for job in config.lora:
        data = "" if job.data is None else f", data {job.data}"
        values = "".join(f", {key} {getattr(job, key, getattr(job.method, key, None))}" for key in config.sweep)
        click.echo(f"  {job.name}: {job.method.method} on {job.task_name}{data}{values}")
    option = "" if file_name == "mlora.json" else f" --config {file_name}"
    click.echo(f"Next: {launcher()} run --base_model BASE_MODEL{option}")


@program.command()
def avail() -> None:
    """List tasks, methods and templates."""
    from mlora.adapters import METHODS
    from mlora.report.table import columns, wrapped

    for protocol, how in HOW.items():
        rows = []
        for task in sorted((task for (p, _), task in TASKS.items() if p == protocol), key=lambda task: task.name):
            source = task.source
            data = source.hub if source.subset is None else f"{source.hub}:{source.subset}"
            sizes = ("?" if size is None else f"{size:,}" for size in (source.train_rows, source.test_rows))
            rows.append([task.name, ", ".join(task.metrics), data, *sizes])
        click.echo(f"{protocol}: {how}\n")
        click.echo(columns(["task", "metrics", "data", "train", "test"], rows, left=3) + "\n")
    for what, names in (("Methods", METHODS), ("Templates", template_names())):
        click.echo(wrapped(f"{what}: {', '.join(names)}"))


@program.command()
def schema() -> None:
    """Print the JSON Schema of config files, for editors."""
    from mlora.config.schema import file_schema

    click.echo(json.dumps(file_schema(), indent=2))
