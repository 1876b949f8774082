"""Export a compact head to ONNX with its manifest, after comparing both on real frames.

``python -m a2c2_ros.heads.export --head head.safetensors --data DIR --out head.onnx``
"""

import argparse
import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from a2c2_ros.core.errors import ConfigError, ManifestError
from a2c2_ros.core.features import time_feature
from a2c2_ros.core.head import HeadInput
from a2c2_ros.core.manifest import MANIFEST_KEY, HeadManifest
from a2c2_ros.heads.compact import CompactHead, load_head
from a2c2_ros.heads.onnx_head import OUTPUT_NAME, OnnxHead, input_shapes

MAX_PARITY_ERROR = 1e-4  # action units
OPSET = 17


class _Graph(nn.Module):
    """Positional inputs for the exporter."""

    def __init__(self, head: CompactHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, *inputs: Tensor) -> Tensor:
        cameras = self.head.config.cameras
        return self.head(dict(zip(cameras, inputs, strict=False)), *inputs[len(cameras) :])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", type=Path, required=True, help="head.safetensors")
    parser.add_argument(
        "--data", type=Path, required=True, help="LeRobotDataset whose frames the graphs are compared on"
    )
    parser.add_argument("--out", type=Path, required=True, help="ONNX file to write")
    parser.add_argument("--frames", type=int, default=64, help="frames for the comparison (default 64)")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    arguments = parser.parse_args()
    from a2c2_ros.training.cache_chunks import load_chunks
    from a2c2_ros.training.dataset import load_demonstrations
    from a2c2_ros.training.train_policy import language_table

    head = load_head(arguments.head)
    data = load_demonstrations(arguments.data, head.config.cameras)
    actions, latents = load_chunks(arguments.data / "chunks" / head.config.policy_id, data)
    language = language_table(data).numpy()
    rng = np.random.default_rng(0)
    samples = [
        HeadInput(
            images={name: frames[i] for name, frames in data.frames.items()},
            state=data.state[i],
            base_action=actions[0, i, k],
            time_feature=time_feature(k, head.config.horizon),
            latent=latents[0, i],
            language=language[data.task[i]],
        )
        for i, k in zip(
            rng.integers(len(data), size=arguments.frames), rng.integers(head.config.horizon, size=arguments.frames)
        )
    ]
    manifest = export(head, samples, arguments.out, arguments.force)
    print(
        f"{arguments.out}: {manifest.parameters} parameters, parity error {manifest.parity_max_abs_error:.2e} on "
        f"{len(samples)} frames, one thread p50/p99 {latency_ms(OnnxHead(arguments.out), samples)} ms"
    )


def export(head: CompactHead, samples: Sequence[HeadInput], path: str | Path, force: bool = False) -> HeadManifest:
    """Write the ONNX file; it appears only after the comparison.

    Args:
        head: In evaluation mode.
        samples: Real inputs to compare ONNX Runtime with torch on.
        path: File to write.
        force: Replace an existing file.

    Returns:
        The manifest as written, with the largest difference found.

    Raises:
        ConfigError: If the file exists and ``force`` is false, or there are no samples.
        ManifestError: If the results differ by ``MAX_PARITY_ERROR`` or more.
    """
    path = Path(path)
    if path.exists() and not force:
        raise ConfigError(f"{path} exists; --force replaces it")
    if not samples:
        raise ConfigError("the comparison has 0 frames, allowed is 1 or more")
    manifest = manifest_of(head)
    partial = path.with_suffix(".partial.onnx")
    try:
        _write(head, manifest, partial)
        manifest = dataclasses.replace(manifest, parity_max_abs_error=parity(head, OnnxHead(partial), samples))
        if not manifest.parity_max_abs_error < MAX_PARITY_ERROR:
            raise ManifestError(
                f"ONNX Runtime and torch differ by {manifest.parity_max_abs_error:.2e}, allowed is less "
                f"than {MAX_PARITY_ERROR:.0e}: {path} not written"
            )
        model = onnx.load(partial)
        onnx.helper.set_model_props(model, {MANIFEST_KEY: manifest.to_json()})
        onnx.save(model, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return manifest


def manifest_of(head: CompactHead) -> HeadManifest:
    """The manifest of a head before the comparison."""
    config = head.config
    return HeadManifest(
        architecture="compact",
        policy_id=config.policy_id,
        horizon=config.horizon,
        step_ns=config.step_ns,
        action_names=config.action_names,
        action_space=config.action_space,
        cameras={name: (config.image_size, config.image_size, 3) for name in config.cameras},
        state_names=config.state_names,
        latent_size=config.latent_dim,
        language_size=config.language_dim,
        training_data_hash=config.training_data_hash,
        parameters=sum(p.numel() for p in head.parameters()),
    )


def parity(head: CompactHead, exported: OnnxHead, samples: Sequence[HeadInput]) -> float:
    """Largest absolute difference between the exported head and torch, action units."""
    worst = 0.0
    for sample in samples:
        with torch.inference_mode():
            images = {name: torch.tensor(image[None]) for name, image in sample.images.items()}
            vectors = (sample.state, sample.base_action, sample.time_feature, sample.latent, sample.language)
            expected = head(images, *(torch.tensor(vector[None]) for vector in vectors))[0].numpy()
        worst = max(worst, float(np.abs(exported.correct(sample) - expected).max()))
    return worst


def latency_ms(head: OnnxHead, samples: Sequence[HeadInput], runs: int = 1000) -> tuple[float, float]:
    """Median and 99th percentile of one correction [ms]."""
    head.warm_up()
    durations = []
    for i in range(runs):
        begin = time.perf_counter()
        head.correct(samples[i % len(samples)])
        durations.append(1e3 * (time.perf_counter() - begin))
    return tuple(round(float(value), 2) for value in np.percentile(durations, (50, 99)))


def _write(head: CompactHead, manifest: HeadManifest, path: Path) -> None:
    shapes = input_shapes(manifest)
    dtypes = {np.uint8: torch.uint8, np.float32: torch.float32}
    example = tuple(torch.zeros(shape, dtype=dtypes[dtype]) for shape, dtype in shapes.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        _Graph(head),
        example,
        str(path),
        input_names=list(shapes),
        output_names=[OUTPUT_NAME],
        opset_version=OPSET,
        dynamo=False,
    )
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {MANIFEST_KEY: manifest.to_json()})
    onnx.save(model, path)


if __name__ == "__main__":
    main()
