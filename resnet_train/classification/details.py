"""What a net gets wrong: every answer of an evaluation as CSV, errors of classes, and a page with the mistakes."""

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
from resnet_train.files import writing
from resnet_train.report import mistakes
from resnet_train.report.mistakes import Mistake
from resnet_train.report.page import Tile
from resnet_train.report.tables import Table
from resnet_train.report.values import escape_and_clip

ENDINGS = ("-predictions.csv", "-classes.csv", "-confusion.csv", "-mistakes.html")
SMALL = 64  # pixels: smaller pictures are stored without loss


def answers(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each image of a batch label, answer and the answer's probability: (N, 3) float64 on the CPU.

    Images whose label is -1 fill a batch and are left out.
    """
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices[:, :1]  # as evaluate.wrong_answers, where there are ties
    odds = logits.double().softmax(1).gather(1, top)
    return torch.cat([labels[:, None].double(), top.double(), odds], 1)[labels >= 0].cpu()


def in_order(batches: list[Tensor]) -> Tensor:
    """The answers of all processes, each of which has its share of the batches, in the order of the images."""
    shares: list[list[Tensor]] = [batches] * world_size()
    if world_size() > 1:
        dist.all_gather_object(shares, batches)
    longest = max(map(len, shares))
    return torch.cat([share[place] for place in range(longest) for share in shares if place < len(share)])


def check_places(out: Path) -> None:
    """Refuse an `out` beside which the files cannot lie. Raises UserError."""
    for ending in ENDINGS:
        if (path := beside(out, ending)).is_dir():
            raise UserError(
                f"out={out}: details=true writes {path.name} beside it, which is a folder; use another name"
            )


def beside(out: Path, ending: str) -> Path:
    """The file that lies beside the JSON file `out`."""
    return out.with_name(out.name.removesuffix(".json") + ending)


def write_details(
    out: Path, net: str, result: dict[str, Any], found: Tensor, dataset: MemoryDataset | StreamingDataset
) -> Path:
    """Write the four files beside `out`, and return the page's.

    `net` in words, `result`: what the evaluation says of itself, `found`: its answers. Raises UserError.
    """
    names, classes, count = dataset.names(result["split"]), dataset.classes, len(dataset.classes)
    labels, told = (found[:, column].long().tolist() for column in (0, 1))
    odds = [round(value, 12) for value in found[:, 2].tolist()]
    confusion = np.bincount(np.array(labels) * count + told, minlength=count * count).reshape(count, count)
    predictions = Table("predictions", "", ["image", "label", "prediction", "probability"])
    rows = zip(names, labels, told, odds, strict=True)
    predictions.rows = [[name, classes[label], classes[answer], share] for name, label, answer, share in rows]
    wrong = [index for index, label in enumerate(labels) if told[index] != label]
    shown, pictures = _readable(classes), []
    for index in sorted(wrong, key=lambda index: (-odds[index], index))[: mistakes.MOST]:
        tile = _tile(dataset.picture(result["split"], index))
        pictures.append(Mistake(tile, shown[labels[index]], shown[told[index]], odds[index], str(names[index])))
    title = f"What {escape_and_clip(net)} gets wrong on {escape_and_clip(result['data'])}, {result['split']}"
    files = [beside(out, ending) for ending in ENDINGS]
    page = mistakes.page(title, result, [path.name for path in files], shown, confusion, pictures)
    tables = [predictions, mistakes.classes_table(classes, confusion), mistakes.confusion_table(classes, confusion)]
    texts = [*(table.csv() for table in tables), page]
    with contextlib.ExitStack() as renamed:  # once all are written, the page last
        parts = [renamed.enter_context(writing(path)) for path in reversed(files)][::-1]
        for part, text in zip(parts, texts, strict=True):
            part.write_bytes(text.encode("utf-8", "backslashreplace"))
    return files[-1]


def _readable(classes: list[str]) -> list[str]:
    """The names of classes as a page shows them; WordNet's numbers with their words."""
    words = imagenet_classes()
    return [f"{escape_and_clip(name)} {words[name]}" if name in words else escape_and_clip(name) for name in classes]


def _tile(image: Tensor) -> Tile:
    """An image (H, W, 3) uint8 for a page."""
    small, content = max(image.shape[:2]) <= SMALL, io.BytesIO()
    picture = Image.fromarray(image.cpu().numpy())
    picture.save(content, "PNG") if small else picture.save(content, "JPEG", quality=85)
    return Tile(content.getvalue(), "png" if small else "jpeg", small)
