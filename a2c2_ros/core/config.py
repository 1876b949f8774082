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

TAKEOVER_TIMEOUT_S = 0.2
"""Default of the parameter of that name, which controller and planner must agree on [s]."""

Config = TypeVar("Config", bound="Parameters")


def parameter(
    default: Any,
    description: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    dynamic: bool = True,
) -> Any:
    """Declare a parameter: default (and with it the type), description with unit, what is allowed, settable running."""
    meta = {"description": description, "low": low, "high": high, "choices": choices, "dynamic": dynamic}
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

    @property
    def ros_values(self) -> dict[str, Any]:
        """ROS parameter name to value."""
        return {self.ros_name(item.name): getattr(self, item.name) for item in dataclasses.fields(self)}

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
        low, high, choices = item.metadata["low"], item.metadata["high"], item.metadata["choices"]
        if choices and value not in choices:
            raise ConfigError(f"parameter {name} is {value!r}, allowed are {list(choices)}")
        if expected not in (int, float):
            return
        if not math.isfinite(value) or (low is not None and value < low) or (high is not None and value > high):
            raise ConfigError(f"parameter {name} is {value}, allowed is [{low}, {high}]")


@dataclass(frozen=True)
class PlannerConfig(Parameters):
    """Parameters of ``chunk_planner``."""

    policy: str = parameter("flow", "Kind of policy, see policies/registry.py", dynamic=False)
    policy_path: str = parameter(
        "flow_libero_spatial",
        "Where the policy is: a checkpoint folder (flow: a bare name is looked up in the package's models; lerobot: or "
        "a hub id) or an address (remote)",
        dynamic=False,
    )
    policy_config: str = parameter(
        "",
        "YAML file that maps names and sets options of the policy: a path, or a name in config/policies; empty: none",
        dynamic=False,
    )
    policy_device: str = parameter("cpu", "Where the policy runs, a torch device: cpu, cuda, cuda:1", dynamic=False)
    policy_dtype: str = parameter(
        "float32", "Arithmetic of the policy", choices=("float32", "bfloat16", "float16"), dynamic=False
    )
    policy_threads: int = parameter(1, "CPU threads of the policy", low=1, high=1024, dynamic=False)
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
    chunking: str = parameter(
        "asynchronous",
        "How chunks follow each other: asynchronous (during an inference the last one goes on), synchronous (the robot "
        "stands still; only with correction.enabled false), rtc (asynchronous, and the policy is guided to go on from "
        "the last chunk), tt_rtc (the policy was trained to go on from it)",
        choices=("asynchronous", "synchronous", "rtc", "tt_rtc"),
    )
    takeover_timeout_s: float = parameter(
        TAKEOVER_TIMEOUT_S,
        "The controller's takeover_timeout_s, or more [s]; no chunk that was observed before it is over is executed",
        low=0.01,
        high=10.0,
    )
    future_tolerance_s: float = parameter(
        FUTURE_TOLERANCE_S, "How far a stamp may lie in the future, as the controller's [s]", low=0.0, high=10.0
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

    @property
    def takeover_timeout_ns(self) -> int:
        """``takeover_timeout_s`` in nanoseconds."""
        return round(self.takeover_timeout_s * 1e9)

    @property
    def future_tolerance_ns(self) -> int:
        """``future_tolerance_s`` in nanoseconds."""
        return round(self.future_tolerance_s * 1e9)


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
    correction__device: str = parameter(
        "cpu", "Where the head runs; cuda needs onnxruntime-gpu", choices=("cpu", "cuda"), dynamic=False
    )
    correction__threads: int = parameter(1, "Threads of the head's runtime", low=1, high=64, dynamic=False)
    correction__deadline_s: float = parameter(
        0.0, "Longest time that the head may take [s]; 0: one control period; not used in lockstep", low=0.0, high=10.0
    )
    correction__retry_after_s: float = parameter(
        1.0, "How long a head that was late is not run [s]", low=0.0, high=3600.0
    )
    correction__on_failure: str = parameter(
        "base",
        "When the head fails, is late or returns what is not plausible: base (execute the base action) or hold",
        choices=("base", "hold"),
    )
    residual_limit: float = parameter(
        4.0, "Largest plausible residual of a channel [action units]; beyond it the head has failed", low=0.0, high=1e6
    )
    residual_margin: float = parameter(
        2.0,
        "Largest plausible residual in multiples of the largest of the head's training, per channel, if it is known",
        low=0.0,
        high=1e6,
    )
    action_margin: float = parameter(
        1.0,
        "How far a chunk's actions may lie outside the limits, in widths of the limits; beyond it the chunk is refused",
        low=0.0,
        high=1e6,
    )
    max_chunk_age_s: float = parameter(
        5.0, "Largest age of the observation that an executed chunk was computed from [s]", low=0.01, high=3600.0
    )
    rearm_after_s: float = parameter(
        0.1, "How long observations must be good again before the robot moves again [s]", low=0.0, high=60.0
    )
    takeover_timeout_s: float = parameter(
        TAKEOVER_TIMEOUT_S, "How long a command of the topic takeover replaces the policy's [s]", low=0.01, high=10.0
    )
    halt_steps: int = parameter(
        20, "Safe commands sent after the robot was stopped, then none [steps]", low=1, high=100_000
    )
    start_state: str = parameter(
        "auto",
        "enabled, disabled (until ~/enable is called), or auto: enabled only if the robot profile says simulated",
        choices=("auto", "enabled", "disabled"),
        dynamic=False,
    )
    emergency_stop_timeout_s: float = parameter(
        0.0,
        "Stop if the topic emergency_stop is silent for longer [s]; 0: it need not be sent regularly",
        low=0.0,
        high=60.0,
        dynamic=False,
    )
    future_tolerance_s: float = parameter(
        FUTURE_TOLERANCE_S, "How far a stamp may lie in the future [s]", low=0.0, high=10.0
    )
    clock_timeout_s: float = parameter(
        0.5, "Hold if the ROS clock stands still for longer, in steady time [s]; not in lockstep", low=0.01, high=60.0
    )
    realtime__priority: int = parameter(
        50,
        "SCHED_FIFO priority of the control loop's thread, one less for the thread that takes messages; 0: do not ask "
        "for it; without the permission it is not used",
        low=0,
        high=98,
        dynamic=False,
    )
    realtime__lead_s: float = parameter(
        0.002,
        "How long before a tick its code is run once without effect, so that the tick finds it in the caches [s]; at "
        "most half a control period is used; 0: never",
        low=0.0,
        high=0.1,
        dynamic=False,
    )
    diagnostics__period_error_s: float = parameter(
        0.002, "Warn if the 99th percentile of the period error is above [s]", low=0.0, high=10.0
    )
    diagnostics__missed_ticks: int = parameter(0, "Warn if more ticks were missed per second", low=0, high=1000)
    diagnostics__head_time_s: float = parameter(
        0.0, "Warn if the 99th percentile of the head's time is above [s]; 0: half a control period", low=0.0, high=10.0
    )
    diagnostics__limited: float = parameter(
        0.5, "Warn if more than this fraction of the commands was limited", low=0.0, high=1.0
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

    @property
    def max_chunk_age_ns(self) -> int:
        """``max_chunk_age_s`` in nanoseconds."""
        return round(self.max_chunk_age_s * 1e9)

    @property
    def rearm_after_ns(self) -> int:
        """``rearm_after_s`` in nanoseconds."""
        return round(self.rearm_after_s * 1e9)

    @property
    def takeover_timeout_ns(self) -> int:
        """``takeover_timeout_s`` in nanoseconds."""
        return round(self.takeover_timeout_s * 1e9)

    @property
    def head_deadline_ns(self) -> int | None:
        """Longest time that the head may take [ns], None in lockstep, where a result must not depend on the machine."""
        if self.lockstep:
            return None
        return round(self.correction__deadline_s * 1e9) or self.period_ns
