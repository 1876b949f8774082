"""Runs the missing episodes of cells and writes the result of each cell as soon as it is complete."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from a2c2_ros.evaluation.cells import Cell, EpisodeStore, summarise, valid_episodes, write_result
from a2c2_ros.evaluation.pool import Pool, Start, Unit
from a2c2_ros.settings import differing


@dataclass(frozen=True)
class Item:
    """A cell and how much of it is wanted."""

    cell: Cell
    episodes: int  # per task
    store: EpisodeStore
    out: Path  # JSON file of the result


@dataclass
class Progress:
    """Where a run stands."""

    episodes: int = 0  # wanted
    done: int = 0  # of them, there
    cells: int = 0
    complete: int = 0  # of them


def progress(items: Sequence[Item], tasks: Sequence[int]) -> Progress:
    """Count what is there; a cell that is wanted twice counts with its larger number of episodes."""
    largest: dict[Path, Item] = {}
    for item in items:
        if item.store.folder not in largest or item.episodes > largest[item.store.folder].episodes:
            largest[item.store.folder] = item
    found = Progress(cells=len(largest))
    for item in largest.values():
        missing = sum(len(item.store.missing(task, item.episodes)) for task in tasks)
        found.episodes += len(tasks) * item.episodes
        found.done += len(tasks) * item.episodes - missing
        found.complete += not missing
    return found


def publish(item: Item, tasks: Sequence[int]) -> None:
    """Write the result of a complete cell, unless the file has more.

    A file of equal settings is kept if it has these very rollouts, perhaps among others, or more valid ones. A file of
    other settings is replaced. Both are told.
    """
    new = summarise(item.cell, item.store.settings, tasks, item.store.read(tasks, item.episodes))
    if item.out.exists():
        old = json.loads(item.out.read_text(encoding="utf-8"))
        wrong = differing(old, item.store.settings)
        count, fresh = len(valid_episodes(old["rollouts"])), len(valid_episodes(new["rollouts"]))
        if not wrong:
            same = old.get("tasks") == list(tasks)
            if same and all(rollout in old["rollouts"] for rollout in new["rollouts"]):
                return
            if fresh < count:
                tqdm.write(
                    f"{item.out} is kept: it has {count} valid episodes of the same settings, {fresh} were run here",
                    file=sys.stderr,
                )
                return
        which = f"other settings ({'; '.join(wrong)})" if wrong else "the same settings"
        tqdm.write(f"{item.out} is replaced: {count} valid episodes of {which}, {fresh} were run here", file=sys.stderr)
    write_result(item.out, new)


def stored(path: Path, settings: Mapping[str, Any]) -> str:
    """What a result's file holds, in words; empty if there is none."""
    if not path.exists():
        return ""
    result = json.loads(path.read_text(encoding="utf-8"))
    other = f" of other settings ({'; '.join(wrong)})" if (wrong := differing(result, settings)) else ""
    return f"result: {len(valid_episodes(result['rollouts']))}{other}"


def run_items(
    items: Sequence[Item],
    tasks: Sequence[int],
    start: Start,
    *,
    workers: int,
    processes: int,
    stop: Callable[[], bool] = lambda: False,
    again: bool = False,
) -> Progress:
    """Run what is missing, in the order of the items.

    Args:
        items: The most important first.
        tasks: Task numbers.
        start: Makes a worker, see :class:`Pool`.
        workers: Episodes at the same time.
        processes: See :class:`Pool`.
        stop: Asked before every episode.
        again: Run episodes anew that ended in an exception.

    Returns:
        What is there at the end.

    Raises:
        A2C2Error: If worker processes died; what was finished is kept.
    """
    before = progress(items, tasks)
    units: list[Unit] = []
    wanted: dict[Path, set[tuple[int, int]]] = {item.store.folder: set() for item in items}
    waits: dict[int, int] = {}  # index of an item to the episodes that it waits for
    stores: dict[Cell, EpisodeStore] = {item.cell: item.store for item in items}
    for index, item in enumerate(items):
        scheduled, waits[index] = wanted[item.store.folder], 0
        for task in tasks:
            numbers = item.store.missing(task, item.episodes, again=again)
            waits[index] += len(numbers)
            if fresh := tuple(n for n in numbers if (task, n) not in scheduled):
                units.append(Unit(item.cell, task, fresh))
                scheduled.update((task, n) for n in fresh)
        if not waits[index]:
            publish(item, tasks)

    complete = before.complete
    tally: dict[str, list[int]] = {}
    to_run = sum(len(unit.numbers) for unit in units)
    with tqdm(total=max(before.episodes, to_run), initial=max(0, before.episodes - to_run), unit="episode") as bar:

        def done(unit: Unit, number: int, record: dict[str, Any]) -> None:
            nonlocal complete
            stores[unit.cell].write(unit.task, number, record)
            for index, item in enumerate(items):
                if item.cell == unit.cell and number < item.episodes:
                    waits[index] -= 1
                    if not waits[index]:
                        publish(item, tasks)
                        last = max(other.episodes for other in items if other.cell == item.cell)
                        complete += item.episodes == last
            count = tally.setdefault(unit.cell.name, [0, 0, 0])
            count[0] += bool(record.get("success"))
            count[1] += 1
            count[2] += record["error"] is not None
            bar.set_description(unit.cell.name, refresh=False)
            bar.set_postfix_str(
                f"success {count[0]}/{count[1] - count[2]}, exceptions {sum(c[2] for c in tally.values())}, "
                f"cells {complete}/{before.cells}",
                refresh=False,
            )
            bar.update()

        if units:
            Pool(start, workers, processes).run(units, done, stop)
    return progress(items, tasks)
