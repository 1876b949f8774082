"""States of the control loop, their reasons, and the safe command of each kind of action."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from a2c2_ros.core.errors import ConfigError


class State(IntEnum):
    """State of the control loop, as published in ControlStep."""

    WAITING = 0  # no chunk has arrived yet: nothing is commanded but hold
    RUNNING = 1  # base action + correction
    BASE_ONLY = 2  # base action alone
    HOLDING = 3  # the safe command, because data is missing, stale or wrong
    STOPPED = 4  # disabled on purpose
    FAULT = 5  # a fault that needs a person


class Reason(IntEnum):
    """Why the control loop is in its state."""

    NONE = 0
    NO_CHUNK = 1  # no chunk has arrived since the start or the last reset
    CHUNK_EXPIRED = 2  # every chunk is used up
    OBSERVATION_MISSING = 3  # a stream has never delivered
    OBSERVATION_STALE = 4  # a stream's newest sample is older than its limit
    OBSERVATION_FUTURE = 5  # a stream's newest sample is from the future: clocks differ
    CORRECTION_DISABLED = 6  # correction.enabled is false
    NO_HEAD = 7  # no head is loaded
    HEAD_MISMATCH = 8  # the head was not trained for this chunk
    HEAD_NOT_FINITE = 9  # the head returned NaN or Inf
    RESIDUAL_TOO_LARGE = 10  # the head's output exceeds residual_limit
    DISABLED = 11  # the loop was disabled
    HEAD_FAILED = 12  # the head's runtime refused the input


@dataclass(frozen=True, eq=False)
class HoldPolicy:
    """The safe command.

    ``delta`` (velocities, twists, pose deltas): zero motion, and channels in ``keep`` (a gripper) keep their last
    command. ``position``: the measured position when holding began, so that the arm stays where it is; without a
    measurement there is no safe command and none is sent.
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

    def command(self, previous: np.ndarray | None, measured: np.ndarray | None) -> np.ndarray | None:
        """The safe command, (A,) float32, or None if nothing safe can be said."""
        if self.kind == "position":
            return None if measured is None else np.asarray(measured, dtype=np.float32)
        hold = np.zeros(self.size, dtype=np.float32)
        for channel, default in zip(self.keep, self.keep_default, strict=True):
            hold[channel] = default if previous is None else previous[channel]
        return hold


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
