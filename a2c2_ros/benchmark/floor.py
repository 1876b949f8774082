"""What the machine itself gives: a thread that only sleeps until each deadline, and nothing else.

``python -m a2c2_ros.benchmark.floor --out FILE``. No loop on this machine can keep time better.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from a2c2_ros.benchmark.trace import summary
from a2c2_ros.nodes.realtime import become_realtime

PRIORITY = 50


def measure(rate_hz: float, duration_s: float) -> dict[str, object]:
    """Sleep from deadline to deadline.

    Returns:
        As of a cell: "n", "period_error_ms", "start_lateness_ms", and the scheduling that was granted.
    """
    scheduling = become_realtime(PRIORITY)
    period_ns = round(1e9 / rate_hz)
    deadline_ns = time.monotonic_ns() + period_ns
    late_ns = np.empty(round(rate_hz * duration_s), np.int64)
    for i in range(len(late_ns)):
        time.sleep(max(deadline_ns - time.monotonic_ns(), 0) / 1e9)
        late_ns[i] = time.monotonic_ns() - deadline_ns
        deadline_ns += period_ns
    return {
        "rate_hz": rate_hz,
        "n": len(late_ns),
        "period_error_ms": summary(np.abs(np.diff(late_ns)) / 1e6),
        "start_lateness_ms": summary(late_ns / 1e6),
        "scheduling": scheduling,
    }


def main() -> None:
    """Command line."""
    p = argparse.ArgumentParser(prog="python -m a2c2_ros.benchmark.floor", description=__doc__)
    p.add_argument("--out", type=Path, required=True, help="JSON file")
    p.add_argument("--rate-hz", type=float, default=100.0, help="deadlines per second")
    p.add_argument("--duration-s", type=float, default=6.0, help="how long [s]")
    args = p.parse_args()
    args.out.write_text(json.dumps(measure(args.rate_hz, args.duration_s)))


if __name__ == "__main__":
    main()
