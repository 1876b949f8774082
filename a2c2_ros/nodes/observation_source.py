"""Subscriptions of a robot profile's sensor topics into an observation buffer."""

from collections.abc import Callable

import numpy as np
from geometry_msgs.msg import PoseStamped
from rclpy.node import Node
from sensor_msgs.msg import Image, JointState

from a2c2_ros.core.errors import ObservationError
from a2c2_ros.core.observation import Observation, ObservationBuffer
from a2c2_ros.drivers.profile import CameraTopic, Profile
from a2c2_ros.nodes.conversions import image_to_array, joint_state_to_array, pose_to_array, to_ns
from a2c2_ros.nodes.runtime import EdgeLog, sensor_qos


class ObservationSource:
    """Keeps the newest sample of every stream; a sample that is wrong is refused, counted and logged once.

    Args:
        node: Owner of the subscriptions; its executor's thread makes every call.
        profile: The robot.
        lockstep: Subscribe reliably.
        log: Where problems go, one key per stream.
        on_sample: Called after each accepted or repeated sample.
    """

    def __init__(
        self, node: Node, profile: Profile, lockstep: bool, log: EdgeLog, on_sample: Callable[[], None] = lambda: None
    ) -> None:
        self._node = node
        self._log = log
        self._on_sample = on_sample
        self._buffer = ObservationBuffer(profile.robot.streams)
        qos = sensor_qos(lockstep)
        self._subscriptions = [
            node.create_subscription(
                JointState,
                profile.joint_states_topic,
                lambda m: self._take("joint_position", m, lambda: joint_state_to_array(m, profile.joint_names)),
                qos,
            ),
            node.create_subscription(
                PoseStamped, profile.ee_pose_topic, lambda m: self._take("ee_pose", m, lambda: pose_to_array(m)), qos
            ),
            *(self._subscribe_camera(camera, qos) for camera in profile.cameras),
        ]

    def snapshot(self) -> Observation:
        """The newest samples."""
        return self._buffer.snapshot()

    def clear(self) -> None:
        """Forget every sample."""
        self._buffer.clear()

    def close(self) -> None:
        """End the subscriptions."""
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
        self._subscriptions.clear()

    def _subscribe_camera(self, camera: CameraTopic, qos):
        return self._node.create_subscription(
            Image,
            camera.topic,
            lambda m: self._take(camera.name, m, lambda: image_to_array(m, camera.height, camera.width)),
            qos,
        )

    def _take(self, stream: str, message, convert: Callable[[], np.ndarray]) -> None:
        try:
            self._buffer.put(stream, to_ns(message.header.stamp), convert())
        except ObservationError as error:
            self._log.problem(stream, f"sample of {stream} refused: {error}")
            return
        self._log.fine(stream)
        self._on_sample()
