"""Ours and its rivals on the same work, in turns on one machine: one table for each slice.

    python -m benchmarks.compare mixtures-7b lora-7b [--rivals DIR] [--sites DIR] [--out FOLDER] [--rounds 2]

Every program runs as a process of its own, A B A B, and is given the time that is left of `--minutes`; what one prints
is kept at once in `SLICE.jsonl`, so neither a crash nor a limit loses what was measured. The table is printed and kept
in `SLICE.md`. Microseconds are per real token, medians over the rounds; MFU holds the frozen model's operations against
the rate of a large product measured in the same call, on a GPU; a gradient whose norm is 0 is marked.

transformers and PEFT are rivals wherever they are installed, and Liger. The others are looked for where flags say:
`--rivals` holds their steps, predecessor.py and unsloth_step.py; `--sites` a folder of packages for each, `mlora052`
and `unsloth`. What is not there is told as absent.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.work import METHODS, SHAPES, Work

ALL = tuple(METHODS)
RATE = ("-m", "benchmarks.work")
"""Prints the rate of a large product."""
Figures = dict[str, Any]


@dataclass(frozen=True)
class Program:
    """A program that prints lines of figures.

    Attributes:
        name: in the table.
        shape: of the model.
        command: what is run, without the interpreter.
        works: what it measures, one line each.
        missing: why it cannot run; None where it can.
        environment: variables of its own.
        once: run in the first round only: it makes what another needs.
    """

    name: str
    shape: str
    command: tuple[str, ...]
    works: tuple[str, ...]
    missing: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    once: bool = False


@dataclass(frozen=True)
class Place:
    """Where slices are measured: the options that programs need."""

    device: str
    rivals: Path | None
    sites: Path | None
    steps: int

    def ours(self, shape: str, works: Iterable[str], *flags: str, name: str = "ours", plain: bool = False) -> Program:
        """Return our step; on a GPU compiled and as CUDA graphs unless it is to be plain."""
        fast = () if plain or self.device == "cpu" else ("--compile", "--graphs")
        return self._step(name, "benchmarks.step", shape, works, (*fast, *flags))

    def peft(self, shape: str, works: Iterable[str], *flags: str) -> Program:
        """Return the step of transformers and PEFT."""
        needed = ("peft", "liger_kernel") if "--liger" in flags else ("peft",)
        absent = [package for package in needed if find_spec(package) is None]
        extras = [flag.removeprefix("--") for flag in flags if flag in ("--recompute", "--liger")]
        name = ", ".join(["PEFT", *extras])
        return self._step(name, "benchmarks.peft_step", shape, works, flags, absent)

    def predecessor(self, shape: str, works: Iterable[str], *flags: str) -> Program:
        """Return m-LoRA 0.5.2's step."""
        works = tuple(works)
        missing, environment = self._rival("predecessor.py", "mlora052")
        environment["MLORA_BACKEND_TYPE"] = "CPU" if self.device == "cpu" else "CUDA"
        command = (str(self._script("predecessor.py")), shape, self.device, *works, *flags)
        return Program("m-LoRA 0.5.2, recompute", shape, command, works, missing, environment)

    def unsloth(self, model: Path, recompute: str, dropout: str) -> Program:
        """Return Unsloth's step of a LoRA over the 7B model of a folder."""
        missing, environment = self._rival("unsloth_step.py", "unsloth")
        command = (str(self._script("unsloth_step.py")), str(model), "8", recompute, dropout)
        how = {"false": "no recompute", "true": "recompute", "unsloth": "offloaded recompute"}[recompute]
        return Program(f"Unsloth, {how}, dropout {dropout}", "7b", command, ("lora",), missing, environment)

    def unsloth_model(self, model: Path) -> Program:
        """Return what writes the model that Unsloth loads."""
        command = (str(self._script("unsloth_step.py")), str(model), "make")
        missing, _ = self._rival("unsloth_step.py", "unsloth")
        return Program("Unsloth's model", "7b", command, (), missing, once=True)

    def _step(
        self, name: str, module: str, shape: str, works: Iterable[str], flags: Iterable[str], absent: Sequence[str] = ()
    ) -> Program:  # fmt: skip
        works = tuple(works)
        command = ("-m", module, shape, *works, "--device", self.device, "--steps", str(self.steps), *flags)
        return Program(name, shape, command, works, _lacking(absent))

    def packing(self, shape: str, programs: Sequence[str], *flags: str) -> Program:
        """Return what trains rows of real lengths; a line says for itself how they were laid out."""
        name, absent = "ours", ()
        if "peft" in programs:
            name, absent = "PEFT", () if find_spec("peft") else ("peft",)
        command = ("-m", "benchmarks.packing", shape, *programs, "--device", self.device, *flags)
        return Program(name, shape, command, (), _lacking(absent))

    def _script(self, name: str) -> Path:
        return (self.rivals or Path()) / name

    def _rival(self, script: str, site: str) -> tuple[str | None, dict[str, str]]:
        if self.rivals is None or self.sites is None:
            return "--rivals and --sites are not given", {}
        absent = [str(path) for path in (self.rivals / script, self.sites / site) if not path.exists()]
        return _lacking(absent), {"PYTHONPATH": str(self.sites / site)}


def _lacking(absent: Sequence[str]) -> str | None:
    return f"no {' and no '.join(absent)}" if absent else None


def mixtures_7b(place: Place) -> list[Program]:
    return [
        place.ours("7b", ALL),
        place.ours("7b", ALL, "--recompute", "all", name="ours, recompute"),
        place.predecessor("7b", ALL),
    ]


def lora_7b(place: Place) -> list[Program]:
    return [
        place.ours("7b", ["lora", "dora"]),
        place.ours("7b", ["lora", "dora"], "--recompute", "all", name="ours, recompute"),
        place.peft("7b", ["lora", "dora"]),
        place.peft("7b", ["lora", "dora"], "--recompute"),
        place.peft("7b", ["lora"], "--liger"),
        place.peft("7b", ["lora"], "--recompute", "--liger"),
    ]


def unsloth_7b(place: Place) -> list[Program]:
    folder = Path(tempfile.gettempdir()) / "unsloth-7b"
    return [
        place.unsloth_model(folder),
        place.ours("7b", ["lora"]),
        place.unsloth(folder, "false", "0"),
        place.unsloth(folder, "true", "0.05"),
        place.unsloth(folder, "unsloth", "0"),
    ]


def long_7b(place: Place) -> list[Program]:
    long = [f"{method}@2x2048" for method in ALL]
    return [
        place.ours("7b", long),
        place.ours("7b", long[:3], "--recompute", "all", name="ours, recompute"),
        place.peft("7b", long[:2]),
        place.peft("7b", long[:1], "--recompute"),
    ]


def small(place: Place) -> list[Program]:
    return [
        place.ours("135m", ALL),
        place.ours("135m", ALL, "--recompute", "all", name="ours, recompute"),
        place.peft("135m", ["lora", "dora"]),
        place.peft("135m", ["lora", "dora"], "--recompute"),
        place.predecessor("135m", ALL),
    ]


def fused(place: Place) -> list[Program]:
    together = [f"{method}*{n}@{8 // n}x512" for method in ("mixlora", "lora") for n in (1, 2, 4, 8)]
    jobs = [f"{method}*{n}@{batch}" for batch in ("16x128", "4x128", "1x128") for method in ALL[:1] + ALL[2:3]
            for n in (1, 8)]  # fmt: skip
    return [place.ours("7b", together), place.ours("135m", jobs)]


def seed(place: Place) -> list[Program]:
    # forward and backward apart, so without CUDA graphs; means of ten; the predecessor's step is timed as a whole
    ten = replace(place, steps=10)
    return [
        ten.ours("7b", ALL[:4], "--recompute", "all", plain=True, name="ours, plain launches, recompute"),
        ten.ours("7b", ALL[:4], "--recompute", "all", "--compile", plain=True, name="ours, compiled, recompute"),
        ten.ours("7b", ALL[:4], "--compile", plain=True, name="ours, compiled"),
        ten.predecessor("7b", ALL[:4]),
    ]


def packing(place: Place) -> list[Program]:
    programs = []
    for shape in "7b", "135m":
        programs.append(place.packing(shape, ["packed+graphs", "packed", "padded"]))
        programs.append(place.packing(shape, ["peft"]))
        programs.append(place.packing(shape, ["packed+graphs", "packed", "padded"], "--adapters", "8"))
    return programs


def packing_cpu(place: Place) -> list[Program]:
    few = ("--base_model", "smollm2", "--rows", "8", "--batches", "2")
    return [place.packing("135m", ["packed", "padded"], *few), place.packing("135m", ["peft"], *few)]


def cpu_float32(place: Place) -> list[Program]:
    return _smollm2(replace(place, steps=4), "float32")


def cpu_bfloat16(place: Place) -> list[Program]:
    return _smollm2(replace(place, steps=4), "bfloat16")


def _smollm2(place: Place, dtype: str) -> list[Program]:
    works, flags = ["lora@4x64", "lora@1x64", "lora*4@1x64"], ("--base_model", "smollm2", "--dtype", dtype)
    return [place.ours("135m", works, *flags), place.peft("135m", works[:2], *flags)]


def tiny(place: Place) -> list[Program]:
    """Every kind of program at once, to try this script."""
    return [
        place.ours("tiny", ["lora", "mixlora", "lora*2"]),
        place.peft("tiny", ["lora"], "--recompute"),
        place.predecessor("tiny", ["lora", "mixlora"]),
        place.unsloth(Path("none"), "false", "0"),
    ]


SLICES: dict[str, Callable[[Place], list[Program]]] = {
    "mixtures-7b": mixtures_7b,
    "lora-7b": lora_7b,
    "unsloth-7b": unsloth_7b,
    "long-7b": long_7b,
    "small": small,
    "fused": fused,
    "seed": seed,
    "packing": packing,
    "packing-cpu": packing_cpu,
    "cpu-float32": cpu_float32,
    "cpu-bfloat16": cpu_bfloat16,
    "tiny": tiny,
}


def run(program: Program, seconds: float, errors: Path) -> Iterator[Figures]:
    """Yield a program's lines as they come; one that fails or has no time left ends with a line that says so.

    Args:
        program: what to run.
        seconds: after which it is ended.
        errors: file that its errors are added to.
    """
    command = [sys.executable, *program.command]
    began = time.monotonic()
    with errors.open("ab") as sink:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=sink, env=os.environ | program.environment, start_new_session=True
        )
    assert process.stdout is not None
    ended = False
    with process, selectors.DefaultSelector() as ready:
        ready.register(process.stdout, selectors.EVENT_READ)
        left = b""
        while not ended:
            if not ready.select(max(0.0, began + seconds - time.monotonic())):
                os.killpg(process.pid, signal.SIGKILL)
                break
            part = process.stdout.read1()  # type: ignore[attr-defined]
            ended = not part
            *lines, left = (left + part).split(b"\n")
            yield from (figures for line in lines if (figures := _figures(line)) is not None)
    if not ended:
        yield {"error": f"ended after {time.monotonic() - began:.0f} s"}
    elif process.returncode:
        last = errors.read_text(errors="replace").strip().rpartition("\n")[2]
        yield {"error": f"exit status {process.returncode}: {last[:160]}"}


def _figures(line: bytes) -> Figures | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def labelled(program: Program, figures: Figures) -> Figures:
    """Return a line under the table's names; rivals' steps have words of their own."""
    own = dict(figures)
    kinds = own.pop("kinds", None)
    work = own.get("work") or ("+".join([kinds] if isinstance(kinds, str) else kinds) if kinds else None)
    if work is None and "us_per_token" in own:
        work = program.works[0]
    if work is not None:
        own["work"] = str(Work.parse(work, program.shape))
    if "gradient_norm" in own:
        own["gradient_norms"] = own.pop("gradient_norm")
    variant = f", {own['variant']}" if "variant" in own else ""
    return own | {"program": program.name + variant, "shape": program.shape}


def measure(name: str, place: Place, rounds: int, minutes: float, folder: Path) -> list[Figures]:
    """Run a slice's programs in turns and return their lines, which are kept as they come."""
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    found: list[Figures] = []
    with (folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:

        def keep(figures: Figures) -> None:
            found.append(figures)
            print(json.dumps(figures), file=file, flush=True)
            print(json.dumps(figures), file=sys.stderr, flush=True)

        programs = SLICES[name](place)
        rate = Program("rate", "", RATE, ())
        first = (rate,) if place.device == "cuda" else ()
        for program in (*first, *(program for _ in range(rounds) for program in programs)):
            own = {"program": program.name, "shape": program.shape}
            before = [line for line in found if line["program"] == program.name and line["shape"] == program.shape]
            left = deadline - time.monotonic()
            if program.missing is not None:
                if not before:
                    keep(own | {"absent": program.missing})
            elif program.once and before:
                continue
            elif left <= 0:
                keep(own | {"error": "no time was left"})
            else:
                began = time.monotonic()
                for figures in run(program, left, folder / f"{name}.log"):
                    keep(labelled(program, figures))
                keep(own | {"process_s": round(time.monotonic() - began, 1)})
    return found


COLUMNS = ("program", "adapters", "us/token", "tokens/s", "forward + backward + optimizer, ms", "peak GiB", "MFU",
           "gradients", "first step, s", "times the first")  # fmt: skip


def table(found: list[Figures]) -> str:
    """Return a slice's lines as a Markdown table for each shape, one line for a program and work, and what failed."""
    rate = next((line["flops_per_second"] for line in found if "flops_per_second" in line), None)
    out = [] if rate is None else [f"bf16 product of 8192: {rate / 1e12:.0f} TFLOP/s"]
    measured: dict[tuple[str, str, str], list[Figures]] = {}
    for line in found:
        if "us_per_token" in line:
            measured.setdefault((line["shape"], line["program"], line["work"]), []).append(line)
    for shape in dict.fromkeys(key[0] for key in measured):
        out += ["", f"### {shape}", "", "| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|"]
        own = {key[1:]: lines for key, lines in measured.items() if key[0] == shape}
        for (program, work), lines in own.items():
            cells = _cells(SHAPES[shape], Work.parse(work, shape), lines, rate)
            first = _first(Work.parse(work, shape), [other for _, other in own], shape)
            base = next(lines for (_, other), lines in own.items() if other == first)
            times = _median(base, "us_per_token") / _median(lines, "us_per_token")
            out.append("| " + " | ".join([program, work, *cells, f"{times:.3f}"]) + " |")
    told = [line for line in found if "absent" in line or "error" in line]
    out += ["", *dict.fromkeys(_told(line) for line in told)] if told else []
    return "\n".join(out) + "\n"


def _told(line: Figures) -> str:
    who = " ".join(part for part in (line["program"], line["shape"], line.get("work", "")) if part)
    return f"- {who}: {'absent: ' + line['absent'] if 'absent' in line else line['error']}"


def _first(work: Work, works: list[str], shape: str) -> str:
    """Return the work that another is held against: the first of these methods with its rows, or else its tokens."""
    kin = [(text, other) for text in works if set((other := Work.parse(text, shape)).methods) == set(work.methods)]
    rows = [text for text, other in kin if other[1:] == work[1:]]
    tokens = [text for text, other in kin if other.tokens == work.tokens]
    if rows and Work.parse(rows[0], shape).methods != work.methods:
        return rows[0]
    return (tokens or rows)[0]


def _median(lines: list[Figures], key: str) -> float:
    return statistics.median(line[key] for line in lines)


def _cells(shape: Any, work: Work, lines: list[Figures], rate: float | None) -> list[str]:
    taken = [line["us_per_token"] for line in lines]
    us = statistics.median(taken)
    spread = f"{us:.1f}" if len(taken) == 1 else f"{us:.1f} ({min(taken):.1f}-{max(taken):.1f})"
    parts = lines[-1].get("parts_ms", {})
    norms = [line.get("gradient_norms") for line in lines]
    return [
        spread,
        f"{1e6 / us:,.0f}",
        " + ".join(f"{ms:.1f}" for ms in parts.values()) or "-",
        f"{max(line['peak_gib'] for line in lines):.1f}" if all("peak_gib" in line for line in lines) else "-",
        f"{shape.flops_per_token(work.length) / us * 1e6 / rate:.1%}" if rate else "-",
        "not told" if None in norms else "non-zero" if all(norm > 0 for norm in norms) else "**zero**",
        f"{lines[0]['first_step_s']:.1f}" if "first_step_s" in lines[0] else "-",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slices", nargs="+", choices=SLICES)
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--rivals", type=Path, help="folder of the rivals' steps")
    parser.add_argument("--sites", type=Path, help="folder of the rivals' packages")
    parser.add_argument("--out", type=Path, default=Path("benchmarks-out"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="that are counted of each")
    parser.add_argument("--minutes", type=float, default=8, help="of each slice")
    options = parser.parse_args()
    device = options.device or _device()
    for name in options.slices:
        place = Place(device, options.rivals, options.sites, options.steps)
        found = measure(name, place, options.rounds, options.minutes, options.out)
        made = f"## {name}\n\n{table(found)}"
        (options.out / f"{name}.md").write_text(made, encoding="utf-8")
        print(made, flush=True)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
