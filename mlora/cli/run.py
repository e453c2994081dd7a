"""Training, from the launcher and as the program that the launcher starts."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import click

from mlora.cli.options import CONTEXT, DTYPES, PATH, all_of, base_model, base_source, log_file, option
from mlora.cli.program import program
from mlora.cli.ranks import start_ranks
from mlora.cli.start import start
from mlora.config import RunOptions, load_config
from mlora.config.templates import ROOT
from mlora.wording import launcher

RECOMPUTE = click.Choice(["auto", "none", "middle", "all"])
run_options = all_of(
    [
        base_model,
        option("config", "The config file.", PATH, default="mlora.json", show_default=True),
        option("dir", "Folder that adapters are written to.", PATH, default=".", show_default=True),
        option("load_adapter", "Go on from saved adapters rather than new ones.", bool, default=False),
        option("inference", "Generate from prompts rather than train.", bool, default=False),
        option("evaluate", "Evaluate saved adapters rather than train.", bool, default=False),
        option("evaluate_base", "Evaluate the base model beside the adapters.", bool, default=False),
        option("resume", "Go on from the newest complete checkpoint.", bool, default=False),
        option("overwrite", "Replace adapter folders that exist.", bool, default=False),
        option("dry_run", "Print the plan and stop.", bool, default=False),
        option("limit", "Rows read of each split, for a quick look.", click.IntRange(1)),
        option("random_seed", "Seed of everything random.", int, default=42, show_default=True),
        option("deterministic", "Use deterministic kernels only.", bool, default=False),
        option("num_gpus", "GPUs that share every step.", click.IntRange(1), default=1, show_default=True),
        option("num_processes", "The same on the CPU: processes.", click.IntRange(1), default=1, show_default=True),
        option("shard_base", "Spread the base model over them: one too large for each.", bool, default=False),
        option("cuda_device", "GPUs that may be used: 0, or 0,1.", metavar="N"),
        option("dtype", "Of the base model. [default: bf16 on CUDA, fp32 else]", DTYPES),
        option("quantize", "Load the base model quantised.", click.Choice(["4bit", "8bit"])),
        option("attn_impl", "Attention implementation, by transformers' name."),
        option("sliding_window", "Turn on a window that the model has switched off.", bool, default=False),
        option("use_cache", "Cache keys and values in generation. [default: True]", bool, default=True),
        option("recompute", "Of layers in backward: less memory, slower. [default: auto]", RECOMPUTE, default="auto"),
        option("gradient_checkpointing", "The same as --recompute all.", bool, default=False),
        option("compile", "Compile norms and sums. [default: on CUDA, bases from 1B parameters]", bool),
        option("tf32", "Allow TensorFloat-32 on CUDA.", bool, default=False),
        base_source,
        option("time_limit", "Minutes after which it stops at a checkpoint.", click.FloatRange(0, min_open=True)),
        option("tracker", "tensorboard, wandb, trackio or mlflow; several with commas.", metavar="NAMES"),
        log_file,
        option("debug", "Show tracebacks; find non-finite gradients.", bool, default=False),
    ]
)
"""The flags of `launch.py run` and `train.py`: the fields of RunOptions."""


@program.command()
@run_options
@click.pass_context
def run(ctx: click.Context, **flags: Any) -> None:
    """Train the adapters of a config together, then evaluate each."""
    options = RunOptions(**flags)
    logging.disable(logging.WARNING)  # the program reads the file again, and it is the one to warn
    try:
        load_config(options.config)
    finally:
        logging.disable(logging.NOTSET)
    ctx.exit(start(options))


@program.command()
@click.pass_context
def demo(ctx: click.Context) -> None:
    """Train four adapters on a small model, on the CPU, in minutes."""
    from mlora.data.demo import ZINDLE_QUESTION, write_demo_data

    click.echo("Two data sets of the project's own making are written to runs/demo/data;")
    click.echo("every adapter is scored on held-out rows, which name things that no training")
    click.echo("row names, beside the model without adapters.\n")
    write_demo_data("runs/demo/data")
    config = str(ROOT / "configs" / "demo.json")
    options = RunOptions(base_model="smollm2", config=config, dir="runs/demo", overwrite=True, evaluate_base=True)
    status = start(options)
    if status == 0:
        click.echo("\nTwo adapters have learned what a zindle is, which the base model cannot know:")
        click.echo(f"{launcher()} generate --base_model smollm2 --lora_weights runs/demo --base \\")
        click.echo(f'    --template none --instruction "{ZINDLE_QUESTION}" --max_new_tokens 3')
    ctx.exit(status)


@click.command(context_settings=CONTEXT)
@run_options
def train(**flags: Any) -> None:
    """Train the adapters of a config; what `launch.py run` starts."""
    options = RunOptions(**flags)
    if options.ranks > 1 and not options.dry_run and "WORLD_SIZE" not in os.environ:
        sys.exit(start_ranks(options))
    if options.cuda_device is not None:  # read when CUDA is first used, so before torch is
        os.environ["CUDA_VISIBLE_DEVICES"] = options.cuda_device
    from mlora.runs.program import main as train_main

    sys.exit(train_main(options))
