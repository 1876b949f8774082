"""Commands in processes of their own, one or side by side, that never outlive this one; and how this one ends."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

POLL_S = 0.5
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """For ``preexec_fn``: the child gets SIGTERM when its parent ends, even if that was killed."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def run_job(command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """Run a command to its end; on an exception it is ended first, with the time that it needs.

    Args:
        command: Command line.
        environment: Of the command; None: this one.

    Returns:
        Its exit code.
    """
    process = _start(command, env=environment)
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def _start(command: Sequence[str], **options: Any) -> subprocess.Popen:
    # A group of its own: Ctrl-C reaches only this process, which then ends the child.
    return subprocess.Popen(command, process_group=0, preexec_fn=end_with_parent, **options)


def run_jobs(
    jobs: Mapping[str, Sequence[str]], workers: int, log_folder: Path, on_poll: Callable[[], None] = lambda: None
) -> list[str]:
    """Run commands, a few at a time, one numeric thread each; a job that dies does not stop the others.

    Args:
        jobs: Name to command line.
        workers: How many run at the same time.
        log_folder: Gets ``NAME.log`` with a job's output.
        on_poll: Called twice a second and at the end, for progress.

    Returns:
        Names of the jobs whose exit code was not 0. On an exception every job is ended first.
    """
    waiting, running, failed = list(jobs), {}, []
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                name = waiting.pop(0)
                with (log_folder / f"{name}.log").open("a") as log:
                    running[name] = _start(jobs[name], env=environment, stdout=log, stderr=log)
            time.sleep(POLL_S)
            for name, process in list(running.items()):
                if process.poll() is not None:
                    del running[name]
                    if process.returncode:
                        failed.append(name)
            on_poll()
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return failed


def interrupt_on_termination() -> None:
    """Let SIGTERM and SIGHUP end this process as Ctrl-C does, through its context managers."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
