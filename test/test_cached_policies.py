"""Base chunks of any policy in the cache, and heads that are trained from a cache alone."""

import dataclasses
import json
import re

import numpy as np
import pytest

pytest.importorskip("lerobot")
torch = pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from safetensors import safe_open
from safetensors.torch import load_file, save_file

from a2c2_ros.core.errors import ConfigError, ObservationError
from a2c2_ros.core.features import time_feature
from a2c2_ros.core.head import HeadInput
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.heads.base import load_head, make_random_head, save_head
from a2c2_ros.heads.export import export, torch_residual
from a2c2_ros.heads.onnx_head import OnnxHead
from a2c2_ros.heads.samples import dataset_samples, random_samples
from a2c2_ros.paths import model_path
from a2c2_ros.policies.base import PolicyOptions
from a2c2_ros.policies.flow import FlowConfig, FlowNetwork, FlowPolicy, load_network, save_network
from a2c2_ros.policies.language import InstructionEncoder
from a2c2_ros.policies.registry import load_policy
from a2c2_ros.training import cache_chunks as cache_chunks_module
from a2c2_ros.training import train_head as train_head_module
from a2c2_ros.training.cache_chunks import PolicyFacts, cache_chunks, load_chunks, load_facts, load_language
from a2c2_ros.training.dataset import load_demonstrations
from a2c2_ros.training.joining import load_base
from a2c2_ros.training.train_head import find_policy
from a2c2_ros.training.train_policy import language_table, normalise

torch.set_num_threads(1)

HORIZON, LENGTH, EPISODES = 8, 6, 4
INSTRUCTIONS = ("pick up the black bowl", "move the plate")
PROFILE = load_profile("libero")
ROBOT = PROFILE.robot
OPTIONS = PolicyOptions(threads=1, robot=ROBOT, camera_shapes=PROFILE.camera_shapes())
FAMILIES = ("act", "diffusion", "smolvla")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two episodes of two tasks with the names and sizes of the robot."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = tmp_path_factory.mktemp("data") / "tiny"
    image = {"dtype": "video", "shape": (128, 128, 3), "names": ["height", "width", "channels"]}
    features = {f"observation.images.{camera}": image for camera in ROBOT.cameras} | {
        "observation.state": {"dtype": "float32", "shape": (8,), "names": list(ROBOT.state_names)},
        "action": {"dtype": "float32", "shape": (7,), "names": list(ROBOT.action_names)},
    }
    dataset = LeRobotDataset.create("local/tiny", fps=20, features=features, root=root)
    rng = np.random.default_rng(0)
    for episode in range(EPISODES):
        for step in range(LENGTH):
            frame = np.full((128, 128, 3), 40 * episode, dtype=np.uint8)
            frame[:, : 16 * step + 8, episode % 2] = 200
            dataset.add_frame(
                {f"observation.images.{camera}": frame for camera in ROBOT.cameras}
                | {
                    "observation.state": rng.standard_normal(8).astype(np.float32),
                    "action": rng.uniform(-1, 1, 7).astype(np.float32),
                    "task": INSTRUCTIONS[episode % 2],
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.fixture(scope="module")
def data(root):
    return load_demonstrations(root, ROBOT.cameras)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint per family, with random weights."""
    import lerobot_checkpoints

    root, short = tmp_path_factory.mktemp("lerobot"), {"n_action_steps": HORIZON}
    return {
        "act": lerobot_checkpoints.save_act(root / "act", chunk_size=HORIZON, **short),
        "diffusion": lerobot_checkpoints.save_diffusion(root / "diffusion", horizon=12, **short),
        "smolvla": lerobot_checkpoints.save_smolvla(root / "smolvla", chunk_size=HORIZON, **short),
    }


@pytest.fixture(scope="module")
def policies(folders):
    return {family: load_policy("lerobot", folder, OPTIONS) for family, folder in folders.items()}


@pytest.fixture(scope="module")
def cached(root, folders):
    """Caches of ACT and SmolVLA, made by the command."""
    for family in ("act", "smolvla"):
        options = ["--kind", "lerobot", "--policy", str(folders[family]), "--views", "2", "--batch", "5"]
        cache_chunks_module.main(["--data", str(root), *options])
    return {path.name.split("-")[0]: path for path in (root / "chunks").iterdir()}


@pytest.fixture
def copied_root(root, cached, tmp_path):
    """The data set with its caches, which a test may damage."""
    import shutil

    return shutil.copytree(root, tmp_path / "tiny")


def facts_of(policy, kind="lerobot"):
    return PolicyFacts.of(policy, kind=kind, action_space=ROBOT.action_space)


def observation(data, frame):
    images = {camera: data.frames[camera][frame] for camera in data.frames}
    return images | {"state": data.state[frame]}, data.instructions[data.task[frame]]


def batch(data, frames):
    images = {camera: data.frames[camera][frames] for camera in data.frames}
    return images, data.state[frames], [data.instructions[task] for task in data.task[frames]]


def edit(path, **changes):
    """Change entries of a JSON file; None takes one away."""
    facts = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in facts.items() if value is not None}))


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_equals_single_predictions(policies, data, family):
    """With instructions of different lengths; diffusion looks at two observations, both are the frame."""
    policy, frames = policies[family], np.array([1, LENGTH + 2, 3])
    actions, latents = policy.predict_batch(*batch(data, frames), seed=3)
    assert actions.shape == (3, HORIZON, 7) and latents.shape == (3, policy.latent_dim)
    assert actions.dtype == latents.dtype == np.float32
    for row, frame in enumerate(frames):
        single = policy.predict(*observation(data, frame), seed=3)
        np.testing.assert_allclose(latents[row], single.latent, atol=1e-4)
        if family == "act":
            np.testing.assert_allclose(actions[row], single.actions, atol=1e-5)
    alone = policy.predict_batch(*batch(data, frames[:1]), seed=3)
    single = policy.predict(*observation(data, frames[0]), seed=3)
    np.testing.assert_array_equal(alone[0][0], single.actions)
    again = policy.predict_batch(*batch(data, frames), seed=3)
    np.testing.assert_array_equal(again[0], actions)
    assert not np.allclose(latents[0], latents[1], atol=1e-3), "every row has its own"


def test_a_named_latent_is_taken_one_observation_at_a_time(folders, data):
    """(B, Z, h, w) and (tokens, B, Z) cannot be told apart by themselves."""
    for name in ("model.encoder_img_feat_input_proj", "model.encoder"):
        policy = load_policy("lerobot", folders["act"], dataclasses.replace(OPTIONS, mapping={"latent": name}))
        actions, latents = policy.predict_batch(*batch(data, np.arange(3)), seed=0)
        for row in range(3):
            single = policy.predict(*observation(data, row), seed=0)
            np.testing.assert_array_equal(latents[row], single.latent)
            np.testing.assert_array_equal(actions[row], single.actions)


def test_a_batch_with_a_wrong_row_is_refused(policies, data):
    images, states, texts = batch(data, np.arange(3))
    states = np.where(np.arange(3)[:, None] == 1, np.float32(np.nan), states)
    with pytest.raises(ObservationError, match="state"):
        policies["act"].predict_batch(images, states, texts, seed=0)


# --- the cache --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["act", "smolvla"])
def test_the_cache_has_what_the_policy_says(policies, data, cached, family):
    policy, folder = policies[family], cached[family]
    assert folder.name == policy.policy_id
    actions, latents = load_chunks(folder, data)
    assert actions.shape == (2, len(data), HORIZON, 7) and latents.shape == (2, len(data), policy.latent_dim)
    for frame in (0, 7, len(data) - 1):
        output = policy.predict(*observation(data, frame), seed=0)
        np.testing.assert_allclose(latents[0, frame], output.latent, atol=1e-4)
        if family == "act":
            np.testing.assert_allclose(actions[0, frame], output.actions, atol=1e-5)
    assert not np.allclose(latents[0], latents[1], atol=1e-3), "the second view is augmented"
    known = load_language(folder)
    assert set(known) == set(INSTRUCTIONS)
    for text, embedding in known.items():
        np.testing.assert_array_equal(embedding, policy.embed(text))
    facts = load_facts(folder)
    assert facts == facts_of(policy)
    assert (facts.kind, facts.horizon, facts.image_size) == ("lerobot", HORIZON, 128)
    assert facts.action_names == data.action_names and facts.language_dim == {"act": 384, "smolvla": 32}[family]
    told = json.loads((folder / "cache.json").read_text())
    assert told["data_hash"] == data.data_hash and "torch" in told["versions"]


def test_a_killed_run_goes_on_where_it_was(policies, data, cached, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_chunks_module, "BLOCK_FRAMES", 5)
    calls, allowed, predict_batch = [], [3], policies["act"].predict_batch

    def killed(*arguments, **options):
        calls.append(arguments)
        if len(calls) > allowed[0]:
            raise KeyboardInterrupt
        return predict_batch(*arguments, **options)

    monkeypatch.setattr(policies["act"], "predict_batch", killed)
    arguments = (data, policies["act"], tmp_path, 2, 0, 1, 3, facts_of(policies["act"]))
    with pytest.raises(KeyboardInterrupt):
        cache_chunks(*arguments)
    folder = tmp_path / "chunks" / policies["act"].policy_id
    assert [path.name for path in sorted(folder.glob("view*"))] == ["view0_0000000.npz"], "half of a block is none"
    with pytest.raises(ConfigError, match="view0_0000005"):
        load_chunks(folder, data)
    before = (folder / "view0_0000000.npz").stat().st_mtime_ns
    calls.clear()
    allowed[0] = 100
    assert cache_chunks(*arguments) == folder
    assert len(calls) == 2 * 5 * 2 - 2, "two batches in each of five blocks of two views, without the first block"
    assert before == (folder / "view0_0000000.npz").stat().st_mtime_ns
    actions, latents = load_chunks(folder, data)
    monkeypatch.undo()
    whole = load_chunks(cached["act"], data)
    np.testing.assert_allclose(actions[0], whole[0][0], atol=1e-5)
    np.testing.assert_allclose(latents[0], whole[1][0], atol=1e-5)
    for name, value in (("views", 3), ("seed", 1)):
        changed = list(arguments)
        changed[{"views": 3, "seed": 4}[name]] = value
        with pytest.raises(ConfigError, match=f"{name}: there .*, here {value}.*remove the folder"):
            cache_chunks(*changed)


def test_a_policy_that_does_not_fit_the_data_is_refused(policies, data, tmp_path):
    policy = policies["act"]

    def refused(match, changed=data, workers=1, facts=None, **options):
        with pytest.raises(ConfigError, match=match):
            cache_chunks(changed, policy, tmp_path, 1, workers=workers, facts=facts or facts_of(policy), **options)
        assert not (tmp_path / "chunks").exists()

    refused("workers is 2.*lerobot", workers=2)
    refused("batch is 0", batch=0)
    refused("actions", dataclasses.replace(data, action_names=data.action_names[::-1]))
    refused("state of 8", dataclasses.replace(data, state=data.state[:, :3], state_names=data.state_names[:3]))
    refused("64x64 images of 'agentview'", facts=dataclasses.replace(facts_of(policy), image_size=64))
    refused("'wrist'.*None", dataclasses.replace(data, frames={"agentview": data.frames["agentview"]}))


# --- policies without predict_batch, and the flow policy --------------------------------------------------------------


@pytest.fixture(scope="module")
def flow_folder(data, tmp_path_factory):
    torch.manual_seed(0)
    config = FlowConfig(
        action_names=data.action_names,
        state_names=data.state_names,
        cameras=tuple(data.frames),
        image_size=128,
        step_ns=data.step_ns,
        horizon=HORIZON,
        latent_dim=16,
        width=32,
        channels=8,
        keypoints=8,
        decoder_width=32,
        decoder_blocks=1,
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_network(FlowNetwork(config), folder, "tiny")
    return folder


def test_a_policy_without_batches_goes_frame_by_frame(data, flow_folder, tmp_path):
    policy = FlowPolicy(flow_folder)
    facts = dataclasses.replace(facts_of(policy, "remote"), policy_id="elsewhere-1")
    folder = cache_chunks(data, policy, tmp_path, 1, facts=facts)
    actions, latents = load_chunks(folder, data)
    rng = np.random.default_rng((0, 0, 0))
    for frame in range(3):
        output = policy.predict(*observation(data, frame), seed=int(rng.integers(2**31)))
        np.testing.assert_array_equal(actions[0, frame], output.actions)
        np.testing.assert_array_equal(latents[0, frame], output.latent)
    assert set(load_language(folder)) == set(INSTRUCTIONS)


def train_arguments(root, policy, out, *options):
    common = ["--data", str(root), "--policy", str(policy), "--out", str(out), "--steps", "3", "--batch-size", "4"]
    return [*common, "--holdout", "0.4", "--draws", "2", "--no-bfloat16", *options]


def test_a_cache_of_an_older_version_serves_its_flow_policy(copied_root, data, flow_folder, tmp_path, capsys):
    cache_chunks_module.main(["--data", str(copied_root), "--policy", str(flow_folder), "--views", "1"])
    policy_id = load_network(flow_folder).config.policy_id
    folder = copied_root / "chunks" / policy_id
    assert sorted(path.name for path in folder.iterdir()) == ["cache.json", "view0_0000000.npz"]
    told, block = json.loads((folder / "cache.json").read_text()), (folder / "view0_0000000.npz").read_bytes()
    old = {name: told[name] for name in ("data_hash", "frames", "views", "seed")}
    (folder / "cache.json").write_text(json.dumps(old))
    assert load_chunks(folder, data)[0].shape == (1, len(data), HORIZON, 7)
    assert load_base(copied_root, data, policy_id).language == {}
    assert train_head_module.main(train_arguments(copied_root, flow_folder, tmp_path / "a")) == 0
    record = json.loads((tmp_path / "a" / "training.json").read_text())
    assert "the base policy's" in record["departures_from_the_paper"][0]
    head = load_head(tmp_path / "a" / "head.safetensors")
    assert not head.latent_mean.any() and (head.latent_std == 1.0).all(), "the flow policy normalises its latent"
    assert train_head_module.main(train_arguments(copied_root, policy_id, tmp_path / "b")) == 2
    assert re.search("older version.*'horizon'", capsys.readouterr().err)
    cache_chunks_module.main(["--data", str(copied_root), "--policy", str(flow_folder), "--views", "1"])
    assert (folder / "view0_0000000.npz").read_bytes() == block
    assert train_head_module.main(train_arguments(copied_root, policy_id, tmp_path / "b", "--architecture", "mlp")) == 0
    assert load_head(tmp_path / "b" / "head.safetensors").config.policy_id == policy_id


# --- heads ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "architecture"), [("act", "mlp"), ("smolvla", "compact")])
def test_a_head_from_a_cache_runs_with_the_policys_own_output(
    root, data, cached, policies, tmp_path, family, architecture
):
    policy, folder = policies[family], cached[family]
    assert train_head_module.main(train_arguments(root, folder.name, tmp_path, "--architecture", architecture)) == 0
    head = load_head(tmp_path / "head.safetensors")
    config = head.config
    assert (config.policy_id, config.horizon, config.step_ns) == (policy.policy_id, HORIZON, 50_000_000)
    assert (config.latent_dim, config.language_dim) == (policy.latent_dim, policy.language_dim)
    assert (config.action_names, config.state_names) == (ROBOT.action_names, ROBOT.state_names)
    assert config.action_space == ROBOT.action_space
    training, _ = data.split(0.4)
    latents = load_chunks(folder, data)[1][0, training]
    np.testing.assert_allclose(head.latent_mean, latents.mean(0), atol=1e-5)
    assert (head.latent_std > 0).all()
    varied = latents.std(0) > 0.1 * latents.std(0).mean()
    np.testing.assert_allclose(head.latent_std[varied], latents.std(0, ddof=1)[varied], rtol=1e-3)

    outputs = [policy.predict(*observation(data, frame), seed=0) for frame in (0, 7, 20)]
    samples = [
        HeadInput(
            images={camera: data.frames[camera][frame] for camera in config.cameras},
            state=data.state[frame],
            base_action=output.actions[slot],
            time_feature=time_feature(slot, HORIZON),
            latent=output.latent,
            language=output.language,
        )
        for frame, slot, output in zip((0, 7, 20), (0, 3, 7), outputs)
    ]
    manifest = export(head, samples, tmp_path / "head.onnx")
    assert manifest.parity_max_abs_error < 1e-4
    exported = OnnxHead(tmp_path / "head.onnx")
    assert exported.manifest.policy_id == policy.policy_id
    words = [policy.embed(text).tolist() for text in INSTRUCTIONS]
    assert all(sample.language.tolist() in words for sample in dataset_samples(manifest, root, 4))
    assert np.abs(exported.correct(samples[0])).max() > 0.0, "three steps changed it"
    moved = dataclasses.replace(samples[0], latent=samples[0].latent + 10 * np.asarray(head.latent_std))
    assert not np.array_equal(exported.correct(moved), exported.correct(samples[0]))


def test_statistics_are_those_of_a_flow_policy(root, data, cached, flow_folder, tmp_path):
    """One rule for both: a network normalised on the same frames."""
    assert train_head_module.main(train_arguments(root, cached["act"].name, tmp_path)) == 0
    head, network = load_head(tmp_path / "head.safetensors"), load_network(flow_folder)
    normalise(network, data, data.split(0.4)[0], language_table(data))
    for name in ("state_mean", "state_std", "language_mean", "language_std"):
        assert torch.equal(getattr(head.encoder, name), getattr(network.encoder, name)), name
    assert torch.equal(head.action_mean, network.action_mean) and torch.equal(head.action_std, network.action_std)
    record = json.loads((tmp_path / "training.json").read_text())
    assert "random weights" in record["departures_from_the_paper"][0]


def test_a_large_latent_is_brought_to_size(tmp_path):
    """A head for latents around 1000 answers as the one for the same latents around 0; the graph takes them raw."""
    sizes = {"latent_dim": 16, "language_dim": 4, "horizon": HORIZON, "step_ns": 50_000_000, "image_size": 32}
    names = {"cameras": ("a",), "state_names": ("p", "q"), "action_names": ("x", "y"), "action_space": "joint"}
    head = make_random_head("compact", **sizes, **names, seed=0, policy_id="large-1")
    export(head, random_samples(manifest(head), 4), tmp_path / "head.onnx")
    plain = OnnxHead(tmp_path / "head.onnx")
    head.set_statistics({"latent_mean": torch.full((16,), 1000.0), "latent_std": torch.full((16,), 50.0)})
    samples = random_samples(manifest(head), 4)
    large = [dataclasses.replace(s, latent=np.float32(1000.0) + np.float32(50.0) * s.latent) for s in samples]
    export(head, large, tmp_path / "head.onnx", force=True)
    for sample, raw in zip(samples, large):
        answer = OnnxHead(tmp_path / "head.onnx").correct(raw)
        np.testing.assert_allclose(answer, plain.correct(sample), atol=1e-5)
        assert np.abs(answer).max() > 1e-3


def manifest(head):
    from a2c2_ros.heads.base import manifest_of

    return manifest_of(head)


@pytest.mark.parametrize("architecture", ["compact", "mlp", "transformer"])
def test_a_head_of_an_older_version_answers_as_before(tmp_path, architecture):
    """Its file has no latent statistics; the answer is bit for bit that of the network without them."""
    sizes = {"latent_dim": 16, "language_dim": 4, "horizon": HORIZON, "step_ns": 50_000_000, "image_size": 32}
    names = {"state_names": ("p", "q"), "action_names": ("x", "y"), "action_space": "joint"}
    names["cameras"] = () if architecture == "mlp" else ("a",)
    small = {"layers": 1, "feed_forward": 32, "attention_heads": 2} if architecture == "transformer" else {}
    path = tmp_path / "head.safetensors"
    save_head(make_random_head(architecture, **sizes, **names, **small, seed=0, policy_id="old-1"), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    assert {"latent_mean", "latent_std"} <= set(tensors)
    save_file({name: value for name, value in tensors.items() if not name.startswith("latent_")}, path, metadata)
    head = load_head(path)
    sample = random_samples(manifest(head), 1)[0]
    vectors = [
        torch.tensor(getattr(sample, name)[None])
        for name in ("state", "base_action", "time_feature", "latent", "language")
    ]
    with torch.inference_mode():
        tokens = {n: head.encode_image(n, torch.tensor(i[None]), vectors[-1]) for n, i in sample.images.items()}
        before = head._fuse(tokens, *vectors)[0].numpy()
    assert np.array_equal(torch_residual(head, sample), before) and np.abs(before).max() > 1e-4


def test_the_shipped_head_loads_and_equals_its_graph():
    head = load_head(model_path("compact_libero_spatial/head.safetensors"))
    exported = OnnxHead(model_path("compact_libero_spatial/head.onnx"))
    assert not head.latent_mean.any() and (head.latent_std == 1.0).all()
    for sample in random_samples(exported.manifest, 4):
        np.testing.assert_allclose(exported.correct(sample), torch_residual(head, sample), atol=1e-4)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_unusable_caches_are_refused(copied_root, cached, tmp_path, capsys):
    name = cached["act"].name
    folder = copied_root / "chunks" / name

    def refused(match, policy=name):
        arguments = train_arguments(copied_root, policy, tmp_path / "out", "--architecture", "mlp")
        assert train_head_module.main(arguments) == 2
        assert re.search(match, capsys.readouterr().err)

    refused(f"'act-0'.*cached are .*'{name}'", "act-0")
    told = (folder / "cache.json").read_text()
    for match, change in (
        ("is of data 000", {"data_hash": "0" * 64}),
        ("has the actions", {"action_names": ["up"] * 7}),
        ("a horizon and actions of.*9, 7.*8, 7", {"horizon": 9}),
        ("a latent of", {"latent_dim": 3}),
        ("front", {"cameras": ["front"]}),
    ):
        edit(folder / "cache.json", **change)
        refused(match)
        (folder / "cache.json").write_text(told)
    block = folder / "view1_0000000.npz"
    block.rename(tmp_path / block.name)
    refused("lacks.*view1_0000000")
    (tmp_path / block.name).rename(block)
    with np.load(folder / "language.npz") as file:
        arrays = dict(file)
    np.savez(folder / "language.npz", **{name: array[:1] for name, array in arrays.items()})
    refused(f"embedding of .*{arrays['instructions'][1]}")
    (folder / "language.npz").unlink()
    refused("language.npz is missing")


def test_the_folder_of_a_checkpoint_names_its_cache(folders, root, cached, tmp_path):
    network, facts = find_policy(str(folders["act"]), [root])
    assert network is None and facts.policy_id == cached["act"].name
    with pytest.raises(ConfigError, match=f"{cached['act'].name}.*cached are"):
        find_policy(str(folders["act"]), [tmp_path])


def test_caches_of_two_data_sets_must_be_of_one_policy(copied_root, root, cached):
    name = cached["act"].name
    assert find_policy(name, [root, copied_root])[1].policy_id == name
    edit(copied_root / "chunks" / name / "cache.json", horizon=9)
    with pytest.raises(ConfigError, match="different policies"):
        find_policy(name, [root, copied_root])


def test_heads_of_policies_without_words_of_their_own_get_the_packages(cached):
    known = load_language(cached["act"])
    for text in INSTRUCTIONS:
        np.testing.assert_array_equal(known[text], InstructionEncoder().embed(text))
