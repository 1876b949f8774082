"""Success against delay and against execution horizon, as in the paper's Figure 6."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Curve:
    """One method's success rates."""

    label: str
    points: Mapping[int, tuple[float, float, float]]  # x to rate, low and high in [0, 1]; the paper's have low == high
    paper: bool = False


def plot(path: Path, panels: Sequence[tuple[str, str, Sequence[Curve]]]) -> None:
    """Draw panels side by side, with 95% intervals.

    Args:
        path: PNG to write.
        panels: (title, label of the horizontal axis, curves) each.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(curve.label for _, _, curves in panels for curve in curves if not curve.paper))
    figure = Figure(figsize=(1.5 + 5.0 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    handles = {}
    for axes, (title, axis, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        ticks = sorted({x for curve in curves for x in curve.points})
        for curve in curves:
            x = sorted(curve.points)
            rates = [100 * curve.points[i][0] for i in x]
            if curve.paper:
                style = {"color": "0.55", "linestyle": "--" if "naive" in curve.label else ":", "marker": "."}
                handles[curve.label] = axes.plot(x, rates, **style)[0]
                continue
            number = labels.index(curve.label)
            low, high = ([abs(100 * curve.points[i][k] - r) for i, r in zip(x, rates)] for k in (1, 2))
            # Curves of equal points would hide each other's intervals.
            shift = 0.006 * (max(ticks) - min(ticks)) * (number - (len(labels) - 1) / 2)
            handles[curve.label] = axes.errorbar(
                [i + shift for i in x], rates, [low, high], color=f"C{number % 10}", marker="o", markersize=4, capsize=2
            )
        axes.set(title=title, xlabel=axis, ylim=(-3, 103), xticks=ticks)
        axes.set_ylabel("success [%]")
        axes.grid(alpha=0.3)
    figure.legend(list(handles.values()), list(handles), loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
