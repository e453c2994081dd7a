"""Evaluating adapters that exist."""

from __future__ import annotations

from typing import Any

import click

from mlora.cli.options import DTYPES, PATH, SeveralValues, base_model, base_source, log_file, names_or_path, option
from mlora.cli.program import program
from mlora.tasks import HARNESS, PROTOCOLS, known_tasks


@program.command(cls=SeveralValues, short_help="Evaluate saved adapters or the base model on tasks.")
@base_model
@option("tasks", 'Task names, joined by ";".', required=True, shell_complete=names_or_path(known_tasks, ";"))
@option("adapter", "Folder, or NAME=FOLDER; several may be given.", multiple=True, shell_complete=names_or_path())
@option(
    "protocol",
    f"Ways to score. [default: each task's first] {HARNESS}: tasks of lm-evaluation-harness, by its names.",
    click.Choice([*PROTOCOLS, HARNESS]),
    multiple=True,
)
@option("num_fewshot", f"Solved rows before each prompt, of {HARNESS}.", click.IntRange(0))
@option("data_path", 'Local data: one path for each task, joined by ";", or one folder.', PATH)
@option("dir", "Folder of the results.", PATH, default=".", show_default=True)
@option("limit", "Rows of each task, for a quick look.", click.IntRange(1))
@option("batch_size", "Rows of each adapter in a forward.", click.IntRange(1), default=16, show_default=True)
@option("cutoff_len", "Longest prompt in tokens; -1: the model's maximum.", int, default=512, show_default=True)
@option("evaluate_base", "Evaluate the base model beside the adapters.", bool, default=False)
@option("samples", "Write what is answered to each row.", bool, default=False)
@option("overwrite", "Find results again that are there.", bool, default=False)
@option("dtype", "Of the base model. [default: bf16 on CUDA, fp32 else]", DTYPES)
@option("quantize", "Load the base model quantised.", click.Choice(["4bit", "8bit"]))
@option("attn_impl", "Attention implementation, by transformers' name.")
@base_source
@option("time_limit", "Minutes after which it stops.", click.FloatRange(0, min_open=True))
@log_file
@option("debug", "Show tracebacks.", bool, default=False)
@click.pass_context
def evaluate(ctx: click.Context, **flags: Any) -> None:
    """Evaluate saved adapters, ours or PEFT's, or the base model alone.

    All adapters answer in one batch. Every result is written to results.json
    as soon as it exists; the same command again goes on with those that are
    missing.
    """
    from mlora.runs.evaluate import Evaluation
    from mlora.runs.program import finish

    evaluation = Evaluation(**flags)
    ctx.exit(finish(evaluation.run, evaluation))
