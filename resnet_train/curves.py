"""The picture of one run's error curves. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; half a line at the end, of a run that is being written, is left out."""
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def draw(metrics: list[dict[str, Any]], title: str, path: Path, reference: tuple[str, float] | None = None) -> None:
    """Error over iterations as in figure 6: training dashed, test bold, validation thin; `reference` a grey line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    styles = {"train": ("--", 1.2), "val": ("-", 1.2), "test": ("-", 2.4)}
    for split, (line, width) in styles.items():
        points = [(point["iteration"], point["error"]) for point in metrics if point["split"] == split]
        if points:
            label = f"{split} error, last {points[-1][1]:.2f} %"
            colour = "C1" if split == "val" else "C0"
            axes.plot(*zip(*points, strict=True), line, color=colour, linewidth=width, label=label)
    if reference:
        axes.axhline(reference[1], color="grey", linewidth=1, label=f"{reference[0]} {reference[1]} %")
    axes.set(xlabel="iteration", ylabel="error (%)", title=title)
    highest = max((point["error"] for point in metrics), default=100)
    axes.set_ylim(0, min(100, highest * 1.05))
    axes.grid(alpha=0.3)
    axes.legend()
    part = path.with_name(f".{path.name}")
    figure.savefig(part, format="png", dpi=150)
    part.replace(path)
