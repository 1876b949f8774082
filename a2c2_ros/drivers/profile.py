"""Robot profiles: a robot is a YAML file, no code. ``config/robots/mock.yaml`` explains every entry."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from a2c2_ros.core.errors import ConfigError
from a2c2_ros.core.limits import Limits
from a2c2_ros.core.observation import StreamSpec
from a2c2_ros.core.robot import Robot
from a2c2_ros.core.safety import HoldPolicy
from a2c2_ros.core.state import state_vector
from a2c2_ros.drivers.entries import Entries
from a2c2_ros.drivers.mapping import ChannelMap, GripperMap
from a2c2_ros.drivers.urdf import joint_limits, urdf_path
from a2c2_ros.paths import robot_profile

STATE_NAMES = ("x", "y", "z", "rx", "ry", "rz", "finger_left", "finger_right")
COMMAND_KINDS = ("joint_state", "joint_trajectory", "float64_multi_array", "twist_stamped")
GRIPPER_TOPIC_KINDS = ("float64_multi_array", "joint_trajectory")
GRIPPER_ACTION_KINDS = ("gripper_command", "parallel_gripper_command")
TWIST_AXES = ("linear_x", "linear_y", "linear_z", "angular_x", "angular_y", "angular_z")
GRIPPER_TOLERANCE = 0.01
"""Default of ``gripper.tolerance``, as a part of the way from open to closed."""
CONTINUOUS_RANGE_RAD = 2 * math.pi - 0.5
"""Widest range of a continuous joint and its largest step together. An angle that its driver wraps lies outside then by
more than a step, even if the joint is 0.5 rad beyond its range, and is not believed; else a hold would follow it by a
turn."""


@dataclass(frozen=True)
class JointTopic:
    """Joints of the profile that one driver publishes."""

    stream: str
    topic: str
    names: tuple[str, ...]  # order of the stream


@dataclass(frozen=True)
class CameraTopic:
    """A camera of the profile."""

    name: str
    topic: str
    height: int  # as it comes [pixels]
    width: int
    shape: tuple[int, int, int]  # (height, width, 3) as it is used, after resizing
    transport: str = "raw"  # "raw": sensor_msgs/Image, "compressed": sensor_msgs/CompressedImage


@dataclass(frozen=True)
class TrajectoryTiming:
    """Times of a ``trajectory_msgs/JointTrajectory``."""

    time_from_start_ns: int  # of the first point
    period_ns: int  # from point to point
    stamp: str  # of the header; "tick": the tick's, "zero": the driver starts when the message arrives


@dataclass(frozen=True, eq=False)
class CommandSpec:
    """How commands reach the driver."""

    kind: str  # of COMMAND_KINDS, see nodes.command_sinks
    topic: str
    joints: tuple[str, ...]  # the driver's names, in its order
    mapping: ChannelMap
    points: str = "one"  # "chunk": a trajectory also has the rest of the chunk
    timing: TrajectoryTiming | None = None  # of a trajectory
    frame_id: str = ""  # of a twist


@dataclass(frozen=True)
class GripperSpec:
    """How gripper commands reach its driver."""

    kind: str  # of GRIPPER_TOPIC_KINDS or GRIPPER_ACTION_KINDS, see nodes.command_sinks
    topic: str  # or name of the action
    mapping: GripperMap
    tolerance: float  # a smaller change is not sent, driver's unit
    joint: str = ""  # the driver's name
    timing: TrajectoryTiming | None = None  # of a trajectory
    max_effort: float = 0.0  # of an action [N or N m]; 0, not with gripper_command: none is sent


@dataclass(frozen=True, eq=False)
class Profile:
    """A robot and the topics that reach it."""

    robot: Robot
    cameras: tuple[CameraTopic, ...]
    joint_topics: tuple[JointTopic, ...]  # the first is the stream joint_position
    ee_pose_topic: str | None  # None if the state does not need it
    command: CommandSpec
    gripper: GripperSpec | None = None  # None: a gripper, if any, is a channel of the command
    control_rate_hz: float | None = None  # rate that the profile is made for, None for any
    text: str = ""  # the YAML file
    ee_pose_frame: str = ""  # in which poses have to come, "" for any
    ready_topic: str | None = None  # where the robot says whether it executes commands; None: it does not say

    @property
    def joint_streams(self) -> dict[str, tuple[str, ...]]:
        """Every stream of joints and its joints."""
        return {topic.stream: topic.names for topic in self.joint_topics}

    @property
    def joint_names(self) -> tuple[str, ...]:
        """All joints, in the order of a state of joints."""
        return tuple(name for topic in self.joint_topics for name in topic.names)

    @property
    def command_topic(self) -> str:
        """Topic of the commands."""
        return self.command.topic

    @property
    def command_kind(self) -> str:
        """Kind of the commands, see nodes.command_sinks."""
        return self.command.kind

    def check_rate(self, control_rate_hz: float) -> None:
        """Refuse to command the robot at another rate than the profile's.

        Raises:
            ConfigError: If the rates differ: trajectories would overlap or stutter, and fractions of a control step be
                another speed.
        """
        if self.control_rate_hz is not None and not math.isclose(self.control_rate_hz, control_rate_hz, rel_tol=1e-6):
            raise ConfigError(
                f"control_rate_hz is {control_rate_hz:g}, allowed is {self.control_rate_hz:g}: robot "
                f"{self.robot.name!r} has it in rates.control_rate_hz"
            )

    def camera_shapes(self) -> dict[str, tuple[int, int, int]]:
        """Camera name to (height, width, 3) as it is used."""
        return {camera.name: camera.shape for camera in self.cameras}


def load_profile(name_or_path: str) -> Profile:
    """Load a robot profile.

    Args:
        name_or_path: A name in ``config/robots`` or a path to a YAML file.

    Raises:
        ConfigError: If the file is missing, or an entry is missing, wrong, given twice or unknown, with the file and
            the entry's path in it, as ``cameras.front.height``.
    """
    path = robot_profile(name_or_path)
    entries = Entries.load(path)
    profile = _Builder(path, entries).profile()
    entries.finish()
    return profile


class _Builder:
    """Reads the sections in the order in which they depend on each other."""

    def __init__(self, path: Path, entries: Entries) -> None:
        self._path = path
        self._entries = entries
        self._topics: dict[str, str] = {}
        self._joint_topics: tuple[JointTopic, ...] = ()
        self._actions = entries.section("action").name_list("names")

    def profile(self) -> Profile:
        entries = self._entries
        rate_hz = entries.section("rates").positive("control_rate_hz", None)
        self._period_ns = None if rate_hz is None else round(1e9 / rate_hz)
        cameras = tuple(self._camera(name) for name in entries.section("cameras").names)
        self._joint_topics = self._read_joint_topics(cameras)
        state = entries.choice("state", ("ee_pose_gripper", "joint_position"), "ee_pose_gripper")
        streams = {c.name: StreamSpec(c.shape, "uint8", self._max_age_ns("camera")) for c in cameras}
        for joints in self._joint_topics:
            age_ns = self._max_age_ns("joint_states" if joints.stream == "joint_position" else joints.stream)
            streams[joints.stream] = StreamSpec((len(joints.names),), "float64", age_ns)
        if state == "ee_pose_gripper":
            streams["ee_pose"] = StreamSpec((7,), "float64", self._max_age_ns("ee_pose"))
        hold = self._hold()
        gripper = self._gripper(hold)
        command = self._command(hold, gripper)
        self._check_kept(command, gripper, hold)
        position = hold.kind == "position"
        ready_topic = self._topic("ready") if "ready" in entries else None
        robot = Robot(
            name=entries.text("name"),
            action_names=self._actions,
            action_space=entries.section("action").text("space"),
            streams=streams,
            cameras=tuple(camera.name for camera in cameras),
            state_names=STATE_NAMES if "ee_pose" in streams else tuple(self._joints),
            state_of=self._ee_pose_gripper() if "ee_pose" in streams else self._joint_position(),
            measured_of=self._measured(command, gripper, hold) if position else lambda values: None,
            measured_streams=self._measured_streams(gripper, hold) if position else (),
            limits=self._limits(command, gripper, hold),
            hold=hold,
            simulated=entries.flag("simulated", False),
            nominal_orientation_xyzw=self._nominal_orientation() if "ee_pose" in streams else None,
            reports_ready=ready_topic is not None,
            undated_streams=self._undated_streams(gripper, hold),
        )
        return Profile(
            robot=robot,
            cameras=cameras,
            joint_topics=self._joint_topics,
            ee_pose_topic=self._topic("ee_pose") if "ee_pose" in streams else None,
            ee_pose_frame=self._ee_pose_frame(command) if "ee_pose" in streams else "",
            command=command,
            gripper=gripper,
            control_rate_hz=rate_hz,
            text=self._path.read_text(encoding="utf-8"),
            ready_topic=ready_topic,
        )

    @property
    def _joints(self) -> dict[str, tuple[str, int]]:
        """Joint to its stream and its place in it, in the order of a state of joints."""
        return {name: (topic.stream, i) for topic in self._joint_topics for i, name in enumerate(topic.names)}

    def _read_joint_topics(self, cameras: Sequence[CameraTopic]) -> tuple[JointTopic, ...]:
        names = self._entries.section("joint_states").name_list("names")
        topics = [JointTopic("joint_position", self._topic("joint_states"), names)]
        more = self._entries.section("more_joint_states")
        taken = {"joint_position", "joint_states", "ee_pose", "camera", *(camera.name for camera in cameras)}
        for stream in more.names:
            if stream in taken:
                raise more.wrong(stream, "another name: a stream or an age has this one")
            joints = more.section(stream)
            names = joints.name_list("names")
            known = {name for topic in topics for name in topic.names}
            for i, name in enumerate(names):
                if name in known:
                    raise joints.wrong(f"names[{i}]", "a joint that no other topic has", name)
            # Arm and gripper may publish to one topic, each a message with its own joints.
            shared = [topic.topic for topic in topics]
            topics.append(JointTopic(stream, self._topic("more_joint_states", stream, shared=shared), names))
        return tuple(topics)

    def _topic(self, *path: str, shared: Sequence[str] = ()) -> str:
        """The entry ``topic`` of a section; two uses of one topic would mix sensors, or commands with sensors."""
        section = self._entries
        for key in path:
            section = section.section(key)
        topic = section.topic("topic")
        name = ".".join((*path, "topic"))
        if topic in self._topics and topic not in shared:
            raise section.wrong("topic", f"a topic of its own: {self._topics[topic]!r} has it too")
        self._topics.setdefault(topic, name)
        return topic

    def _max_age_ns(self, name: str) -> int:
        return round(self._entries.section("max_age_s").positive(name) * 1e9)

    def _camera(self, name: str) -> CameraTopic:
        cameras = self._entries.section("cameras")
        if name in ("joint_position", "ee_pose"):
            raise cameras.wrong(name, "another name: a stream has this one")
        camera = cameras.section(name)
        height, width = camera.count("height"), camera.count("width")
        resize = camera.list("resize", [height, width])
        if len(resize) != 2 or not all(type(side) is int and side > 0 for side in resize):
            raise camera.wrong("resize", "[height, width], whole numbers above 0")
        transport = camera.choice("transport", ("raw", "compressed"), "raw")
        return CameraTopic(name, self._topic("cameras", name), height, width, (*resize, 3), transport)

    def _ee_pose_gripper(self) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
        joint_states, ee_pose = self._entries.section("joint_states"), self._entries.section("ee_pose")
        names = joint_states.name_list("gripper", among=list(self._joints))
        if len(names) not in (1, 2):
            raise joint_states.wrong("gripper", "one joint or two")
        (stream, left), (other, right) = self._joints[names[0]], self._joints[names[-1]]  # one stands for both fingers
        reference = np.array(self._nominal_orientation())
        origin = np.array([*ee_pose.numbers("origin_xyz", 3, (0.0, 0.0, 0.0)), 0.0, 0.0, 0.0, 0.0])

        def state_of(values: Mapping[str, np.ndarray]) -> np.ndarray:
            fingers = np.array([values[stream][left], values[other][right]])
            return state_vector(values["ee_pose"] - origin, fingers, reference)

        return state_of

    def _joint_position(self) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
        streams = [topic.stream for topic in self._joint_topics]
        return lambda values: np.concatenate([values[stream] for stream in streams]).astype(np.float32)

    def _ee_pose_frame(self, command: CommandSpec) -> str:
        """A twist's axes are those of the state: what is measured in another frame corrects in the wrong direction."""
        return self._entries.section("ee_pose").text("frame_id", command.frame_id)

    def _nominal_orientation(self) -> tuple[float, ...]:
        ee_pose = self._entries.section("ee_pose")
        reference = ee_pose.numbers("nominal_orientation_xyzw", 4)
        if not np.linalg.norm(reference) > 1e-6:
            raise ee_pose.wrong("nominal_orientation_xyzw", "a quaternion x y z w")
        return tuple(map(float, reference))

    def _hold(self) -> HoldPolicy:
        hold = self._entries.section("hold")
        kept = hold.name_list("keep", (), among=self._actions)
        return HoldPolicy(
            kind=hold.choice("kind", ("delta", "position")),
            size=len(self._actions),
            keep=tuple(self._actions.index(name) for name in kept),
            keep_default=hold.numbers("keep_default", len(kept), *([] if kept else [()])),
        )

    def _check_kept(self, command: CommandSpec, gripper: GripperSpec | None, hold: HoldPolicy) -> None:
        """Only grippers are kept: a kept axis of the arm would go on through every stop.

        Which channels of a command are a gripper's is not always said; a twist has none, and a joint that is measured
        is the arm's.
        """
        wrong = self._entries.section("hold").wrong
        if command.kind == "twist_stamped":
            grippers = [] if gripper is None else [self._actions[gripper.mapping.channel]]
            if not {self._actions[i] for i in hold.keep} <= set(grippers):
                raise wrong("keep", f"{grippers}, the gripper's channel, with command.kind 'twist_stamped'")
        elif hold.kind == "position":
            measured = self._measured_joints(gripper, hold)
            for i in hold.keep:
                if measured[i] is not None:
                    raise wrong(
                        "keep",
                        f"channels of grippers, with null in action.measured; {self._actions[i]!r} has {measured[i]!r}",
                    )

    # --- commands -----------------------------------------------------------------------------------------------

    def _command(self, hold: HoldPolicy, gripper: GripperSpec | None) -> CommandSpec:
        command = self._entries.section("command")
        kind = command.choice("kind", COMMAND_KINDS)
        used_for_gripper = () if gripper is None else (gripper.mapping.channel,)
        arm = [name for i, name in enumerate(self._actions) if i not in used_for_gripper]
        if kind == "twist_stamped":
            joints, frame_id = TWIST_AXES, command.text("frame_id")
        else:
            joints, frame_id = command.name_list("joints", arm), ""
        channels = command.name_list("channels", arm if kind == "twist_stamped" else joints, among=arm)
        if sorted(channels) != sorted(arm) or len(channels) != len(joints):
            raise command.wrong("channels", f"each of {arm} once, in the order of the driver's {list(joints)}")
        scale = np.array(command.numbers("scale", len(joints), [1.0] * len(joints)))
        offset = np.array(command.numbers("offset", len(joints), [0.0] * len(joints)))
        if not scale.all():
            raise command.wrong("scale", "numbers other than 0")
        if hold.kind == "delta" and offset.any():
            raise command.wrong("offset", "0 with hold.kind delta: no motion has to stay no motion")
        required = {"twist_stamped": "delta", "joint_trajectory": "position"}.get(kind, hold.kind)
        if hold.kind != required:
            raise self._entries.section("hold").wrong("kind", f"{required!r} with command.kind {kind!r}")
        trajectory = kind == "joint_trajectory"
        return CommandSpec(
            kind=kind,
            topic=self._topic("command"),
            joints=joints,
            mapping=ChannelMap(np.array([self._actions.index(name) for name in channels]), scale, offset),
            points=command.choice("points", ("one", "chunk"), "one") if trajectory else "one",
            timing=self._timing(command, self._period()) if trajectory else None,
            frame_id=frame_id,
        )

    def _gripper(self, hold: HoldPolicy) -> GripperSpec | None:
        gripper = self._entries.section("gripper")
        kind = gripper.choice("kind", ("none", *GRIPPER_TOPIC_KINDS, *GRIPPER_ACTION_KINDS), "none")
        if kind == "none":
            return None
        channel = gripper.choice("channel", self._actions)
        if self._actions.index(channel) not in hold.keep:
            raise gripper.wrong("channel", "a channel in hold.keep: a hold must not move a gripper")
        ends = [gripper.section(end).number(side) for side in ("action", "driver") for end in ("open", "closed")]
        for side, (opened, closed) in (("action", ends[:2]), ("driver", ends[2:])):
            if opened == closed:
                raise gripper.section("closed").wrong(side, f"another value than gripper.open.{side}")
        way = abs(ends[3] - ends[2])
        trajectory = kind == "joint_trajectory"
        return GripperSpec(
            kind=kind,
            topic=self._topic("gripper"),
            mapping=GripperMap(self._actions.index(channel), *ends),
            tolerance=gripper.positive("tolerance", GRIPPER_TOLERANCE * way),
            joint=gripper.text("joint") if kind in ("joint_trajectory", "parallel_gripper_command") else "",
            timing=self._timing(gripper, None) if trajectory else None,
            max_effort=self._max_effort(gripper, kind),
        )

    def _max_effort(self, gripper: Entries, kind: str) -> float:
        if kind not in GRIPPER_ACTION_KINDS:
            return 0.0
        if kind == "gripper_command" and "max_effort" not in gripper:  # a goal of it says 0 if nothing is said
            raise gripper.wrong("max_effort", "a number above 0 [N or N m] with gripper.kind 'gripper_command'")
        return gripper.positive("max_effort", 0.0)

    def _period(self) -> int:
        if self._period_ns is None:
            raise self._entries.section("rates").missing("control_rate_hz")
        return self._period_ns

    def _timing(self, entries: Entries, default_ns: int | None) -> TrajectoryTiming:
        """A gripper's way takes as long as it takes, so its time has no default."""
        if default_ns is None or "time_from_start_s" in entries:
            default_ns = round(entries.positive("time_from_start_s") * 1e9)
        return TrajectoryTiming(default_ns, self._period(), entries.choice("stamp", ("tick", "zero"), "tick"))

    # --- limits and measurement ---------------------------------------------------------------------------------

    def _limits(self, command: CommandSpec, gripper: GripperSpec | None, hold: HoldPolicy) -> Limits:
        limits = self._entries.section("limits")
        known, continuous = self._known_limits(command, gripper, hold)
        lower, upper, step, velocity = (
            self._limit(label, known.get(label, {})) for label in ("lower", "upper", "step", "velocity")
        )
        for i, name in enumerate(self._actions):
            for label, values in (("lower", lower), ("upper", upper)):
                if values[i] is None:
                    raise limits.missing(f"{label}.{name}")
            if lower[i] > upper[i]:
                raise limits.wrong("lower", f"at most upper; {name!r} has {lower[i]:g} and {upper[i]:g}")
            if name in continuous:
                joint, widest = continuous[name]
                largest = self._largest_step(step[i], velocity[i])
                if upper[i] - lower[i] + largest > widest:
                    raise limits.wrong(
                        "upper",
                        f"at most lower + {widest - largest:.3f} for {name!r}, which has {lower[i]:g} to {upper[i]:g} "
                        f"and steps of {largest:g}: joint {joint!r} is continuous, and an angle that its driver wraps "
                        "has to lie outside by more than a step",
                    )
            if i in hold.keep:
                continue
            if hold.kind == "delta" and not lower[i] <= 0.0 <= upper[i]:
                raise limits.wrong("lower", f"a range with 0 in it for {name!r} with hold.kind delta")
            if hold.kind == "position" and step[i] is None and velocity[i] is None:
                raise limits.missing(f"velocity.{name}")  # a position may not jump
        # Without any entry the limit itself is absent, which spares the loop its arithmetic.
        optional = [values if any(value is not None for value in values) else None for values in (step, velocity)]
        following = self._following(gripper, hold) if hold.kind == "position" else None
        return Limits.of(self._actions, lower, upper, *optional, following)

    def _largest_step(self, step: float | None, velocity: float | None) -> float:
        """Largest change of a channel per control step, 0 without a limit: that is refused elsewhere."""
        steps = [] if step is None else [step]
        if velocity is not None:
            steps.append(velocity * self._period() / 1e9)
        return min(steps, default=0.0)

    def _following(self, gripper: GripperSpec | None, hold: HoldPolicy) -> dict[str, float | None]:
        """What is typed in of ``limits.following``."""
        limits, measured = self._entries.section("limits"), self._measured_joints(gripper, hold)
        typed = limits.table("following", self._actions, null=True)
        for name, value in typed.items():
            if value is None:
                continue
            if value <= 0.0:
                raise limits.wrong("following", f"above 0, or null for none; {name!r} has {value:g}")
            if measured[self._actions.index(name)] is None:
                raise limits.wrong("following", f"null for {name!r}, which is not measured")
        return typed

    def _limit(self, label: str, known: Mapping[str, float | None]) -> list[float | None]:
        """One limit of every channel: as typed in, else what is known, else None."""
        limits, rate = self._entries.section("limits"), label in ("step", "velocity")
        typed = limits.table(label, self._actions, null=rate)
        for name, value in typed.items():
            if rate and value is not None and value < 0.0:
                raise limits.wrong(label, f"0 or more; {name!r} has {value:g}")
        return [typed.get(name, known.get(name)) for name in self._actions]

    def _known_limits(
        self, command: CommandSpec, gripper: GripperSpec | None, hold: HoldPolicy
    ) -> tuple[dict[str, dict[str, float | None]], dict[str, tuple[str, float]]]:
        """What need not be typed in, and what bounds it.

        Returns:
            By label and channel, limits of the URDF in action units and ends of the gripper; by channel, the joint that
            the URDF calls continuous and its widest range in action units.
        """
        known: dict[str, dict[str, float | None]] = {"lower": {}, "upper": {}, "velocity": {}}
        continuous: dict[str, tuple[str, float]] = {}
        if gripper is not None:
            ends = sorted((gripper.mapping.open_action, gripper.mapping.closed_action))
            known["lower"][self._actions[gripper.mapping.channel]] = ends[0]
            known["upper"][self._actions[gripper.mapping.channel]] = ends[1]
        limits = self._entries.section("limits")
        name = limits.text("urdf", None)
        if name is None:
            return known, continuous
        if hold.kind != "position":
            raise limits.wrong("urdf", "none with hold.kind delta: it limits positions")
        try:
            joints = joint_limits(urdf_path(name, self._path.parent))
        except ConfigError as error:
            raise limits.wrong("urdf", f"a readable file: {error}") from error
        mapping = command.mapping
        for joint, channel, scale, offset in zip(
            command.joints, mapping.channels, mapping.scale, mapping.offset, strict=True
        ):
            if joint not in joints:
                raise limits.wrong("urdf", f"a file with the joint {joint!r}, it has {sorted(joints)}")
            limit, action = joints[joint], self._actions[channel]
            if limit.lower is not None and limit.upper is not None:
                ends = sorted(((limit.lower - offset) / scale, (limit.upper - offset) / scale))
                known["lower"][action], known["upper"][action] = ends
            known["velocity"][action] = None if limit.velocity is None else limit.velocity / abs(scale)
            if limit.continuous:
                continuous[action] = joint, CONTINUOUS_RANGE_RAD / abs(scale)
        return known, continuous

    def _measured(
        self, command: CommandSpec, gripper: GripperSpec | None, hold: HoldPolicy
    ) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
        """Stream values to the measured position in action units; joint states have the driver's units."""
        names = self._measured_joints(gripper, hold)
        order = [names[channel] for channel in command.mapping.channels]
        parts = []
        for topic in self._joint_topics:
            rows = [i for i, name in enumerate(order) if name in topic.names]
            if rows:
                parts.append((topic.stream, rows, [topic.names.index(order[i]) for i in rows]))
        size = len(self._actions)

        def measured_of(values: Mapping[str, np.ndarray]) -> np.ndarray:
            position = np.full(len(order), np.nan)
            for stream, rows, sources in parts:
                if stream in values:
                    position[rows] = values[stream][sources]
            return command.mapping.to_action(position, np.full(size, np.nan))

        return measured_of

    def _measured_streams(self, gripper: GripperSpec | None, hold: HoldPolicy) -> tuple[str, ...]:
        measured = {self._joints[name][0] for name in self._measured_joints(gripper, hold) if name is not None}
        return tuple(topic.stream for topic in self._joint_topics if topic.stream in measured)

    def _undated_streams(self, gripper: GripperSpec | None, hold: HoldPolicy) -> tuple[str, ...]:
        """A gripper's own joint states: an arm's motion is not as old as they are."""
        measured = self._measured_streams(gripper, hold) if hold.kind == "position" else ()
        return tuple(topic.stream for topic in self._joint_topics[1:] if topic.stream not in measured)

    def _measured_joints(self, gripper: GripperSpec | None, hold: HoldPolicy) -> Sequence[str | None]:
        """The joint that measures each action channel; None for one (a gripper's) that none measures."""
        action = self._entries.section("action")
        names = action.list("measured")
        if len(names) != len(self._actions):
            raise action.wrong("measured", f"a joint for each of {list(self._actions)}")
        for i, name in enumerate(names):
            at_gripper = gripper is not None and i == gripper.mapping.channel
            if name is None and i not in hold.keep:
                raise action.wrong(f"measured[{i}]", "a joint; null is for channels in hold.keep", name)
            if name is not None and (at_gripper or name not in self._joints or name in names[:i]):
                allowed = "null: it is the gripper's" if at_gripper else f"one of {list(self._joints)}, once"
                raise action.wrong(f"measured[{i}]", allowed, name)
        return names
