"""The page of an evaluation: tables beside the paper's numbers, targets and plots, between markers in a Markdown file.

Text outside of the markers is left alone. Cells that were not run are shown as such, so a part of the grid will do.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from a2c2_ros.commands import command
from a2c2_ros.core.errors import A2C2Error
from a2c2_ros.evaluation import paper
from a2c2_ros.evaluation.cells import (
    EXPERT,
    SPLITS,
    STATIC,
    Cell,
    outcomes,
    settings,
    settings_without_weights,
    valid_episodes,
)
from a2c2_ros.evaluation.failures import FAILURES
from a2c2_ros.evaluation.grid import Grid, LeftOut, Pair, Row, default_grid, load_grid, make_cell, plan
from a2c2_ros.evaluation.plots import Curve, plot
from a2c2_ros.evaluation.statistics import (
    SIGNIFICANCE,
    Difference,
    Recovery,
    difference,
    holm,
    recovery,
    wilson_interval,
)
from a2c2_ros.markdown import table
from a2c2_ros.settings import differing

NOT_RUN = "not run"
LEFT_OUT = "–"
TRAINING_FOLDER = "training"
"""Beside the results of cells: the records of `make train`."""
Result = Mapping[str, Any]


class Results:
    """The results of a grid, without those of other weights or settings.

    Args:
        grid: The grid.
        split: Whose results.
    """

    def __init__(self, grid: Grid, split: str) -> None:
        self.grid, self.split = grid, split
        self.cells, self.left_out = plan(grid, split)
        self.stale: dict[str, str] = {}
        self._reasons: dict[str, LeftOut] = {entry.cell.name: entry for entry in self.left_out}
        self._found: dict[str, Result] = {}
        for row in grid.rows:
            for pair in [None] if row.method == EXPERT else row.pairs or grid.pairs:
                self._load(make_cell(grid, row, pair, split))

    def _load(self, cell: Cell) -> None:
        path = self.grid.results / f"{cell.name}.json"
        if not path.exists():
            return
        result = json.loads(path.read_text(encoding="utf-8"))
        try:
            mine = settings(cell)
        except A2C2Error:  # the weights are not here: what was measured with them is shown as it is
            mine = settings_without_weights(cell)
        wrong = differing(_without_renderer(result), _without_renderer(mine))
        if wrong:
            self.stale[cell.name] = "; ".join(wrong)
        else:
            self._found[cell.name] = result

    def name(self, row: Row, pair: Pair | None) -> str:
        """Name of a cell, or of the one whose episodes are the same."""
        name = make_cell(self.grid, row, pair, self.split).name
        left = self._reasons.get(name)
        return left.same_as if left and left.same_as and name not in self._found else name

    def get(self, row: Row | None, pair: Pair | None) -> Result | None:
        """The result of a row at a pair; None if it was not run."""
        if row is None:
            return None
        return self._found.get(self.name(row, None if row.method == EXPERT else pair))

    def absent(self, row: Row | None, pair: Pair) -> str:
        """What a table says of a cell without a result; nothing of one that is not in the grid."""
        if row is None:
            return NOT_RUN
        if not (row.method == EXPERT or pair in (row.pairs or self.grid.pairs)):
            return ""
        name = make_cell(self.grid, row, pair, self.split).name
        return LEFT_OUT if name in self._reasons and not self._reasons[name].same_as else NOT_RUN

    def difference(self, row: Row | None, pair: Pair, episodes: int | None = None) -> Difference | None:
        """Success minus that of the row's baseline at the same pair, over the first ``episodes`` of a task or all.

        None if one of them was not run, or with another base policy or renderer, or if they are the same episodes.
        """
        mine = self.get(row, pair)
        theirs = self.get(self.grid.baseline(row), pair) if row else None
        if not mine or not theirs or mine is theirs or _apart(mine, theirs):
            return None
        return difference(outcomes(mine, episodes), outcomes(theirs, episodes))

    def recovery(self, row: Row | None, naive: Row | None) -> Recovery | None:
        """Of a row at (40, 10), see :func:`statistics.recovery`; None without its three cells."""
        parts = self.get(row, (40, 10)), self.get(naive, (40, 10)), self.get(naive, (10, 0))
        if not all(parts) or any(_apart(parts[0], other) for other in parts[1:]):
            return None
        return recovery(*map(outcomes, parts))

    def not_compared(self) -> list[str]:
        """Cells that are no pair with their baseline's though both were run, and why."""
        found = []
        for row in self.grid.rows:
            for pair in () if row.method == EXPERT else row.pairs or self.grid.pairs:
                mine, theirs = self.get(row, pair), self.get(self.grid.baseline(row), pair)
                if mine and theirs and (why := _apart(mine, theirs)):
                    found.append(f"{mine['cell']} is not compared with {theirs['cell']}: {why}")
        return list(dict.fromkeys(found))

    def all(self) -> list[Result]:
        """All results in use."""
        return list(self._found.values())


def _apart(mine: Result, theirs: Result) -> str:
    """Why two results are no pair: other chunks, or other images of the same states. Empty if they are one."""
    facts = [(r.get("policy_id"), r["environment"]["renderer"]) for r in (mine, theirs)]
    names = ("base policy", "renderer")
    return "; ".join(f"{name} {a}, {b}" for name, a, b in zip(names, *facts, strict=True) if a != b)


def _without_renderer(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Settings to compare: the page need not be made where the episodes were run."""
    if "environment" not in facts:
        return dict(facts)
    return {**facts, "environment": {k: v for k, v in facts["environment"].items() if k != "renderer"}}


def counts(result: Result, episodes: int | None = None) -> tuple[int, int, int]:
    """Successes, valid episodes and exceptions, of the first ``episodes`` of each task or of all."""
    chosen = [r for r in result["rollouts"] if episodes is None or r["initial_state"] < episodes]
    fine = valid_episodes(chosen)
    return sum(bool(r["success"]) for r in fine), len(fine), len(chosen) - len(fine)


def rate(result: Result | None, absent: str = NOT_RUN, episodes: int | None = None) -> str:
    """``84% [76, 90]``, with the exceptions if there were any; see :func:`counts`."""
    if result is None:
        return absent
    successes, fine, raised = counts(result, episodes)
    if not fine:
        return f"{raised} exceptions"
    low, high = wilson_interval(successes, fine)
    exceptions = f", {raised} exceptions" if raised else ""
    return f"{percent(successes / fine)} [{100 * low:.0f}, {100 * high:.0f}]{exceptions}"


def percent(share: float) -> str:
    """``84%``, or ``84.2%`` where a digit is needed."""
    return f"{100 * share:.1f}".removesuffix(".0") + "%"


def compare(found: Difference | None) -> str:
    """``+12.0 (p = 0.02, n = 100)``."""
    return NOT_RUN if found is None else f"{found.points:+.1f} ({_p(found)}, n = {found.pairs})"


def _p(found: Difference) -> str:
    return f"p = {found.p:.2g}" if found.p >= 0.001 else "p < 0.001"


def paper_table(results: Results, pairs: Mapping[Pair, Mapping[str, float]], episodes: int | None = None) -> str:
    """Ours beside a table of the paper, with pairs that only we have after it; see :func:`counts`."""
    head = results.grid.headline
    naive, a2c2 = results.grid.row(head.naive), results.grid.row(head.a2c2)
    heading = ["e", "d", "naive, paper", "naive, ours", "a2c2, paper", f"{head.a2c2}, ours"]
    rows = []
    for pair, theirs in pairs.items():
        numbers = {method: percent(theirs[method]) if theirs else "" for method in ("naive", "a2c2")}
        ours = [rate(results.get(row, pair), results.absent(row, pair), episodes) for row in (naive, a2c2)]
        gain = compare(results.difference(a2c2, pair, episodes))
        rows.append([str(pair[0]), str(pair[1]), numbers["naive"], ours[0], numbers["a2c2"], ours[1], gain])
    return table([*heading, f"{head.a2c2} - naive [points]"], rows)


def adjusted_section(results: Results, pairs: Sequence[Pair], episodes: int | None = None) -> str:
    """In how many pairs a2c2 differs significantly from its baseline, adjusted for their number."""
    row = results.grid.row(results.grid.headline.a2c2)
    found = [d for pair in pairs if (d := results.difference(row, pair, episodes)) is not None]
    if not found:
        return ""
    significant = [d for d, p in zip(found, holm([d.p for d in found]), strict=True) if p < SIGNIFICANCE]
    more, fewer = (sum(sign * d.points > 0 for d in found) for sign in (1, -1))
    above, below = (sum(sign * d.points > 0 for d in significant) for sign in (1, -1))
    return (
        f"{row.label} has more successes than {results.grid.baseline(row).label} in {more} of {len(found)} pairs "
        f"and fewer in {fewer}; after Holm's correction for {len(found)} tests significantly more in {above} "
        f"and fewer in {below}."
    )


def grid_table(results: Results, rows: Sequence[Row], pairs: Sequence[Pair]) -> str:
    """Rows over pairs, the grid's initial states; a sign says where a row differs significantly from its baseline."""
    episodes, lines = results.grid.episodes, []
    for row in rows:
        line = [row.label]
        for pair in pairs:
            text = _cell_text(results, row, pair)
            compared = results.difference(row, pair, episodes)
            if compared is not None and compared.significant:
                text += " ▲" if compared.points > 0 else " ▼"
            line.append(text)
        if row.method == EXPERT:
            line[2:] = [""] * (len(pairs) - 1)
        lines.append(line)
    return table(["", *(f"({e}, {d})" for e, d in pairs)], lines)


def difference_table(results: Results, rows: Sequence[Row], pairs: Sequence[Pair]) -> str:
    """Rows over pairs with the difference to the row's baseline and its p-value."""
    lines = []
    for row in rows:
        baseline = results.grid.baseline(row)
        line = [row.label, baseline.label if baseline else ""]
        for pair in pairs:
            compared = results.difference(row, pair, results.grid.episodes)
            text = _cell_text(results, row, pair).partition(" [")[0]
            line.append(text if compared is None else f"{text}, {compared.points:+.0f} ({_p(compared)})")
        lines.append(line)
    return table(["row", "compared with", *(f"({e}, {d})" for e, d in pairs)], lines)


def _adjusted(results: Results, row: Row, pairs: Sequence[Pair]) -> str:
    """``rtc 1 of 9 above naive``, and how many below; empty for less than two."""
    compared = [d for pair in pairs if (d := results.difference(row, pair, results.grid.episodes)) is not None]
    if len(compared) < 2:
        return ""
    points = [d.points for d, p in zip(compared, holm([d.p for d in compared]), strict=True) if p < SIGNIFICANCE]
    above, below = (sum(sign * value > 0 for value in points) for sign in (1, -1))
    text = f"{row.label} {above} of {len(compared)} above {results.grid.baseline(row).label}"
    return text + (f", {below} below" if below else "")


def _cell_text(results: Results, row: Row, pair: Pair) -> str:
    found = results.get(row, pair)
    text = rate(found, results.absent(row, pair), results.grid.episodes)
    if found is not None and results.name(row, pair) != make_cell(results.grid, row, pair, results.split).name:
        return f"= {text}"
    return text


def grid_section(results: Results) -> str:
    """Per variant the rows of the whole grid, then the others with what they differ by from their baselines; the key.

    Columns without any result are left out.
    """
    grid, parts = results.grid, []
    shown = (grid.headline.naive, grid.headline.a2c2)
    for variant in grid.variants:
        rows = [row for row in grid.rows if row.variant == variant]
        whole, some_pairs = [row for row in rows if not row.pairs], {pair for row in rows for pair in row.pairs}
        some = [row for row in rows if row.pairs or (grid.baseline(row) and row.label not in shown)]

        def ran(rows: Sequence[Row], pairs: Sequence[Pair]) -> list[Pair]:
            rows = [row for row in rows if row.method != EXPERT]
            return [pair for pair in pairs if any(results.get(row, pair) for row in rows)]

        if pairs := ran(whole, grid.pairs):
            parts.append(f"**{variant}**\n\n{grid_table(results, whole, pairs)}")
            if adjusted := [text for row in whole if (text := _adjusted(results, row, pairs))]:
                parts.append(f"Significant after Holm's correction over a row's own pairs: {'; '.join(adjusted)}.")
        if pairs := ran(some, [pair for pair in grid.all_pairs(variant) if pair in some_pairs]):
            some = [row for row in some if any(results.get(row, pair) for pair in pairs)]
            parts.append(f"**{variant}, differences to a baseline**\n\n{difference_table(results, some, pairs)}")
    key = (
        f"Columns are (e, d); every number is of the initial states 0 to {grid.episodes - 1} of each task. In brackets "
        f"the 95% Wilson interval. ▲ and ▼: above and below the row's baseline on the same initial states, exact "
        f"McNemar test, p < {SIGNIFICANCE}; p-values are not adjusted for the number of cells. = : at this (e, d) the "
        f"same method as another row, not run again. {LEFT_OUT} : not possible. Rows and columns without any result "
        f"are in the list of what is not run."
    )
    return "\n\n".join([*parts, key])


def task_table(results: Results) -> str:
    """Success of every task for the headline rows at Table 1's pairs, and for chosen rows at their first pair."""
    grid = results.grid
    chosen = [(label, pair) for pair in paper.TABLE_1 for label in (grid.headline.naive, grid.headline.a2c2)]
    chosen += [(label, pair) for label, pair in _first_pairs(grid, grid.headline.tasks)]
    lines = []
    for label, pair in chosen:
        found = results.get(grid.row(label), pair)
        per = found["per_task"] if found else {}
        numbers = (per.get(str(task)) for task in grid.tasks)
        lines.append(
            [label, str(pair[0]), str(pair[1])]
            + [f"{c['successes']}/{c['episodes']}" if c else NOT_RUN for c in numbers]
        )
    return table(["row", "e", "d", *(f"task {task}" for task in grid.tasks)], lines)


def _first_pairs(grid: Grid, labels: Sequence[str]) -> list[tuple[str, Pair]]:
    """The rows that there are, with the first of their pairs."""
    rows = [row for label in labels if (row := grid.row(label)) is not None]
    return [(row.label, (row.pairs or grid.pairs)[0]) for row in rows]


def _where(execution_horizon: int | None, inference_delay: int | None) -> str:
    return "" if execution_horizon is None else f"({execution_horizon}, {inference_delay})"


def failure_table(results: Results) -> str:
    """How failures look: of the headline rows at Table 1's pairs and of chosen rows, or of every cell."""
    grid, found = results.grid, results.all()
    if grid.headline.failures:
        chosen = [(label, pair) for label in (grid.headline.naive, grid.headline.a2c2) for pair in paper.TABLE_1]
        chosen += _first_pairs(grid, grid.headline.failures)
        found = [result for label, pair in chosen if (result := results.get(grid.row(label), pair))]
    lines = []
    for result in found:
        failures = result.get("failures")
        if failures:
            where = _where(result.get("execution_horizon"), result.get("inference_delay"))
            numbers = [str(failures.get(name, 0)) for name in FAILURES]
            lines.append([result["label"], where, str(result["total"]["episodes"]), *numbers])
    key = "; ".join(f"*{name}*: {what}" for name, what in FAILURES.items())
    return f"{table(['row', '(e, d)', 'episodes', *FAILURES], lines)}\n\n{key}." if lines else f"{NOT_RUN}."


def targets(results: Results) -> list[tuple[str, str, str, bool | None]]:
    """What was promised: (what, target, measured, met), met None where it was not run."""
    grid, head = results.grid, results.grid.headline
    naive, a2c2 = grid.row(head.naive), grid.row(head.a2c2)
    found: list[tuple[str, str, str, bool | None]] = []

    def add(what: str, target: str, value: float | None, text: str, limit: float) -> None:
        found.append((what, target, NOT_RUN, None) if value is None else (what, target, text, value >= limit))

    def add_rate(row: Row | None, label: str, pair: Pair, limit: float) -> None:
        result = results.get(row, pair)
        value = result["total"]["success_rate"] if result else None
        add(f"{label} {pair}", f"at least {limit:.0%}", value, rate(result), limit)

    def add_gain(row: Row | None, label: str, pair: Pair) -> None:
        compared = results.difference(row, pair)
        add(f"{label} above naive {pair}", "at least 20 points", compared and compared.points, compare(compared), 20.0)

    def add_recovery(row: Row | None, label: str, limit: float) -> None:
        part = results.recovery(row, naive)
        text = ""
        if part is not None:
            low, high = part.interval or (float("nan"),) * 2
            text = f"{part.value:.2f} " + (f"[{low:.2f}, {high:.2f}]" if part.interval else "[interval undefined]")
        add(f"recovery of {label}", f"at least {limit}", part and part.value, text, limit)

    add_rate(naive, head.naive, (10, 0), 0.85)
    add_rate(a2c2, head.a2c2, (40, 10), 0.90)
    add_gain(a2c2, head.a2c2, (40, 10))
    add_gain(a2c2, head.a2c2, (50, 0))
    for label in head.paper_recipe:
        add_recovery(grid.row(label), f"{label} (towards the paper's recipe)", 1.0)
    add_recovery(a2c2, f"{head.a2c2} (our recipe)", 1.3)
    pairs = (a2c2.pairs or grid.pairs) if a2c2 else ()
    compared = {p: results.difference(a2c2, p) for p in pairs if results.absent(a2c2, p) != LEFT_OUT}
    ran = {pair: c for pair, c in compared.items() if c is not None}
    below = [f"({e}, {d})" for (e, d), c in ran.items() if c.points < 0 and c.significant]
    text = (f"at {', '.join(below)}" if below else "nowhere") + f"; {len(ran)} of {len(compared)} cells were run"
    complete = ran and (below or len(ran) == len(compared))
    found.append((f"{head.a2c2} significantly below naive", "nowhere", text, not below if complete else None))
    for label in head.moving:
        add_gain(grid.row(label), label, (40, 10))
    return found


def targets_section(results: Results) -> str:
    """The targets as a table, with the paper's recovery and where ours comes from."""
    words = {True: "met", False: "**missed**", None: NOT_RUN}
    lines = [(what, target, text, words[met]) for what, target, text, met in targets(results)]
    note = (
        f"Recovery is (a2c2(40, 10) - naive(40, 10)) / (naive(10, 0) - naive(40, 10)), in the paper "
        f"{paper.recovery():.2f}; its interval is a 95% bootstrap over the initial states of each task. Differences "
        f"are in pairs on the same initial states, p of the exact McNemar test."
    )
    return f"{table(['what', 'target', 'measured', ''], lines)}\n\n{note}"


def left_out_section(results: Results) -> str:
    """What of the plan has no result, by row; why cells are left out; exceptions and refused chunks."""
    done = {result["cell"] for result in results.all()}
    wanted: dict[str, int] = {}
    for cell, episodes in results.cells:
        wanted[cell.name] = max(episodes, wanted.get(cell.name, 0))
    have = {r["cell"]: r["episodes_per_task"] for r in results.all()}
    there: dict[str, list[str]] = {}  # of a row
    open_pairs: dict[str, list[str]] = {}
    for cell in dict.fromkeys(cell for cell, _ in results.cells):
        where = _where(cell.execution_horizon, cell.inference_delay)
        if have.get(cell.name, 0) >= wanted[cell.name] or cell.name in results.stale:
            there.setdefault(cell.label, []).append(where)
        else:
            part = f" has {have[cell.name]} of {wanted[cell.name]} episodes per task" if cell.name in have else ""
            open_pairs.setdefault(cell.label, []).append(f"{where}{part}")
    alike: dict[str, list[str]] = {}
    for label, pairs in open_pairs.items():
        known, text = there.get(label, []), ", ".join(pairs)
        if len(known) < len(pairs) and "has" not in text:
            text = "all" + (f" but {', '.join(known)}" if known else "")
        alike.setdefault(text, []).append(label)
    lines = [f"- {', '.join(labels)}: {text}" for text, labels in alike.items()]
    reasons: dict[str, list[str]] = {}
    for entry in results.left_out:
        if entry.cell.name not in done and not entry.same_as:  # whose weights may be elsewhere by now
            reasons.setdefault(entry.reason, []).append(entry.cell.name)
    for name, reason in results.stale.items():
        reasons.setdefault(f"the result is of other settings ({reason})", []).append(name)
    notes = [f"- {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    notes += [f"- {text}" for text in results.not_compared()]
    for result in results.all():
        if errors := [r["error"] for r in result["rollouts"] if r["error"] is not None]:
            kinds = "; ".join(sorted(set(errors)))
            notes.append(f"- {result['cell']}: {len(errors)} exceptions, not counted as failures: {kinds}")
    if refused := [f"{r['cell']} {r['refused_chunks']}" for r in results.all() if r.get("refused_chunks")]:
        notes.append(f"- chunks that the loop refused because their actions are out of bounds: {', '.join(refused)}")
    if uncounted := [r["cell"] for r in results.all() if "refused_chunks" not in r]:
        notes.append(f"- refused chunks were not counted in {', '.join(uncounted)}")
    names = wanted.keys() | done
    complete = sum(have[name] >= wanted.get(name, 0) for name in done)
    parts = [f"{complete} of {len(names)} cells are complete."]
    parts += ["Planned, not run:\n\n" + "\n".join(lines)] if lines else []
    parts += ["Beside that:\n\n" + "\n".join(notes)] if notes else []
    return "\n\n".join(parts)


def training_table(results: Results) -> str:
    """What the policies and heads of this page reach on held-out episodes, from their training's records."""
    policies, heads = [], []
    for path in sorted((results.grid.results / TRAINING_FOLDER).glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if "copy_of" in record or "history" not in record:
            continue
        facts = f"{record['parameters']:,}", f"{record['steps']:,}"
        if "head" in record:
            last, shown = record["history"][-1], ("base_error", "error", "error_0", "error_40")
            errors = [f"{last[name]:.3f}" if name in last else "" for name in shown]
            policy = record["policy_id"].rsplit("-", 1)[0]
            heads.append([path.stem, policy, record["architecture"], *facts, *errors])
        elif by_temperature := record.get("validation_error_by_temperature"):
            best = min(by_temperature.values(), key=lambda errors: errors["error"])
            errors = [f"{best[name]:.3f}" if name in best else "" for name in ("error", "error_0", "error_40")]
            policies.append([path.stem, *facts, *errors])
    tables, common = [], ["parameters", "steps"]
    if policies:
        tables.append(table(["base policy", *common, "error", "k < 10", "k >= 40"], policies))
    if heads:
        heading = ["head", "base policy", "network", *common]
        tables.append(table([*heading, "base", "base + head", "k < 10", "k >= 40"], heads))
    return "\n\n".join(tables) or "No records."


def speed_section(results: Results) -> str:
    """Control steps per second of one process, by row; machine, versions and weights."""
    lines = []
    chosen = results.grid.headline.speed
    for row in results.grid.rows:
        if chosen and row.label not in chosen:
            continue
        mine = [r["speed"] for r in results.all() if r["label"] == row.label and r["speed"]]
        seconds, steps = (sum(s[name] for s in mine) for name in ("seconds", "control_steps"))
        if not seconds:
            continue
        parts = ("simulation", "inference", "head")
        shares = [sum(s[f"{name}_share"] * s["seconds"] for s in mine) / seconds for name in parts]
        lines.append([row.label, str(steps), f"{steps / seconds:.1f}", *(f"{100 * share:.0f}%" for share in shares)])
    heading = ["row", "control steps", "per second and process", "simulation", "policy", "head"]
    versions: dict[str, set[str]] = {}
    for result in results.all():
        for name, version in result["versions"].items():
            versions.setdefault(name, set()).add(str(version))
    facts = {
        "machine": {f"{m['processor']}, {m['processors']} processors" for m in (r["machine"] for r in results.all())},
        "versions": {", ".join(f"{name} {'/'.join(sorted(known))}" for name, known in versions.items())},
        "renderer": {str(r["environment"]["renderer"]) for r in results.all()},
        "policies": {r["policy_id"] for r in results.all() if "policy_id" in r},
    }
    notes = [f"- {name}: {'; '.join(sorted(values))}" for name, values in facts.items() if values]
    resets = "Resets are included. The JSON files have all rows, and the hash of every head."
    return "\n".join([table(heading, lines), "", resets, "", *notes]) if lines else f"{NOT_RUN}."


def _curves(results: Results, variant: str, pairs: Mapping[int, Pair]) -> list[Curve]:
    """One curve per row, and the paper's; ``pairs`` maps the horizontal axis to (e, d)."""
    curves = []
    for row in results.grid.rows:
        if row.variant != variant or not row.plot or row.method == EXPERT:
            continue
        points = {}
        for x, pair in pairs.items():
            found = results.get(row, pair)
            successes, fine, _ = counts(found, results.grid.episodes) if found else (0, 0, 0)
            if fine:
                points[x] = (successes / fine, *wilson_interval(successes, fine))
        if points:
            curves.append(Curve(row.label, points))
    if variant == STATIC and curves:
        for method in ("naive", "a2c2"):
            points = {x: (paper.TABLE_7[p][method],) * 3 for x, p in pairs.items() if p in paper.TABLE_7}
            curves.append(Curve(f"{method}, paper", points, paper=True))
    return curves


def plots_section(results: Results) -> str:
    """Draw the plots beside the page; returns the links to them."""
    links = []
    page = results.grid.page
    for variant in results.grid.variants:
        pairs = results.grid.all_pairs(variant)
        panels = []
        for horizon in (40, 10):
            of_delay = {d: (e, d) for e, d in sorted(pairs) if e == horizon}
            panels.append((f"e = {horizon}", "inference delay d [steps]", _curves(results, variant, of_delay)))
        of_horizon = {e: (e, d) for e, d in sorted(pairs) if d == 0}
        panels.append(("d = 0", "execution horizon e [steps]", _curves(results, variant, of_horizon)))
        panels = [panel for panel in panels if panel[2]]
        if panels:
            path = page.with_name(f"{page.stem}_{variant}.png")
            plot(path, panels)
            links.append(f"![Success against delay and execution horizon, {variant}]({path.name})")
    return "\n\n".join(links) or f"{NOT_RUN}."


def sections(results: Results) -> dict[str, str]:
    """What goes between the markers, by their names; draws the plots."""
    known = dict.fromkeys([*paper.TABLE_7, *results.grid.all_pairs(STATIC)])
    table_7 = {pair: paper.TABLE_7.get(pair, {}) for pair in known}
    return {
        "targets": targets_section(results),
        "table1": paper_table(results, paper.TABLE_1),
        "table7": "\n\n".join(
            part
            for part in (
                paper_table(results, table_7, results.grid.episodes),
                adjusted_section(results, tuple(table_7), results.grid.episodes),
            )
            if part
        ),
        "grid": grid_section(results),
        "plots": plots_section(results),
        "tasks": task_table(results),
        "failures": failure_table(results),
        "training": training_table(results),
        "left_out": left_out_section(results),
        "speed": speed_section(results),
    }


def fill(text: str, parts: Mapping[str, str]) -> str:
    """Replace what is between ``<!-- begin NAME -->`` and ``<!-- end NAME -->``; missing markers are added at the end.

    Raises:
        A2C2Error: If a marker has no counterpart after it.
    """
    for name, content in parts.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, found, rest = text.partition(begin)
        if not found:
            text = f"{text.rstrip()}\n\n{begin}\n\n{content}\n\n{end}\n".lstrip()
            continue
        _, closed, after = rest.partition(end)
        if not closed:
            raise A2C2Error(f"the page has {begin} without {end} after it")
        text = f"{before}{begin}\n\n{content}\n\n{end}{after}"
    return text


def write(grid: Grid, split: str = "test") -> None:
    """Write the page and its plots, and print the tables beside the paper's."""
    parts = sections(Results(grid, split))
    grid.page.parent.mkdir(parents=True, exist_ok=True)
    text = grid.page.read_text(encoding="utf-8") if grid.page.exists() else ""
    grid.page.write_text(fill(text, parts), encoding="utf-8")
    print("\n\n".join(parts[name] for name in ("table1", "table7", "grid", "targets")))
    print(f"\n-> {grid.page}")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m a2c2_ros.evaluation.report",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--grid", type=Path, help="YAML file; default: the package's config/libero_grid.yaml")
    parser.add_argument("--quick", action="store_true", help="its section quick")
    parser.add_argument("--split", choices=SPLITS, default="test", help="whose results")
    args = parser.parse_args(argv)
    write(load_grid(args.grid or default_grid(), quick=args.quick).of_split(args.split), args.split)
    return 0


if __name__ == "__main__":
    sys.exit(main())
