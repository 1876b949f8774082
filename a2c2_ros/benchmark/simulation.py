"""How fast a control step of LIBERO Spatial is: the benchmark's own environment beside ours, on one core.

``python -m a2c2_ros.benchmark.simulation``. Both get the same random actions from the same initial state and give two
128x128 cameras. Each way runs in a process of its own, in rounds, so that a slow minute of the machine meets all.
"""

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from a2c2_ros import provenance
from a2c2_ros.commands import command
from a2c2_ros.core.errors import A2C2Error
from a2c2_ros.sim import conventions

WAYS = {
    "stock": "OffScreenRenderEnv of the benchmark",
    "full meshes": "ours with the benchmark's meshes",
    "ours": "ours",
    "ours, no look": "ours without images: what a step costs whose images nobody reads",
}
WARM_UP_STEPS = 10


def stock(task: int) -> Callable[[np.ndarray], object]:
    """The benchmark's environment as its documentation makes it; returns its step."""
    with contextlib.redirect_stdout(io.StringIO()):
        from libero.libero.benchmark import get_benchmark
        from libero.libero.envs import OffScreenRenderEnv

        benchmark = get_benchmark(conventions.SUITE)(0)
        env = OffScreenRenderEnv(
            bddl_file_name=benchmark.get_task_bddl_file_path(task),
            camera_heights=conventions.IMAGE_SIZE,
            camera_widths=conventions.IMAGE_SIZE,
        )
    env.seed(0)
    env.reset()
    env.set_init_state(benchmark.get_task_init_states(task)[0])
    return env.step


def ours(task: int, *, full_meshes: bool = False, look: bool = True) -> Callable[[np.ndarray], object]:
    """Our environment; returns its step."""
    from a2c2_ros.sim.libero_env import LiberoEnv

    env = LiberoEnv(task, full_meshes=full_meshes)
    env.reset(0, seed=0)
    return lambda action: env.step(action, look=look)


def measure(way: str, task: int, steps: int) -> list[float]:
    """Durations of single steps [ms], in this process."""
    made = {
        "stock": lambda: stock(task),
        "full meshes": lambda: ours(task, full_meshes=True),
        "ours": lambda: ours(task),
        "ours, no look": lambda: ours(task, look=False),
    }
    step = made[way]()
    rng = np.random.default_rng(0)
    durations = []
    for number in range(WARM_UP_STEPS + steps):
        action = rng.uniform(-0.3, 0.3, conventions.ACTION_DIM)
        started = time.perf_counter()
        step(action)
        if number >= WARM_UP_STEPS:
            durations.append(1e3 * (time.perf_counter() - started))
    return durations


def run(way: str, task: int, steps: int) -> list[float]:
    """:func:`measure` in a process of its own, which may have one renderer only.

    Raises:
        A2C2Error: If the process fails, with the end of what it said.
    """
    command = [sys.executable, "-m", "a2c2_ros.benchmark.simulation", "--task", str(task), "--steps", str(steps)]
    done = subprocess.run([*command, "--way", way], capture_output=True, text=True)
    if done.returncode:
        raise A2C2Error(f"{way} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m a2c2_ros.benchmark.simulation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--task", type=int, choices=conventions.TASKS, default=0, metavar="N", help="0 to 9 (default 0)")
    p.add_argument("--steps", type=int, default=100, help="of each way in each round (default 100)")
    p.add_argument("--rounds", type=int, default=3, help="default 3")
    p.add_argument("--out", type=Path, default=Path("results/simulation.json"), help="default results/simulation.json")
    p.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    p = parser()
    args = p.parse_args(argv)
    if args.steps < 1 or args.rounds < 1:
        p.error(f"--steps is {args.steps}, --rounds is {args.rounds}, allowed is 1 or more")
    if args.way:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        json.dump(measure(args.way, args.task, args.steps), sys.stdout)
        return 0
    durations: dict[str, list[float]] = {way: [] for way in WAYS}
    for way in tqdm([way for _ in range(args.rounds) for way in WAYS], unit="run"):
        durations[way] += run(way, args.task, args.steps)
    rows = []
    for way, values in durations.items():
        p50, p99 = np.percentile(values, [50, 99])
        rows.append(
            {
                "way": way,
                "what": WAYS[way],
                "n": len(values),
                "mean_ms": round(float(np.mean(values)), 2),
                "p50_ms": round(float(p50), 2),
                "p99_ms": round(float(p99), 2),
                "steps_per_second": round(1e3 / float(np.mean(values)), 1),
                "speedup": round(float(np.mean(durations["stock"]) / np.mean(values)), 2),
            }
        )
    print(f"{'':16}{'mean':>8}{'p50':>8}{'p99':>8} ms  {'steps/s':>8}{'ratio':>8}")
    for row in rows:
        times = "".join(f"{row[name]:8.1f}" for name in ("mean_ms", "p50_ms", "p99_ms"))
        print(f"{row['way']:16}{times}     {row['steps_per_second']:8.1f}{row['speedup']:7.1f}x")
    result = {
        "benchmark": "simulation",
        "task": args.task,
        "seed": 0,
        "rounds": args.rounds,
        "ways": rows,
        "machine": provenance.machine(),
        "versions": provenance.versions(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"-> {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
