"""Makes a valid bag of one whose recorder was killed, or that was damaged.

``python -m a2c2_ros.recording.repair BAG``: the repaired bag takes the place of BAG at once, the original is kept as
BAG.damaged. Prints what was lost as JSON. MCAP only.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from a2c2_ros.core.errors import A2C2Error, ConfigError
from a2c2_ros.recording.mcap_file import McapFile
from a2c2_ros.recording.reader import ZSTD_MAGIC, bag_files
from a2c2_ros.recording.writer import BagFile, FileInfo, Topic, write_metadata


@dataclass(frozen=True)
class Repair:
    """What a repair did."""

    bag: str
    repaired: bool  # False: it was whole, nothing was changed
    original: str  # where the damaged one is; "" if it was not kept or nothing was changed
    messages: dict[str, int]  # topic -> messages in the bag
    problems: list[str]  # of the original
    bytes_lost: int  # of the original


def repair(path: Path, keep: bool = True) -> Repair:
    """Repair a bag in its place.

    Whole files are linked, damaged ones written anew; nothing of the original is changed.

    Args:
        path: The bag folder.
        keep: Keep the original as ``PATH.damaged``.

    Raises:
        ConfigError: If it is no folder with MCAP files or is being recorded, or ``PATH.damaged`` exists.
        OSError: If the disk is full; the bag is as it was then.
    """
    files = bag_files(path)
    if not path.is_dir() or any(file.suffix != ".mcap" for file in files):
        raise ConfigError(f"{path} cannot be repaired, allowed is a bag folder with .mcap files")
    for file in files:
        _check_released(file)
    new, old = path.with_name(f"{path.name}.repairing"), path.with_name(f"{path.name}.damaged")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    topics: dict[str, Topic] = {}
    infos: list[FileInfo] = []
    problems = [] if (path / "metadata.yaml").is_file() else ["metadata.yaml is missing"]
    bytes_lost, note = 0, {}
    try:
        for file in tqdm(files, unit="file", disable=None):
            with McapFile(file) as mcap:
                infos.append(_checked(mcap, file.name, topics))
                if mcap.problems:
                    checked, infos[-1] = infos[-1], _written_anew(mcap, new / file.name, topics)
                    if infos[-1].counts != checked.counts:
                        raise OSError(f"{new / file.name} could not be written: {infos[-1].ended}")
                else:
                    _link(file, new / file.name)
                problems += [f"{file.name}: {problem}" for problem in dict.fromkeys(mcap.problems)]
                bytes_lost += mcap.bytes_lost
                note |= mcap.note
        if problems and old.exists():
            raise ConfigError(f"{old} exists already, of an earlier repair")
        if problems:
            write_metadata(new, infos, list(topics.values()), note)
            path.rename(old)
            new.rename(path)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    if problems and not keep:
        shutil.rmtree(old)
    counts = sum((info.counts for info in infos), Counter())
    return Repair(str(path), bool(problems), str(old) if problems and keep else "", dict(counts), problems, bytes_lost)


def _checked(mcap: McapFile, name: str, topics: dict[str, Topic]) -> FileInfo:
    """Read every message; adds to ``topics``."""
    info = FileInfo(name)
    for channel, log_ns, _, data in mcap.messages():
        if data.startswith(ZSTD_MAGIC):
            raise ConfigError(f"{name}: messages that are compressed one by one can be read, but not repaired")
        if channel.topic not in topics:
            schema = mcap.schemas.get(channel.schema_id)
            kind, text = (schema.name, schema.data.decode(errors="replace")) if schema else ("", "")
            qos, type_hash = (channel.metadata.get(key, "") for key in ("offered_qos_profiles", "topic_type_hash"))
            topics[channel.topic] = Topic(channel.topic, kind, text, type_hash, qos)
        info.add(channel.topic, log_ns)
    return info


def _written_anew(mcap: McapFile, target: Path, topics: dict[str, Topic]) -> FileInfo:
    copy = BagFile(target, "zstd" if mcap.compressed else "none")
    for channel, log_ns, publish_ns, data in mcap.messages():
        copy.write(topics[channel.topic], log_ns, publish_ns, data)
    if mcap.note:
        copy.note(mcap.note)
    return copy.close()


def _check_released(file: Path) -> None:
    with file.open("rb") as opened, contextlib.suppress(OSError):  # not every file system has locks
        try:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{file} is being recorded; stop the recorder first") from None


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m a2c2_ros.recording.repair", description=__doc__.splitlines()[0])
    parser.add_argument("bag", type=Path, help="bag folder")
    parser.add_argument("--discard", action="store_true", help="do not keep the original as BAG.damaged")
    args = parser.parse_args(argv)
    try:
        print(json.dumps(asdict(repair(args.bag, keep=not args.discard)), indent=2))
    except (A2C2Error, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
