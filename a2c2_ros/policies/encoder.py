"""Observation encoder in torch, shared by the flow policy and the compact head."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class EncoderConfig(Protocol):
    """What the configurations of the policy and the head say of the encoder."""

    cameras: tuple[str, ...]
    image_size: int  # [pixels]
    state_names: tuple[str, ...]
    language_dim: int
    width: int
    channels: int
    keypoints: int


class Film(nn.Module):
    """Scale and shift of feature maps by a condition, the identity at the start."""

    def __init__(self, condition_dim: int, channels: int) -> None:
        super().__init__()
        self.project = nn.Linear(condition_dim, 2 * channels)
        nn.init.zeros_(self.project.weight)
        nn.init.zeros_(self.project.bias)

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        """Apply to (B, C, h, w) features a (B, condition_dim) condition."""
        scale, shift = self.project(condition)[:, :, None, None].chunk(2, dim=1)
        return features * (1.0 + scale) + shift


class ConvBlock(nn.Module):
    """Convolution, GroupNorm, FiLM, SiLU; with a skip connection where the shape stays."""

    def __init__(self, inputs: int, outputs: int, condition_dim: int, kernel: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding=(kernel - 1) // 2, bias=False)
        self.norm = nn.GroupNorm(8, outputs)
        self.film = Film(condition_dim, outputs)
        self.skip = inputs == outputs and stride == 1

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        """(B, inputs, h, w) to (B, outputs, h / stride, w / stride)."""
        out = nn.functional.silu(self.film(self.norm(self.convolution(features)), condition))
        return features + out if self.skip else out


class ImageEncoder(nn.Module):
    """One camera: where things are (spatial-softmax keypoints) and what is there (a coarse grid).

    The condition says which of several equal objects the instruction means, so it enters before the keypoints.
    """

    GRID_CHANNELS = 16

    def __init__(self, image_size: int, channels: int, keypoints: int, condition_dim: int) -> None:
        super().__init__()
        side = image_size // 4
        # A stride-4 stem: most of the cost of a small encoder is in its high-resolution layers.
        self.stem = nn.Conv2d(3, channels, 8, 4, padding=2)
        self.fine = nn.ModuleList([ConvBlock(channels, channels, condition_dim) for _ in range(2)])
        self.heatmaps = nn.Conv2d(channels, keypoints, 1)
        self.coarse = nn.ModuleList(
            [
                ConvBlock(channels, 2 * channels, condition_dim, 4, 2),
                ConvBlock(2 * channels, 2 * channels, condition_dim),
                ConvBlock(2 * channels, 2 * channels, condition_dim, 4, 2),
            ]
        )
        self.grid = nn.Conv2d(2 * channels, self.GRID_CHANNELS, 1)
        axis = torch.linspace(-1.0, 1.0, side)
        rows, columns = torch.meshgrid(axis, axis, indexing="ij")
        self.register_buffer("positions", torch.stack([columns.flatten(), rows.flatten()], dim=1), persistent=False)
        self.temperature = nn.Parameter(torch.ones(keypoints, 1))
        self.output_dim = 2 * keypoints + self.GRID_CHANNELS * (side // 4) ** 2

    def forward(self, image: Tensor, condition: Tensor) -> Tensor:
        """Encode (B, size, size, 3) uint8 RGB with a (B, condition_dim) condition to (B, output_dim)."""
        features = nn.functional.silu(self.stem(image.permute(0, 3, 1, 2).float() / 127.5 - 1.0))
        for block in self.fine:
            features = block(features, condition)
        heat = (self.heatmaps(features).flatten(2) * self.temperature).float().softmax(dim=2)
        keypoints = (heat @ self.positions).flatten(1)
        for block in self.coarse:
            features = block(features, condition)
        return torch.cat([keypoints, self.grid(features).flatten(1).float()], dim=1)


class ObservationEncoder(nn.Module):
    """Images, state and instruction to one feature vector. Normalisation is inside."""

    def __init__(
        self,
        cameras: Sequence[str],
        image_size: int,
        state_dim: int,
        language_dim: int,
        width: int,
        channels: int,
        keypoints: int,
    ) -> None:
        super().__init__()
        self.cameras = tuple(cameras)
        condition_dim, state_width = 64, 64
        for name, size in (("state", state_dim), ("language", language_dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        self.condition = nn.Sequential(nn.Linear(language_dim, condition_dim), nn.SiLU())
        self.images = nn.ModuleDict(
            {name: ImageEncoder(image_size, channels, keypoints, condition_dim) for name in self.cameras}
        )
        self.state = nn.Sequential(nn.Linear(state_dim, 128), nn.SiLU(), nn.Linear(128, state_width))
        features = sum(encoder.output_dim for encoder in self.images.values()) + state_width + condition_dim
        self.trunk_input = nn.Linear(features, width)
        self.trunk = nn.Sequential(
            nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, width), nn.LayerNorm(width), nn.SiLU()
        )

    @classmethod
    def of(cls, config: EncoderConfig) -> "ObservationEncoder":
        """The encoder that the configuration of a policy or a head describes."""
        return cls(
            config.cameras,
            config.image_size,
            len(config.state_names),
            config.language_dim,
            config.width,
            config.channels,
            config.keypoints,
        )

    def set_normalisation(self, **statistics: Tensor) -> None:
        """Fill ``state_mean``, ``state_std``, ``language_mean`` and ``language_std`` from the training data."""
        for name, value in statistics.items():
            getattr(self, name).copy_(value)

    def features(self, images: Mapping[str, Tensor], state: Tensor, language: Tensor) -> Tensor:
        """Trunk input.

        Args:
            images: Camera name to (B, size, size, 3) uint8 RGB.
            state: (B, state_dim) float32, raw units.
            language: (B, language_dim) float32 instruction embedding.

        Returns:
            (B, width) float32, before the trunk's non-linearity, so that other inputs may be added to it.
        """
        condition = self.condition((language - self.language_mean) / self.language_std)
        parts = [self.images[name](images[name], condition) for name in self.cameras]
        parts += [self.state((state - self.state_mean) / self.state_std), condition]
        return self.trunk_input(torch.cat(parts, dim=1))

    def forward(self, images: Mapping[str, Tensor], state: Tensor, language: Tensor) -> Tensor:
        """Encode to (B, width) float32; arguments as in :meth:`features`."""
        return self.trunk(self.features(images, state, language))
