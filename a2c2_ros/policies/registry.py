"""Policies by name."""

import importlib

from a2c2_ros.core.errors import ConfigError
from a2c2_ros.policies.base import ChunkPolicy

POLICIES = {"flow": "a2c2_ros.policies.flow:FlowPolicy"}


def load_policy(kind: str, path: str, **options: object) -> ChunkPolicy:
    """Load a policy; its libraries are imported only now.

    Args:
        kind: A key of ``POLICIES``.
        path: Where the policy's files are.
        **options: Keyword arguments of the policy's class.

    Raises:
        ConfigError: If the kind or an option is unknown.
        PolicyError: If the files cannot be used.
    """
    if kind not in POLICIES:
        raise ConfigError(f"policy kind is {kind!r}, allowed are {sorted(POLICIES)}")
    module, name = POLICIES[kind].split(":")
    try:
        return getattr(importlib.import_module(module), name)(path, **options)
    except TypeError as error:
        if "unexpected keyword" not in str(error):
            raise
        raise ConfigError(f"policy {kind!r} does not take these options: {error}") from error
