"""The fault suite: its judge sees what is unsafe, a campaign against a broken loop finds it, the real loop passes."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from a2c2_ros.core import controller, governor, safety
from a2c2_ros.core.buffer import ChunkBuffer
from a2c2_ros.core.config import ControllerConfig, Parameters
from a2c2_ros.core.controller import CorrectionLoop
from a2c2_ros.core.gate import ChunkGate
from a2c2_ros.core.governor import Governor
from a2c2_ros.core.limits import LimitFlag, Limits
from a2c2_ros.core.observation import ObservationBuffer
from a2c2_ros.core.safety import HoldPolicy, Latch, Reason, State
from a2c2_ros.core.takeover import Takeover
from a2c2_ros.faults import __main__ as tool
from a2c2_ros.faults import runner
from a2c2_ros.faults.base import SCENARIOS
from a2c2_ros.faults.campaign import FAULTS, run_campaign
from a2c2_ros.faults.monitor import HARMLESS, INVARIANTS, GivenChunk, Judge, Rules, Seen

T0 = 10_000_000_000
PERIOD_NS = 50_000_000
ACTIONS = np.tile([0.5, 0.5], (40, 1)).astype(np.float32)


class Bench:
    """A judge of a two-joint arm, and a loop that the test plays."""

    def __init__(self, kind="position", following=(0.6, np.inf), **rules):
        self.judge = Judge(
            Rules(
                kind=kind,
                names=("a", "b"),
                lower=np.array([-1.0, -1.0]),
                upper=np.array([1.0, 1.0]),
                step=np.array([0.1, 0.1]),
                velocity=np.array([10.0, np.inf]),
                period_ns=PERIOD_NS,
                max_ages_ns={"joints": 120_000_000},
                measured_streams=("joints",) if kind == "position" else (),
                following=np.array(following),
                **rules,
            )
        )
        self.n = 0
        self.sampled_ns = T0
        self.chunk()

    @property
    def now_ns(self):
        return T0 + self.n * PERIOD_NS

    def chunk(self, **changes):
        fields = dict(
            chunk_id=1, t_obs_ns=T0, step_ns=PERIOD_NS, actions=ACTIONS, names=("a", "b"), planner="p"
        ) | changes
        self.judge.chunk(GivenChunk(**fields), self.now_ns, accepted=True)

    def sample(self, measured=(0.0, 0.0), sound=True):
        self.judge.sample("joints", self.now_ns, self.now_ns, sound, np.array(measured))
        self.sampled_ns = self.now_ns
        return self

    def tick(self, command, state=State.RUNNING, reason=Reason.NONE, **changes):
        """One step; by default the head returns what makes the command of the chunk's action."""
        age_ns = changes.pop("age_ns", self.now_ns - self.sampled_ns)
        fields = dict(
            t_ns=self.now_ns,
            wall_ns=self.now_ns,
            state=state,
            reason=reason,
            command=None if command is None else np.array(command),
            ages_ns={} if age_ns is None else {"joints": age_ns},
            t_obs_ns=T0,
            chunk_id=1,
            slot=self.n,
            base_action=np.array([0.5, 0.5]),
            residual=np.nan_to_num(np.resize(command or 0.0, 2)) - 0.5,
        ) | changes
        self.judge.tick(Seen(**fields))
        self.n += 1
        return self

    def skip(self, ticks):
        """Time goes on without a tick."""
        self.n += ticks
        return self

    def person(self, *command):
        self.judge.takeover(np.array(command), self.now_ns, self.now_ns)
        return self

    def drive(self, *values):
        for value in values:
            self.sample((value, value)).tick((value, value), State.TAKEOVER)
        return self

    def move(self, *values):
        for value in values:
            self.sample((value, value)).tick((value, value))
        return self

    def hold(self, *values, reason=Reason.CHUNK_EXPIRED, state=State.HOLDING):
        for value in values:
            self.sample((values[-1], values[-1])).tick((value, value), state, reason)
        return self

    def broken(self):
        return {v.invariant for v in self.judge.violations}


def test_a_safe_sequence_passes_and_its_delays_are_measured():
    bench = Bench().move(0.1, 0.2, 0.3)
    bench.judge.disable()
    bench.sample((0.15, 0.15))
    for command in ([0.2, 0.2], [0.15, 0.15], [0.15, 0.15], None):
        bench.tick(command, State.STOPPED, Reason.DISABLED)
    bench.judge.enable()
    fresh = {"chunk_id": 2, "t_obs_ns": bench.now_ns}
    bench.chunk(**fresh)
    bench.sample((0.4, 0.4)).tick((0.5, 0.5), slot=0, **fresh).sample((0.4, 0.4)).tick((0.5, 0.45), slot=1, **fresh)
    bench.judge.finish(9, {State.RUNNING: 5, State.STOPPED: 4}, {Reason.NONE: 9}, 2)
    assert not bench.judge.violations
    assert [(d.ticks, d.ms, d.cause) for d in bench.judge.holds] == [(1, 50.0, "latched")]
    assert [d.ticks for d in bench.judge.recoveries] == [0]


NAN = float("nan")
STALE, ELSEWHERE = "stale data moved the robot", "elsewhere"
UNSAFE = {
    "a command is NaN": ("finite", lambda b: b.move(0.0).tick((NAN, 0.0))),
    "a command is short": ("finite", lambda b: b.move(0.0).tick((0.0,))),
    "beyond the upper limit": ("position limit", lambda b: b.move(0.95).tick((1.01, 1.0))),
    "a step too large": ("step limit", lambda b: b.move(0.0).sample().tick((0.0, 0.11))),
    "first command far from the arm": ("recovery jump", lambda b: b.sample((0.3, 0.3)).tick((0.3, 0.45))),
    "first command of an unknown arm": ("recovery jump", lambda b: b.tick((0.0, 0.0), State.HOLDING, age_ns=None)),
    "first command outside the limits": ("recovery jump", lambda b: b.sample((1.3, 0.0)).tick((1.0, 0.0))),
    "moved on from the hold, the arm is elsewhere": (
        "recovery jump",
        lambda b: b.move(0.0, 0.1).hold(0.1).sample((0.05, 0.05)).tick((0.15, 0.15)),
    ),
    "old joints": (STALE, lambda b: b.move(0.0).tick((0.1, 0.1), age_ns=130_000_000)),
    "joints never came": (STALE, lambda b: b.move(0.0).tick((0.1, 0.1), age_ns=None)),
    "joints from the future": (STALE, lambda b: b.move(0.0).tick((0.1, 0.1), age_ns=-60_000_000)),
    "joints that nobody sent": (STALE, lambda b: b.move(0.0).tick((0.1, 0.1), age_ns=1_000_000)),
    "joints that are not sound": (STALE, lambda b: b.move(0.0).sample(sound=False).tick((0.1, 0.1))),
    "sent too late": (STALE, lambda b: b.move(0.0).sample().tick((0.1, 0.1), sent_ns=T0 + 4 * PERIOD_NS + 30_000_000)),
    "a chunk that nobody sent": (STALE, lambda b: b.move(0.0).sample().tick((0.1, 0.1), chunk_id=7)),
    "not base and residual": (ELSEWHERE, lambda b: b.move(0.0).sample().tick((0.05, 0.05), residual=np.zeros(2) - 0.4)),
    "a residual in BASE_ONLY": (ELSEWHERE, lambda b: b.move(0.45).sample().tick((0.4, 0.4), State.BASE_ONLY)),
    "farther than base and residual": (
        ELSEWHERE,
        lambda b: b.move(0.0).sample().tick((0.1, 0.1), residual=np.array([-0.45, -0.45])),
    ),
    "away from base and residual": (
        ELSEWHERE,
        lambda b: b.move(0.0).sample().tick((-0.1, -0.1), residual=np.zeros(2)),
    ),
    "short of base and residual without a limit": (
        ELSEWHERE,
        lambda b: b.move(0.0).sample().tick((0.05, 0.05), residual=np.zeros(2)),
    ),
    "a residual beyond its limit": (
        ELSEWHERE,
        lambda b: b.move(-0.9).sample((-0.9, -0.9)).tick((-1.0, -1.0), residual=np.full(2, -4.1)),
    ),
    "silence while it moves": (ELSEWHERE, lambda b: b.move(0.0).sample().tick(None)),
    "a residual that is NaN": (ELSEWHERE, lambda b: b.move(0.0).sample().tick((0.1, 0.1), residual=np.full(2, NAN))),
    "a wrong slot": (STALE, lambda b: b.move(0.0).sample().tick((0.1, 0.1), slot=3)),
    "an action of no slot": (
        STALE,
        lambda b: b.move(0.0).sample().tick((0.1, 0.1), base_action=np.zeros(2), residual=np.full(2, 0.1)),
    ),
    "the clock went back": (STALE, lambda b: b.move(0.0, 0.1).sample().tick((0.1, 0.1), t_ns=T0)),
    "no hold": (
        "hold bound",
        lambda b: b.move(0.0, 0.1).sample().tick((0.15, 0.15), State.HOLDING).tick((0.2, 0.2), State.HOLDING),
    ),
    "a hold that is left": ("hold bound", lambda b: b.move(0.0, 0.1).hold(0.1, 0.1, 0.0, 0.1)),
    "no wait after stale data": (
        "rearming",
        lambda b: b.move(0.0).skip(3).tick((0.0, 0.0), State.HOLDING, Reason.OBSERVATION_STALE).move(0.0),
    ),
    "silence in a hold": ("hold bound", lambda b: b.move(0.0).tick(None, State.HOLDING)),
    "silence before the hold": (
        "hold bound",
        lambda b: b.move(0.0, 0.1, 0.2).sample().tick((0.1, 0.1), State.STOPPED).tick(None, State.STOPPED),
    ),
    "shut down without a hold": ("hold bound", lambda b: (b.move(0.0, 0.1), b.judge.left())),
    "motion after a stop": (
        "latched",
        lambda b: (b.move(0.0), *(b.judge.emergency_stop(pressed, b.now_ns) for pressed in (True, False)), b.move(0.1)),
    ),
    "driven by nobody": (STALE, lambda b: b.move(0.0).drive(0.0)),
    "driven by garbage": (STALE, lambda b: b.move(0.0).person(NAN, 0.0).drive(0.0)),
    "driven longer than a command counts": (STALE, lambda b: b.move(0.0).person(0.0, 0.0).drive(*[0.0] * 6)),
    "driven elsewhere": ("takeover", lambda b: b.move(0.0).person(0.5, -0.5).drive(0.1)),
    "driven blindly": (STALE, lambda b: b.move(0.0).person(0.0, 0.0).tick((0.0, 0.0), State.TAKEOVER, age_ns=None)),
    "a person is ignored": ("takeover", lambda b: b.move(0.0).person(0.0, 0.0).move(0.1)),
    "an old chunk after a takeover": ("takeover", lambda b: b.move(0.0).person(0.0, 0.0).drive(*[0.0] * 4).move(0.1)),
    "enabled while pressed": (
        "latched",
        lambda b: (b.move(0.0), b.judge.emergency_stop(True, b.now_ns), b.judge.enable(accepted=True)),
    ),
    "a chunk of before a stop": (
        STALE,
        lambda b: (
            b.move(0.0),
            b.judge.disable(),
            b.hold(0.0, state=State.STOPPED),
            b.judge.enable(),
            b.move(0.0),
        ),
    ),
    "moves on without its arm": (
        "following",
        lambda b: b.move(*np.arange(0.0, 0.65, 0.1)).sample((-0.1, 0.6)).tick((0.7, 0.7)),
    ),
    "stopped while it follows": (
        "following",
        lambda b: b.move(0.0, 0.1, 0.2).hold(0.1, 0.0, reason=Reason.NOT_FOLLOWING, state=State.STOPPED),
    ),
    "a hold that jumps to an arm that lags": (
        "step limit",
        lambda b: b.move(0.0, 0.1, 0.2).hold(0.0),
    ),
    "motion after a defect": ("latched", lambda b: (b.move(0.0), b.judge.defect(), b.move(0.1))),
    "wrong ticks": ("counters", lambda b: b.move(0.0).judge.finish(2, {State.RUNNING: 1}, {Reason.NONE: 1}, 1)),
    "wrong states": ("counters", lambda b: b.move(0.0).judge.finish(1, {State.BASE_ONLY: 1}, {Reason.NONE: 1}, 1)),
    "a chunk not counted": (
        "counters",
        lambda b: b.move(0.0).judge.finish(1, {State.RUNNING: 1}, {Reason.NONE: 1}, 0),
    ),
    "never moves again": ("no recovery", lambda b: b.move(0.0).hold(*[0.0] * 14)),
    "a command without a tick": ("record", lambda b: b.judge.report("record", "seen by the world")),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_the_judge_sees(name):
    invariant, play = UNSAFE[name]
    bench = Bench()
    play(bench)
    assert bench.broken() == {invariant}
    assert (len(bench.judge.unsafe_ticks) > 0) == (invariant not in HARMLESS)


def test_the_judge_sees_a_chunk_beyond_its_age_and_its_end_and_two_planners():
    bench = Bench(max_chunk_age_ns=60_000_000).move(0.0, 0.1, 0.1)
    assert bench.broken() == {STALE} and "old" in bench.judge.violations[0].detail
    bench = Bench().move(*[0.1] * 41)
    assert bench.broken() == {STALE} and "slot 40" in bench.judge.violations[0].detail
    bench = Bench().move(0.0)
    bench.chunk(planner="q", chunk_id=2)
    bench.sample((0.1, 0.1)).tick((0.1, 0.1), chunk_id=2)
    assert bench.broken() == {"planners took turns"}
    bench = Bench(stop_timeout_ns=80_000_000).move(0.0, 0.1, 0.1, 0.1)
    assert bench.broken() == {"latched"}, "the emergency stop was not heard"


@pytest.mark.parametrize(
    "changes",
    [
        {"actions": ACTIONS * np.nan},
        {"actions": ACTIONS * 10},
        {"actions": ACTIONS[:, :1]},
        {"names": ("b", "a")},
        {"step_ns": 0},
        {"chunk_id": 0},
        {"t_obs_ns": T0 + 10**9},
    ],
)
def test_the_judge_does_not_let_a_damaged_chunk_move_the_robot(changes):
    bench = Bench()
    bench.chunk(**({"chunk_id": 2} | changes))
    bench.n = max(0, (changes.get("t_obs_ns", T0) - T0) // PERIOD_NS)
    bench.sample().tick((0.0, 0.0), chunk_id=changes.get("chunk_id", 2), t_obs_ns=changes.get("t_obs_ns", T0))
    assert bench.broken() == {STALE}


def test_pose_deltas_hold_with_zero_motion_in_the_same_tick():
    def last(command):
        bench = Bench("delta", keep=(1,), keep_default=(-1.0,))
        bench.sample().tick((0.1, -0.9)).tick(command, State.HOLDING)
        return bench.tick(command, State.HOLDING)

    assert not last((0.0, -0.9)).broken()
    assert last((0.1, -0.9)).broken() == {"hold bound"}
    assert last((0.0, -1.0)).broken() == {"hold bound"}, "the gripper keeps its last command"


def test_a_hold_starts_where_an_arm_far_behind_is_and_nowhere_else():
    def held(*commands):
        return Bench().move(*np.arange(0.0, 0.85, 0.1)).hold(*commands).broken()

    assert not held(0.0, 0.0)
    assert held(0.7, 0.0) == {"step limit", "hold bound"}, "it goes back on a ramp"
    assert held(-0.15, 0.0) == {"step limit", "hold bound"}
    assert held(0.05, 0.0) == {"hold bound"}


# --- a loop that is broken on purpose -----------------------------------------------------------------------------


def replaced(target, name, value):
    return lambda patch: patch.setattr(target, name, value)


def accept_all(self, stream, stamp_ns, value, latest_ns=None):
    self._samples[stream] = (stamp_ns, value)
    return True


def next_slot(self, t_tick_ns, observed_from_ns=0, _select=ChunkBuffer.select):
    found = _select(self, t_tick_ns, observed_from_ns)
    return None if found is None or found[1] + 1 >= found[0].horizon else (found[0], found[1] + 1)


def old_slot(self, t_tick_ns, observed_from_ns=0, _select=ChunkBuffer.select):
    return _select(self, t_tick_ns)


def keeps_chunks(self, step, t_tick_ns, measured):
    step.verdict = self.latch.verdict
    return self._governor.halt(measured)


def forgets(self, _release=Governor.release):
    _release(self)
    self._kept = None


def any_command(self, command, stamp_ns, latest_ns):
    self._command, self._stamp_ns, self._is_over = np.resize(np.float32(command), self._size), stamp_ns, False


def all_or_nothing(self, observation, ages):
    return None if self._stale_measurement(ages) else self._robot.measured_of(observation.values)


def old_positions(self, observation, ages):
    return self._robot.measured_of(observation.values) if self._measured_ages_ns else None


def never_pressed(self, pressed, now_ns, _signal=Latch.emergency_stop):
    _signal(self, False, now_ns)


def always_ready(self, ready, detail="", _say=Latch.robot_ready):
    _say(self, True, detail)


def ready_enables(self, ready, *detail, _say=Latch.robot_ready):
    _say(self, ready, *detail)
    if ready and self._verdict is not None and self._verdict.detail == safety.READY_AGAIN:
        self._verdict = None


def adds_nan(self, step, *arguments, _correct=CorrectionLoop._correct):
    verdict = _correct(self, step, *arguments)
    if step.action is not None:
        step.action = step.action * np.float32(np.nan)
    return verdict


def other_action(change):
    def correct(self, step, *arguments, _correct=CorrectionLoop._correct):
        verdict = _correct(self, step, *arguments)
        step.action = change(step)
        return verdict

    return replaced(CorrectionLoop, "_correct", correct)


MUTATIONS = {
    "the slot before": (other_action(lambda s: s.chunk.actions[max(0, s.slot - 1)] + s.residual), {ELSEWHERE}),
    "minus the residual": (other_action(lambda step: step.base_action - 40 * step.residual), {ELSEWHERE}),
    "any negative residual": (
        replaced(controller, "np", SimpleNamespace(**(vars(np) | {"abs": lambda values: values}))),
        {ELSEWHERE},
    ),
    "no wait after stale data": (replaced(ControllerConfig, "rearm_after_ns", 0), {"rearming"}),
    "no limits": (replaced(Limits, "apply", lambda self, action, previous: (action, LimitFlag.NONE)), {"step limit"}),
    "no range": (replaced(Limits, "clip", lambda self, action: np.float32(action)), {"position limit"}),
    "NaN actions": (replaced(CorrectionLoop, "_correct", adds_nan), {"finite"}),
    "no ages": (replaced(controller, "stale_stream", lambda *ages: None), {STALE, "hold bound"}),
    "any sample": (replaced(ObservationBuffer, "put", accept_all), {STALE, "recovery jump"}),
    "any chunk": (replaced(ChunkGate, "check", lambda self, chunk, now_ns: None), {STALE, "planners took turns"}),
    "any planner": (replaced(ChunkGate, "follow", lambda self, chunk: None), {"planners took turns"}),
    "a slot ahead": (replaced(ChunkBuffer, "select", next_slot), {STALE}),
    "clock jumps forgotten": (replaced(CorrectionLoop, "forget", lambda self: None), {STALE, "no recovery"}),
    "no approach": (replaced(Governor, "approach", lambda self, measured: None), {"recovery jump"}),
    "outside is inside": (replaced(Governor, "outside", lambda self, m: ""), {"recovery jump", "hold bound"}),
    "impossible is measured": (
        replaced(Governor, "_is_outside", lambda self, measured: np.zeros(len(measured), bool)),
        {"hold bound", "recovery jump"},
    ),
    "a hold elsewhere": (replaced(HoldPolicy, "target", lambda self, last, measured: last + 0.01), {"hold bound"}),
    "silence for a hold": (replaced(Governor, "halt", lambda self, measured: (None, LimitFlag.NONE)), {"hold bound"}),
    "no emergency stop": (replaced(Latch, "emergency_stop", never_pressed), {"latched"}),
    "no signal needed": (replaced(Latch, "watch", lambda self, now_ns: None), {"latched"}),
    "no disable": (replaced(Latch, "disable", lambda self: None), {"latched"}),
    "the robot's own stop not heard": (replaced(Latch, "robot_ready", always_ready), {"latched"}),
    "a robot that is ready again enables": (replaced(Latch, "robot_ready", ready_enables), {"latched"}),
    "no enable": (replaced(Latch, "enable", lambda self: None), {"no recovery"}),
    "any command of a person": (replaced(Takeover, "put", any_command), {"finite", STALE, "takeover"}),
    "a command counts for ever": (
        replaced(Takeover, "command", lambda self, t, timeout: None if self._stamp_ns is None else self._command),
        {STALE},
    ),
    "nobody takes over": (replaced(Takeover, "command", lambda self, t, timeout: None), {"takeover"}),
    "old chunks after a takeover or a stop": (replaced(ChunkBuffer, "select", old_slot), {"takeover", STALE}),
    "old chunks after a stop": (replaced(CorrectionLoop, "_stopped", keeps_chunks), {STALE}),
    "an arm that does not follow": (replaced(Governor, "not_following", lambda self, measured: ""), {"following"}),
    "an arm that follows is stopped": (replaced(Governor, "not_following", lambda self, measured: "x"), {"following"}),
    "a hold from a command that ran away": (replaced(governor, "TRACKING_LAG_S", 1e9), {"step limit", "hold bound"}),
    "a silent driver hides the others": (replaced(CorrectionLoop, "_measured", all_or_nothing), {"hold bound"}),
    "a silent driver is believed": (replaced(CorrectionLoop, "_measured", old_positions), {"hold bound"}),
    "a gripper forgotten in silence": (replaced(Governor, "release", forgets), {"recovery jump"}),
    "any parameter": (replaced(Parameters, "_check_field", lambda self, item, value: None), {"parameters"}),
    "refusals not counted": (replaced(CorrectionLoop, "refused", lambda self, error: None), {"counters"}),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_campaign_against_a_broken_loop_finds_it(monkeypatch, name):
    change, expected = MUTATIONS[name]
    change(monkeypatch)
    result = run_campaign(4000, seed=1, stop_at=1)
    assert {v.invariant for v in result.violations} & expected, result.violations[:3]


def test_a_campaign_against_the_real_loop_finds_nothing_and_is_reproducible():
    result = run_campaign(1000, seed=5)
    assert result.violations == [] and result.unsafe_ticks == 0
    assert result.events.total() == 1000 and set(result.events) == set(FAULTS)
    assert len(result.holds) > 100 and len(result.recoveries) > 100
    record = runner.campaign_record(run_campaign(100, seed=6), 6, 1.0)
    assert record == runner.campaign_record(run_campaign(100, seed=6), 6, 1.0)


def test_named_faults_of_the_loop(tmp_path):
    outcomes = runner.run_scenarios(runner.select(["core"]), tmp_path, lambda s: None, lambda o: None)
    assert [(o.name, o.detail) for o in outcomes if o.result != "passed"] == []
    assert len(outcomes) >= 10 and all(o.ticks > 100 for o in outcomes)
    records = json.loads(json.dumps([runner.outcome_record(o) for o in outcomes], default=str))
    again = [runner.outcome_of(record) for record in records]
    assert [runner.outcome_record(o) for o in again] == records


def test_a_named_fault_fails_if_the_loop_is_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(Governor, "approach", lambda self, measured: None)
    wanted = runner.select(["every stream fault in turn"])
    (outcome,) = runner.run_scenarios(wanted, tmp_path, lambda s: None, lambda o: None)
    assert outcome.result == "failed" and outcome.unsafe_ticks and "recovery jump" in outcome.detail
    assert tool.totals([outcome], None)["unsafe_commands"] == outcome.unsafe_ticks


def test_the_command_line(tmp_path, capsys):
    pytest.importorskip("rclpy")
    assert tool.main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert len(SCENARIOS) >= 30 and all(name in listed for name in (*SCENARIOS, *FAULTS))
    assert tool.main(["--only", "nothing like it"]) == 2
    out = tmp_path / "faults.json"
    assert tool.main(["--only", "campaign", "ticks missed", "--events", "60", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["totals"]["unsafe_commands"] == 0 and record["totals"]["faults_tried"] == 61
    assert record["campaign"]["events"] == 60 and record["invariants"] == INVARIANTS and not record["full"]


@pytest.fixture
def world(tmp_path):
    """A robot, a planner and a person around a controller that the test plays, and what makes its steps."""
    pytest.importorskip("rclpy")
    from a2c2_ros.msg import ControlStep

    from a2c2_ros.faults import dds
    from a2c2_ros.faults.arm_scenarios import write_arm_profile
    from a2c2_ros.nodes.conversions import to_time

    def step(stamp_ns):
        message = ControlStep(state=State.HOLDING, reason=Reason.NO_CHUNK, command=[0.0] * 7, slot=-1)
        message.header.stamp = to_time(stamp_ns)
        message.stream_names, message.stream_ages_s = ["joint_position"], [0.001]
        return message

    robot = dds.RobotFile.read(write_arm_profile(tmp_path / "arm.yaml", simulated=True), 50.0)
    domain_id = dds.free_domain()
    world = dds.World(dds.System(tmp_path, domain_id), domain_id, robot)
    yield SimpleNamespace(world=world, step=step, dds=dds)
    world.close()


def test_the_judge_of_nodes_is_told_what_was_sent_and_not_what_the_record_says(world):
    from sensor_msgs.msg import JointState

    world, make_step = world.world, world.step
    for i, is_sent in enumerate((True, True, False, True)):
        stamp_ns = T0 + i * 20_000_000
        step = make_step(stamp_ns)
        world.judge.sample("joint_position", stamp_ns - 1_000_000, stamp_ns, True, np.zeros(7))
        world._on_step(step, {"source_timestamp": stamp_ns + 2})  # it may come before its command
        if is_sent:
            command = JointState(position=step.command)
            command.header.stamp = step.header.stamp
            world._on_command(command, {"source_timestamp": stamp_ns + 1})
    world._join_commands()
    world._judge(T0 + 10**9)
    assert [v.tick for v in world.judge.violations if v.invariant == "record"] == [2]
    assert world.judge.ticks == 4 and 2 in world.judge.unsafe_ticks, "the robot fell silent in its hold"


@pytest.mark.parametrize(("every", "enough"), [(100, True), (12, True), (7, False), (4, False)])
def test_ticks_that_do_not_come_are_noticed(world, monkeypatch, every, enough):
    world, make_step, dds = world.world, world.step, world.dds
    for i in range(102):
        if i % every:
            world._on_step(make_step(T0 + i * 20_000_000), {"source_timestamp": T0 + i * 20_000_000})
    monkeypatch.setattr(world, "mark", lambda: dds.Mark(T0 + 100 * 20_000_000, 100.0))
    if enough:
        assert len(world.since(dds.Mark(T0, 0.0))) == 100 - 100 // every
    else:
        with pytest.raises(dds.ExpectationError, match=f"{100 - 100 // every} ticks came, 100.0 were due"):
            world.since(dds.Mark(T0, 0.0))


def test_no_tick_is_due_while_no_controller_runs(world):
    world, make_step = world.world, world.step
    begin = world.mark()
    assert world.mark().due == begin.due, "none has started"
    began_ns = begin.time_ns - 10**9
    world.no_ticks(began_ns)
    world._on_step(make_step(began_ns), {"source_timestamp": began_ns - 1})
    assert world.mark().due == world.mark().due, "it was on its way"
    world._on_step(make_step(began_ns), {"source_timestamp": world.mark().time_ns})
    assert world.mark().due < world.mark().due


@pytest.mark.timeout(150)
def test_named_faults_of_a_real_controller(tmp_path):
    pytest.importorskip("rclpy")
    runner.load_scenarios()
    wanted = runner.select(["hardware starts disabled", "joint states lost", "emergency stop"])
    outcomes = runner.run_scenarios(wanted, tmp_path, lambda s: None, lambda o: None)
    assert [(o.name, o.result, o.detail) for o in outcomes] == [(s.name, "passed", "") for s in wanted]
    assert all(o.ticks > 20 and not o.violations for o in outcomes)
    assert outcomes[1].holds and outcomes[1].recoveries and outcomes[1].holds_since_fault_ms
