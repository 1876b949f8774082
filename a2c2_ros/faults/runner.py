"""Runs named faults and the campaign, and keeps what came out."""

import contextlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from statistics import median
from typing import Any

from a2c2_ros.core.errors import A2C2Error
from a2c2_ros.faults import core_scenarios  # noqa: F401, registers itself
from a2c2_ros.faults.base import GROUPS, OWN_PROCESS, SCENARIOS, Scenario, SkippedError, UnmetError
from a2c2_ros.faults.campaign import CampaignResult
from a2c2_ros.faults.monitor import Delay, Judge, Violation

SHOWN_VIOLATIONS = 3
SAVED_VIOLATIONS = 50


@dataclass
class Outcome:
    """What came of one named fault."""

    name: str
    where: str
    result: str  # "passed", "failed" or "skipped"
    detail: str = ""
    does: str = ""
    expects: str = ""
    ticks: int = 0
    unsafe_ticks: int = 0
    seconds: float = 0.0
    violations: list[Violation] = field(default_factory=list)
    holds: list[Delay] = field(default_factory=list)
    recoveries: list[Delay] = field(default_factory=list)
    holds_since_fault_ms: list[float] = field(default_factory=list)  # with the time to notice; named faults of nodes


def load_scenarios() -> None:
    """Register the scenarios with real nodes, if there is ROS."""
    if importlib.util.find_spec("rclpy") is not None:
        for module in ("arm_scenarios", "libero_scenarios", "clock_scenarios", "network_scenarios"):
            importlib.import_module(f"a2c2_ros.faults.{module}")


def run_scenarios(
    scenarios: Sequence[Scenario],
    folder: Path,
    begin: Callable[[Scenario], None],
    done: Callable[[Outcome], None],
    in_process: bool = False,
) -> list[Outcome]:
    """Run scenarios, those of a group together; a group in which one failed is started anew.

    Args:
        scenarios: What to run.
        folder: For profiles, heads and logs.
        begin: Called before each.
        done: Called after each.
        in_process: Run those here that need a process of their own.
    """
    outcomes: list[Outcome] = []
    for name in dict.fromkeys(s.group for s in scenarios):
        left = [s for s in scenarios if s.group == name]
        starts = 0
        while left:
            starts += 1
            group_folder = folder / f"{name.replace(' ', '_')}_{starts}"
            group_folder.mkdir(parents=True)
            before = len(left)
            run = _run_group_apart if name in OWN_PROCESS and not in_process else _run_group
            with contextlib.closing(run(left, group_folder, begin)) as new:
                for outcome in new:
                    outcomes.append(outcome)
                    done(outcome)
            assert len(left) < before, "a group makes progress"
    return outcomes


def _run_group_apart(left: list[Scenario], folder: Path, begin: Callable[[Scenario], None]) -> Iterator[Outcome]:
    """As :func:`_run_group`, by this tool in another process."""
    begin(left[0])
    file = folder / "faults.json"
    names = [scenario.name for scenario in left]
    command = [sys.executable, "-m", "a2c2_ros.faults", "--in-process", "--events", "0", "--only", *names]
    with (folder / "faults.log").open("w") as log:
        process = subprocess.Popen([*command, "--out", str(file), "--logs", str(folder)], stdout=log, stderr=log)
        try:
            process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    records = json.loads(file.read_text())["named_faults"] if file.exists() else []
    for record in records:
        yield outcome_of(record)
    for scenario in left[len(records) :]:
        yield _outcome(scenario, "failed", f"its process ended with {process.returncode}", time.monotonic())
    left.clear()


def _run_group(left: list[Scenario], folder: Path, begin: Callable[[Scenario], None]) -> Iterator[Outcome]:
    """Yield outcomes until one failed; what was run is taken off the list."""
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        begin(left[0])
        try:
            bench = stack.enter_context(GROUPS[left[0].group](folder))
        except (A2C2Error, SkippedError, AssertionError) as error:
            result = "skipped" if isinstance(error, SkippedError) else "failed"
            for scenario in left:
                yield _outcome(scenario, result, str(error), started)
            left.clear()
            return
        while left:
            scenario = left.pop(0)
            begin(scenario)
            outcome = _run_one(scenario, bench)
            yield outcome
            if outcome.result == "failed" and scenario.where == "dds":
                return


def _outcome(scenario: Scenario, result: str, detail: str, started: float) -> Outcome:
    return Outcome(
        scenario.name,
        scenario.where,
        result,
        detail,
        scenario.does,
        scenario.expects,
        seconds=round(time.monotonic() - started, 2),
    )


def _run_one(scenario: Scenario, bench: Any) -> Outcome:
    started = time.monotonic()
    is_node = scenario.where == "dds"
    result, detail = "passed", ""
    marks: dict[int, tuple[int, ...]] = {}
    try:
        if is_node:
            if not scenario.at_start:
                bench.ready()
            bench.begin()
            marks = {id(judge): _mark(judge) for judge in bench.judges}
            bench.world.tell_judge(lambda judge: setattr(judge, "faults", (scenario.name,)))
        else:
            bench.judges.clear()
        detail = scenario.run(bench) or ""
    except SkippedError as error:
        result, detail = "skipped", str(error)
    except (UnmetError, A2C2Error) as error:
        result, detail = "failed", str(error)
    if is_node:
        bench.settle()
    outcome = _outcome(scenario, result, detail, started)
    for judge in bench.judges:
        _add(outcome, judge, marks.get(id(judge), (0, 0, 0, 0, 0)))
    if is_node and bench.begun_ns is not None:
        outcome.holds_since_fault_ms = [
            (hold.ended_ns - bench.begun_ns) / 1e6 for hold in outcome.holds if hold.ended_ns > bench.begun_ns
        ][:1]
    if outcome.violations and outcome.result == "passed":
        outcome.result = "failed"
    if outcome.violations:
        shown = [f"{v.invariant}: {v.detail}" for v in outcome.violations[:SHOWN_VIOLATIONS]]
        outcome.detail = "; ".join([*filter(None, [outcome.detail]), f"{len(outcome.violations)} violations", *shown])
    return outcome


def _mark(judge: Judge) -> tuple[int, ...]:
    return len(judge.violations), len(judge.holds), len(judge.recoveries), judge.ticks, len(judge.unsafe_ticks)


def _add(outcome: Outcome, judge: Judge, mark: tuple[int, ...]) -> None:
    violations, holds, recoveries, ticks, unsafe = mark
    outcome.violations += judge.violations[violations:]
    outcome.holds += judge.holds[holds:]
    outcome.recoveries += judge.recoveries[recoveries:]
    outcome.ticks += judge.ticks - ticks
    outcome.unsafe_ticks += len(judge.unsafe_ticks) - unsafe


def summary(values: Sequence[float]) -> dict[str, float | int | None]:
    """Number, median and worst."""
    return {
        "n": len(values),
        "median": round(median(values), 2) if values else None,
        "worst": round(max(values), 2) if values else None,
    }


def delays(items: Sequence[Delay]) -> dict[str, Any]:
    """Summary of delays in ticks and ms."""
    return {"ticks": summary([d.ticks for d in items]), "ms": summary([d.ms for d in items])}


def outcome_record(outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON."""
    record = {k: getattr(outcome, k) for k in ("name", "where", "result", "detail", "does", "expects", "seconds")}
    return record | {
        "ticks": outcome.ticks,
        "unsafe_commands": outcome.unsafe_ticks,
        "time_to_hold": delays(outcome.holds),
        "time_to_hold_since_fault_ms": summary(outcome.holds_since_fault_ms),
        "time_to_recover": delays(outcome.recoveries),
        "holds": [asdict(d) for d in outcome.holds],
        "recoveries": [asdict(d) for d in outcome.recoveries],
        "holds_since_fault_ms": outcome.holds_since_fault_ms,
        "violations": [asdict(v) for v in outcome.violations[:SAVED_VIOLATIONS]],
    }


def outcome_of(record: Mapping[str, Any]) -> Outcome:
    """The outcome of a record."""
    plain = ("name", "where", "result", "detail", "does", "expects", "seconds", "ticks", "holds_since_fault_ms")
    return Outcome(
        **{key: record[key] for key in plain},
        unsafe_ticks=record["unsafe_commands"],
        violations=[Violation(**v) for v in record["violations"]],
        holds=[Delay(**d) for d in record["holds"]],
        recoveries=[Delay(**d) for d in record["recoveries"]],
    )


def campaign_record(result: CampaignResult, seed: int, seconds: float) -> dict[str, Any]:
    """A campaign as JSON; the worst delays by the fault that was under way."""
    by_fault = {
        name: {
            "events": n,
            "time_to_hold_ticks": summary([d.ticks for d in result.holds if name in d.faults]),
            "time_to_recover_ms": summary([d.ms for d in result.recoveries if name in d.faults]),
        }
        for name, n in sorted(result.events.items())
    }
    return {
        "seed": seed,
        "events": result.events.total(),
        "episodes": result.episodes,
        "ticks": result.ticks,
        "simulated_s": round(result.simulated_s, 1),
        "seconds": round(seconds, 1),
        "unsafe_commands": result.unsafe_ticks,
        "violations": [asdict(v) for v in result.violations[:SAVED_VIOLATIONS]],
        "time_to_hold": delays(result.holds),
        "time_to_recover": delays(result.recoveries),
        "faults": by_fault,
    }


def select(patterns: Sequence[str] | None) -> list[Scenario]:
    """The scenarios whose name or group matches one of the patterns, in their order; all without patterns."""
    if not patterns:
        return list(SCENARIOS.values())
    return [s for s in SCENARIOS.values() if any(fnmatch(s.name, p) or fnmatch(s.group, p) for p in patterns)]
