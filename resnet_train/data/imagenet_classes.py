"""The classes of ImageNet: WordNet IDs, which are the names of its folders, and words for them."""

from __future__ import annotations

from pathlib import Path

FILE = Path(__file__).with_name("imagenet_classes.txt")


def imagenet_classes() -> dict[str, str]:
    """n01440764: tench, and the 999 others, in the order of a classifier's outputs. The words are torchvision's."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines)
