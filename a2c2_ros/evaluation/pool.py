"""Episodes over long-lived worker processes, in the order given, whatever the number of processes."""

import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from a2c2_ros.core.errors import A2C2Error
from a2c2_ros.evaluation.cells import Cell
from a2c2_ros.evaluation.worker import Worker, WorkerError

MAX_DEATHS = 3
"""Worker processes that may die; after that something is wrong with all of them."""
LOOKAHEAD = 4
"""With fewer processes than tasks, a process takes up to this many cells of its task before it makes room."""


@dataclass(frozen=True)
class Unit:
    """Episodes of one task of one cell; one process runs them one after the other."""

    cell: Cell
    task: int
    numbers: tuple[int, ...]

    @property
    def place(self) -> tuple[int, str]:
        """What a process is made for: task and variant."""
        return self.task, self.cell.variant


Start = Callable[[int, str], Worker]
Done = Callable[[Unit, int, dict[str, Any]], None]


class Pool:
    """Gives units to workers.

    Args:
        start: Makes a worker for a task and a variant; it may fail later, in ``run``.
        workers: Episodes at the same time.
        processes: Most processes alive, running or waiting for the next cell of their task; at least ``workers``.
    """

    def __init__(self, start: Start, workers: int, processes: int) -> None:
        self._start, self._workers, self._processes = start, workers, max(workers, processes)
        self._lock = threading.Lock()
        self._waiting: list[Unit] = []
        self._idle: list[tuple[tuple[int, str], Worker]] = []  # the one that waits longest first
        self._busy: list[Worker] = []
        self._errors: list[str] = []
        self._stopped = False

    def run(self, units: Sequence[Unit], done: Done, stop: Callable[[], bool] = lambda: False) -> None:
        """Run the units; the first ones begin first. Every process is ended afterwards, whatever happens.

        Args:
            units: What to run.
            done: Called with every record, never by two threads at once.
            stop: Asked before every episode; True ends the run when the present episodes are over.

        Raises:
            A2C2Error: If processes died; the other units were run, unless ``MAX_DEATHS`` died.
        """
        self._waiting = list(units)
        self._places = len({unit.place for unit in units})
        try:
            with ThreadPoolExecutor(self._workers) as threads:
                slots = [threads.submit(self._slot, done, stop) for _ in range(self._workers)]
                try:
                    for slot in slots:
                        slot.result()
                except BaseException:
                    self._abort()
                    raise
        finally:
            for _, worker in self._idle:
                worker.close()
            self._idle = []
        if self._errors:
            raise A2C2Error("; ".join(self._errors) + "; run the same command again to continue")

    def _slot(self, done: Done, stop: Callable[[], bool]) -> None:
        while (taken := self._take(stop)) is not None:
            unit, worker = taken
            try:
                for number in unit.numbers:
                    if self._stopped or stop():
                        break
                    record = worker.run(unit.cell, number)
                    with self._lock:
                        done(unit, number, record)
            except WorkerError as error:
                with self._lock:
                    self._busy.remove(worker)
                    if not self._stopped:
                        self._errors.append(str(error))
                worker.close()
            else:
                with self._lock:
                    self._busy.remove(worker)
                    self._idle.append((unit.place, worker))

    def _take(self, stop: Callable[[], bool]) -> tuple[Unit, Worker] | None:
        with self._lock:
            if not self._waiting or self._stopped or len(self._errors) >= MAX_DEATHS or stop():
                return None
            ready = {place for place, _ in self._idle}
            first = self._waiting[0]
            if first.place not in ready and len(self._idle) + len(self._busy) >= self._processes:
                window = self._waiting[: LOOKAHEAD * self._places]
                first = next((unit for unit in window if unit.place in ready), first)
            self._waiting.remove(first)
            index = next((i for i, (place, _) in enumerate(self._idle) if place == first.place), None)
            if index is not None:
                worker = self._idle.pop(index)[1]
            else:
                if len(self._idle) + len(self._busy) >= self._processes:
                    self._idle.pop(0)[1].close()
                worker = self._start(*first.place)
            self._busy.append(worker)
            return first, worker

    def _abort(self) -> None:
        print("ending the processes", file=sys.stderr)
        with self._lock:
            self._stopped = True
            busy = list(self._busy)
        for worker in busy:
            worker.close()
