"""What a system consists of: its arguments and processes, once, for the launch file and for ``a2c2_ros.bringup``."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from a2c2_ros.core.config import ControllerConfig, Parameters, PlannerConfig
from a2c2_ros.core.errors import ConfigError
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.paths import share_directory
from a2c2_ros.sim.parameters import KinetixSimConfig, LiberoSimConfig

Value = bool | int | float | str

CLOSED = {"ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST"}
"""Environment of every system unless it is set: no other machine sees the nodes. ROS's own default lets all in."""
NO_HEAD = "none"
OR_NONE = f"{NO_HEAD}: there is none yet, with correction:=false"


@dataclass(frozen=True)
class Argument:
    """One ``name:=value`` of a system.

    Attributes:
        name: Name on the command line.
        default: Value if it is not given; its type is the argument's.
        description: Meaning with unit.
        low: Smallest value of a number.
        high: Largest value of a number.
        texts: All allowed texts; empty: any.
    """

    name: str
    default: Value
    description: str
    low: float = -math.inf
    high: float = math.inf
    texts: tuple[str, ...] = ()

    @property
    def default_text(self) -> str:
        """The default as it would be written on the command line."""
        return str(self.default).lower() if isinstance(self.default, bool) else str(self.default)

    @property
    def choices(self) -> tuple[str, ...] | None:
        """All allowed texts, or None if there are too many to list."""
        return ("true", "false") if isinstance(self.default, bool) else self.texts or None

    @property
    def allowed(self) -> str:
        """What is allowed, in words."""
        if self.choices:
            return " or ".join(self.choices)
        if isinstance(self.default, str):
            return "any text"
        return f"{type(self.default).__name__} in [{self.low}, {self.high}]"

    def parse(self, text: str) -> Value:
        """The value that ``text`` stands for.

        Raises:
            ConfigError: If it is none of the argument's, naming what is allowed.
        """
        if isinstance(self.default, str):
            if not self.texts or text in self.texts:
                return text
        elif self.choices:
            if text.lower() in self.choices:
                return text.lower() == "true"
        else:
            try:
                value = type(self.default)(text)
            except ValueError:
                value = None
            if value is not None and self.low <= value <= self.high:
                return value
        raise ConfigError(f"argument {self.name} is {text!r}, allowed is {self.allowed}")


@dataclass(frozen=True)
class Process:
    """One node in a process of its own.

    Attributes:
        executable: File in ``lib/a2c2_ros``.
        name: Name of the node.
        parameter_files: Read in this order.
        parameters: Set after the files, by parameter name.
    """

    executable: str
    name: str
    parameter_files: tuple[Path, ...]
    parameters: dict[str, Value]

    def ros_arguments(self) -> list[str]:
        """Command line arguments that give the executable its name and parameters."""
        arguments = ["--ros-args", "-r", f"__node:={self.name}"]
        for path in self.parameter_files:
            arguments += ["--params-file", str(path)]
        for name, value in self.parameters.items():
            # Quotes keep a text a text: 123 or true could be a folder's name.
            text = f'"{value}"' if isinstance(value, str) else str(value).lower()
            arguments += ["-p", f"{name}:={text}"]
        return arguments


@dataclass(frozen=True)
class System:
    """Processes that run together.

    Attributes:
        processes: In the order of their start.
        ends: Name of the node whose exit ends all others; the exit of any other with an error does, too.
        out: Folder of this run; what the nodes write goes there.
    """

    processes: tuple[Process, ...]
    ends: str
    out: Path


OF_PLANNER = (
    "policy",
    "policy_path",
    "policy_config",
    "policy_device",
    "horizon",
    "execution_horizon",
    "inference_delay",
    "inference_delay_jitter",
    "chunking",
)


OF_POLICY = ("policy", "policy_path", "policy_config", "policy_device")


def _of(config: type[Parameters], field_name: str, default: Value | None = None, name: str = "") -> Argument:
    field = {item.name: item for item in dataclasses.fields(config)}[field_name]
    meta, default = field.metadata, field.default if default is None else default
    return Argument(name or field_name, default, meta["description"], meta["low"], meta["high"], meta["choices"] or ())


def _of_planner(name: str, default: Value | None = None) -> Argument:
    return _of(PlannerConfig, name, default)


def _of_libero(*names: str) -> tuple[Argument, ...]:
    return tuple(_of(LiberoSimConfig, name) for name in names)


HEAD_DEVICE = _of(ControllerConfig, "correction__device", name="head_device")
CORRECTION = Argument("correction", True, "Correct every action with the head; false: execute the chunks as they are")
HEADLESS = Argument("headless", True, "No window with the cameras")
RUN = (
    Argument("record", False, "Write all topics to a bag in the run folder"),
    Argument("out", "", "Run folder; empty: runs/<date>-<time>"),
)


LIBERO_SIM_ARGUMENTS = (
    *_of_libero("task", "episodes", "initial_state", "max_steps"),
    Argument("seed", 0, "Seed of the fixtures, the policy's noise and the delay's jitter", 0, 2**31 - 1),
    *map(_of_planner, OF_PLANNER),
    *_of_libero("motion", "suite", "disturbance", "expert", "takeover_after_steps"),
    Argument("head", "", f"ONNX head, as correction.model_path; empty: that of the parameter file; {OR_NONE}"),
    HEAD_DEVICE,
    CORRECTION,
    *_of_libero("lockstep"),
    HEADLESS,
    *RUN,
)


def libero_sim(arguments: Mapping[str, Value]) -> System:
    """LIBERO simulation, planner and controller, with a monitor that ends the run after the last episode.

    Args:
        arguments: Every argument of :data:`LIBERO_SIM_ARGUMENTS` with its value.

    Raises:
        ConfigError: If values do not fit each other.
    """
    values, out = _with_run_folder(arguments)
    mode = {"lockstep": values["lockstep"], "use_sim_time": values["lockstep"]}
    of_simulator = {field.name for field in dataclasses.fields(LiberoSimConfig)}
    processes = [
        _process("libero_sim", {name: value for name, value in values.items() if name in of_simulator}),
        _process("chunk_planner", _planner(values) | mode),
        _process("correction_controller", _correction(values) | mode),
        _process("episode_monitor", {"out": str(out), "use_sim_time": values["lockstep"]} | values),
    ]
    if values["record"]:
        processes.append(_process("episode_recorder", {"out": str(out), "use_sim_time": values["lockstep"]}))
    return System(tuple(processes), ends="episode_monitor", out=out)


REAL_ROBOT_DEFAULTS = {"policy_path": "reach/flow_reach", "execution_horizon": 10, "inference_delay": 0}
"""Where a robot differs from the simulation: nothing is injected, and the policy that ships is that of any arm."""

REAL_ROBOT_ARGUMENTS = (
    Argument("robot", "panda_servo", "Robot profile: a name in config/robots or a path"),
    Argument("planner", True, "Start chunk_planner; false: it runs on another machine, started there"),
    Argument("mock", False, "Start mock_robot in place of the robot's driver, which you start otherwise"),
    Argument("enabled", False, "The controller may move the robot from the start; false: when ~/enable is called"),
    Argument("episodes", 0, "With mock: episodes of the reaching task, then the end; 0: no task", 0, 100_000),
    Argument("seed", 0, "Seed of the policy's noise, the delay's jitter and the mock", 0, 2**31 - 1),
    *(_of_planner(name, REAL_ROBOT_DEFAULTS.get(name)) for name in OF_PLANNER),
    Argument("head", "reach/mlp_reach/head.onnx", f"ONNX head, as correction.model_path; {OR_NONE}"),
    HEAD_DEVICE,
    CORRECTION,
    Argument("control_rate_hz", 0.0, "Control steps per second [Hz]; 0: as the profile says, else 20", 0.0, 1000.0),
    HEADLESS,
    *RUN,
)


def real_robot(arguments: Mapping[str, Value]) -> System:
    """Planner and controller of a robot whose driver runs already, or of ``mock_robot``.

    The run ends when it is stopped, and with the mock also after the last of its episodes.

    Args:
        arguments: Every argument of :data:`REAL_ROBOT_ARGUMENTS` with its value.

    Raises:
        ConfigError: If the profile is wrong or values do not fit each other.
    """
    values, out = _with_run_folder(arguments)
    if values["episodes"] and not values["mock"]:
        raise ConfigError(f"episodes is {values['episodes']}, without mock:=true only 0 is allowed: nobody counts them")
    mode = {"lockstep": False, "use_sim_time": False}
    profile = load_profile(values["robot"])
    rate_hz = values["control_rate_hz"] or profile.control_rate_hz or PlannerConfig().control_rate_hz
    profile.check_rate(rate_hz)
    shared = {"robot": values["robot"], "control_rate_hz": rate_hz} | mode
    robot = {"robot": values["robot"], "use_sim_time": False}
    start = {"start_state": "enabled" if values["enabled"] else "disabled"}
    processes = [
        _process("chunk_planner", _planner(values) | shared),
        _process("correction_controller", _correction(values) | start | shared),
        _process("episode_monitor", {"out": str(out)} | values | mode),
    ][0 if values["planner"] else 1 :]
    if values["mock"]:
        processes.insert(0, _process("mock_robot", robot | {name: values[name] for name in ("episodes", "seed")}))
    if values["record"]:
        processes.append(_process("episode_recorder", {"out": str(out)} | robot))
    return System(tuple(processes), ends="episode_monitor", out=out)


KINETIX_SIM_DEFAULTS = {"horizon": 8, "execution_horizon": 4, "inference_delay": 4}
"""The longest delay of the paper's grid."""

KINETIX_SIM_ARGUMENTS = (
    Argument("level", "", "Level file of Kinetix, JSON"),
    Argument("models", "", "Folder that make kinetix made for the level; empty: runs/kinetix/<level>"),
    _of(KinetixSimConfig, "episodes"),
    Argument("seed", 0, "Seed of the world's noise, the policy's and the delay's jitter", 0, 2**31 - 1),
    *(_of_planner(name, KINETIX_SIM_DEFAULTS.get(name)) for name in OF_PLANNER if name not in OF_POLICY),
    CORRECTION,
    _of(KinetixSimConfig, "lockstep"),
    *RUN,
)


def kinetix_sim(arguments: Mapping[str, Value]) -> System:
    """A Kinetix level, planner and controller, with a monitor that ends the run after the last episode.

    Args:
        arguments: Every argument of :data:`KINETIX_SIM_ARGUMENTS` with its value.

    Raises:
        ConfigError: If the level or what was trained for it is missing or wrong, or values do not fit each other.
    """
    values, out = _with_run_folder(arguments)
    level = Path(values["level"]).resolve()
    models = Path(values.pop("models") or Path("runs") / "kinetix" / level.stem).resolve()
    for path in (level, models / "robot.yaml"):
        if not path.is_file():
            raise ConfigError(f"{path} is not a file; level is a file of Kinetix, models what make kinetix made for it")
    lockstep = {"lockstep": values["lockstep"], "use_sim_time": values["lockstep"]}
    robot = {"robot": str(models / "robot.yaml")}
    shared = robot | lockstep | {"control_rate_hz": load_profile(robot["robot"]).control_rate_hz}
    policy = {"policy": "flow", "policy_path": str(models / f"flow_{level.stem}"), "policy_config": ""}
    values |= policy | {
        "policy_device": "cpu",
        "head_device": "cpu",
        "head": str(models / f"mlp_{level.stem}" / "head.onnx"),
    }
    processes = [
        _process(
            "kinetix_sim",
            {"level": str(level), "episodes": values["episodes"], "seed": values["seed"]} | robot | lockstep,
        ),
        _process("chunk_planner", _planner(values) | shared),
        _process("correction_controller", _correction(values) | shared),
        _process("episode_monitor", {"out": str(out)} | values | robot | lockstep),
    ]
    if values["record"]:
        processes.append(_process("episode_recorder", {"out": str(out), "use_sim_time": values["lockstep"]} | robot))
    return System(tuple(processes), ends="episode_monitor", out=out)


def _with_run_folder(arguments: Mapping[str, Value]) -> tuple[dict[str, Value], Path]:
    values = dict(arguments)
    out = values.pop("out") or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    return values, Path(out).resolve()


def _planner(values: Mapping[str, Value]) -> dict[str, Value]:
    parameters = {name: values[name] for name in ("seed", *OF_PLANNER)}
    PlannerConfig().replaced(parameters, running=False)
    return parameters


def _correction(values: Mapping[str, Value]) -> dict[str, Value]:
    head = values["head"]
    if head == NO_HEAD and values["correction"]:
        raise ConfigError(f"head is {head!r} and correction is true, allowed is a head or correction:=false")
    path = {"correction.model_path": "" if head == NO_HEAD else head} if head else {}
    return {"correction.enabled": values["correction"], "correction.device": values["head_device"]} | path


def _process(name: str, parameters: dict[str, Value]) -> Process:
    return Process(name, name, (share_directory() / "config" / f"{name}.yaml",), parameters)


SYSTEMS = {
    "libero_sim": (LIBERO_SIM_ARGUMENTS, libero_sim),
    "real_robot": (REAL_ROBOT_ARGUMENTS, real_robot),
    "kinetix_sim": (KINETIX_SIM_ARGUMENTS, kinetix_sim),
}


def parse_arguments(table: Sequence[Argument], given: Mapping[str, str]) -> dict[str, Value]:
    """Value of every argument of ``table``: what was given, else the default.

    Raises:
        ConfigError: If a name is not in the table or a value is not allowed.
    """
    names = [argument.name for argument in table]
    for name, text in given.items():
        if name not in names:
            raise ConfigError(f"argument {name}:={text} does not exist, allowed are {', '.join(names)}")
    return {a.name: a.parse(given[a.name]) if a.name in given else a.default for a in table}
