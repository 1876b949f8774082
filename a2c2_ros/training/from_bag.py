"""Recorded runs as one data set: ``python -m a2c2_ros.training.from_bag BAG... --out DATASET``.

A frame is a control tick that moved the robot: the observation that the loop decided on, what it executed, the base
chunk and slot, and a label. The observation is the one that the live loop used, found by the recorded ages and
converted by the same functions; the whole run is computed again by the same loop and compared (parity). The result is a
data set as of ``training.on_policy``: ``action`` is the label, ``action.executed`` what was executed, the base chunks
are in ``executed/<policy id>.npz``, so that ``train_head --data`` takes it.

Labels: ``executed``: the command, in successful episodes; ``takeover``: the person's command, while a person commands;
``expert``: the topic expert_action; ``auto``: the first of takeover, expert, executed that a frame has, executed only
in episodes that nobody took over. A frame without a label is not in the data set. A data-set episode has no gaps: where
a tick was missed, lost or has no label, the next one begins; ``executed/record.json`` says which belong to one run.

Bags without any chunk, in which a person commands all the time, give demonstrations for a base policy
(``train_policy --data``).

A damaged bag gives what can be saved; ``from_bag.json`` in the data set says what was lost.
"""

import argparse
import dataclasses
import itertools
import json
import shutil
import sys
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import yaml
from rclpy.serialization import deserialize_message
from rosbags.typesys import get_types_from_msg
from sensor_msgs.msg import JointState
from tqdm import tqdm

from a2c2_ros import provenance
from a2c2_ros.commands import command
from a2c2_ros.core.chunk import ActionChunk
from a2c2_ros.core.config import ControllerConfig
from a2c2_ros.core.errors import ChunkError, ConfigError, ObservationError
from a2c2_ros.core.head import CorrectionHead
from a2c2_ros.core.observation import Observation
from a2c2_ros.core.replay import RecordedStep, Samples, observed, replay
from a2c2_ros.core.robot import Robot
from a2c2_ros.core.safety import MOVING, State
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
from a2c2_ros.policies.language import LANGUAGE_DIM, InstructionEncoder
from a2c2_ros.recording.reader import DamageReport, Message, read_bag, read_types
from a2c2_ros.recording.topics import absolute
from a2c2_ros.training.dataset import IMAGE_PREFIX
from a2c2_ros.training.demonstrations import assemble, features_of
from a2c2_ros.training.joining import save_executed, save_language, save_record

LABELS = ("auto", "executed", "takeover", "expert")
GAP_NS = 1_000_000_000
"""Without the topic episode: after so long without a command another episode begins."""
MIN_PART_FRAMES = 2
"""A video of one frame cannot be joined to others; a frame without a neighbour is left out."""
PART_BYTES = 512_000_000
"""A data-set episode whose images are larger goes on in another one: it is kept in memory while it is encoded."""
OUTCOMES = {EpisodeStatus.SUCCEEDED: "succeeded", EpisodeStatus.FAILED: "failed", EpisodeStatus.ABORTED: "aborted"}
REPORT_FILE = "from_bag.json"
UNITS = {
    "joint_states": ("names", "gripper"),
    "ee_pose": ("nominal_orientation_xyzw", "origin_xyz"),
    "command": ("kind", "channels", "scale", "offset"),
    "gripper": ("open", "closed"),
}
"""Entries of a robot profile that say what numbers of state and action mean."""


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
        converters = {
            absolute(topic, namespace): (stream, convert) for stream, (topic, convert) in streams_of(profile).items()
        }
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
                    stream, convert = converters[message.topic]
                    stamp_ns, value = convert(message.data)
                    if value.dtype.kind == "f" and not np.isfinite(value).all():
                        raise ObservationError(f"a sample of {stream} is not finite")
                    found[stream].append((stamp_ns, number if stream in self.robot.cameras else value))
            except (ObservationError, ChunkError, RuntimeError, ValueError):
                self.refused[message.topic] += 1
        self.takeovers = samples(people)
        self._found = found
        self._readers = {
            stream: partial(Images, partial(read_bag, self.path, [topic]), convert)
            for topic, (stream, convert) in converters.items()
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


def streams_of(profile: Profile) -> dict[str, tuple[str, Callable[[bytes], tuple[int, np.ndarray]]]]:
    """Stream to its topic and what makes stamp and value of a serialised message, as in ``ObservationSource``."""

    def of_bytes(topic: SensorTopic) -> Callable[[bytes], tuple[int, np.ndarray]]:
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


@dataclass(eq=False)
class Part:
    """Frames without a gap that become one episode of the data set."""

    key: tuple[Episode, str]  # episode and instruction
    run: int = 0  # number of the episode over all bags
    end_ns: int = 0  # when the next frame is due
    frames: dict[str, list[np.ndarray]] = field(default_factory=dict)
    ticks: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)  # of the labels
    slots: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    chunks: dict[int, ActionChunk] = field(default_factory=dict)

    def add(self, frame: "Frame", tick: int) -> None:
        """Take the frame of a tick."""
        self.ticks.append(tick)
        self.kinds.append(frame.kind)
        for name, value in frame.values.items():
            self.frames.setdefault(name, []).append(value)
        if frame.chunk is not None:
            self.chunks.setdefault(frame.chunk.t_obs_ns, frame.chunk)
        self.rows.append(-1 if frame.chunk is None else list(self.chunks).index(frame.chunk.t_obs_ns))
        self.slots.append(-1 if frame.chunk is None else frame.slot)

    def save(self, path: Path, example: ActionChunk | None) -> None:
        """Write it as ``training.demonstrations`` and ``training.on_policy`` write an episode.

        Args:
            path: File.
            example: Has the sizes of all chunks; None: there is none.
        """
        base = {}
        if example is not None:
            chunks = self.chunks.values()
            actions, latents = [chunk.actions for chunk in chunks], [chunk.latent for chunk in chunks]
            base = {
                "executed.chunk": np.array(self.rows, dtype=np.int64),
                "executed.slot": np.array(self.slots, dtype=np.int64),
                "executed.actions": np.array(actions, dtype=np.float32).reshape(-1, *example.actions.shape),
                "executed.latents": np.array(latents, dtype=np.float32).reshape(-1, example.latent.size),
            }
        episode, instruction = self.key
        frames = {name: np.stack(values) for name, values in self.frames.items()}
        said = {"instruction": instruction, "solved": episode.outcome == "succeeded", "run": self.run}
        np.savez(path, **said, **frames, **base)


@dataclass(eq=False)
class Conversion:
    """What became of the ticks of a recording."""

    lost: dict[str, list[list[int]]] = field(default_factory=dict)  # what a tick lacks -> first and last tick of runs
    labels: Counter[str] = field(default_factory=Counter)

    def lose(self, tick: int, episode: Episode | None, lacks: Sequence[str]) -> None:
        """A tick that is no frame, and what it lacks."""
        for what in lacks:
            runs = self.lost.setdefault(what, [])
            if runs and tick == runs[-1][1] + 1:
                runs[-1][1] = tick
            else:
                runs.append([tick, tick])
            if episode is not None:
                episode.lacking[what] += 1

    @property
    def lost_ticks(self) -> dict[str, int]:
        """How many ticks lack what."""
        return {why: sum(last - first + 1 for first, last in runs) for why, runs in self.lost.items()}


def label_of(
    recording: Recording, step: RecordedStep, observation: Observation, episode: Episode, wanted: str
) -> tuple[str, np.ndarray] | None:
    """The kind of a frame's label and the label, (A,) float32; None if it has none of the wanted kind."""
    unasked = wanted == "auto"
    found = {
        "takeover": step.command if step.state == State.TAKEOVER else None,
        # The expert saw what the newest sample shows.
        "expert": recording.experts.get(max(observation.stamps_ns.values())),
        # A person's success does not make right what led to the takeover.
        "executed": step.command if episode.outcome == "succeeded" and not (unasked and episode.taken_over) else None,
    }
    kinds = found if unasked else (wanted,)
    return next(((kind, found[kind]) for kind in kinds if found[kind] is not None), None)


def compare(
    recording: Recording, heads: Mapping[int, tuple[ControllerConfig, CorrectionHead | None]]
) -> dict[str, object]:
    """Compute a run again: how many ticks could be compared, and which of them came to another command."""
    robot, chunks, takeovers = recording.robot, recording.chunks, recording.takeovers
    replayed = replay(recording.steps, heads, robot, chunks, recording.samples(), takeovers)
    bar = tqdm(replayed, total=len(recording.steps), desc="parity", unit="tick")
    results = [(again.recorded.tick, again.same) for again in bar if again.step is not None]
    return {"compared": len(results), "differing": [tick for tick, same in results if not same]}


@dataclass(frozen=True, eq=False)
class Frame:
    """What a tick gives to the data set."""

    values: dict[str, np.ndarray]  # by feature
    kind: str  # of the label
    instruction: str
    chunk: ActionChunk | None  # the base chunk
    slot: int


def frame_of(
    recording: Recording, sensors: Mapping[str, Samples], step: RecordedStep, episode: Episode | None, wanted: str
) -> Frame | tuple[str, ...]:
    """The frame of a tick, or what it lacks."""
    robot = recording.robot
    if step.state not in MOVING or step.command is None:
        return ("motion",)
    if episode is None:
        return ("episode",)
    observation, missing = observed(step, sensors)
    missing += tuple(set(robot.streams) - set(step.ages_ns))
    # A person may command without a camera; a head may not.
    stale = [name for name, age_ns in step.ages_ns.items() if age_ns > robot.streams[name].max_age_ns]
    missing += tuple(f"a fresh {name}" for name in stale)
    chunk = recording.chunks.get(step.t_obs_ns)
    if step.t_obs_ns and chunk is None:
        missing += ("chunk",)
    instruction = recording.instructions.get(step.t_obs_ns) or episode.instruction
    if not instruction:
        missing += ("instruction",)
    if missing:
        return missing
    label = label_of(recording, step, observation, episode, wanted)
    if label is None:
        return ("label",)
    try:
        state = robot.state_of(observation.values)
    except ObservationError:
        return ("state",)
    images = {f"{IMAGE_PREFIX}{name}": image for name, image in robot.images(observation.values).items()}
    kind, action = label
    values = {"observation.state": state, "action": action, "action.executed": step.command}
    return Frame(images | values, kind, instruction, chunk, step.slot)


def convert(recording: Recording, wanted: str, save: Callable[[Part], None], first_run: int = 0) -> Conversion:
    """Make the parts of a recording.

    Args:
        recording: The run.
        wanted: Of ``LABELS``.
        save: Takes a part when it is complete.
        first_run: Number of the recording's first episode over all bags.
    """
    result, robot, sensors = Conversion(), recording.robot, recording.samples()
    image_bytes = sum(int(np.prod(robot.streams[name].shape)) for name in robot.cameras)
    limit = max(2, PART_BYTES // max(1, image_bytes))
    part: Part | None = None

    def finish() -> None:
        nonlocal part
        if part is not None:
            episode = part.key[0]
            if len(part.slots) < MIN_PART_FRAMES:
                for tick in part.ticks:
                    result.lose(tick, episode, ("neighbour",))
            else:
                episode.parts += 1
                episode.frames += len(part.slots)
                result.labels.update(part.kinds)
                save(part)
        part = None

    for step in tqdm(recording.steps, desc=recording.path.name, unit="tick"):
        episode = recording.episode_at(step.t_tick_ns)
        frame = frame_of(recording, sensors, step, episode, wanted)
        if not isinstance(frame, Frame):
            result.lose(step.tick, episode, frame)
            continue
        key = (episode, frame.instruction)
        if part is None or part.key != key or step.t_tick_ns != part.end_ns or len(part.slots) >= limit:
            finish()
            part = Part(key, first_run + recording.episodes.index(episode))
        part.end_ns = step.t_tick_ns + recording.period_ns
        part.add(frame, step.tick)
    finish()
    return result


def check_same(recordings: Sequence[Recording]) -> int:
    """Check that bags go into one data set.

    Returns:
        Frames per second.

    Raises:
        ConfigError: Naming what differs, or what no data set can have.
    """
    first = recordings[0].identity
    for other in recordings[1:]:
        rows = [(name, value, other.identity[name]) for name, value in first.items()]
        if wrong := [f"{name}: {mine!r} and {theirs!r}" for name, mine, theirs in rows if mine != theirs]:
            raise ConfigError(f"{recordings[0].path} and {other.path} are of different runs: " + "; ".join(wrong))
    for name in ("policy_id", "horizon"):
        if " and " in first[name]:
            raise ConfigError(f"{recordings[0].path}: {name} of the chunks is {first[name]!r}, allowed is one or none")
    fps, period_ns = round(first["control_rate_hz"]), recordings[0].period_ns
    steps = {chunk.step_ns for recording in recordings for chunk in recording.chunks.values()}
    if round(1e9 / fps) != period_ns or not steps <= {period_ns}:
        raise ConfigError(
            f"{recordings[0].path}: the control period is {period_ns} ns, steps of the chunks are {sorted(steps)} ns, "
            "allowed is one period of a whole number of steps per second"
        )
    return fps


def summary(recording: Recording, conversion: Conversion, parity: Mapping[str, object] | None) -> dict[str, object]:
    """What is said of a bag in the report; parity is of :func:`compare`."""
    steps, damage = recording.steps, recording.damage
    ticks = np.array([step.tick for step in steps])
    heads = {revision: sha for revision, (_, _, sha) in recording.configurations.items()}
    return {
        "bag": str(recording.path),
        "intact": damage.intact,
        **dataclasses.asdict(damage),
        "refused": dict(recording.refused),
        "seconds": recording.seconds,
        "head_sha256": heads,
        "states": {state.name: n for state, n in Counter(step.state for step in steps).items()},
        "ticks": {
            "recorded": len(steps),
            "not_recorded": int(np.maximum(np.diff(ticks) - 1, 0).sum()),
            "missed_by_the_loop": recording.missed_ticks,
            "after_a_restart_and_not_used": recording.after_restart,
        },
        "lacking": conversion.lost_ticks,
        "lacking_ticks": conversion.lost,
        "labels": dict(conversion.labels),
        "episodes": [
            {
                "task": episode.task,
                "instruction": episode.instruction,
                "outcome": episode.outcome,
                "frames": episode.frames,
                "parts": episode.parts,
                "lacking": dict(episode.lacking),
            }
            for episode in recording.episodes
        ],
        "parity": parity,
    }


def tell(bag: Mapping[str, object]) -> None:
    """Print what is worth knowing of a bag's report."""
    frames = sum(episode["frames"] for episode in bag["episodes"])
    parity = bag["parity"] and f"{len(bag['parity']['differing'])} of {bag['parity']['compared']} ticks differ"
    print(f"{bag['bag']}: {frames} frames of {bag['ticks']['recorded']} ticks; parity: {parity or 'not checked'}")
    facts = [*bag["problems"], *(f"{n} messages of {topic} were not recorded" for topic, n in bag["dropped"].items())]
    facts += [f"{n} messages of {topic} could not be converted" for topic, n in bag["refused"].items()]
    facts += [f"{n} ticks lack {what}" for what, n in bag["lacking"].items()]
    facts += [f"{n} ticks {what.replace('_', ' ')}" for what, n in bag["ticks"].items() if n and what != "recorded"]
    for number, episode in enumerate(bag["episodes"]):
        if not episode["frames"]:
            facts.append(f"episode {number} ({episode['outcome']}) has no frame, its ticks lack {episode['lacking']}")
    for fact in facts:
        print(f"  {fact}")


def language_of(recordings: Sequence[Recording]) -> dict[str, np.ndarray]:
    """Instruction to the policy's embedding; empty if the policy has none, or takes that of the package."""
    found = {r.instructions[stamp]: chunk.language for r in recordings for stamp, chunk in r.chunks.items()}
    encoder = InstructionEncoder()

    def of_package(text: str, value: np.ndarray) -> bool:
        # Unit vectors; another processor or number of threads rounds otherwise, another sentence is far away.
        return value.shape == (LANGUAGE_DIM,) and np.linalg.norm(value - encoder.embed(text)) < 1e-3

    same = (of_package(text, value) for text, value in found.items())
    return {} if all(value.size == 0 for value in found.values()) or all(same) else found


def build(bags: Sequence[Path], out: Path, wanted: str, parity: bool, robot: Path | None = None) -> dict[str, object]:
    """Convert bags.

    Args:
        bags: Folders or files.
        out: Folder of the data set; it appears when it is complete.
        wanted: Of ``LABELS``.
        parity: Compute the runs again.
        robot: The runs' profile on this machine, see :func:`recorded_profile`.

    Returns:
        The report.

    Raises:
        ConfigError: If the folder exists, the bags do not go together, or no frame is left.
    """
    if out.exists():
        raise ConfigError(f"{out} exists already; choose another --out or remove it")
    started_s = time.monotonic()
    work = out.with_name(f".{out.name}.from_bag")  # OUT.parts is where demonstrations keep their episodes
    shutil.rmtree(work, ignore_errors=True)
    staging, parts = work / out.name, work / "parts"
    parts.mkdir(parents=True)
    try:
        recordings = [Recording(path, parts, robot) for path in bags]
        fps = check_same(recordings)
        identity, arm = recordings[0].identity, recordings[0].robot
        chunk = next(iter(recordings[0].chunks.values()), None)
        paths: list[Path] = []

        def save(part: Part) -> None:
            paths.append(parts / f"part{len(paths):06d}.npz")
            part.save(paths[-1], chunk)

        with ThreadPoolExecutor(1) as pool:  # the runtime of the head leaves the interpreter to the conversion
            again = [pool.submit(compare, recording, recording.heads()) if parity else None for recording in recordings]
            runs = itertools.accumulate((len(recording.episodes) for recording in recordings), initial=0)
            conversions = [convert(r, wanted, save, run) for r, run in zip(recordings, runs, strict=False)]
            if not paths:
                lacking = sum((Counter(conversion.lost_ticks) for conversion in conversions), Counter())
                raise ConfigError(f"no frame has a label of the kind {wanted!r}; ticks lack {dict(lacking)}")
            assemble(staging, paths, features_of(arm), fps, arm.name)
            told = [
                summary(recording, conversion, future and future.result())
                for recording, conversion, future in zip(recordings, conversions, again, strict=True)
            ]
        for bag in told:
            tell(bag)
        if chunk is None:
            print("  no chunk was recorded: demonstrations for a base policy; a head needs a policy's chunks for them")
        else:
            save_executed(staging, paths, identity["policy_id"])
        save_record(staging, paths, {"policy_id": identity["policy_id"], "label": wanted})
        if language := language_of(recordings):
            save_language(staging, identity["policy_id"], language)
        seconds = time.monotonic() - started_s
        recorded_s = sum(recording.seconds for recording in recordings)
        report = {
            **identity,
            "label": wanted,
            "frames": sum(episode.frames for recording in recordings for episode in recording.episodes),
            "seconds_recorded": round(recorded_s, 3),
            "seconds": round(seconds, 3),
            "times_real_time": round(recorded_s / seconds, 2),
            "bags": told,
            "machine": provenance.machine(),
            "versions": provenance.versions(),
        }
        (staging / REPORT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        staging.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"{out}: {report['frames']} frames, {report['times_real_time']} times real time")
    return report


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m a2c2_ros.training.from_bag",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("bags", type=Path, nargs="+", metavar="BAG", help="bag folders or files")
    p.add_argument("--out", type=Path, required=True, help="folder of the data set; must not exist")
    p.add_argument("--label", choices=LABELS, default="auto", help="what a frame's label is (default auto)")
    p.add_argument("--robot", type=Path, help="the run's profile on this machine, if it names a URDF beside it")
    p.add_argument("--no-parity", dest="parity", action="store_false", help="do not compute the runs again")
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(argv)
    build(args.bags, args.out, args.label, args.parity, args.robot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
