"""Success rates on LIBERO Spatial, with the classes of the nodes in one process.

Each task runs in a process of its own and writes one JSON file per episode, so that an evaluation can be killed at any
time and continues where it was.
"""

import argparse
import hashlib
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from a2c2_ros import provenance
from a2c2_ros.core.config import ControllerConfig, PlannerConfig
from a2c2_ros.core.controller import CorrectionLoop
from a2c2_ros.core.errors import A2C2Error, ConfigError
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.evaluation.statistics import wilson_interval
from a2c2_ros.jobs import run_jobs
from a2c2_ros.paths import model_path
from a2c2_ros.sim import conventions

METHODS = {"naive": False, "a2c2": True}
"""Method name to whether the correction head runs."""
SETTINGS = ("method", "horizon", "delay", "jitter", "seed", "policy", "head", "max_steps")
"""What identifies a cell: results of other settings are not continued."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m a2c2_ros.evaluation.libero",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--out", type=Path, required=True, help="JSON file of the result")
    p.add_argument("--method", choices=sorted(METHODS), default="a2c2", help="how chunks are executed")
    p.add_argument("--tasks", default="0-9", help="task numbers, e.g. 0-3,7")
    p.add_argument("--episodes", type=int, default=10, help="official initial states per task, from 0")
    p.add_argument("--horizon", type=int, default=40, help="execution horizon e [steps]")
    p.add_argument("--delay", type=int, default=10, help="injected inference delay d [steps]")
    p.add_argument("--jitter", type=int, default=0, help="the delay varies by up to this many steps, seeded")
    p.add_argument("--seed", type=int, default=0, help="seed of fixtures, policy noise and jitter")
    p.add_argument("--policy", default=PlannerConfig().policy_path, help="checkpoint folder of the base policy")
    p.add_argument("--head", default=ControllerConfig().correction__model_path, help="ONNX head")
    p.add_argument("--max-steps", type=int, default=conventions.MAX_STEPS, help="step limit of an episode")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="tasks that run at the same time")
    p.add_argument("--worker-task", type=int, help=argparse.SUPPRESS)
    return p


def planner_config(args: argparse.Namespace, horizon: int) -> PlannerConfig:
    """The planner's parameters of a cell; raises ConfigError if e, d and H do not go together."""
    return PlannerConfig(
        policy_path=args.policy,
        horizon=horizon,
        execution_horizon=args.horizon,
        inference_delay=args.delay,
        inference_delay_jitter=args.jitter,
        seed=args.seed,
        lockstep=True,
    )


def run_task(args: argparse.Namespace, task: int) -> None:
    """Run the missing episodes of one task; an episode that raises is recorded as an exception, not as a failure."""
    from a2c2_ros.evaluation.rollout import run_episode
    from a2c2_ros.heads.onnx_head import OnnxHead
    from a2c2_ros.policies.registry import load_policy
    from a2c2_ros.sim.libero_env import LiberoEnv

    robot = load_profile("libero").robot
    policy = load_policy("flow", str(model_path(args.policy)), threads=1)
    corrected = METHODS[args.method]
    head = OnnxHead(model_path(args.head)) if corrected else None
    loop = CorrectionLoop(ControllerConfig(correction__enabled=corrected, lockstep=True), robot, head)
    config = planner_config(args, policy.horizon)
    with LiberoEnv(task) as env:
        for state in range(args.episodes):
            path = episode_path(args.out, task, state)
            if path.exists():
                continue
            record: dict[str, object] = {"task": task, "initial_state": state, "error": None}
            try:
                episode = run_episode(
                    env,
                    robot,
                    policy,
                    loop,
                    config,
                    initial_state=state,
                    seed=args.seed + state,
                    max_steps=args.max_steps,
                )
            except A2C2Error as error:
                traceback.print_exc()
                record["error"] = f"{type(error).__name__}: {error}"
            else:
                record |= vars(episode)
            temporary = path.with_suffix(".partial")
            temporary.write_text(json.dumps(record))
            temporary.replace(path)


def parts_folder(out: Path) -> Path:
    """Where the episodes of a result are kept until it is complete."""
    return out.with_suffix(".parts")


def episode_path(out: Path, task: int, state: int) -> Path:
    """File of one episode."""
    return parts_folder(out) / f"task{task:02d}_state{state:02d}.json"


def run_all(args: argparse.Namespace, tasks: Sequence[int], argv: Sequence[str]) -> list[dict]:
    """Run every task in a process of its own, ``args.workers`` at a time, and collect the episodes.

    Raises:
        A2C2Error: If a task's process died; what was finished is kept.
    """
    folder = parts_folder(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [episode_path(args.out, task, state) for task in tasks for state in range(args.episodes)]
    jobs = {
        f"task{task:02d}": [sys.executable, "-m", "a2c2_ros.evaluation.libero", *argv, "--worker-task", str(task)]
        for task in tasks
        if not all(episode_path(args.out, task, state).exists() for state in range(args.episodes))
    }
    with tqdm(total=len(wanted), unit="episode", desc=f"{args.method} e={args.horizon} d={args.delay}") as bar:

        def show() -> None:
            done = [json.loads(path.read_text()) for path in wanted if path.exists()]
            bar.set_postfix(success=f"{sum(bool(e.get('success')) for e in done)}/{len(done)}", refresh=False)
            bar.update(len(done) - bar.n)

        failed = run_jobs(jobs, args.workers, folder, show)
    if failed:
        raise A2C2Error(f"the processes of {failed} died, see {folder}/*.log; run the same command to continue")
    return [json.loads(path.read_text()) for path in wanted]


def summarise(args: argparse.Namespace, tasks: Sequence[int], episodes: Sequence[dict], seconds: float) -> dict:
    """The result of a cell: counts with Wilson intervals per task and in all, exceptions apart, times, provenance."""

    def counts(chosen: Sequence[dict]) -> dict[str, object]:
        valid = [e for e in chosen if e["error"] is None]
        successes = sum(e["success"] for e in valid)
        return {
            "successes": successes,
            "episodes": len(valid),
            "exceptions": len(chosen) - len(valid),
            "success_rate": successes / len(valid) if valid else None,
            "wilson_95": wilson_interval(successes, len(valid)),
        }

    def percentiles(key: str) -> dict[str, float] | None:
        values = [v for e in episodes if e["error"] is None for v in e[key]]
        return {f"p{q}": round(float(np.percentile(values, q)), 3) for q in (50, 99)} if values else None

    states: dict[str, int] = {}
    for episode in episodes:
        for name, n in episode.get("states", {}).items():
            states[name] = states.get(name, 0) + n
    return {
        "benchmark": conventions.SUITE,
        **cell_settings(args),
        "tasks": list(tasks),
        "episodes_per_task": args.episodes,
        "total": counts(episodes),
        "per_task": {str(task): counts([e for e in episodes if e["task"] == task]) for task in tasks},
        "inference_ms": percentiles("inference_ms"),
        "head_ms": percentiles("head_ms"),
        "states": states,
        "wall_s": round(seconds, 1),
        "machine": provenance.machine(),
        "versions": provenance.versions(),
        "rollouts": [{k: e.get(k) for k in ("task", "initial_state", "success", "steps", "error")} for e in episodes],
    }


def cell_settings(args: argparse.Namespace) -> dict[str, object]:
    """What identifies a cell: the settings and the very weights."""
    config = json.loads((model_path(args.policy) / "config.json").read_text(encoding="utf-8"))
    settings = {name: getattr(args, name) for name in SETTINGS} | {"policy_id": config["policy_id"]}
    if METHODS[args.method]:
        settings["head_sha256"] = hashlib.sha256(model_path(args.head).read_bytes()).hexdigest()
    return settings


def check_settings(args: argparse.Namespace) -> None:
    """Refuse to continue an evaluation of other settings.

    Raises:
        ConfigError: Naming the settings that differ.
    """
    path = parts_folder(args.out) / "settings.json"
    mine = cell_settings(args)
    if path.exists():
        theirs = json.loads(path.read_text())
        wrong = [f"{k}: there {theirs.get(k)!r}, here {v!r}" for k, v in mine.items() if theirs.get(k) != v]
        if wrong:
            raise ConfigError(
                f"{path.parent} holds episodes of other settings ({'; '.join(wrong)}); choose another --out"
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(mine))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    try:
        if args.worker_task is not None:
            run_task(args, args.worker_task)
            return 0
        tasks = conventions.parse_tasks(args.tasks)
        if not 1 <= args.episodes <= conventions.N_INITIAL_STATES:
            raise ConfigError(f"--episodes is {args.episodes}, allowed is 1 to {conventions.N_INITIAL_STATES}")
        horizon = json.loads((model_path(args.policy) / "config.json").read_text())["horizon"]
        planner_config(args, horizon)
        check_settings(args)
        started = time.monotonic()
        episodes = run_all(args, tasks, argv)
        result = summarise(args, tasks, episodes, time.monotonic() - started)
    except A2C2Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    total = result["total"]
    low, high = total["wilson_95"]
    print(
        f"{args.method} e={args.horizon} d={args.delay}: {total['successes']}/{total['episodes']} "
        f"[{low:.1%}, {high:.1%}], exceptions {total['exceptions']} -> {args.out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
