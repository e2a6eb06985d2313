"""The page of a net's mistakes, with figures by matplotlib. Needs no torch."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from resnet_train.report import figures
from resnet_train.report.curves import plain_matplotlib
from resnet_train.report.figures import Picture
from resnet_train.report.page import Section, Tile, html_page
from resnet_train.report.tables import Table
from resnet_train.report.values import escape_and_clip
from resnet_train.terminal import format_share

MOST = 40  # mistakes that are shown as pictures
FEW = 40  # classes with a row and a bar each; if there are more, the worst
SQUARES = 25  # classes whose confusion is drawn
COLOUR = "#2b7bd0"
Counts = npt.NDArray[np.int64]  # (K, K): by label and answer


@dataclass(frozen=True)
class Mistake:
    """An image, its label, the answer and its probability, from 0 to 1, and the image's name."""

    tile: Tile
    label: str
    answer: str
    probability: float
    name: str


def classes_table(classes: Sequence[str], confusion: Counts) -> Table:
    """The error of each class, None without images, and the class it is most often taken for."""
    header = ["class", "images", "wrong", "error (%)", "most often taken for", "times"]
    table = Table("classes", "The error of each class", header)
    others = _mistaken(confusion)
    counts = [confusion.sum(1), others.sum(1), others.argmax(1), others.max(1)]
    for name, images, wrong, other, most in zip(classes, *(count.tolist() for count in counts), strict=True):
        table.rows.append([name, images, wrong, 100 * wrong / images if images else None])
        table.rows[-1] += [classes[other], most] if most else [None, None]
    return table


def _mistaken(confusion: Counts) -> Counts:
    """`confusion` without the right answers."""
    return confusion - np.diag(confusion.diagonal())


def confusion_table(classes: Sequence[str], confusion: Counts) -> Table:
    """How often each class was given each answer; only pairs that occur, as few of 1,000 classes' million pairs do."""
    table = Table("confusion", "What was taken for what", ["label", "prediction", "images"])
    for label, answer in np.argwhere(confusion).tolist():
        table.rows.append([classes[label], classes[answer], int(confusion[label, answer])])
    return table


def pairs_table(classes: Sequence[str], confusion: Counts) -> Table:
    """Which class is taken for which, the most frequent first."""
    others, images = _mistaken(confusion), confusion.sum(1)
    pairs = np.argwhere(others)  # by label, then answer
    most = pairs[np.argsort(-others[tuple(pairs.T)], kind="stable")][:FEW]
    table = Table("pairs", "What is taken for what", ["label", "answer", "times", "of its label (%)"])
    for label, answer in most.tolist():
        times = int(others[label, answer])
        table.rows.append([classes[label], classes[answer], times, 100 * times / int(images[label])])
    if len(pairs) > FEW:
        table.notes.append(f"The {FEW} most frequent of {len(pairs):,} pairs.")
    return table


def page(
    title: str,
    result: dict[str, Any],
    files: Sequence[str],
    classes: Sequence[str],
    confusion: Counts,
    pictures: Sequence[Mistake],
) -> str:
    """The page as HTML that needs no other file. `files`: the names of the files beside it, predictions first."""
    table = classes_table(classes, confusion)
    intro = [
        f"{escape_and_clip(result['protocol'])}; batch norm with {escape_and_clip(result['batch_norm'])}; computed in"
        f" {result['precision']}. Error {result['error']:.2f} %: {result['wrong']:,} of {result['seen']:,} images"
        " wrong."
    ]
    intro.append(f"All of it, beside this page: {', '.join(f'`{escape_and_clip(name)}`' for name in files[:-1])}.")
    sure = Section("Where it is surest and wrong")
    sure.words = [
        "There is no mistake."
        if not pictures
        else f"The {len(pictures)} mistakes with the highest probability, as the net sees them: the label, what the net"
        " says and how sure it is, and the image's name, or its index where it has none."
    ]
    sure.gallery = [
        dataclasses.replace(
            one.tile, lines=(one.label, f"taken for {one.answer}, {format_share(one.probability)}", one.name)
        )
        for one in pictures
    ]
    errors = Section("Classes", figures=[_figure_of_errors(table)] if any(row[1] for row in table.rows) else [])
    errors.tables = [_worst(table)]
    taken = Section("Confusion", tables=[pairs_table(classes, confusion)])
    if len(classes) <= SQUARES:
        caption = "How often each class (row) is given each answer (column), in % of the class's images."
        taken.figures = [Picture("confusion", caption, lambda: _draw_confusion(classes, confusion))]
    sections = [sure, errors, taken]
    with tempfile.TemporaryDirectory() as folder:
        for section in sections:
            section.figures = figures.draw(section.figures, Path(folder))
        return html_page(title, intro, sections, Path(folder))


def _worst(table: Table) -> Table:
    """At most FEW rows of the table, the highest error first."""
    rows = sorted(table.rows, key=lambda row: -(row[3] if isinstance(row[3], float) else -1))
    notes = [f"The {FEW} with the highest error of {len(rows):,} classes."] if len(rows) > FEW else []
    return dataclasses.replace(table, rows=rows[:FEW], notes=notes)


def _figure_of_errors(table: Table) -> Picture:
    """A bar for each class, or a histogram of the errors of many classes."""
    rows = [(str(row[0]), float(row[3])) for row in table.rows if isinstance(row[3], float)]
    if len(rows) <= FEW:
        return Picture("classes", "The error of each class, the highest on top.", lambda: _draw_bars(rows))
    return Picture("classes", "How many classes have which error.", lambda: _draw_histogram([e for _, e in rows]))


def _draw_bars(rows: list[tuple[str, float]]) -> Any:
    with plain_matplotlib():
        from matplotlib.figure import Figure

        rows = sorted(rows, key=lambda row: row[1])
        figure = Figure(figsize=(7, 1.2 + 0.28 * len(rows)))
        axes = figure.subplots()
        bars = axes.barh(range(len(rows)), [error for _, error in rows], color=COLOUR)
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
        axes.set_yticks(range(len(rows)), [_short(name) for name, _ in rows])
        axes.set(xlabel="error (%)", xlim=(0, 1.1 * max(error for _, error in rows) or 1))
        axes.grid(False, axis="y")
    return figure


def _draw_histogram(errors: list[float]) -> Any:
    with plain_matplotlib():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 3.6))
        axes = figure.subplots()
        axes.hist(errors, bins=[5 * edge for edge in range(21)], color=COLOUR, edgecolor="white")
        axes.set(xlabel="error of a class (%)", ylabel="classes", xlim=(0, 100))
    return figure


def _draw_confusion(classes: Sequence[str], confusion: Counts) -> Any:
    with plain_matplotlib():
        from matplotlib.figure import Figure

        shares = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
        figure = Figure(figsize=(2.4 + 0.55 * len(classes), 1.8 + 0.5 * len(classes)))
        axes = figure.subplots()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        for (label, answer), share in np.ndenumerate(shares):
            if share >= 0.05:
                colour = "white" if share > 50 else "black"
                axes.text(answer, label, f"{share:.1f}", ha="center", va="center", fontsize=8, color=colour)
        names = [_short(name) for name in classes]
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="answer", ylabel="label")
        axes.grid(False)
    return figure


def _short(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:27]}…"
