"""Figures 1, 4, 6 and 7 in the paper's layout, as PNG and SVG, with matplotlib."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_train import paper
from resnet_train.report.runs import Point, Run

# Figure: its panels, each a title and the nets in it, in the paper's order.
PANELS: dict[str, list[tuple[str, tuple[str, ...]]]] = {
    "figure 1": [("training error", ("plain-20", "plain-56")), ("test error", ("plain-20", "plain-56"))],
    "figure 4": [("plain", ("plain-18", "plain-34")), ("ResNet", ("resnet-18-A", "resnet-34-A"))],
    "figure 6": [
        ("plain", ("plain-20", "plain-32", "plain-44", "plain-56")),
        ("ResNet", tuple(f"resnet-{depth}-A" for depth in (20, 32, 44, 56, 110))),
        ("ResNet, 110 and 1202", ("resnet-110-A", "resnet-1202-A")),
    ],
}
AXES = {"cifar": (0.0, 20.0), "imagenet": (20.0, 60.0)}  # the paper's, in %
POINTS = 500  # drawn of a curve: more than a panel has pixels for
COLOURS = {18: "C1", 34: "C0", 20: "C1", 32: "C8", 44: "C2", 56: "C0", 110: "C3", 1202: "C4"}


@dataclass(frozen=True)
class Responses:
    """The standard deviations of one net's layer responses, in layer order, and the seed it was trained with."""

    net: str
    data: str
    seed: int
    stds: Sequence[float]
    note: str = ""  # that the training was shortened
    finished: bool = True


def draw(name: str, group: list[Run]) -> Any:
    """Figure 1, 4 or 6 of the runs of one setting, or None if there are none for it.

    Training error dashed (figure 4: thin), test error bold, a colour for each depth, every seed a line.
    """
    from matplotlib.figure import Figure

    panels = [(title, [run for run in group if run.net in nets]) for title, nets in PANELS[name]]
    panels = [(title, runs) for title, runs in panels if runs]
    if not panels or (name == "figure 4") != (group[0].family == "imagenet"):
        return None
    figure = Figure(figsize=(4.6 * len(panels) + 0.4, 4.6), layout="constrained")
    low, high, note = _axis([run for _, runs in panels for run in runs])
    for axes, (title, runs) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for run in runs:
            colour, first = COLOURS.get(run.depth, "C5"), run is next(r for r in runs if r.net == run.net)
            label = f"{run.net}{'' if run.finished else ', unfinished'}" if first else None
            train, test = title != "test error", title != "training error"
            if train:
                style = {"linewidth": 0.8} if name == "figure 4" else {"linewidth": 0.9, "linestyle": "--"}
                axes.plot(*_xy(run.curves["train"]), color=colour, **style, label=None if test else label)
            if test:
                axes.plot(*_xy(run.curves["test"]), color=colour, linewidth=2, label=label)
        axes.set(title=title, xlabel="iterations (10$^4$)", ylabel="error (%)", ylim=(low, high), xlim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    dashes = "thin: training" if name == "figure 4" else "dashed: training"
    what = f"{name.capitalize()} on {group[0].data}; {dashes}, bold: test ({group[0].protocol}){note}"
    _head(figure, what, paper.shortened(group[0].family, group[0].iterations))
    return figure


def draw_responses(measured: Sequence[Responses]) -> Any:
    """Figure 7: the standard deviations in layer order (above) and from the largest on (below)."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 6.4), layout="constrained")
    above, below = figure.subplots(2, 1)
    for number, one in enumerate(measured):
        style = {"linestyle": "--" if one.net.startswith("plain") else "-", "color": f"C{number}", "linewidth": 1.2}
        layers = range(1, len(one.stds) + 1)
        seeds = sum(other.net == one.net for other in measured) > 1
        name = one.net + (f", seed {one.seed}" if seeds else "") + ("" if one.finished else ", unfinished")
        above.plot(layers, one.stds, **style, label=name)
        below.plot(layers, sorted(one.stds, reverse=True), **style)
    above.set(xlabel="layer index (original)", ylabel="std")
    below.set(xlabel="layer index (sorted by magnitude)", ylabel="std")
    for axes in (above, below):
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    above.legend(fontsize=8)
    data = " and ".join(dict.fromkeys(one.data for one in measured))
    notes = "; ".join(dict.fromkeys(one.note for one in measured if one.note))
    _head(figure, f"Figure 7: responses of the 3x3 layers after batch norm, {data}; dashed: plain", notes)
    return figure


def save(figure: Any, path: Path) -> None:
    """Write `path` with .png and .svg, whole or not at all; the same figure is the same file. Raises OSError."""
    import matplotlib as mpl

    for kind in ("png", "svg"):
        part = path.with_name(f".{path.name}.{kind}")
        with mpl.rc_context({"svg.hashsalt": "resnet-train"}):
            figure.savefig(part, format=kind, dpi=110, metadata={"Date": None} if kind == "svg" else {})
        part.replace(path.with_name(f"{path.name}.{kind}"))


def thinned(points: Sequence[Point], most: int = POINTS) -> list[Point]:
    """Every k-th point of a curve and the last, about `most` of them."""
    step = math.ceil(len(points) / most) or 1
    return [*points[:-1:step], *points[-1:]]


def _xy(points: Iterable[Point]) -> tuple[list[float], list[float]]:
    kept = thinned(list(points))
    return [iteration / 1e4 for iteration, _, _ in kept], [error for _, error, _ in kept]


def _axis(runs: list[Run]) -> tuple[float, float, str]:
    """The paper's limits of the error axis where the curves end within them; else wider ones, and a word on it."""
    low, high = AXES[runs[0].family]
    ends = [points[-1][1] for run in runs for points in run.curves.values() if points]
    worst, least = max(ends), min(ends)
    if worst < high and least >= low:
        return low, high, ""
    top = min(100.0, 10 * math.ceil(max(1.6 * worst, high) / 10))
    bottom = low if least >= low else 0.0
    return bottom, top, f"; axis to {top:g} %, the paper's is {low:g} to {high:g} %"


def _head(figure: Any, title: str, warning: str) -> None:
    figure.suptitle((f"{warning}\n" if warning else "") + title, fontsize=9 if not warning else 10)
    if warning:
        figure._suptitle.set_fontweight("bold")
