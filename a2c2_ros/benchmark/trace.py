"""What a control loop did in a cell of the benchmark, and the numbers from it. Pure functions of time stamps.

A tick has a *scheduled* time, on a grid of whole periods, a *start* and the time at which its command was published.
All of them are on the ROS clock, in nanoseconds, and so are the stamps of the samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

STAMP_TOLERANCE_NS = 1_000
"""Ages travel as float32 seconds, so a stamp that is rebuilt from one is off by some nanoseconds."""


@dataclass(frozen=True, eq=False)
class Trace:
    """The ticks of a loop in their order."""

    scheduled_ns: np.ndarray  # (n,) int64
    started_ns: np.ndarray  # (n,) int64
    commanded_ns: np.ndarray  # (n,) int64, when the command had been published; 0 if none was
    head_ns: np.ndarray  # (n,) int64, duration of the head; 0 if it did not run
    states: np.ndarray  # (n,) str, what the loop said of itself
    stamps_ns: Mapping[str, np.ndarray]  # stream -> (n,) int64, stamp of the newest sample at the tick; -1 if none

    def between(self, begin_ns: int, end_ns: int) -> "Trace":
        """The ticks that were scheduled in [begin, end)."""
        chosen = (self.scheduled_ns >= begin_ns) & (self.scheduled_ns < end_ns)
        arrays = (self.scheduled_ns, self.started_ns, self.commanded_ns, self.head_ns, self.states)
        return Trace(*(a[chosen] for a in arrays), {name: a[chosen] for name, a in self.stamps_ns.items()})

    def __len__(self) -> int:
        return len(self.scheduled_ns)


def steps_between(trace: Trace, period_ns: int) -> np.ndarray:
    """Grid points from each tick to the next, (n - 1,) int64; 1 where no tick was missed."""
    return np.rint(np.diff(trace.scheduled_ns) / period_ns).astype(np.int64)


def period_errors_ms(trace: Trace, period_ns: int) -> np.ndarray:
    """How far apart consecutive ticks started, less the periods between them, (n - 1,) float64 [ms], signed.

    A missed tick is counted by :func:`missed_ticks` and is not an error of the period here.
    """
    return (np.diff(trace.started_ns) - steps_between(trace, period_ns) * period_ns) / 1e6


def missed_ticks(trace: Trace, period_ns: int, begin_ns: int, end_ns: int) -> int:
    """Points of the trace's grid in [begin, end) on which no tick ran."""
    if not len(trace):
        return (end_ns - begin_ns) // period_ns
    between = np.maximum(steps_between(trace, period_ns) - 1, 0).sum()
    before = (trace.scheduled_ns[0] - begin_ns) // period_ns
    after = (end_ns - 1 - trace.scheduled_ns[-1]) // period_ns
    return int(before + between + after)


def command_latencies_ms(trace: Trace) -> np.ndarray:
    """Scheduled time to publication of the command, (m,) float64 [ms], of the ticks that sent one."""
    sent = trace.commanded_ns > 0
    return (trace.commanded_ns - trace.scheduled_ns)[sent] / 1e6


def command_ages_ms(trace: Trace, streams: Sequence[str]) -> np.ndarray:
    """Age of the newest observation when the command was published, (m,) float64 [ms]; of several streams, the oldest.

    Ticks without a command or without a sample of every stream are left out.
    """
    stamps = np.stack([trace.stamps_ns[name] for name in streams])
    used = (trace.commanded_ns > 0) & (stamps >= 0).all(axis=0)
    return (trace.commanded_ns - stamps.min(axis=0))[used] / 1e6


def summary(values: np.ndarray) -> dict[str, float] | None:
    """Median, 99th percentile and largest value, or None without a value."""
    if not len(values):
        return None
    p50, p99 = np.percentile(values, (50, 99))
    return {"p50": round(float(p50), 4), "p99": round(float(p99), 4), "max": round(float(np.max(values)), 4)}


def absent(published_ns: np.ndarray, seen_ns: np.ndarray) -> int:
    """How many published samples are not among the seen ones; both are stamps [ns], in any order."""
    if not len(seen_ns):
        return len(published_ns)
    seen = np.sort(seen_ns)
    right = np.searchsorted(seen, published_ns)
    nearest = np.minimum(
        np.abs(seen[np.minimum(right, len(seen) - 1)] - published_ns),
        np.abs(seen[np.maximum(right - 1, 0)] - published_ns),
    )
    return int((nearest > STAMP_TOLERANCE_NS).sum())


def lost(
    published_ns: np.ndarray, counts: Sequence[tuple[int, int]], used_ns: np.ndarray, transport_ns: int = 8_000_000
) -> dict[str, int] | None:
    """Samples lost between a publisher and a node that reports, now and then, how many it has received so far.

    A sample that was on its way at a report may be in its count or not. So in each half of the reports one is taken
    when none was, if there is one, and otherwise what is possible is said to be lost, unless a tick has used it.

    Args:
        published_ns: Stamps of the published samples [ns].
        counts: Time of each report [ns] and samples received until then, in order.
        used_ns: Stamps of the samples that were the newest of some tick [ns].
        transport_ns: Longest time from publication to reception that is expected [ns].

    Returns:
        "published": samples published between two reports; how many of them were "lost" at most, and how many "unused"
        by any tick. None if there are not two reports.
    """
    if len(counts) < 2:
        return None

    def under_way(time_ns: int) -> int:
        return int(((published_ns > time_ns - transport_ns) & (published_ns <= time_ns)).sum())

    half = len(counts) // 2
    begin, first = min(counts[:half], key=lambda report: (under_way(report[0]), report[0]))
    end, last = min(counts[half:], key=lambda report: (under_way(report[0]), -report[0]))
    sent = published_ns[(published_ns > begin) & (published_ns <= end)]
    unused = absent(sent, used_ns)
    missing = len(sent) + under_way(begin) - (last - first)
    return {"published": len(sent), "lost": max(0, min(missing, unused)), "unused": unused}
