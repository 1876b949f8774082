"""Node ``episode_recorder``: every topic of a run into a rosbag2 (MCAP), as the bytes that came over the wire."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from geometry_msgs.msg import PoseStamped
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import String

from a2c2_ros.core.config import Parameters, parameter
from a2c2_ros.core.errors import ConfigError
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.msg import ActionChunk, ControlStep, EpisodeStatus, PlannerTiming
from a2c2_ros.nodes.runtime import NodeParameters, PlainNode, run
from a2c2_ros.paths import share_directory

BAG_VERSION = 9


@dataclass(frozen=True)
class RecorderConfig(Parameters):
    """Parameters of ``episode_recorder``."""

    out: str = parameter("runs/latest", "Run folder; the bag is OUT/bag", dynamic=False)
    robot: str = parameter("libero", "Robot profile: its topics are recorded", dynamic=False)


class EpisodeRecorder(PlainNode):
    """Subscribes without deserialising and appends to the bag. A full disk ends the recording, not the node."""

    def __init__(self) -> None:
        super().__init__("episode_recorder")
        config = NodeParameters(self, RecorderConfig()).value
        profile = load_profile(config.robot)
        self._bag: Writer | None = None
        self._subscriptions_of_bag = []
        path = Path(config.out) / "bag"
        if path.exists():
            raise ConfigError(f"{path} exists already; a bag is not overwritten, choose another out")
        path.parent.mkdir(parents=True, exist_ok=True)
        topics = {camera.topic: Image for camera in profile.cameras} | {
            profile.joint_states_topic: JointState,
            profile.command_topic: JointState,
            "instruction": String,
            "action_chunk": ActionChunk,
            "control_step": ControlStep,
            "planner_timing": PlannerTiming,
            "episode": EpisodeStatus,
        }
        if profile.ee_pose_topic is not None:
            topics[profile.ee_pose_topic] = PoseStamped
        types = get_typestore(Stores.ROS2_JAZZY)
        for file in sorted((share_directory() / "msg").glob("*.msg")):
            types.register(get_types_from_msg(file.read_text(encoding="utf-8"), f"a2c2_ros/msg/{file.stem}"))
        self._bag = Writer(path, version=BAG_VERSION, storage_plugin=StoragePlugin.MCAP)
        self._bag.open()
        for topic, kind in topics.items():
            latched = topic in ("instruction", "action_chunk", "episode")
            qos = QoSProfile(
                depth=100,
                reliability=ReliabilityPolicy.RELIABLE if latched else ReliabilityPolicy.BEST_EFFORT,
                durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
            )
            connection = self._bag.add_connection(
                self.resolve_topic_name(topic), f"{kind.__module__.split('.')[0]}/msg/{kind.__name__}", typestore=types
            )
            self._subscriptions_of_bag.append(
                self.create_subscription(kind, topic, partial(self._write, connection), qos, raw=True)
            )
        self.get_logger().info(f"recording {len(topics)} topics to {path}")

    def close(self) -> None:
        """Finish the bag; the node is about to be destroyed."""
        if self._bag is None:
            return
        bag, self._bag = self._bag, None
        try:
            bag.close()
        except OSError as error:
            self.get_logger().error(f"the bag could not be finished: {error}")

    def _write(self, connection, data: bytes) -> None:
        if self._bag is None:
            return
        try:
            self._bag.write(connection, self.get_clock().now().nanoseconds, data)
        except OSError as error:
            # The robot goes on: a recorder that died would end the launch.
            self.get_logger().error(f"recording ends here, what was written is kept: {error}")
            for subscription in self._subscriptions_of_bag:
                self.destroy_subscription(subscription)
            self._subscriptions_of_bag.clear()
            self.close()


def main(args: list[str] | None = None) -> None:
    """Entry point of the executable."""
    sys.exit(run(EpisodeRecorder, args))


if __name__ == "__main__":
    main()
