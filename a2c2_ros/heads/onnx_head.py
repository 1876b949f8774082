"""A correction head in ONNX Runtime."""

from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from a2c2_ros.core.errors import ConfigError, ManifestError, ObservationError
from a2c2_ros.core.head import HeadInput
from a2c2_ros.core.manifest import MANIFEST_KEY, HeadManifest

IMAGE_PREFIX = "image_"
OUTPUT_NAME = "residual"


def input_shapes(manifest: HeadManifest) -> dict[str, tuple[tuple[int, ...], type]]:
    """Names of the graph's inputs in order, with shape (batch of one) and dtype."""
    shapes = {f"{IMAGE_PREFIX}{name}": ((1, *shape), np.uint8) for name, shape in manifest.cameras.items()}
    vectors = {
        "state": len(manifest.state_names),
        "base_action": len(manifest.action_names),
        "time_feature": 2,
        "latent": manifest.latent_size,
        "language": manifest.language_size,
    }
    return shapes | {name: ((1, size), np.float32) for name, size in vectors.items()}


class OnnxHead:
    """See :class:`CorrectionHead`. One thread calls it at a time: the inputs are copied into fixed buffers."""

    def __init__(self, path: str | Path, threads: int = 1) -> None:
        """Load a head.

        Args:
            path: ``head.onnx`` as written by ``heads.export``.
            threads: CPU threads of one correction.

        Raises:
            ConfigError: If the file is missing or ``threads`` is not positive.
            ManifestError: If the file is damaged, has no manifest, or its graph is not what the manifest says.
        """
        if not Path(path).is_file():
            raise ConfigError(f"head {path} is not a file")
        if threads < 1:
            raise ConfigError(f"threads is {threads}, allowed is 1 or more")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Waiting threads must not take the core from the camera and planner processes between two ticks.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except (
            ort_errors.InvalidProtobuf,
            ort_errors.InvalidGraph,
            ort_errors.InvalidArgument,
            ort_errors.NotImplemented,
            ort_errors.NoModel,
            ort_errors.Fail,
            ort_errors.RuntimeException,
        ) as error:
            raise ManifestError(f"{path} cannot be loaded as an ONNX graph: {error}") from error
        metadata = self._session.get_modelmeta().custom_metadata_map
        if MANIFEST_KEY not in metadata:
            raise ManifestError(f"{path} has no {MANIFEST_KEY!r} in its metadata: it was not exported by a2c2_ros")
        self.manifest = HeadManifest.from_json(metadata[MANIFEST_KEY], str(path))
        expected = input_shapes(self.manifest)
        types = {"tensor(uint8)": np.uint8, "tensor(float)": np.float32}
        found = {node.name: (tuple(node.shape), types.get(node.type)) for node in self._session.get_inputs()}
        outputs = {node.name: tuple(node.shape) for node in self._session.get_outputs()}
        if found != expected or outputs != {OUTPUT_NAME: (1, len(self.manifest.action_names))}:
            raise ManifestError(
                f"{path}: the graph has inputs {found} and outputs {outputs}, its manifest says {expected}"
            )
        self._inputs = {name: np.zeros(shape, dtype) for name, (shape, dtype) in expected.items()}

    def correct(self, inputs: HeadInput) -> np.ndarray:
        """Residual, (A,) float32 in action units.

        Raises:
            ObservationError: If a camera is missing or an input has another shape than the manifest says.
        """
        for name, buffer in self._inputs.items():
            camera = name.removeprefix(IMAGE_PREFIX)
            if camera == name:
                array = getattr(inputs, name)
            elif camera in inputs.images:
                array = inputs.images[camera]
            else:
                raise ObservationError(f"camera {camera!r} is missing, there are {sorted(inputs.images)}")
            if array.shape != buffer.shape[1:] or array.dtype != buffer.dtype:
                raise ObservationError(
                    f"head input {name!r} is {array.dtype} {array.shape}, allowed is {buffer.dtype} {buffer.shape[1:]}"
                )
            buffer[0] = array
        return self._session.run(None, self._inputs)[0][0]

    def warm_up(self, runs: int = 10) -> None:
        """Run on zeros, so that the first correction is not slower than the others."""
        for _ in range(runs):
            self._session.run(None, {name: np.zeros_like(buffer) for name, buffer in self._inputs.items()})
