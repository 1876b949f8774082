"""Cache the base policy's chunk and latent for every frame of a data set (paper equation 7).

``python -m a2c2_ros.training.cache_chunks --data DIR --policy DIR`` writes ``DIR/chunks/<policy id>/``. The first view
is the frame as it is, the others are augmented: the base policy fits its training frames better than it fits new ones,
and a head trained on the first view alone would see too small errors.
"""

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from a2c2_ros.core.errors import ConfigError
from a2c2_ros.policies.flow import FlowNetwork, load_network
from a2c2_ros.training.dataset import Augmentation, Demonstrations, load_demonstrations, observations
from a2c2_ros.training.train_policy import language_table

BLOCK_FRAMES = 1024
BATCH_FRAMES = 64


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True, help="LeRobotDataset")
    p.add_argument("--policy", type=Path, required=True, help="policy folder")
    p.add_argument("--views", type=int, default=3, help="one clean, the others augmented (default 3)")
    p.add_argument("--seed", type=int, default=0, help="of the augmentation and the sampling noise (default 0)")
    p.add_argument("--device", default="cpu", help="torch device (default cpu)")
    p.add_argument("--workers", type=int, default=1, help="threads, one core each (default 1)")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = parser().parse_args(argv)
    network = load_network(arguments.policy).to(arguments.device)
    data = load_demonstrations(arguments.data, network.config.cameras)
    print(cache_chunks(data, network, arguments.data, arguments.views, arguments.seed, arguments.workers))


def cache_chunks(
    data: Demonstrations, network: FlowNetwork, root: Path, views: int, seed: int = 0, workers: int = 1
) -> Path:
    """Compute the missing parts of the cache; a kill loses at most one part.

    Returns:
        The cache's folder.

    Raises:
        ConfigError: If the folder was made from other data, views or seed.
    """
    folder = root / "chunks" / network.config.policy_id
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"data_hash": data.data_hash, "frames": len(data), "views": views, "seed": seed}
    description = folder / "cache.json"
    if description.exists() and (old := json.loads(description.read_text())) != facts:
        raise ConfigError(f"{folder} holds chunks of {old}, asked for are {facts}: remove the folder")
    description.write_text(json.dumps(facts, indent=1) + "\n")
    language = language_table(data)
    blocks = [(view, first) for view in range(views) for first in range(0, len(data), BLOCK_FRAMES)]
    if workers > 1:
        torch.set_num_threads(1)

    def compute(block: tuple[int, int]) -> None:
        view, first = block
        path = _block_path(folder, view, first)
        if path.exists():
            return
        indices = np.arange(first, min(first + BLOCK_FRAMES, len(data)))
        actions, latent = _infer(
            data, network, indices, language, Augmentation() if view else None, (seed, view, first)
        )
        partial = path.with_suffix(".partial.npz")
        np.savez(partial, actions=actions, latent=latent)
        partial.rename(path)

    with ThreadPoolExecutor(workers) as pool:
        for _ in tqdm(pool.map(compute, blocks), total=len(blocks), desc="base chunks", unit="block"):
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
    description = folder / "cache.json"
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


def _block_path(folder: Path, view: int, first: int) -> Path:
    return folder / f"view{view}_{first:07d}.npz"


@torch.inference_mode()
def _infer(
    data: Demonstrations,
    network: FlowNetwork,
    indices: np.ndarray,
    language: torch.Tensor,
    augmentation: Augmentation | None,
    seed: tuple[int, ...],
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    device = network.action_std.device
    actions, latents = [], []
    for part in np.array_split(indices, -(-len(indices) // BATCH_FRAMES)):
        images, state = observations(data, part, augmentation, rng)
        tensors = {name: torch.tensor(array, device=device) for name, array in images.items()}
        latent = network.encode(tensors, torch.tensor(state, device=device), language[data.task[part]].to(device))
        noise = rng.standard_normal((len(part), network.decoder.output.out_features), dtype=np.float32)
        actions.append(network.sample(latent, torch.tensor(noise, device=device)).cpu().numpy())
        latents.append(latent.cpu().numpy())
    return np.concatenate(actions), np.concatenate(latents)


if __name__ == "__main__":
    main()
