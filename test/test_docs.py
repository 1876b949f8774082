"""Tables of the documentation that come from somewhere else."""

import json
import re
from pathlib import Path

from a2c2_ros.benchmark.report import page_tables
from a2c2_ros.core.safety import Reason, State

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def test_every_state_and_reason_is_explained_under_its_number():
    text = (DOCS / "safety.md").read_text()
    section = text.split("## What it says and what to do")[1].split("\n## ")[0]
    explained = {(int(number), name) for number, name in re.findall(r"\b(\d+) `([A-Z_]+)`", section)}
    assert explained == {(code.value, code.name) for code in (*State, *Reason)}


def test_the_tables_of_the_timing_are_those_of_the_result():
    tables = page_tables(json.loads((ROOT / "results" / "bench.json").read_text())).splitlines()
    page = (DOCS / "real_time.md").read_text().splitlines()
    assert [line for line in tables if line not in page] == []
    readme = [line for line in (ROOT / "README.md").read_text().splitlines() if " / " in line and line in page]
    assert len(readme) >= 5, "a part of them"
