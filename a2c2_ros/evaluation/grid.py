"""Success rates on LIBERO Spatial over a grid of methods, execution horizons e and inference delays d.

A YAML file says what is run. Episodes are kept one by one and continued after a kill; the result of a cell is written
as soon as it is complete, then the page with the tables.
"""

import argparse
import dataclasses
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from a2c2_ros.commands import command
from a2c2_ros.core.config import ControllerConfig, PlannerConfig
from a2c2_ros.core.errors import A2C2Error, ConfigError
from a2c2_ros.evaluation.cells import (
    EXPERT,
    METHOD_NAMES,
    SPLITS,
    STATIC,
    Cell,
    EpisodeStore,
    check_cell,
    policy_facts,
    settings_without_weights,
)
from a2c2_ros.evaluation.methods import METHODS
from a2c2_ros.evaluation.runner import Item, progress, run_items, stored
from a2c2_ros.evaluation.worker import ProcessWorker
from a2c2_ros.jobs import interrupt_on_termination
from a2c2_ros.paths import share_directory
from a2c2_ros.sim import conventions

GRID_FILE = "libero_grid.yaml"
PROCESS_BYTES = 2_700_000_000
"""Resident memory of a worker with the simulator, the base policy and a compact head, measured."""
MEMORY_SHARE = 0.6
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")

Pair = tuple[int, int]
"""(e, d): execution horizon and inference delay [steps]."""


@dataclass(frozen=True)
class Row:
    """One way to run one policy: a row of the tables."""

    label: str  # names the files
    method: str  # see ``METHOD_NAMES``
    policy: str = ""  # checkpoint folder
    head: str = ""  # ONNX file, for the methods with a2c2
    seed: int = 0  # of fixtures, policy noise and jitter; rows are only comparable with the same
    inference_delay_jitter: int = 0  # d varies by up to this many steps
    variant: str = STATIC  # or a motion of the simulator
    pairs: tuple[Pair, ...] = ()  # instead of the grid's
    baseline: str = ""  # label that it is compared with; default: naive with the same policy and variant
    plot: bool = True  # draw it

    def __post_init__(self) -> None:
        for name in ("label", "method", "policy", "head", "variant", "baseline"):
            if not isinstance(getattr(self, name), str):
                raise ConfigError(f"row {self.label!r}: {name} is {getattr(self, name)!r}, allowed is text")
        if not _LABEL.fullmatch(self.label):
            raise ConfigError(f"row label {self.label!r}: allowed are letters, digits and _ . + -")
        if self.method not in METHOD_NAMES:
            raise ConfigError(f"row {self.label}: method is {self.method!r}, allowed are {list(METHOD_NAMES)}")


@dataclass(frozen=True)
class More:
    """More episodes for some cells, after all others."""

    rows: tuple[str, ...]
    pairs: tuple[Pair, ...]
    episodes: int


@dataclass(frozen=True)
class Headline:
    """Labels of the rows that stand beside the paper's, that the targets are about, and that the short tables show."""

    naive: str = "naive"
    a2c2: str = "a2c2"  # the shipped head
    paper_recipe: tuple[str, ...] = ()  # heads by the paper's recipe, or a part of it
    moving: tuple[str, ...] = ()  # a2c2 on variants in which things move
    tasks: tuple[str, ...] = ()  # also in the table by task, at their first pair
    failures: tuple[str, ...] = ()  # also in the table of failures, at their first pair; none: all rows at all pairs
    speed: tuple[str, ...] = ()  # in the table of speeds; none: all

    @property
    def others(self) -> set[str]:
        """All labels but the first two."""
        return {*self.paper_recipe, *self.moving, *self.tasks, *self.failures, *self.speed}


@dataclass(frozen=True)
class Grid:
    """A grid file."""

    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...]
    episodes: int  # official initial states per task, from 0
    tasks: tuple[int, ...] = tuple(conventions.TASKS)
    more: tuple[More, ...] = ()
    headline: Headline = field(default_factory=Headline)
    max_steps: int = conventions.MAX_STEPS
    results: Path = Path("results/libero")  # a JSON file per cell
    runs: Path = Path("runs/libero")  # the episodes
    page: Path = Path("docs/libero.md")

    def __post_init__(self) -> None:
        labels = [row.label for row in self.rows]
        if not labels or len(set(labels)) < len(labels):
            raise ConfigError(f"row labels are {labels}, allowed are one or more, each once")
        for what, used in (
            ("more", {label for entry in self.more for label in entry.rows}),
            ("baseline", {row.baseline for row in self.rows if row.baseline}),
        ):
            if unknown := sorted(used - set(labels)):
                raise ConfigError(f"{what} names the rows {unknown}, there are {labels}")
        for episodes in (self.episodes, *(entry.episodes for entry in self.more)):
            if type(episodes) is not int or not 1 <= episodes <= conventions.N_INITIAL_STATES:
                raise ConfigError(f"episodes is {episodes!r}, allowed is 1 to {conventions.N_INITIAL_STATES}")

    def row(self, label: str) -> Row | None:
        """The row with a label."""
        return next((row for row in self.rows if row.label == label), None)

    def baseline(self, row: Row) -> Row | None:
        """The row that a row is compared with on the same initial states.

        It is the one that the row names, else naive with the same policy, variant, seed and jitter. None for naive, the
        expert, and where there is no such row.
        """
        if row.baseline:
            return self.row(row.baseline)
        if row.method in ("naive", EXPERT):
            return None

        def conditions(of: Row) -> tuple[object, ...]:
            return of.policy, of.variant, of.seed, of.inference_delay_jitter

        naive = (other for other in self.rows if other.method == "naive")
        return next((other for other in naive if conditions(other) == conditions(row)), None)

    @property
    def variants(self) -> list[str]:
        """In the order of the rows."""
        return list(dict.fromkeys(row.variant for row in self.rows))

    def all_pairs(self, variant: str) -> list[Pair]:
        """The grid's pairs, then those that only single rows of a variant have."""
        own = [pair for row in self.rows if row.variant == variant for pair in row.pairs]
        return list(dict.fromkeys([*self.pairs, *own]))

    def of_split(self, split: str) -> "Grid":
        """The grid with the files of a split: only the test split's are where the file says."""
        if split == "test":
            return self
        return dataclasses.replace(self, results=self.results / split, page=self.results / split / "libero.md")


@dataclass(frozen=True)
class LeftOut:
    """A cell that is not run, and why."""

    cell: Cell
    reason: str
    same_as: str = ""  # name of the cell whose episodes would be the same


def default_grid() -> Path:
    """The shipped grid file."""
    return share_directory() / "config" / GRID_FILE


def load_grid(path: Path, *, quick: bool = False) -> Grid:
    """Read a grid file.

    Args:
        path: YAML.
        quick: Use its section ``quick``: other tasks, rows (by label), pairs, episodes and folders.

    Raises:
        ConfigError: Naming the file and what is wrong in it.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"grid file {path} cannot be read: {error}") from error
    try:
        return _parse(data, quick)
    except ConfigError as error:
        raise ConfigError(f"grid file {path}: {error}") from error


def _parse(data: Any, quick: bool) -> Grid:
    if not isinstance(data, dict):
        raise ConfigError("it is not a mapping")
    data = dict(data)
    changes = data.pop("quick", None)
    models = {
        "policy": data.pop("policy", PlannerConfig().policy_path),
        "head": data.pop("head", ControllerConfig().correction__model_path),
    }
    rows = [_make(Row, {**models, **_pairs_of(row)}, "rows") for row in _list(data.get("rows"), "rows")]
    headline = dict(_mapping(data.get("headline", {}), "headline"))
    names = {f.name for f in dataclasses.fields(Headline)} - {"naive", "a2c2"}
    lists = {n: tuple(_list(headline[n], f"headline.{n}")) for n in names & headline.keys()}
    data["headline"] = _make(Headline, headline | lists, "headline")
    if unknown := data["headline"].others - {row.label for row in rows}:
        raise ConfigError(f"headline names {sorted(unknown)}, which is not in rows")
    if quick:
        changes = dict(_mapping(changes, "quick"))
        wanted = _list(changes.pop("rows", [row.label for row in rows]), "quick.rows")
        if unknown := set(wanted) - {row.label for row in rows}:
            raise ConfigError(f"quick.rows names {sorted(unknown)}, which is not in rows")
        # A part of the rows on a part of the cells: what is beyond them has no place in it.
        rows = [dataclasses.replace(r, pairs=(), baseline="") for r in rows if r.label in wanted]
        data = {**data, "more": [], **changes}
    data["rows"] = tuple(rows)
    data["pairs"] = _pairs(data.get("pairs"), "pairs")
    more = [_pairs_of(entry) for entry in _list(data.get("more", []), "more")]
    data["more"] = tuple(_make(More, m | {"rows": tuple(_list(m.get("rows"), "more.rows"))}, "more") for m in more)
    if "tasks" in data:
        data["tasks"] = tuple(conventions.parse_tasks(str(data["tasks"])))
    for name in ("results", "runs", "page"):
        if name in data:
            data[name] = Path(str(data[name]))
    return _make(Grid, data, "it")


def _make(kind: type, values: Any, where: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(kind)}
    values = _mapping(values, where)
    required = [n for n, f in known.items() if f.default is f.default_factory is dataclasses.MISSING]
    missing, unknown = [n for n in required if n not in values], sorted(set(values) - set(known))
    if missing or unknown:
        raise ConfigError(f"{where} lacks {missing} and has unknown {unknown}, allowed are {list(known)}")
    return kind(**values)


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is {value!r}, allowed is a mapping")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ConfigError(f"{where} is {value!r}, allowed is a list")
    return value


def _pairs_of(entry: Any) -> dict[str, Any]:
    entry = dict(_mapping(entry, "an entry of rows or more"))
    return entry | ({"pairs": _pairs(entry["pairs"], "pairs")} if "pairs" in entry else {})


def _pairs(value: Any, where: str) -> tuple[Pair, ...]:
    for pair in _list(value, where):
        if not (isinstance(pair, list) and len(pair) == 2 and all(type(number) is int for number in pair)):
            raise ConfigError(f"{where} has {pair!r}, allowed is [e, d] in steps")
    return tuple((e, d) for e, d in value)


def make_cell(grid: Grid, row: Row, pair: Pair | None, split: str) -> Cell:
    """The cell of a row at a pair; the expert has none."""
    names = ("label", "method", "seed", "variant")
    values = {name: getattr(row, name) for name in names} | {"split": split, "max_steps": grid.max_steps}
    if row.method == EXPERT:
        return Cell(**values)
    head = row.head if METHODS[row.method].corrected else ""
    return Cell(
        **values,
        execution_horizon=pair[0],
        inference_delay=pair[1],
        inference_delay_jitter=row.inference_delay_jitter,
        policy=row.policy,
        head=head,
    )


def _pair(cell: Cell) -> tuple[int | None, int | None]:
    return cell.execution_horizon, cell.inference_delay


def equivalent_method(cell: Cell) -> str:
    """A simpler method that does the same at this (e, d), or the cell's own.

    Without delay nothing has to be waited for or clean: sync and tt_rtc are naive. When all H slots are executed, RTC
    has nothing to go on from.
    """
    if cell.method == EXPERT:
        return cell.method
    chunking, corrected = METHODS[cell.method].chunking, METHODS[cell.method].corrected
    longest = cell.inference_delay + cell.inference_delay_jitter
    alike = (chunking in ("synchronous", "tt_rtc") and longest == 0) or (
        chunking == "rtc" and cell.execution_horizon >= policy_facts(cell.policy)["horizon"]
    )
    return ("a2c2" if corrected else "naive") if alike else cell.method


def plan(grid: Grid, split: str = "test") -> tuple[list[tuple[Cell, int]], list[LeftOut]]:
    """What to run, the most important first, and what not.

    A variant is finished before the next one begins, since it needs processes of its own; within it the pairs come in
    their order, with all rows each, and at the end what has more episodes.

    Returns:
        (cell, episodes per task), and the cells left out.
    """
    cells: list[Cell] = []
    left_out: list[LeftOut] = []
    for variant in grid.variants:
        rows = [row for row in grid.rows if row.variant == variant]
        for number, pair in enumerate(grid.all_pairs(variant)):
            for row in rows:
                once = row.method == EXPERT
                if (once and number) or (not once and pair not in (row.pairs or grid.pairs)):
                    continue
                cell = make_cell(grid, row, pair, split)
                try:
                    check_cell(cell)
                except A2C2Error as error:
                    left_out.append(LeftOut(cell, str(error)))
                else:
                    cells.append(cell)
    there = {_identity(cell, cell.method): cell.name for cell in cells}
    kept = []
    for cell in cells:
        method = equivalent_method(cell)
        other = there.get(_identity(cell, method)) if method != cell.method else None
        if other is None:
            kept.append(cell)
        else:
            left_out.append(LeftOut(cell, f"the same method as {other} at this (e, d)", other))
    planned = [(cell, grid.episodes) for cell in kept]
    for entry in grid.more:
        chosen = [c for pair in entry.pairs for c in kept if _pair(c) == pair and c.label in entry.rows]
        planned += [(cell, entry.episodes) for cell in chosen if entry.episodes > grid.episodes]
    order = {variant: number for number, variant in enumerate(grid.variants)}
    return sorted(planned, key=lambda entry: order[entry[0].variant]), left_out


def _identity(cell: Cell, method: str) -> Cell:
    return dataclasses.replace(cell, label="", method=method)


def make_items(grid: Grid, cells: Sequence[tuple[Cell, int]]) -> list[Item]:
    """Cells with their folders and files."""
    stores: dict[Cell, EpisodeStore] = {}
    for cell, _ in cells:
        if cell not in stores:
            stores[cell] = EpisodeStore.named(grid.runs, cell)
    return [Item(cell, n, stores[cell], grid.results / f"{cell.name}.json") for cell, n in cells]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m a2c2_ros.evaluation.grid",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--grid", type=Path, help=f"YAML file; default: the package's config/{GRID_FILE}")
    p.add_argument("--quick", action="store_true", help="its section quick: a part, some minutes")
    p.add_argument("--cells", nargs="+", metavar="PATTERN", help="only these, for example 'a2c2_*' '*_e40_d10'")
    p.add_argument("--split", choices=SPLITS, default="test", help="initial states: official, or sampled to choose by")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="episodes at the same time")
    p.add_argument(
        "--processes",
        type=int,
        help="simulators that are kept, running or waiting for the next cell of their task; fewer need less memory and "
        "start more often; default: one per task, as far as 60%% of the free memory allows",
    )
    p.add_argument("--budget-minutes", type=float, help="begin no episode after this time")
    p.add_argument("--retry-exceptions", action="store_true", help="run episodes again that ended in an exception")
    p.add_argument("--list", action="store_true", help="print the cells, what is there and what is left out")
    p.add_argument("--no-report", action="store_true", help="do not write the page")
    return p


def default_processes(workers: int, tasks: int, free_bytes: int) -> int:
    """How many simulators to keep: one per task, within ``MEMORY_SHARE`` of the free memory, at least ``workers``."""
    return max(workers, min(tasks, int(MEMORY_SHARE * free_bytes / PROCESS_BYTES)))


def _free_bytes() -> int:
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))


def print_list(items: Sequence[Item], left_out: Sequence[LeftOut], grid: Grid) -> None:
    """The cells in their order with the episodes here and those in the result's file, then what is left out."""
    for item in items:
        state = progress([item], grid.tasks)
        there = stored(item.out, item.store.settings)
        print(f"{item.cell.name:32} {item.cell.variant:10} {state.done:5}/{state.episodes:<5} {there}".rstrip())
    for entry in left_out:
        there = stored(grid.results / f"{entry.cell.name}.json", settings_without_weights(entry.cell))
        print(f"{entry.cell.name:32} {entry.cell.variant:10} left out: {entry.reason} {there}".rstrip())


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 if processes died, 2 for wrong settings, 130 if ended."""
    from a2c2_ros.evaluation import report

    args = parser().parse_args(argv)
    started = time.monotonic()
    if args.workers < 1 or (args.processes is not None and args.processes < 1):
        raise ConfigError(f"--workers is {args.workers}, --processes is {args.processes}, allowed is 1 or more")
    grid = load_grid(args.grid or default_grid(), quick=args.quick).of_split(args.split)
    processes = args.processes or default_processes(args.workers, len(grid.tasks), _free_bytes())
    cells, left_out = plan(grid, args.split)
    if args.cells:
        names = [cell.name for cell, _ in cells]
        cells = [(c, n) for c, n in cells if any(fnmatchcase(c.name, p) for p in args.cells)]
        if not cells:
            raise ConfigError(f"--cells {args.cells} matches none of {names}")
    items = make_items(grid, cells)
    if args.list:
        print_list(items, left_out, grid)
        return 0
    for reason in dict.fromkeys(f"{e.cell.label}: {e.reason}" for e in left_out if not e.same_as):
        print(f"left out: {reason}", file=sys.stderr)

    def stop() -> bool:
        return args.budget_minutes is not None and time.monotonic() - started > 60 * args.budget_minutes

    interrupt_on_termination()
    code = 0
    try:
        run_items(
            items,
            grid.tasks,
            lambda task, variant: ProcessWorker.libero(task, variant, grid.runs / "logs"),
            workers=args.workers,
            processes=processes,
            stop=stop,
            again=args.retry_exceptions,
        )
    except A2C2Error as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    state = progress(items, grid.tasks)
    print(
        f"{state.done} of {state.episodes} episodes, {state.complete} of {state.cells} cells"
        + ("" if state.done == state.episodes else "; run the same command again to continue")
    )
    if not args.no_report:
        report.write(grid, args.split)
    return code


if __name__ == "__main__":
    sys.exit(main())
