"""From action channels to what a driver takes, and back."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class ChannelMap:
    """``driver = scale * action[channels] + offset``, in the driver's order."""

    channels: np.ndarray  # (J,) int, the action channel of each of the driver's values
    scale: np.ndarray  # (J,) float64, driver's unit per action unit, not 0
    offset: np.ndarray  # (J,) float64, driver's unit

    def to_driver(self, actions: np.ndarray) -> np.ndarray:
        """(..., A) action units to (..., J) float64 driver's units."""
        return actions[..., self.channels] * self.scale + self.offset

    def to_action(self, values: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """The actions with the mapped channels replaced by (..., J) values of the driver, (..., A) float64."""
        actions = np.array(actions, dtype=np.float64)
        actions[..., self.channels] = (values - self.offset) / self.scale
        return actions


@dataclass(frozen=True)
class GripperMap:
    """Between the open and the closed gripper in proportion; beyond them the end itself."""

    channel: int  # of the action
    open_action: float
    closed_action: float
    open_driver: float  # driver's unit
    closed_driver: float

    def to_driver(self, action: float) -> float:
        """Action units to driver's units."""
        closed = (action - self.open_action) / (self.closed_action - self.open_action)
        closed = min(max(closed, 0.0), 1.0)
        return (1.0 - closed) * self.open_driver + closed * self.closed_driver
