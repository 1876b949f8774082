"""Policies that are not ours on real LIBERO, trained and started with the commands of docs/policies.md."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("lerobot")
pytest.importorskip("rclpy")

from a2c2_ros.msg import ActionChunk
from rclpy.serialization import deserialize_message

from a2c2_ros.benchmark.policies import served
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.evaluation.cells import policy_facts
from a2c2_ros.evaluation.worker import _policy as load_for_evaluation
from a2c2_ros.nodes.conversions import message_to_chunk
from a2c2_ros.policies.registry import load_policy_for
from a2c2_ros.recording.reader import read_bag
from a2c2_ros.training.dataset import load_demonstrations
from a2c2_ros.training.smolvla import save_random

STEPS = 60


def command(module, *arguments):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    with subprocess.Popen([sys.executable, "-m", module, *arguments], env=environment) as process:
        try:
            assert process.wait(timeout=280) == 0
        finally:
            process.terminate()  # and with it what it started


def simulate(out, *arguments):
    """The summary of an episode."""
    command("a2c2_ros.bringup", "libero_sim", "episodes:=1", f"max_steps:={STEPS}", f"out:={out}", *arguments)
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["episodes"], summary["ticks"]) == (1, STEPS)
    assert set(summary["states"]) == {"running" if summary["correction"] else "base_only"}, "never held"
    return summary


@pytest.mark.timeout(600)
def test_an_act_that_lerobot_trained_on_our_data(libero_demonstrations, tmp_path):
    root, out = libero_demonstrations, tmp_path / "act"
    command(
        "lerobot.scripts.lerobot_train",
        "--dataset.repo_id=local/libero",
        f"--dataset.root={root}",
        "--policy.type=act",
        "--policy.chunk_size=50",
        "--policy.n_action_steps=50",
        "--policy.dim_model=64",
        "--policy.dim_feedforward=128",
        "--policy.n_heads=4",
        "--policy.n_encoder_layers=1",
        "--policy.n_vae_encoder_layers=1",
        "--policy.pretrained_backbone_weights=null",
        "--policy.optimizer_lr=5e-4",
        "--policy.optimizer_lr_backbone=5e-4",
        "--policy.push_to_hub=false",
        "--policy.device=cpu",
        "--steps=60",
        "--batch_size=4",
        "--num_workers=0",
        f"--output_dir={out}",
    )
    path = out / "checkpoints" / "last" / "pretrained_model"

    data, profile = load_demonstrations(root), load_profile("libero")
    policy = load_policy_for(profile, "lerobot", path, threads=1)
    frames = np.arange(5, len(data) - 50, 20)
    expert, inside = data.chunks(frames, policy.horizon)
    chunks = []
    for frame in frames:
        observation = {name: images[frame] for name, images in data.frames.items()} | {"state": data.state[frame]}
        chunks.append(policy.predict(observation, data.instructions[0], seed=0).actions)
    error, mean = np.abs(np.array(chunks) - expert), np.abs(data.action.mean(axis=0) - expert)
    assert error[inside].mean() < 0.85 * mean[inside].mean(), "it has learned more than the mean action"

    summary = simulate(tmp_path / "run", "policy:=lerobot", f"policy_path:={path}", "correction:=false")
    assert summary["policy_ids"] == [policy.policy_id] and policy.policy_id.startswith("act-")
    assert summary["inference_ms_p50"] > 0 == summary["transport_ms_p50"]


@pytest.mark.timeout(300)
def test_a_smolvla_with_real_time_chunking(tmp_path):
    profile = load_profile("libero")
    path = save_random(tmp_path / "smolvla", "tiny", profile.robot, profile.camera_shapes()["agentview"][0])
    arguments = ("policy:=lerobot", f"policy_path:={path}", "correction:=false", "chunking:=rtc", "record:=true")
    summary = simulate(tmp_path / "run", *arguments, "execution_horizon:=20", "inference_delay:=5")
    assert [name.split("-")[0] for name in summary["policy_ids"]] == ["smolvla"]
    assert summary["chunk_delay_steps_p50"] == 5
    recorded = (message.data for message in read_bag(tmp_path / "run" / "bag", {"/action_chunk"}))
    chunks = [message_to_chunk(deserialize_message(data, ActionChunk)) for data in recorded]
    assert len(chunks) > 2
    for previous, chunk in itertools.pairwise(chunks):
        apart = np.abs(chunk.actions[:30] - previous.actions[20:]).mean(axis=1)
        assert apart[:5].max() < 0.01 and apart[20:].mean() > 0.05, "it goes on with what will be executed"

    facts, loaded = policy_facts(str(path)), load_for_evaluation(str(path))
    assert [facts["policy_id"]] == [loaded.policy_id] == summary["policy_ids"], "tables name it without loading it"
    assert facts["horizon"] == loaded.horizon == 50


@pytest.mark.timeout(300)
def test_smolvla_trained_from_random_weights(libero_demonstrations, tmp_path):
    out = tmp_path / "smolvla"
    options = ("--data", str(libero_demonstrations), "--out", str(out), "--size", "tiny", "--batch-size", "2")
    for steps in ("2", "3"):  # the second goes on
        command("a2c2_ros.training.smolvla", *options, "--workers", "0", "--save-every", "1", "--steps", steps)
    assert sorted(int(folder.name) for folder in (out / "lerobot" / "checkpoints").glob("0*")) == [1, 2, 3]
    data, profile = load_demonstrations(libero_demonstrations), load_profile("libero")
    moved = out.rename(tmp_path / "moved")
    policy = load_policy_for(profile, "lerobot", moved)
    observation = {name: images[0] for name, images in data.frames.items()} | {"state": data.state[0]}
    assert policy.predict(observation, data.instructions[0], seed=0).actions.shape == (50, 7)
    assert str(tmp_path) not in "".join(path.read_text() for path in moved.glob("*.json")), "no path of this machine"


@pytest.mark.timeout(300)
def test_a_policy_server_and_the_head_of_its_policy(tmp_path):
    with served(threads=1, device="cpu") as address:
        summary = simulate(tmp_path / "run", "policy:=remote", f"policy_path:={address}")
    assert [name.split("-")[0] for name in summary["policy_ids"]] == ["flow_libero_spatial"]
    assert summary["transport_ms_p50"] > 0 and summary["head_ms_p50"] > 0
