"""The newest sample of every sensor stream, with its age."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

from a2c2_ros.core.errors import ObservationError

CLOCK_JUMP_NS = 1_000_000_000
"""A stamp that lies further back than this means that the clock jumped back, not that a sample came late."""


@dataclass(frozen=True)
class StreamSpec:
    """What a sensor stream delivers."""

    shape: tuple[int, ...]
    dtype: str  # numpy name, e.g. "uint8"
    max_age_ns: int  # older samples may not move the robot


@dataclass(frozen=True, eq=False)
class Observation:
    """Immutable snapshot: the newest sample of each stream that has delivered one."""

    values: Mapping[str, np.ndarray]
    stamps_ns: Mapping[str, int]

    def ages_ns(self, now_ns: int) -> dict[str, int]:
        """Age of every sample [ns]; negative if its stamp is in the future."""
        return {name: now_ns - stamp for name, stamp in self.stamps_ns.items()}

    def oldest_ns(self, undated: Collection[str] = ()) -> int:
        """Stamp of the oldest sample but those of ``undated`` streams: no part of the observation is newer than that.

        Raises:
            ValueError: If there is none.
        """
        return min(stamp for name, stamp in self.stamps_ns.items() if name not in undated)

    def synchronous_at(self, stamp_ns: int, streams: Mapping[str, StreamSpec]) -> bool:
        """True if every stream's sample carries exactly this stamp (lockstep)."""
        return all(self.stamps_ns.get(name) == stamp_ns for name in streams)


@dataclass
class ObservationBuffer:
    """Keeps the newest sample of each declared stream.

    Safe with one writer per stream and any reader: a sample is one tuple, put and copied in one step.
    """

    streams: Mapping[str, StreamSpec]
    _samples: dict[str, tuple[int, np.ndarray]] = field(default_factory=dict)

    def put(self, stream: str, stamp_ns: int, value: np.ndarray, latest_ns: int | None = None) -> bool:
        """Take a sample.

        Args:
            stream: Name of a declared stream.
            stamp_ns: When it was measured [ns]; 0 means that the driver did not say, and is refused.
            value: Array of the declared shape and dtype. It is not copied: the caller must not change it later.
            latest_ns: Largest stamp that is taken [ns], None for any. A sample from the future would count as fresh
                when its time comes, however old it is then.

        Returns:
            False if a sample at least as new is here already. If the clock jumped back, everything older is forgotten.

        Raises:
            ObservationError: On an unknown stream, a wrong shape or dtype, a value that is not finite, no stamp, or one
                from the future.
        """
        spec = self.streams.get(stream)
        if spec is None:
            raise ObservationError(f"stream {stream!r} is not declared, allowed are {sorted(self.streams)}")
        if value.shape != spec.shape or value.dtype != np.dtype(spec.dtype):
            raise ObservationError(
                f"stream {stream!r} delivered {value.shape} {value.dtype}, allowed is {spec.shape} {spec.dtype}"
            )
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ObservationError(f"stream {stream!r} delivered a value that is not finite")
        if stamp_ns <= 0:
            raise ObservationError(f"stream {stream!r} has stamp {stamp_ns} ns, allowed is a time after 0")
        if latest_ns is not None and stamp_ns > latest_ns:
            raise ObservationError(
                f"stream {stream!r} has a stamp {(stamp_ns - latest_ns) / 1e9:.3f} s further in the future than is "
                "tolerated; are the clocks of the machines synchronised?"
            )
        newest, _ = self._samples.get(stream, (0, None))
        if stamp_ns < newest - CLOCK_JUMP_NS:
            self.clear()
        elif stamp_ns <= newest:
            return False
        self._samples[stream] = (stamp_ns, value)
        return True

    def snapshot(self) -> Observation:
        """The newest samples, as an immutable view."""
        samples = self._samples.copy()
        return Observation(
            values={name: value for name, (_, value) in samples.items()},
            stamps_ns={name: stamp for name, (stamp, _) in samples.items()},
        )

    def clear(self) -> None:
        """Forget every sample (the clock jumped back)."""
        self._samples = {}
