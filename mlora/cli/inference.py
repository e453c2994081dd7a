"""inference.py: the page and the endpoint."""

from __future__ import annotations

import sys
from typing import Any

import click

from mlora.cli.generate import answering, model_options
from mlora.cli.options import CONTEXT, SeveralValues, option
from mlora.cli.program import program


@program.command(cls=SeveralValues, context_settings=CONTEXT)
@answering
@option("host", "Address to listen on; another than this reaches others.", default="127.0.0.1", show_default=True)
@option("port", "Port to listen on.", click.IntRange(0, 65535), default=7860, show_default=True)
def inference(**flags: Any) -> None:
    """Answer in a web page, the base model and adapters side by side.

    Beside the page, at /v1, is an OpenAI-compatible endpoint. Adapters within a
    folder given as --lora_weights (a run's) are offered: each is loaded by a tick
    on the page, or by the first request for it.
    """
    model = model_options(flags)
    from mlora.serving.app import Served
    from mlora.serving.app import main as serve

    sys.exit(serve(Served(model, **flags)))
