"""The planner node in the test's own process, with a policy that answers when the test wants it to."""

import contextlib
import dataclasses
import threading
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("rclpy")

from rclpy.lifecycle import TransitionCallbackReturn
from rclpy.parameter import Parameter
from ros_bench import ros
from std_msgs.msg import Header, String

from a2c2_ros.core.errors import PolicyError
from a2c2_ros.core.observation import Observation
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.nodes import chunk_planner
from a2c2_ros.nodes.chunk_planner import IDLE_REPORTS, ChunkPlanner
from a2c2_ros.nodes.conversions import to_ns, to_time
from a2c2_ros.policies.base import PolicyOutput

WAIT_S = 30.0
STEP_NS = 50_000_000
T0_NS = 10**18
PROFILE = load_profile("mock")
H = 20


class SlowPolicy:
    """Ends an inference when it is let; action 0 of every slot tells the state that it saw."""

    policy_id, horizon, latent_dim, language_dim = "slow", H, 1, 1
    action_names, cameras = PROFILE.robot.action_names, PROFILE.robot.cameras
    image_size, state_dim = next(iter(PROFILE.camera_shapes().values()))[0], len(PROFILE.robot.state_names)

    def __init__(self):
        self.trained_for, self.delays, self.error = {}, {"rtc": 8}, None
        self.begun, self.may_end = threading.Semaphore(0), threading.Semaphore(1)  # the warm-up
        self.instructions, self.continuations = [], []

    def largest_delay(self, chunking):
        return self.delays.get(chunking)

    def predict(self, observation, instruction, *, seed, continuation=None):
        self.instructions.append(instruction)
        self.continuations.append(continuation)
        self.begun.release()
        assert self.may_end.acquire(timeout=WAIT_S)
        if self.error is not None:
            raise self.error
        actions = np.full((H, len(self.action_names)), observation["state"][0], np.float32)
        return PolicyOutput(actions, np.zeros(1, np.float32), np.zeros(1, np.float32))


class Bench:
    """A planner that is active, a clock, and what it published."""

    def __init__(self, node, policy, monkeypatch):
        self.node, self.policy, self.chunks, self.diagnostics = node, policy, [], []
        self._begin(policy)
        self.now_ns, self.observation = T0_NS, Observation({}, {})
        clock = SimpleNamespace(now=lambda: SimpleNamespace(nanoseconds=self.now_ns))
        monkeypatch.setattr(node, "get_clock", lambda: clock)
        monkeypatch.setattr(node, "_chunk_publisher", SimpleNamespace(publish=self.chunks.append))
        monkeypatch.setattr(node, "_diagnostics_publisher", SimpleNamespace(publish=self.diagnostics.append))
        monkeypatch.setattr(node._source, "snapshot", lambda: self.observation)

    def _begin(self, policy):
        assert policy.begun.acquire(timeout=WAIT_S)

    def observe(self, step, only=None, at_ns=None, lags_ns=None):
        """A sample of every stream at a step, or so long before; it arrives at once or at a time of the planner."""
        stamp_ns = T0_NS + step * STEP_NS
        self.now_ns = stamp_ns if at_ns is None else at_ns
        streams = {n: s for n, s in PROFILE.robot.streams.items() if only is None or n in only}
        values = {name: np.zeros(spec.shape, spec.dtype) for name, spec in streams.items()}
        self.observation = Observation(values, {name: stamp_ns - (lags_ns or {}).get(name, 0) for name in streams})
        self.node._on_sample()

    def say(self, text):
        self.node._on_instruction(String(data=text))

    def inference_begins(self):
        self._begin(self.policy)

    def inference_ends(self):
        """The one that runs; what it gave is taken over."""
        future = self.node._running[1]
        self.policy.may_end.release()
        future.exception(timeout=WAIT_S)
        self.node._pump()


@contextlib.contextmanager
def planner(monkeypatch, policy=None, activate=True, **parameters):
    policy = policy or SlowPolicy()
    monkeypatch.setattr(chunk_planner, "load_policy_for", lambda *args, **options: policy)
    defaults = {"robot": "mock", "horizon": H, "execution_horizon": 10, "inference_delay": 0, "autostart": False}
    with ros(**defaults | parameters):
        node = ChunkPlanner()
        configured = node.trigger_configure() == TransitionCallbackReturn.SUCCESS
        assert configured or not activate
        if activate:
            node.trigger_activate()
        yield Bench(node, policy, monkeypatch) if activate else configured
        policy.may_end.release(100)
        node.close()
        node.destroy_node()


@pytest.fixture
def bench(monkeypatch):
    with planner(monkeypatch) as bench:
        yield bench


def test_instructions_that_follow_each_other_do_not_pile_up_inferences(bench):
    bench.say("first")
    bench.observe(0)
    bench.inference_begins()
    for n, text in enumerate(("second", "third", "fourth"), start=1):
        bench.say(text)
        bench.observe(n)
    bench.observe(12)
    bench.inference_ends()  # of the first instruction, which nobody wants any more
    bench.inference_begins()
    bench.observe(14)
    bench.inference_ends()
    assert bench.policy.instructions[1:] == ["first", "fourth"]
    (chunk,) = bench.chunks
    assert chunk.instruction == "fourth"
    assert to_ns(chunk.header.stamp) == T0_NS + 12 * STEP_NS, "as it was when the worker became free"


def test_a_chunk_starts_with_the_oldest_of_what_was_observed(bench):
    bench.say("go")
    lags_ns = {name: n * 3_000_000 for n, name in enumerate(PROFILE.robot.streams, start=1)}
    assert len(lags_ns) > 1
    bench.observe(1, lags_ns=lags_ns)
    bench.inference_begins()
    bench.inference_ends()
    (chunk,) = bench.chunks
    assert to_ns(chunk.header.stamp) == T0_NS + STEP_NS - max(lags_ns.values())


def test_a_gripper_s_own_joint_states_do_not_make_a_chunk_older(bench):
    robot = bench.node._profile.robot
    slow = list(robot.streams)[-1]
    assert slow == "joint_position"
    profile = dataclasses.replace(bench.node._profile, robot=dataclasses.replace(robot, undated_streams=(slow,)))
    bench.node._profile = profile
    bench.say("go")
    bench.observe(1, lags_ns={slow: 50_000_000})
    bench.inference_begins()
    bench.inference_ends()
    (chunk,) = bench.chunks
    assert to_ns(chunk.header.stamp) == T0_NS + STEP_NS


def test_after_a_stop_an_inference_starts_at_once(bench):
    bench.say("go")
    bench.observe(0)
    bench.inference_begins()
    bench.inference_ends()
    for n in (1, 2, 3):
        bench.observe(n)
    assert len(bench.chunks) == 1, "e is 10 steps"
    bench.node._on_replan(Header(stamp=to_time(T0_NS + 4 * STEP_NS)))
    bench.observe(4)
    bench.inference_begins()
    bench.inference_ends()
    bench.observe(6)
    assert [to_ns(chunk.header.stamp) for chunk in bench.chunks] == [T0_NS, T0_NS + 4 * STEP_NS]
    assert len(bench.policy.instructions) == 3, "one is enough"


def test_a_failed_inference_is_tried_again_soon(bench):
    bench.say("go")
    bench.policy.error = PolicyError("a lost connection")
    bench.observe(0)
    bench.inference_begins()
    bench.inference_ends()
    bench.observe(1)
    assert len(bench.policy.instructions) == 2, "not at the next sample"
    bench.policy.error = None
    bench.observe(5)
    bench.inference_begins()
    bench.inference_ends()
    assert len(bench.chunks) == 1


def test_real_time_chunking_goes_on_from_as_many_slots_as_the_inference_takes(monkeypatch):
    with planner(monkeypatch, chunking="rtc") as bench:
        bench.say("go")
        for start in (0, 10, 20):
            bench.observe(start)
            bench.inference_begins()
            bench.observe(start + 3)
            bench.inference_ends()
        known = [c and (c.delay_steps, len(c.actions)) for c in bench.policy.continuations[1:]]
        assert known == [None, (3, 10), (3, 10)]


def test_it_goes_on_from_no_more_slots_than_the_policy_can(monkeypatch, capfd):
    policy = SlowPolicy()
    policy.delays["rtc"] = 2
    with planner(monkeypatch, policy, chunking="rtc") as bench:
        bench.say("go")
        for start in (0, 10):
            bench.observe(start)
            bench.inference_begins()
            bench.observe(start + 3)
            bench.inference_ends()
        assert bench.policy.continuations[-1].delay_steps == 2
    assert "chunks come d=3 steps late, with rtc the policy goes on from 2 at most" in capfd.readouterr().err


@pytest.mark.parametrize(("parameter", "value"), [("chunking", "tt_rtc"), ("inference_delay", 9)])
def test_what_the_policy_cannot_do_is_refused_while_it_runs(monkeypatch, parameter, value):
    with planner(monkeypatch, chunking="rtc") as bench:
        result = bench.node.set_parameters([Parameter(parameter, value=value)])[0]
        assert not result.successful and str(value) in result.reason and "slow" in result.reason
        assert bench.node.set_parameters([Parameter("inference_delay", value=8)])[0].successful


def test_another_policy_takes_a_new_configuration(monkeypatch):
    with planner(monkeypatch) as bench:
        wanted = [Parameter("policy_path", value="another"), Parameter("control_rate_hz", value=10.0)]
        for parameter in wanted:
            result = bench.node.set_parameters([parameter])[0]
            assert not result.successful and parameter.name in result.reason
        bench.node.trigger_deactivate()
        bench.node.trigger_cleanup()
        assert all(result.successful for result in bench.node.set_parameters(wanted))
        loaded = []
        monkeypatch.setattr(
            chunk_planner, "load_policy_for", lambda profile, kind, path, *_, **__: loaded.append(path) or bench.policy
        )
        monkeypatch.setattr(type(PROFILE), "check_rate", lambda *_: None)
        bench.policy.may_end.release()
        assert bench.node.trigger_configure() == TransitionCallbackReturn.SUCCESS
        assert loaded == ["another"]


@pytest.mark.parametrize(
    ("told", "match"),
    [
        ({"step_ns": 2 * STEP_NS}, "step_ns is 50000000, the policy needs 100000000"),
        ({"state_names": ("x", "y")}, "state_names"),
        ({"action_space": "osc_pose_delta"}, "osc_pose_delta"),
        ({"step_ns": STEP_NS, "action_space": PROFILE.robot.action_space}, None),
    ],
)
def test_a_policy_of_another_rate_state_or_action_is_refused(monkeypatch, capfd, told, match):
    policy = SlowPolicy()
    policy.trained_for = told
    with planner(monkeypatch, policy, activate=False) as configured:
        assert configured == (match is None)
    assert match is None or match in capfd.readouterr().err


def test_how_far_in_the_future_a_stamp_may_lie_is_set_as_in_the_controller(bench):
    bench.say("go")
    bench.observe(0)
    bench.inference_begins()
    bench.inference_ends()
    before = len(bench.policy.instructions)
    bench.now_ns = T0_NS + 20 * STEP_NS - 2 * 10**8
    bench.observe(20, at_ns=bench.now_ns)
    assert len(bench.policy.instructions) == before, "0.2 s ahead"
    assert bench.node.set_parameters([Parameter("future_tolerance_s", value=0.3)])[0].successful
    bench.observe(20, at_ns=bench.now_ns)
    bench.inference_begins()


def test_it_says_why_it_does_not_infer(bench, capfd):
    def report(times=1):
        for _ in range(times):
            bench.node._report()
        return bench.diagnostics[-1].status[0]

    missing = next(iter(PROFILE.robot.cameras))
    bench.observe(0, only=set(PROFILE.robot.streams) - {missing})
    assert missing in report(IDLE_REPORTS - 1).message
    assert "no inference" not in capfd.readouterr().err, "at a start it takes a moment"
    report(2)
    assert f"no inference: OBSERVATION_MISSING: {missing}" in capfd.readouterr().err
    bench.observe(1)
    assert "instruction" in report().message
    bench.say("go")
    bench.observe(2)
    status = report()
    assert (status.level, status.message, status.name) == (b"\0", "ok", "chunk_planner: inference")
    bench.now_ns += 10**10
    assert "is 10.00 s old" in report().message
    bench.policy.error = PolicyError("out of memory")
    bench.inference_begins()
    bench.inference_ends()
    status = report()
    assert status.level == b"\2" and "out of memory" in status.message
