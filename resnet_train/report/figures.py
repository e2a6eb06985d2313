"""Figures 1, 4, 6 and 7, also for data that the paper does not have, as PNG and SVG. Needs matplotlib."""

from __future__ import annotations

import dataclasses
import functools
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_train import paper
from resnet_train.report import curves
from resnet_train.report.curves import Point, colour, edges, interval_means, mark, mean_and_std, plain_matplotlib
from resnet_train.report.runs import Run, by_net

AXES = {"cifar": (0.0, 20.0), "imagenet": (20.0, 60.0)}  # the paper's, in %
LINES: dict[str, dict[str, Any]] = {"train": {"linewidth": 1.1, "linestyle": (0, (4, 1.5))}, "test": {"linewidth": 2.0}}
Panel = tuple[str, dict[str, list[Run]], tuple[str, ...]]  # its title, the runs of each net, which errors


@dataclass(frozen=True)
class Responses:
    """The standard deviations of one net's layer responses, in layer order, and the seed it was trained with."""

    net: str
    data: str
    seed: int
    stds: Sequence[float]
    note: str = ""  # says that the training was shortened, if it was
    finished: bool = True
    iteration: int = 0  # of the checkpoint


@dataclass(frozen=True)
class Picture:
    """A figure that has not been drawn yet."""

    name: str  # of its files, without suffix
    caption: str
    draw: Callable[[], Any]


def plan(group: list[Run]) -> list[Picture]:
    """The figures of the runs of one setting.

    The shallowest and the deepest plain net as in figure 1, all nets as in figures 4 and 6. A line is the mean over
    the seeds of finished runs, with a band of one standard deviation.
    """
    nets = by_net(group)
    plain = {net: runs for net, runs in nets.items() if runs[0].arch == "plain"}
    residual = {net: runs for net, runs in nets.items() if net not in plain and net != "resnet-1202-A"}
    ends = {net: plain[net] for net in (*list(plain)[:1], *list(plain)[-1:])}
    both = ("train", "test")
    deepest = (
        {net: runs for net, runs in nets.items() if runs[0].depth in (110, 1202)} if "resnet-1202-A" in nets else {}
    )
    degradation: list[Panel] = [("training error", ends, ("train",)), ("test error", ends, ("test",))]
    depths: list[Panel] = [("plain nets", plain, both), ("residual nets", residual, both)]
    depths.append(("residual nets, 110 and 1202 layers", deepest, both))
    photos, planned = group[0].family == "imagenet", []
    if len(ends) == 2 and not (photos and group[0].published):
        name, label = ("figure-1", "Figure 1") if group[0].published else ("plain-nets", "Plain nets")
        words = f"{label}: training error (left) and test error (right) of {' and '.join(ends)}"
        planned.append((name, words, degradation))
    name = ("figure-4" if photos else "figure-6") if group[0].published else "curves"
    label = name.capitalize().replace("-", " ") if group[0].published else "Every net"
    words = f"{label}: training error (dashed) and test error (bold, {group[0].protocol})"
    planned.append((name, words, [panel for panel in depths if panel[1]]))
    return [
        Picture(name, _caption(words, panels, group[0]), functools.partial(_draw, panels, group[0]))
        for name, words, panels in planned
    ]


def _caption(words: str, panels: list[Panel], first: Run) -> str:
    nets = [runs for _, nets, _ in panels for runs in nets.values()]
    several = any(sum(run.finished for run in runs) > 1 for runs in nets)
    lines = "means over seeds, with a band of ± one standard deviation" if several else "one seed each"
    runs = [run for of_net in nets for run in of_net]
    lines += explain_points(runs) if any(len(splits) > 1 for _, _, splits in panels) else ""
    return f"{words}, on {first.data}; {lines}{axis_limits(runs)[2]}."


def explain_points(runs: list[Run], splits: Sequence[str] = ("train", "test")) -> str:
    """How curves of a single point are drawn, in words; empty if there are none."""
    looks = {"train": "a ring (training)", "val": "a cross (validation)", "test": "a dot (test)"}
    alone = [looks[split] for split in splits if any(len(run.curves[split]) == 1 for run in runs)]
    return f"; a single point is {' or '.join(alone)}" if alone else ""


def _draw(panels: list[Panel], first: Run) -> Any:
    """Draw panels side by side."""
    with plain_matplotlib():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.2 * len(panels), 4.4))
        low, high, _ = axis_limits([run for _, nets, _ in panels for runs in nets.values() for run in runs])
        unit, xlabel = (1e4, "iterations (10⁴)") if first.iterations >= 20_000 else (1, "iterations")
        for number, axes in enumerate(figure.subplots(1, len(panels), squeeze=False)[0]):
            title, nets, splits = panels[number]
            for net, runs in nets.items():
                done = [run for run in runs if run.finished]
                label = net if done else f"{net}, unfinished"
                named = next(
                    (split for split in reversed(splits) if any(run.curves[split] for run in done or runs)), None
                )
                for split in splits:
                    at, curves = _curves(split, [run.curves[split] for run in done or runs])
                    look = split if len(splits) > 1 else "test"
                    style = LINES[look] | mark(look, at) | {"color": colour(net)}
                    xs = [iteration / unit for iteration in at]
                    _line(axes, xs, curves, **style, label=label if split == named else None)
            axes.set(title=title, xlabel=xlabel, ylim=(low, high), xlim=(0, None))
            axes.xaxis.set_major_locator(_ticks())
            axes.yaxis.set_major_locator(_ticks())
            if unit == 1:
                axes.xaxis.set_major_formatter("{x:,.0f}")
            if axes.lines:  # else nothing has been tested
                axes.legend(loc="best")
            if number == 0:
                axes.set_ylabel("error (%)")
        if short := paper.shortened(first.data, first.family, first.iterations):
            figure.suptitle(short)
    return figure


def _curves(split: str, curves: list[list[Point]]) -> tuple[list[float], list[list[float]]]:
    """The iterations at which the seeds of a net can be averaged, and each seed's errors there."""
    curves = [points for points in curves if points]
    if not curves:
        return [], []
    if split == "train":
        ends = edges(min(curves, key=lambda points: (points[-1][0], len(points))))
        return ends[1:], [interval_means(points, ends) for points in curves]
    tests = [{at: error for at, error, _ in points} for points in curves]
    common = sorted(set.intersection(*(set(test) for test in tests)))
    at = [iteration for iteration, _, _ in thinned([(iteration, 0.0, None) for iteration in common])]
    return list(at), [[test[iteration] for iteration in at] for test in tests]


def _line(axes: Any, xs: Sequence[float], curves: Sequence[Sequence[float]], **style: Any) -> None:
    """Draw the mean of curves with a band of one standard deviation."""
    statistics = [mean_and_std(list(values)) for values in zip(*curves, strict=True)]
    if not statistics:
        return
    means = [mean for mean, _ in statistics]
    axes.plot(xs, means, **style)
    if len(curves) > 1:
        low, high = ([mean + sign * (std or 0.0) for mean, std in statistics] for sign in (-1, 1))
        axes.fill_between(xs, low, high, color=style["color"], alpha=0.2, linewidth=0 if len(xs) > 1 else 8)


def draw_tests(runs: Sequence[tuple[str, list[tuple[int, float]]]], ylabel: str) -> Any:
    """The tests of runs, by name, as points (iteration, value in %); runs of one name share a colour."""
    with plain_matplotlib():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.6, 4.4))
        axes = figure.subplots()
        names = list(dict.fromkeys(name for name, points in runs if points))
        for name, points in runs:
            if points:
                shade = curves.OTHERS[names.index(name) % len(curves.OTHERS)]
                axes.plot(*zip(*points, strict=True), "o-", color=shade, label=textwrap.fill(name, 48))
        axes.set(xlabel="iterations", ylabel=ylabel, xlim=(0, None), ylim=(0, 100))
        axes.xaxis.set_major_locator(_ticks())
        axes.xaxis.set_major_formatter("{x:,.0f}")
        handles, labels = axes.get_legend_handles_labels()
        once = dict(zip(labels, handles, strict=True))
        axes.legend(once.values(), once)
    return figure


def _ticks() -> Any:
    """Few ticks, at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True)


def draw_responses(measured: Sequence[Responses]) -> Any:
    """Figure 7: standard deviations in layer order (above) and by magnitude (below), means over seeds."""
    ordered = [dataclasses.replace(one, stds=sorted(one.stds, reverse=True)) for one in measured]
    return _draw_layers(("std", "layer index (original)", measured), ("std", "layer index (by magnitude)", ordered))


def draw_gradients(by_response: Sequence[Responses], by_weights: Sequence[Responses]) -> Any:
    """The norms of the gradients layer by layer, by the responses (above) and by the weights (below)."""
    panels = [
        (f"gradient by {name}", "layer index", measured)
        for name, measured in (("response", by_response), ("weights", by_weights))
    ]
    return _draw_layers(*panels, yscale="log")


def _draw_layers(*panels: tuple[str, str, Sequence[Responses]], yscale: str = "linear") -> Any:
    """Draw panels of values by layer, one above the other; plain nets dashed."""
    with plain_matplotlib():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 6.4))
        rows = figure.subplots(len(panels), 1)
        for axes, (ylabel, xlabel, measured) in zip(rows, panels, strict=True):
            for net, at in dict.fromkeys((one.net, one.iteration) for one in measured):
                runs = [one for one in measured if (one.net, one.iteration) == (net, at)]
                style = {"color": colour(net), "linewidth": 1.6, "linestyle": "--" if net.startswith("plain") else "-"}
                one_length = all(one.finished and one.iteration == at for one in measured if one.net == net)
                name = net if one_length else f"{net}, iteration {at:,}"
                _line(axes, range(1, len(runs[0].stds) + 1), [one.stds for one in runs], **style, label=name)
            axes.set(xlabel=xlabel, ylabel=ylabel, yscale=yscale)
            axes.xaxis.set_major_locator(_ticks())
            if yscale == "linear":
                axes.set_ylim(bottom=0)
            else:
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
        rows[0].legend(loc="best", ncols=2)
    return figure


def draw(pictures: Sequence[Picture], out: Path) -> list[Picture]:
    """Draw into `out` and return the pictures that could be drawn; warn of each other one."""

    def done(one: Picture) -> bool:
        path = out / one.name
        return curves.attempt(lambda: save(one.draw(), path), path, of_run=False)

    return [one for one in pictures if done(one)]


def save(figure: Any, path: Path) -> None:
    """Write `path`.png and .svg, whole or not at all; equal figures give equal files. Raises OSError."""
    import matplotlib

    with plain_matplotlib():
        matplotlib.rcParams["text.parse_math"] = True  # ticks are made now, and those of a logarithmic axis are powers
        for kind, more in (("png", {}), ("svg", {"metadata": {"Date": None}, "transparent": True})):
            curves.save(figure, path.with_name(f"{path.name}.{kind}"), dpi=130, **more)


def thinned(points: Sequence[Point], most: int = 250) -> list[Point]:
    """Every k-th point of a curve and the last, about `most` of them."""
    step = math.ceil(len(points) / most) or 1
    return [*points[:-1:step], *points[-1:]]


def axis_limits(runs: list[Run]) -> tuple[float, float, str]:
    """The paper's limits of the error axis if the curves end within them; else wider ones, and words that say so."""
    low, high = AXES[runs[0].family] if runs[0].published else (0.0, 10.0)
    ends = [points[-1][1] for run in runs for points in run.curves.values() if points]
    worst, least = max(ends), min(ends)
    if worst < high and least >= low and runs[0].published:
        return low, high, ""
    top = min(100.0, 10 * math.ceil(max(1.6 * worst, high) / 10))
    bottom = low if least >= low else 0.0
    return bottom, top, f"; axis to {top:g} %, the paper's is {low:g} to {high:g} %" if runs[0].published else ""
