"""Listens to a control loop: light while it runs, the messages are decoded afterwards."""

import time
from collections.abc import Sequence

import numpy as np
import rclpy
from diagnostic_msgs.msg import DiagnosticArray
from rclpy.executors import SingleThreadedExecutor
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import JointState

from a2c2_ros.benchmark.trace import Trace
from a2c2_ros.core.errors import A2C2Error
from a2c2_ros.core.safety import State
from a2c2_ros.msg import ControlStep
from a2c2_ros.nodes.conversions import to_ns
from a2c2_ros.nodes.runtime import reliable_qos

QUEUE = 10_000
STATUS_NAME = "correction_controller: observations"
STATES = {int(state): state.name for state in State}


class Recorder:
    """Keeps the serialised messages of a loop, spun by the caller.

    Args:
        domain_id: DDS domain of the loop.
    """

    def __init__(self, domain_id: int) -> None:
        self._context = rclpy.Context()
        rclpy.init(context=self._context, domain_id=domain_id)
        self._node = rclpy.create_node("bench_recorder", context=self._context)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        self.clear()
        for kind, topic, take in (
            (JointState, "joint_command", self._on_command),
            (ControlStep, "control_step", lambda data: self._steps.append(data)),
            (DiagnosticArray, "/diagnostics", lambda data: self._diagnostics.append(data)),
        ):
            self._node.create_subscription(kind, topic, take, reliable_qos(QUEUE), raw=True)

    def drain(self, quiet_s: float = 0.05) -> None:
        """Take what is still on its way from a loop that has ended."""
        quiet_since = time.monotonic()
        while time.monotonic() - quiet_since < quiet_s:
            before = self.commands + len(self._steps) + len(self._diagnostics)
            self.spin(quiet_s / 5)
            if self.commands + len(self._steps) + len(self._diagnostics) != before:
                quiet_since = time.monotonic()

    def clear(self) -> None:
        """Forget what was recorded."""
        self.commands = 0
        self._steps: list[bytes] = []
        self._diagnostics: list[bytes] = []

    def spin(self, timeout_s: float = 0.05) -> None:
        """Take at most one message."""
        self._executor.spin_once(timeout_sec=timeout_s)

    def close(self) -> None:
        """Leave the domain."""
        self._executor.shutdown()
        self._node.destroy_node()
        rclpy.shutdown(context=self._context)

    def steps(self) -> list[ControlStep]:
        """The recorded control steps.

        Raises:
            A2C2Error: If one is missing between two others: the record would show a loop that did not tick.
        """
        steps = [deserialize_message(data, ControlStep) for data in self._steps]
        gaps = [b.tick - a.tick - 1 for a, b in zip(steps, steps[1:])]
        if any(gaps):
            raise A2C2Error(f"{sum(gaps)} of {len(steps) + sum(gaps)} control steps did not reach the recorder")
        return steps

    def received(self, stream: str) -> list[tuple[int, int]]:
        """The controller's reports of how many samples it has received: time [ns] and count."""
        reports = []
        for message in (deserialize_message(data, DiagnosticArray) for data in self._diagnostics):
            for status in message.status:
                values = {entry.key: entry.value for entry in status.values}
                if status.name == STATUS_NAME and f"{stream}.received" in values:
                    reports.append((to_ns(message.header.stamp), int(values[f"{stream}.received"])))
        return reports

    def _on_command(self, data: bytes) -> None:
        self.commands += 1


def trace_of_steps(steps: Sequence[ControlStep]) -> Trace:
    """The ticks as the controller reported them."""
    scheduled_ns = np.array([to_ns(step.header.stamp) for step in steps], np.int64)

    def column(name: str) -> np.ndarray:
        return np.rint(np.array([getattr(step, name) for step in steps], np.float64) * 1e9).astype(np.int64)

    latency_ns = column("command_latency_s")
    ages_s = np.array([step.stream_ages_s for step in steps], np.float64).reshape(len(steps), -1)
    known = np.isfinite(ages_s)
    stamps_ns = np.where(
        known, scheduled_ns[:, None] - np.rint(np.where(known, ages_s, 0.0) * 1e9).astype(np.int64), -1
    )
    names = steps[0].stream_names if steps else ()
    return Trace(
        scheduled_ns=scheduled_ns,
        started_ns=scheduled_ns + column("lateness_s"),
        commanded_ns=np.where(latency_ns > 0, scheduled_ns + latency_ns, 0),
        head_ns=column("head_time_s"),
        states=np.array([STATES[step.state] for step in steps], str),
        stamps_ns={name: stamps_ns[:, i] for i, name in enumerate(names)},
    )
