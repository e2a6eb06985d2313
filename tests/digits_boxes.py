"""ILSVRC's localization data in small, from scikit-learn's real digits: python tests/digits_boxes.py FOLDER.

Each image has a class, the digit that is bright on it, once or twice, and a box around each. In half of the images
there is a dim digit of another class besides, with a box as well. Training and test images show different digits.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision.transforms.v2 import functional as TF

from resnet_train.data.sampler import held_out


def make_digits(folder, train=2000, test=400, classes=10, side=(88, 112), digit=(24, 48), seed=0):
    """An ImageNet tree with Annotations/CLS-LOC/ and a val/ of class folders; sizes in pixels."""
    draw, digits = np.random.default_rng(seed), load_digits()
    kept, tested = held_out(len(digits.images), 360)
    for part, count, indices in (("train", train, kept.numpy()), ("val", test, tested.numpy())):
        by_class = [[index for index in indices if digits.target[index] == label] for label in range(10)]
        for number in range(count):
            label = number % classes
            shown = [(label, 255)] * draw.integers(1, 3)
            shown += [((label + draw.integers(1, classes)) % classes, 110)] * draw.integers(0, 2)
            width, height = (int(edge) for edge in draw.integers(*side, 2))
            pixels, taken = draw.integers(0, 40, (height, width)).astype(np.float32), np.zeros((height, width))
            objects = ""
            for kind, bright in shown:
                ink = enlarged(digits.images[draw.choice(by_class[kind])], int(draw.integers(*digit)))
                for _ in range(20):
                    top = int(draw.integers(0, height - ink.shape[0] + 1))
                    left = int(draw.integers(0, width - ink.shape[1] + 1))
                    here = np.s_[top : top + ink.shape[0], left : left + ink.shape[1]]
                    if not taken[here].any():
                        taken[here], pixels[here] = 1, np.maximum(pixels[here], ink * bright)
                        objects += thing(kind, left, top, left + ink.shape[1] - 1, top + ink.shape[0] - 1)
                        break
            name = f"{label}_{number:05d}"
            write(folder, part, str(label), name, pixels, objects)


def enlarged(grey, size):
    """A digit of 8x8 as it is at `size`, 0 to 1, cut to where it has ink."""
    large = TF.resize(torch.from_numpy(grey / 16)[None], [size, size], antialias=True)[0].clamp(0, 1).numpy()
    rows, columns = (np.flatnonzero((large > 0.2).any(axis)) for axis in (1, 0))
    return large[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def thing(kind, xmin, ymin, xmax, ymax):
    """An object of an annotation; pixels count from 0, and a box includes both of its ends."""
    box = f"<xmin>{xmin}</xmin><ymin>{ymin}</ymin><xmax>{xmax}</xmax><ymax>{ymax}</ymax>"
    return f"<object><name>{kind}</name><difficult>0</difficult><bndbox>{box}</bndbox></object>"


def write(folder, part, name, stem, pixels, objects):
    """An image and its annotation: that of val/ lies in no class folder, as ILSVRC has it."""
    image = folder / part / name / f"{stem}.JPEG"
    path = folder / "Annotations/CLS-LOC" / part / (name if part == "train" else ".") / f"{stem}.xml"
    for place in (image, path):
        place.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.round().astype(np.uint8)).save(image, quality=95)
    height, width = pixels.shape[:2]
    size = f"<size><width>{width}</width><height>{height}</height><depth>1</depth></size>"
    path.write_text(f"<annotation><filename>{stem}</filename>{size}{objects}</annotation>")


if __name__ == "__main__":
    make_digits(Path(sys.argv[1]))
