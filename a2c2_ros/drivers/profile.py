"""Robot profiles: a robot is a YAML file, no code."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from a2c2_ros.core.errors import ConfigError
from a2c2_ros.core.limits import Limits
from a2c2_ros.core.observation import StreamSpec
from a2c2_ros.core.robot import Robot
from a2c2_ros.core.safety import HoldPolicy, channels
from a2c2_ros.core.state import state_vector
from a2c2_ros.paths import robot_profile

STATE_NAMES = ("x", "y", "z", "rx", "ry", "rz", "finger_left", "finger_right")


@dataclass(frozen=True)
class CameraTopic:
    """A camera of the profile."""

    name: str
    topic: str
    height: int
    width: int


@dataclass(frozen=True, eq=False)
class Profile:
    """A robot and the topics that reach it."""

    robot: Robot
    cameras: tuple[CameraTopic, ...]
    joint_states_topic: str
    joint_names: tuple[str, ...]  # order of the joint_position stream
    ee_pose_topic: str
    command_topic: str
    command_kind: str  # see drivers.sinks

    def camera_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Camera name to (height, width, 3)."""
        return {camera.name: (camera.height, camera.width, 3) for camera in self.cameras}


def load_profile(name_or_path: str) -> Profile:
    """Load a robot profile.

    Args:
        name_or_path: A name in ``config/robots`` or a path to a YAML file.

    Raises:
        ConfigError: If the file is missing or an entry is missing or wrong, with the entry's path in the YAML.
    """
    path = robot_profile(name_or_path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    return _Reader(path, data).profile()


class _Reader:
    def __init__(self, path: Path, data: Any) -> None:
        self._path = path
        self._data = data

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = ...) -> Any:
        value: Any = self._data
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                if default is not ...:
                    return default
                raise ConfigError(f"{self._path}: entry {key!r} is missing")
            value = value[part]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ConfigError(f"{self._path}: entry {key!r} is {value!r}, allowed is {kind}")
        return value

    def names(self, key: str, default: Any = ...) -> tuple[str, ...]:
        values = self.get(key, list, default)
        if not all(isinstance(value, str) for value in values):
            raise ConfigError(f"{self._path}: entry {key!r} is {values!r}, allowed is a list of names")
        return tuple(values)

    def profile(self) -> Profile:
        age_s = {
            name: float(self.get(f"max_age_s.{name}", (int, float))) for name in ("camera", "joint_states", "ee_pose")
        }
        for name, value in age_s.items():
            if not value > 0.0:
                raise ConfigError(f"{self._path}: entry 'max_age_s.{name}' is {value}, allowed is a positive time")
        cameras = tuple(
            CameraTopic(
                name=name,
                topic=self.get(f"cameras.{name}.topic", str),
                height=self.get(f"cameras.{name}.height", int),
                width=self.get(f"cameras.{name}.width", int),
            )
            for name in self.get("cameras", Mapping)
        )
        joints = self.names("joint_states.names")
        gripper = channels(joints, self.names("joint_states.gripper"))
        reference = np.array(self.get("ee_pose.nominal_orientation_xyzw", list), dtype=np.float64)
        action_names = self.names("action.names")
        keep = self.names("hold.keep", [])
        streams = {c.name: StreamSpec((c.height, c.width, 3), "uint8", round(age_s["camera"] * 1e9)) for c in cameras}
        streams["joint_position"] = StreamSpec((len(joints),), "float64", round(age_s["joint_states"] * 1e9))
        streams["ee_pose"] = StreamSpec((7,), "float64", round(age_s["ee_pose"] * 1e9))

        def state_of(values: Mapping[str, np.ndarray]) -> np.ndarray:
            return state_vector(values["ee_pose"], values["joint_position"][list(gripper)], reference)

        robot = Robot(
            name=self.get("name", str),
            action_names=action_names,
            action_space=self.get("action.space", str),
            streams=streams,
            cameras=tuple(camera.name for camera in cameras),
            state_names=STATE_NAMES,
            state_of=state_of,
            measured_of=lambda values: None,
            limits=Limits.of(
                action_names,
                self.get("limits.lower", list),
                self.get("limits.upper", list),
                self.get("limits.step", list, None),
            ),
            hold=HoldPolicy(
                kind=self.get("hold.kind", str),
                size=len(action_names),
                keep=channels(action_names, keep),
                keep_default=tuple(float(v) for v in self.get("hold.keep_default", list, [])),
            ),
        )
        return Profile(
            robot=robot,
            cameras=cameras,
            joint_states_topic=self.get("joint_states.topic", str),
            joint_names=joints,
            ee_pose_topic=self.get("ee_pose.topic", str),
            command_topic=self.get("command.topic", str),
            command_kind=self.get("command.kind", str),
        )
