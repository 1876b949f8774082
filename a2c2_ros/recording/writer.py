"""Writes a rosbag2 in MCAP: files that split by size, and ``metadata.yaml``. Knows nothing of nodes.

The bag is what ``ros2 bag record -s mcap`` writes (version 9, Jazzy and newer). The official ``mcap`` library writes
the records; it is used and not ``rosbags``, because it can end a chunk before it is full.
"""

import contextlib
import dataclasses
import fcntl
import os
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from mcap.writer import CompressionType
from mcap.writer import Writer as McapWriter

from a2c2_ros.core.errors import ConfigError
from a2c2_ros.recording.mcap_file import ENDED, NOTE, append_index

BAG_VERSION = 9
CHUNK_BYTES = 2**20
FLUSHES_KEPT = 64
"""The last flushes that may be given up for the index of a file on a full disk."""
UNLIMITED = 2**62
COMPRESSIONS = {"none": CompressionType.NONE, "zstd": CompressionType.ZSTD}


@dataclass(frozen=True)
class Topic:
    """A topic of a bag."""

    name: str  # full name
    type: str  # such as "sensor_msgs/msg/Image"
    definition: str  # ros2msg with its dependencies
    type_hash: str = ""  # RIHS01_...
    offered_qos_profiles: str = ""  # YAML, as rosbag2 writes it


@dataclass
class FileInfo:
    """What metadata.yaml says of a file."""

    name: str
    start_ns: int = 0
    end_ns: int = 0
    counts: Counter[str] = field(default_factory=Counter)  # topic name -> messages
    ended: str = ""  # why the rest of the run is not in it

    def add(self, topic: str, log_ns: int) -> None:
        """Count a message."""
        first = not self.counts
        self.start_ns = log_ns if first else min(self.start_ns, log_ns)
        self.end_ns = log_ns if first else max(self.end_ns, log_ns)
        self.counts[topic] += 1


class BagFile:
    """One MCAP file of a bag.

    After :meth:`flush` everything is with the kernel in complete chunks, so the end of the process cannot harm it.
    After a write error the file is cut back to its last flush, or farther if its index has no room then, and finished
    by :meth:`close`. While it is open it is locked (flock), so that nobody repairs it.
    """

    def __init__(self, path: Path, compression: str = "none") -> None:
        self._path = path
        self._output = _Output(path)
        # The size is looked at here: after an error it must be known where the last whole chunk ends.
        self._mcap = McapWriter(self._output, chunk_size=UNLIMITED, compression=COMPRESSIONS[compression])
        self._mcap.start(profile="ros2", library="a2c2_ros")
        self._channels: dict[str, int] = {}
        self._schemas: dict[str, int] = {}
        self._pending: list[tuple[str, int]] = []
        self._pending_bytes = 0
        self._flushed_bytes = self._output.tell()
        self._error = ""  # why it can only be closed
        self._given = 0  # messages
        self._note: dict[str, str] = {}
        self._info = FileInfo(path.name)
        self._earlier: deque[tuple[int, FileInfo]] = deque(maxlen=FLUSHES_KEPT)  # size and contents before each flush

    @property
    def size_bytes(self) -> int:
        """Size on the disk, without what waits for the next flush."""
        return self._flushed_bytes

    def write(self, topic: Topic, log_ns: int, publish_ns: int, data: bytes) -> None:
        """Append a message; a full chunk is flushed.

        Raises:
            OSError: If it could not be written; the file can only be closed then.
        """
        if topic.name not in self._channels:
            self._channels[topic.name] = self._register(topic)
        self._given += 1
        self._guarded(lambda: self._mcap.add_message(self._channels[topic.name], log_ns, data, publish_ns))
        self._pending.append((topic.name, log_ns))
        self._pending_bytes += len(data)
        if self._pending_bytes >= CHUNK_BYTES:
            self.flush()

    def note(self, values: Mapping[str, str]) -> None:
        """Write a metadata record.

        Raises:
            OSError: As :meth:`write`.
        """
        self._note.update(values)
        self.flush()
        self._guarded(lambda: self._mcap.add_metadata(NOTE, dict(self._note)))

    def flush(self) -> None:
        """Hand everything to the kernel as a complete chunk.

        Raises:
            OSError: As :meth:`write`.
        """
        before = self._flushed_bytes, dataclasses.replace(self._info, counts=Counter(self._info.counts))
        self._guarded(self._mcap.flush)
        if self._pending:
            self._earlier.append(before)
        for name, log_ns in self._pending:
            self._info.add(name, log_ns)
        self._pending.clear()
        self._pending_bytes = 0

    def close(self, ended: str = "") -> FileInfo:
        """Finish the file and wait until it is on the disk.

        Args:
            ended: Why the rest of the run is not recorded; "" if there is none. The file says so.

        Returns:
            What is in it; its ``ended`` says, too, what had to be given up.

        Raises:
            OSError: If it could not be finished; what was flushed can be read and repaired.
        """
        try:
            if not self._error:
                self.note({ENDED: ended}) if ended else self.flush()
                self._guarded(self._mcap.finish)
                self._info.ended = ended
        except Exception:  # noqa: BLE001, the next lines make the best of it
            pass
        try:
            if self._error:
                self._finish_what_fits(ended)
            self._output.sync()
        finally:
            self._output.close()
        return self._info

    def _finish_what_fits(self, ended: str) -> None:
        while True:
            self._output.cut(self._flushed_bytes)
            lost = self._given - self._info.counts.total()
            self._info.ended = f"{ended or self._error}; messages lost before that: {lost}" if lost else ended
            try:
                append_index(self._path, self._note | ({ENDED: self._info.ended} if self._info.ended else {}))
                return
            except OSError:
                if not self._earlier:
                    self._output.cut(self._flushed_bytes)
                    raise
                self._flushed_bytes, self._info = self._earlier.pop()

    def _guarded(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:
            self._error = in_words(error)
            raise
        self._flushed_bytes = self._output.tell()

    def _register(self, topic: Topic) -> int:
        if topic.type not in self._schemas:
            self._schemas[topic.type] = self._mcap.register_schema(topic.type, "ros2msg", topic.definition.encode())
        metadata = {"offered_qos_profiles": topic.offered_qos_profiles, "topic_type_hash": topic.type_hash}
        return self._mcap.register_channel(topic.name, "cdr", self._schemas[topic.type], metadata)


class BagWriter:
    """A bag: a folder with ``NAME_0.mcap``, ``NAME_1.mcap``, ... and ``metadata.yaml``.

    ``metadata.yaml`` names the finished files only, so that the bag can be read at any time; after the end of the
    process the file that was being written is added by ``a2c2_ros.recording.repair``.

    Args:
        folder: Made; must not exist.
        max_file_bytes: A file that has grown to this is followed by another; 0: one file.
        compression: Of the chunks: "none" or "zstd".

    Raises:
        ConfigError: If the folder exists.
        OSError: If it cannot be made.
    """

    def __init__(self, folder: Path, max_file_bytes: int = 0, compression: str = "none") -> None:
        if folder.exists():
            raise ConfigError(f"{folder} exists already; a bag is not overwritten, choose another out")
        folder.mkdir(parents=True)
        self.folder = folder
        self._max_file_bytes = max_file_bytes or UNLIMITED
        self._compression = compression
        self._topics: dict[str, Topic] = {}
        self._note: dict[str, str] = {}
        self._files: list[FileInfo] = []
        self._finished_bytes = 0
        self._file: BagFile | None = self._open(0)

    @property
    def size_bytes(self) -> int:
        """Size of the bag on the disk."""
        return self._finished_bytes + (self._file.size_bytes if self._file else 0)

    def write(self, topic: Topic, log_ns: int, publish_ns: int, data: bytes) -> None:
        """Append a message.

        Raises:
            OSError: If it could not be written; the bag can only be closed then.
        """
        if self._file.size_bytes >= self._max_file_bytes:
            following = self._open(len(self._files) + 1)
            try:
                ended = self._finish_file()
            finally:
                self._file = following
            if ended:
                raise OSError(ended)
        self._topics[topic.name] = topic
        self._file.write(topic, log_ns, publish_ns, data)

    def note(self, values: Mapping[str, str]) -> None:
        """Keep something about the bag itself: in the file as it is now, and as ``custom_data`` in metadata.yaml.

        Raises:
            OSError: As :meth:`write`.
        """
        self._note.update(values)
        if self._file is not None:
            self._file.note(self._note)

    def flush(self) -> None:
        """What was written survives the end of this process.

        Raises:
            OSError: As :meth:`write`.
        """
        if self._file is not None:
            self._file.flush()

    def close(self, ended: str = "") -> str:
        """Finish the file and write metadata.yaml.

        Args:
            ended: Why the rest of the run is not recorded; "" if there is none. File and metadata.yaml say so.

        Returns:
            The same, with what had to be given up.

        Raises:
            OSError: If something could not be written; what was flushed can be read and repaired.
        """
        return self._finish_file(ended) if self._file is not None else ended

    def _open(self, number: int) -> BagFile:
        return BagFile(self.folder / f"{self.folder.name}_{number}.mcap", self._compression)

    def _finish_file(self, ended: str = "") -> str:
        file, self._file = self._file, None
        info = file.close(ended)
        self._files.append(info)
        self._finished_bytes += file.size_bytes
        if info.ended:
            self._note[ENDED] = info.ended
        write_metadata(self.folder, self._files, list(self._topics.values()), self._note)
        return info.ended


def in_words(error: Exception) -> str:
    """What an error says; its type, too, unless the system's words suffice."""
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"


def write_metadata(
    folder: Path, files: Sequence[FileInfo], topics: Sequence[Topic], custom: Mapping[str, str] | None = None
) -> None:
    """Write ``metadata.yaml`` of a bag at once: there is the old one or the new one.

    Args:
        folder: The bag.
        files: In their order.
        topics: Every topic of the files.
        custom: Anything else.

    Raises:
        OSError: If it cannot be written.
    """
    counts = sum((file.counts for file in files), Counter())
    used = [file for file in files if file.counts]
    start_ns = min((file.start_ns for file in used), default=0)
    content = {
        "version": BAG_VERSION,
        "storage_identifier": "mcap",
        "duration": {"nanoseconds": max((file.end_ns for file in used), default=0) - start_ns},
        "starting_time": {"nanoseconds_since_epoch": start_ns},
        "message_count": counts.total(),
        "topics_with_message_count": [
            {
                "topic_metadata": {
                    "name": topic.name,
                    "type": topic.type,
                    "serialization_format": "cdr",
                    "offered_qos_profiles": yaml.safe_load(topic.offered_qos_profiles) or [],
                    "type_description_hash": topic.type_hash,
                },
                "message_count": counts[topic.name],
            }
            for topic in topics
        ],
        "compression_format": "",
        "compression_mode": "",
        "relative_file_paths": [file.name for file in files],
        "files": [
            {
                "path": file.name,
                "starting_time": {"nanoseconds_since_epoch": file.start_ns},
                "duration": {"nanoseconds": file.end_ns - file.start_ns},
                "message_count": file.counts.total(),
            }
            for file in files
        ],
        "custom_data": dict(custom or {}) or None,
        "ros_distro": os.environ.get("ROS_DISTRO", ""),
    }
    temporary = folder / ".metadata.yaml"
    with temporary.open("w", encoding="utf-8") as file:
        yaml.safe_dump({"rosbag2_bagfile_information": content}, file, sort_keys=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / "metadata.yaml")


class _Output:
    """File without a buffer. Python's own would try to write what is left in it after an error, at any time."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        with contextlib.suppress(OSError):  # not every file system has locks
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        """Nothing is held back."""

    def cut(self, size_bytes: int) -> None:
        self._file.truncate(size_bytes)

    def sync(self) -> None:
        os.fdatasync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
