"""The timing model: the slot that is executed is the time that has passed, whatever happens to the chunks."""

import dataclasses

import numpy as np
import pytest
from conftest import NAMES, STEP_NS, make_chunk, make_observation, make_robot
from hypothesis import given, settings
from hypothesis import strategies as st

from a2c2_ros.core.buffer import ChunkBuffer
from a2c2_ros.core.config import ControllerConfig, PlannerConfig
from a2c2_ros.core.controller import CorrectionLoop
from a2c2_ros.core.errors import ChunkError, ConfigError
from a2c2_ros.core.limits import Limits
from a2c2_ros.core.planner import RETRY_AFTER_NS, PlannerSchedule
from a2c2_ros.core.safety import Reason, State
from a2c2_ros.core.schedule import admissible_execution_horizons, check_timing, slot_index
from a2c2_ros.core.timing import DELAY_WINDOW_CHUNKS, DelayMonitor, TickGrid

T0 = 1_000_000_000


@st.composite
def timings(draw):
    horizon = draw(st.integers(2, 60))
    delay = draw(st.integers(0, horizon // 2))
    execution = draw(st.integers(max(1, delay), horizon - delay))
    return horizon, execution, delay


def run_lockstep(horizon, execution, delay, steps, jitter=0, seed=0):
    """(t_obs, slot) of every step, by the planner's schedule and the control loop."""
    config = PlannerConfig(
        horizon=horizon, execution_horizon=execution, inference_delay=delay, inference_delay_jitter=jitter, seed=seed
    )
    schedule, loop = PlannerSchedule(config), CorrectionLoop(ControllerConfig(correction__enabled=False), make_robot())
    executed, ready = [], None
    for n in range(steps):
        t = T0 + n * STEP_NS

        def publish_due(now, chunk):
            if schedule.in_flight is not None and now >= schedule.in_flight.t_due_ns:
                loop.install(schedule.release(chunk, now), now)

        publish_due(t, ready)
        request = schedule.next_request(t)
        if request is not None:
            ready = make_chunk(t, horizon=horizon, chunk_id=n + 1)
            publish_due(t, ready)
        step = loop.tick(t, make_observation(t))
        executed.append(((step.t_obs_ns - T0) // STEP_NS, step.slot))
        assert step.command[0] == pytest.approx(step.chunk_id / 1000) and step.command[1] == pytest.approx(
            step.slot / 1000
        )
    return executed


def canonical_stitch(horizon, execution, delay, steps):
    """Real-time chunking's stitch: execute prev[:d] + new[d:e], then shift by e. A slot is written (t_obs, index)."""
    chunk = [(0, k) for k in range(horizon)]
    executed, t = [], 0
    while len(executed) < steps:
        new = [(t, k) for k in range(horizon)]
        executed += chunk[:delay] + new[delay:execution]
        chunk = new[execution:]
        t += execution
    return executed[:steps]


@given(timings())
def test_lockstep_is_the_canonical_stitch(timing):
    assert run_lockstep(*timing, steps=150) == canonical_stitch(*timing, steps=150)


@given(timings(), st.integers(0, 5), st.integers(0, 1000))
def test_slot_is_elapsed_steps_with_varying_delay(timing, jitter, seed):
    horizon, execution, delay = timing
    jitter = min(jitter, delay, execution - delay, horizon - execution - delay)
    for n, (t_obs, slot) in enumerate(run_lockstep(horizon, execution, delay, 120, jitter, seed)):
        assert slot == n - t_obs


@settings(max_examples=200)
@given(st.data())
def test_slot_is_elapsed_steps_whatever_happens_to_the_chunks(data):
    """Chunks late, dropped, duplicated and out of order; ticks with jitter; the clock jumps back."""
    horizon = data.draw(st.integers(2, 20))
    execution = data.draw(st.integers(1, horizon))
    arrivals = []
    for chunk_id in range(1, 16):
        t_obs = T0 + (chunk_id - 1) * execution * STEP_NS
        for _ in range(data.draw(st.integers(0, 2))):
            arrivals.append((t_obs + data.draw(st.integers(0, 2 * horizon)) * STEP_NS, chunk_id, t_obs))
    arrivals.sort()
    loop = CorrectionLoop(ControllerConfig(correction__enabled=False), make_robot())
    grid = TickGrid(STEP_NS)
    jump_at = data.draw(st.integers(0, 60))
    offset = 0
    arrived: list[int] = []
    moved = False
    for n in range(60):
        if n == jump_at:
            offset = -5 * STEP_NS
        now = T0 + n * STEP_NS + offset + data.draw(st.integers(-STEP_NS // 3, STEP_NS // 3))
        tick = grid.tick(now)
        if tick is None:
            continue
        if tick.jump_ns < 0:
            loop.reset()
            arrived, moved = [], False
        while arrivals and arrivals[0][0] <= now:
            _, chunk_id, t_obs = arrivals.pop(0)
            if t_obs + horizon * STEP_NS <= now:
                with pytest.raises(ChunkError, match="used up"):
                    loop.install(make_chunk(t_obs, horizon=horizon, chunk_id=chunk_id), now)
                continue
            loop.install(make_chunk(t_obs, horizon=horizon, chunk_id=chunk_id), now)
            arrived.append(t_obs)
        step = loop.tick(tick.t_tick_ns, make_observation(tick.t_tick_ns))
        usable = [t for t in arrived if 0 <= slot_index(tick.t_tick_ns, t, STEP_NS) < horizon]
        if not arrived:
            assert (step.state, step.command) == (State.WAITING, None)
        elif not usable:
            assert (step.state, step.reason) == (State.HOLDING, Reason.CHUNK_EXPIRED)
            assert step.command.tolist()[:2] == [0, 0] if moved else step.command is None
        else:
            assert step.t_obs_ns == max(usable)
            assert step.slot == (tick.t_tick_ns - step.t_obs_ns) // STEP_NS
            moved = True


@given(st.integers(-(10**12), 10**12), st.integers(0, 10**12), st.integers(1, 10**9))
def test_slot_rule_owns_half_open_intervals(t_tick, t_obs, step):
    k = slot_index(t_tick, t_obs, step)
    assert t_obs + k * step <= t_tick < t_obs + (k + 1) * step


@given(st.lists(st.integers(-20_000_000, 20_000_000), min_size=2, max_size=50))
def test_jitter_neither_repeats_nor_skips_a_tick(jitter):
    grid = TickGrid(STEP_NS)
    ticks = [grid.tick(T0 + n * STEP_NS + (j if n else 0)) for n, j in enumerate(jitter)]
    assert [t.t_tick_ns for t in ticks] == [T0 + n * STEP_NS for n in range(len(jitter))]
    assert not any(t.missed or t.jump_ns for t in ticks)


def test_missed_ticks_are_skipped_and_counted_and_jumps_start_afresh():
    grid = TickGrid(STEP_NS)
    grid.tick(T0)
    late = grid.tick(T0 + 3 * STEP_NS + 1)
    assert (late.t_tick_ns, late.missed, late.lateness_ns) == (T0 + 3 * STEP_NS, 2, 1)
    assert grid.tick(T0 + 3 * STEP_NS + 2) is None
    assert grid.tick(T0).jump_ns == -3 * STEP_NS
    assert grid.tick(T0 + 10**10).jump_ns == 10**10


def test_a_process_that_stood_still_missed_ticks_and_its_clock_did_not_jump():
    grid = TickGrid(STEP_NS)
    grid.tick(T0, steady_ns=7)
    stalled = grid.tick(T0 + 100 * STEP_NS, steady_ns=7 + 100 * STEP_NS)
    assert (stalled.missed, stalled.jump_ns) == (99, 0)
    jumped = grid.tick(T0 + 200 * STEP_NS, steady_ns=7 + 101 * STEP_NS)
    assert (jumped.missed, jumped.jump_ns) == (0, 100 * STEP_NS)


def test_first_chunk_is_due_at_once_and_a_gap_starts_cold():
    schedule = PlannerSchedule(PlannerConfig(horizon=8, execution_horizon=4, inference_delay=2))
    first = schedule.next_request(T0)
    assert (first.t_due_ns, first.sequence) == (T0, 0)
    assert schedule.next_request(T0 + STEP_NS) is None, "one inference at a time"
    schedule.release(make_chunk(T0), T0)
    second = schedule.next_request(T0 + 4 * STEP_NS)
    assert (second.t_due_ns, second.sequence) == (T0 + 6 * STEP_NS, 1)
    cold = schedule.next_request(T0 + 20 * STEP_NS)
    assert (cold.t_due_ns, cold.sequence) == (T0 + 20 * STEP_NS, 0), "the one in flight has expired"


def test_a_new_instruction_drops_the_inference_in_flight_and_keeps_the_delay():
    schedule = PlannerSchedule(PlannerConfig(horizon=8, execution_horizon=4, inference_delay=2))
    schedule.next_request(T0)
    schedule.release(make_chunk(T0), T0)
    schedule.invalidate()
    assert schedule.next_request(T0) is None, "the robot would take its chunk for a duplicate"
    request = schedule.next_request(T0 + STEP_NS)
    assert request.t_due_ns == T0 + 3 * STEP_NS


@pytest.mark.parametrize("chunking", ["asynchronous", "synchronous"])
def test_a_failed_inference_is_tried_again_before_the_last_chunk_ends(chunking):
    schedule = PlannerSchedule(
        PlannerConfig(horizon=50, execution_horizon=20, inference_delay=0, chunking=chunking, seed=1)
    )
    first = schedule.next_request(T0)
    schedule.failed(T0 + STEP_NS)
    again_ns = T0 + STEP_NS + RETRY_AFTER_NS
    assert not schedule.wants(again_ns - 1), "not at every sample"
    retry = schedule.next_request(again_ns)
    assert (retry.sequence, retry.t_due_ns) == (first.sequence, again_ns), "the robot still waits"
    schedule.release(make_chunk(again_ns, horizon=50), again_ns)
    later_ns = again_ns + 20 * STEP_NS
    assert schedule.next_request(later_ns) is not None
    schedule.failed(later_ns)
    assert not schedule.wants(later_ns + STEP_NS)
    assert schedule.next_request(later_ns + RETRY_AFTER_NS).t_obs_ns < again_ns + 50 * STEP_NS


def test_buffer_refuses_duplicates_and_keeps_the_newest():
    buffer = ChunkBuffer(capacity=2)
    assert buffer.install(make_chunk(T0))
    assert not buffer.install(make_chunk(T0, chunk_id=2))
    assert buffer.install(make_chunk(T0 + 2 * STEP_NS, chunk_id=3))
    assert buffer.install(make_chunk(T0 + STEP_NS, chunk_id=2))
    assert not buffer.install(make_chunk(T0 - STEP_NS, chunk_id=4))
    assert buffer.select(T0 + STEP_NS)[0].chunk_id == 2
    assert buffer.select(T0 + 2 * STEP_NS)[0].chunk_id == 3


class FixedHead:
    def __init__(self, residual):
        self.residual = np.array(residual, np.float32)
        self.inputs = []

    def correct(self, inputs):
        self.inputs.append(inputs)
        return self.residual


def corrected(residual, trained=(), **config):
    from test_core_data import make_manifest

    head = FixedHead(residual)
    head.manifest = make_manifest(residual_range=trained)
    loop = CorrectionLoop(ControllerConfig(**config), make_robot(), head, monotonic_ns=iter([5, 9]).__next__)
    loop.install(make_chunk(T0, latent=np.full(4, 7.0)), T0)
    return loop, loop.tick(T0 + 2 * STEP_NS, make_observation(T0 + 2 * STEP_NS))


def test_executed_action_is_base_plus_residual_and_z_and_k_come_from_the_owner_of_the_slot():
    loop, step = corrected([0.1, 0.2, 0.3])
    assert step.state == State.RUNNING
    assert step.command == pytest.approx(step.base_action + [0.1, 0.2, 0.3])
    assert step.head_ns == 4
    inputs = loop.head.inputs[0]
    assert inputs.latent.tolist() == [7.0] * 4
    assert inputs.time_feature == pytest.approx([1.0, 0.0], abs=1e-6)  # k = 2 of H = 8
    assert inputs.base_action is step.base_action
    assert step.chunk_delay_steps == 2, "the first slot that was executed"


@pytest.mark.parametrize(
    ("residual", "reason"),
    [
        ([np.nan, 0, 0], Reason.HEAD_NOT_FINITE),
        ([5, 0, 0], Reason.RESIDUAL_TOO_LARGE),
        ([0, -5, 0], Reason.RESIDUAL_TOO_LARGE),
        ([0, 0], Reason.HEAD_NOT_FINITE),
    ],
)
def test_a_bad_residual_leaves_the_base_action(residual, reason):
    _, step = corrected(residual)
    assert (step.state, step.reason) == (State.BASE_ONLY, reason)
    assert np.array_equal(step.command, step.base_action)


@pytest.mark.parametrize(
    ("residual", "margin", "says"),
    [
        ([0.19, -0.019, 0.0], 2.0, ""),
        ([0.0, -0.021, 0.0], 2.0, "y: -0.021, allowed are +-0.02"),
        ([0.25, 0.0, 0.0], 2.0, "x: 0.25, allowed are +-0.2"),
        ([0.25, 0.0, 0.0], 3.0, ""),
        ([0.0, 0.0, 0.1], 3.0, "gripper: 0.1, allowed are +-0"),
        ([4.5, 0.0, 0.0], 100.0, "x: 4.5, allowed are +-4"),
    ],
)
def test_a_residual_far_beyond_those_of_the_training_is_refused_per_channel(residual, margin, says):
    _, step = corrected(residual, trained=(0.1, 0.01, 0.0), residual_margin=margin)
    assert step.reason == (Reason.RESIDUAL_TOO_LARGE if says else Reason.NONE)
    assert step.state == (State.BASE_ONLY if says else State.RUNNING)
    assert step.detail == says


def test_correction_can_be_switched_between_ticks():
    loop, _ = corrected([0.1, 0.2, 0.3])
    loop.configure(ControllerConfig(correction__enabled=False), loop.head)
    step = loop.tick(T0 + 3 * STEP_NS, make_observation(T0 + 3 * STEP_NS))
    assert (step.state, step.reason) == (State.BASE_ONLY, Reason.CORRECTION_DISABLED)
    assert np.array_equal(step.command, step.base_action)


@pytest.mark.parametrize(
    ("stamp", "reason"),
    [(T0 - 10 * STEP_NS, Reason.OBSERVATION_STALE), (T0 + 10 * STEP_NS, Reason.OBSERVATION_FUTURE)],
)
def test_stale_or_future_observations_hold(stamp, reason):
    loop = CorrectionLoop(ControllerConfig(correction__enabled=False), make_robot())
    loop.install(make_chunk(T0), T0)
    loop.tick(T0, make_observation(T0))
    stamp += STEP_NS
    step = loop.tick(T0 + STEP_NS, make_observation(stamp))
    assert (step.state, step.reason, step.detail) == (State.HOLDING, reason, "camera")
    assert step.command.tolist() == [0, 0, 0], "no motion, the gripper as last commanded"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"action_names": ("x", "gripper", "y")}, "names"),
        ({"step_ns": 2 * STEP_NS}, "step"),
        ({"t_obs_ns": T0 + 10**9}, "future"),
        ({"t_obs_ns": T0 - 8 * STEP_NS}, "expired"),
        ({"actions": np.full((8, 3), 3.5)}, "implausible"),
    ],
)
def test_a_chunk_that_does_not_fit_is_refused_counted_and_changes_nothing(changes, code):
    loop = CorrectionLoop(ControllerConfig(correction__enabled=False), make_robot())
    with pytest.raises(ChunkError) as caught:
        loop.install(make_chunk(**({"t_obs_ns": T0} | changes)), T0)
    assert caught.value.code == code
    assert loop.tick(T0, make_observation(T0)).state == State.WAITING
    assert loop.chunks == {code: 1}


def test_a_chunk_of_another_control_period_is_refused():
    loop = CorrectionLoop(ControllerConfig(correction__enabled=False), make_robot())
    with pytest.raises(ChunkError, match=r"slots last 0\.1 s, allowed is the control period of 0\.05 s"):
        loop.install(make_chunk(T0, step_ns=2 * STEP_NS), T0)


def test_an_implausible_chunk_is_refused_for_the_channel_that_is_farthest_outside():
    lower, upper = np.array([-10, -1, -1], np.float32), np.array([10, 1, 1], np.float32)
    wide = dataclasses.replace(make_robot(), limits=Limits.of(NAMES, lower, upper))
    loop = CorrectionLoop(ControllerConfig(correction__enabled=False), wide)
    for y in (-4.0, 4.0):  # x is larger, and allowed
        with pytest.raises(ChunkError, match=f"action 'y' is {y:g} to {y:g}, allowed is -3 to 3"):
            loop.install(make_chunk(T0, actions=np.tile([9.0, y, 0.0], (8, 1))), T0)


def test_a_head_for_other_chunks_holds_and_says_why():
    from test_core_data import make_manifest

    head = FixedHead([0, 0, 0])
    head.manifest = make_manifest(policy_id="other")
    loop = CorrectionLoop(ControllerConfig(), make_robot(), head)
    loop.install(make_chunk(T0), T0)
    step = loop.tick(T0, make_observation(T0))
    assert (step.state, step.reason) == (State.HOLDING, Reason.HEAD_MISMATCH)
    assert "policy_id: head 'other', chunk 'test'" in step.detail
    assert not head.inputs


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.floats(-3, 3, width=32), st.floats(-3, 3, width=32), st.booleans()), min_size=2, max_size=30)
)
def test_commands_of_the_loop_never_exceed_the_limits(residuals):
    head = FixedHead([0, 0, 0])
    loop = CorrectionLoop(ControllerConfig(), make_robot(step=[0.25, 0.25, 2.0]), head)
    previous, moved = np.array([0, 0, -1]), False
    for n, (x, y, fresh) in enumerate(residuals):
        t = T0 + n * STEP_NS
        head.residual = np.array([x, y, 0.0], np.float32)
        loop.install(make_chunk(t, chunk_id=n + 1), t)
        step = loop.tick(t, make_observation(t if fresh else t - 10**9))
        if step.command is None:
            assert not moved
            continue
        moved = True
        assert (np.abs(step.command) <= 1).all()
        assert (np.abs(step.command.astype(np.float64) - previous) <= [0.25, 0.25, 2.0]).all()
        previous = step.command
    assert loop.ticks == sum(loop.counts.values()) == len(residuals)
    assert NAMES == make_robot().action_names


@given(st.integers(1, 60), st.integers(0, 60), st.integers(1, 60))
def test_admissible_horizons_are_those_that_the_check_admits(horizon, delay, execution):
    try:
        check_timing(horizon, execution, delay)
        allowed = True
    except ConfigError:
        allowed = False
    assert (execution in admissible_execution_horizons(horizon, delay)) == allowed


def test_the_effective_delay_is_a_high_percentile_of_the_newest_chunks():
    monitor = DelayMonitor()

    def add(delay_ns, cold=False, execution=40):
        return monitor.add(delay_ns, STEP_NS, cold=cold, horizon=50, execution_horizon=execution)

    cold = add(30 * STEP_NS, cold=True)
    assert (cold.delay_steps, cold.effective_delay_steps, cold.window_chunks, cold.problem) == (30, -1, 0, None)
    assert (cold.proposed, len(cold.admissible)) == (0, 0), "nothing was measured yet"
    exact, late = add(4 * STEP_NS), add(4 * STEP_NS + 1)
    assert (exact.delay_steps, late.delay_steps) == (4, 5), "a slot that has begun is gone"
    for _ in range(97):
        timing = add(4 * STEP_NS)
    assert (timing.effective_delay_steps, timing.window_chunks) == (4, 99)
    for _ in range(6):
        timing = add(12 * STEP_NS)
    assert timing.effective_delay_steps == 12, "6 of 100 are late"
    assert (timing.proposed, timing.admissible) == (38, range(12, 39))
    assert "d=12" in timing.problem and "e=40" in timing.problem and "38 (allowed 12 to 38)" in timing.problem
    assert add(12 * STEP_NS, execution=5).proposed == 12
    assert add(12 * STEP_NS, execution=20).problem is None
    for _ in range(DELAY_WINDOW_CHUNKS):
        timing = add(26 * STEP_NS)
    assert timing.effective_delay_steps == 26 and timing.proposed == 0 and "no e fits" in timing.problem
    for _ in range(DELAY_WINDOW_CHUNKS):
        timing = add(0)
    assert timing.effective_delay_steps == 0 and timing.problem is None, "what is older is forgotten"
