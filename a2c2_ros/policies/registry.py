"""Policies by name."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from a2c2_ros.core.errors import ConfigError
from a2c2_ros.paths import share_directory
from a2c2_ros.policies.base import ChunkPolicy, PolicyOptions

if TYPE_CHECKING:
    from a2c2_ros.drivers.profile import Profile

POLICIES = {
    "flow": "a2c2_ros.policies.flow:FlowPolicy",
    "lerobot": "a2c2_ros.policies.lerobot:LeRobotPolicy",
    "remote": "a2c2_ros.policies.remote:RemotePolicy",
}


def load_policy(kind: str, path: str | Path, options: PolicyOptions | None = None) -> ChunkPolicy:
    """Load a policy; its libraries are imported only now.

    Args:
        kind: A key of ``POLICIES``.
        path: Where the policy is: what this means (a folder, a hub id, an address) is for the kind to say.
        options: What it may have to know beside; None: the defaults.

    Raises:
        ConfigError: If the kind or an option is unknown.
        PolicyError: If the files cannot be used.
    """
    if kind not in POLICIES:
        raise ConfigError(f"policy kind is {kind!r}, allowed are {sorted(POLICIES)}")
    module, name = POLICIES[kind].split(":")
    return getattr(importlib.import_module(module), name)(path, options)


def load_policy_for(
    profile: "Profile",
    kind: str,
    path: str | Path,
    config: str = "",
    *,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
) -> ChunkPolicy:
    """Load a policy for a robot.

    Args:
        profile: Of the robot; gives names and sizes to policies whose files do not tell.
        kind: As of :func:`load_policy`.
        path: As of :func:`load_policy`.
        config: The policy's YAML file, see :func:`load_mapping`.
        device: As of :class:`PolicyOptions`.
        dtype: As of :class:`PolicyOptions`.
        threads: As of :class:`PolicyOptions`.

    Raises:
        ConfigError: If the kind, the YAML file or an option is wrong, or does not fit the robot.
        PolicyError: If the policy cannot be loaded.
    """
    options = PolicyOptions(device, dtype, threads, profile.robot, profile.camera_shapes(), load_mapping(config))
    return load_policy(kind, path, options)


def load_mapping(name_or_path: str) -> Mapping[str, Any]:
    """Content of a policy's YAML file, given by name (in ``config/policies``) or path; empty for no name.

    Raises:
        ConfigError: If there is no such file, or it is not a YAML mapping.
    """
    if not name_or_path:
        return {}
    folder = share_directory() / "config" / "policies"
    path = Path(name_or_path).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        path = folder / f"{name_or_path}.yaml"
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        names = sorted(p.stem for p in folder.glob("*.yaml"))
        raise ConfigError(f"policy_config {name_or_path!r} cannot be read ({path}), shipped are {names}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"policy_config {path}: not YAML: {error}") from error
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"policy_config {path} is {type(mapping).__name__}, allowed is a mapping of keys to values")
    return mapping
