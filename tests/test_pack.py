"""Packed photographs: written once and whole however often that is cut, read by us and by litdata, trained from."""

import contextlib
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import tracemalloc

import pytest
import torch
from conftest import metrics, needs, stamp, start
from PIL import Image

from resnet_train import cli
from resnet_train.config.augment import Augment
from resnet_train.config.layout import check_source, class_folders
from resnet_train.data import fetch
from resnet_train.data import pack as packing
from resnet_train.data.crops import cut, scaled_box
from resnet_train.data.decode import decode
from resnet_train.data.imagefolder import image_of, open_image_splits
from resnet_train.data.pack_check import check_packed
from resnet_train.data.packed import Shard, open_packed, stored_order
from resnet_train.data.pool import work_in_processes
from resnet_train.data.sampler import WINDOW, permutation
from resnet_train.data.streaming import StreamingDataset
from resnet_train.data.views import BatchOrder
from resnet_train.errors import RunError, UserError

needs("litdata")

CPU = torch.device("cpu")
COUNTS = {"train": {"cat": 30, "dog": 20, "eel": 14}, "val": {"cat": 4, "dog": 5, "eel": 2}}
SETTINGS = {"shorter_side": 40, "quality": 90, "images": 5, "workers": 0, "broken": "stop"}
AUGMENT = Augment(0, True, [36, 60], None, colour_jitter=0.0, colour_noise=0.1)


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESNET_TRAIN_DATA", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


def photograph(seed, width, height):
    """A smooth colour picture."""
    blocks = torch.randint(0, 256, (5, 4, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(blocks.numpy()).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """64 photographs to train and 11 to test, of three classes and many shapes, as JPEG and PNG."""
    root, number = tmp_path_factory.mktemp("tree") / "photos", itertools.count()
    for part, counts in COUNTS.items():
        for name, count in counts.items():
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                seed = next(number)
                image = photograph(seed, 33 + seed % 31, 36 + seed % 29)
                suffix = "png" if seed % 7 == 0 else "JPEG"
                image.save(root / part / name / f"{index:02d}.{suffix}", **({} if suffix == "png" else {"quality": 95}))
    return root


@pytest.fixture(scope="module")
def packed(tree, tmp_path_factory):
    """The tree, packed: 13 and 3 shards."""
    out = tmp_path_factory.mktemp("packed") / "photos-40"
    packing.pack(root=str(tree), out=out, **SETTINGS)
    return out


def content(folder):
    """All files of a folder, as checksums."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_litdata_reads_what_is_written(packed):
    """As it would read its own, and the same that our reader gives."""
    import litdata

    for part, count in (("train", 64), ("val", 11)):
        theirs = litdata.StreamingDataset(str(packed / part), shuffle=False)
        found = open_packed(str(packed))
        ours = found.train if part == "train" else found.test
        assert len(theirs) == len(ours) == count
        for index in range(count):
            item, (name, image, label) = theirs[index], ours.read(index)
            assert (bytes(item["image"]), item["label"], name.split(": ")[1]) == (image, label, item["name"])


def test_the_packed_images_are_those_of_the_tree(tree, packed):
    """Each once, with its label; no shorter side above the asked, no change of the shape, little of the pixels."""
    files, shards = open_image_splits(str(tree)), open_image_splits(str(packed))
    assert (files.classes, len(files.train), len(files.test)) == (shards.classes, len(shards.train), len(shards.test))
    for part in ("train", "test"):
        ours, theirs = getattr(shards, part), getattr(files, part)
        order = stored_order(part, len(theirs)).tolist()
        for index, place in enumerate(order):
            (small, label), (image, same) = image_of(ours, index), image_of(theirs, place)
            assert label == same
            assert min(small.shape[1:]) == min(40, *image.shape[1:])
            again = packing.packed_image(theirs.read(place)[1], "", 40, 90)
            assert torch.equal(decode(again, "").permute(2, 0, 1), small)
            mean, other = small.float().mean((1, 2)), image.float().mean((1, 2))
            torch.testing.assert_close(mean, other, rtol=0, atol=3)


def test_the_test_part_is_packed_as_listed(tree, packed):
    """So that batches, and the sum of their losses, are those of the tree."""
    names = [open_packed(str(packed)).test.read(index)[0].split(": ")[1] for index in range(11)]
    listed = open_image_splits(str(tree)).test
    assert names == ["/".join(listed.entry(index)[0].split("/")[-2:]) for index in range(11)]


@pytest.mark.parametrize("validation", [1, 13, 63])
def test_the_same_images_are_held_out(validation, tree, packed):
    """Of the tree and of the packed folder; together with the rest they are all."""
    kinds = [StreamingDataset(root=str(root), size=32, validation=validation, workers=0) for root in (tree, packed)]
    for split in ("train", "val"):
        files, shards = (sets.parts[split] for sets in kinds)
        names = {"/".join(files.entry(index)[0].split("/")[-2:]) for index in range(len(files))}
        assert {shards.read(index)[0].split(": ")[1] for index in range(len(shards))} == names
        assert sum(shards.blocks) == len(shards) == kinds[0].sizes[split]


def test_a_jpeg_that_is_small_stays_and_others_become_one(tmp_path):
    def encoded(image, kind="JPEG", **options):
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    small = photograph(1, 50, 39)
    kept = encoded(small, quality=60)
    assert packing.packed_image(kept, "", 40, 90) == kept
    for other in (encoded(small, quality=100), encoded(small, "PNG"), encoded(small.convert("CMYK"), quality=50)):
        found = packing.packed_image(other, "", 40, 90)
        assert found == encoded(Image.fromarray(decode(other, "").numpy()), quality=90)
        with Image.open(io.BytesIO(found)) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (50, 39))
    with Image.open(io.BytesIO(packing.packed_image(encoded(photograph(1, 400, 90)), "", 40, 90))) as image:
        assert image.size == (178, 40)


# Cut and gone on with


def test_a_killed_packing_goes_on_and_gives_the_same(tree, packed, tmp_path):
    """Killed when 2, 6 and 11 shards are there: none is made again, and the whole is the undisturbed, bit for bit."""
    out, seen = tmp_path / "out", {}
    for least in (2, 6, 11):
        child = os.fork()
        if not child:  # another process without the seconds that imports take
            packing.pack(root=str(tree), out=out, **SETTINGS)
            os._exit(0)
        while len(list(out.glob("packing/*-*.json"))) < least:
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        assert not (out / "pack.json").exists()
        with pytest.raises(UserError, match="is packed incompletely"):
            class_folders(out)
        for note in out.glob("packing/*-*.json"):
            assert seen.setdefault(note.name, note.stat().st_mtime_ns) == note.stat().st_mtime_ns
    packing.pack(root=str(tree), out=out, **SETTINGS)
    assert content(out) == content(packed)


def nap(job):
    time.sleep(job[0])


@pytest.mark.parametrize("size", [1, 1_000_000], ids=["small", "more than a pipe takes"])
def test_nobody_waits_for_running_jobs_after_an_error_or_a_signal(size):
    """As after a signal, a generator is closed: jobs end at once, and so do those that are queued."""
    for first in (0, "no number"):
        begin, work = time.monotonic(), work_in_processes(nap, [(first, b""), *[(60, bytes(size))] * 9], 2)
        with contextlib.nullcontext() if first == 0 else pytest.raises(TypeError):
            assert next(work) == ((0, b""), None)
        work.close()
        assert time.monotonic() - begin < 40
        assert multiprocessing.active_children() == []


def test_a_packing_that_was_cut_before_pack_json_is_finished(tree, packed, tmp_path, capsys):
    """One shard without its note is written again; half a file of a shard is none."""
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing.shutil, "rmtree", lambda *_, **__: None)
        packing.pack(root=str(tree), out=out, **SETTINGS)
    (out / "pack.json").unlink()
    (out / "packing" / "train-3.json").unlink()
    (out / "train" / "chunk-0-3.bin").write_bytes(b"half")
    packing.pack(root=str(tree), out=out, **SETTINGS | {"workers": 1})
    assert "resuming: 15 of 16 shards are there" in capsys.readouterr().out
    assert content(out) == content(packed)
    before = content(out)
    packing.pack(root=str(tree), out=out, **SETTINGS)
    assert "nothing to do" in capsys.readouterr().out
    assert content(out) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shorter_side": 41}, "shorter_side: .*other values"),
        ({"quality": 91}, "quality: .*other values"),
        ({"images": 6}, "images: .*other values"),
    ],
)
def test_another_pack_in_the_folder_is_refused(change, words, tree, packed):
    with pytest.raises(UserError, match=words):
        packing.pack(root=str(tree), out=packed, **SETTINGS | change)


def test_another_tree_and_a_foreign_folder_are_refused(tree, packed, tmp_path):
    shutil.copytree(tree, tmp_path / "photos")
    (tmp_path / "photos" / "train" / "cat" / "00.JPEG").write_bytes(b"other")
    with pytest.raises(UserError, match=r"data\.root: .*other values"):
        packing.pack(root=str(tmp_path / "photos"), out=packed, **SETTINGS)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds no pack"):
        packing.pack(root=str(tree), out=tmp_path / "mine", **SETTINGS)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_broken_images_stop_the_packing_or_are_left_out(tree, tmp_path, capsys):
    """What is left out is counted and named, and the same images are held out as of the tree without them."""
    shutil.copytree(tree, tmp_path / "photos")
    spoilt = [("train/dog/03.JPEG", b""), ("train/eel/11.JPEG", b"hello\n"), ("val/cat/01.JPEG", None)]
    for name, text in spoilt:
        path = tmp_path / "photos" / name
        path.write_bytes(path.read_bytes()[:400] if text is None else text)
    with pytest.raises(UserError, match="is not an image that can be read") as caught:
        packing.pack(root=str(tmp_path / "photos"), out=tmp_path / "out", **SETTINGS)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "pack.json").exists()
    packing.pack(root=str(tmp_path / "photos"), out=tmp_path / "skipped", **SETTINGS | {"broken": "skip"})
    told = capsys.readouterr()
    assert "72 images in 16 shards" in told.out
    assert "3 broken ones skipped" in told.out
    for name, _ in spoilt:
        assert f"skipped: {tmp_path / 'photos' / name}: is not an image" in told.err
        (tmp_path / "photos" / name).unlink()
    kinds = [
        StreamingDataset(root=str(tmp_path / name), size=32, validation=20, workers=0) for name in ("photos", "skipped")
    ]
    assert kinds[0].sizes == kinds[1].sizes == {"train": 42, "val": 20, "test": 10}
    held = kinds[0].parts["val"]
    names = {"/".join(held.entry(index)[0].split("/")[-2:]) for index in range(20)}
    assert {kinds[1].parts["val"].read(index)[0].split(": ")[1] for index in range(20)} == names


# The check, and what it finds


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "bit": (flip_a_bit, "checksum is wrong"),
    "cut": (lambda path: os.truncate(path, 1000), "is cut short"),
    "empty": (lambda path: path.write_bytes(b""), "is cut short"),
    "gone": (lambda path: path.unlink(), "No such file"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_the_check_finds_a_damaged_shard(damage, words, packed, tmp_path, capsys):
    shutil.copytree(packed, tmp_path / "copy")
    damage(tmp_path / "copy" / "train" / "chunk-0-7.bin")
    with pytest.raises(RunError, match=f"chunk-0-7.bin: .*{words}"):
        check_packed(str(tmp_path / "copy"), workers=0)
    check_packed(str(packed), workers=0)
    assert "75 images in 16 shards, all as they were packed" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["cut", "empty", "gone"])
def test_a_shard_cut_short_is_named_before_anything_begins(damage, packed, tmp_path):
    shutil.copytree(packed, tmp_path / "copy")
    DAMAGES[damage][0](tmp_path / "copy" / "val" / "chunk-0-1.bin")
    with pytest.raises(UserError, match=r"val/chunk-0-1\.bin: "):
        StreamingDataset(root=str(tmp_path / "copy"), size=32, validation=0, workers=0)


@pytest.mark.parametrize("size", [0, 3, 4, 30, 500])
def test_a_table_that_cannot_be_is_refused(size, packed, tmp_path):
    data = (packed / "train" / "chunk-0-0.bin").read_bytes()
    (tmp_path / "shard").write_bytes(data[:size])
    with pytest.raises(UserError, match="is cut short or damaged"):
        Shard(tmp_path / "shard")


EVIL = '{"format": 1, "parts": {"train": {"shards": [{"name": "../../evil.bin"}]}}}'


@pytest.mark.parametrize("text", ["", "{}", "[]", "1", '{"format": 99}', '{"format": 1, "parts": []}', EVIL])
def test_a_damaged_pack_json_is_one_line(text, packed, tmp_path):
    shutil.copytree(packed, tmp_path / "copy")
    (tmp_path / "copy" / "pack.json").write_text(text)
    with pytest.raises(UserError, match=str(tmp_path / "copy")):
        open_packed(str(tmp_path / "copy"))


# Hostile and damaged packs. What pack.json says is held against one schema, against itself, and against the shards.


def sealed(about, folder):
    """`about` with the checksums of the shards in `folder`, and the digest that belongs to it."""
    digest = hashlib.sha256(repr(about["classes"]).encode())
    for part, told in about["parts"].items():
        for shard in told["shards"]:
            shard["sha256"] = hashlib.sha256((folder / part / shard["name"]).read_bytes()).hexdigest()
            digest.update(shard["sha256"].encode())
    about["digest"] = digest.hexdigest()


def at(*path, value):
    """A change of pack.json: what lies at `path` becomes `value`, or what `value` makes of it."""

    def change(about):
        for key in path[:-1]:
            about = about[key]
        about[path[-1]] = value(about[path[-1]]) if callable(value) else value

    return change


def without(*path):
    def change(about):
        for key in path[:-1]:
            about = about[key]
        del about[path[-1]]

    return change


def one_more(about):
    """A shard and its part claim an image that is not there."""
    for place in (about["parts"]["val"]["shards"][0], about["parts"]["val"]):
        place["images"] += 1
    about["parts"]["val"]["listed"] += 1
    about["images"] = 6


def twice(about):
    about["parts"]["train"]["skipped"], about["parts"]["train"]["listed"] = [3, 3], 66


def false_digest(about):
    about["classes"] = about["classes"][::-1]


TRAIN_PART, VAL, FIRST = ("parts", "train"), ("parts", "val"), ("parts", "train", "shards", 0)
HOSTILE = {
    "the training part as test part": (at("test", value="train"), "test=train: allowed are test, val"),
    "another test part": (at("test", value="test"), "parts: are train, val and must be train, test"),
    "no test part": (without("test"), "test: is missing"),
    "no part of that name": (without(*VAL), "parts: are train and"),
    "one part too many": (at("parts", value=lambda old: {**old, "test": old["val"]}), "parts: are train, val, test"),
    "parts that are none": (at("parts", value=[]), "parts="),
    "a part that is none": (at(*VAL, value=7), "parts.val"),
    "no classes": (at("classes", value=[]), "classes: must be two or more"),
    "one class": (at("classes", value=["cat"]), "classes: must be two or more"),
    "one class twice": (at("classes", value=["cat", "dog", "cat"]), "classes: must be two or more different"),
    "classes that are a word": (at("classes", value="cat"), "classes=cat: must be a list"),
    "a class without a name": (at("classes", 1, value=None), "classes=null: must be a word"),
    "a class with half a character": (at("classes", 1, value="\udcff"), "classes="),
    "classes in another order": (false_digest, "digest=[0-9a-f.]+: is not that of"),
    "no digest": (at("digest", value=None), "digest=null"),
    "a list of 10^12 images": (at(*TRAIN_PART, "listed", value=10**12), "listed=1000000000000: must be 64 stored"),
    "a list of 10^30 images": (at(*TRAIN_PART, "listed", value=10**30), "listed=10+: must be at most"),
    "a list of fewer than none": (at(*TRAIN_PART, "listed", value=-1), "listed=-1: must be at least 0"),
    "a number as word": (at(*TRAIN_PART, "listed", value="64"), "listed=64: must be a whole number"),
    "a truth as number": (at(*TRAIN_PART, "images", value=True), "images=true: must be a whole number"),
    "half an image": (at(*TRAIN_PART, "images", value=64.5), "images=64.5: must be a whole number"),
    "no number at all": (at(*TRAIN_PART, "images", value=float("nan")), "images=nan: must be a whole number"),
    "images that the shards do not have": (at(*TRAIN_PART, "images", value=63), "images=63: must be the 64"),
    "what was skipped is not there": (at(*TRAIN_PART, "skipped", value=[64]), "listed=64: must be 64 stored and 1"),
    "skipped from the end": (
        lambda about: about["parts"]["train"].update(skipped=[-1], listed=65),
        "skipped=-1: must be at least 0",
    ),
    "skipped behind the end": (
        lambda about: about["parts"]["train"].update(skipped=[65], listed=65),
        "skipped: must rise, and stay below 65",
    ),
    "skipped twice": (twice, "skipped: must rise"),
    "skipped a word": (at(*TRAIN_PART, "skipped", value=["x"]), "skipped=x: must be a whole number"),
    "no shards": (at(*VAL, "shards", value=[]), "images=11: must be the 0 of its shards"),
    "shards that are none": (at(*VAL, "shards", value={"a": 1}), "shards=.*must be a list"),
    "a shard that is none": (at(*FIRST, value=None), "parts.train.shards"),
    "a shard without images": (at(*FIRST, "images", value=0), "images=0: must be at least 1"),
    "a shard of too many": (at(*FIRST, "images", value=6), "images=6: are too many for chunk-0-0"),
    "a shard of none of its bytes": (at(*FIRST, "bytes", value=60), "images=5: are too many for chunk-0-0"),
    "a shard of no bytes": (at(*FIRST, "bytes", value=0), "bytes=0: must be at least 1"),
    "a shard of too many bytes": (at(*FIRST, "bytes", value=2**32), "bytes=4294967296: must be at most"),
    "a shard of other bytes": (at(*FIRST, "bytes", value=lambda old: old + 1), r"chunk-0-0.bin: .*\d+ bytes of \d+"),
    "a shard of other images": (one_more, r"val/chunk-0-0.bin: holds 5 images and should 6"),
    "a checksum that is none": (at(*FIRST, "sha256", value="x"), "sha256=x: must be 64 digits"),
    "a shard that lies elsewhere": (at(*FIRST, "name", value="../../evil.bin"), "name=../../evil.bin: must be chunk"),
    "a shard with another name": (at(*FIRST, "name", value="chunk-0-\u0661.bin"), "must be chunk-0-NUMBER"),
    "a shard twice": (at(*FIRST, "name", value="chunk-0-1.bin"), "name=chunk-0-1.bin: comes after"),
    "shards in another order": (at(*TRAIN_PART, "shards", value=lambda old: old[::-1]), "comes after chunk-0-12.bin"),
    "a part of another kind": (at(*FIRST, "chunks", value=3), "chunks: there is no such key"),
    "another key": (at("colour", value="red"), "colour: there is no such key"),
    "no format": (without("format"), "format: is missing"),
    "a format that is true": (at("format", value=1.5), "format=1.5: must be a whole number"),
    "no source": (at("source", value=None), "source"),
    "no shorter side": (at("shorter_side", value=0), "shorter_side=0: must be at least 8"),
    "too good": (at("quality", value=101), "quality=101: must be at most 100"),
    "a way with broken ones": (at("broken", value="maybe"), "broken=maybe: allowed are stop, skip"),
}


@pytest.mark.parametrize(("change", "words"), HOSTILE.values(), ids=HOSTILE)
def test_a_pack_json_that_cannot_be_is_named_before_anything_is_read(change, words, packed, tmp_path):
    for part in ("train", "val"):
        (tmp_path / part).symlink_to(packed / part)
    about = json.loads((packed / "pack.json").read_text())
    change(about)
    (tmp_path / "pack.json").write_text(json.dumps(about))
    for reading in (lambda: open_packed(str(tmp_path)), lambda: check_packed(str(tmp_path), workers=0)):
        with pytest.raises(UserError, match=words) as caught:
            reading()
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)
        if "chunk-0-0.bin: " in words:
            break  # the second reading names what is wrong with shards together


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("text", [f'{{"format": 1, "parts": {DEEP}}}', f'{{"format": {"9" * 5000}}}', "\udcff", "null"])
def test_a_pack_json_that_json_cannot_read_is_one_line(text, packed, tmp_path):
    for part in ("train", "val"):
        (tmp_path / part).symlink_to(packed / part)
    (tmp_path / "pack.json").write_bytes(os.fsencode(text))
    with pytest.raises(UserError, match=r"pack\.json: is damaged") as caught:
        open_packed(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_huge_pack_json_is_not_read(packed, tmp_path):
    (tmp_path / "pack.json").touch()
    os.truncate(tmp_path / "pack.json", 2**40)
    with pytest.raises(
        UserError, match=r"is not a complete packed folder \(pack\.json: larger than 268,435,456 bytes\)"
    ):
        open_packed(str(tmp_path))


def table(*numbers):
    return struct.pack(f"<{len(numbers)}I", *numbers)


TABLES = {
    "four thousand million images": table(2**32 - 1) + bytes(100),
    "images in the table": table(2, 0, 40, 84) + bytes(68),
    "images behind a gap": table(2, 40, 80, 120) + bytes(104),
    "an image before its table": table(1, 4, 60) + bytes(48),
    "an image without room for its sizes": table(2, 16, 34, 60) + bytes(44),
    "the second before the first": table(2, 16, 60, 40) + bytes(24),
    "an end behind the file": table(1, 12, 2**32 - 1) + bytes(48),
}


@pytest.mark.parametrize("content", TABLES.values(), ids=TABLES)
def test_a_false_table_is_refused_before_memory_is_taken_for_it(content, tmp_path):
    (tmp_path / "shard").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(UserError, match="shard: is cut short or damaged"):
        Shard(tmp_path / "shard")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def of_image(change):
    """A change of the first image of a shard, after its three sizes."""

    def damage(data):
        (count,) = struct.unpack_from("<I", data)
        change(data, 4 * count + 8)

    return damage


def relabel(number):
    def change(data, start):
        image = struct.unpack_from("<I", data, start)[0]
        struct.pack_into("<q", data, start + 12 + image, number)

    return of_image(change)


IMAGES = {
    "a class that is not there": (relabel(3), r"cat|dog|eel.*: there is no class 3"),
    "the label of what fills up a batch": (relabel(-1), "there is no class -1"),
    "an image longer than its place": (
        of_image(lambda data, start: struct.pack_into("<I", data, start, 2**32 - 1)),
        "is damaged at its image 0",
    ),
    "a label of four bytes": (
        of_image(lambda data, start: struct.pack_into("<I", data, start + 4, 4)),
        "is damaged at its image 0",
    ),
}


@pytest.mark.parametrize(("damage", "words"), IMAGES.values(), ids=IMAGES)
def test_a_false_image_of_a_sealed_pack_is_named_in_training_and_by_the_check(damage, words, packed, tmp_path):
    """With checksums that hold, as whoever makes a pack can give it."""
    shutil.copytree(packed, tmp_path / "copy")
    for part in ("train", "val"):
        path = tmp_path / "copy" / part / "chunk-0-0.bin"
        data = bytearray(path.read_bytes())
        damage(data)
        path.write_bytes(data)
    about = json.loads((packed / "pack.json").read_text())
    sealed(about, tmp_path / "copy")
    (tmp_path / "copy" / "pack.json").write_text(json.dumps(about))
    sets = StreamingDataset(root=str(tmp_path / "copy"), size=32, validation=0, workers=0)
    for reading in (
        lambda: batches(tmp_path / "copy"),
        lambda: list(sets.eval_batches("test", sets.mean_image(), CPU, 4)),
    ):
        with pytest.raises(UserError, match=words):
            reading()
    with pytest.raises(RunError, match="number of errors: 2;"):
        check_packed(str(tmp_path / "copy"), workers=0)


def test_shards_that_are_no_files_are_named(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "copy")
    path = tmp_path / "copy" / "val" / "chunk-0-1.bin"
    size = path.stat().st_size
    path.unlink()
    path.mkdir()
    about = json.loads((packed / "pack.json").read_text())
    about["parts"]["val"]["shards"][1]["bytes"] = max(size, path.stat().st_size)  # as a folder has it
    (tmp_path / "copy" / "pack.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"val/chunk-0-1\.bin: is cut short or damaged"):
        open_packed(str(tmp_path / "copy"))


def note_at(key, value):
    def damage(path):
        note = json.loads(path.read_text())
        if key in note:
            note[key] = value(note[key])
        else:
            note["shard"][key] = value(note["shard"][key])
        path.write_text(json.dumps(note))

    return damage


NOTES = [
    *(lambda path, text=text: path.write_text(text) for text in ("", "null", "5", "[]", "{}", DEEP)),
    lambda path: path.write_bytes(b"\xff"),
    note_at("shard", lambda _: None),
    note_at("shard", lambda _: 5),
    note_at("skipped", lambda _: [10**12]),
    note_at("skipped", lambda _: "x"),
    note_at("name", lambda _: "chunk-0-1.bin"),
    note_at("images", lambda old: old - 1),
    note_at("bytes", lambda old: old + 1),
    note_at("config", lambda _: None),
]


def cut_before_pack_json(tree, out):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing.shutil, "rmtree", lambda *_, **__: None)
        packing.pack(root=str(tree), out=out, **SETTINGS)
    (out / "pack.json").unlink()


def test_shards_with_damaged_notes_and_without_files_are_made_again(tree, packed, tmp_path, capsys):
    """Each of the first 15 notes in another way; the file of the last one is gone."""
    out = tmp_path / "out"
    cut_before_pack_json(tree, out)
    notes = [*(out / "packing" / f"train-{n}.json" for n in range(13)), out / "packing" / "val-0.json"]
    notes += [out / "packing" / "val-1.json"]
    for damage, path in zip(NOTES, notes, strict=True):
        damage(path)
    (out / "val" / "chunk-0-2.bin").unlink()
    packing.pack(root=str(tree), out=out, **SETTINGS)
    assert "resuming" not in capsys.readouterr().out  # none of 16 shards was there
    assert content(out) == content(packed)


@pytest.mark.parametrize("text", ["", "[]", "{}", "5", DEEP, '{"format": 1}', "\udcff"])
def test_damaged_settings_are_one_line(text, tree, tmp_path):
    out = tmp_path / "out"
    cut_before_pack_json(tree, out)
    (out / "packing" / "settings.json").write_bytes(os.fsencode(text))
    with pytest.raises(UserError, match=r"settings\.json: is damaged .*remove") as caught:
        packing.pack(root=str(tree), out=out, **SETTINGS)
    assert "\n" not in str(caught.value)


def test_names_that_are_not_utf_8(tree, tmp_path):
    """Those of files are packed as litdata can have them; that of a class is refused before anything is written."""
    root = tmp_path / "photos"
    shutil.copytree(tree, root)
    os.rename(root / "val" / "cat" / "00.JPEG", os.fsencode(root / "val" / "cat") + b"/\xff.JPEG")
    packing.pack(root=str(root), out=tmp_path / "out", **SETTINGS)
    test = open_packed(str(tmp_path / "out")).test
    assert [test.read(index)[0].split(": ")[1] for index in range(4)][-1] == "cat/\N{REPLACEMENT CHARACTER}.JPEG"
    for part in ("train", "val"):
        os.rename(root / part / "eel", os.fsencode(root / part) + b"/\xff")
    with pytest.raises(UserError, match=r"classes='\\udcff': must be a name in UTF-8"):
        packing.pack(root=str(root), out=tmp_path / "other", **SETTINGS)
    assert not (tmp_path / "other").exists()


def test_a_shard_that_its_table_cannot_hold_is_refused(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "LARGEST", 5000)
    with pytest.raises(UserError, match=r"shard_images=5: .*use fewer"):
        packing.pack(root=str(tree), out=tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out" / "pack.json").exists()


# Elsewhere


def test_a_packed_folder_elsewhere_is_fetched_once_and_checked(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_TRAIN_DATA", str(tmp_path / "cache"))
    shutil.copytree(packed, tmp_path / "there")
    url = f"local:{tmp_path / 'there'}"
    assert open_packed(url).digest == open_packed(str(packed)).digest
    (here,) = (tmp_path / "cache" / "packed").iterdir()
    shards = {path: path.stat().st_mtime_ns for path in here.rglob("*.bin")}
    assert len(shards) == 16
    assert not list(here.rglob("*.part"))
    torn = here / "train" / "chunk-0-2.bin"
    torn.write_bytes(b"torn")
    assert open_packed(f"{url}/").train.read(0) is not None
    assert torn.read_bytes() == (packed / "train" / "chunk-0-2.bin").read_bytes()
    assert all(path.stat().st_mtime_ns == then for path, then in shards.items() if path != torn)
    flip_a_bit(tmp_path / "there" / "val" / "chunk-0-0.bin")
    (here / "val" / "chunk-0-0.bin").unlink()
    with pytest.raises(UserError, match=r"val/chunk-0-0\.bin is not what pack\.json says"):
        open_packed(url)
    with pytest.raises(UserError, match=r"pack\.json cannot be fetched"):
        open_packed(f"local:{tmp_path / 'nowhere'}")


def test_a_store_whose_client_is_missing_is_named_in_one_line(monkeypatch):
    def missing(*_):
        raise ModuleNotFoundError("Requirement 'google.cloud.storage' not met.\nHINT: Try running `pip install`")

    monkeypatch.setattr("litdata.streaming.downloader.get_downloader", missing)
    with pytest.raises(UserError) as error:
        fetch._downloader("gs://bucket/x")
    assert str(error.value) == (
        "data.root=gs://bucket/x: Requirement 'google.cloud.storage' not met. HINT: Try running `pip install`"
    )


def test_a_pack_can_be_opened_while_another_process_looks_for_a_newer_one(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_TRAIN_DATA", str(tmp_path / "cache"))
    url, client, seen = f"local:{packed}", fetch._downloader, []

    def watched(url):
        get = client(url)

        def got(source, path):
            (here,) = (tmp_path / "cache/packed").iterdir()
            seen.append(open_packed(str(here)).digest)
            get(source, path)

        return got

    first = open_packed(url).digest
    monkeypatch.setattr(fetch, "_downloader", watched)
    assert open_packed(url).digest == first
    assert seen == [first]


def test_false_sizes_elsewhere_and_notes_that_are_no_text(packed, tmp_path, monkeypatch):
    """A shard whose checksum holds and whose size does not is not kept; a note of bytes is as none."""
    monkeypatch.setenv("RESNET_TRAIN_DATA", str(tmp_path / "cache"))
    shutil.copytree(packed, tmp_path / "there")
    url = f"local:{tmp_path / 'there'}"
    assert open_packed(url).test.read(0) == open_packed(url).test.read(0)
    (here,) = (tmp_path / "cache" / "packed").iterdir()
    (here / "val" / "chunk-0-0.bin.sha256").write_bytes(b"\xff")
    open_packed(url)
    assert len((here / "val" / "chunk-0-0.bin.sha256").read_text()) == 64
    about = json.loads((packed / "pack.json").read_text())
    about["parts"]["val"]["shards"][0]["bytes"] += 1
    (tmp_path / "there" / "pack.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"val/chunk-0-0\.bin is not what pack\.json says"):
        open_packed(url)


# The order


def test_the_order_is_of_shards_and_of_images_within_windows():
    """Every image once in each pass; the places of a window hold whole shards, those of a shard are far apart."""
    blocks = (7, 5, 6, 3, 8, 1) * 10
    for epoch in range(3):
        order = permutation(5, epoch, sum(blocks), blocks)
        assert order.sort().values.tolist() == list(range(sum(blocks)))
    shard, seen, start = torch.arange(len(blocks)).repeat_interleave(torch.tensor(blocks))[order].tolist(), set(), 0
    while start < len(shard):
        inside = set()
        for end in range(start, len(shard)):  # a window ends where the next shard is one too many
            if len(inside | {shard[end]}) > WINDOW:
                break
            inside.add(shard[end])
        else:
            end = len(shard)
        assert sum(blocks[number] for number in inside) == end - start
        changes = sum(one != other for one, other in itertools.pairwise(shard[start:end]))
        assert changes > 0.7 * (end - start)
        assert not seen & inside
        seen, start = seen | inside, end
    assert seen == set(range(len(blocks)))
    assert not torch.equal(order, permutation(5, 1, sum(blocks), blocks))
    assert not torch.equal(order, permutation(6, 2, sum(blocks), blocks))


def batches(root, rank=0, world=1, start=0, workers=0, count=4):
    sets = StreamingDataset(root=str(root), size=32, validation=0, workers=workers)
    found = sets.train_batches(sets.mean_image(), CPU, BatchOrder(3, 20, AUGMENT, start, rank, world))
    with contextlib.closing(found):
        return list(itertools.islice(found, count))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
def test_packed_batches_are_the_same_on_any_processes_workers_and_starts(packed):
    whole = batches(packed)
    shares = [batches(packed, rank, 2) for rank in (0, 1)]
    for batch, *parts in zip(whole, *shares, strict=True):
        for one, some, others in zip(batch, *parts, strict=True):
            assert torch.equal(one, torch.cat([some, others]))
    for other in (batches(packed, start=2, count=2), batches(packed, start=2, count=2, workers=2)):
        for one, two in zip(whole[2:], other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# Trained from

TRAIN = ["data=imagenet", "depth=18", "data.size=32", "augment.shorter_side=[36,60]", "batch_size=10", "iterations=7"]
TRAIN += ["log_every=2", "checkpoint_every=2", "eval_batch_size=4", "data.workers=1", "device=cpu"]
TRAIN += ["data.validation=5", "precision=fp32"]


@pytest.mark.long
def test_a_training_on_packed_data_that_is_killed_ends_as_the_undisturbed(packed, tmp_path):
    """64 - 5 images in batches of 10: killed with SIGKILL in the first pass and resuming from its checkpoint."""
    words = [*TRAIN, f"data.root={packed}"]
    whole = subprocess.run(start(*words, "run_dir=whole"), cwd=tmp_path, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    job = subprocess.Popen(start(*words, "run_dir=cut"), cwd=tmp_path, stdout=subprocess.DEVNULL)
    while not stamp(tmp_path / "cut"):
        assert job.poll() is None
        time.sleep(0.005)
    job.kill()
    job.wait()
    done = subprocess.run(start(*words, "run_dir=cut"), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resuming from iteration" in done.stdout
    for name in ("last", "previous", "best"):
        files = [tmp_path / run / "checkpoints" / f"{name}.pt" for run in ("whole", "cut")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    waited = [line["waited"] for line in lines if line["split"] == "train"]
    assert len(waited) == 4
    assert all(0 < share < 1 for share in waited)


# Cutting, listing, broken images


def test_the_cut_is_the_part_resized(tree):
    """At a scale of 1 it is the part itself; a large photograph decoded at a fraction is near to the whole."""
    part = open_image_splits(str(tree)).train
    for index in range(0, 64, 9):
        name, data, _ = part.read(index)
        image = decode(data, name)
        assert torch.equal(cut(data, name, 24, lambda *_: (3, 5, 24, 24)), image[3:27, 5:29])
    file = io.BytesIO()
    photograph(4, 900, 700).save(file, "JPEG", quality=95)
    small = cut(file.getvalue(), "", 32, lambda h, w: (h // 4, w // 4, h // 2, w // 2)).float()
    whole = decode(file.getvalue(), "")[175:525, 225:675].permute(2, 0, 1)[None]
    exact = torch.nn.functional.interpolate(whole.float(), (32, 32), mode="bilinear", antialias=True)
    difference = (small.permute(2, 0, 1) - exact[0]).abs()
    assert 0 < difference.mean() < 2  # not the same pixels: it was decoded at an eighth


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (375, 500), (9000, 12000), (50, 49)])
@pytest.mark.parametrize("side", [224, 256, 480])
def test_boxes_lie_inside_and_reach_both_ends(height, width, side):
    ends = [scaled_box(height, width, size=224, side=side, place=place) for place in ((0.0, 0.0), (1 - 1e-9, 1 - 1e-9))]
    (top, left, edge, same), (bottom, right, *_) = ends
    assert edge == same == max(1, round(224 * min(height, width) / side))
    assert (top, left, bottom, right) == (0, 0, height - edge, width - edge)


def aged(root):
    """Folders that have been as they are for a while."""
    for folder in [root, *root.rglob("*")]:
        if folder.is_dir():
            os.utime(folder, (1e9, 1e9))


def test_a_listing_is_kept_and_never_stale(tree, tmp_path, monkeypatch):
    """Files that come, go, change their names or their length in place are seen, by the listing or at their reading."""
    monkeypatch.setenv("RESNET_TRAIN_DATA", str(tmp_path / "cache"))
    from resnet_train.data import imagefolder

    monkeypatch.setattr(imagefolder, "SETTLED", -1.0)
    root, listed = tmp_path / "photos", []
    shutil.copytree(tree, root)
    real = imagefolder._list_images
    monkeypatch.setattr(imagefolder, "_list_images", lambda *found: listed.append(1) or real(*found))

    def opened(times):
        listed.clear()
        found = open_image_splits(str(root))
        assert len(listed) == times
        return found

    first = opened(2)
    again = opened(0)
    assert again.digest == first.digest
    assert [again.train.read(n) for n in range(64)] == [first.train.read(n) for n in range(64)]
    (root / "train" / "cat" / "01.JPEG").rename(root / "train" / "cat" / "zz.JPEG")
    renamed = opened(2)
    assert renamed.digest != first.digest
    shutil.copy(root / "val" / "eel" / "01.JPEG", root / "val" / "eel" / "02.JPEG")
    assert len(opened(2).test) == 12
    (root / "val" / "eel" / "02.JPEG").unlink()
    assert len(opened(2).test) == 11
    with (root / "train" / "cat" / "zz.JPEG").open("ab") as file:
        file.write(b"x")
    changed = opened(0)
    with pytest.raises(UserError, match=r"zz\.JPEG: has .* bytes and had"):
        [changed.train.read(n) for n in range(64)]
    os.utime(root / "train" / "cat")
    assert opened(2).digest not in (first.digest, renamed.digest)
    monkeypatch.setattr(imagefolder, "SETTLED", 10.0)
    (root / "train" / "dog" / "zz.JPEG").write_bytes(b"x")
    opened(2)
    opened(2)  # the folder has changed just now: not kept


@pytest.mark.parametrize("other", [[1], None, torch.ones(3), {}], ids=["list", "nothing", "tensor", "no keys"])
def test_a_kept_listing_of_another_kind_is_made_again(other, tree, tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_TRAIN_DATA", str(tmp_path))
    monkeypatch.setattr("resnet_train.data.imagefolder.SETTLED", -1.0)
    first = open_image_splits(str(tree))
    (path,) = (tmp_path / "listings").iterdir()
    torch.save(other, path)
    assert open_image_splits(str(tree)).digest == first.digest


def test_a_folder_that_changed_and_has_its_old_time_again_is_listed_anew(tree, tmp_path, monkeypatch):
    """As copying programs leave it, which set the times of what they copy."""
    from resnet_train.data import imagefolder

    monkeypatch.setenv("RESNET_TRAIN_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(imagefolder, "SETTLED", -1.0)
    root = tmp_path / "photos"
    shutil.copytree(tree, root)
    assert len(open_image_splits(str(root)).test) == 11
    before = (root / "val" / "eel").stat()
    shutil.copy(root / "val" / "eel" / "01.JPEG", root / "val" / "eel" / "02.JPEG")
    os.utime(root / "val" / "eel", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (root / "val" / "eel").stat().st_mtime_ns == before.st_mtime_ns
    assert len(open_image_splits(str(root)).test) == 12


def test_a_tree_that_changes_while_it_is_listed_is_refused(tree, tmp_path, monkeypatch):
    from resnet_train.data import imagefolder

    monkeypatch.setenv("RESNET_TRAIN_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(imagefolder, "SETTLED", -1.0)
    root = tmp_path / "photos"
    shutil.copytree(tree, root)
    real = imagefolder._list_images

    def slowly(*arguments):
        found = real(*arguments)
        shutil.copy(root / "val" / "eel" / "01.JPEG", root / "val" / "eel" / "02.JPEG")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(imagefolder, "_list_images", slowly)
        with pytest.raises(UserError, match="changed while it was listed; start again"):
            open_image_splits(str(root))
    assert not (tmp_path / "cache" / "listings").exists()
    assert len(open_image_splits(str(root)).test) == 12


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_broken_training_image_is_skipped_where_asked(tree, tmp_path, capfd):
    """The next one comes in its place, the same on any workers, counted; a broken test image is left out."""
    root = tmp_path / "photos"
    shutil.copytree(tree, root)
    for index in (6, 7):
        (root / "train" / "dog" / f"{index:02d}.JPEG").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"dog/0[67]\.JPEG: is not an image"):
        batches(root, count=7)

    def skipping(workers):
        sets = StreamingDataset(root=str(root), size=32, validation=0, workers=workers, broken="skip")
        found = sets.train_batches(sets.mean_image(), CPU, BatchOrder(3, 16, AUGMENT))
        skipped = []
        with contextlib.closing(found):
            images = [(skipped.append(sets.skipped), one)[1] for one in itertools.islice(found, 8)]
        return images, skipped

    (here, counts), (there, same) = skipping(0), skipping(2)
    assert counts == same
    assert sum(counts) == 4  # two files, two passes of 64
    for one, two in zip(here, there, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.cat([labels for _, labels in here]).bincount().tolist() == [60, 40, 28]
    told = [line for line in capfd.readouterr().err.splitlines() if line.startswith("skipped: ")]
    assert len(told) == 4  # by each of the two sets, each file once
    (root / "val" / "eel" / "01.JPEG").write_bytes(b"no image")
    sets = StreamingDataset(root=str(root), size=32, validation=0, workers=0, broken="skip")
    intact = StreamingDataset(root=str(tree), size=32, validation=0, workers=0)
    index = intact.names("test").index("eel/01.JPEG")
    left, whole = (
        torch.cat([labels for _, labels in one.eval_batches("test", one.mean_image(), CPU, 4)])
        for one in (sets, intact)
    )
    assert left.tolist() == [-1 if place == index else label for place, label in enumerate(whole.tolist())]


MODES = {"L": "JPEG", "CMYK": "JPEG", "P": "PNG", "1": "PNG", "LA": "PNG", "RGBA": "PNG", "I;16": "PNG"}


@pytest.mark.parametrize(("mode", "kind"), MODES.items(), ids=MODES)
def test_every_kind_of_image_becomes_rgb(mode, kind):
    """And the quick decoder gives what Pillow gives."""
    file = io.BytesIO()
    grey = photograph(3, 41, 37).convert("L")
    if mode == "I;16":
        Image.fromarray(torch.arange(0, 37 * 41 * 40, 40).view(37, 41).to(torch.uint16).numpy()).save(file, kind)
        expected = (torch.arange(0, 37 * 41 * 40, 40).view(37, 41) // 256)[..., None].expand(-1, -1, 3)
    else:
        image = (grey if mode in ("L", "LA", "1") else photograph(3, 41, 37)).convert(mode)
        image.save(file, kind)
        with Image.open(io.BytesIO(file.getvalue())) as again:
            expected = torch.tensor(bytearray(again.convert("RGB").tobytes())).view(37, 41, 3)
    assert torch.equal(decode(file.getvalue(), "x.JPEG"), expected.to(torch.uint8))


def test_rotation_is_not_applied_and_palettes_may_be_transparent():
    file = io.BytesIO()
    image, exif = photograph(3, 41, 37), Image.Exif()
    exif[0x0112] = 6
    image.save(file, "JPEG", exif=exif)
    assert decode(file.getvalue(), "").shape == (37, 41, 3)
    file = io.BytesIO()
    image.quantize(8).save(file, "PNG", transparency=bytes(range(8)))
    assert decode(file.getvalue(), "").shape == (37, 41, 3)


# The command line


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("", ["data.root=TREE out=FOLDER", "check=FOLDER"]),
        ("data.root=TREE", ["out=FOLDER"]),
        ("data.root=nosuch out=x", ["data.root=nosuch", "no such file"]),
        ("data.root=TREE out=x shorter_side=7", ["shorter_side=7", "at least 8"]),
        ("data.root=TREE out=x quality=101", ["quality=101", "at most 100"]),
        ("data.root=TREE out=x qualty=9", ["qualty", "did you mean quality?"]),
        ("data.root=TREE out=x data.broken=skp", ["data.broken=skp", "did you mean skip?"]),
        ("data.root=TREE out=x shard_images=0", ["images=0", "at least 1"]),
        ("data.root=TREE out=x workers=-1", ["workers=-1", "at least 0"]),
        ("data.root=TREE out=TREE/packed", ["is inside the tree"]),
        ("data.root=TREE out=s3://bucket/x", ["s3://bucket/x", "to a folder"]),
        ("data.root=TREE out=/dev/null/x", ["/dev/null/x"]),
        ("data.root=PACKED out=x", ["is packed already"]),
        ("data.root=s3://bucket/x out=x", ["is packed already"]),
        ("check=TREE", ["no packed folder", "pack.json"]),
        ("check=ftp://host/x", ["ftp://host/x", "s3://"]),
        ("check=PACKED out=x", ["out=x", "is not used by"]),
        ("check=PACKED workers=1,2 -m", ["-m", "one tree at a time"]),
        ("data=cifar10 out=x", ["'data'"]),
        ("data=imagenet out=x", ["data.root=TREE", "out=FOLDER"]),
    ],
)
def test_a_wrong_command_line_is_one_line(line, parts, tree, packed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = line.replace("TREE", str(tree)).replace("PACKED", str(packed)).split() if "=" in line else []
    monkeypatch.setattr(sys, "argv", ["resnet-pack", *words])
    with pytest.raises(SystemExit) as ended:
        cli.pack()
    text = capsys.readouterr()
    assert (ended.value.code, text.out) == (2, "")
    assert text.err.startswith("error: ")
    assert text.err.count("\n") == 1
    assert all(part in text.err for part in parts), text.err
    assert not list(tmp_path.iterdir())


def test_packed_folders_are_for_imagenet_and_urls_for_packed_folders(packed):
    check_source("imagenet", str(packed))
    check_source("imagenet", "s3://bucket/imagenet")
    for name, root in (("imagefolder", str(packed)), ("cifar10", str(packed)), ("imagefolder", "s3://bucket/x")):
        with pytest.raises(UserError, match="data=imagenet reads"):
            check_source(name, root)
    with pytest.raises(UserError, match="reads packed folders from s3://"):
        check_source("imagenet", "ftp://host/x")
