"""Export a head to ONNX with its manifest, after comparing both on real frames.

``python -m a2c2_ros.heads.export --head head.safetensors --data DIR --out head.onnx``. The file is one graph that runs
as a whole; the tensor ``tokens_<camera>`` is where ``heads.onnx_head`` cuts it.
"""

import argparse
import dataclasses
import io
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from a2c2_ros.commands import command
from a2c2_ros.core.errors import ConfigError, ManifestError
from a2c2_ros.core.head import HeadInput
from a2c2_ros.core.manifest import HeadManifest
from a2c2_ros.heads.base import Head, load_head, manifest_of
from a2c2_ros.heads.onnx_head import IMAGE_PREFIX, OUTPUT_NAME, TOKENS_PREFIX, OnnxHead, input_shapes, save_graph
from a2c2_ros.heads.samples import dataset_samples

MAX_PARITY_ERROR = 1e-4  # action units
OPSET = 17


class _Graph(nn.Module):
    """Positional inputs and the tokens as further outputs, for the exporter."""

    def __init__(self, head: Head, names: Sequence[str]) -> None:
        super().__init__()
        self.head, self.names = head, tuple(names)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.names, inputs))
        absent = given["state"].new_zeros(1, 0)
        latent, language = (given.get(name, absent) for name in ("latent", "language"))
        tokens = {
            camera: self.head.encode_image(camera, given[f"{IMAGE_PREFIX}{camera}"], language)
            for camera in self.head.config.cameras
        }
        vectors = (given[name] for name in ("state", "base_action", "time_feature"))
        return self.head.fuse(tokens, *vectors, latent, language), *tokens.values()


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", type=Path, required=True, help="head.safetensors")
    parser.add_argument(
        "--data", type=Path, required=True, help="LeRobotDataset whose frames the graphs are compared on"
    )
    parser.add_argument("--out", type=Path, required=True, help="ONNX file to write")
    parser.add_argument("--frames", type=int, default=64, help="frames for the comparison (default 64)")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    arguments = parser.parse_args(argv)
    head = load_head(arguments.head)
    samples = dataset_samples(manifest_of(head), arguments.data, arguments.frames)
    manifest = export(head, samples, arguments.out, arguments.force)
    print(
        f"{arguments.out}: {manifest.parameters} parameters, parity error {manifest.parity_max_abs_error:.2e} on "
        f"{len(samples)} frames, one thread p50/p99 {latency_ms(OnnxHead(arguments.out), samples)} ms"
    )


def export(head: Head, samples: Sequence[HeadInput], path: str | Path, force: bool = False) -> HeadManifest:
    """Write the ONNX file; it appears only after the comparison.

    Args:
        head: In evaluation mode.
        samples: Inputs to compare ONNX Runtime with torch on.
        path: File to write.
        force: Replace an existing file.

    Returns:
        The manifest as written, with the largest difference found, in the whole graph and cut at the tokens.

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
    model = to_onnx(head)
    partial = path.with_suffix(".partial.onnx")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_graph(model, manifest, partial)
        error = max(parity(head, OnnxHead(partial, split=split), samples) for split in (False, True))
        if not error < MAX_PARITY_ERROR:
            raise ManifestError(
                f"ONNX Runtime and torch differ by {error:.2e}, allowed is less than {MAX_PARITY_ERROR:.0e}: {path} "
                "not written"
            )
        manifest = dataclasses.replace(manifest, parity_max_abs_error=error)
        save_graph(model, manifest, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return manifest


def to_onnx(head: Head) -> onnx.ModelProto:
    """The head as one graph with a tensor ``tokens_<camera>`` (1, token size) per camera, without a manifest."""
    shapes = input_shapes(manifest_of(head))
    dtypes = {np.uint8: torch.uint8, np.float32: torch.float32}
    example = tuple(torch.zeros(shape, dtype=dtypes[dtype]) for shape, dtype in shapes.values())
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The newer exporter does not keep the names of the tensors, by which the graph is cut.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        # All shapes are fixed, so that what depends on a shape may be a constant.
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        torch.onnx.export(
            _Graph(head, tuple(shapes)).eval(),
            example,
            buffer,
            input_names=list(shapes),
            output_names=[OUTPUT_NAME, *(f"{TOKENS_PREFIX}{camera}" for camera in head.config.cameras)],
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load_from_string(buffer.getvalue())
    for tokens in [node for node in model.graph.output if node.name != OUTPUT_NAME]:
        model.graph.output.remove(tokens)
        model.graph.value_info.append(tokens)
    # The exporter drops the inputs that an ablation takes away; whoever runs the graph gives them all the same.
    types = {np.uint8: onnx.TensorProto.UINT8, np.float32: onnx.TensorProto.FLOAT}
    del model.graph.input[:]
    model.graph.input.extend(
        onnx.helper.make_tensor_value_info(name, types[dtype], shape) for name, (shape, dtype) in shapes.items()
    )
    onnx.checker.check_model(model)
    return model


def parity(head: Head, exported: OnnxHead, samples: Sequence[HeadInput]) -> float:
    """Largest absolute difference between the exported head and torch, action units."""
    return max(float(np.abs(exported.correct(sample) - torch_residual(head, sample)).max()) for sample in samples)


def torch_residual(head: Head, sample: HeadInput) -> np.ndarray:
    """Residual of one input by torch, (A,) float32 in action units."""
    device = head.action_std.device
    vectors = (sample.state, sample.base_action, sample.time_feature, sample.latent, sample.language)
    with torch.inference_mode():
        images = {name: torch.tensor(image[None], device=device) for name, image in sample.images.items()}
        return head(images, *(torch.tensor(vector[None], device=device) for vector in vectors))[0].cpu().numpy()


def latency_ms(head: OnnxHead, samples: Sequence[HeadInput], runs: int = 1000) -> tuple[float, float]:
    """Median and 99th percentile of one correction without prepared images [ms]."""
    head.warm_up()
    durations = []
    for i in range(runs):
        begin = time.perf_counter()
        head.correct(samples[i % len(samples)])
        durations.append(1e3 * (time.perf_counter() - begin))
    return tuple(round(float(value), 2) for value in np.percentile(durations, (50, 99)))


if __name__ == "__main__":
    sys.exit(main())
