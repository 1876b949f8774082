"""Any LeRobot 0.6 policy that predicts chunks, through LeRobot's own factory, processors and normalisation.

LeRobot is imported in this module and in no other policy. It reads safetensors only, and nothing is downloaded unless
the environment says HF_HUB_OFFLINE=0.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the libraries below read it

import numpy as np
import torch
from draccus.utils import DraccusException
from huggingface_hub import snapshot_download
from lerobot.configs import FeatureType, PreTrainedConfig, RTCAttentionSchedule
from lerobot.policies import get_policy_class, make_pre_post_processors, prepare_observation_for_inference
from lerobot.policies.rtc import RTCConfig
from lerobot.policies.utils import populate_queues
from lerobot.processor import TokenizerProcessorStep
from lerobot.processor.pipeline import ProcessorMigrationError
from lerobot.utils.constants import ACTION, OBS_IMAGES, OBS_STATE
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from a2c2_ros.core.errors import ConfigError, PolicyError
from a2c2_ros.policies.base import REMEMBERED, Continuation, PolicyOptions, PolicyOutput, check_observation
from a2c2_ros.policies.language import InstructionEncoder
from a2c2_ros.policies.lerobot_files import VLM_FOLDER, WEIGHTS_FILE, LeRobotMapping, checkpoint_id

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROCESSOR_FILES = ("policy_preprocessor.json", "policy_postprocessor.json")
RESIZING_FIELDS = ("resize_imgs_with_padding", "image_resolution", "resize_shape")
"""Fields of LeRobot's configurations that say that the policy brings images of any size to its own."""

# What LeRobot and the libraries under it raise for files, settings and observations that do not fit.
LEROBOT_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    DraccusException,
    LookupError,
    OSError,
    ProcessorMigrationError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class LatentPlace:
    """Where in a policy the latent z is taken, at the first call of a module in an inference.

    Attributes:
        module: Dotted path inside the policy.
        argument: Keyword argument of the module that is the latent; empty: its output.
        masked: Only the tokens that ``embed_prefix`` of the policy's model calls valid count.
        batch_axis: Axis of the observations; None: not known, so that only one at a time can be looked at.
    """

    module: str
    argument: str = ""
    masked: bool = False
    batch_axis: int | None = 0


LATENT_PLACES = {
    # The last hidden state of the VLM over images, instruction and (SmolVLA) state, mean over the valid tokens.
    "smolvla": LatentPlace("model.vlm_with_expert.vlm.model.text_model.norm", masked=True),
    "pi0": LatentPlace("model.paligemma_with_expert.paligemma.model.language_model.norm", masked=True),
    "pi05": LatentPlace("model.paligemma_with_expert.paligemma.model.language_model.norm", masked=True),
    # The output of the transformer encoder (tokens, B, Z), mean over all tokens.
    "act": LatentPlace("model.encoder", batch_axis=1),
    # The global conditioning of the denoising network: state and image features.
    "diffusion": LatentPlace("diffusion.unet", argument="global_cond"),
}
"""Place of the latent per policy family; the others have to be named in the YAML file."""


class LeRobotPolicy:
    """A LeRobot checkpoint as a :class:`ChunkPolicy`.

    Every inference is on its own: queues and other memory of the policy are cleared before. A policy that looks at
    several observations gets the present one repeated, as LeRobot does at the start of an episode.
    """

    def __init__(self, path: str | Path, options: PolicyOptions | None = None) -> None:
        """Load a checkpoint and run it once, on a black image.

        Args:
            path: Folder, or a hub id with an optional revision, "owner/name@revision".
            options: All of them; ``mapping`` as in :class:`LeRobotMapping`. float32 computes with the weights as they
                are stored; other types use the family's own setting if it has one, else autocast.

        Raises:
            ConfigError: If an option or an entry of the mapping does not fit the policy, the robot or this machine.
            PolicyError: If the checkpoint cannot be used.
        """
        options = options or PolicyOptions()
        self._mapping = LeRobotMapping.of(options.mapping)
        self._device = options.torch_device()
        if options.dtype not in DTYPES:
            raise ConfigError(f"dtype is {options.dtype!r}, allowed are {sorted(DTYPES)}")
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        folder = checkpoint_folder(path)
        self._name = f"LeRobot policy {path}"
        with self._errors():
            config = PreTrainedConfig.from_pretrained(folder, local_files_only=True)
        self.family = config.type
        self._name = f"{self.family} policy {path}"
        self._vlm = str(folder / VLM_FOLDER) if (folder / VLM_FOLDER).is_dir() else ""
        self._autocast = self._configure(config, options)
        self.policy_id = checkpoint_id(folder, self._mapping)
        features = config.input_features or {}
        self._images = {name: tuple(f.shape) for name, f in features.items() if f.type is FeatureType.VISUAL}
        self._state = self._match_state(config)
        self._features = self._match_cameras(options)
        self.cameras = tuple(self._features)
        self.image_size = self._side(config, options)
        self._load(folder, config)
        self._latent = LatentHook(self._policy, self._place())
        self._tokenizer = next((s for s in self._preprocess.steps if isinstance(s, TokenizerProcessorStep)), None)
        self._embed_tokens = _method(self._policy, "embed_language_tokens") if self._tokenizer else None
        self._encoder = InstructionEncoder()
        self.trained_for = {}  # the configuration of a checkpoint has neither rate nor names
        self.embed = lru_cache(REMEMBERED)(self.embed)
        self._rtc_ready = False

        robot = options.robot
        state = config.input_features.get(self._state)
        # A policy without state takes that of any robot.
        self.state_dim = state.shape[0] if state else len(robot.state_names) if robot else 0
        self.action_names = self._names(config, options)
        output = self._probe()
        self.horizon = len(output.actions)
        self.latent_dim, self.language_dim = len(output.latent), len(output.language)

    def embed(self, instruction: str) -> np.ndarray:
        """Embedding of an instruction, (L,) float32, read-only; the newest are remembered.

        The mean of the policy's own token embeddings if it has ``embed_language_tokens`` (SmolVLA, pi0, pi0.5), else
        the sentence embedding of :class:`InstructionEncoder`.
        """
        if self._embed_tokens is None:
            return self._encoder.embed(instruction)
        with self._errors(), torch.no_grad():
            tokens = self._tokenizer.input_tokenizer(instruction, return_tensors="pt")["input_ids"]
            embedding = self._embed_tokens(tokens.to(self._device))[0].float().mean(dim=0).cpu().numpy()
        embedding.setflags(write=False)
        return embedding

    def predict(
        self,
        observation: Mapping[str, np.ndarray],
        instruction: str,
        *,
        seed: int,
        continuation: Continuation | None = None,
    ) -> PolicyOutput:
        """Compute a chunk. See :meth:`ChunkPolicy.predict`."""
        language = self.embed(instruction)
        actions, latents = self._infer([observation], [instruction], seed, continuation)
        return PolicyOutput(actions[0], latents[0], language)

    def largest_delay(self, chunking: str) -> int | None:
        """See :meth:`ChunkPolicy.largest_delay`; LeRobot 0.6 trains no policy for "tt_rtc"."""
        return self.horizon if chunking == "rtc" and self._policy.supports_rtc() else None

    def predict_batch(
        self,
        images: Mapping[str, np.ndarray],
        states: np.ndarray,
        instructions: Sequence[str],
        *,
        seed: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Compute the chunks of B observations at once.

        Args:
            images: Per camera (B, image_size, image_size, 3) uint8 RGB upright.
            states: (B, state_dim) float32.
            instructions: B of them.
            seed: Of the sampling noise, which is drawn for the whole batch: the chunks of a policy that samples are
                others than those of B single predictions.

        Returns:
            Chunks (B, H, A) float32 in action units and latents (B, Z) float32.

        Raises:
            ObservationError: If an image or a state has a wrong shape, dtype or value.
            PolicyError: If a chunk or latent is not finite.
        """
        rows = [
            {camera: images[camera][i] for camera in self.cameras} | {"state": states[i]}
            for i in range(len(instructions))
        ]
        if self._latent.place.batch_axis is None:
            parts = [self._infer([row], [text], seed + i) for i, (row, text) in enumerate(zip(rows, instructions))]
            actions, latents = (np.concatenate(arrays) for arrays in zip(*parts))
        else:
            actions, latents = self._infer(rows, instructions, seed)
        if not (np.isfinite(actions).all() and np.isfinite(latents).all()):
            raise PolicyError(f"{self._name} gave chunks or latents with values that are not finite")
        return actions, latents

    def _infer(
        self,
        observations: Sequence[Mapping[str, np.ndarray]],
        instructions: Sequence[str],
        seed: int,
        continuation: Continuation | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Chunks (B, H, A) in action units and latents (B, Z), both float32, of B observations."""
        for observation in observations:
            check_observation(self, observation)
        cuda = [self._device.index or 0] if self._device.type == "cuda" else []
        with self._errors(), torch.no_grad(), torch.random.fork_rng(cuda), self._arithmetic():
            torch.manual_seed(seed)
            actions, latents = (t.float().cpu() for t in self._run(observations, instructions, continuation))
        count = len(observations)
        if actions.ndim != 3 or actions.shape[0] != count or actions.shape[1] < 2:
            raise PolicyError(
                f"{self._name} returned {tuple(actions.shape)}, needed are chunks ({count}, H, A) with H > 1"
            )
        if len(latents) != count:
            raise PolicyError(f"{self._name} gave {len(latents)} latents of {count} observations")
        return actions.numpy(), latents.numpy()

    def _run(
        self,
        observations: Sequence[Mapping[str, np.ndarray]],
        instructions: Sequence[str],
        continuation: Continuation | None,
    ) -> tuple[Tensor, Tensor]:
        rows = []
        for observation in observations:
            inputs = {feature: np.array(observation[camera]) for camera, feature in self._features.items()}
            if self._state:
                inputs[self._state] = np.array(observation["state"])
            rows.append(prepare_observation_for_inference(inputs, self._device))
        batch = {
            name: torch.cat([row[name] for row in rows]) if isinstance(value, Tensor) else value
            for name, value in rows[0].items()
        } | {"task": list(instructions)}
        if self._mapping.image_size:
            size = (self._mapping.image_size,) * 2
            for feature in self._features.values():
                batch[feature] = nn.functional.interpolate(batch[feature], size, mode="bilinear", antialias=True)
        guidance = {}
        if continuation is not None and len(continuation.actions):
            self._prepare_rtc(continuation)
            # Through the preprocessor as in training, which normalises and, where the policy wants it, makes relative.
            batch[ACTION] = torch.tensor(continuation.actions, device=self._device)[None]
        batch = self._preprocess(batch)
        if continuation is not None and len(continuation.actions):
            guidance = {
                "prev_chunk_left_over": batch.pop(ACTION),
                "inference_delay": continuation.delay_steps,
                "execution_horizon": len(continuation.actions),
            }
        batch = {name: value for name, value in batch.items() if value is not None}
        self._policy.reset()
        self._fill_queues(batch)
        self._latent.clear()
        try:
            chunk = self._policy.predict_action_chunk(batch, **guidance)
        except NotImplementedError as error:
            raise PolicyError(f"{self._name} does not predict chunks: {error}") from error
        return self._postprocess(chunk), self._latent.take()

    def _fill_queues(self, batch: dict[str, Any]) -> None:
        """Some families take their observations from queues that only ``select_action`` fills; do what it does."""
        queues = getattr(self._policy, "_queues", None) or {}
        if OBS_STATE in queues:
            images = [batch[feature] for feature in self._images if feature in batch]
            if images:
                batch[OBS_IMAGES] = torch.stack(images, dim=-4)
            populate_queues(queues, batch, exclude_keys=[ACTION])

    def _prepare_rtc(self, continuation: Continuation) -> None:
        """Switch LeRobot's real-time chunking on (arXiv 2506.07339).

        Raises:
            PolicyError: If the family does not have it.
        """
        if continuation.mode != "rtc":
            raise PolicyError(
                f"{self._name} cannot go on from a chunk with {continuation.mode!r}: LeRobot 0.6 trains no policy for "
                f"it; use rtc or asynchronous"
            )
        if self._rtc_ready:
            return
        if not self._policy.supports_rtc():
            raise PolicyError(f"{self._name} cannot go on from a chunk with 'rtc': LeRobot has no RTC for this family")
        fields = {"prefix_attention_schedule": "EXP"} | dict(self._mapping.rtc)
        fields["prefix_attention_schedule"] = RTCAttentionSchedule(fields["prefix_attention_schedule"])
        self._policy.config.rtc_config = RTCConfig(**fields)
        if hasattr(self._policy, "init_rtc_processor"):
            self._policy.init_rtc_processor()
        self._rtc_ready = True

    def _configure(self, config: PreTrainedConfig, options: PolicyOptions) -> torch.dtype | None:
        """Set device, dtype and the fields that the YAML file changes; returns the type for autocast."""
        if config.use_peft:
            raise PolicyError(f"{self._name} is a PEFT adapter: merge it into its base policy and save that")
        fields = {item.name for item in dataclasses.fields(config)}
        changes = {"device": str(self._device)}
        if self._vlm and "vlm_model_name" in fields:
            changes["vlm_model_name"] = self._vlm
        changes |= dict(self._mapping.config)
        if unknown := sorted(set(changes) - fields):
            raise ConfigError(
                f"entry 'config' has {unknown}, which {self.family} does not have; it has {sorted(fields)}"
            )
        autocast = None
        if "dtype" in fields:  # pi0 and its relatives
            changes.setdefault("dtype", options.dtype)
        elif options.dtype != "float32":
            autocast = DTYPES[options.dtype]
        for name, value in changes.items():
            setattr(config, name, value)
        with self._errors():
            config.__post_init__()
        return autocast

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What LeRobot raises, as errors of this package that name the policy."""
        try:
            yield
        except (ConfigError, PolicyError):
            raise
        except ImportError as error:
            raise PolicyError(f"{self._name} needs a package that is not installed: {error}") from error
        except LEROBOT_ERRORS as error:
            raise PolicyError(f"{self._name}: {type(error).__name__}: {error}") from error

    def _arithmetic(self) -> torch.autocast:
        return torch.autocast(self._device.type, dtype=self._autocast, enabled=self._autocast is not None)

    def _match_state(self, config: PreTrainedConfig) -> str:
        """The feature for the robot's state, empty if the policy takes none."""
        wanted = {name: feature.type for name, feature in (config.input_features or {}).items()}
        name = self._mapping.state
        if name not in wanted and name != OBS_STATE:
            raise ConfigError(f"{self._name} has no feature {name!r} for the state, it has {sorted(wanted)}")
        # Other STATE features are only listed: LeRobot names all columns of the data set, the families read one.
        if others := sorted(other for other in wanted if wanted[other] is FeatureType.ENV and other != name):
            raise ConfigError(
                f"{self._name} needs {others}, which a robot does not give; it gives images and one state ('state' in "
                f"the policy's YAML file is {name!r})"
            )
        return name if name in wanted else ""

    def _match_cameras(self, options: PolicyOptions) -> dict[str, str]:
        """Camera of the robot to the policy's feature."""
        wanted = [name for name in self._images if name not in self._mapping.empty_cameras]
        features = dict(self._mapping.cameras) or {
            name.removeprefix(f"{OBS_IMAGES}."): name for name in wanted if "empty_camera" not in name
        }
        known = options.robot.cameras if options.robot else tuple(features)
        for camera, feature in features.items():
            if camera not in known:
                raise ConfigError(
                    f"{self._name} needs camera {camera!r} as {feature!r}, the robot has {sorted(known)}; map them "
                    f"with 'cameras' in the policy's YAML file"
                )
            if feature not in self._images:
                raise ConfigError(
                    f"camera {camera!r} is mapped to {feature!r}, {self._name} has {sorted(self._images)}"
                )
        unused = [name for name in wanted if name not in features.values() and "empty_camera" not in name]
        if unused:
            raise ConfigError(
                f"{self._name} needs {unused}: map a camera to each with 'cameras' in the policy's YAML file, or list "
                f"them in 'empty_cameras'"
            )
        return features

    def _side(self, config: PreTrainedConfig, options: PolicyOptions) -> int:
        """Side of the robot's images [pixels], after comparing them with the policy's features."""
        # Channels first in LeRobot.
        shapes = {feature: self._images[feature][-2:] for feature in self._features.values()}
        sizes = {camera: tuple(options.camera_shapes.get(camera, ())[:2]) for camera in self._features}
        sides = {size or shapes[self._features[camera]] for camera, size in sizes.items()}
        if len(sides) > 1 or any(height != width for height, width in sides):
            raise ConfigError(
                f"{self._name} gets images of {sorted(sides)} (height, width), allowed are square ones of one size: "
                f"resize them in the robot profile"
            )
        side = sides.pop()[0] if sides else 0
        given = self._mapping.image_size or side
        if any(getattr(config, name, None) for name in RESIZING_FIELDS):
            return side
        for camera, feature in self._features.items():
            if shapes[feature] != (given, given):
                raise ConfigError(
                    f"camera {camera!r} gives {given}x{given} images, {self._name} needs {shapes[feature]} for "
                    f"{feature!r}: resize them in the robot profile, or set 'image_size' in the policy's YAML file"
                )
        return side

    def _names(self, config: PreTrainedConfig, options: PolicyOptions) -> tuple[str, ...]:
        """Names of the action's channels; checkpoints of LeRobot have none, so a robot of the same size gives them."""
        if config.action_feature is None:
            raise PolicyError(f"{self._name} has no output feature {ACTION!r}, it has {sorted(config.output_features)}")
        size = config.action_feature.shape[0]
        default = options.robot.action_names if options.robot else tuple(f"action_{i}" for i in range(size))
        names = self._mapping.action_names or default
        if len(names) != size:
            raise ConfigError(f"{self._name} has an action of {size} channels, allowed by the robot are {names}")
        return names

    def _place(self) -> LatentPlace:
        name = self._mapping.latent
        if name != "auto":
            return LatentPlace(name, batch_axis=None)
        if self.family not in LATENT_PLACES:
            modules = [n for n, _ in self._policy.named_modules() if n.count(".") == 1]
            raise ConfigError(
                f"{self._name}: the place of the latent is known for {sorted(LATENT_PLACES)} only; name a module as "
                f"'latent' in the policy's YAML file, such as {modules[:20]}"
            )
        return LATENT_PLACES[self.family]

    def _load(self, folder: Path, config: PreTrainedConfig) -> None:
        """Build policy and processors, fill in the weights, and make sure that they were filled in."""
        overrides: dict[str, dict[str, str]] = {"device_processor": {"device": str(self._device)}}
        if tokenizer := self._mapping.tokenizer or self._vlm:
            overrides["tokenizer_processor"] = {"tokenizer_name": tokenizer}
        with self._errors():
            for name in PROCESSOR_FILES:
                _check_processors(folder / name)
            self._policy = get_policy_class(self.family).from_pretrained(folder, config=config, local_files_only=True)
            self._policy.to(self._device).eval()
            self._preprocess, self._postprocess = make_pre_post_processors(
                config, str(folder), preprocessor_overrides=overrides
            )
            if self.family in LATENT_PLACES:  # the others may read parts from elsewhere
                self._check_weights(folder / WEIGHTS_FILE)

    def _check_weights(self, path: Path) -> None:
        """LeRobot only prints what it could not load, and goes on with random weights."""
        state = self._policy.state_dict()
        with safe_open(path, "pt") as file:
            stored = {name if name in state else f"model.{name}": name for name in file.keys()}  # noqa: SIM118
            filled = {state[name].data_ptr() for name in stored if name in state}
            missing = [name for name, tensor in state.items() if name not in stored and tensor.data_ptr() not in filled]
            if missing:
                raise PolicyError(
                    f"{path} has no weights for {len(missing)} of {len(state)} tensors, the first is {missing[0]!r}"
                )
            for name in sorted(set(stored) & set(state), key=lambda n: state[n].numel())[:20]:
                tensor = state[name].cpu()
                if not torch.equal(tensor, file.get_tensor(stored[name]).to(tensor.dtype)):
                    raise PolicyError(f"{path}: LeRobot did not load {name!r}")

    def _probe(self) -> PolicyOutput:
        """One inference tells H and the size of the latent for any family."""
        observation = {name: np.zeros((self.image_size, self.image_size, 3), np.uint8) for name in self.cameras}
        observation["state"] = np.zeros(self.state_dim, np.float32)
        return self.predict(observation, "warm up", seed=0)


class LatentHook:
    """Takes the latent out of a running policy."""

    def __init__(self, policy: nn.Module, place: LatentPlace) -> None:
        """Register the hook.

        Raises:
            ConfigError: If the policy has no such module.
        """
        self.place, self._features, self._valid = place, None, None
        try:
            module = policy.get_submodule(place.module)
        except AttributeError as error:
            raise ConfigError(f"latent is {place.module!r}, but {error}") from error
        if place.argument:
            module.register_forward_pre_hook(
                lambda _, args, kwargs: self._keep(kwargs[place.argument]), with_kwargs=True
            )
        else:
            module.register_forward_hook(lambda _, args, output: self._keep(output))
        if place.masked:
            policy.model.embed_prefix = self._recording(policy.model.embed_prefix)

    def clear(self) -> None:
        """Before an inference."""
        self._features = self._valid = None

    def take(self) -> Tensor:
        """(B, Z) of the inference that just ended.

        Raises:
            PolicyError: If the module was not called or its output has no features of observations.
        """
        if not isinstance(self._features, Tensor):
            raise PolicyError(
                f"latent {self.place.module!r} gave {type(self._features).__name__} in an inference, needed is a "
                f"tensor; a module that is not called gives NoneType"
            )
        return pool(self._features, self._valid, self.place.batch_axis)

    def _keep(self, value: object) -> None:
        if self._features is None:
            while isinstance(value, tuple | list) and value:
                value = value[0]
            # Models of transformers return an object with the hidden state in front.
            self._features = getattr(value, "last_hidden_state", value)

    def _recording(self, embed_prefix: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, Tensor]:
            result = embed_prefix(*args, **kwargs)
            self._valid = result[1]
            return result

        return recorded


def pool(features: Tensor, valid: Tensor | None = None, batch_axis: int | None = None) -> Tensor:
    """One vector per observation.

    Args:
        features: (B, Z), tokens as (B, L, Z) or (L, B, Z), or feature maps (B, Z, h, w).
        valid: (B, L) bool, the tokens that count; None: all.
        batch_axis: Where B is; None: B is 1 and the first axis of size 1 is it.

    Returns:
        (B, Z), the mean over tokens or pixels.

    Raises:
        PolicyError: If ``features`` has another shape.
    """
    shape = tuple(features.shape)
    if batch_axis is None:
        batch_axis = shape[:2].index(1) if 1 in shape[: 2 if len(shape) == 3 else 1] else -1
    if not 2 <= len(shape) <= 4 or batch_axis < 0:
        raise PolicyError(
            f"the latent has shape {shape}, allowed are (B, Z), (B, L, Z), (L, B, Z) and (B, Z, h, w); B is 1 for a "
            f"module that is named in the YAML file"
        )
    if len(shape) == 2:
        return features
    if len(shape) == 4:
        return features.mean(dim=(2, 3))
    tokens = features.movedim(batch_axis, 0)
    if valid is None:
        return tokens.mean(dim=1)
    weights = valid[:, :, None]
    return torch.where(weights, tokens, 0.0).sum(dim=1, dtype=torch.float32) / weights.sum(dim=1)


def checkpoint_folder(path: str | Path) -> Path:
    """Folder of a checkpoint given by folder or hub id.

    Raises:
        PolicyError: If it is not there, or has no safetensors.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        name, _, revision = str(path).partition("@")
        offline = os.environ["HF_HUB_OFFLINE"].upper() in ("1", "ON", "YES", "TRUE")
        try:
            files = ["*.json", "*.safetensors", "*.txt", "*.model"]
            folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=files))
        except (OSError, ValueError) as error:
            hint = f"; offline, fetch it first: HF_HUB_OFFLINE=0 hf download {name}" if offline else ""
            raise PolicyError(
                f"LeRobot policy {path}: neither a folder nor on the hub: {str(error).splitlines()[0]}{hint}"
            ) from error
    for name in ("config.json", WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise PolicyError(
                f"LeRobot policy {folder} has no {name}, it has {sorted(p.name for p in folder.iterdir())}; weights "
                f"are read from safetensors only"
            )
    return folder


def _check_processors(path: Path) -> None:
    """A step given by class would be called with arguments from the file, whatever class it is.

    Raises:
        PolicyError: If the file is missing or names a class outside LeRobot.
    """
    try:
        steps = json.loads(path.read_text(encoding="utf-8"))["steps"]
    except FileNotFoundError as error:
        raise PolicyError(
            f"{path} is missing: the checkpoint is older than LeRobot's processors, see migrate_policy_normalization "
            f"in lerobot.processor"
        ) from error
    for step in steps:
        if "registry_name" not in step and not step["class"].startswith("lerobot."):
            raise PolicyError(f"{path} names the class {step['class']!r}, allowed are those of LeRobot")


def _method(policy: nn.Module, name: str) -> Callable[..., Any] | None:
    return next((getattr(module, name) for module in policy.modules() if hasattr(module, name)), None)
