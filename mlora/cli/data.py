"""A look at data before it is trained on."""

from __future__ import annotations

from typing import Any

import click

from mlora.cli.options import PATH, base_model, base_source, names_or_path, option
from mlora.cli.program import program
from mlora.config.templates import prompt_names
from mlora.tasks import PROTOCOLS, known_tasks


@program.command(name="data", short_help="Show training rows as the model reads them.")
@option(
    "preview",
    'Task names joined by ";", instruction data, or a config.',
    required=True,
    shell_complete=names_or_path(known_tasks, ";"),
)
@base_model
@option("data_path", "Local data of the tasks.", PATH)
@option("prompt_template", "Prompt template of instruction data.", shell_complete=names_or_path(prompt_names))
@option("protocol", "How tasks are scored. [default: by letters where they can be]", click.Choice(PROTOCOLS))
@option("train_on_inputs", "Whether prompts are trained on too.", bool)
@option("on_bad_row", "What an unusable row does.", click.Choice(["error", "skip"]))
@option("cutoff_len", "Longest sequence in tokens. [default: 512, or the config's]", click.IntRange(1))
@option("rows", "To show of each adapter.", click.IntRange(1), default=3, show_default=True)
@base_source
@click.pass_context
def data_(ctx: click.Context, preview: str, data_path: str | None, prompt_template: str | None, **flags: Any) -> None:
    """Show training rows as the model reads them, with what is trained on marked.

    Special tokens are shown, and where the cutoff shortens a prompt.
    """
    from mlora.runs.preview import main as preview_main

    ctx.exit(preview_main(preview, data=data_path, prompt=prompt_template, **flags))
