"""Make every policy and head of the LIBERO tables, one after the other: ``python -m a2c2_ros.training.libero``.

A YAML file says what. What is there already is kept, and every step continues after a kill.
"""

import argparse
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

from a2c2_ros.commands import command
from a2c2_ros.core.errors import ConfigError
from a2c2_ros.jobs import interrupt_on_termination, run_job
from a2c2_ros.paths import share_directory

PLAN_FILE = "libero_training.yaml"
TRAINERS = {
    "flow": "training.train_policy",
    "smolvla": "training.smolvla",
    "temperature": "training.temperature",
}
"""Command per kind of policy."""
RECORD_FILE = "training.json"
SECTIONS = ("data", "models", "records", "demonstrations", "policies", "heads", "visited")


@dataclass(frozen=True)
class Step:
    """A command and what it makes."""

    name: str
    command: tuple[str, ...]  # module of this package and its arguments
    product: Path | None = None  # exists when the step is done; None: the command itself sees what is missing

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        return self.product is not None and self.product.exists()


def run_step(step: Step, listing: bool) -> int:
    """Print the command of a step and run it, unless it is done or only listed; returns its exit code."""
    arguments = ["-m", f"a2c2_ros.{step.command[0]}", *step.command[1:]]
    print(f"{'done   ' if step.done else ''}{step.name}: {shlex.join(arguments)}", flush=True)
    if listing or step.done:
        return 0
    if code := run_job([sys.executable, *arguments]):
        print(f"error: {step.name} ended with {code}; the same command continues", file=sys.stderr)
    return code


def options(values: Mapping[str, Any]) -> tuple[str, ...]:
    """A command line: ``true`` is a bare option, ``false`` none, a list several values."""
    found: list[str] = []
    for name, value in values.items():
        if value is False:
            continue
        found.append(f"--{name}")
        if value is not True:
            found += map(str, value if isinstance(value, list) else [value])
    return tuple(found)


def load_plan(path: Path) -> dict[str, Any]:
    """Read the YAML file.

    Raises:
        ConfigError: Naming the file and what is wrong in it.
    """
    try:
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(plan, dict) or sorted(plan) != sorted(SECTIONS):
        raise ConfigError(f"{path} has the sections {sorted(plan or [])}, needed are {sorted(SECTIONS)}")
    for name, values in plan["policies"].items():
        if values.get("kind", "flow") not in TRAINERS:
            raise ConfigError(f"{path}: {name} is of the kind {values['kind']!r}, allowed are {list(TRAINERS)}")
    for section in ("policies", "heads", "visited"):
        for name, values in plan[section].items():
            for key, there in (("policy", "policies"), ("head", "heads")):
                if isinstance(values.get(key), str) and values[key] not in plan[there]:
                    raise ConfigError(f"{path}: {name} has the {key} {values[key]!r}, there are {list(plan[there])}")
            if missing := set(values.get("visited", ())) - set(plan["visited"]):
                raise ConfigError(f"{path}: {name} has visited {sorted(missing)}, there are {list(plan['visited'])}")
    return plan


def steps(plan: Mapping[str, Any], workers: int) -> Iterator[Step]:
    """All steps, each after those that it needs.

    Args:
        plan: Of :func:`load_plan`.
        workers: Threads or processes of each.
    """
    data, models = Path(plan["data"]), Path(plan["models"])
    default_policy = next(iter(plan["policies"]))
    begun: set[str] = set()

    def step(name: str, module: str, product: Path | None, **given: Any) -> Step:
        return Step(name, (module, *options({key.replace("_", "-"): value for key, value in given.items()})), product)

    def visited(name: str) -> Iterator[Step]:
        values = dict(plan["visited"][name])
        head = values.pop("head")
        yield from trained(head)
        yield step(
            name,
            "training.on_policy",
            data.parent / name / "meta" / "info.json",
            policy=models / plan["heads"][head].get("policy", default_policy),
            head=models / head / "head.onnx",
            out=data.parent / name,
            workers=workers,
            **values,
        )

    def trained(name: str) -> Iterator[Step]:
        if name in begun:
            return
        begun.add(name)
        values, folder = dict(plan["heads"][name]), models / name
        policy, others = models / values.pop("policy", default_policy), values.pop("visited", [])
        for other in others:
            yield from visited(other)
        yield step(
            name,
            "training.train_head",
            folder / RECORD_FILE,
            data=[data, *(data.parent / other for other in others)],
            policy=policy,
            out=folder,
            # Batch statistics cannot be shared by threads.
            workers=1 if values.get("architecture") == "transformer" else workers,
            **values,
        )
        product = folder / "head.onnx"
        head = folder / "head.safetensors"
        yield step(f"{name}: export", "heads.export", product, data=data, head=head, out=product)

    yield step(
        "demonstrations",
        "training.demonstrations",
        data / "meta" / "info.json",
        out=data,
        workers=workers,
        **plan["demonstrations"],
    )
    for name, values in plan["policies"].items():
        folder, kind = models / name, values.get("kind", "flow")
        given: dict[str, Any] = {"data": data, "out": folder, "workers": workers}
        given |= {key: value for key, value in values.items() if key != "kind"}
        if kind == "temperature":  # a copy of another one
            given = {"policy": models / given["policy"], "temperature": given["temperature"], "out": folder}
        yield step(name, TRAINERS[kind], folder / RECORD_FILE, **given)
        # SmolVLA takes batches on all cores instead of workers.
        how = {"kind": "lerobot"} if kind == "smolvla" else {"workers": workers}
        yield step(f"{name}: chunks", "training.cache_chunks", None, data=data, policy=folder, **how, views=1)
    for name in plan["heads"]:
        yield from trained(name)


def keep_record(step: Step, folder: Path) -> None:
    """Copy what a training left, ``training.json``, to ``NAME.json`` in a folder where results are kept."""
    if step.product is not None and step.product.name == RECORD_FILE:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(step.product, folder / f"{step.name}.json")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m a2c2_ros.training.libero",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    p.add_argument("--plan", type=Path, help=f"YAML file; default: the package's config/{PLAN_FILE}")
    p.add_argument("--only", nargs="+", metavar="PATTERN", help="only the steps of these names, for example 'no_*'")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="threads or processes of each step")
    p.add_argument("--list", action="store_true", help="print the commands, and which are done")
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code of the step that failed, else 0."""
    args = parser().parse_args(argv)
    plan = load_plan(args.plan or share_directory() / "config" / PLAN_FILE)
    interrupt_on_termination()
    for step in steps(plan, args.workers):
        if args.only and not any(fnmatchcase(step.name, pattern) for pattern in args.only):
            continue
        if (args.list or not step.done) and (code := run_step(step, args.list)):
            return code
        if not args.list:
            keep_record(step, Path(plan["records"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
