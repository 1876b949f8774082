"""A person's commands: who is executed when, and how the policy takes over again."""

import dataclasses

import numpy as np
import pytest
from conftest import STEP_NS, make_chunk
from test_safety import STEP, Arm, outcome

from a2c2_ros.core.errors import ObservationError
from a2c2_ros.core.safety import Reason, State

TIMEOUT_STEPS = 4  # takeover_timeout_s at the control period of the tests
GOAL = np.array([-0.25, 0.25, -1.0])


@pytest.fixture
def arm():
    return Arm(takeover_timeout_s=TIMEOUT_STEPS * STEP_NS / 1e9)


def take_over(arm, command=GOAL, age_steps=0):
    arm.loop.take_over(np.asarray(command, float), arm.now_ns - age_steps * STEP_NS, arm.now_ns)


def drive(arm, n, command=GOAL, **arguments):
    """n steps with a person's command in each."""
    steps = []
    for _ in range(n):
        take_over(arm, command)
        steps.append(arm.tick(**arguments))
    return steps


def test_a_persons_command_is_executed_within_the_limits(arm):
    arm.ticks(2)
    before = arm.commands[-1]
    steps = drive(arm, 8)
    assert {s.state for s in steps} == {State.TAKEOVER}
    assert np.abs(np.diff([before, *(s.command for s in steps)], axis=0))[:, :2].max() <= STEP
    np.testing.assert_array_equal(steps[-1].command, GOAL.astype(np.float32))


def test_the_record_has_the_slot_that_was_not_executed(arm):
    step = drive(arm, 3)[-1]
    assert (step.slot, step.base_action[0], step.residual.any()) == (2, 1.0, False)
    assert step.takeover_age_ns == 0


def test_without_a_chunk_a_person_can_still_drive(arm):
    arm.loop.reset()
    assert [s.state for s in drive(arm, 2)] == [State.TAKEOVER] * 2


def test_after_letting_go_the_policy_waits_for_what_was_observed_since(arm):
    arm.ticks(2)
    drive(arm, 8)
    steps = arm.ticks(TIMEOUT_STEPS + 3)
    assert [s.state for s in steps[:TIMEOUT_STEPS]] == [State.TAKEOVER] * TIMEOUT_STEPS
    assert {outcome(s) for s in steps[TIMEOUT_STEPS:]} == {(State.HOLDING, Reason.TAKEOVER_ENDED)}
    np.testing.assert_array_equal(steps[-1].command[:2], GOAL[:2].astype(np.float32))
    arm.chunk()
    assert arm.ticks(3)[-1].state == State.BASE_ONLY


def test_a_chunk_of_before_that_comes_late_does_not_count(arm):
    arm.ticks(2)
    observed_ns = arm.now_ns
    drive(arm, 4)
    arm.ticks(TIMEOUT_STEPS)
    actions = np.tile([1.0, -1.0, 0.5], (100, 1))
    arm.loop.install(make_chunk(observed_ns, horizon=100, actions=actions, chunk_id=99), arm.now_ns)
    assert outcome(arm.tick()) == (State.HOLDING, Reason.TAKEOVER_ENDED)


def test_an_emergency_stop_is_above_a_person(arm):
    arm.ticks(2)
    arm.loop.emergency_stop(True, arm.now_ns)
    assert {outcome(s) for s in drive(arm, 3)} == {(State.STOPPED, Reason.EMERGENCY_STOP)}


def test_a_disabled_robot_stays_so(arm):
    arm.loop.disable()
    assert drive(arm, 1)[0].state == State.STOPPED


def test_a_blind_arm_is_not_driven(arm):
    arm.ticks(2)
    steps = drive(arm, 2, joints=100)
    assert {outcome(s) for s in steps} == {(State.HOLDING, Reason.OBSERVATION_STALE)}


@pytest.mark.parametrize("command", [[0.0, 0.0], [np.nan, 0.0, 0.0], [np.inf, 0.0, 0.0]])
def test_what_is_no_command_is_refused(arm, command):
    arm.ticks(2)
    with pytest.raises(ObservationError, match="allowed are 3 finite values"):
        take_over(arm, command)
    assert arm.tick().state == State.BASE_ONLY


def test_a_command_of_the_future_is_refused_and_an_old_one_does_not_count(arm):
    arm.ticks(TIMEOUT_STEPS + 2)
    with pytest.raises(ObservationError, match="synchronised"):
        take_over(arm, age_steps=-100)
    take_over(arm, age_steps=TIMEOUT_STEPS + 1)
    assert arm.tick().state == State.BASE_ONLY


def test_a_command_that_has_timed_out_never_counts_again(arm):
    drive(arm, 2)
    arm.chunk()
    arm.ticks(TIMEOUT_STEPS + 2)
    arm.loop.configure(dataclasses.replace(arm.loop.config, takeover_timeout_s=10.0), None)
    assert State.TAKEOVER not in {s.state for s in arm.ticks(3)}
    drive(arm, 1)
    assert arm.ticks(30)[-1].state == State.TAKEOVER


def test_of_two_commands_the_newer_counts(arm):
    arm.ticks(3)
    take_over(arm, age_steps=1)
    take_over(arm, [1.0, 1.0, 1.0], age_steps=2)
    assert arm.tick().command[2] == GOAL[2]


def test_the_clock_going_back_ends_it(arm):
    drive(arm, 2)
    arm.loop.forget()
    assert arm.tick().state == State.HOLDING


def test_the_rest_of_a_chunk_is_within_the_limits(arm):
    step = arm.tick()
    rest = arm.loop.rest_of_chunk(step)
    assert rest.shape == (99, 3)
    np.testing.assert_array_equal(rest[:2, 0], [2 * STEP, 3 * STEP])
    assert rest[-1].tolist() == [1.0, -1.0, 0.5]
    np.testing.assert_array_equal(arm.tick().command, rest[0])


def test_a_hold_has_no_rest(arm):
    arm.ticks(2)
    assert arm.loop.rest_of_chunk(arm.tick(joints=100)).shape == (0, 3)
