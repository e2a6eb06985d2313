"""A trained net with all that it needs to look at images, and the command `resnet-classify`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from resnet_train.classification.load import load_model
from resnet_train.config.images import ClassifyConfig
from resnet_train.config.paths import check_checkpoints
from resnet_train.config.train import Config, config_from_checkpoint
from resnet_train.data.augment import normalise
from resnet_train.data.crops import center_view, whole_view
from resnet_train.data.decode import from_pillow, read_image
from resnet_train.data.imagenet_classes import imagenet_classes
from resnet_train.engine.compute import compute_logits, pick_device
from resnet_train.engine.limits import share_of_cores
from resnet_train.errors import UserError
from resnet_train.files import expand, write_result
from resnet_train.models.resnet import ResNet
from resnet_train.terminal import format_share, say
from resnet_train.weights import source

AT_ONCE = 32  # images of a batch that are named one by one


@dataclass(frozen=True)
class Classifier:
    """A trained net, the names of its classes, and what is done to images before it sees them."""

    net: ResNet  # in evaluation mode, on its device, in float32 (float64 where `precision` is fp64)
    classes: list[str]  # in the order of the logits
    config: Config  # of the run that trained it
    data: str  # what it was trained on
    iteration: int  # after which it was saved
    precision: str  # that its evaluation computes in: bf16, fp16, fp32 or fp64
    mean: Tensor  # what is subtracted, (H, W, 3) or (1, 1, 3), in 0 to 255
    std: tuple[float, ...]  # what images in 0 to 1 are then divided by

    @property
    def device(self) -> torch.device:
        """Where the net is."""
        return self.net.fc.weight.device

    def transform(self, image: Image.Image | str | Path) -> Tensor:
        """An image, or the file of one, as the net takes it: (3, S, S) float32 on the CPU, float64 for fp64.

        It is what evaluation feeds: of an ImageNet net the center crop at shorter side 256 (for S = 224), of a CIFAR
        net the whole image at its size; minus the mean of the training images. EXIF rotation is not applied. Raises
        UserError for a file that is no image.
        """
        try:
            pixels = (
                from_pillow(image).permute(2, 0, 1) if isinstance(image, Image.Image) else read_image(expand(image))
            )
        except OSError as error:  # Pillow opens a file lazily and reads it here
            raise UserError(f"{getattr(image, 'filename', 'the image')}: is not a whole image ({error})") from error
        return self.normalise(view(pixels, self.config)[None])[0]

    def normalise(self, views: Tensor) -> Tensor:
        """Views (N, S, S, 3) uint8 on any device as the net takes them: (N, 3, S, S)."""
        std = torch.tensor(self.std, dtype=torch.float64, device=views.device).view(1, 3, 1, 1)
        return normalise(views, self.mean.to(views.device), std)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """The logits (N, K) of images (N, 3, S, S) in the precision of the net's evaluation, without gradients.

        `net(images)` computes in float32 instead, and with gradients. Raises UserError for images of another shape.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            one = "; of one image give image[None]" if images.ndim == 3 else ""
            raise UserError(f"logits: images are (N, 3, S, S), and these are {tuple(images.shape)}{one}")
        return compute_logits(self.net, images.to(self.device), self.precision)

    def batches(self, names: Sequence[str]) -> Iterator[tuple[Sequence[str], Tensor]]:
        """The images in files, in order: some names, and these images as the net takes them, on its device.

        Raises UserError for a file that is no image.
        """

        def read(name: str) -> Tensor:
            return view(read_image(expand(name)), self.config)

        with ThreadPoolExecutor(max(1, min(AT_ONCE, share_of_cores()))) as pool:
            for start in range(0, len(names), AT_ONCE):
                some = names[start : start + AT_ONCE]
                yield some, self.normalise(torch.stack(list(pool.map(read, some))).to(self.device))


def load(path: str | Path, device: str | torch.device = "cpu") -> Classifier:
    """The trained net in a checkpoint, or in a .safetensors that `resnet-weights export` has made of one.

    Raises UserError, whose message is one line, for other files, a detector's among them.
    """
    check_checkpoints([str(path)])
    file = expand(path)
    state = source.load(file)
    config, classes = config_from_checkpoint(state["config"]), state["classes"]
    net, mean, precision, _ = load_model(file, config, state, classes, torch.device(device))
    return Classifier(
        net=net.eval(),
        classes=classes,
        config=config,
        data=state["label"],
        iteration=state["iteration"],
        precision=precision,
        mean=mean.cpu(),
        std=source.divisor(config),
    )


def view(image: Tensor, config: Config) -> Tensor:
    """What the net is shown of an image (3, H, W) uint8, as in its evaluation: (S, S, 3) uint8."""
    size = config.data.size
    if config.data.family == "imagenet":
        image = center_view(image, size)
    elif image.shape[1:] != (size, size):
        image = whole_view(image, size)
    return image.permute(1, 2, 0).contiguous()


def classify(asked: ClassifyConfig, images: list[str]) -> None:
    """Print the five most likely classes of each image, in JSON too where asked. Raises UserError for a broken one."""
    model = load(asked.checkpoint, pick_device(asked.device))
    words, found = imagenet_classes(), []
    for some, batch in model.batches(images):
        odds = model.logits(batch).double().softmax(1)
        top, which = (values.tolist() for values in odds.topk(min(5, len(model.classes))))
        for name, probabilities, numbers in zip(some, top, which, strict=True):
            rows = [_row(model.classes[n], p, words) for p, n in zip(probabilities, numbers, strict=True)]
            found.append({"image": name, "top": rows})
            say(name)
            for row in rows:
                share = format_share(row["probability"])
                say(f"  {share:>8}  {' '.join([row['class'], *row.get('words', '').split()])}")
    if asked.out is not None:
        path = expand(asked.checkpoint).absolute()
        named = {"checkpoint": str(path), "net": model.config.net, "data": model.data}
        write_result(expand(asked.out), {**named, "iteration": model.iteration, "images": found})


def _row(name: str, probability: float, words: dict[str, str]) -> dict[str, Any]:
    return {"class": name, "probability": probability, **({"words": words[name]} if name in words else {})}
