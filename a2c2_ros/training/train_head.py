"""Train the compact head on cached base chunks.

``python -m a2c2_ros.training.train_head --data DIR --policy DIR --out DIR``. Paper equation 8 and 9:
(o_{t+k}, Â_t[k], τ_k, z_t, l) -> a_{t+k} - Â_t[k], k uniform, mean squared error.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from a2c2_ros.core.errors import ConfigError
from a2c2_ros.core.features import time_feature
from a2c2_ros.heads.base import load_head, save_head
from a2c2_ros.heads.compact import CompactHead
from a2c2_ros.policies.flow import load_network
from a2c2_ros.training.cache_chunks import load_chunks
from a2c2_ros.training.dataset import Augmentation, Demonstrations, load_demonstrations, observations
from a2c2_ros.training.loop import LoopConfig, train
from a2c2_ros.training.record import fingerprint, plot_losses, write_record
from a2c2_ros.training.train_policy import SLOT_RANGE, VALIDATION_FRAMES, describe, language_table

DRAWS = 8  # slots per encoded observation: the encoder is most of the cost

DEPARTURES = (
    "Compact network, its encoder initialised from the base policy's, instead of ResNet-18 and a transformer.",
    "AdamW 5e-4 with a cosine schedule and a moving average of the weights, instead of 1e-5 constant; fewer steps.",
    "The error is in standard deviations of each action instead of action units.",
    "The frame t+k is drawn uniformly, then k uniformly over the slots whose frame t exists; several k share a frame.",
)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="LeRobotDataset")
    parser.add_argument("--policy", type=Path, required=True, help="policy folder")
    parser.add_argument("--out", type=Path, required=True, help="folder of the head")
    parser.add_argument("--holdout", type=float, default=0.05, help="must be the policy's")
    parser.add_argument(
        "--mismatch",
        type=float,
        default=0.0,
        help="fraction of base chunks taken from another frame of "
        "the task, so that the head must look; 0 is the paper's recipe",
    )
    LoopConfig.add_arguments(parser, learning_rate=5e-4, schedule="cosine", weight_decay=1e-5)
    arguments = parser.parse_args()
    policy = load_network(arguments.policy)
    data = load_demonstrations(arguments.data, policy.config.cameras)
    chunks = load_chunks(arguments.data / "chunks" / policy.config.policy_id, data)
    head = CompactHead.for_policy(policy, data.data_hash)
    train_head(
        data, chunks, head, LoopConfig.from_arguments(arguments), arguments.out, arguments.holdout, arguments.mismatch
    )


def train_head(
    data: Demonstrations,
    chunks: tuple[np.ndarray, np.ndarray],
    head: CompactHead,
    loop: LoopConfig,
    out: Path,
    holdout: float = 0.05,
    mismatch: float = 0.0,
    augmentation: Augmentation | None = None,
) -> CompactHead:
    """Train a head and write ``head.safetensors`` with its record.

    Args:
        data: Demonstrations.
        chunks: Base actions (views, N, H, A) and latents (views, N, Z), see :func:`cache_chunks.load_chunks`.
        head: Trained in place.
        loop: Hyper-parameters.
        out: Folder.
        holdout: Fraction of the episodes for validation; the base policy must not have been trained on them.
        mismatch: Fraction of base chunks from another frame of the same task.
        augmentation: Of the newest observation.

    Returns:
        The head as stored.

    Raises:
        ConfigError: If ``mismatch`` is outside 0 to 1.
    """
    if not 0.0 <= mismatch <= 1.0:
        raise ConfigError(f"mismatch is {mismatch}, allowed is 0 to 1")
    augmentation = augmentation or Augmentation()
    training, validation = data.split(holdout)
    validation = np.random.default_rng(0).permutation(validation)[:VALIDATION_FRAMES]
    language = language_table(data)
    of_task = [training[data.task[training] == task] for task in range(len(data.instructions))]
    horizon = head.config.horizon
    taus = np.stack([time_feature(k, horizon) for k in range(horizon)])
    actions, latents = chunks

    def slots(
        model: CompactHead, frames: np.ndarray, base: np.ndarray, k: np.ndarray, view: np.ndarray
    ) -> list[Tensor]:
        device = model.action_std.device
        arrays = (actions[view, base, k], taus[k], latents[view, base], data.action[frames])
        return [torch.tensor(array, device=device) for array in arrays]

    def features(
        model: CompactHead, frames: np.ndarray, change: Augmentation | None, rng: np.random.Generator
    ) -> Tensor:
        device = model.action_std.device
        images, state = observations(data, frames, change, rng)
        tensors = {name: torch.tensor(array, device=device) for name, array in images.items()}
        return model.encoder.features(
            tensors, torch.tensor(state, device=device), language[data.task[frames]].to(device)
        )

    def loss(model: CompactHead, rng: np.random.Generator, size: int) -> Tensor:
        batch = rng.choice(training, size)
        encoded = features(model, batch, augmentation, rng).repeat(DRAWS, 1)
        frames = np.tile(batch, DRAWS)
        k = rng.integers(0, np.minimum(horizon, frames - data.start[frames] + 1))
        base = frames - k
        foreign = rng.random(len(frames)) < mismatch
        k[foreign] = rng.integers(0, horizon, foreign.sum())
        base[foreign] = [rng.choice(of_task[data.task[frame]]) for frame in frames[foreign]]
        action, tau, latent, label = slots(model, frames, base, k, rng.integers(0, len(actions), len(frames)))
        residual = model.correct(encoded, action, tau, latent)
        return ((residual - (label - action)) / model.action_std).float().square().mean()

    def validate(model: CompactHead) -> dict[str, float]:
        rng = np.random.default_rng(0)
        encoded = torch.cat(
            [features(model, validation[i : i + 128], None, rng) for i in range(0, len(validation), 128)]
        )
        frames = np.tile(validation, DRAWS)
        k = rng.integers(0, np.minimum(horizon, frames - data.start[frames] + 1))
        action, tau, latent, label = slots(model, frames, frames - k, k, np.zeros_like(k))
        residual = model.correct(encoded.repeat(DRAWS, 1), action, tau, latent)
        scaled = ((residual - (label - action)) / model.action_std).square().mean()
        metrics = {"loss": scaled.item()}
        for name, error in (("base_error", label - action), ("error", label - action - residual)):
            error = error.abs().mean(dim=1).cpu().numpy()
            metrics[name] = float(error.mean())
            for low in range(0, horizon, SLOT_RANGE):
                part = (k >= low) & (k < low + SLOT_RANGE)
                if part.any():
                    metrics[f"{name}_{low}"] = float(error[part].mean())
        return metrics

    origin = f"head {fingerprint(head.config, mismatch)} on data {data.data_hash[:12]} seed {loop.seed}"
    trained = train(head, loss, validate, loop, out / "checkpoint" / "latest.safetensors", origin)
    save_head(trained.model, out / "head.safetensors")
    write_record(
        out / "training.json",
        {
            "policy_id": head.config.policy_id,
            "parameters": sum(p.numel() for p in head.parameters()),
            "data": describe(data, training, holdout),
            "hyper_parameters": loop,
            "augmentation": augmentation,
            "draws": DRAWS,
            "views": len(actions),
            "mismatch": mismatch,
            "steps": trained.steps,
            "seconds": trained.seconds,
            "history": trained.history,
            "departures_from_the_paper": [
                *DEPARTURES,
                *(
                    [f"Base chunks of 1 clean and {len(actions) - 1} augmented views per frame."]
                    if len(actions) > 1
                    else []
                ),
                *([f"{mismatch:.0%} of the base chunks are of another frame of the task."] if mismatch else []),
            ],
        },
    )
    plot_losses(out / "loss.png", trained.history, "squared error [action standard deviations]")
    return load_head(out / "head.safetensors")


if __name__ == "__main__":
    main()
