"""A recorded run is computed again bit for bit, through the messages that a bag holds."""

import dataclasses

import numpy as np
import pytest
from conftest import STEP_NS, make_chunk, make_robot

pytest.importorskip("rclpy")

from a2c2_ros.core.config import ControllerConfig
from a2c2_ros.core.controller import CorrectionLoop
from a2c2_ros.core.observation import Observation
from a2c2_ros.core.replay import Samples, replay
from a2c2_ros.core.safety import HoldPolicy, Reason, State, Verdict
from a2c2_ros.core.timing import StepTiming
from a2c2_ros.nodes.conversions import message_to_recorded, step_to_message

T0 = 1_700_000_000_000_000_000
TICKS = 600
STREAMS = ("camera", "joints")


class Head:
    """A residual that depends on everything that a head is given."""

    def __init__(self, gain):
        self.gain = gain

    def correct(self, inputs):
        seen = inputs.images["camera"].mean() / 255 + inputs.state.sum()
        return (self.gain * (seen + inputs.base_action + inputs.time_feature[0] + inputs.latent[0])).astype(np.float32)


class Clock:
    """Gives the head times that are sometimes too long."""

    def __init__(self, rng):
        self.rng, self.now, self.running = rng, 0, False

    def __call__(self):
        self.running = not self.running
        if not self.running:
            self.now += int(self.rng.choice([2_000_000, 3_141_593, 70_000_000], p=[0.5, 0.48, 0.02]))
        return self.now


@pytest.fixture(params=["delta", "position"])
def robot(request):
    hold = HoldPolicy(request.param, 3, keep=(2,), keep_default=(-1.0,))
    robot = dataclasses.replace(make_robot(step=[0.05, 0.04, None], hold=hold), reports_ready=True)
    if request.param == "delta":
        return robot
    measured = lambda values: np.append(values["joints"], np.nan)  # noqa: E731
    return dataclasses.replace(robot, measured_of=measured, measured_streams=("joints",))


def run(robot, seed):
    """A run in which everything happens: what a recorder gets of it."""
    rng = np.random.default_rng(seed)
    config = ControllerConfig(rearm_after_s=0.1, takeover_timeout_s=0.2, emergency_stop_timeout_s=0.3)
    configurations = {1: (config, Head(0.1))}
    revision = 1
    loop = CorrectionLoop(config, robot, configurations[1][1], monotonic_ns=Clock(rng))
    recorded = {name: [] for name in STREAMS}
    chunks, people, messages, commands = {}, [], [], []
    newest, values = {}, {}
    for n in range(TICKS):
        t_tick_ns = T0 + n * STEP_NS
        for name in STREAMS:
            if n % 100 not in range(60, 66) or name == "camera":
                newest[name] = t_tick_ns - int(rng.integers(0, 40_000_000))
                image = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
                values[name] = image if name == "camera" else rng.normal(size=2) * 0.1
                recorded[name].append((newest[name], values[name]))
        if n % 7 == 3 and n % 200 < 150:
            chunk = make_chunk(
                t_tick_ns - 2 * STEP_NS,
                horizon=12,
                chunk_id=n + 1,
                actions=rng.normal(size=(12, 3)) * 0.3,
                latent=rng.normal(size=4),
            )
            chunks[chunk.t_obs_ns] = chunk
            loop.install(chunk, t_tick_ns)
        if n % 150 in range(40, 55):
            command, stamp_ns = rng.normal(size=3), t_tick_ns - int(rng.integers(0, 30_000_000))
            people.append((stamp_ns, command))
            loop.take_over(command, stamp_ns, t_tick_ns)
        if n not in range(380, 400):  # so long without a signal stops the robot
            loop.emergency_stop(n in range(420, 460), t_tick_ns)
        if n == 250:
            revision = 2
            config = dataclasses.replace(config, residual_limit=0.3, correction__on_failure="hold")
            configurations[2] = (config, Head(0.2))
            loop.configure(*configurations[2])
        if n in (1, 540, 545):
            loop.latch.robot_ready(n != 540)
        if n == 300:
            loop.disable()
        if n in (2, 330, 402, 460, 550):
            loop.enable()
        if n == 500:
            loop.fault("a defect")
        if n == 510:
            loop.enable()
        stopped = loop.latch.verdict
        if n % 10 == 0 and stopped is not None and stopped.reason == Reason.NOT_FOLLOWING:
            loop.enable()
        problem = Verdict(State.HOLDING, Reason.CLOCK_STOPPED) if n in range(520, 524) else None
        step = loop.tick(t_tick_ns, Observation(dict(values), dict(newest)), problem)
        messages.append(step_to_message(step, STREAMS, StepTiming(0, 0, 0, 0), revision))
        commands.append(step.command)
    samples = {name: stored(pairs) for name, pairs in recorded.items()}
    return messages, configurations, chunks, samples, stored(people), commands


def stored(pairs):
    pairs = sorted(pairs, key=lambda pair: pair[0])
    return Samples(np.array([stamp for stamp, _ in pairs]), lambda index: pairs[index][1])


@pytest.mark.parametrize("seed", range(3))
def test_every_command_is_the_same_bit_for_bit(robot, seed):
    messages, configurations, chunks, samples, people, commands = run(robot, seed)
    steps = [message_to_recorded(message) for message in messages]
    results = list(replay(steps, configurations, robot, chunks, samples, people))
    assert not [(r.recorded.tick, r.recorded.state, r.recorded.reason, r.lacks) for r in results if not r.same]
    assert {step.state for step in steps} == set(State)
    reasons = {Reason.HEAD_LATE, Reason.TAKEOVER_ENDED, Reason.OBSERVATION_STALE, Reason.EMERGENCY_STOP_LOST}
    reasons |= {Reason.ROBOT_STOPPED, Reason.DISABLED}
    assert reasons <= {step.reason for step in steps}
    for result, command in zip(results, commands, strict=True):
        np.testing.assert_array_equal(result.step.command, command)


def test_what_was_not_recorded_is_named_and_the_rest_is_the_same(robot):
    messages, configurations, chunks, samples, people, _ = run(robot, 0)
    lost_ns = int(samples["camera"].stamps_ns[100])
    camera = samples["camera"]
    kept = np.flatnonzero(camera.stamps_ns != lost_ns)
    samples["camera"] = Samples(
        camera.stamps_ns[kept], lambda index: camera.at(int(camera.stamps_ns[kept[index]]), 0)[1]
    )
    owner = message_to_recorded(messages[20]).t_obs_ns
    del chunks[owner]
    results = list(replay(map(message_to_recorded, messages), configurations, robot, chunks, samples, people))
    assert [r.recorded.tick for r in results if "camera" in r.lacks] == [100]
    assert {r.recorded.t_obs_ns for r in results if "chunk" in r.lacks} == {owner}
    others = [r for r in results if not r.lacks]
    assert len(others) > TICKS - 20
    assert sum(not r.same for r in others) < 0.1 * TICKS


def test_another_head_is_noticed(robot):
    messages, configurations, chunks, samples, people, _ = run(robot, 1)
    configurations = {revision: (config, Head(0.11)) for revision, (config, _) in configurations.items()}
    results = list(replay(map(message_to_recorded, messages), configurations, robot, chunks, samples, people))
    assert sum(not r.same for r in results) > TICKS / 10


def test_a_revision_that_was_not_recorded_is_named(robot):
    messages, configurations, chunks, samples, people, _ = run(robot, 1)
    del configurations[2]
    results = list(replay(map(message_to_recorded, messages), configurations, robot, chunks, samples, people))
    assert {r.lacks for r in results[:250]} == {()}
    assert {r.lacks for r in results[250:]} == {("configuration",)}
