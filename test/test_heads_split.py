"""All heads: one graph, the graph cut at the camera tokens, and torch agree; preparing images changes only the time."""

import dataclasses
import json
import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from safetensors.torch import load_file, save_file

from a2c2_ros.benchmark import heads as benchmark_module
from a2c2_ros.core.chunk import ActionChunk
from a2c2_ros.core.errors import ConfigError, HeadError, ManifestError, ObservationError
from a2c2_ros.core.manifest import HeadManifest
from a2c2_ros.heads import quantise as quantise_module
from a2c2_ros.heads.base import head_type, load_head, make_random_head, manifest_of, save_head
from a2c2_ros.heads.export import export, torch_residual
from a2c2_ros.heads.onnx_head import KEPT_PER_CAMERA, OUTPUT_NAME, OnnxHead, read_graph, save_graph
from a2c2_ros.heads.quantise import effect, quantise
from a2c2_ros.heads.samples import random_samples
from a2c2_ros.paths import model_path
from a2c2_ros.policies.flow import FlowConfig, FlowNetwork, save_network

torch.set_num_threads(1)

CAMERAS = ("agentview", "wrist")
SIZES = {
    "mlp": {},
    "compact": {"width": 32, "channels": 8, "keypoints": 8},
    "transformer": {"layers": 2, "feed_forward": 64},
}
CASES = [
    ("mlp", (), 0, 0),
    ("mlp", (), 16, 12),
    ("compact", CAMERAS, 16, 12),
    ("compact", CAMERAS[:1], 0, 0),
    ("compact", (), 16, 0),
    ("transformer", CAMERAS, 16, 12),
    ("transformer", CAMERAS[1:], 0, 12),
    ("transformer", (), 0, 0),
]


def random_head(architecture, cameras=CAMERAS, latent_dim=16, language_dim=12, seed=0, **changes):
    head = make_random_head(
        architecture,
        cameras=cameras,
        image_size=64,
        state_names=("p", "q", "r"),
        action_names=("x", "y"),
        action_space="joint_position",
        horizon=6,
        step_ns=20_000_000,
        latent_dim=latent_dim,
        language_dim=language_dim,
        seed=seed,
        policy_id="random",
        **(SIZES[architecture] | changes),
    )
    generator = torch.Generator().manual_seed(seed)
    for module in head.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # folded into the convolutions that the cameras share
            module.running_var.uniform_(0.5, 2.0, generator=generator)
        if hasattr(module, "project") and isinstance(module.project, torch.nn.Linear):  # FiLM starts as the identity
            torch.nn.init.normal_(module.project.weight, std=0.1, generator=generator)
    for name, value in head.named_buffers():
        if name.endswith("_std") and "image" not in name:
            value.uniform_(0.5, 2.0, generator=generator)
    return head


def exported_head(path, *arguments, **options):
    head = random_head(*arguments, **options)
    samples = random_samples(manifest_of(head), 4)
    export(head, samples, path)
    return path, head, samples


@pytest.fixture(scope="module", params=("compact", "transformer"))
def with_cameras(request, tmp_path_factory):
    return exported_head(tmp_path_factory.mktemp(request.param) / "head.onnx", request.param)


@pytest.fixture(scope="module")
def compact(tmp_path_factory):
    return exported_head(tmp_path_factory.mktemp("compact") / "head.onnx", "compact")


def prepare_all(head, sample):
    for camera, image in sample.images.items():
        head.prepare(camera, image, sample.language)


@pytest.mark.parametrize(("architecture", "cameras", "latent_dim", "language_dim"), CASES)
def test_whole_split_and_torch_agree(tmp_path, architecture, cameras, latent_dim, language_dim):
    path, head, samples = exported_head(tmp_path / "head.onnx", architecture, cameras, latent_dim, language_dim)
    whole, cut = OnnxHead(path, split=False), OnnxHead(path, threads=2, encoder_threads=2)
    cut.warm_up(1)
    whole.warm_up(1)
    assert not whole.splits and cut.splits == bool(cameras)
    assert cut.manifest.architecture == architecture and tuple(cut.manifest.tokens) == cameras
    names = {node.name for node in read_graph(path).graph.input}
    assert ("latent" in names) == bool(latent_dim) and ("language" in names) == bool(language_dim)
    assert np.array_equal(random_samples(manifest_of(head), 1)[0].state, samples[0].state)
    for sample in samples:
        expected = torch_residual(head, sample)
        assert np.abs(expected).max() > 1e-4 and expected.shape == (2,)
        assert np.abs(whole.correct(sample) - expected).max() < 1e-5
        assert np.abs(cut.correct(sample) - expected).max() < 1e-5


@pytest.mark.parametrize(("architecture", "cameras"), [("mlp", ()), ("compact", CAMERAS), ("transformer", CAMERAS)])
def test_files_keep_the_architecture(tmp_path, architecture, cameras):
    head = random_head(architecture, cameras)
    path = tmp_path / "head.safetensors"
    save_head(head, path)
    loaded = load_head(path)
    assert type(loaded) is type(head) and loaded.config == head.config and not loaded.training
    sample = random_samples(manifest_of(head), 1)[0]
    assert np.allclose(torch_residual(loaded, sample), torch_residual(head, sample), atol=1e-3)  # stored as float16
    untrained = head_type(architecture)(head.config).eval()
    assert np.array_equal(torch_residual(untrained, sample), np.zeros(2))


def test_file_without_an_architecture_is_compact(tmp_path):
    head = random_head("compact")
    save_head(head, tmp_path / "new.safetensors")
    old = tmp_path / "old.safetensors"
    metadata = {"config": json.dumps(dataclasses.asdict(head.config))}
    save_file(load_file(tmp_path / "new.safetensors"), old, metadata)
    assert load_head(old).architecture == "compact"
    save_file(load_file(tmp_path / "new.safetensors"), old, metadata | {"architecture": "mamba"})
    with pytest.raises(ManifestError, match="'mamba', allowed are"):
        load_head(old)


def test_shipped_head_is_its_weights():
    """The file that ships, cut at its tokens, against torch with the weights beside it."""
    folder = model_path("compact_libero_spatial")
    head, onnx_head = load_head(folder / "head.safetensors"), OnnxHead(folder / "head.onnx")
    assert onnx_head.splits and dataclasses.replace(manifest_of(head), parity_max_abs_error=0.0) == dataclasses.replace(
        onnx_head.manifest, parity_max_abs_error=0.0
    )
    for sample in random_samples(onnx_head.manifest, 4):
        prepare_all(onnx_head, sample)
        assert np.abs(onnx_head.correct(sample) - torch_residual(head, sample)).max() < 1e-4


def test_configurations_that_cannot_be():
    with pytest.raises(ConfigError, match=r"mlp head are \['agentview', 'wrist'\]"):
        random_head("mlp", CAMERAS)
    with pytest.raises(ConfigError, match="'mamba', allowed are"):
        head_type("mamba")
    config = random_head("mlp", ()).config
    with pytest.raises(ConfigError, match="action_names is empty"):
        dataclasses.replace(config, action_names=())


def test_random_head_has_small_residuals_and_follows_its_seed():
    sample = random_samples(manifest_of(random_head("compact")), 1)[0]
    residuals = [torch_residual(random_head("compact", seed=seed), sample) for seed in (0, 0, 1)]
    assert np.array_equal(residuals[0], residuals[1]) and not np.array_equal(residuals[0], residuals[2])
    assert 1e-4 < np.abs(residuals[0]).max() < 0.2


def count_runs(head, monkeypatch):
    """Names of the encoders that run from now on."""
    runs = []
    encode = head._encode
    monkeypatch.setattr(head, "_encode", lambda camera, *rest: runs.append(camera) or encode(camera, *rest))
    return runs


def test_prepared_images_give_the_same_bits_and_are_not_encoded_again(with_cameras, monkeypatch):
    path, _, samples = with_cameras
    plain, prepared = OnnxHead(path), OnnxHead(path)
    for sample in samples:
        prepare_all(prepared, sample)
    runs = count_runs(prepared, monkeypatch)
    for sample in samples:
        assert np.array_equal(prepared.correct(sample), plain.correct(sample))
    assert runs == []


def test_an_equal_image_that_was_not_prepared_is_encoded(with_cameras, monkeypatch):
    path, _, samples = with_cameras
    head, sample = OnnxHead(path), samples[0]
    prepare_all(head, sample)
    runs = count_runs(head, monkeypatch)
    before = head.correct(sample)
    copied = dataclasses.replace(sample, images=sample.images | {"wrist": sample.images["wrist"].copy()})
    assert np.array_equal(head.correct(copied), before) and runs == ["wrist"]


def test_another_language_is_not_answered_with_old_tokens(compact, monkeypatch):
    path, head, samples = compact
    onnx_head, sample = OnnxHead(path), samples[0]
    prepare_all(onnx_head, sample)
    runs = count_runs(onnx_head, monkeypatch)
    changed = dataclasses.replace(sample, language=sample.language + np.float32(0.5))
    assert np.allclose(onnx_head.correct(changed), torch_residual(head, changed), atol=1e-5)
    assert runs == list(CAMERAS)
    assert not np.allclose(onnx_head.correct(changed), onnx_head.correct(sample), atol=1e-5)
    equal = dataclasses.replace(sample, language=sample.language.copy())
    runs.clear()
    onnx_head.correct(equal)
    assert runs == []


def test_only_the_newest_images_are_kept(compact, monkeypatch):
    path, head, _ = compact
    samples = random_samples(manifest_of(head), KEPT_PER_CAMERA + 1)
    onnx_head = OnnxHead(path)
    for sample in samples:
        prepare_all(onnx_head, sample)
    runs = count_runs(onnx_head, monkeypatch)
    for sample in samples[1:]:
        onnx_head.correct(sample)
    assert runs == []
    onnx_head.correct(samples[0])
    assert runs == list(CAMERAS)


@pytest.mark.parametrize("threads", [1, 2])
def test_preparing_while_correcting(with_cameras, threads):
    """The encoder thread replaces tokens all the time; every residual must be the one of its images."""
    path, head, _ = with_cameras
    samples = random_samples(manifest_of(head), 8)
    plain = OnnxHead(path, encoder_threads=threads)
    expected = [plain.correct(sample) for sample in samples]
    raced = OnnxHead(path, encoder_threads=threads)
    done, errors = threading.Event(), []

    def encoder():
        i = 0
        while not done.is_set():
            try:
                prepare_all(raced, samples[i % len(samples)])
            except (HeadError, ObservationError) as error:
                errors.append(error)
            i += 1

    thread = threading.Thread(target=encoder)
    thread.start()
    try:
        for i in range(120):
            k = (5 * i) % len(samples)
            assert np.array_equal(raced.correct(samples[k]), expected[k]), i
    finally:
        done.set()
        thread.join()
    assert errors == []


def test_head_without_images_ignores_cameras_and_what_it_does_not_take(tmp_path):
    path, head, samples = exported_head(tmp_path / "head.onnx", "mlp", (), 0, 0)
    onnx_head, sample = OnnxHead(path), samples[0]
    onnx_head.prepare("wrist", np.zeros((1, 2, 3), np.uint8), sample.language)
    assert sample.latent.shape == sample.language.shape == (0,) and sample.images == {}
    full = dataclasses.replace(
        sample, images={"wrist": np.zeros((8, 8, 3), np.uint8)}, latent=np.ones(5, np.float32), language=np.ones(3)
    )
    assert np.array_equal(onnx_head.correct(full), onnx_head.correct(sample))
    chunk = ActionChunk(
        chunk_id=1,
        t_obs_ns=0,
        step_ns=20_000_000,
        action_names=("x", "y"),
        actions=np.zeros((6, 2), np.float32),
        latent=np.ones(5, np.float32),
        language=np.ones(3, np.float32),
        policy_id="random",
    )
    onnx_head.manifest.check_chunk(chunk)
    with pytest.raises(ManifestError, match="latent_size: head 16, chunk 5"):
        dataclasses.replace(onnx_head.manifest, latent_size=16).check_chunk(chunk)


def test_wrong_images_are_refused_when_they_are_prepared(compact):
    path, _, samples = compact
    head, sample = OnnxHead(path), samples[0]
    for image in (np.zeros((8, 8, 3), np.uint8), sample.images["wrist"].astype(np.float32)):
        with pytest.raises(ObservationError, match="image_wrist"):
            head.prepare("wrist", image, sample.language)
    with pytest.raises(ObservationError, match="language"):
        head.prepare("wrist", sample.images["wrist"], np.zeros(3, np.float32))
    with pytest.raises(ConfigError, match="encoder_threads is 0"):
        OnnxHead(path, encoder_threads=0)


def test_a_failing_runtime_names_the_file(compact, tmp_path):
    """A gather beyond its table fails only when it runs."""
    path, _, samples = compact
    model = read_graph(path)
    manifest = OnnxHead(path).manifest
    graph = model.graph
    last = next(node for node in graph.node if OUTPUT_NAME in node.output)
    last.output[0] = "unchecked"
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([1.0], np.float32), "one_row"))
    graph.node.extend(
        [
            onnx.helper.make_node("ReduceSum", ["time_feature"], ["sum"], keepdims=0),
            onnx.helper.make_node("Cast", ["sum"], ["row"], to=onnx.TensorProto.INT64),
            onnx.helper.make_node("Gather", ["one_row", "row"], ["factor"], axis=0),
            onnx.helper.make_node("Mul", ["unchecked", "factor"], [OUTPUT_NAME]),
        ]
    )
    broken = tmp_path / "broken.onnx"
    save_graph(model, manifest, broken)
    head = OnnxHead(broken)
    good, bad = (dataclasses.replace(samples[0], time_feature=np.full(2, v, np.float32)) for v in (0.0, 50.0))
    assert np.isfinite(head.correct(good)).all()
    with pytest.raises(HeadError, match=r"broken\.onnx.*Gather"):
        head.correct(bad)
    assert np.isfinite(head.correct(good)).all()


def test_files_without_tokens_run_as_one_graph(compact, tmp_path):
    path, head, samples = compact
    manifest = dataclasses.asdict(OnnxHead(path).manifest)
    for name in ("tokens", "weights"):  # as files were before there were tokens
        del manifest[name]
    old = tmp_path / "old.onnx"
    save_graph(read_graph(path), HeadManifest.from_json(json.dumps(manifest), "test"), old)
    onnx_head = OnnxHead(old)
    assert not onnx_head.splits and onnx_head.manifest.tokens == {} and onnx_head.manifest.weights == "float32"
    prepare_all(onnx_head, samples[0])
    assert np.allclose(onnx_head.correct(samples[0]), torch_residual(head, samples[0]), atol=1e-5)


def test_tokens_that_are_not_in_the_graph_are_refused(compact, tmp_path):
    path = compact[0]
    manifest = OnnxHead(path).manifest
    wrong = tmp_path / "wrong.onnx"
    for tokens in ({"agentview": 32, "wrist": 33}, {"agentview": 32, "top": 32}):
        save_graph(read_graph(path), dataclasses.replace(manifest, tokens=tokens), wrong)
        with pytest.raises(ManifestError, match=r"wrong\.onnx"):
            OnnxHead(wrong)


def test_garbage_is_refused(compact, tmp_path):
    """Bytes changed anywhere: the file loads or it is a ManifestError, never anything else."""
    content = np.frombuffer(compact[0].read_bytes(), np.uint8)
    bad = tmp_path / "bad.onnx"
    refused = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        changed = content.copy()
        # Half of them near an end, where the structure and the manifest are.
        where = rng.integers(len(content), size=8) if seed % 2 else len(content) - 1 - rng.integers(3000, size=8)
        changed[where] = rng.integers(256, size=8)
        bad.write_bytes(changed.tobytes())
        try:
            OnnxHead(bad)
        except ManifestError as error:
            assert "bad.onnx" in str(error)
            refused += 1
    assert refused > 20


@pytest.mark.parametrize("kind", ["int8", "fp16"])
def test_quantised_file_runs_and_keeps_manifest_and_tokens(with_cameras, tmp_path, kind):
    path, _, samples = with_cameras
    small = tmp_path / "small.onnx"
    manifest = quantise(path, small, kind)
    before, after = OnnxHead(path), OnnxHead(small)
    assert after.manifest == manifest and after.splits
    assert dataclasses.replace(manifest, weights="float32") == before.manifest
    assert manifest.weights == {"int8": "int8", "fp16": "float16"}[kind]
    assert small.stat().st_size < path.stat().st_size
    for sample in samples:
        plain = after.correct(sample)
        prepare_all(after, sample)
        assert np.array_equal(after.correct(sample), plain)
        assert np.allclose(OnnxHead(small, split=False).correct(sample), plain, atol=1e-4)
    measured = effect(before, after, samples)
    assert 0.0 < measured["mean_abs"] <= measured["max_abs"] and measured["relative"] < 0.2
    assert effect(before, before, samples)["max_abs"] == 0.0
    with pytest.raises(ConfigError, match="--force"):
        quantise(path, small, kind)
    with pytest.raises(ConfigError, match="'int4', allowed are"):
        quantise(path, tmp_path / "other.onnx", "int4")
    assert list(tmp_path.iterdir()) == [small]


def test_quantise_command(compact, tmp_path, monkeypatch, capsys):
    out = tmp_path / "int8.onnx"
    monkeypatch.setattr("sys.argv", ["quantise", "--head", str(compact[0]), "--out", str(out), "--frames", "4"])
    quantise_module.main()
    assert OnnxHead(out).manifest.weights == "int8" and "residual" in capsys.readouterr().out


def test_benchmark_times_every_head_and_writes_json(tmp_path, monkeypatch, capsys):
    """The figures depend on the machine; which there are, and the ratios between them, do not."""
    folder = tmp_path / "compact"
    folder.mkdir()
    _, head, _ = exported_head(folder / "head.onnx", "compact")
    save_head(head, folder / "head.safetensors")
    config = FlowConfig(
        action_names=("x", "y"),
        state_names=("p", "q", "r"),
        cameras=CAMERAS,
        image_size=32,
        step_ns=20_000_000,
        width=32,
        channels=8,
        keypoints=8,
        decoder_width=32,
        decoder_blocks=1,
    )
    save_network(FlowNetwork(config), tmp_path / "policy", "tiny")
    monkeypatch.setattr(benchmark_module, "RANDOM_HEADS", (("mlp", 0, benchmark_module.KINETIX),))
    out = tmp_path / "heads.json"
    arguments = ["--out", str(out), "--compact", str(folder), "--policy", str(tmp_path / "policy"), "--threads", "1"]
    monkeypatch.setattr("sys.argv", ["heads", *arguments, "--seconds", "0.01", "--frames", "4"])
    benchmark_module.main()
    table = json.loads(out.read_text())
    parts = {(row["head"], row["runtime"], row["weights"], row["part"]) for row in table["rows"]}
    onnx_parts = {
        (name, "onnxruntime", weights, part)
        for weights in ("float32", "int8")
        for name, parts in (("compact", ("whole", "tick", "encode")), ("mlp", ("whole", "tick")))
        for part in parts
    }
    assert parts == onnx_parts | {(name, "torch", "float32", "whole") for name in ("compact", "mlp")}
    assert all(0.0 < row["p50_ms"] <= row["p99_ms"] and row["runs"] >= 20 for row in table["rows"] + table["policy"])
    tick = next(row for row in table["rows"] if row["head"] == "compact" and row["part"] == "tick")
    ratio = next(row for row in table["ratios"] if row["head"] == "compact" and row["weights"] == "float32")
    assert ratio["tick"] == pytest.approx(table["policy"][0]["p50_ms"] / tick["p50_ms"], abs=0.06)
    assert [row["head"] for row in table["effects"]] == ["compact", "mlp"]
    assert "onnxruntime" in table["versions"] and table["settings"]["frames_from"] == "seed 0"
    assert "| compact | onnxruntime | int8 | 1 |" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="'tpu', allowed are"):
        benchmark_module.check_device("tpu")
