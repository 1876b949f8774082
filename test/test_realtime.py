"""The threads of the control loop, on a clock that the test moves."""

import errno
import os
import queue
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

rclpy = pytest.importorskip("rclpy")

from rclpy.clock import ClockType
from rclpy.time import Time

from a2c2_ros.benchmark.processes import fifo_threads
from a2c2_ros.core.timing import TickGrid
from a2c2_ros.nodes import realtime
from a2c2_ros.nodes.realtime import LatestWorker, TickThread, become_realtime

PERIOD_NS = 10_000_000
WAIT_S = 20.0


class Loop:
    """A tick thread whose calls the test awaits."""

    def __init__(self, standstill_s=1000.0, on_tick=None):
        self.context = rclpy.Context()
        rclpy.init(context=self.context, domain_id=99)
        self.node = rclpy.create_node("clocked", context=self.context, use_global_arguments=False)
        self.clock = self.node.get_clock()
        self.clock._set_ros_time_is_active(True)
        self.grid = TickGrid(PERIOD_NS)
        self.ticks, self.standstills, self.failures = [], [], []
        self.called = threading.Condition()
        self.thread = TickThread(
            self.node,
            PERIOD_NS,
            next_ns=lambda: self.grid.next_ns,
            lead_s=0.0,
            on_lead=lambda: None,
            on_tick=on_tick or self.on_tick,
            on_standstill=lambda: self.note(self.standstills, None),
            standstill_s=lambda: standstill_s,
            on_failure=lambda error: self.note(self.failures, error),
            priority=0,
        )

    def on_tick(self):
        self.note(self.ticks, self.grid.tick(self.clock.now().nanoseconds))

    def note(self, calls, value):
        with self.called:
            calls.append(value)
            self.called.notify()

    def wait(self, condition):
        with self.called:
            assert self.called.wait_for(condition, WAIT_S)

    def set_time(self, ns):
        self.clock.set_ros_time_override(Time(nanoseconds=ns, clock_type=self.clock.clock_type))

    def close(self):
        self.thread.stop()
        self.node.destroy_node()
        rclpy.shutdown(context=self.context)


@pytest.fixture
def loop():
    loop = Loop()
    yield loop
    loop.close()


def test_ticks_follow_the_ros_clock_skip_what_was_missed_and_see_it_go_back(loop):
    t0 = 5_000_000_000
    for n, expected in ((0, 0), (1, 0), (2, 0), (5, 2), (6, 0)):
        seen = len(loop.ticks)
        loop.set_time(t0 + n * PERIOD_NS)
        loop.wait(lambda seen=seen: len(loop.ticks) > seen)
        assert (loop.ticks[-1].t_tick_ns, loop.ticks[-1].missed) == (t0 + n * PERIOD_NS, expected)
    loop.set_time(t0 + 6 * PERIOD_NS + PERIOD_NS // 2)
    loop.set_time(t0 + 7 * PERIOD_NS)
    loop.wait(lambda: loop.ticks[-1].t_tick_ns == t0 + 7 * PERIOD_NS)
    assert len(loop.ticks) == 6, "no tick before its time"
    loop.set_time(t0 - 3 * PERIOD_NS)
    loop.wait(lambda: loop.ticks[-1].jump_ns < 0)


def test_a_clock_that_stands_still_is_reported_and_never_started_is_too():
    loop = Loop(standstill_s=0.0)
    try:
        loop.wait(lambda: len(loop.standstills) > 2)
        assert not loop.ticks
        loop.set_time(5_000_000_000)
        loop.wait(lambda: loop.ticks)
    finally:
        loop.close()


class SystemClock:
    """Time goes on by what the thread sleeps, and by a microsecond whenever it looks."""

    clock_type, ros_time_is_active = ClockType.ROS_TIME, False

    def __init__(self):
        self.ns = 5_000_000_000

    def now(self):
        self.ns += 1000
        return SimpleNamespace(nanoseconds=self.ns)

    def sleep(self, duration_s):
        assert 0 <= duration_s <= realtime.LONGEST_SLEEP_S
        self.ns += round(duration_s * 1e9)

    def create_jump_callback(self, *_, **__):
        return SimpleNamespace(unregister=lambda: None)


@pytest.mark.parametrize("period_ns", [PERIOD_NS, 20 * PERIOD_NS])
def test_before_every_tick_of_the_system_clock_there_is_one_lead(monkeypatch, period_ns):
    clock, grid, calls, over = SystemClock(), TickGrid(period_ns), [], threading.Event()
    monkeypatch.setattr(realtime, "time", SimpleNamespace(sleep=clock.sleep, monotonic=time.monotonic))

    def on_tick():
        tick = grid.tick(clock.now().nanoseconds)
        assert tick.missed == 0 and tick.lateness_ns < 10_000
        calls.append(("tick", tick.t_tick_ns))
        if len(calls) > 10:
            raise EOFError

    def on_lead():
        assert 1_990_000 < grid.next_ns - clock.ns < 2_010_000
        calls.append(("lead", grid.next_ns))

    failures = []
    thread = TickThread(
        SimpleNamespace(get_clock=lambda: clock),
        period_ns,
        next_ns=lambda: grid.next_ns,
        lead_s=0.002,
        on_lead=on_lead,
        on_tick=on_tick,
        on_standstill=over.set,
        standstill_s=lambda: 0.0,
        on_failure=lambda error: failures.append(error) or over.set(),
        priority=0,
    )
    assert over.wait(WAIT_S)
    thread.stop()
    assert [type(error) for error in failures] == [EOFError]
    first_ns = calls[0][1]
    deadlines = [first_ns + n * period_ns for n in range(1, 6)]
    assert calls == [("tick", first_ns), *((what, t_ns) for t_ns in deadlines for what in ("lead", "tick"))]


def test_an_exception_in_the_tick_reaches_the_owner():
    def fail():
        raise ValueError("broken")

    loop = Loop(on_tick=fail)
    try:
        loop.set_time(5_000_000_000)
        loop.wait(lambda: loop.failures)
        assert str(loop.failures[0]) == "broken"
    finally:
        loop.close()


def test_only_the_newest_item_of_each_key_is_worked_on():
    done, begun, go_on = queue.Queue(), threading.Event(), threading.Event()

    def work(key, item):
        begun.set()
        assert go_on.wait(WAIT_S)
        done.put((key, item))

    worker = LatestWorker(work)
    worker.submit("a", 1)
    assert begun.wait(WAIT_S)
    for item in (2, 3, 4):
        worker.submit("a", item)
    worker.submit("b", 5)
    go_on.set()
    assert [done.get(timeout=WAIT_S) for _ in range(3)] == [("a", 1), ("a", 4), ("b", 5)]
    worker.stop()
    assert worker.dropped == 2


def test_after_work_that_took_too_long_the_next_has_no_priority():
    if not real_time_is_permitted():
        pytest.skip("no permission for SCHED_FIFO")
    done, clock_s = queue.Queue(), [0.0]

    def work(key, duration_s):
        done.put(os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK)
        clock_s[0] += duration_s

    worker = LatestWorker(work, priority=1, longest_s=0.01, now_s=lambda: clock_s[0])
    seen = []
    for duration_s in (0.009, 0.02, 0.001, 0.009):
        worker.submit("a", duration_s)
        seen.append(done.get(timeout=WAIT_S))
    worker.stop()
    assert seen == [os.SCHED_FIFO, os.SCHED_FIFO, os.SCHED_OTHER, os.SCHED_FIFO]


def in_a_thread(work):
    """What work returns in a thread that ends with it."""
    answers = queue.Queue()
    thread = threading.Thread(target=lambda: answers.put(work()))
    thread.start()
    thread.join()
    return answers.get_nowait()


def real_time_is_permitted():
    """As the kernel says."""

    def ask():
        try:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        except PermissionError:
            return False
        return True

    return in_a_thread(ask)


def test_the_benchmark_counts_the_threads_with_priority():
    if not real_time_is_permitted():
        pytest.skip("no permission for SCHED_FIFO")
    before, has_priority, may_end = fifo_threads(os.getpid()), threading.Event(), threading.Event()

    def run():
        become_realtime(1)
        has_priority.set()
        may_end.wait(WAIT_S)

    threads = [threading.Thread(target=run), threading.Thread(target=may_end.wait)]
    for thread in threads:
        thread.start()
    try:
        assert has_priority.wait(WAIT_S)
        assert fifo_threads(os.getpid()) == before + 1
    finally:
        may_end.set()
        for thread in threads:
            thread.join()


def test_the_priority_can_be_given_back_without_privileges():
    if not real_time_is_permitted():
        pytest.skip("no permission for SCHED_FIFO")
    code = """
import os
from a2c2_ros.nodes.realtime import become_normal, become_realtime
become_realtime(1)
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
before = os.sched_getscheduler(0)
become_normal()
print(before & ~os.SCHED_RESET_ON_FORK, os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK)
"""
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert answer.stdout.split() == [str(os.SCHED_FIFO), str(os.SCHED_OTHER)]


def test_a_thread_gets_the_priority_that_it_asks_for():
    def scheduling():
        return os.sched_getscheduler(0), os.sched_getparam(0).sched_priority

    def become(priority):
        before = scheduling()
        return become_realtime(priority), before, scheduling()

    text, before, after = in_a_thread(lambda: become(0))
    assert text == "no real-time priority (not asked for)" and before == after
    if not real_time_is_permitted():
        pytest.skip("no permission for SCHED_FIFO")
    text, _, after = in_a_thread(lambda: become(1))
    assert text == "SCHED_FIFO priority 1" and after == (os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, 1)


def test_a_priority_that_is_not_permitted_is_done_without(monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    text = in_a_thread(lambda: become_realtime(7))
    assert "no real-time priority (Operation not permitted)" in text and "`ulimit -r 7`" in text
