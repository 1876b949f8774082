"""From the cells of the timing benchmark to ratios, targets, a table and a figure."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from a2c2_ros import markdown

OURS, OURS_NORMAL, BASELINE, BASELINE_SINGLE = "ours", "ours-normal", "baseline", "baseline-single"
LABELS = {
    OURS: "a2c2_ros",
    OURS_NORMAL: "a2c2_ros, priority 0",
    BASELINE: "baseline",
    BASELINE_SINGLE: "baseline, one thread",
}
OVER_OURS = {BASELINE: "baseline_over_ours", BASELINE_SINGLE: "baseline_single_over_ours"}
HEADS = ("none", "mlp", "compact", "transformer")
"""Architectures; none: the correction is off."""
PAGE_RATE_HZ = 100
"""Control rate of the table in the documentation."""
STALLED_SHARE = 0.5
"""A loop that missed more of its ticks than this is called stalled: its durations are of the few that ran."""
CORRECTED, HELD = "RUNNING", "HOLDING"
RATIOS = ("period_error_ms", "command_latency_ms", "joint_age_ms", "camera_age_ms", "head_ms")

Cell = Mapping[str, Any]


def find(cells: Sequence[Cell], loop: str, head: str, rate_hz: float, load: str) -> Cell | None:
    """The cell with these settings, or None if it was not run or failed."""
    wanted = {"loop": loop, "head": head, "rate_hz": rate_hz, "load": load}
    return next((c for c in cells if "error" not in c and all(c[k] == v for k, v in wanted.items())), None)


def ratios(cell: Cell, baseline: Cell) -> dict[str, float]:
    """Baseline divided by ours for p50 and p99 of every duration that both have; above 1, ours is better."""
    found = {}
    for quantity in RATIOS:
        ours, theirs = cell[quantity], baseline[quantity]
        if ours and theirs:
            found |= {f"{quantity}.{q}": round(theirs[q] / ours[q], 2) for q in ("p50", "p99") if ours[q] > 0}
    return found


def add_ratios(cells: Sequence[dict[str, Any]]) -> None:
    """Write the ratios to each baseline (``OVER_OURS``) into every cell of ours that has its counterpart."""
    for cell in cells:
        for baseline, key in OVER_OURS.items():
            other = find(cells, baseline, cell["head"], cell["rate_hz"], cell["load"])
            if cell["loop"] not in OVER_OURS and "error" not in cell and other is not None:
                cell[key] = ratios(cell, other)


def evaluate_targets(
    cells: Sequence[Cell], heads: Mapping[str, Any] | None, wall_s: float | None
) -> list[dict[str, Any]]:
    """Compare with what the package promises on two CPU cores.

    Args:
        cells: Cells with ratios.
        heads: Of ``prepare.head_times``; None if they were not measured.
        wall_s: Duration of a full run [s]; None if only a part was run.

    Returns:
        One entry per target: what, limit, the worst measured value and where, and whether it is met (None: not
        measured).
    """
    ours = [c for c in cells if c["loop"] == OURS and "error" not in c]
    targets = []

    def check(what: str, limit: float, values: Mapping[str, float | None], *, at_least: bool = False) -> None:
        measured = {k: v for k, v in values.items() if v is not None}
        entry: dict[str, Any] = {"what": what, "limit": limit, "value": None, "where": None, "met": None}
        if measured:
            entry["where"] = (min if at_least else max)(measured, key=measured.__getitem__)
            entry["value"] = value = measured[entry["where"]]
            entry["met"] = value >= limit if at_least else value <= limit
        targets.append(entry)

    def of(pick: Callable[[Cell], float | None], **where: Any) -> dict[str, float | None]:
        return {c["cell"]: pick(c) for c in ours if all(c[k] == v for k, v in where.items())}

    def quantile(name: str, q: str) -> Callable[[Cell], float | None]:
        return lambda c: c[name][q] if c[name] else None

    for load, limit in (("idle", 0.5), ("loaded", 1.5)):
        at = {"rate_hz": 100, "load": load}
        check(f"period error p99 at 100 Hz, {load} [ms]", limit, of(quantile("period_error_ms", "p99"), **at))
        check(
            f"baseline's period error p99 over ours at 100 Hz, {load}",
            5.0,
            of(lambda c: c.get("baseline_over_ours", {}).get("period_error_ms.p99"), **at),
            at_least=True,
        )
    check("images lost by the controller at 30 Hz", 0, of(lambda c: c["images"] and c["images"]["lost"]))
    check(
        "tick to command without the head, p50, idle [ms]",
        0.3,
        of(quantile("command_latency_ms", "p50"), head="none", load="idle"),
    )
    rows = {(row["head"], row["part"]): row for row in heads["rows"]} if heads else {}
    for what, key, q, limit in (
        ("mlp head alone on one core, p99 [ms]", ("mlp", "whole"), "p99_ms", 0.15),
        ("compact head alone with its images on one core, p99 [ms]", ("compact", "whole"), "p99_ms", 3.0),
        ("transformer head alone in the tick on two cores, p50 [ms]", ("transformer", "tick"), "p50_ms", 9.0),
    ):
        check(what, limit, {"/".join(key): rows[key][q] if key in rows else None})
    inference_ms = heads["policy"]["p50_ms"] if heads else None
    alone = {"compact/tick": inference_ms / rows["compact", "tick"]["p50_ms"] if heads else None}
    check("flow inference over the compact head alone in the tick, p50", 20.0, alone, at_least=True)
    in_loop = of(lambda c: inference_ms and c["head_ms"] and inference_ms / c["head_ms"]["p50"], head="compact")
    check("flow inference over the compact head in the control loop, p50", 20.0, in_loop, at_least=True)
    check("duration of the full run [s]", 600.0, {"run": wall_s})
    return targets


def table(cells: Sequence[Cell]) -> str:
    """The cells as aligned plain text, baseline below ours."""
    heading = (
        "rate", "load", "head", "loop", "n", "period error [ms]", "ratio", "missed", "joints to", "camera to",
        "tick to command", "head [ms]", "CPU", "images",
    )  # fmt: skip
    under = (
        "[Hz]", "", "", "", "ticks", "p50 / p99 / max", "p99", "ticks", "command p50", "command p50",
        "p50 / p99", "p50 / p99", "[%]", "lost",
    )  # fmt: skip
    rows = [heading, under]
    loops, heads = list(LABELS), list(HEADS)
    for c in sorted(cells, key=lambda c: (c["load"], c["rate_hz"], heads.index(c["head"]), loops.index(c["loop"]))):
        start = (f"{c['rate_hz']:g}", c["load"], c["head"], LABELS[c["loop"]])
        if "error" in c:
            rows.append((*start, "failed", *[""] * (len(heading) - 5)))
            continue
        ratio = c.get("baseline_over_ours", {}).get("period_error_ms.p99")
        images = c["images"]
        rows.append(
            (
                *start,
                str(c["n"]),
                _numbers(c["period_error_ms"], ("p50", "p99", "max"), 3),
                f"{ratio:.1f}x" if ratio is not None else "",
                str(c["missed_ticks"]),
                _numbers(c["joint_age_ms"], ("p50",), 1),
                _numbers(c["camera_age_ms"], ("p50",), 1),
                _numbers(c["command_latency_ms"], ("p50", "p99"), 2),
                _numbers(c["head_ms"], ("p50", "p99"), 2),
                f"{100 * c['cpu_share']:.0f}",
                f"{images['lost']}/{images['published']}" if images else "",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(heading))]
    left = {2, 1, 3}
    lines = [
        "  ".join(v.ljust(w) if i in left else v.rjust(w) for i, (v, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]
    lines.insert(2, "-" * max(map(len, lines)))
    return "\n".join(lines)


def floor_lines(floor: Mapping[str, Mapping[str, Any]]) -> str:
    """What the machine itself gives, a line per load."""
    return "\n".join(
        f"a thread that only sleeps, {f['rate_hz']:g} Hz, {load}: "
        f"period error p50 / p99 / max {_numbers(f['period_error_ms'], ('p50', 'p99', 'max'), 3)} ms"
        for load, f in floor.items()
    )


def targets_table(targets: Sequence[Mapping[str, Any]]) -> str:
    """The targets as plain text."""
    words = {True: "met", False: "NOT MET", None: "not measured"}
    width = max(len(t["what"]) for t in targets)
    return "\n".join(
        f"{t['what'].ljust(width)}  {'' if t['value'] is None else format(t['value'], '.3g'):>7}  "
        f"(target {t['limit']:g})  {words[t['met']]}{' in ' + t['where'] if t['met'] is False else ''}"
        for t in targets
    )


def page_tables(record: Mapping[str, Any]) -> str:
    """The two tables of the documentation: the loops at ``PAGE_RATE_HZ``, and the targets."""
    cells = [c for c in record["cells"] if "error" not in c and c["rate_hz"] == PAGE_RATE_HZ]
    heading = (
        f"loop at {PAGE_RATE_HZ} Hz", "head", "period error idle, p50 / p99 / max [ms]", "loaded",
        "tick to command idle, p50 / p99 [ms]", "loaded",
    )  # fmt: skip
    loops = []
    for loop in LABELS:
        for head in HEADS:
            idle, loaded = (find(cells, loop, head, PAGE_RATE_HZ, load) for load in ("idle", "loaded"))
            if idle and loaded:
                name = "off" if head == "none" else head + _corrected(idle, loaded)
                latencies = (_numbers(c["command_latency_ms"], ("p50", "p99"), 2) for c in (idle, loaded))
                loops.append((LABELS[loop], name, _regularity(idle), _regularity(loaded), *latencies))
    targets = []
    words = {True: "met", False: "not met", None: "not measured"}
    for t in record["targets"]:
        value = "" if t["value"] is None else f"{t['value']:.3g}"
        where = f": {t['where']}" if t["met"] is False else ""
        targets.append((t["what"], f"{t['limit']:g}", value, f"{words[t['met']]}{where}"))
    tables = markdown.table(heading, loops), markdown.table(("target", "limit", "measured", ""), targets)
    return "\n\n".join(tables)


def _regularity(cell: Cell) -> str:
    """Period error, or that there was hardly any loop to speak of."""
    missed = cell["missed_ticks"]
    if cell["missed_share"] > STALLED_SHARE:
        return f"stalled: {cell['n']} of {cell['n'] + missed} ticks ran"
    return _numbers(cell["period_error_ms"], ("p50", "p99", "max"), 3) + (f", {missed} missed" if missed else "")


def _corrected(*cells: Cell) -> str:
    """In which share of the ticks a loop corrected, where it did not in all."""
    ticks = [(c["states"].get(CORRECTED, 0), c["states"].get(HELD, 0), c["n"]) for c in cells]
    if all(corrected == n for corrected, _, n in ticks):
        return ""
    shares = " / ".join(f"{corrected / n:.0%}" for corrected, _, n in ticks if n)
    held = sum(held for _, held, _ in ticks)
    return f" (corrected in {shares} of the ticks{f', {held} held' if held else ''})"


def plot(path: Path, errors_ms: Mapping[tuple[str, str], tuple[np.ndarray, np.ndarray]], title: str) -> None:
    """Draw how often a period is off by how much, and the errors over time.

    Args:
        path: PNG to write.
        errors_ms: (loop, load) to the times of the ticks [s] and their signed period errors [ms].
        title: What was run.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    share, line = figure.subplots(1, 2)
    colours = dict(zip(LABELS, ("tab:blue", "tab:green", "tab:orange", "tab:red")))
    for (loop, load), (times_s, errors) in errors_ms.items():
        style = {"label": f"{LABELS[loop]}, {load}", "color": colours[loop]}
        style["linestyle"] = "-" if load == "loaded" else ":"
        values = np.sort(np.abs(errors))
        share.plot(np.maximum(values, 1e-4), 1.0 - np.arange(len(values)) / len(values), **style)
        if load == "loaded":
            line.plot(times_s, errors, linewidth=0.8, label=style["label"], color=style["color"])
    share.set(xscale="log", yscale="log", xlabel="period error [ms]", ylabel="share of ticks with at least this error")
    line.set(xlabel="time [s]", ylabel="period error [ms]", yscale="symlog")
    for axes in (share, line):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _numbers(values: Mapping[str, float] | None, keys: Sequence[str], digits: int) -> str:
    return " / ".join(f"{values[key]:.{digits}f}" for key in keys) if values else ""
