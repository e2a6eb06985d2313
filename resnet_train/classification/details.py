"""Details of an evaluation: every prediction as CSV, the error of each class, and a page with the mistakes."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from resnet_train.data.imagenet_classes import imagenet_classes
from resnet_train.data.memory import MemoryDataset
from resnet_train.data.streaming import StreamingDataset
from resnet_train.engine.distributed import world_size
from resnet_train.errors import UserError
from resnet_train.files import check_replaceable, writing
from resnet_train.report import mistakes
from resnet_train.report.mistakes import Mistake
from resnet_train.report.page import Tile
from resnet_train.report.tables import Table
from resnet_train.report.values import escape_and_clip

# What `write_details` writes beside the JSON file, with words at the beginning of each by which it is known.
FILES = {
    "-predictions.csv": ("image", "label", "prediction", "probability"),
    "-classes.csv": ("class", "error"),
    "-confusion.csv": ("label", "prediction", "images"),
    "-mistakes.html": ("gets", "wrong"),
}
SMALL = 64  # pixels: images up to this size are stored as PNG


def answers(logits: Tensor, labels: Tensor) -> Tensor:
    """Label, prediction and its probability for each image of a batch: (N, 3) float64 on the CPU.

    Images with label -1, which pad a batch or are broken, have it here too.
    """
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices[:, :1]  # breaks ties as evaluate.wrong_answers
    probability = logits.double().softmax(1).gather(1, top)
    return torch.cat([labels[:, None].double(), top.double(), probability], 1).cpu()


def in_order(batches: list[Tensor], count: int) -> Tensor:
    """Gather the answers of all processes, each with its share of the batches, in the order of the `count` images."""
    shares: list[list[Tensor]] = [batches] * world_size()
    if world_size() > 1:
        dist.all_gather_object(shares, batches)
    longest = max(map(len, shares))
    rows = torch.cat([share[position] for position in range(longest) for share in shares if position < len(share)])
    return rows[:count]  # the last batch is padded


def check_places(out: Path) -> None:
    """Raises UserError if a folder, or a file of no earlier result, has the name of one of the files beside `out`."""
    for ending, words in FILES.items():
        path = beside(out, ending)
        if path.is_dir():
            raise UserError(f"out={out}: details=true writes {path.name}, which is a folder; use another name")
        check_replaceable(path, words, path)


def beside(out: Path, ending: str) -> Path:
    """The path of a file beside the JSON file `out`: its name without .json, plus `ending`."""
    return out.with_name(out.name.removesuffix(".json") + ending)


def write_details(
    out: Path, net: str, result: dict[str, Any], answer_rows: Tensor, dataset: MemoryDataset | StreamingDataset
) -> Path:
    """Write the four files beside `out`; return the path of the page.

    `net` is a description, `result` the evaluation's result, `answer_rows` the rows of `answers`, one for each image;
    those of broken images are left out. Raises UserError.
    """
    read = (answer_rows[:, 0] >= 0).nonzero().flatten().tolist()
    names, answer_rows = dataset.names(result["split"]), answer_rows[read]
    names, classes, count = [names[index] for index in read], dataset.classes, len(dataset.classes)
    labels, predicted = (answer_rows[:, column].long().tolist() for column in (0, 1))
    probabilities = [round(value, 12) for value in answer_rows[:, 2].tolist()]
    confusion = np.bincount(np.array(labels) * count + predicted, minlength=count * count).reshape(count, count)
    predictions = Table("predictions", "", ["image", "label", "prediction", "probability"])
    rows = zip(names, labels, predicted, probabilities, strict=True)
    predictions.rows = [[name, classes[label], classes[answer], p] for name, label, answer, p in rows]
    wrong = [index for index, label in enumerate(labels) if predicted[index] != label]
    readable, worst = _readable(classes), []
    for index in sorted(wrong, key=lambda index: (-probabilities[index], index))[: mistakes.MOST]:
        tile = _tile(dataset.picture(result["split"], read[index]))
        label, answer = readable[labels[index]], readable[predicted[index]]
        worst.append(Mistake(tile, label, answer, probabilities[index], str(names[index])))
    title = f"What {escape_and_clip(net)} gets wrong on {escape_and_clip(result['data'])}, {result['split']}"
    files = [beside(out, ending) for ending in FILES]
    page = mistakes.page(title, result, [path.name for path in files], readable, confusion, worst)
    tables = [predictions, mistakes.classes_table(classes, confusion), mistakes.confusion_table(classes, confusion)]
    texts = [*(table.csv() for table in tables), page]
    with contextlib.ExitStack() as renamed:  # all are renamed once all are written, the page last
        parts = [renamed.enter_context(writing(path)) for path in reversed(files)][::-1]
        for part, text in zip(parts, texts, strict=True):
            part.write_bytes(text.encode("utf-8", "backslashreplace"))
    return files[-1]


def _readable(classes: list[str]) -> list[str]:
    """The names of classes for a page; WordNet IDs are followed by their words."""
    words = imagenet_classes()
    return [f"{escape_and_clip(name)} {words[name]}" if name in words else escape_and_clip(name) for name in classes]


def _tile(image: Tensor) -> Tile:
    """An image (H, W, 3) uint8 as PNG or JPEG, for a page."""
    small, content = max(image.shape[:2]) <= SMALL, io.BytesIO()
    picture = Image.fromarray(image.cpu().numpy())
    picture.save(content, "PNG") if small else picture.save(content, "JPEG", quality=85)
    return Tile(content.getvalue(), "png" if small else "jpeg", small)
