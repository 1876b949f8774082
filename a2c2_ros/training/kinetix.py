"""Expert, demonstrations, base policy and correction head of a Kinetix level.

Every step that is done is kept: a call after a kill goes on with the one that was cut short, an expert or the recording
from its beginning. Departures from the paper's appendix A.1 are in the records (``training.json``) of policy and head.
"""

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from tqdm import tqdm

from a2c2_ros import provenance
from a2c2_ros.core.errors import A2C2Error
from a2c2_ros.heads.base import load_head, manifest_of
from a2c2_ros.heads.export import export
from a2c2_ros.heads.samples import dataset_samples
from a2c2_ros.policies.flow import load_network
from a2c2_ros.settings import check_settings
from a2c2_ros.sim.kinetix_env import ACTION_SPACE, CONTROL_RATE_HZ, KinetixEnv
from a2c2_ros.sim.kinetix_level import load_level
from a2c2_ros.training.assembling import assemble
from a2c2_ros.training.cache_chunks import cache_chunks
from a2c2_ros.training.dataset import Augmentation, load_demonstrations
from a2c2_ros.training.joining import load_base
from a2c2_ros.training.kinetix_budget import Budget
from a2c2_ros.training.kinetix_expert import Expert, ExpertConfig, Rollouts, load_expert, train_expert
from a2c2_ros.training.loop import LoopConfig
from a2c2_ros.training.train_head import HeadRecipe, make_head, train_head
from a2c2_ros.training.train_policy import PREFIX_SHARE, config_of, train_policy

HORIZON = 8
PROFILE_FILE = "robot.yaml"
HOLDOUT = 0.05
MOST_ATTEMPTS = 10
"""Steps of demonstrations that are tried for one that is kept."""
PREFIX_SLOTS = 4
"""Longest delay of the grid."""
TEMPERATURES = (1.0,)
"""Of the flow's noise: a lower one would make the policy a regression, which has no modes to switch between."""
LEAST_SUCCESS = 0.5
"""Of an expert without exploration."""
DATA_SEED = 1_000_000
"""Of the demonstrations; the experts' training has the seeds below, the evaluation those above twice this."""


@dataclass(frozen=True)
class Trained:
    """Where a level's policy and head are."""

    policy: Path
    head: Path  # folder with head.safetensors and head.onnx


def train_level(path: Path, out: Path, budget: Budget, seed: int = 0, device: str = "cpu", workers: int = 1) -> Trained:
    """Make everything that is missing for a level.

    Args:
        path: Level file.
        out: Folder of the level.
        budget: How much.
        seed: Of all.
        device: torch device.
        workers: Threads of the trainings.

    Raises:
        ConfigError: If the level cannot be read, or the folder is of another budget.
        A2C2Error: If the expert is not good enough to learn from.
    """
    out.mkdir(parents=True, exist_ok=True)
    training = {name: value for name, value in dataclasses.asdict(budget).items() if name != "rollouts"}
    level = load_level(path)
    config = ExpertConfig(steps=budget.expert_steps, envs=budget.envs, seed=seed)
    origin = {"level": path.stem, "level_sha256": provenance.sha256_of(path), "expert": dataclasses.asdict(config)}
    check_settings(out / "settings.json", {**origin, "seed": seed, **training})
    env = KinetixEnv(level, distance_reward=config.distance_reward)
    experts = [out / f"expert{number}" for number in range(budget.experts)]
    for number, folder in enumerate(experts):
        if not (folder / "expert.json").exists():
            train_expert(env, dataclasses.replace(config, seed=seed + number), folder, device)
    data_root = out / "data"
    if not data_root.exists():
        actors = [load_expert(folder, env) for folder in experts]
        for actor, folder in zip(actors, experts, strict=True):
            check_expert(env, actor, folder, budget.envs, DATA_SEED + seed)
        record(env, actors, data_root, budget.data_steps, budget.envs, DATA_SEED + seed)
    trained = _train(data_root, out, budget, seed, device, workers)
    write_profile(env, out / PROFILE_FILE)  # last: where it is, a level can be run
    return trained


def trained_in(out: Path) -> Trained:
    """Where policy and head of a level's folder are or will be."""
    return Trained(out / f"flow_{out.name}", out / f"mlp_{out.name}")


def write_profile(env: KinetixEnv, path: Path) -> None:
    """The robot profile of a level, see ``config/robots/mock.yaml``."""
    profile = {
        "name": f"kinetix_{env.name}",
        "simulated": True,
        "joint_states": {"topic": "joint_states", "names": list(env.state_names)},
        "state": "joint_position",
        "action": {"space": ACTION_SPACE, "names": list(env.action_names)},
        "rates": {"control_rate_hz": CONTROL_RATE_HZ},
        "command": {"topic": "joint_command", "kind": "joint_state"},
        "limits": {"lower": env.action_low.tolist(), "upper": [1.0] * len(env.action_names)},
        "hold": {"kind": "delta"},
        "max_age_s": {"joint_states": 0.1},
    }
    path.write_text(yaml.safe_dump(profile, sort_keys=False), encoding="utf-8")


def record(env: KinetixEnv, experts: Sequence[Expert], root: Path, steps: int, count: int, seed: int) -> None:
    """Write episodes that experts solved as a LeRobotDataset v3, at least so many steps.

    The label is what was executed, drawn from the expert's distribution. With the distribution's mean in its place, a
    policy could read from the actions before where the noise had led, and real-time chunking, which gives it actions
    that something else decided, would mislead it. The world's noise is added behind the label and is not in it.

    Args:
        env: Of the level.
        experts: Each acts in its share of the environments.
        root: Folder; it appears when it is complete.
        steps: How many.
        count: Environments at a time.
        seed: Of the draws.

    Raises:
        A2C2Error: If the experts solve too little.
    """
    import datasets

    datasets.disable_progress_bars()  # one per episode would hide ours
    rollouts, generator = Rollouts(env, count, seed), torch.Generator().manual_seed(seed)
    owner = np.arange(count) % len(experts)
    states, actions = [[] for _ in range(count)], [[] for _ in range(count)]
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        parts: list[Path] = []
        with tqdm(total=steps, unit="step", unit_scale=True, desc=f"demonstrations {env.name}") as bar:
            taken = 0
            while bar.n < steps:
                state = rollouts.state
                drawn = np.zeros((count, len(env.action_names)), dtype=np.float32)
                for number, expert in enumerate(experts):
                    mine = owner == number
                    mean = expert.mean(torch.tensor(state[mine]))
                    raw = mean + expert.std * torch.randn(mean.shape, generator=generator)
                    drawn[mine] = expert.squash(raw).numpy()
                stepped = rollouts.step(drawn)
                taken += count
                if taken > MOST_ATTEMPTS * max(steps, count * env.max_steps):
                    raise A2C2Error(f"{env.name}: {len(parts)} episodes solved in {taken} steps: train longer")
                for row in range(count):
                    states[row].append(state[row])
                    actions[row].append(drawn[row])
                    if not stepped.ended[row]:
                        continue
                    if stepped.solved[row]:
                        parts.append(Path(folder) / f"part{len(parts):06d}.npz")
                        _save(parts[-1], env.name, states[row], actions[row])
                        bar.update(len(states[row]))
                    states[row], actions[row] = [], []
        assemble(root, parts, features_of(env), CONTROL_RATE_HZ, "kinetix")


def features_of(env: KinetixEnv) -> dict[str, dict[str, object]]:
    """Of a level's data set, as LeRobot describes them."""
    names = {"observation.state": env.state_names, "action": env.action_names}
    return {key: {"dtype": "float32", "shape": (len(n),), "names": list(n)} for key, n in names.items()}


def _save(path: Path, instruction: str, states: list[np.ndarray], actions: list[np.ndarray]) -> None:
    np.savez(path, **{"instruction": instruction, "observation.state": np.stack(states), "action": np.stack(actions)})


def _departures(budget: Budget, steps: int, paper_epochs: int, frames: int, subject: Sequence[str]) -> list[str]:
    """From the paper's appendix A.1, in words."""
    found = [
        f"{budget.experts} expert(s) of at most {budget.expert_steps} steps, rewarded for coming nearer, too, instead "
        "of 8 of 64000000 of which the weak ones are left out.",
        f"{frames} steps of solved episodes instead of 1000000.",
        "The state of the moving bodies instead of Kinetix's whole observation.",
        f"{steps} steps of {budget.batch_size} instead of {paper_epochs} epochs of 1000000 in batches of 512.",
    ]
    return [*found, *subject]


def _train(data_root: Path, out: Path, budget: Budget, seed: int, device: str, workers: int) -> Trained:
    found = trained_in(out)
    if (found.head / "head.onnx").exists():
        return found
    data = load_demonstrations(data_root)
    shared = {"schedule": "constant", "batch_size": budget.batch_size, "seed": seed, "device": device}
    shared |= {"workers": workers, "bfloat16": False, "average_decay": 0.0}
    frames = len(data.action)
    unchanged = Augmentation(state_noise=0.0)  # a simulator's state has no noise
    if not (found.policy / "training.json").exists():
        config = config_of(
            data,
            ACTION_SPACE,
            horizon=HORIZON,
            width=budget.width,
            latent_dim=budget.width,
            decoder_width=budget.width,
            prefix_slots=PREFIX_SLOTS,
        )
        loop = LoopConfig(
            learning_rate=3e-4,
            weight_decay=1e-2,
            gradient_norm=10.0,
            warmup_steps=1000,
            steps=budget.policy_steps,
            **shared,
        )
        network = f"A residual perceptron of {budget.width} units that predicts the clean chunk."
        prefixes = f"{PREFIX_SHARE:.0%} of the draws go on from a clean prefix, for training-time real-time chunking."
        described = _departures(budget, budget.policy_steps, 32, frames, [network, prefixes])
        train_policy(data, config, loop, found.policy, HOLDOUT, unchanged, TEMPERATURES, described)
    network = load_network(found.policy).to(device)
    cache_chunks(data, network, data_root, views=1, seed=seed, workers=workers, batch=1024)
    if not (found.head / "training.json").exists():
        torch.manual_seed(seed)
        head = make_head("mlp", network, data.data_hash, latent_dim=0, language_dim=0)
        loop = LoopConfig(
            learning_rate=1e-4,
            weight_decay=1e-3,
            gradient_norm=5.0,
            warmup_steps=500,
            steps=budget.head_steps,
            **shared,
        )
        chunks = load_base(data_root, data, network.config.policy_id)
        recipe = HeadRecipe(draws=1, loss_unit="action")
        described = _departures(budget, budget.head_steps, 16, frames, [])
        train_head(data, chunks, head, loop, found.head, HOLDOUT, recipe, unchanged, described=described)
    head = load_head(found.head / "head.safetensors")
    export(head, dataset_samples(manifest_of(head), data_root, 64), found.head / "head.onnx", force=True)
    return found


def check_expert(env: KinetixEnv, expert: Expert, folder: Path, rollouts: int, seed: int) -> None:
    """Refuse an expert that succeeds by its exploration alone: a head learns the mean of what the expert does.

    Raises:
        A2C2Error: If under half of the episodes are solved without exploration.
    """
    solved, _ = expert_success(env, expert, rollouts, seed)
    if solved < LEAST_SUCCESS * rollouts:
        raise A2C2Error(
            f"{env.name}: without exploration the expert in {folder} solves {solved} of {rollouts} episodes, allowed "
            f"are {LEAST_SUCCESS:.0%} or more; remove it and train longer, or with another --seed"
        )


def expert_success(env: KinetixEnv, expert: Expert, rollouts: int, seed: int) -> tuple[int, float]:
    """Successes of an expert without exploration, and environment steps per second."""
    batch, state = env.reset(rollouts)
    over, solved = np.zeros(rollouts, dtype=bool), np.zeros(rollouts, dtype=bool)
    step = 0
    while not over.all():
        with torch.inference_mode():
            action = expert.squash(expert.mean(torch.tensor(state))).numpy()
        stepped = env.step(batch, action, (seed, step))
        batch, state, step = stepped.batch, stepped.state, step + 1
        if step == 1:
            begun = time.perf_counter()  # the first one compiles
        solved |= stepped.solved & ~over
        over |= stepped.ended
    return int(solved.sum()), (step - 1) * rollouts / (time.perf_counter() - begun)
