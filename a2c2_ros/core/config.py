"""Parameters of the nodes, each with its meaning, unit and range; checked as one candidate before anything changes."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from a2c2_ros.core.errors import ConfigError
from a2c2_ros.core.schedule import check_timing

FUTURE_TOLERANCE_S = 0.05
"""How far a stamp may lie in the future before the clocks of the machines are taken to differ [s]."""

Config = TypeVar("Config", bound="Parameters")


def parameter(
    default: Any, description: str, *, low: float | None = None, high: float | None = None, dynamic: bool = True
) -> Any:
    """Declare a parameter: default (and with it the type), description with unit, range, settable at run time."""
    meta = {"description": description, "low": low, "high": high, "dynamic": dynamic}
    return field(default=default, metadata=meta)


@dataclass(frozen=True)
class Parameters:
    """Base of the parameter sets. A ROS parameter's name is the field's with ``__`` for ``.``."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            self._check_field(item, getattr(self, item.name))
        self.check()

    def check(self) -> None:
        """Check the rules that tie several parameters together.

        Raises:
            ConfigError: Naming the parameters and their values.
        """

    @classmethod
    def ros_name(cls, field_name: str) -> str:
        """ROS parameter name of a field."""
        return field_name.replace("__", ".")

    def replaced(self: Config, changes: Mapping[str, Any], *, running: bool = True) -> Config:
        """A candidate with some parameters changed, all rules checked together.

        Args:
            changes: ROS parameter name to value; names that are not ours are ignored.
            running: Refuse changes of parameters that cannot change while the node runs.

        Raises:
            ConfigError: Naming the parameter, its value and what is allowed.
        """
        fields = {self.ros_name(item.name): item for item in dataclasses.fields(self)}
        values = {}
        for name, value in changes.items():
            item = fields.get(name)
            if item is None:
                continue
            if running and not item.metadata["dynamic"] and value != getattr(self, item.name):
                raise ConfigError(
                    f"parameter {name} cannot change while the node runs, it is {getattr(self, item.name)!r}"
                )
            values[item.name] = value
        return dataclasses.replace(self, **values)

    def _check_field(self, item: dataclasses.Field, value: Any) -> None:
        name, expected = self.ros_name(item.name), type(item.default)
        if expected is float and type(value) is int:
            value = float(value)
            object.__setattr__(self, item.name, value)
        if type(value) is not expected:
            raise ConfigError(f"parameter {name} is {value!r} ({type(value).__name__}), allowed is {expected.__name__}")
        low, high = item.metadata["low"], item.metadata["high"]
        if expected not in (int, float):
            return
        if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            raise ConfigError(f"parameter {name} is {value}, allowed is [{low}, {high}]")


@dataclass(frozen=True)
class PlannerConfig(Parameters):
    """Parameters of ``chunk_planner``."""

    policy: str = parameter("flow", "Kind of policy, see policies/registry.py", dynamic=False)
    policy_path: str = parameter(
        "flow_libero_spatial", "Checkpoint folder; a bare name is looked up in the package's models", dynamic=False
    )
    robot: str = parameter("libero", "Robot profile: a name in config/robots or a path", dynamic=False)
    horizon: int = parameter(50, "Slots of a chunk, H [steps]; must be the policy's", low=1, high=1000, dynamic=False)
    execution_horizon: int = parameter(
        40, "Steps executed before the next observation is sent, e [steps]", low=1, high=1000
    )
    inference_delay: int = parameter(
        10, "Injected delay between an observation and its chunk, d [steps]; 0 adds none", low=0, high=1000
    )
    inference_delay_jitter: int = parameter(
        0, "The injected delay varies by up to this many steps, seeded", low=0, high=1000
    )
    seed: int = parameter(0, "Seed of the policy's noise and of the delay's jitter", low=0, high=2**31 - 1)
    lockstep: bool = parameter(
        False, "Answer every observation with planner_status; for simulators that wait", dynamic=False
    )
    control_rate_hz: float = parameter(20.0, "Control steps per second [Hz]", low=0.1, high=1000.0, dynamic=False)
    autostart: bool = parameter(True, "Configure and activate by itself at start", dynamic=False)

    def check(self) -> None:
        check_timing(self.horizon, self.execution_horizon, self.inference_delay)
        if self.inference_delay_jitter > self.inference_delay:
            raise ConfigError(
                f"inference_delay_jitter is {self.inference_delay_jitter}, allowed is at most "
                f"inference_delay {self.inference_delay}"
            )
        check_timing(self.horizon, self.execution_horizon, self.inference_delay + self.inference_delay_jitter)

    @property
    def step_ns(self) -> int:
        """Duration of a control step [ns]."""
        return round(1e9 / self.control_rate_hz)


@dataclass(frozen=True)
class ControllerConfig(Parameters):
    """Parameters of ``correction_controller``."""

    robot: str = parameter("libero", "Robot profile: a name in config/robots or a path", dynamic=False)
    control_rate_hz: float = parameter(20.0, "Control steps per second [Hz]", low=0.1, high=1000.0, dynamic=False)
    lockstep: bool = parameter(
        False, "Tick only when every input of the step is there; for simulators that wait", dynamic=False
    )
    correction__enabled: bool = parameter(True, "Add the head's residual to the base action")
    correction__model_path: str = parameter(
        "compact_libero_spatial/head.onnx",
        "ONNX head; a relative path is looked up in the package's models; swapped between two ticks",
    )
    correction__threads: int = parameter(1, "Threads of the head's runtime", low=1, high=64, dynamic=False)
    residual_limit: float = parameter(
        4.0,
        "Largest plausible residual of any channel [action units]; beyond it the base action is executed",
        low=0.0,
        high=1e6,
    )
    future_tolerance_s: float = parameter(
        FUTURE_TOLERANCE_S, "How far a stamp may lie in the future [s]", low=0.0, high=10.0
    )
    autostart: bool = parameter(True, "Configure and activate by itself at start", dynamic=False)

    @property
    def period_ns(self) -> int:
        """Control period [ns]."""
        return round(1e9 / self.control_rate_hz)

    @property
    def future_tolerance_ns(self) -> int:
        """``future_tolerance_s`` in nanoseconds."""
        return round(self.future_tolerance_s * 1e9)
