"""The state machine: what holds, how it holds, and how it goes on."""

import dataclasses

import numpy as np
import pytest
from conftest import NAMES, STEP_NS, make_chunk, make_observation, make_robot

from a2c2_ros.core.config import ControllerConfig
from a2c2_ros.core.controller import CorrectionLoop
from a2c2_ros.core.errors import ChunkError, HeadError, ObservationError, StateError
from a2c2_ros.core.health import Level, LoopHealth
from a2c2_ros.core.observation import ObservationBuffer
from a2c2_ros.core.safety import HoldPolicy, Reason, State, Verdict
from a2c2_ros.core.timing import StepTiming

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
