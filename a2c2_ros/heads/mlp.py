"""The paper's head for Kinetix: a multilayer perceptron on state, base action and time feature (section 4.2)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from a2c2_ros.core.errors import ConfigError
from a2c2_ros.heads.base import Head, HeadConfig, zero_last_layer


@dataclass(frozen=True, kw_only=True)
class MlpConfig(HeadConfig):
    """What an MLP head was trained for. It has no cameras."""

    hidden: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cameras:
            raise ConfigError(f"cameras of an mlp head are {list(self.cameras)}, allowed are none")


class MlpHead(Head):
    """Three layers: two of 512 hidden units with LayerNorm and ReLU, and the output.

    The paper gives 0.31M parameters without the size of the state. These have 0.30M with the 51 values that vary in a
    Kinetix level at most and 0.31M with 74; a third hidden layer would make 0.56M. Latent and language are not in the
    paper's head; where their size is not 0 they are concatenated, too.
    """

    architecture = "mlp"
    config_type = MlpConfig

    def __init__(self, config: MlpConfig) -> None:
        super().__init__(config)
        states, actions, hidden = len(config.state_names), len(config.action_names), config.hidden
        self.register_buffer("state_mean", torch.zeros(states))
        self.register_buffer("state_std", torch.ones(states))
        self.register_buffer("language_mean", torch.zeros(config.language_dim))
        self.register_buffer("language_std", torch.ones(config.language_dim))
        self.output = zero_last_layer(
            nn.Sequential(
                nn.Linear(states + actions + 2 + config.latent_dim + config.language_dim, hidden),
                nn.LayerNorm(hidden),
                nn.ReLU(),
                nn.Linear(hidden, hidden),
                nn.LayerNorm(hidden),
                nn.ReLU(),
                nn.Linear(hidden, actions),
            )
        )

    def _fuse(
        self,
        tokens: Mapping[str, Tensor],
        state: Tensor,
        base_action: Tensor,
        time_feature: Tensor,
        latent: Tensor,
        language: Tensor,
    ) -> Tensor:
        parts = [(state - self.state_mean) / self.state_std, self.normalise_action(base_action), time_feature]
        parts += [latent] if self.config.latent_dim else []
        parts += [(language - self.language_mean) / self.language_std] if self.config.language_dim else []
        return self.output(torch.cat(parts, dim=1)) * self.action_std
