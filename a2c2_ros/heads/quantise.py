"""Smaller weights for an exported head, and what they change in the action.

``python -m a2c2_ros.heads.quantise --head head.onnx --out head_int8.onnx``. ``int8``: weights of the matrix products as
int8 per output channel, their inputs as uint8 scaled at run time; convolutions stay float32. ``fp16``: weights and
arithmetic as float16, for execution providers that have it; a CPU mostly converts to and fro.
"""

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
from tqdm import tqdm

from a2c2_ros.commands import command
from a2c2_ros.core.errors import ConfigError
from a2c2_ros.core.head import HeadInput
from a2c2_ros.core.manifest import HeadManifest
from a2c2_ros.heads.onnx_head import OnnxHead, read_graph, read_manifest, save_graph
from a2c2_ros.heads.samples import dataset_samples, random_samples


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", type=Path, required=True, help="head.onnx with float32 weights")
    parser.add_argument("--out", type=Path, required=True, help="ONNX file to write")
    parser.add_argument("--kind", choices=sorted(KINDS), default="int8", help="weights (default int8)")
    parser.add_argument("--data", type=Path, help="LeRobotDataset to measure the effect on (default: frames of a seed)")
    parser.add_argument("--frames", type=int, default=64, help="frames for the measurement (default 64)")
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    arguments = parser.parse_args(argv)
    manifest = quantise(arguments.head, arguments.out, arguments.kind, arguments.force)
    if arguments.data is None:
        samples = random_samples(manifest, arguments.frames)
    else:
        samples = dataset_samples(manifest, arguments.data, arguments.frames)
    measured = effect(OnnxHead(arguments.head), OnnxHead(arguments.out), samples, progress=True)
    print(f"{arguments.out}: {manifest.weights}, change of the residual {json.dumps(measured)}")


def quantise(source: str | Path, target: str | Path, kind: str = "int8", force: bool = False) -> HeadManifest:
    """Write a head with smaller weights. Inputs, outputs and token names stay.

    Args:
        source: ``head.onnx`` with float32 weights.
        target: File to write; it appears when it has been loaded once.
        kind: ``int8`` or ``fp16``.
        force: Replace an existing file.

    Returns:
        The manifest as written: the source's, but for ``weights``.

    Raises:
        ConfigError: If ``kind`` is unknown, the source is missing or not float32, or the target exists and ``force`` is
            false.
        ManifestError: If the source is damaged.
    """
    target = Path(target)
    if kind not in KINDS:
        raise ConfigError(f"kind is {kind!r}, allowed are {sorted(KINDS)}")
    if target.exists() and not force:
        raise ConfigError(f"{target} exists; --force replaces it")
    model = read_graph(source)
    manifest = read_manifest(model, source)
    if manifest.weights != "float32":
        raise ConfigError(f"{source} has weights {manifest.weights!r}, allowed is 'float32'")
    weights, convert = KINDS[kind]
    manifest = dataclasses.replace(manifest, weights=weights)
    partial = target.with_suffix(".partial.onnx")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_graph(convert(model), manifest, partial)
        OnnxHead(partial)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return manifest


def effect(
    reference: OnnxHead, changed: OnnxHead, samples: Sequence[HeadInput], progress: bool = False
) -> dict[str, float | int]:
    """What other weights change in the action.

    Args:
        reference: The head with float32 weights.
        changed: The same head with others.
        samples: Inputs to compare on.
        progress: Show a progress bar.

    Returns:
        ``max_abs`` and ``mean_abs`` of the residual's change and ``mean_residual`` of the reference [action units],
        ``relative``: mean change over mean residual, ``frames``.
    """
    pairs = [(reference.correct(s), changed.correct(s)) for s in tqdm(samples, disable=not progress, unit="frame")]
    before, after = (np.stack(residuals).astype(np.float64) for residuals in zip(*pairs))
    difference, residual = np.abs(after - before), np.abs(before).mean()
    return {
        "max_abs": float(difference.max()),
        "mean_abs": float(difference.mean()),
        "mean_residual": float(residual),
        "relative": float(difference.mean() / residual) if residual else float("nan"),
        "frames": len(samples),
    }


def _int8(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "int8.onnx"
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        # Pre-processing would merge nodes across the tokens; with this entry its absence is not warned of.
        copy.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
        quantize_dynamic(copy, out, op_types_to_quantize=["MatMul"], per_channel=True, weight_type=QuantType.QInt8)
        return onnx.load(out)


def _fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return convert_float_to_float16(copy, keep_io_types=True)


KINDS: dict[str, tuple[str, Callable[[onnx.ModelProto], onnx.ModelProto]]] = {
    "int8": ("int8", _int8),
    "fp16": ("float16", _fp16),
}
"""Kind to the manifest's name of the weights and the conversion."""


if __name__ == "__main__":
    sys.exit(main())
