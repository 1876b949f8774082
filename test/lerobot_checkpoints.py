"""Tiny LeRobot checkpoints with random weights, saved by LeRobot itself; nothing is downloaded."""

import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies import get_policy_class, make_policy_config, make_pre_post_processors

from a2c2_ros.training.smolvla import save_vlm

HORIZON, STATE, ACTION, SIDE = 50, 8, 7, 128
CAMERAS = ("observation.images.agentview", "observation.images.wrist")
WORDS = ["pick", "up", "the", "black", "bowl", "and", "place", "it", "on", "plate", "warm", "move"]


def features(cameras=CAMERAS, side=SIDE, state=STATE):
    inputs = {name: PolicyFeature(FeatureType.VISUAL, (3, side, side)) for name in cameras}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (state,))
    return {"input_features": inputs, "output_features": {"action": PolicyFeature(FeatureType.ACTION, (ACTION,))}}


def statistics(cameras=CAMERAS, state=STATE):
    """Statistics of a data set that are not 0 and 1, so that a forgotten normalisation shows."""
    stats = {}
    for name, shape in {c: (3, 1, 1) for c in cameras}.items() | {
        "observation.state": (state,),
        "action": (ACTION,),
    }.items():
        ramp = torch.linspace(0.1, 0.5, shape[0]).reshape(shape)
        stats[name] = {"mean": ramp, "std": ramp + 0.2, "min": ramp - 1.0, "max": ramp + 1.0}
    return stats


def save(folder, family, *, cameras=CAMERAS, side=SIDE, **settings):
    """A checkpoint folder of a family, as ``lerobot-train`` leaves it."""
    torch.manual_seed(0)
    config = make_policy_config(family, device="cpu", push_to_hub=False, **features(cameras, side), **settings)
    policy = get_policy_class(family)(config).eval()
    for name, parameter in policy.named_parameters():
        if name.endswith("state_proj.weight"):
            parameter.data *= 10  # so that the state matters beside the image
    processors = make_pre_post_processors(config, dataset_stats=statistics(cameras))
    policy.save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)
    return folder


def save_act(folder, **settings):
    small = {"dim_model": 32, "n_heads": 2, "dim_feedforward": 64, "n_encoder_layers": 1, "n_vae_encoder_layers": 1}
    small |= {"latent_dim": 8, "pretrained_backbone_weights": None, "chunk_size": HORIZON, "n_action_steps": HORIZON}
    return save(folder, "act", **small | settings)


def save_diffusion(folder, **settings):
    small = {"down_dims": (16, 32), "diffusion_step_embed_dim": 16, "n_groups": 4, "spatial_softmax_num_keypoints": 4}
    small |= {"horizon": 52, "n_action_steps": HORIZON, "num_train_timesteps": 10, "num_inference_steps": 2}
    return save(folder, "diffusion", pretrained_backbone_weights=None, **small | settings)


def save_smolvla(folder, **settings):
    """With its VLM's configuration and tokenizer in ``vlm`` inside the folder."""
    save_vlm(folder / "vlm", "tiny", WORDS)
    small = {"vlm_model_name": str(folder / "vlm"), "num_vlm_layers": 2, "expert_width_multiplier": 0.5}
    small |= {"resize_imgs_with_padding": (64, 64), "chunk_size": HORIZON, "n_action_steps": HORIZON, "num_steps": 3}
    return save(folder, "smolvla", **small | settings)
