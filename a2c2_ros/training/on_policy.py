"""Episodes of the real loop on LIBERO Spatial, every visited state labelled by the scripted expert (DAgger).

``python -m a2c2_ros.training.on_policy --policy DIR --head ONNX --out DATASET``. Placements are sampled; the official
initial states are for evaluation. An episode ends with success, where the expert is done or can do nothing more, or
after the step limit; failed ones are kept, since they show what the head cannot do yet. The result is a data set as of
``training.demonstrations`` (``action`` is the expert's, ``action.executed`` the loop's) with the base chunks that were
executed in ``executed/<policy id>.npz``: ``train_head --data DEMONSTRATIONS DATASET`` trains on exactly the (base
action, τ, z) that the loop met.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from a2c2_ros import provenance
from a2c2_ros.commands import command
from a2c2_ros.core.config import ControllerConfig, PlannerConfig
from a2c2_ros.core.controller import ControlStep, CorrectionLoop
from a2c2_ros.core.errors import ConfigError
from a2c2_ros.core.robot import Robot
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.evaluation.rollout import run_episode
from a2c2_ros.jobs import interrupt_on_termination
from a2c2_ros.paths import model_path
from a2c2_ros.policies.base import ChunkPolicy, Continuation, PolicyOutput
from a2c2_ros.settings import check_settings
from a2c2_ros.sim import conventions
from a2c2_ros.sim.expert import Labeller
from a2c2_ros.training.assembling import assemble
from a2c2_ros.training.episodes import FEATURES, Frames, part_path, record_blocks, save_part, wanted_parts
from a2c2_ros.training.joining import save_executed, save_record

SEED_STREAM = 1_000_003
"""Keeps the seeds of the placements apart from those of the demonstrations."""
SETTINGS = ("execution_horizon", "inference_delay", "seed", "max_steps")


class _Remembering:
    """A policy that keeps what it returned."""

    def __init__(self, policy: ChunkPolicy) -> None:
        self._policy = policy
        self.policy_id = policy.policy_id
        self.outputs: list[PolicyOutput] = []

    def predict(
        self,
        observation: Mapping[str, np.ndarray],
        instruction: str,
        *,
        seed: int,
        continuation: Continuation | None = None,
    ) -> PolicyOutput:
        self.outputs.append(self._policy.predict(observation, instruction, seed=seed, continuation=continuation))
        return self.outputs[-1]


class _NoLabelError(Exception):
    """The expert has nothing more to say."""


def visit(
    env,
    robot: Robot,
    policy: ChunkPolicy,
    loop: CorrectionLoop,
    config: PlannerConfig,
    seed: int,
    max_steps: int = conventions.MAX_STEPS,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], bool]:
    """One episode of the loop from a sampled placement, labelled.

    Args:
        env: A ``LiberoEnv``.
        robot: Its profile.
        policy: Base policy.
        loop: With the head, if one is to be executed.
        config: Of the planner.
        seed: Of the placement and the fixtures.
        max_steps: Step limit.

    Returns:
        Arrays by feature name with the time first, as of ``demonstrations.demonstrate``; ``chunk`` (T,) int64 (row, -1:
        none), ``slot`` (T,) int64 (-1: none), ``actions`` (C, H, A) and ``latents`` (C, Z) float32 of the base chunks;
        and whether the task was solved.

    Raises:
        SimulationError: If the loop has no command for a step.
    """
    remembering = _Remembering(policy)
    frames = Frames()
    chunk: list[int] = []
    slot: list[int] = []
    labeller: Labeller | None = None

    def record(step: ControlStep, observation: Mapping[str, np.ndarray]) -> None:
        nonlocal labeller
        if step.command is None:
            return
        labeller = labeller or Labeller(env)
        label = labeller.label(observation)
        if label is None:
            raise _NoLabelError
        frames.add(env, observation, label, step.command)
        chunk.append(step.chunk_id - 1)
        slot.append(step.slot)

    try:
        solved = run_episode(
            env,
            robot,
            remembering,
            loop,
            config,
            initial_state=None,
            seed=seed,
            max_steps=max_steps,
            on_step=record,
        ).success
    except _NoLabelError:
        solved = False
    base = {
        "chunk": np.array(chunk, dtype=np.int64),
        "slot": np.array(slot, dtype=np.int64),
        "actions": np.stack([output.actions for output in remembering.outputs]),
        "latents": np.stack([output.latent for output in remembering.outputs]),
    }
    return frames.arrays(), base, solved


def run_block(args: argparse.Namespace, task: int, first: int, last: int) -> None:
    """Record the missing episodes ``first`` to ``last - 1`` of a task."""
    from a2c2_ros.heads.onnx_head import OnnxHead
    from a2c2_ros.policies.base import PolicyOptions
    from a2c2_ros.policies.registry import load_policy
    from a2c2_ros.sim.libero_env import LiberoEnv

    robot = load_profile("libero").robot
    policy = load_policy("flow", args.policy, PolicyOptions(threads=1))
    head = OnnxHead(model_path(args.head)) if args.head else None
    loop = CorrectionLoop(ControllerConfig(correction__enabled=head is not None, lockstep=True), robot, head)
    with LiberoEnv(task) as env:
        for episode in range(first, last):
            path = part_path(args.out, task, episode)
            if path.exists():
                continue
            seed = int(np.random.SeedSequence((SEED_STREAM, args.seed, task, episode)).generate_state(1)[0])
            config = planner_config(args, policy.horizon, seed >> 1)  # the planner's seeds have 31 bits
            frames, base, solved = visit(env, robot, policy, loop, config, seed, args.max_steps)
            base = {f"executed.{name}": values for name, values in base.items()}
            save_part(path, instruction=env.instruction, solved=solved, **frames, **base)


def planner_config(args: argparse.Namespace, horizon: int, seed: int = 0) -> PlannerConfig:
    """The planner's parameters; raises ConfigError if e, d and H do not go together."""
    return PlannerConfig(
        policy_path=args.policy,
        horizon=horizon,
        execution_horizon=args.execution_horizon,
        inference_delay=args.inference_delay,
        seed=seed,
        lockstep=True,
    )


def settings_of(args: argparse.Namespace) -> dict[str, object]:
    """What identifies a run: the options and the very weights."""
    config = json.loads((model_path(args.policy) / "config.json").read_text(encoding="utf-8"))
    planner_config(args, config["horizon"])
    head = provenance.sha256_of(model_path(args.head)) if args.head else None
    return {name: getattr(args, name) for name in SETTINGS} | {"policy_id": config["policy_id"], "head_sha256": head}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m a2c2_ros.training.on_policy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--out", type=Path, required=True, help="folder of the data set; must not exist, but its parts may")
    p.add_argument("--policy", default=PlannerConfig().policy_path, help="checkpoint folder of the base policy")
    p.add_argument("--head", help="ONNX head that is executed; without it the base chunks are executed as they are")
    p.add_argument("--execution-horizon", type=int, default=40, help="execution horizon e [steps] (default 40)")
    p.add_argument("--inference-delay", type=int, default=10, help="injected inference delay d [steps] (default 10)")
    p.add_argument("--tasks", default="0-9", help="task numbers, e.g. 0-3,7 (default 0-9)")
    p.add_argument("--episodes-per-task", type=int, default=20, help="episodes of each task (default 20)")
    p.add_argument("--workers", type=int, default=2, help="simulators that run at the same time (default 2)")
    p.add_argument("--seed", type=int, default=0, help="seed of placements and policy noise (default 0)")
    p.add_argument(
        "--max-steps", type=int, default=conventions.MAX_STEPS, help=f"step limit (default {conventions.MAX_STEPS})"
    )
    p.add_argument("--block", type=int, nargs=3, metavar=("TASK", "FIRST", "LAST"), help=argparse.SUPPRESS)
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    if args.block:
        run_block(args, *args.block)
        return 0
    interrupt_on_termination()
    if not 1 <= args.max_steps <= conventions.MAX_STEPS:
        raise ConfigError(f"--max-steps is {args.max_steps}, allowed is 1 to {conventions.MAX_STEPS}")
    settings = settings_of(args)
    wanted = wanted_parts(args)
    check_settings(wanted[0].parent / "settings.json", settings)
    record_blocks("a2c2_ros.training.on_policy", argv, args, wanted, "on-policy episodes")
    staging = args.out.with_name(args.out.name + ".staging")
    assemble(staging, wanted, FEATURES)
    save_executed(staging, wanted, settings["policy_id"])
    save_record(staging, wanted, settings)
    staging.rename(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
