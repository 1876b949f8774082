"""The straightforward controller, for comparison: what one writes from the rclpy tutorials, and writes well.

One node, an executor with its defaults (``MultiThreadedExecutor``, or ``SingleThreadedExecutor`` to see what that one
costs), ``create_timer`` at the control rate, the head as a torch module in the timer's callback. The timer has a
callback group of its own and so has every sensor: no callback waits for another by configuration. Samples are handed
over by reference, the message of the command is made once. It notes times in memory and writes them as JSON when it
ends (SIGINT or SIGTERM).
"""

import argparse
import contextlib
import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import rclpy
import torch
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.executors import MultiThreadedExecutor, SingleThreadedExecutor
from rclpy.node import Node
from rclpy.qos import DurabilityPolicy, QoSProfile, ReliabilityPolicy
from rclpy.signals import SignalHandlerOptions
from sensor_msgs.msg import Image, JointState

from a2c2_ros.benchmark import arm
from a2c2_ros.benchmark.load import READY
from a2c2_ros.core.features import time_feature
from a2c2_ros.heads.base import Head, load_head
from a2c2_ros.msg import ActionChunk

SENSOR = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
LATCHED = QoSProfile(depth=2, reliability=ReliabilityPolicy.RELIABLE, durability=DurabilityPolicy.TRANSIENT_LOCAL)
EXECUTORS = {"multi": MultiThreadedExecutor, "single": SingleThreadedExecutor}
COMMAND = QoSProfile(depth=1, reliability=ReliabilityPolicy.RELIABLE)


class StraightforwardController(Node):
    """Adds the head's residual to the newest chunk's action, clips and publishes, in a timer's callback.

    Args:
        head: The correction head, evaluation mode.
        subscribed: Camera names to subscribe to; at least those of the head.
        rate_hz: Control rate [Hz].
    """

    def __init__(self, head: Head, subscribed: Sequence[str], rate_hz: float) -> None:
        super().__init__("straightforward_controller")
        profile = arm.read_profile()
        self._head = head
        self._cameras = head.config.cameras
        self._size = head.config.image_size
        self._names = profile["action"]["names"]
        self._lower, self._upper = (np.array(profile["limits"][side], np.float32) for side in ("lower", "upper"))
        self._images: dict[str, tuple[int, torch.Tensor]] = {}
        self._joints: tuple[int, np.ndarray] | None = None
        self._chunk: tuple[int, int, np.ndarray, torch.Tensor, torch.Tensor] | None = None
        self._ticks: list[dict[str, Any]] = []
        self._taken_ns: dict[str, list[int]] = {name: [] for name in subscribed}
        self._command = JointState(name=self._names)
        self._publisher = self.create_publisher(JointState, profile["command"]["topic"], COMMAND)
        self.create_subscription(
            JointState,
            profile["joint_states"]["topic"],
            self._on_joints,
            SENSOR,
            callback_group=MutuallyExclusiveCallbackGroup(),
        )
        self.create_subscription(
            ActionChunk, "action_chunk", self._on_chunk, LATCHED, callback_group=MutuallyExclusiveCallbackGroup()
        )
        for name in subscribed:
            self.create_subscription(
                Image,
                profile["cameras"][name]["topic"],
                lambda message, name=name: self._on_image(name, message),
                SENSOR,
                callback_group=MutuallyExclusiveCallbackGroup(),
            )
        self._timer = self.create_timer(1.0 / rate_hz, self._tick, callback_group=MutuallyExclusiveCallbackGroup())

    def _on_joints(self, message: JointState) -> None:
        positions = dict(zip(message.name, message.position))
        state = np.array([positions[name] for name in self._names], np.float32)
        self._joints = (_to_ns(message.header.stamp), state)

    def _on_image(self, name: str, message: Image) -> None:
        stamp_ns = _to_ns(message.header.stamp)
        if name in self._cameras:
            image = np.frombuffer(message.data, np.uint8).reshape(message.height, message.width, 3)
            image = cv2.resize(image, (self._size, self._size), interpolation=cv2.INTER_AREA)
            self._images[name] = (stamp_ns, torch.from_numpy(image)[None])
        else:
            self._images[name] = (stamp_ns, torch.empty(0))
        self._taken_ns[name].append(stamp_ns)

    def _on_chunk(self, message: ActionChunk) -> None:
        actions = np.array(message.actions, np.float32).reshape(message.horizon, -1)
        latent, language = (torch.tensor(np.array(v, np.float32))[None] for v in (message.latent, message.language))
        step_ns = message.step.sec * 1_000_000_000 + message.step.nanosec
        self._chunk = (_to_ns(message.header.stamp), step_ns, actions, latent, language)

    def _tick(self) -> None:
        started_ns = time.time_ns()
        # The grid point that was due last: the timer was called just before, so its next call is one period later.
        scheduled_ns = started_ns + self._timer.time_until_next_call() - self._timer.timer_period_ns
        if self._chunk is None or self._joints is None or len(self._images) < len(self._taken_ns):
            return
        t_obs_ns, step_ns, actions, latent, language = self._chunk
        stamp_ns, state = self._joints
        images = dict(self._images)
        slot = min(max((started_ns - t_obs_ns) // step_ns, 0), len(actions) - 1)
        base = actions[slot]
        head_started_ns = time.perf_counter_ns()
        with torch.inference_mode():
            residual = self._head(
                {name: images[name][1] for name in self._cameras},
                torch.from_numpy(state)[None],
                torch.from_numpy(base)[None],
                torch.from_numpy(time_feature(slot, len(actions)))[None],
                latent,
                language,
            )[0].numpy()
        head_ns = time.perf_counter_ns() - head_started_ns
        self._command.position = np.clip(base + residual, self._lower, self._upper).tolist()
        self._command.header.stamp.sec, self._command.header.stamp.nanosec = divmod(started_ns, 1_000_000_000)
        self._publisher.publish(self._command)
        self._ticks.append(
            {
                "scheduled_ns": scheduled_ns,
                "started_ns": started_ns,
                "commanded_ns": time.time_ns(),
                "head_ns": head_ns,
                "stamps_ns": [stamp_ns, *(images[name][0] for name in self._taken_ns)],
            }
        )

    def record(self) -> dict[str, Any]:
        """Times of every tick, and the stamps of the images that were taken, per camera."""
        return {"ticks": self._ticks, "streams": ["joint_position", *self._taken_ns], "taken_ns": self._taken_ns}


def _to_ns(stamp) -> int:
    return stamp.sec * 1_000_000_000 + stamp.nanosec


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m a2c2_ros.benchmark.baseline", description=__doc__)
    parser.add_argument("--head", type=Path, required=True, help="head.safetensors")
    parser.add_argument("--rate-hz", type=float, required=True, help="control rate [Hz]")
    parser.add_argument("--executor", choices=sorted(EXECUTORS), default="multi", help="rclpy's executor")
    parser.add_argument("--cameras", action="store_true", help="subscribe to the cameras even if the head sees none")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write at the end")
    args = parser.parse_args(argv)
    head = load_head(args.head)
    subscribed = tuple(arm.read_profile()["cameras"]) if args.cameras else head.config.cameras
    # rclpy's own handlers end the context under the executor, which then may raise.
    rclpy.init(signal_handler_options=SignalHandlerOptions.NO)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    node = StraightforwardController(head, subscribed, args.rate_hz)
    executor = EXECUTORS[args.executor]()
    executor.add_node(node)
    with contextlib.suppress(KeyboardInterrupt):
        print(READY, flush=True)
        executor.spin()
    args.out.write_text(json.dumps(node.record()), encoding="utf-8")
    os._exit(0)  # callbacks that wait in the executor's pool would still run, and crash while rclpy ends


if __name__ == "__main__":
    main()
