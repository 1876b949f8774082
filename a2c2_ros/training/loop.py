"""The optimisation loop of both trainings."""

import argparse
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from a2c2_ros.core.errors import ConfigError
from a2c2_ros.settings import differing
from a2c2_ros.training.record import load_checkpoint, save_checkpoint

RECIPE = ("learning_rate", "schedule", "weight_decay", "batch_size", "warmup_steps", "gradient_norm", "average_decay")
"""Hyper-parameters with which a training that was interrupted must go on."""


def threads_for(processors: int, batch_size: int) -> int:
    """The largest number of threads up to ``processors`` that share a batch evenly."""
    return max(n for n in range(1, min(processors, batch_size) + 1) if batch_size % n == 0)


@dataclass(frozen=True)
class LoopConfig:
    """Hyper-parameters of the optimisation."""

    learning_rate: float
    schedule: str  # "cosine" to zero or "constant", both after the warm-up
    weight_decay: float
    batch_size: int = 64
    warmup_steps: int = 200
    gradient_norm: float = 10.0
    average_decay: float = 0.999  # exponential moving average of the weights, which is what is kept
    steps: int | None = None  # either steps or minutes
    minutes: float | None = None
    validate_every: int = 500  # [steps]; a checkpoint is written each time
    seed: int = 0
    device: str = "cpu"
    workers: int = 1  # threads that share each batch
    bfloat16: bool = True

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ConfigError(f"steps is {self.steps} and minutes is {self.minutes}, allowed is one of them")
        if self.workers < 1 or self.batch_size % self.workers:
            raise ConfigError(f"workers is {self.workers}, allowed are divisors of batch_size {self.batch_size}")
        if self.schedule not in ("cosine", "constant"):
            raise ConfigError(f"schedule is {self.schedule!r}, allowed are 'cosine' and 'constant'")

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser, **defaults: object) -> None:
        """Add the options that :meth:`from_arguments` reads."""
        budget = parser.add_mutually_exclusive_group(required=True)
        budget.add_argument("--minutes", type=float, help="train for this long, validation included")
        budget.add_argument("--steps", type=int, help="train for this many steps; reproducible by the seed")
        parser.add_argument("--learning-rate", type=float, default=defaults["learning_rate"])
        parser.add_argument("--schedule", choices=("cosine", "constant"), default=defaults["schedule"])
        parser.add_argument("--weight-decay", type=float, default=defaults["weight_decay"])
        parser.add_argument("--batch-size", type=int, default=64)
        parser.add_argument("--validate-every", type=int, default=500, help="steps between validations")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--device", default="cpu", help="torch device, e.g. cpu, cuda")
        parser.add_argument(
            "--workers",
            type=int,
            default=1,
            help="threads that share each batch, at most: as many as divide it; on a CPU one per core is fastest",
        )
        parser.add_argument("--bfloat16", action=argparse.BooleanOptionalAction, default=True, help="autocast")

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> "LoopConfig":
        """Read the parsed options; of the workers as many as share a batch evenly."""
        names = {field.name for field in dataclasses.fields(cls)}
        values = {name: value for name, value in vars(arguments).items() if name in names}
        if min(values["workers"], values["batch_size"]) > 0:
            values["workers"] = threads_for(values["workers"], values["batch_size"])
        return cls(**values)


@dataclass(frozen=True, eq=False)
class Trained:
    """Result of a training."""

    model: nn.Module  # the averaged weights, evaluation mode
    history: list[dict[str, float]]  # per validation: step, seconds, train_loss and what the validation returned
    steps: int
    seconds: float  # over all runs that the training was continued in


def train(
    model: nn.Module,
    loss: Callable[[nn.Module, np.random.Generator, int], Tensor],
    validate: Callable[[nn.Module], Mapping[str, float]],
    config: LoopConfig,
    checkpoint: Path,
    origin: str,
) -> Trained:
    """Train with AdamW and keep a moving average of the weights.

    Batches and noise depend on the seed, the step and the worker only, so a training that was continued equals one
    that was not. With several workers every one computes the gradient of its part of the batch on one core: threads
    inside an operation wait for each other thousands of times per step, which is slow on a machine that does other
    work as well.

    Args:
        model: Trained in place.
        loss: Draws a batch of a size with the generator and returns the mean loss; runs under autocast, in several
            threads at a time if there are several workers, so all its randomness must come from the generator.
        validate: Metrics of the averaged model on held-out data, ``loss`` among them.
        config: Hyper-parameters.
        checkpoint: File to write, and to continue from if it is there.
        origin: What is trained on what; a checkpoint of another origin is refused.

    Raises:
        ConfigError: If the checkpoint belongs to something else, or had other hyper-parameters. A training may go on
            for more or fewer steps or minutes, on another device and with other threads.
        FloatingPointError: If the loss is not finite.
    """
    model.to(config.device, memory_format=torch.channels_last)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    step, earlier_s, history = 0, 0.0, []
    recipe = {name: getattr(config, name) for name in RECIPE}
    if checkpoint.exists():
        meta = load_checkpoint(checkpoint, model, average, optimizer)
        if meta["origin"] != origin:
            raise ConfigError(
                f"{checkpoint} is of {meta['origin']!r}, not of {origin!r}: remove it or choose another --out"
            )
        if wrong := differing(meta.get("recipe", {}), recipe):
            raise ConfigError(f"{checkpoint} was trained with {'; '.join(wrong)}: remove it or choose another --out")
        step, earlier_s, history = meta["step"], meta["seconds"], meta["history"]
    total = config.steps if config.steps is not None else config.minutes
    started = time.monotonic()

    def progress() -> float:
        done = step if config.steps is not None else (earlier_s + time.monotonic() - started) / 60.0
        return min(1.0, done / total)

    parameters = list(model.parameters())
    kind = torch.device(config.device).type
    if config.workers > 1:
        torch.set_num_threads(1)

    def gradient(worker: int) -> tuple[float, Sequence[Tensor]]:
        rng = np.random.default_rng((config.seed, step, worker))
        with torch.autocast(kind, torch.bfloat16, enabled=config.bfloat16):
            value = loss(model, rng, config.batch_size // config.workers)
        return value.item(), torch.autograd.grad(value, parameters)

    recent: list[float] = []
    with (
        ThreadPoolExecutor(config.workers) as pool,
        tqdm(total=100, mininterval=2.0, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar,
    ):
        while (fraction := progress()) < 1.0:
            model.train()
            scale = 0.5 * (1.0 + math.cos(math.pi * fraction)) if config.schedule == "cosine" else 1.0
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * scale * min(1.0, (step + 1) / config.warmup_steps)
            losses, gradients = zip(*pool.map(gradient, range(config.workers)), strict=True)
            for parameter, *parts in zip(parameters, *gradients, strict=True):
                parameter.grad = sum(parts) / config.workers
            norm = nn.utils.clip_grad_norm_(parameters, config.gradient_norm)
            if not torch.isfinite(norm):
                raise FloatingPointError(f"step {step}: losses {losses}, gradient norm {norm.item()}")
            optimizer.step()
            step += 1
            decay = min(config.average_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), parameters, 1.0 - decay)
            recent.append(float(np.mean(losses)))
            if step % config.validate_every == 0 or progress() >= 1.0:
                with torch.inference_mode():
                    metrics = dict(validate(average))
                seconds = earlier_s + time.monotonic() - started
                history.append(
                    {"step": step, "seconds": round(seconds, 1), "train_loss": float(np.mean(recent)), **metrics}
                )
                recent.clear()
                meta = {"origin": origin, "recipe": recipe, "step": step, "seconds": seconds, "history": history}
                save_checkpoint(checkpoint, model, average, optimizer, meta)
            validation = f"{history[-1]['loss']:.4f}" if history else "-"
            bar.set_postfix(
                step=step, loss=f"{recent[-1]:.4f}" if recent else "-", validation=validation, refresh=False
            )
            bar.update(100 * progress() - bar.n)
    return Trained(average, history, step, history[-1]["seconds"] if history else 0.0)
