"""Between ROS messages and the types of ``core``. Pure functions; wrong input raises and changes nothing."""

import struct
from dataclasses import dataclass

import cv2
import numpy as np
from builtin_interfaces.msg import Duration, Time
from diagnostic_msgs.msg import DiagnosticStatus, KeyValue
from geometry_msgs.msg import PoseStamped
from rclpy.serialization import deserialize_message
from sensor_msgs.msg import Image, JointState

from a2c2_ros.core.chunk import ActionChunk
from a2c2_ros.core.controller import ControlStep
from a2c2_ros.core.errors import ChunkError, ObservationError, OtherJointsError
from a2c2_ros.core.health import Status
from a2c2_ros.core.planner import ChunkRequest
from a2c2_ros.core.replay import RecordedStep
from a2c2_ros.core.safety import Reason, State
from a2c2_ros.core.timing import ChunkTiming, StepTiming
from a2c2_ros.msg import ActionChunk as ActionChunkMsg
from a2c2_ros.msg import ControlStep as ControlStepMsg
from a2c2_ros.msg import PlannerTiming as PlannerTimingMsg


def to_ns(stamp: Time | Duration) -> int:
    """Time or duration in nanoseconds."""
    return stamp.sec * 1_000_000_000 + stamp.nanosec


def to_time(ns: int) -> Time:
    """Nanoseconds to a time message."""
    return Time(sec=ns // 1_000_000_000, nanosec=ns % 1_000_000_000)


def to_duration(ns: int) -> Duration:
    """Nanoseconds to a duration message."""
    return Duration(sec=ns // 1_000_000_000, nanosec=ns % 1_000_000_000)


@dataclass(frozen=True, eq=False)
class ImageView:
    """The fields of a ``sensor_msgs/Image`` that are used, without a copy of its pixels."""

    stamp_ns: int
    height: int
    width: int
    encoding: str
    step: int
    data: memoryview

    @classmethod
    def of(cls, message: Image) -> "ImageView":
        """View of a message."""
        data = memoryview(message.data).cast("B")
        return cls(to_ns(message.header.stamp), message.height, message.width, message.encoding, message.step, data)


CDR_ENDIANNESS = {b"\x00\x00": ">", b"\x00\x01": "<"}
"""Representation identifiers of plain CDR (DDSI-RTPS 2.5, 10.2.1.2) to the byte order of ``struct``."""


def serialized_to_image(serialized: bytes) -> ImageView:
    """View of a serialised ``sensor_msgs/Image``.

    To deserialise a 256 x 256 image keeps the interpreter for 0.2 to 0.4 ms, in which no tick can begin; this takes
    microseconds. Another representation than plain CDR is left to the message library.

    Raises:
        ObservationError: If the bytes are no such message.
    """
    order = CDR_ENDIANNESS.get(serialized[:2])
    if order is None:
        try:
            return ImageView.of(deserialize_message(serialized, Image))
        except RuntimeError as error:
            raise ObservationError(f"image message of {len(serialized)} bytes: {error}") from error
    body = memoryview(serialized)[4:]
    offset = 0

    def read(kind: str) -> int:
        nonlocal offset
        size = struct.calcsize(kind)
        offset += -offset % size
        (value,) = struct.unpack_from(order + kind, body, offset)
        offset += size
        return value

    def read_bytes() -> memoryview:
        nonlocal offset
        length = read("I")
        part = body[offset : offset + length]
        offset += length
        if len(part) < length:
            raise ObservationError(f"image message ends after {len(part)} of {length} bytes of a field")
        return part

    try:
        stamp_ns = read("i") * 1_000_000_000 + read("I")
        read_bytes()  # frame_id
        height, width = read("I"), read("I")
        encoding = bytes(read_bytes()).rstrip(b"\0").decode(errors="replace")
        read("B")  # is_bigendian: of no meaning for 8-bit channels
        step = read("I")
        data = read_bytes()
    except struct.error as error:
        raise ObservationError(f"image message of {len(serialized)} bytes: {error}") from error
    return ImageView(stamp_ns, height, width, encoding, step, data)


def image_to_array(
    message: Image | ImageView, height: int, width: int, shape: tuple[int, int, int] | None = None
) -> np.ndarray:
    """Image message to uint8 RGB; a view of the message's data where that is possible.

    Args:
        message: rgb8 or bgr8.
        height: Declared size [pixels].
        width: Declared size [pixels].
        shape: (height, width, 3) to scale to by the mean over areas; None: as it comes.

    Raises:
        ObservationError: If the encoding is neither rgb8 nor bgr8, or the size is not the declared one.
    """
    if message.encoding not in ("rgb8", "bgr8"):
        raise ObservationError(f"image encoding is {message.encoding!r}, allowed are 'rgb8' and 'bgr8'")
    if (message.height, message.width) != (height, width):
        raise ObservationError(f"image is {message.height} x {message.width} pixels, allowed is {height} x {width}")
    if message.step < 3 * width or len(message.data) != message.step * height:
        raise ObservationError(
            f"image has {len(message.data)} bytes and row step {message.step}, allowed are {height} rows of at least "
            f"{3 * width}"
        )
    rows = np.frombuffer(message.data, np.uint8).reshape(height, message.step)
    image = rows[:, : 3 * width].reshape(height, width, 3)
    if shape is not None and shape != image.shape:
        image = cv2.resize(image, (shape[1], shape[0]), interpolation=cv2.INTER_AREA)
    # torch takes no array with negative strides.
    return image if message.encoding == "rgb8" else np.ascontiguousarray(image[:, :, ::-1])


def array_to_image(array: np.ndarray, stamp_ns: int, frame_id: str) -> Image:
    """(height, width, 3) uint8 RGB to an rgb8 image message."""
    message = Image(height=array.shape[0], width=array.shape[1], encoding="rgb8", step=3 * array.shape[1])
    message.header.stamp = to_time(stamp_ns)
    message.header.frame_id = frame_id
    message.data.frombytes(np.ascontiguousarray(array).tobytes())
    return message


def joint_state_to_array(message: JointState, names: tuple[str, ...]) -> np.ndarray:
    """Positions in the order of ``names``, (len(names),) float64 [rad or m]; the message may have another order.

    Raises:
        OtherJointsError: If none of the joints is in it.
        ObservationError: If a joint is missing or names and positions differ in number.
    """
    if len(message.name) != len(message.position):
        raise ObservationError(f"joint state has {len(message.name)} names and {len(message.position)} positions")
    positions = dict(zip(message.name, message.position, strict=True))
    missing = [name for name in names if name not in positions]
    if missing:
        error = OtherJointsError if len(missing) == len(names) else ObservationError
        raise error(f"joint state lacks the joints {missing}, it has {list(message.name)}")
    return np.array([positions[name] for name in names], dtype=np.float64)


def array_to_joint_state(values: np.ndarray, names: tuple[str, ...], stamp_ns: int) -> JointState:
    """Positions of the named joints or action channels, as a joint state."""
    message = JointState(name=list(names), position=[float(v) for v in values])
    message.header.stamp = to_time(stamp_ns)
    return message


def pose_to_array(message: PoseStamped, frame_id: str = "") -> np.ndarray:
    """(7,) float64: position x y z [m], orientation x y z w.

    Args:
        message: The pose.
        frame_id: In which it has to be; "": in any.

    Raises:
        ObservationError: If it is in another frame.
    """
    if frame_id and message.header.frame_id != frame_id:
        raise ObservationError(f"pose is in frame {message.header.frame_id!r}, allowed is {frame_id!r}")
    p, q = message.pose.position, message.pose.orientation
    return np.array([p.x, p.y, p.z, q.x, q.y, q.z, q.w], dtype=np.float64)


def array_to_pose(values: np.ndarray, stamp_ns: int, frame_id: str) -> PoseStamped:
    """(7,) position and orientation x y z w to a pose."""
    message = PoseStamped()
    message.header.stamp = to_time(stamp_ns)
    message.header.frame_id = frame_id
    p, q = message.pose.position, message.pose.orientation
    p.x, p.y, p.z, q.x, q.y, q.z, q.w = (float(v) for v in values)
    return message


def chunk_to_message(chunk: ActionChunk, instruction: str) -> ActionChunkMsg:
    """Chunk to its message."""
    message = ActionChunkMsg(
        chunk_id=chunk.chunk_id,
        step=to_duration(chunk.step_ns),
        horizon=chunk.horizon,
        action_names=list(chunk.action_names),
        planner_id=chunk.planner_id,
        policy_id=chunk.policy_id,
        instruction=instruction,
        inference_time=to_duration(chunk.inference_ns),
        transport_time=to_duration(chunk.transport_ns),
    )
    message.header.stamp = to_time(chunk.t_obs_ns)
    for name in ("actions", "latent", "language"):
        getattr(message, name).frombytes(getattr(chunk, name).tobytes())
    return message


def message_to_chunk(message: ActionChunkMsg) -> ActionChunk:
    """Message to a chunk.

    Raises:
        ChunkError: If the number of actions does not fit the horizon and names, or a value is wrong.
    """
    horizon, names = message.horizon, tuple(message.action_names)
    actions = np.frombuffer(message.actions, np.float32)
    if actions.size != horizon * len(names):
        raise ChunkError(
            f"chunk {message.chunk_id}: {actions.size} values, allowed are horizon {horizon} x "
            f"{len(names)} names = {horizon * len(names)}"
        )
    return ActionChunk(
        chunk_id=message.chunk_id,
        t_obs_ns=to_ns(message.header.stamp),
        step_ns=to_ns(message.step),
        actions=actions.reshape(horizon, len(names)),
        action_names=names,
        latent=np.frombuffer(message.latent, np.float32),
        language=np.frombuffer(message.language, np.float32),
        policy_id=message.policy_id,
        planner_id=message.planner_id,
        inference_ns=to_ns(message.inference_time),
        transport_ns=to_ns(message.transport_time),
    )


def timing_to_message(
    timing: ChunkTiming, request: ChunkRequest, chunk: ActionChunk, inference_delay: int
) -> PlannerTimingMsg:
    """Timing of a chunk to its message; ``inference_delay`` is the injected d."""
    admissible = timing.admissible
    message = PlannerTimingMsg(
        chunk_id=chunk.chunk_id,
        policy_id=chunk.policy_id,
        inference_time_s=chunk.inference_ns / 1e9,
        transport_time_s=chunk.transport_ns / 1e9,
        delay_s=timing.delay_ns / 1e9,
        delay_steps=timing.delay_steps,
        effective_delay_steps=timing.effective_delay_steps,
        window_chunks=timing.window_chunks,
        horizon=timing.horizon,
        execution_horizon=timing.execution_horizon,
        inference_delay=inference_delay,
        execution_horizon_min=admissible[0] if admissible else 0,
        execution_horizon_max=admissible[-1] if admissible else 0,
        execution_horizon_proposed=timing.proposed,
    )
    message.header.stamp = to_time(request.t_obs_ns)
    return message


def step_to_message(
    step: ControlStep, streams: tuple[str, ...], timing: StepTiming, configuration: int
) -> ControlStepMsg:
    """Control step to its message; ``streams`` is the order of the ages, ``configuration`` the revision in use."""
    ages = [step.ages_ns[name] / 1e9 if name in step.ages_ns else float("inf") for name in streams]
    message = ControlStepMsg(
        tick=step.tick,
        configuration=configuration,
        chunk_id=step.chunk_id,
        chunk_stamp=to_time(step.t_obs_ns),
        slot=step.slot,
        horizon=step.horizon,
        stream_names=list(streams),
        stream_ages_s=ages,
        takeover_age_s=float("inf") if step.takeover_age_ns is None else step.takeover_age_ns / 1e9,
        head_time_s=step.head_ns / 1e9,
        period_error_s=timing.period_error_ns / 1e9,
        lateness_s=timing.lateness_ns / 1e9,
        command_latency_s=timing.command_latency_ns / 1e9,
        missed_ticks=timing.missed,
        chunk_delay_steps=float(step.chunk_delay_steps),
        state=int(step.state),
        reason=int(step.reason),
        detail=step.detail,
        limit_flags=int(step.limits),
    )
    message.header.stamp = to_time(step.t_tick_ns)
    message.base_action.frombytes(step.base_action.tobytes())
    message.residual.frombytes(step.residual.tobytes())
    if step.command is not None:
        message.command.frombytes(step.command.tobytes())
    return message


def message_to_recorded(message: ControlStepMsg) -> RecordedStep:
    """What a replay needs of a control step; ages are as exact as float32 has them."""
    ages = zip(message.stream_names, message.stream_ages_s, strict=True)
    return RecordedStep(
        tick=message.tick,
        configuration=message.configuration,
        t_tick_ns=to_ns(message.header.stamp),
        state=State(message.state),
        reason=Reason(message.reason),
        detail=message.detail,
        t_obs_ns=to_ns(message.chunk_stamp),
        slot=message.slot,
        command=np.array(message.command, np.float32) if len(message.command) else None,
        ages_ns={name: round(age * 1e9) for name, age in ages if np.isfinite(age)},
        takeover_age_ns=round(message.takeover_age_s * 1e9) if np.isfinite(message.takeover_age_s) else None,
        head_ns=round(message.head_time_s * 1e9),
    )


def status_to_message(status: Status, node: str, hardware: str) -> DiagnosticStatus:
    """A line of diagnostics to its message."""
    return DiagnosticStatus(
        level=bytes([status.level]),
        name=f"{node}: {status.name}",
        message=status.message,
        hardware_id=hardware,
        values=[KeyValue(key=key, value=value) for key, value in status.values.items()],
    )
