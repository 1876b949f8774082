"""A correction head in ONNX Runtime, cut at the camera tokens so that images need not wait for the tick."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError
from onnx.utils import Extractor
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from a2c2_ros.core.errors import ConfigError, HeadError, ManifestError, ObservationError
from a2c2_ros.core.head import HeadInput
from a2c2_ros.core.manifest import MANIFEST_KEY, HeadManifest

IMAGE_PREFIX = "image_"
TOKENS_PREFIX = "tokens_"
OUTPUT_NAME = "residual"
KEPT_PER_CAMERA = 4
"""Prepared images that are kept: the tick may still use the one before while newer ones arrive."""

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""Execution provider of ONNX Runtime by device."""
ORT_ERRORS = (
    ort_errors.EngineError,
    ort_errors.EPFail,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoModel,
    ort_errors.NotFound,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)


def input_shapes(manifest: HeadManifest) -> dict[str, tuple[tuple[int, ...], type]]:
    """Names of the graph's inputs in order, with shape (batch of one) and dtype; what has size 0 is left out."""
    shapes = {f"{IMAGE_PREFIX}{name}": ((1, *shape), np.uint8) for name, shape in manifest.cameras.items()}
    vectors = {
        "state": len(manifest.state_names),
        "base_action": len(manifest.action_names),
        "time_feature": 2,
        "latent": manifest.latent_size,
        "language": manifest.language_size,
    }
    return shapes | {name: ((1, size), np.float32) for name, size in vectors.items() if size}


def read_graph(path: str | Path) -> onnx.ModelProto:
    """Read an ONNX file; raises as :func:`read_hashed`."""
    return read_hashed(path)[0]


def read_hashed(path: str | Path) -> tuple[onnx.ModelProto, str]:
    """Read an ONNX file: the graph and the SHA-256 of the very bytes that it was made of.

    Raises:
        ConfigError: If the file is missing.
        ManifestError: If it is damaged.
    """
    if not Path(path).is_file():
        raise ConfigError(f"head {path} is not a file")
    try:
        data = Path(path).read_bytes()
        return onnx.load_from_string(data, format="protobuf"), hashlib.sha256(data).hexdigest()
    except (DecodeError, OSError) as error:
        raise ManifestError(f"{path} cannot be loaded as an ONNX graph: {error}") from error


def read_manifest(model: onnx.ModelProto, path: str | Path) -> HeadManifest:
    """The manifest in a graph's metadata.

    Raises:
        ManifestError: If there is none, or it is wrong. ``path`` is named in the message.
    """
    for entry in model.metadata_props:
        if entry.key == MANIFEST_KEY:
            return HeadManifest.from_json(entry.value, str(path))
    raise ManifestError(f"{path} has no {MANIFEST_KEY!r} in its metadata: it was not exported by a2c2_ros")


def save_graph(model: onnx.ModelProto, manifest: HeadManifest, path: str | Path) -> None:
    """Write a graph with its manifest."""
    onnx.helper.set_model_props(model, {MANIFEST_KEY: manifest.to_json()})
    onnx.save(model, path)


def check_device(device: str) -> None:
    """Check that ONNX Runtime has a device.

    Raises:
        ConfigError: If it does not.
    """
    if device not in PROVIDERS:
        raise ConfigError(f"device is {device!r}, allowed are {sorted(PROVIDERS)}")
    available = onnxruntime.get_available_providers()
    if PROVIDERS[device] not in available:
        raise ConfigError(
            f"device is {device!r}, but ONNX Runtime has {available} only; make setup GPU=1 installs onnxruntime-gpu"
        )


class _Prepared(NamedTuple):
    image: np.ndarray  # kept, so that no other image can get its identity
    language: bytes
    tokens: np.ndarray


class _Encoder:
    """The graph from a camera's image to its tokens, and the newest tokens."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.session = session
        self.uses_language = any(node.name == "language" for node in session.get_inputs())
        self.prepared: tuple[_Prepared, ...] = ()

    def key(self, language: np.ndarray) -> bytes:
        """What the embedding must be equal in for the tokens to be the same."""
        return language.tobytes() if self.uses_language else b""


class OnnxHead:
    """See :class:`CorrectionHead`. One thread calls :meth:`correct` and one other may call :meth:`prepare`.

    A file whose manifest names tokens is cut into one graph per camera (image to tokens) and the fusion (tokens and
    the rest to the residual). There is no lock: a camera's prepared tokens are one tuple that is replaced as a whole,
    and a session of ONNX Runtime may run in several threads at once.
    """

    def __init__(
        self,
        path: str | Path,
        threads: int = 1,
        encoder_threads: int = 1,
        *,
        split: bool = True,
        device: str = "cpu",
    ) -> None:
        """Load a head.

        Args:
            path: ``head.onnx`` as written by ``heads.export`` or ``heads.quantise``.
            threads: CPU threads of the fusion, or of the whole graph if it is not cut.
            encoder_threads: CPU threads of one camera's encoder.
            split: False keeps one graph, so that nothing is prepared.
            device: A key of ``PROVIDERS``.

        Raises:
            ConfigError: If the file is missing, a number of threads is not positive, or ONNX Runtime does not have the
                device.
            ManifestError: If the file is damaged, has no manifest, or its graph is not what the manifest says.
        """
        for name, value in (("threads", threads), ("encoder_threads", encoder_threads)):
            if value < 1:
                raise ConfigError(f"{name} is {value}, allowed is 1 or more")
        self.path = Path(path)
        check_device(device)
        if device == "cuda":
            onnxruntime.preload_dlls()  # those of the wheels of CUDA, which no system path leads to
        self._provider = PROVIDERS[device]
        model, self.sha256 = read_hashed(path)
        self.manifest = read_manifest(model, path)
        self._inputs = input_shapes(self.manifest)
        self._check_graph(model)
        self.splits = split and bool(self.manifest.tokens)
        self._encoders: dict[str, _Encoder] = {}
        if self.splits:
            tokens = {f"{TOKENS_PREFIX}{camera}": camera for camera in self.manifest.tokens}
            for name, camera in tokens.items():
                part = self._cut(model, [f"{IMAGE_PREFIX}{camera}", "language"], name)
                self._encoders[camera] = _Encoder(self._session(part, encoder_threads))
            images = {f"{IMAGE_PREFIX}{camera}" for camera in self._encoders}
            model = self._cut(model, [*tokens, *(name for name in self._inputs if name not in images)], OUTPUT_NAME)
        self._fusion = self._session(model, threads)
        self._fusion_inputs = tuple(node.name for node in self._fusion.get_inputs())

    def prepare(self, camera: str, image: np.ndarray, language: np.ndarray) -> None:
        """Compute a camera's tokens now, so that :meth:`correct` with this very image needs not.

        For one thread, at the same time as another corrects. Nothing happens if the file has no tokens of this camera.

        Args:
            camera: Name.
            image: (height, width, 3) uint8 RGB, the object that :meth:`correct` will get; it must not change any more.
            language: (L,) float32, the embedding that :meth:`correct` will get.

        Raises:
            ObservationError: If an array has another shape or dtype than the manifest says.
            HeadError: If ONNX Runtime fails.
        """
        if camera not in self._encoders:
            return
        encoder = self._encoders[camera]
        self._check(f"{IMAGE_PREFIX}{camera}", image)
        if encoder.uses_language:
            self._check("language", language)
        entry = _Prepared(image, encoder.key(language), self._encode(camera, image, language))
        encoder.prepared = (entry, *encoder.prepared[: KEPT_PER_CAMERA - 1])

    def correct(self, inputs: HeadInput) -> np.ndarray:
        """Residual, (A,) float32 in action units.

        Raises:
            ObservationError: If a camera is missing or an input has another shape or dtype than the manifest says.
            HeadError: If ONNX Runtime fails.
        """
        arrays = {}
        for name in self._inputs:
            camera = name.removeprefix(IMAGE_PREFIX)
            if camera == name:
                array = getattr(inputs, name)
            elif camera in inputs.images:
                array = inputs.images[camera]
            else:
                raise ObservationError(f"camera {camera!r} is missing, there are {sorted(inputs.images)}")
            self._check(name, array)
            arrays[name] = array[None]
        for camera in self._encoders:
            arrays[f"{TOKENS_PREFIX}{camera}"] = self._tokens(camera, inputs.images[camera], inputs.language)
        return self._run(self._fusion, {name: arrays[name] for name in self._fusion_inputs})[0]

    def warm_up(self, runs: int = 10) -> None:
        """Run every graph on zeros, so that the first correction is not slower than the others."""
        zeros = {name: np.zeros(shape[1:], dtype) for name, (shape, dtype) in self._inputs.items()}
        vectors = ("state", "base_action", "time_feature", "latent", "language")
        inputs = HeadInput(
            {camera: zeros[f"{IMAGE_PREFIX}{camera}"] for camera in self.manifest.cameras},
            *(zeros.get(name, np.zeros(0, np.float32)) for name in vectors),
        )
        for _ in range(runs):
            self.correct(inputs)

    def _tokens(self, camera: str, image: np.ndarray, language: np.ndarray) -> np.ndarray:
        encoder = self._encoders[camera]
        key = encoder.key(language)
        for entry in encoder.prepared:
            if entry.image is image and entry.language == key:
                return entry.tokens
        return self._encode(camera, image, language)

    def _encode(self, camera: str, image: np.ndarray, language: np.ndarray) -> np.ndarray:
        encoder = self._encoders[camera]
        feed = {f"{IMAGE_PREFIX}{camera}": image[None]}
        if encoder.uses_language:
            feed["language"] = language[None]
        return self._run(encoder.session, feed)

    def _run(self, session: onnxruntime.InferenceSession, feed: Mapping[str, np.ndarray]) -> np.ndarray:
        try:
            return session.run(None, feed)[0]
        except ORT_ERRORS as error:
            raise HeadError(f"head {self.path}: ONNX Runtime failed: {error}") from error

    def _check(self, name: str, array: np.ndarray) -> None:
        shape, dtype = self._inputs[name]
        if array.shape != shape[1:] or array.dtype != dtype:
            raise ObservationError(
                f"head input {name!r} is {array.dtype} {array.shape}, allowed is {np.dtype(dtype)} {shape[1:]}"
            )

    def _check_graph(self, model: onnx.ModelProto) -> None:
        types = {onnx.TensorProto.UINT8: np.uint8, onnx.TensorProto.FLOAT: np.float32}

        def shapes(nodes: Sequence[onnx.ValueInfoProto]) -> dict[str, tuple[tuple[int, ...], type | None]]:
            tensors = {node.name: node.type.tensor_type for node in nodes}
            return {
                name: (tuple(axis.dim_value for axis in tensor.shape.dim), types.get(tensor.elem_type))
                for name, tensor in tensors.items()
            }

        found = {"inputs": shapes(model.graph.input), "outputs": shapes(model.graph.output)}
        expected = {
            "inputs": self._inputs,
            "outputs": {OUTPUT_NAME: ((1, len(self.manifest.action_names)), np.float32)},
        }
        tokens = {f"{TOKENS_PREFIX}{camera}": (1, size) for camera, size in self.manifest.tokens.items()}
        expected["tokens"] = tokens
        found["tokens"] = {name: shape for name, (shape, _) in shapes(model.graph.value_info).items() if name in tokens}
        if found != expected:
            raise ManifestError(f"{self.path}: the graph has {found}, its manifest says {expected}")

    def _cut(self, model: onnx.ModelProto, inputs: Sequence[str], output: str) -> onnx.ModelProto:
        """The part of a graph between those of ``inputs`` that there are and an output."""
        tokens = [f"{TOKENS_PREFIX}{camera}" for camera in self.manifest.tokens]
        try:
            part = Extractor(model).extract_model([n for n in inputs if n in self._inputs or n in tokens], [output])
        except (AssertionError, ValueError) as error:
            raise ManifestError(f"{self.path} cannot be cut at {tokens}: {error}") from error
        used = {name for node in part.graph.node for name in node.input}
        for unused in [node for node in part.graph.input if node.name not in used]:
            part.graph.input.remove(unused)
        return part

    def _session(self, model: onnx.ModelProto, threads: int) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4  # every error is raised as well; a line per failed run would go out in the tick
        # Waiting threads must not take the core from the camera and planner processes between two ticks.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[self._provider])
        except (*ORT_ERRORS, UnicodeDecodeError) as error:  # the latter where a damaged name is in the message
            raise ManifestError(f"{self.path} cannot be loaded as an ONNX graph: {error}") from error
        if self._provider not in session.get_providers():  # it falls back without an error
            raise ConfigError(f"{self._provider} cannot be used here: ONNX Runtime chose {session.get_providers()}")
        return session
