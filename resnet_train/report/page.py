"""The report as one HTML page that needs no other file and no network, and as Markdown."""

from __future__ import annotations

import base64
import html
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resnet_train.report.figures import thinned
from resnet_train.report.runs import Run
from resnet_train.report.tables import NOTHING, Table


@dataclass
class Section:
    """What is said of runs that may stand together, or of all."""

    title: str
    warnings: list[str] = field(default_factory=list)  # in large letters
    words: list[str] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)  # for the interactive plot
    figures: list[tuple[str, str]] = field(default_factory=list)  # file name without suffix, caption
    tables: list[Table] = field(default_factory=list)
    commands: list[tuple[str, str]] = field(default_factory=list)  # run, and the command that made its curves


STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 68rem; margin: 0 auto;
  padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
.warning { font-size: 1.35rem; line-height: 1.3; font-weight: 800; color: #8a1c00; background: #fff1e6;
  border-left: .4rem solid #d9480f; padding: .5rem .8rem; margin: .8rem 0; }
.scroll { overflow-x: auto; margin: 0 0 .4rem; } table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
td.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td:first-child { white-space: nowrap; } .commands li { margin-bottom: .5rem; font-size: .9rem; }
ul { padding-left: 1.2rem; } .notes { font-size: .85rem; color: #444; margin-top: 0; }
figure { margin: 1rem 0; overflow-x: auto; } figure img { max-width: 100%; min-width: min(100%, 60rem); height: auto; }
figcaption { font-size: .85rem; color: #444; }
code { font: .85em ui-monospace, monospace; overflow-wrap: anywhere; }
@media (max-width: 30rem) { body { padding: .6rem; } .warning { font-size: 1.15rem; } h1 { font-size: 1.35rem; }
  figure img { max-width: none; width: 40rem; } }
@media print { body { max-width: none; font-size: 10pt; } h2, h3 { break-after: avoid; } .screen { display: none; }
  figure, tr, .warning { break-inside: avoid; } .scroll { overflow: visible; } table { font-size: 7.5pt; }
  figure img { min-width: 0; max-width: 100%; } }
"""


def html_page(title: str, intro: list[str], sections: list[Section], out: Path) -> str:
    """The page, with the figures in `out` inside it."""
    from bokeh.embed import components
    from bokeh.resources import Resources

    plots = {section.title: plot(section.runs) for section in sections if section.runs}
    script, places = components(plots) if plots else ("", {})
    library = Resources(mode="inline", components=["bokeh"]).render() if plots else ""
    body = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{_text(words)}</p>" for words in intro)]
    for section in sections:
        body.append(f"<section><h2>{html.escape(section.title)}</h2>")
        body += [f'<p class="warning">{html.escape(words)}</p>' for words in section.warnings]
        body.append("<ul>" + "".join(f"<li>{_text(words)}</li>" for words in section.words) + "</ul>")
        if section.title in places:
            hint = "A click on a name hides a run or shows it again; the pointer, or a finger, reads off values."
            hint += "" if all(run.finished for run in section.runs) else " … marks a run that is not finished."
            body.append(f'<div class="screen"><p>{hint}</p>{places[section.title]}</div>')
        body += [_figure(out, name, caption) for name, caption in section.figures]
        body += [_table(table) for table in section.tables]
        if section.commands:
            lines = (
                f"<li>{html.escape(run)}<br><code>{html.escape(made)}</code></li>" for run, made in section.commands
            )
            body.append(f'<h3>The command of each curve</h3><ul class="commands">{"".join(lines)}</ul>')
        body.append("</section>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    text = [f'<!DOCTYPE html>\n<html lang="en"><head>{head}<title>{html.escape(title)}</title>', library]
    return "\n".join([*text, f"<style>{STYLE}</style></head><body>", *body, script, "</body></html>\n"])


def plot(runs: list[Run]) -> Any:
    """Training (dashed), validation (dotted) and test error over iterations, a colour for each run."""
    from bokeh.models import ColumnDataSource, HoverTool, NumeralTickFormatter, Range1d
    from bokeh.models.annotations import Legend, LegendItem
    from bokeh.palettes import Category20_20
    from bokeh.plotting import figure

    highest = max(point[1] for run in runs for curve in run.curves.values() for point in curve)
    # Nothing is dragged unless a tool is chosen, so that a finger on the plot still scrolls the page.
    canvas = figure(
        height=430 + 21 * math.ceil(len(runs) / 2),  # the legend is a part of it
        sizing_mode="stretch_width",
        tools="box_zoom,pan,reset,save",
        active_drag=None,
        toolbar_location="above",
        x_axis_label="iteration",
        y_axis_label="error (%)",
        y_range=Range1d(start=0, end=min(100, 1.05 * highest)),
    )
    canvas.xaxis.formatter = NumeralTickFormatter(format="0,0")
    items = []
    order = [2 * number % 20 + (number >= 10) for number in range(20)]  # the palette's strong colours first
    for number, run in enumerate(runs):
        colour = Category20_20[order[number % 20]]
        lines: list[Any] = []
        name = f"{run.net}, seed {run.seed}" + ("" if run.finished else " …")
        for split, dash, width in (("train", "dashed", 1.0), ("val", "dotted", 1.5), ("test", "solid", 2.5)):
            points = thinned(run.curves[split])
            columns = {
                "iteration": [iteration for iteration, _, _ in points],
                "error": [round(error, 4) for _, error, _ in points],
            }
            line = canvas.line(
                "iteration", "error", source=ColumnDataSource(columns), color=colour, line_dash=dash, line_width=width
            )
            tips = [("run", name), ("split", split), ("iteration", "@iteration{0,0}"), ("error", "@error{0.00} %")]
            canvas.add_tools(HoverTool(renderers=[line], tooltips=tips, visible=False, line_policy="nearest"))
            lines.append(line)
        items.append(LegendItem(label=name, renderers=lines))
    legend = Legend(
        items=items, click_policy="hide", ncols=2, label_text_font_size="12px", spacing=0, border_line_color=None
    )
    canvas.add_layout(legend, "below")
    return canvas


def markdown(title: str, intro: list[str], sections: list[Section]) -> str:
    """The same without the plot, with links to the figures' files."""
    lines = [f"# {title}", "", *(f"{words}\n" for words in intro)]
    for section in sections:
        lines += [f"## {section.title}", "", *(f"# **{words}**\n" for words in section.warnings)]
        lines += [*(f"- {words}" for words in section.words), ""]
        lines += [f"![{caption}]({name}.png)\n" for name, caption in section.figures]
        lines += [table.markdown() for table in section.tables]
        if section.commands:
            lines += ["### The command of each curve", ""]
            lines += [*(f"- {run}: `{made}`" for run, made in section.commands), ""]
    return "\n".join(lines)


def _text(words: str) -> str:
    """Escaped, with `code` as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(words, quote=False))


def _figure(out: Path, name: str, caption: str) -> str:
    data = base64.b64encode((out / f"{name}.svg").read_bytes()).decode()
    said = html.escape(caption)
    return f'<figure><img alt="{said}" src="data:image/svg+xml;base64,{data}"><figcaption>{said}</figcaption></figure>'


def _table(table: Table) -> str:
    def cell(text: str) -> str:
        kind = "number" if text == NOTHING or re.match(r"[-+]?[\d,.]+( ±.*| \(n=\d+\).*)?$", text) else ""
        return f'<td class="{kind}">{html.escape(text)}</td>' if kind else f"<td>{html.escape(text)}</td>"

    head = "".join(f"<th>{html.escape(word)}</th>" for word in table.header)
    rows = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in table.shown())
    notes = "".join(f"<li>{_text(note)}</li>" for note in table.notes)
    return (
        f'<h3 id="{table.name}">{html.escape(table.title)}</h3>'
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f'<tbody>{rows}</tbody></table></div><ul class="notes">{notes}</ul>'
    )
