"""What the control loop has to know of a robot."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from a2c2_ros.core.limits import Limits
from a2c2_ros.core.observation import StreamSpec
from a2c2_ros.core.safety import HoldPolicy


@dataclass(frozen=True, eq=False)
class Robot:
    """A robot as the core sees it; ``drivers.profile`` builds it from a YAML profile."""

    name: str
    action_names: tuple[str, ...]  # order of the action
    action_space: str  # meaning and unit, e.g. "osc_pose_delta"
    streams: Mapping[str, StreamSpec]  # sensor streams that a command needs
    cameras: tuple[str, ...]  # the streams that are camera images
    state_names: tuple[str, ...]  # order of the state
    state_of: Callable[[Mapping[str, np.ndarray]], np.ndarray]  # stream values -> (S,) float32 state
    measured_of: Callable[[Mapping[str, np.ndarray]], np.ndarray | None]  # -> (A,) position in action units, NaN for a
    # channel that is not measured or whose stream is not given; None if the action is not a position
    measured_streams: tuple[str, ...]  # the streams that measured_of needs
    limits: Limits
    hold: HoldPolicy
    simulated: bool = False  # hardware starts disabled
    nominal_orientation_xyzw: tuple[float, ...] | None = None  # the state's rotation is relative to it; None: has none
    reports_ready: bool = False  # it says whether it executes commands; without that it is not enabled
    undated_streams: tuple[str, ...] = ()  # whose stamps do not date an observation: slow ones that hardly change

    def images(self, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The camera images of an observation, (height, width, 3) uint8 RGB by camera name."""
        return {name: values[name] for name in self.cameras}
