"""Decoding of image files, limited to formats, sizes and frames that are safe to decode."""

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
from resnet_train.files import Unfit, open_regular, read_regular

LARGEST_IMAGE = 300_000_000  # pixels; a larger image is refused from its header, before memory is allocated
LARGEST_FILE = 1_000_000_000  # bytes: three a pixel of such an image, and some more
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no others: for some, Pillow starts programs
PILLOW_FILTER = ("ignore", None, Warning, re.compile("PIL"), 0)  # the entry in warnings.filters for Pillow
QUIET = logging.NullHandler()


class ImageError(UserError):
    """An image that cannot be decoded; the message begins with its name."""


def read_image(path: Path) -> Tensor:
    """Read an image file as (3, H, W) uint8 RGB; EXIF rotation is not applied. Raises UserError naming the file.

    It is an ImageError if the file is there and is no image that can be decoded.
    """
    try:
        data = read_regular(path, LARGEST_FILE)
    except OSError as error:
        kind = ImageError if isinstance(error, Unfit) else UserError
        raise kind(f"{path}: is not an image that can be read ({error.strerror})") from error
    return decode(data, str(path)).permute(2, 0, 1)


def image_size(path: Path) -> tuple[int, int]:
    """Width and height of an image file, from its header. Raises UserError naming the file."""
    try:
        file = open_regular(path)
    except OSError as error:
        raise UserError(f"{path}: is not an image that can be read ({error.strerror})") from error
    with file, _decode_errors(str(path)), _open(file) as image:
        return image.size


def decode(data: bytes, name: str, factor: int = 1) -> Tensor:
    """Decode an image as (H, W, 3) uint8 RGB, whatever its suffix. Raises ImageError, which begins with `name`.

    With a `factor` of 2, 4 or 8 a JPEG for which `jpeg_size` gives a size may be decoded at 1/factor; others are not
    reduced.
    """
    with _decode_errors(name):
        if size := jpeg_size(data):
            check_pixels(*size)
            limits = {"min_height": -(-size[0] // factor), "min_width": -(-size[1] // factor)} if factor > 1 else {}
            with contextlib.suppress(ValueError):  # then Pillow tries
                # The same pixels as Pillow's, faster.
                return torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB", **limits))
        with _open(io.BytesIO(data)) as image:
            return from_pillow(image)


def from_pillow(image: Image.Image) -> Tensor:
    """The pixels of a Pillow image as (H, W, 3) uint8 RGB."""
    if image.mode.startswith("I;16") or (image.format, image.mode) == ("PPM", "I"):  # 16 bits
        grey = (np.asarray(image) >> 8).astype(np.uint8)  # Pillow would clip instead of scaling
        return torch.from_numpy(grey[..., None].repeat(3, 2))
    if image.mode in ("I", "F"):
        raise ValueError(f"has 32 bits a pixel, mode {image.mode}, of which nothing says what is white")
    opaque = image.convert("RGBA") if "transparency" in image.info else image  # else Pillow warns
    return torch.from_numpy(np.array(opaque.convert("RGB")))


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that may be decoded at reduced size; None for any other image.

    These have a baseline or progressive frame of 8 bits, grey or with three colours. libjpeg would write out of bounds
    when it reduces a lossless frame. Unusual sequences of segments give None, so that libjpeg cannot find another frame
    than this function.
    """
    offset = 2
    while data[:2] == b"\xff\xd8" and len(data) >= offset + 10 and data[offset] == 0xFF:
        kind, length = data[offset + 1], int.from_bytes(data[offset + 2 : offset + 4])
        if kind in (0xC0, 0xC2):  # baseline and progressive
            bits, height, width, colours = struct.unpack_from(">BHHB", data, offset + 4)
            return (height, width) if bits == 8 and height and width and colours in (1, 3) else None
        if not (kind in (0xC4, 0xDB, 0xDD, 0xFE) or 0xE0 <= kind <= 0xEF) or length < 2:  # tables, comments, APPn
            return None
        offset += 2 + length
    return None


def check_pixels(height: int, width: int) -> None:
    """Raises ValueError if an image declares more pixels than LARGEST_IMAGE."""
    if height * width > LARGEST_IMAGE:
        raise ValueError(f"is declared as {width}x{height}, above {LARGEST_IMAGE:,} pixels")


@contextlib.contextmanager
def _decode_errors(name: str) -> Iterator[None]:
    """Turn any exception of a decoder into an ImageError, except MemoryError."""
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
    """Open an image and check the size in its header; warnings of Pillow are silenced."""
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
            check_pixels(height, width)  # of a tile, which is allocated at full size even for a small image
    return image


@functools.cache
def _silence_libtiff() -> None:
    """Keep libtiff from printing errors: the exception names the file already."""
    with contextlib.suppress(OSError, AttributeError):  # a Pillow without libtiff, or with hidden symbols
        ctypes.CDLL(Image.core.__file__).TIFFSetErrorHandler(None)
