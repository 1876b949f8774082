"""What recording costs the control loop: the real controller at 100 Hz with two cameras, with and without a recorder.

``python -m a2c2_ros.benchmark.recording --out results/recording.json``. Cells with and without alternate, each is a
fresh start of real processes as in ``benchmark.timing``; docs/real_time.md says how the times are defined.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from a2c2_ros import provenance
from a2c2_ros.benchmark.load import READY
from a2c2_ros.benchmark.processes import Processes, cpu_time_s
from a2c2_ros.benchmark.report import OURS
from a2c2_ros.benchmark.timing import QUIET_CORES, START_TIMEOUT_S, Bench, Cell, prepare
from a2c2_ros.benchmark.trace import Trace, command_latencies_ms, period_errors_ms, summary
from a2c2_ros.core.errors import A2C2Error
from a2c2_ros.jobs import interrupt_on_termination
from a2c2_ros.markdown import table

RATE_HZ = 100
HEAD = "compact"  # sees both cameras
ROBOT = "bench_arm"
REPEATS = 5
DURATION_S = 10.0


def measure_recorded(
    bench: Bench, cell: Cell, policy_pid: int | None, folder: Path
) -> tuple[dict[str, Any], Trace, dict[str, Any]]:
    """Measure a cell while a recorder runs; also what the recorder did.

    Raises:
        A2C2Error: If a process failed or the bag is not whole.
    """
    from a2c2_ros.recording.reader import DamageReport, read_bag

    out = folder / "run"
    arguments = ["--ros-args", "-p", f"out:={out}", "-p", f"robot:={ROBOT}"]
    with Processes(folder, bench.environment) as processes:
        pid = processes.start("episode_recorder", "a2c2_ros.nodes.episode_recorder", arguments)
        processes.wait_for(lambda: "recording" in processes.log("episode_recorder"), "recorder", START_TIMEOUT_S)
        before_s = cpu_time_s(pid)
        result, trace = bench.measure(cell, policy_pid)
        processes.check()
        cpu_s = cpu_time_s(pid) - before_s
        processes.stop("episode_recorder")
    report = DamageReport()
    for _ in read_bag(out / "bag", report=report):
        pass
    if not report.intact or not report.messages.get("/control_step"):
        raise A2C2Error(f"the bag is not whole: {report}")
    content = yaml.safe_load((out / "bag" / "metadata.yaml").read_text(encoding="utf-8"))
    duration_s = content["rosbag2_bagfile_information"]["duration"]["nanoseconds"] / 1e9
    size = sum(file.stat().st_size for file in (out / "bag").glob("*.mcap"))
    recorder = {
        "duration_s": round(duration_s, 2),
        "bytes_per_s": round(size / duration_s),
        "messages_per_s": round(sum(report.messages.values()) / duration_s, 1),
        "messages": report.messages,
        "dropped": report.dropped,
        "cpu_share": round(cpu_s / duration_s, 3),
    }
    return result, trace, recorder


def run_cells(bench: Bench, loads: Sequence[str], repeats: int, folder: Path) -> list[dict[str, Any]]:
    """Every load with and without recording, ``repeats`` times in turn.

    Raises:
        A2C2Error: If a cell failed.
    """
    results = []
    with Processes(folder / "policy", bench.environment) as load, tqdm(total=2 * repeats * len(loads)) as bar:
        policy_pid = None
        for name in loads:
            if name == "loaded":
                policy_pid = load.start(
                    "policy", "a2c2_ros.benchmark.load", ["--out", str(folder / "policy.json"), "policy"]
                )
                load.wait_for(lambda: READY in load.log("policy").split(), "policy", START_TIMEOUT_S)
            cell = Cell(OURS, HEAD, RATE_HZ, name)
            traces: dict[bool, list[Trace]] = {False: [], True: []}
            cells: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
            recorders = []
            for repeat in range(repeats):
                for recorded in (False, True) if repeat % 2 == 0 else (True, False):
                    bar.set_postfix_str(f"{cell.name}, {'recorded' if recorded else 'not recorded'}")
                    if recorded:
                        result, trace, recorder = measure_recorded(bench, cell, policy_pid, folder / f"{name}_{repeat}")
                        recorders.append(recorder)
                    else:
                        result, trace = bench.measure(cell, policy_pid)
                    traces[recorded].append(trace)
                    cells[recorded].append(result)
                    bar.update()
            for recorded in (False, True):
                results.append(
                    pooled(cell, recorded, traces[recorded], cells[recorded])
                    | ({"recorder": recorders} if recorded else {})
                )
    return results


def pooled(cell: Cell, recorded: bool, traces: Sequence[Trace], cells: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All repeats of a cell as one, and each by itself; durations in ms."""
    return {
        "cell": cell.name,
        "recorded": recorded,
        "n": sum(map(len, traces)),
        "period_error_ms": summary(np.concatenate([np.abs(period_errors_ms(t, cell.period_ns)) for t in traces])),
        "command_latency_ms": summary(np.concatenate([command_latencies_ms(t) for t in traces])),
        "missed_ticks": sum(c["missed_ticks"] for c in cells),
        "images": [c["images"] for c in cells],
        "others_cores": [c["cores"]["others"] for c in cells],
        "period_error_p99_ms": [c["period_error_ms"]["p99"] for c in cells],
        "command_latency_p99_ms": [c["command_latency_ms"]["p99"] for c in cells],
    }


def lines(results: Sequence[dict[str, Any]]) -> str:
    """The results as a table in Markdown."""
    rows = []
    for r in results:
        period, latency = r["period_error_ms"], r["command_latency_ms"]
        recorder = ""
        if r["recorded"]:
            mb, cores = (np.mean([item[key] for item in r["recorder"]]) for key in ("bytes_per_s", "cpu_share"))
            lost = sum(sum(item["dropped"].values()) for item in r["recorder"])
            recorder = f"{mb / 1e6:.1f} MB/s, {cores:.2f} cores, {lost} messages lost"
        times = f"{period['p50']:.3f} / {period['p99']:.2f}", f"{latency['p50']:.2f} / {latency['p99']:.2f}"
        rows.append((r["cell"], "yes" if r["recorded"] else "no", *times, str(r["missed_ticks"]), recorder))
    errors = "period error p50 / p99 [ms]", "tick to command p50 / p99 [ms]"
    return table(("cell", "recorded", *errors, "missed", "recorder"), rows)


def run(args: argparse.Namespace, folder: Path) -> int:
    """Measure, print and write; returns the exit code."""
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder, args.duration_s)
    try:
        prepare(folder, [Cell(OURS, HEAD, RATE_HZ, "idle")], bench.environment, head_times=False)
        results = run_cells(bench, args.loads, args.repeats, folder)
    except KeyboardInterrupt:
        print("interrupted, nothing written", file=sys.stderr)
        return 130
    except A2C2Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        bench.close()
    record = {
        "benchmark": "recording",
        "repeats": args.repeats,
        "duration_s": args.duration_s,
        "wall_s": round(time.monotonic() - started, 1),
        "cells": results,
        "machine": provenance.machine(),
        "versions": provenance.versions(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{lines(results)}\n\n{record['wall_s']:.0f} s -> {args.out}")
    if any(cores > QUIET_CORES for result in results for cores in result["others_cores"] if not result["recorded"]):
        print(f"warning: other programs used more than {QUIET_CORES} cores", file=sys.stderr)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m a2c2_ros.benchmark.recording", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("results/recording.json"), help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"of each, with and without ({REPEATS})")
    parser.add_argument("--duration-s", type=float, default=DURATION_S, help=f"of a cell [s] ({DURATION_S:g})")
    parser.add_argument(
        "--loads", nargs="+", choices=("idle", "loaded"), default=["idle", "loaded"], help="loaded: beside the policy"
    )
    args = parser.parse_args(argv)
    interrupt_on_termination()
    with tempfile.TemporaryDirectory(prefix="a2c2_bench_") as folder:
        return run(args, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
