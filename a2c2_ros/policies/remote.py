"""A policy behind a websocket: the client side of openpi's protocol, which :mod:`a2c2_ros.policies.server` speaks too.

The protocol, as openpi's server (github.com/Physical-Intelligence/openpi, src/openpi/serving) speaks it: the server
opens with one binary message, its metadata. Then every binary message is an observation and is answered with one binary
message. A text message is an error, after which the server closes. Messages are msgpack maps; an array is a map with
the binary keys ``__ndarray__``, ``data``, ``dtype`` and ``shape``. An API key travels in the header ``Authorization``.
"""

import hashlib
import json
import math
import os
import re
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

import msgpack
import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.frames import CloseCode
from websockets.sync.client import ClientConnection, connect

from a2c2_ros.core.errors import ConfigError, PolicyError
from a2c2_ros.core.robot import Robot
from a2c2_ros.policies.base import REMEMBERED, Continuation, PolicyOptions, PolicyOutput, check_observation

DIALECT = "a2c2_ros"
"""Key of the metadata that says that the rest of it is :func:`a2c2_ros.policies.server.metadata`."""
DIALECT_VERSION = 1
CONTINUATION = "continuation"
"""Key of a request to a server of ours: what real-time chunking goes on from."""
LIBERO_ORIENTATION_XYZW = (1.0, 0.0, 0.0, 0.0)

BACKOFF_S = 0.1  # between two attempts to connect at first; it doubles up to the largest
LARGEST_BACKOFF_S = 2.0
CLOSE_TIMEOUT_S = 0.2
ERROR_LENGTH = 400  # characters of a server's error that are passed on

ARRAY, SCALAR = b"__ndarray__", b"__npgeneric__"
DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")  # of numbers only: numpy's own parser would also take objects
MAX_AXES = 8
MAX_ITEMS = 4096  # of a list or map; arrays are binary and are limited by the size of the message


def pack(value: Any) -> bytes:
    """Encode plain types and numpy arrays of numbers.

    Raises:
        PolicyError: If the value holds anything else.
    """
    try:
        return msgpack.packb(value, default=_pack_array)
    except (TypeError, ValueError, OverflowError) as error:
        raise PolicyError(f"a message cannot be encoded: {error}") from error


def unpack(message: bytes | str) -> Any:
    """Decode a message; only plain types and arrays of numbers come out, nothing in it is executed.

    Args:
        message: As received; its size is limited by the connection. No step takes much more memory than that.

    Raises:
        PolicyError: If it is not such a message or an array does not have the size that it claims.
    """
    if isinstance(message, str):
        raise PolicyError(f"the message is text, allowed is binary msgpack: {_shortened(message)}")
    try:
        return msgpack.unpackb(
            message,
            object_hook=_unpack_array,
            ext_hook=_refuse_extension,
            timestamp=2,
            max_array_len=MAX_ITEMS,
            max_map_len=MAX_ITEMS,
        )
    except (ValueError, TypeError, OverflowError, msgpack.UnpackException) as error:
        raise PolicyError(f"{len(message)} bytes are no message of the protocol: {error}") from error


def _pack_array(value: Any) -> dict[bytes, Any]:
    if not isinstance(value, (np.ndarray, np.generic)) or not DTYPE.fullmatch(value.dtype.str):
        raise TypeError(f"{getattr(value, 'dtype', type(value))} is neither a plain type nor an array of numbers")
    if isinstance(value, np.generic):
        return {SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}
    return {ARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}


def _unpack_array(value: dict) -> Any:
    if ARRAY not in value and SCALAR not in value:
        return value
    dtype, data = value.get(b"dtype"), value.get(b"data")
    if not isinstance(dtype, str) or not DTYPE.fullmatch(dtype):
        raise ValueError(f"the dtype of an array is {dtype!r}, allowed are numbers")
    dtype = np.dtype(dtype)
    if SCALAR in value:
        if not isinstance(data, (bool, int, float)):
            raise ValueError(f"a {dtype} scalar is {type(data).__name__}, allowed is a number")
        return dtype.type(data)
    shape = value.get(b"shape")
    if not isinstance(shape, list) or len(shape) > MAX_AXES or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"the shape of an array is {str(shape)[:80]}, allowed are up to {MAX_AXES} sizes")
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"a {dtype} array {shape} does not have the size that it claims")
    return np.ndarray(shape, dtype, data).astype(dtype.newbyteorder("="))


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"msgpack extension {code} of {len(data)} bytes, allowed are plain types")


def _shortened(text: str) -> str:
    """Last line of an error, which in a traceback is what happened."""
    line = (text.strip().splitlines() or ["(empty)"])[-1].strip()
    return line if len(line) <= ERROR_LENGTH else f"{line[:ERROR_LENGTH]}..."


@dataclass(frozen=True)
class RemoteSettings:
    """What the server wants and gives, and how long to wait; the keys of the policy's YAML file.

    The defaults are openpi's LIBERO server; those of :data:`DATA_SETTINGS` hold in simulation only. A server of ours
    tells all but :data:`LOCAL_SETTINGS` in its metadata; what the YAML file says counts more.

    Raises:
        ConfigError: If a value is not of the kind that is allowed.
    """

    cameras: Mapping[str, str] = field(
        default_factory=lambda: {"agentview": "observation/image", "wrist": "observation/wrist_image"}
    )  # camera of the robot to key of the request
    state: str = "observation/state"  # key of the request
    instruction: str = "prompt"  # key of the request
    seed: str | None = None  # key of the request; None: the server takes none, equal requests give different chunks
    actions: str = "actions"  # key of the reply
    latent: str | None = None  # key of the reply; None: the latent is empty, for heads that take none
    language: str | None = None  # key of the reply; None: policies.language embeds the instruction
    state_representation: str = "axis_angle"  # "robot": as the robot gives it; "axis_angle": see absolute_rotation
    nominal_orientation_xyzw: tuple[float, ...] | None = None  # for "axis_angle"; None: that of the robot profile
    mirror_images: bool = True  # left and right exchanged, as in the data of openpi's LIBERO policies
    horizon: int | None = None  # H; None: what the server sends
    image_size: int | None = None  # side of the images that are sent [pixels]; None: those of the robot
    state_dim: int | None = None  # None: the robot's
    action_names: tuple[str, ...] | None = None  # None: the robot's
    name: str = "remote"  # first part of the policy id
    timeout_s: float = 5.0  # for a chunk, a lost connection and its retry included
    connect_timeout_s: float = 10.0  # for the first connection, attempts included
    warm_up_timeout_s: float = 120.0  # for the first inference, which may compile the policy
    max_message_mb: float = 16.0  # both ways [10^6 bytes]
    api_key_env: str | None = None  # environment variable that holds the key

    def __post_init__(self) -> None:
        for name in ("nominal_orientation_xyzw", "action_names"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        cameras, orientation, names = self.cameras, self.nominal_orientation_xyzw, self.action_names
        self._check("cameras", isinstance(cameras, Mapping) and all(map(_is_text, [*cameras, *cameras.values()])))
        for name in ("state", "instruction", "actions", "name"):
            self._check(name, _is_text(getattr(self, name)), "a text")
        for name in ("seed", "latent", "language", "api_key_env"):
            self._check(name, getattr(self, name) is None or _is_text(getattr(self, name)), "a text or null")
        for name in ("horizon", "image_size", "state_dim"):
            value = getattr(self, name)
            self._check(name, value is None or type(value) is int and value > 0, "a positive whole number or null")
        for name in ("timeout_s", "connect_timeout_s", "warm_up_timeout_s", "max_message_mb"):
            value = getattr(self, name)
            self._check(name, type(value) in (int, float) and 0 < value < math.inf, "a positive number")
        self._check("mirror_images", isinstance(self.mirror_images, bool), "true or false")
        self._check("state_representation", self.state_representation in ("robot", "axis_angle"), "robot or axis_angle")
        valid = isinstance(orientation, tuple) and len(orientation) == 4 and all(map(_is_number, orientation))
        valid = orientation is None or valid and any(orientation)
        self._check("nominal_orientation_xyzw", valid, "four numbers, not all 0, or null")
        self._check("action_names", names is None or isinstance(names, tuple) and all(map(_is_text, names)), "names")
        keys = [*cameras.values(), self.state, self.instruction, *filter(None, [self.seed])]
        if len(set(keys)) != len(keys):
            raise ConfigError(f"remote policy: the keys of a request are {keys}, allowed are different ones")

    def _check(self, name: str, valid: bool, allowed: str = "a mapping of camera to key") -> None:
        if not valid:
            raise ConfigError(f"remote policy: {name} is {getattr(self, name)!r}, allowed is {allowed}")


DATA_SETTINGS = ("state_representation", "mirror_images")
"""How the data were made that a policy learned from. A guess about it would move a robot wrongly."""
LOCAL_SETTINGS = ("name", "timeout_s", "connect_timeout_s", "warm_up_timeout_s", "max_message_mb", "api_key_env")
"""The settings that do not change what the policy does; a server does not tell them."""


def _check_address(path: str) -> None:
    try:
        url = urlsplit(path)
        valid = url.scheme in ("ws", "wss") and url.hostname and (url.port is None or url.port > 0)
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(f"the address of a remote policy is {path!r}, allowed is ws://host:port or wss://host:port")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value != ""


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def absolute_rotation(state: np.ndarray, nominal_xyzw: np.ndarray) -> np.ndarray:
    """State of LIBERO as openpi's policies have it, from ours, which has the rotation relative to the nominal one.

    The angle goes on beyond pi, as LIBERO's simulator gives it: q and -q are the same rotation, and the one on the side
    of the nominal orientation is taken, which keeps the axis-angle continuous around there.

    Args:
        state: (S,) float32, elements 3 to 5 the rotation of ``core.state.rotation_vector`` [rad].
        nominal_xyzw: (4,) its reference.

    Returns:
        (S,) float32, elements 3 to 5 the axis times the angle in [0, 2 pi] [rad].
    """
    vector = state[3:6].astype(np.float64)
    nominal = np.asarray(nominal_xyzw, np.float64) / np.linalg.norm(nominal_xyzw)
    half = np.linalg.norm(vector) / 2.0
    xyz, w = vector * np.sinc(half / np.pi) / 2.0, np.cos(half)  # quaternion of the relative rotation
    axis = w * nominal[:3] + nominal[3] * xyz + np.cross(xyz, nominal[:3])
    angle = 2.0 * np.arccos(np.clip(w * nominal[3] - xyz @ nominal[:3], -1.0, 1.0))
    length = np.linalg.norm(axis)
    absolute = state.copy()
    absolute[3:6] = axis * (angle / length) if length > 1e-9 else 0.0
    return absolute


class RemotePolicy:
    """A :class:`ChunkPolicy` that another process or machine computes. Not for use from several threads at once.

    ``policy_id`` is the one that a server of ours tells. Else it is ``name`` and a hash of the server's metadata, the
    horizon and the settings that change what the policy does. It does not contain the address; nor does it know the
    weights: the protocol does not tell them, so give different weights different names.
    """

    def __init__(
        self,
        path: str,
        options: PolicyOptions | None = None,
        now_s: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Connect and compute a first chunk, which the server may need to compile.

        Args:
            path: ``ws://host:port`` or ``wss://host:port``.
            options: ``mapping`` has the keys of :class:`RemoteSettings`; ``robot`` and ``camera_shapes`` give what
                neither it nor the server says.
            now_s: A clock that only goes forward [s].
            sleep: Waits on it [s].

        Raises:
            ConfigError: If the address or a setting is wrong, or a size or name is told by nobody.
            PolicyError: If there is no server, or it does not answer as the protocol and the settings say.
        """
        options = options or PolicyOptions()
        _check_address(path)
        known = [f.name for f in fields(RemoteSettings)]
        if unknown := [key for key in options.mapping if key not in known]:
            raise ConfigError(f"remote policy: {unknown} are no settings, allowed are {known}")
        self._url = path
        self._now_s, self._sleep = now_s, sleep
        self._settings = RemoteSettings(**options.mapping)
        self._limit_bytes = round(self._settings.max_message_mb * 1e6)
        self._headers = self._authorization()
        self._metadata: bytes | None = None
        self._connection: ClientConnection | None = None
        self._closing = ExitStack()
        weakref.finalize(self, self._closing.close)
        with self._named():
            self._connect(self._now_s() + self._settings.connect_timeout_s)
            told = _as_map(unpack(self._metadata), "the metadata")
        ours = told.get(DIALECT) == DIALECT_VERSION
        served = {k: v for k, v in told.items() if ours and k in known and k not in LOCAL_SETTINGS}
        given = served | dict(options.mapping)
        self._settings = settings = RemoteSettings(**given)
        robot = options.robot
        untold = [name for name in DATA_SETTINGS if name not in given]
        if untold and robot is not None and not robot.simulated:
            raise ConfigError(
                f"remote policy: the server does not tell {untold}, and {robot.name} is no simulator: the policy's "
                f"YAML file (policy_config) has to say them"
            )
        self.cameras = tuple(settings.cameras)
        self.image_size = (settings.image_size or self._robot_image_size(options)) if self.cameras else 0
        self.state_dim = settings.state_dim or self._given("state_dim", robot and len(robot.state_names))
        self.action_names = settings.action_names or self._given("action_names", robot and robot.action_names)
        self._nominal_xyzw = self._nominal_orientation(robot)
        trained_for = told.get("trained_for") if ours else None
        if not isinstance(trained_for, Mapping):
            trained_for = {}
        self.trained_for = {k: tuple(v) if isinstance(v, list) else v for k, v in trained_for.items()}
        delays = told.get("largest_delay") if ours else None
        self._largest_delays = delays if isinstance(delays, Mapping) else {}
        self._languages: dict[str, np.ndarray] = {}  # what the server sent
        self._encoder = None
        self.horizon, self.latent_dim, self.language_dim = settings.horizon, None, None
        output = self._infer(self._nothing(), "warm up", 0, settings.warm_up_timeout_s)
        self.horizon, self.latent_dim = len(output.actions), len(output.latent)
        self.language_dim = len(output.language)
        self.policy_id = self._identity(told, served)

    def embed(self, instruction: str) -> np.ndarray:
        """Embedding of an instruction, (L,) float32; the server's if it sends any."""
        if self._settings.language is None:
            if self._encoder is None:
                # Imports torch, which the client of a server that sends its embedding can do without.
                from a2c2_ros.policies.language import InstructionEncoder

                self._encoder = InstructionEncoder()
            return self._encoder.embed(instruction)
        if instruction not in self._languages:
            self._infer(self._nothing(), instruction, 0, self._settings.timeout_s)
        return self._languages[instruction]

    def largest_delay(self, chunking: str) -> int | None:
        """See :meth:`ChunkPolicy.largest_delay`; what a server of ours tells, others cannot."""
        delay = self._largest_delays.get(chunking)
        return delay if type(delay) is int else None

    def predict(
        self,
        observation: Mapping[str, np.ndarray],
        instruction: str,
        *,
        seed: int,
        continuation: Continuation | None = None,
    ) -> PolicyOutput:
        """Ask the server for a chunk. See :meth:`ChunkPolicy.predict`; ``seed`` counts if the server takes one.

        Raises:
            ObservationError: If an image or the state has a wrong shape, dtype or value.
            PolicyError: If no usable chunk came in time, or the chunk was to go on from another. A lost connection is
                made anew, once here, and again by the next call.
        """
        check_observation(self, observation)
        if continuation is not None and self.largest_delay(continuation.mode) is None:
            raise PolicyError(f"{self._url}: the server cannot go on from a chunk ({continuation.mode!r})")
        return self._infer(observation, instruction, seed, self._settings.timeout_s, continuation)

    def close(self) -> None:
        """Close the connection; the next inference opens another."""
        self._connection = None
        self._closing.close()

    def _infer(
        self,
        observation: Mapping[str, np.ndarray],
        instruction: str,
        seed: int,
        timeout_s: float,
        continuation: Continuation | None = None,
    ) -> PolicyOutput:
        settings = self._settings
        images = {key: observation[name] for name, key in settings.cameras.items()}
        if settings.mirror_images:
            images = {key: image[:, ::-1] for key, image in images.items()}
        state = observation["state"]
        if settings.state_representation == "axis_angle":
            state = absolute_rotation(state, self._nominal_xyzw)
        request = images | {settings.state: state, settings.instruction: instruction}
        if settings.seed is not None:
            request[settings.seed] = seed
        if continuation is not None:
            request[CONTINUATION] = {
                "actions": continuation.actions,
                "delay_steps": continuation.delay_steps,
                "mode": continuation.mode,
            }
        with self._named():
            reply = self._exchange(pack(request), timeout_s)
            actions = _array(reply, settings.actions, (self.horizon, len(self.action_names)))
            latent = np.zeros(0, np.float32)
            if settings.latent is not None:
                latent = _array(reply, settings.latent, (self.latent_dim,))
            if settings.language is not None:
                if len(self._languages) >= REMEMBERED:
                    self._languages.clear()
                self._languages[instruction] = _array(reply, settings.language, (self.language_dim,))
            return PolicyOutput(actions, latent, self.embed(instruction), _inference_ns(reply))

    def _exchange(self, message: bytes, timeout_s: float) -> Mapping:
        """Send a request and decode its answer, once more on a new connection if the old one is lost."""
        if len(message) > self._limit_bytes:
            raise PolicyError(f"the request has {len(message)} bytes, allowed are {self._limit_bytes} (max_message_mb)")
        deadline_s = self._now_s() + timeout_s
        try:
            try:
                return self._ask(message, deadline_s)
            except ConnectionClosed as error:
                if _too_big(error):
                    raise
                return self._ask(message, deadline_s)
        except TimeoutError as error:
            raise PolicyError(f"no answer within {timeout_s} s") from error
        except ConnectionClosed as error:
            raise PolicyError(f"the connection was lost: {error}") from error

    def _ask(self, message: bytes, deadline_s: float) -> Mapping:
        """Send a request and decode its answer.

        Unless the answer is good the connection is closed: a late one cannot be taken for that of another request.
        """
        self._connect(deadline_s)
        reply = None
        try:
            with suppress(TimeoutError):
                self._connection.recv(timeout=0)
                raise PolicyError("the server sent something that it was not asked for")
            self._connection.send(message)
            answer = self._connection.recv(timeout=deadline_s - self._now_s())
            if isinstance(answer, str):
                raise PolicyError(f"the server failed: {_shortened(answer)}")
            reply = _as_map(unpack(answer), "the reply")
        finally:
            if reply is None:
                self.close()
        return reply

    def _connect(self, deadline_s: float) -> None:
        """Connect if there is no connection, again and again until the deadline."""
        wait_s = BACKOFF_S
        while self._connection is None:
            try:
                self._open(deadline_s)
            except InvalidStatus as error:
                raise PolicyError(f"the server refuses: {error}") from error
            except (OSError, WebSocketException) as error:
                if self._now_s() + wait_s >= deadline_s:
                    raise PolicyError(f"no connection: {type(error).__name__}: {error}") from error
                self._sleep(wait_s)
                wait_s = min(2.0 * wait_s, LARGEST_BACKOFF_S)

    def _open(self, deadline_s: float) -> None:
        connection = self._closing.enter_context(
            connect(
                self._url,
                additional_headers=self._headers,
                compression=None,
                max_size=self._limit_bytes,
                open_timeout=max(0.0, deadline_s - self._now_s()),
                close_timeout=CLOSE_TIMEOUT_S,
                ping_interval=None,  # openpi's server answers no ping while it computes
                proxy=None,
            )
        )
        try:
            with suppress(OSError):  # lost already: recv says why
                connection.socket.settimeout(self._settings.timeout_s)  # a send to a dead peer ends, too
            metadata = connection.recv(timeout=deadline_s - self._now_s())
            if isinstance(metadata, str):
                raise PolicyError(f"the server failed: {_shortened(metadata)}")
            if self._metadata not in (None, metadata):
                raise PolicyError("the server now tells other metadata: configure again")
            self._metadata, self._connection = metadata, connection
        finally:
            if self._connection is None:
                self.close()

    def _authorization(self) -> dict[str, str] | None:
        variable = self._settings.api_key_env
        if variable is None:
            return None
        if not os.environ.get(variable):
            raise ConfigError(f"remote policy: the environment variable {variable} (api_key_env) holds no key")
        return {"Authorization": f"Api-Key {os.environ[variable]}"}

    def _nominal_orientation(self, robot: Robot | None) -> tuple[float, ...] | None:
        """What the state's rotation is relative to, None if it is sent as it is."""
        if self._settings.state_representation != "axis_angle":
            return None
        given = self._settings.nominal_orientation_xyzw
        if robot is None:
            if self.state_dim < 6:
                raise ConfigError(
                    f"remote policy: state_representation axis_angle with {self.state_dim} numbers of state"
                )
            return given or LIBERO_ORIENTATION_XYZW
        if robot.nominal_orientation_xyzw is None:
            raise ConfigError(
                f"remote policy: state_representation is axis_angle, but the state of {robot.name} is "
                f"{list(robot.state_names)}, without a rotation; allowed is robot"
            )
        if given not in (None, robot.nominal_orientation_xyzw):
            raise ConfigError(
                f"remote policy: nominal_orientation_xyzw is {given}, allowed is that of {robot.name}, "
                f"{robot.nominal_orientation_xyzw}, or null"
            )
        return robot.nominal_orientation_xyzw

    def _robot_image_size(self, options: PolicyOptions) -> int:
        shapes = {name: options.camera_shapes.get(name) for name in self.cameras}
        sides = {side for shape in shapes.values() if shape for side in shape[:2]}
        if None in shapes.values() or len(sides) != 1:
            raise ConfigError(
                f"remote policy: image_size is told neither by the settings nor by the server, and the robot's cameras "
                f"are {shapes}, allowed are square images of one size"
            )
        return sides.pop()

    @staticmethod
    def _given(name: str, value: Any) -> Any:
        if not value:
            raise ConfigError(f"remote policy: {name} is told neither by settings nor server, nor by a robot")
        return value

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except PolicyError as error:
            raise PolicyError(f"{self._url}: {error}") from error

    def _nothing(self) -> dict[str, np.ndarray]:
        images = {name: np.zeros((self.image_size, self.image_size, 3), np.uint8) for name in self.cameras}
        return images | {"state": np.zeros(self.state_dim, np.float32)}

    def _identity(self, told: Mapping, served: Mapping) -> str:
        facts, name = _facts(self._settings), self._settings.name
        if served and _is_text(told.get("policy_id")):
            name = told["policy_id"]
            if facts == _facts(RemoteSettings(**served)):
                return name
        facts |= {"horizon": self.horizon, "image_size": self.image_size}
        text = json.dumps(facts, sort_keys=True).encode()
        return f"{name}-{hashlib.sha256(self._metadata + text).hexdigest()[:8]}"


def _facts(settings: RemoteSettings) -> dict[str, Any]:
    return {name: value for name, value in asdict(settings).items() if name not in LOCAL_SETTINGS}


def _as_map(value: Any, what: str) -> Mapping:
    if not isinstance(value, Mapping):
        raise PolicyError(f"{what} is {type(value).__name__}, allowed is a map")
    return value


def _array(reply: Mapping, key: str, shape: tuple[int | None, ...]) -> np.ndarray:
    """An array of the reply as float32; None in ``shape`` is any size but 0 in a chunk."""
    array = reply.get(key)
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise PolicyError(f"{key!r} of the reply is {kind}, allowed is a float array; the reply has {list(reply)[:20]}")
    fits = array.ndim == len(shape) and all(want in (None, size) for want, size in zip(shape, array.shape))
    if not fits or (len(shape) == 2 and not len(array)):
        raise PolicyError(f"{key!r} of the reply has shape {array.shape}, allowed is {shape} (None: any)")
    with np.errstate(over="ignore"):  # what becomes infinite is refused as such
        return array.astype(np.float32)


def _inference_ns(reply: Mapping) -> int | None:
    """What the server says that it computed, None if it says nothing sensible."""
    timing = reply.get("server_timing")
    inference_ms = timing.get("infer_ms") if isinstance(timing, Mapping) else None
    return round(inference_ms * 1e6) if _is_number(inference_ms) and inference_ms >= 0 else None


def _too_big(error: ConnectionClosed) -> bool:
    return any(close is not None and close.code == CloseCode.MESSAGE_TOO_BIG for close in (error.rcvd, error.sent))
