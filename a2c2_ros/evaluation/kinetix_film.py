"""Animated picture of a Kinetix level: one row per method, the same episodes side by side.

Which episodes is not chosen: they are the first of a cell of the evaluation's kind. Green: solved; red: failed.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from a2c2_ros.commands import command
from a2c2_ros.evaluation.batched import run_method
from a2c2_ros.evaluation.kinetix import EVALUATION_SEED, KINETIX_METHODS
from a2c2_ros.evaluation.methods import METHODS
from a2c2_ros.heads.base import load_head
from a2c2_ros.policies.flow import load_network
from a2c2_ros.policies.language import InstructionEncoder
from a2c2_ros.recording.film import FONT, TEXT_COLOUR

GOING, FAILED, SOLVED = (200, 200, 200), (200, 60, 60), (60, 160, 60)
"""Colours of a picture's border [RGB]."""
BORDER, HEADING = 4, 24  # [pixels]
STEPS_PER_FRAME = 2
FRAME_MS = 66
"""Two control steps of two physics steps of 1/60 s each."""
LAST_FRAME_MS = 2000


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m a2c2_ros.evaluation.kinetix_film",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--levels", type=Path, required=True, help="folder with NAME.json of every level")
    p.add_argument("--task", required=True, help="name of the level; make kinetix has trained for it")
    p.add_argument("--work", type=Path, default=Path("runs/kinetix"), help="trainings")
    p.add_argument("--methods", nargs="+", choices=KINETIX_METHODS, default=["naive", "a2c2"], help="rows")
    p.add_argument("--execution-horizon", type=int, default=4, help="execution horizon [steps]")
    p.add_argument("--inference-delay", type=int, default=4, help="inference delay [steps]")
    p.add_argument("--episodes", type=int, default=4, help="columns")
    p.add_argument("--size", type=int, default=160, help="side of a picture [pixels]")
    p.add_argument("--out", type=Path, required=True, help="file.gif")
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(argv)
    film(args)
    return 0


def film(args: argparse.Namespace) -> None:
    """Run the episodes and write the file.

    Raises:
        ConfigError: If level or trainings are missing.
    """
    from a2c2_ros.sim.kinetix_env import KinetixEnv
    from a2c2_ros.sim.kinetix_level import load_level
    from a2c2_ros.training.kinetix import trained_in

    trained = trained_in(args.work / args.task)
    policy, head = load_network(trained.policy), load_head(trained.head / "head.safetensors")
    env = KinetixEnv(load_level(args.levels / f"{args.task}.json"))
    language = torch.tensor(InstructionEncoder().embed(args.task))
    rows = []
    for name in args.methods:
        filmed = _Filmed(env, args.size)
        e, d = args.execution_horizon, args.inference_delay
        run_method(filmed, policy, head, METHODS[name], [(e, d)], args.episodes, EVALUATION_SEED, language)
        rows.append(_with_heading(np.stack(filmed.frames), f"{name}, e = {e}, d = {d}"))
    length = max(map(len, rows))  # the last picture stays
    frames = np.concatenate([row[np.minimum(np.arange(length), len(row) - 1)] for row in rows], axis=1)
    pictures = [Image.fromarray(frame).quantize(64, method=Image.Quantize.FASTOCTREE) for frame in frames]
    times = [FRAME_MS] * (length - 1) + [LAST_FRAME_MS]
    pictures[0].save(args.out, save_all=True, append_images=pictures[1:], duration=times, loop=0, optimize=True)
    print(f"{length} pictures -> {args.out}")


class _Filmed:
    """An environment that draws its episodes, until each is over."""

    def __init__(self, env, size: int) -> None:
        self._env, self._size, self._steps = env, size, 0
        self._pictures: dict[int, np.ndarray] = {}  # of every episode, the newest
        self._over: set[int] = set()
        self.frames: list[np.ndarray] = []

    def __getattr__(self, name: str):
        return getattr(self._env, name)

    def step(self, batch, action: np.ndarray, seed: tuple[int, int], **options):
        """As the environment's own."""
        stepped = self._env.step(batch, action, seed, **options)
        self._steps += 1
        shown = self._steps % STEPS_PER_FRAME == 0
        for row in set(range(len(action))) - self._over:
            if shown or stepped.ended[row]:
                colour = GOING if not stepped.ended[row] else SOLVED if stepped.solved[row] else FAILED
                self._pictures[row] = self._draw(stepped.batch, row, colour)
            if stepped.ended[row]:
                self._over.add(row)
        if shown or len(self._over) == len(action):
            self.frames.append(np.concatenate([self._pictures[row] for row in range(len(action))], axis=1))
        return stepped

    def _draw(self, batch, row: int, colour: tuple[int, int, int]) -> np.ndarray:
        inside = self._size - 2 * BORDER
        picture = cv2.resize(self._env.picture(batch, row), (inside, inside), interpolation=cv2.INTER_AREA)
        return cv2.copyMakeBorder(picture, *[BORDER] * 4, cv2.BORDER_CONSTANT, value=colour)


def _with_heading(frames: np.ndarray, text: str) -> np.ndarray:
    """(T, h, w, 3) to (T, h + HEADING, w, 3)."""
    heading = np.full((HEADING, frames.shape[2], 3), 255, np.uint8)
    cv2.putText(heading, text, (BORDER, HEADING - 8), FONT, 0.45, TEXT_COLOUR, 1, cv2.LINE_AA)
    return np.concatenate([np.broadcast_to(heading, (len(frames), *heading.shape)), frames], axis=1)


if __name__ == "__main__":
    sys.exit(main())
