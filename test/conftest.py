"""Shared pieces of the tests."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

from a2c2_ros.core.chunk import ActionChunk
from a2c2_ros.core.limits import Limits
from a2c2_ros.core.observation import Observation, StreamSpec
from a2c2_ros.core.robot import Robot
from a2c2_ros.core.safety import HoldPolicy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it, and so would children

settings.register_profile("a2c2_ros", deadline=None)  # a machine may be slow
settings.load_profile("a2c2_ros")

STEP_NS = 50_000_000
NAMES = ("x", "y", "gripper")


def make_chunk(t_obs_ns: int, *, horizon: int = 8, chunk_id: int = 1, step_ns: int = STEP_NS, **changes) -> ActionChunk:
    """A chunk whose actions tell the chunk and the slot: action[k] = (chunk_id, k, 0) / 1000."""
    actions = np.zeros((horizon, len(NAMES)), np.float32)
    actions[:, 0] = chunk_id / 1000
    actions[:, 1] = np.arange(horizon) / 1000
    fields = (
        dict(
            chunk_id=chunk_id,
            t_obs_ns=t_obs_ns,
            step_ns=step_ns,
            actions=actions,
            action_names=NAMES,
            latent=np.zeros(4),
            language=np.zeros(2),
            policy_id="test",
        )
        | changes
    )
    return ActionChunk(**fields)


def make_robot(*, step=None, hold=None, max_age_ns: int = 100_000_000) -> Robot:
    """A robot with one camera and a 2-D state."""
    return Robot(
        name="test",
        action_names=NAMES,
        action_space="test",
        streams={
            "camera": StreamSpec((4, 4, 3), "uint8", max_age_ns),
            "joints": StreamSpec((2,), "float64", max_age_ns),
        },
        cameras=("camera",),
        state_names=("a", "b"),
        state_of=lambda values: values["joints"].astype(np.float32),
        measured_of=lambda values: None,
        measured_streams=(),
        limits=Limits.of(NAMES, [-1, -1, -1], [1, 1, 1], step),
        hold=hold or HoldPolicy("delta", 3, keep=(2,), keep_default=(-1.0,)),
        simulated=True,
    )


def make_observation(stamp_ns: int) -> Observation:
    """An observation of :func:`make_robot`, every stream with the same stamp."""
    return Observation(
        values={"camera": np.zeros((4, 4, 3), np.uint8), "joints": np.zeros(2)},
        stamps_ns={"camera": stamp_ns, "joints": stamp_ns},
    )


@pytest.fixture
def robot() -> Robot:
    return make_robot()


@pytest.fixture
def bench(tmp_path):
    """See ros_bench; skipped without ROS."""
    pytest.importorskip("rclpy")
    from ros_bench import Bench

    bench = Bench(tmp_path)
    yield bench
    bench.close()


@pytest.fixture(scope="session")
def manifest():
    """Manifest of the shipped head."""
    from a2c2_ros.heads.onnx_head import OnnxHead
    from a2c2_ros.paths import model_path

    return OnnxHead(model_path("compact_libero_spatial/head.onnx")).manifest


@pytest.fixture(scope="session")
def libero_demonstrations(tmp_path_factory):
    """Two recorded episodes of LIBERO; the recording was killed after the first and started again."""
    pytest.importorskip("lerobot")
    out = tmp_path_factory.mktemp("libero") / "demos"
    command = [sys.executable, "-m", "a2c2_ros.training.demonstrations", "--out", str(out)]
    command += ["--tasks", "0", "--episodes-per-task", "2", "--workers", "1", "--seed", "3"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "HF_HUB_OFFLINE": "1"}
    first = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not (done := sorted(out.parent.glob("demos.parts/*.npz"))):
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    assert not out.exists()
    kept = done[0].stat().st_mtime_ns
    subprocess.run(command, env=environment, check=True, timeout=150)
    assert done[0].stat().st_mtime_ns == kept
    return out
