"""What a system consists of: its arguments and processes, once, for the launch file and for ``a2c2_ros.bringup``."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from a2c2_ros.core.config import PlannerConfig
from a2c2_ros.core.errors import ConfigError
from a2c2_ros.paths import share_directory
from a2c2_ros.sim.conventions import MAX_STEPS, MOTIONS

Value = bool | int | float | str


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


OF_SIMULATOR = ("task", "episodes", "max_steps", "seed", "motion", "lockstep")


def _of_planner(name: str) -> Argument:
    field = {item.name: item for item in dataclasses.fields(PlannerConfig)}[name]
    meta = field.metadata
    return Argument(name, field.default, meta["description"], meta["low"], meta["high"], meta["choices"] or ())


LIBERO_SIM_ARGUMENTS = (
    Argument("task", 0, "LIBERO Spatial task", 0, 9),
    Argument("episodes", 2, "Episodes to run; 0: until stopped", 0, 100_000),
    Argument("max_steps", MAX_STEPS, "Step limit of an episode", 1, 100_000),
    Argument("seed", 0, "Seed of the fixtures, the policy's noise and the delay's jitter", 0, 2**31 - 1),
    *map(_of_planner, OF_PLANNER),
    Argument("motion", "none", "What the plate does: nothing, slide all the time, or once", texts=MOTIONS),
    Argument("head", "", "ONNX head, as correction.model_path; empty: that of config/correction_controller.yaml"),
    Argument("correction", True, "Correct every action with the head; false: execute the chunks as they are"),
    Argument("lockstep", True, "The simulation waits for every command; false: it runs on the clock"),
    Argument("headless", True, "No window with the cameras"),
    Argument("record", False, "Write all topics to a bag in the run folder"),
    Argument("out", "", "Run folder; empty: runs/<date>-<time>"),
)


def libero_sim(arguments: Mapping[str, Value]) -> System:
    """LIBERO simulation, planner and controller, with a monitor that ends the run after the last episode.

    Args:
        arguments: Every argument of :data:`LIBERO_SIM_ARGUMENTS` with its value.

    Raises:
        ConfigError: If values do not fit each other.
    """
    values = dict(arguments)
    out = Path(values.pop("out") or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")).resolve()
    planner = {name: values[name] for name in ("seed", *OF_PLANNER)}
    PlannerConfig().replaced(planner, running=False)
    mode = {"lockstep": values["lockstep"], "use_sim_time": values["lockstep"]}
    config = share_directory() / "config"

    head = {"correction.model_path": values["head"]} if values["head"] else {}

    def process(name: str, parameters: dict[str, Value]) -> Process:
        return Process(name, name, (config / f"{name}.yaml",), parameters)

    processes = [
        process("libero_sim", {name: values[name] for name in OF_SIMULATOR}),
        process("chunk_planner", planner | mode),
        process("correction_controller", {"correction.enabled": values["correction"]} | head | mode),
        process("episode_monitor", {"out": str(out), "use_sim_time": values["lockstep"]} | values),
    ]
    if values["record"]:
        processes.append(process("episode_recorder", {"out": str(out), "use_sim_time": values["lockstep"]}))
    return System(tuple(processes), ends="episode_monitor", out=out)


SYSTEMS = {"libero_sim": (LIBERO_SIM_ARGUMENTS, libero_sim)}


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
