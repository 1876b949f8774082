"""The control loop with everything that surrounds it in the node, without ROS and faster than real time.

A world of one robot, one planner, one clock and one person, advanced by control periods. Faults are functions that are
put into its lists and taken out again, so that any number of them can overlap. The judge sees all that is delivered.
"""

import contextlib
import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from a2c2_ros.core.chunk import ActionChunk
from a2c2_ros.core.config import ControllerConfig
from a2c2_ros.core.controller import ControlStep, CorrectionLoop
from a2c2_ros.core.errors import ChunkError, ObservationError, StateError
from a2c2_ros.core.head import HeadInput
from a2c2_ros.core.limits import Limits
from a2c2_ros.core.observation import ObservationBuffer, StreamSpec
from a2c2_ros.core.robot import Robot
from a2c2_ros.core.safety import HoldPolicy, Reason, State, Verdict
from a2c2_ros.core.timing import TickGrid
from a2c2_ros.faults.monitor import GivenChunk, Judge, Rules, Seen

SECOND_NS = 1_000_000_000
START_NS = 1_000 * SECOND_NS
SENSOR_LATENCY_NS = 2_000_000
SIGNAL_PERIOD_NS = 50_000_000  # of the emergency stop
SAMPLE_RATES_HZ = {"camera": 30.0, "joints": 100.0, "other joints": 40.0}
MAX_AGE_NS = 250_000_000
IMAGE_SHAPE = (2, 2, 3)
LONGEST_LEAVE = 5_000  # commands on the way to a hold


@dataclass(frozen=True)
class Kind:
    """A kind of robot, as numbers."""

    hold: str  # "delta" or "position"
    names: tuple[str, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]
    keep_default: float  # of the last channel, the gripper
    step: tuple[float | None, ...] | None = None
    velocity: tuple[float | None, ...] | None = None
    following: tuple[float | None, ...] | None = None  # largest distance of a moving arm from its command
    reports_ready: bool = False  # it says whether it executes commands
    first_joints: int | None = None  # so many are a stream, the others another driver's; None: all are one

    @property
    def parts(self) -> dict[str, slice]:
        """Streams of joints, and which of the joints each has."""
        if self.first_joints is None:
            return {"joints": slice(0, self.joints)}
        return {"joints": slice(0, self.first_joints), "other joints": slice(self.first_joints, self.joints)}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every stream and its shape."""
        return {"camera": IMAGE_SHAPE} | {name: (part.stop - part.start,) for name, part in self.parts.items()}

    def position_of(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """(A,) float64 position that streams tell, NaN for what they do not."""
        position = np.full(len(self.names), np.nan)
        for name, part in self.parts.items():
            if name in values:
                position[part] = values[name]
        return position

    @property
    def joints(self) -> int:
        """Measured channels: all but the gripper."""
        return len(self.names) - 1


_DELTA = Kind("delta", ("x", "y", "yaw", "gripper"), (-1.0,) * 4, (1.0,) * 4, -1.0)
_POSITION = Kind(
    "position",
    ("j1", "j2", "j3", "gripper"),
    (-1.5, -1.5, -1.5, 0.0),
    (1.5, 1.5, 1.5, 0.08),
    0.04,
    step=(None, None, 0.05, None),
    velocity=(2.0, 2.0, 3.0, None),
    following=(0.65, 0.65, 0.5, None),
)
KINDS = {
    "pose delta": _DELTA,
    "pose delta, ramped": replace(_DELTA, step=(0.3, 0.3, 0.4, 0.5)),
    "joint position": _POSITION,
    "joint position, says whether it executes": replace(_POSITION, reports_ready=True),
    "joint position, of two drivers": replace(_POSITION, first_joints=2),
}


def make_robot(kind: Kind, simulated: bool) -> Robot:
    """The robot as the loop gets it."""
    is_position = kind.hold == "position"
    gripper = len(kind.names) - 1
    return Robot(
        name="fault rig",
        action_names=kind.names,
        action_space=kind.hold,
        streams={
            name: StreamSpec(shape, "uint8" if name == "camera" else "float64", MAX_AGE_NS)
            for name, shape in kind.shapes.items()
        },
        cameras=("camera",),
        state_names=kind.names[:-1],
        state_of=lambda values: values["joints"].astype(np.float32),
        measured_of=kind.position_of if is_position else lambda values: None,
        measured_streams=tuple(kind.parts) if is_position else (),
        limits=Limits.of(
            kind.names,
            kind.lower,
            kind.upper,
            kind.step,
            kind.velocity,
            dict(zip(kind.names, kind.following or ())),
        ),
        hold=HoldPolicy(kind.hold, len(kind.names), keep=(gripper,), keep_default=(kind.keep_default,)),
        simulated=simulated,
        reports_ready=kind.reports_ready,
    )


def make_rules(kind: Kind, config: ControllerConfig) -> Rules:
    """The same robot as the judge gets it."""

    def numbers(values: tuple[float | None, ...] | None) -> np.ndarray:
        return np.array([np.inf if v is None else v for v in values or (None,) * len(kind.names)])

    return Rules(
        kind=kind.hold,
        names=kind.names,
        lower=np.array(kind.lower),
        upper=np.array(kind.upper),
        step=numbers(kind.step),
        velocity=numbers(kind.velocity),
        following=numbers(kind.following),
        period_ns=round(1e9 / config.control_rate_hz),
        max_ages_ns=dict.fromkeys(kind.shapes, MAX_AGE_NS),
        keep=(len(kind.names) - 1,),
        keep_default=(kind.keep_default,),
        measured_streams=tuple(kind.parts) if kind.hold == "position" else (),
        reports_ready=kind.reports_ready,
        **_rules_of(config),
    )


def _rules_of(config: ControllerConfig) -> dict[str, Any]:
    return {
        "max_chunk_age_ns": round(config.max_chunk_age_s * 1e9),
        "future_tolerance_ns": round(config.future_tolerance_s * 1e9),
        "action_margin": config.action_margin,
        "residual_limit": config.residual_limit,
        "rearm_after_ns": round(config.rearm_after_s * 1e9),
        "stop_timeout_ns": round(config.emergency_stop_timeout_s * 1e9),
        "takeover_timeout_ns": round(config.takeover_timeout_s * 1e9),
    }


@dataclass
class Sample:
    """A sensor sample on its way to the loop."""

    stream: str
    stamp_ns: int
    value: np.ndarray
    delay_ns: int = SENSOR_LATENCY_NS

    def sound(self, shape: tuple[int, ...]) -> bool:
        """Whether its shape, dtype and values are right."""
        dtype = np.uint8 if self.stream == "camera" else np.float64
        return self.value.shape == shape and self.value.dtype == dtype and bool(np.isfinite(self.value).all())


@dataclass
class ChunkOnItsWay:
    """A chunk on its way to the loop."""

    chunk_id: int
    t_obs_ns: int
    step_ns: int
    actions: np.ndarray
    names: tuple[str, ...]
    planner: str
    delay_ns: int

    def copy(self) -> "ChunkOnItsWay":
        """Another one with equal contents."""
        return replace(self, actions=self.actions.copy())

    def given(self) -> GivenChunk:
        """As the judge gets it."""
        return GivenChunk(self.chunk_id, self.t_obs_ns, self.step_ns, self.actions, tuple(self.names), self.planner)


class RigHead:
    """A head that returns small residuals and fails as it is told."""

    def __init__(self, rig: "Rig") -> None:
        self._rig = rig

    def correct(self, inputs: HeadInput) -> Any:
        residual = np.resize(np.float32([0.01, -0.01]), inputs.base_action.shape)
        self._rig.head_clock_ns += 1_000_000
        for fault in self._rig.head_faults:
            residual = fault(residual)
        return residual


class Arm:
    """A servo that follows its command with a lag, sags, and floats when nobody commands it."""

    LAG_S, SPEED, SAG = 0.05, 2.5, 0.008

    def __init__(self, joints: int, rng: np.random.Generator) -> None:
        self.position = rng.uniform(-0.5, 0.5, joints)
        self.hand: np.ndarray | None = None  # where a person pulls it while it floats
        self.blocked = 0
        self._rng = rng

    def advance(self, command: np.ndarray | None, duration_s: float) -> None:
        """Move for a while, towards a command or a hand."""
        goal = self.hand if command is None else command - self.SAG
        if goal is None or (self.blocked and command is not None):
            return
        share, largest = 1.0 - np.exp(-duration_s / self.LAG_S), self.SPEED * duration_s
        self.position = self.position + np.clip((goal - self.position) * share, -largest, largest)

    def measured(self) -> np.ndarray:
        """(joints,) float64 with noise."""
        return self.position + self._rng.normal(0.0, 2e-4, self.position.shape)


@dataclass
class _Totals:
    ticks: int = 0
    states: Counter = field(default_factory=Counter)
    reasons: Counter = field(default_factory=Counter)
    chunks: int = 0


class Rig:
    """One loop in its world.

    Args:
        kind: Robot.
        seed: Equal seeds give equal worlds.
        simulated: False: hardware, which starts disabled.
        horizon: H of the planner's chunks.
        **parameters: Of the controller.
    """

    def __init__(
        self, kind: Kind, seed: int = 0, *, simulated: bool = True, horizon: int = 40, **parameters: Any
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.kind = kind
        self.config = ControllerConfig(**({"correction__model_path": ""} | parameters))
        self.period_ns = self.config.period_ns
        self.steady_ns = 0
        self.clock_ns = START_NS
        self.clock_stopped = 0  # how many faults stop it
        self.ticks_to_miss = 0
        self.signal_lost = 0
        self.pressed = 0
        self.stopped = 0  # how many faults keep the robot stopped
        self.head_clock_ns = 0
        self.head_rests_until_ns = -1
        self.stream_faults: dict[str, list[Callable[[Sample], Sample | None]]] = {n: [] for n in SAMPLE_RATES_HZ}
        self.chunk_faults: list[Callable[[list[ChunkOnItsWay]], list[ChunkOnItsWay]]] = []
        self.head_faults: list[Callable[[np.ndarray], Any]] = []
        self.people: list[Callable[[], tuple[np.ndarray, int]]] = []  # command and stamp [ns] of every period
        self.arm = Arm(kind.joints, self.rng)
        self.last_step: ControlStep | None = None
        self._robot = make_robot(kind, simulated)
        self._starts_enabled = simulated and not kind.reports_ready
        self.judge = Judge(make_rules(kind, self.config), self._starts_enabled)
        self._totals = _Totals()
        self._phase = self.rng.uniform(0.0, 2 * np.pi, len(kind.names))
        self._speed = self.rng.uniform(0.3, 3.0)
        self._execution_horizon = max(1, horizon // 2)
        self.horizons = [horizon]  # the last one counts
        self.planner_delays_ns = [round(self.rng.uniform(0.0, 0.2) * horizon) * self.period_ns]
        self._on_the_way: list[tuple[int, int, Any]] = []
        self._order = itertools.count()
        self._sample_due_ns = dict.fromkeys(SAMPLE_RATES_HZ, 0)
        self._signal_due_ns = 0
        self._standing_ns = 0
        self.planner_starts = 0
        self.head = RigHead(self)
        self._start_loop()
        self.start_planner()

    # --- what a person and a system do --------------------------------------------------------------------------

    def start_planner(self) -> None:
        """Start the planner anew: another id, numbers from 1."""
        self.planner_starts += 1
        self.planner = f"planner {self.planner_starts}"
        self.chunk_id = 0
        self._chunk_due_ns = self.steady_ns

    def start(self) -> None:
        """A robot of the kind that says whether it executes commands says so, and a person enables the loop."""
        if self.kind.reports_ready:
            self.robot_says()
            self.enable()

    def faults_of(self, stream: str, rng: np.random.Generator) -> list[Callable[[Sample], Sample | None]]:
        """Where a fault of a stream goes; one of the joints is that of any of their drivers."""
        drivers = list(self.kind.parts)
        if stream == "joints" and len(drivers) > 1:
            stream = str(rng.choice(drivers))
        return self.stream_faults[stream]

    def restart_loop(self) -> None:
        """Kill the loop and start it anew; the robot keeps its last command."""
        self._add_totals()
        self._start_loop()
        self.judge.restarted(self._starts_enabled)
        self._chunk_due_ns = self.steady_ns

    def leave(self) -> None:
        """Deactivate the loop and activate it again."""
        observation = self._buffer.snapshot()
        for command in itertools.islice(self.loop.stop(self.clock_ns, observation), LONGEST_LEAVE):
            self.steady_ns += self.period_ns
            self._command = command
            ages = observation.ages_ns(self.clock_ns)
            no = np.zeros(len(self.kind.names))
            self.judge.leave(
                Seen(self.clock_ns, self.steady_ns, State.STOPPED, Reason.DISABLED, command, ages, 0, 0, -1, no, no)
            )
            self._move()
        self.judge.left()
        self._buffer.clear()
        self._grid = TickGrid(self.period_ns)
        self._chunk_due_ns = self.steady_ns  # the planner is asked for what was observed since

    def enable(self) -> bool:
        """A person enables the loop; False if it refuses."""
        try:
            self.loop.enable()
        except StateError:
            self.judge.enable(accepted=False)
            return False
        self.judge.enable()
        self._chunk_due_ns = self.steady_ns
        return True

    def disable(self) -> None:
        """A person disables the loop."""
        self.loop.disable()
        self.judge.disable()

    def signal(self) -> None:
        """The emergency stop sends its state."""
        self.loop.emergency_stop(self.pressed > 0, self.clock_ns)
        self.judge.emergency_stop(self.pressed > 0, self.clock_ns)

    def robot_says(self) -> None:
        """The robot says whether it executes commands, if it is of the kind that does."""
        if self.kind.reports_ready:
            self.loop.latch.robot_ready(not self.stopped)
            self.judge.robot_ready(not self.stopped)

    def take_over(self, command: np.ndarray, stamp_ns: int) -> None:
        """A person commands the robot."""
        self.judge.takeover(command, stamp_ns, self.clock_ns)
        with contextlib.suppress(ObservationError):  # if it was sound, the judge will miss it
            self.loop.take_over(command, stamp_ns, self.clock_ns)

    def set_parameters(self, changes: Mapping[str, Any]) -> None:
        """Change parameters as over the service.

        Raises:
            ConfigError: If they are refused.
        """
        self.config = self.config.replaced(changes)
        self._configure()

    def swap_head(self, head: Any) -> None:
        """Use another head, None for none."""
        self.head = head
        self._configure()

    @property
    def silent(self) -> bool:
        """True if the robot is under no command."""
        return self._command is None

    # --- time ---------------------------------------------------------------------------------------------------

    def run(self, duration_s: float) -> None:
        """Advance."""
        for _ in range(max(1, round(duration_s * 1e9 / self.period_ns))):
            self.step()

    def run_until(self, condition: Callable[[], bool], limit_s: float) -> bool:
        """Advance until the condition holds; False if it does not within the limit."""
        end_ns = self.steady_ns + round(limit_s * 1e9)
        while self.steady_ns < end_ns:
            if condition():
                return True
            self.step()
        return condition()

    def step(self) -> None:
        """Advance by one control period."""
        self.steady_ns += self.period_ns
        if self.clock_stopped:
            self._standing_ns += self.period_ns
        else:
            self.clock_ns += self.period_ns
            self._standing_ns = 0
        self._sense()
        self._plan()
        if self.config.emergency_stop_timeout_s and not self.signal_lost and self.steady_ns >= self._signal_due_ns:
            self._signal_due_ns = self.steady_ns + SIGNAL_PERIOD_NS
            self.signal()
        self._deliver()
        for person in self.people:
            self.take_over(*person())
        if self.ticks_to_miss:
            self.ticks_to_miss -= 1
        elif not self.clock_stopped:
            self._on_clock()
        elif self._standing_ns > self.config.clock_timeout_s * 1e9 and self._grid.next_ns is not None:
            self._tick(self._grid.next_ns - self.period_ns, Verdict(State.HOLDING, Reason.CLOCK_STOPPED))
        self._move()

    def finish(self) -> None:
        """Compare the counters; the loop is not used any more."""
        self._add_totals()
        totals = self._totals
        self.judge.finish(totals.ticks, totals.states, totals.reasons, totals.chunks)

    # --- inside -------------------------------------------------------------------------------------------------

    def _start_loop(self) -> None:
        self._command: np.ndarray | None = None
        self._buffer = ObservationBuffer(self._robot.streams)
        self._grid = TickGrid(self.period_ns)
        self.loop = CorrectionLoop(self.config, self._robot, self.head, monotonic_ns=lambda: self.head_clock_ns)
        self.loop.forget()

    def _configure(self) -> None:
        self.loop.configure(self.config, self.head)
        self.judge.rules = replace(self.judge.rules, **_rules_of(self.config))

    def _add_totals(self) -> None:
        totals, loop = self._totals, self.loop
        totals.ticks += loop.ticks
        totals.states.update(loop.counts)
        totals.reasons.update(loop.reasons)
        totals.chunks += sum(loop.chunks.values())

    def _send(self, delay_ns: int, item: Any) -> None:
        heapq.heappush(self._on_the_way, (self.steady_ns + delay_ns, next(self._order), item))

    def _sense(self) -> None:
        for stream in self.kind.shapes:
            rate_hz = SAMPLE_RATES_HZ[stream]
            if self.steady_ns < self._sample_due_ns[stream]:
                continue
            behind_ns = (self.steady_ns - self._sample_due_ns[stream]) % round(1e9 / rate_hz)
            self._sample_due_ns[stream] = self.steady_ns - behind_ns + round(1e9 / rate_hz)
            if self.clock_stopped:  # a paused simulator senses nothing
                continue
            if stream == "camera":
                value = np.zeros(IMAGE_SHAPE, np.uint8)
            else:
                value = self.arm.measured()[self.kind.parts[stream]]
            sample: Sample | None = Sample(stream, self.clock_ns - behind_ns, value)
            for fault in self.stream_faults[stream]:
                sample = sample and fault(sample)
            if sample is not None:
                self._send(sample.delay_ns, sample)

    def _plan(self) -> None:
        if self.steady_ns < self._chunk_due_ns:
            return
        self._chunk_due_ns = self.steady_ns + self._execution_horizon * self.period_ns
        self.chunk_id += 1
        chunks = [self.make_chunk(self.planner, self.chunk_id)]
        for fault in self.chunk_faults:
            chunks = fault(chunks)
        for chunk in chunks:
            self._send(chunk.delay_ns, chunk)

    def make_chunk(self, planner: str, chunk_id: int) -> ChunkOnItsWay:
        """A chunk of the observation that is taken now."""
        times_s = (self.clock_ns - START_NS + self.period_ns * np.arange(self.horizons[-1])) / 1e9
        wave = np.sin(self._speed * times_s[:, None] + self._phase)
        lower, upper = np.array(self.kind.lower), np.array(self.kind.upper)
        actions = (lower + upper) / 2 + 0.6 * wave * (upper - lower)
        return ChunkOnItsWay(
            chunk_id,
            self.clock_ns,
            self.period_ns,
            actions.astype(np.float32),
            self.kind.names,
            planner,
            self.planner_delays_ns[-1],
        )

    def _deliver(self) -> None:
        while self._on_the_way and self._on_the_way[0][0] <= self.steady_ns:
            item = heapq.heappop(self._on_the_way)[2]
            if isinstance(item, Sample):
                self._take_sample(item)
            else:
                self._take_chunk(item)

    def _take_sample(self, sample: Sample) -> None:
        measured, sound = None, sample.sound(self.kind.shapes[sample.stream])
        if sample.stream != "camera" and sound and self.kind.hold == "position":
            measured = self.kind.position_of({sample.stream: sample.value})
        self.judge.sample(sample.stream, sample.stamp_ns, self.clock_ns, sound, measured)
        with contextlib.suppress(ObservationError):  # if it was sound, the judge will miss the recovery
            latest_ns = self.clock_ns + self.config.future_tolerance_ns
            self._buffer.put(sample.stream, sample.stamp_ns, sample.value, latest_ns)

    def _take_chunk(self, chunk: ChunkOnItsWay) -> None:
        given = chunk.given()
        accepted = False
        try:
            made = ActionChunk(
                chunk.chunk_id,
                chunk.t_obs_ns,
                chunk.step_ns,
                chunk.actions,
                chunk.names,
                latent=np.zeros(2),
                language=np.zeros(0),
                policy_id="rig",
                planner_id=chunk.planner,
            )
        except ChunkError as error:
            self.loop.refused(error)
        else:
            with contextlib.suppress(ChunkError):  # the loop counts it
                accepted = self.loop.install(made, self.clock_ns)
        self.judge.chunk(given, self.clock_ns, accepted)

    def _on_clock(self) -> None:
        """As the node: a tick at its deadline, or when the clock went back."""
        now_ns, next_ns = self.clock_ns, self._grid.next_ns
        if next_ns is not None and now_ns < next_ns < now_ns + 2 * self.period_ns:
            return
        if next_ns is not None and next_ns <= now_ns < next_ns + self.period_ns:
            now_ns = next_ns  # it was due within this period
        tick = self._grid.tick(now_ns, self.steady_ns)
        if tick is None:
            return
        problem = None
        if tick.jump_ns < 0:
            self.loop.forget()
            self._buffer.clear()
            problem = Verdict(State.HOLDING, Reason.CLOCK_JUMPED)
        self._tick(tick.t_tick_ns, problem)

    def _tick(self, t_tick_ns: int, problem: Verdict | None) -> None:
        head_began_ns = self.head_clock_ns
        enabled, holds = self.config.correction__enabled, self.config.correction__on_failure == "hold"
        self.judge.head_fails = enabled and holds and self.head is not None and bool(self.head_faults)
        self.judge.head_rests = enabled and self.clock_ns <= self.head_rests_until_ns
        try:
            step = self.loop.tick(t_tick_ns, self._buffer.snapshot(), problem)
        except Exception as error:  # noqa: BLE001, what the node does with a defect
            self.loop.fault(f"{type(error).__name__}: {error}")
            self.judge.defect()
            return
        if self.head_faults:
            rests_ns = self.head_clock_ns - head_began_ns + round(self.config.correction__retry_after_s * 1e9)
            self.head_rests_until_ns = max(self.head_rests_until_ns, t_tick_ns + rests_ns + self.period_ns)
        self.last_step = step
        self._command = step.command
        self.judge.tick(
            Seen(
                t_ns=step.t_tick_ns,
                wall_ns=self.steady_ns,
                state=step.state,
                reason=step.reason,
                command=step.command,
                ages_ns=step.ages_ns,
                t_obs_ns=step.t_obs_ns,
                chunk_id=step.chunk_id,
                slot=step.slot,
                base_action=step.base_action,
                residual=step.residual,
                sent_ns=t_tick_ns + step.head_ns,
            )
        )

    def _move(self) -> None:
        command = None if self._command is None else self._command[: self.kind.joints].astype(np.float64)
        if self.kind.hold == "position":
            self.arm.advance(command, self.period_ns / 1e9)
