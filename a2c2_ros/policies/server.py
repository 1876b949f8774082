"""Serves a policy to other machines in openpi's websocket protocol, see :mod:`a2c2_ros.policies.remote`.

The protocol has no encryption, and no authentication but one key for all clients. Without ``--host`` the server is
reachable from its own machine only.
"""

import argparse
import asyncio
import hmac
import logging
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any

import numpy as np
from websockets.asyncio.server import Request, Response, ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.protocol import State

from a2c2_ros.core.errors import A2C2Error, ConfigError, ObservationError
from a2c2_ros.drivers.profile import load_profile
from a2c2_ros.policies.base import CONTINUED, ChunkPolicy, Continuation
from a2c2_ros.policies.registry import load_policy_for
from a2c2_ros.policies.remote import CONTINUATION, DIALECT, DIALECT_VERSION, pack, unpack

HEALTH_PATH = "/healthz"
STATE, INSTRUCTION, SEED = "observation/state", "prompt", "seed"
DEFAULT_MESSAGE_MB = 16.0
LONGEST_INSTRUCTION = 4096

logger = logging.getLogger(__name__)


def metadata(policy: ChunkPolicy) -> dict[str, Any]:
    """What the server tells every client first: sizes, and the settings of the client for this server."""
    return {
        DIALECT: DIALECT_VERSION,
        "policy_id": policy.policy_id,
        "horizon": policy.horizon,
        "action_names": list(policy.action_names),
        "state_dim": policy.state_dim,
        "latent_dim": policy.latent_dim,
        "language_dim": policy.language_dim,
        "image_size": policy.image_size if policy.cameras else None,
        "cameras": {name: f"observation/{name}" for name in policy.cameras},
        "state": STATE,
        "instruction": INSTRUCTION,
        "seed": SEED,
        "actions": "actions",
        "latent": "latent",
        "language": "language",
        "state_representation": "robot",
        "mirror_images": False,
        "trained_for": {k: list(v) if isinstance(v, tuple) else v for k, v in policy.trained_for.items()},
        "largest_delay": {mode: policy.largest_delay(mode) for mode in CONTINUED},
    }


def infer(policy: ChunkPolicy, request: object) -> dict[str, Any]:
    """Answer one request.

    Args:
        policy: Computes the chunk.
        request: Decoded message: per camera ``observation/NAME``, ``observation/state``, ``prompt`` and, if equal
            requests are to give equal chunks whatever came before, ``seed`` (default 0). For real-time chunking
            ``continuation``: a map of the fields of :class:`Continuation`.

    Returns:
        ``actions`` (H, A), ``latent`` (Z,), ``language`` (L,), all float32, and ``policy_timing`` [ms].

    Raises:
        ObservationError: If the request lacks something or has something of a wrong kind, shape or value.
        PolicyError: If the policy gives no usable chunk.
    """
    if not isinstance(request, Mapping):
        raise ObservationError(f"a request is {type(request).__name__}, allowed is a map")
    observation = {name: _item(request, f"observation/{name}", np.ndarray) for name in policy.cameras}
    observation["state"] = _item(request, STATE, np.ndarray).astype(np.float32)
    instruction = _item(request, INSTRUCTION, str)
    seed = _item(request, SEED, int) if SEED in request else 0
    if not 0 <= seed < 2**63:
        raise ObservationError(f"{SEED!r} is {seed}, allowed are 0 to 2**63 - 1")
    if len(instruction) > LONGEST_INSTRUCTION:
        raise ObservationError(f"{INSTRUCTION!r} has {len(instruction)} characters, allowed are {LONGEST_INSTRUCTION}")
    continuation = None
    if CONTINUATION in request:
        continuation = _continuation(policy, _item(request, CONTINUATION, Mapping))
    started_s = time.perf_counter()
    output = policy.predict(observation, instruction, seed=seed, continuation=continuation)
    return {
        "actions": output.actions,
        "latent": output.latent,
        "language": output.language,
        "policy_timing": {"infer_ms": 1e3 * (time.perf_counter() - started_s)},
    }


def _continuation(policy: ChunkPolicy, given: Mapping) -> Continuation:
    actions, mode = _item(given, "actions", np.ndarray), _item(given, "mode", str)
    if actions.ndim != 2 or not 0 < len(actions) <= policy.horizon or actions.shape[1] != len(policy.action_names):
        raise ObservationError(
            f"'actions' to go on from are {actions.shape}, allowed are up to {policy.horizon} of "
            f"{len(policy.action_names)} numbers"
        )
    if not np.isfinite(actions).all():
        raise ObservationError("'actions' to go on from are not finite")
    if mode not in CONTINUED or policy.largest_delay(mode) is None:
        raise ObservationError(f"'mode' is {mode[:20]!r}, which the policy {policy.policy_id} cannot do")
    return Continuation(actions.astype(np.float32), _item(given, "delay_steps", int), mode)


def _item(request: Mapping, key: str, kind: type) -> Any:
    value = request.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ObservationError(
            f"{key!r} is {type(value).__name__}, allowed is {kind.__name__}; the request has {list(request)[:20]}"
        )
    return value


class PolicyServer:
    """Serves one policy, one inference at a time, to any number of clients.

    A request that cannot be answered is answered with a text, the error, and ends the connection of its client only.
    """

    def __init__(
        self, policy: ChunkPolicy, *, key: str | None = None, max_message_mb: float = DEFAULT_MESSAGE_MB
    ) -> None:
        """Make a server; :meth:`run` starts it.

        Args:
            policy: Called on one thread only.
            key: What clients have to send as ``Authorization: Api-Key KEY``; None: nothing.
            max_message_mb: Largest request [10^6 bytes].
        """
        self._policy = policy
        self._metadata = pack(metadata(policy))
        self._key = key
        self._limit_bytes = round(max_message_mb * 1e6)
        self._turn = asyncio.Lock()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="inference")

    async def run(self, host: str, port: int) -> None:
        """Serve until SIGINT or SIGTERM; the inference that runs then is finished.

        Args:
            host: Address of this machine that clients connect to.
            port: TCP port; 0: any free one.

        Raises:
            OSError: If the address cannot be used.
        """
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def on_signal(number: int) -> None:
            loop.remove_signal_handler(number)  # the second one ends the process at once
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal, number)
        async with serve(
            self._handle,
            host,
            port,
            compression=None,
            max_size=self._limit_bytes,
            max_queue=1,
            process_request=self._admit,
        ) as server:
            for socket in server.sockets:
                address, bound_port = socket.getsockname()[:2]
                where = f"[{address}]:{bound_port}" if ":" in address else f"{address}:{bound_port}"
                print(f"serving {self._policy.policy_id} at ws://{where}", flush=True)
            await stop.wait()
        self._worker.shutdown()
        print("stopped", flush=True)

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        if request.path == HEALTH_PATH:
            return connection.respond(HTTPStatus.OK, "OK\n")
        given = request.headers.get("Authorization", "")
        if self._key is not None and not hmac.compare_digest(given.encode(), f"Api-Key {self._key}".encode()):
            return connection.respond(HTTPStatus.UNAUTHORIZED, "the header 'Authorization: Api-Key KEY' is wrong\n")
        return None

    async def _handle(self, connection: ServerConnection) -> None:
        client = connection.remote_address
        logger.info("client %s connected", client)
        with suppress(ConnectionClosed):
            await connection.send(self._metadata)
            total_ms = None
            async for message in connection:
                started_s = time.perf_counter()
                try:
                    reply = await self._answer(connection, message)
                except (A2C2Error, RuntimeError) as error:  # RuntimeError: what torch raises
                    logger.warning("client %s: %s", client, error)
                    await connection.send(f"{type(error).__name__}: {error}")
                    await connection.close(CloseCode.INTERNAL_ERROR, "the request failed, see the text before")
                    break
                if total_ms is not None:
                    reply["server_timing"]["prev_total_ms"] = total_ms
                await connection.send(pack(reply))
                total_ms = 1e3 * (time.perf_counter() - started_s)
        logger.info("client %s left", client)

    async def _answer(self, connection: ServerConnection, message: bytes | str) -> dict[str, Any]:
        async with self._turn:
            if connection.state is not State.OPEN:  # it left while others had their turn
                raise ConnectionClosed(None, None)
            loop, started_s = asyncio.get_running_loop(), time.perf_counter()
            reply = await loop.run_in_executor(self._worker, lambda: infer(self._policy, unpack(message)))
            return reply | {"server_timing": {"infer_ms": 1e3 * (time.perf_counter() - started_s)}}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("websockets").setLevel(logging.WARNING)
    try:
        key = None
        if arguments.api_key_env and not (key := os.environ.get(arguments.api_key_env)):
            raise ConfigError(f"the environment variable {arguments.api_key_env} (--api-key-env) holds no key")
        if not _is_loopback(arguments.host):
            logger.warning(
                "%s: everything is sent in the clear, and %s: use a network that nobody else is in",
                arguments.host,
                "the key is all that keeps others out" if key else "anybody who reaches the port can use the policy",
            )
        policy = load_policy_for(
            load_profile(arguments.robot),
            arguments.policy,
            arguments.policy_path,
            arguments.policy_config,
            device=arguments.device,
            dtype=arguments.dtype,
            threads=arguments.threads,
        )
        server = PolicyServer(policy, key=key, max_message_mb=arguments.max_message_mb)
        asyncio.run(server.run(arguments.host, arguments.port))
    except (A2C2Error, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--policy", default="flow", help="kind of policy (default: %(default)s)")
    result.add_argument("--policy-path", required=True, help="where the policy is, as for the planner")
    result.add_argument("--policy-config", default="", help="YAML file of the policy, as for the planner")
    result.add_argument("--robot", default="libero", help="profile of the clients' robot (default: %(default)s)")
    result.add_argument("--dtype", default="float32", help="arithmetic of the policy (default: %(default)s)")
    result.add_argument("--device", default="cpu", help="torch device (default: %(default)s)")
    result.add_argument("--threads", type=int, help="CPU threads of the policy (default: all)")
    result.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, loopback)")
    result.add_argument("--port", type=int, default=8000, help="TCP port, 0: any free one (default: %(default)s)")
    result.add_argument("--api-key-env", help="environment variable with the key that clients must send")
    result.add_argument(
        "--max-message-mb", type=float, default=DEFAULT_MESSAGE_MB, help="largest request [10^6 bytes] (default: 16)"
    )
    return result


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    main()
