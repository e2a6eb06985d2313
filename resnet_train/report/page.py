"""The report as Markdown and as one HTML page, which needs no other file and no network.

Every string comes from a run's files or from a command line, and is escaped where it enters the page.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resnet_train.report.curves import colour, edges, interval_means
from resnet_train.report.figures import Picture, axis_limits, explain_points, thinned
from resnet_train.report.runs import Run
from resnet_train.report.tables import NOTHING, Table
from resnet_train.report.values import escape_and_clip

# Of the plot, see curves.MARKS.
POINTS: dict[str, dict[str, Any]] = {
    "train": {"size": 15, "fill_color": None},
    "val": {"size": 11, "marker": "x"},
    "test": {"size": 8},
}


@dataclass(frozen=True)
class Tile:
    """A picture of a gallery, with lines of text below it."""

    content: bytes
    kind: str  # png or jpeg
    small: bool  # enlarged, with pixels as squares
    lines: tuple[str, ...] = ()


@dataclass
class Section:
    """A section of the report: of one group of comparable runs, or of all."""

    title: str
    warnings: list[str] = field(default_factory=list)  # in large letters
    words: list[str] = field(default_factory=list)
    verdict: Table | None = None
    runs: list[Run] = field(default_factory=list)  # for the interactive plot
    gallery: list[Tile] = field(default_factory=list)
    figures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    commands: list[tuple[str, str]] = field(default_factory=list)  # run, and its command
    links: list[tuple[str, str]] = field(default_factory=list)  # to pages of mistakes: text and URL


# Dark mode inverts pictures: white becomes the page's colour, and hues stay. What is wider than the screen scrolls in a
# box of its own, with shadows at the edges that hide more.
STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1a1a1a; --soft: #555; --line: #ddd; --shadow: #0005; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 68rem;
  margin: 0 auto; padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.warning { font-size: 1.2rem; line-height: 1.3; font-weight: 700; color: #8a1c00; background: #fff1e6;
  border-left: .4rem solid #d9480f; padding: .5rem .8rem; margin: .8rem 0; }
.scroll { overflow-x: auto; background: linear-gradient(to right, var(--page) 30%, transparent) left,
  linear-gradient(to left, var(--page) 30%, transparent) right,
  radial-gradient(farthest-side at 0 50%, var(--shadow), transparent) left,
  radial-gradient(farthest-side at 100% 50%, var(--shadow), transparent) right;
  background-size: 3rem 100%, 3rem 100%, 1rem 100%, 1rem 100%; background-repeat: no-repeat;
  background-attachment: local, local, scroll, scroll; }
table { border-collapse: collapse; font-size: .88rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { vertical-align: bottom; } th button { font: inherit; color: inherit; background: none; border: 0; padding: 0;
  text-align: inherit; cursor: pointer; } th button::after { content: "\\a0↕"; color: var(--soft); }
th[aria-sort=ascending] button::after { content: "\\a0↑"; }
th[aria-sort=descending] button::after { content: "\\a0↓"; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
td:not(.number, .short) { min-width: 8rem; }
td.number, td.short, td:first-child { white-space: nowrap; } details li { margin-bottom: .5rem; font-size: .9rem; }
ul { padding-left: 1.2rem; } .notes { font-size: .85rem; color: var(--soft); margin-top: .4rem; }
figure { margin: 1.5rem 0; } figure img { display: block; max-width: 100%; height: auto; }
figcaption { font-size: .9rem; color: var(--soft); }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: 1rem; }
.gallery img { display: block; width: 100%; } .gallery img.small { image-rendering: pixelated; }
.gallery p { font-size: .85rem; line-height: 1.35; margin: .3rem 0 0; overflow-wrap: anywhere; }
code { font: .85em ui-monospace, monospace; overflow-wrap: anywhere; } summary { cursor: pointer; font-weight: 600; }
@media (max-width: 48rem) { body { padding: .6rem; } h1 { font-size: 1.35rem; } figure img { max-width: none; }
  figure img { width: calc(.68 * var(--width)); } }
@media (prefers-color-scheme: dark) { :root { --page: #121212; --text: #ededed; --soft: #b0b0b0; --line: #3a3a3a;
  --shadow: #fff6; } .warning { color: #ffb38a; background: #2b1608; }
  figure img, .invert { filter: invert(.93) hue-rotate(180deg); } }
@media print { body { max-width: none; font-size: 10pt; } h2, h3 { break-after: avoid; } .plot { display: none; }
  figure, tr, .warning { break-inside: avoid; } .scroll { overflow: visible; } table { font-size: 7.5pt; }
  figure img { max-width: 100%; } }
"""

# A click on the head of a column sorts by it, a second one in reverse; empty cells stay last.
SORT = """
for (const button of document.querySelectorAll('th button')) button.addEventListener('click', () => {
  const head = button.parentElement, body = head.closest('table').tBodies[0], column = head.cellIndex;
  const direction = head.ariaSort === 'ascending' ? -1 : 1, text = (row) => row.cells[column].textContent;
  const value = (row) => parseFloat(text(row).replaceAll(',', ''));
  const compare = (a, b) => isNaN(value(a)) || isNaN(value(b)) || !a.cells[column].classList.contains('number')
    ? text(a).localeCompare(text(b), undefined, { numeric: true }) : value(a) - value(b);
  const last = (row) => text(row) === 'NOTHING';
  const rows = [...body.rows].sort((a, b) => last(a) - last(b) || direction * compare(a, b));
  for (const other of head.parentElement.cells) other.removeAttribute('aria-sort');
  head.ariaSort = direction > 0 ? 'ascending' : 'descending';
  body.append(...rows);
});
""".replace("NOTHING", NOTHING)


def html_page(title: str, intro: list[str], sections: list[Section], out: Path) -> str:
    """The page, with the figures of the folder `out` embedded."""
    library, script, plots = _plots(sections)
    body = [f"<h1>{html.escape(title)}</h1>", *(f"<p>{_to_html(words)}</p>" for words in intro)]
    for number, section in enumerate(sections):
        body.append(f"<section><h2>{html.escape(section.title)}</h2>")
        body += [f'<p class="warning">{html.escape(words)}</p>' for words in section.warnings]
        body += [f"<p>{_to_html(words)}</p>" for words in section.words]
        body += [_table(section.verdict)] if section.verdict else []
        body += [f'<div class="gallery">{"".join(map(_tile, section.gallery))}</div>'] if section.gallery else []
        body += [_figure(out, one.name, one.caption) for one in section.figures]
        if str(number) in plots:
            hint = "Every run: training error dashed, validation dotted, test bold"
            hint += explain_points(section.runs, ("train", "val", "test"))
            hint += ". A click on a name hides a net or shows it again; the pointer, or a finger, reads off values."
            body.append(
                f'<div class="plot"><p class="notes">{hint}</p><div class="invert">{plots[str(number)]}</div></div>'
            )
        body += [_table(table) for table in section.tables]
        if section.links:
            items = (f'<li><a href="{html.escape(url)}">{html.escape(text)}</a></li>' for text, url in section.links)
            body.append(f"<h3>What they get wrong</h3><ul>{''.join(items)}</ul>")
        if section.commands:
            lines = (
                f"<li>{html.escape(run)}<br><code>{html.escape(command)}</code>" for run, command in section.commands
            )
            body.append(f"<details><summary>The command of each curve</summary><ul>{''.join(lines)}</ul></details>")
        body.append("</section>")
    scripts = f"{library}{script}<script>{SORT}</script>"
    # A browser runs these scripts and no others, and loads nothing from the network.
    hashes = [
        hashlib.sha256(text.encode()).digest() for text in re.findall(r"(?s)<script[^>]*>(.*?)</script>", scripts)
    ]
    allowed = " ".join(f"'sha256-{base64.b64encode(one).decode()}'" for one in hashes)
    policy = f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
    head += f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
    text = [f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head><body>', *body, scripts]
    return "\n".join([*text, "</body></html>\n"])


def _plots(sections: list[Section]) -> tuple[str, str, dict[str, str]]:
    """Bokeh's library, the script of the interactive plots, and each plot's HTML by the number of its section."""
    runs = {str(number): section.runs for number, section in enumerate(sections) if section.runs}
    if not runs:
        return "", "", {}
    from bokeh.embed import components
    from bokeh.resources import Resources

    script, plots = components({number: plot(group) for number, group in runs.items()})
    return Resources(mode="inline", components=["bokeh"]).render(), script, plots


def plot(runs: list[Run]) -> Any:
    """Training (dashed), validation (dotted) and test error over iterations of every run, a colour for each net."""
    from bokeh.models import BasicTicker, ColumnDataSource, DataRange1d, HoverTool, NumeralTickFormatter, Range1d
    from bokeh.models.annotations import Legend, LegendItem
    from bokeh.plotting import figure

    nets = list(dict.fromkeys(run.net for run in runs))
    # No tool is active at first, so that a finger on the plot scrolls the page.
    canvas = figure(
        height=420 + 24 * math.ceil(len(nets) / 2),  # the legend is a part of it
        sizing_mode="stretch_width",
        tools="box_zoom,pan,reset,save",
        active_drag=None,
        toolbar_location="above",
        x_axis_label="iterations",
        y_axis_label="error (%)",
        x_range=DataRange1d(start=0),
        y_range=Range1d(start=0, end=axis_limits(runs)[1]),
    )
    canvas.toolbar.logo = None
    canvas.min_border_right = 24  # for half of the last tick's label
    canvas.axis.minor_tick_line_color = None
    canvas.axis.major_label_text_font_size = canvas.axis.axis_label_text_font_size = "13px"
    canvas.xaxis.ticker = BasicTicker(desired_num_ticks=4, min_interval=1)
    canvas.xaxis.formatter = NumeralTickFormatter(format="0,0")
    lines: dict[str, list[Any]] = {net: [] for net in nets}
    for run in runs:
        for split, dash, width in (("train", "dashed", 1.2), ("val", "dotted", 1.5), ("test", "solid", 2.5)):
            points = thinned(run.curves[split])
            at, errors = [iteration for iteration, _, _ in points], [error for _, error, _ in points]
            if split == "train" and points:
                ends = edges(run.curves[split])
                at, errors = [round(end) for end in ends[1:]], interval_means(run.curves[split], ends)
            source = ColumnDataSource({"iteration": at, "error": [round(error, 4) for error in errors]})
            style: dict[str, Any] = {"source": source, "color": colour(run.net)}
            line = canvas.line("iteration", "error", **style, line_dash=dash, line_width=width)
            lines[run.net].append(line)
            if len(at) == 1:
                lines[run.net].append(canvas.scatter("iteration", "error", **style, line_width=2, **POINTS[split]))
            name = f"{run.net}, seed {run.seed}" + ("" if run.finished else ", unfinished")
            # The tooltip is HTML; the name was checked when the run was read, and is escaped nevertheless.
            tips = [("run", html.escape(name)), ("split", split), ("iteration", "@iteration{0,0}")]
            tips.append(("error", "@error{0.00} %"))
            canvas.add_tools(
                HoverTool(renderers=lines[run.net][-1:], tooltips=tips, visible=False, line_policy="nearest")
            )
    items = [LegendItem(label=net, renderers=lines[net]) for net in nets]
    legend = Legend(items=items, click_policy="hide", ncols=2, location="left", spacing=12, border_line_color=None)
    canvas.add_layout(legend, "below")
    return canvas


def markdown(title: str, intro: list[str], sections: list[Section]) -> str:
    """The report as Markdown: without the interactive plot, with links to the figures' files."""
    lines = [f"# {_to_markdown(title)}", "", *(f"{_to_markdown(words)}\n" for words in intro)]
    for section in sections:
        lines += [f"## {_to_markdown(section.title)}", ""]
        lines += [f"# **{_to_markdown(words)}**\n" for words in section.warnings]
        lines += [f"{_to_markdown(words)}\n" for words in section.words]
        lines += [markdown_table(section.verdict)] if section.verdict else []
        for one in section.figures:
            lines += [f"![{_to_markdown(one.caption)}]({one.name}.png)\n", f"{_to_markdown(one.caption)}\n"]
        lines += [markdown_table(table) for table in section.tables]
        if section.links:
            lines += ["### What they get wrong", ""]
            lines += [*(f"- [{_to_markdown(text)}]({url})" for text, url in section.links), ""]
        if section.commands:
            lines += ["<details><summary>The command of each curve</summary>", ""]
            lines += [f"- {_to_markdown(run)}: `{command}`" for run, command in section.commands]
            lines += ["", "</details>", ""]
    return "\n".join(lines)


def markdown_table(table: Table) -> str:
    """A table as Markdown, with its title and notes."""
    head, *rows = ([_to_markdown(cell) for cell in row] for row in (table.header, *table.formatted()))
    rows = [head, ["---"] * len(head), *rows]
    lines = [f"### {_to_markdown(table.title)}", "", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join([*lines, "", *(f"- {_to_markdown(note)}" for note in table.notes), ""])


def _to_markdown(words: str) -> str:
    """Escaped for Markdown, except `code`; underscores where they could begin or end emphasis."""
    parts = words.split("`")
    special = r"([\\\[\]|$*<>~]|(?<![^\W_])_|_(?![^\W_]))"
    parts[::2] = [re.sub(special, r"\\\1", part.replace("&", "&amp;")) for part in parts[::2]]
    return "`".join(parts)


def _to_html(words: str) -> str:
    """Escaped for HTML, with `code` as <code>."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(words, quote=False))


def _figure(out: Path, name: str, caption: str) -> str:
    svg = (out / f"{name}.svg").read_bytes()
    width = re.search(rb'width="([\d.]+)pt"', svg)
    style = f' style="--width: {float(width[1]):.0f}pt"' if width else ""
    description, data = html.escape(caption), base64.b64encode(svg).decode()
    picture = f'<img{style} alt="{description}" src="data:image/svg+xml;base64,{data}">'
    return f'<figure><div class="scroll">{picture}</div><figcaption>{description}</figcaption></figure>'


def _tile(tile: Tile) -> str:
    words, data = html.escape(", ".join(map(escape_and_clip, tile.lines))), base64.b64encode(tile.content).decode()
    kind = ' class="small"' if tile.small else ""
    lines = "<br>".join(html.escape(escape_and_clip(line)) for line in tile.lines)
    return f'<div><img{kind} alt="{words}" src="data:image/{tile.kind};base64,{data}"><p>{lines}</p></div>'


def _table(table: Table) -> str:
    rows = table.formatted()
    number = re.compile(rf"{NOTHING}|[-+]?[\d,.]+( [±(].*)?")
    kinds = []
    for column in zip(*rows, strict=True) if rows else [[""]] * len(table.header):
        short = ' class="short"' if max(map(len, column)) < 16 else ""
        kinds.append(' class="number"' if all(map(number.fullmatch, column)) else short)

    def line(cells: list[str], tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}{kind}>{cell}</{tag}>' for kind, cell in zip(kinds, cells, strict=True))}</tr>"

    head = line([f"<button>{html.escape(name)}</button>" for name in table.header], "th")
    body = "".join(line([html.escape(cell) for cell in row], "td") for row in rows)
    notes = "".join(f"<li>{_to_html(note)}</li>" for note in table.notes)
    return (
        f'<h3 id="{table.name}">{html.escape(table.title)}</h3><div class="scroll"><table><thead>{head}</thead>'
        f'<tbody>{body}</tbody></table></div><ul class="notes">{notes}</ul>'
    )
