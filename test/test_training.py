"""Training on a tiny LeRobotDataset: reading, labels, learning, continuing, caching, the head and its export."""

import argparse
import dataclasses
import errno
import json
import os
import shutil

import numpy as np
import pytest

pytest.importorskip("lerobot")
torch = pytest.importorskip("torch")

from a2c2_ros.core.errors import ConfigError
from a2c2_ros.heads.compact import CompactHead
from a2c2_ros.policies.flow import FlowConfig, FlowNetwork, load_network
from a2c2_ros.training import train_head as train_head_module
from a2c2_ros.training import train_policy as train_policy_module
from a2c2_ros.training.cache_chunks import cache_chunks, load_chunks
from a2c2_ros.training.dataset import Augmentation, load_demonstrations
from a2c2_ros.training.joining import BaseChunks, concatenate
from a2c2_ros.training.loop import LoopConfig
from a2c2_ros.training.train_head import HeadRecipe, train_head
from a2c2_ros.training.train_policy import DISTURBED_WEIGHT, PADDING_WEIGHT, targets, train_policy

# Threads that wait for each other are slow on a busy machine, and these networks are tiny.
torch.set_num_threads(1)

SIZE, LENGTH, EPISODES, HORIZON = 64, 12, 3, 8
ACTIONS = ("x", "y", "gripper")


def action_at(task, step):
    """Depends on the task and the step only, both of which are visible."""
    return np.array([0.5 - task, step / LENGTH, 1.0 if step > LENGTH // 2 else -1.0], dtype=np.float32)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = tmp_path_factory.mktemp("data") / "tiny"
    image = {"dtype": "video", "shape": (SIZE, SIZE, 3), "names": ["height", "width", "channels"]}
    features = {
        "observation.images.agentview": image,
        "observation.images.wrist": image,
        "observation.state": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
        "action": {"dtype": "float32", "shape": (3,), "names": list(ACTIONS)},
        "observation.objects": {"dtype": "float32", "shape": (3,), "names": ["x", "y", "z"]},
    }
    dataset = LeRobotDataset.create("local/tiny", fps=20, features=features, root=root)
    for episode in range(2 * EPISODES):
        task = episode % 2
        for step in range(LENGTH):
            frame = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
            frame[:, : 4 * step + 8, task] = 200
            dataset.add_frame(
                {
                    "observation.images.agentview": frame,
                    "observation.images.wrist": frame,
                    "observation.state": np.array([step / LENGTH, task], dtype=np.float32),
                    "action": action_at(task, step),
                    "observation.objects": np.full(3, task, dtype=np.float32),
                    "task": ("pick up the red cup", "open the drawer")[task],
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.fixture(scope="module")
def data(root):
    return load_demonstrations(root)


@pytest.fixture(scope="module", autouse=True)
def embedding():
    """A stand-in for the sentence encoder, which test_flow tests."""

    def table(data):
        return torch.eye(len(data.instructions), 384)

    with pytest.MonkeyPatch.context() as patch:
        for module in ("train_policy", "cache_chunks"):
            patch.setattr(f"a2c2_ros.training.{module}.language_table", table)
        yield


def config_for(data):
    return FlowConfig(
        action_names=data.action_names,
        state_names=data.state_names,
        cameras=tuple(data.frames),
        image_size=SIZE,
        step_ns=data.step_ns,
        horizon=HORIZON,
        latent_dim=32,
        width=64,
        channels=8,
        keypoints=8,
        decoder_width=64,
        decoder_blocks=1,
        objects_dim=3,
    )


def loop_for(steps, **changes):
    values = {
        "learning_rate": 3e-3,
        "schedule": "cosine",
        "weight_decay": 1e-4,
        "batch_size": 16,
        "steps": steps,
        "warmup_steps": 10,
        "validate_every": 60,
        "average_decay": 0.95,
        "bfloat16": False,
    }
    return LoopConfig(**(values | changes))


@pytest.fixture(scope="module")
def policy(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "tiny_policy"
    train_policy(data, config_for(data), loop_for(180), out, holdout=0.3)
    return out


@pytest.fixture(scope="module")
def chunks(data, root, policy):
    folder = cache_chunks(data, load_network(policy), root, views=2)
    return folder, load_chunks(folder, data)


def test_dataset_is_read_as_written(data):
    assert len(data) == 2 * EPISODES * LENGTH and data.action_names == ACTIONS and data.step_ns == 50_000_000
    assert data.instructions[data.task[0]] == "pick up the red cup"
    assert np.array_equal(data.action[LENGTH + 3], action_at(1, 3))
    assert data.start[LENGTH + 3] == LENGTH and data.end[LENGTH + 3] == 2 * LENGTH
    frame = data.frames["agentview"][LENGTH + 3]
    # Frame 3 of task 1: green for 20 columns, up to the loss of the video codec.
    assert frame.shape == (SIZE, SIZE, 3) and frame.dtype == np.uint8
    assert frame[:, :16, 1].mean() > 150 and frame[:, 26:, 1].mean() < 50 and frame[:, :, 0].mean() < 50


def test_a_chunk_of_positions_stands_still_where_it_is(data):
    chunks, _ = data.chunks(np.array([LENGTH - 2]), HORIZON, positions=True)
    assert np.array_equal(chunks[0, 2:], np.tile(action_at(0, LENGTH - 1), (HORIZON - 2, 1)))


def test_a_policy_of_another_rate_or_state_is_refused(data, root, policy):
    network = load_network(policy)
    for changes, words in (({"step_ns": 100_000_000}, "step_ns"), ({"state_names": data.state_names[::-1]}, "state")):
        with pytest.raises(ConfigError, match=words):
            cache_chunks(dataclasses.replace(data, **changes), network, root, views=1)


def test_frames_that_do_not_fit_on_the_disk_are_an_error(root, tmp_path, monkeypatch):
    copy = tmp_path / "data"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns("cache", "chunks"))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(ConfigError, match=r"no room for 0\.0 GB.*No space left"):
        patch.setattr(os, "posix_fallocate", full)
        load_demonstrations(copy)
    assert not list(copy.rglob("*.partial"))
    assert len(load_demonstrations(copy)) == 2 * EPISODES * LENGTH


def test_as_many_workers_as_share_a_batch():
    parser = argparse.ArgumentParser()
    LoopConfig.add_arguments(parser, learning_rate=1e-3, schedule="cosine", weight_decay=0.0)
    for given, used in (("1", 1), ("12", 8), ("24", 16), ("128", 64)):
        assert LoopConfig.from_arguments(parser.parse_args(["--steps", "1", "--workers", given])).workers == used
    with pytest.raises(ConfigError, match="workers is 0"):
        LoopConfig.from_arguments(parser.parse_args(["--steps", "1", "--workers", "0"]))


def test_chunks_stand_still_after_the_episode(data):
    chunks, inside = data.chunks(np.array([0, LENGTH - 2]), HORIZON)
    assert inside[0].all() and inside[1].tolist() == [True, True] + [False] * (HORIZON - 2)
    assert np.array_equal(chunks[0], np.stack([action_at(0, k) for k in range(HORIZON)]))
    assert np.array_equal(chunks[1, :2], np.stack([action_at(0, LENGTH - 2), action_at(0, LENGTH - 1)]))
    assert np.array_equal(chunks[1, 2:], np.tile([0.0, 0.0, 1.0], (HORIZON - 2, 1)))


@pytest.fixture(scope="module")
def disturbed(data):
    """Two disturbances in the first episode, and in the second at its first and its last frame."""
    frames = (3, LENGTH - 2, LENGTH, 2 * LENGTH - 1)
    return dataclasses.replace(data, disturbed=np.isin(np.arange(len(data)), frames))


STARTS = np.array([0, 3, 4, LENGTH - 4, LENGTH - 1, LENGTH + 1, 2 * LENGTH - 4])
UNDISTURBED = (4, 1, 7, 3, HORIZON, HORIZON, 4)
"""Slots of a chunk from each start to the one that is disturbed: what comes after it answers the disturbance."""


def test_what_follows_a_disturbance_in_the_episode_cannot_be_foreseen(disturbed):
    foreseen = disturbed.undisturbed(STARTS, HORIZON)
    assert foreseen.tolist() == [[slot < count for slot in range(HORIZON)] for count in UNDISTURBED]


def test_slots_after_the_end_and_after_a_disturbance_weigh_less(disturbed):
    _, weights, _ = targets(disturbed, FlowNetwork(config_for(disturbed)), STARTS)
    inside = np.minimum(disturbed.end[STARTS] - STARTS, HORIZON)
    expected = [
        [DISTURBED_WEIGHT if slot >= count else PADDING_WEIGHT if slot >= length else 1.0 for slot in range(HORIZON)]
        for count, length in zip(UNDISTURBED, inside, strict=True)
    ]
    by_slot = weights.reshape(len(STARTS), HORIZON, len(ACTIONS))
    np.testing.assert_array_equal(by_slot, np.repeat(np.float32(expected)[:, :, None], len(ACTIONS), axis=2))


def test_split_keeps_episodes_whole(data):
    training, validation = data.split(0.3)
    assert not set(data.episode[training]) & set(data.episode[validation])
    assert len(training) + len(validation) == len(data) and set(data.task[validation]) == {0, 1}
    with pytest.raises(ConfigError, match="episodes"):
        dataclasses.replace(data, group=data.task).split(0.3)


def test_parts_of_one_recorded_episode_are_on_one_side_of_the_split(data, root, tmp_path):
    assert np.array_equal(data.group, data.episode), "nobody says otherwise"
    together = dataclasses.replace(data, group=data.episode // 2)
    for joined in (together, concatenate([together, dataclasses.replace(together, data_hash="another")])):
        training, validation = joined.split(0.3)
        assert len(validation) and not set(joined.group[training]) & set(joined.group[validation])
        assert len(np.unique(joined.group)) * 2 == len(np.unique(joined.episode))


def test_augmentation_only_shifts_and_scales():
    image = np.zeros((16, 16, 3), dtype=np.uint8)
    image[8, 8] = 100
    augmentation = Augmentation(shift=2, brightness=0.0)
    seen = set()
    for seed in range(40):
        changed = augmentation.image(image, np.random.default_rng(seed))
        (y,), (x,) = np.nonzero(changed[:, :, 0])
        assert changed[y, x, 0] == 100
        seen.add((y - 8, x - 8))
    assert {abs(v) for pair in seen for v in pair} == {0, 1, 2}
    bright = {int(Augmentation(0, 0.2).image(image, np.random.default_rng(seed)).max()) for seed in range(20)}
    assert len(bright) > 5 and 80 <= min(bright) and max(bright) <= 120


def test_policy_learns_and_leaves_a_record(policy, data):
    record = json.loads((policy / "training.json").read_text())
    assert record["steps"] == 180 and record["data"]["hash"] == data.data_hash
    # The mean action has an error of 0.6.
    assert record["history"][-1]["error"] < 0.15 and record["history"][-1]["loss"] < record["history"][0]["loss"]
    assert record["policy_id"] == load_network(policy).config.policy_id
    assert (policy / "loss.png").stat().st_size > 1000


def test_training_is_reproducible_and_continues(data, tmp_path):
    """Two runs of 20 steps agree, and so does one that was stopped at step 10 and continued."""

    def weights(out):
        return load_network(out).decoder.output.weight

    for name in ("a", "b"):
        train_policy(data, config_for(data), loop_for(20, validate_every=10, schedule="constant"), tmp_path / name, 0.3)
    train_policy(data, config_for(data), loop_for(10, validate_every=10, schedule="constant"), tmp_path / "c", 0.3)
    assert not torch.equal(weights(tmp_path / "a"), weights(tmp_path / "c"))
    train_policy(data, config_for(data), loop_for(20, validate_every=10, schedule="constant"), tmp_path / "c", 0.3)
    assert torch.equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert torch.equal(weights(tmp_path / "a"), weights(tmp_path / "c"))
    for name in ("d", "e"):
        loop = loop_for(20, validate_every=20, schedule="constant", workers=2)
        train_policy(data, config_for(data), loop, tmp_path / name, 0.3)
    assert torch.equal(weights(tmp_path / "d"), weights(tmp_path / "e"))
    refused = (
        ({"seed": 1}, 0.3, "seed 0.* not of .*seed 1"),
        ({}, 0.5, "holdout"),
        ({"learning_rate": 1.0}, 0.3, "rate"),
    )
    for changes, holdout, words in refused:
        with pytest.raises(ConfigError, match=words):
            loop = loop_for(30, **{"schedule": "constant"} | changes)
            train_policy(data, config_for(data), loop, tmp_path / "a", holdout)


def test_cache_resumes_and_belongs_to_its_data(chunks, data, root, policy):
    folder, (actions, latents) = chunks
    assert actions.shape == (2, len(data), HORIZON, 3) and latents.shape == (2, len(data), 32)
    assert not np.array_equal(latents[0], latents[1])
    block = folder / "view1_0000000.npz"
    block.unlink()
    with pytest.raises(ConfigError, match="view1"):
        load_chunks(folder, data)
    cache_chunks(data, load_network(policy), root, views=2)
    assert np.array_equal(load_chunks(folder, data)[0], actions)
    with pytest.raises(ConfigError, match="of data"):
        load_chunks(folder, dataclasses.replace(data, data_hash="0" * 64))
    with pytest.raises(ConfigError, match="remove the folder"):
        cache_chunks(data, load_network(policy), root, views=3)


def test_head_corrects_a_base_that_is_wrong(chunks, data, policy, tmp_path):
    """Every base action is off by 0.5."""
    _, (actions, latents) = chunks
    head = CompactHead.for_policy(load_network(policy), data.data_hash)
    wrong = BaseChunks.of_cache(actions + 0.5, latents)
    trained = train_head(data, wrong, head, loop_for(120, validate_every=40), tmp_path, 0.3)
    record = json.loads((tmp_path / "training.json").read_text())
    last = record["history"][-1]
    assert last["base_error"] > 0.4 and last["error"] < 0.3 * last["base_error"]
    assert trained.config.policy_id == load_network(policy).config.policy_id
    with pytest.raises(ConfigError, match="mismatch"):
        train_head(data, wrong, head, loop_for(1), tmp_path / "x", 0.3, HeadRecipe(mismatch=1.5))


def test_budget_must_be_one():
    with pytest.raises(ConfigError, match="minutes"):
        loop_for(10, minutes=1.0)
    with pytest.raises(ConfigError, match="workers"):
        loop_for(10, workers=3)
    with pytest.raises(ConfigError, match="schedule"):
        loop_for(10, schedule="linear")


@pytest.mark.parametrize("module", [train_policy_module, train_head_module])
def test_command_line_has_help(module, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["program", "--help"])
    with pytest.raises(SystemExit) as exit_info:
        module.main()
    assert exit_info.value.code == 0 and "--minutes" in capsys.readouterr().out


def test_folder_without_data_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="info.json"):
        load_demonstrations(tmp_path)
