"""Robot profiles: a robot is a YAML file, no code."""

import math
from collections.abc import Callable, Mapping
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
    height: int  # as it comes [pixels]
    width: int
    shape: tuple[int, int, int]  # (height, width, 3) as it is used, after resizing


@dataclass(frozen=True, eq=False)
class Profile:
    """A robot and the topics that reach it."""

    robot: Robot
    cameras: tuple[CameraTopic, ...]
    joint_states_topic: str
    joint_names: tuple[str, ...]  # order of the joint_position stream
    ee_pose_topic: str | None  # None if the state does not need it
    command_topic: str
    command_kind: str  # see drivers.sinks

    def camera_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Camera name to (height, width, 3) as it is used."""
        return {camera.name: camera.shape for camera in self.cameras}


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
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{self._path}: entry {key!r} is {value!r}, allowed is {kind}")
        return value

    def names(self, key: str, default: Any = ...) -> tuple[str, ...]:
        values = self.get(key, list, default)
        if not all(isinstance(value, str) for value in values):
            raise ConfigError(f"{self._path}: entry {key!r} is {values!r}, allowed is a list of names")
        return tuple(values)

    def profile(self) -> Profile:
        cameras = tuple(self._camera(name) for name in self.get("cameras", Mapping, {}))
        joints = self.names("joint_states.names")
        action_names = self.names("action.names")
        streams = {c.name: StreamSpec(c.shape, "uint8", self._max_age_ns("camera")) for c in cameras}
        streams["joint_position"] = StreamSpec((len(joints),), "float64", self._max_age_ns("joint_states"))
        state_kind = self.get("state", str, "ee_pose_gripper")
        if state_kind == "ee_pose_gripper":
            streams["ee_pose"] = StreamSpec((7,), "float64", self._max_age_ns("ee_pose"))
            state_names, state_of = STATE_NAMES, self._ee_pose_gripper(joints)
        elif state_kind == "joint_position":
            state_names, state_of = joints, lambda values: values["joint_position"].astype(np.float32)
        else:
            raise self._wrong("state", state_kind, "'ee_pose_gripper' or 'joint_position'")
        hold = self._hold(action_names)
        limits = self._limits(action_names, hold)
        measured_of = self._measured(action_names, joints) if hold.kind == "position" else lambda values: None
        robot = Robot(
            name=self.get("name", str),
            action_names=action_names,
            action_space=self.get("action.space", str),
            streams=streams,
            cameras=tuple(camera.name for camera in cameras),
            state_names=state_names,
            state_of=state_of,
            measured_of=measured_of,
            measured_streams=("joint_position",) if hold.kind == "position" else (),
            limits=limits,
            hold=hold,
            simulated=self.get("simulated", bool, False),
        )
        return Profile(
            robot=robot,
            cameras=cameras,
            joint_states_topic=self.get("joint_states.topic", str),
            joint_names=joints,
            ee_pose_topic=self.get("ee_pose.topic", str) if "ee_pose" in streams else None,
            command_topic=self.get("command.topic", str),
            command_kind=self.get("command.kind", str),
        )

    def _wrong(self, key: str, value: object, allowed: str) -> ConfigError:
        return ConfigError(f"{self._path}: entry {key!r} is {value!r}, allowed is {allowed}")

    def _max_age_ns(self, name: str) -> int:
        value = float(self.get(f"max_age_s.{name}", (int, float)))
        if not 0.0 < value < math.inf:
            raise self._wrong(f"max_age_s.{name}", value, "a positive time")
        return round(value * 1e9)

    def _camera(self, name: str) -> CameraTopic:
        height, width = self.get(f"cameras.{name}.height", int), self.get(f"cameras.{name}.width", int)
        resize = self.get(f"cameras.{name}.resize", list, [height, width])
        if len(resize) != 2 or not all(type(side) is int and side > 0 for side in (*resize, height, width)):
            raise self._wrong(f"cameras.{name}", (height, width, resize), "positive height, width and resize: [h, w]")
        return CameraTopic(name, self.get(f"cameras.{name}.topic", str), height, width, (*resize, 3))

    def _ee_pose_gripper(self, joints: tuple[str, ...]) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
        gripper = list(channels(joints, self.names("joint_states.gripper")))
        reference = np.array(self.get("ee_pose.nominal_orientation_xyzw", list), dtype=np.float64)
        return lambda values: state_vector(values["ee_pose"], values["joint_position"][gripper], reference)

    def _hold(self, action_names: tuple[str, ...]) -> HoldPolicy:
        return HoldPolicy(
            kind=self.get("hold.kind", str),
            size=len(action_names),
            keep=channels(action_names, self.names("hold.keep", [])),
            keep_default=tuple(float(v) for v in self.get("hold.keep_default", list, [])),
        )

    def _limits(self, action_names: tuple[str, ...], hold: HoldPolicy) -> Limits:
        limits = Limits.of(
            action_names,
            self.get("limits.lower", list),
            self.get("limits.upper", list),
            self.get("limits.step", list, None),
            self.get("limits.velocity", list, None),
        )
        if not (np.isfinite(limits.lower).all() and np.isfinite(limits.upper).all()):
            raise self._wrong("limits", (limits.lower.tolist(), limits.upper.tolist()), "a finite range per channel")
        if hold.kind == "position":
            step = limits.at(1_000_000_000).largest_step
            free = [
                name
                for i, name in enumerate(action_names)
                if i not in hold.keep and (step is None or not np.isfinite(step[i]))
            ]
            if free:
                raise ConfigError(f"{self._path}: {free} need limits.velocity or limits.step: a position may not jump")
        return limits

    def _measured(
        self, action_names: tuple[str, ...], joints: tuple[str, ...]
    ) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
        """Action channel to the joint that measures it; null for a channel (a gripper) without one."""
        measured = self.get("action.measured", list)
        keep = channels(action_names, self.names("hold.keep", []))
        if len(measured) != len(action_names) or any(
            name not in joints if name is not None else i not in keep for i, name in enumerate(measured)
        ):
            raise self._wrong(
                "action.measured",
                measured,
                f"a joint of {list(joints)} for each of {list(action_names)}, null only for channels in hold.keep",
            )
        rows = [i for i, name in enumerate(measured) if name is not None]
        sources = [joints.index(measured[i]) for i in rows]

        def measured_of(values: Mapping[str, np.ndarray]) -> np.ndarray:
            position = np.full(len(action_names), np.nan)
            position[rows] = values["joint_position"][sources]
            return position

        return measured_of
