"""The paper's head for LIBERO: ResNet-18 tokens of the cameras in a transformer encoder (section 4.2)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import resnet18

from a2c2_ros.core.errors import ConfigError
from a2c2_ros.heads.base import Head, HeadConfig, zero_last_layer

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # RGB, of values 0 to 1
WIDTH = 512  # of the tokens and of ResNet-18's last features


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(HeadConfig):
    """Architecture of a transformer head and what it was trained for."""

    image_size: int = 224  # [pixels]
    encoded_size: int = 0  # side that images are scaled to before ResNet-18 [pixels]; 0: as they are
    layers: int = 6
    attention_heads: int = 8
    feed_forward: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.encoded_size or self.image_size
        if self.cameras and size < 32:
            raise ConfigError(f"the encoded image size is {size}, ResNet-18 needs 32 or more")


class TransformerHead(Head):
    """One token each of the cameras, the language, the base action, the latent and the time feature.

    One ResNet-18 serves all cameras. A learned embedding tells the tokens apart. The mean of the encoder's outputs goes
    with the base action and the state through a 3-layer MLP. With two cameras, a latent of 960 and a language embedding
    of 960 (SmolVLA) there are 31.6M parameters (paper: 32M), with the shipped policy's 256 and 384 there are 31.0M.
    """

    architecture = "transformer"
    config_type = TransformerConfig
    token_size = WIDTH

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        states, actions = len(config.state_names), len(config.action_names)
        if config.cameras:
            self.backbone = resnet18(weights=None)
            self.backbone.fc = nn.Identity()
        self.register_buffer("image_mean", 255.0 * torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("image_std", 255.0 * torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)
        self.register_buffer("state_mean", torch.zeros(states))
        self.register_buffer("state_std", torch.ones(states))
        self.register_buffer("language_mean", torch.zeros(config.language_dim))
        self.register_buffer("language_std", torch.ones(config.language_dim))
        sizes = {
            "language": config.language_dim,
            "base_action": actions,
            "latent": config.latent_dim,
            "time_feature": 2,
        }
        self.project = nn.ModuleDict({name: nn.Linear(size, WIDTH) for name, size in sizes.items() if size})
        self.kinds = nn.Parameter(0.02 * torch.randn(len(config.cameras) + len(self.project), WIDTH))
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, config.attention_heads, config.feed_forward, batch_first=True),
            config.layers,
            enable_nested_tensor=False,
        )
        for parameter in self.encoder.parameters():  # the layers start as copies of each other
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.output = zero_last_layer(
            nn.Sequential(
                nn.Linear(WIDTH + actions + states, WIDTH),
                nn.ReLU(),
                nn.Linear(WIDTH, WIDTH),
                nn.ReLU(),
                nn.Linear(WIDTH, actions),
            )
        )

    def _encode(self, camera: str, image: Tensor, language: Tensor) -> Tensor:
        pixels = image.permute(0, 3, 1, 2).float()
        if size := self.config.encoded_size:
            pixels = functional.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
        return self.backbone((pixels - self.image_mean) / self.image_std)

    def _fuse(
        self,
        tokens: Mapping[str, Tensor],
        state: Tensor,
        base_action: Tensor,
        time_feature: Tensor,
        latent: Tensor,
        language: Tensor,
    ) -> Tensor:
        action = self.normalise_action(base_action)
        language = (language - self.language_mean) / self.language_std
        values = {"language": language, "base_action": action, "latent": latent, "time_feature": time_feature}
        sequence = [tokens[camera] for camera in self.config.cameras]
        sequence += [project(values[name]) for name, project in self.project.items()]
        pooled = self.encoder(torch.stack(sequence, dim=1) + self.kinds).mean(dim=1)
        state = (state - self.state_mean) / self.state_std
        return self.output(torch.cat([pooled, action, state], dim=1)) * self.action_std
