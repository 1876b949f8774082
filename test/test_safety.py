"""The state machine: what holds, how it holds, and how it goes on."""

import dataclasses

import numpy as np
import pytest
import yaml
from conftest import NAMES, STEP_NS, make_chunk, make_observation, make_robot

from a2c2_ros.core.chunk import ActionChunk
from a2c2_ros.core.config import ControllerConfig
from a2c2_ros.core.controller import CorrectionLoop
from a2c2_ros.core.errors import ChunkError, ConfigError, HeadError, ObservationError, StateError
from a2c2_ros.core.health import Level, LoopHealth
from a2c2_ros.core.limits import Limits
from a2c2_ros.core.observation import Observation, ObservationBuffer
from a2c2_ros.core.safety import HoldPolicy, Reason, State, Verdict
from a2c2_ros.core.timing import StepTiming
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.paths import robot_profile

T0 = 1_000_000_000
STEP = 0.125  # a power of two: sums are exact


class Arm:
    """A position loop, a chunk whose actions are all ``goal``, and where the arm is measured."""

    def __init__(self, goal=1.0, horizon=100, head=None, robot=None, **config):
        self.robot = robot or dataclasses.replace(
            make_robot(step=[STEP, STEP, None], hold=HoldPolicy("position", 3, keep=(2,), keep_default=(0.0,))),
            measured_of=lambda values: np.append(values["joints"], np.nan),
            measured_streams=("joints",),
        )
        config = {"correction__enabled": head is not None} | config
        self.loop = CorrectionLoop(ControllerConfig(**config), self.robot, head, monotonic_ns=lambda: 0)
        self.n = 0
        self.measured = np.zeros(2)
        self.goal, self.horizon = goal, horizon
        self.commands = []
        self.chunk()

    @property
    def now_ns(self):
        return T0 + self.n * STEP_NS

    def chunk(self, **changes):
        actions = np.tile([self.goal, -self.goal, 0.5], (self.horizon, 1))
        fields = {"horizon": self.horizon, "actions": actions, "chunk_id": self.n + 1} | changes
        return self.loop.install(make_chunk(self.now_ns, **fields), self.now_ns)

    def tick(self, age_steps=0, follow=True, problem=None, **ages):
        """One step; ages of single streams by name [steps], None for a stream that never delivered."""
        observation = make_observation(self.now_ns - age_steps * STEP_NS)
        observation.values["joints"][:] = self.measured
        for stream, age in ages.items():
            if age is None:
                del observation.stamps_ns[stream]
            else:
                observation.stamps_ns[stream] = self.now_ns - age * STEP_NS
        step = self.loop.tick(self.now_ns, observation, problem)
        self.n += 1
        self.commands.append(step.command)
        if step.command is not None and follow:
            self.measured = step.command[:2].astype(float)
        return step

    def ticks(self, n, **arguments):
        return [self.tick(**arguments) for _ in range(n)]


def outcome(step):
    return step.state, step.reason


def test_the_first_command_is_one_step_from_where_the_arm_is_measured():
    arm = Arm()
    arm.measured = np.array([-0.5, 0.5])
    assert arm.tick().command.tolist() == [-0.375, 0.375, 0.5]


def test_holding_goes_to_where_the_arm_was_measured_and_stays_there():
    arm = Arm()
    arm.ticks(4)
    lagging = arm.measured - 2 * STEP * np.array([1, -1])
    arm.measured = lagging.copy()
    held = arm.ticks(4, camera=10, follow=False)
    assert {outcome(step) for step in held} == {(State.HOLDING, Reason.OBSERVATION_STALE)}
    assert held[0].detail == "camera"
    assert [step.command[0] for step in held] == [0.375, 0.25, 0.25, 0.25], "a ramp within the step limit, then still"
    arm.measured = lagging - 0.1  # sags
    assert arm.tick(camera=10, follow=False).command[0] == 0.25


def test_without_a_measurement_the_last_command_is_held():
    arm = Arm()
    last = arm.ticks(3)[-1].command
    arm.measured = np.array([-0.9, 0.9])
    assert np.array_equal(arm.tick(joints=10).command, last)


class Joint:
    """The first joint of so101 and its loop, enabled; ``moves`` says where it is one period after a command."""

    def __init__(self, moves, profile="so101", goal=1.8, **config):
        self.robot = load_profile(profile).robot
        self.loop = CorrectionLoop(
            ControllerConfig(correction__enabled=False, start_state="enabled", **config), self.robot
        )
        self.step_rad = float(self.robot.limits.velocity[0]) * STEP_NS / 1e9
        self.moves = moves
        self.n, self.at = 0, 0.0
        self.commanded, self.arm, self.steps = [], [], []
        self.chunk(goal)

    @property
    def now_ns(self):
        return T0 + self.n * STEP_NS

    def chunk(self, goal):
        actions = np.zeros((60, len(self.robot.action_names)), np.float32)
        actions[:, 0], actions[:, -1] = goal, 0.5
        chunk = ActionChunk(
            self.n + 1, self.now_ns, STEP_NS, actions, self.robot.action_names, [], [], policy_id="test", planner_id="p"
        )
        self.loop.install(chunk, self.now_ns)

    def ticks(self, n, silent=()):
        for _ in range(n):
            values = {name: np.zeros(spec.shape, spec.dtype) for name, spec in self.robot.streams.items()}
            values["joint_position"][0] = self.at
            self.arm.append(self.at)
            stamps_ns = {name: self.now_ns - 10**9 * (name in silent) for name in values}
            step = self.loop.tick(self.now_ns, Observation(values, stamps_ns))
            self.steps.append(step)
            self.n += 1
            if step.command is not None:
                self.commanded.append(float(step.command[0]))
                self.at = self.moves(self)
        return self.steps[-n:]


def slow(rad_s):
    def moves(joint):
        largest = rad_s * STEP_NS / 1e9
        return joint.at + float(np.clip(joint.commanded[-1] - joint.at, -largest, largest))

    return moves


def late(steps):
    return lambda joint: joint.commanded[-1 - steps] if len(joint.commanded) > steps else joint.at


@pytest.mark.parametrize("rad_s", [0.4, 0.2, 0.0])
def test_a_stop_of_an_arm_far_behind_its_command_does_not_move_it_on(rad_s):
    joint = Joint(slow(rad_s))
    joint.ticks(round(0.3 / (1.2 - rad_s) / 0.05 * 1.2) + 1)  # farther behind than drivers lag
    assert joint.steps[-1].state == State.BASE_ONLY
    at_stop = joint.at
    joint.loop.emergency_stop(True, joint.now_ns)
    first = joint.ticks(30)[0]
    assert outcome(first) == (State.STOPPED, Reason.EMERGENCY_STOP)
    assert first.command[0] == pytest.approx(at_stop, abs=joint.step_rad)
    assert max(abs(at - at_stop) for at in joint.arm[-30:]) <= joint.step_rad


def two_drivers(folder):
    """Path of an so101 whose first joint has a driver of its own."""
    entries = yaml.safe_load(robot_profile("so101").read_text())
    names = entries["joint_states"]["names"]
    entries["more_joint_states"] = {"rest": {"topic": "rest/joint_states", "names": names[1:]}}
    entries["max_age_s"]["rest"] = entries["max_age_s"]["joint_states"]
    entries["joint_states"]["names"] = names[:1]
    (folder / "robot.yaml").write_text(yaml.safe_dump(entries))
    return str(folder / "robot.yaml")


@pytest.mark.parametrize("way", ["emergency stop", "hold"])
def test_a_silent_driver_of_other_joints_does_not_hide_a_blocked_one(way, tmp_path):
    joint = Joint(slow(0.0), two_drivers(tmp_path))
    joint.ticks(8)
    assert joint.steps[-1].state == State.BASE_ONLY
    if way == "emergency stop":
        joint.loop.emergency_stop(True, joint.now_ns)
    held = joint.ticks(10, silent=("rest",))
    reason = Reason.EMERGENCY_STOP if way == "emergency stop" else Reason.OBSERVATION_STALE
    assert held[0].reason == reason
    assert held[0].command[0] == pytest.approx(0.0, abs=joint.step_rad), "where it is, not on towards its command"
    last = joint.steps[7].command
    np.testing.assert_array_equal(held[0].command[1:], last[1:], "what is not known stays as it was commanded")


def test_the_first_command_waits_until_every_joint_is_measured(tmp_path):
    joint = Joint(slow(4.7), two_drivers(tmp_path))
    assert [step.command for step in joint.ticks(3, silent=("rest",))] == [None] * 3
    joint.loop.take_over(np.full(6, 0.5, np.float32), joint.now_ns, joint.now_ns)
    assert joint.ticks(1, silent=("rest",))[0].command is None, "nor for a person"


def test_an_arm_that_lags_as_drivers_do_stops_on_a_ramp():
    joint = Joint(late(4))  # 0.2 s
    joint.ticks(20)
    assert joint.steps[-1].state == State.BASE_ONLY
    joint.loop.disable()
    joint.ticks(10)
    steps = np.abs(np.diff(joint.commanded))
    assert steps.max() <= joint.step_rad * (1 + 1e-6) and joint.commanded[-1] < joint.commanded[19] - joint.step_rad


def test_only_the_joint_that_is_far_behind_holds_where_it_is():
    arm = Arm()
    arm.ticks(8)
    arm.measured = np.array([arm.commands[-1][0] - 0.875, arm.commands[-1][1] + 0.25])
    command = arm.tick(camera=10, follow=False).command
    assert command[0] == arm.measured[0] and command[1] == arm.commands[-2][1] + STEP


@pytest.mark.parametrize("reads", [np.nan, 1e30])
def test_a_hold_does_not_jump_to_what_is_not_believed(reads):
    arm = Arm()
    last = arm.ticks(8)[-1].command
    arm.measured = np.array([reads, last[1]])
    arm.loop.disable()
    assert arm.tick(follow=False).command[0] == last[0]


def test_an_arm_that_stands_still_is_stopped_where_it_is_until_a_person_enables():
    joint = Joint(slow(0.0))
    joint.ticks(40)
    stopped = next(step for step in joint.steps if step.state == State.STOPPED)
    assert stopped.reason == Reason.NOT_FOLLOWING
    assert 10 <= stopped.tick <= 12, "half a second of full speed"
    assert stopped.detail.startswith("shoulder_pan is commanded to 0.6") and "measured at 0" in stopped.detail
    assert stopped.command[0] == pytest.approx(0.0, abs=joint.step_rad)
    assert {outcome(step) for step in joint.steps[stopped.tick :]} == {(State.STOPPED, Reason.NOT_FOLLOWING)}
    assert joint.loop.silent
    joint.moves = slow(4.7)
    joint.loop.enable()
    joint.chunk(1.0)
    assert {step.state for step in joint.ticks(30)} == {State.BASE_ONLY} and joint.at == pytest.approx(1.0)


def test_an_arm_that_is_slower_than_its_limits_is_stopped_and_one_that_lags_or_follows_is_not():
    joint = Joint(slow(0.4))
    joint.ticks(40)
    assert outcome(joint.steps[-1]) == (State.STOPPED, Reason.NOT_FOLLOWING)
    for moves in (late(0), late(2), late(4)):  # 0, 0.1 and 0.2 s
        joint = Joint(moves)
        assert {step.state for step in joint.ticks(25)} == {State.BASE_ONLY}
        joint.chunk(-1.8)
        assert {step.state for step in joint.ticks(50)} == {State.BASE_ONLY}, "and back at full speed"


def test_a_person_may_press_the_arm_against_something_and_let_go():
    joint = Joint(slow(0.0))
    person = np.zeros(6)
    person[0], person[5] = 1.8, 0.5
    for _ in range(30):
        joint.loop.take_over(person, joint.now_ns, joint.now_ns)
        joint.ticks(1)
    assert {step.state for step in joint.steps} == {State.TAKEOVER} and joint.commanded[-1] > 1.7
    joint.ticks(6)
    assert outcome(joint.steps[-1]) == (State.HOLDING, Reason.TAKEOVER_ENDED)
    assert joint.commanded[-1] == pytest.approx(0.0, abs=joint.step_rad)
    joint.moves = slow(4.7)
    joint.chunk(0.5)
    assert {step.state for step in joint.ticks(20)} == {State.BASE_ONLY}


def test_pushed_away_in_a_hold_an_arm_goes_on():
    arm = Arm()
    arm.ticks(4)
    arm.ticks(3, camera=10, follow=False)
    arm.measured = np.array([-0.75, 0.75])
    states = [step.state for step in arm.ticks(20)]
    assert State.STOPPED not in states and states[-1] == State.BASE_ONLY


def test_the_largest_distance_from_the_command_is_typed_in_or_follows_from_the_limits():
    names = ("a", "b", "c", "d", "e")
    typed = {"b": 0.3, "c": None}
    limits = Limits.of(names, [-1] * 5, [1] * 5, [None, None, None, 0.0, 0.1], [2, 2, 2, None, 100], typed)
    np.testing.assert_allclose(limits.at(50_000_000).following, [1.0, 0.3, np.inf, np.inf, 1.0])
    crawling = Limits.of(("a",), [-1], [1], None, [0.01]).at(50_000_000)
    np.testing.assert_allclose(crawling.following, [0.04])
    assert np.isinf(Limits.of(("a",), [-1], [1]).at(50_000_000).following).all(), "a channel that may jump"
    with pytest.raises(ConfigError, match="'following' is .*, allowed is above 0"):
        Limits.of(("a",), [-1], [1], None, [1.0], {"a": 0.0})


def test_after_a_stop_the_robot_waits_for_what_was_observed_since():
    arm = Arm()
    arm.ticks(10)
    arm.loop.emergency_stop(True, arm.now_ns)
    arm.ticks(35)
    arm.loop.emergency_stop(False, arm.now_ns)
    arm.loop.enable()
    steps = arm.ticks(5)
    assert {outcome(step) for step in steps} == {(State.HOLDING, Reason.NO_CHUNK)}
    assert all(step.command is None for step in steps), "it is silent by now"
    late = make_chunk(arm.now_ns - 8 * STEP_NS, horizon=100, chunk_id=998)
    arm.loop.install(late, arm.now_ns)
    assert outcome(arm.tick()) == (State.HOLDING, Reason.NO_CHUNK), "observed before, it came after"
    fresh_ns = T0 + 45 * STEP_NS
    arm.loop.install(make_chunk(fresh_ns, horizon=100, chunk_id=999), arm.now_ns)
    step = arm.tick()
    assert step.state == State.BASE_ONLY and step.t_obs_ns == fresh_ns


def test_what_a_person_commanded_before_a_stop_does_not_count_after_it():
    arm = Arm(takeover_timeout_s=10.0)
    arm.loop.take_over(np.array([0.25, 0.25, 0.0]), arm.now_ns, arm.now_ns)
    assert arm.tick().state == State.TAKEOVER
    arm.loop.disable()
    arm.tick()
    arm.loop.enable()
    assert outcome(arm.tick()) == (State.HOLDING, Reason.NO_CHUNK)
    arm.loop.take_over(np.array([0.25, 0.25, 0.0]), arm.now_ns, arm.now_ns)
    assert arm.tick().state == State.TAKEOVER


@pytest.mark.parametrize("away", ["stop", "forget"])
def test_after_a_pause_or_a_clock_jump_old_chunks_that_come_again_are_not_executed(away):
    arm = Arm()
    arm.ticks(5)
    if away == "stop":
        list(arm.loop.stop(arm.now_ns, make_observation(arm.now_ns)))
    else:
        arm.loop.forget()
    old_ns, arm.n = arm.now_ns + STEP_NS, arm.n + 40
    for t_obs_ns in (T0, old_ns):  # before, and meanwhile
        arm.loop.install(make_chunk(t_obs_ns, horizon=100, chunk_id=50 + t_obs_ns % 7), arm.now_ns)
        assert outcome(arm.tick()) == (State.HOLDING, Reason.NO_CHUNK)
    arm.chunk()
    assert arm.ticks(2)[-1].state == State.BASE_ONLY


def test_a_chunk_of_the_first_tick_after_a_clock_jump_counts():
    arm = Arm()
    arm.loop.forget()
    arm.chunk()
    assert arm.tick().state == State.BASE_ONLY


def test_what_came_while_the_clock_was_ahead_between_two_ticks_is_forgotten():
    arm = Arm(horizon=3)
    arm.tick()
    arm.n += 400
    arm.chunk()
    arm.loop.take_over(np.zeros(3), arm.now_ns, arm.now_ns)
    arm.n -= 399
    assert arm.tick().state == State.HOLDING
    arm.chunk()
    assert arm.tick().state == State.BASE_ONLY


def test_a_chunk_that_was_too_old_stays_so_when_the_limit_is_raised():
    arm = Arm(max_chunk_age_s=0.2)
    arm.ticks(10)
    arm.loop.configure(dataclasses.replace(arm.loop.config, max_chunk_age_s=5.0), None)
    assert outcome(arm.tick()) == (State.HOLDING, Reason.CHUNK_EXPIRED)
    arm.chunk()
    assert arm.ticks(8)[-1].state == State.BASE_ONLY
    arm.loop.configure(dataclasses.replace(arm.loop.config, max_chunk_age_s=6.0), None)
    assert arm.tick().state == State.BASE_ONLY, "it was not too old"


@pytest.mark.parametrize("away", ["disable", "stop"])
def test_a_gripper_with_a_speed_limit_stays_closed_through_a_stop(away):
    robot = dataclasses.replace(Arm().robot, limits=Limits.of(NAMES, [-1] * 3, [1] * 3, [STEP, STEP, STEP]))
    arm = Arm(robot=robot)
    arm.ticks(10)
    assert arm.commands[-1][2] == 0.5, "keep_default is 0"
    if away == "disable":
        arm.loop.disable()
        assert arm.ticks(25)[-1].command is None
        arm.loop.enable()
    else:
        list(arm.loop.stop(arm.now_ns, make_observation(arm.now_ns)))
    arm.chunk()
    assert {step.command[2] for step in arm.ticks(10)} == {0.5}
    arm.loop.reset()
    arm.chunk()
    assert arm.tick().command[2] == STEP, "a new loop does not know"


def test_rearming_waits_then_starts_from_the_measured_state_without_a_jump():
    arm = Arm(rearm_after_s=0.15)
    arm.ticks(4)
    arm.ticks(3, joints=10, follow=False)
    assert arm.commands[-1][0] == 0.5, "the last command: the joints are not known"
    arm.measured = np.array([-0.25, 0.25])  # moved by hand meanwhile
    steps = arm.ticks(12, follow=False)
    assert [outcome(step) for step in steps[:3]] == [(State.HOLDING, Reason.REARMING)] * 3
    assert [step.command[0] for step in steps[:2]] == [0.5, 0.5], "0.15 s are three steps after the last bad one"
    states = [step.state for step in steps]
    first = states.index(State.BASE_ONLY)
    assert steps[first - 1].command[0] == -0.25, "it went to where it is measured first"
    assert set(states[first:]) == {State.BASE_ONLY}
    jumps = np.abs(np.diff([command[:2] for command in arm.commands], axis=0))
    assert jumps.max() <= STEP


def test_an_expired_chunk_holds_and_a_new_one_goes_on_at_once():
    arm = Arm(horizon=3)
    arm.ticks(3)
    assert outcome(arm.tick()) == (State.HOLDING, Reason.CHUNK_EXPIRED)
    arm.chunk()
    assert arm.tick().state == State.BASE_ONLY


def test_slots_long_after_their_observation_are_not_executed():
    arm = Arm(max_chunk_age_s=0.2)
    assert [step.state for step in arm.ticks(6)] == [State.BASE_ONLY] * 5 + [State.HOLDING]


def test_an_arm_outside_its_limits_is_not_moved_until_a_person_brings_it_back():
    arm = Arm()
    arm.measured = np.array([1.5, 0.0])
    step = arm.tick(follow=False)
    assert outcome(step) == (State.HOLDING, Reason.OUTSIDE_LIMITS)
    assert step.detail == f"{NAMES[0]} is at 1.5" and step.command is None
    arm.measured = np.array([1.0, 0.0])
    assert arm.tick().state == State.BASE_ONLY
    arm.loop.reset()
    arm.chunk()
    arm.measured = np.array([1.5, 0.0])
    assert outcome(arm.tick(follow=False)) == (State.HOLDING, Reason.OUTSIDE_LIMITS), "also after a new start"


def test_hardware_starts_disabled_and_simulation_enabled():
    arm = Arm(robot=make_robot())
    assert arm.tick().state == State.BASE_ONLY
    hardware = dataclasses.replace(make_robot(), simulated=False)
    arm = Arm(robot=hardware)
    step = arm.tick()
    assert (outcome(step), step.command) == ((State.STOPPED, Reason.DISABLED), None)
    arm.loop.enable()
    arm.chunk()
    assert arm.tick().state == State.BASE_ONLY
    assert Arm(robot=hardware, start_state="enabled").tick().state == State.BASE_ONLY
    assert Arm(robot=make_robot(), start_state="disabled").tick().state == State.STOPPED


def test_disabling_holds_then_goes_silent_and_enabling_starts_from_the_measured_state():
    arm = Arm(halt_steps=3)
    arm.ticks(3)
    arm.loop.disable()
    stopped = arm.ticks(8)
    assert {outcome(step) for step in stopped} == {(State.STOPPED, Reason.DISABLED)}
    assert [step.command is None for step in stopped] == [False] * 4 + [True] * 4, "one to the hold, three in place"
    assert arm.loop.silent
    arm.measured = np.array([-0.5, 0.5])
    arm.loop.enable()
    arm.chunk()
    assert arm.tick().command[:2].tolist() == [-0.375, 0.375]


def test_emergency_stop_latches():
    arm = Arm()
    arm.tick()
    arm.loop.emergency_stop(True, arm.now_ns)
    assert outcome(arm.tick()) == (State.STOPPED, Reason.EMERGENCY_STOP)
    with pytest.raises(StateError, match="pressed"):
        arm.loop.enable()
    arm.loop.emergency_stop(False, arm.now_ns)
    arm.loop.fault("something else")
    assert outcome(arm.tick()) == (State.STOPPED, Reason.EMERGENCY_STOP), "a release does not enable"
    arm.loop.enable()
    arm.chunk()
    assert arm.tick().state == State.BASE_ONLY


def test_a_lost_emergency_stop_signal_stops():
    arm = Arm(emergency_stop_timeout_s=0.1)
    for _ in range(4):
        arm.loop.emergency_stop(False, arm.now_ns)
        assert arm.tick().state == State.BASE_ONLY
    steps = arm.ticks(4)
    assert [step.state for step in steps] == [State.BASE_ONLY] * 2 + [State.STOPPED] * 2
    assert steps[-1].reason == Reason.EMERGENCY_STOP_LOST
    arm.loop.emergency_stop(False, arm.now_ns)
    assert arm.tick().state == State.STOPPED
    arm.loop.enable()
    arm.chunk()
    assert arm.tick().state == State.BASE_ONLY


def test_a_clock_that_goes_back_does_not_delay_the_notice_of_a_lost_emergency_stop_signal():
    arm = Arm(emergency_stop_timeout_s=0.1)
    arm.n = 100
    arm.loop.emergency_stop(False, arm.now_ns)
    arm.n = 0
    states = [step.state for step in arm.ticks(4)]
    assert states == [State.BASE_ONLY] * 3 + [State.STOPPED], "the time begins when the clock went back"


def test_a_fault_holds_until_it_is_acknowledged():
    arm = Arm()
    arm.tick()
    arm.loop.fault("division by zero")
    step = arm.tick()
    assert (*outcome(step), step.detail) == (State.FAULT, Reason.INTERNAL_ERROR, "division by zero")
    arm.loop.enable()
    arm.chunk()
    assert arm.tick().state == State.BASE_ONLY


def test_a_clock_that_goes_back_voids_the_chunks_but_not_the_last_command():
    arm = Arm()
    arm.ticks(3)
    arm.n = 0
    arm.loop.forget()
    step = arm.tick(problem=Verdict(State.HOLDING, Reason.CLOCK_JUMPED))
    assert outcome(step) == (State.HOLDING, Reason.CLOCK_JUMPED) and step.command is not None
    arm.ticks(3)
    assert outcome(arm.tick()) == (State.HOLDING, Reason.NO_CHUNK)
    arm.chunk()
    assert arm.tick().state == State.BASE_ONLY
    assert np.abs(np.diff([command[:2] for command in arm.commands], axis=0)).max() <= STEP


def test_one_planner_at_a_time_and_a_new_one_takes_over_when_the_old_is_used_up():
    arm = Arm(horizon=4)
    arm.loop.reset()
    arm.chunk(planner_id="a", chunk_id=1)
    arm.tick()
    with pytest.raises(ChunkError) as caught:
        arm.chunk(planner_id="b", chunk_id=1)
    assert caught.value.code == "owner" and "two planners" in str(caught.value)
    with pytest.raises(ChunkError) as caught:
        arm.chunk(planner_id="a", chunk_id=1)
    assert caught.value.code == "number"
    arm.ticks(3)
    arm.chunk(planner_id="b", chunk_id=1)
    assert arm.tick().state == State.BASE_ONLY
    assert arm.loop.chunks == {"accepted": 3, "owner": 1, "number": 1}


def test_a_hold_does_not_believe_an_impossible_measurement():
    arm = Arm()
    last = arm.ticks(3)[-1].command
    arm.measured = np.array([1e30, last[1]])
    arm.loop.disable()
    assert np.array_equal(arm.tick(follow=False).command, last)


def test_a_sample_from_the_future_is_refused_and_does_not_block_its_stream():
    buffer = ObservationBuffer(make_robot().streams)
    with pytest.raises(ObservationError, match="future"):
        buffer.put("joints", T0 + 2, np.zeros(2), latest_ns=T0 + 1)
    assert buffer.put("joints", T0, np.zeros(2), latest_ns=T0 + 1)


class Head:
    def __init__(self, residual=(0.0, 0.0, 0.0), error=None):
        self.residual, self.error, self.calls = np.array(residual, np.float32), error, 0

    def correct(self, inputs):
        self.calls += 1
        if self.error is not None:
            raise self.error
        return self.residual


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (Head([np.nan, 0, 0]), Reason.HEAD_NOT_FINITE),
        (Head([0, np.inf, 0]), Reason.HEAD_NOT_FINITE),
        (Head([0, -np.inf, 0]), Reason.HEAD_NOT_FINITE),
        (Head([9, 0, 0]), Reason.RESIDUAL_TOO_LARGE),
        (Head([0, -9, 0]), Reason.RESIDUAL_TOO_LARGE),
        (Head(error=HeadError("out of memory")), Reason.HEAD_FAILED),
    ],
)
def test_a_failing_head_leaves_the_base_action_or_holds_as_the_parameter_says(head, reason):
    assert outcome(Arm(head=head).tick()) == (State.BASE_ONLY, reason)
    arm = Arm(head=head, correction__on_failure="hold")
    arm.loop.configure(dataclasses.replace(arm.loop.config, correction__enabled=False), head)
    arm.tick()
    arm.loop.configure(dataclasses.replace(arm.loop.config, correction__enabled=True), head)
    steps = []
    for _ in range(5):
        arm.measured = arm.measured - 0.01  # sags a little below what is commanded
        steps.append(arm.tick())
    assert {outcome(step) for step in steps} == {(State.HOLDING, reason)}
    assert len({step.command.tobytes() for step in steps}) == 1, "the hold does not follow the measurement"


def test_a_late_head_rests_and_is_tried_again():
    head = Head([0.1, 0, 0])
    arm = Arm(head=head, correction__deadline_s=0.01, correction__retry_after_s=0.1)
    times = iter(range(0, 10**9, 20_000_000))
    arm.loop._monotonic_ns = lambda: next(times)
    reasons = [arm.tick().reason for _ in range(4)]
    assert reasons == [Reason.HEAD_LATE] * 4
    assert head.calls == 2, "at steps 0 and 3: it rests for 0.1 s from its end"
    arm.ticks(2)
    arm.loop._monotonic_ns = iter([0, 200_000_000]).__next__
    step = arm.tick()
    assert outcome(step) == (State.HOLDING, Reason.OBSERVATION_STALE), "too old when the head was done"
    lockstep = Arm(head=head, correction__deadline_s=0.01, lockstep=True)
    lockstep.loop._monotonic_ns = lambda: next(times)
    assert lockstep.tick().state == State.RUNNING, "in lockstep a result does not depend on the machine"


def test_diagnostics_say_what_is_wrong():
    config = ControllerConfig(control_rate_hz=20.0, diagnostics__period_error_s=0.002)
    health = LoopHealth(("camera", "joints"))
    arm = Arm(horizon=3)

    def report():
        return {s.name: s for s in health.report(config, 1.0, {"camera": 30}, {"camera": 2}, arm.loop.chunks)}

    assert report()["timing"].level == Level.ERROR, "no tick at all"
    for step in arm.ticks(3):
        health.add(step, StepTiming(1_000_000, 100_000, 300_000, 0))
    lines = report()
    assert lines["timing"].level == Level.OK and lines["timing"].values["period_error p99 [ms]"] == "1.000"
    assert lines["timing"].values["rate [Hz]"] == "3.00"
    assert lines["observations"].values["camera.received"] == "30"
    assert lines["observations"].values["camera.refused"] == "2"
    assert lines["chunk"].values["accepted"] == "1" and lines["chunk"].values["slot"] == "2"
    assert lines["chunk"].values["base change at seams max"] == "none", "there was one chunk"
    assert float(lines["chunk"].values["command change between seams max"]) > 0.0
    assert lines["state"].level == Level.WARN, "every step was limited"
    for step in arm.ticks(2, camera=10):
        health.add(step, StepTiming(5_000_000, 100_000, 0, 3))
    lines = report()
    assert lines["timing"].message == "6 ticks missed; period error"
    assert lines["observations"].message == "camera: OBSERVATION_STALE"
    assert lines["state"].message == "HOLDING: OBSERVATION_STALE"
    assert lines["state"].values["ticks HOLDING"] == "2" and lines["state"].values["ticks BASE_ONLY"] == "3"
    arm.loop.emergency_stop(True, arm.now_ns)
    health.add(arm.tick(), StepTiming(0, 0, 0, 0))
    assert report()["state"].level == Level.ERROR


def state_line(arm):
    health = LoopHealth(("camera", "joints"))
    health.add(arm.tick(), StepTiming(0, 0, 0, 0))
    return health.report(ControllerConfig(), 1.0, {}, {}, {})[-1]


def test_diagnostics_call_what_only_a_person_ends_an_error_unless_a_person_began_it():
    arm = Arm()
    arm.loop.fault("division by zero")
    assert (state_line(arm).level, state_line(arm).message) == (Level.ERROR, "FAULT: INTERNAL_ERROR")
    arm = Arm(emergency_stop_timeout_s=0.1)
    arm.ticks(3)
    assert (state_line(arm).level, state_line(arm).message) == (Level.ERROR, "STOPPED: EMERGENCY_STOP_LOST")
    arm = Arm()
    arm.loop.disable()
    assert state_line(arm).level == Level.OK


@pytest.mark.parametrize(
    ("head_ms", "limit_s", "message"),
    [(24, 0.0, "ok"), (26, 0.0, "head is slow"), (26, 0.03, "ok"), (31, 0.03, "head is slow")],
)
def test_diagnostics_say_that_the_head_is_slow_by_the_parameter_or_half_a_period(head_ms, limit_s, message):
    arm = Arm(head=Head())
    arm.loop._monotonic_ns = iter([0, head_ms * 1_000_000]).__next__
    health = LoopHealth(("camera", "joints"))
    health.add(arm.tick(), StepTiming(0, 0, 0, 0))
    config = ControllerConfig(diagnostics__head_time_s=limit_s)
    assert health.report(config, 1.0, {}, {}, {})[0].message == message
