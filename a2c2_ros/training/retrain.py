"""Retrain a head on what happened: ``make retrain``.

Evaluates the head on LIBERO Spatial where something is not as in its training, records episodes of the real nodes with
the expert's labels, converts the bags, trains the head on them and on the demonstrations, and evaluates again; each
further round records with the head of the last one. In a round "takeover" the expert, in a person's place, takes over
after a while and finishes the task. The last head is swapped into a running loop. Episodes start from sampled
placements, so that all official initial states are held out. Every step that is done is kept: the same command
continues after a kill.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from a2c2_ros import bringup, provenance
from a2c2_ros.commands import command
from a2c2_ros.core.config import PlannerConfig
from a2c2_ros.core.errors import A2C2Error, ConfigError
from a2c2_ros.core.safety import State
from a2c2_ros.evaluation.cells import DISTURBED, STATIC, SWAP, VARIANTS, outcomes, parse_variant, policy_facts
from a2c2_ros.evaluation.statistics import difference
from a2c2_ros.jobs import end_with_parent, interrupt_on_termination, run_jobs
from a2c2_ros.paths import model_path
from a2c2_ros.settings import check_settings
from a2c2_ros.sim import conventions
from a2c2_ros.training.dataset import hash_files
from a2c2_ros.training.libero import Step, options, run_step

FIRST_SEED = 1_000_000
"""Placements of the recorded episodes; evaluations use seeds from 0 and from 2**31."""
SWAP_STEPS = 100
"""Control steps that are watched before and after the swap."""
SWAP_TIMEOUT_S = 600.0
SETTINGS = (
    *("tasks", "rounds", "takeover_after", "episodes", "record_steps", "evaluations", "variant", "disturbance"),
    *("execution_horizon", "inference_delay", "seed", "minutes", "steps", "policy"),
)
SETTINGS_FILE = "settings.json"
POLICY, TAKEOVER = "policy", "takeover"
"""Kinds of rounds: the policy with its head acts to the end, or the expert takes over."""
MAX_ROUNDS, MAX_EPISODES = 10, 1000
"""More would take the seeds of other recordings."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(
        prog="python -m a2c2_ros.training.retrain",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,  # --task would be taken for --tasks
    )
    p.add_argument("--out", type=Path, default=Path("runs/retrain"), help="folder of bags, data set, head, evaluations")
    p.add_argument("--result", type=Path, default=Path("results/retrain.json"), help="JSON file of the result")
    p.add_argument("--head", default="compact_libero_spatial", help="folder with head.onnx and head.safetensors")
    p.add_argument("--policy", default=PlannerConfig().policy_path, help="checkpoint folder of the base policy")
    p.add_argument("--old", type=Path, default=Path("data/libero"), help="data that it was trained on")
    p.add_argument("--variant", choices=VARIANTS, default=SWAP, help="how it is not as in training")
    p.add_argument("--disturbance", type=float, default=0.5, help="strength of pushes on the arm, 0 to 1")
    # With two objects in each other's place the expert cannot reach the bowl of task 4, nor always that of 1, 3 and 6.
    p.add_argument("--tasks", default="0,2,5,7-9", help="task numbers, e.g. 0-3,7")
    p.add_argument("--rounds", default=f"{POLICY},{TAKEOVER}", help="of recording and training: who acts, in order")
    p.add_argument("--takeover-after", type=int, default=40, help="control steps of an episode before the takeover")
    p.add_argument("--episodes", type=int, default=20, help="recorded episodes per task and round")
    p.add_argument("--record-steps", type=int, default=120, help="of an episode, and again after a takeover")
    p.add_argument("--evaluations", type=int, default=10, help="initial states per task, before and after")
    p.add_argument("--execution-horizon", type=int, default=40, help="execution horizon e [steps]")
    p.add_argument("--inference-delay", type=int, default=10, help="injected inference delay d [steps]")
    budget = p.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=12.0, help="of the training of a round")
    budget.add_argument("--steps", type=int, help="of the training of a round, instead of minutes")
    p.add_argument("--seed", type=int, default=0, help="of placements, noise and training")
    p.add_argument("--workers", type=int, default=os.cpu_count(), help="processes or threads of each step")
    p.add_argument("--list", action="store_true", help="print the commands, and which are done")
    p.add_argument("--only", choices=("record", "swap"), help=argparse.SUPPRESS)
    p.add_argument("--internal-round", type=int, default=1, help=argparse.SUPPRESS)
    p.add_argument("--internal-task", type=int, help=argparse.SUPPRESS)
    return p


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code of the step that failed, else 0."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(argv)
    interrupt_on_termination()
    tasks = conventions.parse_tasks(args.tasks)
    if args.only == "record":
        task = args.internal_task
        record_task(args, task) if task is not None else record(args, argv, tasks)
        return 0
    if args.only == "swap":
        swap(args, tasks[0])
        return 0
    heads = {name: file_hash(model_path(args.head) / name) for name in ("head.onnx", "head.safetensors")}
    parse_variant(variant_of(args))
    if not set(kinds_of(args)) <= {POLICY, TAKEOVER} or len(kinds_of(args)) > MAX_ROUNDS:
        raise ConfigError(
            f"--rounds is {args.rounds!r}, allowed is a list of up to {MAX_ROUNDS} of {POLICY!r} and {TAKEOVER!r}"
        )
    if not 1 <= args.episodes <= MAX_EPISODES:
        raise ConfigError(f"--episodes is {args.episodes}, allowed is 1 to {MAX_EPISODES}")
    if not args.list:
        args.out.mkdir(parents=True, exist_ok=True)
        weights = heads | {"policy_id": policy_facts(args.policy)["policy_id"]}
        data = {"old_data": hash_files(args.old) if has_data(args.old) else "none"}
        settings = {name: getattr(args, name) for name in SETTINGS} | weights | data
        check_settings(args.out / SETTINGS_FILE, settings)
    if not has_data(args.old):
        print(f"{args.old} has no data set: the head is trained on the new data alone")
    for step in commands(args, argv):
        if code := run_step(step, args.list):
            return code
    if not args.list:
        report(args)
    return 0


def commands(args: argparse.Namespace, argv: Sequence[str]) -> Iterator[Step]:
    """The commands in their order, and what each makes."""
    out = args.out
    evaluation = {
        "method": "a2c2",
        "tasks": args.tasks,
        "episodes": args.evaluations,
        "execution-horizon": args.execution_horizon,
        "inference-delay": args.inference_delay,
        "seed": args.seed,
        "policy": args.policy,
        "workers": args.workers,
    }
    training = {
        "policy": model_path(args.policy),
        "seed": args.seed,
        "workers": args.workers,
        **({"steps": args.steps} if args.steps else {"minutes": args.minutes}),
    }

    def step(name: str, module: str, product: Path, *given: object, **named: object) -> Step:
        return Step(name, (module, *map(str, given), *options(named)), product)

    def evaluated(name: str, number: int, variant: str) -> Step:
        product, head = out / f"{name}.json", head_folder(args, number) / "head.onnx"
        return step(name, "evaluation.libero", product, **evaluation, variant=variant, head=head, out=product)

    variant = variant_of(args)
    data = [args.old] if has_data(args.old) else []  # before the first step, as the user was told
    yield evaluated("before", 0, variant)
    last = len(kinds_of(args))
    for number in range(1, last + 1):
        folder, head = round_folder(args, number), head_folder(args, number)
        bags = [run_folder(args, number, task) / "bag" for task in conventions.parse_tasks(args.tasks)]
        data = [*data, folder / "data"]
        recording = (*(word for word in argv if word != "--list"), "--only", "record", "--internal-round", number)
        yield step(f"record_{number}", "training.retrain", folder / "recorded.json", *recording)
        info = folder / "data" / "meta" / "info.json"
        yield step(f"convert_{number}", "training.from_bag", info, *bags, out=folder / "data", label="expert")
        init = head_folder(args, number - 1) / "head.safetensors"
        yield step(
            f"train_{number}", "training.train_head", head / "head.onnx", **training, init=init, data=data, out=head
        )
        yield evaluated(f"after_{number}", number, variant)
    yield step("swap", "training.retrain", out / "swap.json", *argv, "--only", "swap")
    if variant != STATIC:
        yield evaluated(f"{STATIC}_before", 0, STATIC)
        yield evaluated(f"{STATIC}_after", last, STATIC)


def kinds_of(args: argparse.Namespace) -> list[str]:
    """What kind each round is of."""
    return args.rounds.split(",")


def variant_of(args: argparse.Namespace) -> str:
    """The variant with its pushes, as evaluations name it."""
    return args.variant + (f"{DISTURBED}{args.disturbance:g}" if args.disturbance else "")


def round_folder(args: argparse.Namespace, number: int) -> Path:
    """Where all of a round is."""
    return args.out / f"round{number}"


def head_folder(args: argparse.Namespace, number: int) -> Path:
    """Where the head after so many rounds is."""
    return round_folder(args, number) / "head" if number else model_path(args.head)


def has_data(folder: Path) -> bool:
    """Whether there is a data set."""
    return (folder / "meta" / "info.json").is_file()


def file_hash(path: Path) -> str:
    """SHA-256 of a file.

    Raises:
        ConfigError: If it is missing.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is missing: --head is a folder with head.onnx and head.safetensors")
    return provenance.sha256_of(path)


def run_folder(args: argparse.Namespace, number: int, task: int) -> Path:
    """Where the recorded run of a round and task is."""
    return round_folder(args, number) / "runs" / f"task{task:02d}"


def arguments_of(args: argparse.Namespace, number: int, task: int, out: Path, **given: object) -> list[str]:
    """The bring-up of a run of a round."""
    arguments, strength = parse_variant(variant_of(args))
    recording = len(conventions.TASKS) * (MAX_ROUNDS * args.seed + number - 1) + task
    values = {
        "task": task,
        "seed": FIRST_SEED + MAX_EPISODES * recording,
        "initial_state": -2,
        **arguments,
        "disturbance": strength,
        "policy_path": args.policy,
        "head": head_folder(args, number - 1) / "head.onnx",
        "execution_horizon": args.execution_horizon,
        "inference_delay": args.inference_delay,
        "out": out,
    }
    return ["libero_sim", *(f"{name}:={str(value)}" for name, value in (values | given).items())]


def own_domain(task: int) -> str:
    """A DDS domain for a run, so that those that run at the same time do not meet."""
    first = int(os.environ.get("ROS_DOMAIN_ID") or os.getppid())  # the same for all tasks of a command
    return str(bringup.DOMAINS[(first + task) % len(bringup.DOMAINS)])


def record_task(args: argparse.Namespace, task: int) -> None:
    """Record the episodes of a task by the real nodes."""
    folder = run_folder(args, args.internal_round, task)
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    os.environ["ROS_DOMAIN_ID"] = own_domain(task)
    given = {"episodes": args.episodes, "record": "true", "expert": "true", "max_steps": args.record_steps}
    if kinds_of(args)[args.internal_round - 1] == TAKEOVER:
        after = args.takeover_after
        given |= {"takeover_after_steps": after, "max_steps": after + args.record_steps}
    if code := bringup.main(arguments_of(args, args.internal_round, task, partial, **given)):
        raise A2C2Error(f"the run of task {task} ended with {code}")
    partial.rename(folder)


def record(args: argparse.Namespace, argv: Sequence[str], tasks: Sequence[int]) -> None:
    """Record the tasks that are missing, and how they went.

    Raises:
        A2C2Error: If a run failed; those that are complete are kept.
    """
    folder = round_folder(args, args.internal_round)
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "a2c2_ros.training.retrain", *argv]
    missing = [task for task in tasks if not run_folder(args, args.internal_round, task).exists()]
    with tqdm(total=len(tasks), initial=len(tasks) - len(missing), unit="task", desc="record") as bar:

        def show() -> None:
            bar.update(sum(run_folder(args, args.internal_round, task).exists() for task in tasks) - bar.n)

        jobs = {f"task{task:02d}": [*command, "--internal-task", str(task)] for task in missing}
        if failed := run_jobs(jobs, args.workers, folder / "runs", show):
            raise A2C2Error(f"runs {failed} failed, see {folder / 'runs'}/*.log; the same command continues")
    summaries = [run_folder(args, args.internal_round, task) / "summary.json" for task in tasks]
    episodes = [e for path in summaries for e in json.loads(path.read_text(encoding="utf-8"))["per_episode"]]
    (folder / "recorded.json").write_text(json.dumps(episodes, indent=1) + "\n")


def swap(args: argparse.Namespace, task: int) -> None:
    """Swap the new head into a loop that runs on the clock, by the parameter service, and count what was missed.

    Raises:
        A2C2Error: If the swap was refused or the loop did not go on.
    """
    import rclpy
    from rclpy.executors import SingleThreadedExecutor
    from rclpy.parameter import Parameter
    from rclpy.parameter_client import AsyncParameterClient

    from a2c2_ros.msg import ControlConfiguration, ControlStep
    from a2c2_ros.nodes.runtime import latched_qos, reliable_qos

    head, folder = (head_folder(args, len(kinds_of(args))) / "head.onnx").resolve(), args.out / "swap"
    domain = own_domain(0)
    os.environ.update(bringup.environment() | {"ROS_DOMAIN_ID": domain})
    context = rclpy.Context()
    rclpy.init(context=context, domain_id=int(domain))
    node = rclpy.create_node("retrain", context=context)
    executor = SingleThreadedExecutor(context=context)
    executor.add_node(node)
    steps: list[ControlStep] = []
    configurations: dict[int, ControlConfiguration] = {}
    node.create_subscription(ControlStep, "control_step", steps.append, reliable_qos(1000))
    node.create_subscription(
        ControlConfiguration, "control_configuration", lambda m: configurations.update({m.revision: m}), latched_qos(10)
    )
    client = AsyncParameterClient(node, "correction_controller")
    command = [sys.executable, "-m", "a2c2_ros.bringup"]
    command += arguments_of(args, 1, task, folder.resolve(), episodes=0, lockstep="false")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with (folder / "bringup.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=end_with_parent)
    deadline_s = time.monotonic() + SWAP_TIMEOUT_S

    def spin_until(condition: Callable[[], bool], what: str) -> None:
        while not condition():
            executor.spin_once(timeout_sec=0.05)
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise A2C2Error(f"{what} did not happen, see {folder / 'bringup.log'}")

    try:
        spin_until(lambda: any(step.state == State.RUNNING for step in steps), "the first step")
        begun = len(steps)
        spin_until(lambda: len(steps) >= begun + SWAP_STEPS and client.services_are_ready(), f"{SWAP_STEPS} steps")
        asked, old = len(steps), steps[-1].configuration
        asked_s = time.monotonic()
        answer = client.set_parameters([Parameter("correction.model_path", value=str(head))])
        spin_until(answer.done, "the answer")
        answered_s = time.monotonic() - asked_s
        (result,) = answer.result().results
        if not result.successful:
            raise A2C2Error(f"the head was refused: {result.reason}")
        spin_until(lambda: sum(step.configuration > old for step in steps) >= SWAP_STEPS, "steps with the new head")
        spin_until(lambda: steps[-1].configuration in configurations, "the new configuration")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()
        node.destroy_node()
        rclpy.shutdown(context=context)
    new = steps[-1].configuration
    first_new = next(i for i, step in enumerate(steps) if step.configuration == new)

    def watched(part: Sequence[ControlStep]) -> dict[str, object]:
        return {
            "steps": len(part),
            "missed_ticks": sum(step.missed_ticks for step in part),
            "longest_period_error_s": max(abs(step.period_error_s) for step in part),
            "states": sorted({State(step.state).name for step in part}),
        }

    found = {
        "revision": [old, new],
        "head_sha256": configurations[new].head_sha256,
        "answered_after_s": answered_s,
        "steps_until_in_use": first_new - asked,
        "before": watched(steps[begun:asked]),
        "while_loading": watched(steps[asked : first_new + 1]),
        "after": watched(steps[first_new + 1 :]),
    }
    if found["head_sha256"] != file_hash(head):
        raise A2C2Error(f"the loop runs another head than {head}")
    (args.out / "swap.json").write_text(json.dumps(found, indent=1) + "\n")


def report(args: argparse.Namespace) -> None:
    """Write the result and print it."""

    def read(name: str) -> dict | list:
        return json.loads((args.out / name).read_text(encoding="utf-8"))

    def shown(cell: dict) -> dict[str, object]:
        where = ("cell", "variant", "execution_horizon", "inference_delay", "head_sha256")
        return {name: cell[name] for name in (*where, "total", "per_task", "failures")}

    def compared(first: dict, then: dict) -> dict[str, object]:
        pairs = difference(outcomes(then), outcomes(first))
        return {"after": shown(then), "difference": vars(pairs) if pairs else None}

    before, rounds = read("before.json"), []
    for number, kind in enumerate(kinds_of(args), 1):
        recorded, data, training = (
            read(f"round{number}/{name}") for name in ("recorded.json", "data/from_bag.json", "head/training.json")
        )
        rounds.append(
            {
                "recorded": {
                    "acting": kind,
                    "episodes": len(recorded),
                    "successes": sum(e["result"] == "success" for e in recorded),
                },
                "conversion": {
                    **{name: data[name] for name in ("frames", "seconds_recorded", "seconds", "times_real_time")},
                    "ticks_that_differ": sum(len(bag["parity"]["differing"]) for bag in data["bags"]),
                },
                "training": {
                    name: training[name] for name in ("steps", "seconds", "data_sets", "hyper_parameters", "history")
                },
                **compared(before, read(f"after_{number}.json")),
            }
        )
    swapped = read("swap.json")
    result = {
        "settings": read(SETTINGS_FILE),
        "before": shown(before),
        "rounds": rounds,
        "with_old_data": len(rounds[-1]["training"]["data_sets"]) > len(rounds),
        "swap": swapped,
    }
    if variant_of(args) != STATIC:
        first = read(f"{STATIC}_before.json")
        result[STATIC] = {"before": shown(first), **compared(first, read(f"{STATIC}_after.json"))}
    result |= {"machine": provenance.machine(), "versions": provenance.versions()}
    args.result.parent.mkdir(parents=True, exist_ok=True)
    args.result.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    found = [("before", result["before"])] + [(f"after {n}", r["after"]) for n, r in enumerate(rounds, 1)]
    if STATIC in result:
        found += [(f"{STATIC}, {name}", result[STATIC][name]) for name in ("before", "after")]
    for name, cell in found:
        low, high = cell["total"]["wilson_95"]
        print(f"{name:16}{cell['total']['successes']}/{cell['total']['episodes']} [{low:.1%}, {high:.1%}]")
    missed = swapped["while_loading"]["missed_ticks"]
    print(f"swapped while it ran: {missed} ticks missed; {args.result}")


if __name__ == "__main__":
    sys.exit(main())
