"""Demonstrations, base policy and correction head of the reaching task, for two arms at once, and what they reach.

One command makes all of it on a CPU in some minutes: ``python -m a2c2_ros.training.reach``. The policy sees the state
only: where the gripper is relative to the origin of the robot's profile. What exists is kept: remove it to make it
anew.
"""

import argparse
import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from a2c2_ros import provenance
from a2c2_ros.commands import command
from a2c2_ros.core.config import ControllerConfig, PlannerConfig
from a2c2_ros.core.controller import CorrectionLoop
from a2c2_ros.core.errors import ConfigError
from a2c2_ros.drivers.profile import Profile, load_profile
from a2c2_ros.evaluation.rollout import run_episode
from a2c2_ros.evaluation.statistics import difference, wilson_interval
from a2c2_ros.heads.base import manifest_of
from a2c2_ros.heads.export import export
from a2c2_ros.heads.onnx_head import OnnxHead
from a2c2_ros.heads.samples import dataset_samples
from a2c2_ros.policies.flow import CONFIG_FILE, WEIGHTS_FILE, FlowPolicy, load_network
from a2c2_ros.sim.arms import Arm, arm_of
from a2c2_ros.sim.reach import INSTRUCTIONS, MAX_STEPS, TARGETS, ReachEnv, expert_action
from a2c2_ros.training.assembling import assemble, features_of
from a2c2_ros.training.cache_chunks import cache_chunks
from a2c2_ros.training.dataset import load_demonstrations
from a2c2_ros.training.joining import load_base
from a2c2_ros.training.loop import LoopConfig
from a2c2_ros.training.train_head import make_head, train_head
from a2c2_ros.training.train_policy import config_of, train_policy

ROBOTS = ("panda_servo", "so101_servo")
POLICY, HEAD = "flow_reach", "mlp_reach"
HOLDOUT = 0.1
STEPS = 100
"""Of a demonstration: the way to the corner, and what a chunk that begins there has to do."""
WANDER_STEPS = 30
"""Before a demonstration the arm goes to where it begins."""
START_RANGE_M = (0.06, 0.09, 0.06)
LATENCIES_S = (0.0, 0.08)
NOISE_RAD = 0.0005
PUSH_SPEEDS_M_S = (0.0, 0.25)
SIZES = {"width": 64, "latent_dim": 32, "decoder_width": 96, "decoder_blocks": 2}
HEAD_HIDDEN = 128
PAIRS = ((10, 0), (40, 10))
"""(e, d) of the evaluation [steps]."""
LATENCY_S = 0.04


def make_env(profile: Profile, latency_s: float, push_speed_m_s: float) -> ReachEnv:
    """The task on the simulated arm of a profile.

    Raises:
        ConfigError: If there is no such arm, or the profile is not one that takes twists.
    """
    if profile.command_kind != "twist_stamped" or profile.ee_pose_topic is None:
        raise ConfigError(f"profile {profile.robot.name} has no twist_stamped command or no ee_pose: it cannot reach")

    def drive(arm: Arm, action: np.ndarray) -> None:
        arm.twist(profile.command.mapping.to_driver(action))
        if profile.gripper is not None:
            arm.grip(profile.gripper.mapping.to_driver(action[profile.gripper.mapping.channel]))

    name = arm_of(profile.joint_names)
    return ReachEnv(
        lambda seed: Arm(name, latency_s=latency_s, noise_rad=NOISE_RAD, seed=seed),
        profile.joint_streams,
        profile.robot.state_of,
        drive,
        round(1e9 / profile.control_rate_hz),
        push_speed_m_s,
    )


def demonstrate(profile: Profile, target: int, seed: int) -> dict[str, np.ndarray]:
    """One demonstration from a place in the workspace that the seed draws, as arrays by feature with the time first."""
    rng = np.random.default_rng(seed)
    env = make_env(profile, rng.uniform(*LATENCIES_S), rng.choice(PUSH_SPEEDS_M_S))
    values = env.reset(target, seed)
    start = rng.uniform(-1.0, 1.0, 3) * START_RANGE_M
    opening = rng.uniform(-1.0, 1.0)  # the gripper may be anywhere: it does not matter here
    rows: dict[str, list[np.ndarray]] = {"observation.state": [], "action": [], "action.executed": []}
    for step in range(-WANDER_STEPS, STEPS):
        state = profile.robot.state_of(values)
        action = expert_action(state, TARGETS[env.instruction] if step >= 0 else start)
        executed = np.append(action[:6], opening) if step < 0 else action
        values, _ = env.step(executed)
        if step >= 0:
            rows["observation.state"].append(state)
            rows["action"].append(action)
            # Whatever it was that a push did: what happened was not the expert's action alone.
            rows["action.executed"].append(action + env.arm.pushed)
    return {name: np.stack(values).astype(np.float32) for name, values in rows.items()}


def record(root: Path, robots: Sequence[str], episodes: int, seed: int) -> None:
    """Write the demonstrations as a LeRobotDataset v3; it appears only when it is complete.

    Args:
        root: Folder.
        robots: Names of profiles.
        episodes: Per robot and target.
        seed: Of starts, latencies and pushes.
    """
    import datasets

    datasets.disable_progress_bars()  # one per episode would hide ours
    profiles = [load_profile(robot) for robot in robots]
    jobs = [(p, t, n) for n in range(episodes) for t in range(len(INSTRUCTIONS)) for p in range(len(profiles))]
    with tempfile.TemporaryDirectory() as folder:
        parts = []
        for robot, target, number in tqdm(jobs, unit="episode", desc="demonstrations"):
            episode_seed = int(np.random.SeedSequence((seed, robot, target, number)).generate_state(1)[0])
            rows = demonstrate(profiles[robot], target, episode_seed)
            parts.append(Path(folder) / f"part{len(parts):06d}.npz")
            np.savez(parts[-1], instruction=INSTRUCTIONS[target], **rows)
        features = {name: feature for name, feature in features_of(profiles[0].robot).items() if name in rows}
        assemble(root, parts, features, round(profiles[0].control_rate_hz), "reach")


def train_all(data_root: Path, work: Path, steps: int, seed: int) -> None:
    """Train policy and head with the trainers of every other policy and head, export the head with parity."""
    data = load_demonstrations(data_root)
    loop = LoopConfig(learning_rate=1e-3, schedule="cosine", weight_decay=1e-4, steps=steps, seed=seed, bfloat16=False)
    if not (work / POLICY / CONFIG_FILE).exists():
        config = config_of(data, load_profile(ROBOTS[0]).robot.action_space, **SIZES)
        train_policy(data, config, loop, work / POLICY, HOLDOUT)
    if not (work / HEAD / "head.onnx").exists():
        network = load_network(work / POLICY)
        cache_chunks(data, network, data_root, views=2, seed=seed)
        torch.manual_seed(seed)
        head = make_head("mlp", network, data.data_hash, hidden=HEAD_HIDDEN)
        chunks = load_base(data_root, data, network.config.policy_id)
        head = train_head(data, chunks, head, loop, work / HEAD, HOLDOUT)
        export(head, dataset_samples(manifest_of(head), data_root, 64), work / HEAD / "head.onnx", force=True)


def ship(work: Path, out: Path) -> None:
    """Copy what runs, and how it was made, without checkpoints."""
    shipped = {POLICY: (CONFIG_FILE, WEIGHTS_FILE, "training.json"), HEAD: ("head.onnx", "training.json")}
    for folder, files in shipped.items():
        (out / folder).mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copyfile(work / folder / file, out / folder / file)


def evaluate(models: Path, robots: Sequence[str], episodes: int, seed: int) -> dict[str, object]:
    """Success of the policy alone and with the head, in the control loop of the nodes, one episode after the other.

    Returns:
        What belongs into the result file.
    """
    policy = FlowPolicy(models / POLICY)
    head_path = models / HEAD / "head.onnx"
    cells = []
    todo = [(r, p, pair) for r in robots for p in PUSH_SPEEDS_M_S for pair in PAIRS]
    with tqdm(total=2 * episodes * len(todo), unit="episode", desc="evaluation") as bar:
        for name, push, (e, d) in todo:
            profile = load_profile(name)
            outcomes = {}
            for method in ("naive", "a2c2"):
                corrected = method == "a2c2"
                rate_hz = profile.control_rate_hz
                controller = ControllerConfig(
                    robot=name,
                    control_rate_hz=rate_hz,
                    lockstep=True,
                    correction__enabled=corrected,
                    start_state="enabled",
                )
                loop = CorrectionLoop(controller, profile.robot, OnnxHead(head_path) if corrected else None)
                planner = PlannerConfig(
                    robot=name,
                    horizon=policy.horizon,
                    execution_horizon=e,
                    inference_delay=d,
                    control_rate_hz=rate_hz,
                    seed=seed,
                )
                results = []
                for number in range(episodes):
                    env = make_env(profile, LATENCY_S, push)
                    results.append(
                        run_episode(
                            env,
                            profile.robot,
                            policy,
                            loop,
                            planner,
                            initial_state=number,
                            seed=seed + number,
                            max_steps=MAX_STEPS,
                        )
                    )
                    bar.update()
                successes = sum(result.success for result in results)
                outcomes[method] = {(0, number): result.success for number, result in enumerate(results)}
                cells.append(
                    {
                        "robot": name,
                        "method": method,
                        "execution_horizon": e,
                        "inference_delay": d,
                        "push_speed_m_s": push,
                        "successes": successes,
                        "episodes": episodes,
                        "wilson_95": wilson_interval(successes, episodes),
                        "steps": [result.steps for result in results],
                        "success": [result.success for result in results],
                    }
                )
            compared = difference(outcomes["a2c2"], outcomes["naive"])
            cells[-1]["difference_to_naive"] = None if compared is None else dataclasses.asdict(compared)
    return {
        "task": "reach",
        "latency_s": LATENCY_S,
        "noise_rad": NOISE_RAD,
        "max_steps": MAX_STEPS,
        "seed": seed,
        "policy_id": policy.policy_id,
        "parity_max_abs_error": OnnxHead(head_path).manifest.parity_max_abs_error,
        "cells": cells,
        "machine": provenance.machine(),
        "versions": provenance.versions(),
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m a2c2_ros.training.reach",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--work", type=Path, default=Path("data/reach"), help="demonstrations and trainings")
    p.add_argument("--out", type=Path, default=Path("models/reach"), help="what ships")
    p.add_argument("--results", type=Path, default=Path("results/reach.json"), help="success rates")
    p.add_argument("--robots", nargs="+", default=list(ROBOTS), help="profiles of one action and state space")
    p.add_argument("--demonstrations", type=int, default=16, help="per robot and target")
    p.add_argument("--steps", type=int, default=1500, help="of each training")
    p.add_argument("--episodes", type=int, default=32, help="per cell of the evaluation")
    p.add_argument("--seed", type=int, default=0, help="of all; the evaluation's episodes are none of training")
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(argv)
    data = args.work / "demonstrations"
    if not data.exists():
        args.work.mkdir(parents=True, exist_ok=True)
        record(data, args.robots, args.demonstrations, args.seed)
    train_all(data, args.work, args.steps, args.seed)
    ship(args.work, args.out)
    result = evaluate(args.out, args.robots, args.episodes, args.seed + 1_000_000)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for cell in result["cells"]:
        print(
            "{robot:12} {method:6} (e, d) = ({execution_horizon}, {inference_delay}) pushes {push_speed_m_s} m/s: "
            "{successes}/{episodes}".format(**cell)
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
