"""What surrounds the loop in the timing benchmark, each a process of its own.

``robot`` publishes joint states, chunks and cameras like a robot with a planner; ``policy`` runs the shipped policy
back to back, like a planner that never rests. Both work until SIGTERM or SIGINT and then write what they did as JSON.
"""

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from a2c2_ros.benchmark import arm

JOINT_STATE_FACTOR = 1.02
"""Joint states come slightly faster than the ticks. At equal rates their age would be a constant of the phase at start;
so it passes through all phases within a second at 50 Hz."""

READY = "ready"
"""What a load prints when it works."""


def until_signal() -> threading.Event:
    """An event that SIGTERM and SIGINT set."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    return stop


@dataclass
class _Stream:
    """Something that is published at a fixed rate."""

    period_ns: int
    publish: Callable[[int], None]  # with the stamp [ns]
    due_ns: int


def run_robot(rate_hz: float, cameras: bool, stop: threading.Event) -> dict[str, Any]:
    """Publish until ``stop`` is set.

    Args:
        rate_hz: Control rate: sets the rate of the joint states and chunks and the duration of a slot.
        cameras: Publish the cameras of the profile.
        stop: Ends it.

    Returns:
        "images_ns": camera name to the stamps of its images [ns].
    """
    import rclpy
    from rclpy.signals import SignalHandlerOptions
    from sensor_msgs.msg import Image, JointState

    from a2c2_ros.msg import ActionChunk
    from a2c2_ros.nodes.runtime import latched_qos, sensor_qos

    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node("bench_robot")
    profile = arm.read_profile()
    stamps: dict[str, list[int]] = {}
    streams = [
        _joint_states(node.create_publisher(JointState, "joint_states", sensor_qos(False)), profile, rate_hz),
        _chunks(node.create_publisher(ActionChunk, "action_chunk", latched_qos(2)), profile, rate_hz),
    ]
    if cameras:
        rng = np.random.default_rng(arm.SEED)
        for name, camera in profile["cameras"].items():
            stamps[name] = []
            publisher = node.create_publisher(Image, camera["topic"], sensor_qos(False))
            streams.append(_camera(publisher, camera, rng, stamps[name]))
    print(READY, flush=True)
    while not stop.is_set():
        stream = min(streams, key=lambda s: s.due_ns)
        wait_ns = stream.due_ns - time.time_ns()
        if wait_ns > 0:
            time.sleep(wait_ns / 1e9)
        stream.publish(time.time_ns())
        # A late sample does not shift the next one, but after a long pause there is no burst.
        stream.due_ns = max(stream.due_ns + stream.period_ns, time.time_ns())
    node.destroy_node()
    rclpy.shutdown()
    return {"images_ns": stamps}


def _joint_states(publisher, profile: Mapping[str, Any], rate_hz: float) -> _Stream:
    from sensor_msgs.msg import JointState

    from a2c2_ros.nodes.conversions import to_time

    message = JointState(name=profile["joint_states"]["names"])

    def publish(stamp_ns: int) -> None:
        message.header.stamp = to_time(stamp_ns)
        message.position = arm.motion_rad(np.array([stamp_ns]), len(message.name))[0].tolist()
        publisher.publish(message)

    return _Stream(round(1e9 / (rate_hz * JOINT_STATE_FACTOR)), publish, time.time_ns())


def _chunks(publisher, profile: Mapping[str, Any], rate_hz: float) -> _Stream:
    from a2c2_ros.msg import ActionChunk
    from a2c2_ros.nodes.conversions import to_duration, to_time

    step_ns = round(1e9 / rate_hz)
    rng = np.random.default_rng(arm.SEED)
    names = profile["action"]["names"]
    message = ActionChunk(
        step=to_duration(step_ns),
        horizon=arm.HORIZON,
        action_names=names,
        planner_id="bench",
        policy_id=arm.POLICY_ID,
    )
    message.latent.frombytes(rng.standard_normal(arm.LATENT_DIM, np.float32).tobytes())
    message.language.frombytes(rng.standard_normal(arm.LANGUAGE_DIM, np.float32).tobytes())

    def publish(stamp_ns: int) -> None:
        slots_ns = stamp_ns + step_ns * np.arange(arm.HORIZON)
        message.header.stamp = to_time(stamp_ns)
        message.chunk_id += 1
        del message.actions[:]
        message.actions.frombytes(arm.motion_rad(slots_ns, len(names)).astype(np.float32).tobytes())
        publisher.publish(message)

    return _Stream(step_ns * arm.HORIZON // 2, publish, time.time_ns())


def _camera(publisher, camera: Mapping[str, Any], rng: np.random.Generator, stamps: list[int]) -> _Stream:
    from a2c2_ros.nodes.conversions import array_to_image, to_time

    pixels = rng.integers(0, 256, (camera["height"], camera["width"], 3), np.uint8)
    message = array_to_image(pixels, 0, "camera")

    def publish(stamp_ns: int) -> None:
        message.header.stamp = to_time(stamp_ns)
        publisher.publish(message)
        stamps.append(stamp_ns)

    return _Stream(round(1e9 / arm.CAMERA_RATE_HZ), publish, time.time_ns())


def policy_inference() -> Callable[[int], object]:
    """One inference of the shipped policy on one thread and a made-up observation, as a function of the noise seed."""
    from a2c2_ros.core.config import PlannerConfig
    from a2c2_ros.policies.base import PolicyOptions
    from a2c2_ros.policies.registry import load_policy

    config = PlannerConfig()
    policy = load_policy(config.policy, config.policy_path, PolicyOptions(threads=1))
    rng = np.random.default_rng(arm.SEED)
    side = policy.image_size
    observation = {name: rng.integers(0, 256, (side, side, 3), np.uint8) for name in policy.cameras}
    observation["state"] = rng.standard_normal(policy.state_dim, np.float32)
    return lambda seed: policy.predict(observation, "move", seed=seed)


def run_policy(stop: threading.Event) -> dict[str, Any]:
    """Run the shipped policy on one thread, one inference after the other, until ``stop`` is set.

    Returns:
        "ended_ns": ROS time at the end of every inference [ns].
    """
    infer = policy_inference()
    ended_ns: list[int] = []
    infer(0)
    print(READY, flush=True)
    while not stop.is_set():
        infer(len(ended_ns))
        ended_ns.append(time.time_ns())
    return {"ended_ns": ended_ns}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m a2c2_ros.benchmark.load", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write at the end")
    kinds = parser.add_subparsers(dest="kind", required=True)
    robot = kinds.add_parser("robot", help="joint states, chunks and cameras")
    robot.add_argument("--rate-hz", type=float, required=True, help="control rate [Hz]")
    robot.add_argument("--cameras", action="store_true", help="publish the cameras")
    kinds.add_parser("policy", help="the shipped policy back to back on one thread")
    args = parser.parse_args(argv)
    stop = until_signal()
    record = run_robot(args.rate_hz, args.cameras, stop) if args.kind == "robot" else run_policy(stop)
    args.out.write_text(json.dumps(record), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
