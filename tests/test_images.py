"""CIFAR-10's archive, class-folder trees and digits as tensors; what is wrong with a data set is said in one line."""

import contextlib
import hashlib
import io
import json
import logging
import os
import pickle
import random
import shutil
import struct
import tarfile
import warnings
import zlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from resnet_train.classification.run import build
from resnet_train.config.compose import compose
from resnet_train.config.layout import (
    CIFAR_FOLDER,
    check_source,
    class_folders,
    count_images,
    describe_left_out,
    files_for_test,
    is_official,
    left_out,
)
from resnet_train.config.train import check_train
from resnet_train.data import crops
from resnet_train.data.cache import cache_folder
from resnet_train.data.cifar10 import TEST_FILES, TRAIN_FILES, read_official
from resnet_train.data.crops import LONGEST, center_view, cut, whole_view
from resnet_train.data.decode import ImageError, _decode_errors, check_pixels, decode, image_size, jpeg_size, read_image
from resnet_train.data.image_set import CIFAR10_FINGERPRINT, ImageSet, make_data_set
from resnet_train.data.imagefolder import open_image_splits
from resnet_train.data.memory import MemoryDataset
from resnet_train.data.pack import packed_image
from resnet_train.data.source import file_names, load
from resnet_train.detection import annotations as detection
from resnet_train.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RESNET_TRAIN_DATA", str(tmp_path / "cache"))


def one_line(caught, *words):
    """The caught UserError has no line break and says all `words`."""
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message


def everything(folder):
    """All paths below a folder."""
    return sorted(folder.rglob("*"))


def pixels(seed, *shape):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# The official archive, with few images


def planes_of(seed):
    """Rows as in the archive: 1,024 red, then green, then blue values of each image."""
    return pixels(seed, 3, 3072)


def batch_bytes(seed):
    return pickle.dumps({"data": planes_of(seed).numpy(), "labels": [seed % 10, 9, 0]}, protocol=2)


CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
NAMES = [*TRAIN_FILES, *TEST_FILES]
RAW = {name: batch_bytes(seed) for seed, name in enumerate(NAMES)}


def md5s(raw=RAW):
    """The two mappings that `read_official` takes, right for `raw`."""
    sums = {name: hashlib.md5(raw[name]).hexdigest() for name in NAMES}
    return {"train": {name: sums[name] for name in TRAIN_FILES}, "test": {name: sums[name] for name in TEST_FILES}}


def member(name, content=None, **fields):
    """One entry of an archive: a file, or what `fields` makes of it."""
    entry = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(entry, key, value)
    if content is None:
        return entry, None
    entry.size = len(content)
    return entry, io.BytesIO(content)


def members(raw=RAW):
    return [member(f"{CIFAR_FOLDER}/{name}", content) for name, content in raw.items()]


def write_archive(path, entries, compression="gz"):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, f"w:{compression}") as archive:
        for entry, content in entries:
            archive.addfile(entry, content)
    return path


def write_folder(path, raw=RAW):
    path.mkdir(parents=True)
    for name, content in raw.items():
        (path / name).write_bytes(content)
    return path


@pytest.fixture(params=["archive", "folder", "parent"])
def source_of(request, tmp_path):
    """Write `raw` in one of the three forms that data.root= takes."""

    def write(raw=RAW):
        if request.param == "archive":
            return write_archive(tmp_path / "cifar.tar.gz", members(raw))
        folder = write_folder(tmp_path / "unpacked" / CIFAR_FOLDER, raw)
        return folder if request.param == "folder" else folder.parent

    return write


def test_the_official_file_names_are_the_published_ones():
    assert list(TRAIN_FILES) == [f"data_batch_{number}" for number in range(1, 6)]
    assert list(TEST_FILES) == ["test_batch"]


def test_official_images_are_the_planes_of_the_archive(source_of):
    source = source_of()
    assert is_official("cifar10", source)
    data = read_official(source, **md5s())
    assert (data.train.images.shape, data.test.images.shape) == ((15, 32, 32, 3), (3, 32, 32, 3))
    assert data.train.images.dtype == data.test.images.dtype == torch.uint8
    for part, seeds in ((data.train, range(5)), (data.test, [5])):
        rows = torch.cat([planes_of(seed) for seed in seeds])
        for image, row in zip(part.images, rows, strict=True):
            for channel in range(3):
                assert torch.equal(image[:, :, channel], row[1024 * channel : 1024 * (channel + 1)].view(32, 32))
        assert part.labels.tolist() == [label for seed in seeds for label in (seed, 9, 0)]
        assert part.labels.dtype == torch.int64
    assert data.classes == CLASSES


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_with_another_checksum_is_refused(name, source_of):
    source = source_of(RAW | {name: RAW[name] + b"\n"})
    with pytest.raises(UserError) as caught:
        read_official(source, **md5s())
    one_line(caught, source, name, "MD5")


def test_all_official_checksums_are_checked(source_of):
    source = source_of()
    with pytest.raises(UserError) as caught:
        load("cifar10", str(source), 32)
    one_line(caught, source, "data_batch_1", "MD5")


def test_a_batch_larger_than_any_is_refused_before_it_is_read(source_of, monkeypatch):
    """Of memory for 60 GB of zeros there is nothing to tell but that it is out."""
    source = source_of()
    monkeypatch.setattr("resnet_train.data.cifar10.LARGEST", 1000)
    with pytest.raises(UserError) as caught:
        read_official(source, **md5s())
    one_line(caught, f"data.root={source}: is not CIFAR-10's", "larger than 1,000 bytes", "data_batch_1")


class Hostile:
    """A pickle that creates a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_hostile_pickle_is_not_executed(source_of, tmp_path):
    hostile = pickle.dumps(Hostile(tmp_path / "mark"))
    source = source_of(RAW | {"data_batch_3": hostile})
    with pytest.raises(UserError, match="data_batch_3"):
        read_official(source, **md5s())
    assert not (tmp_path / "mark").exists()
    pickle.loads(hostile)  # noqa: S301 (it does bite)
    assert (tmp_path / "mark").exists()


def without(name):
    return [entry for entry in members() if not entry[0].name.endswith(name)]


BATCH = f"{CIFAR_FOLDER}/data_batch_2"
LINKS = {
    "symlink outside": member(BATCH, type=tarfile.SYMTYPE, linkname="../../data_batch_2"),
    "symlink to an absolute path": member(BATCH, type=tarfile.SYMTYPE, linkname="/etc/hostname"),
    "symlink to itself": member(BATCH, type=tarfile.SYMTYPE, linkname="data_batch_2"),
    "hard link outside": member(BATCH, type=tarfile.LNKTYPE, linkname="../data_batch_2"),
    "hard link to itself": member(BATCH, type=tarfile.LNKTYPE, linkname=BATCH),
    "folder": member(BATCH, type=tarfile.DIRTYPE),
    "device": member(BATCH, type=tarfile.CHRTYPE),
    "pipe": member(BATCH, type=tarfile.FIFOTYPE),
}
ARCHIVES = {
    "empty": [],
    "other members": [member("notes.txt", b"hello")],
    "one batch missing": without("data_batch_2"),
    "no test batch": without("test_batch"),
    "batches above the folder": [member(f"../{entry.name}", RAW[Path(entry.name).name]) for entry, _ in members()],
    "batches at absolute paths": [member(f"/{entry.name}", RAW[Path(entry.name).name]) for entry, _ in members()],
    **{kind: [*without("data_batch_2"), entry] for kind, entry in LINKS.items()},
}


@pytest.mark.parametrize("entries", ARCHIVES.values(), ids=ARCHIVES)
def test_an_archive_without_the_batches_is_refused_and_nothing_is_written(entries, tmp_path):
    source = write_archive(tmp_path / "inner" / "cifar.tar.gz", entries)
    before = everything(tmp_path)
    with pytest.raises(UserError) as caught:
        read_official(source, **md5s())
    one_line(caught, f"data.root={source}")
    assert everything(tmp_path) == before


def test_other_members_are_left_alone(tmp_path):
    """Names that lead outside, links and devices beside the batches: nothing is unpacked."""
    harm = [
        member("../outside", b"x"),
        member(str(tmp_path / "absolute"), b"x"),
        member(f"{CIFAR_FOLDER}/link", type=tarfile.SYMTYPE, linkname="/etc"),
        member(f"{CIFAR_FOLDER}/device", type=tarfile.BLKTYPE),
    ]
    source = write_archive(tmp_path / "inner" / "cifar.tar.gz", harm + members())
    before = everything(tmp_path)
    assert len(read_official(source, **md5s()).train) == 15
    assert everything(tmp_path) == before


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_archive_is_refused(share, tmp_path):
    source = write_archive(tmp_path / "cifar.tar.gz", members())
    content = source.read_bytes()
    source.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError) as caught:
        read_official(source, **md5s())
    one_line(caught, f"data.root={source}")


@pytest.mark.parametrize("compression", ["gz", "bz2", "xz"])
def test_an_archive_with_flipped_bits_is_refused_or_read_right(compression, tmp_path):
    source, draw = write_archive(tmp_path / "cifar.tar", members(), compression), random.Random(0)
    content, right = source.read_bytes(), read_official(source, **md5s()).digest
    messages = []
    for _ in range(50):
        damaged = bytearray(content)
        damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        source.write_bytes(damaged)
        try:
            assert read_official(source, **md5s()).digest == right
        except UserError as error:
            messages.append(str(error))
    assert len(messages) > 40
    assert "\n" not in "".join(messages)


@pytest.mark.parametrize("content", [b"", b"hello\n", b"<html>" * 1000, bytes(20_000), b"\x1f\x8b\x08", b"BZh9", b"PK"])
def test_a_file_that_is_no_archive_is_refused(content, tmp_path):
    source = tmp_path / "cifar.tar.gz"
    source.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load("cifar10", str(source), 32)
    one_line(caught, f"data.root={source}")


def test_a_folder_without_all_batches_is_refused(tmp_path):
    folder = write_folder(tmp_path / "unpacked", {"data_batch_1": RAW["data_batch_1"]})
    for read in (lambda: read_official(folder), lambda: load("cifar10", str(folder), 32)):
        with pytest.raises(UserError) as caught:
            read()
        one_line(caught, "data_batch_2")


# Class folders


def save(path, image):
    """An image file of (H, W, 3) or (H, W) uint8 pixels, in the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.numpy()).save(path)
    return path


def fill(folder, counts, size=(32, 32), suffix=".png", seed=0):
    """`folder`/<class>/<number> images of random pixels; `counts` says how many of each class."""
    for name, count in counts.items():
        for index in range(count):
            save(folder / name / f"{index:02}{suffix}", pixels(seed := seed + 1, *size, 3))


@pytest.fixture
def tree(tmp_path):
    """A tree of 32x32 PNG images of two classes: 3 and 2 to train, 1 and 2 to test."""
    fill(tmp_path / "tree" / "train", {"cat": 3, "dog": 2})
    fill(tmp_path / "tree" / "test", {"cat": 1, "dog": 2}, seed=100)
    return tmp_path / "tree"


def rgb(path):
    """(32, 32, 3) pixels as Pillow reads them."""
    with Image.open(path) as image:
        return torch.tensor(list(image.convert("RGB").tobytes())).view(32, 32, 3)


def check(root, name="cifar10"):
    check_source(name, str(root))


def expected(folder):
    """The pixels of all files below a folder, in sorted order."""
    return torch.stack([rgb(path) for path in sorted(folder.glob("*/*"))])


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ({"cat": 3, "dog": 2}, {"cat": 1, "dog": 2}),
        ({"b": 1, "A": 2, "é ü": 3, "10": 1, "9": 2}, {"b": 2, "A": 1, "é ü": 1, "10": 3, "9": 1}),
        ({f"class {number}": 1 for number in range(12)}, {f"class {number}": 1 for number in range(12)}),
    ],
)
def test_class_folders_of_any_name_and_count(train, test, tmp_path):
    fill(tmp_path / "tree" / "train", train)
    fill(tmp_path / "tree" / "test", test, seed=100)
    check(tmp_path / "tree")
    data = load("cifar10", str(tmp_path / "tree"), 32)
    assert data.classes == sorted(train)
    for part, counts, folder in ((data.train, train, "train"), (data.test, test, "test")):
        assert part.labels.tolist() == [i for i, name in enumerate(sorted(counts)) for _ in range(counts[name])]
        assert (part.images.dtype, part.labels.dtype) == (torch.uint8, torch.int64)
        assert torch.equal(part.images, expected(tmp_path / "tree" / folder))


def test_files_that_are_no_images_by_name_are_left_out(tree):
    for name in (".hidden.png", "._00.png", "Thumbs.db", "labels.txt"):
        (tree / "train" / "cat" / name).write_bytes(b"no image")
    (tree / "train" / "notes.txt").write_text("no class")
    shutil.copy(tree / "train" / "cat" / "00.png", tree / "train" / "cat" / "99.PNG")
    data = load("cifar10", str(tree), 32)
    assert (data.classes, data.train.labels.tolist()) == (["cat", "dog"], [0, 0, 0, 0, 1, 1])
    assert torch.equal(data.train.images[0], data.train.images[3])


def test_hidden_folders_are_no_classes(tree):
    """Such as Jupyter's; in the training part, in the test part, or alone in one that then has no classes."""
    first = load("cifar10", str(tree), 32)
    for part in ("train", "test"):
        fill(tree / part, {".ipynb_checkpoints": 2})
    (tree / "train" / ".empty").mkdir()
    check(tree)
    assert class_folders(tree) == (["cat", "dog"], "test")
    same(load("cifar10", str(tree), 32), first)
    assert open_image_splits(str(tree)).classes == ["cat", "dog"]
    assert count_images(tree / "train") == 5
    (tree / "test").rename(tree / "val")
    (tree / "test" / ".ipynb_checkpoints").mkdir(parents=True)
    assert class_folders(tree) == (["cat", "dog"], "val")


def test_names_that_are_not_utf8_are_names(tree):
    """Latin-1's é, in a class and in a file."""
    name = os.fsdecode(b"caf\xe9")
    for part in ("train", "test"):
        (tree / part / "cat").rename(tree / part / name)
        (tree / part / name / "00.png").rename(tree / part / name / f"{name}.png")
    check(tree)
    for _ in range(2):  # then from the cache
        data, photographs = load("imagefolder", str(tree), 32), open_image_splits(str(tree))
        assert data.classes == photographs.classes == [name, "dog"]
        assert torch.equal(data.train.images, expected(tree / "train"))
        assert Path(photographs.train.read(2)[0]) == tree / "train" / name / f"{name}.png"
    sets = MemoryDataset(name="imagefolder", root=str(tree), size=32, validation=0)
    assert sets.classes == [name, "dog"]


def test_what_is_left_out_of_a_tree_is_counted(tree):
    for part, name in (("train", "cat"), ("test", "dog")):
        fill(tree / part / name, {"more": 3, "deeper/still": 2}, seed=7)
        for file in ("a.avif", "b.AVIF", "c.heic", "notes", "Thumbs.db", ".hidden", ".DS_Store"):
            (tree / part / name / file).write_bytes(b"")
    (tree / "train" / "dog" / "empty").mkdir()
    (tree / "train" / "dog" / "x.t\nxt").write_bytes(b"")
    wanted = {"in subfolders": 10, ".avif": 4, ".heic": 2, "without a suffix": 2, ".db": 2, ".t\\nxt": 1}
    assert +left_out("imagefolder", str(tree)) == wanted
    for _ in range(2):  # then from the kept listing
        assert +Counter(open_image_splits(str(tree)).left_out) == wanted
    line = describe_left_out(wanted)
    assert line.startswith(
        "left out of the class folders: 10 in subfolders, 4 .avif, 2 .heic, 2 without a suffix, 2 .db, "
    )
    assert "1 of other kinds; images end in .jpg .jpeg .png" in line
    assert "\n" not in line
    assert len(load("imagefolder", str(tree), 32).train) == 5


def test_where_nothing_is_left_out_nothing_is_said(tree):
    assert describe_left_out(left_out("cifar10", str(tree))) == ""
    assert describe_left_out(open_image_splits(str(tree)).left_out) == ""
    assert describe_left_out(left_out("digits", None)) == describe_left_out(left_out("cifar10", None)) == ""


def test_val_stands_for_test(tree):
    before = load("cifar10", str(tree), 32)
    (tree / "test").rename(tree / "val")
    check(tree)
    assert class_folders(tree) == (["cat", "dog"], "val")
    assert load("cifar10", str(tree), 32).digest == before.digest
    assert file_names("imagefolder", str(tree), ["cat", "dog"], "test") == ["cat/00.png", "dog/00.png", "dog/01.png"]


def test_a_test_folder_without_classes_gives_way_to_val(tree):
    """As in ImageNet, whose test images have no labels."""
    (tree / "test").rename(tree / "val")
    save(tree / "test" / "00.png", pixels(1, 32, 32, 3))
    check(tree)
    assert class_folders(tree) == (["cat", "dog"], "val")
    assert len(load("cifar10", str(tree), 32).test) == 3


def test_an_undivided_tree_is_divided_by_names(tmp_path):
    """A fifth of each class, at least one, for both kinds of data sets alike, whatever else is there."""
    root = tmp_path / "photos"
    fill(root, {"cat": 10, "dog": 4})
    check(root, "imagefolder")
    assert class_folders(root) == (["cat", "dog"], "")
    tested = files_for_test("imagefolder", str(root))
    ordered = sorted(range(10), key=lambda i: hashlib.sha256(f"cat/{i:02d}.png".encode()).digest())
    assert tested[:-1] == sorted(f"cat/{i:02d}.png" for i in ordered[:2])
    assert [name[:4] for name in tested] == ["cat/", "cat/", "dog/"]
    small, photographs = load("imagefolder", str(root), 32), open_image_splits(str(root))
    assert (len(small.train), len(small.test)) == (len(photographs.train), len(photographs.test)) == (11, 3)
    assert [photographs.test.name(i) for i in range(3)] == tested
    for part, files in (("train", photographs.train), ("test", photographs.test)):
        images = small.train if part == "train" else small.test
        for index in range(len(files)):
            path, _, label = files.entry(index)
            assert torch.equal(images.images[index], read_image(Path(path)).permute(1, 2, 0))
            assert images.labels[index] == label
        assert file_names("imagefolder", str(root), small.classes, part) == [files.name(i) for i in range(len(files))]
    assert files_for_test("imagefolder", None) == files_for_test("digits", None) == []


def test_an_evaluation_on_an_undivided_tree_says_what_it_tests(trained, tmp_path, command_here):
    fill(tmp_path / "fresh", {str(label): 10 for label in range(10)})
    words = [trained, "data=imagefolder", "device=cpu", "out=r.json"]
    told = command_here("evaluate", *words, "data.root=fresh")
    fifth = "has no train/ and test/: the fifth that training would hold out is tested, 20 of 100 images\n"
    assert told.startswith(f"note: {tmp_path / 'fresh'} {fifth}")
    for part in ("train", "test"):
        (tmp_path / "divided" / part).parent.mkdir(exist_ok=True)
        (tmp_path / "divided" / part).symlink_to(tmp_path / "fresh")
    assert "note: " not in command_here("evaluate", *words, "data.root=divided")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"cat": 3, "dog": 1}, "dog/ has one image; at least two are needed, one of them for the test"),
        ({"cat": 3, "dog": 2, "empty": 0}, "empty/ has no images"),
        ({"cat": 3}, "photos: has one class, cat; at least two are needed"),
        ({"cat": 3, "empty": 0}, "photos: has one class, cat; at least two are needed; without images: empty/$"),
        ({".": 3}, "photos: has 3 images in no folder; put the images into a folder for each class"),
        ({"inner/cat": 2, "inner/dog": 2}, "photos: the classes seem to lie in inner/; try data.root=.*photos/inner$"),
        ({"inner/train/cat": 2, "inner/test/cat": 2}, "photos: the classes seem to lie in inner/"),
        ({"training/cat": 2}, r"has no train/ and test/ .*; training/ is not one: name it train/"),
        ({"a": 0, "b": 0}, r"has neither a folder of images for each class nor train/ and test/ \(or val/\)"),
    ],
)
def test_what_cannot_be_divided_is_refused(tmp_path, counts, message):
    fill(tmp_path / "photos", counts)
    for name in counts:
        (tmp_path / "photos" / name).mkdir(exist_ok=True, parents=True)
    with pytest.raises(UserError, match=message):
        check_source("imagefolder", str(tmp_path / "photos"))


def test_data_without_a_root_say_what_it_may_be():
    with pytest.raises(UserError, match="a folder with train/ and test/ or val/, or a folder for each class"):
        check_source("imagefolder", None)


@pytest.mark.parametrize(("held", "warned"), [(4, False), (5, True)])
def test_what_is_taken_for_the_test_and_held_out_is_told(tmp_path, held, warned):
    root = tmp_path / "photos"
    fill(root, {"cat": 5, "dog": 5})
    words = ["data=imagefolder", f"data.root={root}", "depth=20", "batch_size=3", "compile=false", "device=cpu"]
    config = check_train(compose("train", [*words, f"data.validation={held}", "precision=fp32"]))
    told = build(config).describe()
    assert f"note: {root} has no test part: a fifth of each class, 2 of 10 files, is taken (split.json)" in told
    warning = "warning: data.validation=5 leaves 3 of 8 images for the training"
    assert [line for line in told if line.startswith("warning")] == [warning] * warned


@pytest.mark.parametrize(
    ("schedule", "warned"),
    [
        ("iterations=300 log_every=20", "0.03: a plateau of 9 iterations, where the error is known every 20,"),
        ("iterations=300 log_every=3", None),
        ("iterations=300 log_every=20 schedule.patience=0.5", None),
        ("iterations=300 log_every=20 schedule=cosine", None),
    ],
)
def test_a_plateau_that_chance_makes_is_warned_of(tmp_path, schedule, warned):
    fill(tmp_path / "photos", {"cat": 5, "dog": 5})
    words = ["data=imagenet", f"data.root={tmp_path}/photos", "depth=18", "batch_size=3", "device=cpu"]
    config = check_train(compose("train", [*words, "precision=fp32", "normalise=channels", *schedule.split()]))
    found = [line for line in build(config).describe() if line.startswith("warning")]
    assert [line.startswith(f"warning: schedule.patience={warned}") for line in found] == [True] * (warned is not None)


def test_cifar10_is_not_divided(tmp_path):
    """The paper's test images are given."""
    fill(tmp_path / "photos", {"cat": 3, "dog": 3})
    with pytest.raises(UserError, match="data=imagefolder divides it by itself"):
        check_source("cifar10", str(tmp_path / "photos"))


def test_jpeg_keeps_colours_and_place(tree):
    """A red left half and a blue right half."""
    image = torch.zeros(32, 32, 3, dtype=torch.uint8)
    image[:, :16, 0], image[:, 16:, 2] = 200, 100
    (tree / "train" / "cat" / "00.png").unlink()
    Image.fromarray(image.numpy()).save(tree / "train" / "cat" / "00.jpg", quality=95, subsampling=0)
    read = load("cifar10", str(tree), 32).train.images[0]
    assert (read.int() - image).abs().max() <= 8


def paletted(path, image):
    Image.fromarray(image.numpy()).quantize(256).save(path)


KINDS = {
    "grey.png": lambda path, image: Image.fromarray(image.numpy()).convert("L").save(path),
    "grey.jpg": lambda path, image: Image.fromarray(image.numpy()).convert("L").save(path, quality=100),
    "grey with alpha.png": lambda path, image: Image.fromarray(image.numpy()).convert("LA").save(path),
    "two-level.png": lambda path, image: Image.fromarray(image.numpy()).convert("1").save(path),
    "alpha.png": lambda path, image: Image.fromarray(image.numpy()).convert("RGBA").save(path),
    "palette.png": paletted,
    "picture.gif": paletted,
    "lossless.webp": lambda path, image: Image.fromarray(image.numpy()).save(path, lossless=True),
    "cmyk.jpg": lambda path, image: Image.fromarray(image.numpy()).convert("CMYK").save(path, quality=100),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_image_becomes_rgb(name, tree):
    """Grey, palette, alpha, CMYK: what Pillow calls its RGB."""
    image = pixels(7, 4, 4, 3).repeat_interleave(8, 0).repeat_interleave(8, 1)
    path = tree / "train" / "cat" / f"00 {name}"
    KINDS[name](path, image)
    read = load("cifar10", str(tree), 32).train.images[0]
    assert (read.int() - rgb(path)).abs().max() <= 2
    if "grey" in name:
        assert torch.equal(read, read[:, :, :1].expand(-1, -1, 3))


def test_16_bit_images_keep_their_brightness(tree):
    """A ramp from black to white: 0, 2,048, … 63,488 of 65,535."""
    ramp = (torch.arange(32) * 2048).to(torch.uint16).expand(32, 32).contiguous()
    Image.fromarray(ramp.numpy()).save(tree / "train" / "cat" / "00.png")
    read = load("cifar10", str(tree), 32).train.images[0]
    assert (read.int() - (torch.arange(32) * 8)[:, None]).abs().max() <= 1


def test_an_animation_counts_as_its_first_picture(tree):
    pictures = [Image.new("RGB", (32, 32), colour) for colour in ("red", "green", "blue")]
    pictures[0].save(tree / "train" / "cat" / "00 moving.gif", save_all=True, append_images=pictures[1:])
    for name in ("cifar10", "imagefolder"):
        read = load(name, str(tree), 32).train.images[0]
        assert torch.equal(read.int(), torch.tensor([255, 0, 0]).expand(32, 32, 3).int())


@pytest.mark.parametrize(("height", "width"), [(32, 33), (31, 32), (64, 64), (1, 1)])
def test_another_size_is_refused_for_cifar10_and_resized_for_imagefolder(height, width, tree):
    path = save(tree / "test" / "dog" / "01.png", torch.full((height, width, 3), 77, dtype=torch.uint8))
    with pytest.raises(UserError) as caught:
        load("cifar10", str(tree), 32)
    one_line(caught, path, f"{width}x{height}", "32x32", "data=imagefolder")
    data = load("imagefolder", str(tree), 32)
    assert data.test.images.shape == (3, 32, 32, 3)
    assert (data.test.images[2] == 77).all()
    assert torch.equal(data.train.images, expected(tree / "train"))


def test_imagefolder_takes_the_center(tmp_path):
    """60x40 with 10 columns of another colour at each side: the shorter side becomes 20, and the sides are cut off."""
    image = torch.full((40, 60, 3), 200, dtype=torch.uint8)
    image[:, :9] = image[:, -9:] = 0
    for part in ("train", "test"):
        save(tmp_path / "tree" / part / "a" / "0.png", image)
        save(tmp_path / "tree" / part / "b" / "0.png", image.transpose(0, 1).contiguous())
    data = load("imagefolder", str(tmp_path / "tree"), 20)
    assert data.train.images.shape == data.test.images.shape == (2, 20, 20, 3)
    assert (data.train.images[:, 1:-1, 1:-1] == 200).all()


def half(content):
    return content[: len(content) // 2]


@pytest.mark.parametrize("name", ["cifar10", "imagefolder"])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".gif"])
@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"hello\n", half], ids=["zero bytes", "text", "half"])
def test_a_file_that_is_no_image_is_named(damage, suffix, name, tree):
    path = save(tree / "train" / "dog" / f"00{suffix}", pixels(1, 32, 32, 3))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError) as caught:
        load(name, str(tree), 32)
    one_line(caught, path)


def spoil(root, *names):
    for name in names:
        (root / name).write_bytes(b"no image")


def test_all_broken_files_are_named_at_once(tree):
    fill(tree / "train", {"cat": 6}, seed=3)
    spoil(tree, *(f"train/cat/{i:02d}.png" for i in range(5)))
    (tree / "train" / "dog" / "link.png").symlink_to("nowhere")
    (tree / "test" / "dog" / "01.png").write_bytes(b"no image")
    for _ in range(2):  # nothing of this is kept
        with pytest.raises(UserError) as caught:
            load("imagefolder", str(tree), 32)
        first, *others = sorted(
            [*(tree / "train/cat").glob("0[0-4].png"), tree / "train/dog/link.png", tree / "test/dog/01.png"]
        )
        one_line(caught, f"{first}: is not an image that can be read (none of JPEG, ")
        one_line(
            caught, f"; and 6 more cannot be used: {', '.join(map(str, others[:3]))} and 3 more; ", "data.broken=skip"
        )
    (tree / "train" / "dog" / "link.png").unlink()
    with pytest.raises(UserError) as caught:
        load("cifar10", str(tree), 32)
    assert "data.broken" not in str(caught.value)  # data=cifar10 takes none


@pytest.mark.parametrize("divided", [True, False])
def test_broken_files_in_memory_are_left_out_where_asked(divided, tmp_path):
    """Of training and test; what is left is as before, and an undivided tree is divided as before."""
    root = tmp_path / "photos"
    for part in ("train", "test") if divided else (".",):
        fill(root / part, {"cat": 6, "dog": 13}, seed=len(part))
    whole = load("imagefolder", str(root), 16)
    names = {part: file_names("imagefolder", str(root), whole.classes, part) for part in ("train", "test")}
    broken = {"train": [names["train"][i] for i in (1, -1)], "test": names["test"][-1:]}
    spoil(root, *(f"{part if divided else '.'}/{name}" for part, group in broken.items() for name in group))
    for _ in range(2):  # then from the cache
        data = load("imagefolder", str(root), 16, skip=True)
        assert data.unreadable == broken
        assert data.digest != whole.digest
        for part in ("train", "test"):
            kept = torch.tensor([name not in broken[part] for name in names[part]])
            assert torch.equal(getattr(data, part).images, getattr(whole, part).images[kept])
            assert torch.equal(getattr(data, part).labels, getattr(whole, part).labels[kept])
    sets = MemoryDataset(name="imagefolder", root=str(root), size=16, validation=3, broken="skip")
    for part in ("train", "val", "test"):
        for index, name in enumerate(sets.names(part)):
            place = root / ("test" if part == "test" else "train") / name if divided else root / name
            assert torch.equal(sets.picture(part, index), whole_view(read_image(place), 16).permute(1, 2, 0))
    with pytest.raises(UserError, match="and 2 more cannot be used"):
        load("imagefolder", str(root), 16)


def test_a_class_without_any_image_that_can_be_decoded_is_refused(tree):
    spoil(tree, "train/dog/00.png", "train/dog/01.png")
    with pytest.raises(UserError, match=r"tree: dog has no training image that can be decoded: dog/00.png, dog/01.png"):
        load("imagefolder", str(tree), 32, skip=True)


@pytest.mark.long
def test_a_run_says_what_it_leaves_out(command, tmp_path):
    """In a line, in split.json and in summary.json; an evaluation of its checkpoint leaves out the same."""
    fill(tmp_path / "photos", {"cat": 12, "dog": 12})
    tested = files_for_test("imagefolder", str(tmp_path / "photos"))
    broken = {"train": ["cat/00.png" if "cat/00.png" not in tested else "cat/01.png"], "test": tested[-1:]}
    spoil(tmp_path / "photos", *broken["train"], *broken["test"])
    words = "data=imagefolder data.root=photos data.size=16 depth=8 batch_size=8 iterations=2 compile=false run_dir=run"
    stopped = command(*words.split(), "device=cpu")
    assert stopped.returncode == 2
    assert "and 1 more cannot be used" in stopped.stderr
    assert not (tmp_path / "run").exists()
    told = command(*words.split(), "device=cpu", "data.broken=skip")
    assert told.returncode == 0, told.stderr
    line = f"images left out because they cannot be decoded: 2 (train: {broken['train'][0]}, test: {tested[-1]})"
    assert f"warning: {line}; split.json lists them\n" in told.stdout
    assert "3 of 22 files, is taken" in told.stdout
    split, summary = (json.loads((tmp_path / "run" / f"{name}.json").read_text()) for name in ("split", "summary"))
    assert split == {"test": tested[:-1], "unreadable": broken}
    assert summary["images"] == {"train": 19, "val": 0, "test": 3}
    assert summary["unreadable"] == {"train": 1, "test": 1}
    assert "skipped" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    evaluated = command("run/checkpoints/last.pt", "device=cpu", "out=e.json", entry="evaluate")
    assert "; images left out because they cannot be decoded: 1; e.json" in evaluated.stdout
    result = json.loads((tmp_path / "e.json").read_text())
    assert (result["seen"], result["unreadable"]) == (3, 1)


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("nowhere")], ids=["folder", "broken link"])
def test_something_else_named_like_an_image_is_named(make, tree):
    path = tree / "train" / "dog" / "zz.jpg"
    make(path)
    with pytest.raises(UserError) as caught:
        load("cifar10", str(tree), 32)
    one_line(caught, path)


def test_read_image_has_channels_first(tmp_path):
    image = pixels(3, 5, 7, 3)
    assert torch.equal(read_image(save(tmp_path / "a.png", image)), image.permute(2, 0, 1))
    with pytest.raises(UserError) as caught:
        read_image(tmp_path / "absent.png")
    one_line(caught, tmp_path / "absent.png")


def empty_class(tree):
    shutil.rmtree(tree / "train" / "dog")
    (tree / "train" / "dog").mkdir()


def only_hidden(tree):
    empty_class(tree)
    (tree / "train" / "dog" / ".00.png").write_bytes(b"")


def empty_root(tree):
    shutil.rmtree(tree)
    tree.mkdir()


def one_class(tree):
    shutil.rmtree(tree / "train" / "dog")
    shutil.rmtree(tree / "test" / "dog")


def empty_train(tree):
    shutil.rmtree(tree / "train")
    (tree / "train").mkdir()


WRONG_TREES = {
    "class missing in test": (lambda tree: shutil.rmtree(tree / "test" / "dog"), ["class dog", "test/"]),
    "class missing in train": (lambda tree: shutil.rmtree(tree / "train" / "dog"), ["class dog", "train/"]),
    "empty class": (empty_class, ["train/dog/", "no images"]),
    "only hidden files": (only_hidden, ["train/dog/", "no images"]),
    "empty root": (empty_root, ["empty"]),
    "no root": (shutil.rmtree, ["no such file or folder"]),
    "no test": (lambda tree: shutil.rmtree(tree / "test"), ["test/", "val/"]),
    "no train": (lambda tree: shutil.rmtree(tree / "train"), ["train/"]),
    "train without classes": (empty_train, ["train/", "no folder for any class"]),
    "one class": (one_class, ["one class, cat"]),
}


@pytest.mark.parametrize("name", ["cifar10", "imagefolder", "imagenet"])
@pytest.mark.parametrize(("spoil", "words"), WRONG_TREES.values(), ids=WRONG_TREES)
def test_a_wrong_tree_is_refused_by_its_listing(spoil, words, name, tree):
    spoil(tree)
    with pytest.raises(UserError) as caught:
        check(tree, name)
    one_line(caught, f"data.root={tree}", *words)


@pytest.mark.parametrize("name", ["cifar10", "imagefolder", "imagenet"])
def test_a_right_tree_is_accepted(name, tree):
    check(tree, name)


@pytest.mark.parametrize("name", ["imagefolder", "imagenet"])
def test_a_file_is_no_root_of_a_tree(name, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError) as caught:
        check(tmp_path / "file", name)
    one_line(caught, tmp_path / "file", "is a file")


# Images that are odd, or that mean harm


def segment(kind, body):
    """A segment of a JPEG with its marker and length."""
    return struct.pack(">BBH", 0xFF, kind, len(body) + 2) + body


def frame(kind, height, width, colours=3, bits=8):
    """The header of a JPEG's frame: baseline is 0xC0, progressive 0xC2, lossless 0xC3."""
    return segment(kind, struct.pack(">BHHB", bits, height, width, colours) + bytes([1, 0x11, 0] * colours))


def lossless(height, width):
    """A lossless JPEG of grey pixels: each differs by 0 from the one before, which is one bit in one code."""
    table = segment(0xC4, bytes([0, 1] + [0] * 15 + [0]))
    scan = segment(0xDA, bytes([3, 1, 0, 1, 0, 1, 0, 1, 0, 0]))
    zeros = bytes(height * width * 3 // 8 + 1)
    return b"\xff\xd8" + frame(0xC3, height, width) + table + scan + zeros + b"\xff\xd9"


@pytest.mark.parametrize("data", [lossless(200, 300), lossless(1600, 40)])
def test_a_jpeg_that_libjpeg_cannot_reduce_is_decoded_whole(data):
    """Reducing it, libjpeg writes beyond its memory, and the process dies."""
    whole = decode(data, "x.jpg")
    assert (whole == 128).all()
    assert jpeg_size(data) is None
    assert torch.equal(decode(data, "x.jpg", 8), whole)
    assert torch.equal(cut(data, "x.jpg", 8, lambda height, width: (0, 0, height, width)), whole[:8, :8])


def jpeg(mode="RGB", **options):
    file = io.BytesIO()
    Image.fromarray(pixels(7, 37, 41, 3).numpy()).convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.mark.parametrize(("mode", "options"), [("RGB", {}), ("L", {}), ("RGB", {"progressive": True})])
def test_a_usual_jpeg_may_be_reduced(mode, options):
    data = jpeg(mode, **options, comment=b"c" * 300, exif=b"Exif\0\0" + bytes(999))
    assert jpeg_size(data) == (37, 41)
    assert decode(data, "x", 4).shape == (10, 11, 3)


def test_any_other_image_may_not_be_reduced():
    usual = jpeg()
    place = usual.index(b"\xff\xc0")
    others = [usual[:place] + bytes([0xFF, kind]) + usual[place + 2 :] for kind in {*range(0xC0, 0x100)} - {0xC0, 0xC2}]
    others += [usual[:place] + between + usual[place:] for between in (b"\0", b"\xff", b"\xff\x01", b"\xff\xfe\0\1")]
    others += [usual[:place] + frame(0xC0, *size) for size in ((0, 9), (9, 0), (9, 9, 4), (9, 9, 2), (9, 9, 3, 12))]
    others += [jpeg("CMYK"), usual[: place + 9], usual[:4], usual[:2], b"", b"text"]
    assert [jpeg_size(data) for data in others] == [None] * len(others)


@pytest.mark.parametrize("kind", ["EPS", "ICO", "TGA", "SGI", "PCX", "DDS", "ICNS", "PDF", "SPIDER", "JPEG2000"])
def test_no_other_format_is_opened(kind, tmp_path, monkeypatch):
    """PostScript would start a program, Ghostscript; whatever the file is named."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/mark\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # what it has found before
    mode = "F" if kind == "SPIDER" else "RGB"
    file = io.BytesIO()
    Image.fromarray(pixels(7, 64, 64, 3).numpy()).convert(mode).save(file, kind)
    (tmp_path / "x.jpg").write_bytes(file.getvalue())
    for read in (read_image, image_size):
        with pytest.raises(ImageError) as caught:
            read(tmp_path / "x.jpg")
        one_line(caught, tmp_path / "x.jpg", "none of JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("kind", ["float32", "int32"])
def test_pixels_of_32_bits_are_no_image(kind, tmp_path):
    """Pillow would clip them to black or white."""
    image = Image.fromarray(pixels(7, 8, 8, 3)[..., 0].numpy().astype(kind))
    image.save(tmp_path / "x.tif")
    with pytest.raises(ImageError, match="has 32 bits a pixel"):
        read_image(tmp_path / "x.tif")


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "png", "webp", "gif", "bmp", "tif", "Tiff", "ppm", "PGM"])
def test_suffixes_count_in_any_case(suffix, tree):
    path = tree / "train" / "cat" / f"zz.{suffix}"
    with Image.open(tree / "train" / "cat" / "00.png") as image:
        image.convert("L" if suffix == "PGM" else "RGB").save(path)
    assert len(load("cifar10", str(tree), 32).train) == 6
    assert len(open_image_splits(str(tree)).train) == 6


def tiff(**tags):
    """A grey TIFF of the given tags beside the usual ones, without pixels."""
    numbers = {
        "ImageWidth": 256,
        "ImageLength": 257,
        "Compression": 259,
        "TileWidth": 322,
        "TileLength": 323,
        "SamplesPerPixel": 277,
    }
    usual = {256: 1, 257: 1, 258: 8, 259: 1, 262: 1, 273: 0, 277: 1, 279: 9, 324: 0, 325: 9}
    values = sorted((usual | {numbers[name]: value for name, value in tags.items()}).items())
    entries = b"".join(struct.pack("<HHII", number, 4, 1, value) for number, value in values)
    return struct.pack("<2sHIH", b"II", 42, 8, len(values)) + entries + bytes(99)


def header(kind, width, height):
    """The beginning of an image that is declared to be of that size; of its pixels, next to nothing."""
    if kind.endswith("JPEG"):
        code = {"JPEG": 0xC0, "progressive JPEG": 0xC2, "lossless JPEG": 0xC3}[kind]
        scan = segment(0xDA, bytes([3, 1, 0, 2, 0, 3, 0, 0, 63, 0]))
        return b"\xff\xd8" + frame(code, height, width) + scan + bytes(99) + b"\xff\xd9"
    if kind == "PPM":
        return f"P6 {width} {height} 255\n".encode()
    if kind == "TIFF":
        return tiff(ImageWidth=width, ImageLength=height)
    if kind == "WEBP":
        canvas = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + canvas
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, kind)
    data = bytearray(file.getvalue())
    if kind == "PNG":
        struct.pack_into(">II", data, 16, width, height)
        struct.pack_into(">I", data, 29, zlib.crc32(data[12:29]))
    else:
        form, place = {"GIF": ("<HH", 6), "BMP": ("<ii", 18)}[kind]
        struct.pack_into(form, data, place, width, height)
    return bytes(data)


LARGE_KINDS = ["JPEG", "progressive JPEG", "lossless JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM", "WEBP"]


@pytest.mark.parametrize("kind", LARGE_KINDS)
@pytest.mark.parametrize(("width", "height"), [(20000, 20000), (65500, 65500), (15001, 20000)])
def test_what_is_declared_too_large_is_refused_everywhere(kind, width, height, tmp_path):
    """By classification, packing, prediction and detection, whole or at a fraction; below the limit the size passes."""
    if kind == "WEBP":
        width, height = (min(side, 1 << 24) for side in (width, height))
    data, path = header(kind, width, height), tmp_path / "bomb.jpg"
    path.write_bytes(data)
    readers = [
        lambda: read_image(path),
        lambda: decode(data, str(path), 8),
        lambda: cut(data, str(path), 24, lambda height, width: (0, 0, height, width)),
        lambda: image_size(path),
        lambda: packed_image(data, str(path), 256, 90),
        lambda: detection.load(detection.Example(path, "bomb", 1, width, height, *[torch.empty(0)] * 4)),
    ]
    for read in readers:
        with pytest.raises(ImageError) as caught:
            read()
        one_line(caught, path, "is not an image that can be read", "300")
        assert any(said in str(caught.value) for said in (f"{width}x{height}", f"({width * height} pixels)"))


def test_the_largest_image_is_of_300_million_pixels(tmp_path):
    check_pixels(15_000, 20_000)
    with pytest.raises(ValueError, match="is declared as 20000x15001, above 300,000,000 pixels"):
        check_pixels(15_001, 20_000)
    for kind in set(LARGE_KINDS) - {"WEBP"}:  # whose header alone is not opened
        path = tmp_path / kind
        path.write_bytes(header(kind, 15_000, 20_000))
        assert image_size(path) == (15_000, 20_000)


def test_a_tile_larger_than_any_image_is_refused():
    """It is allocated whole, however small the image."""
    data = tiff(ImageWidth=9, ImageLength=9, Compression=8, TileWidth=40_000, TileLength=10_000)
    with pytest.raises(ImageError, match=r"^x: .*is declared as 40000x10000, above 300,000,000 pixels"):
        decode(data, "x")


def test_a_jpeg_cannot_hold_every_image_that_png_can(tmp_path):
    """A line that is packed: 65,500 pixels are the most."""
    path = save(tmp_path / "line.png", torch.zeros(1, 65_501, dtype=torch.uint8))
    with pytest.raises(ImageError) as caught:
        packed_image(path.read_bytes(), str(path), 8, 90)
    one_line(caught, path, "is 65501x1; a JPEG has at most 65500 pixels a side")


@pytest.mark.parametrize("view", [whole_view, center_view])
def test_a_line_is_not_blown_up(view):
    """3,000,001x1 with its shorter side at 224 would be 1.8 TB: only the middle is."""
    line = torch.zeros(3, 1, 3_000_001, dtype=torch.uint8)
    line[:, :, 1_499_980:1_500_021] = 200
    assert (view(line, 224) == 200).all()
    assert (view(line.transpose(1, 2), 224) == 200).all()


@pytest.mark.parametrize("view", [whole_view, center_view])
@pytest.mark.parametrize("length", [LONGEST + 1, 60, 61])
def test_the_middle_of_a_long_image_is_that_of_the_whole(view, length, monkeypatch):
    image = pixels(2, 3, length, 1)
    seen = view(image, 32).int()
    monkeypatch.setattr(crops, "LONGEST", 10**6)
    assert (view(image, 32).int() - seen).abs().max() <= 1


@pytest.mark.parametrize("shape", [(3, 1, LONGEST), (3, 40, 1), (3, 7, 7 * LONGEST), (3, 7, 9), (3, 2, 60_001)])
def test_the_middle_leaves_out_as_much_at_either_end(shape):
    image = torch.arange(shape[1] * shape[2]).expand(3, -1).reshape(shape)
    found = crops.middle(image)
    short, long = sorted(shape[1:])
    assert max(found.shape[1:]) in (long,) if long <= LONGEST * short else (LONGEST * short, LONGEST * short + 1)
    assert found[0, 0, 0] + found[0, -1, -1] == image[0, 0, 0] + image[0, -1, -1]


def apng_without_frames():
    """An animation of no pictures: Pillow warns."""
    file = io.BytesIO()
    Image.new("RGB", (9, 9)).save(file, "PNG")
    data, body = file.getvalue(), b"acTL" + bytes(8)
    return data[:33] + struct.pack(">I", 8) + body + struct.pack(">I", zlib.crc32(body)) + data[33:]


def odd_fax():
    """libtiff prints what is wrong with such codes."""
    file = io.BytesIO()
    Image.fromarray(pixels(7, 99, 99).numpy()).convert("1").save(file, "TIFF", compression="group4")
    data = bytearray(file.getvalue())
    with Image.open(file) as image:
        start = image.tag_v2[273][0]
    data[start : start + 300] = pixels(8, 300).numpy().tobytes()
    return bytes(data)


def many_samples():
    """153 for each pixel: Pillow logs an error."""
    return tiff(SamplesPerPixel=153)


@pytest.mark.parametrize("make", [apng_without_frames, odd_fax, many_samples])
def test_pillow_and_its_libraries_print_nothing(make, capfd, recwarn, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])  # pytest's: without any, Python prints errors
    warnings.simplefilter("always")
    with contextlib.suppress(ImageError):
        decode(make(), "x")
    assert capfd.readouterr() == ("", "")
    assert list(recwarn) == []


def blp():
    """An image of the game Warcraft, in a compression that it does not have."""
    return b"BLP1" + struct.pack("<IIIIII", 9, 0, 4, 4, 5, 0) + bytes(2000)


def dds():
    """A texture of no known pixel format."""
    return b"DDS " + struct.pack("<IIII", 124, 0, 4, 4) + bytes(48) + struct.pack("<II4s", 32, 4, b"????") + bytes(99)


@pytest.mark.parametrize("make", [blp, dds])
def test_whatever_a_decoder_raises_names_the_file(make):
    with pytest.raises(ImageError, match=r"^x\.jpg: is not an image that can be read"):
        decode(make(), "x.jpg")


@pytest.mark.parametrize("error", [RuntimeError("a\nb"), NotImplementedError(), KeyError("k"), struct.error("s")])
def test_an_exception_of_any_kind_is_an_image_error(error):
    with pytest.raises(ImageError, match=r"^x: is not an image that can be read") as caught, _decode_errors("x"):
        raise error
    one_line(caught)


def test_a_lack_of_memory_is_not_the_images_fault():
    with pytest.raises(MemoryError), _decode_errors("x"):
        raise MemoryError


@pytest.mark.parametrize("kind", ["PGM of 16 bits", "PPM of 16 bits"])
def test_ppm_of_16_bits_keeps_its_brightness(kind):
    """A ramp from black to white: 0, 2,048, … 63,488 of 65,535."""
    grey = kind.startswith("PGM")
    values = [value for step in range(32) for value in [2048 * step] * (1 if grey else 3)]
    data = f"P{5 if grey else 6} 32 1 65535\n".encode() + struct.pack(f">{len(values)}H", *values)
    assert (decode(data, "x")[0].int() - 8 * torch.arange(32)[:, None]).abs().max() <= 1


# The cache of decoded sets


def same(one, other):
    assert one.digest == other.digest
    assert one.classes == other.classes
    for part in ("train", "test"):
        assert torch.equal(getattr(one, part).images, getattr(other, part).images)
        assert torch.equal(getattr(one, part).labels, getattr(other, part).labels)


def kept():
    """The one file in the cache of decoded sets."""
    (file,) = (cache_folder() / "decoded").iterdir()
    return file


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RESNET_TRAIN_DATA", "~/elsewhere")
    assert cache_folder() == tmp_path / "elsewhere"
    monkeypatch.setenv("RESNET_TRAIN_DATA", "")
    assert cache_folder() == tmp_path / ".cache" / "resnet-train" / "data"


def test_a_second_load_reads_the_cache_until_a_file_changes(tree):
    first = load("cifar10", str(tree), 32)
    path = tree / "train" / "cat" / "01.png"
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    same(load("cifar10", str(tree), 32), first)
    os.utime(path)
    with pytest.raises(UserError) as caught:
        load("cifar10", str(tree), 32)
    one_line(caught, path)


def test_a_new_and_a_removed_file_are_seen(tree):
    load("cifar10", str(tree), 32)
    extra = save(tree / "train" / "cat" / "77.png", pixels(5, 32, 32, 3))
    assert len(load("cifar10", str(tree), 32).train) == 6
    extra.unlink()
    (tree / "test" / "dog" / "00.png").unlink()
    assert [len(part) for data in [load("cifar10", str(tree), 32)] for part in (data.train, data.test)] == [5, 2]


def test_sizes_have_their_own_cache(tree):
    assert load("imagefolder", str(tree), 32).train.images.shape[1] == 32
    assert load("imagefolder", str(tree), 16).train.images.shape[1] == 16
    assert load("imagefolder", str(tree), 32).train.images.shape[1] == 32


def test_what_imagefolder_keeps_is_not_taken_for_cifar10(tree):
    save(tree / "test" / "dog" / "01.png", pixels(1, 8, 8, 3))
    load("imagefolder", str(tree), 32)
    with pytest.raises(UserError, match="8x8"):
        load("cifar10", str(tree), 32)


def flip(content):
    """One bit of one pixel or label or of the names."""
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def saved(content):
    def damage(_):
        file = io.BytesIO()
        torch.save(content, file)
        return file.getvalue()

    return damage


DAMAGES = {
    "no bytes": lambda _: b"",
    "half": half,
    "last byte lost": lambda content: content[:-1],
    "text": lambda _: b"junk",
    "a pickle": lambda _: pickle.dumps([1, 2]),
    "one bit": flip,
    "zeros": lambda content: bytes(len(content)),
    "a list": saved([1]),
    "no keys": saved({}),
    "other keys": saved({"train": [1], "test": [2], "classes": [], "digest": ""}),
    "nothing": saved(None),
    "a tensor": saved(torch.ones(3)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_cache_file_is_made_again(damage, tree):
    first = load("cifar10", str(tree), 32)
    content = kept().read_bytes()
    kept().write_bytes(damage(content))
    assert kept().read_bytes() != content
    same(load("cifar10", str(tree), 32), first)
    same(load("cifar10", str(tree), 32), first)
    assert len(kept().read_bytes()) == len(content)


def test_a_hostile_cache_file_is_not_executed(tree, tmp_path):
    first = load("cifar10", str(tree), 32)
    hostile = Hostile(tmp_path / "mark")
    torch.save({"train": hostile, "test": hostile, "classes": hostile, "digest": hostile}, kept())
    same(load("cifar10", str(tree), 32), first)
    assert not (tmp_path / "mark").exists()


def test_a_cache_that_cannot_be_written_is_no_obstacle(tree, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert len(load("cifar10", str(tree), 32).train) == 5
    output = capsys.readouterr()
    assert "RESNET_TRAIN_DATA" in output.out + output.err


def test_nothing_half_written_stays(tree):
    load("cifar10", str(tree), 32)
    assert [path.suffix for path in (cache_folder() / "decoded").iterdir()] == [".pt"]


# The digest


def test_the_digest_does_not_depend_on_the_place(tree, tmp_path):
    first = load("cifar10", str(tree), 32)
    tree.rename(tmp_path / "moved")
    assert load("cifar10", str(tmp_path / "moved"), 32).digest == first.digest


def another_pixel(tree):
    path = tree / "test" / "dog" / "01.png"
    image = expected(tree / "test")[2].to(torch.uint8)
    image[31, 31, 2] ^= 1
    save(path, image)


def another_label(tree):
    """The last cat becomes the first dog: the same pixels in the same order."""
    (tree / "train" / "cat" / "02.png").rename(tree / "train" / "dog" / "!.png")


def another_class_name(tree):
    for part in ("train", "test"):
        (tree / part / "dog").rename(tree / part / "hound")


def swapped(tree):
    """Two training images of one class change places."""
    one, other = tree / "train" / "cat" / "00.png", tree / "train" / "cat" / "01.png"
    one.rename(tree / "train" / "cat" / "03.png")
    other.rename(one)
    (tree / "train" / "cat" / "03.png").rename(other)


@pytest.mark.parametrize("change", [another_pixel, another_label, another_class_name, swapped])
def test_the_digest_differs_when_the_content_does(change, tree):
    first = load("cifar10", str(tree), 32)
    change(tree)
    assert load("cifar10", str(tree), 32).digest != first.digest


def test_the_official_digest_is_that_of_an_equal_tree(tmp_path):
    """The digest is of pixels, labels and class names; the form on disk does not matter."""
    official = read_official(write_archive(tmp_path / "cifar.tar.gz", members()), **md5s())
    changed = read_official(
        write_archive(tmp_path / "other.tar.gz", members(raw := RAW | {"test_batch": RAW["data_batch_1"]})), **md5s(raw)
    )
    folder = read_official(write_folder(tmp_path / "folder"), **md5s())
    assert official.digest == folder.digest
    assert official.digest != changed.digest


# Digits


def test_digits_are_1437_and_360_images_and_the_same_each_time():
    data = load("digits", None, 32)
    assert (data.train.images.shape, data.test.images.shape) == ((1437, 32, 32, 3), (360, 32, 32, 3))
    assert data.train.images.dtype == torch.uint8
    assert data.classes == [str(digit) for digit in range(10)]
    for part in (data.train, data.test):
        assert part.labels.unique().tolist() == list(range(10))
        assert torch.equal(part.images[..., 0], part.images[..., 1])
        assert torch.equal(part.images[..., 0], part.images[..., 2])
    same(load("digits", None, 32), data)


def test_digits_are_those_of_scikit_learn_each_once():
    from sklearn.datasets import load_digits

    def rows(images, labels):
        return sorted((int(label), *image.flatten().tolist()) for image, label in zip(images, labels, strict=True))

    source, data = load_digits(), load("digits", None, 8)
    images = (torch.from_numpy(source.images) * 255 / 16).round().long()
    both = [torch.cat([getattr(data.train, name), getattr(data.test, name)]) for name in ("images", "labels")]
    assert rows(both[0][..., 0], both[1]) == rows(images, source.target)


@pytest.mark.parametrize("size", [32, 20, 9])
def test_digits_are_enlarged_bilinearly(size):
    small, large = load("digits", None, 8), load("digits", None, size)
    grey = small.test.images[..., :1].permute(0, 3, 1, 2).float()
    reference = interpolate(grey, size=size, mode="bilinear", antialias=True)[:, 0]
    assert (large.test.images[..., 0] - reference).abs().max() <= 1
    assert torch.equal(small.test.labels, large.test.labels)


# Real data


@pytest.mark.slow
def test_cifar10_is_known_by_its_images_in_whatever_container(real_data, monkeypatch):
    """The shared PNG tree, where the user keeps it (decoded once, then from the cache), and its images shuffled."""
    monkeypatch.undo()
    root = str(real_data("cifar10"))
    data = load("imagefolder", root, 32)
    assert data.classes == CLASSES
    assert (data.train.images.shape, data.test.images.shape) == ((50_000, 32, 32, 3), (10_000, 32, 32, 3))
    assert data.train.labels.bincount().tolist() == [5000] * 10
    assert data.test.labels.bincount().tolist() == [1000] * 10
    means = data.train.images.reshape(-1, 3).double().mean(0) / 255
    assert (means - torch.tensor([0.4914, 0.4822, 0.4465])).abs().max() < 1e-4
    assert data.digest == CIFAR10_FINGERPRINT

    other = make_data_set(*(part.part(torch.randperm(len(part))) for part in (data.train, data.test)), CLASSES)
    same(other, data)
    assert MemoryDataset(name="imagefolder", root=root, size=32, validation=0).label == "cifar10"

    data.train.images[0, 0, 0, 0] ^= 1  # one bit of one image: a look-alike
    assert make_data_set(data.train, data.test, CLASSES).digest != CIFAR10_FINGERPRINT
    swapped = other.train.labels.clone()
    swapped[[0, 1]] = swapped[[1, 0]] if swapped[0] != swapped[1] else (swapped[[0, 1]] + 1) % 10
    assert make_data_set(ImageSet(other.train.images, swapped), other.test, CLASSES).digest != CIFAR10_FINGERPRINT
