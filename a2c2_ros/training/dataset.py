"""Demonstrations for training: a LeRobotDataset in memory, frames decoded once, augmentation in numpy."""

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from a2c2_ros.core.errors import ConfigError
from a2c2_ros.drivers.profile import STATE_NAMES

# Actions that are commands of a state, not motions: after the end of an episode they keep their last value.
HELD_ACTIONS = ("gripper",)
EXECUTED_FOLDER = "executed"  # base chunks that were executed, and a record of the episodes
RECORD_FILE = "record.json"
IMAGE_PREFIX = "observation.images."


@dataclass(frozen=True, eq=False)
class Demonstrations:
    """N frames of several episodes, one after the other."""

    frames: Mapping[str, np.ndarray]  # camera -> (N, size, size, 3) uint8 RGB, memory-mapped
    state: np.ndarray  # (N, S) float32
    action: np.ndarray  # (N, A) float32, the expert's action without exploration noise
    disturbed: np.ndarray  # (N,) bool, what was executed was not the expert's action
    objects: np.ndarray  # (N, O) float32 [m], privileged, training target only; O may be 0
    episode: np.ndarray  # (N,) int64
    start: np.ndarray  # (N,) int64, first frame of the frame's episode
    end: np.ndarray  # (N,) int64, one past the last frame of the frame's episode
    group: np.ndarray  # (N,) int64, episodes that belong together: parts of one recorded episode
    task: np.ndarray  # (N,) int64, row of instructions
    instructions: tuple[str, ...]
    action_names: tuple[str, ...]
    state_names: tuple[str, ...]
    step_ns: int
    data_hash: str  # of the files that the frames come from

    def __len__(self) -> int:
        return len(self.state)

    def split(self, holdout: float) -> tuple[np.ndarray, np.ndarray]:
        """Frame indices for training and validation; whole groups of episodes, of every task the last ones.

        Args:
            holdout: Fraction of the groups for validation, 0 < holdout < 1; at least one per task.

        Raises:
            ConfigError: If a task has fewer than two groups.
        """
        held = []
        for task, instruction in enumerate(self.instructions):
            groups = np.unique(self.group[self.task == task])
            if len(groups) < 2:
                raise ConfigError(f"task {instruction!r} has {len(groups)} episodes, allowed are 2 or more")
            held += held_out(groups, holdout)
        validation = np.isin(self.group, held)
        return np.flatnonzero(~validation), np.flatnonzero(validation)

    def chunks(self, indices: np.ndarray, horizon: int, positions: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Expert chunks that start at the given frames.

        Slots after the episode's end stand still: zero motion, held actions keep their last value.

        Args:
            indices: (B,) frames.
            horizon: H.
            positions: Actions are positions: all of them are held.

        Returns:
            (B, H, A) float32 and (B, H) bool, True where the slot is inside the episode.
        """
        slots = indices[:, None] + np.arange(horizon)
        last = self.end[indices][:, None] - 1
        inside = slots <= last
        actions = self.action[np.minimum(slots, last)]
        moves = np.array([not positions and name not in HELD_ACTIONS for name in self.action_names])
        return np.where(~inside[:, :, None] & moves, np.float32(0.0), actions), inside

    def undisturbed(self, indices: np.ndarray, horizon: int) -> np.ndarray:
        """(B, H) bool: nothing disturbed the expert between the given frame and the slot.

        After a disturbance the expert's actions answer it: no policy can foresee them from the given frame.
        """
        before = np.concatenate([[0], np.cumsum(self.disturbed)])
        slots = np.minimum(indices[:, None] + np.arange(horizon), self.end[indices][:, None])
        return before[slots] == before[indices][:, None]


def held_out(groups: np.ndarray, holdout: float) -> list[int]:
    """Of the groups (G,) of a task the last ones, this fraction of them and at least one."""
    return groups[-max(1, round(holdout * len(groups))) :].tolist()


@dataclass(frozen=True)
class Augmentation:
    """Random changes that must not change the action."""

    shift: int = 4  # [pixels], either direction, edges repeated
    brightness: float = 0.2  # relative gain, either direction
    state_noise: float = 0.03  # standard deviation in standard deviations of the data

    def image(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A shifted, brighter or darker copy of a (size, size, 3) uint8 image."""
        size = image.shape[0]
        dy, dx = rng.integers(-self.shift, self.shift + 1, 2)
        gain = np.uint16(round(128 * (1.0 + rng.uniform(-self.brightness, self.brightness))))
        rows = image[np.clip(np.arange(size) + dy, 0, size - 1)]
        shifted = np.empty_like(rows)
        # Slices and 16-bit integers (255 * 256 fits) instead of indices and floats: this runs 128 times per step.
        low, high = max(0, -dx), size - max(0, dx)
        shifted[:, low:high] = rows[:, low + dx : high + dx]
        shifted[:, :low] = rows[:, :1]
        shifted[:, high:] = rows[:, -1:]
        return np.minimum((shifted * gain) >> 7, 255).astype(np.uint8)


def observations(
    data: Demonstrations, indices: np.ndarray, augmentation: Augmentation | None, rng: np.random.Generator
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Images per camera (B, size, size, 3) uint8 and states (B, S) float32 of frames, augmented unless None."""
    state = data.state[indices]
    if augmentation is None:
        return {name: frames[indices] for name, frames in data.frames.items()}, state
    images = {
        name: np.stack([augmentation.image(frames[i], rng) for i in indices]) for name, frames in data.frames.items()
    }
    noise = rng.standard_normal(state.shape) * augmentation.state_noise * data.state.std(axis=0)
    return images, (state + noise).astype(np.float32)


def load_demonstrations(root: str | Path, cameras: Sequence[str] | None = None) -> Demonstrations:
    """Read a LeRobotDataset; its videos are decoded to ``cache/`` in its folder at the first time.

    Args:
        root: Folder of the data set.
        cameras: Which cameras, None for all.

    Raises:
        ConfigError: If the folder has no data set, or a feature is missing.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = Path(root)
    if not (root / "meta" / "info.json").is_file():
        raise ConfigError(f"{root} has no LeRobotDataset: meta/info.json is missing")
    source = LeRobotDataset(f"local/{root.name}", root=root)
    available = [key.removeprefix(IMAGE_PREFIX) for key in source.meta.video_keys]
    cameras = available if cameras is None else list(cameras)
    missing = [f"{IMAGE_PREFIX}{name}" for name in cameras if name not in available]
    missing += [key for key in ("observation.state", "action") if key not in source.features]
    if missing:
        raise ConfigError(f"{root}: features {missing} are missing; it has {sorted(source.features)}")

    table = source.hf_dataset.with_format("numpy")
    episode = np.asarray(table["episode_index"][:], dtype=np.int64)
    first = np.flatnonzero(np.r_[True, np.diff(episode) != 0])
    lengths = np.diff(np.r_[first, len(episode)])
    task_index = np.asarray(table["task_index"][:], dtype=np.int64)
    task_ids, task = np.unique(task_index, return_inverse=True)
    names = {int(row.task_index): str(text) for text, row in source.meta.tasks.iterrows()}
    column = {
        key: np.asarray(table[key][:], dtype=np.float32).reshape(len(episode), -1)
        for key in ("observation.state", "action", "action.executed", "observation.objects")
        if key in source.features
    }
    data_hash = hash_files(root)
    return Demonstrations(
        frames={name: _decode(source, root, name, episode, data_hash) for name in cameras},
        state=column["observation.state"],
        action=column["action"],
        disturbed=(column.get("action.executed", column["action"]) != column["action"]).any(axis=1),
        objects=column.get("observation.objects", np.zeros((len(episode), 0), dtype=np.float32)),
        episode=episode,
        start=np.repeat(first, lengths),
        end=np.repeat(first + lengths, lengths),
        group=_groups(root, episode),
        task=task,
        instructions=tuple(names[int(i)] for i in task_ids),
        action_names=_names(source.features, "action"),
        state_names=_names(source.features, "observation.state", STATE_NAMES),
        step_ns=round(1e9 / source.fps),
        data_hash=data_hash,
    )


def _groups(root: Path, episode: np.ndarray) -> np.ndarray:
    """Group of every frame: what ``from_bag`` says of its episode, else the episode."""
    path = root / EXECUTED_FOLDER / RECORD_FILE
    episodes = json.loads(path.read_text(encoding="utf-8"))["episodes"] if path.is_file() else []
    runs = [entry.get("run") for entry in episodes]
    if len(runs) != int(episode.max()) + 1 or None in runs:
        return episode
    return np.array(runs, dtype=np.int64)[episode]


def _names(features: Mapping[str, Mapping], key: str, default: Sequence[str] = ()) -> tuple[str, ...]:
    names = features[key].get("names") or default
    if isinstance(names, Mapping):
        names = next(iter(names.values()))
    if not names or len(names) != features[key]["shape"][0]:
        raise ConfigError(f"feature {key!r} has names {names!r}, allowed are {features[key]['shape'][0]} names")
    return tuple(str(name) for name in names)


def hash_files(root: Path) -> str:
    """SHA-256 of all that a LeRobotDataset consists of, names and contents; its caches do not count."""
    digest = hashlib.sha256()
    for path in sorted(p for part in ("meta", "data", "videos") for p in (root / part).rglob("*") if p.is_file()):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _decode(source, root: Path, camera: str, episode: np.ndarray, data_hash: str) -> np.ndarray:
    """Memory-mapped frames (N, size, size, 3) of a camera, written once per state of the data set."""
    path = root / "cache" / data_hash[:12] / f"{camera}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of two trainings on new data one decodes, the other waits
        if not path.exists():
            _write_frames(path, source, root, f"{IMAGE_PREFIX}{camera}", episode)
    return np.load(path, mmap_mode="r")


def _write_frames(path: Path, source, root: Path, key: str, episode: np.ndarray) -> None:
    from lerobot.datasets.video_utils import decode_video_frames

    partial = path.with_suffix(".partial")
    shape = (len(episode), *source.features[key]["shape"])
    frames = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
    try:
        with partial.open("r+b") as file:  # a full disk is an error here, but would kill who writes to the mapping
            os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
    except OSError as error:
        partial.unlink()
        raise ConfigError(f"{path}: no room for {frames.nbytes / 1e9:.1f} GB of decoded frames: {error}") from error
    for index in tqdm(np.unique(episode), desc=f"decode {key.removeprefix(IMAGE_PREFIX)}", unit="episode"):
        rows = np.flatnonzero(episode == index)
        offset = source.meta.episodes[int(index)][f"videos/{key}/from_timestamp"]
        stamps = [offset + i / source.fps for i in range(len(rows))]
        video = root / source.meta.get_video_file_path(int(index), key)
        decoded = decode_video_frames(video, stamps, 0.5 / source.fps, return_uint8=True)
        frames[rows] = decoded.permute(0, 2, 3, 1).numpy()
    frames.flush()
    partial.rename(path)
