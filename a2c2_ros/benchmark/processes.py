"""Child processes of the benchmark, and what the system says of them."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from a2c2_ros.core.errors import A2C2Error

STOP_TIMEOUT_S = 10.0
LOG_LINES = 15  # of a log, in an error


class Processes:
    """Python modules run as processes of their own, in a group of their own, so that Ctrl-C reaches only the parent.

    A context manager: whatever still runs at its end is ended.

    Args:
        folder: Gets ``NAME.log`` with the output of each.
        environment: Environment of the children.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder = folder
        self._environment = dict(environment)
        self._children: dict[str, subprocess.Popen] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children.values():
            if child.poll() is None:
                child.terminate()
        for name in self._children:
            self._wait(name)

    def start(self, name: str, module: str, arguments: Sequence[str]) -> int:
        """Start ``python -m MODULE ARGUMENTS``; returns its process id."""
        with (self._folder / f"{name}.log").open("w") as log:
            self._children[name] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=0,
            )
        return self._children[name].pid

    def log(self, name: str) -> str:
        """What a process has written so far."""
        return (self._folder / f"{name}.log").read_text(errors="replace")

    def wait_for(
        self, condition: Callable[[], bool], what: str, timeout_s: float, poll: Callable[[], None] | None = None
    ) -> None:
        """Wait until the condition holds, calling ``poll`` (or sleeping) in between.

        Raises:
            A2C2Error: If a process ends before, or the time is over; with the ends of the logs.
        """
        deadline = time.monotonic() + timeout_s
        while not condition():
            died = [name for name, child in self._children.items() if child.poll() is not None]
            if died:
                raise self._error(f"{died} ended before {what}")
            if time.monotonic() > deadline:
                raise self._error(f"no {what} within {timeout_s:g} s")
            if poll is None:
                time.sleep(0.05)
            else:
                poll()

    def wait_end(self, name: str, timeout_s: float) -> None:
        """Wait until a process has ended by itself.

        Raises:
            A2C2Error: If it fails or the time is over.
        """
        try:
            code = self._children[name].wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise self._error(f"{name} did not end within {timeout_s:g} s") from None
        if code != 0:
            raise self._error(f"{name} ended with exit code {code}")

    def check(self) -> None:
        """Raises :class:`A2C2Error` if a process has ended."""
        self.wait_for(lambda: all(child.poll() is None for child in self._children.values()), "the end of the cell", 0)

    def stop(self, name: str) -> None:
        """End a process with SIGTERM and wait for it.

        Raises:
            A2C2Error: If it does not end cleanly; it is killed if it does not end at all.
        """
        self._children[name].terminate()
        code = self._wait(name)
        if code != 0:
            raise self._error(f"{name} ended with exit code {code}")

    def _wait(self, name: str) -> int:
        child = self._children[name]
        try:
            return child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait()

    def _error(self, text: str) -> A2C2Error:
        logs = (f"{name}: " + "\n".join(self.log(name).splitlines()[-LOG_LINES:]) for name in self._children)
        return A2C2Error("\n".join([text, *logs]))


def cpu_time_s(pid: int) -> float:
    """User and system time that a process has used [s], see proc(5).

    Raises:
        A2C2Error: If there is no such process.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        raise A2C2Error(f"process {pid} has ended") from None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy_time_s() -> float:
    """Time that all cores together were busy or taken away by a hypervisor, since the start of the machine [s]."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


class CpuUse:
    """CPU use from its making on, by process and of everything else.

    Args:
        pids: Name to process id.
    """

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = dict(pids)
        self._begin = self._read()

    def cores(self) -> dict[str, float]:
        """Cores that were busy on average: by name, and "others" for the rest of the machine."""
        now = self._read()
        wall_s, busy_s, *used_s = (after - before for before, after in zip(self._begin, now))
        cores = {name: round(s / wall_s, 3) for name, s in zip(self._pids, used_s)}
        return cores | {"others": round(max(0.0, busy_s - sum(used_s)) / wall_s, 3)}

    def _read(self) -> list[float]:
        return [time.monotonic(), busy_time_s(), *map(cpu_time_s, self._pids.values())]


def fifo_threads(pid: int) -> int:
    """How many threads of a process run under SCHED_FIFO."""
    found = 0
    for entry in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            # The nodes' threads ask for it with a flag that is part of the answer.
            found += os.sched_getscheduler(int(entry.name)) & ~os.SCHED_RESET_ON_FORK == os.SCHED_FIFO
    return found
