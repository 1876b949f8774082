"""Limits of the commands that may leave the control loop."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag

import numpy as np

from a2c2_ros.core.errors import ConfigError


class LimitFlag(IntFlag):
    """Which limits changed a command."""

    NONE = 0
    POSITION = 1  # a value was outside [lower, upper]
    STEP = 2  # a change since the last command was larger than the step limit


@dataclass(frozen=True, eq=False)
class Limits:
    """Per-channel limits of a command.

    Raises:
        ConfigError: If a limit is NaN, has the wrong length, or lower > upper. 0.0 is a limit, None is none.
    """

    lower: np.ndarray  # (A,) float32, action units
    upper: np.ndarray  # (A,) float32
    step: np.ndarray | None = None  # (A,) float32, largest change per tick; inf for a channel without one

    @classmethod
    def of(
        cls, names: Sequence[str], lower: Sequence[float], upper: Sequence[float], step: Sequence[float] | None = None
    ) -> "Limits":
        """Build and check limits for the named channels."""
        arrays = {}
        for label, values in (("lower", lower), ("upper", upper), ("step", step)):
            if values is None:
                arrays[label] = None
                continue
            array = np.array(values, dtype=np.float32)
            if array.shape != (len(names),) or np.isnan(array).any():
                raise ConfigError(
                    f"limit {label!r} is {array.tolist()}, allowed are {len(names)} numbers, one for "
                    f"each of {list(names)}"
                )
            arrays[label] = array
        if (arrays["lower"] > arrays["upper"]).any():
            raise ConfigError(f"limit lower {arrays['lower'].tolist()} exceeds upper {arrays['upper'].tolist()}")
        if arrays["step"] is not None and (arrays["step"] < 0).any():
            raise ConfigError(f"limit step {arrays['step'].tolist()} is negative, allowed is 0 or more")
        return cls(**arrays)

    def apply(self, action: np.ndarray, previous: np.ndarray | None) -> tuple[np.ndarray, LimitFlag]:
        """Bring a finite command within the limits.

        Args:
            action: (A,) finite command.
            previous: (A,) last command, or None if there is none (no step limit then).

        Returns:
            (A,) float32 command and what was limited. A step that is too large is scaled as a whole, so that the
            direction of motion is kept; the position limit is applied per channel.
        """
        limited = np.clip(action, self.lower, self.upper).astype(np.float32)
        flags = LimitFlag.POSITION if (limited != action).any() else LimitFlag.NONE
        if self.step is not None and previous is not None:
            delta = limited.astype(np.float64) - previous
            moving = delta != 0.0
            if (np.abs(delta) > self.step).any():
                scale = float((self.step[moving] / np.abs(delta[moving])).min(initial=1.0))
                bound = np.minimum(np.abs(delta * scale), self.step)
                limited = self._step_within(previous, np.copysign(bound, delta))
                flags |= LimitFlag.STEP
        return limited, flags

    def _step_within(self, previous: np.ndarray, delta: np.ndarray) -> np.ndarray:
        """The float32 command nearest to ``previous + delta`` within it: rounding must not add to a step."""
        exact = previous + delta
        rounded = exact.astype(np.float32)
        too_far = np.abs(rounded - previous.astype(np.float64)) > np.abs(delta)
        return np.where(too_far, np.nextafter(rounded, previous.astype(np.float32)), rounded).astype(np.float32)
