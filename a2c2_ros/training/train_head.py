"""Train a correction head on base chunks.

``python -m a2c2_ros.training.train_head --data DIR --policy POLICY --out DIR``. Paper equation 8 and 9:
(o_{t+k}, Â_t[k], τ_k, z_t, l) -> a_{t+k} - Â_t[k], k uniform over what the episode has, mean squared error. Ablations
and controls are options; what they take away is taken away by the exported graph, too, so that a control loop runs
every head alike. With ``--init HEAD`` a trained head is trained on and exported. A folder that has a head already is
refused; a training that was killed continues.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from a2c2_ros import provenance
from a2c2_ros.commands import command
from a2c2_ros.core.errors import ConfigError, PolicyError
from a2c2_ros.core.features import time_feature
from a2c2_ros.core.head import HeadInput
from a2c2_ros.heads.base import ABLATIONS, ARCHITECTURES, Head, head_type, load_head, save_head, variant
from a2c2_ros.heads.export import export
from a2c2_ros.policies.flow import FlowNetwork, load_network
from a2c2_ros.policies.lerobot_files import LeRobotMapping, checkpoint_id, is_checkpoint
from a2c2_ros.training.cache_chunks import DESCRIPTION_FILE, PolicyFacts, check_flow, language_rows, load_facts
from a2c2_ros.training.dataset import Augmentation, Demonstrations, load_demonstrations, observations
from a2c2_ros.training.joining import BaseChunks, JoinedDemonstrations, concatenate, concatenate_chunks, load_base
from a2c2_ros.training.loop import LoopConfig, train
from a2c2_ros.training.record import fingerprint, plot_losses, write_record
from a2c2_ros.training.train_policy import SLOT_RANGE, VALIDATION_FRAMES, describe, statistics

VALIDATION_DRAWS = 8  # slots per frame
VALIDATION_BATCH = 128  # frames
RANGE_SAMPLES = 100_000
MIN_RANGE = 0.1  # [standard deviations of the action] a head is not exactly 0 where the base policy never errs
PAPER_STEPS = 200_000
MIN_LATENT_STD = 0.01  # in means of the latent's standard deviations; what hardly varies is not blown up

INIT_LEARNING_RATE = 0.2
"""Of the recipe's, for a head that is trained already."""
PARITY_FRAMES = 64
HEAD_FILE, ONNX_FILE, RECORD_FILE = "head.safetensors", "head.onnx", "training.json"
CHECKPOINT = Path("checkpoint") / "latest.safetensors"

LOSS_UNITS = {"action": "action units", "deviation": "action standard deviations"}
RECIPES = {
    "paper": {
        "learning_rate": 1e-5,
        "schedule": "constant",
        "weight_decay": 1e-5,
        "warmup_steps": 1,
        "average_decay": 0.0,
        "draws": 1,
        "loss_unit": "action",
    },
    "ours": {
        "learning_rate": 5e-4,
        "schedule": "cosine",
        "weight_decay": 1e-5,
        "warmup_steps": 200,
        "average_decay": 0.999,
        "draws": 8,
        "loss_unit": "deviation",
    },
}
"""Defaults of the options; the paper's are of its table 6 (AdamW, batch 64, 200,000 steps)."""


@dataclass(frozen=True)
class HeadRecipe:
    """How a head's training samples are drawn and what its loss is."""

    draws: int = 8  # slots per encoded observation: the encoder is most of the cost
    loss_unit: str = "deviation"  # the squared error's, see LOSS_UNITS
    slots: tuple[int, int] | None = None  # k in [low, high); None: the whole chunk
    mismatch: float = 0.0  # share of base chunks from another frame of the task, so that the head must look
    executed: float = 1.0  # share of the draws that take a frame's executed base action, where one is known

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise ConfigError(f"draws is {self.draws}, allowed is 1 or more")
        if self.loss_unit not in LOSS_UNITS:
            raise ConfigError(f"loss_unit is {self.loss_unit!r}, allowed are {sorted(LOSS_UNITS)}")
        for name in ("mismatch", "executed"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} is {getattr(self, name)}, allowed is 0 to 1")

    def slot_range(self, horizon: int) -> tuple[int, int]:
        """Lowest slot and one past the highest.

        Raises:
            ConfigError: If a chunk of ``horizon`` slots has no such range.
        """
        low, high = self.slots or (0, horizon)
        if not 0 <= low < high <= horizon:
            raise ConfigError(f"slots are {low} to {high}, allowed is 0 <= low < high <= {horizon}")
        return low, high


def parser() -> argparse.ArgumentParser:
    """The command line; ``RECIPES`` has further defaults."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, nargs="+", required=True, help="one or more LeRobotDatasets, joined")
    p.add_argument(
        "--policy",
        help="folder of a flow policy or a LeRobot checkpoint, or the id of any policy with cached chunks (not needed "
        "with --init)",
    )
    p.add_argument(
        "--init",
        type=Path,
        help="head.safetensors to go on from: architecture, options and statistics are its own, the learning rate is a "
        "fifth; writes head.onnx, too",
    )
    p.add_argument("--out", type=Path, required=True, help="folder of the head")
    p.add_argument("--holdout", type=float, default=0.05, help="must be the policy's")
    p.add_argument("--architecture", choices=sorted(ARCHITECTURES), default="compact", help="default compact")
    p.add_argument(
        "--recipe",
        choices=sorted(RECIPES),
        help="defaults of optimiser, loss and draws (default: paper for the transformer, else ours)",
    )
    p.add_argument(
        "--image-size",
        type=int,
        default=0,
        help="transformer: side that images are scaled to, e.g. 224 [pixels]; default 0, as they are",
    )
    p.add_argument("--slots", type=int, nargs=2, metavar=("LOW", "HIGH"), help="draw k in [LOW, HIGH), e.g. [d, d + e)")
    p.add_argument("--mismatch", type=float, default=0.0, help="share of base chunks from another frame of the task")
    p.add_argument(
        "--executed",
        type=float,
        default=1.0,
        help="share of draws with the base action that was executed, in data of training.on_policy (default 1)",
    )
    p.add_argument("--without", choices=ABLATIONS, nargs="+", default=[], help="ablation: inputs to take away")
    p.add_argument("--residual-limit", type=float, default=0.0, help="largest residual [action units]; 0: none")
    p.add_argument("--reactive", action="store_true", help="control: the action itself from the observation alone")
    p.add_argument("--clock", action="store_true", help="a reactive head gets time feature and latent all the same")
    p.add_argument("--draws", type=int, help="slots per encoded observation")
    p.add_argument("--loss-unit", choices=sorted(LOSS_UNITS), help="unit of the squared error")
    LoopConfig.add_arguments(p, learning_rate=None, schedule=None, weight_decay=None)
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    p = parser()
    asked, _ = p.parse_known_args(argv)
    init = load_head(asked.init) if asked.init else None
    if init is not None:
        p.set_defaults(architecture=init.architecture, **options_of(init))
        asked, _ = p.parse_known_args(argv)
    elif asked.policy is None:
        raise ConfigError("--policy is not given, only with --init it need not be")
    defaults = RECIPES[asked.recipe or ("paper" if asked.architecture == "transformer" else "ours")]
    if init is not None:
        defaults = defaults | {"learning_rate": INIT_LEARNING_RATE * defaults["learning_rate"]}
    p.set_defaults(**defaults)
    run(p.parse_args(argv), init)
    return 0


def run(arguments: argparse.Namespace, init: Head | None) -> None:
    """Train as the command line says, from ``init`` on if it is given.

    Raises:
        A2C2Error: If something does not fit, or the folder has a head.
    """
    recipe = HeadRecipe(
        # One observation of a head that does not see the slot is one sample.
        draws=1 if arguments.reactive and not arguments.clock else arguments.draws,
        loss_unit=arguments.loss_unit,
        slots=tuple(arguments.slots) if arguments.slots else None,
        mismatch=arguments.mismatch,
        executed=arguments.executed,
    )
    loop = LoopConfig.from_arguments(arguments)
    check_free(arguments.out, init is not None)
    if arguments.policy is None:
        policy, facts = None, PolicyFacts.of(init.config, kind="of a head")
    else:
        policy, facts = find_policy(arguments.policy, arguments.data)
    cameras = facts.cameras if init is None else init.config.cameras
    parts = [load_demonstrations(root, cameras) for root in arguments.data]
    data = concatenate(parts)
    chunks = concatenate_chunks(
        [
            load_base(root, part, facts.policy_id, cache=recipe.executed < 1.0)
            for root, part in zip(arguments.data, parts, strict=True)
        ]
    )
    torch.manual_seed(loop.seed)
    if init is None:
        facts.check(data, chunks.actions, chunks.latents)
        if policy is not None:
            check_flow(policy.config, data)
        head = make_head(
            arguments.architecture,
            policy or described(facts, data),
            data.data_hash,
            image_size=arguments.image_size,
            without=tuple(arguments.without),
            residual_limit=arguments.residual_limit,
            reactive=arguments.reactive,
            clock=arguments.clock,
        )
    else:
        check_init(init, facts, data, chunks, arguments)
        head = init
        head.config = dataclasses.replace(init.config, training_data_hash=data.data_hash)
    if policy is None and init is None:
        training, _ = data.split(arguments.holdout)
        language = language_rows(chunks.language, data)
        head.set_statistics(statistics(data, training, language) | latent_statistics(chunks, training))
    origin = provenance.sha256_of(arguments.init) if init else ""
    trained = train_head(data, chunks, head, loop, arguments.out, arguments.holdout, recipe, init=origin)
    if init is not None:
        path = arguments.out / ONNX_FILE
        manifest = export(trained, samples_of(trained, data, chunks, PARITY_FRAMES), path)
        print(f"{path}: parity error {manifest.parity_max_abs_error:.2e} on {PARITY_FRAMES} frames")


def check_free(out: Path, exports: bool = False) -> None:
    """Refuse to overwrite a head.

    Args:
        out: Folder of a training.
        exports: The ONNX file is the last that the training writes; else its record is.

    Raises:
        ConfigError: If the folder has one, unless that training was killed before it had written its last file.
    """
    unfinished = (out / CHECKPOINT).exists() and not (out / (ONNX_FILE if exports else RECORD_FILE)).exists()
    if there := [name for name in (HEAD_FILE, ONNX_FILE) if (out / name).exists() and not unfinished]:
        raise ConfigError(f"{out} has {' and '.join(there)} already: choose another --out")


def options_of(head: Head) -> dict[str, object]:
    """The options that a head was made with, by the command line's names."""
    config = head.config
    return {
        "without": list(config.without),
        "residual_limit": config.residual_limit,
        "reactive": config.reactive,
        "clock": config.clock,
        "image_size": getattr(config, "encoded_size", 0),
    }


def check_init(
    head: Head, facts: PolicyFacts, data: Demonstrations, chunks: BaseChunks, arguments: argparse.Namespace
) -> None:
    """Compare a trained head with what it is to be trained on.

    Raises:
        ConfigError: Naming every difference.
    """
    config = head.config
    images = {name: (config.image_size, config.image_size, 3) for name in config.cameras}
    rows = [
        ("policy_id", config.policy_id, facts.policy_id),
        ("cameras", images, {name: tuple(frames.shape[1:]) for name, frames in data.frames.items()}),
        ("state_names", config.state_names, data.state_names),
        ("action_names", config.action_names, data.action_names),
        ("step_ns", config.step_ns, data.step_ns),
        ("horizon", config.horizon, chunks.actions.shape[2]),
        ("latent_dim", config.latent_dim or chunks.latents.shape[2], chunks.latents.shape[2]),
        ("architecture", head.architecture, arguments.architecture),
        *((name, value, getattr(arguments, name)) for name, value in options_of(head).items()),
    ]
    if wrong := [f"{name}: head {mine!r}, here {theirs!r}" for name, mine, theirs in rows if mine != theirs]:
        raise ConfigError(f"{arguments.init} cannot be trained on, it differs in " + "; ".join(wrong))


def samples_of(head: Head, data: Demonstrations, chunks: BaseChunks, count: int) -> list[HeadInput]:
    """Inputs of a head, drawn as in its training."""
    rng = np.random.default_rng(0)
    frames = rng.choice(np.flatnonzero(chunks.cached | (chunks.slot >= 0)), count)
    actions, slots, latents = draw_bases(data, chunks, HeadRecipe(), frames, rng, views=1)
    language = language_rows(chunks.language, data).numpy()
    return [
        HeadInput(
            images={name: data.frames[name][frame] for name in head.config.cameras},
            state=data.state[frame],
            base_action=action,
            time_feature=time_feature(slot, head.config.horizon),
            latent=latent,
            language=language[data.task[frame]],
        )
        for frame, action, slot, latent in zip(frames, actions, slots, latents, strict=True)
    ]


def find_policy(policy: str, roots: Sequence[Path]) -> tuple[FlowNetwork | None, PolicyFacts]:
    """The base policy by its folder or, for one that is known from its cached chunks only (None), by its id.

    Args:
        policy: Folder of a flow policy or of a LeRobot checkpoint that needs no YAML file, or a policy id.
        roots: Folders of the data sets.

    Raises:
        ConfigError: If it is neither, or the data sets have caches of different policies by this id.
    """
    if is_checkpoint(Path(policy)):
        policy = checkpoint_id(Path(policy), LeRobotMapping())
    cached = {path.parent for root in roots for path in (root / "chunks").glob(f"*/{DESCRIPTION_FILE}")}
    if folders := sorted(folder for folder in cached if folder.name == policy):
        first, *others = [load_facts(folder) for folder in folders]
        if wrong := [other for other in others if other != first]:
            raise ConfigError(f"the caches {list(map(str, folders))} are of different policies: {first} and {wrong[0]}")
        return None, first
    try:
        network = load_network(policy)
    except PolicyError as error:
        known = sorted({folder.name for folder in cached})
        raise ConfigError(
            f"policy is {policy!r}: no data set has cached chunks of such a policy id, cached are {known}, and it is "
            f"not the folder of a flow policy: {error}"
        ) from error
    return network, PolicyFacts.of(network.config, kind="flow")


def described(facts: PolicyFacts, data: Demonstrations) -> dict[str, object]:
    """What a head has to know of a policy and its data."""
    return dataclasses.asdict(facts) | {"step_ns": data.step_ns, "state_names": data.state_names}


def latent_statistics(chunks: BaseChunks, training: np.ndarray) -> dict[str, Tensor]:
    """``latent_mean`` and ``latent_std`` over the clean views of the training frames that are cached."""
    latents = torch.tensor(chunks.latents[0, training[chunks.cached[training]]])
    std = latents.std(0)
    return {"latent_mean": latents.mean(0), "latent_std": std.clamp(min=(MIN_LATENT_STD * std.mean()).clamp(min=1e-6))}


def make_head(
    architecture: str,
    policy: FlowNetwork | Mapping[str, object],
    data_hash: str,
    *,
    image_size: int = 0,
    **options: object,
) -> Head:
    """An untrained head for a policy; an MLP takes no cameras.

    Args:
        architecture: Key of ``ARCHITECTURES``.
        policy: Base policy, whose statistics and encoder the head starts from; or what is :func:`described` of it: the
            head has random weights then, and no statistics.
        data_hash: Of the data that it will be trained on.
        image_size: Side that a transformer's images are scaled to [pixels]; 0 leaves them.
        **options: Further fields of :class:`HeadConfig`: ``without``, ``residual_limit``, ``reactive``,
            ``clock``.

    Raises:
        ConfigError: If the options do not go together.
    """
    if image_size:
        if architecture != "transformer":
            raise ConfigError(f"image size is {image_size}, the {architecture} head allows only 0, as the images are")
        options["encoded_size"] = image_size
    if architecture == "mlp":
        options["cameras"] = ()
    cls = head_type(architecture)
    make = cls.for_policy if isinstance(policy, FlowNetwork) else cls.of_facts
    return make(policy, data_hash, **options)


def draw_bases(
    data: Demonstrations,
    chunks: BaseChunks,
    recipe: HeadRecipe,
    frames: np.ndarray,
    rng: np.random.Generator,
    of_task: Sequence[np.ndarray] = (),
    views: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What the base policy wants at each frame, from a chunk that started k steps before.

    A frame that is too early in its episode for the lowest slot takes its episode's first chunk, as a cold start does.

    Args:
        data: Demonstrations.
        chunks: Of their frames.
        recipe: Says how k and the chunk are chosen.
        frames: (B,) the frames that are observed.
        rng: Draws.
        of_task: Per task, the frames whose chunks may be mismatched; needed if the recipe has a mismatch.
        views: Use the first so many views of the cache, None for all.

    Returns:
        Base actions (B, A) float32, slots k (B,) and latents (B, Z) float32.
    """
    low, high = recipe.slot_range(chunks.actions.shape[2])
    count = len(frames)
    available = np.minimum(high, frames - data.start[frames] + 1)
    k = rng.integers(np.minimum(low, available - 1), available)
    base = frames - k
    view = rng.integers(0, views or len(chunks.actions), count)
    foreign = rng.random(count) < recipe.mismatch
    k[foreign] = rng.integers(low, high, foreign.sum())
    base[foreign] = [rng.choice(of_task[data.task[frame]]) for frame in frames[foreign]]
    wanted = (rng.random(count) < recipe.executed) | ~chunks.cached[frames]
    executed = wanted & (chunks.slot[frames] >= 0) & ~foreign
    action = np.where(executed[:, None], chunks.action[frames], chunks.actions[view, base, k])
    latent = np.where(executed[:, None], chunks.latent[frames], chunks.latents[view, base])
    return action, np.where(executed, chunks.slot[frames], k), latent


def residual_range(
    data: Demonstrations, chunks: BaseChunks, recipe: HeadRecipe, frames: np.ndarray, of_task: Sequence[np.ndarray] = ()
) -> np.ndarray:
    """Largest residual of each channel that a head is trained to return, (A,) float32 in action units.

    Args:
        data: Demonstrations.
        chunks: Of their frames.
        recipe: How samples are drawn.
        frames: Of the training.
        of_task: As of :func:`draw_bases`.
    """
    rng = np.random.default_rng(0)
    drawn = rng.choice(frames, RANGE_SAMPLES)
    return np.abs(data.action[drawn] - draw_bases(data, chunks, recipe, drawn, rng, of_task)[0]).max(axis=0)


def train_head(
    data: Demonstrations,
    chunks: BaseChunks,
    head: Head,
    loop: LoopConfig,
    out: Path,
    holdout: float = 0.05,
    recipe: HeadRecipe | None = None,
    augmentation: Augmentation | None = None,
    init: str = "",
    described: Sequence[str] | None = None,
) -> Head:
    """Train a head and write ``head.safetensors`` with its record.

    Args:
        data: Demonstrations.
        chunks: Base chunks of their frames, see ``training.joining``.
        head: Trained in place.
        loop: Hyper-parameters.
        out: Folder.
        holdout: Fraction of the episodes for validation; the base policy must not have been trained on them.
        recipe: How samples are drawn.
        augmentation: Of the newest observation.
        init: SHA-256 of the file that the head was loaded from; empty if it is untrained.
        described: Departures from the paper, for the record; None: those from its training on LIBERO.

    Returns:
        The head as stored.

    Raises:
        ConfigError: If the recipe does not fit the chunks or the head, or ``out`` has a head, or the checkpoint of
            another training.
    """
    check_free(out, bool(init))
    recipe, augmentation = recipe or HeadRecipe(), augmentation or Augmentation()
    horizon = head.config.horizon
    recipe.slot_range(horizon)
    if loop.workers > 1 and any(isinstance(module, (nn.BatchNorm2d, nn.Dropout)) for module in head.modules()):
        raise ConfigError(
            f"workers is {loop.workers}, the {head.architecture} head allows 1: its batch statistics and drop-out "
            "cannot be shared by threads"
        )
    known = chunks.cached | (chunks.slot >= 0)
    training, validation = (indices[known[indices]] for indices in data.split(holdout))
    validation = np.random.default_rng(0).permutation(validation)[:VALIDATION_FRAMES]
    language = language_rows(chunks.language, data)
    if head.config.language_dim not in (0, language.shape[1]):
        raise ConfigError(
            f"the head takes an embedding of {head.config.language_dim} values of an instruction, the policy of these "
            f"chunks has {language.shape[1]}"
        )
    cached = training[chunks.cached[training]]
    of_task = [cached[data.task[cached] == task] for task in range(len(data.instructions))]
    if recipe.mismatch and not all(len(frames) for frames in of_task):
        raise ConfigError(f"mismatch is {recipe.mismatch}, without cached chunks of every task only 0 is allowed")
    # A reactive head's residual leads from any base action to its own, however far they are apart; and of a head that
    # was trained before, on what is not known, it stays unknown.
    if not head.config.reactive and (not init or head.config.residual_range):
        largest = residual_range(data, chunks, recipe, training, of_task)
        largest = np.maximum(largest, MIN_RANGE * head.action_std.cpu().numpy())
        if head.config.residual_range:
            largest = np.maximum(largest, head.config.residual_range)
        head.config = dataclasses.replace(head.config, residual_range=[round(float(v), 6) for v in largest])
    seen = dataclasses.replace(data, frames={name: data.frames[name] for name in head.config.cameras})
    taus = np.stack([time_feature(k, horizon) for k in range(horizon)])
    validated = dataclasses.replace(recipe, slots=None, mismatch=0.0)

    def residual_error(
        model: Head, frames: np.ndarray, rng: np.random.Generator, validating: bool = False
    ) -> tuple[Tensor, Tensor, np.ndarray]:
        """What the base and the corrected action lack, (B * draws, A) each, and the slots."""
        device = model.action_std.device

        def tensor(array: np.ndarray) -> Tensor:
            return torch.tensor(array, device=device)

        draws = VALIDATION_DRAWS if validating else recipe.draws
        images, state = observations(seen, frames, None if validating else augmentation, rng)
        words = language[data.task[frames]].to(device)
        tokens = {name: model.encode_image(name, tensor(image), words) for name, image in images.items()}
        repeated = np.tile(frames, draws)
        if validating:
            action, k, latent = draw_bases(data, chunks, validated, repeated, rng, views=1)
        else:
            action, k, latent = draw_bases(data, chunks, recipe, repeated, rng, of_task)
        base = tensor(action)
        residual = model.fuse(
            {name: token.repeat(draws, 1) for name, token in tokens.items()},
            tensor(state).repeat(draws, 1),
            base,
            tensor(taus[k]),
            tensor(latent),
            words.repeat(draws, 1),
        )
        missing = tensor(data.action[repeated]) - base
        return missing, missing - residual, k

    def squared(model: Head, error: Tensor) -> Tensor:
        scale = model.action_std if recipe.loss_unit == "deviation" else 1.0
        return (error / scale).float().square().mean()

    def loss(model: Head, rng: np.random.Generator, size: int) -> Tensor:
        torch.manual_seed(int(rng.integers(2**31)))  # drop-out knows no other generator
        _, error, _ = residual_error(model, rng.choice(training, size), rng)
        return squared(model, error)

    def validate(model: Head) -> dict[str, float]:
        for average, latest in zip(model.buffers(), head.buffers(), strict=True):
            average.copy_(latest)  # statistics of batch normalisation: the loop averages the parameters only
        rng = np.random.default_rng(0)
        parts = [validation[i : i + VALIDATION_BATCH] for i in range(0, len(validation), VALIDATION_BATCH)]
        results = [residual_error(model, part, rng, validating=True) for part in parts]
        frames = np.concatenate([np.tile(part, VALIDATION_DRAWS) for part in parts])
        k = np.concatenate([slots for _, _, slots in results])
        missing, error = (torch.cat([result[i] for result in results]) for i in (0, 1))
        metrics = {"loss": squared(model, error).item()}
        groups = {f"_{low}": (k >= low) & (k < low + SLOT_RANGE) for low in range(0, horizon, SLOT_RANGE)}
        if isinstance(data, JoinedDemonstrations):
            groups |= {f"_data{number}": data.part[frames] == number for number in range(len(data.hashes))}
        for name, values in (("base_error", missing), ("error", error)):
            size = values.abs().mean(dim=1).float().cpu().numpy()
            metrics[name] = float(size.mean())
            metrics |= {f"{name}{suffix}": float(size[part].mean()) for suffix, part in groups.items() if part.any()}
        return metrics

    origin = (
        f"head {head.architecture} {fingerprint(head.config, recipe)} on data {data.data_hash[:12]} "
        f"holdout {holdout} seed {loop.seed}" + (f" from {init[:12]}" if init else "")
    )
    trained = train(head, loss, validate, loop, out / CHECKPOINT, origin)
    save_head(trained.model, out / HEAD_FILE)
    write_record(
        out / RECORD_FILE,
        {
            "policy_id": head.config.policy_id,
            "architecture": variant(head),
            "head": head.config,
            "init_sha256": init or None,
            "parameters": sum(p.numel() for p in head.parameters()),
            "data": describe(data, training, holdout),
            "data_sets": getattr(data, "hashes", (data.data_hash,)),
            "executed_frames": int((chunks.slot >= 0).sum()),
            "hyper_parameters": loop,
            "recipe": recipe,
            "augmentation": augmentation,
            "views": len(chunks.actions),
            "steps": trained.steps,
            "seconds": trained.seconds,
            "history": trained.history,
            "departures_from_the_paper": departures(head, recipe, loop, trained.steps, len(chunks.actions), bool(init))
            if described is None
            else described,
        },
    )
    plot_losses(out / "loss.png", trained.history, f"squared error [{LOSS_UNITS[recipe.loss_unit]}]")
    return load_head(out / HEAD_FILE)


def departures(
    head: Head, recipe: HeadRecipe, loop: LoopConfig, steps: int, views: int, trained_before: bool = False
) -> list[str]:
    """What differs from the paper's training of its head, in words."""
    config, paper = head.config, RECIPES["paper"]
    origin = "the base policy's" if head.encoder_of_policy else "random weights"
    origin = "a trained head's" if trained_before else origin
    found = {
        "compact": f"Compact network, its encoder initialised from {origin}, instead of ResNet-18 and a transformer.",
        "mlp": "Multilayer perceptron without images instead of ResNet-18 and a transformer.",
        "transformer": f"ResNet-18 starts from {origin} instead of ImageNet's.",
    }
    lines = [found[head.architecture]] + ["All weights start from a trained head's."] * trained_before
    if any(getattr(loop, name) != paper[name] for name in ("learning_rate", "schedule", "weight_decay")):
        lines.append(
            f"AdamW {loop.learning_rate:g}, {loop.schedule} schedule, weight decay {loop.weight_decay:g}, instead of "
            "1e-5 constant and 1e-5."
        )
    if loop.average_decay:
        lines.append("A moving average of the weights is kept instead of the last ones.")
    if steps != PAPER_STEPS or loop.batch_size != 64:
        lines.append(f"{steps} steps of {loop.batch_size} observations instead of {PAPER_STEPS} of 64.")
    if recipe.loss_unit != paper["loss_unit"]:
        lines.append("The error is in standard deviations of each action instead of action units.")
    shared = "; several k share a frame" if recipe.draws > 1 else ""
    lines.append(f"The frame t+k is drawn uniformly, then k over the slots whose frame t exists{shared}.")
    if views > 1:
        lines.append(f"Base chunks of 1 clean and {views - 1} augmented views per frame.")
    if recipe.slots:
        lines.append("k is drawn in [{}, {}).".format(*recipe.slots))
    if recipe.mismatch:
        lines.append(f"{recipe.mismatch:.0%} of the base chunks are of another frame of the task.")
    if config.reactive:
        unseen = "base action" if config.clock else "base action, time feature and latent"
        lines.append(f"Control: behaviour cloning per step, without {unseen}.")
    if config.without:
        lines.append(f"Ablation: without {', '.join(config.without)}.")
    if config.residual_limit:
        lines.append(f"The residual is limited to {config.residual_limit:g}.")
    return lines


if __name__ == "__main__":
    sys.exit(main())
