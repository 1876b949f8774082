"""Demonstrations of the scripted expert on LIBERO Spatial, as a LeRobotDataset v3.

Every episode is written to a file of its own first (OUT.parts), by several processes; what is there is kept, so that a
killed run continues. Then the data set is assembled from the files, in order. The executed action is the expert's plus
noise, the label is the expert's own action for the state that the noise has led to.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from a2c2_ros.commands import command
from a2c2_ros.core.errors import A2C2Error
from a2c2_ros.jobs import interrupt_on_termination
from a2c2_ros.settings import check_settings
from a2c2_ros.sim import conventions
from a2c2_ros.sim.disturbance import Pushes
from a2c2_ros.training.assembling import assemble
from a2c2_ros.training.episodes import FEATURES, Frames, part_path, record_blocks, save_part, wanted_parts

STEPS_AFTER_SUCCESS = 3
ATTEMPTS = 6
"""An episode that failed is drawn anew; the last attempt is without noise."""
NOISE_SHARES = {"none": 0.3, "pushes": 0.4, "steady": 0.3}
WHITE_NOISE = np.array([0.06] * 3 + [0.04] * 3)
CORRELATED_NOISE = np.array([0.15] * 3 + [0.05] * 3)
CORRELATION = 0.9
"""Of the Ornstein-Uhlenbeck noise from one step to the next."""


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
    frames = Frames()
    steps_left = conventions.MAX_STEPS
    solved = False
    while steps_left > 0:
        label = expert.act(observation)
        if expert.phase is Phase.DONE:
            break
        executed = action_noise.apply(label) if expert.accepts_noise else label
        frames.add(env, observation, label, executed)
        observation, success = env.step(executed)
        steps_left -= 1
        if success and not solved:
            solved = True
            steps_left = min(steps_left, STEPS_AFTER_SUCCESS)
    return frames.arrays() if solved else None


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
            save_part(path, attempts=attempt + 1, instruction=env.instruction, **frames)


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
    wanted = wanted_parts(args)
    check_settings(wanted[0].parent / "settings.json", {"seed": args.seed})
    if not args.assemble_only:
        record_blocks("a2c2_ros.training.demonstrations", argv, args, wanted, "demonstrations")
    assemble(args.out, [path for path in wanted if path.exists()], FEATURES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
