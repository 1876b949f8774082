"""The page of the Kinetix results: tables and the two plots of the paper's figure 5.

A mean over levels weighs every level alike. Its interval is normal, from the variances of the levels after Agresti and
Coull (two successes and two failures are added, so that no level counts as certain). Methods are compared episode by
episode, because they share the world's noise; the variance is after Agresti and Min (half a pair is added to each of
the four outcomes).
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from a2c2_ros.core.errors import ConfigError
from a2c2_ros.evaluation.plots import Curve, plot
from a2c2_ros.evaluation.report import NOT_RUN, fill
from a2c2_ros.evaluation.statistics import Z_95
from a2c2_ros.markdown import table

Pair = tuple[int, int]
Result = Mapping
FIXED_DELAY = 1
"""Of the plot over the execution horizon, as in figure 5."""
LONGEST_DELAY = 4
TARGETS = (
    ("a2c2 above naive, d = 4 (the paper: nearly 35)", "a2c2", "naive", 20.0),
    ("a2c2 above rtc, d = 4 (the paper: 23 in the presence of delay)", "a2c2", "rtc", 10.0),
)
"""What, method, baseline and points."""
LONG_HORIZON, LONG_HORIZON_RATE = (7, 1), 0.85
"""(e, d), and what a2c2 stays above there according to the paper."""


class Results:
    """Result files of levels."""

    def __init__(self, folder: Path) -> None:
        self.levels: dict[str, Result] = {
            path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))
        }
        for name in ("budget", "rollouts", "seed", "horizon", "action_noise"):
            values = {level: result[name] for level, result in self.levels.items()}
            if len(set(values.values())) > 1:
                raise ConfigError(f"results in {folder} differ in {name}: {values}")
        self.methods = list(dict.fromkeys(name for result in self.levels.values() for name in result["methods"]))
        self._cells = {
            (level, method, (cell["e"], cell["d"])): cell
            for level, result in self.levels.items()
            for method, found in result["methods"].items()
            for cell in found["cells"]
        }
        self.pairs: list[Pair] = list(dict.fromkeys(pair for _, _, pair in self._cells))

    def mean(self, method: str, pairs: Sequence[Pair]) -> tuple[float, float] | None:
        """Success rate over all levels and these cells, and its standard error; None if a level was not run."""
        keys = [(level, method, pair) for level in self.levels for pair in pairs]
        if not keys or not all(key in self._cells for key in keys):
            return None
        rates = [(self._cells[key]["successes"] / self._cells[key]["episodes"]) for key in keys]
        variance = sum(_variance(self._cells[key]) for key in keys)
        return sum(rates) / len(rates), math.sqrt(variance) / len(rates)

    def gain(self, method: str, baseline: str, pairs: Sequence[Pair]) -> tuple[float, float] | None:
        """Success rate of a method minus that of another, as :meth:`mean` has them, and its standard error."""
        rates = self.mean(method, pairs), self.mean(baseline, pairs)
        if None in rates:
            return None
        variances = []
        for level in self.levels:
            for pair in pairs:
                mine, theirs = (self._cells[level, name, pair]["solved"] for name in (method, baseline))
                both = Counter(zip(mine, theirs, strict=True))
                won, lost, count = both["1", "0"] + 0.5, both["0", "1"] + 0.5, len(mine) + 2
                variances.append((won + lost - (won - lost) ** 2 / count) / count**2)
        return rates[0][0] - rates[1][0], math.sqrt(sum(variances)) / len(variances)

    def rate(self, level: str, method: str, pair: Pair) -> str:
        """``84 [79, 88]`` in percent."""
        cell = self._cells.get((level, method, pair))
        if cell is None:
            return NOT_RUN
        low, high = cell["wilson_95"]
        return f"{100 * cell['successes'] / cell['episodes']:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def _variance(cell: Mapping) -> float:
    episodes = cell["episodes"] + 4
    rate = (cell["successes"] + 2) / episodes
    return rate * (1 - rate) / episodes


def interval(found: tuple[float, float] | None) -> str:
    """``84.0 ± 1.2`` in percent."""
    return NOT_RUN if found is None else f"{100 * found[0]:.1f} ± {100 * Z_95 * found[1]:.1f}"


def targets_section(results: Results) -> str:
    """What was asked for and what came out."""
    rows = []
    delayed = [pair for pair in results.pairs if pair[1] == LONGEST_DELAY]
    for text, method, baseline, points in TARGETS:
        found = results.gain(method, baseline, delayed)
        if found is None:
            rows.append([text, f"{points:g} points", NOT_RUN, ""])
            continue
        gain, error = 100 * found[0], 100 * found[1]
        rows.append([text, f"{points:g} points", f"{gain:+.1f} ± {Z_95 * error:.1f}", _met(gain >= points)])
    e, d = LONG_HORIZON
    found = results.mean("a2c2", [LONG_HORIZON])
    met = "" if found is None else _met(found[0] >= LONG_HORIZON_RATE)
    rows.append([f"a2c2 at e = {e}, d = {d}", f"{100 * LONG_HORIZON_RATE:g}%", interval(found), met])
    return table(["target", "asked for", "measured", ""], rows)


def _met(condition: bool) -> str:
    return "met" if condition else "missed"


def mean_section(results: Results) -> str:
    """Means over the levels, one row per cell."""
    heading = ["d", "e", *results.methods]
    rows = [
        [str(d), str(e), *(interval(results.mean(method, [(e, d)])) for method in results.methods)]
        for e, d in results.pairs
    ]
    return f"Levels: {', '.join(results.levels)}.\n\n{table(heading, rows)}"


def level_section(results: Results) -> str:
    """Every level by itself, at the ends of the grid."""
    shown = [pair for pair in ((1, 0), (8, 0), (1, 1), LONG_HORIZON, (4, 4)) if pair in results.pairs]
    parts = []
    for e, d in shown:
        rows = [
            [level, _expert(result), *(results.rate(level, method, (e, d)) for method in results.methods)]
            for level, result in results.levels.items()
        ]
        parts.append(f"e = {e}, d = {d}:\n\n{table(['level', 'expert', *results.methods], rows)}")
    return "\n\n".join(parts)


def _expert(result: Result) -> str:
    found = result["expert"]["pruned"]
    return f"{100 * found['successes'] / found['episodes']:.0f}"


def environment_section(results: Results) -> str:
    """Sizes, and experts in the environment of the results and in the stock one."""
    rows = []
    variants = list(dict.fromkeys(name for result in results.levels.values() for name in result["expert"]))
    for level, result in results.levels.items():
        cells = []
        for variant in variants:
            found = result["expert"][variant]
            low, high = found["wilson_95"]
            rate = f"{found['successes']}/{found['episodes']} [{100 * low:.0f}, {100 * high:.0f}]"
            cells.append(f"{rate}, {found['steps_per_s']:,.0f}/s")
        facts = result["facts"]
        sizes = facts["parameters"]
        rows.append(
            [
                level,
                str(facts["state"]),
                str(len(facts["actions"])),
                f"{sizes['policy']:,}",
                f"{sizes['head']:,}",
                *cells,
            ]
        )
    heading = ["level", "state", "actions", "policy's parameters", "head's", *(f"expert, {name}" for name in variants)]
    return f"{table(heading, rows)}\n\nBehind the success: environment steps per second, the expert included."


def training_section(results: Results) -> str:
    """Steps and seconds of every training; those of an expert are of the environment."""
    stages = ("expert", "policy", "head")
    rows = []
    for level, result in results.levels.items():
        found = [result["facts"]["training"][stage] for stage in stages]
        seconds = ("not kept" if stage["seconds"] is None else f"{stage['seconds']:,.0f} s" for stage in found)
        rows.append([level, *(f"{stage['steps']:,}, {time}" for stage, time in zip(found, seconds, strict=True))])
    return table(["level", *stages], rows)


def speed_section(results: Results) -> str:
    """Where the time of the evaluation goes."""
    rows = []
    for level, result in results.levels.items():
        for method, found in result["methods"].items():
            seconds, counts = found["seconds"], found["counts"]
            chunk = seconds["policy"] / counts["chunks"]
            head = seconds["head"] / counts["corrections"] if counts.get("corrections") else 0.0
            rows.append(
                [
                    level,
                    method,
                    f"{counts['steps'] / seconds['simulator']:,.0f}",
                    f"{seconds['all']:.0f}",
                    *(f"{100 * seconds[name] / seconds['all']:.0f}%" for name in ("simulator", "policy", "head")),
                    f"{1e6 * chunk:.1f}",
                    f"{1e6 * head:.1f}" if head else "",
                    f"{head / chunk:.3f}" if head else "",
                ]
            )
    heading = [
        "level",
        "method",
        "env. steps/s",
        "s",
        "simulator",
        "policy",
        "head",
        "µs per chunk",
        "µs per correction",
        "head / chunk",
    ]
    return table(heading, rows)


def plots_section(results: Results, page: Path) -> str:
    """Draw figure 5: success over the delay at e = max(d, 1), and over e at d = 1."""

    def curves(pairs: Mapping[int, Pair]) -> list[Curve]:
        found = []
        for method in results.methods:
            points = {}
            for x, pair in pairs.items():
                if (mean := results.mean(method, [pair])) is not None:
                    rate, error = mean
                    points[x] = (rate, max(0.0, rate - Z_95 * error), min(1.0, rate + Z_95 * error))
            if points:
                found.append(Curve(method, points))
        return found

    of_delay = {d: (max(d, 1), d) for d in sorted({d for _, d in results.pairs})}
    of_horizon = {e: (e, d) for e, d in sorted(results.pairs) if d == FIXED_DELAY}
    panels = [
        ("e = max(d, 1)", "inference delay d [steps]", curves(of_delay)),
        (f"d = {FIXED_DELAY}", "execution horizon e [steps]", curves(of_horizon)),
    ]
    if not all(panel[2] for panel in panels):
        return f"{NOT_RUN}."
    plot(page.with_suffix(".png"), panels)
    return f"![Success over delay and over execution horizon]({page.stem}.png)"


def write(folder: Path, page: Path) -> None:
    """Fill the page from the result files of a folder, and print the targets."""
    results = Results(folder)
    parts = {
        "targets": targets_section(results),
        "plots": plots_section(results, page),
        "mean": mean_section(results),
        "levels": level_section(results),
        "environment": environment_section(results),
        "training": training_section(results),
        "speed": speed_section(results),
    }
    page.parent.mkdir(parents=True, exist_ok=True)
    text = page.read_text(encoding="utf-8") if page.exists() else "# Kinetix\n"
    page.write_text(fill(text, parts), encoding="utf-8")
    print(f"{parts['mean']}\n\n{parts['targets']}\n\n-> {page}")
