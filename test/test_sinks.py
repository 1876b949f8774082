"""Commands as a driver receives them over DDS, and compressed images as the nodes take them."""

import importlib.util
import random
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

rclpy = pytest.importorskip("rclpy")

from action_msgs.msg import GoalStatus
from rclpy.action import ActionServer
from rclpy.executors import SingleThreadedExecutor
from rclpy.serialization import serialize_message
from rclpy.task import Future
from sensor_msgs.msg import CompressedImage, Image

from a2c2_ros.core.errors import ConfigError, ObservationError
from a2c2_ros.drivers.mapping import ChannelMap
from a2c2_ros.drivers.profile import CameraTopic, load_profile
from a2c2_ros.nodes import command_sinks
from a2c2_ros.nodes.command_sinks import GRIPPER_REPEAT_NS, make_sink
from a2c2_ros.nodes.conversions import image_to_array, to_ns, to_time
from a2c2_ros.nodes.observation_source import ObservationSource, compressed_to_image
from a2c2_ros.nodes.runtime import EdgeLog, reliable_qos, sensor_qos

STEP_NS = 50_000_000
T0_NS = 1_700_000_000_000_000_007
TIMEOUT_S = 30.0
HAS_CONTROL_MSGS = importlib.util.find_spec("control_msgs") is not None


class Bench:
    """The robot's side and the driver's side, in one context."""

    def __init__(self, context):
        self.robot, self.driver = (rclpy.create_node(name, context=context) for name in ("robot", "driver"))
        self._executor = SingleThreadedExecutor(context=context)
        for node in (self.robot, self.driver):
            self._executor.add_node(node)

    def sink(self, profile):
        """A profile's sink, with the driver listening to all that it publishes."""
        before = list(self.robot.publishers)
        sink = make_sink(self.robot, profile)
        own = [publisher for publisher in self.robot.publishers if publisher not in before]
        self.received = {publisher.topic_name.lstrip("/"): [] for publisher in own}
        for publisher in own:
            received = self.received[publisher.topic_name.lstrip("/")]
            self.driver.create_subscription(publisher.msg_type, publisher.topic_name, received.append, reliable_qos(10))
        self.spin_until(lambda: all(publisher.get_subscription_count() for publisher in own))
        return sink

    def spin_until(self, condition):
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline
            self._executor.spin_once(timeout_sec=0.1)

    def next(self, topic):
        self.spin_until(lambda: self.received[topic])
        return self.received[topic].pop(0)

    def close(self):
        self._executor.shutdown()
        for node in (self.robot, self.driver):
            node.destroy_node()


@pytest.fixture(scope="module")
def context():
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=random.SystemRandom().randrange(1, 100))
    yield context
    rclpy.shutdown(context=context)


@pytest.fixture
def bench(context):
    bench = Bench(context)
    yield bench
    bench.close()


def ramp(profile, start=0.0):
    """An action with another value in each channel."""
    return (start + np.arange(1, len(profile.robot.action_names) + 1) / 10).astype(np.float32)


def reversed_with_units(profile):
    """The same robot with a driver of another order, unit and zero."""
    size = len(profile.command.joints)
    mapping = ChannelMap(np.arange(size)[::-1], np.full(size, 2.0), np.arange(size) + 1.0)
    return replace(profile, command=replace(profile.command, joints=profile.command.joints[::-1], mapping=mapping))


def times_ns(message):
    return [to_ns(point.time_from_start) for point in message.points]


def test_joint_state(bench):
    profile = load_profile("libero")
    sink, action = bench.sink(profile), ramp(profile)
    sink.rehearse(action + 1, T0_NS)
    sink.send(action, T0_NS)
    message = bench.next("joint_command")
    assert not sink.wants_rest
    assert tuple(message.name) == profile.robot.action_names and to_ns(message.header.stamp) == T0_NS
    np.testing.assert_array_equal(np.float32(message.position), action)
    assert not bench.received["joint_command"], "a rehearsal sends nothing"


def test_what_nobody_subscribes_to_is_told_if_something_was_sent(bench):
    profile = load_profile("panda_forward")
    sink, action = make_sink(bench.robot, profile), ramp(profile)
    topics = [profile.command.topic, profile.gripper.topic]
    assert sink.unheard() == []
    sink.send(action, T0_NS)
    assert [topic.lstrip("/") for topic in sink.unheard()] == topics
    assert sink.unheard() == [], "nothing was sent since"
    publishers = list(bench.robot.publishers)[-2:]
    for publisher in publishers:
        bench.driver.create_subscription(publisher.msg_type, publisher.topic_name, lambda message: None, 1)
    bench.spin_until(lambda: all(publisher.get_subscription_count() for publisher in publishers))
    sink.send(action, T0_NS)
    assert sink.unheard() == []


def test_float64_multi_array_in_the_driver_s_order_and_units(bench):
    profile = reversed_with_units(load_profile("panda_forward"))
    sink, action = bench.sink(profile), ramp(profile)
    for start in (0.0, 0.5):
        sink.send(action + np.float32(start), T0_NS)
        np.testing.assert_allclose(
            bench.next("forward_position_controller/commands").data,
            2.0 * (action[:7][::-1] + start) + np.arange(7) + 1,
            rtol=1e-6,
        )


def test_twist_stamped(bench):
    profile = load_profile("panda_servo")
    sink = bench.sink(profile)
    sink.send(np.array([1.0, -0.5, 0.25, 0.1, -0.2, 1.0, 1.0], np.float32), T0_NS)
    message = bench.next("servo_node/delta_twist_cmds")
    linear, angular = message.twist.linear, message.twist.angular
    assert (message.header.frame_id, to_ns(message.header.stamp)) == ("panda_link0", T0_NS)
    np.testing.assert_allclose([linear.x, linear.y, linear.z], [0.25, -0.125, 0.0625])
    np.testing.assert_allclose([angular.x, angular.y, angular.z], [0.1, -0.2, 1.0], rtol=1e-6)
    assert list(bench.next("panda_hand_controller/commands").data) == [0.0]
    sink.send(np.array([0, 0, 0, 0, 0, 0, 1], np.float32), T0_NS + STEP_NS)  # the hold
    message = bench.next("servo_node/delta_twist_cmds")
    linear, angular = message.twist.linear, message.twist.angular
    assert [linear.x, linear.y, linear.z, angular.x, angular.y, angular.z] == [0.0] * 6


@pytest.mark.parametrize("stamp", ["tick", "zero"])
def test_joint_trajectory_with_one_point(bench, stamp):
    profile = load_profile("ur5e")
    timing = replace(profile.command.timing, stamp=stamp)
    profile = reversed_with_units(replace(profile, command=replace(profile.command, timing=timing)))
    sink, action = bench.sink(profile), ramp(profile)
    sink.send(action, T0_NS)
    message = bench.next("scaled_joint_trajectory_controller/joint_trajectory")
    assert not sink.wants_rest
    assert message.joint_names == list(profile.robot.action_names[::-1])
    assert to_ns(message.header.stamp) == (T0_NS if stamp == "tick" else 0)
    assert times_ns(message) == [STEP_NS], "the control period"
    np.testing.assert_allclose(message.points[0].positions, 2.0 * action[::-1] + np.arange(6) + 1, rtol=1e-6)
    assert not message.points[0].velocities, "a last point with a velocity is refused by ros2_control"


def test_joint_trajectory_with_the_rest_of_the_chunk(bench):
    """The points grow and shrink with the chunk, and the gripper's channel is not among them."""
    profile = load_profile("mock")
    timing = replace(profile.command.timing, time_from_start_ns=70_000_000)
    profile = replace(profile, command=replace(profile.command, timing=timing))
    sink, action = bench.sink(profile), ramp(profile)
    assert sink.wants_rest
    for step, n in enumerate((3, 0, 5, 2)):
        rest = np.stack([ramp(profile, start=i + 1) for i in range(n)]) if n else np.zeros((0, 4), np.float32)
        sink.send(action, T0_NS + step * STEP_NS, rest)
        message = bench.next("arm_controller/joint_trajectory")
        assert message.joint_names == ["arm_joint3", "arm_joint2", "arm_joint1"]
        assert to_ns(message.header.stamp) == T0_NS + step * STEP_NS
        assert times_ns(message) == [70_000_000 + i * STEP_NS for i in range(n + 1)]
        expected = np.concatenate([action[None], rest])[:, [2, 1, 0]]
        np.testing.assert_allclose([point.positions for point in message.points], expected, rtol=1e-6)
    sink.send(action, T0_NS)
    assert len(bench.next("arm_controller/joint_trajectory").points) == 1, "a hold has no rest"


def test_a_gripper_is_told_what_changed_and_rarely_what_did_not(bench):
    profile = load_profile("mock")
    sink = bench.sink(profile)
    quiet = GRIPPER_REPEAT_NS // STEP_NS
    # Step and channel of the gripper: open; within the tolerance; half; closed; beyond; then nothing new for a while.
    commands = [(0, -1.0), (1, -0.99), (2, 0.0), (3, 1.0), (4, 1.5)]
    commands += [(step, 1.0) for step in range(5, 2 * quiet + 5)] + [(2 * quiet + 5, -1.0)]
    expected = [0.04, 0.02, 0.0, 0.0, 0.0, 0.04]
    for step, value in commands:
        sink.send(np.array([0, 0, 0, value], np.float32), T0_NS + step * STEP_NS)
        bench.next("arm_controller/joint_trajectory")
    bench.spin_until(lambda: len(bench.received["gripper_controller/commands"]) >= len(expected))
    received = [value for message in bench.received["gripper_controller/commands"] for value in message.data]
    np.testing.assert_allclose(received, expected, atol=1e-9)
    sink.send(np.array([0, 0, 0, -1], np.float32), T0_NS - STEP_NS)  # the clock went back
    bench.spin_until(lambda: len(bench.received["gripper_controller/commands"]) == len(expected) + 1)


def test_a_gripper_with_a_trajectory_of_its_own(bench):
    profile = load_profile("so101")
    sink = bench.sink(profile)
    sink.send(np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.8], np.float32), T0_NS)
    arm = bench.next("arm_controller/joint_trajectory")
    assert arm.joint_names == ["shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll"]
    np.testing.assert_allclose(arm.points[0].positions, [0.1, 0.2, 0.3, 0.4, 0.5], rtol=1e-6)
    gripper = bench.next("gripper_controller/joint_trajectory")
    assert gripper.joint_names == ["gripper"] and times_ns(gripper) == [500_000_000]
    assert list(gripper.points[0].positions) == pytest.approx([0.8], rel=1e-6)


@pytest.mark.parametrize("name", ["panda_servo", "so101", "ur5e"])
def test_a_sink_that_is_closed_leaves_nothing_behind(bench, name):
    before = list(bench.robot.publishers)
    bench.sink(load_profile(name)).close()
    assert list(bench.robot.publishers) == before


def with_action(kind):
    profile = load_profile("panda_servo")
    return replace(profile, gripper=replace(profile.gripper, kind=kind, joint="finger", max_effort=20.0))


@pytest.mark.skipif(HAS_CONTROL_MSGS, reason="control_msgs is installed")
@pytest.mark.parametrize("kind", ["gripper_command", "parallel_gripper_command"])
def test_a_gripper_s_action_without_control_msgs_is_refused(bench, kind):
    before = list(bench.robot.publishers)
    with pytest.raises(ConfigError, match=f"gripper.kind is '{kind}', which needs control_msgs"):
        make_sink(bench.robot, with_action(kind))
    assert list(bench.robot.publishers) == before


@pytest.mark.skipif(not HAS_CONTROL_MSGS, reason="control_msgs is not installed")
@pytest.mark.parametrize("kind", ["gripper_command", "parallel_gripper_command"])
def test_a_gripper_s_action(bench, kind):
    from control_msgs import action

    goals = []

    def execute(handle):
        goals.append(handle.request.command)
        handle.succeed()
        return action_type.Result()

    action_type = action.GripperCommand if kind == "gripper_command" else action.ParallelGripperCommand
    profile = with_action(kind)
    sink = bench.sink(profile)
    closed, opened = np.array([0, 0, 0, 0, 0, 0, 1], np.float32), np.array([0, 0, 0, 0, 0, 0, -1], np.float32)
    step = 0

    def command(action):
        nonlocal step
        sink.send(action, T0_NS + step * STEP_NS)
        step += 1

    command(opened)  # nobody is there yet
    ActionServer(bench.driver, action_type, profile.gripper.topic, execute)
    bench.spin_until(lambda: command(opened) or goals)
    bench.spin_until(lambda: not sink._gripper._driver.repeats)  # it was told that the goal is accepted
    for _ in range(2 * GRIPPER_REPEAT_NS // STEP_NS):
        command(opened)
    command(closed)
    bench.spin_until(lambda: len(goals) == 2)
    if kind == "gripper_command":
        assert [(goal.position, goal.max_effort) for goal in goals] == [(0.04, 20.0), (0.0, 20.0)]
    else:
        assert [(goal.name, list(goal.position), list(goal.effort)) for goal in goals] == [
            (["finger"], [0.04], [20.0]),
            (["finger"], [0.0], [20.0]),
        ]


class Client:
    """An action's client; the test plays its server."""

    def __init__(self, node, action_type, name, *, callback_group=None):
        self.group = callback_group
        self.up, self.goals, self.unanswered, self.running = True, [], [], []
        node.client = self

    def server_is_ready(self):
        return self.up

    def send_goal_async(self, goal):
        self.goals.append(goal.command.position)
        self.unanswered.append(Future())
        return self.unanswered[-1]

    def answer(self, accepted):
        self.unanswered.pop(0).set_result(SimpleNamespace(accepted=accepted, get_result_async=self.run))

    def run(self):
        self.running.append(Future())
        return self.running[-1]

    def end(self, status):
        self.running.pop(0).set_result(SimpleNamespace(status=status))

    def destroy(self):
        self.up = None


class ActionBench:
    """A gripper's action without ROS: what the executor would do is done at once."""

    def __init__(self, patch):
        fields = {"position": 0.0, "max_effort": 0.0}
        goal = type("Goal", (), {"__init__": lambda self: setattr(self, "command", SimpleNamespace(**fields))})
        action = SimpleNamespace(GripperCommand=SimpleNamespace(Goal=goal))
        patch.setitem(sys.modules, "control_msgs.action", action)
        patch.setattr(command_sinks, "ActionClient", Client)
        self.errors, self.infos, self.timers = [], [], []
        self.group, self.step = object(), 0
        self.sink = make_sink(self, with_action("gripper_command"), callback_group=self.group)

    # The part of a node that a sink uses.

    def get_logger(self):
        return SimpleNamespace(error=self.errors.append, info=self.infos.append)

    def create_publisher(self, *arguments):
        return SimpleNamespace(publish=lambda message: None)

    def create_guard_condition(self, callback, callback_group=None):
        self.guard_group = callback_group
        self.guard = SimpleNamespace(trigger=callback)
        return self.guard

    def destroy_publisher(self, publisher):
        pass

    def destroy_guard_condition(self, guard):
        assert guard is self.guard
        self.guard = None

    def create_timer(self, period_s, callback, callback_group=None, **others):
        self.timers.append(callback)

    # What the test does.

    def command(self, gripper, steps=1):
        """Send the same command at every step."""
        for _ in range(steps):
            self.sink.send(np.array([0, 0, 0, 0, 0, 0, gripper], np.float32), T0_NS + self.step * STEP_NS)
            self.step += 1

    def silence(self, steps):
        """Only time passes."""
        self.step += steps
        for callback in self.timers:
            callback()


@pytest.fixture
def action(monkeypatch):
    return ActionBench(monkeypatch)


REPEAT_STEPS = GRIPPER_REPEAT_NS // STEP_NS


def test_a_gripper_s_goal_that_nobody_took_is_not_sent_when_the_loop_is_silent(action):
    action.client.up = False
    action.command(1.0, 10)
    action.silence(45 * REPEAT_STEPS)
    action.client.up = True
    action.silence(1)
    assert action.client.goals == []
    action.command(-1.0)
    assert action.client.goals == [0.04], "and the next command counts"


def test_a_gripper_s_goal_is_asked_for_until_there_is_a_server(action):
    action.client.up = False
    action.command(1.0, 3 * REPEAT_STEPS)
    assert len(action.errors) == 1 and "nobody serves the action" in action.errors[0]
    action.client.up = True
    action.command(1.0, REPEAT_STEPS)
    assert action.client.goals == [0.0]
    action.client.answer(True)
    action.command(1.0, 3 * REPEAT_STEPS)
    assert action.client.goals == [0.0] and len(action.infos) == 1


def test_a_gripper_s_goal_that_is_rejected_is_logged_once_and_asked_for_again(action):
    for n in range(5):
        action.command(1.0, REPEAT_STEPS)
        assert action.client.goals == [0.0] * (n + 1)
        action.client.answer(False)
    assert len(action.errors) == 1 and "'panda_hand_controller/commands' did not accept its goal" in action.errors[0]
    action.silence(60 * REPEAT_STEPS)
    assert len(action.client.goals) == 5
    action.command(1.0)
    action.client.answer(True)
    action.command(1.0, 3 * REPEAT_STEPS)
    assert len(action.client.goals) == 6 and len(action.infos) == 1


def test_a_gripper_s_goal_that_is_given_up_is_logged_once_and_not_repeated(action):
    for gripper in (1.0, -1.0):
        action.command(gripper)
        action.client.answer(True)
        action.client.end(GoalStatus.STATUS_ABORTED)
        action.command(gripper, 3 * REPEAT_STEPS)
    assert len(action.client.goals) == 2
    assert len(action.errors) == 1 and "'panda_hand_controller/commands' gave up its goal" in action.errors[0]
    action.command(1.0)
    action.client.answer(True)
    action.client.end(GoalStatus.STATUS_SUCCEEDED)
    assert len(action.infos) == 1


def test_the_answer_to_an_older_goal_does_not_count_for_a_newer_one(action):
    action.command(1.0)
    action.client.up = False
    action.command(-1.0)  # it cannot be sent
    action.client.answer(True)
    action.client.up = True
    action.command(-1.0, REPEAT_STEPS)
    assert action.client.goals == [0.0, 0.04]


def test_a_gripper_s_action_is_in_the_callback_group_that_was_given(action):
    assert action.client.group is action.guard_group is action.group


def test_a_gripper_s_action_that_is_closed_sends_nothing_more(action):
    send_goal, action.guard.trigger = action.guard.trigger, lambda: None
    action.command(1.0)
    action.sink.close()
    assert action.guard is None and action.client.up is None
    send_goal()  # the executor had seen the trigger before
    assert action.client.goals == [] and action.errors == []


# --- compressed images -----------------------------------------------------------------------------------------------


def picture(height=24, width=32):
    """(height, width, 3) uint8 RGB, smooth, with channels that differ."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([8 * x, 10 * y, 255 - 4 * (x + y)], axis=2).clip(0, 255).astype(np.uint8)


def compressed(image, codec="png", form="rgb8; png compressed bgr8", stamp_ns=T0_NS):
    message = CompressedImage(format=form)
    message.header.stamp = to_time(stamp_ns)
    done, data = cv2.imencode(f".{codec}", image if image.ndim == 2 else image[:, :, ::-1])
    assert done
    message.data = data.tobytes()
    return message


@pytest.mark.parametrize("form", ["png", "rgb8; png compressed bgr8", "bgr8; png compressed bgr8"])
def test_a_compressed_image_is_the_image(form):
    view = compressed_to_image(serialize_message(compressed(picture(), form=form)))
    assert view.stamp_ns == T0_NS
    np.testing.assert_array_equal(image_to_array(view, 24, 32), picture())
    assert image_to_array(view, 24, 32, (12, 16, 3)).shape == (12, 16, 3)


@pytest.mark.parametrize("form", ["jpeg", "jpg", "rgb8; jpeg compressed bgr8"])
def test_jpeg_keeps_the_order_of_the_channels(form):
    view = compressed_to_image(serialize_message(compressed(picture(), "jpg", form)))
    assert np.abs(image_to_array(view, 24, 32).astype(int) - picture()).mean() < 5


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (compressed(picture(), form="16UC1; compressedDepth png"), "format '16UC1; compressedDepth png'"),
        (compressed(picture(), form="rgb8; jpeg compressed rgb8"), "format"),
        (compressed(picture(), form="mono8; jpeg compressed "), "format"),
        (compressed(picture(), form=""), "format ''"),
        (compressed(picture()[:, :, 0]), r"\(24, 32\) uint8"),
        (compressed(picture().astype(np.uint16)), "uint16"),
        (CompressedImage(format="jpeg", data=b"no picture"), "holds nothing"),
        (CompressedImage(format="jpeg", data=compressed(picture(), "jpg").data[:-9]), "holds nothing"),
        (CompressedImage(format="jpeg"), "of 0 bytes"),
    ],
)
def test_another_format_is_refused(message, words):
    with pytest.raises(ObservationError, match=words):
        compressed_to_image(serialize_message(message))


def test_a_damaged_message_and_a_wrong_size_are_refused():
    serialized = serialize_message(compressed(picture()))
    with pytest.raises(ObservationError, match="compressed image message of 9 bytes"):
        compressed_to_image(serialized[:9])
    with pytest.raises(ObservationError, match="24 x 32 pixels, allowed is 24 x 33"):
        image_to_array(compressed_to_image(serialized), 24, 33)


def test_raw_and_compressed_cameras_side_by_side(bench):
    profile = load_profile("mock")
    cameras = tuple(CameraTopic(name, f"{name}/image", 24, 32, (24, 32, 3), name) for name in ("raw", "compressed"))
    spec = replace(profile.robot.streams["front"], shape=(24, 32, 3))
    streams = {"raw": spec, "compressed": spec, "joint_position": profile.robot.streams["joint_position"]}
    profile = replace(profile, cameras=cameras, robot=replace(profile.robot, streams=streams))
    log = EdgeLog(bench.robot)
    source = ObservationSource(bench.robot, profile, lockstep=True, log=log, future_tolerance_ns=lambda: 0)
    raw = bench.driver.create_publisher(Image, "raw/image", sensor_qos(True))
    packed = bench.driver.create_publisher(CompressedImage, "compressed/image", sensor_qos(True))
    bench.spin_until(lambda: raw.get_subscription_count() and packed.get_subscription_count())
    message = Image(height=24, width=32, encoding="rgb8", step=96, data=picture().tobytes())
    message.header.stamp = to_time(T0_NS)
    raw.publish(message)
    packed.publish(compressed(picture()))
    bench.spin_until(lambda: len(source.snapshot().values) == 2)
    observation = source.snapshot()
    for name in ("raw", "compressed"):
        assert observation.stamps_ns[name] == T0_NS
        np.testing.assert_array_equal(observation.values[name], picture())
    packed.publish(compressed(picture(20, 20), stamp_ns=T0_NS + STEP_NS))
    bench.spin_until(lambda: log.counts.get("compressed"))
    assert source.snapshot().stamps_ns["compressed"] == T0_NS, "a wrong size changes nothing"
    source.close()
