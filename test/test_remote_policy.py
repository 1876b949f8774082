"""The remote policy against servers that speak openpi's protocol: one written here from the protocol, and ours."""

import contextlib
import fcntl
import heapq
import os
import random
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest

msgpack = pytest.importorskip("msgpack")
pytest.importorskip("websockets")

from websockets.sync.client import connect
from websockets.sync.server import serve

from a2c2_ros.core.errors import ConfigError, ObservationError, PolicyError
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.faults.namespaces import inside, ip
from a2c2_ros.policies.base import Continuation, PolicyOptions
from a2c2_ros.policies.registry import load_policy
from a2c2_ros.policies.remote import RemotePolicy, absolute_rotation, pack, unpack

H, A, SIZE = 10, 7, 32
INSTRUCTION = "put the bowl on the plate"
ACTION_NAMES = ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]
LIBERO = {"image_size": SIZE, "state_dim": 8, "action_names": ACTION_NAMES}
LATENT = {"latent": "z", "language": "l"}
PICKLE = b"cposix\nsystem\n(S'true'\ntR."  # what runs a command where it is unpickled
NOMINAL = (1.0, 0.0, 0.0, 0.0)


def to_wire(value):
    """As openpi's client and server put arrays into msgpack."""

    def array(item):
        return {b"__ndarray__": True, b"data": item.tobytes(), b"dtype": item.dtype.str, b"shape": item.shape}

    return msgpack.packb(value, default=array)


def from_wire(message):
    def array(item):
        if b"__ndarray__" not in item:
            return item
        return np.frombuffer(item[b"data"], item[b"dtype"]).reshape(item[b"shape"])

    return msgpack.unpackb(message, object_hook=array)


def chunk_for(request, shape=(H, A)):
    """A chunk that tells which request it answers."""
    return np.full(shape, float(request["observation/state"][0]))


def answer(request):
    return to_wire({"actions": chunk_for(request), "state": np.zeros(8), "server_timing": {"infer_ms": 0.0}})


def observation(number=0.0):
    rng = np.random.default_rng(0)
    images = {name: rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for name in ("agentview", "wrist")}
    return images | {"state": np.array([number, 0, 1, 0.01, 0.05, -0.05, 0.04, -0.04], np.float32)}


class OpenpiServer:
    """``answers`` are functions from a request to what is sent: bytes, text, a list of them, or None for nothing.

    They are used up one by one; then every request is answered with :func:`answer`.
    """

    def __init__(self, metadata=None, port=0):
        self.requests, self.headers, self.connections, self.answers = [], [], [], []
        self._metadata = to_wire({} if metadata is None else metadata)
        self._port = port

    def __enter__(self):
        self._server = serve(self._handle, "127.0.0.1", self._port, compression=None, max_size=None)
        self.port = self._server.socket.getsockname()[1]
        self.url = f"ws://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._thread.join()
        for connection in self.connections:
            connection.close_socket()

    def _handle(self, connection):
        self.connections.append(connection)
        self.headers.append(connection.request.headers)
        connection.send(self._metadata)
        for message in connection:
            request = from_wire(message)
            self.requests.append(request)
            replies = (self.answers.pop(0) if self.answers else answer)(request)
            for reply in replies if isinstance(replies, list) else [replies]:
                if reply is not None:
                    connection.send(reply)


@pytest.fixture
def server():
    with OpenpiServer() as server:
        yield server


class Clock:
    """Goes on by what is slept."""

    def __init__(self):
        self.slept_s = []

    def now_s(self):
        return sum(self.slept_s)

    def sleep(self, duration_s):
        self.slept_s.append(duration_s)


def remote(server, *clock, **mapping):
    url = server if isinstance(server, str) else server.url
    return RemotePolicy(url, PolicyOptions(mapping=LIBERO | mapping), *clock)


def predict(policy, number=0.0):
    return policy.predict(observation(number), INSTRUCTION, seed=3)


# The messages


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float16", "float32", ">f8"])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 4)])
def test_arrays_travel_both_ways(dtype, shape):
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    ours = unpack(pack({"a": array}))["a"]
    assert ours.dtype == array.dtype.newbyteorder("=") and ours.flags.writeable
    np.testing.assert_array_equal(ours, array)
    np.testing.assert_array_equal(from_wire(pack(array)), array)
    np.testing.assert_array_equal(unpack(to_wire(array)), array)


def test_plain_values_views_and_scalars_travel():
    array = np.arange(12).reshape(3, 4)[:, ::-2]
    value = {"text": "è", "numbers": [1, 2.5, True, None], "bytes": b"\0", "map": {"a": array}, "n": np.float32(1.5)}
    back = unpack(pack(value))
    np.testing.assert_array_equal(back["map"].pop("a"), array)
    assert back == value | {"map": {}} and isinstance(back["n"], np.float32)


@pytest.mark.parametrize("value", [np.array([object()]), np.zeros(2, "c8"), np.array(["a"]), object(), {1, 2}, 1 << 70])
def test_only_numbers_are_sent(value):
    with pytest.raises(PolicyError, match="encoded"):
        pack({"a": value})


def wire_array(**changes):
    good = {b"__ndarray__": True, b"data": bytes(24), b"dtype": "<f4", b"shape": [2, 3]}
    return msgpack.packb(good | {key.encode(): value for key, value in changes.items()})


@pytest.mark.parametrize(
    "message",
    [
        wire_array(data=bytes(23)),  # truncated
        wire_array(data=bytes(28)),
        wire_array(data="text"),
        wire_array(data=None),
        wire_array(dtype="|O"),
        wire_array(dtype="O", data=PICKLE),
        wire_array(dtype="<f4,<f4"),
        wire_array(dtype="(6,)<f4"),
        wire_array(dtype="<U6"),
        wire_array(dtype="<M8[s]"),
        wire_array(dtype="<c8"),
        wire_array(dtype=b"<f4"),
        wire_array(dtype=["<f4"]),
        wire_array(shape=[2**40, 2**40]),
        wire_array(shape=[0, 2**63], data=b""),
        wire_array(shape=[-2, -3]),
        wire_array(shape=[True, 6]),
        wire_array(shape=[1.0, 6]),
        wire_array(shape=[1] * 40 + [6]),
        wire_array(shape=6),
        wire_array(shape=None),
        msgpack.packb({b"__npgeneric__": True, b"data": "1", b"dtype": "<f4"}),
        msgpack.packb({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}),
        msgpack.packb({b"__npgeneric__": True, b"data": 1, b"dtype": "O"}),
        msgpack.packb(msgpack.ExtType(42, b"code")),
        msgpack.packb({1: 2}),
        msgpack.packb([0] * 5000),
        b"\xdd\xff\xff\xff\xff",  # a list of 2^32 - 1
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000,  # lists in lists
        b"\xa1\xff",  # no UTF-8
        b"\xc1",
        b"",
        to_wire({"a": 1}) + b"\0",
        to_wire({"a": np.zeros(9)})[:-5],
        PICKLE,
        os.urandom(64) + b"\xc1",
        "text",
    ],
    ids=lambda message: repr(message[:24]),
)
def test_bad_messages_are_refused(message):
    with pytest.raises(PolicyError):
        unpack(message)


# What openpi's LIBERO server gets and gives


def test_libero_defaults_of_openpi(server):
    policy = remote(server)
    assert (policy.horizon, policy.action_names, policy.state_dim) == (H, tuple(ACTION_NAMES), 8)
    assert (policy.cameras, policy.image_size) == (("agentview", "wrist"), SIZE)
    output = predict(policy, 0.25)
    np.testing.assert_array_equal(output.actions, np.full((H, A), 0.25, np.float32))
    assert output.actions.dtype == np.float32
    assert (output.latent.shape, policy.latent_dim) == ((0,), 0)
    np.testing.assert_array_equal(output.language, policy.embed(INSTRUCTION))
    assert policy.language_dim == 384 and np.linalg.norm(output.language) == pytest.approx(1.0)

    warm_up, request = server.requests
    assert sorted(request) == ["observation/image", "observation/state", "observation/wrist_image", "prompt"]
    assert request["prompt"] == INSTRUCTION
    seen = observation(0.25)
    for name, key in (("agentview", "observation/image"), ("wrist", "observation/wrist_image")):
        assert request[key].dtype == np.uint8
        np.testing.assert_array_equal(request[key], seen[name][:, ::-1])
    np.testing.assert_array_equal(request["observation/state"], absolute_rotation(seen["state"], NOMINAL))
    assert not warm_up["observation/image"].any()


def test_sizes_and_names_of_the_robot_are_taken(server):
    profile = load_profile("libero")
    policy = RemotePolicy(server.url, PolicyOptions(robot=profile.robot, camera_shapes=profile.camera_shapes()))
    assert (policy.image_size, policy.state_dim, policy.action_names) == (128, 8, profile.robot.action_names)


def test_rotation_as_libero_gives_it():
    """Numbers of the simulator at a start; the formula is robosuite's quat2axisangle."""
    ours = np.array([0.1, 0.2, 0.3, 0.01121415, 0.04515357, -0.05348291, 0.04, -0.04], np.float32)
    state = absolute_rotation(ours, NOMINAL)
    np.testing.assert_allclose(state[3:6], [3.15087387, -0.08429426, -0.0711664], atol=2e-6)
    np.testing.assert_array_equal(np.delete(state, [3, 4, 5]), np.delete(ours, [3, 4, 5]))


def test_rotation_is_that_of_the_quaternion():
    from scipy.spatial.transform import Rotation

    rng = np.random.default_rng(1)
    for nominal in (np.array(NOMINAL), np.array([0.5, -0.5, 1.0, 0.2]), np.array([0.0, 0.0, 0.0, 1.0])):
        for relative in [np.zeros(3), *rng.uniform(-1.5, 1.5, (20, 3))]:
            state = np.concatenate([np.zeros(3), relative, np.zeros(2)]).astype(np.float32)
            absolute = absolute_rotation(state, nominal)[3:6]
            expected = Rotation.from_rotvec(relative) * Rotation.from_quat(nominal)
            difference = Rotation.from_rotvec(absolute) * expected.inv()
            assert difference.magnitude() < 1e-5
            assert np.linalg.norm(absolute) <= 2 * np.pi + 1e-5


def test_keys_are_configurable(server):
    server.answers = [
        lambda request: to_wire({"a": np.zeros((4, 2), "f4"), "z": np.arange(3.0), "l": np.ones(5)}) for _ in range(3)
    ]
    policy = remote(
        server,
        cameras={"wrist": "w"},
        state="s",
        instruction="i",
        seed="n",
        actions="a",
        **LATENT,
        action_names=["x", "y"],
        state_representation="robot",
        mirror_images=False,
    )
    assert (policy.horizon, policy.latent_dim, policy.language_dim) == (4, 3, 5)
    output = predict(policy)
    np.testing.assert_array_equal(output.latent, np.arange(3, dtype=np.float32))
    np.testing.assert_array_equal(output.language, policy.embed(INSTRUCTION))
    request = server.requests[-1]
    assert sorted(request) == ["i", "n", "s", "w"] and request["n"] == 3
    np.testing.assert_array_equal(request["w"], observation()["wrist"])
    np.testing.assert_array_equal(request["s"], observation()["state"])
    asked = len(server.requests)
    policy.embed("another")
    policy.embed("another")
    assert [r["i"] for r in server.requests[asked:]] == ["another"]


def test_the_time_is_split(server):
    policy = remote(server)
    for timing in ({"infer_ms": 1e9}, {"infer_ms": -1.0}, {"infer_ms": float("nan")}, {"infer_ms": "1"}, {}, 5, None):
        server.answers = [lambda request, t=timing: to_wire({"actions": chunk_for(request), "server_timing": t})]
        expected = round(1e15) if timing == {"infer_ms": 1e9} else None
        assert predict(policy).inference_ns == expected
    assert predict(policy).inference_ns == 0


def test_the_policy_id_names_what_decides_the_chunk():
    ids = {}
    for name, metadata, mapping in (
        ("plain", {}, {}),
        ("again", {}, {}),
        ("patient", {}, {"timeout_s": 9.0, "max_message_mb": 1.0}),
        ("named", {}, {"name": "pi05"}),
        ("metadata", {"reset_pose": [0, 1.5]}, {}),
        ("mapping", {}, {"mirror_images": False}),
    ):
        with OpenpiServer(metadata) as server:
            ids[name] = remote(server, **mapping).policy_id
    assert ids["plain"] == ids["again"] == ids["patient"]
    assert ids["plain"].startswith("remote-") and ids["named"].startswith("pi05-")
    assert len(set(ids.values())) == 4


def test_on_a_real_robot_nothing_is_guessed_about_the_data(server):
    arm = load_profile("panda_servo").robot
    settings = LIBERO | {"cameras": {"front": "observation/image"}}

    def options(robot=arm, **mapping):
        return PolicyOptions(robot=robot, mapping=settings | mapping)

    for told in ({}, {"mirror_images": False}):
        with pytest.raises(ConfigError, match="state_representation.*panda_servo is no simulator.*policy_config"):
            RemotePolicy(server.url, options(**told))
    told = {"mirror_images": False, "state_representation": "axis_angle"}
    RemotePolicy(server.url, options(**told))
    with pytest.raises(ConfigError, match="axis_angle, but the state of panda is.*without a rotation"):
        RemotePolicy(server.url, options(load_profile("panda").robot, **told))
    with pytest.raises(ConfigError, match=r"nominal_orientation_xyzw is \(0.*allowed is that of panda_servo"):
        RemotePolicy(server.url, options(nominal_orientation_xyzw=[0.0, 0.0, 0.0, 1.0], **told))


def test_the_rotation_is_that_to_the_nominal_orientation_of_the_robot(server):
    sent = {}
    for name in ("panda_servo", "so101_servo"):
        mapping = LIBERO | {"mirror_images": False, "state_representation": "axis_angle"}
        policy = RemotePolicy(server.url, PolicyOptions(robot=load_profile(name).robot, mapping=mapping))
        predict(policy)
        sent[name] = server.requests[-1]["observation/state"][3:6]
    expected = absolute_rotation(observation()["state"], np.array([0.0, 1.0, 0.0, 0.0]))[3:6]
    np.testing.assert_allclose(sent["so101_servo"], expected)
    assert not np.allclose(sent["so101_servo"], sent["panda_servo"])


def test_a_chunk_cannot_go_on_from_another(server):
    policy = remote(server)
    assert policy.largest_delay("rtc") is None
    with pytest.raises(PolicyError, match="rtc"):
        policy.predict(
            observation(), INSTRUCTION, seed=0, continuation=Continuation(np.zeros((2, A), np.float32), 1, "rtc")
        )
    with pytest.raises(ObservationError, match="wrist"):
        policy.predict(observation() | {"wrist": np.zeros((4, 4, 3), np.uint8)}, INSTRUCTION, seed=0)


# What goes wrong


def refused(server, policy, reply, match):
    """One bad answer is an error that names the server; the next call works."""
    server.answers = [reply]
    with pytest.raises(PolicyError, match=match) as caught:
        predict(policy, 0.5)
    assert server.url in str(caught.value)
    np.testing.assert_array_equal(predict(policy, 0.75).actions[0, 0], np.float32(0.75))


@pytest.mark.parametrize(
    ("reply", "match"),
    [
        ({"actions": np.zeros((H - 1, A))}, "shape"),
        ({"actions": np.zeros((H, A + 1))}, "shape"),
        ({"actions": np.zeros((1, H, A))}, "shape"),
        ({"actions": np.zeros((H, A)).tolist()}, "float array"),
        ({"actions": np.zeros((H, A), "i4")}, "float array"),
        ({"actions": np.full((H, A), np.nan)}, "finite"),
        ({"actions": np.full((H, A), 1e300)}, "finite"),
        ({}, "actions"),
        ({"actions": np.zeros((H, A)), "z": np.zeros(3)}, "shape"),
        ({"actions": np.zeros((H, A)), "z": np.full(2, np.inf)}, "finite"),
        ({"actions": np.zeros((H, A)), "z": None}, "float array"),
        ([1, 2], "map"),
    ],
)
def test_wrong_chunks_are_refused(reply, match):
    with OpenpiServer() as server:
        good = {"z": np.zeros(2), "l": np.zeros(4)}
        whole = lambda request: to_wire({"actions": chunk_for(request)} | good)
        server.answers = [whole]
        policy = remote(server, **LATENT)
        reply = good | reply if isinstance(reply, dict) else reply
        server.answers = [lambda request: to_wire(reply), whole]
        with pytest.raises(PolicyError, match=match) as caught:
            predict(policy, 0.5)
        assert server.url in str(caught.value)
        assert predict(policy, 0.75).actions[0, 0] == np.float32(0.75)


def test_garbage_is_refused(server):
    policy = remote(server)
    refused(server, policy, lambda request: b"\xc1 garbage", "no message of the protocol")
    refused(server, policy, lambda request: answer(request)[:-3], "no message of the protocol")
    refused(server, policy, lambda request: wire_array(dtype="O"), "dtype")


def test_the_error_of_the_server_is_told_in_short(server):
    policy = remote(server)
    trace = "Traceback (most recent call last):\n  File x\nValueError: " + "no such key " * 1000
    server.answers = [lambda request: trace]
    with pytest.raises(PolicyError, match="ValueError: no such key") as caught:
        predict(policy)
    assert len(str(caught.value)) < 600 and "Traceback" not in str(caught.value)
    assert predict(policy, 0.5).actions[0, 0] == 0.5
    assert len(server.connections) == 2


def test_a_late_answer_is_not_taken_for_a_newer_one(server):
    policy = remote(server, timeout_s=0.3)
    ended, release = threading.Event(), threading.Event()

    def late(request):
        release.wait(60.0)
        ended.set()
        return answer(request)

    server.answers = [late]
    with pytest.raises(PolicyError, match=f"{server.url}: no answer within 0.3 s"):
        predict(policy, 0.5)
    release.set()
    assert ended.wait(60.0)
    patient = remote(server)
    assert predict(patient, 0.75).actions[0, 0] == 0.75
    policy._settings = patient._settings  # the machine may be slow now; only the late answer was to time out
    assert predict(policy, 0.25).actions[0, 0] == 0.25


def test_what_nobody_asked_for_is_not_taken_for_an_answer(server):
    policy = remote(server)
    server.connections[-1].send(answer({"observation/state": np.zeros(8)}))
    assert policy._connection.ping().wait(60.0)  # the answer came before the pong
    with pytest.raises(PolicyError, match="not asked for"):
        predict(policy, 0.75)
    assert predict(policy, 0.75).actions[0, 0] == 0.75


def test_a_lost_connection_is_made_anew(server):
    policy = remote(server)
    server.connections[-1].close_socket()
    assert predict(policy, 0.5).actions[0, 0] == 0.5

    def break_off(request):
        server.connections[-1].close_socket()

    server.answers = [break_off]
    assert predict(policy, 0.75).actions[0, 0] == 0.75
    server.answers = [break_off, break_off]
    with pytest.raises(PolicyError, match=f"{server.url}: the connection was lost"):
        predict(policy)
    assert predict(policy, 0.25).actions[0, 0] == 0.25


def test_a_server_that_starts_again():
    clock = Clock()
    with OpenpiServer() as server:
        policy = remote(server, clock.now_s, clock.sleep, timeout_s=9.0)
    with pytest.raises(PolicyError, match=f"{server.url}: no connection: ConnectionRefused"):
        predict(policy)
    assert clock.slept_s == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    with OpenpiServer(port=server.port):
        assert predict(policy, 0.5).actions[0, 0] == 0.5
    with OpenpiServer({"another": 1}, port=server.port), pytest.raises(PolicyError, match="other metadata"):
        predict(policy)
    with OpenpiServer(port=server.port):
        assert predict(policy, 0.75).actions[0, 0] == 0.75


def test_too_large_messages_are_refused(server):
    policy = remote(server, max_message_mb=0.1)
    server.answers = [lambda request: to_wire({"actions": chunk_for(request, (H, A)), "x": bytes(200_000)})]
    with pytest.raises(PolicyError, match="too big"):
        predict(policy)
    assert len(server.requests) == 2  # not asked again
    assert predict(policy, 0.5).actions[0, 0] == 0.5
    with pytest.raises(PolicyError, match="max_message_mb"):
        remote(server, max_message_mb=0.005)
    clock = Clock()
    with OpenpiServer({"x": bytes(200_000)}) as talkative, pytest.raises(PolicyError, match="too big"):
        remote(talkative, clock.now_s, clock.sleep, max_message_mb=0.1)


def test_a_server_that_is_none(server):
    with pytest.raises(PolicyError, match="no connection"):
        remote("ws://127.0.0.1:1", connect_timeout_s=0.05)
    for reply in (b"\xc1", to_wire([1])):
        server._metadata = reply
        with pytest.raises(PolicyError, match=server.url):
            remote(server)
    server._metadata = "Traceback\nNoGpu: nothing"
    with pytest.raises(PolicyError, match="NoGpu"):
        remote(server)
    release = threading.Event()
    silent = serve(lambda connection: release.wait(60.0), "127.0.0.1", 0)
    thread = threading.Thread(target=silent.serve_forever)
    thread.start()
    try:
        with pytest.raises(PolicyError, match="no connection: TimeoutError"):
            remote(f"ws://127.0.0.1:{silent.socket.getsockname()[1]}", connect_timeout_s=0.2)
    finally:
        release.set()
        silent.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("mapping", "match"),
    [
        ({"timeouts": 1}, "timeouts"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"timeout_s": "1"}, "timeout_s"),
        ({"max_message_mb": float("inf")}, "max_message_mb"),
        ({"cameras": ["agentview"]}, "cameras"),
        ({"cameras": {"agentview": 1}}, "cameras"),
        ({"state": "prompt"}, "different"),
        ({"horizon": 0}, "horizon"),
        ({"latent": ""}, "latent"),
        ({"state_representation": "quaternion"}, "state_representation"),
        ({"nominal_orientation_xyzw": [0, 0, 0, 0]}, "nominal_orientation"),
        ({"mirror_images": 1}, "mirror_images"),
        ({"api_key_env": "A2C2_NO_SUCH_KEY"}, "A2C2_NO_SUCH_KEY"),
        ({"state_dim": 4}, "state_dim|numbers of state"),
    ],
)
def test_wrong_settings_are_refused(server, mapping, match):
    with pytest.raises(ConfigError, match=match):
        remote(server, **mapping)


@pytest.mark.parametrize(
    "url", ["http://localhost:8000", "localhost:8000", "ws://", "ws://a:b", "ws://[::1", "models/x"]
)
def test_wrong_addresses_are_refused(url):
    with pytest.raises(ConfigError, match="ws://host:port"):
        remote(url)


def test_sizes_that_nobody_tells(server):
    for missing, match in (("image_size", "image_size"), ("state_dim", "state_dim"), ("action_names", "action_names")):
        mapping = {key: value for key, value in LIBERO.items() if key != missing}
        with pytest.raises(ConfigError, match=match):
            RemotePolicy(server.url, PolicyOptions(mapping=mapping))


def test_the_key_is_sent(server, monkeypatch):
    monkeypatch.setenv("A2C2_TEST_KEY", "secret")
    remote(server, api_key_env="A2C2_TEST_KEY")
    remote(server)
    assert [headers.get("Authorization") for headers in server.headers] == ["Api-Key secret", None]


# Our server with the shipped policy


class Served:
    """The command as a process in the network namespace of this thread."""

    def __init__(self, *arguments, path="flow_libero_spatial", **environment):
        command = [sys.executable, "-m", "a2c2_ros.policies.server", "--policy-path", path, "--port", "0"]
        self.process = subprocess.Popen(
            [*command, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )
        self.line = self.process.stdout.readline()
        self.url = self.line.split()[-1] if self.line else ""

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        try:
            rest = self.process.communicate(timeout=60.0)[0]
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, rest


@pytest.fixture(scope="module")
def served():
    pytest.importorskip("torch")
    served = Served("--threads", "1", "--max-message-mb", "1")
    yield served
    code, rest = served.stop()
    assert code == 0 and "stopped" in rest


def libero_observation(seed=0):
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 256, (128, 128, 3), dtype=np.uint8) for name in ("agentview", "wrist")}
    return images | {"state": rng.standard_normal(8).astype(np.float32)}


def test_our_server_gives_the_same_chunks(served):
    local = load_policy("flow", "flow_libero_spatial", PolicyOptions(threads=1))
    policy = load_policy("remote", served.url)
    for name in ("policy_id", "horizon", "state_dim", "latent_dim", "language_dim", "image_size"):
        assert getattr(policy, name) == getattr(local, name), name
    assert tuple(policy.action_names) == tuple(local.action_names) and policy.cameras == tuple(local.cameras)
    assert local.policy_id in served.line and "127.0.0.1" in served.line
    for seed in range(3):
        ours = policy.predict(libero_observation(seed), INSTRUCTION, seed=seed)
        theirs = local.predict(libero_observation(seed), INSTRUCTION, seed=seed)
        for name in ("actions", "latent", "language"):
            np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-5)
    assert ours.inference_ns > 0 and theirs.inference_ns is None
    np.testing.assert_array_equal(policy.embed("new words"), local.embed("new words"))
    assert dict(policy.trained_for) == local.trained_for
    for mode in ("rtc", "tt_rtc"):
        assert policy.largest_delay(mode) == local.largest_delay(mode) > 0
        known = np.full((20, 7), 0.3, np.float32)
        options = {"seed": 4, "continuation": Continuation(known, 5, mode)}
        ours, theirs = (p.predict(libero_observation(), INSTRUCTION, **options).actions for p in (policy, local))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
        assert not np.allclose(ours, policy.predict(libero_observation(), INSTRUCTION, seed=4).actions, atol=1e-3)
    changed = load_policy("remote", served.url, PolicyOptions(mapping={"mirror_images": True}))
    assert changed.policy_id.startswith(f"{local.policy_id}-")


def test_a_policy_that_sees_nothing_is_served_too():
    pytest.importorskip("torch")
    served = Served("--threads", "1", "--robot", "panda_servo", path="reach/flow_reach")
    try:
        local = load_policy("flow", "reach/flow_reach", PolicyOptions(threads=1))
        policy = load_policy("remote", served.url)
        assert policy.cameras == local.cameras == () and policy.policy_id == local.policy_id
        observation = {"state": np.full(local.state_dim, 0.1, np.float32)}
        ours, theirs = (p.predict(observation, INSTRUCTION, seed=1).actions for p in (policy, local))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
    finally:
        served.stop()


def test_our_server_speaks_the_protocol(served):
    """With the test's own words for it."""
    request = {f"observation/{name}": value for name, value in libero_observation().items()} | {"prompt": "x"}
    with connect(served.url, compression=None) as connection:
        told = from_wire(connection.recv())
        assert told["horizon"] == 50 and told["latent_dim"] == 256
        for number in range(2):
            connection.send(to_wire(request))
            reply = from_wire(connection.recv())
            assert reply["actions"].shape == (50, 7) and reply["latent"].shape == (256,)
            assert reply["server_timing"]["infer_ms"] > 0
            assert ("prev_total_ms" in reply["server_timing"]) == (number > 0)
    health = served.url.replace("ws://", "http://") + "/healthz"
    with urllib.request.urlopen(health, timeout=60.0) as response:
        assert (response.status, response.read()) == (200, b"OK\n")


def going_on(**changes):
    return {"actions": np.zeros((5, 7), "f4"), "delay_steps": 2, "mode": "rtc"} | changes


def test_our_server_outlives_bad_clients(served):
    good = {f"observation/{name}": value for name, value in libero_observation().items()} | {"prompt": "x"}
    policy = load_policy("remote", served.url)
    for bad, match in (
        (b"\xc1", "no message of the protocol"),
        ("text", "text"),
        (to_wire([1]), "allowed is a map"),
        (wire_array(dtype="O"), "dtype"),
        (to_wire({k: v for k, v in good.items() if k != "observation/wrist"}), "observation/wrist"),
        (to_wire(good | {"observation/state": np.zeros(3, "f4")}), "allowed is float32 (8,)"),
        (to_wire(good | {"observation/state": np.full(8, np.nan)}), "not finite"),
        (to_wire(good | {"observation/agentview": np.zeros((64, 64, 3), "u1")}), "agentview"),
        (to_wire(good | {"prompt": 5}), "prompt"),
        (to_wire(good | {"seed": -1}), "seed"),
        (to_wire(good | {"prompt": "x" * 5000}), "5000 characters, allowed are 4096"),
        (to_wire(good | {"continuation": 5}), "continuation"),
        (to_wire(good | {"continuation": going_on(actions=np.zeros((51, 7)))}), "(51, 7), allowed are up to 50"),
        (to_wire(good | {"continuation": going_on(actions=np.full((5, 7), np.nan))}), "not finite"),
        (to_wire(good | {"continuation": going_on(mode="magic")}), "magic"),
        (to_wire(good | {"continuation": going_on(delay_steps=6)}), "allowed is 0 to the 5"),
    ):
        with connect(served.url, compression=None) as connection:
            connection.recv()
            connection.send(bad)
            text = connection.recv()
            assert isinstance(text, str) and match in text
    with connect(served.url, compression=None) as connection:
        connection.recv()
        connection.send(bytes(2_000_000))
        with pytest.raises(Exception, match="1009|too big"):
            connection.recv()
    with connect(served.url, compression=None) as leaving:
        leaving.recv()
        leaving.send(to_wire(good))
        leaving.close_socket()  # without a word, its inference under way
    assert policy.predict(libero_observation(), INSTRUCTION, seed=0).actions.shape == (50, 7)


def test_clients_take_turns(served):
    chunks, errors = {}, []

    def ask(number):
        try:
            policy = load_policy("remote", served.url, PolicyOptions(mapping={"timeout_s": 60.0}))
            chunks[number] = [policy.predict(libero_observation(number), INSTRUCTION, seed=0).actions for _ in range(3)]
        except PolicyError as error:
            errors.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    policy = load_policy("remote", served.url)
    for number, found in chunks.items():
        expected = policy.predict(libero_observation(number), INSTRUCTION, seed=0).actions
        for chunk in found:
            np.testing.assert_array_equal(chunk, expected)


def test_our_server_wants_the_key(monkeypatch):
    pytest.importorskip("torch")
    clock = Clock()
    served = Served("--threads", "1", "--api-key-env", "A2C2_TEST_KEY", A2C2_TEST_KEY="secret")
    try:
        with pytest.raises(PolicyError, match="401"):
            load_policy("remote", served.url)
        for key, accepted in (("wrong", False), ("secret", True)):
            monkeypatch.setenv("A2C2_TEST_KEY", key)
            options = PolicyOptions(mapping={"api_key_env": "A2C2_TEST_KEY"})
            if accepted:
                policy = RemotePolicy(served.url, options, clock.now_s, clock.sleep)
            else:
                with pytest.raises(PolicyError, match="401"):
                    load_policy("remote", served.url, options)
        assert served.stop(signal.SIGINT)[0] == 0
        with pytest.raises(PolicyError, match="no connection"):
            policy.predict(libero_observation(), INSTRUCTION, seed=0)
    finally:
        served.process.kill()
        served.process.communicate()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--policy", "none", "--policy-path", "x"], "policy kind"),
        (["--policy-path", "no_such_model"], "no_such_model"),
        (["--policy-path", "x", "--api-key-env", "A2C2_NO_SUCH_KEY"], "A2C2_NO_SUCH_KEY"),
    ],
)
def test_a_server_that_cannot_start_says_why(arguments, match):
    from a2c2_ros.policies.server import main

    with pytest.raises(SystemExit, match=match):
        main(arguments)


# Another machine


class Cable:
    """Two network namespaces and a cable that delivers every frame late and loses some, as netem would.

    Both ends are TAP devices, which a thread reads and writes. That needs root, but no module of the kernel.
    """

    DELAY_S, LOSS = 0.02, 0.01
    TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000

    def __init__(self):
        mark = f"a2c2t{os.getpid() % 100_000}"
        self.addresses = {f"{mark}r": "10.199.8.1", f"{mark}p": "10.199.8.2"}
        self.robot, self.policy = self.addresses
        self.frames = self.lost = 0
        self._ends, self._made = [], []
        self._unplugged = threading.Event()
        try:
            for name, address in self.addresses.items():
                ip("netns", "add", name)
                self._made.append(name)
                with inside(name):
                    self._ends.append(os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK))
                    request = struct.pack("16sH22x", b"cable", self.IFF_TAP | self.IFF_NO_PI)
                    fcntl.ioctl(self._ends[-1], self.TUNSETIFF, request)
                ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
                ip("-n", name, "link", "set", "lo", "up")
                ip("-n", name, "link", "set", "cable", "up", "multicast", "on")
        except (OSError, subprocess.CalledProcessError) as error:
            self._remove()
            pytest.skip(f"no network namespaces: {getattr(error, 'stderr', '') or error}")
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def close(self):
        self._unplugged.set()
        self._thread.join()
        self._remove()

    def _carry(self):
        rng, under_way = random.Random(0), []
        while not self._unplugged.is_set():
            wait_s = min(under_way[0][0] - time.monotonic(), 0.1) if under_way else 0.1
            for end in select.select(self._ends, [], [], max(0.0, wait_s))[0]:
                with contextlib.suppress(BlockingIOError):
                    while frame := os.read(end, 65536):
                        self.frames += 1
                        if rng.random() < self.LOSS:
                            self.lost += 1
                        else:
                            other = self._ends[1 - self._ends.index(end)]
                            heapq.heappush(under_way, (time.monotonic() + self.DELAY_S, self.frames, other, frame))
            while under_way and under_way[0][0] <= time.monotonic():
                with contextlib.suppress(OSError):  # a full or closed end loses the frame
                    os.write(under_way[0][2], under_way[0][3])
                heapq.heappop(under_way)

    def _remove(self):
        for end in self._ends:
            os.close(end)
        for name in self._made:
            ip("netns", "delete", name)


@pytest.fixture
def cable():
    cable = Cable()
    yield cable
    cable.close()


def test_a_policy_behind_a_slow_network(cable):
    pytest.importorskip("torch")
    with inside(cable.policy):
        served = Served("--threads", "1", "--host", cable.addresses[cable.policy])
    try:
        with inside(cable.robot):
            policy = load_policy("remote", served.url, PolicyOptions(mapping={"timeout_s": 60.0}))
            outputs = [policy.predict(libero_observation(), INSTRUCTION, seed=0) for _ in range(2)]
            started_ns = time.perf_counter_ns()
            outputs.append(policy.predict(libero_observation(), INSTRUCTION, seed=0))
            duration_ns = time.perf_counter_ns() - started_ns
        assert duration_ns - outputs[-1].inference_ns >= 2 * Cable.DELAY_S * 1e9
        assert cable.frames > 0
        local = load_policy("flow", "flow_libero_spatial", PolicyOptions(threads=1))
        expected = local.predict(libero_observation(), INSTRUCTION, seed=0).actions
        for output in outputs:
            np.testing.assert_allclose(output.actions, expected, rtol=1e-5, atol=1e-5)
    finally:
        served.process.kill()
        served.process.communicate()


LISTENER = """
import rclpy
from a2c2_ros.core.safety import State
from a2c2_ros.msg import ActionChunk, ControlStep
from a2c2_ros.nodes.runtime import latched_qos, reliable_qos

sent, executed = set(), set()

def on_step(step):
    if step.state == State.RUNNING:
        executed.add(step.chunk_id)

rclpy.init()
node = rclpy.create_node("listener")
node.create_subscription(ActionChunk, "action_chunk", lambda chunk: sent.add(chunk.chunk_id), latched_qos(2))
node.create_subscription(ControlStep, "control_step", on_step, reliable_qos(100))
while len(executed) < 4 or len(executed & sent) < 2:  # a chunk may be lost on its way here and come to the controller
    rclpy.spin_once(node, timeout_sec=1.0)
"""


@pytest.mark.timeout(280)
def test_the_planner_behind_a_slow_network(cable, tmp_path, monkeypatch):
    """Simulator and controller here, the planner there: its chunks arrive and are executed, corrected by the head."""
    pytest.importorskip("rclpy")
    from ros_system import System

    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    monkeypatch.setenv("ROS_STATIC_PEERS", ";".join(cable.addresses.values()))
    monkeypatch.setenv("FASTDDS_BUILTIN_TRANSPORTS", "UDPv4")  # shared memory would go round the cable
    system = System(tmp_path)
    mode = {"lockstep": True, "use_sim_time": True}
    # A process of its own: the DDS library looks at the network interfaces once, and other tests have used it here.
    environment = os.environ | {"ROS_DOMAIN_ID": str(system.domain_id)}
    with inside(cable.robot):
        listener = subprocess.Popen([sys.executable, "-c", LISTENER], env=environment)
        try:
            system.start("libero_sim", task=0, episodes=0)
            system.start("correction_controller", **mode)
            with inside(cable.policy):
                system.start("chunk_planner", execution_horizon=5, inference_delay=2, **mode)
            system.wait_for(lambda: listener.poll() is not None, "four executed chunks", 120.0)
            assert listener.returncode == 0 and cable.lost > 0
        finally:
            listener.kill()
            listener.wait()
            system.close()
