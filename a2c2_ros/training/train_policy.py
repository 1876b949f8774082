"""Train the flow policy on a LeRobotDataset: ``python -m a2c2_ros.training.train_policy --data DIR --out DIR``."""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from a2c2_ros.commands import command
from a2c2_ros.policies.flow import FlowConfig, FlowNetwork, save_network
from a2c2_ros.policies.language import InstructionEncoder
from a2c2_ros.training.dataset import Augmentation, Demonstrations, load_demonstrations, observations
from a2c2_ros.training.loop import LoopConfig, train
from a2c2_ros.training.record import fingerprint, plot_losses, write_record

DRAWS = 4  # (noise, t) pairs per encoded observation: the encoder is most of the cost
PADDING_WEIGHT = 0.2  # of slots after the end of an episode
DISTURBED_WEIGHT = 0.1  # of slots that a disturbance after the observation has changed
PREFIX_SLOTS = 20  # longest delay that training-time real-time chunking is trained for
PREFIX_SHARE = 0.4  # of the training draws that go on from a clean prefix
OBJECTS_WEIGHT = 0.1
MIN_STD = 0.1  # of an action; keeps rarely used directions from being blown up by the normalisation
VALIDATION_FRAMES = 1024
TEMPERATURES = (0.0, 0.25, 0.5, 1.0)
POSITIONS = "joint_position"  # action space in which standing still is not zero
SLOT_RANGE = 10  # width of the ranges that the validation error is reported by [slots]

DEPARTURES = (
    "The base policy is a small flow-matching network trained from scratch instead of SmolVLA (450M).",
    "The demonstrations come from a scripted expert instead of LIBERO's human demonstrations.",
    "Learning rate 1e-3 and fewer steps.",
)
OBJECTS_DEPARTURE = "Auxiliary loss on object positions (training only)."


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--data", type=Path, required=True, help="LeRobotDataset")
    p.add_argument("--out", type=Path, required=True, help="policy folder; its name is the first part of the id")
    p.add_argument("--holdout", type=float, default=0.05, help="fraction of the episodes for validation")
    p.add_argument("--horizon", type=int, default=50, help="slots of a chunk")
    p.add_argument(
        "--action-space",
        default="osc_pose_delta",
        help=f"meaning of the actions, as in the robot's profile; in {POSITIONS} an arm that stands still repeats its "
        "last action, in all others it has zeros",
    )
    p.add_argument("--without-images", action="store_true", help="control: from state and instruction alone")
    LoopConfig.add_arguments(p, learning_rate=1e-3, schedule="cosine", weight_decay=1e-4)
    return p


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = parser().parse_args(argv)
    data = load_demonstrations(arguments.data)
    if arguments.without_images:
        data = dataclasses.replace(data, frames={})
    config = config_of(
        data,
        arguments.action_space,
        horizon=arguments.horizon,
        objects_dim=data.objects.shape[1],
        prefix_slots=min(PREFIX_SLOTS, arguments.horizon - 1),
    )
    train_policy(data, config, LoopConfig.from_arguments(arguments), arguments.out, arguments.holdout)


def config_of(data: Demonstrations, action_space: str, **sizes: int) -> FlowConfig:
    """The configuration of a policy that sees what the demonstrations have; ``sizes`` are its further fields."""
    image_size = next((frames.shape[1] for frames in data.frames.values()), 0)
    return FlowConfig(
        action_names=data.action_names,
        state_names=data.state_names,
        cameras=tuple(data.frames),
        image_size=image_size,
        step_ns=data.step_ns,
        action_space=action_space,
        **sizes,
    )


def train_policy(
    data: Demonstrations,
    config: FlowConfig,
    loop: LoopConfig,
    out: Path,
    holdout: float = 0.05,
    augmentation: Augmentation | None = None,
    temperatures: Sequence[float] = TEMPERATURES,
    described: Sequence[str] = DEPARTURES,
) -> FlowConfig:
    """Train, choose the sampling temperature on the held-out episodes and write the policy folder.

    Args:
        data: Demonstrations.
        config: Architecture.
        loop: Hyper-parameters.
        out: Policy folder.
        holdout: Fraction of the episodes for validation.
        augmentation: Of the observations.
        temperatures: To choose from.
        described: Departures from the paper, for the record.

    Returns:
        The written configuration.

    Raises:
        ConfigError: If the data cannot be split or ``out`` holds the checkpoint of another training.
    """
    augmentation = augmentation or Augmentation()
    training, validation = data.split(holdout)
    validation = np.random.default_rng(0).permutation(validation)[:VALIDATION_FRAMES]
    language = language_table(data)
    torch.manual_seed(loop.seed)
    network = FlowNetwork(config)
    normalise(network, data, training, language)

    def loss(model: FlowNetwork, rng: np.random.Generator, size: int) -> Tensor:
        batch = rng.choice(training, size)
        chunks, weights, objects = targets(data, model, batch)
        latent = encode(data, model, batch, language, augmentation, rng)
        flow = flow_loss(model, latent, chunks, weights, rng)
        if model.objects is None:
            return flow
        return flow + OBJECTS_WEIGHT * (model.objects(latent) - objects).abs().mean()

    def validate(model: FlowNetwork) -> dict[str, float]:
        latent = encode_all(data, model, validation, language)
        chunks, weights, _ = targets(data, model, validation)
        metrics = {"loss": flow_loss(model, latent, chunks, weights, np.random.default_rng(0)).item()}
        return metrics | chunk_error(data, model, latent, validation)

    what = f"flow policy {fingerprint(config)}"
    origin = f"{what} on data {data.data_hash[:12]} holdout {holdout} seed {loop.seed}"
    trained = train(network, loss, validate, loop, out / "checkpoint" / "latest.safetensors", origin)
    model = trained.model.float()
    with torch.inference_mode():
        latent = encode_all(data, model, validation, language)
        errors = {}
        for temperature in temperatures:
            model.config = dataclasses.replace(config, temperature=temperature)
            errors[temperature] = chunk_error(data, model, latent, validation)
        best = min(errors, key=lambda value: errors[value]["error"])
    model.config = dataclasses.replace(config, temperature=best)
    written = save_network(model, out, out.name)
    write_record(
        out / "training.json",
        {
            "policy_id": written.policy_id,
            "parameters": sum(p.numel() for p in model.parameters()),
            "data": describe(data, training, holdout),
            "hyper_parameters": loop,
            "augmentation": augmentation,
            "draws": DRAWS,
            "padding_weight": PADDING_WEIGHT,
            "disturbed_weight": DISTURBED_WEIGHT,
            "prefix_share": PREFIX_SHARE if config.prefix_slots else 0.0,
            "objects_weight": OBJECTS_WEIGHT if config.objects_dim else 0.0,
            "steps": trained.steps,
            "seconds": trained.seconds,
            "validation_error_by_temperature": errors,
            "history": trained.history,
            "departures_from_the_paper": [*described, *([OBJECTS_DEPARTURE] if config.objects_dim else [])],
        },
    )
    plot_losses(out / "loss.png", trained.history, "flow-matching loss")
    return written


def flow_loss(model: FlowNetwork, latent: Tensor, chunks: Tensor, weights: Tensor, rng: np.random.Generator) -> Tensor:
    """Flow-matching loss: the velocity's squared error weighted by (1 - t)², that is the clean chunk's squared error.

    Args:
        model: Network.
        latent: (B, Z).
        chunks: (B, H * A) normalised expert chunks.
        weights: (B, H * A) of the loss.
        rng: Draws ``DRAWS`` pairs of noise and flow time per row, and clean prefixes (training-time real-time chunking,
            arXiv 2512.05964).
    """
    latent, chunks, weights = (x.repeat(DRAWS, 1) for x in (latent, chunks, weights))
    noise = torch.tensor(rng.standard_normal(chunks.shape, dtype=np.float32), device=chunks.device)
    t = torch.tensor(rng.random(len(chunks), dtype=np.float32), device=chunks.device)
    x = (1.0 - t)[:, None] * noise + t[:, None] * chunks
    prefix = None
    if slots := model.config.prefix_slots:
        lengths = np.where(rng.random(len(chunks)) < PREFIX_SHARE, rng.integers(1, slots + 1, len(chunks)), 0)
        clean = np.arange(model.config.horizon) < lengths[:, None]
        prefix = torch.tensor(clean[:, :slots].astype(np.float32), device=chunks.device)
        known = torch.tensor(clean.repeat(len(model.config.action_names), axis=1), device=chunks.device)
        x, weights = torch.where(known, chunks, x), torch.where(known, 0.0, weights)
    error = (model.decoder(x, t, latent, prefix) - chunks).float().square()
    return (error * weights).sum() / weights.sum()


def chunk_error(data: Demonstrations, model: FlowNetwork, latent: Tensor, indices: np.ndarray) -> dict[str, float]:
    """Mean absolute error of sampled chunks in action units, all and by range of slots.

    Slots after the episode's end, or after a disturbance that no policy could know of, do not count.
    """
    noise = torch.randn(len(latent), model.decoder.output.out_features, generator=torch.Generator().manual_seed(0))
    actions = model.sample(latent, noise.to(latent.device)).cpu().numpy()
    expert, inside = data.chunks(indices, model.config.horizon, model.config.action_space == POSITIONS)
    inside &= data.undisturbed(indices, model.config.horizon)
    error = np.abs(actions - expert).mean(axis=2)
    result = {"error": float(error[inside].mean())}
    for low in range(0, model.config.horizon, SLOT_RANGE):
        part = slice(low, low + SLOT_RANGE)
        if inside[:, part].any():
            result[f"error_{low}"] = float(error[:, part][inside[:, part]].mean())
    return result


def language_table(data: Demonstrations) -> Tensor:
    """Embeddings of the instructions, (tasks, L) float32."""
    encoder = InstructionEncoder()
    return torch.tensor(np.stack([encoder.embed(text) for text in data.instructions]))


def statistics(data: Demonstrations, training: np.ndarray, language: Tensor) -> dict[str, Tensor]:
    """``NAME_mean`` and ``NAME_std`` of state, language, action and objects, as networks and heads normalise by them.

    Args:
        data: Demonstrations.
        training: Frames that count.
        language: (tasks, L), embeddings of all instructions.
    """
    scale = language.std() if len(language) > 1 else torch.tensor(1.0)
    result = {
        "language_mean": language.mean(0),
        # One scale for all: instructions of a suite differ in few directions, a scale each would amplify the rest.
        "language_std": (language - language.mean(0)).std().clamp(min=0.1 * scale).expand(language.shape[1]),
    }
    rows = (("state", data.state, 1e-3), ("action", data.action, MIN_STD), ("objects", data.objects, 1e-3))
    for name, values, minimum in rows:
        values = torch.tensor(values[training])
        if not values.shape[1]:
            continue
        result |= {f"{name}_mean": values.mean(0), f"{name}_std": values.std(0).clamp(min=minimum)}
    return result


def normalise(network: FlowNetwork, data: Demonstrations, training: np.ndarray, language: Tensor) -> None:
    """Set all statistics of a network from the training frames."""
    for name, value in statistics(data, training, language).items():
        if name.startswith(("state", "language")):
            network.encoder.set_normalisation(**{name: value})
        else:
            getattr(network, name).copy_(value)


def targets(data: Demonstrations, model: FlowNetwork, indices: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised chunks (B, H * A), their loss weights (B, H * A) and normalised object positions (B, O)."""
    device = model.action_std.device
    chunks, inside = data.chunks(indices, model.config.horizon, model.config.action_space == POSITIONS)
    weights = np.where(inside, 1.0, PADDING_WEIGHT)
    weights[~data.undisturbed(indices, model.config.horizon)] = DISTURBED_WEIGHT
    weights = weights.astype(np.float32).repeat(len(data.action_names), axis=1)
    objects = torch.tensor(data.objects[indices], device=device)
    return (
        model.normalise(torch.tensor(chunks, device=device)),
        torch.tensor(weights, device=device),
        (objects - model.objects_mean) / model.objects_std,
    )


def encode(
    data: Demonstrations,
    model: FlowNetwork,
    indices: np.ndarray,
    language: Tensor,
    augmentation: Augmentation | None,
    rng: np.random.Generator,
) -> Tensor:
    """Latents (B, Z) of frames."""
    device = model.action_std.device
    images, state = observations(data, indices, augmentation, rng)
    tensors = {name: torch.tensor(array, device=device) for name, array in images.items()}
    return model.encode(tensors, torch.tensor(state, device=device), language[data.task[indices]].to(device))


def encode_all(data: Demonstrations, model: FlowNetwork, indices: np.ndarray, language: Tensor) -> Tensor:
    """Latents (B, Z) of frames as they are, in parts that fit the memory."""
    rng = np.random.default_rng(0)
    parts = [indices[i : i + 128] for i in range(0, len(indices), 128)]
    return torch.cat([encode(data, model, part, language, None, rng).float() for part in parts])


def describe(data: Demonstrations, training: np.ndarray, holdout: float) -> dict[str, object]:
    """What a training was made from, for its record."""
    return {
        "hash": data.data_hash,
        "frames": len(data),
        "episodes": len(np.unique(data.episode)),
        "training_frames": len(training),
        "holdout": holdout,
        "instructions": data.instructions,
    }


if __name__ == "__main__":
    sys.exit(main())
