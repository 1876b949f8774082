"""Tables of the documentation that people look codes up in."""

import re
from pathlib import Path

from a2c2_ros.core.safety import Reason, State

DOCS = Path(__file__).resolve().parents[1] / "docs"


def test_every_state_and_reason_is_explained_under_its_number():
    text = (DOCS / "safety.md").read_text()
    section = text.split("## What it says and what to do")[1].split("\n## ")[0]
    explained = {(int(number), name) for number, name in re.findall(r"\b(\d+) `([A-Z_]+)`", section)}
    assert explained == {(code.value, code.name) for code in (*State, *Reason)}
