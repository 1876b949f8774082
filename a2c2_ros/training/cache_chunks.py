"""Cache the base policy's chunk and latent for every frame of a data set (paper equation 7).

``python -m a2c2_ros.training.cache_chunks --data DIR --kind KIND --policy PATH`` writes ``DIR/chunks/<policy id>/``,
which is all that ``training.train_head`` has to know of the policy. The first view is the frame as it is, the others
are augmented: the base policy fits its training frames better than it fits new ones, and a head trained on the first
view alone would see too small errors.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from a2c2_ros import provenance
from a2c2_ros.commands import command
from a2c2_ros.core.errors import ConfigError
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.policies.base import ChunkPolicy
from a2c2_ros.policies.flow import FlowConfig, FlowNetwork
from a2c2_ros.policies.registry import POLICIES, load_policy_for
from a2c2_ros.training.dataset import Augmentation, Demonstrations, load_demonstrations, observations
from a2c2_ros.training.train_policy import language_table

BLOCK_FRAMES = 1024
BATCH_FRAMES = 64
DESCRIPTION_FILE, LANGUAGE_FILE = "cache.json", "language.npz"

Inference = Callable[[Mapping[str, np.ndarray], np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, ...]]
"""Images per camera (B, ...), states (B, S), rows of the instructions (B,), generator of the noise -> chunks (B, H, A)
and latents (B, Z), both float32."""


@dataclass(frozen=True, kw_only=True)
class PolicyFacts:
    """What has to be known of a base policy to train a head for it; in ``cache.json``."""

    kind: str  # key of ``policies.registry.POLICIES``
    policy_id: str
    horizon: int
    action_names: tuple[str, ...]
    action_space: str
    cameras: tuple[str, ...]
    image_size: int  # side of the square images [pixels]
    latent_dim: int
    language_dim: int

    def __post_init__(self) -> None:
        for name in ("action_names", "cameras"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @classmethod
    def of(cls, policy: object, **given: str) -> "PolicyFacts":
        """Of a policy or its configuration: what is not given is its attribute of the same name."""
        names = {field.name for field in dataclasses.fields(cls)} - set(given)
        return cls(**given, **{name: getattr(policy, name) for name in names})

    def check(self, data: Demonstrations, actions: np.ndarray | None = None, latents: np.ndarray | None = None) -> None:
        """Compare the policy with a data set and, if given, with cached chunks (..., H, A) and latents (..., Z).

        Raises:
            ConfigError: If the data set has other actions or lacks a camera, or an image or chunk has another size.
        """
        if self.action_names != data.action_names:
            raise ConfigError(
                f"policy {self.policy_id} has the actions {list(self.action_names)}, the data set "
                f"{list(data.action_names)}: allowed are the same in the same order"
            )
        for camera in self.cameras:
            shape = data.frames[camera].shape[1:] if camera in data.frames else None
            if shape != (self.image_size, self.image_size, 3):
                raise ConfigError(
                    f"policy {self.policy_id} takes {self.image_size}x{self.image_size} images of {camera!r}, the data "
                    f"set has {shape}"
                )
        sizes = {"a horizon and actions": (actions, 2, (self.horizon, len(self.action_names)))}
        sizes["a latent"] = (latents, 1, (self.latent_dim,))
        for name, (array, axes, size) in sizes.items():
            if array is not None and array.shape[-axes:] != size:
                raise ConfigError(
                    f"policy {self.policy_id} has {name} of {size}, the cached chunks {array.shape[-axes:]}"
                )


def check_flow(config: FlowConfig, data: Demonstrations) -> None:
    """Compare what a flow policy was trained with and :class:`PolicyFacts` does not know with a data set.

    Raises:
        ConfigError: If the data set has another step, or other names or another order of the state.
    """
    rows = [(name, getattr(config, name), getattr(data, name)) for name in ("step_ns", "state_names")]
    if wrong := [f"{name}: policy {mine!r}, data set {theirs!r}" for name, mine, theirs in rows if mine != theirs]:
        raise ConfigError(f"policy {config.policy_id} does not fit the data set: " + "; ".join(wrong))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True, help="LeRobotDataset")
    p.add_argument("--kind", choices=sorted(POLICIES), default="flow", help="kind of policy (default flow)")
    p.add_argument("--policy", required=True, help="where the policy is, as the planner's policy_path")
    p.add_argument("--policy-config", default="", help="YAML file of the policy, as for the planner")
    p.add_argument("--robot", default="libero", help="profile of the robot of the data set (default libero)")
    p.add_argument("--views", type=int, default=3, help="one clean, the others augmented (default 3)")
    p.add_argument("--seed", type=int, default=0, help="of the augmentation and the sampling noise (default 0)")
    p.add_argument("--device", default="cpu", help="torch device (default cpu)")
    p.add_argument("--dtype", default="float32", help="arithmetic of the policy (default float32)")
    p.add_argument("--batch", type=int, default=BATCH_FRAMES, help=f"frames at once (default {BATCH_FRAMES})")
    p.add_argument("--workers", type=int, default=1, help="flow: threads, one core each (default 1)")
    return p


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = parser().parse_args(argv)
    profile = load_profile(arguments.robot)
    policy = load_policy_for(
        profile,
        arguments.kind,
        arguments.policy,
        arguments.policy_config,
        device=arguments.device,
        dtype=arguments.dtype,
    )
    data = load_demonstrations(arguments.data, policy.cameras)
    if arguments.kind == "flow":
        policy, facts = policy.network, None
    else:
        facts = PolicyFacts.of(policy, kind=arguments.kind, action_space=profile.robot.action_space)
    workers, batch = arguments.workers, arguments.batch
    print(cache_chunks(data, policy, arguments.data, arguments.views, arguments.seed, workers, batch, facts))


def cache_chunks(
    data: Demonstrations,
    policy: FlowNetwork | ChunkPolicy,
    root: Path,
    views: int,
    seed: int = 0,
    workers: int = 1,
    batch: int = BATCH_FRAMES,
    facts: PolicyFacts | None = None,
) -> Path:
    """Compute the missing parts of the cache; a kill loses at most one part.

    Args:
        data: Demonstrations with the policy's cameras.
        policy: The network of a flow policy, or any other policy: in batches if it has a ``predict_batch`` (see
            :class:`LeRobotPolicy`), else frame by frame.
        root: Folder of the data set.
        views: One clean, the others augmented.
        seed: Of the augmentation and the sampling noise.
        workers: Threads, flow networks only.
        batch: Frames at once; a policy that samples draws its noise per batch.
        facts: Of the policy, needed for all but a flow network, which tells them itself.

    Returns:
        The cache's folder.

    Raises:
        ConfigError: If the policy does not fit the data, the folder was made from other data, views or seed, or an
            option is out of range.
    """
    if views < 1 or batch < 1 or workers < 1:
        raise ConfigError(f"views is {views}, batch is {batch}, workers is {workers}, allowed are 1 or more")
    if isinstance(policy, FlowNetwork):
        check_flow(policy.config, data)
        facts = PolicyFacts.of(policy.config, kind="flow")
        states, infer = len(policy.config.state_names), _flow_inference(policy, language_table(data))
    else:
        states, infer = policy.state_dim, _policy_inference(policy, data.instructions)
        if workers > 1:
            raise ConfigError(f"workers is {workers}, a {facts.kind} policy allows 1: it takes batches")
    facts.check(data)
    if states != data.state.shape[1]:
        raise ConfigError(
            f"policy {facts.policy_id} takes a state of {states} values, the data set has {data.state_names}"
        )
    folder = root / "chunks" / facts.policy_id
    folder.mkdir(parents=True, exist_ok=True)
    _describe(folder, {"data_hash": data.data_hash, "frames": len(data), "views": views, "seed": seed}, facts)
    if facts.kind != "flow":  # whose instructions are embedded by the package
        embeddings = np.stack([policy.embed(text) for text in data.instructions])
        _save(folder / LANGUAGE_FILE, instructions=np.array(data.instructions), embeddings=embeddings)
    if workers > 1:
        torch.set_num_threads(1)

    def compute(block: tuple[int, int]) -> None:
        view, first = block
        path = _block_path(folder, view, first)
        indices = np.arange(first, min(first + BLOCK_FRAMES, len(data)))
        if path.exists():
            bar.update(len(indices))
            return
        rng, augmentation = np.random.default_rng((seed, view, first)), Augmentation() if view else None
        results = []
        for part in np.array_split(indices, -(-len(indices) // batch)):
            images, state = observations(data, part, augmentation, rng)
            results.append(infer(images, state, data.task[part], rng))
            bar.update(len(part))
        actions, latents = (np.concatenate(arrays) for arrays in zip(*results, strict=True))
        _save(path, actions=actions, latent=latents)

    blocks = [(view, first) for view in range(views) for first in range(0, len(data), BLOCK_FRAMES)]
    with (
        tqdm(total=views * len(data), desc="base chunks", unit="frame") as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        for _ in pool.map(compute, blocks):
            pass
    return folder


def load_chunks(folder: str | Path, data: Demonstrations) -> tuple[np.ndarray, np.ndarray]:
    """Read a complete cache.

    Returns:
        Actions (views, N, H, A) float32 in action units and latents (views, N, Z) float32.

    Raises:
        ConfigError: If the cache is absent, incomplete or of other data.
    """
    folder = Path(folder)
    description = folder / DESCRIPTION_FILE
    if not description.is_file():
        raise ConfigError(f"{folder} has no cached chunks: run a2c2_ros.training.cache_chunks")
    facts = json.loads(description.read_text())
    if facts["data_hash"] != data.data_hash:
        raise ConfigError(f"{folder} is of data {facts['data_hash'][:12]}, not of {data.data_hash[:12]}")
    actions, latents = [], []
    for view in range(facts["views"]):
        paths = [_block_path(folder, view, first) for first in range(0, len(data), BLOCK_FRAMES)]
        if missing := [path.name for path in paths if not path.exists()]:
            raise ConfigError(f"{folder} lacks {missing}: run a2c2_ros.training.cache_chunks again")
        blocks = []
        for path in paths:
            with np.load(path, allow_pickle=False) as file:
                blocks.append((file["actions"], file["latent"]))
        actions.append(np.concatenate([a for a, _ in blocks]))
        latents.append(np.concatenate([z for _, z in blocks]))
    return np.stack(actions), np.stack(latents)


def load_facts(folder: str | Path) -> PolicyFacts:
    """What a cache says of its policy.

    Raises:
        ConfigError: If it was made before caches said it.
    """
    told = json.loads((Path(folder) / DESCRIPTION_FILE).read_text())
    names = {field.name for field in dataclasses.fields(PolicyFacts)}
    if missing := sorted(names - set(told)):
        raise ConfigError(
            f"{folder} is of an older version and does not tell {missing} of its policy: run "
            f"a2c2_ros.training.cache_chunks again, which adds them, or name the flow policy's folder"
        )
    return PolicyFacts(**{name: told[name] for name in names})


def load_language(folder: str | Path) -> dict[str, np.ndarray]:
    """The policy's embedding (L,) float32 per instruction; empty for a flow policy, see :func:`language_rows`.

    Raises:
        ConfigError: If the policy is of another kind and its embeddings are missing.
    """
    path = Path(folder) / LANGUAGE_FILE
    if json.loads((path.parent / DESCRIPTION_FILE).read_text()).get("kind", "flow") == "flow":
        return {}
    if not path.is_file():
        raise ConfigError(f"{path} is missing: run a2c2_ros.training.cache_chunks again")
    return read_language(path)


def read_language(path: Path) -> dict[str, np.ndarray]:
    """Embedding (L,) float32 per instruction of a file; empty if there is none."""
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as file:
        return dict(zip(file["instructions"].tolist(), file["embeddings"], strict=True))


def language_rows(known: Mapping[str, np.ndarray], data: Demonstrations) -> Tensor:
    """Embeddings (tasks, L) float32 of a data set's instructions.

    Args:
        known: Of :func:`load_language`; empty for a policy that takes the package's embeddings.
        data: Demonstrations.

    Raises:
        ConfigError: If the policy's embedding of an instruction is not known.
    """
    if not known:
        return language_table(data)
    if missing := [text for text in data.instructions if text not in known]:
        raise ConfigError(f"no cache has the policy's embedding of {missing}: cache chunks of that data set, too")
    return torch.tensor(np.stack([known[text] for text in data.instructions]))


def _block_path(folder: Path, view: int, first: int) -> Path:
    return folder / f"view{view}_{first:07d}.npz"


def _describe(folder: Path, identity: Mapping[str, object], facts: PolicyFacts) -> None:
    """Write ``cache.json``, or compare with what is there; what an older version left out is added."""
    path = folder / DESCRIPTION_FILE
    told = json.loads(json.dumps({**identity, **dataclasses.asdict(facts)}))
    old = json.loads(path.read_text()) if path.exists() else {}
    differing = [name for name in told if old.get(name, told[name]) != told[name]]
    if wrong := [f"{name}: there {old[name]}, here {told[name]}" for name in differing]:
        raise ConfigError(f"{folder} holds other chunks ({'; '.join(wrong)}): remove the folder")
    if set(told) - set(old):
        record = {**told, "machine": provenance.machine(), "versions": provenance.versions()}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1) + "\n")
        partial.rename(path)


def _save(path: Path, **arrays: np.ndarray) -> None:
    """The file appears with its whole content."""
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **arrays)
    partial.rename(path)


def _flow_inference(network: FlowNetwork, language: Tensor) -> Inference:
    device = network.action_std.device

    @torch.inference_mode()
    def infer(
        images: Mapping[str, np.ndarray], state: np.ndarray, tasks: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        tensors = {name: torch.tensor(array, device=device) for name, array in images.items()}
        latent = network.encode(tensors, torch.tensor(state, device=device), language[tasks].to(device))
        noise = rng.standard_normal((len(state), network.decoder.output.out_features), dtype=np.float32)
        actions = network.sample(latent, torch.tensor(noise, device=device))
        return actions.cpu().numpy(), latent.cpu().numpy()

    return infer


def _policy_inference(policy: ChunkPolicy, instructions: Sequence[str]) -> Inference:
    def infer(
        images: Mapping[str, np.ndarray], state: np.ndarray, tasks: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        texts = [instructions[task] for task in tasks]
        if hasattr(policy, "predict_batch"):
            return policy.predict_batch(images, state, texts, seed=int(rng.integers(2**31)))
        outputs = [
            policy.predict(
                {name: array[i] for name, array in images.items()} | {"state": state[i]},
                text,
                seed=int(rng.integers(2**31)),
            )
            for i, text in enumerate(texts)
        ]
        return np.stack([output.actions for output in outputs]), np.stack([output.latent for output in outputs])

    return infer


if __name__ == "__main__":
    sys.exit(main())
