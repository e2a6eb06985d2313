"""The command `resnet-classify`: the five most likely classes of pictures, seen as evaluation sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resnet_train.classification.load import load_model
from resnet_train.config.commands import ClassifyConfig
from resnet_train.config.train import Config, config_from_checkpoint
from resnet_train.data.augment import normalise
from resnet_train.data.crops import center_view, whole_view
from resnet_train.data.decode import read_image
from resnet_train.data.imagenet_classes import imagenet_classes
from resnet_train.engine.compute import compute_logits, pick_device
from resnet_train.files import expand, write_result
from resnet_train.terminal import say
from resnet_train.weights.source import divisor, load

AT_ONCE = 32


def classify(asked: ClassifyConfig, images: list[str]) -> None:
    """Print the five most likely classes of each image, in JSON too where asked. Raises UserError for a broken one."""
    device = pick_device(asked.device)
    path = expand(asked.checkpoint)
    state = load(path)
    config, classes = config_from_checkpoint(state["config"]), state["classes"]
    net, mean, precision, _ = load_model(path, config, state, classes, device)
    std = torch.tensor(divisor(config), dtype=torch.float64, device=device).view(1, 3, 1, 1)
    net.eval()
    words, found = imagenet_classes(), []
    for start in range(0, len(images), AT_ONCE):
        some = images[start : start + AT_ONCE]
        views = torch.stack([view(read_image(expand(name)), config) for name in some]).to(device)
        with torch.no_grad():
            odds = compute_logits(net, normalise(views, mean, std), precision).softmax(1)
        top, which = (values.tolist() for values in odds.topk(min(5, len(classes))))
        for name, probabilities, numbers in zip(some, top, which, strict=True):
            rows = [_row(classes[n], p, words) for p, n in zip(probabilities, numbers, strict=True)]
            found.append({"image": name, "top": rows})
            say(name)
            for row in rows:
                say(f"  {100 * row['probability']:6.2f} %  {' '.join([row['class'], *row.get('words', '').split()])}")
    if asked.out is not None:
        named = {"checkpoint": str(path.absolute()), "net": config.net, "data": state["label"]}
        write_result(expand(asked.out), {**named, "iteration": state["iteration"], "images": found})


def view(image: Tensor, config: Config) -> Tensor:
    """What the net is shown of an image (3, H, W) uint8, as in its evaluation: (S, S, 3) uint8."""
    size = config.data.size
    if config.data.family == "imagenet":
        image = center_view(image, size)
    elif image.shape[1:] != (size, size):
        image = whole_view(image, size)
    return image.permute(1, 2, 0).contiguous()


def _row(name: str, probability: float, words: dict[str, str]) -> dict[str, Any]:
    return {"class": name, "probability": probability, **({"words": words[name]} if name in words else {})}
