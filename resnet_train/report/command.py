"""The command `resnet-report`."""

from __future__ import annotations

import csv
import importlib.util
import shlex
import webbrowser
from pathlib import Path

from resnet_train import paper
from resnet_train.config.commands import ReportConfig
from resnet_train.errors import UserError
from resnet_train.files import expand, put
from resnet_train.report import detection, figures, page, runs, tables, verdict
from resnet_train.report.page import Section
from resnet_train.report.runs import Run

FIGURES = {
    "figure 1": "Figure 1: plain nets of 20 and 56 layers.",
    "figure 4": "Figure 4: plain nets (left) and residual nets (right) of 18 and 34 layers.",
    "figure 6": "Figure 6: plain nets, residual nets, and residual nets of 110 and 1202 layers.",
}


def report(asked: ReportConfig) -> None:
    """Write the report of the runs that were named, or of complexity; one line for each file to look at.

    Raises UserError.
    """
    out = expand(asked.out)
    notes: list[str] = []
    if importlib.util.find_spec("bokeh") is None:
        raise UserError("resnet-report needs Bokeh: pip install 'resnet-train[report]'")
    if asked.report == "complexity":
        from resnet_train.report.complexity import complexity_table

        sections = [Section("Parameters and multiply-adds of every net of tables 1 and 6", tables=[complexity_table()])]
        title = "Complexity"
        print(sections[0].tables[0].markdown())
    else:
        folders = [expand(name) for name in asked.runs]
        found, places, notes = runs.find(folders)
        detectors = detection.find(places)
        _check_out(out, [*(run.folder for run in found), *places])
        groups = runs.groups(found)
        notes += _kept_apart(groups)
        title = "Deep Residual Learning for Image Recognition: these runs beside the paper"
    for note in notes:
        print(f"note: {note}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if asked.report == "runs":
            sections = [*(_sections(groups, folders, out) if groups else []), *detection.sections(detectors, out)]
        _write(asked, title, notes, sections, out)
    except OSError as error:
        raise UserError(f"out={out}: cannot be written: {error.strerror}") from error
    print(f"{out / 'index.html'}")
    if asked.open:
        webbrowser.open((out / "index.html").resolve().as_uri())


def _write(asked: ReportConfig, title: str, notes: list[str], sections: list[Section], out: Path) -> None:
    command = shlex.join(["resnet-report", *asked.runs, f"out={asked.out}"])
    command = command if asked.report == "runs" else f"resnet-report complexity {shlex.quote(f'out={asked.out}')}"
    intro = [f"Made by `{command}`.", *(f"Note: {note}." for note in notes)]
    tabular = [table for section in sections for table in section.tables]
    everyone = [run for section in sections for run in section.runs]
    for table in [*tabular, tables.runs_table(everyone)] if everyone else tabular:
        put(out / f"{table.name}.csv", table.csv().encode())
    put(out / "report.md", page.markdown(title, intro, sections).encode())
    put(out / "index.html", page.html_page(title, intro, sections, out).encode())  # last: it needs the figures


def _check_out(out: Path, folders: list[Path]) -> None:
    """Refuse to write into a run. Raises UserError."""
    for folder in folders:
        if out.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"out={out}: lies in the run {folder}; take another folder")


def _kept_apart(groups: list[list[Run]]) -> list[str]:
    """Why runs stand in different rows and figures."""
    notes = []
    for number, other in enumerate(groups[1:], 2):
        why = ", ".join(f"{key} ({here} and {there})" for key, here, there in runs.differences(groups[0], other))
        who = f"{groups[0][0].folder}, … and {other[0].folder}, …"
        notes.append(f"the runs of sections 1 and {number} ({who}) are not in one row or figure: they differ in {why}")
    return notes


def _sections(groups: list[list[Run]], folders: list[Path], out: Path) -> list[Section]:
    """A section for each group of runs that may stand together, and what concerns all; draws the figures into `out`."""
    apart = {key for other in groups[1:] for key, _, _ in runs.differences(groups[0], other)}
    sections = [_section(group, number, apart, out) for number, group in enumerate(groups, 1)]
    if measured := [one for folder in folders for one in _responses(folder)]:
        figures.save(figures.draw_responses(measured), out / "figure-7")
        caption = "Figure 7: standard deviation of the layer responses, by layer (above) and by magnitude (below)."
        words = [f"mean over the layers of {one.net}: {sum(one.stds) / len(one.stds):.3f}" for one in measured]
        words += _less_or_more(measured)
        warnings = list(dict.fromkeys(one.note for one in measured if one.note))
        sections.append(Section("Layer responses", warnings, words, figures=[("figure-7", caption)]))
    sections.append(Section("Recipes", tables=[tables.deviations_table(groups)]))
    return sections


def _less_or_more(measured: list[figures.Responses]) -> list[str]:
    """Figure 7 in words: whether a residual net responds less than the plain one of its depth, by the mean."""
    means = {one.net: sum(one.stds) / len(one.stds) for one in measured}
    pairs = [(net, f"plain-{net.split('-')[1]}") for net in means if not net.startswith("plain")]
    return [
        f"{net} responds {'less' if means[net] < means[plain] else 'no less'} than {plain}; in the paper, less"
        for net, plain in pairs
        if plain in means
    ]


def _section(group: list[Run], number: int, apart: set[str], out: Path) -> Section:
    """Of runs that may stand together; `apart` are the keys in which they are not like those of other sections."""
    first = group[0]
    where = "" if number == 1 else f"-{number}"
    runs_said = f"{len(group)} run{'s' if len(group) > 1 else ''}"
    seen = f"{first.data}: {runs_said} of {first.iterations:,} iterations, {first.protocol}"
    told = sorted(apart - {"data", "iterations", "protocol"})
    seen += "".join(f", {key}={runs.shown(first.setting[key])}" for key in told)
    section = Section(f"{number}. {seen}", runs=group)
    if short := paper.shortened(first.family, first.iterations):
        section.warnings.append(short)
    section.warnings += [f"{why}" for why in tables.incomparable(first) if " is not " in why]
    section.words = [verdict.summary(group)]
    section.words += [f"{v.shallow} and {v.deep}: {v.words}." for v in verdict.verdicts(group)]
    section.words.insert(1, verdict.gaps(group))
    section.words = [words for words in [*section.words, verdict.ordering(group)] if words]
    section.words.append(f"Training errors at the end are those of the last {100 // runs.END} % of the iterations.")
    for name, caption in FIGURES.items():
        figure = figures.draw(name, group)
        if figure is not None:
            file = name.replace(" ", "-") + where
            figures.save(figure, out / file)
            section.figures.append((file, caption))
    section.commands = [(_told(run), tables.made_by(run)) for run in group]
    names = ("table 6",) if first.family == "cifar" else ("table 2", "table 3", "table 4")
    made = [tables.errors_table(group, name, where) for name in names]
    section.tables = [table for table in (*made, tables.ensemble_table(group, where)) if table is not None]
    return section


def _told(run: Run) -> str:
    """A run in a line: how far it is, what it gave, where it was made and lies."""
    state = f"test error {run.test_error:.2f} %" + (
        "" if run.finished else f", unfinished ({run.reached:,} iterations)"
    )
    where = f", on {run.device}" if run.device else ""
    return f"{run.net}, seed {run.seed}: {state}{where}; {run.folder}"


def _responses(folder: Path) -> list[figures.Responses]:
    """What resnet-responses has left in a folder. Raises UserError for a file that it has not written."""
    found = []
    for path in sorted(folder.rglob("responses.csv")):
        stds: dict[tuple[str, str, str, str, str], list[float]] = {}
        try:
            with path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    key = (row["net"], row["data"], row["seed"], row["note"], row["finished"])
                    stds.setdefault(key, []).append(float(row["std"]))
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path}: is no table of resnet-responses ({type(error).__name__}: {error})") from error
        for (net, data, seed, note, finished), std in stds.items():
            found.append(figures.Responses(net, data, int(seed), std, note, finished == "True"))
    return found
