"""What `launch.py run` and `train.py` are asked to do with a config."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class RunOptions:
    """The flags of the command line, under their own names.

    Attributes:
        base_model: local folder, hub id, GGUF file, or "smollm2".
        config: the JSON config file.
        dir: folder that adapters and the run's files are written to.
        load_adapter: continue training saved adapters rather than new ones.
        inference: generate from prompts on standard input rather than train.
        evaluate: evaluate saved adapters rather than train.
        evaluate_base: evaluate the base model without adapter as well.
        resume: go on from the newest complete checkpoint.
        overwrite: replace existing adapter folders.
        dry_run: print the plan and stop.
        limit: rows read of each split; None leaves it to the config.
        random_seed: of initial weights, data order and dropout.
        deterministic: use deterministic kernels only.
        num_gpus: that share every step, one process each.
        num_processes: that share every step on the CPU.
        shard_base: hold a part of every decoder layer on each GPU rather than a whole base model.
        cuda_device: GPUs to use, "0" or "0,1"; None for all.
        dtype: of the base model's weights, "bf16", "fp16" or "fp32"; None for bf16 on CUDA, fp32 on the CPU.
        quantize: "4bit" or "8bit"; None for full weights.
        attn_impl: transformers' name of an attention implementation; None for packed sequences' own.
        sliding_window: turn on the window of families that have one switched off (qwen2).
        use_cache: keep keys and values in generation.
        recompute: what of decoder layers is not kept for backward but computed again there, "none", "middle" (their
            feed-forward blocks) or "all"; "auto" for as little as lets the training fit into memory.
        gradient_checkpointing: the same as recompute "all".
        compile: compile norms and residual sums, tens of seconds at the first step; None for on a
            GPU with a base of a billion parameters or more.
        tf32: allow TensorFloat-32 in float32 products.
        revision: of the base model on the hub.
        trust_remote_code: run code from the base model's repository.
        time_limit: minutes after which the run stops at a checkpoint; None for no limit.
        tracker: programs that metrics are sent on to, joined by commas: tensorboard, wandb, trackio, mlflow.
        log_file: what is logged, tracebacks included.
        debug: show tracebacks, and look for the operation that made a gradient non-finite.
    """

    base_model: str
    config: str = "mlora.json"
    dir: str = "."
    load_adapter: bool = False
    inference: bool = False
    evaluate: bool = False
    evaluate_base: bool = False
    resume: bool = False
    overwrite: bool = False
    dry_run: bool = False
    limit: int | None = None
    random_seed: int = 42
    deterministic: bool = False
    num_gpus: int = 1
    num_processes: int = 1
    shard_base: bool = False
    cuda_device: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    attn_impl: str | None = None
    sliding_window: bool = False
    use_cache: bool = True
    tf32: bool = False
    recompute: str = "auto"
    gradient_checkpointing: bool = False
    compile: bool | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    time_limit: float | None = None
    tracker: str | None = None
    log_file: str = "mlora.log"
    debug: bool = False

    @property
    def ranks(self) -> int:
        """Processes that share every step."""
        return max(self.num_gpus, self.num_processes)

    def arguments(self) -> list[str]:
        """Return the options as command-line arguments, each one apart; those at their default are left out."""
        return list(self._arguments())

    def _arguments(self) -> Iterator[str]:
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                # One word, so that a value beginning with a hyphen is never taken for a flag.
                yield f"--{field.name}={value}"
