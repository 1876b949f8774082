"""Command sinks: how a command leaves for the robot; chosen by the profile, not by code."""

from array import array
from typing import Protocol

import numpy as np
from rclpy.node import Node
from rclpy.serialization import serialize_message
from sensor_msgs.msg import JointState

from a2c2_ros.core.errors import ConfigError
from a2c2_ros.drivers.profile import Profile
from a2c2_ros.nodes.conversions import to_time
from a2c2_ros.nodes.runtime import reliable_qos


class Sink(Protocol):
    """Sends commands to a robot."""

    def send(self, command: np.ndarray, stamp_ns: int) -> None:
        """Send a command, (A,) float32 in action units, of the tick with this stamp [ns]."""
        ...

    def rehearse(self, command: np.ndarray, stamp_ns: int) -> None:
        """Do everything but send."""
        ...


def make_sink(node: Node, profile: Profile) -> Sink:
    """The sink of a profile's ``command.kind``.

    Raises:
        ConfigError: If there is no such kind.
    """
    if profile.command_kind not in SINKS:
        raise ConfigError(f"command.kind is {profile.command_kind!r}, allowed are {sorted(SINKS)}")
    return SINKS[profile.command_kind](node, profile)


class JointStateSink:
    """``sensor_msgs/JointState``: one position per action channel."""

    def __init__(self, node: Node, profile: Profile) -> None:
        self._publisher = node.create_publisher(JointState, profile.command_topic, reliable_qos(1))
        self._message = JointState(name=list(profile.robot.action_names))  # reused: nothing but the values changes

    def send(self, command: np.ndarray, stamp_ns: int) -> None:
        """See :class:`Sink`."""
        self._publisher.publish(self._filled(command, stamp_ns))

    def rehearse(self, command: np.ndarray, stamp_ns: int) -> None:
        """See :class:`Sink`."""
        serialize_message(self._filled(command, stamp_ns))

    def _filled(self, command: np.ndarray, stamp_ns: int) -> JointState:
        self._message.header.stamp = to_time(stamp_ns)
        self._message.position = array("d", command)
        return self._message


SINKS: dict[str, type[Sink]] = {"joint_state": JointStateSink}
