"""Success rate of one method at one (e, d) on LIBERO Spatial, with the classes of the nodes in one process per task.

One cell of ``a2c2_ros.evaluation.grid``. It can be killed at any time; the same command continues where it was.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from a2c2_ros.commands import command
from a2c2_ros.core.config import ControllerConfig, PlannerConfig
from a2c2_ros.core.errors import ConfigError
from a2c2_ros.evaluation.cells import EXPERT, METHOD_NAMES, SPLITS, STATIC, Cell, EpisodeStore, check_cell
from a2c2_ros.evaluation.methods import METHODS
from a2c2_ros.evaluation.runner import Item, run_items
from a2c2_ros.evaluation.worker import ProcessWorker
from a2c2_ros.jobs import interrupt_on_termination
from a2c2_ros.sim import conventions


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m a2c2_ros.evaluation.libero",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--out", type=Path, required=True, help="JSON file of the result")
    p.add_argument("--method", choices=METHOD_NAMES, default="a2c2", help="how chunks are executed")
    p.add_argument("--tasks", default="0-9", help="task numbers, e.g. 0-3,7")
    p.add_argument("--episodes", type=int, default=10, help="initial states per task, from 0")
    p.add_argument("--split", choices=SPLITS, default="test", help="initial states: official, or sampled to choose by")
    p.add_argument("--variant", default=STATIC, help="static, swap, or a motion of the simulator")
    p.add_argument("--execution-horizon", type=int, default=40, help="execution horizon e [steps]")
    p.add_argument("--inference-delay", type=int, default=10, help="injected inference delay d [steps]")
    p.add_argument("--inference-delay-jitter", type=int, default=0, help="d varies by up to this many steps, seeded")
    p.add_argument("--seed", type=int, default=0, help="seed of fixtures, policy noise and jitter")
    p.add_argument("--policy", default=PlannerConfig().policy_path, help="checkpoint folder of the base policy")
    p.add_argument("--head", default=ControllerConfig().correction__model_path, help="ONNX head")
    p.add_argument("--max-steps", type=int, default=conventions.MAX_STEPS, help="step limit of an episode")
    p.add_argument("--videos", action="store_true", help="MP4 of every episode that is run, in OUT's .parts")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="episodes that run at the same time")
    return p


def make_cell(args: argparse.Namespace) -> Cell:
    """The cell that a command line asks for."""
    expert = args.method == EXPERT
    return Cell(
        label=args.method,
        method=args.method,
        execution_horizon=None if expert else args.execution_horizon,
        inference_delay=None if expert else args.inference_delay,
        policy="" if expert else args.policy,
        head=args.head if not expert and METHODS[args.method].corrected else "",
        seed=args.seed,
        inference_delay_jitter=args.inference_delay_jitter,
        variant=args.variant,
        split=args.split,
        max_steps=args.max_steps,
    )


def parts_folder(out: Path) -> Path:
    """Where the episodes of a result are kept."""
    return out.with_suffix(".parts")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(argv)
    folder = parts_folder(args.out)
    try:
        tasks = conventions.parse_tasks(args.tasks)
        if not 1 <= args.episodes <= conventions.N_INITIAL_STATES:
            raise ConfigError(f"--episodes is {args.episodes}, allowed is 1 to {conventions.N_INITIAL_STATES}")
        if args.workers < 1:
            raise ConfigError(f"--workers is {args.workers}, allowed is 1 or more")
        if args.videos and args.method == EXPERT:
            raise ConfigError("--videos draws the loop's actions, which the expert does not have")
        cell = make_cell(args)
        check_cell(cell)
        item = Item(cell, args.episodes, EpisodeStore(folder, cell), args.out)
        interrupt_on_termination()
        run_items(
            [item],
            tasks,
            lambda task, variant: ProcessWorker.libero(task, variant, folder, folder if args.videos else None),
            workers=args.workers,
            processes=args.workers,
        )
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    total = json.loads(args.out.read_text(encoding="utf-8"))["total"]
    low, high = total["wilson_95"]
    print(
        f"{cell.name}: {total['successes']}/{total['episodes']} "
        f"[{low:.1%}, {high:.1%}], exceptions {total['exceptions']} -> {args.out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
