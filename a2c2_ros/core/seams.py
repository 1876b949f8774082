"""How smoothly chunks follow each other: how far actions change from tick to tick, at the seams and between them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from a2c2_ros.core.timing import Window


@dataclass(frozen=True)
class Change:
    """From one tick to the next, the largest over the channels [action units]."""

    seam: bool  # the second tick is another chunk's
    base: float  # of the chunk's actions
    command: float  # of what was sent


class ChangeMeter:
    """Compares each tick with the one before it.

    Args:
        keep: Channels that are left out: grippers, which jump on purpose.
    """

    def __init__(self, keep: Sequence[int] = ()) -> None:
        self._keep = tuple(keep)
        self._used = np.zeros(0, dtype=np.intp)  # the other channels
        self._last: tuple[int, np.ndarray] | None = None

    def add(self, chunk: int, base: np.ndarray, command: np.ndarray | None, missed: int) -> Change | None:
        """Take one tick.

        Args:
            chunk: What identifies the chunk that was executed; 0: none was, the tick held, waited or was a person's.
            base: (A,) its action.
            command: (A,) what was sent; None: nothing.
            missed: Ticks that were skipped before this one.

        Returns:
            The change since the tick before, None where one of both executed no chunk.
        """
        last, self._last = self._last, None
        if not chunk or command is None:
            return None
        rows = np.array((base, command), dtype=np.float64)
        self._last = chunk, rows
        if last is None or last[1].shape != rows.shape:
            self._used = np.array([i for i in range(rows.shape[1]) if i not in self._keep], dtype=np.intp)
            return None
        if missed or not self._used.size:
            return None
        base_change, command_change = np.abs(rows - last[1])[:, self._used].max(axis=1)
        return Change(chunk != last[0], float(base_change), float(command_change))


class Seams:
    """Collects changes: at seams and between them, of the chunks' actions and of the commands."""

    def __init__(self) -> None:
        self._windows = {(seam, what): Window() for seam in (True, False) for what in ("base", "command")}

    def add(self, change: Change) -> None:
        """Take one change."""
        self._windows[change.seam, "base"].add(change.base)
        self._windows[change.seam, "command"].add(change.command)

    def percentiles(self, qs: Sequence[int]) -> dict[str, float | None]:
        """Name, as ``seam_command_p99``, to value [action units]; None without a measurement."""
        return {
            f"{'seam' if seam else 'between_seams'}_{what}_p{q}": window.percentile(q)
            for (seam, what), window in self._windows.items()
            for q in qs
        }
