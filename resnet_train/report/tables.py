"""Tables 2 to 6 with our figures beside the paper's; as Markdown and CSV."""

from __future__ import annotations

import csv
import io
import itertools
import math
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from resnet_train import paper
from resnet_train.report.curves import mean_and_std
from resnet_train.report.runs import END, Run, by_net, deviations
from resnet_train.report.values import describe_test

Spread = tuple[float, float | None, int]  # mean, standard deviation over seeds, number of seeds
Cell = str | int | float | Spread | None
NOTHING = "\N{EN DASH}"  # in an empty cell
MEANING = "± is the standard deviation over seeds, n their number."
VIEWS = {"table 2": "10-crop", "table 3": "10-crop", "table 4": "multi-scale", "table 5": "multi-scale"}
MEANING_OF_VIEWS = {
    "single view": "each test image once, as it is",
    "center crop": "the square in the middle of each test image",
    "10-crop": "averaged over ten crops of each test image",
    "multi-scale": "averaged over several sizes of each test image",
}


@dataclass
class Table:
    """A table: `name` for files and anchors, a title, rows of cells, and notes below."""

    name: str
    title: str
    header: list[str]
    rows: list[list[Cell]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def formatted(self) -> list[list[str]]:
        """The rows as text."""
        signed = ["difference" in name for name in self.header]
        return [[format_cell(cell, sign) for cell, sign in zip(row, signed, strict=True)] for row in self.rows]

    def csv(self) -> str:
        """The table as CSV, numbers in full; a mean takes three columns: mean, std, n."""
        wide = [any(isinstance(row[i], tuple) for row in self.rows) for i in range(len(self.header))]
        header = [
            word
            for name, spread in zip(self.header, wide, strict=True)
            for word in ([name, f"{name}: std", f"{name}: n"] if spread else [name])
        ]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([_csv(word) for word in header])
        for row in self.rows:
            cells: list[Any] = []
            for cell, spread in zip(row, wide, strict=True):
                cells += (cell if isinstance(cell, tuple) else [cell, None, None]) if spread else [cell]
            writer.writerow([_csv(cell) for cell in cells])
        return text.getvalue()


def format_cell(cell: Cell, signed: bool = False) -> str:
    """A cell as text: errors with two decimals, a mean with its spread and n."""
    if cell is None:
        return NOTHING
    if isinstance(cell, tuple):
        mean, std, n = cell
        return f"{mean:.2f}" + ("" if std is None else f" ± {std:.2f}") + f" (n={n})"
    if isinstance(cell, float):
        return f"{cell:+.2f}" if signed else f"{cell:.2f}"
    return f"{cell:,}" if isinstance(cell, int) else cell


def add_files(table: Table, files: list[str]) -> None:
    """Add a column of `files`, those of the first rows, where two of these rows have the same words."""
    words = [tuple(cell for cell in row if isinstance(cell, str)) for row in table.rows[: len(files)]]
    if len({*words}) < len(words):
        table.header.append("file")
        for row, file in itertools.zip_longest(table.rows, files):
            row.append(file)


def _csv(cell: Any) -> Any:
    """A cell that a spreadsheet can open safely: text that begins like a formula is quoted."""
    if isinstance(cell, str) and cell[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{cell}"
    return "" if cell is None else cell


def spread(values: list[float]) -> Spread | None:
    """Mean, standard deviation and number of the `values` that are not NaN; None if there are none."""
    values = [value for value in values if not math.isnan(value)]
    return (*mean_and_std(values), len(values)) if values else None


def tables(group: list[Run], where: str) -> list[Table]:
    """The paper's tables with our figures beside them; for data that the paper does not have, one table of its own."""
    if not group[0].published:
        return [_own_table(group, where), *_ensembles(group, where)]
    if group[0].family == "cifar":
        return [table for table in [errors_table(group, "table 6", where)] if table]
    paper_tables = [errors_table(group, name, where) for name in ("table 2", "table 3", "table 4")]
    return [*(table for table in paper_tables if table), *_ensembles(group, where)]


def _own_table(group: list[Run], where: str) -> Table:
    """The errors of every net under the protocol of training, and under others that resnet-eval has measured."""
    ended = [run for run in group if run.finished]
    views = [group[0].protocol]
    views += [view for view in ("10-crop", "multi-scale") if any(final_error(run, view) is not None for run in ended)]
    top5 = [view for view in views if any(final_error(run, view, "error5") is not None for run in ended)]
    validated = any(run.curves["val"] for run in group)
    header = ["net", "parameters", *(f"test error ({view})" for view in views), *(f"top-5 ({view})" for view in top5)]
    header += ["lowest validation error", "test error there"] if validated else []
    table = Table(f"errors{where}", f"Error in %, {group[0].data}", [*header, "training error at the end"])
    for net, runs in by_net(group).items():
        done = [run for run in runs if run.finished]
        row: list[Cell] = [net, next((run.parameters for run in done if run.parameters), None)]
        row += [_mean([final_error(run, view) for run in done]) for view in views]
        row += [_mean([final_error(run, view, "error5") for run in done]) for view in top5]
        if validated:
            row += [_mean([run.chosen and run.chosen[1] for run in done]), _mean([run.chosen_error for run in done])]
        table.rows.append([*row, _mean([run.train_error for run in done])])
        table.notes += _unfinished(runs)
    table.notes += _explain(views)
    return table


def _explain(views: Iterable[str], *more: str) -> list[str]:
    """What the columns of a table of errors mean."""
    words = [*more, *(f"{view}: {MEANING_OF_VIEWS[view]}" for view in views if view in MEANING_OF_VIEWS)]
    words.append(f"training error at the end: of augmented images, over the last {100 // END} % of the iterations")
    return [f"{'; '.join(words)}.", MEANING]


def _mean(values: Iterable[float | None]) -> Spread | None:
    """Mean, standard deviation and number of the values that are not None; None if there are none."""
    return spread([value for value in values if value is not None])


def _unfinished(runs: list[Run]) -> list[str]:
    return [
        f"{run.net}, seed {run.seed}: unfinished, at iteration {run.reached:,} of {run.iterations:,};"
        f" {describe_test(run.test_error, ' so far')}; in no mean"
        for run in runs
        if not run.finished
    ]


def errors_table(group: list[Run], name: str, where: str) -> Table | None:
    """Our test errors beside those of table `name` (2, 3, 4 or 6); None if the group has none of its nets.

    `last` is the figure; `best` is the test error where a validation part's error was lowest. Means are over the seeds
    of finished runs; 110 layers are compared with the mean of the paper's five runs.
    """
    nets = by_net(group)
    published = paper.TABLES[name]
    extra = [net for net in nets if net not in published] if name == "table 6" else []
    rows = [net for net in published if net in nets] + extra
    if not rows:
        return None
    photos = group[0].family == "imagenet"
    view = VIEWS.get(name, group[0].protocol)
    header = ["net", "parameters", "paper", f"ours, last ({view})", "difference", "best seed"]
    header += ["best, by validation error"] if any(run.curves["val"] for run in group) else []
    header += [f"ours, last ({group[0].protocol})", "paper, top-5", f"ours, top-5 ({view})"] if photos else []
    header += ["training error at the end"]
    table = Table(f"{name.replace(' ', '-')}{where}", f"{name.capitalize()}: error in %, {group[0].data}", header)
    for net in rows:
        done = [run for run in nets[net] if run.finished]
        finals = {run.seed: error for run in done if (error := final_error(run, view)) is not None}
        our_error = spread(list(finals.values()))
        paper_error, paper_top5 = published.get(net, (None, None))
        reference = paper.FIVE_OF_110[0] if net == "resnet-110-A" else paper_error
        seed = min(finals, key=lambda seed: (finals[seed], seed)) if finals else None
        row: list[Cell] = [net, next((run.parameters for run in done if run.parameters), None)]
        paper_cell = "6.43 (five: 6.61 ± 0.16)" if net == "resnet-110-A" and paper_error else paper_error
        row += [paper_cell, our_error, our_error[0] - reference if our_error and reference is not None else None]
        row += [f"{finals[seed]:.2f} (seed {seed})" if seed is not None and len(finals) > 1 else None]
        if "best, by validation error" in header:
            row += [_mean([run.chosen_error for run in done])]
        if photos:
            row += [_mean([run.test_error for run in done]), paper_top5]
            row += [_mean([final_error(run, view, "error5") for run in done])]
        table.rows.append([*row, _mean([run.train_error for run in done])])
        if missing := [run for run in done if run.seed not in finals]:
            table.notes += [f"{net}: for the {view} error: `{command(view, [run])}`" for run in missing]
        table.notes += _unfinished(nets[net])
    reasons = [paper.shortened(group[0].data, group[0].family, group[0].iterations).removeprefix("SHORTENED: ")]
    reasons += ["another training set"] if group[0].setting["data.validation"] else []
    if any(reasons):
        table.notes.append(f"Not comparable with the paper's: {'; '.join(filter(None, reasons))}.")
    if absent := [net for net in published if net not in nets]:
        table.notes.append(f"Not run here: {', '.join(absent)}.")
    if others := paper.OTHERS.get(name):
        table.notes.append(
            "In the paper also: " + "; ".join(f"{who} {_both(*errors)}" for who, errors in others.items())
        )
    last = "last: at the last iteration; difference: ours minus the paper's; best seed: for comparison, not as a result"
    table.notes += _explain(dict.fromkeys([view, group[0].protocol]), last)
    return table


def _ensembles(group: list[Run], where: str) -> list[Table]:
    """Table 5: errors of ensembles that resnet-eval has measured, or the command that measures one."""
    first = group[0]
    results = {str(result): result for run in group for result in run.results if _of_ensemble(result)}
    members = [run for run in group if run.finished and run.net in paper.TABLES["table 4"] and run.published]
    if not (results or members):
        return []
    name, title = ("table-5", "Table 5: ensembles") if first.published else ("ensembles", "Ensembles")
    table = Table(f"{name}{where}", f"{title}, {first.data}", ["nets", "view", "top-1", "top-5"])
    if first.published:
        table.rows.append(["the paper's six (test server)", "multi-scale", None, 3.57])
        others = "; ".join(f"{who} {top5}" for who, (_, top5) in paper.OTHERS["table 5"].items())
        table.notes.append(f"In the paper also, top-5: {others}. Its figures are of the test server's images.")
    for result in results.values():
        if result["data"] == first.data:
            nets = ", ".join(member["net"] for member in result["members"])
            table.rows.append([nets, result["protocol"], result["error"], result.get("error5")])
    if not results:
        table.notes.append(f"For the ensemble's error: `{command('multi-scale', members)}`")
    return [table]


def _of_ensemble(result: dict[str, Any]) -> bool:
    """Whether a result is the test of several nets, each after its last iteration."""
    members = result.get("members", [])
    return _is_plain(result) and bool(members) and all(one["iteration"] == one["iterations"] for one in members)


def _is_plain(result: dict[str, Any]) -> bool:
    """Whether a result is of the test images, with the batch norm of the training."""
    return result["split"] == "test" and result.get("batch_norm", "moving averages") == "moving averages"


def final_error(run: Run, view: str, key: str = "error") -> float | None:
    """The error of the last iteration under `view`: the protocol of training, or one that resnet-eval has measured."""
    if run.protocol == view:
        return run.test_error if key == "error" else run.curves["test"][-1][2]
    for result in run.results:
        last = result.get("iteration") == run.iterations and "members" not in result
        if last and _is_plain(result) and result["data"] == run.data and str(result["protocol"]).startswith(view):
            return result.get(key)
    return None


def command(view: str, runs: list[Run]) -> str:
    """The resnet-eval command that measures what is missing."""
    files = [f"{run.display_path}/checkpoints/last.pt" for run in runs]
    protocol = {"10-crop": "tencrop", "multi-scale": "multiscale"}.get(view, "center")
    checkpoint = f"checkpoint=[{','.join(files)}]" if len(files) > 1 else f"checkpoint={files[0]}"
    return shlex.join(["resnet-eval", f"protocol={protocol}", checkpoint])


def _both(top1: float | None, top5: float | None) -> str:
    return " / ".join(NOTHING if error is None else f"{error:g}" for error in ((top1, top5) if top5 else (top1,)))


def deviations_table(groups: list[list[Run]]) -> Table:
    """The runs that deviate from the paper's recipe, and the keys in which they do."""
    header = ["section", "runs", "data", "what", "here", "paper"]
    table = Table("deviations", "Where these runs are not the paper's recipe", header)
    for number, group in enumerate(groups, 1):
        by_deviation: dict[tuple[str, str, str], list[str]] = {}
        for run in group:
            for deviation in deviations(run):
                by_deviation.setdefault(deviation, []).append(f"{run.net} seed {run.seed}")
        images = group[0].setting.get("images")  # where others share the label
        data = group[0].data + (f", images of {images}" if images else "")
        for (key, value, published), runs in by_deviation.items():
            names = f"all {len(group)}" if len(runs) == len(group) > 1 else ", ".join(runs)
            table.rows.append([str(number), names, data, key, value, published])
    if not all(group[0].published for group in groups):
        table.notes.append("On data that the paper does not have, the length and the size of images are no deviations.")
    table.notes.append("What the keys mean: docs/keys.md.")
    table.notes.append("What is the same in every run of this program: docs/paper.md, “Where this is not the paper”.")
    return table


def runs_table(runs: list[Run]) -> Table:
    """Every run with its progress and its command; the test error is that of a finished run's last iteration."""
    header = ["net", "seed", "data", "iterations", "of", "test error", "protocol", "device", "command", "folder"]
    replaced, validated = any(run.replaced for run in runs), any(run.curves["val"] for run in runs)
    header += ["lowest validation error", "at iteration", "test error there"] * validated
    table = Table("runs", "Every run", header + ["broken images replaced"] * replaced)
    for run in runs:
        error = run.test_error if run.finished else None
        table.rows.append([run.net, str(run.seed), run.data, run.reached, run.iterations, error])
        table.rows[-1] += [run.protocol, run.device, run_command(run), run.display_path]
        if validated:
            at, lowest, _ = run.chosen or (None, None, None)
            table.rows[-1] += [lowest, at, run.chosen_error]
        table.rows[-1] += [run.replaced] * replaced
    return table


def run_command(run: Run) -> str:
    """The command of a run; for a job of a sweep, with a comment that names the job."""
    command = strip_folders(run.command) or "not recorded"
    return command + (f" # {strip_folders(run.job)}" if run.job else "")


def strip_folders(command: str) -> str:
    """A command to paste, without the folders of the machine that ran it: of an absolute path its last name."""
    try:
        words = shlex.split(command)
    except ValueError:  # quotes that do not close
        words = command.split()
    return shlex.join(re.sub(r"(^|[=\[,][\"']?)(?:~[^/,\]]*)?/(?:[^,\]]*/)?(?=[^,\]])", r"\1", word) for word in words)
