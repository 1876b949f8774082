"""The compact correction head: the paper's inputs with a small encoder, milliseconds on one CPU core."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from a2c2_ros.core.errors import ConfigError, ManifestError
from a2c2_ros.policies.encoder import ObservationEncoder
from a2c2_ros.policies.flow import FlowNetwork, compact_state

CONFIG_KEY = "config"


@dataclass(frozen=True)
class CompactConfig:
    """Architecture of a compact head and what it was trained for; kept in the metadata of its safetensors file."""

    policy_id: str
    horizon: int
    step_ns: int  # [ns]
    action_names: tuple[str, ...]
    action_space: str
    state_names: tuple[str, ...]
    cameras: tuple[str, ...]
    image_size: int  # [pixels]
    latent_dim: int
    language_dim: int
    width: int
    channels: int
    keypoints: int
    training_data_hash: str = ""

    def __post_init__(self) -> None:
        for name in ("action_names", "state_names", "cameras"):
            object.__setattr__(self, name, tuple(getattr(self, name)))


class CompactHead(nn.Module):
    """Residual of an action from the newest observation and the slot of the chunk (paper equation 4)."""

    def __init__(self, config: CompactConfig) -> None:
        super().__init__()
        self.config = config
        actions = len(config.action_names)
        self.encoder = ObservationEncoder.of(config)
        self.slot = nn.Sequential(
            nn.Linear(actions + 2 + config.latent_dim, 256), nn.SiLU(), nn.Linear(256, config.width)
        )
        self.output = nn.Sequential(
            nn.Linear(config.width + actions, 256), nn.LayerNorm(256), nn.SiLU(), nn.Linear(256, actions)
        )
        # An untrained head leaves the base action as it is.
        nn.init.zeros_(self.output[-1].weight)
        nn.init.zeros_(self.output[-1].bias)
        self.register_buffer("action_mean", torch.zeros(actions))
        self.register_buffer("action_std", torch.ones(actions))

    @classmethod
    def for_policy(cls, policy: FlowNetwork, training_data_hash: str) -> "CompactHead":
        """A head for a policy, its observation encoder and statistics taken from it."""
        fields = {field.name for field in dataclasses.fields(CompactConfig)}
        shared = {k: v for k, v in dataclasses.asdict(policy.config).items() if k in fields}
        head = cls(CompactConfig(**shared, training_data_hash=training_data_hash))
        head.encoder.load_state_dict(policy.encoder.state_dict())
        head.action_mean.copy_(policy.action_mean)
        head.action_std.copy_(policy.action_std)
        return head

    def forward(
        self,
        images: Mapping[str, Tensor],
        state: Tensor,
        base_action: Tensor,
        time_feature: Tensor,
        latent: Tensor,
        language: Tensor,
    ) -> Tensor:
        """Residual (B, A) float32 in action units.

        Args:
            images: Camera name to (B, size, size, 3) uint8 RGB, the newest.
            state: (B, S) float32, the newest.
            base_action: (B, A) float32, action of the chunk's slot, action units.
            time_feature: (B, 2) float32, see ``core.features``.
            latent: (B, Z) float32, of the chunk.
            language: (B, L) float32.
        """
        return self.correct(self.encoder.features(images, state, language), base_action, time_feature, latent)

    def correct(self, features: Tensor, base_action: Tensor, time_feature: Tensor, latent: Tensor) -> Tensor:
        """As :meth:`forward` from encoded observations (B, width): in training several slots share one."""
        action = (base_action - self.action_mean) / self.action_std
        slot = self.slot(torch.cat([action, time_feature, latent], dim=1))
        hidden = self.encoder.trunk(features + slot)
        return self.output(torch.cat([hidden, action], dim=1)) * self.action_std


def save_head(head: CompactHead, path: str | Path) -> None:
    """Write the head's weights with its configuration."""
    save_file(compact_state(head), path, {CONFIG_KEY: json.dumps(dataclasses.asdict(head.config))})


def load_head(path: str | Path) -> CompactHead:
    """Read a head, evaluation mode, float32 on the CPU.

    Raises:
        ConfigError: If the file is missing.
        ManifestError: If the file is damaged or not a compact head.
    """
    if not Path(path).is_file():
        raise ConfigError(f"compact head {path} is not a file")
    try:
        with safe_open(path, "pt") as file:
            names, metadata = file.keys(), file.metadata() or {}
            head = CompactHead(CompactConfig(**json.loads(metadata[CONFIG_KEY])))
            head.load_state_dict({name: file.get_tensor(name).float() for name in names})
    except (SafetensorError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ManifestError(f"{path} is not a compact head: {type(error).__name__}: {error}") from error
    return head.eval()
