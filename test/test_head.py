"""The compact head and its ONNX form: zero start, parity, manifest, every kind of bad file. See test_heads_split.py."""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxruntime")

from test_flow import CONFIG

from a2c2_ros.core.errors import ConfigError, HeadError, ManifestError, ObservationError
from a2c2_ros.core.features import time_feature
from a2c2_ros.core.head import HeadInput
from a2c2_ros.core.manifest import MANIFEST_KEY, HeadManifest
from a2c2_ros.faults.heads import write_head
from a2c2_ros.heads import export as export_module
from a2c2_ros.heads.base import load_head, save_head
from a2c2_ros.heads.compact import CompactHead
from a2c2_ros.heads.export import torch_residual
from a2c2_ros.heads.onnx_head import OnnxHead
from a2c2_ros.policies.flow import FlowNetwork


def small_head():
    config = dataclasses.replace(CONFIG, language_dim=12, policy_id="tiny-1")
    torch.manual_seed(0)
    policy = FlowNetwork(config)
    policy.action_std.copy_(torch.tensor([0.5, 0.25, 2.0]))
    return CompactHead.for_policy(policy, "hash").eval(), policy


def trained_head():
    head, _ = small_head()
    torch.nn.init.normal_(head.output[-1].weight)
    return head


def samples(count=5):
    rng = np.random.default_rng(0)
    return [
        HeadInput(
            images={name: rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for name in ("agentview", "wrist")},
            time_feature=time_feature(i % 6, 6),
            **{
                name: rng.standard_normal(size).astype(np.float32)
                for name, size in (("state", 2), ("base_action", 3), ("latent", 16), ("language", 12))
            },
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / "head.onnx"
    head = trained_head()
    return path, head, export_module.export(head, samples(), path)


def test_untrained_head_leaves_the_action():
    head, policy = small_head()
    assert np.array_equal(torch_residual(head, samples()[0]), np.zeros(3))
    for name, value in policy.encoder.state_dict().items():
        assert torch.equal(head.encoder.state_dict()[name], value), name


def test_every_input_changes_the_residual():
    head, sample = trained_head(), samples()[0]
    # FiLM starts as the identity; a trained one is not.
    for module in head.modules():
        if hasattr(module, "project"):
            torch.nn.init.normal_(module.project.weight, std=0.1)
    before = torch_residual(head, sample)
    for name in ("state", "base_action", "time_feature", "latent", "language"):
        changed = dataclasses.replace(sample, **{name: getattr(sample, name) + np.float32(0.5)})
        assert not np.allclose(torch_residual(head, changed), before, atol=1e-4), name
    for camera in sample.images:
        changed = dataclasses.replace(sample, images=sample.images | {camera: 255 - sample.images[camera]})
        assert not np.allclose(torch_residual(head, changed), before, atol=1e-4), camera


def test_export_parity_and_manifest(exported):
    path, head, manifest = exported
    loaded = OnnxHead(path)
    loaded.warm_up(2)
    assert loaded.manifest == manifest
    assert manifest.policy_id == "tiny-1" and manifest.horizon == 6 and manifest.training_data_hash == "hash"
    assert tuple(manifest.cameras) == ("agentview", "wrist")
    assert 0.0 <= manifest.parity_max_abs_error < 1e-4
    for sample in samples(3):
        residual = loaded.correct(sample)
        assert residual.shape == (3,) and residual.dtype == np.float32 and np.abs(residual).max() > 1e-3
        assert np.allclose(residual, torch_residual(head, sample), atol=1e-4)


def test_export_refuses_to_replace_and_to_differ(exported, tmp_path, monkeypatch):
    path, head, _ = exported
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="--force"):
        export_module.export(head, samples(), path)
    monkeypatch.setattr(export_module, "MAX_PARITY_ERROR", 0.0)
    with pytest.raises(ManifestError, match="differ"):
        export_module.export(head, samples(), path, force=True)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_missing_file_is_one_line_and_no_traceback(tmp_path, capsys):
    arguments = ["--head", str(tmp_path / "none"), "--data", str(tmp_path), "--out", str(tmp_path / "head.onnx")]
    assert export_module.main(arguments) == 2
    assert capsys.readouterr().err == f"error: head {tmp_path / 'none'} is not a file\n"


@pytest.mark.parametrize("available", [False, True])
def test_a_device_that_is_not_there_is_no_silent_fallback(exported, monkeypatch, available):
    """Nor if ONNX Runtime was built for it but cannot use it: it would take the CPU."""
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"] if available else ["CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    with pytest.raises(ConfigError, match="cannot be used here" if available else "GPU=1"):
        OnnxHead(exported[0], device="cuda")


def test_missing_damaged_and_foreign_files_are_refused(exported, tmp_path):
    path, _, manifest = exported
    with pytest.raises(ConfigError, match="not a file"):
        OnnxHead(tmp_path / "absent.onnx")
    with pytest.raises(ConfigError, match="threads"):
        OnnxHead(path, threads=0)
    with pytest.raises(ConfigError, match="'tpu', allowed are .'cpu', 'cuda'"):
        OnnxHead(path, device="tpu")
    bad = tmp_path / "bad.onnx"
    content = path.read_bytes()
    for damaged in (b"", b"not onnx", content[: len(content) // 2]):
        bad.write_bytes(damaged)
        with pytest.raises(ManifestError):
            OnnxHead(bad)
    model = onnx.load(path)
    for properties, message in (
        ({}, "not exported by a2c2_ros"),
        ({MANIFEST_KEY: "{"}, "not JSON"),
        ({MANIFEST_KEY: dataclasses.replace(manifest, latent_size=17).to_json()}, "its manifest says"),
        ({MANIFEST_KEY: dataclasses.replace(manifest, output="action").to_json()}, "output"),
        ({MANIFEST_KEY: dataclasses.replace(manifest, residual_range=(0.1,)).to_json()}, "residual_range is .0.1."),
        ({MANIFEST_KEY: dataclasses.replace(manifest, residual_range=(0.1, -1.0, 1.0)).to_json()}, "residual_range"),
    ):
        del model.metadata_props[:]
        onnx.helper.set_model_props(model, properties)
        onnx.save(model, bad)
        with pytest.raises(ManifestError, match=message):
            OnnxHead(bad)


def test_wrong_input_is_refused(exported):
    head, sample = OnnxHead(exported[0]), samples()[0]
    with pytest.raises(ObservationError, match="wrist"):
        head.correct(dataclasses.replace(sample, images={"agentview": sample.images["agentview"]}))
    with pytest.raises(ObservationError, match="latent"):
        head.correct(dataclasses.replace(sample, latent=np.zeros(3, np.float32)))
    with pytest.raises(ObservationError, match="state"):
        head.correct(dataclasses.replace(sample, state=sample.state.astype(np.float64)))


def test_a_failing_run_raises_and_writes_nothing(tmp_path, capfd):
    """A line per tick on the terminal would make the loop late besides."""
    manifest = HeadManifest(
        **{"architecture": "broken", "policy_id": "p", "horizon": 8, "step_ns": 50_000_000, "cameras": {}},
        **{"action_names": ("x",), "action_space": "a", "state_names": ("s",), "latent_size": 0, "language_size": 0},
    )
    head = OnnxHead(write_head(tmp_path / "head.onnx", "broken", manifest))
    inputs = HeadInput(
        {}, np.ones(1, np.float32), np.zeros(1, np.float32), time_feature(3, 8), *[np.empty(0, np.float32)] * 2
    )
    with pytest.raises(HeadError, match="ONNX Runtime failed"):
        head.correct(inputs)
    assert capfd.readouterr() == ("", "")


def test_head_file_round_trip(tmp_path):
    head = trained_head()
    path = tmp_path / "head.safetensors"
    save_head(head, path)
    loaded = load_head(path)
    assert loaded.config == head.config
    assert np.allclose(torch_residual(loaded, samples()[0]), torch_residual(head, samples()[0]), atol=0.02)
    with pytest.raises(ConfigError, match="not a file"):
        load_head(tmp_path / "absent.safetensors")
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ManifestError, match="not a head file"):
        load_head(path)


def test_manifest_survives_json(exported):
    manifest = dataclasses.replace(exported[2], residual_range=(0.1, 0.0, 2.0))
    assert HeadManifest.from_json(manifest.to_json(), "test") == manifest
