"""How good detections are: Pascal VOC's average precision, by its rules of 2007 and of 2010, and COCO's.

Detections are torchvision's, on the CPU: for each example, in the same order, `boxes` (m, 4) as the example's,
`scores` (m,) and `labels` (m,). Nothing depends on the order of examples or detections unless scores are equal.
Figures are in percent; where no object can tell one it is None, never a NaN.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resnet_train.detection.annotations import Example
from resnet_train.detection.masks import mask_code, rle
from resnet_train.errors import RunError, UserError

Detections = Sequence[Mapping[str, Any]]
Columns = dict[str, np.ndarray]
ELEVEN = np.arange(11) / 10  # not 0.1 * k: 0.1 * 3 is above 3 / 10, and a recall of 3 in 10 would miss it
COCO_FIGURES = (  # in the order of pycocotools; the recalls are means over the thresholds of overlap, as "map" is
    *("map", "map50", "map75", "small", "medium", "large"),
    *("recall1", "recall10", "recall100", "recall_small", "recall_medium", "recall_large"),
)


def voc_ap(recall: np.ndarray, precision: np.ndarray, *, points11: bool) -> float:
    """The average precision, 0 to 1, of a curve: recall (n,), never falling, and the precision (n,) at each.

    With `points11` that of VOC 2007: the mean, over the recalls 0, 0.1, …, 1, of the greatest precision at that recall
    or above. Otherwise that of VOC 2010 and later: the area under the curve of these greatest precisions.
    """
    recall, precision = np.r_[0.0, recall, 1.0], np.r_[0.0, precision, 0.0]
    greatest = np.maximum.accumulate(precision[::-1])[::-1]
    if points11:
        return float(greatest[np.searchsorted(recall, ELEVEN)].mean())
    return float(np.sum(np.diff(recall) * greatest[1:]))


def voc_curve(
    truth: Columns, detected: Columns, label: int, threshold: float = 0.5
) -> tuple[np.ndarray, np.ndarray] | None:
    """Recall and precision (n,) of a class down to each detection, highest score first; None if there is no object.

    The rule of the devkit's VOCevaldet.m. A detection belongs to the object of its image and class that it overlaps
    most (of equals the first), be that difficult or taken. With an overlap of `threshold` or more it is right if the
    object is new and wrong if it was taken; if it is difficult, the detection does not count and is not in the curve.
    With less it is wrong. Of equal scores the first example's goes first, then the first in the example. The devkit
    adds 1 to differences of pixel indices; our boxes go from edge to edge and need no 1.
    """
    total = _objects(truth, label)
    if not total:
        return None
    theirs = truth["labels"] == label
    objects = {name: column[theirs] for name, column in truth.items()}
    mine = np.flatnonzero(detected["labels"] == label)
    mine = mine[np.argsort(-detected["scores"][mine], kind="stable")]
    boxes, images = detected["boxes"][mine], detected["images"][mine]
    # The objects of an image lie together: all detections are held against the first of theirs, then the second, …
    start, end = (np.searchsorted(objects["images"], images, side) for side in ("left", "right"))
    best, chosen = np.zeros(len(mine)), np.zeros(len(mine), int)
    for turn in range((end - start).max(initial=0)):
        rows = np.flatnonzero(start + turn < end)
        overlap = _overlap(boxes[rows], objects["boxes"][start[rows] + turn])
        rows, overlap = rows[overlap > best[rows]], overlap[overlap > best[rows]]
        best[rows], chosen[rows] = overlap, start[rows] + turn
    hit = best >= threshold
    ignored = hit & objects["ignored"][chosen]
    counted = np.flatnonzero(hit & ~ignored)
    right = np.zeros(len(mine), bool)
    right[counted[np.unique(chosen[counted], return_index=True)[1]]] = True  # the first to take each object
    rights = np.cumsum(right[~ignored])
    return rights / total, rights / np.arange(1, len(rights) + 1)


def voc_map(examples: Sequence[Example], detections: Detections, classes: int | Sequence[str]) -> dict[str, Any]:
    """VOC's mean average precision over `classes`, their number or names: {"map07", "map10", "per_class"}.

    `per_class` has for each name {"ap07", "ap10", "objects"}, the last without the difficult ones. A class without any
    has None for its precisions and is left out of the means. Raises RunError for a detection that is not finite.
    """
    truth, detected = as_columns(examples, detections)
    per_class: dict[str, dict[str, Any]] = {}
    for label, name in enumerate(_names(classes), 1):
        curve = voc_curve(truth, detected, label)
        per_class[name] = {
            "ap07": None if curve is None else 100 * voc_ap(*curve, points11=True),
            "ap10": None if curve is None else 100 * voc_ap(*curve, points11=False),
            "objects": _objects(truth, label),
        }
    known = [row for row in per_class.values() if row["objects"]]
    means = {
        f"map{year}": sum(row[f"ap{year}"] for row in known) / len(known) if known else None for year in ("07", "10")
    }
    return {**means, "per_class": per_class}


def coco_map(
    examples: Sequence[Example],
    detections: Detections,
    classes: int | Sequence[str],
    category_ids: Sequence[int] | None = None,
    *,
    masks: bool = False,
) -> dict[str, Any]:
    """COCO's figures by faster-coco-eval: those of `COCO_FIGURES`, where "map" is mAP@[.5:.95].

    They are of the overlap of boxes, or with `masks` of that of masks, which objects and detections then have. Ignored
    objects are COCO's crowds. A class without others is left out of the means. `category_ids` are the data set's own
    for the labels 1, 2, …; without them the labels. Of equal scores that of the lowest image_id goes first, as in
    pycocotools. Raises RunError for a detection that is not finite, and UserError where the package is missing.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster  # type: ignore[import-untyped]
    except ImportError as error:
        raise UserError("COCO's mAP: needs faster-coco-eval: pip install 'resnet-train[detection]'") from error
    ids = list(category_ids or range(1, len(_names(classes)) + 1))
    order = sorted(range(len(examples)), key=lambda index: examples[index].image_id)
    truth, detected = as_columns([examples[index] for index in order], [detections[index] for index in order])
    sizes = [(examples[index].height, examples[index].width) for index in order]
    images = [{"id": place, "height": height, "width": width} for place, (height, width) in enumerate(sizes)]
    common = {"images": images, "categories": [{"id": id_} for id_ in ids]}
    quiet = {"print_function": lambda *_: None}

    def outlines(columns: Columns, texts: Iterable[bytes]) -> dict[str, np.ndarray]:
        if not masks:
            return {}
        rows = zip(columns["images"].tolist(), texts, strict=True)
        return {"segmentation": np.array([rle(text, sizes[place]) for place, text in rows], object)}

    def data_set(columns: Columns, **more: np.ndarray) -> Any:
        sides = columns["boxes"][:, 2:] - columns["boxes"][:, :2]
        fields = {
            "id": np.arange(1, len(sides) + 1),  # 0 would say that nothing matches
            "image_id": columns["images"],
            "category_id": np.array([0, *ids])[columns["labels"]],
            "bbox": np.hstack([columns["boxes"][:, :2], sides]),
            **more,
        }
        rows = zip(*(values.tolist() for values in fields.values()), strict=True)
        return COCO({**common, "annotations": [dict(zip(fields, row, strict=True)) for row in rows]}, **quiet)

    areas = (detected["boxes"][:, 2:] - detected["boxes"][:, :2]).prod(1)
    drawn = outlines(detected, (text for index in order for text in detections[index].get("masks", ())))
    if masks:
        areas = np.array(mask_code().area(drawn["segmentation"].tolist()), float)
    objects = data_set(
        truth,
        area=truth["areas"],
        iscrowd=truth["ignored"].astype(int),
        **outlines(truth, (text for index in order for text in examples[index].masks)),
    )
    candidates = data_set(detected, area=areas, score=detected["scores"], **drawn)
    judge = COCOeval_faster(objects, candidates, "segm" if masks else "bbox", **quiet)
    judge.run()
    # Where there is no object COCO says -1.
    return {
        name: 100 * float(value) if value >= 0 else None for name, value in zip(COCO_FIGURES, judge.stats, strict=True)
    }


def in_words(measured: Mapping[str, Any], data: str) -> str:
    """The mAP by the rule of the `data` (voc, coco or det) first, and by the others that the paper or the field uses.

    Of a detector with masks also COCO's two figures of these.
    """
    coco, half = f"{measured['map']:.2f}", f"{measured['map50']:.2f}"
    if data == "coco":
        words = f"mAP {coco} % by COCO's rule @[.5,.95], {half} % @.5, {measured['map07']:.2f} % by VOC 2007's"
    else:
        words = f"mAP {measured['map07']:.2f} % by VOC 2007's rule, {measured['map10']:.2f} % by VOC 2010's,"
        words += f" {coco} % by COCO's @[.5,.95]"
    masks = "mask_map" in measured
    return words + (f"; of masks {measured['mask_map']:.2f} %, {measured['mask_map50']:.2f} % @.5" if masks else "")


def _names(classes: int | Sequence[str]) -> list[str]:
    return [str(label) for label in range(1, classes + 1)] if isinstance(classes, int) else list(classes)


def _objects(truth: Columns, label: int) -> int:
    return int(np.sum((truth["labels"] == label) & ~truth["ignored"]))


def as_columns(examples: Sequence[Example], detections: Detections) -> tuple[Columns, Columns]:
    """All objects and all detections, one under another, each with the place of its example among `images`.

    Fractions are float64. Raises RunError for a detection that is not finite.
    """
    assert len(examples) == len(detections), "detections of other examples"

    def column(parts: list[Tensor], kind: torch.dtype, *shape: int) -> np.ndarray:
        return torch.cat([torch.empty(0, *shape, dtype=kind), *parts]).numpy()

    def images(parts: list[Tensor]) -> np.ndarray:
        return np.repeat(np.arange(len(parts)), np.array([len(part) for part in parts], int))

    labels = [example.labels for example in examples]
    truth = {
        "images": images(labels),
        "labels": column(labels, torch.int64),
        "boxes": column([example.boxes for example in examples], torch.float64, 4),
        "ignored": column([example.ignored for example in examples], torch.bool),
        "areas": column([example.areas for example in examples], torch.float64),
    }
    labels = [row["labels"] for row in detections]
    detected = {
        "images": images(labels),
        "labels": column(labels, torch.int64),
        "boxes": column([row["boxes"] for row in detections], torch.float64, 4),
        "scores": column([row["scores"] for row in detections], torch.float64),
    }
    finite = np.isfinite(detected["boxes"]).all(1) & np.isfinite(detected["scores"])
    if not finite.all():
        name = examples[detected["images"][finite.argmin()]].name
        raise RunError(
            f"{name}: a box or score found is not finite; try an earlier checkpoint or a lower learning rate"
        )
    return truth, detected


def _overlap(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (n, 4) with as many others; 0 where they have no area in common."""
    sides = np.minimum(boxes[:, 2:], others[:, 2:]) - np.maximum(boxes[:, :2], others[:, :2])
    common = sides.clip(0).prod(1)
    union = (boxes[:, 2:] - boxes[:, :2]).prod(1) + (others[:, 2:] - others[:, :2]).prod(1) - common
    return np.divide(common, union, out=np.zeros_like(common), where=common > 0)
