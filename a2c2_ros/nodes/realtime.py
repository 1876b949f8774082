"""The threads of the control loop: a tick on absolute deadlines, and the preparation of images beside it."""

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable

from rclpy.clock import ClockType, JumpThreshold, ROSClock
from rclpy.duration import Duration
from rclpy.node import Node

LONGEST_SLEEP_S = 0.05
"""How long a stop or a step of the system clock may go unnoticed."""
SPIN_S = 0.0001
"""The last wait before a deadline is spent awake: a wake-up takes about this long."""


def become_realtime(priority: int) -> str:
    """Ask for SCHED_FIFO for the calling thread, but not for threads that it starts; below 1 nothing is asked for.

    Returns:
        What it runs under, for the log.
    """
    if priority < 1:
        return "no real-time priority (not asked for)"
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(priority))
    except OSError as error:
        return (
            f"no real-time priority ({error.strerror}); to allow it: `ulimit -r {priority}` or an rtprio entry in "
            "/etc/security/limits.conf"
        )
    return f"SCHED_FIFO priority {priority}"


def become_normal() -> None:
    """Undo :func:`become_realtime`."""
    with contextlib.suppress(OSError):
        # The flag stays: Linux refuses to clear it without CAP_SYS_NICE, and then the priority would stay, too.
        os.sched_setscheduler(0, os.SCHED_OTHER | os.SCHED_RESET_ON_FORK, os.sched_param(0))


class TickThread:
    """Calls a function at every deadline of a grid on the ROS clock, from a thread of its own.

    Deadlines are absolute; who calls decides which tick is due, so a late wake-up neither shifts nor bunches the next.
    Beside it the executor's thread takes the messages: a tick waits for no callback.

    Args:
        node: Owner; its clock is the ROS clock, simulated or not.
        period_ns: Control period [ns].
        next_ns: The next deadline on the ROS clock [ns]; None: at once.
        lead_s: How long before a deadline ``on_lead`` is called [s]; 0: never. Not on a simulated clock.
        on_lead: Prepares for the tick.
        on_tick: Called at the deadline, and when the clock went back.
        on_standstill: Called about every period of steady time while the clock stands still.
        standstill_s: Steady time without a change after which a simulated clock is said to stand still [s].
        on_failure: Called with the exception that ended the thread.
        priority: SCHED_FIFO priority, 0 for none.
    """

    def __init__(
        self,
        node: Node,
        period_ns: int,
        next_ns: Callable[[], int | None],
        lead_s: float,
        on_lead: Callable[[], None],
        on_tick: Callable[[], None],
        on_standstill: Callable[[], None],
        standstill_s: Callable[[], float],
        on_failure: Callable[[Exception], None],
        priority: int,
    ) -> None:
        self._clock: ROSClock = node.get_clock()
        assert self._clock.clock_type == ClockType.ROS_TIME
        self._period_ns = period_ns
        self._next_ns = next_ns
        self._lead_s = lead_s
        self._on_lead = on_lead
        self._on_tick = on_tick
        self._on_standstill = on_standstill
        self._standstill_s = standstill_s
        self._on_failure = on_failure
        self._priority = priority
        self._stopping = False
        self._led_ns: int | None = None  # the deadline that on_lead was called for
        self._clock_moved = threading.Event()
        self._jump_handle = self._clock.create_jump_callback(
            JumpThreshold(
                min_forward=Duration(nanoseconds=1), min_backward=Duration(nanoseconds=-1), on_clock_change=True
            ),
            post_callback=lambda jump: self._clock_moved.set(),
        )
        self.scheduling = ""
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="control loop", daemon=True)
        self._thread.start()
        self._started.wait()

    @property
    def leads(self) -> bool:
        """True if ``on_lead`` is called before the ticks."""
        return self._lead_s > 0.0 and not self._clock.ros_time_is_active

    def stop(self) -> None:
        """End the thread after the tick that it is in."""
        self._stopping = True
        self._clock_moved.set()
        self._thread.join()
        self._jump_handle.unregister()

    def _run(self) -> None:
        self.scheduling = become_realtime(self._priority)
        self._started.set()
        try:
            while not self._stopping:
                if self._wait():
                    self._on_tick()
        except Exception as error:  # noqa: BLE001, the node ends with it instead of living on without its loop
            self._on_failure(error)

    def _wait(self) -> bool:
        """Wait for the deadline; False if the thread is to end."""
        period_s = self._period_ns / 1e9
        last_ns, still_since_s = None, time.monotonic()
        while not self._stopping:
            deadline_ns, now_ns = self._next_ns(), self._clock.now().nanoseconds
            simulated = self._clock.ros_time_is_active
            if now_ns or not simulated:  # 0: no time has come on /clock yet
                if deadline_ns is None:
                    return True
                remaining_ns = deadline_ns - now_ns
                # A deadline is at most a period away; TickGrid takes a period more for a clock that went back.
                if remaining_ns <= 0 or remaining_ns >= 2 * self._period_ns:
                    return True
            if not simulated:
                self._sleep(remaining_ns / 1e9, deadline_ns)
                continue
            self._clock_moved.wait(min(period_s, LONGEST_SLEEP_S))
            self._clock_moved.clear()
            if now_ns != last_ns:
                last_ns, still_since_s = now_ns, time.monotonic()
            elif time.monotonic() - still_since_s > self._standstill_s():
                self._on_standstill()
                still_since_s += period_s
        return False

    def _sleep(self, remaining_s: float, deadline_ns: int) -> None:
        """Come nearer to a deadline of the system clock."""
        if remaining_s > LONGEST_SLEEP_S + self._lead_s:
            time.sleep(LONGEST_SLEEP_S)
        elif self._lead_s and self._led_ns != deadline_ns:
            time.sleep(max(remaining_s - self._lead_s, 0.0))
            self._led_ns = deadline_ns
            self._on_lead()
        else:
            time.sleep(max(remaining_s - SPIN_S, 0.0))
            while 0 < deadline_ns - self._clock.now().nanoseconds < self._period_ns:
                pass


class LatestWorker:
    """Runs a function on the newest item of each key, in a thread beside the control loop.

    An item that was not begun when a newer one comes is dropped: what is late is not worth the time.

    Args:
        work: Called with key and item.
        priority: SCHED_FIFO priority, 0 for none. A tick that gives the interpreter to a thread waits until that thread
            has taken it, and a thread without priority may have to wait for other processes first.
        longest_s: Work that took longer [s] costs the next item the priority: else the threads of DDS, which have none,
            could not take messages.
        now_s: A clock that only goes forward [s].
    """

    def __init__(
        self,
        work: Callable[[str, object], None],
        priority: int = 0,
        longest_s: float = math.inf,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._work = work
        self._priority = priority
        self._longest_s = longest_s
        self._now_s = now_s
        self._items: dict[str, object] = {}
        self._changed = threading.Condition()
        self._stopping = False
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="image preparation", daemon=True)
        self._thread.start()

    def submit(self, key: str, item: object) -> None:
        """Hand over an item; never waits for the work."""
        with self._changed:
            self.dropped += key in self._items
            self._items[key] = item
            self._changed.notify()

    def stop(self) -> None:
        """End the thread after the item that it is at."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        took_s = 0.0
        while True:
            if took_s > self._longest_s:
                become_normal()
            else:
                become_realtime(self._priority)
            with self._changed:
                while not self._items and not self._stopping:
                    self._changed.wait()
                if self._stopping:
                    return
                key = next(iter(self._items))
                item = self._items.pop(key)
            begun_s = self._now_s()
            self._work(key, item)
            took_s = self._now_s() - begun_s
