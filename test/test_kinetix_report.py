"""The page of the Kinetix results, from result files made here; no simulator."""

import json

import pytest

from a2c2_ros.core.errors import ConfigError
from a2c2_ros.evaluation import kinetix_report
from a2c2_ros.evaluation.kinetix_report import Results

PAIRS = [(1, 0), (1, 1), (7, 1), (4, 4)]
SETTINGS = {"budget": "small", "rollouts": 8, "seed": 0, "horizon": 8, "action_noise": 0.1}


def result(solved, **changes):
    """Of a level; ``solved`` are the outcomes of every method at every pair, as text."""

    def cell(pair, text):
        number = text.count("1")
        interval = [max(0.0, number / 8 - 0.2), min(1.0, number / 8 + 0.2)]
        found = {"e": pair[0], "d": pair[1], "successes": number, "episodes": 8, "wilson_95": interval, "solved": text}
        return found | {"mean_steps": 10.0}

    seconds = {"all": 10.0, "simulator": 6.0, "policy": 3.0, "head": 1.0}
    methods = {
        name: {
            "cells": [cell(pair, text) for pair in PAIRS],
            "seconds": seconds,
            "counts": {"steps": 1000, "chunks": 100, "corrections": 500 * ("a2c2" in name)},
        }
        for name, text in solved.items()
    }
    expert = {
        name: {"successes": 8, "episodes": 8, "wilson_95": [0.7, 1.0], "steps_per_s": 100.0} for name in ("stock",)
    }
    expert["pruned"] = expert["stock"] | {"steps_per_s": 2000.0}
    training = {name: {"steps": 100, "seconds": 5.0} for name in ("expert", "policy", "head")}
    facts = {"training": training, "state": 7, "actions": ["motor0"], "parameters": {"policy": 1000, "head": 2000}}
    return SETTINGS | {"expert": expert, "methods": methods, "facts": facts} | changes


@pytest.fixture
def folder(tmp_path):
    one = {"naive": "11000000", "rtc": "11110000", "a2c2": "11111100"}
    two = {"naive": "00001111", "rtc": "00001111", "a2c2": "11111111"}
    for name, solved in (("one", one), ("two", two)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result(solved)))
    return tmp_path


def test_means_weigh_levels_alike_and_gains_are_of_pairs(folder):
    results = Results(folder)
    rate, _ = results.mean("naive", [(4, 4)])
    assert rate == pytest.approx((2 / 8 + 4 / 8) / 2)
    gain, error = results.gain("a2c2", "naive", [(4, 4)])
    assert gain == pytest.approx((4 / 8 + 4 / 8) / 2)
    # Four of eight pairs differ, always in favour: half a pair more on either side, two pairs more in all.
    variance = (4.5 + 0.5 - 4.0**2 / 10) / 10**2
    assert error == pytest.approx((2 * variance) ** 0.5 / 2)
    assert results.gain("a2c2", "tt_rtc", [(4, 4)]) is None


def test_targets_are_met_or_missed_by_the_numbers(folder):
    rows = kinetix_report.targets_section(Results(folder)).splitlines()[2:]
    assert "+50.0" in rows[0] and rows[0].rstrip(" |").endswith("met")
    assert "+37.5" in rows[1] and rows[1].rstrip(" |").endswith("met")
    assert "87.5" in rows[2] and rows[2].rstrip(" |").endswith("met")
    worse = result({"naive": "11111111", "a2c2": "11110000"})
    for name in ("one", "two"):
        (folder / f"{name}.json").write_text(json.dumps(worse))
    rows = kinetix_report.targets_section(Results(folder)).splitlines()[2:]
    assert "-50.0" in rows[0] and "missed" in rows[0] and "missed" in rows[2]
    assert kinetix_report.NOT_RUN in rows[1]


def test_the_page_has_every_part_and_what_stands_around_them(folder, capsys):
    page = folder / "page.md"
    page.write_text("# Mine\n\n<!-- begin mean -->\n\nold\n\n<!-- end mean -->\n\nkept\n")
    kinetix_report.write(folder, page)
    text = page.read_text()
    assert "kept" in text and "old" not in text and "37.5 ±" in text
    assert "37.5 ±" in capsys.readouterr().out


def test_results_of_other_settings_are_not_mixed(folder):
    (folder / "three.json").write_text(json.dumps(result({"naive": "11111111"}, rollouts=16)))
    with pytest.raises(ConfigError, match="differ in rollouts"):
        Results(folder)
