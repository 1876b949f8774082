"""How chunks follow each other: stop and wait, real-time chunking in both forms, and what it goes on from."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import NAMES, STEP_NS, make_chunk, make_observation, make_robot
from hypothesis import given, settings
from hypothesis import strategies as st

from a2c2_ros.core.config import ControllerConfig, PlannerConfig
from a2c2_ros.core.controller import CorrectionLoop
from a2c2_ros.core.errors import ChunkError, ConfigError, PolicyError
from a2c2_ros.core.planner import PlannerSchedule, leftover
from a2c2_ros.core.safety import Reason, State
from a2c2_ros.evaluation.methods import METHODS
from a2c2_ros.evaluation.rollout import run_episode
from a2c2_ros.policies.base import Continuation, PolicyOutput

T0 = 1_000_000_000
START_NS = 50_000_000


@st.composite
def timings(draw):
    horizon = draw(st.integers(2, 30))
    delay = draw(st.integers(0, horizon // 2))
    execution = draw(st.integers(max(1, delay), horizon - delay))
    return {"horizon": horizon, "execution_horizon": execution, "inference_delay": delay}


class BlindEnv:
    """The joints tell the step; images that were not looked at are white."""

    instruction = "count"

    def __init__(self):
        self.commands, self.looked = [], [True]

    def reset(self, initial_state, seed):
        return self._observe(True)

    def step(self, action, look=True):
        self.commands.append(action.copy())
        self.looked.append(look)
        return self._observe(look), False

    def _observe(self, look):
        image = np.full((4, 4, 3), len(self.commands) % 200 if look else 255, np.uint8)
        return {"camera": image, "joints": np.array([len(self.commands), 0.0])}


class NumberingPolicy:
    """Action k of chunk n is (n, k, 0) / 1000. Keeps what it was given."""

    policy_id = "numbers"

    def __init__(self, horizon):
        self.horizon = horizon
        self.observed, self.images, self.continuations, self.seeds = [], [], [], []

    def predict(self, observation, instruction, *, seed, continuation=None):
        actions = np.zeros((self.horizon, len(NAMES)), np.float32)
        actions[:, 0] = len(self.observed) / 1000
        actions[:, 1] = np.arange(self.horizon) / 1000
        self.observed.append(int(observation["state"][0]))
        self.images.append(int(observation["camera"].max()))
        self.continuations.append(continuation)
        self.seeds.append(seed)
        return PolicyOutput(actions, np.zeros(1, np.float32), np.zeros(1, np.float32))


class HalfHead:
    """Adds a half to the first channel."""

    def correct(self, inputs):
        return np.array([0.5, 0.0, 0.0], np.float32)


def roll_out(config, steps=60, head=None, watched=True):
    """(environment, policy, control steps)"""
    env, policy, seen = BlindEnv(), NumberingPolicy(config.horizon), []
    loop = CorrectionLoop(ControllerConfig(correction__enabled=head is not None, lockstep=True), make_robot(), head)
    on_step = (lambda step, observation: seen.append(step)) if watched else None
    run_episode(env, make_robot(), policy, loop, config, initial_state=0, seed=0, max_steps=steps, on_step=on_step)
    return env, policy, seen


def numbers(steps):
    """(chunk, slot) of every step that executed an action, None where the robot held."""
    pairs = [tuple(int(round(1000 * float(x))) for x in s.base_action[:2]) for s in steps]
    return [pair if s.state is State.BASE_ONLY else None for pair, s in zip(pairs, steps)]


# ---- stop and wait


def stop_and_wait(execution, delay, steps):
    """The reference: execute e actions of a chunk, stand still for d steps, and so on."""
    executed, chunk = [], 0
    while len(executed) < steps:
        executed += [(chunk, slot) for slot in range(execution)]
        executed += [None] * delay
        chunk += 1
    return executed[:steps]


@settings(max_examples=30, deadline=None)
@given(timings())
def test_synchronous_execution_is_stop_and_wait(timing):
    config = PlannerConfig(chunking="synchronous", **timing)
    _, policy, steps = roll_out(config)
    execution, delay = config.execution_horizon, config.inference_delay
    assert numbers(steps) == stop_and_wait(execution, delay, 60)
    assert policy.observed == [0, *range(execution, 60, execution + delay)], "asked when the e slots are executed"
    held = [s for s in steps if s.state is State.HOLDING]
    assert all(not s.command[:2].any() for s in held), "the robot stands still"
    assert not any(policy.continuations)


def test_synchronous_waits_as_long_as_the_jitter_says():
    timing = {"horizon": 12, "execution_horizon": 5, "inference_delay": 3, "inference_delay_jitter": 2}
    _, policy, steps = roll_out(PlannerConfig(chunking="synchronous", **timing), steps=200)
    waits = np.diff(policy.observed[1:]) - 5
    assert set(waits) == {1, 2, 3, 4, 5}, waits
    expected = [item for chunk, wait in enumerate(waits) for item in [(chunk, k) for k in range(5)] + [None] * wait]
    assert numbers(steps)[: len(expected)] == expected


def test_synchronous_chunk_starts_when_it_is_published_unless_its_observation_is_too_old():
    schedule = PlannerSchedule(
        PlannerConfig(chunking="synchronous", horizon=8, execution_horizon=4, inference_delay=2, seed=0)
    )
    schedule.next_request(T0)
    first = schedule.release(make_chunk(T0), T0)
    assert (first.t_obs_ns, first.horizon) == (T0, 4)
    assert schedule.next_request(T0 + 3 * STEP_NS) is None
    assert schedule.next_request(T0 + 4 * STEP_NS).t_due_ns == T0 + 6 * STEP_NS
    late = schedule.release(make_chunk(T0 + 4 * STEP_NS, chunk_id=2), T0 + 7 * STEP_NS + 9)
    assert late.t_obs_ns == T0 + 7 * STEP_NS + 9, "the inference took longer: the robot stood still until now"
    assert schedule.next_request(T0 + 7 * STEP_NS) is None, "an observation from just before the publication"
    assert schedule.next_request(late.t_end_ns - 1) is None
    third = schedule.next_request(late.t_end_ns)
    assert third.sequence == 2
    now_ns = third.t_obs_ns + 8 * STEP_NS
    old = schedule.release(make_chunk(third.t_obs_ns, chunk_id=3), now_ns)
    assert old.t_obs_ns == third.t_obs_ns
    with pytest.raises(ChunkError, match="used up"):
        CorrectionLoop(ControllerConfig(correction__enabled=False), make_robot()).install(old, now_ns)
    assert schedule.wants(now_ns), "and the planner asks again"


def test_synchronous_answers_a_new_instruction_when_the_robot_stands():
    schedule = PlannerSchedule(
        PlannerConfig(chunking="synchronous", horizon=8, execution_horizon=4, inference_delay=2, seed=0)
    )
    schedule.next_request(T0)
    schedule.release(make_chunk(T0), T0)
    schedule.invalidate()
    assert not schedule.wants(T0 + STEP_NS), "the robot still moves"
    assert schedule.next_request(T0 + 4 * STEP_NS).t_due_ns == T0 + 6 * STEP_NS
    schedule.invalidate()
    assert schedule.next_request(T0 + 5 * STEP_NS).t_due_ns == T0 + 7 * STEP_NS


# ---- a person takes over


class Driven:
    """Planner and loop with a person who commands for a while; observations and ticks are one control step apart."""

    def __init__(self, inference_steps, **config):
        self.config = PlannerConfig(horizon=50, **config)
        self.schedule = PlannerSchedule(self.config)
        self.loop = CorrectionLoop(ControllerConfig(correction__enabled=False), make_robot())
        self.inference_steps = inference_steps
        self.asked, self.steps, self.observed = [], [], {}  # observed: of every chunk, by its number

    def run(self, steps, driven):
        for n in range(steps):
            now_ns = T0 + n * STEP_NS
            if n in driven:
                self.schedule.replan(now_ns + self.config.takeover_timeout_ns)
                self.loop.take_over(np.zeros(3), now_ns, now_ns)
            self._publish(n, now_ns)
            if self.schedule.next_request(now_ns) is not None:
                self.asked.append(n)
                self._publish(n, now_ns)
            self.steps.append(self.loop.tick(now_ns, make_observation(now_ns)))
        return self

    def _publish(self, n, now_ns):
        flying = self.schedule.in_flight
        if flying is None or n < self.asked[-1] + self.inference_steps or now_ns < flying.t_due_ns:
            return
        number = len(self.asked)
        self.observed[number] = self.asked[-1]
        chunk = self.schedule.release(make_chunk(flying.t_obs_ns, horizon=50, chunk_id=number), now_ns)
        self.loop.install(chunk, now_ns)

    def executed(self):
        """(step, step at which its chunk was observed)"""
        return [(n, self.observed[s.chunk_id]) for n, s in enumerate(self.steps) if s.state is State.BASE_ONLY]


TIMEOUT_STEPS = 4  # takeover_timeout_s


@pytest.mark.parametrize("driven", [range(20, 38), range(20, 32), range(14, 50)])
def test_synchronous_chunk_of_a_takeover_is_not_executed(driven):
    rig = Driven(12, chunking="synchronous", execution_horizon=20, inference_delay=0).run(120, driven)
    over = driven[-1] + TIMEOUT_STEPS
    afterwards = [(n, observed) for n, observed in rig.executed() if n > driven[0]]
    assert afterwards and min(observed for _, observed in afterwards) >= over
    assert min(n for n, _ in afterwards) <= over + 2 * 12 + 1, "what was in flight, then what was observed since"


@pytest.mark.parametrize("chunking", ["asynchronous", "rtc", "synchronous"])
@pytest.mark.parametrize(("inference_steps", "delay"), [(0, 0), (1, 0), (3, 5)])
def test_after_a_takeover_the_next_inference_does_not_wait_for_the_last_chunk(chunking, inference_steps, delay):
    driven = range(50, 110)
    config = {"chunking": chunking, "execution_horizon": 40, "inference_delay": delay}
    rig = Driven(inference_steps, **config).run(200, driven)
    over = driven[-1] + TIMEOUT_STEPS
    first = min(n for n in rig.asked if n >= over)
    assert first <= over + max(inference_steps, delay), "at once, or after what is in flight"
    goes_on = min(n for n, _ in rig.executed() if n > driven[0])
    assert goes_on <= first + max(inference_steps, delay) + 1
    assert rig.steps[goes_on - 1].reason is Reason.TAKEOVER_ENDED or goes_on == over + 1


def test_a_steady_takeover_neither_starves_nor_floods_the_policy():
    rig = Driven(1, execution_horizon=10, inference_delay=0).run(100, range(5, 100))
    assert rig.asked == list(range(0, 100, 10))
    assert {s.state for s in rig.steps[5:]} == {State.TAKEOVER} and {s.slot for s in rig.steps[5:]} == set(range(1, 11))


def test_a_takeover_is_forgotten_with_the_clock_it_was_in():
    schedule = PlannerSchedule(PlannerConfig(chunking="synchronous", horizon=8, execution_horizon=4, inference_delay=0))
    schedule.replan(T0 + 100 * STEP_NS)
    schedule.reset()
    schedule.next_request(T0)
    assert schedule.release(make_chunk(T0), T0 + STEP_NS).t_obs_ns == T0 + STEP_NS, "the robot stood still"


# ---- changing it


def test_chunking_may_change_between_two_chunks():
    config = PlannerConfig(horizon=8, execution_horizon=4, inference_delay=2)
    schedule = PlannerSchedule(config)
    schedule.next_request(T0)
    assert schedule.release(make_chunk(T0), T0).horizon == 8
    schedule.configure(dataclasses.replace(config, chunking="synchronous"))
    assert schedule.next_request(T0 + 7 * STEP_NS) is None, "the whole chunk is executed before the robot stands"
    assert schedule.next_request(T0 + 8 * STEP_NS) is not None
    stopped = schedule.release(make_chunk(T0 + 8 * STEP_NS, chunk_id=2), T0 + 10 * STEP_NS)
    assert stopped.horizon == 4
    schedule.configure(dataclasses.replace(config, chunking="rtc"))
    assert schedule.next_request(T0 + 13 * STEP_NS) is None
    request = schedule.next_request(T0 + 14 * STEP_NS)
    assert not len(request.known), "the synchronous chunk is used up"
    assert request.t_due_ns == T0 + 16 * STEP_NS
    schedule.release(make_chunk(T0 + 14 * STEP_NS, chunk_id=3), T0 + 16 * STEP_NS)
    assert len(schedule.next_request(T0 + 18 * STEP_NS).known) == 4


# ---- what the next chunk goes on from


def test_leftover_is_found_by_time():
    chunk = make_chunk(T0, horizon=8)
    assert leftover(None, T0).shape[0] == 0
    for t_ns, slot in ((T0, 0), (T0 + 3 * STEP_NS, 3), (T0 + 3 * STEP_NS + STEP_NS - 1, 3), (T0 + 7 * STEP_NS, 7)):
        assert np.array_equal(leftover(chunk, t_ns), chunk.actions[slot:])
    for t_ns in (T0 - 1, T0 + 8 * STEP_NS, T0 + 100 * STEP_NS):
        assert len(leftover(chunk, t_ns)) == 0


@settings(max_examples=30, deadline=None)
@given(timings(), st.sampled_from(["rtc", "tt_rtc"]), st.booleans())
def test_the_policy_is_told_what_is_executed_until_its_chunk_is_there(timing, mode, corrected):
    config = PlannerConfig(chunking=mode, **timing)
    _, policy, steps = roll_out(config, head=HalfHead() if corrected else None)
    executed = np.array([s.base_action for s in steps])
    if corrected:
        assert np.allclose([s.command[0] for s in steps], executed[:, 0] + 0.5)
    execution, delay = config.execution_horizon, config.inference_delay
    assert policy.observed == list(range(0, 60, execution))
    for n, (start, continuation) in enumerate(zip(policy.observed, policy.continuations)):
        if n == 0 or execution == config.horizon:
            assert continuation is None
            continue
        assert (continuation.mode, continuation.delay_steps) == (mode, delay)
        known = [((n - 1) / 1000, k / 1000, 0.0) for k in range(execution, config.horizon)]
        assert np.allclose(continuation.actions, known, atol=1e-7)
        until = min(start + delay, 60)
        assert np.array_equal(executed[start:until], continuation.actions[: until - start]), "base actions"


def test_jitter_leaves_the_expected_delay():
    timing = {"horizon": 12, "execution_horizon": 6, "inference_delay": 3, "inference_delay_jitter": 2}
    _, policy, steps = roll_out(PlannerConfig(chunking="rtc", **timing), steps=200)
    assert {c.delay_steps for c in policy.continuations[1:]} == {3}
    assert {len(c.actions) for c in policy.continuations[1:]} == {6}
    assert {s.chunk_delay_steps for s in steps if s.chunk_id > 1} == {1, 2, 3, 4, 5}


def test_a_shorter_leftover_shortens_the_delay():
    schedule = PlannerSchedule(PlannerConfig(chunking="rtc", horizon=8, execution_horizon=4, inference_delay=3))
    assert Continuation.of(schedule.next_request(T0)) is None
    schedule.release(make_chunk(T0), T0)
    continuation = Continuation.of(schedule.next_request(T0 + 6 * STEP_NS))  # observations were missing
    assert (len(continuation.actions), continuation.delay_steps) == (2, 2)
    schedule.failed(T0 + 6 * STEP_NS)
    assert Continuation.of(schedule.next_request(T0 + 10 * STEP_NS)) is None
    schedule.reset()
    assert Continuation.of(schedule.next_request(T0 + STEP_NS)) is None, "after a reset there is no previous chunk"


@pytest.mark.parametrize("mode", ["rtc", "tt_rtc"])
def test_after_a_takeover_or_a_stop_nothing_is_gone_on_with(mode):
    schedule = PlannerSchedule(PlannerConfig(chunking=mode, horizon=8, execution_horizon=4, inference_delay=3))
    schedule.next_request(T0)
    schedule.release(make_chunk(T0), T0)
    schedule.replan(T0 + 2 * STEP_NS)
    request = schedule.next_request(T0 + 2 * STEP_NS)
    assert Continuation.of(request) is None, "the robot stands where it was stopped"
    schedule.release(make_chunk(request.t_obs_ns, chunk_id=2), request.t_obs_ns)
    assert len(Continuation.of(schedule.next_request(T0 + 6 * STEP_NS)).actions) == 4


def test_the_measured_delay_counts_where_none_is_injected():
    schedule = PlannerSchedule(PlannerConfig(chunking="rtc", horizon=8, execution_horizon=4, inference_delay=1))
    schedule.next_request(T0)
    schedule.release(make_chunk(T0), T0)
    for n, (measured, expected) in enumerate([(3, 3), (0, 1), (9, 4)], start=1):
        schedule.expect_delay(measured)
        request = schedule.next_request(T0 + 4 * n * STEP_NS)
        assert Continuation.of(request).delay_steps == expected
        schedule.release(make_chunk(request.t_obs_ns, chunk_id=n + 1), request.t_obs_ns)


def test_after_a_new_instruction_only_what_will_be_executed_is_known():
    schedule = PlannerSchedule(PlannerConfig(chunking="rtc", horizon=8, execution_horizon=4, inference_delay=3))
    schedule.next_request(T0)
    schedule.release(make_chunk(T0), T0)
    schedule.invalidate()
    request = schedule.next_request(T0 + STEP_NS)
    assert np.array_equal(request.known, make_chunk(T0).actions[1:4])
    schedule.release(make_chunk(T0 + STEP_NS, chunk_id=2), T0 + 4 * STEP_NS)
    assert len(schedule.next_request(T0 + 5 * STEP_NS).known) == 4


def test_every_chunk_has_noise_of_its_own_which_the_seed_of_the_run_repeats():
    def seeds(seed):
        config = PlannerConfig(horizon=8, execution_horizon=4, inference_delay=2, seed=seed)
        return roll_out(config, watched=False)[1].seeds

    first, other = seeds(0), seeds(1)
    assert len(first) == len(other) == 15
    assert len({*first, *other}) == 30
    assert seeds(0) == first and seeds(1) == other


def test_continuation_refuses_a_delay_that_it_has_no_actions_for():
    for delay in (-1, 4):
        with pytest.raises(PolicyError, match=f"{delay}, allowed is 0 to the 3"):
            Continuation(np.zeros((3, 2), np.float32), delay, "rtc")


def test_chunking_is_checked():
    assert {m.chunking for m in METHODS.values()} == {"asynchronous", "synchronous", "rtc", "tt_rtc"}
    with pytest.raises(ConfigError, match="chunking is 'fast'.*asynchronous.*tt_rtc"):
        PlannerConfig(chunking="fast")
    for chunking in ("rtc", "tt_rtc"):
        with pytest.raises(ConfigError, match=r"e \+ d <= H"):
            PlannerConfig(chunking=chunking, horizon=8, execution_horizon=6, inference_delay=3)


# ---- images that nobody reads


@settings(max_examples=30, deadline=None)
@given(timings(), st.sampled_from([m.chunking for m in METHODS.values()]), st.integers(0, 3))
def test_images_that_nobody_reads_are_not_rendered_and_change_nothing(timing, chunking, jitter):
    horizon, execution, delay = timing.values()
    jitter = min(jitter, delay, execution - delay, horizon - execution - delay)
    config = PlannerConfig(chunking=chunking, inference_delay_jitter=jitter, **timing)
    env, policy, _ = roll_out(config, watched=False)
    watched_env, watched_policy, _ = roll_out(config, watched=True)
    assert watched_env.looked == [True] * 61
    assert policy.images == watched_policy.images and 255 not in policy.images
    assert np.array_equal(env.commands, watched_env.commands)
    asked = set(policy.observed)
    assert {n for n, looked in enumerate(env.looked[:60]) if looked} == asked


def test_a_head_is_always_shown_the_images():
    class Watchful(HalfHead):
        def correct(self, inputs):
            assert inputs.images["camera"].max() < 255
            return super().correct(inputs)

    env, _, _ = roll_out(
        PlannerConfig(horizon=8, execution_horizon=4, inference_delay=2), head=Watchful(), watched=False
    )
    assert env.looked == [True] * 61


def test_wants_changes_nothing():
    schedule = PlannerSchedule(PlannerConfig(horizon=8, execution_horizon=4, inference_delay=4))
    assert schedule.wants(T0) and schedule.wants(T0)
    schedule.next_request(T0)
    schedule.release(make_chunk(T0), T0)
    assert not schedule.wants(T0 + 3 * STEP_NS)
    schedule.next_request(T0 + 4 * STEP_NS)
    assert not schedule.wants(T0 + 7 * STEP_NS), "its chunk is not due"
    assert schedule.wants(T0 + 8 * STEP_NS), "its chunk is published by then"
    assert schedule.next_request(T0 + 8 * STEP_NS) is None, "but it was not"
    assert schedule.in_flight.t_obs_ns == T0 + 4 * STEP_NS


def test_tick_of_a_synchronous_chunk_follows_the_slot_rule():
    """Between its publication and the next tick no slot is lost."""
    schedule = PlannerSchedule(PlannerConfig(chunking="synchronous", horizon=8, execution_horizon=4, inference_delay=2))
    loop = CorrectionLoop(ControllerConfig(correction__enabled=False), make_robot())
    schedule.next_request(T0)
    published_ns = T0 + STEP_NS // 3
    loop.install(schedule.release(make_chunk(T0), published_ns), published_ns)
    ticks = [loop.tick(T0 + n * STEP_NS, make_observation(T0 + n * STEP_NS)) for n in range(1, 7)]
    assert [t.slot for t in ticks] == [0, 1, 2, 3, -1, -1]


# ---- the expert


def test_the_expert_solves_a_task_in_the_same_record():
    pytest.importorskip("libero")
    from a2c2_ros.evaluation.rollout import run_expert_episode
    from a2c2_ros.sim.libero_env import LiberoEnv

    with LiberoEnv(0, render=False) as env:
        episode = run_expert_episode(env, initial_state=0, seed=0, max_steps=220)
        assert episode.success and 40 < episode.steps < 220
        assert (episode.inference_ms, episode.head_ms, episode.states) == ([], [], {})
        assert not run_expert_episode(env, initial_state=0, seed=0, max_steps=10).success


# ---- the node


def test_a_person_s_command_counts_from_its_stamp_but_not_from_the_future():
    pytest.importorskip("rclpy")
    from sensor_msgs.msg import JointState

    from a2c2_ros.nodes.chunk_planner import ChunkPlanner
    from a2c2_ros.nodes.conversions import to_time

    voided = []
    clock = SimpleNamespace(now=lambda: SimpleNamespace(nanoseconds=T0))
    planner = SimpleNamespace(
        get_clock=lambda: clock,
        _settings=SimpleNamespace(value=PlannerConfig(takeover_timeout_s=0.3)),
        _schedule=SimpleNamespace(replan=voided.append),
    )
    for stamp_ns in (T0 - STEP_NS, T0 + STEP_NS, T0 + 3600 * 10**9):
        message = JointState()
        message.header.stamp = to_time(stamp_ns)
        ChunkPlanner._on_takeover(planner, message)
    assert [t_ns - T0 - 300_000_000 for t_ns in voided] == [-STEP_NS, STEP_NS, 50_000_000]


@pytest.mark.timeout(200)
def test_planner_changes_chunking_while_it_runs(bench):
    from a2c2_ros.msg import ActionChunk
    from std_msgs.msg import String

    from a2c2_ros.nodes.runtime import latched_qos

    bench.system.start("chunk_planner", execution_horizon=25, inference_delay=5)
    bench.wait_for_log("chunk_planner", "configured")
    received = []
    bench.node.create_subscription(ActionChunk, "action_chunk", received.append, latched_qos(2))
    bench.instruction.publish(String(data="pick up the black bowl"))
    bench.spin_until(lambda: len(received) >= 2, "two chunks")

    def use(chunking, **others):
        for name, value in {"chunking": chunking, **others}.items():
            assert bench.set_parameter("chunk_planner", name, value) == (True, "")
        count = len(received)
        return lambda n: bench.spin_until(lambda: len(received) >= count + n, f"{n} chunks, {chunking}")

    use("rtc")(3)
    assert "inference failed" not in bench.system.log("chunk_planner")
    accepted, reason = bench.set_parameter("chunk_planner", "chunking", "fast")
    assert not accepted and "'fast'" in reason and "tt_rtc" in reason
    assert bench.get_parameter("chunk_planner", "chunking") == "rtc"

    use("tt_rtc")(1)
    accepted, reason = bench.set_parameter("chunk_planner", "inference_delay", 22)
    assert not accepted and "inference_delay is 22" in reason and "allows at most" in reason
    use("synchronous", inference_delay=2)(3)
    chunks = received[-2:]
    assert [(c.horizon, len(c.actions)) for c in chunks] == [(25, 175)] * 2
    stamps = [m.header.stamp.sec * 10**9 + m.header.stamp.nanosec for m in chunks]
    assert (stamps[1] - stamps[0]) / 50e6 >= 27, "all slots, then the inference"
    assert bench.system.stop("chunk_planner") == 0
