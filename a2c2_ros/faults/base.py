"""What a named fault is, and what the groups of them have in common."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from a2c2_ros.core.safety import LATCHED, MOVING, Reason, State
from a2c2_ros.faults.monitor import Judge

if TYPE_CHECKING:
    from a2c2_ros.faults.dds import Mark, System, World

STALE = (Reason.OBSERVATION_STALE, Reason.OBSERVATION_MISSING)
TICK_SHARE = 0.9  # of the ticks that are due, at least so many come
FUTURE = (*STALE, Reason.OBSERVATION_FUTURE)


class UnmetError(AssertionError):
    """Something that had to happen did not."""


class SkippedError(Exception):
    """This machine cannot do it; the message says why."""


@dataclass(frozen=True)
class Scenario:
    """One named fault."""

    name: str
    group: str  # scenarios of a group share what is started for it
    does: str
    expects: str
    run: Callable[[Any], str | None]  # with what the group started; returns what is worth telling
    at_start: bool = False  # the robot need not move before

    @property
    def where(self) -> str:
        """``core`` or ``dds``."""
        return "core" if self.group == "core" else "dds"


SCENARIOS: dict[str, Scenario] = {}
GROUPS: dict[str, Callable[[Path], contextlib.AbstractContextManager[Any]]] = {}
OWN_PROCESS = {"network"}
"""Groups that need a process of their own: the middleware looks at the network's interfaces once."""


def scenario(group: str, name: str, does: str, expects: str, at_start: bool = False) -> Callable[[Callable], Callable]:
    """Register a scenario; the decorated function runs it."""

    def add(run: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
        SCENARIOS[name] = Scenario(name, group, does, expects, run, at_start)
        return run

    return add


def group(name: str) -> Callable[[Callable], Callable]:
    """Register what a group starts: a generator that yields its bench, given a folder."""

    def add(start: Callable[[Path], Iterator[Any]]) -> Callable:
        GROUPS[name] = contextlib.contextmanager(start)
        return start

    return add


def must(condition: bool, what: str) -> None:
    """Raise :class:`UnmetError` unless the condition holds."""
    if not condition:
        raise UnmetError(what)


class NodeBench:
    """A controller process in a world."""

    def __init__(self, folder: Path, system: "System", world: "World") -> None:
        self.folder = folder
        self.system = system
        self.world = world
        self.begun_ns: int | None = None

    @property
    def judges(self) -> list[Judge]:
        """The one judge."""
        return [self.world.judge]

    def ready(self) -> None:
        """The robot moves; a person enables it if need be."""
        world = self.world
        world.wait_for(lambda: bool(world.steps), "the first step")
        if world.steps[-1].state in LATCHED:
            must(world.enable().success, "enabled")
        world.wait_for(lambda: world.steps[-1].state in MOVING, "motion")

    def begin(self) -> None:
        """Everything so far is judged; what comes is the scenario's."""
        self.settle()
        self.begun_ns = None
        self.world.tick_share = TICK_SHARE

    def fault_begins(self) -> None:
        """From now on the time until the hold is measured."""
        self.begun_ns = time.time_ns()

    def settle(self) -> None:
        """Let everything arrive and be judged."""
        self.world.settle()

    def holds_for(self, begin: Callable[[], None], end: Callable[[], None], *reasons: Reason) -> None:
        """Do something that must hold the robot, and undo it: it must move again."""
        world = self.world
        begin()
        if reasons != (Reason.CHUNK_EXPIRED,):  # until its chunk is used up the robot needs no planner
            self.fault_begins()
        held = world.wait_state(State.HOLDING)
        must(held.reason in reasons, f"HOLDING for {[r.name for r in reasons]}, not for {held.reason.name}")
        world.stays(0.5, lambda s: s.state == State.HOLDING, "it stays HOLDING")
        end()
        world.wait_for(lambda: world.steps[-1].state in MOVING, "motion after the end of the fault")

    def keeps_moving(self, duration_s: float, share: float = 1.0) -> None:
        """The robot moves in at least this share of the ticks."""
        begin = self.world.mark()
        self.world.spin_for(duration_s)
        self.moved_since(begin, share)

    def moved_since(self, begin: "Mark", share: float = 1.0) -> None:
        """The robot moved in at least this share of the ticks since then, and nearly all that were due came."""
        steps = self.world.since(begin)
        moving = sum(s.state in MOVING for s in steps) / len(steps)
        must(moving >= share, f"moving in {share:.0%} of the ticks, not in {moving:.0%}")


@contextlib.contextmanager
def closing(*items: Any) -> Iterator[None]:
    """Close the items at the end, the first one first."""
    try:
        yield
    finally:
        for item in items:
            item.close()
