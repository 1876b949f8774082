"""Nodes as real processes for the tests, on a DDS domain of their own."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

TIMEOUT_S = 90.0


class Peer:
    """A node of the test on a system's domain, spun only while the test waits."""

    def __init__(self, system: "System") -> None:
        import rclpy
        from rclpy.executors import SingleThreadedExecutor

        self._system = system
        self._context = rclpy.Context()
        rclpy.init(context=self._context, domain_id=system.domain_id)
        self.node = rclpy.create_node("peer", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)

    def spin_until(
        self, condition: Callable[[], bool], what: str | Callable[[], str], timeout_s: float = TIMEOUT_S
    ) -> None:
        self._system.wait_for(condition, what, timeout_s, pause=self._spin)

    def _spin(self) -> None:
        """Handle what comes for a while: a single callback per check would fall behind fast topics."""
        end_s = time.monotonic() + 0.05
        while time.monotonic() < end_s:
            self._executor.spin_once(timeout_sec=0.02)  # always the same: another timeout starts with the first entity

    def close(self) -> None:
        import rclpy

        self.node.destroy_node()
        rclpy.shutdown(context=self._context)


class System:
    """Starts nodes as ``ros2 run`` would, collects their output and ends them."""

    def __init__(self, folder: Path) -> None:
        self.domain_id = random.SystemRandom().randrange(1, 100)
        self._folder = folder
        self._processes: dict[str, subprocess.Popen] = {}

    def start(self, node: str, **parameters) -> subprocess.Popen:
        arguments = ["--ros-args"]
        for name, value in parameters.items():
            text = str(value).lower() if isinstance(value, bool) else str(value)
            arguments += ["-p", f"{name.replace('__', '.')}:={text}"]
        code = "import faulthandler, sys; faulthandler.register(10); "
        code += f"from a2c2_ros.nodes.{node} import main; main(sys.argv)"
        log = (self._folder / f"{node}.log").open("w")
        environment = os.environ | {"ROS_DOMAIN_ID": str(self.domain_id), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment, stdout=log, stderr=log)
        self._processes[node] = process
        return process

    def log(self, node: str) -> str:
        return (self._folder / f"{node}.log").read_text()

    def wait_for(
        self,
        condition: Callable[[], bool],
        what: str | Callable[[], str],
        timeout_s: float = TIMEOUT_S,
        pause: Callable[[], None] = lambda: time.sleep(0.05),
    ) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            died = [node for node, process in self._processes.items() if process.poll()]
            if died or time.monotonic() > deadline:
                logs = "\n".join(f"== {node}\n{self.log(node)}" for node in self._processes)
                text = what if isinstance(what, str) else what()
                raise AssertionError(f"{text} did not happen within {timeout_s} s, died: {died}\n{logs}")
            pause()

    def stop(self, node: str, signal_number: int = signal.SIGTERM) -> int:
        process = self._processes[node]
        if process.poll() is None:
            process.send_signal(signal_number)
        try:
            return process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGUSR1)  # faulthandler writes every thread's stack to the log
            time.sleep(1.0)
            raise AssertionError(f"{node} does not end\n{self.log(node)}") from None

    def close(self) -> dict[str, int]:
        try:
            return {node: self.stop(node) for node in self._processes}
        finally:
            for process in self._processes.values():
                if process.poll() is None:
                    process.kill()
                    process.wait()
