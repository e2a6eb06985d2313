"""Where runs and their results lie, and what they are called in a report: as much of a path as is needed."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from resnet_train import paper
from resnet_train.errors import UserError
from resnet_train.files import read_if_object
from resnet_train.report.values import escape_and_clip, number, reading, word


def tell_apart(paths: Mapping[Path, int]) -> dict[Path, str]:
    """A name for each path: as many of its last parts as given, and more where two paths would have one name."""
    kept = dict(paths)
    while True:
        names = {path: os.path.join(*path.parts[-count:]) if path.parts else "" for path, count in kept.items()}
        count_of = Counter(names.values())
        alike = [path for path, name in names.items() if count_of[name] > 1 and kept[path] < len(path.parts)]
        if not alike:
            return {path: escape_and_clip(name) for path, name in names.items()}
        kept |= {path: kept[path] + 1 for path in alike}


def name_weights(sources: Iterable[str]) -> dict[str, str]:
    """A name for each file of initial weights: the file's, of a run's checkpoint with the run's, or more."""
    paths = {source: Path(source) for source in sources}
    short = {s: path.parents[1] / path.name for s, path in paths.items() if path.parent.name == "checkpoints"}
    of_runs = {source for source, path in short.items() if path not in paths.values()}
    paths |= {source: short[source] for source in of_runs}
    names = tell_apart({path: 2 if source in of_runs else 1 for source, path in paths.items()})
    return {source: names[path] for source, path in paths.items()}


def name_folders(folders: Iterable[Path]) -> list[str]:
    """The folders on a command line: a relative path as it is, of an absolute one its last part, or more, see above."""
    counts = {_absolute(folder): 1 if folder.is_absolute() else _count(folder) for folder in folders}
    return list(tell_apart(counts).values())


def find_runs(folders: Iterable[Path]) -> dict[Path, str]:
    """The folders of all runs in `folders`, which are runs or contain them, each once, with its name.

    Folders above an absolute one on the command line are no part of the name where it can be told apart without them.
    Raises UserError for a folder without runs.
    """
    counts: dict[Path, tuple[Path, int]] = {}
    for folder in folders:
        try:
            os.listdir(folder)
            configs = sorted(path for path in find_files(folder, "config.json") if path.is_file())
        except OSError as error:
            raise UserError(f"{error.filename or folder}: {error.strerror}") from error
        if not configs and not any(find_files(folder, "responses.csv")):
            raise UserError(f"{folder}: holds no run (a folder with config.json and metrics.jsonl)")
        for run in sorted((path.parent for path in configs), key=lambda run: _is_behind_link(run, folder)):
            count = _count(run.relative_to(folder.parent) if folder.is_absolute() else run)
            counts.setdefault(run.resolve(), (run, count))
    names = tell_apart({_absolute(run): count for run, count in counts.values()})
    return {run: names[_absolute(run)] for run, _ in counts.values()}


def find_files(folder: Path, name: str) -> Iterator[Path]:
    """The files of a name in `folder` and below, also behind links to folders, each of which is followed once."""
    followed = {os.path.realpath(folder)}
    for here, below, files in os.walk(folder, followlinks=True):
        if name in files:
            yield Path(here, name)
        below.sort()
        for link in [entry for entry in below if os.path.islink(os.path.join(here, entry))]:
            target = os.path.realpath(os.path.join(here, link))
            if target in followed:
                below.remove(link)
            followed.add(target)


def _is_behind_link(path: Path, folder: Path) -> bool:
    """Whether a link leads from `folder` to `path`, which lies below it."""
    return path.resolve() != folder.resolve() / path.relative_to(folder)


def _absolute(folder: Path) -> Path:
    """With the names of links, not of what they point to."""
    return Path(os.path.abspath(folder))


def _count(path: Path) -> int:
    return max(1, sum(part != ".." for part in Path(os.path.normpath(path)).parts))


def name_label(data: str, tested: Any) -> str:
    """The label of data with so many test images: a folder called imagenet may have others than ILSVRC's."""
    others = data == "imagenet" and tested is not None and tested not in paper.IMAGENET_TEST
    return "imagenet-folder" if others else data


def read_results(folder: Path, net: str, seed: int, digest: Any) -> list[dict[str, Any]]:
    """The test results that resnet-eval wrote beside the checkpoints of a run, of it and of ensembles.

    `digest` is that of the run's data. Results on others are left out, as these may have the same label; of a folder
    without a training part, which has no digest, those on the paper's data sets are kept.
    """
    results = []
    for path in sorted((folder / "checkpoints").glob("*-test.json")):
        result = read_if_object(path)
        if not {"net", "data", "split", "protocol", "error"} <= result.keys():
            continue
        with reading(path, "resnet-eval"):
            if "members" not in result and (result["net"] != net or result.get("seed", seed) != seed):
                continue
            result |= {key: word(result[key]) for key in ("net", "data", "split", "protocol")}
            result["data"] = name_label(result["data"], result.get("seen") if result["split"] == "test" else None)
            tested = result.get("digest", digest)
            if digest is not None and tested != digest and not (tested is None and result["data"] in paper.DATA):
                continue
            result |= {key: number(result[key], 0, 100) for key in ("error", "error5") if key in result}
            if "members" in result:
                result["members"] = [
                    {"net": word(one["net"]), "iteration": one.get("iteration"), "iterations": one.get("iterations")}
                    for one in result["members"]
                ]
        results.append(result)
    return results
