"""Kinetix as in the paper's figure 5: ``make kinetix ARGS="--levels DIR"``.

Trains what is missing for every level (expert, demonstrations, base policy, correction head), then runs every method on
every (e, d) of the grid and writes results/kinetix/LEVEL.json and docs/kinetix.md. What is done is kept: the same
command continues after a kill, and after more levels or methods are asked for.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from a2c2_ros import provenance
from a2c2_ros.commands import command
from a2c2_ros.core.errors import A2C2Error, ConfigError
from a2c2_ros.core.schedule import admissible_execution_horizons
from a2c2_ros.evaluation import kinetix_report
from a2c2_ros.evaluation.methods import METHODS
from a2c2_ros.evaluation.statistics import wilson_interval
from a2c2_ros.training.kinetix_budget import BUDGETS

DELAYS = range(5)
KINETIX_METHODS = ("naive", "rtc", "tt_rtc", "a2c2", "rtc+a2c2", "tt_rtc+a2c2")
SMALL_LEVELS = ("h17_unicycle", "cartpole_thrust", "hard_lunar_lander", "mjc_half_cheetah")
EVALUATION_SEED = 2_000_000
EXPERT_ROLLOUTS = {"stock": 64, "shrunk": 64, "pruned": 256}
"""By variant of the environment."""


def _threads() -> int:
    """The largest power of two that this machine has processors for."""
    return 1 << ((os.cpu_count() or 1).bit_length() - 1)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m a2c2_ros.evaluation.kinetix",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--levels", type=Path, required=True, help="folder with NAME.json of every level")
    p.add_argument("--tasks", nargs="+", default=list(SMALL_LEVELS), help="names of levels, or all: the paper's twelve")
    p.add_argument("--budget", choices=BUDGETS, default="small", help="how much of everything; small: two CPU cores")
    p.add_argument("--methods", nargs="+", choices=KINETIX_METHODS, default=list(KINETIX_METHODS), help="to evaluate")
    p.add_argument("--rollouts", type=int, help="episodes per cell, instead of the budget's")
    p.add_argument("--work", type=Path, default=Path("runs/kinetix"), help="trainings")
    p.add_argument("--results", type=Path, default=Path("results/kinetix"), help="JSON files")
    p.add_argument("--page", type=Path, default=Path("docs/kinetix.md"), help="page with tables and plots")
    p.add_argument("--seed", type=int, default=0, help="of all")
    p.add_argument("--device", default="cpu", help="torch device; JAX takes a GPU by itself if it was installed for it")
    p.add_argument("--workers", type=int, default=_threads(), help="threads; they divide the batch size")
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        return run(args)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130


def run(args: argparse.Namespace) -> int:
    """Train, evaluate and report, level by level; a level that fails is reported and left out.

    Returns:
        The exit code.

    Raises:
        ConfigError: If a level is missing or a folder is of other settings.
    """
    from a2c2_ros.sim.kinetix_level import LEVELS
    from a2c2_ros.training.kinetix import train_level

    budget = BUDGETS[args.budget]
    rollouts = args.rollouts or budget.rollouts
    tasks = LEVELS if args.tasks == ["all"] else args.tasks
    paths = [args.levels / f"{task}.json" for task in tasks]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise ConfigError(f"levels {missing} are not there; --levels is the folder with NAME.json of every level")
    args.results.mkdir(parents=True, exist_ok=True)
    failed = 0
    for path in paths:
        out = args.work / path.stem
        try:
            trained = train_level(path, out, budget, args.seed, args.device, args.workers)
            evaluate(path, out, trained, args, rollouts)
        except A2C2Error as error:
            print(f"error: {path.stem}: {error}", file=sys.stderr)
            failed += 1
    kinetix_report.write(args.results, args.page)
    return 2 if failed else 0


def evaluate(path: Path, out: Path, trained, args: argparse.Namespace, rollouts: int) -> None:
    """Run the methods of a level that its result file lacks."""
    import torch

    from a2c2_ros.evaluation.batched import run_method
    from a2c2_ros.heads.base import load_head
    from a2c2_ros.policies.flow import load_network
    from a2c2_ros.policies.language import InstructionEncoder
    from a2c2_ros.sim.kinetix_env import ACTION_NOISE, KinetixEnv
    from a2c2_ros.sim.kinetix_level import load_level
    from a2c2_ros.training.kinetix import expert_success
    from a2c2_ros.training.kinetix_expert import load_expert

    policy = load_network(trained.policy).to(args.device)
    head = load_head(trained.head / "head.safetensors").to(args.device)
    horizon = policy.config.horizon
    pairs = [(e, d) for d in DELAYS for e in admissible_execution_horizons(horizon, d)]
    settings = {
        "level": path.stem,
        "level_sha256": provenance.sha256_of(path),
        "budget": args.budget,
        "policy_id": policy.config.policy_id,
        "head_sha256": provenance.sha256_of(trained.head / "head.onnx"),
        "horizon": horizon,
        "rollouts": rollouts,
        "seed": args.seed,
        "action_noise": ACTION_NOISE,
    }
    file = args.results / f"{path.stem}.json"
    result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    result = result or {**settings, "expert": {}, "methods": {}}
    for name, value in settings.items():
        if result.get(name) != value:
            raise ConfigError(f"{file} is of {name} {result.get(name)!r}, not {value!r}; move it or choose --results")
    torch.set_num_threads(args.workers)
    level = load_level(path)
    env = KinetixEnv(level)
    language = torch.tensor(InstructionEncoder().embed(path.stem))
    result["facts"] = facts(policy, head, env, out, trained)
    if not result["expert"]:
        for variant, count in EXPERT_ROLLOUTS.items():
            computed = env if variant == env.variant else KinetixEnv(level, variant=variant)
            expert = load_expert(out / "expert0", computed)
            solved, steps_per_s = expert_success(computed, expert, count, EVALUATION_SEED + args.seed)
            result["expert"][variant] = {**rate(solved, count), "steps_per_s": steps_per_s}
        save(file, result)
    missing = [name for name in args.methods if name not in result["methods"]]
    if missing:
        env.compile(len(pairs) * rollouts)  # which is not to be timed
    for name in missing:
        with tqdm(total=env.max_steps, unit="step", desc=f"{path.stem} {name}") as bar:
            begun = time.perf_counter()
            outcome = run_method(
                env, policy, head, METHODS[name], pairs, rollouts, EVALUATION_SEED + args.seed, language, bar
            )
        result["methods"][name] = {
            "cells": [
                {
                    "e": e,
                    "d": d,
                    **rate(int(solved.sum()), len(solved)),
                    "mean_steps": float(outcome.steps[e, d].mean()),
                    "solved": "".join("01"[won] for won in solved.tolist()),
                }
                for (e, d), solved in outcome.solved.items()
            ],
            "seconds": {"all": time.perf_counter() - begun, **outcome.seconds},
            "counts": outcome.counts,
            "threads": args.workers,
        }
        save(file, result)


def facts(policy, head, env, out: Path, trained) -> dict[str, object]:
    """Sizes, and how expert, policy and head were trained."""
    records = {
        name: json.loads((folder / "training.json").read_text(encoding="utf-8"))
        for name, folder in dataclasses.asdict(trained).items()
    }
    expert = json.loads((out / "expert0" / "expert.json").read_text(encoding="utf-8"))
    return {
        "state": len(env.state_names),
        "actions": list(env.action_names),
        "parameters": {
            "policy": sum(p.numel() for p in policy.parameters()),
            "head": sum(p.numel() for p in head.parameters()),
        },
        "training": {
            name: {"steps": record["steps"], "seconds": record.get("seconds")}
            for name, record in {"expert": expert, **records}.items()
        },
        "departures": {name: record["departures_from_the_paper"] for name, record in records.items()},
    }


def rate(successes: int, episodes: int) -> dict[str, object]:
    """What a result file has of a success rate."""
    return {"successes": successes, "episodes": episodes, "wilson_95": wilson_interval(successes, episodes)}


def save(file: Path, result: Mapping[str, object]) -> None:
    """Write a result with where it comes from; a kill leaves the old file or the new one."""
    partial = file.with_suffix(".partial")
    text = json.dumps({**result, "machine": provenance.machine(), "versions": provenance.versions()}, indent=1)
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(file)


if __name__ == "__main__":
    sys.exit(main())
