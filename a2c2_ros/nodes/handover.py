"""What the executor's thread and the thread of the control loop hand to each other."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from rclpy.callback_groups import CallbackGroup
from rclpy.node import Node

from a2c2_ros.core.errors import StateError

ANSWER_TIMEOUT_S = 5.0
"""How long a question waits for the control loop."""


class Handover:
    """Changes of the loop, for before its next tick, and work of the loop that may block, for the executor.

    Args:
        node: Whose executor does the work.
        group: Callback group of the work; one with the callbacks that it must not overlap with.
    """

    def __init__(self, node: Node, group: CallbackGroup) -> None:
        self.threaded = False
        """Whether the loop has a thread of its own; without one everything is done at once, by the caller."""
        self._changes: deque[Callable[[], None]] = deque()
        self._work: deque[Callable[[], None]] = deque()
        self._work_ready = node.create_guard_condition(self._do_work, callback_group=group)

    # --- on the executor's thread -------------------------------------------------------------------------------

    def post(self, change: Callable[[], None]) -> None:
        """Change the loop: before its next tick if it has a thread, else now."""
        if self.threaded:
            self._changes.append(change)
        else:
            change()

    def ask(self, change: Callable[[], Any], keep: bool) -> Any:
        """As :meth:`post`, and wait for the result or exception.

        Args:
            change: What is to be done.
            keep: A change that was not made in time is made later; else never.

        Raises:
            StateError: Of the change.
            TimeoutError: If the loop does not answer within ``ANSWER_TIMEOUT_S``.
        """
        answer = Future()

        def run_it() -> None:
            if not answer.set_running_or_notify_cancel():
                return
            try:
                answer.set_result(change())
            except StateError as error:
                answer.set_exception(error)

        self.post(run_it)
        try:
            return answer.result(timeout=ANSWER_TIMEOUT_S)
        except TimeoutError:
            # The person is told that it did not happen, so it must not happen later, unless it is a stop.
            if keep or answer.cancel():
                raise
            return answer.result()  # the loop has just begun with it

    def wake(self) -> None:
        """Let the executor look at what waits; from any thread."""
        self._work_ready.trigger()

    def end(self) -> None:
        """The loop's thread has ended: do what is left of both."""
        self.threaded = False
        self.take()
        self._do_work()

    def _do_work(self) -> None:
        while self._work:
            self._work.popleft()()

    # --- on the loop's thread -----------------------------------------------------------------------------------

    def take(self) -> None:
        """Make the changes that were posted."""
        while self._changes:
            self._changes.popleft()()

    def later(self, work: Callable[[], None]) -> None:
        """Do what may block, as logging, on the executor's thread."""
        self._work.append(work)
        if self.threaded:
            self.wake()
        else:
            self._do_work()
