"""The chunks that the control loop may execute."""

from a2c2_ros.core.chunk import ActionChunk
from a2c2_ros.core.errors import ChunkError
from a2c2_ros.core.schedule import slot_index


class ChunkBuffer:
    """Keeps the newest chunks by observation stamp and picks the one that owns a tick.

    Chunks may arrive late, twice or out of order: what counts is the stamp of their observation. Not thread safe: the
    owner serialises the calls.
    """

    def __init__(self, capacity: int = 4) -> None:
        self._capacity = capacity
        self._chunks: list[ActionChunk] = []  # newest observation first

    def install(self, chunk: ActionChunk) -> bool:
        """Take a chunk.

        Returns:
            False if a chunk of the same observation is here already or only newer ones fit.

        Raises:
            ChunkError: If its planner used its number for another observation.
        """
        for other in self._chunks:
            if chunk.t_obs_ns == other.t_obs_ns:
                return False
            if (chunk.planner_id, chunk.chunk_id) == (other.planner_id, other.chunk_id):
                raise ChunkError(
                    f"chunk {chunk.chunk_id}: planner {chunk.planner_id!r} used this number for an observation "
                    f"{(other.t_obs_ns - chunk.t_obs_ns) / 1e9:+.3f} s away",
                    "number",
                )
        self._chunks.append(chunk)
        self._chunks.sort(key=lambda c: c.t_obs_ns, reverse=True)
        del self._chunks[self._capacity :]
        return chunk in self._chunks

    def select(self, t_tick_ns: int, observed_from_ns: int = 0) -> tuple[ActionChunk, int] | None:
        """The newest chunk with ``0 <= k < H`` at this tick, and its slot k; None if there is none.

        Args:
            t_tick_ns: Scheduled time of the tick [ns].
            observed_from_ns: Chunks of older observations do not count [ns].
        """
        for chunk in self._chunks:
            if chunk.t_obs_ns < observed_from_ns:
                return None
            slot = slot_index(t_tick_ns, chunk.t_obs_ns, chunk.step_ns)
            if 0 <= slot < chunk.horizon:
                return chunk, slot
        return None

    def observed_since(self, t_ns: int) -> bool:
        """True if there is a chunk of an observation at or after this time [ns]."""
        return bool(self._chunks) and self._chunks[0].t_obs_ns >= t_ns

    def __len__(self) -> int:
        return len(self._chunks)

    def clear(self) -> None:
        """Forget every chunk."""
        self._chunks.clear()
