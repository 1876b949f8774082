"""Demonstrations of the scripted expert on LIBERO Spatial, as a LeRobotDataset v3.

Every episode is written to a file of its own first (OUT.parts), by several processes; what is there is kept, so that a
killed run continues. Then the data set is assembled from the files, in order. The executed action is the expert's plus
noise, the label is the expert's own action for the state that the noise has led to.
"""

import argparse
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from a2c2_ros.commands import command
from a2c2_ros.core.errors import A2C2Error, ConfigError
from a2c2_ros.core.robot import Robot
from a2c2_ros.core.state import state_vector
from a2c2_ros.drivers.profile import STATE_NAMES
from a2c2_ros.jobs import interrupt_on_termination, run_jobs
from a2c2_ros.settings import check_settings
from a2c2_ros.sim import conventions
from a2c2_ros.sim.disturbance import Pushes
from a2c2_ros.training.dataset import IMAGE_PREFIX

BLOCK = 20
"""Episodes per process: the start of a simulator is paid once per block, and unfinished data stays balanced."""
STEPS_AFTER_SUCCESS = 3
ATTEMPTS = 6
"""An episode that failed is drawn anew; the last attempt is without noise."""
NOISE_SHARES = {"none": 0.3, "pushes": 0.4, "steady": 0.3}
WHITE_NOISE = np.array([0.06] * 3 + [0.04] * 3)
CORRELATED_NOISE = np.array([0.15] * 3 + [0.05] * 3)
CORRELATION = 0.9
"""Of the Ornstein-Uhlenbeck noise from one step to the next."""
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


class ActionNoise:
    """Noise on the six motion channels of the executed action, of one kind per episode.

    Steady noise (white and correlated) leads to states near the expert's way, but then every later action answers noise
    that nobody could foresee: a bad example of a chunk. After a push the expert goes on undisturbed for a while: a good
    one, from a state off the way.

    Args:
        rng: Draws the kind and the noise.
        kind: Key of ``NOISE_SHARES``; None draws one.
    """

    def __init__(self, rng: np.random.Generator, kind: str | None = None) -> None:
        self._rng = rng
        self.kind = str(rng.choice(list(NOISE_SHARES), p=list(NOISE_SHARES.values()))) if kind is None else kind
        self._state = np.zeros(6)
        self._pushes = Pushes(rng)

    def apply(self, action: np.ndarray) -> np.ndarray:
        """The action with noise, (7,), within the limits; the gripper's channel is left alone."""
        noisy = action.copy()
        noisy[:6] += self._steady() if self.kind == "steady" else self._pushes.next() if self.kind == "pushes" else 0.0
        return np.clip(noisy, conventions.ACTION_LOW, conventions.ACTION_HIGH)

    def _steady(self) -> np.ndarray:
        kick = self._rng.standard_normal((2, 6))
        self._state = CORRELATION * self._state + np.sqrt(1 - CORRELATION**2) * kick[0]
        return WHITE_NOISE * kick[1] + CORRELATED_NOISE * self._state


def demonstrate(env, seed: int, noise: str | None) -> dict[str, np.ndarray] | None:
    """One episode of the expert from a freshly sampled placement.

    Args:
        env: A ``LiberoEnv``.
        seed: Seed of the placement, the fixtures and the noise.
        noise: Kind of noise, see :class:`ActionNoise`.

    Returns:
        Arrays by feature name with the time first, or None if the task was not solved.
    """
    from a2c2_ros.sim.expert import Expert, Phase

    observation = env.reset(None, seed)
    expert = Expert(env)
    action_noise = ActionNoise(np.random.default_rng(seed), noise)
    frames: dict[str, list[np.ndarray]] = {name: [] for name in FEATURES}
    steps_left = conventions.MAX_STEPS
    solved = False
    while steps_left > 0:
        label = expert.act(observation)
        if expert.phase is Phase.DONE:
            break
        executed = action_noise.apply(label) if expert.accepts_noise else label
        for name in conventions.CAMERAS:
            frames[f"observation.images.{name}"].append(observation[name])
        frames["observation.state"].append(
            state_vector(observation["ee_pose"], observation["joint_position"][-2:], conventions.NOMINAL_EE_QUAT_XYZW)
        )
        objects = [env.object_pose(name)[:3] for name in (conventions.TARGET_BOWL, conventions.PLATE)]
        frames["observation.objects"].append(np.concatenate(objects).astype(np.float32))
        frames["action"].append(label.astype(np.float32))
        frames["action.executed"].append(executed.astype(np.float32))
        observation, success = env.step(executed)
        steps_left -= 1
        if success and not solved:
            solved = True
            steps_left = min(steps_left, STEPS_AFTER_SUCCESS)
    return {name: np.stack(values) for name, values in frames.items()} if solved else None


def part_path(out: Path, task: int, episode: int) -> Path:
    """File of one episode."""
    return out.with_name(out.name + ".parts") / f"episode{episode:04d}_task{task:02d}.npz"


def run_block(out: Path, task: int, first: int, last: int, seed: int) -> None:
    """Record the missing episodes ``first`` to ``last - 1`` of a task.

    Raises:
        A2C2Error: If the expert does not solve an episode in any attempt.
    """
    from a2c2_ros.sim.libero_env import LiberoEnv

    with LiberoEnv(task) as env:
        for episode in range(first, last):
            path = part_path(out, task, episode)
            if path.exists():
                continue
            for attempt in range(ATTEMPTS):
                episode_seed = int(np.random.SeedSequence((seed, task, episode, attempt)).generate_state(1)[0])
                frames = demonstrate(env, episode_seed, None if attempt < ATTEMPTS - 1 else "none")
                if frames is not None:
                    break
            else:
                raise A2C2Error(f"task {task}, episode {episode}: not solved in {ATTEMPTS} attempts")
            partial = path.with_suffix(".partial")
            with partial.open("wb") as file:
                np.savez(file, attempts=attempt + 1, instruction=env.instruction, **frames)
            partial.replace(path)


def features_of(robot: Robot) -> dict[str, dict[str, object]]:
    """Features of a data set of this robot: cameras, state, label and what was executed."""
    images = {
        f"{IMAGE_PREFIX}{name}": {
            "dtype": "video",
            "shape": robot.streams[name].shape,
            "names": ["height", "width", "channels"],
        }
        for name in robot.cameras
    }
    state = {"dtype": "float32", "shape": (len(robot.state_names),), "names": list(robot.state_names)}
    action = {"dtype": "float32", "shape": (len(robot.action_names),), "names": list(robot.action_names)}
    return images | {"observation.state": state, "action": action, "action.executed": dict(action)}


def assemble(
    out: Path,
    parts: Sequence[Path],
    features: Mapping[str, Mapping[str, object]] = FEATURES,
    fps: int = conventions.CONTROL_RATE_HZ,
    robot_type: str = "panda",
) -> None:
    """Write the LeRobotDataset v3 of these episode files; it appears at ``out`` only when it is complete.

    Args:
        out: Folder.
        parts: One ``.npz`` file per episode with the features, time first, and ``instruction``.
        features: As LeRobot describes them.
        fps: Control steps per second.
        robot_type: Name of the robot.

    Raises:
        A2C2Error: If a video lacks a frame.
    """
    import av
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    av.logging.set_libav_level(av.logging.ERROR)  # the encoder tells its settings for every video
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    dataset = LeRobotDataset.create(
        repo_id=f"a2c2_ros/{out.name}",
        fps=fps,
        features=dict(features),
        root=partial,
        robot_type=robot_type,
        rgb_encoder=RGBEncoderConfig(vcodec="h264", crf=18, g=2, preset="veryfast"),
        streaming_encoding=True,
        # A frame that waits longer than 0.1 s for a place in the queue is dropped: the queue takes a whole episode.
        encoder_queue_maxsize=max(map(_length, parts)) + 1,
    )
    for path in tqdm(parts, unit="episode", desc="assemble"):
        with np.load(path, allow_pickle=False) as part:
            frames = {name: part[name] for name in features}
            instruction = str(part["instruction"])
        for index in range(len(frames["action"])):
            dataset.add_frame({name: values[index] for name, values in frames.items()} | {"task": instruction})
        dataset.save_episode()
    dataset.finalize()
    check_videos(partial)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def _length(part: Path) -> int:
    with np.load(part, allow_pickle=False) as file:
        return len(file["action"])


def check_videos(root: Path) -> None:
    """Check that every episode has as many frames in each video as it has steps.

    Raises:
        A2C2Error: Naming the episode, the camera and both numbers.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDatasetMetadata

    meta = LeRobotDatasetMetadata(f"a2c2_ros/{root.name}", root=root)
    for row in meta.episodes:
        for key in meta.video_keys:
            frames = round((row[f"videos/{key}/to_timestamp"] - row[f"videos/{key}/from_timestamp"]) * meta.fps)
            if frames != row["length"]:
                raise A2C2Error(
                    f"episode {row['episode_index']}: {frames} frames in the video {key}, {row['length']} steps"
                )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m a2c2_ros.training.demonstrations",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--out", type=Path, required=True, help="folder of the data set; must not exist, but its parts may")
    p.add_argument("--tasks", default="0-9", help="task numbers, e.g. 0-3,7")
    p.add_argument("--episodes-per-task", type=int, default=40, help="solved episodes of each task")
    p.add_argument("--workers", type=int, default=2, help="simulators that run at the same time")
    p.add_argument("--seed", type=int, default=0, help="seed of placements and noise")
    p.add_argument("--assemble-only", action="store_true", help="make a data set of the episodes that are there")
    p.add_argument("--block", type=int, nargs=3, metavar=("TASK", "FIRST", "LAST"), help=argparse.SUPPRESS)
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    if args.block:
        run_block(args.out, *args.block, args.seed)
        return 0
    interrupt_on_termination()
    tasks = conventions.parse_tasks(args.tasks)
    if args.episodes_per_task < 1:
        raise ConfigError(f"--episodes-per-task is {args.episodes_per_task}, allowed is 1 or more")
    if args.out.exists():
        raise ConfigError(f"{args.out} exists already; choose another --out or remove it")
    wanted = [part_path(args.out, task, episode) for episode in range(args.episodes_per_task) for task in tasks]
    wanted[0].parent.mkdir(parents=True, exist_ok=True)
    check_settings(wanted[0].parent / "settings.json", {"seed": args.seed})
    if not args.assemble_only:
        record(args, argv, tasks, wanted)
    assemble(args.out, [path for path in wanted if path.exists()])
    return 0


def record(args: argparse.Namespace, argv: Sequence[str], tasks: Sequence[int], wanted: Sequence[Path]) -> None:
    """Record the missing episodes in blocks, with a progress bar.

    Raises:
        A2C2Error: If a block's process failed; what was finished is kept.
    """
    jobs = {}
    for first in range(0, args.episodes_per_task, BLOCK):
        last = min(first + BLOCK, args.episodes_per_task)
        for task in tasks:
            if not all(part_path(args.out, task, episode).exists() for episode in range(first, last)):
                block = ["--block", str(task), str(first), str(last)]
                jobs[f"task{task:02d}_from{first:04d}"] = [
                    sys.executable,
                    "-m",
                    parser().prog.split()[-1],
                    *argv,
                    *block,
                ]
    with tqdm(total=len(wanted), unit="episode", desc="demonstrations") as bar:

        def show() -> None:
            bar.update(sum(path.exists() for path in wanted) - bar.n)

        failed = run_jobs(jobs, args.workers, wanted[0].parent, show)
    if failed:
        raise A2C2Error(f"blocks {failed} failed, see {wanted[0].parent}/*.log; run the same command to continue")


if __name__ == "__main__":
    sys.exit(main())
