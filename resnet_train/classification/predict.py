"""A trained net with the preprocessing of its images, and the command `resnet-classify`."""

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
from resnet_train.data.decode import from_pillow, image_size, read_image
from resnet_train.data.imagenet_classes import imagenet_classes
from resnet_train.engine.compute import compute_logits, find_device, pick_device
from resnet_train.engine.limits import share_of_cores
from resnet_train.errors import UserError, check_each
from resnet_train.files import expand, write_result
from resnet_train.models.resnet import ResNet
from resnet_train.terminal import format_share, say
from resnet_train.weights import source

AT_ONCE = 32  # images in a batch


@dataclass(frozen=True, repr=False)
class Classifier:
    """A trained net, the names of its classes, and the preprocessing of its images."""

    net: ResNet  # in evaluation mode, on its device, in float32 (float64 where `precision` is fp64)
    classes: list[str]  # in the order of the logits
    config: Config  # of the run that trained it
    data: str  # the label of its training data
    iteration: int  # of the checkpoint
    precision: str  # of its evaluation: bf16, fp16, fp32 or fp64
    mean: Tensor  # subtracted from images, (H, W, 3) or (1, 1, 3), in 0 to 255
    std: tuple[float, ...]  # images in 0 to 1 are then divided by it

    def __repr__(self) -> str:
        """A line, without the net's modules and the names of a thousand classes."""
        return (
            f"<Classifier {self.config.net} on {self.data}: {len(self.classes)} classes, iteration {self.iteration},"
            f" {self.precision} on {self.device}>"
        )

    @property
    def device(self) -> torch.device:
        """The device of the net."""
        return self.net.fc.weight.device

    def transform(self, image: Image.Image | str | Path) -> Tensor:
        """Preprocess an image or image file for the net: (3, S, S) float32 on the CPU, float64 for fp64.

        As in evaluation: for an ImageNet net the center crop at shorter side 256 (for S = 224), for a CIFAR net the
        whole image at its size; minus the mean of the training images. EXIF rotation is not applied. Raises UserError
        for what is not an image of 8 or 16 bits.
        """
        try:
            pixels = (
                from_pillow(image).permute(2, 0, 1) if isinstance(image, Image.Image) else read_image(expand(image))
            )
        except (OSError, ValueError) as error:  # Pillow opens a file lazily and reads it here
            raise UserError(f"{getattr(image, 'filename', 'the image')}: is not a whole image ({error})") from error
        return self.normalise(view(pixels, self.config)[None])[0]

    def normalise(self, views: Tensor) -> Tensor:
        """Views (N, S, S, 3) uint8 on any device as inputs of the net: (N, 3, S, S)."""
        std = torch.tensor(self.std, dtype=torch.float64, device=views.device).view(1, 3, 1, 1)
        return normalise(views, self.mean.to(views.device), std)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """The logits (N, K) of images (N, 3, S, S) in the precision of the net's evaluation, without gradients.

        `net(images)` computes in float32 instead, and with gradients. Raises UserError for images of another shape
        or of integers.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            hint = "; of one image give image[None]" if images.ndim == 3 else ""
            raise UserError(f"logits: images are (N, 3, S, S), and these are {tuple(images.shape)}{hint}")
        if not images.is_floating_point():
            dtype = str(images.dtype).removeprefix("torch.")
            raise UserError(f"logits: images are float32, as transform and normalise make them, and these are {dtype}")
        return compute_logits(self.net, images.to(self.device, self.net.fc.weight.dtype), self.precision)

    def batches(self, names: Sequence[str]) -> Iterator[tuple[Sequence[str], Tensor]]:
        """Batches of image files, in order: the names, and the images as inputs of the net, on its device.

        Raises UserError for files that are not images, before the first batch for those whose headers say so.
        """
        check_each(names, lambda name: image_size(expand(name)))

        def read(name: str) -> Tensor:
            return view(read_image(expand(name)), self.config)

        with ThreadPoolExecutor(max(1, min(AT_ONCE, share_of_cores()))) as pool:
            for start in range(0, len(names), AT_ONCE):
                chunk = names[start : start + AT_ONCE]
                yield chunk, self.normalise(torch.stack(list(pool.map(read, chunk))).to(self.device))


def load(path: str | Path, device: str | torch.device = "cpu") -> Classifier:
    """Load a trained net from a checkpoint, or from a .safetensors file of `resnet-weights export`.

    Raises UserError, with a one-line message, for any other file, such as the checkpoint of a detector, and for a
    device that is not there.
    """
    place = find_device(device)
    check_checkpoints([str(path)])
    file = expand(path)
    state = source.load(file)
    config, classes = config_from_checkpoint(state["config"]), state["classes"]
    net, mean, precision, _ = load_model(file, config, state, classes, place)
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
    """Resize and crop an image (3, H, W) uint8 as in the net's evaluation: (S, S, 3) uint8."""
    size = config.data.size
    if config.data.family == "imagenet":
        image = center_view(image, size)
    elif image.shape[1:] != (size, size):
        image = whole_view(image, size)
    return image.permute(1, 2, 0).contiguous()


def classify(args: ClassifyConfig, images: list[str]) -> None:
    """Print the five most likely classes of each image; with `args.out` also as JSON. Raises UserError."""
    model = load(args.checkpoint, pick_device(args.device))
    words, predictions = imagenet_classes(), []
    for names, batch in model.batches(images):
        top = model.logits(batch).double().softmax(1).topk(min(5, len(model.classes)))
        if not (finite := top.values.isfinite().all(1)).all():
            name = names[int(finite.long().argmin())]
            raise UserError(f"checkpoint={args.checkpoint}: gives numbers that are not finite for {name}")
        for name, probabilities, indices in zip(names, top.values.tolist(), top.indices.tolist(), strict=True):
            rows = [_row(model.classes[n], p, words) for p, n in zip(probabilities, indices, strict=True)]
            predictions.append({"image": name, "top": rows})
            say(name)
            for row in rows:
                share = format_share(row["probability"])
                say(f"  {share:>8}  {' '.join([row['class'], *row.get('words', '').split()])}")
    if args.out is not None:
        path = expand(args.checkpoint).absolute()
        result = {"checkpoint": str(path), "net": model.config.net, "data": model.data, "iteration": model.iteration}
        result["classes"] = len(model.classes)
        write_result(expand(args.out), {**result, "images": predictions})


def _row(name: str, probability: float, words: dict[str, str]) -> dict[str, Any]:
    return {"class": name, "probability": probability, **({"words": words[name]} if name in words else {})}
