"""Node ``episode_recorder``: everything of a run into a rosbag2 (MCAP), as the bytes that came over the wire."""

import importlib
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import Parameter, ParameterEvent
from rclpy.duration import Duration
from rclpy.event_handler import SubscriptionEventCallbacks
from rclpy.parameter_client import AsyncParameterClient
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.serialization import serialize_message
from rclpy.subscription import Subscription
from rclpy.task import Future
from rclpy.topic_endpoint_info import TopicEndpointInfo

from a2c2_ros.core.config import Parameters, parameter
from a2c2_ros.core.errors import ConfigError
from a2c2_ros.core.health import Level, Status
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.nodes.diagnostics import diagnostics_of
from a2c2_ros.nodes.runtime import EdgeLog, NodeParameters, PlainNode, reliable_qos, run
from a2c2_ros.recording.definitions import definition
from a2c2_ros.recording.recorder import IMAGES, Recorder
from a2c2_ros.recording.topics import DEPTH, recorded_topics
from a2c2_ros.recording.writer import BagWriter, Topic

PLANNER = "chunk_planner"
PARAMETER_EVENTS = "/parameter_events"
DIAGNOSTICS = "/diagnostics"
NICENESS = 5
"""Whatever else needs the processor gets three times as much of it."""
DISCOVERY_PERIOD_S = 0.1
REPORT_PERIOD_S = 1.0
ANSWER_TIMEOUT_S = 3.0
"""An answer of the planner can be lost: a service that has not yet discovered its client answers nobody."""
CLOSE_TIMEOUT_S = 20.0
IMAGE_DEPTH = 60
"""Images that wait to be taken: two seconds."""
MB = 10**6


@dataclass(frozen=True)
class RecorderConfig(Parameters):
    """Parameters of ``episode_recorder``."""

    out: str = parameter("runs/latest", "Run folder; the bag is OUT/bag", dynamic=False)
    robot: str = parameter("libero", "Robot profile: its topics are recorded", dynamic=False)
    max_bag_size_mb: int = parameter(
        2000, "A file that has grown to this is followed by another [MB]; 0: one file", low=0, high=10**6, dynamic=False
    )
    max_queue_mb: int = parameter(
        256,
        "What may wait for the disk [MB]; when it is full, images are dropped first",
        low=1,
        high=10**5,
        dynamic=False,
    )
    min_free_mb: int = parameter(
        500, "The recording ends when the disk has less than this left [MB]", low=0, high=10**7, dynamic=False
    )
    compression: str = parameter("none", "Of the bag: none or zstd", choices=("none", "zstd"), dynamic=False)


class EpisodeRecorder(PlainNode):
    """Subscribes without deserialising; a thread writes. A full disk ends the recording, not the node.

    Like ``ros2 bag record`` it takes type, reliability and durability of a topic from its publishers, when the first
    appears.
    """

    def __init__(self) -> None:
        super().__init__("episode_recorder")
        self._recorder: Recorder | None = None
        config = NodeParameters(self, RecorderConfig()).value
        self._log = EdgeLog(self)
        self._simulated_time = self.get_parameter("use_sim_time").value
        self._missing = list(map(self.resolve_topic_name, recorded_topics(load_profile(config.robot))))
        self._topics: dict[str, Topic] = {}
        self._subscriptions_of_bag: list[tuple[Topic, Subscription]] = []
        self._refusing: set[str] = set()  # topics with a publisher that the subscription does not hear
        self._sequences: dict[tuple[str, bytes | None], int] = {}
        self._ended = False
        path = Path(config.out) / "bag"
        try:
            bag = BagWriter(path, config.max_bag_size_mb * MB, config.compression)
        except OSError as error:
            raise ConfigError(f"out is {config.out!r}, no bag can be written there: {error}") from error
        self._recorder = Recorder(bag, config.max_queue_mb * MB, config.min_free_mb * MB)
        self._planner = AsyncParameterClient(self, PLANNER)
        self._ask_planner_at_ns = 0.0  # infinite when it has answered
        self._diagnostics = self.create_publisher(DiagnosticArray, DIAGNOSTICS, reliable_qos(10))
        self.create_timer(DISCOVERY_PERIOD_S, self._discover, clock=self.system_clock)
        self.create_timer(REPORT_PERIOD_S, self._report, clock=self.system_clock)
        self._discover()
        self.get_logger().info(f"recording up to {len(self._topics) + len(self._missing)} topics to {path}")

    def close(self) -> None:
        """Finish the bag; the node is about to be destroyed."""
        if self._recorder is None:
            return
        try:
            for topic, subscription in self._subscriptions_of_bag:
                self._drain(topic, subscription)
        finally:
            if not self._recorder.close(CLOSE_TIMEOUT_S):
                self.get_logger().error("the disk did not take what was waiting, repair the bag before it is read")
            self._report()

    # --- topics -----------------------------------------------------------------------------------------------------

    def _discover(self) -> None:
        for name in [name for name in self._missing if self.count_publishers(name)]:
            publishers = self.get_publishers_info_by_topic(name)
            if publishers and not self._ended:
                self._missing.remove(name)
                self._subscribe(name, publishers)
        for name in list(self._refusing) if not self._ended else ():
            self._listen_again(name)

    def _subscribe(self, name: str, publishers: Sequence[TopicEndpointInfo]) -> None:
        kind, type_hash = publishers[0].topic_type, str(publishers[0].topic_type_hash)
        try:
            topic = Topic(name, kind, definition(kind), type_hash, offered_qos(publishers))
            package, _, type_name = kind.split("/")
            message = getattr(importlib.import_module(f"{package}.msg"), type_name)
        except (ConfigError, ImportError, AttributeError) as error:
            self.get_logger().error(f"{name} is not recorded: {error}")
            return
        self._topics[name] = topic
        self._listen(topic, message, publishers)

    def _listen(self, topic: Topic, message: type, publishers: Sequence[TopicEndpointInfo]) -> None:
        """Subscribe with what all of the publishers offer."""
        reliable = all(p.qos_profile.reliability == ReliabilityPolicy.RELIABLE for p in publishers)
        latched = all(p.qos_profile.durability == DurabilityPolicy.TRANSIENT_LOCAL for p in publishers)
        qos = QoSProfile(
            depth=IMAGE_DEPTH if topic.type in IMAGES else DEPTH,
            reliability=ReliabilityPolicy.RELIABLE if reliable else ReliabilityPolicy.BEST_EFFORT,
            durability=DurabilityPolicy.TRANSIENT_LOCAL if latched else DurabilityPolicy.VOLATILE,
        )
        events = SubscriptionEventCallbacks(incompatible_qos=lambda event: self._refusing.add(topic.name))
        take = partial(self._take, topic)
        subscription = self.create_subscription(message, topic.name, take, qos, raw=True, event_callbacks=events)
        self._subscriptions_of_bag.append((topic, subscription))

    def _listen_again(self, name: str) -> None:
        """A publisher that came after the first offers less than the subscription asks for: ask for what all offer."""
        self._refusing.remove(name)
        index = next(i for i, (topic, _) in enumerate(self._subscriptions_of_bag) if topic.name == name)
        topic, subscription = self._subscriptions_of_bag.pop(index)
        self._drain(topic, subscription)
        self.destroy_subscription(subscription)
        self._listen(topic, subscription.msg_type, self.get_publishers_info_by_topic(name))

    def _drain(self, topic: Topic, subscription: Subscription) -> None:
        """What has arrived belongs to the recording, even if the executor has not come to it on a busy machine."""
        for _ in range(DEPTH):
            with subscription.handle:
                taken = subscription.handle.take_message(subscription.msg_type, True)
            if taken is None:
                break
            self._take(topic, *taken)

    def _take(self, topic: Topic, data: bytes, info: Mapping[str, Any]) -> None:
        gid = info.get("publisher_gid", {}).get("data")  # not before Kilted
        publisher, sequence = (topic.name, gid), info.get("publication_sequence_number")
        if sequence:
            last = self._sequences.get(publisher, sequence - 1)
            # Whose number it is cannot be told without a gid, unless there is only one publisher.
            if sequence > last + 1 and (gid is not None or self.count_publishers(topic.name) == 1):
                self._recorder.count_lost(topic.name, sequence - last - 1)
            self._sequences[publisher] = max(sequence, last)
        received_ns, published_ns = info["received_timestamp"], info["source_timestamp"]
        if self._simulated_time or received_ns <= 0:  # not every middleware says when
            received_ns = published_ns = self.get_clock().now().nanoseconds
        self._recorder.put(topic, received_ns, published_ns if published_ns > 0 else received_ns, data)

    # --- parameters of the planner ----------------------------------------------------------------------------------

    def _ask_planner(self) -> None:
        """Ask for what /parameter_events does not tell: the values at start. Asked again when the planner is back."""
        if not (self._planner.services_are_ready() and PARAMETER_EVENTS in self._topics):
            self._ask_planner_at_ns = 0.0
            return
        now_ns = self.system_clock.now().nanoseconds
        if now_ns >= self._ask_planner_at_ns:
            self._ask_planner_at_ns = again_ns = now_ns + ANSWER_TIMEOUT_S * 1e9
            self._planner.list_parameters().add_done_callback(partial(self._ask_values, again_ns))

    def _ask_values(self, again_ns: float, listed: Future) -> None:
        names = listed.result().result.names
        self._planner.get_parameters(names).add_done_callback(partial(self._take_values, again_ns, names))

    def _take_values(self, again_ns: float, names: Sequence[str], got: Future) -> None:
        """Written as the event that the planner published at its start, so that all parameters are read alike."""
        if again_ns != self._ask_planner_at_ns:  # answered already, or to an older question
            return
        self._ask_planner_at_ns = math.inf
        now = self.get_clock().now()
        values = [Parameter(name=name, value=value) for name, value in zip(names, got.result().values)]
        event = ParameterEvent(stamp=now.to_msg(), node=self.resolve_topic_name(PLANNER), new_parameters=values)
        self._recorder.put(self._topics[PARAMETER_EVENTS], now.nanoseconds, now.nanoseconds, serialize_message(event))

    # --- report -----------------------------------------------------------------------------------------------------

    def _report(self) -> None:
        status = self._recorder.status()
        for topic, count in status.dropped.items() if not status.ended else ():
            self._log.problem(topic, f"{topic}: {count} messages did not reach the bag; what follows is counted in it")
        if status.ended and not self._ended:
            # The robot goes on: a recorder that died would end the launch.
            self._ended = True
            self.get_logger().error(f"recording ends here, what was written is kept: {status.ended}")
            for _, subscription in self._subscriptions_of_bag:
                self.destroy_subscription(subscription)
            self._subscriptions_of_bag.clear()
        self._ask_planner()
        level = Level.WARN if status.dropped else Level.OK
        values = {
            "size_bytes": status.size_bytes,
            "queue_bytes": status.queue_bytes,
            "messages_lost": sum(status.dropped.values()),
        }
        line = Status(
            "recording",
            Level.ERROR if status.ended else level,
            status.ended or ("messages are lost" if status.dropped else "recording"),
            {key: str(value) for key, value in values.items()},
        )
        self._diagnostics.publish(diagnostics_of(self, [line]))


def offered_qos(publishers: Sequence[TopicEndpointInfo]) -> str:
    """QoS profiles of publishers as rosbag2 writes them (version 9): YAML."""

    def duration(value: Duration) -> dict[str, int]:
        return {"sec": value.nanoseconds // 10**9, "nsec": value.nanoseconds % 10**9}

    profiles = [publisher.qos_profile for publisher in publishers]
    offered = [
        {
            "history": qos.history.name.lower(),
            "depth": qos.depth,
            "reliability": qos.reliability.name.lower(),
            "durability": qos.durability.name.lower(),
            "deadline": duration(qos.deadline),
            "lifespan": duration(qos.lifespan),
            "liveliness": qos.liveliness.name.lower(),
            "liveliness_lease_duration": duration(qos.liveliness_lease_duration),
            "avoid_ros_namespace_conventions": qos.avoid_ros_namespace_conventions,
        }
        for qos in profiles
    ]
    return yaml.safe_dump(offered, sort_keys=False).strip()


def main(args: list[str] | None = None) -> None:
    """Entry point of the executable."""
    os.nice(NICENESS)  # before DDS starts its threads
    sys.exit(run(EpisodeRecorder, args))


if __name__ == "__main__":
    main()
