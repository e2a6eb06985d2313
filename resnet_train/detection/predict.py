"""The command `resnet-detect predict`: the objects in pictures, drawn and as JSON."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from resnet_train.config.detection import PredictConfig, config_from_checkpoint
from resnet_train.data.decode import read_image
from resnet_train.detection.build import build_like_checkpoint
from resnet_train.detection.draw import draw_detections, enlarged, likely
from resnet_train.detection.evaluate import ImageDetections, check_shape, detections
from resnet_train.detection.masks import rle
from resnet_train.engine import checkpoint
from resnet_train.engine.boxes import restore
from resnet_train.engine.compute import pick_device
from resnet_train.errors import check_each
from resnet_train.files import expand, write_result, write_whole
from resnet_train.terminal import say

SHOWN = 10  # detections of an image that are printed, those with the highest scores


def predict(args: PredictConfig, images: list[str]) -> None:
    """Print what is found in each image, draw it, and write it as JSON. Raises UserError for a broken image."""
    device, path, out = pick_device(args.device), expand(args.checkpoint), expand(args.out)
    state = checkpoint.load(path, kind="detector")
    config, classes = config_from_checkpoint(state["config"]), state["classes"]
    model, precision = restore(build_like_checkpoint(config, state)[0], state, device)

    def check(name: str) -> None:
        check_shape(name, read_image(expand(name)).shape[1:], config.min_size, config.max_size)

    check_each(images, check)  # before anything is written, also that the pixels can be read
    named: dict[str, Any] = {"checkpoint": str(path.absolute()), "net": config.net, "data": config.data_label}
    named |= {"score": args.score, "iteration": state["iteration"], "boxes": "left, top, right, bottom, in pixels"}
    named |= {"masks": "run lengths, as pycocotools reads them"} if config.masks else {}
    if not (out / "detections.json").exists():  # marks the folder as ours, whatever ends this
        write_result(out / "detections.json", {**named, "images": [], "finished": False})
    results = []
    for name in images:
        image = read_image(expand(name))
        (detected,) = detections(model, [image.to(device)], precision)
        rows = _rows(likely(detected, args.score), classes, image.shape[1:])
        picture = out / f"{Path(name).stem}.png"
        png = io.BytesIO()
        drawn = draw_detections(image, detected, classes, args.score)
        Image.fromarray(drawn.permute(1, 2, 0).numpy()).save(png, "PNG")
        write_whole(picture, png.getvalue())
        times = enlarged(image.shape[1:])
        results.append({"image": name, "picture": str(picture), "enlarged": times, "found": rows})
        larger = f", drawn {times} times as large" if times > 1 else ""
        best = "" if rows else _tell_best(detected)
        say(f"{name}: {len(rows)} found with a score of {args.score:g} or more{best}, {picture}{larger}")
        for row in rows[:SHOWN]:
            left, top, right, bottom = row["box"]
            place = f"left {left:.0f}, top {top:.0f}, right {right:.0f}, bottom {bottom:.0f}"
            say(f"  {row['class']} {row['score']:.2f}  {place}")
        if len(rows) > SHOWN:
            say(f"  and {len(rows) - SHOWN} more, in {out / 'detections.json'}")
    write_result(out / "detections.json", {**named, "images": results})


def _tell_best(detected: ImageDetections) -> str:
    scores = likely(detected, 0)["scores"]
    return f" (the best score is {scores.max():.2g})" if len(scores) else " (none at any score)"


def _rows(detected: ImageDetections, classes: list[str], shape: Sequence[int]) -> list[dict[str, Any]]:
    """What the JSON says of each object in an image of `shape` (H, W)."""
    rows: list[dict[str, Any]] = [
        {"class": classes[label - 1], "score": score, "box": box}
        for box, score, label in zip(*(detected[name].tolist() for name in ("boxes", "scores", "labels")), strict=True)
    ]
    for row, text in zip(rows, detected.get("masks", ()), strict=False):
        row["mask"] = {**rle(text, shape), "counts": text.decode()}
    return rows
