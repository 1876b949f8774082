"""The recorder as a real process over DDS: every topic as it was sent, and what is left after kill -9."""

import itertools
import signal

import numpy as np
import pytest

pytest.importorskip("rclpy")
pytest.importorskip("mcap")

import rclpy
from a2c2_ros.msg import ActionChunk, ControlStep
from rcl_interfaces.msg import ParameterEvent, ParameterType
from rclpy.parameter import Parameter
from rclpy.serialization import deserialize_message
from ros_system import Peer, System
from rosbags.highlevel import AnyReader
from sensor_msgs.msg import CompressedImage, Image, JointState
from std_msgs.msg import String

from a2c2_ros.nodes.conversions import array_to_image, array_to_joint_state
from a2c2_ros.nodes.episode_recorder import EpisodeRecorder
from a2c2_ros.nodes.runtime import latched_qos, reliable_qos, sensor_qos
from a2c2_ros.recording.definitions import definition
from a2c2_ros.recording.reader import DamageReport, read_bag
from a2c2_ros.recording.repair import repair
from a2c2_ros.recording.writer import Topic

COUNT = 60
SENSORS = ("agentview/image", "wrist/image", "joint_states", "joint_command", "control_step", "takeover")


@pytest.fixture
def system(tmp_path):
    system = System(tmp_path)
    peer = Peer(system)
    yield system, peer
    system.close()
    peer.close()


def wait_for_recorder(peer, publishers, others=0):
    peer.spin_until(
        lambda: all(p.get_subscription_count() > others for p in publishers), "the recorder's subscriptions"
    )


def padded(data: bytes) -> bytes:
    """The middleware fills the last word or not, depending on the transport."""
    return data + bytes(-len(data) % 4)


@pytest.mark.timeout(100)
def test_a_publisher_that_comes_later_and_offers_less_is_recorded_too(system, tmp_path):
    system, peer = system
    arm = peer.node.create_publisher(JointState, "joint_states", reliable_qos(10))
    system.start("episode_recorder", out=tmp_path / "run", min_free_mb=0)
    wait_for_recorder(peer, [arm])
    hand = peer.node.create_publisher(JointState, "joint_states", sensor_qos(lockstep=False))
    peer.spin_until(lambda: hand.get_subscription_count() and arm.get_subscription_count(), "the other subscription")

    def recorded() -> set[str]:
        messages = read_bag(tmp_path / "run" / "bag", {"/joint_states"})
        return {deserialize_message(message.data, JointState).name[0] for message in messages}

    def both() -> bool:
        for publisher, name in ((arm, "arm"), (hand, "hand")):
            publisher.publish(array_to_joint_state([0.0], (name,), 1))
        return {"arm", "hand"} <= recorded()

    peer.spin_until(both, "both publishers' messages")
    assert system.stop("episode_recorder") == 0


@pytest.mark.timeout(100)
def test_every_topic_is_recorded_as_it_was_sent(system, tmp_path):
    system, peer = system
    planner = rclpy.create_node("chunk_planner", context=peer.node.context)
    planner.declare_parameter("inference_delay", 7)
    peer.node.executor.add_node(planner)
    qos = reliable_qos(COUNT)  # more than a robot offers, so that nothing may be missing
    topics = {
        "agentview/image": (Image, qos),
        "wrist/image": (CompressedImage, qos),  # the type is the publisher's
        "joint_states": (JointState, qos),
        "joint_command": (JointState, qos),
        "control_step": (ControlStep, qos),
        "takeover": (JointState, qos),
        "action_chunk": (ActionChunk, latched_qos(COUNT)),
        "instruction": (String, latched_qos(COUNT)),
        "planner_status": (String, qos),  # not recorded
    }
    publishers = {name: peer.node.create_publisher(kind, name, qos) for name, (kind, qos) in topics.items()}
    sent = {f"/{name}": [] for name in topics if name != "planner_status"}
    for name, (kind, qos) in topics.items():  # serialising again would not give the same: padding is not defined
        if name != "planner_status":
            peer.node.create_subscription(kind, name, sent[f"/{name}"].append, qos, raw=True)
    publishers["instruction"].publish(String(data="before the recorder started"))
    system.start("episode_recorder", out=tmp_path / "run", min_free_mb=0)
    wait_for_recorder(peer, [p for name, p in publishers.items() if name != "planner_status"], others=1)
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        messages = {
            "agentview/image": array_to_image(rng.integers(0, 256, (16, 16, 3), np.uint8), number, "camera"),
            "wrist/image": CompressedImage(format="jpeg", data=rng.bytes(int(rng.integers(1, 900)))),
            "joint_states": array_to_joint_state(rng.standard_normal(3), ("a", "b", "c"), number),
            "joint_command": array_to_joint_state(rng.standard_normal(2), ("a", "b"), number),
            "control_step": ControlStep(tick=number, base_action=[float(number)] * 7, detail="x" * number),
            "takeover": JointState(name=["a"], position=[float(number)]),
            "planner_status": String(),
        }
        if number % 10 == 0:
            messages["action_chunk"] = ActionChunk(chunk_id=number, actions=[0.5] * 350)
            messages["instruction"] = String(data=f"instruction {number}")
        for name, message in messages.items():
            publishers[name].publish(message)
        for _ in topics:
            peer.node.executor.spin_once(timeout_sec=0.01)

    def heard() -> bool:
        peer.node.executor.spin_once(timeout_sec=0.01)
        return all(len(sent[f"/{name}"]) == COUNT for name in SENSORS)

    peer.spin_until(heard, "the last messages")
    bag = tmp_path / "run" / "bag"

    def missing() -> dict[str, int]:
        got = [message.topic for message in read_bag(bag)]
        counts = {name: len(messages) - got.count(name) for name, messages in sent.items()}
        counts["/parameter_events"] = int("/parameter_events" not in got)
        return {name: count for name, count in counts.items() if count > 0}

    peer.spin_until(lambda: not missing(), lambda: f"what lacks in the file that is still written, {missing()},")
    planner.set_parameters([Parameter("inference_delay", value=9)])

    def change() -> bool:
        return sum(b"chunk_planner" in m.data for m in read_bag(bag, ["/parameter_events"])) >= 2

    peer.spin_until(change, "the change of a parameter")
    assert system.stop("episode_recorder") == 0

    report = DamageReport()
    messages = list(read_bag(bag, report=report))
    assert report.intact and report.dropped == {}
    assert "/planner_status" not in report.messages
    assert len(sent["/action_chunk"]) == COUNT // 10 and len(sent["/instruction"]) == 1 + COUNT // 10
    for name, expected in sent.items():
        assert [padded(m.data) for m in messages if m.topic == name] == [padded(data) for data in expected], name
    assert [(m.topic, m.log_ns, m.publish_ns) for m in messages if abs(m.log_ns - m.publish_ns) > 60e9] == []
    values = {}
    for message in messages:
        if message.topic == "/parameter_events":
            event = deserialize_message(message.data, ParameterEvent)
            if event.node == "/chunk_planner":
                for item in (*event.new_parameters, *event.changed_parameters):
                    values.setdefault(item.name, []).append(item.value)
    assert [(v.type, v.integer_value) for v in values["inference_delay"]] == [
        (ParameterType.PARAMETER_INTEGER, 7),
        (ParameterType.PARAMETER_INTEGER, 9),
    ]
    with AnyReader([bag]) as reader:  # checks the definitions against the type hashes of the publishers
        assert {c.topic for c in reader.connections} == {m.topic for m in messages}
        durability = {c.topic: [q.durability.name for q in c.ext.offered_qos_profiles] for c in reader.connections}
        connection = next(c for c in reader.connections if c.topic == "/control_step")
        assert connection.msgdef.data == definition("a2c2_ros/msg/ControlStep")
        ticks = [reader.deserialize(data, c.msgtype).tick for c, _, data in reader.messages([connection])]
    assert ticks == list(range(COUNT))
    assert durability["/instruction"] == ["TRANSIENT_LOCAL"] and durability["/control_step"] == ["VOLATILE"]
    planner.destroy_node()


def test_a_middleware_that_tells_no_publisher_is_recorded(tmp_path, monkeypatch):
    """As on Jazzy: a message comes without the gid of its publisher, and with another clock than ours."""
    rclpy.init(args=["--ros-args", "-p", f"out:={tmp_path}", "-p", "min_free_mb:=0"], domain_id=101)
    try:
        node = EpisodeRecorder()
        publishers = [node.create_publisher(String, "instruction", 1)]
        topic = Topic("/instruction", "std_msgs/msg/String", "string data\n")

        def take(sequence: int, published_ns: int) -> None:
            times = {"received_timestamp": 10**18 + sequence, "source_timestamp": published_ns}
            node._take(topic, b"\0\1\0\0", times | {"publication_sequence_number": sequence})

        take(1, 10**18)
        take(4, -5)
        publishers.append(node.create_publisher(String, "instruction", 1))
        take(90, 0)  # of the other publisher
        node._take(topic, b"\0\1\0\0", {"received_timestamp": 10**18 + 91, "source_timestamp": 10**18})

        def fail(*_: object) -> None:
            raise MemoryError("draining")

        monkeypatch.setattr(node, "_drain", fail)
        with pytest.raises(MemoryError, match="draining"):
            node.close()
        node.destroy_node()
    finally:
        rclpy.shutdown()
    report = DamageReport()
    stamps = [(m.log_ns - 10**18, m.publish_ns - 10**18) for m in read_bag(tmp_path / "bag", report=report)]
    assert stamps == [(1, 0), (4, 4), (90, 90), (91, 0)]
    assert report.intact and report.dropped == {"/instruction": 2}, "what two publishers number cannot be told"


@pytest.mark.timeout(200)
def test_a_lost_answer_of_the_planner_is_asked_for_again(system, tmp_path):
    system, peer = system
    planner = rclpy.create_node("chunk_planner", context=peer.node.context)
    planner.declare_parameter("inference_delay", 7)
    service = next(s for s in planner.services if s.srv_name.endswith("/list_parameters"))
    system.start("episode_recorder", out=tmp_path / "run", min_free_mb=0)

    def taken() -> bool:
        with service.handle:
            request, _ = service.handle.service_take_request(service.srv_type.Request)
        return request is not None

    peer.spin_until(taken, "the first question, which nobody answers")
    peer.node.executor.add_node(planner)
    bag = tmp_path / "run" / "bag"

    def values() -> list[int]:
        events = [deserialize_message(m.data, ParameterEvent) for m in read_bag(bag, ["/parameter_events"])]
        items = [item for event in events if event.node == "/chunk_planner" for item in event.new_parameters]
        return [item.value.integer_value for item in items if item.name == "inference_delay"]

    peer.spin_until(lambda: bool(values()), "the planner's parameters in the bag")
    assert system.stop("episode_recorder") == 0
    assert values() == [7]
    planner.destroy_node()


@pytest.mark.timeout(100)
def test_what_was_flushed_can_be_read_after_kill_9(system, tmp_path):
    reader = pytest.importorskip("mcap_ros2.reader")
    system, peer = system
    images = peer.node.create_publisher(Image, "agentview/image", reliable_qos(10))
    steps = peer.node.create_publisher(ControlStep, "control_step", reliable_qos(1000))
    process = system.start("episode_recorder", out=tmp_path / "run", min_free_mb=0, max_bag_size_mb=1)
    wait_for_recorder(peer, [images, steps])
    bag = tmp_path / "run" / "bag"
    image = array_to_image(np.zeros((128, 128, 3), np.uint8), 0, "camera")

    def second_file() -> bool:
        images.publish(image)
        return (bag / "bag_1.mcap").exists()

    peer.spin_until(second_file, "a second file")

    def ticks(messages) -> list[int]:
        return [deserialize_message(m.data, ControlStep).tick for m in messages if m.topic == "/control_step"]

    sent, flushed = itertools.count(), []

    def recorded() -> bool:
        steps.publish(ControlStep(tick=next(sent)))
        flushed[:] = read_bag(bag)
        return len(ticks(flushed)) > 10

    peer.spin_until(recorded, "steps in the file that is still written")
    process.send_signal(signal.SIGKILL)
    process.wait()

    report = DamageReport()
    saved = list(read_bag(bag, report=report))
    assert not report.intact and "/control_step" not in report.dropped
    assert set(flushed) <= set(saved) and ticks(saved) == list(range(len(ticks(saved))))
    done = repair(bag)
    assert done.repaired and sum(done.messages.values()) == len(saved)
    assert list(read_bag(bag)) == saved
    with AnyReader([bag]) as whole:  # which reads one file after the other
        by_rosbags = [(log_ns, c.topic, bytes(data)) for c, log_ns, data in whole.messages()]
    assert sorted(by_rosbags) == sorted((m.log_ns, m.topic, m.data) for m in saved)
    by_mcap = sum(1 for file in bag.glob("*.mcap") for _ in reader.read_ros2_messages(str(file)))
    assert by_mcap == len(saved)
