"""Starting several processes of the training program, one for each GPU, and looking after them.

They get torchrun's environment, so whoever prefers torchrun or `accelerate launch` may start them that way. What this
adds: no port of another program is taken, each process's own exit status and the signals that arrive here keep their
meaning, and when one ends before its time it is said which and by what, and the others do not wait for it.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

from mlora.cli.start import program
from mlora.config import RunOptions

GRACE_SECONDS, GRACE_SECONDS_WITHOUT_FIRST = 10.0, 1.0
"""How long the others may take to end by themselves after one has failed, or after the second signal; the first is the
only one that writes, so nothing is lost where it has ended."""
INTERRUPTED = 130


def start_ranks(options: RunOptions) -> int:
    """Run the training program in several processes and return the exit status."""
    command, environment = program(options)
    count = options.ranks
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(count)}
    if options.num_processes > 1:  # otherwise each would take all processors
        environment.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // count, 1)))
    children: list[subprocess.Popen[bytes]] = []
    started = False
    early: list[int] = []
    told: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if not started:
            early.append(number)
            return
        told.append(number)
        for child in children:
            child.send_signal(number)

    heeded = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in heeded}
    try:
        for rank in range(count):
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            children.append(subprocess.Popen(command, env=own, start_new_session=True))
        started = True
        for number in early:
            forward(number, None)
        return _status(children, _wait(children, told), told)
    finally:
        for child in children:
            child.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: list[subprocess.Popen[bytes]], told: list[int]) -> dict[int, int]:
    """Wait until all have ended, and return the statuses of those that did so by themselves, in that order.

    When one has failed, or the second signal has come, the others get a while and are then killed.
    """
    statuses: dict[int, int] = {}
    failed_at: float | None = None
    while len(statuses) < len(children):
        for rank, child in enumerate(children):
            if rank not in statuses and child.poll() is not None:
                statuses[rank] = child.returncode
        if failed_at is None and (any(statuses.values()) or len(told) > 1):
            failed_at = time.monotonic()
        grace = GRACE_SECONDS_WITHOUT_FIRST if 0 in statuses else GRACE_SECONDS
        if failed_at is not None and time.monotonic() > failed_at + grace:
            for child in children:
                child.kill()
            break
        time.sleep(0.05)
    for child in children:
        child.wait()
    return statuses


def _status(children: list[subprocess.Popen[bytes]], ended: dict[int, int], told: list[int]) -> int:
    """Return the exit status of the whole; say which process failed where the first has not said why."""
    failed = {rank: status for rank, status in ended.items() if status}
    if told and (failed or len(ended) < len(children)):
        return INTERRUPTED if INTERRUPTED in failed.values() else 128 + told[-1]
    if not failed:
        return 0
    rank, status = next((pair for pair in failed.items() if pair[1] < 0), next(iter(failed.items())))
    if status > 0 and failed.get(0, 0) > 0:
        return failed[0]
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    print(f"Error: rank {rank} of {len(children)} processes {how}, which ends the run; --resume goes on from the last "
          "checkpoint", file=sys.stderr)  # fmt: skip
    return 1 if status < 0 else status


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
