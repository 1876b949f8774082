"""Several data sets as one: demonstrations, and the base chunks that belong to their frames."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from a2c2_ros import provenance
from a2c2_ros.core.errors import ConfigError
from a2c2_ros.training.cache_chunks import load_chunks, load_language, read_language
from a2c2_ros.training.dataset import EXECUTED_FOLDER, RECORD_FILE, Demonstrations, held_out

LANGUAGE_SUFFIX = ".language.npz"
MUST_AGREE = ("action_names", "state_names", "step_ns")


class JoinedFrames:
    """Frames of several arrays as one; nothing is read before it is asked for.

    Args:
        parts: (n, size, size, 3) arrays of equal frames, for example memory-mapped.
    """

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self._parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in self._parts])
        self.dtype = self._parts[0].dtype
        self.shape = (int(self._ends[-1]), *self._parts[0].shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | np.ndarray) -> np.ndarray:
        """One frame, or an array of frames for an array of integers, as numpy does it; raises IndexError like it."""
        indices = np.asarray(index)
        if indices.dtype.kind not in "iu":
            raise IndexError(f"frames are taken by integers, not by {indices.dtype}")
        if ((indices < -len(self)) | (indices >= len(self))).any():
            raise IndexError(f"frame {index} does not exist, allowed are 0 to {len(self) - 1}")
        indices = np.where(indices < 0, indices + len(self), indices)
        owner = np.searchsorted(self._ends, indices, side="right")
        first = self._ends - [len(part) for part in self._parts]
        if not indices.ndim:
            return self._parts[owner][indices - first[owner]]
        frames = np.empty((*indices.shape, *self.shape[1:]), self.dtype)
        for number in np.unique(owner):
            mine = owner == number
            frames[mine] = self._parts[number][indices[mine] - first[number]]
        return frames


@dataclass(frozen=True, eq=False)
class JoinedDemonstrations(Demonstrations):
    """Frames of several data sets, one data set after the other."""

    part: np.ndarray  # (N,) int64, number of the data set
    hashes: tuple[str, ...]  # of the data sets

    def split(self, holdout: float) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`Demonstrations.split`, in every data set by itself: what is held out of the first stays so.

        A data set with one episode of a task keeps it for training.

        Raises:
            ConfigError: If no episode is left for validation.
        """
        held = []
        for part in range(len(self.hashes)):
            for task in range(len(self.instructions)):
                groups = np.unique(self.group[(self.part == part) & (self.task == task)])
                if len(groups) > 1:
                    held += held_out(groups, holdout)
        validation = np.isin(self.group, held)
        if not validation.any():
            raise ConfigError("no task has 2 or more episodes in one data set, allowed is at least one such task")
        return np.flatnonzero(~validation), np.flatnonzero(validation)


def concatenate(parts: Sequence[Demonstrations]) -> Demonstrations:
    """One data set of several; frames stay where they are.

    Instructions are merged by their text. The object positions are dropped unless all have equally many.

    Raises:
        ConfigError: If there is none, or two differ in cameras, image shape, names or step.
    """
    if not parts:
        raise ConfigError("there are 0 data sets to join, allowed is 1 or more")
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    for number, part in enumerate(parts[1:], 2):
        rows = [(name, getattr(first, name), getattr(part, name)) for name in MUST_AGREE]
        shapes = [{camera: tuple(f.shape[1:]) for camera, f in data.frames.items()} for data in (first, part)]
        rows.append(("cameras", *shapes))
        if wrong := [f"{name}: {mine!r} and {theirs!r}" for name, mine, theirs in rows if mine != theirs]:
            raise ConfigError(f"data sets 1 and {number} cannot be joined, they differ in " + "; ".join(wrong))
    instructions = tuple(dict.fromkeys(text for part in parts for text in part.instructions))
    sizes = [len(part) for part in parts]
    frame = np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
    episodes, groups = (
        np.cumsum([0, *(int(numbers.max()) + 1 for numbers in of[:-1])])
        for of in ([part.episode for part in parts], [part.group for part in parts])
    )

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    objects = {part.objects.shape[1] for part in parts}
    hashes = tuple(part.data_hash for part in parts)
    return JoinedDemonstrations(
        frames={camera: JoinedFrames([part.frames[camera] for part in parts]) for camera in first.frames},
        state=joined("state"),
        action=joined("action"),
        disturbed=joined("disturbed"),
        objects=joined("objects") if len(objects) == 1 else np.zeros((sum(sizes), 0), dtype=np.float32),
        episode=joined("episode") + np.repeat(episodes, sizes),
        start=joined("start") + frame,
        end=joined("end") + frame,
        group=joined("group") + np.repeat(groups, sizes),
        task=np.concatenate([np.array([instructions.index(t) for t in p.instructions])[p.task] for p in parts]),
        instructions=instructions,
        action_names=first.action_names,
        state_names=first.state_names,
        step_ns=first.step_ns,
        data_hash=hashlib.sha256("\n".join(hashes).encode()).hexdigest(),
        part=np.repeat(np.arange(len(parts)), sizes),
        hashes=hashes,
    )


@dataclass(frozen=True, eq=False)
class BaseChunks:
    """What the base policy says for every frame of a data set, and what of it was executed there."""

    actions: np.ndarray  # (views, N, H, A) float32, chunks that start at the frame, action units
    latents: np.ndarray  # (views, N, Z) float32
    cached: np.ndarray  # (N,) bool, the two above are valid
    slot: np.ndarray  # (N,) int64, k of the base action that was executed at the frame; -1: none is known
    action: np.ndarray  # (N, A) float32, that base action
    latent: np.ndarray  # (N, Z) float32, of its chunk
    language: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)  # instruction to the policy's (L,)
    # float32 embedding; empty: the package embeds for this policy

    @classmethod
    def of_cache(
        cls, actions: np.ndarray, latents: np.ndarray, language: Mapping[str, np.ndarray] | None = None
    ) -> Self:
        """Cached chunks, see ``load_chunks`` and ``load_language`` of ``cache_chunks``; nothing was executed."""
        frames = actions.shape[1]
        return cls(
            actions=actions,
            latents=latents,
            cached=np.ones(frames, dtype=bool),
            slot=np.full(frames, -1),
            action=np.zeros((frames, actions.shape[3]), dtype=np.float32),
            latent=np.zeros((frames, latents.shape[2]), dtype=np.float32),
            language=language or {},
        )


def load_base(root: str | Path, data: Demonstrations, policy_id: str, cache: bool = False) -> BaseChunks:
    """The base chunks of a data set: cached, executed (``training.on_policy``, ``training.from_bag``), or both.

    Args:
        root: Folder of the data set.
        data: The same data set.
        policy_id: Of the base policy.
        cache: A cache must be there even if chunks were executed.

    Raises:
        ConfigError: If what is needed is missing or of other data.
    """
    path, folder = Path(root) / EXECUTED_FOLDER / f"{policy_id}.npz", Path(root) / "chunks" / policy_id
    executed = None
    if path.is_file():
        language = read_language(path.with_name(f"{policy_id}{LANGUAGE_SUFFIX}"))
        with np.load(path, allow_pickle=False) as file:
            executed = {name: file[name] for name in ("chunk", "slot", "actions", "latents")}
        if len(executed["slot"]) != len(data):
            raise ConfigError(f"{path} is of {len(executed['slot'])} frames, the data set has {len(data)}")
    if executed is None or cache or folder.is_dir():
        chunks = BaseChunks.of_cache(*load_chunks(folder, data), load_language(folder))
    else:
        horizon, actions = executed["actions"].shape[1:]
        chunks = dataclasses.replace(
            # One value that is seen everywhere: a cache that is not there takes no memory.
            BaseChunks.of_cache(
                np.broadcast_to(np.float32(0.0), (1, len(data), horizon, actions)),
                np.broadcast_to(np.float32(0.0), (1, len(data), executed["latents"].shape[1])),
            ),
            cached=np.zeros(len(data), dtype=bool),
        )
    if executed is None:
        return chunks
    slot, chunk = executed["slot"], executed["chunk"]
    known = (slot >= 0)[:, None]
    return dataclasses.replace(
        chunks,
        language={**chunks.language, **language},
        slot=slot,
        action=np.where(known, executed["actions"][chunk, slot], np.float32(0.0)),
        latent=np.where(known, executed["latents"][chunk], np.float32(0.0)),
    )


def concatenate_chunks(parts: Sequence[BaseChunks]) -> BaseChunks:
    """Base chunks of joined data sets, in their order. One with fewer views than another repeats them.

    Raises:
        ConfigError: If there is none, or two differ in the size of a chunk or latent.
    """
    if not parts:
        raise ConfigError("there are 0 sets of base chunks to join, allowed is 1 or more")
    shapes = {(*part.actions.shape[2:], part.latents.shape[2]) for part in parts}
    if len(shapes) > 1:
        raise ConfigError(f"base chunks of shapes (H, A, Z) {sorted(shapes)} cannot be joined, allowed is one shape")
    if len(parts) == 1:
        return parts[0]
    views = np.arange(max(len(part.actions) for part in parts))
    values = {}
    for name in (item.name for item in dataclasses.fields(BaseChunks)):
        arrays = [getattr(part, name) for part in parts]
        if name == "language":
            values[name] = {text: embedding for known in arrays for text, embedding in known.items()}
        elif name in ("actions", "latents"):
            values[name] = np.concatenate([array[views % len(array)] for array in arrays], axis=1)
        else:
            values[name] = np.concatenate(arrays)
    return BaseChunks(**values)


def save_executed(out: Path, parts: Sequence[Path], policy_id: str) -> None:
    """Write the executed base chunks of these episode files, in their order."""
    values: dict[str, list[np.ndarray]] = {name: [] for name in ("chunk", "slot", "actions", "latents")}
    chunks = 0
    for path in parts:
        with np.load(path, allow_pickle=False) as part:
            base = {name: part[f"executed.{name}"] for name in values}
        base["chunk"] = np.where(base["chunk"] < 0, -1, base["chunk"] + chunks)
        chunks += len(base["actions"])
        for name, array in base.items():
            values[name].append(array)
    folder = out / EXECUTED_FOLDER
    folder.mkdir(exist_ok=True)
    partial = folder / "base.partial"
    with partial.open("wb") as file:
        np.savez(file, **{name: np.concatenate(arrays) for name, arrays in values.items()})
    partial.replace(folder / f"{policy_id}.npz")


def save_record(out: Path, parts: Sequence[Path], settings: Mapping[str, object]) -> None:
    """Write what these episode files are, in their order: the record of the run."""
    episodes = []
    for path in parts:
        with np.load(path, allow_pickle=False) as part:
            episode = {"part": path.stem, "steps": len(part["action"]), "solved": bool(part["solved"])}
            episodes.append(episode | ({"run": int(part["run"])} if "run" in part else {}))
    record = {
        **settings,
        "solved": sum(episode["solved"] for episode in episodes),
        "episodes": episodes,
        "machine": provenance.machine(),
        "versions": provenance.versions(),
    }
    folder = out / EXECUTED_FOLDER
    folder.mkdir(exist_ok=True)
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n")


def save_language(out: Path, policy_id: str, language: Mapping[str, np.ndarray]) -> None:
    """Write the policy's embeddings (L,) of the instructions beside the executed chunks, for a policy with its own."""
    path = out / EXECUTED_FOLDER / f"{policy_id}{LANGUAGE_SUFFIX}"
    np.savez(path, instructions=np.array(list(language)), embeddings=np.stack(list(language.values())))
