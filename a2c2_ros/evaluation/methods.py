"""How chunks are executed: the methods that the evaluations compare."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One way to run a policy."""

    chunking: str  # parameter of the planner, see ``core.config.PlannerConfig``
    corrected: bool  # the correction head runs


METHODS = {
    "sync": Method("synchronous", False),
    "naive": Method("asynchronous", False),
    "rtc": Method("rtc", False),
    "tt_rtc": Method("tt_rtc", False),
    "a2c2": Method("asynchronous", True),
    "rtc+a2c2": Method("rtc", True),
    "tt_rtc+a2c2": Method("tt_rtc", True),
}
