"""The command `resnet-report`."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import io
import os
import shlex
import webbrowser
from pathlib import Path
from urllib.parse import quote

from resnet_train import paper
from resnet_train.config.commands import ReportConfig
from resnet_train.config.layout import count_unreadable
from resnet_train.errors import UserError, from_write_error
from resnet_train.files import LARGEST_TEXT, expand, put, read_regular
from resnet_train.report import detection, figures, localization, page, runs, tables, verdict
from resnet_train.report.figures import Picture
from resnet_train.report.folders import find_files, name_folders
from resnet_train.report.page import Section
from resnet_train.report.runs import Run
from resnet_train.report.values import MALFORMED, describe_test, escape_and_clip, number
from resnet_train.terminal import say


def report(args: ReportConfig) -> None:
    """Write the report of the given runs, or of complexity, and print the path of its page.

    Raises UserError.
    """
    out = expand(args.out)
    notes: list[str] = []
    if importlib.util.find_spec("bokeh") is None:
        raise UserError("resnet-report needs Bokeh: pip install 'resnet-train[report]'")
    if args.report == "complexity":
        from resnet_train.report.complexity import complexity_table

        sections = [Section("Parameters and multiply-adds of every net of tables 1 and 6", tables=[complexity_table()])]
        title = "Complexity"
        for line in page.markdown_table(sections[0].tables[0]).splitlines():
            say(line)
    else:
        folders = [expand(name) for name in args.runs]
        classifiers, others, notes = runs.find(folders)
        detectors, localizers = detection.find(others), localization.find(others)
        _check_out(out, [*(run.folder for run in classifiers), *others])
        groups = runs.groups(classifiers)
        notes += _explain_groups(groups)
        all_runs: list[Run | detection.Detector | localization.Localizer] = [*classifiers, *detectors, *localizers]
        data = dict.fromkeys(run.data for run in all_runs)
        published = any(run.published for run in all_runs)
        title = "Deep Residual Learning for Image Recognition: these runs beside the paper"
        title = title if published else f"Residual networks on {' and '.join(data)}"
    for note in notes:
        say(f"note: {note}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if args.report == "runs":
            sections = [*(_sections(groups, folders, out) if groups else []), *detection.sections(detectors)]
            sections += localization.sections(localizers)
        _write(args, title, notes, sections, out)
    except OSError as error:
        raise from_write_error(f"out={out}: cannot be written", error) from error
    say(f"{out / 'index.html'}")
    if args.open:
        webbrowser.open((out / "index.html").resolve().as_uri())


def _write(args: ReportConfig, title: str, notes: list[str], sections: list[Section], out: Path) -> None:
    names = name_folders(map(expand, args.runs)) if args.report == "runs" else ["complexity"]
    command = shlex.join(["resnet-report", *names, f"out={args.out}"])
    intro = [f"Made by `{tables.strip_folders(escape_and_clip(command))}`.", *(f"Note: {note}." for note in notes)]
    all_tables = [table for section in sections for table in (section.verdict, *section.tables) if table]
    all_runs = [run for section in sections for run in section.runs]
    put(out / "report.md", page.markdown(title, intro, sections).encode())  # marks the folder as ours
    for table in [*all_tables, tables.runs_table(all_runs)] if all_runs else all_tables:
        put(out / f"{table.name}.csv", table.csv().encode())
    for section in sections:
        section.figures = figures.draw(section.figures, out)
    put(out / "report.md", page.markdown(title, intro, sections).encode())  # without figures that could not be drawn
    put(out / "index.html", page.html_page(title, intro, sections, out).encode())


def _check_out(out: Path, folders: list[Path]) -> None:
    """Refuse to write into a run. Raises UserError."""
    for folder in folders:
        if out.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"out={out}: lies in the run {folder}; use another folder")


def _explain_groups(groups: list[list[Run]]) -> list[str]:
    """Notes on why runs are in different rows and figures."""
    notes = []
    for count, other in enumerate(groups[1:], 2):
        keys = ", ".join(f"{key} ({one} and {two})" for key, one, two in runs.differences(groups[0], other))
        first, second = (group[0].display_path + ", …" * (len(group) > 1) for group in (groups[0], other))
        names = f"{first} and {second}"
        apart = f"the runs of sections 1 and {count} ({names}) are not in one row or figure"
        notes.append(f"{apart}: they differ in {keys}")
    return notes


def _sections(groups: list[list[Run]], folders: list[Path], out: Path) -> list[Section]:
    """A section for each group of comparable runs, and those about all runs."""
    sections = []
    for place, group in enumerate(groups, 1):
        differing = {key for other in groups for key, _, _ in runs.differences(group, other)}
        sections.append(_section(group, place, differing, out))
    measured = _measured(folders, "responses.csv", "std")
    gradients = [_measured(folders, "gradients.csv", f"by_{name}") for name in ("response", "weights")]
    for count, data in enumerate(dict.fromkeys(one.data for one in measured), 1):
        of_data = [[one for one in part if one.data == data] for part in (measured, *gradients)]
        sections.append(_responses_section("" if count == 1 else f"-{count}", *of_data))
    table = tables.deviations_table(groups)
    return [*sections, Section("Recipes", tables=[table])] if table.rows else sections


def _responses_section(where: str, *columns: list[figures.Responses]) -> Section:
    """Figure 7 for the nets of one data set and, if measured, the norms of the gradients."""
    measured, by_response, by_weights = columns
    first = measured[0]
    nets: dict[str, list[float]] = {}
    for one in measured:
        nets.setdefault(one.net, []).append(sum(one.stds) / len(one.stds))
    means = {net: sum(values) / len(values) for net, values in nets.items()}
    words = ["Mean over the layers: " + ", ".join(f"{mean:.3f} in {net}" for net, mean in means.items()) + "."]
    published = paper.DATA.get(first.data) == "cifar"  # whose nets these are
    plain = {net: means.get(f"plain-{net.split('-')[1]}") for net in means if not net.startswith("plain")}
    for how, less in (("less", True), ("no less", False)):
        if who := [net for net, other in plain.items() if other is not None and (means[net] < other) == less]:
            words.append(f"The response is {how} than in the plain net of the same depth in {', '.join(who)}.")
            words[-1] += " In the paper it is less." if published else ""
    caption = f"{'Figure 7' if published else 'Layer responses'}: standard deviation of the responses of the 3x3 layers"
    caption += f" after batch norm, by layer (above) and by magnitude (below), on {first.data}; dashed: plain nets."
    warnings = list(dict.fromkeys(one.note for one in measured if one.note and published))
    pictures = [Picture(f"figure-7{where}", caption, lambda: figures.draw_responses(measured))]
    if by_response:
        caption = (
            "L2 norms of the loss's gradients by the response of each 3x3 layer (above) and by its weights (below)"
        )
        caption += f", on {first.data}; dashed: plain nets."
        pictures.append(Picture(f"gradients{where}", caption, lambda: figures.draw_gradients(by_response, by_weights)))
    return Section(f"Layer responses on {first.data}", warnings, words, figures=pictures)


def _section(group: list[Run], number: int, differing: set[str], out: Path) -> Section:
    """The section of one group of comparable runs; `differing`: the settings in which groups differ."""
    first = group[0]
    where = "" if number == 1 else f"-{number}"
    count = f"{len(group)} run{'s' if len(group) > 1 else ''}"
    title = f"{first.data}: {count} of {first.iterations:,} iterations, {first.protocol}"
    keys = sorted((differing - {"data", "iterations", "protocol"}) & first.setting.keys())
    title += "".join(f", {key}={runs.format_setting(first.setting[key])}" for key in keys)
    section = Section(f"{number}. {title}", runs=group, verdict=verdict.table(group, where))
    if first.published and (short := paper.shortened(first.data, first.family, first.iterations)):
        section.warnings.append(short)
    section.words = [text for text in [verdict.sentence(group)] if text]
    section.figures = [dataclasses.replace(one, name=f"{one.name}{where}") for one in figures.plan(group)]
    section.commands = [(_describe(run), tables.run_command(run)) for run in group]
    section.tables = tables.tables(group, where)
    section.links = [link for run in group for link in _pages(run, out)]
    return section


def _pages(run: Run, out: Path) -> list[tuple[str, str]]:
    """Links to the pages of a run's mistakes: text, and URL relative to the report's folder `out`."""
    return [
        (
            f"{run.net}, seed {run.seed}: {escape_and_clip(path.name.removesuffix('-mistakes.html'))}",
            quote(os.fsencode(os.path.relpath(path, out.resolve()))),
        )
        for path in run.pages
    ]


def _describe(run: Run) -> str:
    """A run in one line: net, seed, error, progress, device and folder."""
    state = describe_test(run.test_error) + ("" if run.finished else f", unfinished ({run.reached:,} iterations)")
    state += f", {count_unreadable(run.unreadable)}" if run.unreadable else ""
    return runs.describe_run(f"{run.net}, seed {run.seed}: {state}", run.device, run.replaced, run.display_path)


def _measured(folders: list[Path], name: str, column: str) -> list[figures.Responses]:
    """A column of resnet-responses' tables in `folders`, of the last checkpoint of each net and seed.

    Raises UserError for a file of another form.
    """
    newest: dict[tuple[str, str, int], figures.Responses] = {}
    for path in (path for folder in folders for path in sorted(find_files(folder, name)) if path.is_file()):
        values: dict[tuple[str, ...], list[float]] = {}
        try:
            with io.StringIO(read_regular(path, LARGEST_TEXT).decode(), newline="") as file:
                for row in csv.DictReader(file):
                    key = tuple(row[part] for part in ("net", "data", "seed", "iteration", "note", "finished"))
                    values.setdefault(key, []).append(number(float(row[column])))
            for (net, data, seed, iteration, note, finished), layers in values.items():
                if not runs.NET.fullmatch(net) or len(layers) != int(net.split("-")[1]) - 1:
                    raise ValueError(f"{len(layers)} layers of {net!r}")
                label, warning, done = escape_and_clip(data), escape_and_clip(note), finished == "True"
                responses = figures.Responses(net, label, int(seed), layers, warning, done, int(iteration))
                if newest.setdefault((net, label, responses.seed), responses).iteration <= responses.iteration:
                    newest[net, label, responses.seed] = responses
        except (OSError, csv.Error, *MALFORMED) as error:
            reason = escape_and_clip(f"{type(error).__name__}: {error}")[:200]
            raise UserError(f"{path}: is no table of resnet-responses ({reason})") from error
    nets = newest.values()
    return sorted(nets, key=lambda one: (not one.net.startswith("plain"), int(one.net.split("-")[1]), one.seed))
