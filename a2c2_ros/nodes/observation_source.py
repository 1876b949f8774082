"""Subscriptions of a robot profile's sensor topics into an observation buffer."""

import math
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from time import monotonic as monotonic_s
from typing import Any, NamedTuple

import cv2
import numpy as np
from geometry_msgs.msg import PoseStamped
from rclpy.callback_groups import CallbackGroup
from rclpy.node import Node
from rclpy.qos import QoSProfile
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import CompressedImage, Image, JointState

from a2c2_ros.core.errors import HeadError, ObservationError, OtherJointsError
from a2c2_ros.core.observation import Observation, ObservationBuffer
from a2c2_ros.drivers.profile import CameraTopic, Profile
from a2c2_ros.nodes.conversions import (
    ImageView,
    image_to_array,
    joint_state_to_array,
    pose_to_array,
    serialized_to_image,
    to_ns,
)
from a2c2_ros.nodes.realtime import LatestWorker
from a2c2_ros.nodes.runtime import EdgeLog, sensor_qos

COLOUR_FORMAT = re.compile(r"(\w+; )?(jpe?g|png)( compressed bgr8)?")
"""``CompressedImage.format`` of 8-bit colour: the codec alone, or as image_transport writes it."""
SHARED_DEPTH = 10
"""Messages that wait on a topic of several drivers: one driver's must not push out another's."""


class ObservationSource:
    """Keeps the newest sample of every stream; a sample that is wrong is refused, counted and logged once.

    Args:
        node: Owner of the subscriptions.
        profile: The robot.
        lockstep: Subscribe reliably.
        log: Where problems go, one key per stream and one per camera's preparation.
        future_tolerance_ns: How far a stamp may lie in the future [ns]; not used in lockstep.
        on_sample: Called after each accepted or repeated sample, by the executor's thread.
        prepare: Called with camera and image before the image counts as arrived, in a thread of its own, for work that
            is better done once per image than in the tick. An image that could not be begun in time is dropped.
        callback_group: Of the subscriptions, None for the node's default.
        priority: SCHED_FIFO priority of the thread of ``prepare``, 0 for none.
        longest_s: After a preparation that took longer [s] the next one has no priority.
    """

    def __init__(
        self,
        node: Node,
        profile: Profile,
        lockstep: bool,
        log: EdgeLog,
        future_tolerance_ns: Callable[[], int],
        on_sample: Callable[[], None] = lambda: None,
        prepare: Callable[[str, np.ndarray], None] | None = None,
        callback_group: CallbackGroup | None = None,
        priority: int = 0,
        longest_s: float = math.inf,
    ) -> None:
        self._node = node
        self._lockstep = lockstep
        self._future_tolerance_ns = future_tolerance_ns
        self._log = log
        self._on_sample = on_sample
        self._prepare = prepare
        self._worker = None if prepare is None else LatestWorker(self._prepare_and_put, priority, longest_s)
        self._buffer = ObservationBuffer(profile.robot.streams)
        self.received: Counter[str] = Counter()  # messages per stream, refused ones too
        self._heard_s: dict[str, float] = {}  # when each stream's last sample was accepted
        self._callback_group = callback_group
        self._subscriptions = []
        topics = sensor_topics(profile)
        streams = Counter(topic.name for topic in topics.values())
        for stream, topic in topics.items():
            convert = self._preparing(stream, topic.convert) if topic.image else topic.convert
            qos = sensor_qos(lockstep, SHARED_DEPTH if streams[topic.name] > 1 else 1)
            self._subscribe(topic.message_type, topic.name, stream, convert, qos, topic.image)

    @property
    def dropped(self) -> int:
        """Images that were replaced by a newer one before they were prepared."""
        return 0 if self._worker is None else self._worker.dropped

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
        if self._worker is not None:
            self._worker.stop()

    def _subscribe(
        self, message_type: type, topic: str, stream: str, convert: "Converter", qos: QoSProfile, image: bool
    ) -> None:
        def take(message) -> None:
            self.received[stream] += 1
            if image and self._worker is not None:
                self._worker.submit(stream, (message, convert))
            elif self._put(stream, message, convert):
                self._on_sample()

        self._subscriptions.append(
            self._node.create_subscription(
                message_type, topic, take, qos, callback_group=self._callback_group, raw=image
            )
        )

    def _prepare_and_put(self, stream: str, item: tuple) -> None:
        try:
            self._put(stream, *item)
        except Exception as error:  # noqa: BLE001, a defect: the image counts as not arrived, the next one is taken
            self._log.problem(stream, f"sample of {stream} lost, a defect: {type(error).__name__}: {error}")

    def _put(self, stream: str, message, convert: "Converter") -> bool:
        try:
            latest_ns = None
            if not self._lockstep:  # there, sensor data may be ahead of /clock by the transport
                latest_ns = self._node.get_clock().now().nanoseconds + self._future_tolerance_ns()
            self._buffer.put(stream, *convert(message), latest_ns)
        except OtherJointsError as error:
            # Where the stream has its own samples, this is another driver's on the same topic.
            silent_s = monotonic_s() - self._heard_s.get(stream, -math.inf)
            if silent_s * 1e9 > self._buffer.streams[stream].max_age_ns:
                self._log.problem(stream, f"sample of {stream} refused: {error}")
            else:
                self.received[stream] -= 1
            return False
        except ObservationError as error:
            self._log.problem(stream, f"sample of {stream} refused: {error}")
            return False
        self._heard_s[stream] = monotonic_s()
        self._log.fine(stream)
        return True

    def _preparing(self, camera: str, convert: "Converter") -> "Converter":
        def converted(serialized: bytes) -> tuple[int, np.ndarray]:
            stamp_ns, image = convert(serialized)
            if self._prepare is not None:
                key = f"preparation of {camera}"
                try:
                    self._prepare(camera, image)
                except (HeadError, ObservationError) as error:  # the image is good; the tick will meet the same error
                    self._log.problem(key, f"preparation of an image of {camera}: {error}")
                else:
                    self._log.fine(key)
            return stamp_ns, image

        return converted


class SensorTopic(NamedTuple):
    """Where a stream comes from."""

    message_type: type
    name: str  # as in the profile
    convert: "Converter"  # of a message; of the serialised one, if it is an image
    image: bool = False


def sensor_topics(profile: Profile) -> dict[str, SensorTopic]:
    """Stream to its topic, for the nodes and for whoever reads a bag."""
    topics = {}
    for joints in profile.joint_topics:
        convert = _stamped(partial(joint_state_to_array, names=joints.names))
        topics[joints.stream] = SensorTopic(JointState, joints.topic, convert)
    if profile.ee_pose_topic is not None:
        pose = _stamped(lambda m: pose_to_array(m, profile.ee_pose_frame))
        topics["ee_pose"] = SensorTopic(PoseStamped, profile.ee_pose_topic, pose)
    for camera in profile.cameras:
        message_type = CompressedImage if camera.transport == "compressed" else Image
        topics[camera.name] = SensorTopic(message_type, camera.topic, _image_converter(camera), image=True)
    return topics


def _image_converter(camera: CameraTopic) -> "Converter":
    view = compressed_to_image if camera.transport == "compressed" else serialized_to_image

    def convert(serialized: bytes) -> tuple[int, np.ndarray]:
        message = view(serialized)
        return message.stamp_ns, image_to_array(message, camera.height, camera.width, camera.shape)

    return convert


def compressed_to_image(serialized: bytes) -> ImageView:
    """Decoded pixels of a serialised ``sensor_msgs/CompressedImage``.

    Raises:
        ObservationError: If the bytes are no such message, or the image is not 8-bit colour as JPEG or PNG.
    """
    try:
        message = deserialize_message(serialized, CompressedImage)
    except RuntimeError as error:
        raise ObservationError(f"compressed image message of {len(serialized)} bytes: {error}") from error
    if not COLOUR_FORMAT.fullmatch(message.format):
        raise ObservationError(f"compressed image has format {message.format!r}, allowed are JPEG and PNG of bgr8")
    try:
        # Unchanged: a grey or 16-bit image must be seen as what it is.
        image = cv2.imdecode(np.frombuffer(message.data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise ObservationError(f"compressed image of {len(message.data)} bytes: {error}") from error
    if image is None or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        what = "nothing" if image is None else f"{image.shape} {image.dtype}"
        raise ObservationError(f"compressed image of {len(message.data)} bytes holds {what}, allowed is 8-bit colour")
    height, width, _ = image.shape
    return ImageView(to_ns(message.header.stamp), height, width, "bgr8", 3 * width, memoryview(image).cast("B"))


Converter = Callable[[Any], tuple[int, np.ndarray]]
"""From a message to its stamp [ns] and value."""


def _stamped(convert: Callable[[Any], np.ndarray]) -> Converter:
    return lambda message: (to_ns(message.header.stamp), convert(message))
