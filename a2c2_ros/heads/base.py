"""What the correction heads have in common in torch: inputs, configuration, files, manifest."""

import dataclasses
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from a2c2_ros.core.errors import ConfigError, ManifestError
from a2c2_ros.core.manifest import HeadManifest
from a2c2_ros.policies.flow import FlowNetwork, compact_state

ARCHITECTURES = {
    "mlp": "a2c2_ros.heads.mlp:MlpHead",
    "compact": "a2c2_ros.heads.compact:CompactHead",
    "transformer": "a2c2_ros.heads.transformer:TransformerHead",
}
ARCHITECTURE_KEY, CONFIG_KEY = "architecture", "config"
ABLATIONS = ("tau", "latent", "language", "images", "base_action")  # inputs that a head can be trained without
LATENT_STATISTICS = ("latent_mean", "latent_std")
RANDOM_RESIDUAL = 0.01  # mean absolute residual of a random head [action units]


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """What a head was trained for. An architecture adds its own sizes."""

    policy_id: str
    horizon: int
    step_ns: int  # [ns]
    action_names: tuple[str, ...]
    action_space: str
    state_names: tuple[str, ...]
    cameras: tuple[str, ...] = ()
    image_size: int = 0  # side of the square images [pixels]
    latent_dim: int = 0  # 0: the head takes no latent
    language_dim: int = 0  # 0: the head takes no language
    training_data_hash: str = ""
    without: tuple[str, ...] = ()  # of ABLATIONS: the graph puts zeros in their place; without images: no cameras
    residual_limit: float = 0.0  # largest residual [action units], by tanh; 0: none
    residual_range: tuple[float, ...] = ()  # (A,) largest residuals of the training [action units]; empty: not known
    reactive: bool = False  # control: the action from the newest observation alone; the residual leads to it
    clock: bool = False  # a reactive head gets the chunk's slot and latent all the same, which tell the time

    def __post_init__(self) -> None:
        for name in ("action_names", "state_names", "cameras", "without", "residual_range"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if unknown := [name for name in self.without if name not in ABLATIONS]:
            raise ConfigError(f"without names {unknown}, allowed are {list(ABLATIONS)}")
        if not 0.0 <= self.residual_limit < float("inf"):
            raise ConfigError(f"residual_limit is {self.residual_limit}, allowed is 0 (none) or more")
        if self.reactive and self.residual_limit:
            raise ConfigError(f"residual_limit is {self.residual_limit}, a reactive head allows none")
        if self.clock and not self.reactive:
            raise ConfigError("clock is True, only a reactive head allows it: every other has the clock")
        if "images" in self.without:
            object.__setattr__(self, "cameras", ())
        for name in ("action_names", "state_names"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is empty, a head needs 1 or more")

    @property
    def unseen(self) -> frozenset[str]:
        """Arguments of :meth:`Head.fuse` that the network gets zeros for."""
        names = {"time_feature" if name == "tau" else name for name in self.without}
        if self.reactive:
            names |= {"base_action"} if self.clock else {"base_action", "time_feature", "latent"}
        return frozenset(names)


class Head(nn.Module):
    """Residual of an action from the newest observation and the slot of the chunk (paper equation 4).

    Inputs are raw: normalisation is inside, in buffers. Each camera's image is encoded on its own, so that this may
    happen when the image arrives; the fusion is what is left for the control tick. An input of size 0 is a (B, 0)
    tensor and is not used. An architecture is :meth:`_encode` and :meth:`_fuse`; what the configuration takes away from
    it (``without``, ``residual_limit``, ``reactive``, ``clock``) is here, inside the exported graph.
    """

    architecture: ClassVar[str]
    config_type: ClassVar[type[HeadConfig]] = HeadConfig
    token_size: int = 0  # of a camera's tokens
    output: nn.Sequential  # to the residual in standard deviations of the action; the last layer is linear
    encoder_of_policy: bool = False  # the encoder started from the policy's, not from random weights

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("action_mean", torch.zeros(len(config.action_names)))
        self.register_buffer("action_std", torch.ones(len(config.action_names)))
        self.register_buffer("latent_mean", torch.zeros(config.latent_dim))
        self.register_buffer("latent_std", torch.ones(config.latent_dim))

    def encode_image(self, camera: str, image: Tensor, language: Tensor) -> Tensor:
        """Tokens of an image, (B, token_size) float32.

        Args:
            camera: Name.
            image: (B, size, size, 3) uint8 RGB.
            language: (B, L) float32.
        """
        return self._encode(camera, image, self._seen("language", language))

    def fuse(
        self,
        tokens: Mapping[str, Tensor],
        state: Tensor,
        base_action: Tensor,
        time_feature: Tensor,
        latent: Tensor,
        language: Tensor,
    ) -> Tensor:
        """Residual (B, A) float32 in action units.

        Args:
            tokens: Camera name to (B, token_size) float32, see :meth:`encode_image`.
            state: (B, S) float32, the newest.
            base_action: (B, A) float32, action of the chunk's slot, action units.
            time_feature: (B, 2) float32, see ``core.features``.
            latent: (B, Z) float32, of the chunk.
            language: (B, L) float32.
        """
        if self.config.latent_dim:
            latent = (latent - self.latent_mean) / self.latent_std
        output = self._fuse(
            tokens,
            state,
            self._seen("base_action", base_action),
            self._seen("time_feature", time_feature),
            self._seen("latent", latent),
            self._seen("language", language),
        )
        if self.config.reactive:
            return output + self.action_mean - base_action
        if limit := self.config.residual_limit:
            return limit * torch.tanh(output / limit)
        return output

    def _encode(self, camera: str, image: Tensor, language: Tensor) -> Tensor:
        raise NotImplementedError

    def _fuse(
        self,
        tokens: Mapping[str, Tensor],
        state: Tensor,
        base_action: Tensor,
        time_feature: Tensor,
        latent: Tensor,
        language: Tensor,
    ) -> Tensor:
        raise NotImplementedError

    def _seen(self, name: str, value: Tensor) -> Tensor:
        return torch.zeros_like(value) if name in self.config.unseen else value

    def forward(
        self,
        images: Mapping[str, Tensor],
        state: Tensor,
        base_action: Tensor,
        time_feature: Tensor,
        latent: Tensor,
        language: Tensor,
    ) -> Tensor:
        """Residual (B, A) from images, camera name to (B, size, size, 3) uint8 RGB; the rest as in :meth:`fuse`."""
        tokens = {name: self.encode_image(name, images[name], language) for name in self.config.cameras}
        return self.fuse(tokens, state, base_action, time_feature, latent, language)

    @classmethod
    def for_policy(cls, policy: FlowNetwork, training_data_hash: str, **options: object) -> Self:
        """A head for a policy, with its statistics and what else this architecture can take from it.

        Args:
            policy: Gives sizes, names and statistics.
            training_data_hash: Of the data that it will be trained on.
            **options: Further fields of the architecture's configuration.

        Raises:
            ConfigError: If the configuration cannot be.
        """
        head = cls.of_facts(dataclasses.asdict(policy.config), training_data_hash, **options)
        head.start_from(policy)
        return head

    @classmethod
    def of_facts(cls, facts: Mapping[str, object], training_data_hash: str, **options: object) -> Self:
        """A head with random weights, without statistics.

        Args:
            facts: What is known of the policy and its data; what is no field of the configuration is left out.
            training_data_hash: Of the data that it will be trained on.
            **options: Further fields of the architecture's configuration.

        Raises:
            ConfigError: If the configuration cannot be.
        """
        fields = {field.name for field in dataclasses.fields(cls.config_type)}
        shared = {name: value for name, value in facts.items() if name in fields}
        return cls(cls.config_type(**(shared | options), training_data_hash=training_data_hash))

    @torch.no_grad()
    def start_from(self, policy: FlowNetwork) -> None:
        """Take the statistics of the policy's training data."""
        self.set_statistics(dict(policy.named_buffers()) | dict(policy.encoder.named_buffers()))

    @torch.no_grad()
    def set_statistics(self, statistics: Mapping[str, Tensor]) -> None:
        """Fill what the inputs are normalised by.

        Args:
            statistics: ``NAME_mean`` and ``NAME_std`` of state, language, action, latent; what this head does not take
                is left out.
        """
        for path, buffer in self.named_buffers():
            name = path.rpartition(".")[2]
            if name in statistics and buffer.numel():
                buffer.copy_(statistics[name])

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *arguments: object) -> None:
        for name in LATENT_STATISTICS:  # heads and checkpoints are older than these
            state_dict.setdefault(f"{prefix}{name}", getattr(self, name))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def normalise_action(self, action: Tensor) -> Tensor:
        """(B, A) in action units to standard deviations from the mean."""
        return (action - self.action_mean) / self.action_std


def zero_last_layer(output: nn.Sequential) -> nn.Sequential:
    """Let an untrained head leave the base action as it is; returns ``output``."""
    nn.init.zeros_(output[-1].weight)
    nn.init.zeros_(output[-1].bias)
    return output


def head_type(architecture: str) -> type[Head]:
    """The class of an architecture; its libraries are imported only now.

    Raises:
        ConfigError: If the name is unknown.
    """
    if architecture not in ARCHITECTURES:
        raise ConfigError(f"head architecture is {architecture!r}, allowed are {sorted(ARCHITECTURES)}")
    module, name = ARCHITECTURES[architecture].split(":")
    return getattr(importlib.import_module(module), name)


def save_head(head: Head, path: str | Path) -> None:
    """Write the head's weights with its architecture and configuration."""
    metadata = {ARCHITECTURE_KEY: head.architecture, CONFIG_KEY: json.dumps(dataclasses.asdict(head.config))}
    save_file(compact_state(head), path, metadata)


def load_head(path: str | Path) -> Head:
    """Read a head of any architecture, evaluation mode, float32 on the CPU.

    Raises:
        ConfigError: If the file is missing.
        ManifestError: If the file is damaged or not a head.
    """
    if not Path(path).is_file():
        raise ConfigError(f"head {path} is not a file")
    try:
        with safe_open(path, "pt") as file:
            names, metadata = file.keys(), file.metadata() or {}
            # Files without an architecture are from before there was more than one.
            cls = head_type(metadata.get(ARCHITECTURE_KEY, "compact"))
            head = cls(cls.config_type(**json.loads(metadata[CONFIG_KEY])))
            tensors = {name: file.get_tensor(name) for name in names}
            head.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in tensors.items()})
    except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ManifestError(f"{path} is not a head file: {type(error).__name__}: {error}") from error
    return head.eval()


def variant(head: Head) -> str:
    """The architecture's name, with what the head was made without: "compact", "compact without tau, latent"."""
    config = head.config
    parts = [head.architecture] + (["reactive"] if config.reactive else []) + (["with clock"] if config.clock else [])
    parts += [f"without {', '.join(config.without)}"] if config.without else []
    parts += [f"limited to {config.residual_limit:g}"] if config.residual_limit else []
    return " ".join(parts)


def manifest_of(head: Head) -> HeadManifest:
    """The manifest of a head before it is compared with its exported graph."""
    config = head.config
    return HeadManifest(
        architecture=variant(head),
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
        tokens=dict.fromkeys(config.cameras, head.token_size),
        residual_range=config.residual_range,
    )


def make_random_head(
    architecture: str,
    *,
    cameras: Sequence[str],
    image_size: int,
    state_names: Sequence[str],
    action_names: Sequence[str],
    action_space: str,
    horizon: int,
    step_ns: int,
    latent_dim: int,
    language_dim: int,
    seed: int,
    policy_id: str,
    **options: object,
) -> Head:
    """A head with random weights and small residuals, to measure time and to test loops with.

    Args:
        architecture: A key of ``ARCHITECTURES``.
        cameras: Camera names.
        image_size: Side of the square images [pixels].
        state_names: Order of the state.
        action_names: Order of the action.
        action_space: Meaning of the action.
        horizon: H.
        step_ns: Duration of a slot [ns].
        latent_dim: Size of the latent, 0 for none.
        language_dim: Size of the language embedding, 0 for none.
        seed: Equal seeds give equal heads.
        policy_id: Of the base policy.
        **options: Further fields of the architecture's configuration.

    Returns:
        In evaluation mode; its residuals on random inputs are ``RANDOM_RESIDUAL`` in the mean.

    Raises:
        ConfigError: If the architecture is unknown or cannot be made so.
    """
    cls = head_type(architecture)
    config = cls.config_type(
        policy_id=policy_id,
        horizon=horizon,
        step_ns=step_ns,
        action_names=action_names,
        action_space=action_space,
        state_names=state_names,
        cameras=cameras,
        image_size=image_size,
        latent_dim=latent_dim,
        language_dim=language_dim,
        **options,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        head = cls(config).eval()
        nn.init.normal_(head.output[-1].weight)
        images = {name: torch.randint(0, 256, (8, image_size, image_size, 3), dtype=torch.uint8) for name in cameras}
        vectors = (torch.randn(8, size) for size in (len(state_names), len(action_names), 2, latent_dim, language_dim))
        head.output[-1].weight.mul_(RANDOM_RESIDUAL / head(images, *vectors).abs().mean())
    return head
