"""Chunks, observations, limits, state, manifest and parameters: what is refused, and what the error says."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import NAMES, make_chunk, make_robot
from hypothesis import given
from hypothesis import strategies as st

from a2c2_ros.core.config import ControllerConfig, PlannerConfig
from a2c2_ros.core.errors import ChunkError, ConfigError, ManifestError, ObservationError
from a2c2_ros.core.features import time_feature
from a2c2_ros.core.limits import LimitFlag, Limits
from a2c2_ros.core.manifest import HeadManifest
from a2c2_ros.core.observation import ObservationBuffer
from a2c2_ros.core.safety import HoldPolicy
from a2c2_ros.core.state import rotation_vector, state_vector


def test_core_imports_nothing_heavy():
    code = (
        "import pkgutil, importlib, sys, a2c2_ros.core as core\n"
        "for m in pkgutil.iter_modules(core.__path__): importlib.import_module('a2c2_ros.core.' + m.name)\n"
        "print(*{m.split('.')[0] for m in sys.modules} - set(sys.stdlib_module_names) - {'__main__'})\n"
        "print(*{m for m in sys.modules if m.startswith('a2c2_ros.') and not m.startswith('a2c2_ros.core')})"
    )
    path = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(np.__file__).parents[1])])
    run = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": path}
    )
    packages, siblings = run.stdout.split("\n")[:2]
    assert set(packages.split()) <= {"numpy", "a2c2_ros"}
    assert siblings == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"actions": np.full((8, 3), np.nan)}, "not finite"),
        ({"actions": np.zeros((8, 2))}, r"\(8, 2\)"),
        ({"actions": np.zeros((0, 3))}, r"\(0, 3\)"),
        ({"latent": np.array([np.inf])}, "latent"),
        ({"step_ns": 0}, "step_ns is 0"),
        ({"chunk_id": 0}, "chunk_id is 0"),
        ({"action_names": ("x", "x", "y")}, "repeat"),
    ],
)
def test_chunk_refuses(changes, message):
    with pytest.raises(ChunkError, match=message):
        make_chunk(0, **changes)


def test_chunk_is_immutable():
    source = np.zeros((8, 3), np.float32)
    chunk = make_chunk(0, actions=source)
    source[:] = 1
    assert not chunk.actions.any()
    with pytest.raises(ValueError):
        chunk.actions[0, 0] = 1


@pytest.mark.parametrize(
    ("stream", "stamp", "value", "message"),
    [
        ("nose", 1, np.zeros(2), "nose"),
        ("joints", 1, np.zeros(3), r"\(3,\)"),
        ("joints", 1, np.zeros(2, np.float32), "float32"),
        ("joints", 1, np.array([0.0, np.nan]), "not finite"),
        ("joints", 0, np.zeros(2), "stamp 0"),
    ],
)
def test_observation_refuses(stream, stamp, value, message):
    buffer = ObservationBuffer(make_robot().streams)
    with pytest.raises(ObservationError, match=message):
        buffer.put(stream, stamp, value)
    assert not buffer.snapshot().values


def test_observation_keeps_the_newest_and_the_snapshot_does_not_change():
    buffer = ObservationBuffer(make_robot().streams)
    assert buffer.put("joints", 20, np.array([2.0, 2.0]))
    snapshot = buffer.snapshot()
    assert not buffer.put("joints", 10, np.array([1.0, 1.0]))
    assert buffer.put("joints", 30, np.array([3.0, 3.0]))
    assert snapshot.values["joints"][0] == 2.0
    assert buffer.snapshot().ages_ns(35) == {"joints": 5}


def test_a_clock_that_jumped_back_starts_afresh_but_a_late_sample_does_not():
    buffer = ObservationBuffer(make_robot().streams)
    buffer.put("joints", 10**10, np.zeros(2))
    buffer.put("camera", 10**10, np.zeros((4, 4, 3), np.uint8))
    assert not buffer.put("joints", 10**10 - 10**9, np.ones(2))
    assert buffer.put("joints", 10**9, np.ones(2))
    assert buffer.snapshot().stamps_ns == {"joints": 10**9}


@given(
    st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3),
    st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3),
    st.lists(st.floats(0, 2, width=32), min_size=3, max_size=3),
)
def test_limits_are_never_exceeded(action, previous, step):
    limits = Limits.of(NAMES, [-1] * 3, [1] * 3, step)
    action, previous = np.array(action, np.float32), np.array(previous, np.float32)
    limited, flags = limits.apply(action, previous)
    assert (limited >= -1).all() and (limited <= 1).all()
    assert (np.abs(limited.astype(np.float64) - previous) <= limits.step).all()
    assert (flags == LimitFlag.NONE) == np.array_equal(limited, action)


def test_step_limit_keeps_the_direction():
    limits = Limits.of(NAMES, [-1] * 3, [1] * 3, [0.1, 0.1, np.inf])
    limited, flags = limits.apply(np.array([0.4, 0.2, 0.0], np.float32), np.zeros(3, np.float32))
    assert limited == pytest.approx([0.1, 0.05, 0.0])
    assert flags == LimitFlag.STEP


def test_zero_is_a_limit_and_nan_is_refused():
    limited, _ = Limits.of(NAMES, [0] * 3, [0] * 3).apply(np.ones(3, np.float32), None)
    assert not limited.any()
    with pytest.raises(ConfigError, match="lower"):
        Limits.of(NAMES, [np.nan] * 3, [1] * 3)
    with pytest.raises(ConfigError, match="step"):
        Limits.of(NAMES, [-1] * 3, [1] * 3, [-0.1, 1, 1])


def test_a_channel_that_may_not_move_does_not_stop_the_others():
    limits = Limits.of(NAMES, [-1] * 3, [1] * 3, [0.0, 0.1, None])
    limited, flags = limits.apply(np.array([0.4, 0.2, 0.5], np.float32), np.zeros(3, np.float32))
    assert limited == pytest.approx([0.0, 0.1, 0.5]), "a channel without a limit (a gripper) is not scaled"
    assert flags == LimitFlag.STEP


def test_velocity_is_a_step_at_the_control_rate():
    limits = Limits.of(NAMES, [-1] * 3, [1] * 3, None, [2.0, 2.0, None]).at(50_000_000)
    limited, flags = limits.apply(np.array([0.4, 0.2, 0.0], np.float32), np.zeros(3, np.float32))
    assert limited == pytest.approx([0.1, 0.05, 0.0])
    assert flags == LimitFlag.VELOCITY


def test_hold_of_a_delta_keeps_the_gripper_and_of_a_position_stays_where_it_is_measured():
    delta = HoldPolicy("delta", 3, keep=(2,), keep_default=(-1.0,))
    assert delta.target(np.array([0.5, 0.5, 1.0]), None).tolist() == [0, 0, 1]
    assert delta.seed(None).tolist() == [0, 0, -1]
    position = HoldPolicy("position", 3, keep=(2,), keep_default=(0.5,))
    last = np.array([1.0, 1.0, 0.8], np.float32)
    assert position.target(last, None) == pytest.approx(last), "the last command is the nearest to a measurement"
    assert position.target(last, np.array([0.1, 0.2, np.nan])) == pytest.approx([0.1, 0.2, 0.8])
    assert position.seed(None) is None
    assert position.seed(np.array([0.1, 0.2, np.nan])) == pytest.approx([0.1, 0.2, 0.5])
    assert position.seed(np.array([0.1, np.nan, np.nan])) is None, "never zero for a joint"


def test_time_feature_is_the_papers():
    assert time_feature(0, 8) == pytest.approx([0, 1])
    assert time_feature(2, 8) == pytest.approx([1, 0], abs=1e-7)
    assert time_feature(4, 8) == pytest.approx([0, -1], abs=1e-7)


def test_rotation_vector_is_continuous_at_pi_and_ignores_the_quaternions_sign():
    down = np.array([1.0, 0.0, 0.0, 0.0])
    for angle in (-0.02, -0.01, 0.0, 0.01, 0.02):
        tilted = np.array([np.cos(angle / 2), 0.0, 0.0, -np.sin(angle / 2)])
        expected = [angle, 0, 0]
        assert rotation_vector(tilted, down) == pytest.approx(expected, abs=1e-12)
        assert rotation_vector(-tilted, down) == pytest.approx(expected, abs=1e-12)


def test_state_vector_layout_and_refusals():
    pose = np.array([0.1, 0.2, 0.3, 1.0, 0.0, 0.0, 0.0])
    state = state_vector(pose, np.array([0.04, -0.04]), pose[3:])
    assert state.dtype == np.float32
    assert state == pytest.approx([0.1, 0.2, 0.3, 0, 0, 0, 0.04, -0.04])
    with pytest.raises(ObservationError, match="gripper"):
        state_vector(pose, np.zeros(3), pose[3:])
    with pytest.raises(ObservationError, match="no direction"):
        state_vector(np.zeros(7), np.zeros(2), pose[3:])


def make_manifest(**changes) -> HeadManifest:
    fields = (
        dict(
            architecture="compact",
            policy_id="test",
            horizon=8,
            step_ns=50_000_000,
            action_names=NAMES,
            action_space="test",
            cameras={"camera": (4, 4, 3)},
            state_names=("a", "b"),
            latent_size=4,
            language_size=2,
        )
        | changes
    )
    return HeadManifest(**fields)


def test_manifest_round_trip_and_refusals():
    manifest = make_manifest()
    assert HeadManifest.from_json(manifest.to_json(), "x.onnx") == manifest
    for text, message in (
        ("{", "not JSON"),
        ("[]", "list"),
        ("{}", "missing"),
        (make_manifest(output="absolute").to_json(), "'absolute'"),
        (make_manifest(time_feature="k_over_H").to_json(), "time_feature"),
    ):
        with pytest.raises(ManifestError, match=message):
            HeadManifest.from_json(text, "x.onnx")


def test_manifest_names_every_mismatch():
    make_manifest().check_chunk(make_chunk(0))
    with pytest.raises(ManifestError, match=r"horizon: head 50, chunk 8.*latent_size: head 9, chunk 4"):
        make_manifest(horizon=50, latent_size=9).check_chunk(make_chunk(0))
    with pytest.raises(ManifestError, match="camera wrist.*absent"):
        make_manifest(cameras={"wrist": (4, 4, 3)}).check_robot(
            {"camera": (4, 4, 3)}, ("a", "b"), NAMES, "test", 50_000_000
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"execution_horizon": 5}, r"H=50.*e=5.*d=10.*d <= e"),
        ({"inference_delay": 11}, r"H=50.*e=40.*d=11.*e \+ d <= H"),
        ({"execution_horizon": 0}, r"execution_horizon is 0, allowed is \[1"),
        ({"execution_horizon": 10.5}, "float"),
        ({"execution_horizon": True}, "bool"),
        ({"inference_delay_jitter": 11}, "jitter"),
        ({"horizon": 60}, "cannot change"),
    ],
)
def test_planner_parameters_are_checked_as_one_candidate(changes, message):
    config = PlannerConfig()
    with pytest.raises(ConfigError, match=message):
        config.replaced(changes)


def test_planner_parameters_change_together():
    config = PlannerConfig().replaced({"execution_horizon": 5, "inference_delay": 5, "use_sim_time": True})
    assert (config.execution_horizon, config.inference_delay) == (5, 5)


def test_controller_parameters_have_ros_names():
    config = ControllerConfig().replaced({"correction.enabled": False, "residual_limit": 1})
    assert config.correction__enabled is False
    assert config.residual_limit == 1.0
    with pytest.raises(ConfigError, match="correction.enabled"):
        config.replaced({"correction.enabled": 1})
    with pytest.raises(ConfigError, match="residual_limit is nan"):
        config.replaced({"residual_limit": float("nan")})
