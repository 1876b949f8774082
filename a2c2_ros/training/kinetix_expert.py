"""Experts of Kinetix levels: proximal policy optimisation with noise on the mean (RPO, arXiv 2212.07536).

The paper's experts see four stacked frames and are rewarded by success alone, for 64 million steps. These see the
state, which has the velocities, and are told in addition how much nearer they came to the goal, which needs about one
million.
"""

import dataclasses
import json
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from a2c2_ros.core.errors import ConfigError, PolicyError
from a2c2_ros.sim.kinetix_env import KinetixEnv
from a2c2_ros.training.record import write_record

WEIGHTS_FILE, RECORD_FILE = "expert.safetensors", "expert.json"
LOG_STD_RANGE = (-5.0, 1.0)
MEAN_LIMIT = 5.0
"""Of the mean before it is squashed."""
WARM_UP_STEPS = 128
"""With random actions, for the scale of the state."""


@dataclass(frozen=True)
class ExpertConfig:
    """Hyper-parameters; those that are not of the search's size are of the paper's base code (arXiv 2506.07339)."""

    steps: int = 3_000_000  # of the environment, at most
    good_enough: float = 0.98  # success rate that ends the training when it lasts
    lasting_updates: int = 3
    envs: int = 256
    rollout: int = 128  # steps per update and environment
    minibatches: int = 8
    epochs: int = 4
    discount: float = 0.995
    trace: float = 0.9  # lambda of the generalised advantage estimate
    clip: float = 0.2
    value_weight: float = 0.5
    mean_noise: float = 0.3  # half width of RPO's uniform noise on the mean, before it is squashed
    width: int = 256
    gradient_norm: float = 1.0
    learning_rate: float = 5e-4
    distance_reward: float = 0.5  # [1/m]
    seed: int = 0


class Expert(nn.Module):
    """Actor and critic; the action is squashed to its range: tanh for motors, the logistic function for thrusters."""

    def __init__(self, states: int, low: np.ndarray, width: int) -> None:
        super().__init__()
        self.register_buffer("state_mean", torch.zeros(states))
        self.register_buffer("state_std", torch.ones(states))
        self.register_buffer("low", torch.tensor(low))
        self.actor = _perceptron(states, width, len(low), 0.01)
        self.critic = _perceptron(states, width, 1, 1.0)
        self.log_std = nn.Parameter(torch.zeros(len(low)))

    def mean(self, state: Tensor) -> Tensor:
        """(B, S) to (B, A), before it is squashed."""
        return self.actor(self._normalised(state)).clamp(-MEAN_LIMIT, MEAN_LIMIT)

    def value(self, state: Tensor) -> Tensor:
        """(B, S) to (B,)."""
        return self.critic(self._normalised(state))[:, 0]

    @property
    def std(self) -> Tensor:
        """(A,), before it is squashed."""
        return self.log_std.clamp(*LOG_STD_RANGE).exp()

    def squash(self, raw: Tensor) -> Tensor:
        """(B, A) to action units."""
        return torch.where(self.low < 0, raw.tanh(), raw.sigmoid())

    def _normalised(self, state: Tensor) -> Tensor:
        return (state - self.state_mean) / self.state_std


def _perceptron(inputs: int, width: int, outputs: int, gain: float) -> nn.Sequential:
    layers = nn.Sequential(
        nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, outputs)
    )
    for layer, scale in zip(layers[::2], (2**0.5, 2**0.5, gain), strict=True):
        nn.init.orthogonal_(layer.weight, scale)
        nn.init.zeros_(layer.bias)
    return layers


class Rollouts:
    """Environments that go on from update to update, each back at the start when its episode ends."""

    def __init__(self, env: KinetixEnv, count: int, seed: int) -> None:
        self._env, self._seed, self._number = env, seed, 0
        self._batch, self.state = env.reset(count)

    def step(self, action: np.ndarray):
        """Apply (N, A) actions; see :meth:`KinetixEnv.step`."""
        stepped = self._env.step(self._batch, action, (self._seed, self._number), restart=True)
        self._batch, self.state = stepped.batch, stepped.state
        self._number += 1
        return stepped


def train_expert(env: KinetixEnv, config: ExpertConfig, out: Path, device: str = "cpu") -> float:
    """Train until the expert is good enough or the steps are used up, and write it with its record.

    Args:
        env: With the distance reward of the configuration.
        config: Hyper-parameters.
        out: Folder; gets ``expert.safetensors`` and ``expert.json``.
        device: Of the network.

    Returns:
        Success rate of the newest ``envs`` episodes when the stored weights had acted, with the exploration's noise.
    """
    begun = time.perf_counter()
    torch.manual_seed(config.seed)
    expert = Expert(len(env.state_names), env.action_low, config.width)
    rollouts = Rollouts(env, config.envs, config.seed)
    _set_scale(expert, rollouts, np.random.default_rng(config.seed))
    expert.to(device)
    optimizer = torch.optim.Adam(expert.parameters(), lr=config.learning_rate, eps=1e-5)
    best, best_rate, lasting, history = {}, -1.0, 0, []
    newest: deque[bool] = deque(maxlen=config.envs)  # of the episodes of one update those that fail may be missing
    updates = -(-config.steps // (config.envs * config.rollout))
    with tqdm(
        total=updates * config.envs * config.rollout, unit="step", unit_scale=True, desc=f"expert {env.name}"
    ) as bar:
        for _ in range(updates):
            before = {name: value.clone() for name, value in expert.state_dict().items()}
            memory, solved = _collect(expert, rollouts, config, device)
            newest.extend(solved)
            rate = sum(newest) / config.envs
            if rate >= best_rate:
                best, best_rate = before, rate
            bar.update(config.envs * config.rollout)
            history.append({"steps": bar.n, "success_rate": rate})
            bar.set_postfix(success=f"{rate:.1%}", best=f"{best_rate:.1%}")
            lasting = lasting + 1 if rate >= config.good_enough else 0
            if lasting >= config.lasting_updates:
                break
            _update(expert, optimizer, memory, config)
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: value.cpu().contiguous() for name, value in best.items()}, out / WEIGHTS_FILE)
    write_record(
        out / RECORD_FILE,
        {
            "level": env.name,
            "state_names": env.state_names,
            "action_names": env.action_names,
            "hyper_parameters": config,
            "success_rate": best_rate,
            "steps": history[-1]["steps"],
            "seconds": time.perf_counter() - begun,
            "history": history,
        },
    )
    return best_rate


def load_expert(folder: Path, env: KinetixEnv) -> Expert:
    """Read what :func:`train_expert` wrote.

    Raises:
        ConfigError: If there is no expert.
        PolicyError: If it is of another state or action.
    """
    if not (folder / RECORD_FILE).is_file():
        raise ConfigError(f"{folder} has no expert: {RECORD_FILE} is missing")
    record: Mapping = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    for name in ("state_names", "action_names"):
        if tuple(record[name]) != getattr(env, name):
            raise PolicyError(f"{folder}: the expert has {name} {record[name]}, the level {list(getattr(env, name))}")
    expert = Expert(len(env.state_names), env.action_low, record["hyper_parameters"]["width"])
    expert.load_state_dict(load_file(folder / WEIGHTS_FILE))
    return expert.eval()


def _set_scale(expert: Expert, rollouts: Rollouts, rng: np.random.Generator) -> None:
    states = []
    low = expert.low.numpy()
    for _ in range(WARM_UP_STEPS):
        states.append(rollouts.state)
        rollouts.step(rng.uniform(low, 1.0, (len(rollouts.state), len(low))))
    seen = torch.tensor(np.concatenate(states))
    expert.state_mean.copy_(seen.mean(0))
    expert.state_std.copy_(seen.std(0).clamp(min=0.05))


@torch.no_grad()
def _collect(
    expert: Expert, rollouts: Rollouts, config: ExpertConfig, device: str
) -> tuple[dict[str, Tensor], list[bool]]:
    """One update's steps, and whether each episode that ended in it was solved."""
    rows: dict[str, list] = {name: [] for name in ("state", "raw", "log_prob", "value", "reward", "ended")}
    solved: list[bool] = []
    for _ in range(config.rollout):
        state = torch.tensor(rollouts.state, device=device)
        mean, std = expert.mean(state), expert.std
        raw = mean + std * torch.randn_like(mean)
        rows["state"].append(state)
        rows["raw"].append(raw)
        rows["log_prob"].append(_log_prob(raw, mean, std))
        rows["value"].append(expert.value(state))
        stepped = rollouts.step(expert.squash(raw).cpu().numpy())
        rows["reward"].append(torch.tensor(stepped.reward, device=device))
        rows["ended"].append(torch.tensor(stepped.ended, device=device))
        solved += stepped.solved[stepped.ended].tolist()
    memory = {name: torch.stack(values) for name, values in rows.items()}
    last = expert.value(torch.tensor(rollouts.state, device=device))
    memory["advantage"] = advantages(memory["reward"], memory["value"], memory["ended"], last, config)
    memory["return"] = memory["advantage"] + memory["value"]
    return memory, solved


def advantages(reward: Tensor, value: Tensor, ended: Tensor, last_value: Tensor, config: ExpertConfig) -> Tensor:
    """Generalised advantage estimate (arXiv 1506.02438), (T, N).

    Args:
        reward: (T, N) of the step.
        value: (T, N) of the state before it.
        ended: (T, N) bool, the episode ended with the step.
        last_value: (N,) of the state after the last step.
        config: Discount and trace.
    """
    result, running = torch.zeros_like(value), torch.zeros_like(last_value)
    following = last_value
    for t in range(len(reward) - 1, -1, -1):
        goes_on = (~ended[t]).float()
        error = reward[t] + config.discount * following * goes_on - value[t]
        running = error + config.discount * config.trace * goes_on * running
        result[t], following = running, value[t]
    return result


def _update(expert: Expert, optimizer: torch.optim.Optimizer, memory: dict[str, Tensor], config: ExpertConfig) -> None:
    rows = {name: values.flatten(0, 1) for name, values in memory.items()}
    count = len(rows["state"])
    for _ in range(config.epochs):
        for part in torch.randperm(count, device=rows["state"].device).chunk(config.minibatches):
            batch = {name: values[part] for name, values in rows.items()}
            mean = expert.mean(batch["state"])
            mean = mean + torch.empty_like(mean).uniform_(-config.mean_noise, config.mean_noise)
            ratio = (_log_prob(batch["raw"], mean, expert.std) - batch["log_prob"]).exp()
            gain = (batch["advantage"] - batch["advantage"].mean()) / (batch["advantage"].std() + 1e-8)
            actor = -torch.minimum(ratio * gain, ratio.clamp(1 - config.clip, 1 + config.clip) * gain).mean()
            critic = 0.5 * (expert.value(batch["state"]) - batch["return"]).square().mean()
            loss = actor + config.value_weight * critic
            if not torch.isfinite(loss):
                raise FloatingPointError(f"loss {loss.item()} of {dataclasses.asdict(config)}")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(expert.parameters(), config.gradient_norm)
            optimizer.step()


def _log_prob(raw: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Of independent normals, up to a constant; what squashing adds is the same for both sides of a ratio."""
    return -(((raw - mean) / std).square() / 2 + std.log()).sum(1)
