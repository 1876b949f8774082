"""Exports the heads of the timing benchmark and times them alone; ``timing`` runs this as a process.

``python -m a2c2_ros.benchmark.heads`` times more: other sizes, int8 weights, torch, a GPU.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from a2c2_ros.benchmark import arm
from a2c2_ros.benchmark.heads import measure_ms
from a2c2_ros.benchmark.load import policy_inference
from a2c2_ros.heads.base import load_head, make_random_head, manifest_of, save_head
from a2c2_ros.heads.export import export, save_graph
from a2c2_ros.heads.onnx_head import KEPT_PER_CAMERA, OnnxHead, read_graph
from a2c2_ros.heads.samples import random_samples

SAMPLES = KEPT_PER_CAMERA  # inputs to compare and time the heads on, all of which a head can have prepared
SECONDS = 1.0  # of one measurement


def export_heads(folder: Path, wanted: Sequence[tuple[str, int]]) -> None:
    """Write ``ARCHITECTURE.safetensors`` and ``ARCHITECTURE_STEP.onnx`` for every wanted architecture and step [ns].

    The step is in the manifest alone, so one export per architecture serves every control rate.
    """
    folder.mkdir(parents=True, exist_ok=True)
    profile = arm.read_profile()
    for architecture in sorted({name for name, _ in wanted}):
        steps_ns = [step_ns for name, step_ns in wanted if name == architecture]
        head = make_random_head(architecture, **arm.head_options(profile, architecture, steps_ns[0]))
        weights = arm.weights_file(folder, architecture)
        save_head(head, weights)
        head = load_head(weights)  # what the baseline loads, rounded by the file
        paths = [arm.head_file(folder, architecture, step_ns) for step_ns in steps_ns]
        manifest = export(head, random_samples(manifest_of(head), SAMPLES, arm.SEED), paths[0], force=True)
        for step_ns, path in zip(steps_ns[1:], paths[1:]):
            save_graph(read_graph(paths[0]), dataclasses.replace(manifest, step_ns=step_ns), path)


def head_times(folder: Path, wanted: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """Time the exported heads and the shipped policy, one after the other.

    Returns:
        "rows" (head, threads, part, p50_ms, p99_ms, runs), where part is "whole" (with its images) or "tick" (the
        images were prepared when they arrived); "policy" (threads, p50_ms, p99_ms, runs), the shipped flow policy.
    """
    rows = []
    for architecture, path in {name: arm.head_file(folder, name, step_ns) for name, step_ns in wanted}.items():
        threads = arm.THREADS[architecture]
        for part in ("whole", "tick"):
            head = OnnxHead(path, threads, threads, split=part == "tick")
            samples = random_samples(head.manifest, SAMPLES, arm.SEED)
            for sample in samples:
                for camera, image in sample.images.items():
                    head.prepare(camera, image, sample.language)
            timing = measure_ms(lambda i, head=head, samples=samples: head.correct(samples[i % SAMPLES]), SECONDS)
            rows.append({"head": architecture, "threads": threads, "part": part, **timing})
    return {"rows": rows, "policy": {"threads": 1, **measure_ms(policy_inference(), SECONDS)}}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m a2c2_ros.benchmark.prepare", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the heads and heads.json")
    parser.add_argument("--head-times", action="store_true", help="measure the heads alone, write heads.json")
    parser.add_argument("heads", nargs="*", metavar="ARCHITECTURE:STEP_NS", help="heads to export")
    args = parser.parse_args(argv)
    wanted = [(name, int(step_ns)) for name, step_ns in (text.rsplit(":", 1) for text in args.heads)]
    export_heads(args.out, wanted)
    if args.head_times:
        (args.out / "heads.json").write_text(json.dumps(head_times(args.out, wanted)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
