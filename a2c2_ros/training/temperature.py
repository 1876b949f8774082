"""Copy a flow policy with another sampling temperature: ``python -m a2c2_ros.training.temperature --help``.

The weights stay; the temperature is part of the policy's id, so that a head is trained for each copy. At 0 a policy
draws no noise, and its chunks have no modes that real-time chunking could keep apart.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from a2c2_ros.commands import command
from a2c2_ros.core.errors import ConfigError
from a2c2_ros.paths import model_path
from a2c2_ros.policies.flow import CONFIG_FILE, load_network, save_network
from a2c2_ros.training.record import write_record

RECORD_FILE = "training.json"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--policy", required=True, help="folder of a flow policy; a bare name is looked up in models/")
    p.add_argument("--temperature", type=float, required=True, help="scale of the noise at t = 0, from 0 to 1")
    p.add_argument("--out", type=Path, required=True, help="folder of the copy; its name is the first part of the id")
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(argv)
    print(copy(model_path(args.policy), args.temperature, args.out))
    return 0


def copy(policy: Path, temperature: float, out: Path) -> str:
    """Write the copy and its record: that of the original, with what it was copied from.

    Returns:
        The copy's policy id.

    Raises:
        ConfigError: If the temperature is not allowed, or ``out`` has a policy.
        PolicyError: If the original cannot be read.
    """
    if (out / CONFIG_FILE).exists():
        raise ConfigError(f"{out} has a policy already: choose another --out")
    network = load_network(policy)
    origin = network.config.policy_id
    network.config = dataclasses.replace(network.config, temperature=temperature)
    written = save_network(network, out, out.name)
    record = policy / RECORD_FILE
    facts = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    copied = {"policy_id": written.policy_id, "copy_of": origin, "temperature": temperature}
    write_record(out / RECORD_FILE, facts | copied)
    return written.policy_id


if __name__ == "__main__":
    sys.exit(main())
