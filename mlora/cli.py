"""The command line: launch.py, train.py and the installed `mlora`. Imports neither torch nor transformers.

Flags are spelt with underscores, as in the predecessors. A truth value may be given as `--flag`, `--flag True` or
`--flag false`.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import click

from mlora import __version__
from mlora.config import ConfigError, RunOptions, load_config
from mlora.config.templates import ROOT, template_names

_Command = TypeVar("_Command", bound=Callable[..., Any])
_Decorator = Callable[[_Command], _Command]

STORY = """\
Fine-tune several adapters at once over one frozen language model.

\b
1. gen       python launch.py gen --template mixlora --tasks "arc-e;arc-c"
             writes mlora.json: one adapter for each task
2. edit      open mlora.json; `launch.py schema` lists every key
3. run       python launch.py run --base_model BASE_MODEL
             trains all adapters together, then evaluates each
4. evaluate  python launch.py run --base_model BASE_MODEL --evaluate
             evaluates saved adapters again
5. compare   results.json and metrics.jsonl hold every number and step
"""


class _Program(click.Group):
    """A group whose commands report bad input on standard error and exit with 2, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            if any(argument.startswith("--debug") for argument in sys.argv):
                raise
            click.echo(f"Error: {error}", err=True)
            ctx.exit(2)


def _option(flag: str, help: str, kind: Any = str, **settings: Any) -> _Decorator:
    if kind is bool:  # click's own flags take no value
        settings = {"is_flag": False, "flag_value": "True", "metavar": "[True|False]"} | settings
    return click.option(f"--{flag}", type=kind, help=help, **settings)


def _all(options: Sequence[_Decorator]) -> _Decorator:
    def decorate(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


run_options = _all(
    [
        _option("base_model", 'Local folder, hub id, GGUF file, or "smollm2".', required=True),
        _option("config", "The config file.", default="mlora.json", show_default=True),
        _option("dir", "Folder that adapters are written to.", default=".", show_default=True),
        _option("load_adapter", "Go on from saved adapters rather than new ones.", bool, default=False),
        _option("inference", "Generate from prompts rather than train.", bool, default=False),
        _option("evaluate", "Evaluate saved adapters rather than train.", bool, default=False),
        _option("evaluate_base", "Evaluate the base model beside the adapters.", bool, default=False),
        _option("resume", "Go on from the newest complete checkpoint.", bool, default=False),
        _option("overwrite", "Replace adapter folders that exist.", bool, default=False),
        _option("dry_run", "Print the plan and stop.", bool, default=False),
        _option("limit", "Rows read of each split, for a quick look.", click.IntRange(1)),
        _option("random_seed", "Seed of everything random.", int, default=42, show_default=True),
        _option("deterministic", "Use deterministic kernels only.", bool, default=False),
        _option("num_gpus", "GPUs to spread the batches over.", click.IntRange(1), default=1, show_default=True),
        _option("cuda_device", "GPUs that may be used: 0, or 0,1.", metavar="N"),
        _option(
            "dtype", "Of the base model. [default: bf16 on CUDA, fp32 else]", click.Choice(["bf16", "fp16", "fp32"])
        ),
        _option("quantize", "Load the base model quantised.", click.Choice(["4bit", "8bit"])),
        _option("attn_impl", "Attention implementation, by transformers' name."),
        _option("sliding_window", "Turn on a window that the model has switched off.", bool, default=False),
        _option("use_cache", "Cache keys and values in generation. [default: True]", bool, default=True),
        _option("gradient_checkpointing", "Recompute layers in backward: less memory, slower.", bool, default=False),
        _option("tf32", "Allow TensorFloat-32 on CUDA.", bool, default=False),
        _option("revision", "Of the base model on the hub."),
        _option("trust_remote_code", "Run code from the model's repository.", bool, default=False),
        _option("log_file", "Where the log goes.", default="mlora.log", show_default=True),
        _option("debug", "Show tracebacks; find non-finite gradients.", bool, default=False),
    ]
)
"""The flags of `launch.py run` and `train.py`: the fields of RunOptions."""

_OVERRIDES = [
    ("cutoff_len", "cutoff_len", int, "Longest sequence in tokens; -1: the model's maximum."),
    ("save_step", "save_step", int, "Optimizer steps between checkpoints."),
    ("prompt_template", "prompt", str, "Prompt template of instruction data."),
    ("lr_scheduler", "scheduler_type", str, "Schedule, by transformers' name."),
    ("warmup_steps", "warmup_steps", float, "Steps in which the learning rate rises."),
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


@click.group(
    cls=_Program,
    help=STORY,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)
@click.version_option(__version__)
@click.pass_context
def program(ctx: click.Context) -> None:  # noqa: D103
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@program.command()
@_option("template", f"One of {', '.join(template_names())}, or a file.", required=True)
@_option("tasks", 'Task names, paths or hub ids, joined by ";".', required=True)
@_option("adapter_name", "Stem of the adapters' names. [default: the task's]")
@_option("file_name", "File to write.", default="mlora.json", show_default=True)
@_option("data_path", 'Local data: one path for each task, joined by ";", or one folder.')
@_option("multi_task", "One adapter for the mixture of the tasks.", bool, default=False)
@_option("append", "Add to the file rather than replace it.", bool, default=False)
@_all([_option(flag, help, kind) for flag, _, kind, help in _OVERRIDES])
def gen(
    template: str,
    tasks: str,
    adapter_name: str | None,
    file_name: str,
    data_path: str | None,
    multi_task: bool,
    append: bool,
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
        overrides={key: flags[flag] for flag, key, _, _ in _OVERRIDES},
    )
    click.echo(f"Wrote {file_name}:")
    for job in config.lora:
        data = "" if job.data is None else f", data {job.data}"
        click.echo(f"  {job.name}: {job.method.method} on {job.task_name}{data}")
    option = "" if file_name == "mlora.json" else f" --config {file_name}"
    click.echo(f"Next: python launch.py run --base_model BASE_MODEL{option}")


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
    ctx.exit(_start(options))


@program.command()
@click.pass_context
def demo(ctx: click.Context) -> None:
    """Train four adapters on a small real model, on the CPU, in minutes."""
    from mlora.data.demo import write_demo_data

    click.echo("Two data sets of the project's own making are written to runs/demo/data; every adapter is scored on")
    click.echo("held-out rows, which name things that no training row names, beside the model without adapters.\n")
    write_demo_data("runs/demo/data")
    config = str(ROOT / "configs" / "demo.json")
    options = RunOptions(base_model="smollm2", config=config, dir="runs/demo", overwrite=True, evaluate_base=True)
    ctx.exit(_start(options))


@program.command(name="export")
@_option("format", "Form to write.", click.Choice(["peft", "mixlora", "mixtral", "merged"]), required=True)
@_option("base_model", 'Local folder, hub id, GGUF file, or "smollm2".', required=True)
@_option("adapter", "Folder of the adapter.", required=True)
@_option("output", "Folder to write.", required=True)
@_option("dtype", "Of a written model. [default: fp32]", click.Choice(["bf16", "fp16", "fp32"]))
@_option("revision", "Of the base model on the hub.")
@_option("trust_remote_code", "Run code from the model's repository.", bool, default=False)
@_option("overwrite", "Replace an earlier export.", bool, default=False)
@click.pass_context
def export_(ctx: click.Context, **flags: Any) -> None:
    r"""Write a saved adapter in the form of another program.

    \b
    peft     LoRA, rsLoRA and DoRA, for PEFT and vLLM
    merged   the same, merged into the base: a plain transformers model
    mixlora  top-k MixLoRA, for the public package mixlora 0.2.3
    mixtral  top-k MixLoRA and its base as a stock mixture of experts:
             Mixtral from Llama and Mistral, Qwen3-MoE from Qwen3
    """
    from mlora.export import main as export_main

    ctx.exit(export_main(**flags))


@program.command()
def avail() -> None:
    """List tasks, methods and templates."""
    from mlora.adapters import METHODS
    from mlora.tasks import TASKS

    rows = [("TASK", "PROTOCOL", "METRIC", "VERSION", "DATA")]
    for name, task in sorted(TASKS.items(), key=lambda item: (item[1].protocol, item[0])):
        hub = task.source.hub if task.source.subset is None else f"{task.source.hub}:{task.source.subset}"
        rows.append((name, task.protocol, ", ".join(task.metrics), str(task.version), hub))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        cells = [text.ljust(width) for text, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*cells, row[-1]]))
    click.echo(f"\nMethods:   {', '.join(METHODS)}")
    click.echo(f"Templates: {', '.join(template_names())}")


@program.command()
def schema() -> None:
    """Print the JSON Schema of config files, for editors."""
    from mlora.config.schema import file_schema

    click.echo(json.dumps(file_schema(), indent=2))


@program.command(name="help")
@click.argument("command", required=False)
@click.pass_context
def help_(ctx: click.Context, command: str | None) -> None:
    """Show this help, or that of a COMMAND."""
    parent = ctx.parent or ctx
    if command is None:
        click.echo(parent.get_help())
        return
    name, found, _ = program.resolve_command(parent, [command])
    if found is not None:
        click.echo(found.get_help(click.Context(found, info_name=name, parent=parent)))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@run_options
def train(**flags: Any) -> None:
    """Train the adapters of a config; what `launch.py run` starts."""
    options = RunOptions(**flags)
    if options.cuda_device is not None:  # read when CUDA is first used, so before torch is
        os.environ["CUDA_VISIBLE_DEVICES"] = options.cuda_device
    from mlora.training.program import main as train_main

    sys.exit(train_main(options))


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@_option("base_model", 'Local folder, hub id, GGUF file, or "smollm2".', required=True)
@_option("instruction", "What is asked.", required=True)
@_option("input", "What the instruction is about.", default="")
@_option("lora_weights", "Adapter folder or hub id; may be given several times.", multiple=True)
@_option("template", "Prompt template, by name or path.")
@_option("max_new_tokens", "Tokens of the answer.", click.IntRange(1), default=128, show_default=True)
@_option("load_16bit", "bf16 weights. [default: on CUDA]", bool, default=False)
@_option("load_8bit", "8-bit weights.", bool, default=False)
@_option("load_4bit", "4-bit weights.", bool, default=False)
@_option("device", "cpu, cuda, ... [default: a GPU where there is one]")
@_option("stream", "Print tokens as they come.", bool, default=False)
@_option("revision", "Of the base model on the hub.")
@_option("trust_remote_code", "Run code from the model's repository.", bool, default=False)
def generate(load_16bit: bool, load_8bit: bool, load_4bit: bool, lora_weights: tuple[str, ...], **flags: Any) -> None:
    """Answer an instruction with the base model or with adapters."""
    if load_8bit and load_4bit:
        raise click.UsageError("--load_8bit cannot be combined with --load_4bit")
    from mlora.generation.answer import Asked
    from mlora.generation.answer import main as answer_main

    quantize = "4bit" if load_4bit else "8bit" if load_8bit else None
    asked = Asked(lora_weights=lora_weights, dtype="bf16" if load_16bit else None, quantize=quantize, **flags)
    sys.exit(answer_main(asked))


def main() -> None:
    """Run the command line."""
    program(prog_name="launch.py" if Path(sys.argv[0]).name == "launch.py" else None)


def _start(options: RunOptions) -> int:
    """Run the training program and return its exit status."""
    script = ROOT / "train.py" if (ROOT / "train.py").exists() else ROOT / "programs" / "train.py"
    command = [sys.executable, str(script), *options.arguments()]
    environment = dict(os.environ)
    if options.cuda_device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = options.cuda_device
    return _wait(command, environment)


def _wait(command: list[str], environment: dict[str, str]) -> int:
    """Run a child, hand it the signals that arrive here, and return its exit status as a shell would say it.

    The child gets a session of its own: a terminal sends Ctrl-C to all processes of a session's foreground group, and
    a child that is told twice takes it as the order to stop without a checkpoint.
    """
    early: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, frame: FrameType | None) -> None:
        if child is None:
            early.append(number)
        else:
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        child = subprocess.Popen(command, env=environment, start_new_session=True)
        for arrived in early:
            child.send_signal(arrived)
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - status if status < 0 else status
