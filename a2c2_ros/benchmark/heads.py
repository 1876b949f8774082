"""How long the heads take, what smaller weights change in the action, and how that compares with the base policy.

``python -m a2c2_ros.benchmark.heads --out heads.json`` times every head in ONNX Runtime (the whole graph, the control
tick with prepared images, the encoding of one image) and in torch. ``mlp`` and ``transformer`` have random weights, the
last layer too; ``compact`` is the file that ships.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from a2c2_ros import provenance
from a2c2_ros.commands import command
from a2c2_ros.core.errors import ConfigError
from a2c2_ros.core.head import HeadInput
from a2c2_ros.heads.base import Head, load_head, make_random_head, manifest_of
from a2c2_ros.heads.export import export, torch_residual
from a2c2_ros.heads.onnx_head import KEPT_PER_CAMERA, PROVIDERS, OnnxHead
from a2c2_ros.heads.onnx_head import check_device as check_runtime
from a2c2_ros.heads.quantise import effect, quantise
from a2c2_ros.heads.samples import dataset_samples, random_samples
from a2c2_ros.markdown import table
from a2c2_ros.paths import model_path
from a2c2_ros.policies.base import PolicyOptions
from a2c2_ros.policies.flow import FlowPolicy

LIBERO = {
    "cameras": ("agentview", "wrist"),
    "state_names": ("x", "y", "z", "rx", "ry", "rz", "finger_left", "finger_right"),
    "action_names": ("x", "y", "z", "roll", "pitch", "yaw", "gripper"),
    "action_space": "osc_pose_delta",
    "horizon": 50,
    "step_ns": 50_000_000,
    "latent_dim": 256,
    "language_dim": 384,
}
KINETIX = {
    "cameras": (),
    "state_names": tuple(f"state{i}" for i in range(51)),  # most values that vary in one of the paper's levels
    "action_names": tuple(f"action{i}" for i in range(6)),
    "action_space": "kinetix",
    "horizon": 8,
    "step_ns": 33_333_333,
    "latent_dim": 0,
    "language_dim": 0,
}
RANDOM_HEADS = (
    ("mlp", 0, KINETIX),
    ("transformer", 224, LIBERO),
    ("transformer", 128, LIBERO),
)
"""Architecture, image size [pixels] and robot."""
MIN_RUNS, WARM_UP_RUNS = 20, 3


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the result")
    parser.add_argument("--compact", default="compact_libero_spatial", help="folder of a trained compact head")
    parser.add_argument("--policy", default="flow_libero_spatial", help="folder of its base policy")
    parser.add_argument("--data", type=Path, help="LeRobotDataset for the compact head (default: frames of a seed)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="CPU threads (default 1 2)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of one measurement (default 0.5)")
    parser.add_argument("--frames", type=int, default=16, help="frames for the effect on the action (default 16)")
    parser.add_argument("--device", choices=sorted(PROVIDERS), default="cpu", help="where to run (default cpu)")
    parser.add_argument("--seed", type=int, default=0, help="of random weights and frames (default 0)")
    arguments = parser.parse_args(argv)
    result = head_table(
        model_path(arguments.compact),
        model_path(arguments.policy),
        data=arguments.data,
        threads=arguments.threads,
        seconds=arguments.seconds,
        frames=arguments.frames,
        device=arguments.device,
        seed=arguments.seed,
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown(result))


def head_table(
    compact: str | Path,
    policy: str | Path,
    *,
    data: str | Path | None = None,
    threads: Sequence[int] = (1, 2),
    seconds: float = 0.5,
    frames: int = 16,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, object]:
    """Time the heads and the base policy.

    Args:
        compact: Folder with ``head.onnx`` and ``head.safetensors`` of a trained compact head.
        policy: Folder of a flow policy.
        data: LeRobotDataset for the compact head's frames; None makes frames from the seed.
        threads: Numbers of CPU threads.
        seconds: Duration of one measurement [s]; at least ``MIN_RUNS`` runs are made.
        frames: Inputs for the effect on the action.
        device: ``cpu`` or ``cuda``.
        seed: Of random weights and frames.

    Returns:
        JSON-like: ``rows`` (head, runtime, weights, threads, part, p50_ms, p99_ms, runs), ``effects`` (head, weights
        and the values of :func:`quantise.effect`), ``policy`` (threads, p50_ms, p99_ms, runs), ``ratios`` (the
        policy's median over the head's, equal threads, ONNX Runtime), ``settings``, ``machine``, ``versions``.

    Raises:
        ConfigError: If a file is missing or the device is not available.
    """
    check_device(device)
    rows, effects = [], []
    count = 1 + len(RANDOM_HEADS)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=count + 1, unit="model") as progress:
        for i in range(count):
            if i == 0:
                name, path = "compact", Path(compact) / "head.onnx"
                head = load_head(Path(compact) / "head.safetensors")
                manifest = OnnxHead(path).manifest
                samples = dataset_samples(manifest, data, frames, seed) if data else None
            else:
                architecture, image_size, robot = RANDOM_HEADS[i - 1]
                name, path = f"{architecture} {image_size}" if image_size else architecture, Path(folder) / f"{i}.onnx"
                head = make_random_head(architecture, image_size=image_size, seed=seed, policy_id="random", **robot)
                manifest = export(head, random_samples(manifest_of(head), 2, seed), path)
                samples = None
            progress.set_description(name)
            samples = samples or random_samples(manifest, frames, seed)
            small = Path(folder) / f"{i}_int8.onnx"
            quantise(path, small)
            found = [
                row for file in (path, small) for n in threads for row in _onnx_rows(file, samples, n, seconds, device)
            ]
            found += [_torch_row(head.to(device), samples, n, seconds) for n in threads]
            rows += [{"head": name, "parameters": manifest.parameters, **row} for row in found]
            weights = "trained" if i == 0 else "random"
            change = effect(OnnxHead(path), OnnxHead(small), samples)
            effects.append({"head": name, "head_weights": weights, "weights": "int8", **change})
            progress.update()
        progress.set_description("flow")
        policies = [_policy_row(policy, n, seconds, device, seed) for n in threads]
        progress.update()
    return {
        "rows": rows,
        "effects": effects,
        "policy": policies,
        "ratios": _ratios(rows, policies),
        "settings": {
            "compact": Path(compact).name,
            "policy": Path(policy).name,
            "frames": frames,
            "frames_from": Path(data).name if data else f"seed {seed}",
            "seconds": seconds,
            "device": device,
            "seed": seed,
        },
        "machine": provenance.machine() | ({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}),
        "versions": provenance.versions(),
    }


def check_device(device: str) -> None:
    """Check that torch and ONNX Runtime can use a device.

    Raises:
        ConfigError: If one of them cannot.
    """
    check_runtime(device)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {device!r}, but torch has no CUDA")


def measure_ms(run: Callable[[int], object], seconds: float) -> dict[str, float | int]:
    """Durations of ``run(i)``, after a tenth of the time to warm up: ``p50_ms``, ``p99_ms``, ``runs``."""
    durations: list[int] = []
    begin_ns, i = time.perf_counter_ns(), 0
    while i < WARM_UP_RUNS or time.perf_counter_ns() - begin_ns < 1e8 * seconds:
        run(i)
        i += 1
    begin_ns = time.perf_counter_ns()
    while len(durations) < MIN_RUNS or time.perf_counter_ns() - begin_ns < 1e9 * seconds:
        start_ns = time.perf_counter_ns()
        run(len(durations))
        durations.append(time.perf_counter_ns() - start_ns)
    p50, p99 = np.percentile(durations, (50, 99)) / 1e6
    return {"p50_ms": round(float(p50), 4), "p99_ms": round(float(p99), 4), "runs": len(durations)}


def markdown(result: Mapping[str, object]) -> str:
    """The result as Markdown tables."""
    times, effects = [], []
    groups: dict[tuple, dict[str, str]] = {}
    for row in result["rows"]:
        key = (row["head"], row["runtime"], row["weights"], row["threads"])
        groups.setdefault(key, {})[row["part"]] = f"{row['p50_ms']:.3g}/{row['p99_ms']:.3g}"
    ratios = {(r["head"], "onnxruntime", r["weights"], r["threads"]): f"{r['tick']:.0f}" for r in result["ratios"]}
    for key, parts in groups.items():
        cells = [*map(str, key), *(parts.get(part, "") for part in ("whole", "tick", "encode")), ratios.get(key, "")]
        times.append(cells)
    for row in result["effects"]:
        values = [f"{row[name]:.2g}" for name in ("max_abs", "mean_abs", "mean_residual", "relative")]
        effects.append([row["head"], f"{row['head_weights']} weights", *values])
    name = result["settings"]["policy"]
    policy = [(name, str(r["threads"]), f"{r['p50_ms']}/{r['p99_ms']}") for r in result["policy"]]
    tables = (
        (("head", "runtime", "weights", "threads", "whole p50/p99 [ms]", "tick", "one image", "policy/tick"), times),
        (("change by int8", "of", "max abs", "mean abs", "mean residual", "relative"), effects),
        (("policy", "threads", "p50/p99 [ms]"), policy),
    )
    return "\n\n".join(table(heading, rows) for heading, rows in tables)


def _onnx_rows(
    path: Path, samples: Sequence[HeadInput], threads: int, seconds: float, device: str
) -> list[dict[str, object]]:
    whole, cut = (OnnxHead(path, threads, threads, split=split, device=device) for split in (False, True))
    ready = samples[:KEPT_PER_CAMERA]
    for sample in ready:
        for camera, image in sample.images.items():
            cut.prepare(camera, image, sample.language)

    def encode(i: int) -> None:
        sample = samples[i % len(samples)]
        camera, image = next(iter(sample.images.items()))
        cut.prepare(camera, image, sample.language)

    parts = {
        "whole": lambda i: whole.correct(samples[i % len(samples)]),
        "tick": lambda i: cut.correct(ready[i % len(ready)]),
    } | ({"encode": encode} if cut.splits else {})
    row = {"runtime": "onnxruntime", "weights": cut.manifest.weights, "threads": threads}
    return [{**row, "part": part, **measure_ms(run, seconds)} for part, run in parts.items()]


def _torch_row(head: Head, samples: Sequence[HeadInput], threads: int, seconds: float) -> dict[str, object]:
    with _torch_threads(threads):
        timing = measure_ms(lambda i: torch_residual(head, samples[i % len(samples)]), seconds)
    return {"runtime": "torch", "weights": "float32", "threads": threads, "part": "whole", **timing}


def _policy_row(path: str | Path, threads: int, seconds: float, device: str, seed: int) -> dict[str, object]:
    rng = np.random.default_rng(seed)
    with _torch_threads(threads):
        policy = FlowPolicy(path, PolicyOptions(device=device))
        size = policy.image_size
        observation = {name: rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for name in policy.cameras}
        observation["state"] = rng.standard_normal(policy.state_dim).astype(np.float32)
        timing = measure_ms(lambda i: policy.predict(observation, "put the bowl on the plate", seed=i), seconds)
    return {"threads": threads, **timing}


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ratios(rows: Sequence[Mapping[str, object]], policies: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """How many corrections fit into one chunk inference, by the medians and with equal threads."""
    medians = {row["threads"]: row["p50_ms"] for row in policies}
    found: dict[tuple, dict[str, object]] = {}
    for row in rows:
        if row["runtime"] == "onnxruntime" and row["part"] in ("whole", "tick"):
            key = {name: row[name] for name in ("head", "weights", "threads")}
            entry = found.setdefault(tuple(key.values()), key)
            entry[row["part"]] = round(medians[row["threads"]] / row["p50_ms"], 1)
    return list(found.values())


if __name__ == "__main__":
    sys.exit(main())
