"""Error curves of runs as a picture, and the style of all pictures. Needs no torch."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from resnet_train.files import replacing
from resnet_train.terminal import printable, say

Point = tuple[int, float, float | None]  # iteration, top-1 and top-5 error in %
# A net has one colour in every figure: warm for plain nets, cold for residual ones, darker for deeper ones.
PLAIN = {18: "#e8890c", 20: "#e8890c", 32: "#ec6b2d", 34: "#b3202c", 44: "#c92f2f", 56: "#7d1128"}
RESIDUAL = {18: "#35a853", 20: "#35a853", 32: "#12a5a5", 34: "#2b7bd0", 44: "#2b7bd0", 50: "#5b3fc4", 56: "#2f3fa8"}
RESIDUAL |= {101: "#a03ccf", 110: "#a03ccf", 152: "#3a3a3a", 1202: "#3a3a3a"}
OTHERS = ("#8c6d31", "#4c8c9b", "#5a8a3a", "#6b6ecf", "#b5651d", "#d6509a", "#00707a")  # by depth
# A curve of a single point makes no line: a ring is its training error, a cross its validation, a dot its test error.
MARKS: dict[str, dict[str, Any]] = {
    "train": {"marker": "o", "markersize": 12, "markerfacecolor": "none", "markeredgewidth": 2},
    "val": {"marker": "x", "markersize": 9, "markeredgewidth": 2},
    "test": {"marker": "o", "markersize": 6},
}
# `$` in a name begins no formula, and equal figures give equal files.
STYLE: Any = {"text.parse_math": False, "svg.hashsalt": "resnet-train", "font.size": 12}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
STYLE |= {"legend.frameon": False, "legend.fontsize": 10, "figure.constrained_layout.use": True}


def colour(net: str) -> str:
    """The colour of a net by its name, such as plain-56 or resnet-110-A; for any other name the first of OTHERS."""
    kind, _, rest = net.partition("-")
    depth, _, shortcut = rest.partition("-")
    if not depth.isdecimal():
        return OTHERS[0]
    colours = PLAIN if kind == "plain" else RESIDUAL
    other = OTHERS[(int(depth) // 2 + ord(shortcut[:1] or "A")) % len(OTHERS)]
    return colours.get(int(depth), other) if kind == "plain" or shortcut == "A" or int(depth) >= 50 else other


def mark(split: str, points: Sequence[object]) -> dict[str, Any]:
    """The options of matplotlib that make a curve of a single point visible; none for other curves."""
    return MARKS[split] if len(points) == 1 else {}


def edges(points: Sequence[Point], most: int = 250) -> list[float]:
    """The edges of equal intervals of a training curve from 0 to its last iteration, one per point, at most `most`."""
    count = min(most, len(points))
    return [points[-1][0] * number / count for number in range(count + 1)]


def interval_means(points: Sequence[Point], ends: Sequence[float]) -> list[float]:
    """The mean error of a training curve between neighbouring `ends`.

    A point is the mean since the point before it, and is weighted by these iterations.
    """
    import numpy as np

    at = np.array([0, *(iteration for iteration, *_ in points)], float)
    sums = np.cumsum([0, *np.diff(at) * [error for _, error, *_ in points]])
    return list(np.diff(np.interp(ends, at, sums)) / np.diff(ends))


@contextlib.contextmanager
def plain_matplotlib() -> Iterator[None]:
    """Use matplotlib without a display, without the user's settings, and with text as it is (`a$_$b` is no formula)."""
    backend = os.environ.pop("MPLBACKEND", None)  # read at the first import, which fails for an unknown one
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a box is drawn instead
        yield


def attempt(draw: Callable[[], object], path: Path, *, of_run: bool = True) -> bool:
    """Call `draw`, which writes the picture `path`, and return whether it succeeded; an error becomes a warning.

    `of_run`: whether the picture is in a run's folder, so that resnet-report can draw it later.
    """
    try:
        draw()
    except Exception as error:  # of any kind: the results are on disk already
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        later = f"; resnet-report {shlex.quote(str(path.parent))} draws it" if of_run else ""
        say(f"warning: {path}: cannot be drawn ({reason}){later}")
        return False
    return True


def mean_and_std(values: list[float]) -> tuple[float, float | None]:
    """The mean and the sample standard deviation (n - 1), which is None for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def draw(
    runs: dict[str, list[dict[str, Any]]], title: str, path: Path, reference: tuple[str, float] | None = None
) -> None:
    """Error over iterations as in figure 6: training dashed, test bold, validation dotted, a colour for each run.

    A single point is drawn as in MARKS.

    `runs`: metrics by name; `reference`: its source and an error in %, drawn as a grey line.
    """
    with plain_matplotlib():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        highest = 0.0
        for name, metrics in runs.items():
            for split, line, width in (("train", "--", 1.0), ("val", ":", 1.5), ("test", "-", 2.4)):
                points = [(point["iteration"], point["error"], None) for point in metrics if point["split"] == split]
                if points:
                    label = f"{name} {split} error, last {points[-1][1]:.2f} %"
                    xs, ys = [at for at, *_ in points], [error for _, error, _ in points]
                    if split == "train":
                        xs, ys = edges(points)[1:], interval_means(points, edges(points))
                    axes.plot(xs, ys, line, color=colour(name), linewidth=width, label=label, **mark(split, xs))
                    highest = max(highest, *ys)
        if reference:
            axes.axhline(reference[1], color="grey", linewidth=1, label=f"{reference[0]} {reference[1]} %")
        axes.set(xlabel="iteration", xlim=(0, None), title=_text(title))
        axes.locator_params(axis="x", integer=True)
        axes.set(ylabel="error (%)", ylim=(0, min(100, highest * 1.05) or 1))
        axes.legend()
        save(figure, path, dpi=120)


def draw_detection(metrics: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draw a detector's training loss and its test mAP, by each rule, over iterations."""
    with plain_matplotlib():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        test = [line for line in metrics if line["split"] == "test"]
        rules = {"map07": "VOC 2007", "map10": "VOC 2010", "map": "COCO @[.5,.95]", "mask_map": "COCO, of masks"}
        for name, label in rules.items():
            points = [(line["iteration"], line[name]) for line in test if name in line]
            if points:
                axes.plot(*zip(*points, strict=True), "o-", label=f"{label}, last {points[-1][1]:.2f} %")
        axes.set(xlabel="iteration", ylabel="mAP (%), test", title=_text(title), ylim=(0, 100))
        axes.legend(loc="upper left")
        train = [(line["iteration"], line["loss"]) for line in metrics if line["split"] == "train"]
        losses = axes.twinx()
        losses.grid(False)
        if train:  # empty if the metrics were lost
            losses.plot(*zip(*train, strict=True), "--", color="grey", linewidth=1, **mark("train", train))
        losses.set(ylabel=f"training loss ({'ring' if len(train) == 1 else 'dashed'})", ylim=(0, None))
        save(figure, path, dpi=120)


def _text(words: str) -> str:
    """`words` with unprintable characters escaped, except line ends."""
    return "\n".join(map(printable, words.split("\n")))


def save(figure: Any, path: Path, **options: Any) -> None:
    """Write a picture in the format of its suffix, whole or not at all."""
    with replacing(path) as part:
        figure.savefig(part, format=path.suffix[1:], **options)
