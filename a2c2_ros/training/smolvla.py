"""Train SmolVLA from random weights on a data set, with LeRobot's own trainer.

``python -m a2c2_ros.training.smolvla --data DIR --out DIR --size small``. LeRobot's SmolVLA reads the architecture and
the tokenizer of its vision-language model from a folder or the hub; this writes such a folder, so nothing is loaded.
What follows ``--`` goes to ``lerobot-train`` as it is. The result is a checkpoint folder for the planner's policy
``lerobot``, with the vision-language model in ``vlm`` beside the weights. A killed training goes on from its last
checkpoint.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from a2c2_ros.commands import command
from a2c2_ros.core.errors import ConfigError
from a2c2_ros.core.robot import Robot
from a2c2_ros.jobs import interrupt_on_termination, run_job
from a2c2_ros.policies.lerobot_files import VLM_FOLDER
from a2c2_ros.settings import check_settings
from a2c2_ros.training.dataset import IMAGE_PREFIX, Demonstrations, load_demonstrations
from a2c2_ros.training.record import write_record

HORIZON = 50
SETTINGS = ("size", "holdout", "batch_size", "learning_rate", "seed")
"""What a training that goes on cannot change."""
SIZES: dict[str, dict[str, Any]] = {
    # For tests of the plumbing: seconds.
    "tiny": {
        "text": {"hidden_size": 32, "intermediate_size": 64, "layers": 2, "heads": 2, "kv_heads": 1},
        "vision": {"hidden_size": 16, "intermediate_size": 32, "layers": 1, "heads": 2, "image_size": 64},
        "scale_factor": 2,
        "expert_width": 0.5,
    },
    # For training on two CPU cores.
    "small": {
        "text": {"hidden_size": 192, "intermediate_size": 512, "layers": 4, "heads": 3, "kv_heads": 1},
        "vision": {"hidden_size": 128, "intermediate_size": 512, "layers": 3, "heads": 4, "image_size": 128},
        "scale_factor": 2,
        "expert_width": 0.75,
    },
    # The published SmolVLA: 16 layers of SmolVLM2-500M (arXiv 2506.01844), here with random weights.
    "full": {
        "text": {"hidden_size": 960, "intermediate_size": 2560, "layers": 16, "heads": 15, "kv_heads": 5},
        "vision": {"hidden_size": 768, "intermediate_size": 3072, "layers": 12, "heads": 12, "image_size": 512},
        "scale_factor": 4,
        "expert_width": 0.75,
        "vocabulary": 49_280,
    },
}
SPECIAL_TOKENS = {
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "image_token": "<image>",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, required=True, help="LeRobotDataset")
    p.add_argument("--out", type=Path, required=True, help="checkpoint folder")
    p.add_argument("--size", choices=SIZES, default="small", help="of the network (default small)")
    p.add_argument("--steps", type=int, default=5000, help="training steps (default 5000)")
    p.add_argument("--batch-size", type=int, default=32, help="frames per step (default 32)")
    p.add_argument("--learning-rate", type=float, default=5e-4, help="highest, with cosine decay (default 5e-4)")
    p.add_argument("--seed", type=int, default=0, help="of weights and batches (default 0)")
    p.add_argument("--device", default="cpu", help="torch device (default cpu)")
    p.add_argument("--workers", type=int, default=2, help="processes that decode videos (default 2)")
    p.add_argument(
        "--holdout", type=float, default=0.05, help="share of episodes for a head's validation (default 0.05)"
    )
    p.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints (default 1000)")
    p.add_argument("trainer", nargs="*", help="further options of lerobot-train, after --")
    return p


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = parser().parse_args(argv)
    data = load_demonstrations(arguments.data, [])
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    identity = {name: getattr(arguments, name) for name in SETTINGS} | {"data_hash": data.data_hash}
    check_settings(out / "settings.json", identity)
    words = {word for text in data.instructions for word in text.split()}
    if not (out / VLM_FOLDER).is_dir():
        partial = out / f"{VLM_FOLDER}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        save_vlm(partial, arguments.size, sorted(words))
        partial.rename(out / VLM_FOLDER)
    run = out / "lerobot"
    last = run / "checkpoints" / "last" / "pretrained_model"
    options = trainer_options(arguments, data, out)
    if last.exists():
        options = [f"--config_path={last / 'train_config.json'}", "--resume=true", f"--steps={arguments.steps}"]
    started_s = time.time()
    command = [sys.executable, "-m", "lerobot.scripts.lerobot_train", *options, *arguments.trainer]
    interrupt_on_termination()
    if code := run_job(command, os.environ | {"HF_HUB_OFFLINE": "1"}):
        sys.exit(f"lerobot-train ended with {code}")
    collect(last, out)
    record: dict[str, object] = {
        "size": arguments.size,
        "architecture": SIZES[arguments.size],
        "data": {"hash": data.data_hash, "frames": len(data), "holdout": arguments.holdout},
        "hyper_parameters": {
            name: getattr(arguments, name) for name in ("steps", "batch_size", "learning_rate", "seed", "device")
        },
        "lerobot_train": arguments.trainer,
        "seconds": round(time.time() - started_s, 1),  # since the start or, after a kill, since the last checkpoint
    }
    write_record(out / "training.json", record)
    print(f"policy:=lerobot policy_path:={arguments.out}")


def collect(checkpoint: Path, out: Path) -> None:
    """Copy a checkpoint of lerobot-train beside its vision-language model, so that both can be moved together."""
    for path in [*checkpoint.glob("*.safetensors"), *checkpoint.glob("policy_*.json"), checkpoint / "config.json"]:
        shutil.copy2(path, out / path.name)
    # Where it was made and where it was continued from says nothing elsewhere.
    places = {"vlm_model_name": VLM_FOLDER, "tokenizer_name": VLM_FOLDER, "pretrained_path": None}
    for name in ("config.json", "policy_preprocessor.json"):
        settings = json.loads((out / name).read_text(encoding="utf-8"))
        for part in [settings, *(step["config"] for step in settings.get("steps", []))]:
            part.update({key: value for key, value in places.items() if key in part})
        (out / name).write_text(json.dumps(settings, indent=4) + "\n", encoding="utf-8")


def trainer_options(arguments: argparse.Namespace, data: Demonstrations, out: Path) -> list[str]:
    """Options of lerobot-train; it sees the training episodes only, as the head's training needs it."""
    training, _ = data.split(arguments.holdout)
    episodes = sorted({int(episode) for episode in data.episode[training]})
    network = network_options(arguments.size, out / VLM_FOLDER)
    warmup = max(1, min(1000, arguments.steps // 20))
    return [
        f"--dataset.repo_id=local/{arguments.data.name}",
        f"--dataset.root={arguments.data.resolve()}",
        f"--dataset.episodes={episodes}",
        "--policy.type=smolvla",
        "--policy.push_to_hub=false",
        f"--policy.device={arguments.device}",
        *(f"--policy.{name}={_text(value)}" for name, value in network.items()),
        "--policy.freeze_vision_encoder=false",
        "--policy.train_expert_only=false",
        f"--policy.optimizer_lr={arguments.learning_rate}",
        f"--policy.scheduler_warmup_steps={warmup}",
        f"--policy.scheduler_decay_steps={arguments.steps}",
        f"--steps={arguments.steps}",
        f"--batch_size={arguments.batch_size}",
        f"--num_workers={arguments.workers}",
        f"--seed={arguments.seed}",
        f"--save_freq={arguments.save_every}",
        f"--log_freq={min(100, arguments.save_every)}",
        f"--output_dir={out / 'lerobot'}",
    ]


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


def save_vlm(folder: Path, size: str, words: Sequence[str]) -> None:
    """Write the configuration and the processor of a SmolVLM without weights.

    Args:
        folder: Is made.
        size: Key of :data:`SIZES`.
        words: The tokenizer's vocabulary; it cuts at spaces, and every other word is one unknown token.

    Raises:
        ConfigError: If the size is unknown.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        SmolVLMConfig,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    if size not in SIZES:
        raise ConfigError(f"size is {size!r}, allowed are {sorted(SIZES)}")
    shape: Mapping[str, Any] = SIZES[size]
    vocabulary = ["<pad>", "<unk>", "\n", *SPECIAL_TOKENS.values(), *words]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Split(" ", "removed")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", extra_special_tokens=SPECIAL_TOKENS
    )
    text, vision = shape["text"], shape["vision"]
    SmolVLMConfig(
        text_config={
            "model_type": "llama",
            "hidden_size": text["hidden_size"],
            "intermediate_size": text["intermediate_size"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "num_key_value_heads": text["kv_heads"],
            "head_dim": text["hidden_size"] // text["heads"],
            "vocab_size": max(shape.get("vocabulary", 0), len(vocabulary)),
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 1,
        },
        vision_config={
            "hidden_size": vision["hidden_size"],
            "intermediate_size": vision["intermediate_size"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["heads"],
            "image_size": vision["image_size"],
            "patch_size": 16,
        },
        scale_factor=shape["scale_factor"],
        image_token_id=vocabulary.index(SPECIAL_TOKENS["image_token"]),
        pad_token_id=0,
    ).save_pretrained(folder)
    SmolVLMProcessor(SmolVLMImageProcessor(), tokenizer, SmolVLMVideoProcessor()).save_pretrained(folder)


def save_random(folder: Path, size: str, robot: Robot, image_size: int) -> Path:
    """Write a checkpoint of a size with random weights and small motions, to measure time and to test loops with.

    Args:
        folder: Is made.
        size: Key of :data:`SIZES`.
        robot: Names of cameras, sizes of state and action.
        image_size: Side of the robot's images [pixels].

    Returns:
        The folder.
    """
    import torch
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies import get_policy_class, make_policy_config, make_pre_post_processors

    save_vlm(folder / VLM_FOLDER, size, ["warm", "up"])
    inputs = {
        f"{IMAGE_PREFIX}{name}": PolicyFeature(FeatureType.VISUAL, (3, image_size, image_size))
        for name in robot.cameras
    }
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (len(robot.state_names),))
    output = PolicyFeature(FeatureType.ACTION, (len(robot.action_names),))
    config = make_policy_config(
        "smolvla",
        device="cpu",
        push_to_hub=False,
        input_features=inputs,
        output_features={"action": output},
        **network_options(size, folder / VLM_FOLDER),
    )
    torch.manual_seed(0)
    get_policy_class("smolvla")(config).save_pretrained(folder)
    statistics = {
        name: {"mean": torch.zeros(feature.shape), "std": torch.full(feature.shape, std)}
        for name, feature, std in (("observation.state", inputs["observation.state"], 1.0), ("action", output, 0.1))
    }
    for processor in make_pre_post_processors(config, dataset_stats=statistics):
        processor.save_pretrained(folder)
    return folder


def network_options(size: str, vlm: Path) -> dict[str, Any]:
    """Fields of LeRobot's SmolVLA configuration for a size."""
    shape = SIZES[size]
    side = shape["vision"]["image_size"]
    return {
        "vlm_model_name": str(vlm),
        "load_vlm_weights": False,
        "num_vlm_layers": shape["text"]["layers"],
        "expert_width_multiplier": shape["expert_width"],
        "resize_imgs_with_padding": (side, side),
        "chunk_size": HORIZON,
        "n_action_steps": HORIZON,
    }


if __name__ == "__main__":
    sys.exit(main())
