"""How exactly the control loop keeps time: this package beside the straightforward way to write it, in one run.

``python -m a2c2_ros.benchmark.timing --out results/bench.json`` (or ``make bench``). Every cell starts the real node
and what surrounds it as processes on a DDS domain of their own; docs/real_time.md says how each number is defined.
"""

import argparse
import fnmatch
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from a2c2_ros import provenance
from a2c2_ros.benchmark import arm
from a2c2_ros.benchmark.load import READY
from a2c2_ros.benchmark.processes import CpuUse, Processes, fifo_threads
from a2c2_ros.benchmark.report import (
    BASELINE,
    BASELINE_SINGLE,
    HEADS,
    OURS,
    OURS_NORMAL,
    add_ratios,
    evaluate_targets,
    floor_lines,
    page_tables,
    plot,
    table,
    targets_table,
)
from a2c2_ros.benchmark.trace import (
    Trace,
    absent,
    command_ages_ms,
    command_latencies_ms,
    lost,
    missed_ticks,
    period_errors_ms,
    summary,
)
from a2c2_ros.bringup import DOMAINS
from a2c2_ros.commands import command
from a2c2_ros.core.errors import A2C2Error, ConfigError
from a2c2_ros.jobs import interrupt_on_termination

FULL_OUT, PART_OUT = Path("results/bench.json"), Path("runs/bench.json")
RATES_HZ = (50, 100, 250)
BASELINE_EXECUTORS = {BASELINE: "multi", BASELINE_SINGLE: "single"}
PRIORITY = {OURS: 50, OURS_NORMAL: 0}
PLOT_RATE_HZ, PLOT_HEAD = 100, "compact"
START_TIMEOUT_S = 60.0
STALL_S = 5.0  # after the start
PREPARE_TIMEOUT_S = 180.0
SETTLE_S = 1.0  # dropped at the start of a cell
DURATION_S = {OURS: 6.0, OURS_NORMAL: 6.0, BASELINE: 3.0, BASELINE_SINGLE: 3.0}
QUICK_DURATION_S = 2.0
QUIET_CORES = 0.2  # what else the machine may do without a warning
LAST_IMAGES_NS = 100_000_000  # an image this young at the end of a cell may be on its way


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    loop: str  # OURS, OURS_NORMAL, BASELINE or BASELINE_SINGLE
    head: str  # an architecture, or "none": correction off
    rate_hz: int
    load: str  # "idle" or "loaded": the policy runs without a pause, and the loop gets both cameras in any case

    @property
    def name(self) -> str:
        """As ``--cells`` takes it."""
        return f"{self.loop}/{self.head}/{self.rate_hz}hz/{self.load}"

    @property
    def cameras(self) -> bool:
        """Whether the loop subscribes to the cameras."""
        return self.load == "loaded" or arm.IMAGE_SIZES[self.head] is not None

    @property
    def period_ns(self) -> int:
        """Control period [ns]."""
        return round(1e9 / self.rate_hz)


def full_plan() -> list[Cell]:
    """Every cell; the idle ones first, because the policy starts once."""
    cells = []
    for load in ("idle", "loaded"):
        for rate_hz in RATES_HZ:
            cells += [Cell(OURS, head, rate_hz, load) for head in HEADS]
            # A head of several milliseconds in a callback stalls at every rate: one is enough to see it.
            heads = [head for head in HEADS[1:] if head != "transformer" or rate_hz == 100]
            cells += [Cell(BASELINE, head, rate_hz, load) for head in heads]
        cells += [Cell(BASELINE_SINGLE, head, 100, load) for head in ("mlp", "compact")]
        cells.append(Cell(OURS_NORMAL, "mlp", 100, load))
    return cells


def quick_plan() -> list[Cell]:
    """A few cells that together use every part."""
    return [
        Cell(OURS, "none", 100, "idle"),
        Cell(OURS, "mlp", 100, "idle"),
        Cell(BASELINE, "mlp", 100, "idle"),
        Cell(OURS, "compact", 100, "loaded"),
        Cell(BASELINE, "compact", 100, "loaded"),
    ]


class Bench:
    """Measures cells on one DDS domain.

    Args:
        folder: For heads, profiles, logs and records.
        duration_s: Measured part of a cell [s]; None takes ``DURATION_S``.
    """

    def __init__(self, folder: Path, duration_s: float | None) -> None:
        from a2c2_ros.benchmark.recorder import Recorder

        self._folder = folder
        self._duration_s = duration_s
        self.domain_id = random.SystemRandom().choice(DOMAINS)
        self.environment = os.environ | {
            "ROS_DOMAIN_ID": str(self.domain_id),
            "ROS_AUTOMATIC_DISCOVERY_RANGE": "LOCALHOST",
        }
        os.environ.update(self.environment)
        self._recorder = Recorder(self.domain_id)

    def close(self) -> None:
        """Leave the domain."""
        self._recorder.close()

    def measure(self, cell: Cell, policy_pid: int | None) -> tuple[dict[str, Any], Trace]:
        """Run one cell.

        Raises:
            A2C2Error: If a process failed, or the loop did not do what the cell is about.
        """
        folder = self._folder / cell.name.replace("/", "_")
        recorder = self._recorder
        recorder.drain()
        recorder.clear()
        with Processes(folder, self.environment) as processes:
            pid = self._start_loop(processes, cell, folder)
            arguments = ["--out", str(folder / "robot.json"), "robot", "--rate-hz", str(cell.rate_hz)]
            robot_pid = processes.start("robot", "a2c2_ros.benchmark.load", arguments + ["--cameras"] * cell.cameras)
            self._wait_for_command(processes, cell)
            self._spin(SETTLE_S)
            pids = {"loop": pid, "robot": robot_pid, "recorder": os.getpid()} | (
                {"policy": policy_pid} if policy_pid else {}
            )
            begin_ns, cpu = time.time_ns(), CpuUse(pids)
            self._spin(self._duration_s or DURATION_S[cell.loop])
            processes.check()
            end_ns, cores, fifo = time.time_ns(), cpu.cores(), fifo_threads(pid)
            self._spin(LAST_IMAGES_NS / 1e9)
            for name in ("loop", "robot"):
                processes.stop(name)
        images_ns = json.loads((folder / "robot.json").read_text())["images_ns"]
        if cell.loop in BASELINE_EXECUTORS:
            record = json.loads((folder / "loop.json").read_text())
            trace = trace_of_record(record)
            images = images_of_record(record, trace, images_ns, begin_ns, end_ns)
        else:
            trace = self._recorded_trace(cell)
            images = self._recorded_images(trace, images_ns, begin_ns, end_ns)
        trace = trace.between(begin_ns, end_ns)
        if not len(trace) and cell.loop in PRIORITY:
            raise A2C2Error("no tick within the cell")
        result = {"cell": cell.name, **vars(cell), "window_s": round((end_ns - begin_ns) / 1e9, 3)}
        result |= numbers(trace, cell.period_ns, list(images_ns), begin_ns, end_ns)
        result |= {"cpu_share": cores["loop"], "cores": cores, "fifo_threads": fifo, "images": images}
        return result | {"window_ns": [begin_ns, end_ns]}, trace

    def floor(self, load: str) -> dict[str, Any]:
        """What the machine gives to a thread that only sleeps, see ``benchmark.floor``.

        Raises:
            A2C2Error: If it failed.
        """
        out = self._folder / f"floor_{load}.json"
        with Processes(self._folder / f"floor_{load}", self.environment) as processes:
            processes.start("floor", "a2c2_ros.benchmark.floor", ["--out", str(out)])
            processes.wait_end("floor", START_TIMEOUT_S)
        return json.loads(out.read_text())

    def _wait_for_command(self, processes: Processes, cell: Cell) -> None:
        """A baseline that stalls (docs/real_time.md) is measured as it is: its waiting would only cost time."""
        recorder, give_up_s = self._recorder, None

        def ready() -> bool:
            nonlocal give_up_s
            if give_up_s is None and cell.loop in BASELINE_EXECUTORS and READY in processes.log("loop"):
                give_up_s = time.monotonic() + STALL_S
            return recorder.commands > 0 or (give_up_s is not None and time.monotonic() > give_up_s)

        processes.wait_for(ready, "command", START_TIMEOUT_S, recorder.spin)

    def _start_loop(self, processes: Processes, cell: Cell, folder: Path) -> int:
        if cell.loop in BASELINE_EXECUTORS:
            arguments = ["--head", str(arm.weights_file(self._folder, cell.head)), "--rate-hz", str(cell.rate_hz)]
            arguments += ["--executor", BASELINE_EXECUTORS[cell.loop], *["--cameras"] * cell.cameras]
            arguments += ["--out", str(folder / "loop.json")]
            return processes.start("loop", "a2c2_ros.benchmark.baseline", arguments)
        profile = folder / "robot.yaml"
        arm.write_profile(profile, cameras=cell.cameras, image_size=arm.IMAGE_SIZES[cell.head])
        parameters = {
            "robot": profile,
            "control_rate_hz": float(cell.rate_hz),
            "realtime.priority": PRIORITY[cell.loop],
            "correction.enabled": str(cell.head != "none").lower(),
            "correction.model_path": "''",
        }
        if cell.head != "none":
            parameters["correction.model_path"] = arm.head_file(self._folder, cell.head, cell.period_ns)
            parameters["correction.threads"] = arm.THREADS[cell.head]
        arguments = [part for name, value in parameters.items() for part in ("-p", f"{name}:={value}")]
        return processes.start("loop", "a2c2_ros.nodes.correction_controller", ["--ros-args", *arguments])

    def _spin(self, duration_s: float) -> None:
        end = time.monotonic() + duration_s
        while (left := end - time.monotonic()) > 0:
            self._recorder.spin(min(left, 0.05))

    def _recorded_trace(self, cell: Cell) -> Trace:
        from a2c2_ros.benchmark.recorder import trace_of_steps

        steps = self._recorder.steps()
        if not steps:
            raise A2C2Error(f"{cell.name}: no control step was recorded")
        return trace_of_steps(steps)

    def _recorded_images(
        self, trace: Trace, images_ns: Mapping[str, list[int]], begin_ns: int, end_ns: int
    ) -> dict[str, int] | None:
        total = Counter()
        for camera, stamps in images_ns.items():
            reports = [(t, n) for t, n in self._recorder.received(camera) if begin_ns <= t <= end_ns]
            counted = lost(np.array(stamps), reports, trace.stamps_ns[camera])
            if counted is None:
                return None
            total.update(counted)
        return dict(total) or None


def trace_of_record(record: Mapping[str, Any]) -> Trace:
    """The ticks of the baseline's file."""

    def column(read: Callable[[Mapping[str, Any]], int]) -> np.ndarray:
        return np.array([read(tick) for tick in record["ticks"]], np.int64)

    columns = ("scheduled_ns", "started_ns", "commanded_ns", "head_ns")
    return Trace(
        **{name: column(lambda tick, name=name: tick[name]) for name in columns},
        states=np.full(len(record["ticks"]), "RUNNING"),
        stamps_ns={s: column(lambda tick, i=i: tick["stamps_ns"][i]) for i, s in enumerate(record["streams"])},
    )


def images_of_record(
    record: Mapping[str, Any], trace: Trace, images_ns: Mapping[str, list[int]], begin_ns: int, end_ns: int
) -> dict[str, int] | None:
    """As :func:`lost`, for images that were published in a window, exactly: the baseline's file has every stamp."""
    total = Counter()
    for camera, stamps in images_ns.items():
        sent = np.array([t for t in stamps if begin_ns <= t < end_ns - LAST_IMAGES_NS])
        lost_images = absent(sent, np.array(record["taken_ns"][camera]))
        total.update(published=len(sent), lost=lost_images, unused=absent(sent, trace.stamps_ns[camera]))
    return dict(total) or None


def numbers(trace: Trace, period_ns: int, cameras: Sequence[str], begin_ns: int, end_ns: int) -> dict[str, Any]:
    """What the result file says of the ticks in [begin, end); durations in ms."""
    missed = missed_ticks(trace, period_ns, begin_ns, end_ns)
    heads_ms = trace.head_ns[trace.head_ns > 0] / 1e6
    return {
        "n": len(trace),
        "states": {str(state): int(n) for state, n in Counter(trace.states.tolist()).items()},
        "period_error_ms": summary(np.abs(period_errors_ms(trace, period_ns))),
        "missed_ticks": missed,
        "missed_share": round(missed / (missed + len(trace)), 5),
        "start_lateness_ms": summary((trace.started_ns - trace.scheduled_ns) / 1e6),
        "command_latency_ms": summary(command_latencies_ms(trace)),
        "joint_age_ms": summary(command_ages_ms(trace, ["joint_position"])),
        "camera_age_ms": summary(command_ages_ms(trace, cameras)) if cameras else None,
        "head_ms": summary(heads_ms),
    }


def run_cells(
    bench: Bench, cells: Sequence[Cell], folder: Path
) -> tuple[list[dict[str, Any]], dict[Cell, Trace], dict[str, dict[str, Any]]]:
    """Measure the cells in order; the policy runs from the first loaded cell on. A cell that fails says why.

    Returns:
        The results, the ticks, and per load what the machine itself gives.
    """
    results, traces, floor = [], {}, {}
    with Processes(folder / "policy", bench.environment) as load, tqdm(total=len(cells), unit="cell") as bar:
        policy_pid = None
        for cell in cells:
            bar.set_postfix_str(cell.name)
            if cell.load == "loaded" and policy_pid is None:
                arguments = ["--out", str(folder / "policy.json"), "policy"]
                policy_pid = load.start("policy", "a2c2_ros.benchmark.load", arguments)
                load.wait_for(lambda: READY in load.log("policy").split(), "policy", START_TIMEOUT_S)
            try:
                if policy_pid:
                    load.check()
                if cell.load not in floor:
                    floor[cell.load] = bench.floor(cell.load)
                result, traces[cell] = _measure(bench, cell, policy_pid)
            except A2C2Error as error:
                tqdm.write(f"{cell.name} failed: {error}")
                result = {"cell": cell.name, **vars(cell), "error": str(error)}
            results.append(result)
            bar.update()
        if policy_pid:
            load.stop("policy")
            ended_ns = np.array(json.loads((folder / "policy.json").read_text())["ended_ns"])
        for result in (r for r in results if "error" not in r):
            begin_ns, end_ns = result.pop("window_ns")
            if result["load"] == "loaded":
                result["policy_inferences"] = int(((ended_ns >= begin_ns) & (ended_ns < end_ns)).sum())
    return results, traces, floor


def _measure(bench: Bench, cell: Cell, policy_pid: int | None) -> tuple[dict[str, Any], Trace]:
    """Run a cell; a baseline that fails, whose executor is not ours, runs once more; its result says so."""
    try:
        return bench.measure(cell, policy_pid)
    except A2C2Error as error:
        if cell.loop not in BASELINE_EXECUTORS:
            raise
        tqdm.write(f"{cell.name} failed, once more: {error}")
        result, trace = bench.measure(cell, policy_pid)
        return result | {"failed_before": str(error).splitlines()[0]}, trace


def draw(path: Path, traces: Mapping[Cell, Trace]) -> None:
    """The figure of the compact head at 100 Hz, of what was measured of it."""
    errors = {}
    for cell, trace in traces.items():
        if (cell.head, cell.rate_hz) == (PLOT_HEAD, PLOT_RATE_HZ) and len(trace) > 1:
            times_s = (trace.started_ns[1:] - trace.started_ns[0]) / 1e9
            errors[cell.loop, cell.load] = (times_s, period_errors_ms(trace, cell.period_ns))
    if errors:
        plot(path, errors, f"control loop at {PLOT_RATE_HZ} Hz with the {PLOT_HEAD} head and two cameras")


def prepare(folder: Path, cells: Sequence[Cell], environment: Mapping[str, str], *, head_times: bool) -> dict | None:
    """Export the heads of the cells in a process of its own, so that torch is not loaded here; their times, if wanted.

    Raises:
        A2C2Error: If that process failed.
    """
    periods = sorted({(cell.head, cell.period_ns) for cell in cells if cell.head != "none"})
    arguments = ["--out", str(folder), *(f"{head}:{period}" for head, period in periods)]
    with Processes(folder / "prepare", environment) as processes:
        processes.start("prepare", "a2c2_ros.benchmark.prepare", arguments + ["--head-times"] * head_times)
        processes.wait_end("prepare", PREPARE_TIMEOUT_S)
    return json.loads((folder / "heads.json").read_text()) if head_times else None


def text(record: Mapping[str, Any]) -> str:
    """The numbers of a result file as plain text."""
    return "\n\n".join((table(record["cells"]), floor_lines(record["floor"]), targets_table(record["targets"])))


def show(path: Path) -> None:
    """Print a result file, also as the documentation's tables.

    Raises:
        ConfigError: If it is none.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("benchmark") != "timing":
            raise ValueError(f"benchmark is {record.get('benchmark')!r}, not 'timing'")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} is not a result of this benchmark: {error}") from error
    print(f"{text(record)}\n\n{page_tables(record)}")


def run(args: argparse.Namespace, cells: Sequence[Cell], folder: Path) -> int:
    """Measure, print and write; returns the exit code."""
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(folder, QUICK_DURATION_S if args.quick and args.duration_s is None else args.duration_s)
    full = list(cells) == full_plan()
    try:
        heads = prepare(folder, cells, bench.environment, head_times=full)
        results, traces, floor = run_cells(bench, cells, folder)
    except KeyboardInterrupt:
        print("interrupted, nothing written", file=sys.stderr)
        return 130
    except A2C2Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        bench.close()
    add_ratios(results)
    wall_s = round(time.monotonic() - started, 1)
    targets = evaluate_targets(results, heads, wall_s if full else None)
    record = {
        "benchmark": "timing",
        "full": full,
        "wall_s": wall_s,
        "seed": arm.SEED,
        "targets": targets,
        "heads": heads,
        "floor": floor,
        "cells": results,
        "machine": provenance.machine(),
        "versions": provenance.versions(),
    }
    out = args.out or (FULL_OUT if full else PART_OUT)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(out.with_suffix(".png"), traces)
    print(f"{text(record)}\n\n{wall_s:.0f} s -> {out}")
    noisy = [r["cell"] for r in results if "error" not in r and r["cores"]["others"] > QUIET_CORES]
    if noisy:
        print(f"warning: other programs used more than {QUIET_CORES} cores during {noisy}", file=sys.stderr)
    return int(any("error" in result for result in results))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="python -m a2c2_ros.benchmark.timing", description=__doc__)
    p.add_argument(
        "--out", type=Path, help=f"JSON file, the figure goes beside it; without it {FULL_OUT}, of a part {PART_OUT}"
    )
    p.add_argument("--show", type=Path, metavar="FILE", help="print this result again, also as Markdown; runs nothing")
    p.add_argument("--cells", nargs="+", metavar="PATTERN", help="only these, e.g. 'ours/mlp/*' '*/100hz/loaded'")
    p.add_argument("--duration-s", type=float, help="measured part of a cell [s]; without it 6, baselines 3")
    p.add_argument("--quick", action="store_true", help="five cells of 2 s, no head times: to see that it works")
    p.add_argument("--logs", type=Path, help="keep heads, profiles, logs and records in this folder")
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 if a cell failed, 2 for wrong arguments."""
    args = parser().parse_args(argv)
    if args.show:
        show(args.show)
        return 0
    cells = quick_plan() if args.quick else full_plan()
    if args.cells:
        cells = [cell for cell in cells if any(fnmatch.fnmatch(cell.name, pattern) for pattern in args.cells)]
    if not cells:
        print(f"error: --cells {args.cells} matches none of {[c.name for c in full_plan()]}", file=sys.stderr)
        return 2
    interrupt_on_termination()
    if args.logs:
        return run(args, cells, args.logs.resolve())
    with tempfile.TemporaryDirectory(prefix="a2c2_bench_") as folder:
        return run(args, cells, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
