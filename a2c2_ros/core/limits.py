"""Limits of the commands that may leave the control loop."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntFlag

import numpy as np

from a2c2_ros.core.errors import ConfigError

FOLLOWING_S = 0.5
"""An arm whose measurement is as far behind its command as the limits allow in this time does not follow [s]. More than
twice what drivers and servos lag, 0.1 to 0.2 s."""
FOLLOWING_SHARE = 0.02
"""Part of a channel's range that an arm may always be away: however slow it has to be, it sags as before."""


class LimitFlag(IntFlag):
    """Which limits changed a command."""

    NONE = 0
    POSITION = 1  # a value was outside [lower, upper]
    STEP = 2  # a change since the last command was larger than the step limit
    VELOCITY = 4  # a change since the last command was faster than the velocity limit


@dataclass(frozen=True, eq=False)
class Limits:
    """Per-channel limits of a command.

    Raises:
        ConfigError: If a limit is NaN, has the wrong length, or lower > upper. 0.0 is a limit, None is none.
    """

    lower: np.ndarray  # (A,) float32, action units
    upper: np.ndarray  # (A,) float32
    step: np.ndarray | None = None  # (A,) float32, largest change per control step; inf for a channel without one
    velocity: np.ndarray | None = None  # (A,) float32, largest change per second; inf for a channel without one
    following: np.ndarray | None = None  # (A,) float32, largest distance between command and measurement; inf for none,
    # NaN for what follows from the other limits, see at()
    velocity_step: np.ndarray | None = None  # (A,) float32, velocity times the control period, see at()

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        lower: Sequence[float],
        upper: Sequence[float],
        step: Sequence[float | None] | None = None,
        velocity: Sequence[float | None] | None = None,
        following: Mapping[str, float | None] | None = None,
    ) -> "Limits":
        """Build and check limits for the named channels; a channel's None means none.

        ``following`` goes by name: a channel that it lacks has what follows from its other limits.
        """
        arrays = {}
        for label, values in (("lower", lower), ("upper", upper), ("step", step), ("velocity", velocity)):
            if values is None:
                arrays[label] = None
                continue
            unlimited = label in ("step", "velocity")
            try:
                array = np.array(
                    [np.inf if unlimited and value is None else float(value) for value in values], dtype=np.float32
                )
            except (TypeError, ValueError) as error:
                raise ConfigError(f"limit {label!r} is {values!r}, allowed are numbers: {error}") from error
            if array.shape != (len(names),) or np.isnan(array).any():
                raise ConfigError(
                    f"limit {label!r} is {array.tolist()}, allowed are {len(names)} numbers, one for "
                    f"each of {list(names)}"
                )
            if unlimited and (array < 0).any():
                raise ConfigError(f"limit {label!r} is {array.tolist()}, allowed is 0 or more")
            arrays[label] = array
        if (arrays["lower"] > arrays["upper"]).any():
            raise ConfigError(f"limit lower {arrays['lower'].tolist()} exceeds upper {arrays['upper'].tolist()}")
        distances = [(following or {}).get(name, np.nan) for name in names]
        arrays["following"] = np.array([np.inf if value is None else value for value in distances], np.float32)
        if (arrays["following"] <= 0.0).any():
            raise ConfigError(f"limit 'following' is {following}, allowed is above 0")
        return cls(**arrays)

    def at(self, period_ns: int) -> "Limits":
        """These limits for a control period [ns]: the velocity becomes a largest change per control step.

        What a channel has no ``following`` for is the way of its largest steps in ``FOLLOWING_S``, at least
        ``FOLLOWING_SHARE`` of its range. A channel that may jump, or may not move, has none.
        """
        period_s = period_ns / 1e9
        limits = self
        if self.velocity is not None:
            limits = replace(self, velocity_step=(self.velocity * period_s).astype(np.float32))
        step = limits.largest_step
        if step is None:
            step = np.full_like(self.lower, np.inf)
        derived = np.maximum(step * (FOLLOWING_S / period_s), FOLLOWING_SHARE * (self.upper - self.lower))
        derived = np.where(step > 0.0, derived, np.inf)
        typed = derived if self.following is None else np.where(np.isnan(self.following), derived, self.following)
        return replace(limits, following=typed.astype(np.float32))

    @property
    def largest_step(self) -> np.ndarray | None:
        """(A,) float32 largest change per control step by both limits, or None without any."""
        if self.step is None or self.velocity_step is None:
            return self.step if self.velocity_step is None else self.velocity_step
        return np.minimum(self.step, self.velocity_step)

    def clip(self, action: np.ndarray) -> np.ndarray:
        """The command with every channel inside [lower, upper], (A,) float32."""
        return np.clip(action, self.lower, self.upper).astype(np.float32)

    def apply(self, action: np.ndarray, previous: np.ndarray | None) -> tuple[np.ndarray, LimitFlag]:
        """Bring a finite command within the limits.

        Args:
            action: (A,) finite command.
            previous: (A,) last command, inside the limits; None if there is none (no step limit then).

        Returns:
            (A,) float32 command and what was limited. A step that is too large is scaled in all channels that have a
            step limit, so that the direction of motion is kept; a channel that may not move at all (limit 0) stays and
            does not stop the others. The position limit is applied per channel.
        """
        limited = self.clip(action)
        flags = LimitFlag.POSITION if (limited != action).any() else LimitFlag.NONE
        largest = self.largest_step
        if largest is None or previous is None:
            return limited, flags
        delta = limited.astype(np.float64) - previous
        size = np.abs(delta)
        if not (size > largest).any():
            return limited, flags
        for limit, flag in ((self.step, LimitFlag.STEP), (self.velocity_step, LimitFlag.VELOCITY)):
            if limit is not None and (size > limit).any():
                flags |= flag
        together = np.isfinite(largest)
        bound = together & (size > 0.0) & (largest > 0.0)
        scale = float((largest[bound] / size[bound]).min(initial=1.0))
        step = np.where(together, np.minimum(size * scale, largest), size)
        return self._step_within(previous, np.copysign(step, delta)), flags

    def _step_within(self, previous: np.ndarray, delta: np.ndarray) -> np.ndarray:
        """The float32 command nearest to ``previous + delta`` within it: rounding must not add to a step."""
        exact = previous + delta
        rounded = exact.astype(np.float32)
        too_far = np.abs(rounded - previous.astype(np.float64)) > np.abs(delta)
        return np.where(too_far, np.nextafter(rounded, previous.astype(np.float32)), rounded).astype(np.float32)
