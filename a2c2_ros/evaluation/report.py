"""Tables from result files, in Markdown: ``python -m a2c2_ros.evaluation.report results/libero/*.json``."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def success_table(results: Sequence[dict]) -> str:
    """One row per cell: method, e, d, success with its 95% Wilson interval, and the success of every task."""
    tasks = sorted({int(task) for result in results for task in result["per_task"]})
    lines = [
        "| method | e | d | success | 95% interval | " + " | ".join(f"task {task}" for task in tasks) + " |",
        "|---|---|---|---|---|" + "---|" * len(tasks),
    ]
    for result in sorted(results, key=lambda r: (r["horizon"], r["delay"], r["method"] != "naive", r["method"])):
        total = result["total"]
        low, high = total["wilson_95"]
        exceptions = f", {total['exceptions']} exceptions" if total["exceptions"] else ""
        cells = [
            f"{per['successes']}/{per['episodes']}" if (per := result["per_task"].get(str(task))) else "-"
            for task in tasks
        ]
        lines.append(
            f"| {result['method']} | {result['horizon']} | {result['delay']} | "
            f"{total['successes']}/{total['episodes']}{exceptions} | {low:.0%} to {high:.0%} | {' | '.join(cells)} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m a2c2_ros.evaluation.report", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="JSON files of a2c2_ros.evaluation.libero")
    args = parser.parse_args(argv)
    print(success_table([json.loads(path.read_text(encoding="utf-8")) for path in args.files]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
