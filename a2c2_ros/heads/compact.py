"""The compact correction head: the paper's inputs with a small encoder, milliseconds on one CPU core."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from a2c2_ros.heads.base import Head, HeadConfig, zero_last_layer
from a2c2_ros.policies.encoder import ObservationEncoder
from a2c2_ros.policies.flow import FlowNetwork


@dataclass(frozen=True, kw_only=True)
class CompactConfig(HeadConfig):
    """Architecture of a compact head and what it was trained for."""

    width: int = 512  # of the trunk
    channels: int = 32  # of the image encoders
    keypoints: int = 32  # per camera


class CompactHead(Head):
    """One small FiLM encoder per camera, a trunk, and the slot of the chunk added to its input.

    A camera's tokens are its share of the trunk's input: the tick adds them instead of multiplying the encoder's
    output with a large matrix.
    """

    architecture = "compact"
    config_type = CompactConfig

    def __init__(self, config: CompactConfig) -> None:
        super().__init__(config)
        actions = len(config.action_names)
        self.token_size = config.width
        self.encoder = ObservationEncoder.of(config)
        self.slot = nn.Sequential(
            nn.Linear(actions + 2 + config.latent_dim, 256), nn.SiLU(), nn.Linear(256, config.width)
        )
        self.output = zero_last_layer(
            nn.Sequential(nn.Linear(config.width + actions, 256), nn.LayerNorm(256), nn.SiLU(), nn.Linear(256, actions))
        )

    @torch.no_grad()
    def start_from(self, policy: FlowNetwork) -> None:
        """Take the policy's observation encoder and the statistics of its training data."""
        super().start_from(policy)
        own, theirs = self.encoder.state_dict(), policy.encoder.state_dict()
        # The cameras' columns come first: a head without cameras takes those after them.
        columns = own["trunk_input.weight"].shape[1]
        theirs["trunk_input.weight"] = theirs["trunk_input.weight"][:, -columns:]
        self.encoder.load_state_dict({name: theirs[name] for name in own})
        self.encoder_of_policy = True

    def _encode(self, camera: str, image: Tensor, language: Tensor) -> Tensor:
        features = self.encoder.images[camera](image, self._condition(image, language))
        start = 0
        for name in self.encoder.cameras[: self.encoder.cameras.index(camera)]:
            start += self.encoder.images[name].output_dim
        return functional.linear(features, self.encoder.trunk_input.weight[:, start : start + features.shape[1]])

    def _fuse(
        self,
        tokens: Mapping[str, Tensor],
        state: Tensor,
        base_action: Tensor,
        time_feature: Tensor,
        latent: Tensor,
        language: Tensor,
    ) -> Tensor:
        encoder = self.encoder
        rest = torch.cat(
            [encoder.state((state - encoder.state_mean) / encoder.state_std), self._condition(state, language)], dim=1
        )
        trunk_input = encoder.trunk_input
        features = functional.linear(rest, trunk_input.weight[:, -rest.shape[1] :], trunk_input.bias)
        for camera in encoder.cameras:
            features = features + tokens[camera]
        action = self.normalise_action(base_action)
        parts = [action, time_feature] + ([latent] if self.config.latent_dim else [])
        slot = self.slot(torch.cat(parts, dim=1))
        hidden = self.encoder.trunk(features + slot)
        return self.output(torch.cat([hidden, action], dim=1)) * self.action_std

    def _condition(self, batch: Tensor, language: Tensor) -> Tensor:
        """Condition of the image encoders; ``batch`` gives the number of rows where there is no language."""
        encoder = self.encoder
        if self.config.language_dim:
            return encoder.condition((language - encoder.language_mean) / encoder.language_std)
        return functional.silu(encoder.condition[0].bias).expand(batch.shape[0], -1)
