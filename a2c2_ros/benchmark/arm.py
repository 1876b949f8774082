"""The simulated arm of the timing benchmark: its profile, its motion, its chunks."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from a2c2_ros.paths import robot_profile

PROFILE = "bench_arm"
HORIZON = 50  # H of its chunks
LATENT_DIM = 256  # of the shipped flow policy
LANGUAGE_DIM = 384  # of the shipped instruction encoder
POLICY_ID = "bench"
CAMERA_RATE_HZ = 30.0
IMAGE_SIZES = {"none": None, "mlp": None, "compact": 128, "transformer": 224}  # what each head sees [pixels]
THREADS = {"mlp": 1, "compact": 1, "transformer": 2}  # of the head's runtime in our node
SEED = 0
AMPLITUDE_RAD, FREQUENCY_HZ = 0.2, 0.2


def read_profile() -> dict[str, Any]:
    """The profile as written."""
    return yaml.safe_load(robot_profile(PROFILE).read_text(encoding="utf-8"))


def write_profile(path: Path, *, cameras: bool, image_size: int | None) -> None:
    """Write a variant of the profile.

    Args:
        path: YAML file to write.
        cameras: Keep the cameras.
        image_size: Side of the images that the head sees [pixels]; None leaves the profile's.
    """
    profile = read_profile()
    if not cameras:
        profile["cameras"] = {}
        del profile["max_age_s"]["camera"]
    for camera in profile["cameras"].values():
        if image_size is not None:
            camera["resize"] = [image_size, image_size]
    path.write_text(yaml.safe_dump(profile, sort_keys=False), encoding="utf-8")


def head_options(profile: Mapping[str, Any], architecture: str, step_ns: int) -> dict[str, Any]:
    """Keyword arguments of ``heads.make_random_head`` for a head of the arm with slots of ``step_ns``."""
    size = IMAGE_SIZES[architecture]
    names = tuple(profile["action"]["names"])
    return {
        "cameras": tuple(profile["cameras"]) if size else (),
        "image_size": size or 0,
        "state_names": names,
        "action_names": names,
        "action_space": profile["action"]["space"],
        "horizon": HORIZON,
        "step_ns": step_ns,
        "latent_dim": LATENT_DIM,
        "language_dim": LANGUAGE_DIM,
        "seed": SEED,
        "policy_id": POLICY_ID,
    }


def head_file(folder: Path, architecture: str, step_ns: int) -> Path:
    """Where the ONNX head of an architecture for slots of ``step_ns`` is."""
    return folder / f"{architecture}_{step_ns}.onnx"


def weights_file(folder: Path, architecture: str) -> Path:
    """Where the weights of an architecture's head are."""
    return folder / f"{architecture}.safetensors"


def motion_rad(times_ns: np.ndarray, joints: int) -> np.ndarray:
    """Where the arm is: slow sines, inside every limit.

    Args:
        times_ns: (n,) int64, ROS time.
        joints: Number of joints, A.

    Returns:
        (n, A) float64 [rad].
    """
    phase = 2.0 * np.pi * FREQUENCY_HZ * (times_ns % 1_000_000_000_000) / 1e9
    return AMPLITUDE_RAD * np.sin(phase[:, None] + np.arange(joints))
