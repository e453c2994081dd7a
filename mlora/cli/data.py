"""A look at data before it is trained on."""

from __future__ import annotations

from typing import Any

import click

from mlora.cli.options import base_model, base_source, option
from mlora.cli.program import program
from mlora.tasks import PROTOCOLS


@program.command(name="data")
@option("preview", 'Task names joined by ";", instruction data, or a config.', required=True)
@base_model
@option("data_path", "Local data of the tasks.")
@option("prompt_template", "Prompt template of instruction data.")
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
