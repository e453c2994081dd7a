"""The command line as a user meets it: fast, without torch, honest exit statuses, no shell."""

from __future__ import annotations

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result

from mlora.cli import start
from mlora.cli.config import OVERRIDES
from mlora.cli.program import program
from mlora.cli.run import train
from mlora.config import RunOptions
from mlora.data.demo import ZINDLE_QUESTION
from mlora.tasks import PROTOCOLS, known_tasks
from mlora.wording import COMMAND, command_line, launcher

ROOT = Path(__file__).parents[1]
FAST = [
    ["--help"],
    ["gen", "--template", "mixlora", "--tasks", "arc-e"],
    ["avail"],
    ["schema"],
    ["run", "--help"],
    ["evaluate", "--help"],
    ["reproduce", "--help"],
]
CONFIG = {"lora": [{"name": "a"}]}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mlora.json").write_text(json.dumps(CONFIG))


def launch(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *settings.pop("python", []), str(ROOT / "launch.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **settings)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(program, list(arguments))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """What `run` would have started: commands with their environments."""
    calls: list[tuple[list[str], dict[str, str]]] = []

    def record(command: list[str], environment: dict[str, str]) -> int:
        calls.append((command, environment))
        return 7

    monkeypatch.setattr(start, "wait", record)
    return calls


@pytest.mark.parametrize("arguments", FAST, ids=" ".join)
def test_it_starts_without_torch(arguments: list[str]) -> None:
    done = launch(*arguments, python=["-X", "importtime"])
    assert done.returncode == 0, done.stderr[-2000:]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "mlora" in imported
    assert not imported & {"torch", "transformers", "datasets", "numpy", "peft"}


@pytest.mark.parametrize("arguments", FAST, ids=" ".join)
def test_it_takes_less_than_half_a_second_of_cpu(arguments: list[str], tmp_path: Path) -> None:
    # Where bytecode is not written, every start compiles all of the sources: what an installed program never does.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path)

    def seconds() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    taken = []
    for _ in range(5):
        before = seconds()
        assert launch(*arguments, env=environment).returncode == 0
        taken.append(seconds() - before)
    assert min(taken) < 0.5, taken


@pytest.mark.parametrize("script", ["launch.py", "train.py", "generate.py", "inference.py"])
def test_a_python_without_the_packages_is_told_what_to_do(script: str) -> None:
    done = subprocess.run([sys.executable, "-S", str(ROOT / script)], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "has no package" in done.stderr
    assert "make setup" in done.stderr and "Traceback" not in done.stderr


def test_the_log_is_where_the_help_says() -> None:
    for command, said in (
        ("run", "with --dir, its log.txt"),
        ("evaluate", "with --dir, its log.txt"),
        ("reproduce", "log.txt in --dir"),
    ):
        assert said in " ".join(invoke(command, "--help").output.split())


def test_the_forms_of_an_export_are_a_line_each() -> None:
    lines = [line.strip() for line in invoke("export", "--help").output.splitlines()]
    assert "peft     LoRA, rsLoRA and DoRA, for PEFT and vLLM" in lines and not any("\\b" in line for line in lines)


@pytest.mark.parametrize(("started", "said"), [("/somewhere/bin/mlora", "mlora"), ("launch.py", "python launch.py")])
def test_commands_are_called_as_this_one_was(monkeypatch: pytest.MonkeyPatch, started: str, said: str) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    assert launcher() == said


def test_a_command_is_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/launch.py", "run", "--base_model", "a b"])
    typed = ["launch.py", "run", "--base_model", "a b"]
    assert command_line() == typed
    _, environment = start.program(RunOptions("a b", num_processes=2))
    monkeypatch.setattr(os, "environ", environment)  # as train.py finds it, and as each of its processes does
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py", "--base_model=a b"])
    assert command_line() == typed and start.program(RunOptions("a b"))[1] == environment
    monkeypatch.setattr(os, "environ", {})
    assert command_line() == ["train.py", "--base_model=a b"]
    began = {"TORCHELASTIC_RUN_ID": "none", "GROUP_WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "2"}
    monkeypatch.setattr(os, "environ", began)
    assert command_line() == ["torchrun", "--nproc_per_node=2", "train.py", "--base_model=a b"]
    monkeypatch.setattr(os, "environ", began | {"GROUP_WORLD_SIZE": "3"})
    assert command_line()[:3] == ["torchrun", "--nnodes=3", "--nproc_per_node=2"]


def test_alone_it_tells_the_five_steps() -> None:
    result = invoke()
    assert result.exit_code == 0
    assert result.output == invoke("help").output == invoke("--help").output
    for word in ["gen", "edit", "run", "evaluate", "compare"]:
        assert f". {word} " in result.output
    assert "mixlora" in invoke("help", "gen").output


def commands() -> list[str]:
    return list(program.commands)


@pytest.mark.parametrize("command", ["", *commands()])
def test_help_fits_80_columns(command: str) -> None:
    text = invoke(*filter(None, [command, "--help"])).output
    assert max(map(len, text.splitlines())) <= 80


def test_the_list_of_commands_is_cut_nowhere() -> None:
    listed = invoke().output.partition("Commands:")[2].splitlines()[1:]
    assert len(listed) == len(commands()) and not [line for line in listed if "..." in line]


def test_a_bounded_number_is_one_number() -> None:
    assert not [c for c in commands() if "RANGE" in invoke(c, "--help").output]


def test_what_is_available_fits_80_columns_and_is_all_there() -> None:
    text = invoke("avail").output
    assert max(map(len, text.splitlines())) <= 80
    shown = [line.split()[0] for line in text.splitlines() if line.strip()]
    assert sorted(set(known_tasks()) - set(shown)) == []
    assert all(f"{protocol}: " in text for protocol in PROTOCOLS)


FILES = ("what a shell completes by itself",)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("gen --template mixl", ["mixlora", "mixlora_dynamic", "mixlora_switch"]),
        ("gen --template ./own", FILES),
        ("gen --tasks ob", ["obqa"]),
        ("gen --tasks arc-e;arc-", ["arc-e;arc-c"]),
        ("gen --tasks arc-e;./rows", FILES),
        ("gen --data_path ", FILES),
        ("evaluate --tasks glue:s", ["glue:sst2"]),
        ("reproduce --tasks arc-e,ob", ["arc-e,obqa"]),
        ("reproduce --methods lora;mixd", ["lora;mixdora"]),
        ("generate --template c", ["chat"]),
        ("generate --prompts ", FILES),
        ("run --base_model mod", FILES),
        ("run --config ", FILES),
        ("run --dir ", FILES),
        ("report ", FILES),
        ("export --adapter ", FILES),
    ],
)
def test_a_shell_completes_names_and_paths(typed: str, offered: Sequence[str]) -> None:
    *words, begun = typed.split(" ")
    found = ShellComplete(program, {}, "mlora", "_MLORA_COMPLETE").get_completions(words, begun)
    if offered is FILES:
        assert [item.type for item in found] == ["file"]
    else:
        assert [(item.type, item.value) for item in found] == [("plain", value) for value in offered]


def test_flags_are_the_fields_of_the_options() -> None:
    flags = {option.name for option in train.params if option.expose_value}
    assert flags == {field.name for field in fields(RunOptions)}
    given = train.make_context("train.py", ["--base_model", "m"]).params
    assert RunOptions(**given) == RunOptions(base_model="m")


@pytest.mark.parametrize(("words", "value"), [([], False), (["--tf32"], True), (["--tf32", "True"], True)])
def test_truth_values(words: list[str], value: bool) -> None:
    for arguments in [["--base_model", "m", *words], [*words, "--base_model", "m"]]:
        assert train.make_context("train.py", arguments).params["tf32"] is value
    for off in ["false", "False"]:
        assert train.make_context("train.py", ["--base_model", "m", "--use_cache", off]).params["use_cache"] is False


def test_options_survive_being_passed_on() -> None:
    options = RunOptions(
        "-odd name; $(id)", config="a b.json", use_cache=False, tf32=True, limit=3, dtype="bf16", debug=True
    )
    assert RunOptions(**train.make_context("train.py", options.arguments()).params) == options


def test_the_seed_files_commands() -> None:
    for tasks in ["arc-c", "hellaswag", "yahma/alpaca-cleaned"]:
        assert invoke("gen", "--template", "mixlora", "--tasks", tasks).exit_code == 0
    mixed = ["gen", "--template", "mixlora", "--tasks", "arc-c;arc-e;boolq;obqa;piqa", "--multi_task", "True"]
    result = invoke(*mixed, "--adapter_name", "mixlora")
    assert result.exit_code == 0
    assert "mixlora_0: mixlora on arc-c;arc-e;boolq;obqa;piqa" in result.output


def test_every_flag_of_gen_changes_the_file() -> None:
    def generated(*words: str) -> Any:
        result = invoke("gen", "--template", "lora", "--tasks", "piqa", *words)
        assert result.exit_code == 0, result.output
        return json.loads(Path("mlora.json").read_text())

    values = {int: "4", float: "5", str: "alpaca", bool: "True"}
    for flag, key, kind, _ in OVERRIDES:
        if flag == "use_dora":  # a key of its method, once that is registered
            continue
        value = {"lr_scheduler": "linear", "protocol": "letter"}.get(flag) or values[kind]
        extra = ["--micro_batch_size", "4"] if flag == "batch_size" else []
        config = generated(f"--{flag}", value, *extra)
        written = config.get(key, config["lora"][0].get(key))
        assert str(written) == str(kind(value)), flag


def test_avail_lists_tasks_methods_and_templates() -> None:
    output = invoke("avail").output
    assert "arc-e  " in output and "allenai/ai2_arc:ARC-Easy" in output
    assert "lora, mixlora" in output


def test_schema_is_json() -> None:
    assert json.loads(invoke("schema").output)["$defs"]["mixlora"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gne"], "Did you mean 'gen'?"),
        (["gen", "--template", "lora", "--task", "x"], "--tasks"),
        (["gen", "--template", "lora"], "--tasks"),
        (["gen", "--template", "lroa", "--tasks", "piqa"], 'did you mean "lora"?'),
        (["gen", "--template", "lora", "--tasks", "arc_e"], 'did you mean "arc-e"?'),
        (["gen", "--template", "lora", "--tasks", "piqa", "--multi_task", "maybe"], "maybe"),
        (["run"], "--base_model"),
        (["run", "--base_model", "m", "--config", "none.json"], "no such file"),
        (["run", "--base_model", "m", "--quantize", "3bit"], "4bit"),
        (["run", "--base_model", "m", "--config", "empty.json"], "empty.json: is empty"),
        (["run", "--base_model", "m", "--config", "comma.json"], "comma"),
        (["data", "--preview", "hellaswg", "--base_model", "m"], '--preview: "hellaswg" is no task, no file or folder'),
        (["report", "nowhere"], "nowhere: no such folder"),
        (["run", "--base_model", "m", "--config", "bad.json"], 'lora[0].lr_rate: unknown key; did you mean "lr"?'),
    ],
)
def test_bad_input_exits_with_2_and_says_why(arguments: list[str], message: str) -> None:
    Path("bad.json").write_text('{"lora": [{"name": "a", "lr_rate": 1}]}')
    Path("empty.json").write_text("\n")
    Path("comma.json").write_text('{"lora": [{"name": "a"},]}')
    done = launch(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 15


def test_debug_shows_the_traceback() -> None:
    done = launch("run", "--base_model", "m", "--config", "none.json", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr and "no such file" in done.stderr


def test_run_starts_the_training_program(started: list[tuple[list[str], dict[str, str]]]) -> None:
    assert invoke("run", "--base_model", "some model; rm -rf", "--tf32", "--limit", "3").exit_code == 7
    command, environment = started[0]
    assert command == [
        sys.executable,
        str(ROOT / "train.py"),
        "--base_model=some model; rm -rf",
        "--limit=3",
        "--tf32=True",
    ]
    assert environment == dict(os.environ) | {COMMAND: shlex.join(command_line())}


def test_run_on_several_gpus(started: list[tuple[list[str], dict[str, str]]]) -> None:
    before = dict(os.environ)
    assert invoke("run", "--base_model", "m", "--num_gpus", "2", "--cuda_device", "2,3").exit_code == 7
    command, environment = started[0]
    assert command[1] == str(ROOT / "train.py") and "--num_gpus=2" in command
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert dict(os.environ) == before
    invoke("run", "--base_model", "m", "--num_gpus", "2", "--dry_run")
    assert started[1][0][1] == str(ROOT / "train.py")


def test_run_checks_the_config_and_leaves_warnings_to_the_program(
    started: list[tuple[list[str], dict[str, str]]], caplog: pytest.LogCaptureFixture
) -> None:
    Path("mlora.json").write_text(json.dumps({**CONFIG, "train_strategy": "optim"}))
    assert invoke("run", "--base_model", "m").exit_code == 7
    assert not caplog.records
    Path("mlora.json").write_text("{}")
    assert invoke("run", "--base_model", "m").exit_code == 2
    assert len(started) == 1


def test_demo_is_a_run(started: list[tuple[list[str], dict[str, str]]]) -> None:
    assert invoke("demo").exit_code == 7
    command = started[0][0]
    assert {"--base_model=smollm2", "--dir=runs/demo", "--overwrite=True"} <= set(command)
    assert any(word.startswith("--config=") and word.endswith("demo.json") for word in command)


def test_demo_ends_with_what_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "wait", lambda command, environment: 0)
    said = invoke("demo")
    assert said.exit_code == 0 and ZINDLE_QUESTION in said.output
    last = said.output[said.output.index("generate") :].replace("\\\n", " ")
    done = invoke(*shlex.split(last), "--template", "nowhere")  # its other flags are known, then
    assert "--template: 'nowhere': no such file" in done.output


PROGRAM = """
import signal, sys, time
from pathlib import Path

def stop(number, frame):
    with open("signals", "a") as file:
        file.write(f"{number}\\n")
    time.sleep(0.3)  # a second signal would be seen
    sys.exit(130)

signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
if "--limit=9" in sys.argv:
    sys.exit(9)
if "--limit=8" in sys.argv:
    signal.raise_signal(signal.SIGKILL)
Path("ready").touch()
time.sleep(30)
"""


def start_fake(tmp_path: Path, *arguments: str) -> subprocess.Popen[bytes]:
    Path("train.py").write_text(PROGRAM)
    code = f"from pathlib import Path; from mlora.cli import main, start; start.ROOT = Path({str(tmp_path)!r}); main()"
    command = [sys.executable, "-c", code, "run", "--base_model", "m", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, start_new_session=True)


@pytest.mark.parametrize(("limit", "status"), [("9", 9), ("8", 128 + signal.SIGKILL)])
def test_the_programs_exit_status_is_the_launchers(tmp_path: Path, limit: str, status: int) -> None:
    assert start_fake(tmp_path, "--limit", limit).wait(30) == status


@pytest.mark.parametrize("whole_group", [False, True], ids=["to the launcher", "from a terminal"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_the_program_once(tmp_path: Path, number: int, whole_group: bool) -> None:
    with start_fake(tmp_path) as launcher:
        deadline = time.monotonic() + 20
        while not Path("ready").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        (os.killpg if whole_group else os.kill)(launcher.pid, number)
        assert launcher.wait(20) == 130
    assert Path("signals").read_text().split() == [str(int(number))]


def test_no_command_is_hidden_from_the_story() -> None:
    assert isinstance(program, click.Group)
    assert {"gen", "run", "avail", "schema", "help", "demo"} <= set(commands())
