"""Computes a recorded run again, through the control loop that ran it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from a2c2_ros.core.chunk import ActionChunk
from a2c2_ros.core.config import ControllerConfig
from a2c2_ros.core.controller import ControlStep, CorrectionLoop
from a2c2_ros.core.errors import ChunkError
from a2c2_ros.core.head import CorrectionHead
from a2c2_ros.core.observation import Observation
from a2c2_ros.core.robot import Robot
from a2c2_ros.core.safety import LATCHED, Reason, State, Verdict

AGE_RESOLUTION = 1e-6
"""Ages are recorded as float32: a stamp that follows from one is known up to this part of the age and a microsecond."""


@dataclass(frozen=True, eq=False)
class RecordedStep:
    """What the record says of one control step; the names are those of :class:`ControlStep`."""

    tick: int
    configuration: int  # revision in use
    t_tick_ns: int
    state: State
    reason: Reason
    detail: str
    t_obs_ns: int  # stamp of the chunk's observation, 0 if there is no chunk
    slot: int
    command: np.ndarray | None  # (A,) float32
    ages_ns: Mapping[str, int]  # of the streams that had delivered
    takeover_age_ns: int | None
    head_ns: int


class Samples:
    """Recorded samples of one stream, in the order of their stamps, decoded when they are asked for.

    Args:
        stamps_ns: (n,) int64, rising.
        read: Number of a sample to its value.
    """

    def __init__(self, stamps_ns: np.ndarray, read: Callable[[int], np.ndarray]) -> None:
        self.stamps_ns = stamps_ns
        self._read = read

    def at(self, t_tick_ns: int, age_ns: int) -> tuple[int, np.ndarray] | None:
        """The sample that had this age at the tick: stamp [ns] and value; None if it was not recorded."""
        wanted_ns = t_tick_ns - age_ns
        after = int(np.searchsorted(self.stamps_ns, wanted_ns))
        near = [i for i in (after - 1, after) if 0 <= i < len(self.stamps_ns)]
        if not near:
            return None
        index = min(near, key=lambda i: abs(int(self.stamps_ns[i]) - wanted_ns))
        stamp_ns = int(self.stamps_ns[index])
        if abs(stamp_ns - wanted_ns) > 1000 + AGE_RESOLUTION * abs(age_ns):
            return None
        return stamp_ns, self._read(index)


def observed(step: RecordedStep, samples: Mapping[str, Samples]) -> tuple[Observation, tuple[str, ...]]:
    """The observation that a step was decided on, and the streams whose sample was not recorded."""
    values, stamps, missing = {}, {}, []
    for name, age_ns in step.ages_ns.items():
        sample = samples[name].at(step.t_tick_ns, age_ns) if name in samples else None
        if sample is None:
            missing.append(name)
        else:
            stamps[name], values[name] = sample
    return Observation(values, stamps), tuple(missing)


@dataclass(frozen=True)
class Replayed:
    """A recorded step and what the loop decides now."""

    recorded: RecordedStep
    step: ControlStep | None  # None if it could not be computed
    lacks: tuple[str, ...] = ()  # what was not recorded: streams, chunk, takeover, configuration

    @property
    def same(self) -> bool:
        """The command is bit for bit what was executed, for the same reason."""
        if self.step is None or (self.step.state, self.step.reason) != (self.recorded.state, self.recorded.reason):
            return False
        mine, theirs = self.step.command, self.recorded.command
        if mine is None or theirs is None:
            return mine is theirs
        return mine.tobytes() == theirs.tobytes()


def replay(
    steps: Iterable[RecordedStep],
    configurations: Mapping[int, tuple[ControllerConfig, CorrectionHead | None]],
    robot: Robot,
    chunks: Mapping[int, ActionChunk],
    samples: Mapping[str, Samples],
    takeovers: Samples | None = None,
) -> Iterator[Replayed]:
    """Run the control loop on a record.

    The record says what a tick saw and what people did; slots, limits, holds and corrections are computed anew. A step
    that lacks something is not computed, and the loop goes on from the recorded command.

    Args:
        steps: In their order.
        configurations: Revision to parameters and head.
        robot: The robot.
        chunks: By the stamp of their observation [ns].
        samples: By stream.
        takeovers: Commands of a person, (A,) each.
    """
    loop: CorrectionLoop | None = None
    revision = 0
    clock = _HeadClock()
    for recorded in steps:
        if recorded.configuration not in configurations:
            yield Replayed(recorded, None, ("configuration",))
            continue
        if loop is None:
            config, head = configurations[recorded.configuration]
            loop = CorrectionLoop(config, robot, head, monotonic_ns=clock)
        elif recorded.configuration != revision:
            loop.configure(*configurations[recorded.configuration])
        revision = recorded.configuration
        observation, lacks = observed(recorded, samples)
        lacks += _provide(loop, recorded, chunks, takeovers)
        if lacks:
            loop.adopt(recorded.command)
            yield Replayed(recorded, None, lacks)
            continue
        _follow_people(loop, recorded)
        clock.head_ns = recorded.head_ns
        yield Replayed(recorded, loop.tick(recorded.t_tick_ns, observation, _clock_problem(loop, recorded)))


class _HeadClock:
    """Stands still but for the head's recorded time: a head that was late is late again."""

    def __init__(self) -> None:
        self.head_ns = 0
        self._running = False

    def __call__(self) -> int:
        self._running = not self._running
        return 0 if self._running else self.head_ns


def _provide(
    loop: CorrectionLoop, recorded: RecordedStep, chunks: Mapping[int, ActionChunk], takeovers: Samples | None
) -> tuple[str, ...]:
    """Hand over the chunk and the person's command of a step; what of it was not recorded."""
    lacks = []
    if recorded.t_obs_ns:
        chunk = chunks.get(recorded.t_obs_ns)
        try:
            if chunk is None:
                lacks.append("chunk")
            else:
                loop.install(chunk, recorded.t_tick_ns)
        except ChunkError:
            lacks.append("chunk")
    if recorded.takeover_age_ns is not None:
        person = None if takeovers is None else takeovers.at(recorded.t_tick_ns, recorded.takeover_age_ns)
        if person is None:
            lacks.append("takeover")
        else:
            loop.take_over(person[1], person[0], max(recorded.t_tick_ns, person[0]))
    return tuple(lacks)


def _follow_people(loop: CorrectionLoop, recorded: RecordedStep) -> None:
    """Enable, disable, stop as it happened."""
    if recorded.state not in LATCHED:
        loop.emergency_stop(False, recorded.t_tick_ns)  # where its signal is required, it was heard
        loop.latch.robot_ready(True)
        if loop.latched:
            loop.enable()
    elif recorded.reason == Reason.EMERGENCY_STOP_LOST:
        loop.emergency_stop(False, 0)
    elif recorded.reason == Reason.EMERGENCY_STOP:
        loop.emergency_stop(True, recorded.t_tick_ns)
    elif recorded.reason == Reason.DISABLED:
        loop.latch.robot_ready(True)
        loop.disable()
    elif recorded.reason == Reason.ROBOT_STOPPED:
        loop.latch.robot_ready(False, recorded.detail)
    elif recorded.reason == Reason.NOT_FOLLOWING:
        loop.latch.not_following(recorded.detail)
    elif recorded.state == State.FAULT:
        loop.fault(recorded.detail)


def _clock_problem(loop: CorrectionLoop, recorded: RecordedStep) -> Verdict | None:
    """What the loop's owner said of the clock."""
    if recorded.reason not in (Reason.CLOCK_JUMPED, Reason.CLOCK_STOPPED):
        return None
    if recorded.reason == Reason.CLOCK_JUMPED:
        loop.forget()
    return Verdict(recorded.state, recorded.reason, recorded.detail)
