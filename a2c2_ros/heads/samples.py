"""Inputs to compare and time heads on: frames of a data set, or frames made from a seed."""

from pathlib import Path

import numpy as np

from a2c2_ros.core.features import time_feature
from a2c2_ros.core.head import HeadInput
from a2c2_ros.core.manifest import HeadManifest


def random_samples(manifest: HeadManifest, count: int, seed: int = 0) -> list[HeadInput]:
    """Inputs made from a seed.

    Args:
        manifest: Of the head: shapes, names and horizon.
        count: Number of inputs.
        seed: Equal seeds give equal inputs.

    Returns:
        Images of smooth colour fields with a little noise, standard normal vectors, slots in turn.
    """
    rng = np.random.default_rng(seed)
    sizes = {
        "state": len(manifest.state_names),
        "base_action": len(manifest.action_names),
        "latent": manifest.latent_size,
        "language": manifest.language_size,
    }
    language = rng.standard_normal(manifest.language_size).astype(np.float32)
    return [
        HeadInput(
            images={name: _image(rng, *shape) for name, shape in manifest.cameras.items()},
            time_feature=time_feature(i % manifest.horizon, manifest.horizon),
            **{name: rng.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
            | {"language": language},
        )
        for i in range(count)
    ]


def dataset_samples(manifest: HeadManifest, root: str | Path, count: int, seed: int = 0) -> list[HeadInput]:
    """Frames of a LeRobotDataset with the cached chunks of the head's base policy.

    Args:
        manifest: Of the head.
        root: Data set; its folder ``chunks`` must have the policy's, see ``training.cache_chunks``.
        count: Number of inputs.
        seed: Of the choice of frames and slots.

    Raises:
        ConfigError: If the data set or its cached chunks cannot be read.
    """
    from a2c2_ros.training.cache_chunks import language_rows, load_chunks, load_language
    from a2c2_ros.training.dataset import load_demonstrations

    data = load_demonstrations(root, tuple(manifest.cameras))
    folder = Path(root) / "chunks" / manifest.policy_id
    actions, latents = load_chunks(folder, data)
    language = language_rows(load_language(folder), data).numpy()
    rng = np.random.default_rng(seed)
    frames, slots = rng.integers(len(data), size=count), rng.integers(manifest.horizon, size=count)
    return [
        HeadInput(
            images={name: data.frames[name][i] for name in manifest.cameras},
            state=data.state[i],
            base_action=actions[0, i, k],
            time_feature=time_feature(k, manifest.horizon),
            latent=latents[0, i],
            language=language[data.task[i]],
        )
        for i, k in zip(frames, slots)
    ]


def _image(rng: np.random.Generator, height: int, width: int, channels: int) -> np.ndarray:
    """Eight by eight colours, enlarged without steps, plus sensor-like noise."""
    corners = rng.uniform(0.0, 255.0, (8, 8, channels))
    rows, columns = (_weights(size, 8) for size in (height, width))
    smooth = np.einsum("yi,xj,ijc->yxc", rows, columns, corners)
    return np.clip(smooth + rng.normal(0.0, 4.0, smooth.shape), 0.0, 255.0).astype(np.uint8)


def _weights(size: int, corners: int) -> np.ndarray:
    """(size, corners) weights of linear interpolation."""
    position = np.linspace(0.0, corners - 1.0, size)[:, None]
    return np.clip(1.0 - np.abs(position - np.arange(corners)), 0.0, None)
