"""Independent commands side by side, each in a process of its own."""

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

POLL_S = 0.5


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
                    running[name] = subprocess.Popen(jobs[name], env=environment, stdout=log, stderr=log)
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
