"""The controller node in the test's own process: its life cycle, its parameters and what it logs."""

import contextlib
import gc
import queue
import sys
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

rclpy = pytest.importorskip("rclpy")

from a2c2_ros.msg import ControlConfiguration
from geometry_msgs.msg import PoseStamped
from rclpy.executors import SingleThreadedExecutor
from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from rclpy.parameter_client import AsyncParameterClient
from rclpy.qos import QoSProfile, ReliabilityPolicy
from rclpy.time import Time
from ros_bench import ros
from sensor_msgs.msg import Image, JointState
from std_msgs.msg import Bool, Float64MultiArray, Header
from std_srvs.srv import SetBool

from a2c2_ros.core.chunk import ActionChunk
from a2c2_ros.core.errors import ChunkError, ConfigError, HeadError, ObservationError
from a2c2_ros.core.observation import Observation
from a2c2_ros.core.safety import Reason, State
from a2c2_ros.core.timing import Tick
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.nodes import correction_controller, handover, head_loader, observation_source
from a2c2_ros.nodes.conversions import array_to_image, array_to_joint_state, array_to_pose, chunk_to_message, to_ns
from a2c2_ros.nodes.correction_controller import CorrectionController
from a2c2_ros.nodes.observation_source import ObservationSource
from a2c2_ros.nodes.runtime import EdgeLog, ManagedNode, latched_qos, reliable_qos, sensor_qos
from a2c2_ros.paths import model_path, robot_profile

WAIT_S = 30.0
PERIOD_NS = 50_000_000
NO_DATA = Observation({}, {})


@contextlib.contextmanager
def controller(**parameters):
    """A controller of a Panda that was configured, or also activated if lockstep is true: then it has no thread."""
    interval_s = sys.getswitchinterval()
    defaults = {"robot": "panda", "correction__enabled": False, "correction__model_path": "''", "autostart": False}
    defaults |= {"start_state": "enabled", "realtime__priority": 0}
    with ros(**defaults | parameters):
        node = CorrectionController()
        try:
            assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
            if parameters.get("lockstep"):
                assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS
            yield node
        finally:
            node.close()
            node.destroy_node()
            sys.setswitchinterval(interval_s)
            gc.unfreeze()


@contextlib.contextmanager
def peer_of(node):
    """Another node, and what spins both until a condition holds."""
    peer, executor = rclpy.create_node("peer"), SingleThreadedExecutor()
    executor.add_node(node)
    executor.add_node(peer)

    def until(condition):
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline
            executor.spin_once(timeout_sec=0.05)

    try:
        yield peer, until
    finally:
        executor.shutdown()
        peer.destroy_node()


def enable(node, value=True):
    response = node._permission.on_enable(SetBool.Request(data=value), SetBool.Response())
    return response.success, response.message


def emergency_stop(node, pressed, heard_by=ReliabilityPolicy.RELIABLE):
    node._permission.on_emergency_stop(Bool(data=pressed), heard_by)


def configured_anew(node):
    """What the loop is latched in after cleanup and configure, None if it may run."""
    assert node.trigger_cleanup() == TransitionCallbackReturn.SUCCESS
    assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
    verdict = node._loop.tick(0, NO_DATA)
    return (verdict.state, verdict.reason) if node._loop.latched else None


# --- latches ---------------------------------------------------------------------------------------------------------


def test_a_pressed_emergency_stop_and_its_latch_survive_cleanup():
    with controller() as node:
        emergency_stop(node, True)
        assert configured_anew(node) == (State.STOPPED, Reason.EMERGENCY_STOP)
        accepted, text = enable(node)
        assert not accepted and "pressed" in text
        emergency_stop(node, False)
        assert configured_anew(node) == (State.STOPPED, Reason.EMERGENCY_STOP), "a release does not enable"
        assert enable(node)[0]
        assert configured_anew(node) is None
        node._loop.fault("broken")
        assert configured_anew(node) == (State.FAULT, Reason.INTERNAL_ERROR)


def test_stop_and_disable_are_heard_while_nothing_is_configured():
    with controller() as node:
        node.trigger_cleanup()
        accepted, text = enable(node)
        assert not accepted and "not configured" in text
        emergency_stop(node, True)
        node.trigger_configure()
        assert not enable(node)[0]
        emergency_stop(node, False)
        assert enable(node)[0]
        node.trigger_cleanup()
        assert enable(node, False)[0]
        node.trigger_configure()
        assert node._loop.latched


def test_a_robot_that_starts_disabled_has_to_be_enabled_after_every_configuration():
    with controller(start_state="disabled") as node:
        assert enable(node)[0]
        assert configured_anew(node) == (State.STOPPED, Reason.DISABLED)


@pytest.mark.parametrize("reliability", [ReliabilityPolicy.RELIABLE, ReliabilityPolicy.BEST_EFFORT])
def test_the_emergency_stop_of_a_reliable_and_of_a_best_effort_publisher_is_heard(reliability, capfd):
    with controller() as node, peer_of(node) as (peer, until):
        stop = peer.create_publisher(Bool, "emergency_stop", QoSProfile(depth=1, reliability=reliability))

        def latched():
            stop.publish(Bool(data=True))
            return node._loop.latched

        def released():
            stop.publish(Bool(data=False))
            return enable(node)[0]

        until(latched)
        assert node._permission.latch.verdict.reason == Reason.EMERGENCY_STOP and not enable(node)[0]
        until(released)
        assert not node._loop.latched
    log = capfd.readouterr().err
    assert ("it is heard, but messages may be lost" in log) == (reliability == ReliabilityPolicy.BEST_EFFORT)


def test_a_late_copy_of_a_release_does_not_undo_a_newer_press():
    reliable, best_effort = ReliabilityPolicy.RELIABLE, ReliabilityPolicy.BEST_EFFORT
    with controller() as node:
        # A release and a press of one reliable publisher; of the second copies the press is lost.
        for pressed, heard_by in ((False, reliable), (True, reliable), (False, best_effort)):
            emergency_stop(node, pressed, heard_by)
        assert node._loop.latched and not enable(node)[0]
        emergency_stop(node, True, best_effort)
        emergency_stop(node, False, reliable)
        assert not enable(node)[0]
        emergency_stop(node, False, best_effort)
        assert enable(node)[0]


def test_a_press_is_not_pushed_out_by_what_came_after_it_while_the_executor_was_busy():
    with controller() as node, peer_of(node) as (peer, until):
        stop = peer.create_publisher(Bool, "emergency_stop", reliable_qos(100))
        until(lambda: stop.get_subscription_count() == 2)
        stop.publish(Bool(data=True))
        for _ in range(50):  # of a button at 10 Hz in the time in which ~/enable waits
            stop.publish(Bool(data=False))
        until(lambda: node._loop.latched)


def test_a_first_configuration_that_fails_leaves_no_robot_that_cannot_be_stopped(monkeypatch):
    with ros(robot="panda", correction__enabled=False, correction__model_path="''", autostart=False):
        node = CorrectionController()
        with monkeypatch.context() as patch:

            def fail(*_, **__):
                raise RuntimeError("no more")

            patch.setattr(node, "create_service", fail)
            assert node.trigger_configure() == TransitionCallbackReturn.FAILURE
        assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
        with peer_of(node) as (peer, until):
            stop = peer.create_publisher(Bool, "emergency_stop", reliable_qos(1))
            pressed = lambda: node._permission.latch.verdict.reason == Reason.EMERGENCY_STOP  # noqa: E731
            until(lambda: stop.publish(Bool(data=True)) or pressed())
        services = [name for name, _ in node.get_service_names_and_types_by_node("correction_controller", "/")]
        assert services.count("/correction_controller/enable") == 1
        node.close()
        node.destroy_node()


def test_a_loop_that_could_not_start_does_not_keep_a_stop_waiting(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("can't start new thread")

    with controller() as node:
        monkeypatch.setattr(correction_controller, "TickThread", fail)
        assert node.trigger_activate() != TransitionCallbackReturn.SUCCESS
        monkeypatch.setattr(handover, "ANSWER_TIMEOUT_S", 0.0)
        assert enable(node, False) == (True, "disabled")


@pytest.mark.parametrize("way", ["disable", "emergency stop"])
def test_a_stop_is_not_lost_when_the_loop_answers_late(way, monkeypatch):
    monkeypatch.setattr(handover, "ANSWER_TIMEOUT_S", 0.2)
    inside, may_go = threading.Event(), threading.Event()
    with controller() as node:
        assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS
        tick = node._loop.tick

        def blocked(*arguments):
            inside.set()
            assert may_go.wait(WAIT_S)
            return tick(*arguments)

        def wait_for(condition):
            deadline = time.monotonic() + WAIT_S
            while not condition():
                assert time.monotonic() < deadline
                time.sleep(0.01)

        monkeypatch.setattr(node._loop, "tick", blocked)
        try:
            assert inside.wait(WAIT_S)
            if way == "disable":
                accepted, text = enable(node, False)
                assert not accepted and "NOT STOPPED YET" in text and "as soon as it does" in text
            else:
                emergency_stop(node, True)
                emergency_stop(node, False)
            accepted, text = enable(node)
            assert not accepted and "nothing was changed" in text
            assert not node._loop.latched
        finally:
            may_go.set()
        wait_for(lambda: node._loop.latched)
        ticks = node._loop.ticks
        wait_for(lambda: node._loop.ticks > ticks + 3)
        assert node._loop.latched, "what was told not to have happened must not happen later"


def test_what_the_loop_has_begun_in_time_is_told_as_it_ends(monkeypatch):
    begun, may_end = threading.Event(), threading.Event()

    class Impatient(Future):
        """Its time is over as soon as the loop has begun."""

        def result(self, timeout=None):
            if timeout is not None:
                assert begun.wait(WAIT_S)
                raise TimeoutError
            may_end.set()
            return super().result(WAIT_S)

    def slow():
        begun.set()
        assert may_end.wait(WAIT_S)
        return "done"

    monkeypatch.setattr(handover, "Future", Impatient)
    with controller() as node:
        assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS
        assert node._handover.ask(slow, keep=False) == "done"


# --- profiles --------------------------------------------------------------------------------------------------------


def test_an_edited_profile_counts_for_all_that_is_made_of_it(tmp_path):
    """Else the loop would take the measured position by the new scale, and the sink send it by the old one."""
    old, new = "forward_position_controller/commands", "other_controller/commands"
    text = robot_profile("panda_forward").read_text()
    edited = text.replace(old, new).replace("command:\n", f"command:\n  scale: {[-1.0] + [1.0] * 6}\n")
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    position = np.array([0.8, 0.0, 0.0, -1.0, 0.0, 1.0, 0.0, 0.0])
    with controller(robot=path, control_rate_hz=100.0) as node, peer_of(node) as (peer, until):
        received, configurations = [], []
        peer.create_subscription(Float64MultiArray, new, received.append, reliable_qos(10))
        peer.create_subscription(ControlConfiguration, "control_configuration", configurations.append, latched_qos(10))
        until(lambda: peer.count_publishers(old) == 1)
        assert node.trigger_cleanup() == TransitionCallbackReturn.SUCCESS
        path.write_text(edited)
        assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
        until(lambda: not peer.count_publishers(old) and node.count_subscribers(new) and peer.count_publishers(new))
        until(lambda: len(configurations) == 2)
        assert [configuration.robot for configuration in configurations] == [text, edited]
        hold = node._profile.robot.hold.target(
            np.zeros(8, np.float32), node._profile.robot.measured_of({"joint_position": position})
        )
        until(lambda: node._sink.send(hold, 1) or received)
        np.testing.assert_allclose(received[0].data, position[:7], atol=1e-6)


def test_a_configuration_that_fails_leaves_nothing_of_the_robot_behind(tmp_path, monkeypatch):
    text = robot_profile("panda_forward").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with controller(robot=path, control_rate_hz=100.0) as node:

        def topics():
            return sorted(publisher.topic_name for publisher in node.publishers)

        configured = topics()
        assert node.trigger_cleanup() == TransitionCallbackReturn.SUCCESS
        clean = topics()
        assert set(configured) - set(clean) == {
            "/forward_position_controller/commands",
            "/panda_hand_controller/commands",
        }
        with monkeypatch.context() as broken:
            broken.setattr(node, "_announce", fail_with("after the sink was made"))
            assert node.trigger_configure() == TransitionCallbackReturn.FAILURE
        assert topics() == clean
        path.write_text(text.replace("kind: position", "kind: delta"))
        assert node.trigger_configure() == TransitionCallbackReturn.FAILURE
        assert topics() == clean
        path.write_text(text)
        assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
        assert topics() == configured


def test_a_pose_in_another_frame_than_that_of_the_twists_does_not_move_the_robot(capfd):
    with controller(robot="panda_servo", lockstep=True) as node, peer_of(node) as (peer, until):
        robot = node._profile.robot
        joints = peer.create_publisher(JointState, "joint_states", reliable_qos(1))
        poses = peer.create_publisher(PoseStamped, "ee_pose", reliable_qos(1))
        pose = np.array([0.45, 0.0, 0.3, 1.0, 0.0, 0.0, 0.0])
        now_ns = node.get_clock().now().nanoseconds
        actions = np.tile(np.array([0.1, 0, 0, 0, 0, 0, -1], np.float32), (10, 1))
        chunk = ActionChunk(1, now_ns, PERIOD_NS, actions, robot.action_names, [], [], "policy", "planner")
        node._on_chunk(chunk_to_message(chunk, ""))

        def come(frame, condition):
            def published():
                joints.publish(array_to_joint_state(np.zeros(8), node._profile.joint_names, now_ns))
                poses.publish(array_to_pose(pose, now_ns, frame))
                return condition()

            until(published)
            return node._loop.tick(now_ns, node._source.snapshot())

        arrived = lambda: "joint_position" in node._source.snapshot().values  # noqa: E731
        step = come("base", lambda: arrived() and node._log.counts.get("ee_pose"))
        assert (step.state, step.reason, step.detail) == (State.HOLDING, Reason.OBSERVATION_MISSING, "ee_pose")
        assert "ee_pose" not in node._source.snapshot().values
        come("panda_link0", lambda: "ee_pose" in node._source.snapshot().values)
        np.testing.assert_array_equal(node._source.snapshot().values["ee_pose"], pose)
    assert "sample of ee_pose refused: pose is in frame 'base', allowed is 'panda_link0'" in capfd.readouterr().err


def test_arm_and_gripper_on_one_topic_are_two_streams_and_neither_is_the_other_s_problem(tmp_path, capfd, monkeypatch):
    clock_s = [100.0]
    monkeypatch.setattr(observation_source, "monotonic_s", lambda: clock_s[0])
    entries = yaml.safe_load(robot_profile("panda_forward").read_text())
    hand = {"topic": "joint_states", "names": ["panda_finger_joint1"]}
    entries |= {"more_joint_states": {"hand": hand}, "max_age_s": entries["max_age_s"] | {"hand": 0.5}}
    entries["joint_states"]["names"] = arm = [f"panda_joint{i}" for i in range(1, 8)]
    path = tmp_path / "robot.yaml"
    path.write_text(yaml.safe_dump(entries))
    with controller(robot=path, control_rate_hz=100.0, lockstep=True) as node, peer_of(node) as (peer, until):
        publisher = peer.create_publisher(JointState, "joint_states", reliable_qos(10))
        newest = lambda: node._source.snapshot().stamps_ns  # noqa: E731

        def say(names, stamp_ns):
            publisher.publish(array_to_joint_state(np.ones(len(names)), names, stamp_ns))

        def refused(stream):
            return node._log.counts.get(stream, 0)

        start_ns = node.get_clock().now().nanoseconds
        until(lambda: publisher.get_subscription_count() == 2)
        say(arm, start_ns)
        until(lambda: newest().get("joint_position") == start_ns and refused("hand"))
        assert "hand" not in newest(), "a stream that was never heard says what came in its place"
        for n in range(1, 6):
            say(hand["names"], start_ns + n)  # both at once: neither may push out the other
            say(arm, start_ns + n)
            until(lambda n=n: newest() == {"joint_position": start_ns + n, "hand": start_ns + n})
        assert (refused("joint_position"), refused("hand")) == (0, 1)
        received = node._source.received
        assert (received["joint_position"], received["hand"]) == (6, 6), "its own, and what it refused"
        clock_s[0] += 1.0  # the gripper's driver is gone
        say(arm, start_ns + 10)
        until(lambda: newest()["joint_position"] == start_ns + 10 and refused("hand") == 2)
        say([*arm, "another"], start_ns + 11)
        say(arm[:3], start_ns + 12)
        until(lambda: refused("joint_position") == 1)
        assert newest()["joint_position"] == start_ns + 11
    assert "sample of hand refused: joint state lacks the joints ['panda_finger_joint1']" in capfd.readouterr().err


# --- parameters and heads --------------------------------------------------------------------------------------------


class Loading:
    """Heads that take as long to load as the test wants, and a client of the node's parameters."""

    def __init__(self, monkeypatch):
        self.loaded, self.may_end = [], threading.Event()
        self._node = None
        monkeypatch.setattr(head_loader, "OnnxHead", self._load)
        monkeypatch.setattr(
            head_loader, "model_path", lambda name: name if name.startswith("head") else model_path(name)
        )

    def _load(self, path, threads, device):
        self.loaded.append(path)
        assert self.may_end.wait(WAIT_S)
        manifest = SimpleNamespace(check_robot=lambda *_: None, to_json=lambda: "{}")
        return SimpleNamespace(path=path, sha256="", manifest=manifest, warm_up=lambda: None)

    def serve(self, node):
        self._peer = rclpy.create_node("peer")
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(node)
        self._executor.add_node(self._peer)
        self.client = AsyncParameterClient(self._peer, node.get_name())
        self.stop = self._peer.create_publisher(Bool, "emergency_stop", reliable_qos(10))
        self.spin_until(lambda: self.client.services_are_ready() and self.stop.get_subscription_count())

    def spin_until(self, condition):
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline
            self._executor.spin_once(timeout_sec=0.05)

    def set(self, *parameters, atomically=False):
        """(accepted, reason) of each, or of all."""
        call = self.client.set_parameters_atomically if atomically else self.client.set_parameters
        answer = call([Parameter(name, value=value) for name, value in parameters])
        self.spin_until(answer.done)
        results = [answer.result().result] if atomically else answer.result().results
        return [(result.successful, result.reason) for result in results]

    def close(self):
        self.may_end.set()
        self._executor.shutdown()
        self._peer.destroy_node()


@pytest.fixture
def loading(monkeypatch):
    return Loading(monkeypatch)


@pytest.mark.timeout(150)
def test_a_head_among_other_parameters_is_loaded_once(loading):
    with controller() as node, contextlib.closing(loading):
        loading.serve(node)
        loading.may_end.set()
        wanted = [("residual_limit", 2.0), ("correction.model_path", "head A"), ("action_margin", 2.0)]
        assert loading.set(*wanted) == [(True, "")] * 3
        assert loading.loaded == ["head A"] and node._loop.head.path == "head A"
        assert loading.set(("correction.model_path", "head B"), ("residual_limit", 3.0)) == [(True, "")] * 2
        assert loading.loaded == ["head A", "head B"] and node._loop.head.path == "head B"


@pytest.mark.timeout(150)
def test_a_head_is_loaded_again_from_the_file_that_it_came_from(loading):
    """It may have been trained anew."""
    loading.may_end.set()
    with controller(correction__enabled=True, correction__model_path="'head A'") as node, contextlib.closing(loading):
        loading.serve(node)
        old = node._loop.head
        assert loading.set(("residual_limit", 2.0)) == [(True, "")]
        assert node._loop.head is old
        assert loading.set(("residual_limit", 3.0), ("correction.model_path", "head A")) == [(True, "")] * 2
        assert node._loop.head is not old and node._loop.head.path == "head A"
        assert node._loop.config.residual_limit == 3.0


@pytest.mark.timeout(150)
def test_a_stop_and_the_sink_go_on_while_a_head_loads(loading, monkeypatch):
    sent = []

    def make_sink(node, profile, callback_group=None):
        return SimpleNamespace(ready=node.create_guard_condition(lambda: sent.append(1), callback_group=callback_group))

    monkeypatch.setattr(correction_controller, "make_sink", make_sink)
    with controller() as node, contextlib.closing(loading):
        loading.serve(node)
        answer = loading.client.set_parameters([Parameter("correction.model_path", value="head A")])
        loading.spin_until(lambda: loading.loaded)
        node._sink.ready.trigger()
        loading.stop.publish(Bool(data=True))
        loading.spin_until(lambda: sent and node._loop.latched)
        assert not answer.done()
        loading.may_end.set()
        loading.spin_until(answer.done)
        assert answer.result().results[0].successful


@pytest.mark.timeout(150)
def test_correction_and_its_head_can_be_switched_off_together(loading):
    loading.may_end.set()
    with controller(correction__enabled=True, correction__model_path="'head A'") as node, contextlib.closing(loading):
        loading.serve(node)
        off, no_head = ("correction.enabled", False), ("correction.model_path", "")
        ((accepted, reason),) = loading.set(no_head)
        assert not accepted and "''" in reason
        assert loading.set(off, no_head, atomically=True) == [(True, "")]
        assert node._loop.head is None and not node._loop.config.correction__enabled


def chunk_of_the_panda(t_obs_ns, position):
    names = load_profile("panda").robot.action_names
    actions = np.tile(np.float32(position), (50, 1))
    return ActionChunk(t_obs_ns // PERIOD_NS, t_obs_ns, PERIOD_NS, actions, names, [], [], "policy", "planner")


def test_a_chunk_of_before_the_activation_is_not_executed_by_a_loop_that_is_new():
    position = np.array([0.0, 0, 0, -1, 0, 1, 0, 0.02])
    with controller(lockstep=True) as node:
        now_ns = 10**12 + 10 * PERIOD_NS
        observation = Observation({"joint_position": position}, {"joint_position": now_ns})
        node._loop.install(chunk_of_the_panda(10**12, position), now_ns)
        assert node._loop.tick(now_ns, observation).reason == Reason.NO_CHUNK
        node._loop.install(chunk_of_the_panda(now_ns, position), now_ns)
        assert node._loop.tick(now_ns, observation).state == State.BASE_ONLY


def test_the_planner_is_told_from_when_on_chunks_count_even_if_it_comes_later():
    with controller() as node, peer_of(node) as (peer, until):
        assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS
        since = []
        peer.create_subscription(Header, "replan", lambda message: since.append(to_ns(message.stamp)), latched_qos(1))
        until(lambda: len(since) == 1)
        assert enable(node, False)[0]
        before_ns = node.get_clock().now().nanoseconds
        assert enable(node)[0]
        until(lambda: len(since) == 2)
        assert since[0] < before_ns <= since[1] <= node.get_clock().now().nanoseconds


def test_a_simulation_s_planner_is_not_told_it_waits_for_the_next_chunk_anyway(monkeypatch):
    with controller(lockstep=True) as node:
        monkeypatch.setattr(node, "_replan_publisher", None)
        assert enable(node, False)[0] and enable(node)[0]


def test_a_rehearsal_does_not_wait_for_an_arm_that_is_not_commanded():
    position, goal = np.array([0.0, 0, 0, -1, 0, 1, 0, 0.02]), np.array([1.0, 0, 0, -1, 0, 1, 0, 0])
    with controller() as node:
        loop = node._rehearsal
        loop.install(chunk_of_the_panda(10**12, goal), 10**12)
        for t_ns in range(10**12, 10**12 + 40 * PERIOD_NS, PERIOD_NS):
            step = loop.tick(t_ns, Observation({"joint_position": position}, {"joint_position": t_ns}))
        assert step.state == State.BASE_ONLY


def test_a_wider_margin_counts_for_the_rehearsal_and_its_refusals_stop_nothing(monkeypatch):
    with controller(lockstep=True) as node:
        robot = load_profile("panda").robot
        far = np.tile(np.array([0, 0, 0, 3.0, 0, 1.5, 0, -1], np.float32), (10, 1))

        def come(number):
            now_ns = node.get_clock().now().nanoseconds
            chunk = ActionChunk(number, now_ns, PERIOD_NS, far, robot.action_names, [], [], "policy", "planner")
            node._on_chunk(chunk_to_message(chunk, ""))

        come(1)
        assert node._loop.chunks == {"implausible": 1}
        assert node.set_parameters([Parameter("action_margin", value=3.0)])[0].successful
        come(2)
        assert node._loop.chunks["accepted"] == 1 and node._rehearsal.chunks == {"accepted": 1}

        def refuse(chunk, now_ns):
            raise ChunkError("not for a rehearsal")

        monkeypatch.setattr(node._rehearsal, "install", refuse)
        come(3)
        assert node._loop.chunks["accepted"] == 2


def test_robots_are_told_apart_in_the_diagnostics(monkeypatch):
    with controller(lockstep=True, namespace="/left") as node:
        published = []
        monkeypatch.setattr(node, "_diagnostics_publisher", SimpleNamespace(publish=published.append))
        node._publish_diagnostics(1.0)
    assert [status.name for status in published[0].status] == ["left/correction_controller: timing"]


def test_another_cause_of_a_problem_is_logged(capfd):
    clock_s = [0.0]
    with ros():
        node = rclpy.create_node("owner")
        log = EdgeLog(node, lambda: clock_s[0])
        for now_s, text in (
            (0.0, "no connection for 1.5 s"),
            (9.0, "no connection for 10.5 s"),
            (10.0, "other metadata"),
            (11.0, "a third cause"),
            (14.9, "a third cause"),
            (15.0, "a third cause"),
        ):
            clock_s[0] = now_s
            log.problem("inference", text)
        node.destroy_node()
    logged = [line.rsplit("]: ")[-1] for line in capfd.readouterr().err.splitlines()]
    assert logged == ["no connection for 1.5 s", "other metadata", "a third cause"]
    assert log.counts == {"inference": 6}


def test_a_defect_while_an_image_is_taken_does_not_end_the_camera(capfd):
    taken = []

    def convert(serialized):
        if not taken:
            taken.append(1)
            raise MemoryError("no room")
        raise ObservationError("wrong size")

    with ros():
        node = rclpy.create_node("owner")
        source = ObservationSource(
            node, load_profile("libero"), False, EdgeLog(node), lambda: 0, prepare=lambda *_: None
        )
        for _ in range(2):
            source._prepare_and_put("agentview", (b"", convert))
        source.close()
        node.destroy_node()
    assert "MemoryError: no room" in capfd.readouterr().err
    assert source._log.counts == {"agentview": 2}


@pytest.mark.parametrize("name", ["x" * 300, "~nobody-of-this-name/head.onnx"])
def test_a_model_that_cannot_be_looked_for_is_an_error_of_the_configuration(name):
    with pytest.raises(ConfigError, match=name):
        model_path(name)


# --- life cycle ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "result"),
    [
        ("configure", TransitionCallbackReturn.FAILURE),
        ("activate", TransitionCallbackReturn.ERROR),
        ("deactivate", TransitionCallbackReturn.ERROR),
    ],
)
def test_a_defect_in_a_transition_is_logged(broken, result, capfd):
    calls = []

    class Broken(ManagedNode):
        def cleanup(self):
            calls.append("cleanup")

    def fail(self):
        raise ValueError("broken on purpose")

    setattr(Broken, broken, fail)
    with ros():
        node = Broken("broken")
        try:
            transitions = {name: getattr(node, f"trigger_{name}") for name in ("configure", "activate", "deactivate")}
            results = {}
            for name, transition in transitions.items():
                results[name] = transition()
                if name == broken:
                    break
        finally:
            node.destroy_node()
    log = capfd.readouterr().err
    assert f"not {broken}d, a defect" in log and "in fail" in log and "ValueError: broken on purpose" in log
    assert results.pop(broken) == result
    assert set(results.values()) <= {TransitionCallbackReturn.SUCCESS}
    assert calls == (["cleanup"] if broken == "configure" else [])


CLOCK_START_NS = 5_000_000_000
ON_A_CLOCK = {"use_sim_time": True, "clock_timeout_s": 60.0}  # which may stand for as long as the test needs


def clocked(node):
    """Sets the time of a node to control periods and more [ns], and what it publishes of its next step."""
    published, clock = queue.Queue(), node.get_clock()
    node._step_publisher = SimpleNamespace(publish=published.put)

    def set_time(periods, more_ns=0):
        ns = CLOCK_START_NS + periods * PERIOD_NS + more_ns
        clock.set_ros_time_override(Time(nanoseconds=ns, clock_type=clock.clock_type))

    return set_time, lambda: published.get(timeout=WAIT_S)


def test_time_in_which_the_node_was_not_active_is_no_missed_tick():
    with controller(**ON_A_CLOCK) as node:
        set_time, next_step = clocked(node)

        def missed_at(periods):
            set_time(periods)
            return next_step().missed_ticks

        assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS
        assert [missed_at(0), missed_at(1), missed_at(3)] == [0, 0, 1]
        assert node.trigger_deactivate() == TransitionCallbackReturn.SUCCESS
        set_time(10)
        assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS
        first = next_step()
        assert [first.missed_ticks, first.period_error_s, missed_at(11)] == [0, 0.0, 0]


def test_the_error_of_a_period_is_what_is_left_of_the_time_since_the_last_tick():
    with controller(**ON_A_CLOCK) as node:
        set_time, next_step = clocked(node)
        assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS
        steps = []
        for periods, late_ns in ((0, 0), (1, 0), (3, 2_000_000), (4, 0)):
            set_time(periods, late_ns)
            steps.append(next_step())
        assert [step.missed_ticks for step in steps] == [0, 0, 1, 0]
        assert [step.period_error_s for step in steps] == [0.0, 0.0, 0.002, -0.002]


# --- what is done beside a tick --------------------------------------------------------------------------------------


class PreparingHead:
    """Keeps what it was given."""

    path = sha256 = ""

    def __init__(self, manifest):
        self.manifest, self.prepared, self.inputs = manifest, [], []

    def warm_up(self):
        pass

    def prepare(self, camera, image, language):
        self.prepared.append((camera, image, language))

    def correct(self, inputs):
        self.inputs.append(inputs)
        return np.zeros(len(self.manifest.action_names), np.float32)


def test_the_images_of_a_correction_were_prepared_before_with_the_language_of_its_chunk(monkeypatch, manifest):
    head = PreparingHead(manifest)
    monkeypatch.setattr(head_loader, "OnnxHead", lambda *_, **__: head)
    libero = {"robot": "libero", "correction__enabled": True, "rearm_after_s": 0.0}
    libero |= {"correction__model_path": "compact_libero_spatial/head.onnx"}
    with controller(**libero, **ON_A_CLOCK) as node, peer_of(node) as (peer, until):
        qos = sensor_qos(lockstep=False)
        cameras = {name: peer.create_publisher(Image, f"{name}/image", qos) for name in manifest.cameras}
        joints = peer.create_publisher(JointState, "joint_states", qos)
        pose = peer.create_publisher(PoseStamped, "ee_pose", qos)
        set_time, next_step = clocked(node)
        assert node.trigger_activate() == TransitionCallbackReturn.SUCCESS
        chunk = ActionChunk(
            chunk_id=1,
            t_obs_ns=CLOCK_START_NS,
            step_ns=PERIOD_NS,
            actions=np.zeros((manifest.horizon, len(manifest.action_names)), np.float32),
            action_names=manifest.action_names,
            latent=np.zeros(manifest.latent_size, np.float32),
            language=np.arange(manifest.language_size, dtype=np.float32),
            policy_id=manifest.policy_id,
            planner_id="planner",
        )
        node._on_chunk(chunk_to_message(chunk, ""))
        set_time(0)
        assert next_step().reason == Reason.OBSERVATION_MISSING

        def observed():
            now_ns = node.get_clock().now().nanoseconds
            for name, publisher in cameras.items():
                publisher.publish(array_to_image(np.zeros(manifest.cameras[name], np.uint8), now_ns, name))
            joints.publish(array_to_joint_state(np.zeros(9), node._profile.joint_names, now_ns))
            pose.publish(array_to_pose(np.array([0, 0, 1.0, 1, 0, 0, 0]), now_ns, "world"))
            return len(node._source.snapshot().values) == len(node._profile.robot.streams)

        until(observed)
        set_time(1)
        assert next_step().chunk_id == 1
    (inputs,) = head.inputs
    for camera in manifest.cameras:
        (language,) = [told for name, image, told in head.prepared if image is inputs.images[camera] and name == camera]
        np.testing.assert_array_equal(language, chunk.language)
    np.testing.assert_array_equal(inputs.language, chunk.language)


# --- the log ---------------------------------------------------------------------------------------------------------


def fail_with(text):
    def fail(*_):
        raise ValueError(text)

    return fail


def test_every_defect_of_a_tick_is_logged(capfd, monkeypatch):
    with controller(lockstep=True) as node:
        node._clock_jumped(Tick(0, 0, 0, -1))  # logs with another severity
        for text in ("the first defect", "the second defect"):
            with monkeypatch.context() as broken:
                broken.setattr(node._loop, "tick", fail_with(text))
                node._run(Tick(0, 0, 0, 0), NO_DATA, 0, None)
            assert node._loop.latched
            assert enable(node)[0]
    log = capfd.readouterr().err
    assert "ValueError: the first defect" in log
    assert "ValueError: the second defect" in log


def test_takeovers_and_rehearsals_that_fail_again_are_logged_again(capfd, monkeypatch):
    with controller(lockstep=True) as node:
        names = load_profile("panda").robot.action_names

        def drive(value):
            now_ns = node.get_clock().now().nanoseconds
            node._on_takeover(array_to_joint_state(np.full(len(names), value), names, now_ns))

        node._grid.tick(0)
        for value in (np.nan, np.nan, 0.0, np.nan):
            drive(value)
        for text in ("the first", "the first", "", "the second"):
            with monkeypatch.context() as broken:
                if text:
                    broken.setattr(node._rehearsal, "tick", fail_with(text))
                node._rehearse()
    log = capfd.readouterr().err
    assert log.count("finite values") == 2
    assert log.count("in a rehearsal: the first") == log.count("in a rehearsal: the second") == 1


def test_the_preparation_of_each_camera_is_logged_when_it_fails_again(capfd):
    problems = {"agentview": ""}

    def prepare(camera, image):
        if problems.get(camera):
            raise HeadError(problems[camera])

    with ros():
        node = rclpy.create_node("owner")
        source = ObservationSource(node, load_profile("libero"), False, EdgeLog(node), lambda: 0, prepare=prepare)
        convert = {
            camera: source._preparing(camera, lambda serialized: (0, np.zeros(()))) for camera in ("agentview", "wrist")
        }
        for problem in ("the first", "the first", "", "the second"):
            problems["agentview"] = problem
            for camera in convert:
                convert[camera](b"")
        source.close()
        node.destroy_node()
    log = capfd.readouterr().err
    assert log.count(": the first") == log.count(": the second") == 1
