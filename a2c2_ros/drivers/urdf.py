"""Joint limits of a robot description (URDF)."""

import math
import os
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from a2c2_ros.core.errors import ConfigError


@dataclass(frozen=True)
class JointLimits:
    """What a URDF says of a joint [rad or m, per second]; None: nothing."""

    lower: float | None
    upper: float | None
    velocity: float | None
    continuous: bool = False  # turns without end: a driver may report its angle modulo a turn


def urdf_path(name: str, base: Path) -> Path:
    """Path of a URDF: absolute, relative to the folder ``base``, or ``package://PACKAGE/PATH`` of an installed package.

    Raises:
        ConfigError: If there is no such file.
    """
    if name.startswith("package://"):
        package, _, below = name.removeprefix("package://").partition("/")
        prefixes = os.environ.get("AMENT_PREFIX_PATH", "").split(os.pathsep)
        candidates = [Path(prefix) / "share" / package / below for prefix in prefixes]
    else:
        candidates = [base / name]
    for path in candidates:
        if path.is_file():
            return path
    raise ConfigError(f"URDF {name!r} does not exist, looked at {[str(path) for path in candidates]}")


def joint_limits(path: Path) -> dict[str, JointLimits]:
    """Limits of the joints that can move, by name.

    Raises:
        ConfigError: If the file is not a URDF or a limit is not a number.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise ConfigError(f"URDF {path} cannot be read: {error}") from error
    if root.tag != "robot" or path.suffix == ".xacro":
        raise ConfigError(f"{path} is no URDF (first element {root.tag!r}); a xacro file has to be expanded first")
    limits = {}
    for joint in root.findall("joint"):
        if joint.get("type") == "fixed":
            continue
        limit = joint.find("limit")
        values = {} if limit is None else limit.attrib
        # A continuous joint turns without end, whatever its limits say.
        continuous = joint.get("type") == "continuous"
        keys = ("velocity",) if continuous else ("lower", "upper", "velocity")
        name = joint.get("name", "")
        found = (_number(path, name, key, values) if key in keys else None for key in _KEYS)
        limits[name] = JointLimits(*found, continuous)
    return limits


_KEYS = ("lower", "upper", "velocity")


def _number(path: Path, joint: str, key: str, values: dict[str, str]) -> float | None:
    if key not in values:
        return None
    try:
        number = float(values[key])
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"URDF {path}: limit {key} of joint {joint!r} is {values[key]!r}, allowed is a number")
    return number
