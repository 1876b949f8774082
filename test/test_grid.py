"""The grid: what is run and what not, episodes that survive everything, results and the page."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
from evaluation_fakes import FakeWorkers, fake_record, write_head, write_policy

from a2c2_ros.core.errors import A2C2Error, ConfigError
from a2c2_ros.evaluation import cells, grid, libero, paper, report
from a2c2_ros.evaluation.cells import DEVELOPMENT_SEEDS, Cell
from a2c2_ros.evaluation.pool import MAX_DEATHS, Pool, Unit
from a2c2_ros.evaluation.runner import progress, run_items
from a2c2_ros.evaluation.worker import ProcessWorker, WorkerError

GRID = """
results: {folder}/results
runs: {folder}/runs
page: {folder}/page.md
tasks: 0,3
episodes: 3
policy: {folder}/policy
head: {folder}/head.onnx
rows:
  - {{label: naive, method: naive}}
  - {{label: a2c2, method: a2c2}}
  - {{label: expert, method: expert}}
  - {{label: sync, method: sync}}
pairs: [[40, 10], [10, 0], [50, 0]]
more:
  - {{rows: [naive, a2c2], pairs: [[10, 0]], episodes: 5}}
headline: {{naive: naive, a2c2: a2c2}}
quick: {{tasks: 3, episodes: 1, rows: [naive], pairs: [[10, 0]], results: {folder}/quick}}
"""
EPISODES = 8 * 2 * 3 + 2 * 2 * 2
"""naive and a2c2 at three pairs, the expert, sync at (40, 10) alone; two of them have two more per task."""


@pytest.fixture
def folder(tmp_path):
    write_policy(tmp_path / "policy", "p1")
    write_head(tmp_path / "head.onnx", "p1")
    (tmp_path / "grid.yaml").write_text(GRID.format(folder=tmp_path))
    return tmp_path


def run(folder, start=None, workers=2, processes=4, **options):
    loaded = grid.load_grid(folder / "grid.yaml")
    items = grid.make_items(loaded, grid.plan(loaded)[0])
    start = start or FakeWorkers()
    state = run_items(items, loaded.tasks, start, workers=workers, processes=processes, **options)
    assert state == progress(items, loaded.tasks)
    return start, state


def results(folder):
    found = {path.stem: json.loads(path.read_text()) for path in (folder / "results").glob("*.json")}
    return {name: {k: result[k] for k in ("total", "per_task", "rollouts", "states")} for name, result in found.items()}


def expected(name, method, horizon, delay, episodes, folder):
    policy = "" if method == "expert" else f"{folder}/policy"
    cell = Cell(label=method, method=method, execution_horizon=horizon, inference_delay=delay, policy=policy)
    records = [fake_record(cell, task, number) for task in (0, 3) for number in range(episodes)]
    fine = [r for r in records if r["error"] is None]
    return sum(r["success"] for r in fine), len(fine), len(records) - len(fine)


def check_counts(folder):
    found = results(folder)
    wanted = {
        f"{method}_e{e}_d{d}": (method, e, d, 5 if (e, d) == (10, 0) else 3)
        for method in ("naive", "a2c2")
        for e, d in ((40, 10), (10, 0), (50, 0))
    } | {"expert": ("expert", None, None, 3), "sync_e40_d10": ("sync", 40, 10, 3)}
    assert found.keys() == wanted.keys()
    for name, arguments in wanted.items():
        total = found[name]["total"]
        counts = (total["successes"], total["episodes"], total["exceptions"])
        assert counts == expected(name, *arguments, folder), name
    return found


def test_the_shipped_grid_has_the_pairs_and_rows_that_were_promised():
    loaded = grid.load_grid(grid.default_grid())
    assert set(loaded.pairs) == {*paper.TABLE_7, (20, 20), (30, 20)}
    assert {row.method for row in loaded.rows} == set(cells.METHOD_NAMES)
    assert set(loaded.more[0].pairs) == set(paper.TABLE_1)
    assert (loaded.episodes, loaded.more[0].episodes, loaded.tasks) == (10, 50, tuple(range(10)))
    quick = grid.load_grid(grid.default_grid(), quick=True)
    assert (len(quick.tasks), len(quick.pairs), len(quick.rows)) == (2, 3, 3)
    assert quick.results != loaded.results
    assert quick.page != loaded.page


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("method: sync", "method: snyc", "snyc"),
        ("label: sync", "label: naive", "each once"),
        ("label: sync", "label: a/b", "a/b"),
        ("[10, 0]]", "[10]]", r"\[10\]"),
        ("episodes: 5", "episodes: 51", "51"),
        ("episodes: 3", "episode: 3", "episode"),
        ("rows: [naive, a2c2]", "rows: [nobody]", "nobody"),
        ("tasks: 0,3", "tasks: 0-10", "10"),
        ("rows:\n", "rows: 3\nold:\n", "rows is 3"),
        ("{label: naive, method: naive}", "{label: naive, methode: naive}", "methode"),
        ("a2c2: a2c2}", "a2c2: a2c2, moving: [gone]}", r"headline names \['gone'\]"),
        ("a2c2: a2c2}", "a2c2: a2c2, moving: naive}", "headline.moving is 'naive'"),
        ("a2c2: a2c2}", "a2c2: a2c2, best: a2c2}", r"unknown \['best'\]"),
    ],
)
def test_what_is_wrong_in_a_grid_file_is_named(folder, old, new, words):
    path = folder / "grid.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ConfigError, match=words):
        grid.load_grid(path)


def test_plan_is_in_the_order_of_the_file_and_more_comes_last(folder):
    planned, left_out = grid.plan(grid.load_grid(folder / "grid.yaml"))
    assert [(cell.name, n) for cell, n in planned] == [
        ("naive_e40_d10", 3),
        ("a2c2_e40_d10", 3),
        ("expert", 3),
        ("sync_e40_d10", 3),
        ("naive_e10_d0", 3),
        ("a2c2_e10_d0", 3),
        ("naive_e50_d0", 3),
        ("a2c2_e50_d0", 3),
        ("naive_e10_d0", 5),
        ("a2c2_e10_d0", 5),
    ]
    assert [(entry.cell.name, entry.same_as) for entry in left_out] == [
        ("sync_e10_d0", "naive_e10_d0"),
        ("sync_e50_d0", "naive_e50_d0"),
    ]


def test_what_is_not_possible_is_left_out_with_its_reason(folder):
    write_policy(folder / "prefix", "p2", prefix_slots=4)
    write_head(folder / "foreign.onnx", "p3")
    text = (folder / "grid.yaml").read_text()
    rows = f"""
  - {{label: tt, method: tt_rtc, policy: {folder}/prefix}}
  - {{label: foreign, method: a2c2, head: {folder}/foreign.onnx}}
  - {{label: later, method: a2c2, head: {folder}/later.onnx}}
  - {{label: moving, method: naive, variant: push, pairs: [[5, 2]]}}
"""
    text = text.replace("\npairs:", f"{rows}\npairs:").replace("[50, 0]]\nmore", "[10, 4], [5, 6], [45, 10]]\nmore")
    (folder / "grid.yaml").write_text(text)
    planned, left_out = grid.plan(grid.load_grid(folder / "grid.yaml"))
    names = [cell.name for cell, n in planned if n == 3]
    assert {"tt_e10_d4", "tt_e10_d0", "naive_e10_d4"} <= set(names)  # another policy's tt_rtc is not naive at d = 0
    assert [cell.name for cell, _ in planned][-1] == "moving_e5_d2"  # a variant is done before the next
    reasons = {entry.cell.name: entry.reason for entry in left_out}
    assert "d <= e" in reasons["naive_e5_d6"]
    assert "e + d <= H" in reasons["naive_e45_d10"]
    assert "d=10" in reasons["tt_e40_d10"] and "4 slots" in reasons["tt_e40_d10"]
    assert "p3" in reasons["foreign_e40_d10"]
    assert "later.onnx" in reasons["later_e40_d10"]
    assert not set(names) & set(reasons)


@pytest.mark.parametrize(("workers", "processes"), [(1, 1), (2, 2), (5, 8)])
def test_results_do_not_depend_on_the_number_of_workers(folder, workers, processes):
    pool, state = run(folder, FakeWorkers(0.002))
    found = check_counts(folder)
    assert (state.done, state.episodes, state.complete, state.cells) == (EPISODES, EPISODES, 8, 8)
    assert len(pool.ran) == len(set(pool.ran)) == EPISODES
    assert pool.alive == 0
    shutil.rmtree(folder / "results")
    shutil.rmtree(folder / "runs")
    other, _ = run(folder, FakeWorkers(0.002), workers, processes)
    assert results(folder) == found
    assert other.most_alive <= processes
    assert other.alive == 0


def test_a_second_run_has_nothing_to_do_but_writes_lost_results(folder):
    run(folder)
    (folder / "results" / "expert.json").unlink()
    workers, _ = run(folder)
    assert not workers.started
    check_counts(folder)


def test_a_repeated_evaluation_that_comes_out_otherwise_replaces_the_result(folder):
    run(folder)
    path = folder / "results" / "naive_e10_d0.json"
    mine = path.read_text()
    told = json.loads(mine)
    told["rollouts"][3]["success"] = not told["rollouts"][3]["success"]
    path.write_text(json.dumps(told))
    run(folder)
    assert path.read_text() == mine


def test_a_result_with_more_episodes_is_kept_unless_the_weights_are_others(folder, capsys):
    run(folder)
    path = folder / "results" / "a2c2_e40_d10.json"
    told = json.loads(path.read_text())
    more = [
        rollout | {"initial_state": n, "success": False, "error": None} for n in (3, 4) for rollout in told["rollouts"]
    ]
    path.write_text(json.dumps(told | {"rollouts": more}))
    before = path.read_text()
    run(folder)
    assert path.read_text() == before
    fine = cells.outcomes(told)
    assert f"a2c2_e40_d10.json is kept: it has 12 valid episodes of the same settings, {len(fine)} were run here" in (
        capsys.readouterr().err
    )
    write_head(folder / "head.onnx", "p1", parameters=1)
    os.utime(folder / "head.onnx", ns=(2, 2))
    run(folder)
    assert cells.outcomes(json.loads(path.read_text())) == fine
    assert "is replaced: 12 valid episodes of other settings (head_sha256" in capsys.readouterr().err


def test_a_row_is_compared_with_naive_under_the_same_conditions(folder):
    text = (folder / "grid.yaml").read_text()
    given = (("n2", "naive", "2"), ("a2", "a2c2", "2"), ("a3", "a2c2", "3"), ("a4", "a2c2", "3, baseline: n2"))
    row = "  - {{label: {}, method: {}, inference_delay_jitter: {}}}\n"
    rows = "".join(row.format(*values) for values in given)
    (folder / "grid.yaml").write_text(text.replace("pairs: [[40", f"{rows}pairs: [[40", 1))
    loaded = grid.load_grid(folder / "grid.yaml")
    found = {row.label: loaded.baseline(row) for row in loaded.rows}
    assert {label: row and row.label for label, row in found.items()} == {
        **{"naive": None, "expert": None, "a2c2": "naive", "sync": "naive"},
        **{"n2": None, "a2": "n2", "a3": None, "a4": "n2"},
    }


def test_complete_cells_come_early_with_fewer_workers_than_tasks():
    tasks, order = range(10), [Cell(label=f"c{i}", method="expert") for i in range(3)]
    units = [Unit(cell, task, (0, 1)) for cell in order for task in tasks]
    seen = []
    workers = FakeWorkers()
    Pool(workers, 2, 10).run(units, lambda unit, number, record: seen.append(unit.cell.label))
    assert len(workers.started) == 10  # every simulator is made once
    last = {label: len(seen) - 1 - seen[::-1].index(label) for label in ("c0", "c1", "c2")}
    assert last["c0"] < 24 and last["c1"] < 44  # of 60; a cell has 20


def test_few_processes_take_several_cells_before_they_make_room():
    order = [Cell(label=f"c{i}", method="expert") for i in range(8)]
    workers = FakeWorkers()
    units = [Unit(cell, task, (0,)) for cell in order for task in range(10)]
    Pool(workers, 1, 1).run(units, lambda *_: None)
    assert len(workers.ran) == 80
    assert len(workers.started) <= 30
    assert workers.most_alive == 1


KILLED = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from evaluation_fakes import FakeWorkers
from test_grid import run
run(Path(sys.argv[1]), FakeWorkers(0.2))
"""


def test_a_run_that_was_killed_is_continued_with_right_counts(folder):
    script = KILLED.format(path=[str(Path(__file__).parent), *sys.path])
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list((folder / "runs").glob("*/task*.json"))) < 9:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = len(list((folder / "runs").glob("*/task*.json")))
    assert 9 <= kept < EPISODES
    workers, state = run(folder)
    assert len(workers.ran) == EPISODES - kept
    assert state.complete == 8
    check_counts(folder)


def test_a_budget_ends_after_an_episode_and_the_rest_comes_later(folder):
    first = FakeWorkers()
    _, state = run(folder, first, workers=1, stop=lambda: len(first.ran) >= 10)
    assert (len(first.ran), state.done) == (10, 10)
    assert set(results(folder)) == {"naive_e40_d10"}  # six of its episodes, four of the next cell
    second, _ = run(folder)
    assert len(second.ran) == EPISODES - 10
    check_counts(folder)


def test_episodes_of_other_weights_are_not_mixed_in(folder):
    run(folder)
    before = results(folder)
    write_head(folder / "head.onnx", "p1", parameters=1)
    os.utime(folder / "head.onnx", ns=(1, 1))
    loaded = grid.load_grid(folder / "grid.yaml")
    stale = report.Results(loaded, "test").stale
    assert set(stale) == {"a2c2_e40_d10", "a2c2_e10_d0", "a2c2_e50_d0"}
    workers, _ = run(folder)
    assert {name.split("_")[0] for name, _, _ in workers.ran} == {"a2c2"}
    assert len(workers.ran) == 3 * 2 * 3 + 2 * 2
    assert results(folder) == before  # the fake's success does not depend on the head
    assert not report.Results(loaded, "test").stale
    assert len(list((folder / "runs").glob("a2c2_e40_d10-*"))) == 2


def test_exceptions_are_kept_until_they_are_run_again_on_demand(folder):
    _, state = run(folder)
    raised = sum(result["total"]["exceptions"] for result in results(folder).values())
    assert raised > 0 and state.done == EPISODES
    assert not run(folder)[0].ran
    workers, _ = run(folder, again=True)
    assert len(workers.ran) == raised
    check_counts(folder)


def test_a_process_that_dies_stops_neither_the_others_nor_counts_as_failure(folder):
    workers = FakeWorkers(dies=lambda cell, task, number: (cell.name, task, number) == ("naive_e40_d10", 3, 1))
    with pytest.raises(A2C2Error, match="naive_e40_d10 task 3 died"):
        run(folder, workers)
    assert "naive_e40_d10" not in results(folder) and len(results(folder)) == 7
    assert len(workers.ran) == EPISODES - 2
    assert workers.alive == 0
    assert len(run(folder)[0].ran) == 2
    check_counts(folder)


def test_processes_that_all_die_end_the_run(folder):
    workers = FakeWorkers(dies=lambda *_: True)
    with pytest.raises(A2C2Error, match="died"):
        run(folder, workers)
    assert not workers.ran
    assert MAX_DEATHS <= len(workers.started) <= MAX_DEATHS + 1
    assert not results(folder)


SERVER = """
import os, sys
from a2c2_ros.evaluation.worker import serve

def run(env, cell, number):
    print("a library talks", file=sys.stderr)
    if number == 1:
        raise ValueError("one episode")
    if number == 2:
        os._exit(7)
    return {"success": cell.method == "naive", "steps": env}

serve(5, sys.stdin, sys.stdout, run)
"""


def test_a_worker_process_answers_records_exceptions_and_is_missed_when_it_dies(tmp_path):
    worker = ProcessWorker([sys.executable, "-c", SERVER], tmp_path / "logs" / "w.log")
    cell = Cell(label="x", method="naive", execution_horizon=10, inference_delay=0, policy="p")
    assert worker.run(cell, 0) == {"error": None, "success": True, "steps": 5}
    assert worker.run(cell, 1) == {"error": "ValueError: one episode"}
    with pytest.raises(WorkerError, match="code 7"):
        worker.run(cell, 2)
    worker.close()
    worker.close()
    assert "a library talks" in (tmp_path / "logs" / "w.log").read_text()


def test_splits_do_not_share_initial_states():
    def cell(split, seed=0):
        return Cell(label="x", method="expert", split=split, seed=seed)

    assert [cell("test").placement(n) for n in (0, 49)] == [(0, 0), (49, 49)]
    development = {cell("development", seed).placement(n) for seed in range(3) for n in range(50)}
    assert len(development) == 150
    assert {state for state, _ in development} == {None}
    placements = np.array([seed for _, seed in development])
    assert placements.min() >= DEVELOPMENT_SEEDS
    assert Cell(label="x", method="expert", split="development", seed=cells.MAX_SEED).placement(49)[1] < 2**32
    demonstrations = [
        int(np.random.SeedSequence((0, task, episode, attempt)).generate_state(1)[0])
        for task in range(10)
        for episode in range(100)
        for attempt in range(6)
    ]
    assert not np.isin(demonstrations, placements).any()


def test_page_of_a_part_and_of_all(folder):
    loaded = grid.load_grid(folder / "grid.yaml")
    page = folder / "page.md"
    page.write_text("# Mine\n\n<!-- begin grid -->\nold\n<!-- end grid -->\n\nWords after it.\n")
    report.write(loaded)
    text = page.read_text()
    assert text.startswith("# Mine\n") and "Words after it." in text and "old" not in text
    assert "| 40 | 10 | 64.4% | not run | 84.2% | not run | not run |" in text  # Table 1 beside nothing yet
    assert "0 of 8 cells are complete." in text
    assert not list(folder.glob("*.png"))
    assert "No records." in text
    assert "- naive, a2c2, expert, sync: all\n" in text
    record = {"head": {}, "policy_id": "p1", "architecture": "compact without tau", "parameters": 1000, "steps": 7}
    record |= {"seconds": 2.0, "history": [{"error": 0.5}, {"base_error": 0.2, "error": 0.1, "error_0": 0.05}]}
    (folder / "results" / "training").mkdir(parents=True)
    (folder / "results" / "training" / "no_time.json").write_text(json.dumps(record))
    best = {"error": 0.25, "error_0": 0.125, "error_40": 0.5}
    flow = {"policy_id": "p1", "parameters": 2000, "steps": 9, "seconds": 3.0, "history": [{}]}
    flow["validation_error_by_temperature"] = {"0.0": best, "1.0": best | {"error": 0.3}}
    (folder / "results" / "training" / "flow.json").write_text(json.dumps(flow))
    (folder / "results" / "training" / "copied.json").write_text(json.dumps(flow | {"copy_of": "p1"}))
    report.write(loaded)
    assert "| no_time | p1 | compact without tau | 1,000 | 7 | 0.200 | 0.100 | 0.050 |  |" in page.read_text()
    assert "| flow | 2,000 | 9 | 0.250 | 0.125 | 0.500 |" in page.read_text()
    assert "copied" not in page.read_text(), "it was not trained"
    first = FakeWorkers()
    run(folder, first, workers=1, stop=lambda: len(first.ran) >= 10)
    report.write(loaded)
    successes, episodes, _ = expected("", "naive", 40, 10, 3, folder)
    assert f"| 40 | 10 | 64.4% | {report.percent(successes / episodes)} [" in page.read_text()
    assert "- naive: all but (40, 10)\n" in page.read_text() and "- a2c2, expert, sync: all\n" in page.read_text()
    assert (folder / "page_static.png").stat().st_size > 10_000
    run(folder)
    for path in (folder / "results").glob("naive_e10_d0.json"):
        path.write_text(path.read_text().replace('"episodes_per_task": 5', '"episodes_per_task": 3'))
    report.write(loaded)
    assert "- naive: (10, 0) has 3 of 5 episodes per task\n" in page.read_text()
    shutil.rmtree(folder / "results")
    run(folder)
    report.write(loaded)
    text = page.read_text()
    assert "8 of 8 cells are complete." in text
    assert re.search(
        r"a2c2 has more successes than naive in \d of 3 pairs .*; after Holm's correction for 3 tests", text
    )
    assert "Planned, not run" not in text and "sync_e10_d0" not in text
    report.write(loaded)
    assert page.read_text() == text


def fake_result(folder, method, horizon, delay, successes, *, label="", variant="static"):
    cell = Cell(
        label=label or method,
        method=method,
        variant=variant,
        execution_horizon=horizon,
        inference_delay=delay,
        policy=f"{folder}/policy",
        head=f"{folder}/head.onnx" if method == "a2c2" else "",
    )
    record = {"error": None, "steps": 10, "seconds": 1.0, "inference_ms": [], "head_ms": [], "states": {}}
    record["failure"] = "held"
    places = [{"task": task, "initial_state": n, "success": n < successes} for task in (0, 3) for n in range(10)]
    result = cells.summarise(cell, cells.settings(cell), [0, 3], [record | place for place in places])
    cells.write_result(folder / "results" / f"{cell.name}.json", result)


@pytest.mark.parametrize("variant", ["dift", "dift+0.5", "drift+2", "drift+x", "drift+nan", "drift+"])
def test_a_variant_that_does_not_exist_is_refused(variant):
    with pytest.raises(ConfigError, match=f"variant is '{re.escape(variant)}', allowed"):
        Cell(label="x", method="expert", variant=variant)


def test_a_variant_says_what_the_simulator_is_asked_for():
    assert cells.parse_variant("static") == ({}, 0.0)
    assert cells.parse_variant("drift+0.5") == ({"motion": "drift"}, 0.5)
    assert cells.parse_variant("swap+1") == ({"suite": "libero_spatial_swap"}, 1.0)


def test_a_result_whose_weights_are_gone_is_not_listed_as_left_out(folder):
    loaded = grid.load_grid(folder / "grid.yaml")
    fake_result(folder, "a2c2", 40, 10, 9)
    (folder / "head.onnx").unlink()
    report.write(loaded)
    listed = (folder / "page.md").read_text().partition("cells are complete.")
    assert listed[0].rsplit(maxsplit=3)[-3] == "1"
    assert "a2c2_e40_d10" not in listed[2] and "a2c2_e10_d0" in listed[2]
    path = folder / "results" / "a2c2_e40_d10.json"
    path.write_text(path.read_text().replace('"max_steps": 220', '"max_steps": 100'))
    assert "max_steps" in report.Results(loaded, "test").stale["a2c2_e40_d10"], "what can be compared is"


def test_results_of_different_base_policies_are_not_compared(folder):
    loaded = grid.load_grid(folder / "grid.yaml")
    fake_result(folder, "naive", 40, 10, 5)
    fake_result(folder, "a2c2", 40, 10, 9)
    row = loaded.row("a2c2")
    assert report.Results(loaded, "test").difference(row, (40, 10)).points == 40
    path = folder / "results" / "a2c2_e40_d10.json"
    path.write_text(path.read_text().replace('"policy_id": "p1"', '"policy_id": "p0"'))
    (folder / "head.onnx").unlink()
    (folder / "policy" / "config.json").unlink()
    found = report.Results(loaded, "test")
    assert found.get(row, (40, 10)) and found.difference(row, (40, 10)) is None


def test_targets_are_met_missed_or_not_run(folder):
    loaded = grid.load_grid(folder / "grid.yaml")
    for method, e, d, successes in (
        ("naive", 40, 10, 4),
        ("a2c2", 40, 10, 9),
        ("naive", 10, 0, 9),
        ("a2c2", 10, 0, 3),
    ):
        fake_result(folder, method, e, d, successes)
    found = {what: (text, met) for what, _, text, met in report.targets(report.Results(loaded, "test"))}
    assert found["naive (10, 0)"] == ("90% [70, 97]", True)
    assert found["a2c2 (40, 10)"][1] is True
    assert found["a2c2 above naive (40, 10)"] == ("+50.0 (p = 0.002, n = 20)", True)
    assert found["a2c2 above naive (50, 0)"] == ("not run", None)
    assert found["recovery of a2c2 (our recipe)"][0].startswith("1.00 [")
    assert found["recovery of a2c2 (our recipe)"][1] is False
    assert found["a2c2 significantly below naive"] == ("at (10, 0); 2 of 3 cells were run", False)
    assert not any("paper" in what for what in found)


def test_heads_towards_the_papers_recipe_and_things_that_move_have_targets_of_their_own(folder):
    text = (folder / "grid.yaml").read_text()
    rows = f"  - {{label: paper, method: a2c2, head: {folder}/head.onnx}}\n  - {{label: later, method: a2c2}}\n"
    rows += "  - {label: n_push, method: naive, variant: push}\n  - {label: a_push, method: a2c2, variant: push}\n"
    text = text.replace("pairs: [[40", f"{rows}pairs: [[40", 1)
    text = text.replace("a2c2: a2c2}", "a2c2: a2c2, paper_recipe: [paper, later], moving: [a_push]}")
    (folder / "grid.yaml").write_text(text)
    loaded = grid.load_grid(folder / "grid.yaml")
    for label, method, variant, e, d, successes in (
        ("naive", "naive", "static", 40, 10, 4),
        ("naive", "naive", "static", 10, 0, 8),
        ("paper", "a2c2", "static", 40, 10, 6),
        ("n_push", "naive", "push", 40, 10, 1),
        ("a_push", "a2c2", "push", 40, 10, 4),
    ):
        fake_result(folder, method, e, d, successes, label=label, variant=variant)
    found = {what: (target, text, met) for what, target, text, met in report.targets(report.Results(loaded, "test"))}
    target, text, met = found["recovery of paper (towards the paper's recipe)"]
    assert (target, met) == ("at least 1.0", False) and text.startswith("0.50 [")
    assert found["recovery of later (towards the paper's recipe)"] == ("at least 1.0", "not run", None)
    assert found["a_push above naive (40, 10)"][1:] == ("+30.0 (p = 0.031, n = 20)", True)


def test_results_of_another_renderer_are_not_compared(folder):
    loaded = grid.load_grid(folder / "grid.yaml")
    for method, e, d, successes in (("naive", 40, 10, 4), ("a2c2", 40, 10, 9), ("naive", 10, 0, 9)):
        fake_result(folder, method, e, d, successes)
    row, naive = loaded.row("a2c2"), loaded.row("naive")
    assert report.Results(loaded, "test").recovery(row, naive).value == 1.0
    path = folder / "results" / "a2c2_e40_d10.json"
    path.write_text(path.read_text().replace('"renderer": "', '"renderer": "other-'))
    found = report.Results(loaded, "test")
    assert found.get(row, (40, 10)) and found.difference(row, (40, 10)) is None and found.recovery(row, naive) is None
    report.write(loaded)
    assert "a2c2_e40_d10 is not compared with naive_e40_d10: renderer other-" in (folder / "page.md").read_text()


def test_the_grid_shows_every_row_on_the_same_initial_states(folder):
    """Table 1 has more of them."""
    loaded = grid.load_grid(folder / "grid.yaml")  # 3 per task, of which the naive results below have 10
    fake_result(folder, "naive", 10, 0, 2)
    fake_result(folder, "a2c2", 10, 0, 9)
    found = report.Results(loaded, "test")
    text = report.grid_section(found)
    assert "| naive | 66.7% [" in text and "| a2c2 | 100% [" in text and "states 0 to 2 of each" in text
    assert "(40, 10)" not in text, "a column without any result"
    assert "| 20% [" in report.paper_table(found, paper.TABLE_1)
    row, pair = loaded.row("a2c2"), (10, 0)
    pairs = [found.difference(row, pair, episodes).pairs for episodes in (1, 3, 10, None)]
    assert pairs == [2, 6, 20, 20], "of two tasks"
    (curve,) = [c for c in report._curves(found, "static", {10: (10, 0)}) if c.label == "naive"]
    assert curve.points[10][0] == pytest.approx(2 / 3)


def test_rows_with_pairs_of_their_own_are_shown_with_their_difference_to_a_baseline(folder):
    text = (folder / "grid.yaml").read_text()
    rows = f"  - {{label: tried, method: a2c2, head: {folder}/head.onnx, baseline: a2c2, pairs: [[10, 0]]}}\n"
    text = text.replace("pairs: [[40", f"{rows}pairs: [[40", 1).replace("episodes: 3", "episodes: 10")
    (folder / "grid.yaml").write_text(text.replace("episodes: 5", "episodes: 20"))
    loaded = grid.load_grid(folder / "grid.yaml")
    for label, method, successes in (("naive", "naive", 2), ("a2c2", "a2c2", 9), ("tried", "a2c2", 5)):
        fake_result(folder, method, 10, 0, successes, label=label)
    text = report.grid_section(report.Results(loaded, "test"))
    assert "| row | compared with | (10, 0) |\n" in text
    assert "| tried | a2c2 | 50%, -40 (p = 0.0078) |" in text
    assert "| sync | naive | = 20% |" in text, "the same episodes are no comparison"
    assert "Holm's" not in text, "nothing to adjust for"
    fake_result(folder, "naive", 40, 10, 4)
    fake_result(folder, "a2c2", 40, 10, 6)  # p = 0.125
    text = report.grid_section(report.Results(loaded, "test"))
    assert "Holm's correction over a row's own pairs: a2c2 1 of 2 above naive.\n" in text


def test_short_tables_have_the_rows_that_the_headline_names(folder):
    fake_result(folder, "naive", 40, 10, 5)
    fake_result(folder, "a2c2", 40, 10, 9)
    fake_result(folder, "sync", 40, 10, 8)
    path = folder / "grid.yaml"
    text = path.read_text()
    for lists, lines in (("", 3), (", tasks: [sync], failures: [sync], speed: [sync]", 1)):
        path.write_text(text.replace("a2c2: a2c2}", f"a2c2: a2c2{lists}}}"))
        found = report.Results(grid.load_grid(path), "test")
        assert len(re.findall(r"^\| \w+ \| \d+ \| \d", report.speed_section(found), re.M)) == lines
        assert ("| sync | 40 | 10 | 8/10 | 8/10 |" in report.task_table(found)) == bool(lists)
        assert report.failure_table(found).count("| (40, 10) | 20 |") == 3


def test_a_marker_without_its_end_is_refused():
    with pytest.raises(A2C2Error, match="begin grid"):
        report.fill("<!-- begin grid -->\n", {"grid": "x"})


@pytest.mark.parametrize(("workers", "free_gb", "kept"), [(2, 100, 10), (2, 24, 5), (4, 8, 4), (16, 100, 16)])
def test_simulators_are_kept_as_far_as_the_memory_allows(workers, free_gb, kept):
    assert grid.default_processes(workers, 10, int(free_gb * 1e9)) == kept


def test_command_line_lists_and_refuses(folder, capsys):
    arguments = ["--grid", str(folder / "grid.yaml")]
    assert grid.main([*arguments, "--list"]) == 0
    assert "sync_e10_d0" in capsys.readouterr().out
    assert not (folder / "runs").exists()
    fake_result(folder, "naive", 40, 10, 5)
    fake_result(folder, "a2c2", 40, 10, 5)
    (folder / "head.onnx").unlink()
    assert grid.main([*arguments, "--list"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines["naive_e40_d10"].split()[2:] == ["0/6", "result:", "20"]
    assert "left out" in lines["a2c2_e40_d10"] and lines["a2c2_e40_d10"].endswith(" result: 20")
    assert "result" not in lines["naive_e10_d0"]
    write_head(folder / "head.onnx", "p1")
    capsys.readouterr()
    assert grid.main([*arguments, "--cells", "nothing*"]) == 2
    assert "a2c2_e10_d0" in capsys.readouterr().err
    assert grid.main(["--grid", str(folder / "absent.yaml")]) == 2
    assert "absent.yaml" in capsys.readouterr().err


def test_one_real_short_episode(tmp_path):
    out = tmp_path / "r.json"
    arguments = ["--method", "naive", "--execution-horizon", "10", "--inference-delay", "0"]
    arguments += ["--tasks", "0", "--episodes", "1"]
    assert libero.main(["--out", str(out), *arguments, "--max-steps", "4", "--workers", "1", "--videos"]) == 0
    result = json.loads(out.read_text())
    rollout = {"task": 0, "initial_state": 0, "success": False, "steps": 4, "failure": "never lifted", "error": None}
    assert result["rollouts"] == [rollout] and result["failures"] == {"never lifted": 1}
    assert result["states"] == {"BASE_ONLY": 4}
    assert result["total"]["episodes"] == 1
    with av.open(str(tmp_path / "r.parts" / "task00_state00.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert [frame.shape for frame in frames] == [(256, 768, 3)] * 4
    assert min(frame[:, :512].std() for frame in frames) > 20, "the cameras are drawn in every step"
