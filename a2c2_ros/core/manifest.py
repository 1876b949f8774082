"""The manifest of a correction head: what it was trained for and what it therefore may be used with."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field

from a2c2_ros.core.chunk import ActionChunk
from a2c2_ros.core.errors import ManifestError

MANIFEST_KEY = "a2c2_manifest"
MANIFEST_VERSION = 1


@dataclass(frozen=True)
class HeadManifest:
    """Written into the head's ONNX metadata under ``a2c2_manifest`` as JSON.

    The graph takes raw inputs (normalisation is inside it) with a leading batch axis and returns the residual in
    action units.
    """

    architecture: str  # e.g. "compact"
    policy_id: str  # the base policy whose chunks it was trained on
    horizon: int  # H, slots of a chunk
    step_ns: int  # duration of a slot [ns]
    action_names: tuple[str, ...]  # order of the action
    action_space: str  # e.g. "osc_pose_delta": meaning and unit of the action
    cameras: Mapping[str, tuple[int, int, int]]  # name -> (height, width, 3), uint8 RGB, upright, in input order
    state_names: tuple[str, ...]  # order of the state
    latent_size: int  # 0: the head takes no latent and fits chunks with any
    language_size: int  # 0: the head takes no language and fits chunks with any
    output: str = "residual"  # the only meaning allowed: a_exec = a_base + output
    time_feature: str = "sin_cos_2pi_k_over_H"  # features.time_feature
    training_data_hash: str = ""
    parity_max_abs_error: float = 0.0  # ONNX Runtime against torch with float32 weights, action units
    parameters: int = 0
    tokens: Mapping[str, int] = field(default_factory=dict)  # camera -> size of the graph's tensor tokens_<camera>
    residual_range: tuple[float, ...] = ()  # (A,) largest residuals of its training [action units]; empty: not known
    weights: str = "float32"  # of the graph: "float32", "int8" or "float16", see heads.quantise
    version: int = MANIFEST_VERSION

    def to_json(self) -> str:
        """The manifest as a JSON object."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str, origin: str) -> "HeadManifest":
        """Read a manifest.

        Args:
            text: JSON object.
            origin: Where it comes from (a file name), for the error message.

        Raises:
            ManifestError: If the text is not JSON, a field is missing or unknown, the version, output meaning or time
                feature is not the one that this package computes, or the residual range is none.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ManifestError(f"{origin}: the manifest is not JSON: {error}") from error
        if not isinstance(data, dict):
            raise ManifestError(f"{origin}: the manifest is a {type(data).__name__}, allowed is a JSON object")
        known = {entry.name: entry for entry in dataclasses.fields(cls)}
        missing = [n for n, f in known.items() if f.default is f.default_factory is MISSING and n not in data]
        unknown = sorted(set(data) - set(known))
        if missing or unknown:
            raise ManifestError(f"{origin}: manifest fields missing: {missing}, unknown: {unknown}")
        try:
            data["cameras"] = {str(name): tuple(int(v) for v in shape) for name, shape in data["cameras"].items()}
            data["tokens"] = {str(name): int(size) for name, size in data.get("tokens", {}).items()}
            data["action_names"] = tuple(str(name) for name in data["action_names"])
            data["state_names"] = tuple(str(name) for name in data["state_names"])
            data["residual_range"] = tuple(float(value) for value in data.get("residual_range", ()))
            for name in ("horizon", "step_ns", "latent_size", "language_size", "version"):
                data[name] = int(data.get(name, known[name].default))
        except (TypeError, ValueError, AttributeError) as error:
            raise ManifestError(f"{origin}: a manifest field has the wrong type: {error}") from error
        manifest = cls(**data)
        for name, expected in (
            ("version", MANIFEST_VERSION),
            ("output", cls.output),
            ("time_feature", cls.time_feature),
        ):
            value = getattr(manifest, name)
            if value != expected:
                raise ManifestError(f"{origin}: manifest {name} is {value!r}, allowed is {expected!r}")
        values, size = manifest.residual_range, len(manifest.action_names)
        if values and not (len(values) == size and all(0.0 <= value < float("inf") for value in values)):
            raise ManifestError(
                f"{origin}: manifest residual_range is {list(values)}, allowed are {size} finite values of 0 or more"
            )
        return manifest

    def check_chunk(self, chunk: ActionChunk) -> None:
        """Check that the head may correct this chunk.

        Raises:
            ManifestError: Naming every field that differs, the head's value and the chunk's.
        """
        rows = [
            ("policy_id", self.policy_id, chunk.policy_id),
            ("horizon", self.horizon, chunk.horizon),
            ("step_ns", self.step_ns, chunk.step_ns),
            ("action_names", self.action_names, chunk.action_names),
        ]
        sizes = [
            ("latent_size", self.latent_size, chunk.latent.size),
            ("language_size", self.language_size, chunk.language.size),
        ]
        self._check("chunk", rows + [row for row in sizes if row[1] > 0])

    def check_robot(
        self,
        cameras: Mapping[str, Sequence[int]],
        state_names: Sequence[str],
        action_names: Sequence[str],
        action_space: str,
        step_ns: int,
    ) -> None:
        """Check that the head fits the robot profile.

        Args:
            cameras: Name to (height, width, 3) of the cameras that the profile offers; it may offer more.
            state_names: Order of the robot's state vector.
            action_names: Order of the robot's action.
            action_space: Meaning of the robot's action.
            step_ns: Control period [ns].

        Raises:
            ManifestError: Naming every field that differs.
        """
        rows = [
            ("state_names", self.state_names, tuple(state_names)),
            ("action_names", self.action_names, tuple(action_names)),
            ("action_space", self.action_space, action_space),
            ("step_ns", self.step_ns, step_ns),
        ]
        rows += [
            (f"camera {name}", tuple(shape), tuple(cameras[name]) if name in cameras else "absent")
            for name, shape in self.cameras.items()
        ]
        self._check("robot", rows)

    def _check(self, other: str, rows: Sequence[tuple[str, object, object]]) -> None:
        wrong = [f"{name}: head {mine!r}, {other} {theirs!r}" for name, mine, theirs in rows if mine != theirs]
        if wrong:
            raise ManifestError(f"the {self.architecture} head does not fit the {other}: " + "; ".join(wrong))
