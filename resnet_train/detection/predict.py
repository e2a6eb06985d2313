"""The command `resnet-detect predict`: the objects in pictures, drawn and as JSON."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from PIL import Image

from resnet_train import checkpoint
from resnet_train.data.images import read_image
from resnet_train.detection.build import precision_of, restored_detector
from resnet_train.detection.config import PredictConfig, restored
from resnet_train.detection.evaluate import check_shape, detections
from resnet_train.detection.pictures import drawn
from resnet_train.engine.compute import pick_device, placed
from resnet_train.files import expand, write_result, write_whole
from resnet_train.terminal import say


def predict(asked: PredictConfig, images: list[str]) -> None:
    """Print what is found in each image, draw it, and write it as JSON. Raises UserError for a broken image."""
    device, path, out = pick_device(asked.device), expand(asked.checkpoint), expand(asked.out)
    state = checkpoint.load(path, detector=True)
    config, classes = restored(state["config"]), state["classes"]
    model, _ = restored_detector(config, state)
    with checkpoint.fitting(path):
        precision = precision_of(state)
        model.load_state_dict(state["model"])
    model = placed(model, device, "fp32")
    told = []
    for name in images:
        image = read_image(expand(name))
        check_shape(name, image.shape[1:], config.min_size, config.max_size)
        (found,) = detections(model, [image.to(device)], precision)
        kept = found["scores"] >= asked.score
        rows = [
            {"class": classes[label - 1], "score": score, "box": box}
            for box, score, label in zip(
                found["boxes"][kept].tolist(),
                found["scores"][kept].tolist(),
                found["labels"][kept].tolist(),
                strict=True,
            )
        ]
        picture = out / f"{Path(name).stem}.png"
        png = io.BytesIO()
        Image.fromarray(drawn(image, found, classes, asked.score).permute(1, 2, 0).numpy()).save(png, "PNG")
        write_whole(picture, png.getvalue())
        told.append({"image": name, "picture": str(picture), "found": rows})
        say(f"{name}: {len(rows)} found, {picture}")
        for row in rows:
            left, top, right, bottom = row["box"]
            place = f"left {left:.0f}, top {top:.0f}, right {right:.0f}, bottom {bottom:.0f}"
            say(f"  {row['class']} {row['score']:.2f}  {place}")
    named: dict[str, Any] = {"checkpoint": str(path.absolute()), "net": config.net, "data": config.data_label}
    named |= {"score": asked.score, "iteration": state["iteration"], "boxes": "left, top, right, bottom, in pixels"}
    write_result(out / "detections.json", {**named, "images": told})
