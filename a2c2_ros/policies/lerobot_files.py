"""What can be known of a LeRobot checkpoint and its YAML file without importing LeRobot, which takes long."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from a2c2_ros.core.errors import ConfigError, PolicyError

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
VLM_FOLDER = "vlm"
"""In a checkpoint's folder: configuration and tokenizer of its vision-language model, in the place of those that the
checkpoint names; so a checkpoint can be moved as a whole."""


STATE_FEATURE = "observation.state"


@dataclass(frozen=True)
class LeRobotMapping:
    """The YAML file of a LeRobot policy; every key may be left out.

    Raises:
        ConfigError: If a value is not of its kind.
    """

    cameras: Mapping[str, str] = field(default_factory=dict)  # camera of the robot to image feature of the policy
    empty_cameras: tuple[str, ...] = ()  # image features that are not given, for families that allow it
    state: str = STATE_FEATURE  # the policy's feature for the robot's state
    image_size: int = 0  # images are resized to this side for the policy [pixels]; 0: as they come
    latent: str = "auto"  # dotted path of the module whose output is the latent; auto: LATENT_PLACES
    action_names: tuple[str, ...] = ()  # order of the policy's action, to be checked against the robot's
    tokenizer: str = ""  # folder or hub id, in the place of the one that the checkpoint names
    config: Mapping[str, Any] = field(default_factory=dict)  # fields of LeRobot's configuration to change
    rtc: Mapping[str, Any] = field(default_factory=dict)  # fields of LeRobot's RTCConfig to change

    def __post_init__(self) -> None:
        for name in ("empty_cameras", "action_names"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        kinds = {"cameras": Mapping, "config": Mapping, "rtc": Mapping, "image_size": int} | {
            "empty_cameras": tuple,
            "action_names": tuple,
        }
        for item in dataclasses.fields(self):
            value, kind = getattr(self, item.name), kinds.get(item.name, str)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ConfigError(f"entry {item.name!r} of the policy's YAML file is {value!r}, allowed is {kind}")
        if self.image_size < 0:
            raise ConfigError(
                f"entry 'image_size' of the policy's YAML file is {self.image_size}, allowed is 0 or more"
            )

    @classmethod
    def of(cls, mapping: Mapping[str, Any]) -> "LeRobotMapping":
        """From the content of a YAML file.

        Raises:
            ConfigError: If a key is unknown or a value is not of its kind.
        """
        allowed = {item.name for item in dataclasses.fields(cls)}
        if unknown := sorted(set(mapping) - allowed):
            raise ConfigError(f"the policy's YAML file has {unknown}, allowed are {sorted(allowed)}")
        return cls(**mapping)


def is_checkpoint(folder: Path) -> bool:
    """Whether a policy folder is LeRobot's: its configuration names a policy family."""
    try:
        return "type" in json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def chunk_size(folder: Path) -> int:
    """H, the slots of a chunk, from the configuration of a checkpoint.

    Raises:
        PolicyError: If it does not tell.
    """
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    size = config.get("chunk_size", config.get("n_action_steps"))
    if type(size) is not int:
        raise PolicyError(f"{folder / CONFIG_FILE} has neither chunk_size nor n_action_steps")
    return size


def checkpoint_id(folder: Path, mapping: LeRobotMapping) -> str:
    """The policy's id: its family, and a hash of everything that decides what it answers.

    That is the checkpoint's configuration, weights and processors, its own vision-language model's tokenizer and
    configuration, and what the YAML file changes.
    """
    family = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["type"]
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(mapping), sort_keys=True, default=str).encode())
    own = (path for path in (folder / VLM_FOLDER).rglob("*") if path.is_file())
    for path in sorted([folder / CONFIG_FILE, *folder.glob("policy_p*.json"), *folder.glob("*.safetensors"), *own]):
        digest.update(path.name.encode())
        digest.update(_hash(path, path.stat().st_mtime_ns))
    return f"{family}-{digest.hexdigest()[:8]}"


@functools.cache
def _hash(path: Path, _mtime_ns: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
