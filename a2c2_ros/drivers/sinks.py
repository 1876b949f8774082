"""Command sinks: how a command leaves for the robot; chosen by the profile, not by code."""

from collections.abc import Callable

import numpy as np
from rclpy.node import Node
from sensor_msgs.msg import JointState

from a2c2_ros.core.errors import ConfigError
from a2c2_ros.drivers.profile import Profile
from a2c2_ros.nodes.conversions import array_to_joint_state
from a2c2_ros.nodes.runtime import reliable_qos

Sink = Callable[[np.ndarray, int], None]
"""Sends a command, (A,) float32 in action units, of the tick with this stamp [ns]."""


def make_sink(node: Node, profile: Profile) -> Sink:
    """The sink of a profile's ``command.kind``.

    Raises:
        ConfigError: If there is no such kind.
    """
    if profile.command_kind not in SINKS:
        raise ConfigError(f"command.kind is {profile.command_kind!r}, allowed are {sorted(SINKS)}")
    return SINKS[profile.command_kind](node, profile)


def _joint_state_sink(node: Node, profile: Profile) -> Sink:
    publisher = node.create_publisher(JointState, profile.command_topic, reliable_qos(1))
    names = profile.robot.action_names

    def send(command: np.ndarray, stamp_ns: int) -> None:
        publisher.publish(array_to_joint_state(command, names, stamp_ns))

    return send


SINKS: dict[str, Callable[[Node, Profile], Sink]] = {"joint_state": _joint_state_sink}
