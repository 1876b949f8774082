"""Reads a bag, whole or damaged: MCAP from any writer (ours, ``ros2 bag record``), several files, and sqlite3."""

import contextlib
import heapq
import json
import re
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import yaml
import zstandard

from a2c2_ros.core.errors import ConfigError
from a2c2_ros.recording.mcap_file import DROPPED, ENDED, McapFile

ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"  # no CDR message begins with it
COPY_BYTES = 2**20
KINDS = (".mcap", ".db3", ".mcap.zstd", ".db3.zstd")


class Message(NamedTuple):
    """One message as it came over the wire."""

    topic: str  # full name, with a leading slash
    type: str  # such as "sensor_msgs/msg/Image"
    log_ns: int  # when the recorder received it [ns]; in simulated time that of the ROS clock
    publish_ns: int  # when it was published [ns]; equal to log_ns if the writer did not know
    data: bytes  # CDR: deserialize with rclpy.serialization, or with read_types(path) and rosbags


@dataclass
class DamageReport:
    """What could not be read; filled while :func:`read_bag` is iterated, complete when it is exhausted."""

    files: list[str] = field(default_factory=list)  # names of the files that were read, in order
    messages: dict[str, int] = field(default_factory=dict)  # topic -> messages read
    problems: list[str] = field(default_factory=list)  # in words: file, byte offset, what is wrong
    bytes_lost: int = 0  # bytes in damaged chunks and after the last whole record; a cut chunk's beginning is read
    dropped: dict[str, int] = field(default_factory=dict)  # topic -> messages that never reached the bag, if it says so

    @property
    def intact(self) -> bool:
        """Nothing is damaged or missing."""
        return not self.problems


def read_bag(
    path: Path | str, topics: Collection[str] | None = None, report: DamageReport | None = None
) -> Iterator[Message]:
    """Messages of a bag in the order of their log time, whatever state it is in.

    Needs no metadata.yaml, no footer and no index. A damaged bag gives what can be read, for a file that was cut a
    prefix of its messages; damage is never an exception. Memory is bounded: one chunk per file at a time.

    Args:
        path: A bag folder, or one ``.mcap`` or ``.db3`` file.
        topics: Full names of the topics wanted; None for all.
        report: Gets what was read and what was lost.

    Raises:
        ConfigError: If ``path`` does not exist or has no bag file in it, naming what is allowed.
    """
    files = bag_files(Path(path))
    return _read(Path(path), files, topics, report or DamageReport())


def read_types(path: Path | str) -> dict[str, str]:
    """Definitions of the recorded types, as written in the bag: type name -> text (ros2msg with its dependencies).

    Raises:
        ConfigError: As :func:`read_bag`.
    """
    types: dict[str, str] = {}
    for path_of_file in bag_files(Path(path)):
        with contextlib.ExitStack() as stack:
            file, _ = _uncompressed(path_of_file, stack)
            if file.suffix == ".db3":
                types |= _sqlite_types(file)
                continue
            mcap = stack.enter_context(McapFile(file))
            if not mcap.schemas:  # without a summary they are in the chunks
                mcap.learn()
            types |= {schema.name: schema.data.decode(errors="replace") for schema in mcap.schemas.values()}
    return types


def bag_files(path: Path) -> list[Path]:
    """Files of a bag in their order.

    Raises:
        ConfigError: As :func:`read_bag`.
    """
    if path.is_file() and path.name.endswith(KINDS):
        return [path]
    if path.is_dir():
        files = [file for file in path.iterdir() if file.name.endswith(KINDS)]
        if files:  # bag_10 comes after bag_9
            return sorted(files, key=lambda f: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", f.name)])
        raise ConfigError(f"{path} holds no bag file, allowed are {', '.join(KINDS)}")
    raise ConfigError(f"{path} is no bag, allowed are a bag folder and a file ending in {', '.join(KINDS)}")


def _read(path: Path, files: list[Path], topics: Collection[str] | None, report: DamageReport) -> Iterator[Message]:
    report.files += [file.name for file in files]
    report.problems += [f"{name}: is in metadata.yaml, but missing" for name in _listed(path) - set(report.files)]
    with contextlib.ExitStack() as stack:
        parts = []
        for file in files:
            uncompressed, problems = _uncompressed(file, stack)
            report.problems += [f"{file.name}: {problem}" for problem in problems]
            read = _read_sqlite if uncompressed.suffix == ".db3" else _read_mcap
            parts.append(read(uncompressed, None if topics is None else set(topics), report))
        for message in heapq.merge(*parts, key=lambda m: m.log_ns):
            if message.data.startswith(ZSTD_MAGIC):  # rosbag2's compression mode "message"
                try:
                    data = zstandard.ZstdDecompressor().decompressobj().decompress(message.data)
                except zstandard.ZstdError as error:
                    report.problems.append(f"{message.topic} at {message.log_ns}: cannot be decompressed: {error}")
                    continue
                message = message._replace(data=data)
            report.messages[message.topic] = report.messages.get(message.topic, 0) + 1
            yield message


def _read_mcap(path: Path, topics: set[str] | None, report: DamageReport) -> Iterator[Message]:
    with McapFile(path) as file:
        for channel, log_ns, publish_ns, data in file.messages(lambda topic: topics is None or topic in topics):
            schema = file.schemas.get(channel.schema_id)
            yield Message(channel.topic, schema.name if schema else "", log_ns, publish_ns or log_ns, data)
        try:
            for topic, count in json.loads(file.note.get(DROPPED, "{}")).items():
                report.dropped[topic] = max(int(count), report.dropped.get(topic, 0))  # each counts from the beginning
        except (ValueError, AttributeError, TypeError):
            report.problems.append(f"{path.name}: what was dropped cannot be read")
        report.bytes_lost += file.bytes_lost
        report.problems += [f"{path.name}: {problem}" for problem in file.problems]
        if reason := file.note.get(ENDED):
            report.problems.append(f"{path.name}: the recording ended before the run did: {reason}")


def _read_sqlite(path: Path, topics: set[str] | None, report: DamageReport) -> Iterator[Message]:
    import apsw  # these take a second, and few bags are of this kind
    from rosbags.rosbag2 import Reader, ReaderError

    try:
        with Reader(path) as bag:
            wanted = [c for c in bag.connections if topics is None or c.topic in topics]
            for connection, log_ns, data in bag.messages(wanted) if wanted else ():
                yield Message(connection.topic, connection.msgtype, log_ns, log_ns, bytes(data))
    except (ReaderError, apsw.Error) as error:
        report.problems.append(f"{path.name}: {error}")


def _sqlite_types(path: Path) -> dict[str, str]:
    import apsw
    from rosbags.rosbag2 import Reader, ReaderError

    with contextlib.suppress(ReaderError, apsw.Error), Reader(path) as bag:
        return {connection.msgtype: connection.msgdef.data for connection in bag.connections}
    return {}


def _listed(path: Path) -> set[str]:
    """Files that metadata.yaml names, if it can be read."""
    try:
        content = yaml.safe_load((path / "metadata.yaml").read_text(encoding="utf-8"))
        return {Path(name).name for name in content["rosbag2_bagfile_information"]["relative_file_paths"]}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return set()


def _uncompressed(path: Path, stack: contextlib.ExitStack) -> tuple[Path, list[str]]:
    """The file itself, or a temporary copy of what rosbag2 compressed as a whole, and what is wrong with it."""
    if path.suffix != ".zstd":
        return path, []
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="a2c2_ros_bag_")))
    copy = folder / path.stem
    decompressor = zstandard.ZstdDecompressor().decompressobj()
    try:
        with path.open("rb") as source, copy.open("wb") as target:
            while data := source.read(COPY_BYTES):
                target.write(decompressor.decompress(data))
    except zstandard.ZstdError as error:
        return copy, [f"cannot be decompressed to its end: {error}"]
    return copy, [] if decompressor.eof else ["the compressed file is cut"]
