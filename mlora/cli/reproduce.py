"""The paper's table."""

from __future__ import annotations

from typing import Any

import click

from mlora.cli.options import DTYPES, PATH, base_model, base_source, names_or_path, option
from mlora.cli.program import program
from mlora.config.templates import template_names
from mlora.report.paper import TASKS
from mlora.tasks import known_tasks


@program.command()
@base_model
@option(
    "methods",
    'Templates, joined by "," or ";".',
    default="lora,dora,mixlora,mixdora",
    show_default=True,
    shell_complete=names_or_path(template_names, ",;"),
)
@option(
    "tasks",
    'Task names, joined by "," or ";". [default: the eight]',
    default=",".join(TASKS),
    shell_complete=names_or_path(known_tasks, ",;"),
)
@option("seeds", 'Seeds, joined by "," or ";".', default="1,2,3", show_default=True)
@option("protocols", 'Ways to train and score, joined by "," or ";". [default: a task\'s first]')
@option("multi_task", "One adapter for all tasks.", bool, default=False)
@option("scale", "Size of the adapters.", click.Choice(["paper", "small"]), default="paper", show_default=True)
@option("data_path", 'Local data: one path for each task, joined by ";", or one folder.', PATH)
@option("train_limit", "Training rows of each task.", click.IntRange(1))
@option("test_limit", "Test rows of each task.", click.IntRange(1))
@option("num_epochs", "Passes over the data.", click.IntRange(1))
@option("batch_size", "Sequences of an optimizer step.", click.IntRange(1))
@option("micro_batch_size", "Sequences of a forward pass.", click.IntRange(1))
@option("learning_rate", "Learning rate.", click.FloatRange(0, min_open=True))
@option("cutoff_len", "Longest sequence in tokens.", click.IntRange(1), default=512, show_default=True)
@option("evaluate_batch_size", "Rows of an adapter in a forward.", click.IntRange(1), default=16, show_default=True)
@option("at_once", "Adapters of a pass. [default: what memory allows]", click.IntRange(1))
@option("dir", "Folder that all is written to.", PATH, default="runs/reproduce", show_default=True)
@option("time_limit", "Minutes after which it stops at a checkpoint.", click.FloatRange(0, min_open=True))
@option("overwrite", "Begin again.", bool, default=False)
@option("dry_run", "Print the grid and stop.", bool, default=False)
@option("dtype", "Of the base model. [default: bf16 on CUDA, fp32 else]", DTYPES)
@option("quantize", "Load the base model quantised.", click.Choice(["4bit", "8bit"]))
@option("attn_impl", "Attention implementation, by transformers' name.")
@option("gradient_checkpointing", "Recompute layers in backward: less memory, slower.", bool, default=False)
@base_source
@option("log_file", "Where the log goes. [default: log.txt in --dir]", PATH, default="mlora.log")
@option("debug", "Show tracebacks.", bool, default=False)
@click.pass_context
def reproduce(ctx: click.Context, **flags: Any) -> None:
    """Train and evaluate the paper's grid, and print its table.

    Methods x tasks x seeds are trained as concurrent adapters. Stopped or
    killed anywhere, the same command goes on. Means and standard deviations
    over seeds stand beside the published figures.
    """
    from mlora.runs.program import finish
    from mlora.runs.reproduce import Reproduction

    grid = Reproduction(**flags)
    ctx.exit(finish(grid.run, grid))
