"""Bags without nodes: written, read by others, cut, damaged, repaired; the queue when the disk does not follow."""

import itertools
import json
import queue
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
import zstandard

pytest.importorskip("mcap")

from mcap.writer import CompressionType
from mcap.writer import Writer as McapWriter
from rosbags.highlevel import AnyReader

from a2c2_ros.core.errors import ConfigError
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.paths import share_directory
from a2c2_ros.recording import topics as topics_module
from a2c2_ros.recording.reader import DamageReport, read_bag, read_types
from a2c2_ros.recording.recorder import Recorder
from a2c2_ros.recording.repair import main as repair_main
from a2c2_ros.recording.repair import repair
from a2c2_ros.recording.topics import absolute, qos_overrides, recorded_topics
from a2c2_ros.recording.writer import BagWriter, Topic

DURATION = "{sec: 9223372036, nsec: 854775807}"
LATCHED = f"""- history: keep_last
  depth: 1
  reliability: reliable
  durability: transient_local
  deadline: {DURATION}
  lifespan: {DURATION}
  liveliness: automatic
  liveliness_lease_duration: {DURATION}
  avoid_ros_namespace_conventions: false"""
TEXT = Topic(
    "/instruction",
    "std_msgs/msg/String",
    "string data\n",
    "RIHS01_df668c740482bbd48fb39d76a70dfd4bd59db1288021743503259e948f6b1a18",
    LATCHED,
)
FLAG = Topic(
    "/emergency_stop",
    "std_msgs/msg/Bool",
    "bool data\n",
    "RIHS01_feb91e995ff9ebd09c0cb3d2aed18b11077585839fb5db80193b62d74528f6c9",
)
IMAGE = Topic("/front/image", "sensor_msgs/msg/Image", "uint8[] data\n")


def text_cdr(text: str) -> bytes:
    data = text.encode() + b"\0"
    return b"\0\1\0\0" + struct.pack("<I", len(data)) + data


def flag_cdr(value: bool) -> bytes:
    return b"\0\1\0\0" + bytes([value])


def made_messages(count: int) -> list[tuple[Topic, int, int, bytes]]:
    """(topic, log_ns, publish_ns, data) in order of log time, several with the same."""
    rng = np.random.default_rng(0)
    out = []
    for i in range(count):
        log_ns = 10**18 + i // 3
        data = flag_cdr(bool(i % 2)) if i % 5 == 0 else text_cdr(f"{i} {rng.bytes(rng.integers(200)).hex()}")
        out.append((FLAG if i % 5 == 0 else TEXT, log_ns, log_ns - 7, data))
    return out


def write_bag(path: Path, messages, *, max_file_bytes: int = 0, compression: str = "none") -> None:
    bag = BagWriter(path, max_file_bytes, compression)
    for index, message in enumerate(messages):
        bag.write(*message)
        if index % 40 == 39:
            bag.flush()
    bag.note({"dropped": "{}"})
    bag.close()


def contents(messages) -> list[tuple]:
    return [(topic.name, topic.type, *rest) for topic, *rest in messages]


def read_by_rosbags(path: Path) -> list[tuple[str, int, bytes]]:
    with AnyReader([path]) as bag:
        return [(connection.topic, log_ns, bytes(data)) for connection, log_ns, data in bag.messages()]


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_bag_of_several_files_is_read_by_all(tmp_path, compression):
    reader = pytest.importorskip("mcap_ros2.reader")
    written = made_messages(600)
    write_bag(tmp_path / "bag", written, max_file_bytes=20_000, compression=compression)
    files = sorted(p.name for p in (tmp_path / "bag").iterdir())
    assert files[:2] == ["bag_0.mcap", "bag_1.mcap"] and files[-1] == "metadata.yaml"

    report = DamageReport()
    assert list(read_bag(tmp_path / "bag", report=report)) == contents(written)
    assert report.intact and report.messages == {TEXT.name: 480, FLAG.name: 120}
    texts = list(read_bag(tmp_path / "bag", topics=[TEXT.name]))
    assert texts == [m for m in contents(written) if m[0] == TEXT.name]
    assert read_types(tmp_path / "bag") == {TEXT.type: TEXT.definition, FLAG.type: FLAG.definition}

    with AnyReader([tmp_path / "bag"]) as bag:
        assert bag.message_count == 600
        qos = {c.topic: c.ext.offered_qos_profiles for c in bag.connections}
        assert [q.durability.name for q in qos[TEXT.name]] == ["TRANSIENT_LOCAL"] and qos[FLAG.name] == []
        decoded = [bag.deserialize(d, c.msgtype).data for c, _, d in bag.messages() if c.topic == TEXT.name]
    by_mcap = [m for file in files[:-1] for m in reader.read_ros2_messages(str(tmp_path / "bag" / file))]
    assert sorted(m.ros_msg.data for m in by_mcap if m.channel.topic == TEXT.name) == sorted(decoded)
    assert len(by_mcap) == 600
    with pytest.raises(ConfigError, match="is not overwritten"):
        BagWriter(tmp_path / "bag")


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_cut_file_gives_a_prefix_and_is_repaired(tmp_path, compression):
    written = made_messages(300)
    write_bag(tmp_path / "whole", written, compression=compression)
    data = (tmp_path / "whole" / "whole_0.mcap").read_bytes()
    rng = np.random.default_rng(1)
    seen = set()
    for number, size in enumerate([0, 1, 8, len(data) - 1, *rng.integers(9, len(data), 20).tolist()]):
        bag = tmp_path / f"cut_{number}"
        bag.mkdir()
        (bag / "cut_0.mcap").write_bytes(data[:size])
        report = DamageReport()
        got = list(read_bag(bag, report=report))
        assert got == contents(written)[: len(got)]
        assert not report.intact
        seen.add(len(got))
        done = repair(bag)
        assert done.repaired and sum(done.messages.values()) == len(got)
        assert [(topic, log_ns, raw) for topic, _, log_ns, _, raw in got] == (read_by_rosbags(bag) if got else [])
        assert Path(done.original, "cut_0.mcap").read_bytes() == data[:size], "the original is kept"
        assert not repair(bag).repaired, "nothing is left to repair"
    assert len(seen) > 4 and 300 in seen


def test_damaged_bytes_never_give_a_message_that_was_not_written(tmp_path):
    written = made_messages(300)
    write_bag(tmp_path / "bag", written)
    file = tmp_path / "bag" / "bag_0.mcap"
    data = file.read_bytes()
    genuine = {(log_ns, raw) for _, log_ns, _, raw in written}
    rng = np.random.default_rng(2)
    saved = []
    for _ in range(60):
        broken = bytearray(data)
        for offset in rng.integers(0, len(data), rng.integers(1, 4)):
            broken[offset] ^= int(rng.integers(1, 256))
        file.write_bytes(broken)
        got = [(m.log_ns, m.data) for m in read_bag(tmp_path / "bag")]
        assert genuine.issuperset(got)
        read_types(tmp_path / "bag")
        saved.append(len(got))
    assert np.median(saved) > 200, "what follows a damaged chunk is read"
    file.write_bytes(data[:30_000] + b"\0" * 9000)
    report = DamageReport()
    got = list(read_bag(tmp_path / "bag", report=report))
    assert 0 < len(got) < 300 and got == contents(written)[: len(got)]
    assert "bag_0.mcap" in report.problems[0]


def test_repair_changes_only_what_is_damaged(tmp_path, capsys):
    bag = tmp_path / "bag"
    write_bag(bag, made_messages(600), max_file_bytes=20_000)
    files = sorted(bag.glob("*.mcap"))
    assert len(files) > 2
    inodes = {file.name: file.stat().st_ino for file in files}
    files[-1].write_bytes(files[-1].read_bytes()[:-200])
    (bag / "metadata.yaml").unlink()
    before = list(read_bag(bag))
    assert repair_main([str(bag), "--discard"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["repaired"] and len(report["problems"]) == 2 and files[-1].name in report["problems"][1]
    assert list(read_bag(bag)) == before and len(read_by_rosbags(bag)) == len(before)
    after = {file.name: file.stat().st_ino for file in sorted(bag.glob("*.mcap"))}
    assert [name for name in inodes if after[name] != inodes[name]] == [files[-1].name]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bag"]
    assert repair_main([str(tmp_path / "nowhere")]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_a_repaired_bag_still_says_what_never_reached_it(tmp_path):
    bag = tmp_path / "bag"
    writer = BagWriter(bag)
    writer.note({"dropped": '{"/front/image": 3}'})
    for message in made_messages(100):
        writer.write(*message)
    writer.close()
    file = bag / "bag_0.mcap"
    file.write_bytes(file.read_bytes()[:-200])
    done = repair(bag)
    assert done.repaired and sum(done.messages.values()) == 100
    report = DamageReport()
    assert list(read_bag(bag, report=report)) == contents(made_messages(100))
    assert report.intact and report.dropped == {IMAGE.name: 3}
    assert custom_data(bag) == {"dropped": '{"/front/image": 3}'}


def write_other(path: Path, messages, **options) -> None:
    """An MCAP file as others write it."""
    with path.open("wb") as stream:
        writer = McapWriter(stream, **options)
        writer.start("ros2", "another")
        channels = {}
        for topic, log_ns, publish_ns, data in messages:
            if topic not in channels:
                schema = writer.register_schema(topic.type, "ros2msg", topic.definition.encode())
                channels[topic] = writer.register_channel(topic.name, "cdr", schema)
            writer.add_message(channels[topic], log_ns, data, publish_ns)
        writer.finish()


@pytest.mark.parametrize("cut", [0, 30])
@pytest.mark.parametrize("kind", ["lz4", "no chunks", "no summary", "messages zstd", "file zstd", "sqlite3"])
def test_bags_of_other_writers(tmp_path, kind, cut):
    written = made_messages(300)
    bag = tmp_path / "rosbag2_2026_01_01-00_00_00"
    bag.mkdir()
    part, rest = written[:200], written[200:]
    if kind == "sqlite3":
        from rosbags.rosbag2 import StoragePlugin, Writer

        bag.rmdir()
        with Writer(bag, version=9, storage_plugin=StoragePlugin.SQLITE3) as writer:
            names = {
                topic: writer.add_connection(topic.name, topic.type, msgdef=topic.definition, rihs01=topic.type_hash)
                for topic in (TEXT, FLAG)
            }
            for topic, log_ns, _, data in written:
                writer.write(names[topic], log_ns, data)
        written = [(topic, log_ns, log_ns, data) for topic, log_ns, _, data in written]
    elif kind == "messages zstd":
        packed = [(*message[:3], zstandard.compress(message[3])) for message in written]
        write_other(bag / "a_0.mcap", packed[:200])
        write_other(bag / "a_1.mcap", packed[200:])
    else:
        options = {"lz4": {"compression": CompressionType.LZ4}, "no chunks": {"use_chunking": False}}.get(kind, {})
        if kind == "no summary":
            names = ("use_statistics", "use_summary_offsets", "repeat_channels", "repeat_schemas")
            options = dict.fromkeys(names, False)
        write_other(bag / "a_9.mcap", part, chunk_size=5000, **options)
        write_other(bag / "a_10.mcap", rest, chunk_size=5000, **options)
    if kind == "file zstd":
        for file in sorted(bag.iterdir()):
            file.with_name(f"{file.name}.zstd").write_bytes(zstandard.compress(file.read_bytes()))
            file.unlink()
    report = DamageReport()
    if cut and kind != "sqlite3":  # sqlite has no checksums
        last = max(file for file in bag.iterdir() if file.suffix != ".yaml")
        last.write_bytes(last.read_bytes()[:-cut])
        assert set(read_bag(bag, report=report)) <= set(contents(written)) and not report.intact
    else:
        assert list(read_bag(bag, report=report)) == contents(written)
        assert report.intact and set(read_types(bag)) == {TEXT.type, FLAG.type}


@pytest.mark.parametrize(("name", "words"), [("none", "is no bag"), ("empty", "holds no bag file")])
def test_what_is_no_bag_is_refused(tmp_path, name, words):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=words):
        read_bag(tmp_path / name)


class BlockedBag(BagWriter):
    """A disk that takes nothing until the gate opens."""

    def __init__(self, folder: Path) -> None:
        self.gate = threading.Event()
        self.reached = threading.Event()
        super().__init__(folder)

    def write(self, *message) -> None:
        self.reached.set()
        self.gate.wait()
        super().write(*message)


class WatchedBag(BagWriter):
    """Tells what was done."""

    def __init__(self, folder: Path) -> None:
        self._done = queue.Queue()
        super().__init__(folder)

    def write(self, *message) -> None:
        super().write(*message)
        self._done.put("write")

    def flush(self) -> None:
        super().flush()
        self._done.put("flush")

    def next(self) -> str:
        return self._done.get(timeout=30.0)


def test_what_was_taken_half_a_second_ago_is_with_the_kernel(tmp_path):
    bag, clock_s = WatchedBag(tmp_path / "bag"), [100.0]
    recorder = Recorder(bag, 10**6, now_s=lambda: clock_s[0])
    assert bag.next() == "flush"
    for number in range(2):
        recorder.put(TEXT, number, 1, text_cdr("nothing follows it"))
        assert bag.next() == "write"
        assert len(list(read_bag(bag.folder))) == number, "a chunk of each message would make a large file"
        clock_s[0] += 0.5
        assert bag.next() == "flush"
        assert len(list(read_bag(bag.folder))) == number + 1
    assert recorder.close(30.0)


def test_a_blocked_disk_costs_images_first_and_everything_is_counted(tmp_path):
    image, step = bytes(4 + 10_000), text_cdr("step")
    bag = BlockedBag(tmp_path / "bag")
    recorder = Recorder(bag, max_queue_bytes=40 * len(image))
    counter = itertools.count(1)
    recorder.put(TEXT, next(counter), 1, step)
    bag.reached.wait()
    for _ in range(100):
        recorder.put(IMAGE, next(counter), 1, image)
    status = recorder.status()
    images = 100 - status.dropped[IMAGE.name]
    assert 20 < images < 30 and TEXT.name not in status.dropped, "three quarters of the queue are for images"
    for _ in range(100):
        recorder.put(TEXT, next(counter), 1, step)
    assert TEXT.name not in recorder.status().dropped, "there is room for what is small"
    for _ in range(1000):
        recorder.put(TEXT, next(counter), 1, step)
    status = recorder.status()
    lost = status.dropped[TEXT.name]
    assert lost > 0 and status.queue_bytes <= 40 * len(image)
    recorder.count_lost(FLAG.name, 3)
    bag.gate.set()
    assert recorder.close(30.0) and recorder.status().ended == ""
    report = DamageReport()
    got = list(read_bag(tmp_path / "bag", report=report))
    assert [m.log_ns for m in got] == sorted(m.log_ns for m in got)
    assert report.messages == {TEXT.name: 1101 - lost, IMAGE.name: images}
    assert report.intact and report.dropped == {TEXT.name: lost, IMAGE.name: 100 - images, FLAG.name: 3}


def test_recording_ends_before_the_disk_is_full(tmp_path):
    bag = BagWriter(tmp_path / "bag")
    recorder = Recorder(bag, 10**6, min_free_bytes=10**18)
    assert recorder.close(30.0)
    assert "No space left on device" in recorder.status().ended and "min_free_mb" in recorder.status().ended
    recorder.put(TEXT, 1, 1, text_cdr("late"))
    report = DamageReport()
    assert list(read_bag(tmp_path / "bag", report=report)) == [] and not report.intact


def test_a_bag_whose_recording_ended_early_says_so(tmp_path, monkeypatch):
    bag = BagWriter(tmp_path / "bag")
    recorder = Recorder(bag, 10**6)
    recorder.put(TEXT, 1, 1, text_cdr("first"))
    while recorder.status().queue_bytes:
        time.sleep(0.01)
    recorder._min_free_bytes = 10**18
    recorder.put(TEXT, 2, 2, text_cdr("last"))
    assert recorder.close(30.0) and recorder.status().ended
    report = DamageReport()
    assert len(list(read_bag(tmp_path / "bag", report=report))) >= 1
    assert not report.intact and "the recording ended before the run did: No space left" in " ".join(report.problems)


def in_a_process(code: str, *arguments: object) -> str:
    """What the code prints, run with these arguments."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{code}"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert out.returncode == 0, out.stderr
    return out.stdout


def custom_data(bag: Path) -> dict[str, str]:
    return yaml.safe_load((bag / "metadata.yaml").read_text())["rosbag2_bagfile_information"]["custom_data"]


WRITE_ERROR = """
import resource, sys
from pathlib import Path
from test_recording import TEXT, text_cdr
from a2c2_ros.recording.recorder import Recorder
from a2c2_ros.recording.writer import BagWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
bag = BagWriter(Path(sys.argv[1]))
bag.note({"dropped": '{"/front/image": 3}'})
recorder = Recorder(bag, 10**8)
for number in range(400):
    recorder.put(TEXT, number, number, text_cdr(f"{number:010000d}"))
assert recorder.close(30.0)
print(recorder.status().ended)
"""


def test_after_a_write_error_the_bag_is_valid(tmp_path):
    said = in_a_process(WRITE_ERROR, tmp_path / "bag", 3_000_000)
    assert "File too large; messages lost before that: " in said and "repair" not in said
    report = DamageReport()
    got = list(read_bag(tmp_path / "bag", report=report))
    assert 180 < len(got) < 400 and [m.log_ns for m in got] == list(range(len(got)))
    assert report.problems == [f"bag_0.mcap: the recording ended before the run did: {said.strip()}"]
    assert report.dropped == {IMAGE.name: 3}
    assert custom_data(tmp_path / "bag")["ended"] == said.strip()
    assert [raw for _, _, raw in read_by_rosbags(tmp_path / "bag")] == [m.data for m in got]


NO_ROOM = """
import resource, sys
from pathlib import Path
from test_recording import TEXT, text_cdr
from a2c2_ros.recording.writer import BagWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
bag = BagWriter(Path(sys.argv[1]))
try:
    for number in range(400):
        bag.write(TEXT, number, number, text_cdr(f"{number:0500d}"))
        bag.flush()
except OSError:
    assert bag.close()
    print(number)
"""


def test_the_index_of_a_file_gets_its_room_from_the_last_messages(tmp_path):
    written = int(in_a_process(NO_ROOM, tmp_path / "bag"))
    report = DamageReport()
    got = list(read_bag(tmp_path / "bag", report=report))
    assert [m.log_ns for m in got] == list(range(len(got)))
    assert written - 64 < len(got) < written - 2
    (problem,) = report.problems
    assert problem.endswith(f"File too large; messages lost before that: {written + 1 - len(got)}")
    assert custom_data(tmp_path / "bag")["ended"] in problem
    assert [raw for _, _, raw in read_by_rosbags(tmp_path / "bag")] == [m.data for m in got]


NO_ROOM_AT_THE_END = """
import resource, sys
from pathlib import Path
from test_recording import TEXT, text_cdr
from a2c2_ros.recording.recorder import Recorder
from a2c2_ros.recording.writer import BagWriter
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
bag = BagWriter(Path(sys.argv[1]))
number = 0
while bag.size_bytes < int(sys.argv[2]):
    bag.write(TEXT, number, number, text_cdr(f"{number:0500d}"))
    bag.flush()
    number += 1
recorder = Recorder(bag, 10**8)
assert recorder.close(30.0)
print(number, recorder.status().ended, sep="\\n")
"""


@pytest.mark.parametrize(("size", "lost"), [(60_000, False), (98_000, True)])
def test_a_bag_that_is_cut_at_its_end_says_so(tmp_path, size, lost):
    written, said = in_a_process(NO_ROOM_AT_THE_END, tmp_path / "bag", size).split("\n")[:2]
    report = DamageReport()
    got = list(read_bag(tmp_path / "bag", report=report))
    assert (len(got) < int(written)) == lost == (said != "") == (not report.intact)
    assert (custom_data(tmp_path / "bag") or {}).get("ended", "") == said
    assert not lost or said in report.problems[0]


def test_an_error_in_the_midst_of_a_bag_is_told_in_its_files(tmp_path, monkeypatch):
    bag = BagWriter(tmp_path / "bag", max_file_bytes=1000)
    recorder = Recorder(bag, 10**8)
    monkeypatch.setattr(bag, "_open", failing(OSError(28, "No space left on device")))
    for number in range(400):
        recorder.put(TEXT, number, number, text_cdr(f"{number:010000d}"))
    assert recorder.close(30.0)
    status = recorder.status()
    report = DamageReport()
    got = list(read_bag(tmp_path / "bag", report=report))
    assert len(got) + status.dropped[TEXT.name] == 400 and "No space left" in status.ended
    assert report.problems == [f"bag_0.mcap: the recording ended before the run did: {status.ended}"]


def failing(error: Exception):
    def fail(*_: object) -> None:
        raise error

    return fail


def test_an_error_of_any_kind_ends_the_recording_and_is_told(tmp_path):
    recorder = Recorder(BagWriter(tmp_path / "bag"), 10**6)
    recorder.put(TEXT, 1, 1, text_cdr("first"))
    while recorder.status().size_bytes < 200:
        time.sleep(0.01)
    recorder.put(TEXT, 2, -1, text_cdr("before the epoch"))
    while not recorder.status().ended:
        time.sleep(0.01)
    recorder.put(TEXT, 3, 3, text_cdr("after the end"))
    assert recorder.close(30.0)
    status = recorder.status()
    assert status.ended.startswith("error: ") and status.dropped[TEXT.name] == 2
    report = DamageReport()
    assert [m.log_ns for m in read_bag(tmp_path / "bag", report=report)] == [1]
    assert report.problems == [f"bag_0.mcap: the recording ended before the run did: {status.ended}"]
    assert len(read_by_rosbags(tmp_path / "bag")) == 1


REPAIR = """
import resource, sys
from a2c2_ros.recording.repair import main
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
print(main([sys.argv[1], "--discard"]))
"""


def test_a_repair_without_room_leaves_the_bag_as_it_was(tmp_path):
    bag = tmp_path / "bag"
    writer = BagWriter(bag)
    for message in made_messages(600):
        writer.write(*message)
    writer.close()
    file = bag / "bag_0.mcap"
    file.write_bytes(file.read_bytes()[:-200])
    before = {path.name: path.read_bytes() for path in bag.iterdir()}
    assert len(before[file.name]) > 60_000 and len(list(read_bag(bag))) == 600
    assert in_a_process(REPAIR, bag).strip() == "1"
    assert {path.name: path.read_bytes() for path in bag.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["bag"]


def test_a_bag_that_is_being_recorded_is_not_repaired(tmp_path):
    bag = BagWriter(tmp_path / "bag", max_file_bytes=1000)
    for message in made_messages(100):
        bag.write(*message)
        bag.flush()
    with pytest.raises(ConfigError, match=r"bag_\d+\.mcap is being recorded"):
        repair(tmp_path / "bag")
    bag.close()
    assert not repair(tmp_path / "bag").repaired


def robots() -> list[str]:
    return sorted(path.stem for path in (share_directory() / "config" / "robots").glob("*.yaml"))


@pytest.mark.parametrize("robot", robots())
def test_shipped_topic_lists_are_those_of_the_recorder(robot, capsys):
    names = [absolute(name) for name in recorded_topics(load_profile(robot))]
    shipped = share_directory() / "config" / "record_topics" / f"{robot}.txt"
    assert shipped.read_text().split() == names, f"python -m a2c2_ros.recording.topics --robot {robot} > {shipped.name}"
    assert topics_module.main(["--robot", robot, "--namespace", "/left"]) == 0
    printed = capsys.readouterr().out.split()
    assert "/left/control_step" in printed and "/parameter_events" in printed
    assert "/left/planner_status" not in printed


def test_shipped_qos_overrides_are_those_of_the_recorder():
    text = (share_directory() / "config" / "record_topics_qos.yaml").read_text()
    assert yaml.safe_load(text) == qos_overrides()
