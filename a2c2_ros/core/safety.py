"""The state machine of the control loop: its states, the reasons for every transition, the latches of a person."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from a2c2_ros.core.errors import ConfigError, StateError


class State(IntEnum):
    """State of the control loop, as published in ControlStep."""

    WAITING = 0  # enabled, no chunk has arrived yet, nothing is commanded
    RUNNING = 1  # base action + correction
    BASE_ONLY = 2  # base action alone
    HOLDING = 3  # the safe command, because data is missing, stale or wrong; goes on by itself
    STOPPED = 4  # disabled or stopped on purpose: the safe command, then silence; goes on when a person enables
    FAULT = 5  # a defect: as STOPPED
    TAKEOVER = 6  # a person's command within the limits; chunk and slot are in the record, but not executed


class Reason(IntEnum):
    """Why the control loop is in its state."""

    NONE = 0
    NO_CHUNK = 1  # no chunk has arrived that was observed since the start, the last reset or the last stop
    CHUNK_EXPIRED = 2  # every chunk is used up, or its observation is older than max_chunk_age_s
    OBSERVATION_MISSING = 3  # a stream has never delivered
    OBSERVATION_STALE = 4  # a stream's newest sample is older than its limit
    OBSERVATION_FUTURE = 5  # a stream's newest sample is from the future: clocks differ
    CORRECTION_DISABLED = 6  # correction.enabled is false
    NO_HEAD = 7  # no head is loaded
    HEAD_MISMATCH = 8  # the head was not trained for this chunk
    HEAD_NOT_FINITE = 9  # the head returned NaN or Inf
    RESIDUAL_TOO_LARGE = 10  # the head's output exceeds residual_limit
    DISABLED = 11  # not enabled yet, or disabled by a person
    HEAD_FAILED = 12  # the head's runtime refused the input
    EMERGENCY_STOP = 13  # the emergency stop was pressed
    EMERGENCY_STOP_LOST = 14  # the emergency stop's signal was not heard for emergency_stop_timeout_s
    INTERNAL_ERROR = 15  # the loop itself failed
    HEAD_LATE = 16  # the head took longer than correction.deadline_s; it rests for correction.retry_after_s
    CLOCK_JUMPED = 17  # the clock went back: everything that was known is void
    CLOCK_STOPPED = 18  # the ROS clock stands still
    REARMING = 19  # data is back: it must stay, and the command starts from the measured state
    OUTSIDE_LIMITS = 20  # the measured position is outside the limits by more than a step: a person must move it
    TAKEOVER_ENDED = 21  # a person has let go: no chunk has come that was observed since
    NOT_FOLLOWING = 22  # the arm is measured far from its command: blocked, stopped by itself, slower than its limits
    ROBOT_STOPPED = 23  # the robot says that it executes no commands, or was not heard yet


EXECUTING = frozenset({State.RUNNING, State.BASE_ONLY})
"""The policy's chunk is executed."""
MOVING = EXECUTING | {State.TAKEOVER}
LATCHED = frozenset({State.STOPPED, State.FAULT})


NOT_READY = "the robot says that it executes no commands"
NEVER_HEARD = "the robot has not said yet that it executes commands"
READY_AGAIN = "the robot executes commands now, not enabled since"


@dataclass(frozen=True)
class Verdict:
    """A state with its reason."""

    state: State
    reason: Reason = Reason.NONE
    detail: str = ""  # for people: the stream, the mismatch; empty if there is nothing to say


class Latch:
    """What a person, an arm or a defect has switched off; nothing but :meth:`enable` switches it on again.

    Args:
        enabled: State at the start.
        stop_timeout_ns: Without a signal of the emergency stop for this long the loop stops [ns]; 0: no signal is
            expected.
        ready: False: the robot tells whether it executes commands, and has not said so yet.
    """

    def __init__(self, enabled: bool, stop_timeout_ns: int = 0, ready: bool = True) -> None:
        self._verdict = None if enabled else Verdict(State.STOPPED, Reason.DISABLED, "not enabled yet")
        self._pressed = False
        self.robot_ready(ready, NEVER_HEARD)
        self._stop_timeout_ns = stop_timeout_ns
        self._signal_ns: int | None = None

    @property
    def verdict(self) -> Verdict | None:
        """The latched state, or None if the loop may run."""
        return self._verdict

    def enable(self) -> None:
        """A person takes the responsibility: ends STOPPED and FAULT.

        Raises:
            StateError: If the emergency stop is pressed, or the robot executes no commands.
        """
        if self._pressed:
            raise StateError("the emergency stop is pressed, allowed is to enable after its release")
        if not self._ready:
            raise StateError(f"{self._why_not_ready}, allowed is to enable when it does")
        self._verdict = None
        self._signal_ns = None

    def disable(self) -> None:
        """Stop on purpose; an emergency stop or fault stays what it is."""
        if self._verdict is None:
            self._verdict = Verdict(State.STOPPED, Reason.DISABLED)

    def emergency_stop(self, pressed: bool, now_ns: int) -> None:
        """Signal of the emergency stop. A release does not enable."""
        self._pressed = pressed
        self._signal_ns = now_ns
        if pressed:
            self._verdict = Verdict(State.STOPPED, Reason.EMERGENCY_STOP)

    def robot_ready(self, ready: bool, detail: str = NOT_READY) -> None:
        """Whether the robot says that it executes commands. That it does again does not enable.

        Args:
            ready: What it says.
            detail: Why it counts as not ready.
        """
        self._ready, self._why_not_ready = ready, detail
        reason = None if self._verdict is None else self._verdict.reason
        if not ready and reason in (None, Reason.DISABLED, Reason.ROBOT_STOPPED):
            self._verdict = Verdict(State.STOPPED, Reason.ROBOT_STOPPED, self._why_not_ready)
        elif ready and reason == Reason.ROBOT_STOPPED:
            self._verdict = Verdict(State.STOPPED, Reason.DISABLED, READY_AGAIN)

    def not_following(self, detail: str) -> None:
        """The arm is elsewhere than commanded, and a person has to see why; another stop stays what it is."""
        if self._verdict is None:
            self._verdict = Verdict(State.STOPPED, Reason.NOT_FOLLOWING, detail)

    def fault(self, reason: Reason, detail: str) -> None:
        """A defect; an emergency stop stays what it is."""
        if self._verdict is None or self._verdict.reason != Reason.EMERGENCY_STOP:
            self._verdict = Verdict(State.FAULT, reason, detail)

    def watch(self, now_ns: int) -> None:
        """Stop if the emergency stop's signal is lost; called every tick."""
        if not self._stop_timeout_ns or self._verdict is not None:
            return
        if self._signal_ns is None or now_ns < self._signal_ns:  # enabled, or the clock jumped: the time begins now
            self._signal_ns = now_ns
        if now_ns - self._signal_ns > self._stop_timeout_ns:
            silence_s = (now_ns - self._signal_ns) / 1e9
            self._verdict = Verdict(State.STOPPED, Reason.EMERGENCY_STOP_LOST, f"no signal for {silence_s:.3f} s")


@dataclass(frozen=True, eq=False)
class HoldPolicy:
    """The safe command.

    ``delta`` (velocities, twists, pose deltas): zero motion. ``position``: the measured position when holding began, so
    that the arm stays where it is; without a measurement the last command. Channels in ``keep`` (a gripper) keep their
    last command in both.
    """

    kind: str  # "delta" or "position"
    size: int  # A
    keep: tuple[int, ...] = ()  # channels that keep their last command
    keep_default: tuple[float, ...] = ()  # their value before the first command

    def __post_init__(self) -> None:
        if self.kind not in ("delta", "position"):
            raise ConfigError(f"hold kind is {self.kind!r}, allowed are 'delta' and 'position'")
        if len(self.keep) != len(self.keep_default):
            raise ConfigError(f"hold keeps channels {self.keep} but has {len(self.keep_default)} default values")

    def target(self, previous: np.ndarray, measured: np.ndarray | None) -> np.ndarray:
        """The safe command to go to.

        Args:
            previous: (A,) last command.
            measured: (A,) measured position, NaN in channels without one; None if it is not known.

        Returns:
            (A,) float32.
        """
        if self.kind == "delta":
            target = np.zeros(self.size, dtype=np.float32)
        elif measured is None:
            target = previous.astype(np.float32)
        else:
            target = np.where(np.isnan(measured), previous, measured).astype(np.float32)
        keep = list(self.keep)
        target[keep] = previous[keep]
        return target

    def seed(self, measured: np.ndarray | None, last: np.ndarray | None = None) -> np.ndarray | None:
        """What stands for the last command when none holds: the first command may differ from it by one step.

        Args:
            measured: As of :meth:`target`.
            last: (A,) the last command before the silence, in which a gripper stays; None if there was none.

        Returns:
            (A,) float32; None if the kind is ``position`` and the position of a channel that is not kept is not known.
        """
        rest = np.zeros(self.size, dtype=np.float32)
        keep = list(self.keep)
        rest[keep] = self.keep_default if last is None else last[keep]
        if self.kind == "delta":
            return rest
        if measured is None or set(np.flatnonzero(np.isnan(measured))) - set(keep):
            return None
        return np.where(np.isnan(measured), rest, measured).astype(np.float32)


def stale_stream(
    ages_ns: dict[str, int], max_ages_ns: dict[str, int], future_tolerance_ns: int
) -> tuple[Reason, str] | None:
    """The first stream that may not move the robot, and why.

    Args:
        ages_ns: Age of each stream's newest sample [ns]; a stream that never delivered is absent.
        max_ages_ns: Allowed age of each stream [ns].
        future_tolerance_ns: How far a stamp may lie in the future [ns].

    Returns:
        (reason, stream name), or None if every stream is fresh.
    """
    for name, limit in max_ages_ns.items():
        age = ages_ns.get(name)
        if age is None:
            return Reason.OBSERVATION_MISSING, name
        if age > limit:
            return Reason.OBSERVATION_STALE, name
        if age < -future_tolerance_ns:
            return Reason.OBSERVATION_FUTURE, name
    return None


def channels(names: Sequence[str], wanted: Sequence[str]) -> tuple[int, ...]:
    """Indices of the wanted channels.

    Raises:
        ConfigError: If a channel is not among the names.
    """
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ConfigError(f"channels {missing} are not among the action names {list(names)}")
    return tuple(names.index(name) for name in wanted)
