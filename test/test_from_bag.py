"""Bags to data sets: the right observation, base action and label for every frame; what is lost is said."""

import dataclasses
import json

import numpy as np
import pytest
import yaml

pytest.importorskip("rclpy")
pytest.importorskip("lerobot")

from bag_writer import CAMERAS, POLICY_ID, SIZE, STEP_NS, image_at, make_head, record, write_profile

from a2c2_ros.core.errors import ConfigError
from a2c2_ros.core.safety import State
from a2c2_ros.heads.base import manifest_of
from a2c2_ros.heads.export import to_onnx
from a2c2_ros.heads.onnx_head import save_graph
from a2c2_ros.nodes.conversions import array_to_joint_state, joint_state_to_array
from a2c2_ros.training import from_bag, recorded_run
from a2c2_ros.training.dataset import load_demonstrations
from a2c2_ros.training.from_bag import build, check_same, compare, convert, summary
from a2c2_ros.training.joining import load_base
from a2c2_ros.training.recorded_run import Recording


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    head = make_head()
    path = tmp_path_factory.mktemp("head") / "head.onnx"
    save_graph(to_onnx(head), manifest_of(head), path)
    return path


@pytest.fixture(scope="module")
def profile(tmp_path_factory):
    return write_profile(tmp_path_factory.mktemp("robot") / "arm.yaml")


@pytest.fixture(scope="module")
def run(head, profile, tmp_path_factory):
    """A bag, its control steps and the observation of each."""
    path = tmp_path_factory.mktemp("run") / "bag"
    return path, *record(path, profile, head)


def converted(path, folder, wanted="auto"):
    recording, parts = Recording(path, folder), []
    return recording, convert(recording, wanted, parts.append), parts


def test_a_data_set_has_what_the_loop_saw_and_did(run, tmp_path):
    path, steps, seen = run
    report = build([path], tmp_path / "data", "expert", parity=True)
    assert report["bags"][0]["parity"] == {"compared": 100, "differing": []}
    assert {State[name] for name in report["bags"][0]["states"]} >= {State.RUNNING, State.BASE_ONLY, State.TAKEOVER}
    data = load_demonstrations(tmp_path / "data")
    base = load_base(tmp_path / "data", data, POLICY_ID)
    rows = [
        (s, o) for s, o in list(zip(steps, seen, strict=True))[:80] if s.state in (1, 2, 6)
    ]  # the expert is silent after 80
    assert len(data) == len(rows) == len(base.slot) and report["frames"] == len(rows)
    for i, (step, observation) in enumerate(rows):
        assert np.array_equal(data.state[i], observation.values["joint_position"].astype(np.float32))
        assert np.allclose(data.action[i], 0.001 * step.tick) and data.disturbed[i]
        assert np.array_equal(base.action[i], step.base_action) and base.slot[i] == step.slot
        for camera in CAMERAS:
            assert abs(float(data.frames[camera][i].mean()) - image_at(step.tick).mean()) < 1.5
    assert {text: row.argmax() for text, row in base.language.items()} == {f"task {i}": i for i in range(3)}
    assert data.instructions == ("task 0", "task 1", "task 2") and data.step_ns == STEP_NS
    told = json.loads((tmp_path / "data" / from_bag.REPORT_FILE).read_text())
    assert told["bags"][0]["intact"] and told["policy_id"] == POLICY_ID
    assert not list(tmp_path.glob("data.*")), "nothing is left beside it"
    with pytest.raises(ConfigError, match="exists already"):
        build([path], tmp_path / "data", "expert", parity=True)


def test_joints_that_two_drivers_publish_on_one_topic_are_two_streams(head, profile, tmp_path):
    entries = yaml.safe_load(profile.read_text())
    joints = entries["joint_states"]
    entries["more_joint_states"] = {"wrist_joints": {"topic": joints["topic"], "names": joints["names"][4:]}}
    entries["max_age_s"]["wrist_joints"] = entries["max_age_s"]["joint_states"]
    joints["names"] = joints["names"][:4]
    shared = tmp_path / "arm.yaml"
    shared.write_text(yaml.safe_dump(entries))
    _, seen = record(tmp_path / "bag", shared, head)
    assert seen[-1].values["joint_position"].shape == (4,) and seen[-1].values["wrist_joints"].shape == (3,)
    report = build([tmp_path / "bag"], tmp_path / "data", "expert", parity=True)
    assert report["bags"][0]["parity"] == {"compared": 100, "differing": []}
    assert not report["bags"][0]["refused"]


def test_a_stream_s_sample_is_taken_whatever_the_others_of_its_topic_make_of_the_message():
    def reader(names):
        return lambda message: (message.header.stamp.sec, joint_state_to_array(message, names))

    readers = {"arm": reader(("a", "b")), "hand": reader(("c", "d"))}

    def taken(names, values):
        found, refused = recorded_run._samples_of(array_to_joint_state(values, names, 10**9), readers)
        return {stream: value.tolist() for stream, _, value in found}, len(refused)

    assert taken("ab", [1, 2]) == ({"arm": [1, 2]}, 0)
    assert taken("abcd", [1, 2, 3, 4]) == ({"arm": [1, 2], "hand": [3, 4]}, 0)
    assert taken("abc", [1, 2, 3]) == ({"arm": [1, 2]}, 1)
    assert taken("abcd", [1, np.nan, 3, 4]) == ({"hand": [3, 4]}, 1)
    assert taken("x", [1]) == ({}, 2), "a message that nobody has a part in"


def test_a_person_alone_gives_demonstrations(head, profile, tmp_path, capsys):
    path, out = tmp_path / "bag", tmp_path / "data"
    steps, _ = record(path, profile, head, planner=False, person=range(100), skipped=(20,))
    report = build([path], out, "takeover", parity=True)
    assert report["policy_id"] == "" and report["bags"][0]["parity"] == {"compared": 99, "differing": []}
    assert "demonstrations for a base policy" in capsys.readouterr().out
    data = load_demonstrations(out)
    assert len(data) == len(steps) == 99
    assert np.array_equal(data.action, np.array([step.command for step in steps], np.float32))
    assert data.instructions == ("task 0", "task 1", "task 2")
    assert len(np.unique(data.group)) == 3 and len(np.unique(data.episode)) == 4, "one was cut by the missed tick"
    with pytest.raises(ConfigError, match="chunks"):
        load_base(out, data, "any-policy")


@pytest.mark.parametrize("wanted", from_bag.LABELS)
def test_labels(run, tmp_path, wanted):
    path, steps, _ = run
    recording, result, parts = converted(path, tmp_path, wanted)
    moving = [s for s in steps if s.state in (1, 2, 6)]
    people = {s.tick for s in moving if s.state == State.TAKEOVER}
    expected = {
        "executed": {s.tick for s in moving if s.tick < 40},
        "takeover": people,
        "expert": {s.tick for s in moving if s.tick < 80},
    }
    expected["auto"] = expected["expert"] | people
    assert people == set(range(50, 59)), "the last command counts for 0.2 s"
    assert sum(len(part.slots) for part in parts) == len(expected[wanted]) == sum(result.labels.values())
    executed = {s.tick: s.command for s in moving}
    frames = [row for part in parts for row in zip(part.frames["action"], part.frames["action.executed"], strict=True)]
    for tick, (action, command) in zip(sorted(expected[wanted]), frames, strict=True):
        assert np.array_equal(command, executed[tick])
        by_expert = wanted == "expert" or (wanted == "auto" and tick not in people)
        assert np.array_equal(action, np.full(7, 0.001 * tick, np.float32) if by_expert else command)
    assert [e.outcome for e in recording.episodes] == ["succeeded", "failed", "unfinished"]


def test_what_led_to_a_takeover_is_not_right_unless_it_is_asked_for(run, tmp_path, monkeypatch):
    path, steps, _ = run
    monkeypatch.setattr(Recording, "_on_expert", lambda self, message, names: None)
    recording = Recording(path, tmp_path)
    assert [e.taken_over for e in recording.episodes] == [False, True, False]
    recording.episodes[1].outcome = "succeeded"
    before = {s.tick for s in steps if s.state in (1, 2) and 40 <= s.tick < 50}
    for wanted, labelled in (("auto", set()), ("executed", before)):
        parts = []
        convert(recording, wanted, parts.append)
        assert before & {tick for part in parts for tick in part.ticks} == labelled


def test_parts_of_one_episode_belong_together(head, profile, tmp_path):
    record(tmp_path / "bag", profile, head, skipped=(10, 20, 30), ticks=75)
    build([tmp_path / "bag"] * 2, tmp_path / "data", "expert", parity=False)
    data = load_demonstrations(tmp_path / "data")
    runs = [sorted(set(data.group[(data.task == task)])) for task in range(3)]
    assert runs == [[0, 3], [1, 4], [2, 5]]
    assert len(np.unique(data.episode[data.group == 0])) == 4
    training, validation = data.split(0.3)
    assert not set(data.group[training]) & set(data.group[validation])


def test_other_episodes_beside_the_data_set_are_left_alone(run, tmp_path):
    path, _, _ = run
    kept = tmp_path / "data.parts" / "episode.npz"
    kept.parent.mkdir()
    kept.touch()
    assert from_bag.main([str(tmp_path / "none"), "--out", str(tmp_path / "data")]) == 2
    build([path], tmp_path / "data", "executed", parity=False)
    assert kept.exists() and {p.name for p in tmp_path.iterdir()} == {"data", "data.parts"}


def test_an_embedding_that_is_rounded_otherwise_is_that_of_the_package(run, tmp_path):
    recording = Recording(run[0], tmp_path)
    text = next(iter(recording.instructions.values()))
    value = from_bag.InstructionEncoder().embed(text)
    chunk = next(iter(recording.chunks.values()))
    for noise, expected in ((3e-7, {}), (0.1, {text})):
        rounded = dataclasses.replace(chunk, language=value + np.float32(noise))
        recording.chunks, recording.instructions = {chunk.t_obs_ns: rounded}, {chunk.t_obs_ns: text}
        assert set(from_bag.language_of([recording])) == set(expected)


def test_a_urdf_beside_the_profile_is_found_with_the_profile_of_this_machine(run, profile, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text(profile.read_text() + "\n")
    with pytest.raises(ConfigError, match="other.yaml is not the profile that the run recorded"):
        Recording(run[0], tmp_path, other)
    copy = tmp_path / "robot" / "arm.yaml"
    copy.parent.mkdir()
    copy.write_text(profile.read_text())
    assert Recording(run[0], tmp_path, copy).profile.text == profile.read_text()


def test_what_is_lost_is_said_and_nothing_is_filled_in(head, profile, tmp_path):
    lost = {("front/image", 30), ("control_step", 60), ("joint_states", 12)}
    steps, _ = record(
        tmp_path / "bag", profile, head, skipped=(33, 34), drop=lambda topic, n: (topic, n) in lost, ticks=75
    )
    recording, result, parts = converted(tmp_path / "bag", tmp_path, "expert")
    told = summary(recording, result, None)
    assert told["lacking_ticks"]["front"] == [[30, 30]] and told["lacking_ticks"]["joint_position"] == [[12, 12]]
    assert told["ticks"]["missed_by_the_loop"] == 2 and told["ticks"]["not_recorded"] == 1
    for part in parts:
        assert len(part.slots) == len(part.frames["action"]) and part.end_ns
    labels = [round(float(action[0]) * 1000) for part in parts for action in part.frames["action"]]
    ends = np.cumsum([len(part.slots) for part in parts])[:-1]
    assert all(b - a == 1 for i, (a, b) in enumerate(zip(labels, labels[1:], strict=False), 1) if i not in ends)
    assert not {12, 30, 33, 34, 60} & set(labels)
    assert compare(recording, recording.heads())["compared"] == len(steps) - 3


def test_without_the_topic_episode_one_ends_where_nothing_was_commanded_for_a_second(head, profile, tmp_path):
    skipped = (*range(5, 24), *range(30, 50))  # for 1 s, and for more
    options = dict(skipped=skipped, person=(), drop=lambda topic, n: topic == "episode", ticks=75)
    steps, _ = record(tmp_path / "bag", profile, head, **options)
    recording, result, parts = converted(tmp_path / "bag", tmp_path, "expert")
    ticks = [step.t_tick_ns for step in steps]
    assert [(e.start_ns, e.end_ns) for e in recording.episodes] == [
        (ticks[0], ticks[10] + 1),
        (ticks[11], ticks[-1] + 1),
    ]
    assert [(recording.episodes.index(part.key[0]), part.key[1], len(part.ticks)) for part in parts] == [
        (0, "task 0", 5),
        (0, "task 0", 6),
        (1, "task 1", 20),
        (1, "task 2", 5),
    ]
    assert [tick for part in parts for tick in part.ticks] == [step.tick for step in steps] and not result.lost


def test_nothing_is_used_of_what_came_after_a_restart_of_the_controller(head, profile, tmp_path):
    steps, _ = record(tmp_path / "bag", profile, head, restart=30)
    assert [step.tick for step in steps] == [*range(30), *range(70)]
    recording, result, parts = converted(tmp_path / "bag", tmp_path, "expert")
    told = summary(recording, result, None)
    assert told["ticks"]["after_a_restart_and_not_used"] == 70 and told["ticks"]["recorded"] == 30
    labels = [action for part in parts for action in part.frames["action"]]
    assert np.array_equal(labels, np.full((30, 7), 0.001 * np.arange(30)[:, None], np.float32))


def test_a_frame_has_no_image_that_a_person_drove_without(head, profile, tmp_path):
    options = dict(person=range(50, 70), stopped=lambda stream, n: stream == "front" and 53 <= n < 65, ticks=75)
    steps, seen = record(tmp_path / "bag", profile, head, **options)
    stale = [s.tick for s, o in zip(steps, seen, strict=True) if o.ages_ns(s.t_tick_ns)["front"] > 250_000_000]
    assert stale == list(range(57, 65)) and {steps[tick].state for tick in stale} == {State.TAKEOVER}
    recording, result, parts = converted(tmp_path / "bag", tmp_path, "takeover")
    assert result.lost["a fresh front"] == [[57, 64]] and recording.episodes[1].lacking["a fresh front"] == 8
    assert [part.ticks for part in parts] == [[*range(50, 57)], [*range(65, 70)], [*range(70, 73)]]


def test_a_part_has_one_instruction_that_of_its_chunks(head, profile, tmp_path):
    options = dict(person=(), drop=lambda topic, n: topic == "episode" and n > 0, ticks=75)
    record(tmp_path / "bag", profile, head, **options)
    recording, _, parts = converted(tmp_path / "bag", tmp_path, "expert")
    (episode,) = recording.episodes
    assert episode.instruction == "task 0"
    assert [part.key for part in parts] == [(episode, f"task {number}") for number in range(3)]
    assert [(part.ticks[0], part.ticks[-1]) for part in parts] == [(0, 39), (40, 69), (70, 74)]


def test_a_cut_bag_gives_its_beginning(run, tmp_path):
    path, _, _ = run
    cut = tmp_path / "cut.mcap"
    data = next(path.glob("*.mcap")).read_bytes()
    cut.write_bytes(data[: len(data) // 2])
    recording, result, parts = converted(cut, tmp_path)
    assert 10 < len(recording.steps) < 100 and parts
    told = summary(recording, result, None)
    assert not told["intact"] and told["problems"]
    assert recording.episodes[-1].outcome == "unfinished"


def test_another_head_is_noticed_and_a_missing_one_named(run, head, tmp_path, capsys):
    path, _, _ = run
    recording = Recording(path, tmp_path)
    heads = recording.heads()
    recording.steps = recording.steps[:30]
    config = heads[1][0]
    changed = {revision: (c, None) for revision, (c, _) in heads.items()}
    assert compare(recording, heads) == {"compared": 30, "differing": []}
    assert compare(recording, changed)["differing"]
    recording.configurations[1] = (config, "nowhere.onnx", "0" * 64)
    with pytest.raises(ConfigError, match="nowhere.onnx.*--no-parity"):
        recording.heads()


@pytest.mark.parametrize("differs", ["robot", "policy_id", "cameras", "units"])
def test_bags_that_do_not_go_together_are_refused(run, head, profile, tmp_path, differs):
    path, _, _ = run
    changes = {"policy_id": "other-1"} if differs == "policy_id" else {}
    other = profile
    if differs != "policy_id":
        other = write_profile(tmp_path / "other.yaml", name="other_arm" if differs == "robot" else "bench_arm")
    if differs == "units":
        other.write_text(other.read_text().replace("command: {", f"command: {{scale: {[0.5] * 7}, "))
    if differs == "cameras":
        other.write_text(other.read_text().replace(f"width: {SIZE}", f"width: {SIZE}, resize: [32, 32]"))
    recordings = [Recording(path, tmp_path)]
    if differs == "policy_id":
        record(tmp_path / "bag", other, head, ticks=12, **changes)
        recordings.append(Recording(tmp_path / "bag", tmp_path))
    else:
        recordings.append(Recording(path, tmp_path))
        recordings[1].profile = recorded_run.load_profile(str(other))
    with pytest.raises(ConfigError, match=f"{differs}: "):
        check_same(recordings)


def test_other_message_definitions_are_refused(run, tmp_path, monkeypatch):
    path, _, _ = run
    types = recorded_run.read_types(path)
    old = types["a2c2_ros/msg/ControlStep"].replace("uint32 configuration", "uint32 other")
    monkeypatch.setattr(recorded_run, "read_types", lambda path: types | {"a2c2_ros/msg/ControlStep": old})
    with pytest.raises(ConfigError, match="ControlStep was recorded with another definition"):
        Recording(path, tmp_path)


def test_nothing_is_left_of_a_conversion_that_failed(run, tmp_path, monkeypatch, capsys):
    path, _, _ = run
    monkeypatch.setattr(Recording, "_on_expert", lambda self, message, names: None)
    assert from_bag.main([str(path), "--out", str(tmp_path / "data"), "--label", "expert", "--no-parity"]) == 2
    assert "no frame" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.timeout(280)
def test_a_run_of_the_real_nodes_is_computed_again_bit_for_bit(tmp_path):
    """LIBERO, planner, controller and recorder over DDS; parameters change and another head is swapped in."""
    pytest.importorskip("libero")
    from a2c2_ros.msg import ControlStep
    from rclpy.parameter import Parameter
    from rclpy.parameter_client import AsyncParameterClient
    from ros_system import Peer, System

    from a2c2_ros.heads.base import load_head
    from a2c2_ros.nodes.runtime import reliable_qos
    from a2c2_ros.paths import model_path

    other = load_head(model_path("compact_libero_spatial/head.safetensors"))
    other.output[-1].bias.data += 0.05
    save_graph(to_onnx(other), manifest_of(other), tmp_path / "other.onnx")
    system = System(tmp_path)
    peer = Peer(system)
    steps: list[ControlStep] = []
    peer.node.create_subscription(ControlStep, "control_step", steps.append, reliable_qos(1000))
    client = AsyncParameterClient(peer.node, "correction_controller")
    mode = dict(lockstep=True, use_sim_time=True)
    try:
        system.start("episode_recorder", out=tmp_path, use_sim_time=True)
        system.start("chunk_planner", execution_horizon=12, inference_delay=5, inference_delay_jitter=3, **mode)
        system.start("correction_controller", **mode)
        unusual = dict(disturbance=1.0, motion="drift", suite="libero_spatial_swap", takeover_after_steps=30)
        system.start("libero_sim", task=2, episodes=0, initial_state=-2, expert=True, **unusual)
        peer.spin_until(lambda: len(steps) > 5 and client.services_are_ready(), "the first steps", timeout_s=200)
        changes = {"residual_limit": 3.5, "correction.model_path": str(tmp_path / "other.onnx")}
        for revision, (name, value) in enumerate(changes.items(), 2):
            client.set_parameters([Parameter(name, value=value)])
            peer.spin_until(lambda n=revision: sum(s.configuration == n for s in steps) > 5, f"{name} in use")
        peer.spin_until(lambda: sum(s.state == State.TAKEOVER for s in steps) > 10, "the expert's takeover")
        assert set(system.close().values()) == {0}
    finally:
        system.close()
        peer.close()
    recording, result, parts = converted(tmp_path / "bag", tmp_path, "expert")
    assert len(recording.steps) > 15 and {s.configuration for s in recording.steps} == {1, 2, 3}
    compared = compare(recording, recording.heads())
    assert compared["differing"] == [] and compared["compared"] > 0.5 * len(recording.steps)
    frames = sum(len(part.slots) for part in parts)
    assert frames > 0.5 * len(recording.steps) and not recording.refused, result.lost
    labels = np.concatenate([part.frames["action"] for part in parts])
    executed = np.concatenate([part.frames["action.executed"] for part in parts])
    state = {step.tick: step.state for step in recording.steps}
    person = np.array([state[tick] == State.TAKEOVER for part in parts for tick in part.ticks])
    assert not person[:20].any() and person.any()
    error = np.abs(labels - executed)[:, :6].max(axis=1)
    assert error[~person].max() > 0.1 and np.median(error[person]) < 0.05
