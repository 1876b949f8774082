"""Reads one MCAP file whatever state it is in, and gives an index to one that was cut.

Needs neither footer nor index: the records are followed from the start, which only touches their heads.
"""

import heapq
import mmap
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import lz4.frame
import zstandard
from mcap.data_stream import ReadDataStream, RecordBuilder
from mcap.exceptions import McapError
from mcap.opcode import Opcode
from mcap.records import (
    Channel,
    ChunkIndex,
    DataEnd,
    Footer,
    Metadata,
    MetadataIndex,
    Schema,
    Statistics,
)
from mcap.writer import MCAP0_MAGIC

NOTE = "a2c2_ros.recorder"
"""Name of the metadata record of our recorder."""
DROPPED = "dropped"
ENDED = "ended"
"""Key in it: JSON object, topic -> messages that did not reach the bag."""

_HEAD = struct.Struct("<BQ")  # opcode, length
_CHUNK = struct.Struct("<QQQII")  # start, end [ns], uncompressed size, CRC, length of the compression's name
_MESSAGE = struct.Struct("<HIQQ")  # channel, sequence, log time, publish time [ns]
_UINT64 = struct.Struct("<Q")
_LEAST = {Opcode.CHUNK: _CHUNK.size, Opcode.MESSAGE: _MESSAGE.size}


class Record(NamedTuple):
    """Where a record is."""

    opcode: int
    offset: int  # of its head
    begin: int  # of its content
    end: int  # beyond the end of the data if it was cut


class RawMessage(NamedTuple):
    """A message of a file."""

    channel: Channel
    log_ns: int
    publish_ns: int
    data: bytes


@dataclass
class Block:
    """What is read at once: a chunk, or messages outside of chunks that follow each other."""

    start_ns: int
    end_ns: int
    begin: int  # bytes [begin, end) of the file, heads included
    end: int
    chunk: bool
    indices: list[Record] = field(default_factory=list)  # message indices of a chunk


def records(data: bytes | mmap.mmap, begin: int, end: int) -> Iterator[Record]:
    """Records in ``data[begin:end]``; the last may be cut, bytes that are no head end it."""
    while begin + _HEAD.size <= end:
        opcode, length = _HEAD.unpack_from(data, begin)
        record = Record(opcode, begin, begin + _HEAD.size, begin + _HEAD.size + length)
        yield record
        begin = record.end


class McapFile:
    """A scanned file. A context manager.

    Attributes:
        blocks: In the order of the file.
        note: The newest metadata that our recorder wrote.
        metadata: Where all metadata records are.
        problems: What is wrong, in words, with the byte; grows while messages are read.
        bytes_lost: Bytes that could not be read.
        end: Where the last whole record ends.
        schemas: By id.
        channels: By id.
    """

    def __init__(self, path: Path) -> None:
        self.blocks: list[Block] = []
        self.note: dict[str, str] = {}
        self.metadata: list[MetadataIndex] = []
        self.problems: list[str] = []
        self.bytes_lost = 0
        self.end = 0
        self.schemas: dict[int, Schema] = {}
        self.channels: dict[int, Channel] = {}
        self._learned = False
        self._bad_channels: set[int] = set()
        self._data: bytes | mmap.mmap = b""
        with path.open("rb") as file:
            if path.stat().st_size:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._scan()

    def __enter__(self) -> "McapFile":
        return self

    def __exit__(self, *_: object) -> None:
        if isinstance(self._data, mmap.mmap):
            self._data.close()

    def messages(self, wanted: Callable[[str], bool] = lambda topic: True) -> Iterator[RawMessage]:
        """Messages in the order of their log time, equal ones in the order of the file; one or two blocks in memory."""
        waiting: list[tuple[int, int, RawMessage]] = []
        order = {id(block): index << 32 for index, block in enumerate(self.blocks)}
        for block in sorted(self.blocks, key=lambda b: b.start_ns):
            while waiting and waiting[0][0] < block.start_ns:
                yield heapq.heappop(waiting)[2]
            for index, message in enumerate(self._load(block, wanted)):
                heapq.heappush(waiting, (message.log_ns, order[id(block)] + index, message))
        while waiting:
            yield heapq.heappop(waiting)[2]

    def learn(self) -> None:
        """Read every schema and channel; a file without a summary has them only in its chunks."""
        self._learned = True
        for block in self.blocks:
            content, _ = self._content(block)
            for record in records(content, 0, len(content)):
                self._register(content, record)

    @property
    def compressed(self) -> bool:
        """Whether the chunks are compressed."""
        whole = [block for block in self.blocks if block.chunk and block.end <= len(self._data)]
        return bool(whole) and self._compression(whole[0])[0] != ""

    # --- scan -------------------------------------------------------------------------------------------------------

    def _scan(self) -> None:
        data, size = self._data, len(self._data)
        if data[: len(MCAP0_MAGIC)] != MCAP0_MAGIC:
            self._lost(0, size, "not the beginning of an MCAP file" if size else "empty")
            return
        self.end = len(MCAP0_MAGIC)
        whole = False
        for record in records(data, self.end, size):
            if record.opcode == Opcode.FOOTER and data[record.end : size] == MCAP0_MAGIC:
                self.end, whole = size, True
                break
            if not 0 < record.opcode < 0x80:
                break
            self._found(record, size)
            if record.end > size:
                break
            self.end = record.end
        if self.end < size:
            self._lost(self.end, size, "the rest is cut or is no record")
        elif not whole:
            self.problems.append(f"byte {size}: no footer, the writer did not finish the file")

    def _found(self, record: Record, size: int) -> None:
        data = self._data
        last = self.blocks[-1] if self.blocks else None
        if min(record.end, size) - record.begin < _LEAST.get(record.opcode, 0):
            if record.end <= size:
                self.problems.append(f"byte {record.offset}: record {record.opcode} is too short")
        elif record.opcode == Opcode.CHUNK:
            start_ns, end_ns, *_ = _CHUNK.unpack_from(data, record.begin)
            self.blocks.append(Block(start_ns, end_ns, record.offset, record.end, chunk=True))
        elif record.end > size:
            return
        elif record.opcode == Opcode.MESSAGE:
            _, _, log_ns, _ = _MESSAGE.unpack_from(data, record.begin)
            if last and not last.chunk and last.end == record.offset and last.end - last.begin < 2**20:
                last.start_ns, last.end_ns = min(last.start_ns, log_ns), max(last.end_ns, log_ns)
                last.end = record.end
            else:
                self.blocks.append(Block(log_ns, log_ns, record.offset, record.end, chunk=False))
        elif record.opcode == Opcode.MESSAGE_INDEX and last:
            last.indices.append(record)
        else:
            self._register(data, record)

    def _register(self, data: bytes | mmap.mmap, record: Record) -> None:
        if record.opcode not in (Opcode.SCHEMA, Opcode.CHANNEL, Opcode.METADATA):
            return
        stream = ReadDataStream(BytesIO(data[record.begin : record.end]))
        try:
            if record.opcode == Opcode.SCHEMA:
                schema = Schema.read(stream)
                self.schemas[schema.id] = schema
            elif record.opcode == Opcode.CHANNEL:
                channel = Channel.read(stream)
                self.channels[channel.id] = channel
            else:
                metadata = Metadata.read(stream)
                length = record.end - record.offset
                self.metadata.append(MetadataIndex(offset=record.offset, length=length, name=metadata.name))
                if metadata.name == NOTE:
                    self.note = metadata.metadata
        except (McapError, struct.error, ValueError) as error:
            self.problems.append(f"byte {record.offset}: record {record.opcode} cannot be read: {error}")

    # --- blocks -----------------------------------------------------------------------------------------------------

    def _load(self, block: Block, wanted: Callable[[str], bool]) -> Iterator[RawMessage]:
        content, problem = self._content(block)
        if problem:
            self._lost(block.begin, min(block.end, len(self._data)), problem)
        for record in records(content, 0, len(content)):
            if record.end > len(content):
                break
            if record.opcode == Opcode.MESSAGE and record.end - record.begin >= _MESSAGE.size:
                channel_id, _, log_ns, publish_ns = _MESSAGE.unpack_from(content, record.begin)
                channel = self._channel(channel_id, block)
                if channel is not None and wanted(channel.topic):
                    yield RawMessage(channel, log_ns, publish_ns, content[record.begin + _MESSAGE.size : record.end])
            else:
                self._register(content, record)

    def _channel(self, channel_id: int, block: Block) -> Channel | None:
        if channel_id not in self.channels and not self._learned:
            self.learn()
        if channel_id not in self.channels and channel_id not in self._bad_channels:
            self._bad_channels.add(channel_id)
            self.problems.append(f"byte {block.begin}: channel {channel_id} is not described, its messages are lost")
        return self.channels.get(channel_id)

    def _content(self, block: Block) -> tuple[bytes, str]:
        """Records of a block, uncompressed, and what is wrong. Of a cut chunk the whole beginning."""
        if not block.chunk:
            return self._data[block.begin : block.end], ""
        begin = block.begin + _HEAD.size
        try:
            _, _, size, crc, _ = _CHUNK.unpack_from(self._data, begin)
            compression, begin, end = self._compression(block)
            content = _decompressed(compression, self._data[begin:end])
        except (struct.error, ValueError, RuntimeError, zstandard.ZstdError) as error:
            return b"", f"chunk cannot be read: {error}"
        if block.end > len(self._data):
            return content, ""  # the scan has said so
        if len(content) != size or (crc and zlib.crc32(content) != crc):
            return b"", "chunk is damaged: checksum or size is wrong"
        return content, ""

    def _compression(self, block: Block) -> tuple[str, int, int]:
        """Compression of a chunk, begin and end of its compressed records."""
        begin = block.begin + _HEAD.size + _CHUNK.size
        (name_length,) = struct.unpack_from("<I", self._data, begin - 4)
        (length,) = _UINT64.unpack_from(self._data, begin + name_length)
        compression = self._data[begin : begin + name_length].decode()
        begin += name_length + _UINT64.size
        return compression, begin, begin + length

    def chunk_index(self, block: Block) -> tuple[ChunkIndex, dict[int, int]]:
        """Index of a chunk from what follows it, and the number of its messages by channel."""
        compression, begin, end = self._compression(block)
        offsets, counts = {}, {}
        for record in block.indices:
            channel_id, length = struct.unpack_from("<HI", self._data, record.begin)
            offsets[channel_id], counts[channel_id] = record.offset, length // 16
        index = ChunkIndex(
            chunk_length=block.end - block.begin,
            chunk_start_offset=block.begin,
            compression=compression,
            compressed_size=end - begin,
            message_end_time=block.end_ns,
            message_index_length=sum(record.end - record.offset for record in block.indices),
            message_index_offsets=offsets,
            message_start_time=block.start_ns,
            uncompressed_size=struct.unpack_from("<Q", self._data, block.begin + _HEAD.size + 16)[0],
        )
        return index, counts

    def _lost(self, begin: int, end: int, text: str) -> None:
        self.bytes_lost += end - begin
        self.problems.append(f"byte {begin}: {text}, {end - begin} bytes")


def _decompressed(compression: str, data: bytes) -> bytes:
    """Of data that was cut, what it begins with."""
    if compression == "":
        return data
    if compression == "zstd":
        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    if compression == "lz4":
        return lz4.frame.LZ4FrameDecompressor().decompress(data)
    raise ValueError(f"compression {compression!r} is not known")


def append_index(path: Path, note: Mapping[str, str]) -> None:
    """Finish a file of ours that ends with a whole record: note, data end, summary, footer.

    Args:
        path: The file.
        note: Metadata of our recorder; nothing is written for an empty one.

    Raises:
        OSError: If there is no space for it.
    """
    with McapFile(path) as file:
        file.learn()
        indices = [file.chunk_index(block) for block in file.blocks]
        counts = Counter[int]()
        for _, found in indices:
            counts.update(found)
        begin = file.end
        builder = RecordBuilder()
        if note:
            Metadata(name=NOTE, metadata=dict(note)).write(builder)
            file.metadata.append(MetadataIndex(length=builder.count, name=NOTE, offset=begin))
        statistics = Statistics(
            attachment_count=0,
            channel_count=len(file.channels),
            channel_message_counts=counts,
            chunk_count=len(indices),
            message_count=counts.total(),
            message_start_time=min((block.start_ns for block in file.blocks), default=0),
            message_end_time=max((block.end_ns for block in file.blocks), default=0),
            metadata_count=len(file.metadata),
            schema_count=len(file.schemas),
        )
        chunks = [index for index, _ in indices]
        DataEnd(0).write(builder)
        footer = Footer(summary_start=begin + builder.count, summary_offset_start=0, summary_crc=0)
        for record in (*file.schemas.values(), *file.channels.values(), statistics, *chunks, *file.metadata, footer):
            record.write(builder)
    with path.open("r+b") as output:
        output.seek(begin)
        output.write(builder.end() + MCAP0_MAGIC)
