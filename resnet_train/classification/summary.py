"""A classifier's run in words: the lines at its start, summary.json, the picture and the line at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from resnet_train import paper
from resnet_train.classification.step import TrainState
from resnet_train.config.layout import count_unreadable, describe_left_out, describe_unreadable
from resnet_train.config.train import Config
from resnet_train.data.memory import MemoryDataset
from resnet_train.data.streaming import StreamingDataset
from resnet_train.engine.distributed import world_size
from resnet_train.models.build import build_network
from resnet_train.models.resnet import ResNet, multiply_adds, parameters
from resnet_train.report import curves
from resnet_train.weights.source import Source

TABLE_6 = "He et al. 2015, table 6:"

Dataset = MemoryDataset | StreamingDataset


def reference_error(net: str, label: str) -> float | None:
    """The paper's test error in % of a net on the data named `label`: of CIFAR-10 proper alone (table 6)."""
    return paper.TABLES["table 6"].get(net, (None,))[0] if label == "cifar10" else None


# --- At the start ----------------------------------------------------------------------------------------------------


def describe_start(
    task: TrainState, dataset: Dataset, source: Source | None, test_files: list[str], *, compiled: bool
) -> list[str]:
    """Lines that describe a training, printed at its start.

    `source` is where the initial weights are from, `test_files` what is taken of an undivided tree for the test.
    """
    config, sizes = task.config, dataset.sizes
    held_out = f", {sizes['val']} held out" if sizes["val"] else ""
    lines = [
        f"{config.net} on {dataset.label}: {sizes['train']} training images{held_out}, {sizes['test']} for the"
        f" test; {config.iterations} iterations of {_describe_batch(task)}; {task.precision} on {task.device}"
        + ("; compiling" if compiled else "")
    ]
    if test_files:
        taken = f"a fifth of each class, {len(test_files)} of {sum(sizes.values())} files, is taken (split.json)"
        lines.append(f"note: {config.data.root} has no test part: {taken}")
    if sizes["val"] > sizes["train"]:
        held = f"data.validation={config.data.validation} leaves {sizes['train']}"
        lines.append(f"warning: {held} of {sizes['train'] + sizes['val']} images for the training")
    if warning := _warn_of_plateau(config):
        lines.append(warning)
    if left_out := describe_left_out(dataset.left_out):
        lines.append(f"note: {left_out}")
    if unreadable := describe_unreadable(dataset.unreadable):
        lines.append(f"warning: {unreadable}; split.json lists them")
    if source is not None:
        classes, same = len(dataset.classes), source.same_classes(dataset.classes)
        fresh = f", but for fc, which is fresh, for {classes} classes in place of its {source.count}"
        lines.append(f"starts from the weights of {config.init_from} ({source.name}){'' if same else fresh}")
        if source.assumed:
            lines.append(f"assumed, for the file does not say: {'; '.join(source.assumed)}")
    if config.freeze is not None:
        lines.append(f"frozen: all from the input to {config.freeze}")
    return lines


def _describe_batch(task: TrainState) -> str:
    """The batch size, and how the batch is divided."""
    share, details = task.share, []
    if world_size() > 1:
        details.append(f"{share.images * share.passes} in each of {world_size()} processes")
    if share.passes > 1:
        details.append(f"{share.images} at once")
    if share.group != share.images:
        details.append(f"batch norm over {share.group}")
    return str(task.config.batch_size) + (f" ({', '.join(details)})" if details else "")


def _warn_of_plateau(config: Config) -> str:
    """A warning where a plateau would be of fewer than three known errors; empty otherwise."""
    schedule, every = config.schedule, config.log_every if config.schedule.watch == "train" else config.eval_every
    waits = schedule.patience * config.iterations
    if schedule.name != "plateau" or waits >= 3 * every:
        return ""
    known = f"a plateau of {waits:g} iterations, where the error is known every {every}, is chance"
    return f"warning: schedule.patience={schedule.patience:g}: {known}; for a short run take schedule=cosine"


# --- At the end ------------------------------------------------------------------------------------------------------


def summarise(
    config: Config, dataset: Dataset, model: ResNet, best_at: int, metrics: list[dict[str, Any]]
) -> dict[str, Any]:
    """The content of summary.json for a finished run with the logged points `metrics`.

    `best_at` is the iteration that the validation part has chosen.
    """
    points = {(point["split"], point["iteration"]): point for point in metrics}

    def errors(iteration: int) -> dict[str, Any]:
        keys = ("iteration", "loss", "error", "error5", "wrong", "seen", "protocol")
        by_split = {split: points.get((split, iteration)) for split in ("train", "val", "test")}
        return {s: {k: point[k] for k in keys if k in point} for s, point in by_split.items() if point}

    best, last = errors(best_at), errors(config.iterations)
    unreadable = {part: len(names) for part, names in dataset.unreadable.items()} or {
        split: dataset.sizes[split] - last[split]["seen"] for split in ("val", "test") if split in last
    }  # of photographs, known only as they are read
    expected = reference_error(config.net, dataset.label)
    return {
        "net": config.net,
        "data": dataset.label,
        "images": dataset.sizes,
        **({"unreadable": unreadable} if any(unreadable.values()) else {}),
        "recipe": config.recipe,
        "seed": config.seed,
        "iterations": config.iterations,
        "init_from": config.init_from,
        "freeze": config.freeze,
        "last": last,
        "best": {"chosen_by": "lowest validation error", **best} if dataset.sizes["val"] and best else None,
        "paper": {"source": TABLE_6, "test_error": expected} if expected is not None else None,
        "parameters": parameters(model),
        "multiply_adds": multiply_adds(build_network(config, len(dataset.classes)), config.data.size),
    }


def draw_curves(config: Config, label: str, metrics: list[dict[str, Any]], picture: Path) -> bool:
    """Plot the errors over the iterations to the file `picture`; returns whether that succeeded."""
    title, short, expected = _title(config, label), _shortened(config, label), reference_error(config.net, label)
    heading = f"{short}\n{title}" if short else title
    line = (TABLE_6, expected) if expected is not None else None
    return curves.attempt(lambda: curves.draw({config.net: metrics}, heading, picture, line), picture)


def describe_end(config: Config, label: str, summary: dict[str, Any]) -> str:
    """The test error in one line."""
    test = summary["last"]["test"]
    left_out = count_unreadable(summary.get("unreadable", {}).get("test", 0))
    line = (
        f"{_title(config, label)}: test error {test['error']:.2f} % ({test['wrong']} of {test['seen']} wrong,"
        f" {test['protocol']}) at iteration {config.iterations}, the last"
    )
    return "; ".join(filter(None, [line, _describe_best(summary["best"]), _shortened(config, label), left_out]))


def _title(config: Config, label: str) -> str:
    return f"{config.net} on {label}, seed {config.seed}"


def _shortened(config: Config, label: str) -> str:
    return paper.shortened(label, config.data.family, config.iterations)


def _describe_best(best: dict[str, Any] | None) -> str:
    """The point that the validation part has chosen; empty without one."""
    if not best or "val" not in best:
        return ""
    test = f", test error {best['test']['error']:.2f} % there" if "test" in best else ""
    return (
        f"validation error lowest at iteration {best['val']['iteration']}, {best['val']['error']:.2f} %{test} (best.pt)"
    )
