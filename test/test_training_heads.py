"""Head trainings: ablations and controls in the exported graph, how samples are drawn, joined data sets, DAgger."""

import argparse
import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from a2c2_ros.core.errors import ConfigError
from a2c2_ros.core.features import time_feature
from a2c2_ros.core.head import HeadInput
from a2c2_ros.heads.base import load_head
from a2c2_ros.heads.export import export, torch_residual
from a2c2_ros.heads.onnx_head import OnnxHead
from a2c2_ros.policies.flow import FlowConfig, FlowNetwork, load_network, save_network
from a2c2_ros.training import train_head as train_head_module
from a2c2_ros.training.dataset import Augmentation, Demonstrations, observations
from a2c2_ros.training.joining import (
    BaseChunks,
    JoinedFrames,
    concatenate,
    concatenate_chunks,
    load_base,
)
from a2c2_ros.training.loop import LoopConfig, Trained
from a2c2_ros.training.train_head import RECIPES, HeadRecipe, draw_bases, make_head, train_head
from a2c2_ros.training.train_policy import train_policy

torch.set_num_threads(1)

SIZE, HORIZON, LATENT, LANGUAGE = 32, 8, 16, 12
CAMERAS, ACTIONS = ("agentview", "wrist"), ("x", "y", "gripper")
POLICY_ID = "tiny-1"
LOOP = LoopConfig(
    learning_rate=1e-3,
    schedule="constant",
    weight_decay=0.0,
    batch_size=8,
    warmup_steps=1,
    average_decay=0.5,
    steps=3,
    bfloat16=False,
)


@pytest.fixture(autouse=True, scope="module")
def embedding():
    """A stand-in for the sentence encoder: rows by text, so that joined data sets get the same."""

    def table(data):
        generators = [torch.Generator().manual_seed(sum(map(ord, text))) for text in data.instructions]
        return torch.stack([torch.randn(LANGUAGE, generator=generator) for generator in generators])

    with pytest.MonkeyPatch.context() as patch:
        for module in ("train_policy", "cache_chunks"):
            patch.setattr(f"a2c2_ros.training.{module}.language_table", table)
        yield


def demonstrations(seed=0, lengths=(12, 10, 12, 9), instructions=("red", "blue"), **changes):
    rng = np.random.default_rng(seed)
    frames, ends = sum(lengths), np.cumsum(lengths)
    values = {
        "frames": {name: rng.integers(0, 256, (frames, SIZE, SIZE, 3), dtype=np.uint8) for name in CAMERAS},
        "state": rng.standard_normal((frames, 2)).astype(np.float32),
        "action": rng.uniform(-1, 1, (frames, 3)).astype(np.float32),
        "disturbed": rng.random(frames) < 0.2,
        "objects": rng.standard_normal((frames, 3)).astype(np.float32),
        "episode": np.repeat(np.arange(len(lengths)), lengths),
        "start": np.repeat(ends - lengths, lengths),
        "end": np.repeat(ends, lengths),
        "group": np.repeat(np.arange(len(lengths)), lengths),
        "task": np.repeat(np.arange(len(lengths)) % len(instructions), lengths),
        "instructions": instructions,
        "action_names": ACTIONS,
        "state_names": ("p", "q"),
        "step_ns": 50_000_000,
        "data_hash": f"{seed:064d}",
    }
    return Demonstrations(**(values | changes))


def base_chunks(data, seed=0, views=2):
    rng = np.random.default_rng(seed)
    return BaseChunks.of_cache(
        rng.uniform(-1, 1, (views, len(data), HORIZON, 3)).astype(np.float32),
        rng.standard_normal((views, len(data), LATENT)).astype(np.float32),
    )


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    config = FlowConfig(
        action_names=ACTIONS,
        state_names=("p", "q"),
        cameras=CAMERAS,
        image_size=SIZE,
        step_ns=50_000_000,
        horizon=HORIZON,
        language_dim=LANGUAGE,
        latent_dim=LATENT,
        width=32,
        channels=8,
        keypoints=8,
        decoder_width=32,
        decoder_blocks=1,
        policy_id=POLICY_ID,
    )
    network = FlowNetwork(config)
    network.action_mean.copy_(torch.tensor([0.1, -0.2, 0.5]))
    network.action_std.copy_(torch.tensor([0.5, 0.25, 1.0]))
    network.encoder.state_mean.fill_(0.3)
    return network


def awake(head):
    """With weights as after a training: nothing is zero or the identity any more."""
    torch.manual_seed(1)
    with torch.no_grad():
        torch.nn.init.normal_(head.output[-1].weight)
        for module in head.modules():
            if hasattr(module, "project") and isinstance(module.project, torch.nn.Linear):
                torch.nn.init.normal_(module.project.weight, std=0.1)
    return head.eval()


def head_for(policy, architecture, **options):
    small = {"layers": 1, "feed_forward": 32, "attention_heads": 2} if architecture == "transformer" else {}
    return make_head(architecture, policy, "hash", **small, **options)


def samples(count=4):
    rng = np.random.default_rng(0)
    return [
        HeadInput(
            images={name: rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for name in CAMERAS},
            time_feature=time_feature(i, HORIZON),
            **{
                name: rng.standard_normal(size).astype(np.float32)
                for name, size in (("state", 2), ("base_action", 3), ("latent", LATENT), ("language", LANGUAGE))
            },
        )
        for i in range(count)
    ]


def changed(sample, name):
    """The sample with another value of one input."""
    if name == "images":
        return dataclasses.replace(sample, images={camera: 255 - image for camera, image in sample.images.items()})
    return dataclasses.replace(sample, **{name: getattr(sample, name) + np.float32(0.5)})


INPUTS = {
    "tau": "time_feature",
    "latent": "latent",
    "language": "language",
    "images": "images",
    "base_action": "base_action",
}


@pytest.mark.parametrize("architecture", ["compact", "transformer"])
@pytest.mark.parametrize("without", [*((name,) for name in INPUTS), tuple(INPUTS)])
def test_exported_ablation_ignores_its_inputs_and_no_others(policy, tmp_path, architecture, without):
    head = awake(head_for(policy, architecture, without=without))
    manifest = export(head, samples(), tmp_path / "head.onnx")
    assert manifest.architecture == f"{architecture} without {', '.join(without)}"
    for split in (True, False):
        exported = OnnxHead(tmp_path / "head.onnx", split=split)
        exported.warm_up(1)
        before = exported.correct(samples()[0])
        assert np.abs(before).max() > 1e-3
        for name, field in INPUTS.items():
            after = exported.correct(changed(samples()[0], field))
            assert np.array_equal(after, before) == (name in without), name
        assert not np.array_equal(exported.correct(changed(samples()[0], "state")), before)


def test_zeros_are_what_an_ablation_sees_in_training(policy):
    sample = samples()[0]
    whole, without = awake(head_for(policy, "compact")), awake(head_for(policy, "compact", without=("tau", "latent")))
    without.load_state_dict(whole.state_dict())
    zeros = {name: np.zeros_like(getattr(sample, name)) for name in ("time_feature", "latent")}
    expected = torch_residual(whole, dataclasses.replace(sample, **zeros))
    assert np.array_equal(torch_residual(without, sample), expected)


@pytest.mark.parametrize("architecture", ["compact", "transformer", "mlp"])
def test_reactive_action_does_not_depend_on_the_chunk(policy, tmp_path, architecture):
    head = head_for(policy, architecture, reactive=True)
    untrained = torch_residual(head.eval(), samples()[0]) + samples()[0].base_action
    assert np.allclose(untrained, policy.action_mean, atol=1e-6)
    export(awake(head), samples(), tmp_path / "head.onnx")
    exported, sample = OnnxHead(tmp_path / "head.onnx"), samples()[0]
    assert exported.manifest.architecture == f"{architecture} reactive"
    action = exported.correct(sample) + sample.base_action
    for name in ("base_action", "time_feature", "latent"):
        other = changed(sample, name)
        assert np.allclose(exported.correct(other) + other.base_action, action, atol=1e-5), name
    seen = ("state", "language") if architecture == "mlp" else ("state", "language", "images")
    for name in seen:
        other = changed(sample, name)
        assert not np.allclose(exported.correct(other) + other.base_action, action, atol=1e-4), name


def test_a_reactive_head_with_a_clock_sees_all_of_the_chunk_but_its_action(policy, tmp_path):
    head = awake(head_for(policy, "compact", reactive=True, clock=True))
    export(head, samples(), tmp_path / "head.onnx")
    exported, sample = OnnxHead(tmp_path / "head.onnx"), samples()[0]
    assert exported.manifest.architecture == "compact reactive with clock"
    action = exported.correct(sample) + sample.base_action
    other = changed(sample, "base_action")
    assert np.allclose(exported.correct(other) + other.base_action, action, atol=1e-5)
    for name in ("time_feature", "latent", "state", "images"):
        assert not np.allclose(exported.correct(changed(sample, name)) + sample.base_action, action, atol=1e-4), name
    with pytest.raises(ConfigError, match="clock is True, only a reactive head"):
        head_for(policy, "compact", clock=True)


def test_limited_residual_keeps_its_limit(policy, tmp_path):
    free, limited = (awake(head_for(policy, "compact", residual_limit=limit)) for limit in (0.0, 0.2))
    with torch.no_grad():
        free.output[-1].weight.mul_(0.3)
    limited.load_state_dict(free.state_dict())
    export(limited, samples(), tmp_path / "head.onnx")
    exported = OnnxHead(tmp_path / "head.onnx")
    for sample in samples():
        residual = torch_residual(free, sample)
        assert 0.2 < np.abs(residual).max() < 10.0
        assert np.allclose(exported.correct(sample), 0.2 * np.tanh(residual / 0.2), atol=1e-4)
        assert np.abs(exported.correct(sample)).max() <= 0.2 + 1e-6
    with pytest.raises(ConfigError, match="reactive"):
        head_for(policy, "compact", residual_limit=0.2, reactive=True)
    with pytest.raises(ConfigError, match="'depth'"):
        head_for(policy, "compact", without=("depth",))
    with pytest.raises(ConfigError, match="image size"):
        head_for(policy, "compact", image_size=64)


def test_heads_start_from_the_policy(policy):
    for without in ((), ("images",)):
        head = head_for(policy, "compact", without=without)
        assert np.array_equal(head.encoder.state[0].weight.detach(), policy.encoder.state[0].weight.detach())
        columns = head.encoder.trunk_input.weight.shape[1]
        assert torch.equal(head.encoder.trunk_input.weight, policy.encoder.trunk_input.weight[:, -columns:])
    for architecture in ("mlp", "transformer"):
        head = head_for(policy, architecture)
        for name in ("state_mean", "state_std", "language_mean"):
            assert torch.equal(getattr(head, name), getattr(policy.encoder, name)), name
        assert torch.equal(head.action_std, policy.action_std)


def slots_of(recipe, data, chunks, frames, seed=0):
    of_task = [np.flatnonzero(data.task == task) for task in range(len(data.instructions))]
    return draw_bases(data, chunks, recipe, frames, np.random.default_rng(seed), of_task)


def test_slots_are_drawn_in_their_range():
    data = demonstrations()
    chunks, frames = base_chunks(data), np.tile(np.arange(len(data)), 50)
    into = frames - data.start[frames]
    for slots, low, high in ((None, 0, HORIZON), ((2, 5), 2, 5), ((0, 1), 0, 1)):
        _, k, _ = slots_of(HeadRecipe(slots=slots), data, chunks, frames)
        late = into >= low
        assert set(k[into >= high]) == set(range(low, high)) and k[late].min() == low
        assert (k <= into).all() and (k < high).all()
        assert np.array_equal(k[~late], into[~late])  # the episode's first chunk, as at a cold start
    _, k, _ = slots_of(HeadRecipe(slots=(2, 5), mismatch=1.0), data, chunks, frames)
    assert set(k) == {2, 3, 4}
    for slots in ((3, 3), (-1, 4), (0, HORIZON + 1)):
        with pytest.raises(ConfigError, match="slots are"):
            HeadRecipe(slots=slots).slot_range(HORIZON)


def test_drawn_base_action_is_the_slot_of_the_chunk_before():
    data = demonstrations()
    chunks, frames = base_chunks(data, views=1), np.arange(len(data))
    action, k, latent = slots_of(HeadRecipe(), data, chunks, frames)
    assert np.array_equal(action, chunks.actions[0, frames - k, k])
    assert np.array_equal(latent, chunks.latents[0, frames - k])
    assert (frames - k >= data.start).all()
    action, k, latent = slots_of(HeadRecipe(mismatch=1.0), data, chunks, frames)
    flat = {tuple(row): index for index, row in enumerate(chunks.latents[0])}
    base = np.array([flat[tuple(row)] for row in latent])
    assert np.array_equal(data.task[base], data.task[frames]) and not np.array_equal(base, frames - k)
    assert np.array_equal(action, chunks.actions[0, base, k])


@pytest.mark.parametrize("mismatch", [0.0, 0.5, 1.0])
def test_action_and_latent_are_of_one_chunk_and_all_views_are_drawn(mismatch):
    data = demonstrations()
    chunks, frames = base_chunks(data, views=3), np.tile(np.arange(len(data)), 20)
    action, k, latent = slots_of(HeadRecipe(mismatch=mismatch), data, chunks, frames)
    view, base = chunk_of(chunks, latent)
    assert np.array_equal(action, chunks.actions[view, base, k])
    assert set(view) == {0, 1, 2}
    assert abs((base != frames - k).mean() - mismatch) < 0.1  # now and then another frame is the right one


def chunk_of(chunks, latents):
    """View and frame of the cached chunks with these latents."""
    places = {row.tobytes(): place for place, row in zip(np.ndindex(chunks.latents.shape[:2]), rows(chunks.latents))}
    return np.array([places[row.tobytes()] for row in latents]).T


def rows(array):
    return array.reshape(-1, array.shape[-1])


def with_executed(data, chunks, cached=True):
    rng = np.random.default_rng(9)
    return dataclasses.replace(
        chunks,
        cached=np.full(len(data), cached),
        slot=np.minimum(np.arange(len(data)) - data.start, HORIZON - 1),
        action=rng.uniform(-1, 1, (len(data), 3)).astype(np.float32),
        latent=rng.standard_normal((len(data), LATENT)).astype(np.float32),
    )


@pytest.mark.parametrize(("share", "cached"), [(1.0, True), (0.0, True), (0.5, True), (0.0, False)])
def test_executed_base_actions_take_the_place_of_cached_ones(share, cached):
    data = demonstrations()
    chunks = with_executed(data, base_chunks(data), cached)
    frames = np.tile(np.arange(len(data)), 20)
    action, k, latent = slots_of(HeadRecipe(executed=share), data, chunks, frames)
    executed = (action == chunks.action[frames]).all(axis=1)
    assert np.array_equal(executed, (latent == chunks.latent[frames]).all(axis=1))
    assert (k[executed] == chunks.slot[frames[executed]]).all()
    expected = share if cached else 1.0
    assert abs(executed.mean() - expected) < 0.1 and (expected not in (0.0, 1.0) or executed.mean() == expected)


def test_a_chunk_of_another_frame_was_not_executed():
    data = demonstrations()
    chunks, frames = with_executed(data, base_chunks(data)), np.tile(np.arange(len(data)), 20)
    action, k, latent = slots_of(HeadRecipe(mismatch=1.0), data, chunks, frames)
    assert not (action == chunks.action[frames]).all(axis=1).any()
    view, base = chunk_of(chunks, latent)
    assert np.array_equal(action, chunks.actions[view, base, k])


def save_executed_file(root, data, horizon=HORIZON):
    """Two frames per chunk, the second one of frame 4 on unknown."""
    chunk = np.arange(len(data)) // 2
    slot = np.where(np.arange(len(data)) == 5, -1, np.arange(len(data)) % 2)
    rng = np.random.default_rng(2)
    actions = rng.uniform(-1, 1, (chunk.max() + 1, horizon, 3)).astype(np.float32)
    latents = rng.standard_normal((chunk.max() + 1, LATENT)).astype(np.float32)
    (root / "executed").mkdir(parents=True)
    values = {"chunk": np.where(slot < 0, -1, chunk), "slot": slot, "actions": actions, "latents": latents}
    np.savez(root / "executed" / f"{POLICY_ID}.npz", **values)
    return actions, latents


def test_executed_chunks_are_read(tmp_path):
    data = demonstrations()
    actions, latents = save_executed_file(tmp_path, data)
    base = load_base(tmp_path, data, POLICY_ID)
    assert not base.cached.any() and base.actions.shape == (1, len(data), HORIZON, 3)
    assert base.slot[5] == -1 and not base.action[5].any()
    assert np.array_equal(base.action[7], actions[3, 1]) and np.array_equal(base.latent[6], latents[3])
    with pytest.raises(ConfigError, match="no cached chunks"):
        load_base(tmp_path, data, POLICY_ID, cache=True)
    with pytest.raises(ConfigError, match="no cached chunks"):
        load_base(tmp_path, data, "other-1")
    with pytest.raises(ConfigError, match="frames"):
        load_base(tmp_path, demonstrations(lengths=(5, 5)), POLICY_ID)


def two():
    first = demonstrations(0)
    second = demonstrations(1, lengths=(9, 11, 10), instructions=("blue", "green"))
    return first, second, concatenate([first, second])


def test_joined_data_sets_equal_the_separate_ones():
    first, second, joined = two()
    count = len(first)
    assert len(joined) == count + len(second) and joined.instructions == ("red", "blue", "green")
    texts = [first.instructions[t] for t in first.task] + [second.instructions[t] for t in second.task]
    assert [joined.instructions[t] for t in joined.task] == texts
    for offset, part in ((0, first), (count, second)):
        frames = np.arange(len(part))
        for name in ("state", "action", "disturbed", "objects"):
            assert np.array_equal(getattr(joined, name)[frames + offset], getattr(part, name)), name
        for a, b in zip(joined.chunks(frames + offset, HORIZON), part.chunks(frames, HORIZON)):
            assert np.array_equal(a, b)
        assert np.array_equal(joined.undisturbed(frames + offset, HORIZON), part.undisturbed(frames, HORIZON))
        for augmentation in (None, Augmentation(shift=2, state_noise=0.0)):
            mine, _ = observations(joined, frames[::3] + offset, augmentation, np.random.default_rng(0))
            theirs, _ = observations(part, frames[::3], augmentation, np.random.default_rng(0))
            for camera in CAMERAS:
                assert np.array_equal(mine[camera], theirs[camera])
    assert len(np.unique(joined.episode)) == 7 and concatenate([first]) is first
    assert joined.data_hash != concatenate([second, first]).data_hash
    # What is held out of the first stays so; "green" has one episode, which is trained on.
    training, validation = joined.split(0.3)
    assert np.array_equal(validation[validation < count], first.split(0.3)[1])
    assert len(training) + len(validation) == len(joined)
    assert set(joined.task[validation[validation >= count]]) == {1}


def test_frames_of_memory_maps_are_indexed_like_one_array(tmp_path):
    arrays = [np.random.default_rng(n).integers(0, 256, (5 + n, 4, 4, 3), dtype=np.uint8) for n in range(3)]
    maps = []
    for number, array in enumerate(arrays):
        np.save(tmp_path / f"{number}.npy", array)
        maps.append(np.load(tmp_path / f"{number}.npy", mmap_mode="r"))
    frames, whole = JoinedFrames(maps), np.concatenate(arrays)
    assert frames.shape == whole.shape and len(frames) == len(whole) and frames.dtype == whole.dtype
    for index in (0, 4, 5, 17, -1, np.int64(11)):
        assert np.array_equal(frames[index], whole[index])
    for indices in (np.array([17, 0, 5, 5, -2]), np.array([[1, 6], [12, 3]]), np.array([], dtype=int)):
        assert np.array_equal(frames[indices], whole[indices])
    for wrong in (18, -19, np.array([0, 18]), 0.5):
        with pytest.raises(IndexError):
            frames[wrong]


def test_data_sets_that_do_not_fit_are_refused():
    first = demonstrations()
    for name, value in (("action_names", ("x", "y", "z")), ("step_ns", 1), ("state_names", ("a", "b"))):
        with pytest.raises(ConfigError, match=name):
            concatenate([first, demonstrations(1, **{name: value})])
    one_camera = demonstrations(1)
    with pytest.raises(ConfigError, match="cameras"):
        concatenate([first, dataclasses.replace(one_camera, frames={"wrist": one_camera.frames["wrist"]})])
    with pytest.raises(ConfigError, match="0 data sets"):
        concatenate([])
    without = demonstrations(1, objects=np.zeros((43, 0), dtype=np.float32))
    assert concatenate([first, without]).objects.shape == (86, 0)


def test_joined_chunks_keep_their_frames():
    first, second, _ = two()
    a, b = base_chunks(first, 0, views=3), with_executed(second, base_chunks(second, 1, views=2))
    joined = concatenate_chunks([a, b])
    assert joined.actions.shape[:2] == (3, len(first) + len(second))
    for view in range(3):
        assert np.array_equal(joined.actions[view, : len(first)], a.actions[view])
        assert np.array_equal(joined.latents[view, len(first) :], b.latents[view % 2])
    assert (joined.slot[: len(first)] == -1).all() and np.array_equal(joined.slot[len(first) :], b.slot)
    with pytest.raises(ConfigError, match="one shape"):
        concatenate_chunks([a, dataclasses.replace(b, actions=b.actions[:, :, :5])])


def run(data, chunks, head, out, recipe=None, loop=LOOP):
    trained = train_head(data, chunks, head, loop, out, 0.3, recipe or HeadRecipe(draws=2))
    return trained, json.loads((out / "training.json").read_text())


def test_transformer_trains_and_exports(policy, tmp_path):
    data = demonstrations()
    head = head_for(policy, "transformer", image_size=48)
    recipe = HeadRecipe(draws=2, loss_unit="action")
    trained, record = run(data, base_chunks(data), head, tmp_path, recipe)
    assert record["architecture"] == "transformer" and record["head"]["encoded_size"] == 48
    assert record["recipe"]["loss_unit"] == "action" and record["steps"] == 3
    # The statistics of the batches are kept with the averaged weights.
    assert not torch.equal(trained.backbone.bn1.running_mean, torch.zeros(64))
    assert torch.equal(trained.backbone.bn1.running_mean, head.backbone.bn1.running_mean)
    manifest = export(trained, samples(), tmp_path / "head.onnx")
    exported = OnnxHead(tmp_path / "head.onnx")
    assert manifest.parity_max_abs_error < 1e-4 and manifest.cameras["wrist"] == (SIZE, SIZE, 3)
    for sample in samples():
        residual = exported.correct(sample)
        assert residual.any() and np.allclose(residual, torch_residual(trained, sample), atol=1e-4)
    with pytest.raises(ConfigError, match="workers is 2"):
        run(data, base_chunks(data), head, tmp_path / "x", loop=dataclasses.replace(LOOP, workers=2))


def test_transformer_continues_where_it_was(policy, tmp_path):
    data = demonstrations()

    def weights(out, *steps):
        for count in steps:
            (out / "training.json").unlink(missing_ok=True)  # as if it was killed before its end
            torch.manual_seed(0)
            head = head_for(policy, "transformer")
            loop = dataclasses.replace(LOOP, steps=count, validate_every=2)
            run(data, base_chunks(data), head, out, loop=loop)
        return load_head(out / "head.safetensors").state_dict()

    once, twice = weights(tmp_path / "a", 4), weights(tmp_path / "b", 2, 4)
    for name, value in once.items():
        assert torch.equal(value, twice[name]), name


def watched_training(monkeypatch, data, chunks, head, out, recipe, size):
    """The rows that a head gets in one step and in a validation, with the loss of each.

    A row has the network's inputs, the pixels of each camera that its tokens are of, and the residual.
    """
    tokens, calls, losses = {}, [], []
    encode_image, fuse = head.encode_image, head.fuse

    def watched_encode(camera, images, language):
        result = encode_image(camera, images, language)
        for token, image, words in zip(result, images, language, strict=True):
            tokens[camera, token.numpy().tobytes()] = image.numpy(), words.numpy()
        return result

    def watched_fuse(given, *vectors):
        residual = fuse(given, *vectors)
        seen = [
            {camera: tokens[camera, row.numpy().tobytes()] for camera, row in zip(given, of, strict=True)}
            for of in zip(*given.values(), strict=True)
        ]
        calls.append((seen, *(vector.numpy() for vector in vectors), residual.numpy()))
        return residual

    def train(model, loss, validate, *_):
        with torch.inference_mode():
            losses.append(loss(model, np.random.default_rng(3), size).item())
            metrics = {"train_loss": losses[0], **validate(model)}
        losses.append(metrics["loss"])
        return Trained(model, [{"step": 1, **metrics}], 1, 0.0)

    monkeypatch.setattr(head, "encode_image", watched_encode)
    monkeypatch.setattr(head, "fuse", watched_fuse)
    monkeypatch.setattr(train_head_module, "train", train)
    still = Augmentation(shift=0, brightness=0.0, state_noise=0.0)
    train_head(data, chunks, head, LOOP, out, 0.3, recipe, still)
    return list(zip(calls, losses, strict=True))


def frames_of(data, states):
    """Frames with these states."""
    places = {row.tobytes(): frame for frame, row in enumerate(data.state)}
    return np.array([places[row.tobytes()] for row in states])


@pytest.mark.parametrize("unit", ["action", "deviation"])
def test_all_that_a_row_has_belongs_to_its_frame(policy, tmp_path, monkeypatch, unit):
    data = demonstrations()
    chunks, head = base_chunks(data, views=3), awake(head_for(policy, "compact"))
    recipe = HeadRecipe(draws=3, loss_unit=unit)
    training, validation = data.split(0.3)
    language = train_head_module.language_rows(chunks.language, data).numpy()
    scale = head.action_std.numpy() if unit == "deviation" else 1.0
    watched = watched_training(monkeypatch, data, chunks, head, tmp_path, recipe, size=16)
    for ((images, state, action, tau, latent, words, residual), loss), views in zip(watched, ({0, 1, 2}, {0})):
        frames = frames_of(data, state)
        view, base = chunk_of(chunks, latent)
        k = frames - base
        assert set(view) == views and set(k) <= set(range(HORIZON))
        assert np.array_equal(action, chunks.actions[view, base, k])
        assert np.array_equal(tau, [time_feature(slot, HORIZON) for slot in k]) and len(set(k)) > 4
        assert np.array_equal(words, language[data.task[frames]])
        for row, frame in zip(images, frames, strict=True):
            for camera, (pixels, seen) in row.items():
                assert np.array_equal(pixels, data.frames[camera][frame])
                assert np.array_equal(seen, language[data.task[frame]])
        assert loss == pytest.approx(np.square((data.action[frames] - action - residual) / scale).mean(), rel=1e-4)
    assert len(watched[0][0][1]) == 3 * 16 and set(frames_of(data, watched[0][0][1])) <= set(training)
    assert np.array_equal(np.unique(frames_of(data, watched[1][0][1])), validation)


def test_frames_without_any_chunk_are_left_out(policy, tmp_path, monkeypatch):
    data = demonstrations()
    chunks, head = with_executed(data, base_chunks(data), cached=False), head_for(policy, "compact")
    unknown = np.arange(len(data)) % 3 == 1
    chunks = dataclasses.replace(chunks, slot=np.where(unknown, -1, chunks.slot))
    known = [frames[~unknown[frames]] for frames in data.split(0.3)]
    watched = watched_training(monkeypatch, data, chunks, head, tmp_path, HeadRecipe(draws=1), size=400)
    for ((_, state, *_), _), frames in zip(watched, known, strict=True):
        assert np.array_equal(np.unique(frames_of(data, state)), frames)
    drawn = train_head_module.samples_of(head, data, chunks, 400)
    frames = np.flatnonzero(~unknown)
    assert np.array_equal(np.unique(frames_of(data, [sample.state for sample in drawn])), frames)


OPTIONS = [
    ("compact", {"reactive": True}, HeadRecipe(draws=1)),
    ("compact", {"reactive": True, "clock": True}, HeadRecipe(draws=2)),
    ("compact", {"residual_limit": 0.3}, HeadRecipe(draws=2, slots=(2, 6))),
    ("compact", {"without": ("images", "tau")}, HeadRecipe(draws=2, mismatch=0.5)),
    ("mlp", {}, HeadRecipe(draws=2)),
]


@pytest.mark.parametrize(("architecture", "options", "recipe"), OPTIONS)
def test_options_train_and_are_recorded(policy, tmp_path, architecture, options, recipe):
    first, second, data = two()
    chunks = concatenate_chunks([base_chunks(first), base_chunks(second, 1)])
    trained, record = run(data, chunks, head_for(policy, architecture, **options), tmp_path, recipe)
    for name, value in options.items():
        assert getattr(trained.config, name) == value
        assert record["head"][name] == (list(value) if isinstance(value, tuple) else value)
    assert record["recipe"]["slots"] == (list(recipe.slots) if recipe.slots else None)
    assert record["data_sets"] == [first.data_hash, second.data_hash] and record["data"]["frames"] == len(data)
    last = record["history"][-1]
    assert {"error", "base_error", "error_0", "error_data0", "error_data1"} <= set(last)
    manifest = export(trained, samples(), tmp_path / "head.onnx")
    assert manifest.residual_range == trained.config.residual_range
    assert len(manifest.residual_range) == (0 if trained.config.reactive else 3)


def test_reactive_learns_the_action_and_a_head_the_correction(policy, tmp_path):
    """The base is off by 0.5 everywhere and the expert's action is a part of the state."""
    data = demonstrations(lengths=(40,) * 6)
    action = np.tile(0.8 * data.state[:, :1], (1, 3))
    data = dataclasses.replace(data, action=action)
    label = np.stack([data.chunks(np.arange(len(data)), HORIZON)[0]])
    chunks = dataclasses.replace(base_chunks(data, views=1), actions=label - 0.5)
    loop = dataclasses.replace(LOOP, steps=60, learning_rate=3e-3)
    for name, options in (("head", {}), ("reactive", {"reactive": True})):
        head = head_for(policy, "compact", without=("images",), **options)
        _, record = run(data, chunks, head, tmp_path / name, HeadRecipe(draws=1), loop)
        last = record["history"][-1]
        assert last["base_error"] > 0.4 and last["error"] < 0.5 * last["base_error"], name


def test_a_head_knows_the_largest_residual_of_all_its_trainings(policy, tmp_path):
    data = demonstrations(lengths=(40,) * 6)
    label = data.chunks(np.arange(len(data)), HORIZON)[0]
    head, found = head_for(policy, "compact"), []
    for number, missing in enumerate(([0.1, 0.5, 0.0], [0.2, -0.3, 0.0])):
        chunks = dataclasses.replace(base_chunks(data, views=1), actions=np.float32([label - missing]))
        head, _ = run(data, chunks, head, tmp_path / str(number), HeadRecipe(draws=1))
        found.append(head.config.residual_range)
    least = 0.1 * head.action_std[2].item()
    assert found[0] == pytest.approx((0.1, 0.5, least), abs=1e-5) and least < 0.2
    assert found[1] == pytest.approx((0.2, 0.5, least), abs=1e-5)
    head.config = dataclasses.replace(head.config, residual_range=())
    trained = train_head(data, chunks, head, LOOP, tmp_path / "older", 0.3, HeadRecipe(draws=1), init="abc")
    assert trained.config.residual_range == (), "what it was trained on before is not known"


def test_mismatch_needs_cached_chunks(policy, tmp_path):
    data = demonstrations()
    chunks = with_executed(data, base_chunks(data), cached=False)
    run(data, chunks, head_for(policy, "compact"), tmp_path / "a")
    with pytest.raises(ConfigError, match="mismatch is 0.5"):
        run(data, chunks, head_for(policy, "compact"), tmp_path / "b", HeadRecipe(mismatch=0.5))
    for wrong in ({"draws": 0}, {"loss_unit": "metre"}, {"executed": 1.5}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            HeadRecipe(**wrong)


@pytest.mark.parametrize(
    ("options", "recipe", "expected"),
    [
        ([], "ours", {"draws": 8, "slots": None}),
        (["--architecture", "transformer"], "paper", {"loss_unit": "action", "draws": 1}),
        (["--architecture", "transformer", "--recipe", "ours", "--learning-rate", "0.002"], "ours", {}),
        (["--recipe", "paper", "--slots", "2", "6", "--mismatch", "0.4"], "paper", {"slots": (2, 6), "mismatch": 0.4}),
        (["--reactive", "--without", "language", "images"], "ours", {"draws": 1}),
        (["--reactive", "--clock"], "ours", {"draws": 8}),
    ],
)
def test_command_line(policy, tmp_path, monkeypatch, options, recipe, expected):
    save_network(policy, tmp_path / "policy", "tiny")
    data, seen = demonstrations(), {}
    monkeypatch.setattr(train_head_module, "load_demonstrations", lambda root, cameras: data)
    monkeypatch.setattr(train_head_module, "load_base", lambda *arguments, **rest: base_chunks(data))
    monkeypatch.setattr(train_head_module, "train_head", lambda *arguments, **_: seen.update(arguments=arguments))
    common = ["--data", "a", "b", "--policy", str(tmp_path / "policy"), "--out", "out", "--steps", "5"]
    train_head_module.main(common + options)
    joined, chunks, head, loop, out, holdout, used = seen["arguments"]
    assert len(joined) == 2 * len(data) == len(chunks.slot)
    assert {name: getattr(used, name) for name in expected} == expected
    rate = 0.002 if "--learning-rate" in options else RECIPES[recipe]["learning_rate"]
    assert loop.learning_rate == rate and loop.average_decay == RECIPES[recipe]["average_decay"]
    assert head.architecture == ("transformer" if "transformer" in options else "compact")
    assert head.config.reactive == ("--reactive" in options)
    assert head.config.cameras == (() if "images" in options else CAMERAS)
    assert head.config.policy_id == load_network(tmp_path / "policy").config.policy_id


def test_base_without_images_trains(policy, tmp_path):
    """The state-only control: a flow policy without cameras, and heads for it."""
    data = dataclasses.replace(demonstrations(), frames={})
    config = dataclasses.replace(policy.config, cameras=(), objects_dim=3)
    written = train_policy(data, config, LOOP, tmp_path / "blind", 0.3)
    network = load_network(tmp_path / "blind")
    assert written.cameras == () and network.encode({}, torch.zeros(1, 2), torch.zeros(1, LANGUAGE)).shape == (
        1,
        LATENT,
    )
    head = awake(make_head("compact", network, "hash"))
    export(head, samples(), tmp_path / "head.onnx")
    assert OnnxHead(tmp_path / "head.onnx").manifest.cameras == {}


# --- on-policy data ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_policy():
    pytest.importorskip("mujoco")
    pytest.importorskip("libero")
    from a2c2_ros.training import on_policy

    return on_policy


def test_executed_chunks_of_episodes_are_joined_in_order(on_policy, tmp_path):
    rng = np.random.default_rng(0)
    paths, actions = [], []
    for number, (steps, count) in enumerate(((4, 2), (3, 1))):
        actions.append(rng.standard_normal((count, HORIZON, 3)).astype(np.float32))
        base = {
            "executed.chunk": np.minimum(np.arange(steps) // 2, count - 1),
            "executed.slot": np.arange(steps) % 2,
            "executed.actions": actions[-1],
            "executed.latents": rng.standard_normal((count, LATENT)).astype(np.float32),
        }
        base["executed.chunk"][0] = base["executed.slot"][0] = -1 if number else 0
        paths.append(tmp_path / f"part{number}.npz")
        np.savez(paths[-1], instruction="red", solved=bool(number), action=np.zeros((steps, 3)), **base)
    out = tmp_path / "data"
    out.mkdir()
    on_policy.save_executed(out, paths, POLICY_ID)
    on_policy.save_record(out, paths, {"policy_id": POLICY_ID, "execution_horizon": 4})
    record = json.loads((out / "executed" / "record.json").read_text())
    assert (record["solved"], record["execution_horizon"]) == (1, 4)
    assert [episode["steps"] for episode in record["episodes"]] == [4, 3]
    base = load_base(out, demonstrations(lengths=(4, 3)), POLICY_ID)
    assert base.slot.tolist() == [0, 1, 0, 1, -1, 1, 0]
    assert np.array_equal(base.action[3], actions[0][1, 1]) and np.array_equal(base.action[5], actions[1][0, 1])


def test_run_of_other_settings_is_not_continued(on_policy, tmp_path, capsys):
    path = tmp_path / "settings.json"
    on_policy.check_settings(path, {"execution_horizon": 40, "head_sha256": None})
    on_policy.check_settings(path, {"execution_horizon": 40, "head_sha256": None})
    with pytest.raises(ConfigError, match="execution_horizon: there 40, here 10"):
        on_policy.check_settings(path, {"execution_horizon": 10, "head_sha256": None})
    written = path.stat().st_mtime_ns, path.stat().st_ino
    on_policy.check_settings(path, {"execution_horizon": 40})
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == written and list(tmp_path.iterdir()) == [path]
    damaged = tmp_path / "damaged.json"
    damaged.touch()
    with pytest.raises(ConfigError, match=r"damaged\.json cannot be read"):
        on_policy.check_settings(damaged, {"execution_horizon": 40})
    assert on_policy.main(["--out", str(tmp_path), "--policy", "flow_libero_spatial"]) == 2
    assert "exists already" in capsys.readouterr().err
    too_late = ["--inference-delay", "20", "--execution-horizon", "40"]
    too_late += ["--out", str(tmp_path / "x"), "--policy", "flow_libero_spatial"]
    assert on_policy.main(too_late) == 2 and "e + d <= H" in capsys.readouterr().err


def test_visited_states_carry_the_experts_label_and_the_executed_chunk(on_policy):
    """The real loop with a policy that moves up: LIBERO, physics and schedule are real."""
    from a2c2_ros.core.config import ControllerConfig
    from a2c2_ros.core.controller import CorrectionLoop
    from a2c2_ros.drivers.profile import load_profile
    from a2c2_ros.policies.base import PolicyOutput
    from a2c2_ros.sim.libero_env import LiberoEnv

    class Upwards:
        policy_id, calls = "upwards", 0

        def predict(self, observation, instruction, *, seed, continuation=None):
            self.calls += 1
            actions = np.tile(np.float32([0, 0, 0.1, 0, 0, 0, -1]), (50, 1))
            actions[:, 0] = 0.01 * self.calls + 0.001 * np.arange(50)
            return PolicyOutput(actions, np.float32([self.calls]), np.zeros(4, np.float32))

    robot, policy = load_profile("libero").robot, Upwards()
    loop = CorrectionLoop(ControllerConfig(correction__enabled=False, lockstep=True), robot)
    config = on_policy.planner_config(argparse.Namespace(policy="", execution_horizon=6, inference_delay=2), 50)
    with LiberoEnv(0) as env:
        frames, base, solved = on_policy.visit(env, robot, policy, loop, config, seed=3, max_steps=16)
        first = env.reset(None, 3)
        label = on_policy.Labeller(env).act(first).astype(np.float32)
    assert not solved and len(frames["action"]) == 16 == len(base["slot"])
    assert np.array_equal(frames["observation.images.wrist"][0], first["wrist"])
    assert np.array_equal(frames["action"][0], label)
    # Chunk 1 from step 0, chunk 2 from step 6, taken at step 8, chunk 3 from step 12, taken at step 14.
    assert base["chunk"].tolist() == [0] * 8 + [1] * 6 + [2] * 2
    assert base["slot"].tolist() == [*range(8), *range(2, 8), 2, 3]
    assert np.array_equal(frames["action.executed"], base["actions"][base["chunk"], base["slot"]])
    assert base["latents"][:, 0].tolist() == [1, 2, 3]
    assert np.abs(frames["action"] - frames["action.executed"]).max() > 0.1


def test_labeller_takes_over_a_grasp_of_the_loop(on_policy):
    """Another expert acts; it lifts the bowl while the labeller still waits above it."""
    from a2c2_ros.sim.expert import Expert, Phase
    from a2c2_ros.sim.libero_env import LiberoEnv

    with LiberoEnv(0, render=False) as env:
        observation = env.reset(None, 1)
        acting, labeller = Expert(env), on_policy.Labeller(env)
        labeller._yaw += 0.6  # it would have taken the bowl elsewhere
        labels, carried = [], []
        for _ in range(150):
            action = acting.act(observation)
            if acting.phase in (Phase.APPROACH, Phase.DESCEND, Phase.CLOSE):
                labeller._last_position = observation["ee_pose"][:3].copy()
            else:
                labels.append(labeller.act(observation))
                if acting.phase is Phase.TRANSFER and np.linalg.norm(action[:2]) > 0.5:
                    carried.append(labels[-1][:2] @ action[:2])
            if acting.phase in (Phase.OPEN, Phase.DONE):
                break
            observation, _ = env.step(action)
        assert not labeller.lost and len(labels) > 10
    # While the bowl still stands the label may be anything; once it hangs, it is to hold and carry it.
    assert all(label[6] == 1.0 for label in labels[8:-1])
    assert np.abs([label[5] for label in labels[8:-1]]).mean() < 0.2  # and not to turn to another grasp
    assert len(carried) > 5 and min(carried) > 0  # to the plate, not back to where it would have lifted the bowl


def test_labeller_takes_the_bowl_where_the_loop_came_down(on_policy):
    from a2c2_ros.sim import conventions
    from a2c2_ros.sim.expert import RIM_HEIGHT_M
    from a2c2_ros.sim.libero_env import LiberoEnv

    with LiberoEnv(0, render=False) as env:
        observation = env.reset(None, 1)
        labeller = on_policy.Labeller(env)
        bowl = env.object_pose(conventions.TARGET_BOWL)
        own = labeller._grip_point(bowl)
        opposite = 2.0 * bowl[:3] - own
        for height, stays in ((RIM_HEIGHT_M + 0.1, True), (RIM_HEIGHT_M, False)):
            opposite[2] = bowl[2] + height
            for _ in range(2):
                labeller.act(observation | {"ee_pose": np.r_[opposite, observation["ee_pose"][3:]]})
            chosen = labeller._grip_point(bowl)
            assert np.allclose(chosen, own) == stays
        assert np.linalg.norm(chosen[:2] - opposite[:2]) < 0.04


def test_labels_follow_what_is_seen_not_what_was_done(on_policy):
    """A gripper at the rim goes on down and closes, and lifts when its fingers have closed, however long that takes."""
    from a2c2_ros.sim import conventions
    from a2c2_ros.sim.expert import GRIP_DEPTH_M, Expert, Phase
    from a2c2_ros.sim.libero_env import LiberoEnv

    with LiberoEnv(0, render=False) as env:
        observation = env.reset(None, 1)
        expert, labeller = Expert(env), on_policy.Labeller(env)
        grip = labeller._grip_point(env.object_pose(conventions.TARGET_BOWL))
        orientation = labeller._desired_orientation()

        def at(aside_m, above_m, opening_m):
            pose = np.r_[grip + (aside_m, 0.0, above_m), orientation]
            fingers = np.array(observation["joint_position"])
            fingers[-2:] = opening_m / 2, -opening_m / 2
            return observation | {"ee_pose": pose, "joint_position": fingers}

        for _ in range(3):
            label, own = labeller.act(at(0.01, GRIP_DEPTH_M, 0.08)), expert.act(at(0.01, GRIP_DEPTH_M, 0.08))
        assert label[2] < 0.0 and label[6] == conventions.GRIPPER_OPEN
        assert own[2] > 0.5  # the expert would hover above the rim first
        labels = [labeller.act(at(0.0, 0.0, 0.08)) for _ in range(30)]
        assert labeller.phase is Phase.CLOSE and labels[-1][6] == conventions.GRIPPER_CLOSE
        assert np.abs(labels[-1][:3]).max() < 0.2
        assert labeller.act(at(0.0, 0.0, 0.01))[2] > 0.5 and labeller.phase is Phase.LIFT
