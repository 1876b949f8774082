"""Takes messages without waiting and writes them on a thread of its own, in bounded memory."""

import errno
import json
import os
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from a2c2_ros.recording.mcap_file import DROPPED
from a2c2_ros.recording.writer import BagWriter, Topic, in_words

IMAGES = ("sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage")
IMAGES_SHARE = 0.75
"""Part of the queue that images may fill. The rest is for everything else: small messages, it holds minutes of them."""
OVERHEAD_BYTES = 500
"""What an item of the queue takes beside its data."""
FLUSH_S = 0.5
"""What is older than this and was taken is with the kernel."""


@dataclass(frozen=True)
class Status:
    """How a recording goes."""

    size_bytes: int  # of the bag
    queue_bytes: int
    dropped: dict[str, int]  # topic -> messages that did not reach the bag
    ended: str  # why no more is recorded; "" while it goes on


class Recorder:
    """A bag that is written by a thread.

    When the writer is too slow, images are dropped first; all that is dropped is counted, and the counts are written
    to the bag. An error or a disk that is nearly full ends the recording and leaves a valid bag that says so.

    Args:
        bag: Used by the thread alone from now on.
        max_queue_bytes: Bound of what waits for the thread.
        min_free_bytes: The recording ends when the file system has less than this left.
        now_s: A clock that only goes forward [s].
    """

    def __init__(
        self,
        bag: BagWriter,
        max_queue_bytes: int,
        min_free_bytes: int = 0,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._bag = bag
        self._max_queue_bytes = max_queue_bytes
        self._min_free_bytes = min_free_bytes
        self._now_s = now_s
        self._changed = threading.Condition()
        self._queue: deque[tuple[Topic, int, int, bytes]] = deque()
        self._queue_bytes = 0
        self._dropped = Counter[str]()
        self._noted: dict[str, int] = {}
        self._size_bytes = 0
        self._closing = False
        self._ended = ""
        self._thread = threading.Thread(target=self._run, name="bag writer", daemon=True)
        self._thread.start()

    def put(self, topic: Topic, log_ns: int, publish_ns: int, data: bytes) -> None:
        """Hand a message over; never waits for the disk."""
        size = len(data) + OVERHEAD_BYTES
        limit = self._max_queue_bytes * (IMAGES_SHARE if topic.type in IMAGES else 1.0)
        with self._changed:
            if self._closing:
                return
            if self._ended or self._queue_bytes + size > limit:
                self._dropped[topic.name] += 1
                return
            self._queue.append((topic, log_ns, publish_ns, data))
            self._queue_bytes += size
            self._changed.notify()

    def count_lost(self, topic: str, count: int) -> None:
        """Count messages that were lost on their way here."""
        with self._changed:
            self._dropped[topic] += count

    def status(self) -> Status:
        """How it goes."""
        with self._changed:
            return Status(self._size_bytes, self._queue_bytes, dict(self._dropped), self._ended)

    def close(self, timeout_s: float) -> bool:
        """Write what waits and finish the bag; False if the disk did not take it in time."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._record()
        except Exception as error:  # noqa: BLE001, whatever it is, nothing more is recorded
            self._end(in_words(error))
        try:
            if ended := self._bag.close(self._ended):
                self._end(ended)
            self._size_bytes = self._bag.size_bytes
        except Exception as error:  # noqa: BLE001, as above
            words = f"repair it before it is read: {in_words(error)}"
            self._end(f"{self._ended or 'the bag could not be finished'}; {words}")

    def _record(self) -> None:
        flush_s = 0.0
        while True:
            if self._now_s() >= flush_s:
                self._flush()
                flush_s = self._now_s() + FLUSH_S
            with self._changed:
                if self._queue:
                    item = self._queue[0]
                elif self._closing:
                    break
                else:
                    self._changed.wait(max(0.0, flush_s - self._now_s()))
                    continue
            self._bag.write(*item)
            with self._changed:
                self._queue.popleft()
                self._queue_bytes -= len(item[-1]) + OVERHEAD_BYTES
        self._flush()

    def _flush(self) -> None:
        self._bag.flush()
        with self._changed:
            self._size_bytes = self._bag.size_bytes
            dropped = dict(self._dropped)
        if dropped != self._noted:
            self._bag.note({DROPPED: json.dumps(dropped)})
            self._noted = dropped
        self._check_space()

    def _check_space(self) -> None:
        space = os.statvfs(self._bag.folder)
        free = space.f_bavail * space.f_frsize
        if free < self._min_free_bytes:
            text = f"{os.strerror(errno.ENOSPC)}: {free / 1e6:.0f} MB are free, min_free_mb is"
            raise OSError(f"{text} {self._min_free_bytes / 1e6:.0f}")

    def _end(self, reason: str) -> None:
        with self._changed:
            self._ended = reason
            self._dropped.update(topic.name for topic, *_ in self._queue)
            self._queue.clear()
            self._queue_bytes = 0
