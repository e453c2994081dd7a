"""Starting the training program: its exit status is ours, and a signal that arrives here reaches it once."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from types import FrameType

from mlora.config import RunOptions
from mlora.config.templates import ROOT
from mlora.wording import COMMAND, command_line


def start(options: RunOptions) -> int:
    """Run the training program and return its exit status."""
    return wait(*program(options))


def program(options: RunOptions) -> tuple[list[str], dict[str, str]]:
    """Return the command of the training program and its environment."""
    script = ROOT / "train.py" if (ROOT / "train.py").exists() else ROOT / "programs" / "train.py"
    environment = dict(os.environ) | {COMMAND: shlex.join(command_line())}
    if options.cuda_device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = options.cuda_device
    return [sys.executable, str(script), *options.arguments()], environment


def wait(command: list[str], environment: dict[str, str]) -> int:
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

    stopping = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    heeded = [number for number in stopping if signal.getsignal(number) is not signal.SIG_IGN]  # nohup turns one off
    before = {number: signal.signal(number, forward) for number in heeded}
    try:
        child = subprocess.Popen(command, env=environment, start_new_session=True)
        for arrived in early:
            child.send_signal(arrived)
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - status if status < 0 else status
