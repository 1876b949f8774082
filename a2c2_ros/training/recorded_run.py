"""What a bag says of a run of the loop: steps, configurations, chunks, episodes, and what the sensors said."""

import itertools
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import yaml
from rclpy.serialization import deserialize_message
from rosbags.typesys import get_types_from_msg
from sensor_msgs.msg import JointState

from a2c2_ros import provenance
from a2c2_ros.core.chunk import ActionChunk
from a2c2_ros.core.config import ControllerConfig
from a2c2_ros.core.errors import ChunkError, ConfigError, ObservationError, OtherJointsError
from a2c2_ros.core.head import CorrectionHead
from a2c2_ros.core.replay import RecordedStep, Samples
from a2c2_ros.core.robot import Robot
from a2c2_ros.core.safety import State
from a2c2_ros.drivers.profile import Profile, load_profile
from a2c2_ros.heads.onnx_head import OnnxHead
from a2c2_ros.msg import ActionChunk as ActionChunkMsg
from a2c2_ros.msg import ControlConfiguration, EpisodeStatus
from a2c2_ros.msg import ControlStep as ControlStepMsg
from a2c2_ros.nodes.conversions import (
    joint_state_to_array,
    message_to_chunk,
    message_to_recorded,
    to_ns,
)
from a2c2_ros.nodes.observation_source import SensorTopic, sensor_topics
from a2c2_ros.paths import model_path, robot_profile, share_directory
from a2c2_ros.recording.reader import DamageReport, Message, read_bag, read_types
from a2c2_ros.recording.topics import absolute

GAP_NS = 1_000_000_000
"""Without the topic episode: after so long without a command another episode begins."""
OUTCOMES = {EpisodeStatus.SUCCEEDED: "succeeded", EpisodeStatus.FAILED: "failed", EpisodeStatus.ABORTED: "aborted"}
UNITS = {
    "joint_states": ("names", "gripper"),
    "ee_pose": ("nominal_orientation_xyzw", "origin_xyz"),
    "command": ("kind", "channels", "scale", "offset"),
    "gripper": ("open", "closed"),
}
"""Entries of a robot profile that say what numbers of state and action mean."""
Reader = Callable[[bytes], tuple[int, np.ndarray]]
"""From a serialised message to its stamp [ns] and value."""


@dataclass(eq=False)
class Episode:
    """An episode of a run."""

    start_ns: int
    end_ns: int | None = None  # one past the last tick; None: until the next one starts
    outcome: str = "unknown"  # of OUTCOMES, "unfinished" or "unknown"
    task: int | None = None
    instruction: str = ""
    frames: int = 0
    parts: int = 0  # episodes of the data set that it became
    lacking: Counter[str] = field(default_factory=Counter)  # what its other ticks lack
    taken_over: bool = False  # by a person, for a while


class Images:
    """Images of a camera, read from the bag when they are asked for; in their order each is read once.

    Args:
        reader: Begins to read the camera's messages.
        convert: Serialised message to stamp and image.
        numbers: Which message each image is.
    """

    def __init__(
        self,
        reader: Callable[[], Iterator[Message]],
        convert: Callable[[bytes], tuple[int, np.ndarray]],
        numbers: Sequence[int],
    ) -> None:
        self._reader, self._convert, self._numbers = reader, convert, numbers
        self._messages: Iterator[Message] = iter(())
        self._read = 0
        self._index, self._image = -1, np.zeros(0)

    def __call__(self, index: int) -> np.ndarray:
        """The image of this index, (height, width, 3) uint8."""
        if index != self._index:
            wanted = self._numbers[index]
            if wanted < self._read or not self._read:
                self._messages, self._read = self._reader(), 0
            message = next(itertools.islice(self._messages, wanted - self._read, None))
            self._read = wanted + 1
            self._index, self._image = index, self._convert(message.data)[1]
        return self._image


class Recording:
    """What a bag says of a run: all but the images is in memory.

    Args:
        path: Bag folder or file.
        folder: Gets the robot's profile, if it is not one of this installation.
        robot: The profile on this machine, see :func:`recorded_profile`.

    Raises:
        ConfigError: If the bag has no configuration of a controller, or was written with other message definitions.
    """

    def __init__(self, path: Path, folder: Path, robot: Path | None = None) -> None:
        self.path = path
        self.damage = DamageReport()
        self.refused: Counter[str] = Counter()  # messages by topic that could not be converted
        self.steps: list[RecordedStep] = []
        self.missed_ticks = 0  # by the loop itself
        self.after_restart = 0  # steps after clock or controller started anew, which are not used
        self.configurations: dict[int, tuple[ControllerConfig, str, str]] = {}  # with path and SHA-256 of the head
        self.chunks: dict[int, ActionChunk] = {}  # by the stamp of the observation
        self.instructions: dict[int, str] = {}  # of the chunks
        self.episodes: list[Episode] = []
        self.experts: dict[int, np.ndarray] = {}  # by stamp
        check_types(path)
        first = next((m for m in read_bag(path) if m.topic.endswith("/control_configuration")), None)
        if first is None:
            raise ConfigError(f"{path} has no topic control_configuration: neither robot nor parameters are known")
        message = deserialize_message(first.data, ControlConfiguration)
        self._on_configuration(message)
        self.profile = recorded_profile(message, folder, robot)
        self._read(first.topic.removesuffix("control_configuration"))
        if not self.steps:
            raise ConfigError(f"{path} has no control steps")

    @property
    def robot(self) -> Robot:
        """The robot as the loop knows it."""
        return self.profile.robot

    @property
    def period_ns(self) -> int:
        """Control period [ns]."""
        return next(iter(self.configurations.values()))[0].period_ns

    @property
    def seconds(self) -> float:
        """From the first control step to the last."""
        return (self.steps[-1].t_tick_ns - self.steps[0].t_tick_ns + self.period_ns) / 1e9

    @property
    def identity(self) -> dict[str, object]:
        """What bags of one data set have in common."""
        chunks = self.chunks.values()
        return {
            "robot": self.robot.name,
            "action_names": self.robot.action_names,
            "action_space": self.robot.action_space,
            "state_names": self.robot.state_names,
            "cameras": self.profile.camera_shapes(),
            "units": units_of(self.profile),
            "control_rate_hz": 1e9 / self.period_ns,
            "policy_id": " and ".join(sorted({chunk.policy_id for chunk in chunks})),
            "horizon": " and ".join(sorted({str(chunk.horizon) for chunk in chunks})),
        }

    def heads(self) -> dict[int, tuple[ControllerConfig, CorrectionHead | None]]:
        """The configurations with their heads loaded.

        Raises:
            ConfigError: If a head is not at hand, or another file has its name.
        """
        loaded: dict[str, OnnxHead] = {}
        for config, name, sha256 in self.configurations.values():
            if name and sha256 not in loaded:
                path = next((p for p in (Path(name), model_path_or_none(config)) if p and p.is_file()), None)
                found = "" if path is None else provenance.sha256_of(path)
                if found != sha256:
                    raise ConfigError(
                        f"{self.path}: the run's head {name} (SHA-256 {sha256[:12]}) is not at hand, found is "
                        f"{found[:12] or 'nothing'}; --no-parity converts without it"
                    )
                loaded[sha256] = OnnxHead(path, config.correction__threads)
        return {revision: (config, loaded.get(sha)) for revision, (config, _, sha) in self.configurations.items()}

    def samples(self) -> dict[str, Samples]:
        """What the sensors said, to be read in the order of the steps by one reader."""
        return {stream: samples(pairs, self._readers.get(stream, _in_memory)) for stream, pairs in self._found.items()}

    def episode_at(self, t_tick_ns: int) -> Episode | None:
        """The episode that a tick belongs to."""
        number = bisect_right(self.episodes, t_tick_ns, key=lambda episode: episode.start_ns) - 1
        episode = self.episodes[number] if number >= 0 else None
        return None if episode is None or (episode.end_ns is not None and t_tick_ns >= episode.end_ns) else episode

    def _read(self, namespace: str) -> None:
        """Take every message but the pixels."""
        profile, names = self.profile, self.robot.action_names
        people: list[tuple[int, np.ndarray]] = []
        found: dict[str, list[tuple[int, np.ndarray | int]]] = {name: [] for name in self.robot.streams}
        seen: Counter[str] = Counter()
        converters: dict[str, dict[str, Reader]] = {}
        for stream, (topic, convert) in streams_of(profile).items():
            converters.setdefault(absolute(topic, namespace), {})[stream] = convert
        messages = {
            "control_step": (ControlStepMsg, self._on_step),
            "control_configuration": (ControlConfiguration, self._on_configuration),
            "action_chunk": (ActionChunkMsg, self._on_chunk),
            "episode": (EpisodeStatus, self._on_episode),
            "takeover": (JointState, lambda m: people.append((to_ns(m.header.stamp), joint_state_to_array(m, names)))),
            "expert_action": (JointState, lambda m: self._on_expert(m, names)),
        }
        handlers = {absolute(topic, namespace): value for topic, value in messages.items()}
        for message in read_bag(self.path, {*handlers, *converters}, self.damage):
            number = seen[message.topic]
            seen[message.topic] += 1
            try:
                if message.topic in handlers:
                    kind, take = handlers[message.topic]
                    take(deserialize_message(message.data, kind))
                else:
                    taken, refused = _samples_of(message.data, converters[message.topic])
                    for stream, stamp_ns, value in taken:
                        found[stream].append((stamp_ns, number if stream in self.robot.cameras else value))
                    if refused:
                        raise refused[0]
            except (ObservationError, ChunkError, RuntimeError, ValueError):
                self.refused[message.topic] += 1
        self.takeovers = samples(people)
        self._found = found
        self._readers = {
            stream: partial(Images, partial(read_bag, self.path, [topic]), convert)
            for topic, of_topic in converters.items()
            for stream, convert in of_topic.items()
            if stream in self.robot.cameras
        }
        if not self.episodes:
            self._episodes_from_gaps()
        elif self.episodes[-1].outcome == "unknown":
            self.episodes[-1].outcome = "unfinished"
        for step in self.steps:
            if step.state == State.TAKEOVER and (episode := self.episode_at(step.t_tick_ns)) is not None:
                episode.taken_over = True

    def _on_step(self, message: ControlStepMsg) -> None:
        step, last = message_to_recorded(message), self.steps[-1] if self.steps else None
        if self.after_restart or (last and (step.t_tick_ns < last.t_tick_ns or step.tick < last.tick)):
            self.after_restart += 1
            return
        self.steps.append(step)
        self.missed_ticks += message.missed_ticks

    def _on_configuration(self, message: ControlConfiguration) -> None:
        config = ControllerConfig().replaced(json.loads(message.parameters), running=False)
        # A controller that was started anew counts from 1 again; its steps are not used.
        self.configurations.setdefault(message.revision, (config, message.head_path, message.head_sha256))

    def _on_chunk(self, message: ActionChunkMsg) -> None:
        chunk = message_to_chunk(message)
        self.chunks.setdefault(chunk.t_obs_ns, chunk)
        self.instructions.setdefault(chunk.t_obs_ns, message.instruction)

    def _on_expert(self, message: JointState, names: tuple[str, ...]) -> None:
        action = joint_state_to_array(message, names).astype(np.float32)
        if np.isfinite(action).all():
            self.experts[to_ns(message.header.stamp)] = action

    def _on_episode(self, message: EpisodeStatus) -> None:
        stamp_ns, last = to_ns(message.header.stamp), self.episodes[-1] if self.episodes else None
        if message.phase == EpisodeStatus.STARTED:
            if last is not None and last.outcome == "unknown":
                last.outcome, last.end_ns = "unfinished", stamp_ns
            self.episodes.append(Episode(stamp_ns, None, "unknown", message.task, message.instruction))
        elif last is not None and last.outcome == "unknown":
            last.outcome, last.end_ns = OUTCOMES[message.phase], stamp_ns

    def _episodes_from_gaps(self) -> None:
        last_ns = None
        for step in self.steps:
            if step.command is None or step.state in (State.STOPPED, State.FAULT):
                last_ns = None
                continue
            if last_ns is None or step.t_tick_ns - last_ns > GAP_NS:
                self.episodes.append(Episode(step.t_tick_ns))
            last_ns = step.t_tick_ns
            self.episodes[-1].end_ns = last_ns + 1


def check_types(path: Path) -> None:
    """Check that a bag was written with this package's message definitions.

    Raises:
        ConfigError: Naming the type.
    """
    for name, text in read_types(path).items():
        file = share_directory() / "msg" / f"{name.rpartition('/')[2]}.msg"
        if not name.startswith("a2c2_ros/") or not file.is_file():
            continue
        mine, theirs = (
            get_types_from_msg(definition.split("\n====")[0], name)[name]
            for definition in (file.read_text(encoding="utf-8"), text)
        )
        if mine != theirs:
            raise ConfigError(f"{path}: {name} was recorded with another definition: convert it with that version")


def model_path_or_none(config: ControllerConfig) -> Path | None:
    """The head that a configuration names, on this machine."""
    try:
        return model_path(config.correction__model_path)
    except ConfigError:
        return None


def units_of(profile: Profile) -> dict[str, object]:
    """What numbers of state and action mean in a profile: data of two that differ here must not be mixed."""
    told = yaml.safe_load(profile.text)
    return {f"{key}.{name}": (told.get(key) or {}).get(name) for key, names in UNITS.items() for name in names}


def recorded_profile(message: ControlConfiguration, folder: Path, given: Path | None = None) -> Profile:
    """The robot profile that a run had.

    Args:
        message: What the run recorded.
        folder: Gets the profile, if it is neither given nor one of this installation.
        given: The profile as a file of this machine, beside which a URDF that it names is looked for.

    Raises:
        ConfigError: If it cannot be read, or the given one is another.
    """
    if given is not None:
        profile = load_profile(str(given))
        if profile.text != message.robot:
            raise ConfigError(f"--robot {given} is not the profile that the run recorded")
        return profile
    name = json.loads(message.parameters)["robot"]
    try:
        if robot_profile(name).read_text(encoding="utf-8") == message.robot:
            return load_profile(name)  # a URDF that it names is found beside it
    except ConfigError:
        pass
    path = folder / "robot.yaml"
    path.write_text(message.robot, encoding="utf-8")
    return load_profile(str(path))


def _samples_of(
    data: bytes, readers: Mapping[str, Reader]
) -> tuple[list[tuple[str, int, np.ndarray]], list[ObservationError]]:
    """Stream, stamp and value of what a message says to the streams of its topic, and why it was refused for others.

    That it is another driver's counts only if no stream has a part in it.
    """
    taken, refused, not_for_it = [], [], []
    for stream, read in readers.items():
        try:
            stamp_ns, value = read(data)
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                raise ObservationError(f"a sample of {stream} is not finite")
        except OtherJointsError as error:
            not_for_it.append(error)
        except ObservationError as error:
            refused.append(error)
        else:
            taken.append((stream, stamp_ns, value))
    return taken, refused or ([] if taken else not_for_it)


def streams_of(profile: Profile) -> dict[str, tuple[str, Reader]]:
    """Stream to its topic and what makes stamp and value of a serialised message, as in ``ObservationSource``."""

    def of_bytes(topic: SensorTopic) -> Reader:
        if topic.image:
            return topic.convert
        return lambda data: topic.convert(deserialize_message(data, topic.message_type))

    return {stream: (topic.name, of_bytes(topic)) for stream, topic in sensor_topics(profile).items()}


def _in_memory(values: Sequence[np.ndarray]) -> Callable[[int], np.ndarray]:
    return values.__getitem__


def samples(
    pairs: Sequence[tuple[int, object]], reader: Callable[[list], Callable[[int], np.ndarray]] = _in_memory
) -> Samples:
    """Samples by rising stamp; of equal stamps the first counts, as in the ``ObservationBuffer``."""
    first: dict[int, object] = {}
    for stamp_ns, value in pairs:
        first.setdefault(stamp_ns, value)
    stamps = sorted(first)
    return Samples(np.array(stamps, dtype=np.int64), reader([first[stamp_ns] for stamp_ns in stamps]))
