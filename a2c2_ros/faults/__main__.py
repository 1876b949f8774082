"""Does the loop keep its promises when things go wrong? Named faults and a random campaign; every tick is judged.

``python -m a2c2_ros.faults`` (or ``make faults``). The named faults run against real nodes over DDS, or against the
loop without ROS where that says more; docs/safety.md says what each shows.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from tqdm import tqdm

from a2c2_ros import provenance
from a2c2_ros.faults.base import SCENARIOS, Scenario
from a2c2_ros.faults.campaign import FAULTS, CampaignResult, run_campaign
from a2c2_ros.faults.monitor import INVARIANTS
from a2c2_ros.faults.runner import (
    Outcome,
    campaign_record,
    delays,
    load_scenarios,
    outcome_record,
    run_scenarios,
    select,
    summary,
)
from a2c2_ros.jobs import interrupt_on_termination

CAMPAIGN = "campaign"
SHOWN = 10  # violations of the campaign in the output


def table(outcomes: Sequence[Outcome]) -> str:
    """One line per named fault; times are the worst of it."""
    head = ("fault", "where", "result", "seen to hold", "fault to hold", "good to motion", "detail")
    rows = [
        (
            o.name,
            o.where,
            o.result,
            _worst([d.ms for d in o.holds]),
            _worst(o.holds_since_fault_ms),
            _worst([d.ms for d in o.recoveries]),
            " ".join(o.detail.split())[:110],
        )
        for o in outcomes
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [head, *rows])


def _worst(values: Sequence[float]) -> str:
    return f"{max(values):.0f} ms" if values else "-"


def totals(outcomes: Sequence[Outcome], campaign: CampaignResult | None) -> dict[str, Any]:
    """What the whole run comes to."""
    events = 0 if campaign is None else campaign.events.total()
    holds = [d for o in outcomes for d in o.holds] + ([] if campaign is None else campaign.holds)
    recoveries = [d for o in outcomes for d in o.recoveries] + ([] if campaign is None else campaign.recoveries)
    results = [o.result for o in outcomes]
    return {
        "named_faults": len(outcomes),
        **{result: results.count(result) for result in ("passed", "failed", "skipped")},
        "faults_tried": events + len(outcomes) - results.count("skipped"),
        "ticks_judged": sum(o.ticks for o in outcomes) + (0 if campaign is None else campaign.ticks),
        "unsafe_commands": sum(o.unsafe_ticks for o in outcomes) + (0 if campaign is None else campaign.unsafe_ticks),
        "violations": sum(len(o.violations) for o in outcomes) + (0 if campaign is None else len(campaign.violations)),
        "time_to_hold": delays(holds),
        "time_to_hold_since_fault_ms": summary([ms for o in outcomes for ms in o.holds_since_fault_ms]),
        "time_to_recover": delays(recoveries),
    }


def report(outcomes: Sequence[Outcome], campaign: CampaignResult | None, total: dict[str, Any]) -> str:
    """The end of the output."""
    lines = [table(outcomes)] if outcomes else []
    if campaign is not None:
        lines.append(
            f"campaign: {campaign.events.total()} events of {len(campaign.events)} kinds in {campaign.episodes} "
            f"episodes, {campaign.simulated_s:.0f} s of robot time, {campaign.ticks} ticks, "
            f"{len(campaign.violations)} violations"
        )
        lines += [f"  {v.invariant}: {v.detail} ({', '.join(v.faults)})" for v in campaign.violations[:SHOWN]]
    hold, recover = total["time_to_hold"], total["time_to_recover"]
    since = total["time_to_hold_since_fault_ms"]
    lines.append(
        f"faults tried {total['faults_tried']}, unsafe commands {total['unsafe_commands']}, "
        f"violations {total['violations']}, named faults: {total['passed']} passed, {total['failed']} failed, "
        f"{total['skipped']} skipped\n"
        f"time to hold since a tick could see the fault: median {hold['ms']['median']} ms, "
        f"worst {hold['ms']['worst']} ms ({hold['ticks']['median']} and {hold['ticks']['worst']} ticks)\n"
        f"time to hold since the fault (nodes): median {since['median']} ms, worst {since['worst']} ms\n"
        f"time to recover since the data was good: median {recover['ms']['median']} ms, "
        f"worst {recover['ms']['worst']} ms"
    )
    return "\n".join(lines)


def run(args: argparse.Namespace, scenarios: Sequence[Scenario], folder: Path) -> int:
    """Run, print and write; returns the exit code."""
    started = time.monotonic()
    campaign, campaign_s = None, 0.0
    try:
        if args.events and (not args.only or any(fnmatch(CAMPAIGN, pattern) for pattern in args.only)):
            with tqdm(total=args.events, desc=CAMPAIGN, unit="event", disable=None) as bar:
                campaign = run_campaign(args.events, args.seed, lambda n: bar.update(n))
            campaign_s = time.monotonic() - started
        with tqdm(total=len(scenarios), desc="named faults", unit="fault", disable=None) as bar:

            def done(outcome: Outcome) -> None:
                bar.update()
                if outcome.result == "failed":
                    bar.write(f"{outcome.name}: {outcome.detail}", file=sys.stderr)

            outcomes = run_scenarios(
                scenarios, folder, lambda s: bar.set_postfix_str(s.name), done, in_process=args.in_process
            )
    except KeyboardInterrupt:
        print("interrupted, nothing written", file=sys.stderr)
        return 130
    total = totals(outcomes, campaign)
    full = not args.only and campaign is not None
    record = {
        "suite": "faults",
        "full": full,
        "wall_s": round(time.monotonic() - started, 1),
        "totals": total,
        "invariants": INVARIANTS,
        "campaign": None if campaign is None else campaign_record(campaign, args.seed, campaign_s),
        "named_faults": [outcome_record(outcome) for outcome in outcomes],
        "machine": provenance.machine(),
        "versions": provenance.versions(),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
    print(f"{report(outcomes, campaign, total)}\n{record['wall_s']:.0f} s -> {args.out}")
    return int(total["failed"] > 0 or total["unsafe_commands"] > 0 or total["violations"] > 0)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m a2c2_ros.faults", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument(
        "--only", nargs="+", metavar="NAME", help="only these: names, groups or patterns; campaign is the campaign"
    )
    p.add_argument("--list", action="store_true", help="print the named faults and the campaign's, run nothing")
    p.add_argument("--events", type=int, default=10_000, help="fault events of the campaign, 0 for none")
    p.add_argument("--seed", type=int, default=0, help="of the campaign")
    p.add_argument("--out", type=Path, default=Path("results/faults.json"), help="JSON file")
    p.add_argument("--in-process", action="store_true", help="start no other process of this tool")
    p.add_argument("--logs", type=Path, help="keep profiles, heads and logs in this folder")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 if a promise was broken, 2 for wrong arguments."""
    args = parser().parse_args(argv)
    load_scenarios()
    scenarios = select(args.only)
    if args.list:
        for s in scenarios:
            print(f"{s.name}  [{s.where}, {s.group}]\n    {s.does}\n    -> {s.expects}")
        print(f"campaign: {', '.join(FAULTS)}")
        return 0
    if args.only and not scenarios and not any(fnmatch(CAMPAIGN, pattern) for pattern in args.only):
        print(f"error: --only {args.only} matches none of {[CAMPAIGN, *SCENARIOS]}", file=sys.stderr)
        return 2
    interrupt_on_termination()
    if args.logs:
        return run(args, scenarios, args.logs.resolve())
    with tempfile.TemporaryDirectory(prefix="a2c2_faults_") as folder:
        return run(args, scenarios, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
