"""Image files to pixels: only formats, sizes and frames that are safe to decode."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import logging
import re
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from resnet_train.errors import UserError
from resnet_train.files import open_regular, read_regular

LARGEST_IMAGE = 300_000_000  # pixels; a larger image is refused by its header, before anything is allocated for it
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # and no other: for some, Pillow starts programs
PILLOW_FILTER = ("ignore", None, Warning, re.compile("PIL"), 0)  # of Pillow's warnings, as `warnings` keeps it
QUIET = logging.NullHandler()


class ImageError(UserError):
    """An image that is not what it should be; the message begins with its name."""


def read_image(path: Path) -> Tensor:
    """An image file as (3, H, W) uint8 RGB; EXIF rotation is not applied. Raises UserError naming the file."""
    try:
        data = read_regular(path)
    except OSError as error:
        raise UserError(f"{path}: is not an image that can be read ({error.strerror})") from error
    return decode(data, str(path)).permute(2, 0, 1)


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file, as its header declares them. Raises UserError naming the file."""
    try:
        file = open_regular(path)
    except OSError as error:
        raise UserError(f"{path}: is not an image that can be read ({error.strerror})") from error
    with file, _decoding(str(path)), _open(file) as image:
        return image.size


def decode(data: bytes, name: str, factor: int = 1) -> Tensor:
    """An encoded image as (H, W, 3) uint8 RGB, whatever its suffix said. Raises ImageError, which begins with `name`.

    A `factor` of 2, 4 or 8 is what a JPEG may be reduced by, where `jpeg_size` says that it can be; others come whole.
    """
    with _decoding(name):
        if size := jpeg_size(data):
            check_pixels(*size)
            least = {"min_height": -(-size[0] // factor), "min_width": -(-size[1] // factor)} if factor > 1 else {}
            with contextlib.suppress(ValueError):  # which Pillow is to judge
                # The same pixels as Pillow's, in less time.
                return torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB", **least))
        with _open(io.BytesIO(data)) as image:
            return from_pillow(image)


def from_pillow(image: Image.Image) -> Tensor:
    """The pixels of an image of Pillow's as (H, W, 3) uint8 RGB."""
    if image.mode.startswith("I;16") or (image.format, image.mode) == ("PPM", "I"):  # 16 bits
        grey = (np.asarray(image) >> 8).astype(np.uint8)  # Pillow would clip where it should scale
        return torch.from_numpy(grey[..., None].repeat(3, 2))
    opaque = image.convert("RGBA") if "transparency" in image.info else image  # else Pillow warns
    return torch.from_numpy(np.array(opaque.convert("RGB")))


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that may be reduced as it is decoded; None for any other image.

    These are baseline and progressive frames of 8 bits, grey or in three colours. libjpeg would write beyond its memory
    when it reduces a lossless frame. What is not in plain order is None, so that libjpeg finds no other frame.
    """
    place = 2
    while data[:2] == b"\xff\xd8" and len(data) >= place + 10 and data[place] == 0xFF:
        kind, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4])
        if kind in (0xC0, 0xC2):  # baseline and progressive
            bits, height, width, colours = struct.unpack_from(">BHHB", data, place + 4)
            return (height, width) if bits == 8 and height and width and colours in (1, 3) else None
        if not (kind in (0xC4, 0xDB, 0xDD, 0xFE) or 0xE0 <= kind <= 0xEF) or length < 2:  # tables, comments, APPn
            return None
        place += 2 + length
    return None


def check_pixels(height: int, width: int) -> None:
    """Refuse what is declared as larger than any image may be. Raises ValueError."""
    if height * width > LARGEST_IMAGE:
        raise ValueError(f"is declared as {width}x{height}, above {LARGEST_IMAGE:,} pixels")


@contextlib.contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Make an ImageError of whatever a decoder raises, which may be anything; but not of a lack of memory."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, UnidentifiedImageError):
            reason = f"none of {', '.join(FORMATS)}"
        raise ImageError(f"{name}: is not an image that can be read ({reason})") from error


def _open(file: BinaryIO) -> Image.Image:
    """An image whose header has been read and found to be in bounds; what Pillow would print is left out."""
    Image.MAX_IMAGE_PIXELS = LARGEST_IMAGE // 2  # Pillow refuses twice as many, in some formats before we can
    if PILLOW_FILTER not in warnings.filters:
        warnings.filterwarnings("ignore", module="PIL")
    logging.getLogger("PIL").addHandler(QUIET)
    image = Image.open(file, formats=FORMATS)
    check_pixels(image.height, image.width)
    if image.format == "TIFF":
        _silence_libtiff()
        tags = image.tag_v2  # type: ignore[attr-defined]
        if isinstance(width := tags.get(322), int) and isinstance(height := tags.get(323), int):
            check_pixels(height, width)  # of a tile, which is allocated whole however small the image is
    return image


@functools.cache
def _silence_libtiff() -> None:
    """Keep libtiff from printing what is wrong with a file: the error that names the file is enough."""
    with contextlib.suppress(OSError, AttributeError):  # a Pillow without libtiff, or that hides it
        ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)
