"""What a training leaves behind: the record, the loss curves and checkpoints. JSON and safetensors only."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from a2c2_ros import provenance


def write_record(path: str | Path, record: Mapping[str, object]) -> None:
    """Write ``training.json``: the given facts and where they come from (platform, processors, versions)."""
    machine = {**provenance.machine(), "torch_threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    record = {**record, "machine": machine, "versions": provenance.versions()}
    Path(path).write_text(json.dumps(record, indent=1, default=_plain) + "\n")


def fingerprint(*facts: object) -> str:
    """Eight hexadecimal digits that identify JSON-like values and dataclasses."""
    return hashlib.sha256(json.dumps(facts, default=_plain, sort_keys=True).encode()).hexdigest()[:8]


def plot_losses(path: str | Path, history: list[Mapping[str, float]], ylabel: str) -> None:
    """Draw the training and validation loss of a history (see :func:`loop.train`) over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = [row["step"] for row in history]
    for name, label in (("train_loss", "training"), ("loss", "validation, held-out episodes")):
        axes.plot(steps, [row[name] for row in history], label=label)
    axes.set(xlabel="step", ylabel=ylabel, yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def save_checkpoint(
    path: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer, meta: Mapping[str, object]
) -> None:
    """Write everything that a training needs to continue; a kill leaves the old file or the new one, never a part."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in slots.items()}
    partial = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, partial, {"meta": json.dumps(meta)})
    partial.rename(path)


def load_checkpoint(
    path: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, object]:
    """Restore a checkpoint in place and return its ``meta``."""
    with safe_open(path, "pt") as file:
        names, meta = file.keys(), json.loads(file.metadata()["meta"])
        tensors = {key: file.get_tensor(key) for key in names}
    for prefix, module in (("model.", model), ("average.", average)):
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return meta


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value):
        return dataclasses.asdict(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)
