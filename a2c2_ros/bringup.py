"""Starts a system without ``ros2 launch``: ``python -m a2c2_ros.bringup libero_sim task:=0 episodes:=2``.

The processes are those of the launch file of the same name. The exit code is 0 if the run ended by itself or
was asked to (Ctrl-C, SIGTERM) and every node ended well, 1 if one failed or had to be killed, 2 for wrong arguments.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from a2c2_ros.core.errors import ConfigError
from a2c2_ros.launching import CLOSED, SYSTEMS, Argument, System, parse_arguments

POLL_S = 0.05
# Longer than the recorder waits for its disk: a node's second signal interrupts what it does at its end.
TERMINATE_S = 30.0
KILL_S = 10.0  # after that
# What a process that does not end gets, by the time since the shutdown began [s].
ESCALATION = ((0.0, signal.SIGINT), (TERMINATE_S, signal.SIGTERM), (TERMINATE_S + KILL_S, signal.SIGKILL))
# Exit codes of a node that was asked to end: by itself, or by the signal.
CLEAN_EXITS = {0, *(code for s in (signal.SIGINT, signal.SIGTERM) for code in (-s, 128 + s))}
# Ask the bring-up itself to end.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Domains whose ports lie below the ones that Linux hands out to other programs.
DOMAINS = range(1, 102)


def find_executable(name: str) -> Path:
    """Path of ``lib/a2c2_ros/<name>`` in the first prefix of ``AMENT_PREFIX_PATH`` that has it.

    Raises:
        ConfigError: If none has it.
    """
    prefixes = os.environ.get("AMENT_PREFIX_PATH", "")
    for prefix in filter(None, prefixes.split(os.pathsep)):
        path = Path(prefix) / "lib" / "a2c2_ros" / name
        if os.access(path, os.X_OK):
            return path
    raise ConfigError(f"{name} is in no lib/a2c2_ros of AMENT_PREFIX_PATH {prefixes!r}, source install/setup.bash")


class Supervisor:
    """Child processes, each in a process group of its own, that start and end together.

    Args:
        escalation: Seconds since the begin of the shutdown and the signal that is sent then, rising.
    """

    def __init__(self, escalation: Sequence[tuple[float, signal.Signals]] = ESCALATION) -> None:
        self._escalation = escalation
        self._children: dict[str, subprocess.Popen] = {}
        self._signal: signal.Signals | None = None

    def run(self, commands: Mapping[str, Sequence[str]], ends: str, environment: Mapping[str, str]) -> int:
        """Start the commands, wait for the end of ``ends``, end the others.

        Args:
            commands: Name to command line, in the order of the start.
            ends: Name of the command whose exit ends the run.
            environment: Environment of the commands.

        Returns:
            Exit code, see the module.
        """
        previous = {s: signal.signal(s, self._on_signal) for s in STOP_SIGNALS}
        try:
            for name, command in commands.items():
                self._children[name] = subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, process_group=0
                )
            failed = self._wait(ends)
        finally:
            clean = self._shut_down()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return int(failed or not clean)

    def _on_signal(self, number: int, frame: object) -> None:
        self._signal = signal.Signals(number)

    def _wait(self, ends: str) -> bool:
        """Wait for the end of the run; True if a process failed."""
        over: set[str] = set()
        while self._signal is None:
            for name, child in self._children.items():
                code = child.poll()
                if code is None or name in over:
                    continue
                over.add(name)
                if code != 0:
                    _say(f"{name} failed with exit code {code}")
                    return True
                if name == ends:
                    return False
                _say(f"{name} ended")
            time.sleep(POLL_S)
        _say(f"{self._signal.name}: shutting down")
        return False

    def _shut_down(self) -> bool:
        """End what still runs; True if all of it ended when asked and without an error."""
        running = {name: child for name, child in self._children.items() if child.poll() is None}
        started_s = time.monotonic()
        for after_s, number in self._escalation:
            while any(c.poll() is None for c in running.values()) and time.monotonic() - started_s < after_s:
                time.sleep(POLL_S)
            for name, child in running.items():
                if child.poll() is None:
                    if after_s > 0:
                        _say(f"{name} did not end within {after_s:g} s: {number.name}")
                    _signal_group(child, number)
        clean = True
        for name, child in running.items():
            code = child.wait()
            if code not in CLEAN_EXITS:
                _say(f"{name} failed in the shutdown with exit code {code}")
                clean = False
        for child in self._children.values():
            _signal_group(child, signal.SIGKILL)  # whatever a node started and left behind
        return clean


def _signal_group(child: subprocess.Popen, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, number)


def _say(text: str) -> None:
    print(f"[bringup] {text}", file=sys.stderr, flush=True)


def environment() -> dict[str, str]:
    """This environment, closed to other machines and other runs unless it says otherwise."""
    domain = random.SystemRandom().choice(DOMAINS)
    return {"ROS_DOMAIN_ID": str(domain)} | CLOSED | os.environ


def run_system(system: System) -> int:
    """Run a system to its end; the exit code is that of :meth:`Supervisor.run`.

    Raises:
        ConfigError: If an executable is missing.
    """
    commands = {p.name: [str(find_executable(p.executable)), *p.ros_arguments()] for p in system.processes}
    env = environment()
    system.out.mkdir(parents=True, exist_ok=True)
    _say(f"run folder {system.out}")
    _say(f"ROS_DOMAIN_ID={env['ROS_DOMAIN_ID']} ROS_AUTOMATIC_DISCOVERY_RANGE={env['ROS_AUTOMATIC_DISCOVERY_RANGE']}")
    return Supervisor().run(commands, system.ends, env)


def describe(table: Sequence[Argument]) -> str:
    """The arguments as a table: name, default, meaning, what is allowed."""
    width = max(len(f"{a.name}:={a.default_text}") for a in table)
    return "\n".join(f"  {f'{a.name}:={a.default_text}':<{width}}  {a.description} ({a.allowed})" for a in table)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m a2c2_ros.bringup", description=__doc__.split("\n\n")[0])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(f"arguments of {name}:\n{describe(table)}" for name, (table, _) in SYSTEMS.items())
    parser.add_argument("system", choices=SYSTEMS, help="what to start")
    parser.add_argument("arguments", nargs="*", metavar="name:=value", help="see below")
    parser.add_argument("-s", "--show-args", action="store_true", help="list the system's arguments and exit")
    options = parser.parse_args(argv)
    table, build = SYSTEMS[options.system]
    if options.show_args:
        print(describe(table))
        return 0
    try:
        given = {}
        for text in options.arguments:
            name, separator, value = text.partition(":=")
            if not separator:
                raise ConfigError(f"argument {text!r} is not of the form name:=value")
            given[name] = value
        return run_system(build(parse_arguments(table, given)))
    except ConfigError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    sys.exit(main())
