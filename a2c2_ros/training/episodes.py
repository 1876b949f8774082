"""Episodes of LIBERO on their way into a data set: their frames, a file for each, the processes that record them."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from a2c2_ros.core.errors import A2C2Error, ConfigError
from a2c2_ros.core.state import state_vector
from a2c2_ros.drivers.profile import STATE_NAMES
from a2c2_ros.jobs import run_jobs
from a2c2_ros.sim import conventions

BLOCK = 20
"""Episodes per process: the start of a simulator is paid once per block, and unfinished data stays balanced."""
FEATURES = {
    **{
        f"observation.images.{name}": {
            "dtype": "video",
            "shape": (conventions.IMAGE_SIZE, conventions.IMAGE_SIZE, 3),
            "names": ["height", "width", "channels"],
        }
        for name in conventions.CAMERAS
    },
    "observation.state": {"dtype": "float32", "shape": (conventions.STATE_DIM,), "names": list(STATE_NAMES)},
    "observation.objects": {"dtype": "float32", "shape": (6,), "names": None},
    "action": {"dtype": "float32", "shape": (conventions.ACTION_DIM,), "names": list(conventions.ACTION_NAMES)},
    "action.executed": {
        "dtype": "float32",
        "shape": (conventions.ACTION_DIM,),
        "names": list(conventions.ACTION_NAMES),
    },
}
"""``observation.objects`` is privileged (bowl xyz, plate xyz [m]): a target for training, never an input."""


class Frames:
    """The frames of an episode, by the names of ``FEATURES``."""

    def __init__(self) -> None:
        self._rows: dict[str, list[np.ndarray]] = {name: [] for name in FEATURES}

    def add(self, env, observation: Mapping[str, np.ndarray], label: np.ndarray, executed: np.ndarray) -> None:
        """Add a control step.

        Args:
            env: A ``LiberoEnv``, in the state of the observation.
            observation: What it returned.
            label: The expert's action (7,).
            executed: The action (7,) that is executed.
        """
        fingers = observation["joint_position"][-2:]
        objects = [env.object_pose(name)[:3] for name in (conventions.TARGET_BOWL, conventions.PLATE)]
        row = {f"observation.images.{name}": observation[name] for name in conventions.CAMERAS}
        row["observation.state"] = state_vector(observation["ee_pose"], fingers, conventions.NOMINAL_EE_QUAT_XYZW)
        row["observation.objects"] = np.concatenate(objects).astype(np.float32)
        row["action"] = label.astype(np.float32)
        row["action.executed"] = executed.astype(np.float32)
        for name, value in row.items():
            self._rows[name].append(value)

    def arrays(self) -> dict[str, np.ndarray]:
        """Arrays by feature name with the time first."""
        return {name: np.stack(values) for name, values in self._rows.items()}


def part_path(out: Path, task: int, episode: int) -> Path:
    """File of one episode."""
    return out.with_name(out.name + ".parts") / f"episode{episode:04d}_task{task:02d}.npz"


def save_part(path: Path, **arrays: object) -> None:
    """Write the file of an episode; it appears only when it is complete."""
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    partial.replace(path)


def wanted_parts(args: argparse.Namespace) -> list[Path]:
    """The files of all episodes that a command line asks for, in their order in the data set; their folder is made.

    Raises:
        ConfigError: If it asks for none, or for a data set that exists.
    """
    tasks = conventions.parse_tasks(args.tasks)
    if args.episodes_per_task < 1:
        raise ConfigError(f"--episodes-per-task is {args.episodes_per_task}, allowed is 1 or more")
    if args.out.exists():
        raise ConfigError(f"{args.out} exists already; choose another --out or remove it")
    wanted = [part_path(args.out, task, episode) for episode in range(args.episodes_per_task) for task in tasks]
    wanted[0].parent.mkdir(parents=True, exist_ok=True)
    return wanted


def record_blocks(
    program: str, argv: Sequence[str], args: argparse.Namespace, wanted: Sequence[Path], what: str
) -> None:
    """Record the missing episodes in blocks, with a progress bar.

    Args:
        program: Module whose ``--block TASK FIRST LAST`` records a block.
        argv: Its other arguments.
        args: The same, read.
        wanted: Files of :func:`wanted_parts`.
        what: For the progress bar.

    Raises:
        A2C2Error: If a block's process failed; what was finished is kept.
    """
    jobs = {}
    for first in range(0, args.episodes_per_task, BLOCK):
        last = min(first + BLOCK, args.episodes_per_task)
        for task in conventions.parse_tasks(args.tasks):
            if not all(part_path(args.out, task, episode).exists() for episode in range(first, last)):
                command = [sys.executable, "-m", program, *argv, "--block", str(task), str(first), str(last)]
                jobs[f"task{task:02d}_from{first:04d}"] = command
    with tqdm(total=len(wanted), unit="episode", desc=what) as bar:

        def show() -> None:
            bar.update(sum(path.exists() for path in wanted) - bar.n)

        failed = run_jobs(jobs, args.workers, wanted[0].parent, show)
    if failed:
        raise A2C2Error(f"blocks {failed} failed, see {wanted[0].parent}/*.log; run the same command to continue")
