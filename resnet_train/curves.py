"""Error curves of runs as a picture. Needs no torch."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; half a line at the end, of a run that is being written, is left out."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


@contextlib.contextmanager
def plain_matplotlib() -> Iterator[None]:
    """matplotlib for files only: no display, none of the user's settings, and text is text (`a$_$b` no mathematics)."""
    asked = os.environ.pop("MPLBACKEND", None)  # read at the first import, which fails for one that there is not
    try:
        import matplotlib
    finally:
        if asked is not None:
            os.environ["MPLBACKEND"] = asked
    with matplotlib.rc_context(), warnings.catch_warnings():
        matplotlib.rcdefaults()
        matplotlib.rcParams["text.parse_math"] = False
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a box stands for it
        yield


def attempt(draw: Callable[[], None], path: Path) -> bool:
    """Draw the picture `path`, and say whether that was done: where it cannot be, that is a warning and no more."""
    try:
        draw()
    except Exception as error:  # whatever matplotlib raises: all that counts is on disk
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        print(f"warning: {path}: cannot be drawn ({reason}); resnet-report {path.parent} draws it", flush=True)
        return False
    return True


def draw(
    runs: dict[str, list[dict[str, Any]]], title: str, path: Path, reference: tuple[str, float] | None = None
) -> None:
    """Error over iterations as in figure 6: training dashed, test bold, validation dotted, a colour for each run.

    `runs` are metrics by name; `reference` (its source and an error in %) is a grey line.
    """
    with plain_matplotlib():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        highest = 0.0
        for number, (name, metrics) in enumerate(runs.items()):
            for split, line, width in (("train", "--", 1.0), ("val", ":", 1.5), ("test", "-", 2.4)):
                points = [(point["iteration"], point["error"]) for point in metrics if point["split"] == split]
                if points:
                    label = f"{name} {split} error, last {points[-1][1]:.2f} %"
                    axes.plot(*zip(*points, strict=True), line, color=f"C{number}", linewidth=width, label=label)
                    highest = max(highest, *(error for _, error in points))
        if reference:
            axes.axhline(reference[1], color="grey", linewidth=1, label=f"{reference[0]} {reference[1]} %")
        axes.set(xlabel="iteration", ylabel="error (%)", title=_text(title), ylim=(0, min(100, highest * 1.05) or 1))
        axes.grid(alpha=0.3)
        axes.legend()
        _save(figure, path)


def draw_detection(metrics: list[dict[str, Any]], title: str, path: Path) -> None:
    """The training loss of a detector and its mAP on the test, by three rules, over iterations."""
    with plain_matplotlib():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.subplots()
        test = [line for line in metrics if line["split"] == "test"]
        for name, label in (("map07", "VOC 2007"), ("map10", "VOC 2010"), ("map", "COCO @[.5,.95]")):
            points = [(line["iteration"], line[name]) for line in test]
            axes.plot(*zip(*points, strict=True), "o-", label=f"{label}, last {points[-1][1]:.2f} %")
        axes.set(xlabel="iteration", ylabel="mAP (%), test", title=_text(title), ylim=(0, 100))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")
        train = [(line["iteration"], line["loss"]) for line in metrics if line["split"] == "train"]
        losses = axes.twinx()
        if train:  # else the record of them was lost
            losses.plot(*zip(*train, strict=True), "--", color="grey", linewidth=1)
        losses.set(ylabel="training loss (dashed)", ylim=(0, None))
        _save(figure, path)


def _text(words: str) -> str:
    """`words` with what no font shows escaped, but for the ends of lines."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in words)


def _save(figure: Any, path: Path) -> None:
    """Write a picture whole or not at all."""
    part = path.with_name(f".{path.name}")
    try:
        figure.savefig(part, format="png", dpi=120)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
