"""LeRobot policies: the same as LeRobot's own pipeline, latents from the stated places, errors that name the thing."""

import dataclasses
import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
import yaml

pytest.importorskip("lerobot")

from a2c2_ros.core.errors import ConfigError, ObservationError, PolicyError
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.launching import LIBERO_SIM_ARGUMENTS, libero_sim, parse_arguments
from a2c2_ros.policies.base import Continuation, PolicyOptions
from a2c2_ros.policies.language import InstructionEncoder
from a2c2_ros.policies.lerobot_files import LeRobotMapping, checkpoint_id
from a2c2_ros.policies.registry import POLICIES, load_mapping, load_policy

FAMILIES = ("act", "diffusion", "smolvla")
INSTRUCTION = "pick up the black bowl"
PROFILE = load_profile("libero")
OPTIONS = PolicyOptions(threads=1, robot=PROFILE.robot, camera_shapes=PROFILE.camera_shapes())


def load(folder, **changes):
    return load_policy("lerobot", folder, dataclasses.replace(OPTIONS, **changes))


def observation(seed=0, side=128):
    rng = np.random.default_rng(seed)
    images = {camera: rng.integers(0, 256, (side, side, 3), np.uint8) for camera in ("agentview", "wrist")}
    return images | {"state": rng.standard_normal(8).astype(np.float32)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint per family."""
    import lerobot_checkpoints

    root = tmp_path_factory.mktemp("lerobot")
    return {family: getattr(lerobot_checkpoints, f"save_{family}")(root / family) for family in FAMILIES}


@pytest.fixture(scope="module")
def policies(folders):
    return {family: load(folder) for family, folder in folders.items()}


@pytest.fixture
def copy(tmp_path):
    """Copy of a checkpoint that a test may damage."""
    return lambda folder: shutil.copytree(folder, tmp_path / "copy")


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def direct(folder, inputs, seed, hooks=()):
    """Chunk of LeRobot's own pipeline, called as its documentation does; ``hooks``: (module, hook)."""
    import torch
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies import get_policy_class, make_pre_post_processors, prepare_observation_for_inference

    config = PreTrainedConfig.from_pretrained(folder)
    policy = get_policy_class(config.type).from_pretrained(folder)
    for name, hook in hooks:
        policy.get_submodule(name).register_forward_hook(hook)
    before, after = make_pre_post_processors(config, str(folder))
    frame = {f"observation.images.{camera}": inputs[camera].copy() for camera in ("agentview", "wrist")}
    frame["observation.state"] = inputs["state"].copy()
    batch = before(prepare_observation_for_inference(frame, torch.device("cpu"), INSTRUCTION))
    torch.manual_seed(seed)
    if config.type == "diffusion":  # its chunk method takes the history of observations from the loader
        frames = config.n_obs_steps
        batch = {name: torch.stack([value] * frames, 1) for name, value in batch.items() if name.startswith("obs")}
    chunk = policy.predict_action_chunk({name: value for name, value in batch.items() if value is not None})
    return after(chunk)[0].numpy(), batch


@pytest.mark.parametrize("family", FAMILIES)
def test_the_chunk_is_that_of_lerobots_own_pipeline(folders, policies, family):
    output = policies[family].predict(observation(), INSTRUCTION, seed=3)
    expected, _ = direct(folders[family], observation(), 3)
    assert output.actions.shape == expected.shape == (50, 7)
    assert output.actions.dtype == output.latent.dtype == output.language.dtype == np.float32
    np.testing.assert_allclose(output.actions, expected, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_and_determinism(policies, family):
    import torch

    policy = policies[family]
    assert (policy.horizon, policy.state_dim, policy.image_size) == (50, 8, 128)
    assert policy.cameras == ("agentview", "wrist") and policy.action_names == PROFILE.robot.action_names
    assert policy.policy_id.startswith(f"{family}-")
    state = torch.get_rng_state()
    first = policy.predict(observation(), INSTRUCTION, seed=1)
    policy.predict(observation(1), "move", seed=9)
    again = policy.predict(observation(), INSTRUCTION, seed=1)
    assert torch.equal(state, torch.get_rng_state()), "the process's generator is left alone"
    for name in ("actions", "latent", "language"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert len(first.latent) == policy.latent_dim and len(first.language) == policy.language_dim
    other = policy.predict(observation(), INSTRUCTION, seed=2)
    assert np.array_equal(first.actions, other.actions) == (family == "act"), "only ACT does not sample"
    assert np.array_equal(first.latent, other.latent), "the latent is of the observation"
    assert not np.allclose(first.latent, policy.predict(observation(1), INSTRUCTION, seed=1).latent)


def test_latent_of_act_is_the_mean_of_the_encoders_tokens(folders, policies):
    seen = []
    direct(folders["act"], observation(), 0, [("model.encoder", lambda *call: seen.append(call[2]))])
    assert seen[0].shape == (1 + 1 + 2 * 16, 1, 32), "latent, state, and 4 x 4 features of two cameras"
    latent = policies["act"].predict(observation(), INSTRUCTION, seed=0).latent
    np.testing.assert_allclose(latent, seen[0][:, 0].mean(0).numpy(), atol=1e-6)


def test_latent_of_diffusion_is_its_conditioning(folders, policies):
    import torch

    seen = []
    encoders = [(f"diffusion.rgb_encoder.{i}", lambda *call: seen.append(call[2])) for i in (0, 1)]
    _, batch = direct(folders["diffusion"], observation(), 0, encoders)
    expected = [torch.cat([batch["observation.state"][0, i], seen[0][i], seen[1][i]]) for i in range(2)]
    latent = policies["diffusion"].predict(observation(), INSTRUCTION, seed=0).latent
    np.testing.assert_allclose(latent, torch.cat(expected).numpy(), atol=1e-5)


def test_latent_of_smolvla_is_the_mean_over_the_valid_tokens_of_its_vlm(folders, copy):
    """With the instruction padded to 48 tokens, the padding must not count."""
    folder = copy(folders["smolvla"])
    edit(folder / "policy_preprocessor.json", lambda d: _tokenizer_config(d).update(padding="max_length"))
    seen = []
    place = "model.vlm_with_expert.vlm.model.text_model.norm"
    _, batch = direct(folder, observation(), 0, [(place, lambda *call: seen.append(call[2]))])
    words = batch["observation.language.attention_mask"][0]
    assert len(words) == 48 and words.sum() == 6, "five words and a line end"
    tokens, images = seen[0][0], seen[0].shape[1] - 48 - 1
    expected = np.concatenate([tokens[:images], tokens[images:-1][words], tokens[-1:]]).mean(0)
    latent = load(folder).predict(observation(), INSTRUCTION, seed=0).latent
    np.testing.assert_allclose(latent, expected, atol=1e-5)
    assert not np.allclose(latent, tokens.mean(0), atol=1e-3)


def _tokenizer_config(preprocessor):
    return next(s for s in preprocessor["steps"] if s.get("registry_name") == "tokenizer_processor")["config"]


def test_latent_of_a_named_module(folders):
    policy = load(folders["act"], mapping={"latent": "model.encoder_img_feat_input_proj"})
    assert policy.latent_dim == 32 and policy.policy_id != load(folders["act"]).policy_id
    for name, word in (("model.brain", "brain"), ("model.vae_encoder", "NoneType")):
        with pytest.raises((ConfigError, PolicyError), match=word):
            load(folders["act"], mapping={"latent": name})


def test_the_places_in_full_size_pi0_and_pi05():
    """Without weights: shapes run through LeRobot's code for 4 billion parameters on torch's meta device."""
    import lerobot_checkpoints
    import torch
    from lerobot.policies import get_policy_class, make_policy_config

    from a2c2_ros.policies.lerobot import LATENT_PLACES, LatentHook

    for family in ("pi0", "pi05"):
        features = lerobot_checkpoints.features()
        config = make_policy_config(family, device="cpu", push_to_hub=False, **features)
        config.device = "meta"
        with torch.device("meta"), torch.no_grad():
            policy = get_policy_class(family)(config)
            hook = LatentHook(policy, LATENT_PLACES[family])
            batch = {name: torch.zeros(1, *feature.shape) for name, feature in features["input_features"].items()}
            batch["observation.language.tokens"] = torch.zeros(1, 10, dtype=torch.long)
            batch["observation.language.attention_mask"] = torch.ones(1, 10, dtype=torch.bool)
            assert policy.predict_action_chunk(batch).shape == (1, 50, 7)
            assert hook._features.shape == (1, 2 * 256 + 10, 2048) and hook._valid.shape == (1, 2 * 256 + 10)
            assert policy.supports_rtc()
            tokens = torch.zeros(1, 5, dtype=torch.long)
            assert policy.model.paligemma_with_expert.embed_language_tokens(tokens).shape == (1, 5, 2048)


def test_language_embedding_is_the_policys_own_and_computed_once(policies):
    import torch

    policy = policies["smolvla"]
    table = policy._policy.model.vlm_with_expert.vlm.model.text_model.embed_tokens.weight
    ids = policy._tokenizer.input_tokenizer("move the plate")["input_ids"]
    np.testing.assert_allclose(policy.embed("move the plate"), table[torch.tensor(ids)].mean(0).detach(), atol=1e-6)
    calls = []
    handle = policy._tokenizer.input_tokenizer
    policy._tokenizer.input_tokenizer = lambda *args, **kwargs: calls.append(args) or handle(*args, **kwargs)
    try:
        assert policy.embed("place it") is policy.embed("place it")
    finally:
        policy._tokenizer.input_tokenizer = handle
    assert len(calls) == 1


def test_a_policy_without_language_takes_the_sentence_embedding(policies):
    np.testing.assert_array_equal(policies["act"].embed(INSTRUCTION), InstructionEncoder().embed(INSTRUCTION))
    assert policies["act"].language_dim == 384


def test_rtc_goes_on_from_the_last_chunk(policies):
    policy = policies["smolvla"]
    free = policy.predict(observation(), INSTRUCTION, seed=1)
    known = free.actions[20:] + np.float32(0.5)
    guided = policy.predict(observation(), INSTRUCTION, seed=1, continuation=Continuation(known, 5, "rtc"))
    gap = np.abs(guided.actions[:30] - known).mean(axis=1)
    apart = np.abs(free.actions[:30] - known).mean(axis=1)
    assert (gap[:5] < 0.2 * apart[:5]).all(), "what will be executed is kept"
    assert gap[:5].mean() < gap[20:].mean(), "what comes later may differ"
    nothing = Continuation(np.zeros((0, 7), np.float32), 0, "rtc")
    after = policy.predict(observation(), INSTRUCTION, seed=1, continuation=nothing)
    np.testing.assert_array_equal(after.actions, free.actions)


def test_rtc_is_lerobots_own(folders, policies):
    """The same call with LeRobot's classes, the known actions normalised by hand."""
    import lerobot_checkpoints
    import torch
    from lerobot.configs import PreTrainedConfig, RTCAttentionSchedule
    from lerobot.policies import get_policy_class, make_pre_post_processors, prepare_observation_for_inference
    from lerobot.policies.rtc import RTCConfig

    folder, inputs = folders["smolvla"], observation()
    known = np.random.default_rng(0).standard_normal((30, 7)).astype(np.float32)
    ours = policies["smolvla"].predict(inputs, INSTRUCTION, seed=4, continuation=Continuation(known, 5, "rtc"))
    config = PreTrainedConfig.from_pretrained(folder)
    config.rtc_config = RTCConfig(prefix_attention_schedule=RTCAttentionSchedule.EXP)
    policy = get_policy_class("smolvla").from_pretrained(folder, config=config)
    before, after = make_pre_post_processors(config, str(folder))
    frame = {f"observation.images.{camera}": inputs[camera] for camera in ("agentview", "wrist")}
    frame["observation.state"] = inputs["state"]
    batch = before(prepare_observation_for_inference(frame, torch.device("cpu"), INSTRUCTION))
    batch.pop("action")
    stats = lerobot_checkpoints.statistics()["action"]
    left = (torch.tensor(known)[None] - stats["mean"]) / (stats["std"] + 1e-8)
    torch.manual_seed(4)
    chunk = policy.predict_action_chunk(
        batch, inference_delay=5, prev_chunk_left_over=left, execution_horizon=len(known)
    )
    np.testing.assert_allclose(ours.actions, after(chunk)[0].numpy(), atol=1e-4)


@pytest.mark.parametrize(("family", "mode"), [("act", "rtc"), ("diffusion", "rtc"), ("smolvla", "tt_rtc")])
def test_a_family_without_this_chunking_says_so(policies, family, mode):
    with pytest.raises(PolicyError, match=f"{family}.*{mode}"):
        policies[family].predict(
            observation(), INSTRUCTION, seed=0, continuation=Continuation(np.zeros((5, 7), np.float32), 2, mode)
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_close_to_float32(folders, policies, family):
    output = load(folders[family], dtype="bfloat16").predict(observation(), INSTRUCTION, seed=0)
    exact = policies[family].predict(observation(), INSTRUCTION, seed=0)
    assert 0.0 < np.abs(output.latent - exact.latent).max() < 0.1 * np.abs(exact.latent).max()


def test_names_and_sizes_from_the_yaml_file(tmp_path):
    import lerobot_checkpoints

    cameras = ("observation.images.image", "observation.images.image2", "observation.images.empty_camera_0")
    folder = lerobot_checkpoints.save_smolvla(tmp_path / "p", cameras=cameras[:2], side=256, empty_cameras=1)
    policy = load(folder, mapping=load_mapping("lerobot_libero"))
    assert policy.image_size == 128 and len(policy.predict(observation(), INSTRUCTION, seed=0).actions) == 50
    swapped = load(folder, mapping={"cameras": {"agentview": cameras[1], "wrist": cameras[0]}})
    turned = observation() | {"agentview": observation()["wrist"], "wrist": observation()["agentview"]}
    one, other = (p.predict(o, INSTRUCTION, seed=0).actions for p, o in ((policy, observation()), (swapped, turned)))
    np.testing.assert_array_equal(one, other)
    faster = load(folder, mapping=dict(load_mapping("lerobot_libero")) | {"config": {"num_steps": 1}})
    assert faster.policy_id != policy.policy_id
    assert not np.allclose(faster.predict(observation(), INSTRUCTION, seed=0).actions, one)


def test_images_are_resized_only_when_the_yaml_file_says_so(tmp_path):
    import lerobot_checkpoints

    folder = lerobot_checkpoints.save_act(tmp_path, side=64)
    with pytest.raises(ConfigError, match="agentview.*128x128.*64.*image_size"):
        load(folder)
    policy = load(folder, mapping={"image_size": 64})
    assert policy.image_size == 128
    line = np.pad(8 * np.random.default_rng(0).integers(0, 32, 122), 3, mode="edge")
    half = np.pad(line, 1, mode="edge").reshape(-1, 2)  # pixels 2 i - 1 and 2 i
    half = (half[:-1] @ (1, 3) + half[1:] @ (3, 1)) // 8  # a triangle over four pixels, without remainder

    def striped(line):
        image = np.tile(line[:, None, None], (1, len(line), 3)).astype(np.uint8)
        return {"agentview": image, "wrist": image.swapaxes(0, 1), "state": observation()["state"]}

    actions = policy.predict(striped(line), INSTRUCTION, seed=0).actions
    np.testing.assert_allclose(actions, direct(folder, striped(half), 0)[0], atol=1e-5)
    assert not np.allclose(actions, direct(folder, striped(line[::2]), 0)[0], atol=1e-4), "every pixel counts"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mapping": {"cameras": {"front": "observation.images.wrist"}}}, ("front", "agentview", "cameras")),
        ({"mapping": {"cameras": {"wrist": "observation.images.top"}}}, ("observation.images.top", "images.agentview")),
        ({"mapping": {"cameras": {"wrist": "observation.images.wrist"}}}, ("observation.images.agentview", "empty")),
        ({"mapping": {"state": "observation.joints"}}, ("observation.joints", "observation.state")),
        ({"mapping": {"camera": {}}}, ("camera", "cameras")),
        ({"mapping": {"latent": 3}}, ("latent", "3")),
        ({"mapping": {"config": {"depth": 3}}}, ("depth", "chunk_size")),
        ({"mapping": {"action_names": ["x", "y"]}}, ("7", "'x', 'y'")),
        ({"device": "cuda:77"}, ("cuda:77",)),
        ({"device": "abacus"}, ("abacus",)),
        ({"dtype": "int8"}, ("int8", "bfloat16")),
        ({"camera_shapes": {"agentview": (128, 96, 3), "wrist": (128, 96, 3)}}, ("96", "square", "profile")),
        ({"camera_shapes": {"agentview": (64, 64, 3), "wrist": (64, 64, 3)}}, ("64x64", "(128, 128)")),
        ({"robot": load_profile("bench_arm").robot}, ("agentview", "front")),
    ],
)
def test_wrong_options_name_the_thing(folders, changes, words):
    with pytest.raises(ConfigError) as error:
        load(folders["act"], **changes)
    assert [word for word in words if word not in str(error.value)] == []


def test_damaged_checkpoints_are_refused(folders, copy):
    folder = copy(folders["act"])
    config, weights = folder / "config.json", folder / "model.safetensors"

    def refused(*words):
        with pytest.raises((PolicyError, ConfigError)) as error:
            load(folder)
        assert [word for word in words if word not in str(error.value)] == []

    text, data = config.read_text(), weights.read_bytes()
    edit(config, lambda d: d.update(type="gato"))
    refused("gato", "registered")
    config.write_text(text)
    edit(config, lambda d: d["input_features"].update({"observation.environment_state": {"type": "ENV", "shape": [7]}}))
    refused("observation.environment_state", "does not give")
    config.write_text(text)
    edit(config, lambda d: d.update(use_peft=True))
    refused("PEFT")
    config.write_text(text)
    weights.write_bytes(data[: len(data) // 2])
    refused("Safetensor")
    weights.write_bytes(data)
    edit(folder / "policy_preprocessor.json", lambda d: d["steps"].append({"class": "subprocess.Popen", "config": {}}))
    refused("subprocess.Popen", "allowed")
    (folder / "policy_preprocessor.json").unlink()
    refused("policy_preprocessor.json", "missing")
    weights.rename(folder / "pytorch_model.bin")
    refused("model.safetensors", "safetensors only")


def test_a_moved_checkpoint_brings_its_vlm_along(folders, tmp_path):
    folder = shutil.copytree(folders["smolvla"], tmp_path / "moved")
    before = load(folder).predict(observation(), INSTRUCTION, seed=0)
    edit(folder / "config.json", lambda d: d.update(vlm_model_name="nobody/nothing"))
    edit(folder / "policy_preprocessor.json", lambda d: _tokenizer_config(d).update(tokenizer_name="nobody/nothing"))
    after = load(folder).predict(observation(), INSTRUCTION, seed=0)
    np.testing.assert_array_equal(before.actions, after.actions)
    shutil.rmtree(folder / "vlm")
    with pytest.raises(PolicyError, match="moved"):
        load(folder)


def test_weights_that_lerobot_would_leave_random_are_an_error(folders, copy):
    from safetensors.torch import load_file, save_file

    folder = copy(folders["act"])
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.action_head.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(PolicyError, match="no weights for 1 of .*model.action_head.weight"):
        load(folder)


def test_a_missing_extra_and_an_unknown_hub_id(folders, monkeypatch):
    from lerobot.utils import import_utils

    monkeypatch.setitem(import_utils._require_package_cache, "transformers", False)
    with pytest.raises(PolicyError, match=r"smolvla.*transformers.*lerobot\[smolvla\]"):
        load(folders["smolvla"])
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(PolicyError, match="nobody/nothing.*hf download"):
        load("nobody/nothing")
    with pytest.raises(PolicyError, match="neither a folder nor on the hub"):
        load("no/such/folder")


def test_columns_of_the_data_set_that_the_family_does_not_read_are_no_obstacle(folders, copy):
    """``lerobot-train`` lists all of them."""
    folder = copy(folders["act"])
    more = {"observation.objects": {"type": "STATE", "shape": [6]}}
    edit(folder / "config.json", lambda d: d["input_features"].update(more))
    edit(
        folder / "config.json",
        lambda d: d["output_features"].update({"action.executed": d["output_features"]["action"]}),
    )
    one, other = (load(f).predict(observation(), INSTRUCTION, seed=0).actions for f in (folder, folders["act"]))
    np.testing.assert_array_equal(one, other)


def test_a_hub_id_is_read_from_the_cache(folders, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--someone--tiny"
    shutil.copytree(folders["act"], cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    assert load("someone/tiny").policy_id == load(folders["act"]).policy_id
    with pytest.raises(PolicyError, match="someone/tiny@v2"):
        load("someone/tiny@v2")


def test_a_policy_without_chunks(tmp_path):
    import lerobot_checkpoints

    folder = lerobot_checkpoints.save(
        tmp_path, "gaussian_actor", latent_dim=8, image_encoder_hidden_dim=8, num_discrete_actions=None
    )
    with pytest.raises(PolicyError, match="gaussian_actor.*chunk"):
        load(folder, mapping={"latent": "actor"})
    with pytest.raises(ConfigError, match="gaussian_actor.*'latent'.*actor"):
        load(folder)


def test_a_wrong_observation_is_refused(policies):
    for change, word in (({"wrist": np.zeros((64, 64, 3), np.uint8)}, "wrist"), ({"state": np.zeros(7)}, "state")):
        with pytest.raises(ObservationError, match=word):
            policies["act"].predict(observation() | change, INSTRUCTION, seed=0)


def test_a_policy_id_is_of_every_file_that_decides_what_the_policy_answers(tmp_path):
    files = {
        "config.json": json.dumps({"type": "act"}),
        "model.safetensors": "weights",
        "policy_preprocessor.json": "before",
        "policy_preprocessor_step_3_normalizer_processor.safetensors": "statistics",
        "policy_postprocessor.json": "after",
        "vlm/tokenizer.json": "words",
    }

    def id_of(name, **changes):
        folder = tmp_path / name
        (folder / "vlm").mkdir(parents=True)
        for file, text in (files | changes).items():
            (folder / file).write_text(text)
        return checkpoint_id(folder, LeRobotMapping())

    first = id_of("first")
    assert re.fullmatch("act-[0-9a-f]{8}", first)
    assert id_of("moved", **{"README.md": "words", "training.json": "{}"}) == first
    changed = {file: id_of(f"{number}", **{file: text + " "}) for number, (file, text) in enumerate(files.items())}
    assert len({first, *changed.values()}) == 1 + len(files), changed


def test_policy_config_by_name_and_path(tmp_path):
    assert load_mapping("") == {} and "cameras" in load_mapping("lerobot_libero")
    with pytest.raises(ConfigError, match="no_such.*lerobot_libero"):
        load_mapping("no_such")
    path = tmp_path / "mine.yaml"
    for text, word in (("- 1", "list"), ("a: [", "YAML")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=word):
            load_mapping(str(path))
    assert set(POLICIES) == {"flow", "lerobot", "remote"}


def test_the_launch_arguments_reach_the_planner():
    given = {"policy": "lerobot", "policy_path": "p", "policy_config": "lerobot_libero", "policy_device": "cuda"}
    run = libero_sim(parse_arguments(LIBERO_SIM_ARGUMENTS, given))
    planner = next(process for process in run.processes if process.name == "chunk_planner")
    assert planner.parameters.items() >= given.items()


@pytest.mark.timeout(200)
def test_the_planner_runs_a_lerobot_checkpoint(bench, folders, tmp_path):
    from a2c2_ros.msg import ActionChunk
    from std_msgs.msg import String

    from a2c2_ros.nodes.runtime import latched_qos

    received = []
    bench.node.create_subscription(ActionChunk, "action_chunk", received.append, latched_qos(2))
    mapping = {"cameras": {"agentview": "observation.images.wrist", "wrist": "observation.images.agentview"}}
    file = tmp_path / "swapped.yaml"
    file.write_text(yaml.safe_dump(mapping))
    bench.system.start("chunk_planner", policy="lerobot", policy_path=folders["act"], policy_config=file)
    bench.wait_for_log("chunk_planner", "configured: policy act-")
    bench.instruction.publish(String(data=INSTRUCTION))
    bench.spin_until(lambda: received, "a chunk")
    chunk = received[0]
    assert (chunk.horizon, len(chunk.actions), len(chunk.latent), len(chunk.language)) == (50, 350, 32, 384)
    assert chunk.policy_id == load(folders["act"], mapping=mapping).policy_id != load(folders["act"]).policy_id
    accepted, reason = bench.set_parameter("chunk_planner", "policy_device", "cuda")
    assert not accepted and "cannot change while the node runs" in reason
    assert bench.system.stop("chunk_planner", signal.SIGINT) == 0
