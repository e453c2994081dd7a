"""Other programs' forms of an adapter."""

from __future__ import annotations

from typing import Any

import click

from mlora.cli.options import DTYPES, PATH, base_model, base_source, hub_offline, option
from mlora.cli.program import program

FORMS = """\
\b
peft     LoRA, rsLoRA and DoRA, for PEFT and vLLM
merged   the same, merged into the base: a plain transformers model
mixlora  top-k MixLoRA, for the public package mixlora 0.2.3
mixtral  top-k MixLoRA and its base as a stock mixture of experts:
         Mixtral from Llama and Mistral, Qwen3-MoE from Qwen3
"""


@program.command(name="export", help=f"Write a saved adapter in the form of another program.\n\n{FORMS}")
@option("format", "Form to write.", click.Choice(["peft", "mixlora", "mixtral", "merged"]), required=True)
@base_model
@option("adapter", "Folder of the adapter.", PATH, required=True)
@option("output", "Folder to write.", PATH, required=True)
@option("dtype", "Of a written model. [default: fp32]", DTYPES)
@base_source
@option("overwrite", "Replace an earlier export.", bool, default=False)
@click.pass_context
def export_(ctx: click.Context, **flags: Any) -> None:
    """Write a saved adapter in the form of another program."""
    from mlora.export import main as export_main

    ctx.exit(export_main(**flags))


@program.command()
@option("adapter", "Folder of the adapter.", PATH, required=True)
@option("repo", "Where to: user/name, made where there is none.", required=True)
@option("private", "A new repository is private.", bool, default=False)
@option("revision", "Branch. [default: the main one]")
@option("message", "Of the commit.")
@hub_offline
@click.pass_context
def push(ctx: click.Context, **flags: Any) -> None:
    """Publish a saved adapter and its card on the Hugging Face hub."""
    from mlora.model.hub import main as push_main

    ctx.exit(push_main(**flags))
