"""Flow-matching chunk policy: a small network that runs on one CPU core.

The flow goes from noise at t = 0 to the action chunk at t = 1 along x_t = (1 - t) * noise + t * actions, so the
velocity is v = actions - noise. The decoder predicts the clean chunk and the velocity follows from it,
v = (prediction - x_t) / (1 - t): a small network cannot pass H * A numbers of noise through, and need not.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from a2c2_ros.core.errors import ConfigError, PolicyError
from a2c2_ros.paths import model_path
from a2c2_ros.policies.base import Continuation, PolicyOptions, PolicyOutput, check_observation
from a2c2_ros.policies.encoder import ObservationEncoder
from a2c2_ros.policies.language import LANGUAGE_DIM, InstructionEncoder

GUIDANCE_LIMIT = 5.0
"""Largest weight of the guidance of real-time chunking, beta in arXiv 2506.07339; what it recommends for 5 steps."""

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


@dataclass(frozen=True)
class FlowConfig:
    """Architecture and sampling of a flow policy; ``config.json`` of its folder."""

    action_names: tuple[str, ...]
    state_names: tuple[str, ...]
    cameras: tuple[str, ...]
    image_size: int  # [pixels]
    step_ns: int  # duration of a slot [ns]
    action_space: str = "osc_pose_delta"
    horizon: int = 50  # H
    language_dim: int = LANGUAGE_DIM
    latent_dim: int = 256
    width: int = 512  # of the observation trunk
    channels: int = 32  # of the image encoders
    keypoints: int = 32  # per camera
    decoder_width: int = 384
    decoder_blocks: int = 3
    objects_dim: int = 0  # auxiliary training target: positions that no sensor gives at run time; 0 for none
    euler_steps: int = 5
    temperature: float = 1.0  # scale of the noise at t = 0; below 1 trades variety for precision
    prefix_slots: int = 0  # longest clean prefix that the network was trained to go on from (training-time RTC)
    policy_id: str = ""

    def __post_init__(self) -> None:
        for name in ("action_names", "state_names", "cameras"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.euler_steps < 1:
            raise ConfigError(f"euler_steps is {self.euler_steps}, allowed is 1 or more")
        if not 0 <= self.prefix_slots < self.horizon:
            raise ConfigError(f"prefix_slots is {self.prefix_slots}, allowed is 0 to {self.horizon - 1}")
        if not 0.0 <= self.temperature <= 1.0:
            raise ConfigError(f"temperature is {self.temperature}, allowed is 0 to 1")


class DecoderBlock(nn.Module):
    """Residual MLP whose normalised input is scaled and shifted by the condition."""

    def __init__(self, width: int, condition_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = nn.Linear(condition_dim, 2 * width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.mlp[2].weight)
        nn.init.zeros_(self.mlp[2].bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """(B, width) to (B, width)."""
        scale, shift = self.modulation(condition).chunk(2, dim=1)
        return x + self.mlp(self.norm(x) * (1.0 + scale) + shift)


class FlowDecoder(nn.Module):
    """Clean chunk from a noisy one, the flow time and the latent. All in normalised actions, flattened to H * A."""

    TIME_FREQUENCIES = 16

    def __init__(self, chunk_dim: int, latent_dim: int, width: int, blocks: int, prefix_slots: int) -> None:
        super().__init__()
        condition_dim = 256
        self.prefix = nn.Linear(prefix_slots, width, bias=False) if prefix_slots else None
        self.register_buffer("frequencies", 2.0 ** torch.linspace(0, 6, self.TIME_FREQUENCIES), persistent=False)
        self.condition = nn.Sequential(nn.Linear(latent_dim + 2 * self.TIME_FREQUENCIES, condition_dim), nn.SiLU())
        self.input = nn.Linear(chunk_dim, width)
        self.blocks = nn.ModuleList([DecoderBlock(width, condition_dim) for _ in range(blocks)])
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, chunk_dim)

    def forward(self, x: Tensor, t: Tensor, latent: Tensor, clean: Tensor | None = None) -> Tensor:
        """Predict the clean chunk.

        Args:
            x: (B, H * A) noisy chunk.
            t: (B,) flow time in [0, 1).
            latent: (B, Z).
            clean: (B, prefix_slots) float, 1 where a slot of ``x`` holds the clean action already; None: nowhere.

        Returns:
            (B, H * A).
        """
        angles = t[:, None] * self.frequencies
        condition = self.condition(torch.cat([latent, angles.sin(), angles.cos()], dim=1))
        hidden = self.input(x)
        if clean is not None:
            hidden = hidden + self.prefix(clean)
        for block in self.blocks:
            hidden = block(hidden, condition)
        return self.output(nn.functional.silu(self.norm(hidden)))


class FlowNetwork(nn.Module):
    """Observation encoder, latent and flow decoder."""

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = config
        actions = len(config.action_names)
        self.encoder = ObservationEncoder.of(config)
        self.latent = nn.Sequential(
            nn.Linear(config.width, config.latent_dim), nn.LayerNorm(config.latent_dim, elementwise_affine=False)
        )
        self.decoder = FlowDecoder(
            config.horizon * actions,
            config.latent_dim,
            config.decoder_width,
            config.decoder_blocks,
            config.prefix_slots,
        )
        self.objects = nn.Linear(config.latent_dim, config.objects_dim) if config.objects_dim else None
        for name in ("action", "objects"):
            size = actions if name == "action" else config.objects_dim
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))

    def normalise(self, actions: Tensor) -> Tensor:
        """(..., H, A) in action units to (..., H * A) normalised."""
        return ((actions - self.action_mean) / self.action_std).flatten(-2)

    def denormalise(self, chunk: Tensor) -> Tensor:
        """(..., H * A) normalised to (..., H, A) in action units."""
        return chunk.unflatten(-1, (self.config.horizon, -1)) * self.action_std + self.action_mean

    def encode(self, images: Mapping[str, Tensor], state: Tensor, language: Tensor) -> Tensor:
        """Latent (B, Z) of a batch of observations, arguments as in :meth:`ObservationEncoder.features`."""
        return self.latent(self.encoder(images, state, language))

    def sample(self, latent: Tensor, noise: Tensor, continuation: Continuation | None = None) -> Tensor:
        """Integrate the flow with Euler steps.

        Args:
            latent: (B, Z).
            noise: (B, H * A) standard normal; it is scaled by the temperature.
            continuation: What the chunks of the batch go on from, one for all or one for each; None: nothing.

        Returns:
            (B, H, A) in action units.

        Raises:
            PolicyError: If the continuation is longer than what the network was trained for.
        """
        if continuation is None or not continuation.actions.shape[-2]:
            return self.denormalise(self._integrate(latent, noise, None, 0))
        known = torch.tensor(continuation.actions[..., : self.config.horizon, :], device=noise.device)
        known = self.normalise(known).expand(len(noise), -1)
        if continuation.mode == "rtc":
            x = self._integrate(latent, noise, known, continuation.delay_steps)
        elif continuation.mode == "tt_rtc":
            x = self._integrate_after(latent, noise, known, continuation.delay_steps)
        else:
            raise PolicyError(f"continuation mode is {continuation.mode!r}, allowed are 'rtc' and 'tt_rtc'")
        return self.denormalise(x)

    def _times(self, noise: Tensor) -> Iterator[tuple[float, Tensor]]:
        for i in range(self.config.euler_steps):
            t = i / self.config.euler_steps
            yield t, torch.full((len(noise),), t, device=noise.device)

    def _integrate(self, latent: Tensor, noise: Tensor, known: Tensor | None, delay_steps: int) -> Tensor:
        """With the guidance of real-time chunking if there is something known (arXiv 2506.07339, equations 2 to 5).

        Every step moves the predicted clean chunk towards the known actions, by the gradient of its weighted distance.
        """
        steps = self.config.euler_steps
        x = noise * self.config.temperature
        if known is not None:
            actions = len(self.config.action_names)
            weights = torch.tensor(guidance_weights(known.shape[1] // actions, delay_steps), device=x.device)
            weights = weights.repeat_interleave(actions)
        for t, times in self._times(noise):
            if known is None:
                clean = self.decoder(x, times, latent)
                guidance = 0.0
            else:
                with torch.inference_mode(False), torch.enable_grad():
                    at = x.clone().requires_grad_()
                    clean = self.decoder(at, times.clone(), latent.clone())  # autograd refuses inference tensors
                    error = weights * (known.clone() - clean.detach()[:, : known.shape[1]])
                    (gradient,) = torch.autograd.grad((clean[:, : known.shape[1]] * error).sum(), at)
                clean = clean.detach()
                # (1 - t) / (t r²) with r² = (1 - t)² / (t² + (1 - t)²)
                weight = (t**2 + (1.0 - t) ** 2) / (t * (1.0 - t)) if t else GUIDANCE_LIMIT
                guidance = min(GUIDANCE_LIMIT, weight) * gradient
            x = x + ((clean - x) / (1.0 - t) + guidance) / steps
        return x

    def _integrate_after(self, latent: Tensor, noise: Tensor, known: Tensor, delay_steps: int) -> Tensor:
        """With the first ``delay_steps`` slots given (training-time real-time chunking, arXiv 2512.05964)."""
        if delay_steps > self.config.prefix_slots:
            raise PolicyError(
                f"the delay is {delay_steps} steps, this policy was trained to go on from at most "
                f"{self.config.prefix_slots}"
            )
        size = delay_steps * len(self.config.action_names)
        mask = (torch.arange(self.config.prefix_slots, device=noise.device) < delay_steps).float()
        mask = mask.expand(len(noise), -1) if size else None
        x = noise * self.config.temperature
        for t, times in self._times(noise):
            x = torch.cat([known[:, :size], x[:, size:]], dim=1)
            x = x + (self.decoder(x, times, latent, mask) - x) / (1.0 - t) / self.config.euler_steps
        return torch.cat([known[:, :size], x[:, size:]], dim=1)


def guidance_weights(known_slots: int, delay_steps: int) -> np.ndarray:
    """How much each known slot counts (arXiv 2506.07339, equation 5).

    Args:
        known_slots: n = H - e, slots of which the previous chunk says something.
        delay_steps: d, of these will be executed in any case.

    Returns:
        (n,) float32: 1 for the first d, then falling exponentially to 0 after the last.
    """
    slots = np.arange(known_slots)
    share = (known_slots - slots) / (known_slots - delay_steps + 1)
    decay = share * np.expm1(share) / (np.e - 1.0)
    return np.where(slots < delay_steps, 1.0, decay).astype(np.float32)


class FlowPolicy:
    """The shipped :class:`ChunkPolicy`: a :class:`FlowNetwork` from a folder, and the instruction encoder."""

    def __init__(self, path: str | Path, options: PolicyOptions | None = None) -> None:
        """Load ``config.json`` and ``model.safetensors``.

        Args:
            path: Folder; a bare name is looked up in the package's models.
            options: Device and threads; the rest is in the files.

        Raises:
            ConfigError: If there is no such folder, or an option is not one of this policy's.
            PolicyError: If a file is missing, damaged, or does not belong to the other.
        """
        options = options or PolicyOptions()
        if options.dtype != "float32" or options.mapping:
            raise ConfigError(
                f"dtype is {options.dtype!r} and the policy's YAML file has {sorted(options.mapping)}; "
                f"the flow policy takes float32 and no YAML file"
            )
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.device = options.torch_device()
        self.network = load_network(model_path(str(path))).to(self.device)
        self.config = self.network.config
        self.policy_id = self.config.policy_id
        self.horizon = self.config.horizon
        self.action_names = self.config.action_names
        self.cameras = self.config.cameras
        self.image_size = self.config.image_size
        self.state_dim = len(self.config.state_names)
        self.latent_dim = self.config.latent_dim
        self.language_dim = self.config.language_dim
        self.trained_for = {name: getattr(self.config, name) for name in ("step_ns", "state_names", "action_space")}
        self._language = InstructionEncoder()

    def largest_delay(self, chunking: str) -> int | None:
        """See :meth:`ChunkPolicy.largest_delay`."""
        return self.horizon if chunking == "rtc" else self.config.prefix_slots or None

    def embed(self, instruction: str) -> np.ndarray:
        """Embedding of an instruction, (384,) float32."""
        return self._language.embed(instruction)

    def predict(
        self,
        observation: Mapping[str, np.ndarray],
        instruction: str,
        *,
        seed: int,
        continuation: Continuation | None = None,
    ) -> PolicyOutput:
        """Sample a chunk. See :meth:`ChunkPolicy.predict`."""
        check_observation(self, observation)
        language = self.embed(instruction)
        noise = torch.randn(1, self.horizon * len(self.action_names), generator=torch.Generator().manual_seed(seed))
        try:
            with torch.inference_mode():
                images = {name: torch.tensor(observation[name][None], device=self.device) for name in self.cameras}
                state, embedding = (
                    torch.tensor(array[None], device=self.device) for array in (observation["state"], language)
                )
                latent = self.network.encode(images, state, embedding)
                actions = self.network.sample(latent, noise.to(self.device), continuation)
                actions, latent = actions[0].cpu().numpy(), latent[0].cpu().numpy()
        except RuntimeError as error:  # of the device, as when its memory is used up by others
            raise PolicyError(f"flow policy {self.policy_id}: {error}") from error
        return PolicyOutput(actions, latent, language)


def save_network(network: FlowNetwork, path: str | Path, name: str) -> FlowConfig:
    """Write a policy folder.

    Args:
        network: On any device.
        path: Folder, made if absent.
        name: First part of the policy id; the rest identifies the weights and the sampling settings.

    Returns:
        The configuration as written, with its policy id.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(compact_state(network), folder / WEIGHTS_FILE)
    config = dataclasses.replace(network.config, policy_id="")
    config = dataclasses.replace(config, policy_id=f"{name}-{_fingerprint(config, folder / WEIGHTS_FILE)}")
    (folder / CONFIG_FILE).write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    return config


def compact_state(module: nn.Module) -> dict[str, Tensor]:
    """State for storage: parameters as float16; statistics of the data stay float32, they need the digits."""
    parameters = {name for name, _ in module.named_parameters()}
    return {
        name: (value.half() if name in parameters else value).detach().cpu().contiguous()
        for name, value in module.state_dict().items()
    }


def load_network(path: str | Path) -> FlowNetwork:
    """Read a policy folder.

    Returns:
        The network in evaluation mode on the CPU, float32.

    Raises:
        PolicyError: If a file is missing or damaged, or the weights are not those that the policy id names.
    """
    folder = Path(path)
    try:
        config = FlowConfig(**json.loads((folder / CONFIG_FILE).read_text()))
        tensors = load_file(folder / WEIGHTS_FILE)
        network = FlowNetwork(config)
        network.load_state_dict({k: v.float() for k, v in tensors.items()})
        fingerprint = _fingerprint(config, folder / WEIGHTS_FILE)
    except OSError as error:
        raise PolicyError(
            f"flow policy {folder}: a file cannot be read: {error}; needed are {CONFIG_FILE} and {WEIGHTS_FILE}"
        ) from error
    except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
        raise PolicyError(f"flow policy {folder}: {type(error).__name__}: {error}") from error
    if not config.policy_id.endswith(f"-{fingerprint}"):
        raise PolicyError(
            f"flow policy {folder}: policy_id is {config.policy_id!r}, but the weights and sampling "
            f"settings are those of '...-{fingerprint}'"
        )
    return network.eval()


def _fingerprint(config: FlowConfig, weights: Path) -> str:
    facts = dataclasses.asdict(dataclasses.replace(config, policy_id=""))
    if not config.prefix_slots:  # policies are older than this field
        del facts["prefix_slots"]
    text = json.dumps(facts, sort_keys=True)
    return hashlib.sha256(text.encode() + weights.read_bytes()).hexdigest()[:8]
