"""A run of a small arm as a bag: the real loop on sensor data with jitter, written message by message."""

import dataclasses
import json

import numpy as np
from a2c2_ros.msg import ControlConfiguration, EpisodeStatus
from rclpy.serialization import serialize_message
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from a2c2_ros.core.chunk import ActionChunk
from a2c2_ros.core.config import ControllerConfig
from a2c2_ros.core.controller import CorrectionLoop
from a2c2_ros.core.observation import ObservationBuffer
from a2c2_ros.core.timing import StepTiming
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.heads.base import make_random_head
from a2c2_ros.heads.onnx_head import OnnxHead
from a2c2_ros.nodes.conversions import (
    array_to_image,
    array_to_joint_state,
    chunk_to_message,
    message_to_chunk,
    step_to_message,
    to_time,
)
from a2c2_ros.paths import robot_profile, share_directory
from a2c2_ros.training.recorded_run import streams_of

STEP_NS = 50_000_000
T0 = 1_700_000_000_000_000_000
POLICY_ID, HORIZON, LATENT, LANGUAGE, SIZE = "bench-0", 20, 3, 4, 64
CAMERAS = ("front", "wrist")
JOINTS = tuple(f"joint{i}" for i in range(1, 8))


def write_profile(path, size=SIZE, name="bench_arm"):
    text = robot_profile("bench_arm").read_text().replace("256", str(size)).replace(", resize: [128, 128]", "")
    path.write_text(text.replace("name: bench_arm", f"name: {name}"))
    return path


def make_head():
    """A head with random weights for the arm."""
    return make_random_head(
        "compact",
        cameras=CAMERAS,
        image_size=SIZE,
        state_names=JOINTS,
        action_names=JOINTS,
        action_space="joint_position",
        horizon=HORIZON,
        step_ns=STEP_NS,
        latent_dim=LATENT,
        language_dim=LANGUAGE,
        seed=0,
        policy_id=POLICY_ID,
        width=16,
        channels=8,
        keypoints=4,
    )


def image_at(n):
    """An image that tells its number, also after it was a video."""
    return np.full((SIZE, SIZE, 3), 2 * n + 20, np.uint8)


def record(
    path,
    profile_file,
    head,
    *,
    ticks=100,
    skipped=(),
    drop=lambda topic, n: False,
    planner=True,
    person=range(50, 56),
    stopped=lambda stream, n: False,
    restart=None,
    **changes,
):
    """Run the loop and write what a recorder gets of it.

    Args:
        path: Bag folder.
        profile_file: YAML file of the robot.
        head: ONNX file.
        ticks: Control steps.
        skipped: Ticks that the loop misses.
        drop: Topic and tick to whether the message is not recorded.
        planner: There are chunks.
        person: Ticks in which a person commands.
        stopped: Stream and tick to whether its sensor says nothing.
        restart: Tick before which the controller is started anew.
        **changes: Of the chunks.

    Returns:
        The control steps, and the observation of each.
    """
    rng = np.random.default_rng(0)
    profile = load_profile(str(profile_file))
    robot = profile.robot
    config = ControllerConfig(robot=str(profile_file), correction__model_path=str(head))

    def started():
        return CorrectionLoop(config, robot, OnnxHead(head), monotonic_ns=lambda: 0)

    loop = started()
    buffer = ObservationBuffer(robot.streams)
    converters = streams_of(profile)
    messages, steps, seen = [], [], []
    revision, missed = 0, 0

    def put(topic, message, log_ns, n):
        if not drop(topic, n):
            messages.append((log_ns, f"/{topic}", message))

    def announce(log_ns):
        nonlocal revision
        revision += 1
        message = ControlConfiguration(
            revision=revision,
            parameters=json.dumps(config.ros_values),
            robot=profile_file.read_text(),
            head_path=str(head),
            head_sha256=loop.head.sha256,
            head_manifest=loop.head.manifest.to_json(),
        )
        put("control_configuration", message, log_ns, -1)

    def episode(phase, t_ns, n):
        message = EpisodeStatus(phase=phase, episode=task, task=task, instruction=f"task {task}")
        message.header.stamp = to_time(t_ns)
        put("episode", message, t_ns, n)

    announce(T0 - STEP_NS)
    for n in range(ticks):
        t_ns = T0 + n * STEP_NS
        task = 0 if n < 40 else 1 if n < 70 else 2
        if n == restart:
            loop, revision = started(), 0
            announce(t_ns - 1)
        if n in (0, 40, 70):
            episode(EpisodeStatus.STARTED, t_ns, n)
        sensors = {}
        for joints in profile.joint_topics:
            position = 0.02 * rng.standard_normal(len(joints.names))
            stamp_ns = t_ns - int(rng.integers(0, 40_000_000))
            sensors[joints.stream] = array_to_joint_state(position, joints.names, stamp_ns)
        for name in CAMERAS:
            sensors[name] = array_to_image(image_at(n), t_ns - int(rng.integers(0, 40_000_000)), name)
        for stream, message in sensors.items():
            if stopped(stream, n):
                continue
            topic, convert = converters[stream]
            buffer.put(stream, *convert(serialize_message(message)))
            put(topic, message, t_ns - 1, n)
        expert = array_to_joint_state(np.full(7, 0.001 * n), robot.action_names, 0)
        expert.header.stamp = to_time(max(buffer.snapshot().stamps_ns.values()))
        if n < 80:
            put("expert_action", expert, t_ns - 1, n)
        if planner and n % 10 == 0:
            chunk = ActionChunk(
                **dict(
                    chunk_id=n + 1,
                    t_obs_ns=t_ns - 2 * STEP_NS,
                    step_ns=STEP_NS,
                    actions=0.1 * rng.standard_normal((HORIZON, 7)),
                    action_names=robot.action_names,
                    latent=rng.standard_normal(LATENT),
                    language=np.eye(LANGUAGE)[task],
                    policy_id=POLICY_ID,
                )
                | changes
            )
            message = chunk_to_message(chunk, f"task {task}")
            loop.install(message_to_chunk(message), t_ns)
            put("action_chunk", message, t_ns - 1, n)
        if n in person:
            command = array_to_joint_state(np.full(7, 0.05), robot.action_names, t_ns - 5_000_000)
            loop.take_over(np.array(command.position), t_ns - 5_000_000, t_ns)
            put("takeover", command, t_ns - 1, n)
        if n == 20:
            config = dataclasses.replace(config, residual_limit=0.005)
            loop.configure(config, loop.head)
            announce(t_ns - 1)
        if n in skipped:
            missed += 1
            continue
        step = loop.tick(t_ns, buffer.snapshot())
        steps.append(step)
        seen.append(buffer.snapshot())
        put("control_step", step_to_message(step, tuple(robot.streams), StepTiming(0, 0, 0, missed), revision), t_ns, n)
        missed = 0
        if n in (39, 69):
            episode(EpisodeStatus.SUCCEEDED if n == 39 else EpisodeStatus.FAILED, t_ns + STEP_NS, n)
    types = get_typestore(Stores.ROS2_JAZZY)
    for file in sorted((share_directory() / "msg").glob("*.msg")):
        types.register(get_types_from_msg(file.read_text(), f"a2c2_ros/msg/{file.stem}"))
    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as bag:
        connections = {}
        for log_ns, topic, message in sorted(messages, key=lambda row: row[0]):
            if topic not in connections:
                kind = f"{type(message).__module__.split('.')[0]}/msg/{type(message).__name__}"
                connections[topic] = bag.add_connection(topic, kind, typestore=types)
            bag.write(connections[topic], log_ns, serialize_message(message))
    return steps, seen
