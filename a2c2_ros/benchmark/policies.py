"""How long a chunk of a policy takes beside one correction of its head, and what a policy server adds.

``python -m a2c2_ros.benchmark.policies --out results/policies.json``: the shipped flow policy in the process, the same
behind ``policies.server`` on this machine, and SmolVLA with random weights, whose time does not depend on them. The
heads are compact ones of the policy's sizes.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from a2c2_ros import provenance
from a2c2_ros.benchmark.heads import measure_ms
from a2c2_ros.benchmark.processes import Processes
from a2c2_ros.commands import command
from a2c2_ros.drivers.profile import Profile, load_profile
from a2c2_ros.heads.base import make_random_head, manifest_of
from a2c2_ros.heads.export import export
from a2c2_ros.heads.onnx_head import OnnxHead
from a2c2_ros.heads.samples import random_samples
from a2c2_ros.markdown import table
from a2c2_ros.policies.base import ChunkPolicy
from a2c2_ros.policies.registry import load_policy, load_policy_for

INSTRUCTION = "pick up the black bowl and place it on the plate"
STEP_NS = 50_000_000
ADDRESS = re.compile(r"(ws://\S+)\n")  # a line that is complete
START_TIMEOUT_S = 120.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True, help="JSON file of the result")
    p.add_argument("--smolvla", default="full", help="size of SmolVLA, see training.smolvla (default full)")
    p.add_argument("--threads", type=int, default=1, help="CPU threads of policies and heads (default 1)")
    p.add_argument("--seconds", type=float, default=10.0, help="of one measurement, at least 20 chunks (default 10)")
    p.add_argument("--device", default="cpu", help="torch device of the policies; heads run on the CPU (default cpu)")
    p.add_argument("--dtype", default="float32", help="arithmetic of SmolVLA (default float32)")
    return p


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = parser().parse_args(argv)
    result = compare(**{name: value for name, value in vars(arguments).items() if name != "out"})
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(markdown(result))


def compare(smolvla: str, threads: int, seconds: float, device: str, dtype: str) -> dict[str, Any]:
    """Measure; see the module.

    Args:
        smolvla: Size of SmolVLA.
        threads: CPU threads of policies and heads.
        seconds: Duration of one measurement [s].
        device: Torch device of the policies.
        dtype: Arithmetic of SmolVLA.

    Returns:
        JSON-like: ``rows`` with times of chunk, server, transport and head [ms], and chunk over head.
    """
    from a2c2_ros.training.smolvla import save_random

    profile = load_profile("libero")
    local = load_policy_for(profile, "flow", "flow_libero_spatial", device=device, threads=threads)
    rows = [row("flow", local, profile, threads, seconds)]
    with served(threads, device) as address:
        rows.append(row("flow, server on this machine", load_policy("remote", address), profile, threads, seconds))
    with tempfile.TemporaryDirectory() as folder:
        path = save_random(Path(folder) / "policy", smolvla, profile.robot, local.image_size)
        policy = load_policy_for(profile, "lerobot", path, device=device, dtype=dtype, threads=threads)
        rows.append(row(f"SmolVLA {smolvla}, {dtype}", policy, profile, threads, seconds))
    machine = provenance.machine() | ({"gpu": torch.cuda.get_device_name(device)} if "cuda" in device else {})
    settings = {"smolvla": smolvla, "threads": threads, "seconds": seconds, "device": device, "dtype": dtype}
    return {"rows": rows, "settings": settings, "machine": machine, "versions": provenance.versions()}


def row(name: str, policy: ChunkPolicy, profile: Profile, threads: int, seconds: float) -> dict[str, Any]:
    """Times of a policy and of a head of its sizes."""
    rng = np.random.default_rng(0)
    side = policy.image_size
    observation = {camera: rng.integers(0, 256, (side, side, 3), np.uint8) for camera in policy.cameras}
    observation["state"] = rng.standard_normal(policy.state_dim).astype(np.float32)
    inference_ns: list[int | None] = []

    def infer(i: int) -> None:
        inference_ns.append(policy.predict(observation, INSTRUCTION, seed=i).inference_ns)

    chunk = measure_ms(infer, seconds)
    result = {"policy": name, "chunk": chunk, "latent": policy.latent_dim, "language": policy.language_dim}
    if None not in inference_ns:
        server = np.array(inference_ns[-chunk["runs"] :]) / 1e6
        result["server_p50_ms"] = round(float(np.median(server)), 3)
        result["transport_p50_ms"] = round(chunk["p50_ms"] - result["server_p50_ms"], 3)
    result["head"] = head_times(policy, profile, threads, seconds)
    result["chunk_per_head"] = round(chunk["p50_ms"] / result["head"]["p50_ms"], 1)
    return result


def head_times(policy: ChunkPolicy, profile: Profile, threads: int, seconds: float) -> dict[str, Any]:
    """Times of one correction with a compact head of the policy's sizes, its images encoded in the call."""
    head = make_random_head(
        "compact",
        cameras=policy.cameras,
        image_size=policy.image_size,
        state_names=profile.robot.state_names,
        action_names=policy.action_names,
        action_space="osc_pose_delta",
        horizon=policy.horizon,
        step_ns=STEP_NS,
        latent_dim=policy.latent_dim,
        language_dim=policy.language_dim,
        seed=0,
        policy_id="random",
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "head.onnx"
        export(head, random_samples(manifest_of(head), 2), path)
        runner = OnnxHead(path, threads, threads)
        sample = random_samples(runner.manifest, 1)[0]
        return measure_ms(lambda _: runner.correct(sample), min(seconds, 2.0))


@contextmanager
def served(threads: int, device: str) -> Iterator[str]:
    """Address of a server of the shipped policy in another process.

    Raises:
        A2C2Error: If it does not start.
    """
    arguments = ["--policy-path", "flow_libero_spatial", "--port", "0", "--threads", str(threads), "--device", device]
    with tempfile.TemporaryDirectory() as folder, Processes(Path(folder), os.environ) as processes:
        processes.start("server", "a2c2_ros.policies.server", arguments)
        processes.wait_for(lambda: ADDRESS.search(processes.log("server")) is not None, "address", START_TIMEOUT_S)
        yield ADDRESS.search(processes.log("server"))[1]


def markdown(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    rows = []
    for found in result["rows"]:
        chunk, head, transport = found["chunk"], found["head"], str(found.get("transport_p50_ms", ""))
        times = f"{chunk['p50_ms']:.4g} / {chunk['p99_ms']:.4g}", f"{head['p50_ms']:.3g} / {head['p99_ms']:.3g}"
        rows.append((found["policy"], times[0], transport, times[1], f"{found['chunk_per_head']:g}"))
    heading = ("policy", "chunk p50/p99 [ms]", "transport p50", "head p50/p99 [ms]", "chunk/head")
    return table(heading, rows)


if __name__ == "__main__":
    sys.exit(main())
