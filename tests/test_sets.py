"""Batches of the two kinds of data sets: whole in memory, and decoded as it trains."""

import contextlib
import dataclasses
import errno
import itertools
import multiprocessing
import os
import shutil
import sys
import threading

import pytest
import torch
from conftest import entries
from distributed_worker import composed
from PIL import Image
from torchvision.transforms.v2 import functional as TF

from resnet_train.classification.load import open_dataset
from resnet_train.config.augment import Augment
from resnet_train.config.layout import check_source
from resnet_train.data import imagefolder, streaming
from resnet_train.data.augment import EIGENVECTORS, IMAGENET_MEAN
from resnet_train.data.cache import cache_folder
from resnet_train.data.crops import area_box
from resnet_train.data.decode import ImageError, read_image
from resnet_train.data.memory import MemoryDataset
from resnet_train.data.source import load
from resnet_train.data.streaming import StreamingDataset, _RandomViews
from resnet_train.data.views import BatchOrder, split_sizes
from resnet_train.errors import RunError, UserError

CPU = torch.device("cpu")
AUGMENT = Augment(4, True, [28, 40], None, colour_jitter=0.0, colour_noise=0.1)
PLAIN = Augment(0, False, [24, 24], None, colour_jitter=0.0, colour_noise=0.0)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RESNET_TRAIN_DATA", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def digits():
    """1,300 images to train, 137 held out, 360 to test."""
    return MemoryDataset(name="digits", root=None, size=16, validation=137)


# Height and width; none is a multiple of another.
SHAPES = [(40, 57), (63, 41), (48, 48), (45, 100), (33, 34), (90, 31), (27, 27)]
COUNTS = {"train": {"cat": 7, "dog": 4, "eel": 2}, "val": {"cat": 2, "dog": 4, "eel": 3}}


def photograph(path, shape, seed):
    """A smooth colour picture as JPEG."""
    blocks = torch.randint(0, 256, (3, 4, 5), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = TF.resize(blocks, list(shape), antialias=True).permute(1, 2, 0).contiguous()
    Image.fromarray(image.numpy()).save(path, quality=95)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """13 photographs to train and 9 to validate, of three classes and seven shapes."""
    root, number = tmp_path_factory.mktemp("photographs"), itertools.count()
    for part, counts in COUNTS.items():
        for name, count in counts.items():
            for index in range(count):
                seed = next(number)
                photograph(root / part / name / f"{index}.JPEG", SHAPES[seed % len(SHAPES)], seed)
    return root


def streamed(root, validation=0, workers=0, size=24):
    return StreamingDataset(root=str(root), size=size, validation=validation, workers=workers)


def training(sets, count, start=0, seed=3, batch_size=8, augment=AUGMENT):
    """`count` training batches from iteration `start`, as images and labels."""
    batches = sets.train_batches(sets.mean_image(), CPU, BatchOrder(seed, batch_size, augment, start))
    with contextlib.closing(batches):
        return [(images.clone(), labels.clone()) for images, labels in itertools.islice(batches, count)]


def evaluating(sets, split, batch_size):
    return list(sets.eval_batches(split, sets.mean_image(), CPU, batch_size))


def equal(some, others):
    """The same batches, bit for bit."""
    return len(some) == len(others) and all(
        torch.equal(one, other) for pair in zip(some, others, strict=True) for one, other in zip(*pair, strict=True)
    )


def test_sizes_and_names(digits, tree):
    assert digits.sizes == {"train": 1300, "val": 137, "test": 360}
    assert (digits.protocol, digits.top5, len(digits.classes)) == ("single view", False, 10)
    sets = streamed(tree, validation=4)
    assert sets.sizes == {"train": 9, "val": 4, "test": 9}
    assert (sets.protocol, sets.top5, sets.classes) == ("center crop", False, ["cat", "dog", "eel"])


@pytest.mark.parametrize("classes", [5, 6])
def test_top5_is_of_more_than_five_classes(classes, tmp_path):
    for part, number in itertools.product(("train", "val"), range(classes)):
        photograph(tmp_path / part / str(number) / "0.JPEG", SHAPES[0], number)
    assert streamed(tmp_path).top5 == (classes > 5)


@pytest.mark.parametrize("validation", [0, 5, 137])
def test_split_sizes(validation):
    train, val = split_sizes(138, validation)
    assert (len(train), len(val)) == (138 - validation, validation)


@pytest.mark.parametrize("validation", [138, 139, 10**9])
def test_holding_out_everything_is_refused(validation):
    with pytest.raises(UserError, match=rf"data\.validation={validation}: .*138 images") as caught:
        split_sizes(138, validation)
    assert "\n" not in str(caught.value)


def test_both_kinds_refuse_to_hold_out_everything(tree):
    with pytest.raises(UserError, match=r"data\.validation=13"):
        streamed(tree, validation=13)
    with pytest.raises(UserError, match=r"data\.validation=1437"):
        MemoryDataset(name="digits", root=None, size=8, validation=1437)


# In memory


def test_the_validation_part_is_no_part_of_the_training_part(digits):
    """Both together are the training set, each image once."""
    full = load("digits", None, 16)
    held = torch.zeros(1437, dtype=torch.bool)
    held[digits.val_indices] = True
    assert held.sum() == 137
    for split, which in (("train", ~held), ("val", held)):
        assert torch.equal(digits.parts[split].images, full.train.images[which])
        assert torch.equal(digits.parts[split].labels, full.train.labels[which])
    assert torch.equal(digits.parts["test"].images, full.test.images)
    assert digits.digest == full.digest


def test_the_mean_is_of_the_training_part_only(digits):
    full = load("digits", None, 16)
    kept = torch.ones(1437, dtype=torch.bool)
    kept[digits.val_indices] = False
    assert torch.equal(digits.mean_image(), full.train.images[kept].double().mean(0).float())
    assert not torch.equal(digits.mean_image(), full.train.images.double().mean(0).float())


def test_without_validation_all_images_train():
    sets = MemoryDataset(name="digits", root=None, size=8, validation=0)
    assert sets.sizes == {"train": 1437, "val": 0, "test": 360}
    assert evaluating(sets, "val", 10) == []
    assert torch.equal(sets.parts["train"].images, load("digits", None, 8).train.images)


@pytest.mark.parametrize("start", [1, 9, 12])
def test_memory_batches_from_a_start_are_the_tail(start, digits):
    """1,300 images in batches of 100: iteration 13 begins the second pass."""
    whole = training(digits, 15, batch_size=100)
    assert equal(training(digits, 15 - start, start=start, batch_size=100), whole[start:])
    assert not equal(training(digits, 1, seed=4, batch_size=100), whole[:1])


def test_memory_batches_are_views_of_their_images(digits):
    """Each is one of the 81 crops of the image it is labelled as, or of its mirror image."""
    mean = digits.mean_image()
    images, labels = training(digits, 1, batch_size=6)[0]
    assert images.shape == (6, 3, 16, 16)
    assert images.is_contiguous(memory_format=torch.channels_last)
    part = digits.parts["train"]
    padded = torch.nn.functional.pad((part.images.float() - mean)[..., 0] / 255, (4, 4, 4, 4))
    for view, label in zip(images[:, 0], labels, strict=True):
        candidates = padded[part.labels == label]
        views = torch.cat([candidates, candidates.flip(2)]).unfold(1, 16, 1).unfold(2, 16, 1)
        assert views.shape[1:3] == (9, 9)
        assert (views - view).abs().amax((3, 4)).min() < 1e-6


def test_one_pass_without_augmentation_holds_every_image_once(digits):
    """With pad 0 and no flip, 13 batches of 100 are the training part in another order."""
    images, labels = (
        torch.cat(both) for both in zip(*training(digits, 13, batch_size=100, augment=PLAIN), strict=True)
    )
    part = digits.parts["train"]
    reference = ((part.images.float() - digits.mean_image()) / 255).permute(0, 3, 1, 2)
    assert not torch.equal(labels, part.labels)
    assert labels.bincount().tolist() == part.labels.bincount().tolist()
    direction = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    along = [(views * direction).double().sum((1, 2, 3)).sort().values for views in (images, reference)]
    torch.testing.assert_close(*along, rtol=0, atol=1e-4)


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("batch_size", [7, 100, 360, 2000])
def test_evaluation_sees_every_image_once_in_full_batches(split, batch_size, digits):
    batches, part = evaluating(digits, split, batch_size), digits.parts[split]
    assert len(batches) == -(-len(part) // batch_size)
    assert all(images.shape == (batch_size, 3, 16, 16) for images, _ in batches)
    images, labels = (torch.cat(both) for both in zip(*batches, strict=True))
    assert labels.dtype == torch.int64
    assert torch.equal(labels[: len(part)], part.labels)
    assert (labels[len(part) :] == -1).all()
    reference = ((part.images.double() - digits.mean_image().double()) / 255).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(images[: len(part)], reference, rtol=1e-6, atol=1e-7)


# Decoded as it trains


@pytest.fixture(scope="module")
def whole(tree):
    """Five training batches of the whole tree, decoded in this process."""
    return training(streamed(tree), 5)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_batches_do_not_depend_on_workers_or_on_the_start(workers, tree, whole):
    sets = streamed(tree, workers=workers)
    assert equal(training(sets, 5), whole)
    assert equal(training(sets, 3, start=2), whole[2:])


def test_streamed_batches_depend_on_the_seed(tree, whole):
    assert not equal(training(streamed(tree), 1, seed=4), whole[:1])


def test_streamed_batches_have_the_size_asked_for(whole):
    for images, labels in whole:
        assert images.shape == (8, 3, 24, 24)
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert (labels.shape, labels.dtype) == ((8,), torch.int64)


def test_one_streamed_pass_holds_every_image_once(tree):
    labels = torch.cat([labels for _, labels in training(streamed(tree), 13, batch_size=1)])
    assert labels.bincount().tolist() == list(COUNTS["train"].values())


def reference_view(path, side, size):
    """The center crop of `size` pixels after the shorter side is brought to `side`, minus the mean."""
    image = TF.center_crop(TF.resize(read_image(path), [side], antialias=True), [size, size])
    return (image.double() - torch.tensor(IMAGENET_MEAN, dtype=torch.float64)[:, None, None]) / 255


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [3, 4, 9, 20])
def test_streamed_evaluation_is_the_center_crop_of_every_image_once(batch_size, workers, tree):
    """Shorter side 256 / 224 of the crop's: 27 for 24."""
    batches = evaluating(streamed(tree, workers=workers), "test", batch_size)
    assert len(batches) == -(-9 // batch_size)
    assert all(images.shape == (batch_size, 3, 24, 24) for images, _ in batches)
    images, labels = (torch.cat(both) for both in zip(*batches, strict=True))
    assert labels.tolist() == [0] * 2 + [1] * 4 + [2] * 3 + [-1] * (len(labels) - 9)
    reference = torch.stack([reference_view(path, 27, 24) for path in sorted((tree / "val").glob("*/*"))])
    torch.testing.assert_close(images[:9], reference.float(), rtol=1e-6, atol=1e-6)


def test_the_paper_s_224_is_cut_from_256(tree):
    images, _ = evaluating(streamed(tree, size=224), "test", 1)[0]
    reference = reference_view(tree / "val" / "cat" / "0.JPEG", 256, 224)
    torch.testing.assert_close(images[0], reference.float(), rtol=1e-6, atol=1e-6)


def test_streamed_validation_is_no_part_of_training(tree):
    sets = streamed(tree, validation=4)
    paths = {split: [path for path, _ in entries(sets.parts[split])] for split in sets.parts}
    assert sorted(paths["train"] + paths["val"]) == sorted((tree / "train").glob("*/*"))
    assert paths["test"] == sorted((tree / "val").glob("*/*"))
    assert (len(paths["train"]), len(paths["val"])) == (9, 4)
    for split in ("train", "val", "test"):
        assert [label for _, label in entries(sets.parts[split])] == [
            sets.classes.index(path.parent.name) for path in paths[split]
        ]
    _, labels = evaluating(sets, "val", 5)[0]
    assert labels.tolist() == [*(label for _, label in entries(sets.parts["val"])), -1]


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Two classes with one 24x40 picture each: a crop of 24 has 17 places, from left to right."""
    root = tmp_path_factory.mktemp("wide")
    for seed, (part, name) in enumerate(itertools.product(("train", "test"), ("a", "b"))):
        image = torch.randint(0, 256, (24, 40, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        (root / part / name).mkdir(parents=True)
        Image.fromarray(image.numpy()).save(root / part / name / "0.png")
    return root


def places(wide, flip):
    """How often each of the 17 places is seen as it is and mirrored, in 1,600 images: (2, 17)."""
    mean = torch.tensor(IMAGENET_MEAN)[:, None, None]
    crops = [read_image(wide / "train" / name / "0.png").unfold(2, 24, 1).permute(2, 0, 1, 3) for name in "ab"]
    views = [((torch.cat([crop, crop.flip(3)]) - mean) / 255).flatten(1) for crop in crops]
    seen = torch.zeros(34, dtype=torch.int64)
    for images, labels in training(streamed(wide), 200, augment=dataclasses.replace(PLAIN, flip=flip)):
        for image, label in zip(images.flatten(1), labels.tolist(), strict=True):
            (which,) = ((views[label] - image).abs().amax(1) < 1e-6).nonzero().flatten()
            seen[which] += 1
    return seen.view(2, 17)


def test_streamed_crops_reach_every_place_evenly(wide):
    """94 of each are expected; four standard deviations are 38."""
    plain, mirrored = places(wide, flip=False)
    assert mirrored.sum() == 0
    assert plain.min() > 56
    assert plain.max() < 132


def test_streamed_flips_happen_at_every_place(wide):
    seen = places(wide, flip=True)
    assert seen.min() > 0
    assert 700 < seen[1].sum() < 900


def test_the_shorter_side_takes_every_value(tmp_path):
    """Pictures white on the left and black on the right: after scaling, the crop of 24 is 24 / side of the whole."""
    for part, name in itertools.product(("train", "test"), ("a", "b")):
        (tmp_path / part / name).mkdir(parents=True)
        ramp = torch.arange(0, 240, dtype=torch.uint8).repeat(240, 1)[..., None].expand(-1, -1, 3).contiguous()
        Image.fromarray(ramp.numpy()).save(tmp_path / part / name / "0.png")
    sides = set()
    for images, _ in training(streamed(tmp_path), 20, augment=dataclasses.replace(PLAIN, shorter_side=[26, 30])):
        steps = (images[:, 0, 12, 20] - images[:, 0, 12, 3]) * 255 / 17
        sides |= {round(240 / step) for step in steps.tolist()}
    assert sides == {26, 27, 28, 29, 30}


def test_colour_noise_shifts_each_image_along_the_components(tree):
    still = training(streamed(tree), 3, augment=dataclasses.replace(AUGMENT, colour_noise=0.0))
    noisy = training(streamed(tree), 3, augment=dataclasses.replace(AUGMENT, colour_noise=0.5))
    shifts = []
    for (before, labels), (after, same) in zip(still, noisy, strict=True):
        assert torch.equal(labels, same)
        difference = after - before
        shift = difference.mean((2, 3))
        torch.testing.assert_close(difference, shift[:, :, None, None].expand_as(difference), rtol=0, atol=1e-5)
        shifts.append(shift)
    weights = torch.cat(shifts) @ torch.tensor(EIGENVECTORS)
    assert len(weights.unique(dim=0)) == 24
    # The standard deviation along each component is 0.5 times its eigenvalue.
    assert (weights.std(0) / (0.5 * torch.tensor([0.2175, 0.0188, 0.0045]))).sub(1).abs().max() < 0.5


def test_the_digest_is_of_names_and_sizes(tree, tmp_path):
    digest = streamed(tree).digest
    assert streamed(tree, validation=3, workers=1).digest == digest
    shutil.copytree(tree, tmp_path / "copy")
    assert streamed(tmp_path / "copy").digest == digest
    with (tmp_path / "copy" / "train" / "cat" / "0.JPEG").open("ab") as file:
        file.write(b"x")
    assert streamed(tmp_path / "copy").digest != digest


def moved_to_another_class(tree, folder):
    """The tree with its last cat as the first dog: the same names and sizes in the same order, of other classes."""
    shutil.copytree(tree, folder)
    for number in range(4):
        (folder / "train" / "dog" / f"{number}.JPEG").rename(folder / "train" / "dog" / f"7-{number}.JPEG")
    shutil.copytree(folder, folder.with_name("moved"))
    (folder.with_name("moved") / "train" / "cat" / "6.JPEG").rename(
        folder.with_name("moved") / "train" / "dog" / "6.JPEG"
    )
    return folder, folder.with_name("moved")


def test_the_digest_is_of_classes_too(tree, tmp_path):
    """Of photographs by their names, of small images by their labels."""
    one, other = moved_to_another_class(tree, tmp_path / "copy")
    files = [sets.parts["train"] for sets in map(streamed, (one, other))]
    names = [[(path.name, path.stat().st_size) for path, _ in entries(part)] for part in files]
    assert names[0] == names[1]
    assert streamed(one).digest != streamed(other).digest
    small = [load("imagefolder", str(root), 8) for root in (one, other)]
    assert torch.equal(small[0].train.images, small[1].train.images)
    assert not torch.equal(small[0].train.labels, small[1].train.labels)
    assert small[0].digest != small[1].digest


def test_the_next_of_a_broken_last_image_is_the_first(tree, tmp_path):
    """Every pass then holds the first image twice."""
    shutil.copytree(tree, tmp_path / "copy")
    (tmp_path / "copy" / "train" / "eel" / "1.JPEG").write_bytes(b"no image")
    sets = StreamingDataset(root=str(tmp_path / "copy"), size=24, validation=0, workers=0, broken="skip")
    batches = training(sets, 13, batch_size=1, augment=PLAIN)
    assert torch.cat([labels for _, labels in batches]).bincount().tolist() == [8, 4, 1]
    (tmp_path / "copy" / "train" / "cat" / "0.JPEG").write_bytes(b"no image")  # nor is this one
    sets = StreamingDataset(root=str(tmp_path / "copy"), size=24, validation=0, workers=0, broken="skip")
    batches = training(sets, 13, batch_size=1, augment=PLAIN)
    assert torch.cat([labels for _, labels in batches]).bincount().tolist() == [8, 4, 1]


@pytest.mark.parametrize(
    ("make", "reason"),
    [(os.mkfifo, "not a regular file"), (lambda path: make_sparse(path, 60e9), "larger than 1,000,000,000 bytes")],
    ids=["pipe", "huge"],
)
def test_an_image_that_is_a_pipe_or_huge_is_a_broken_one(make, reason, tree, tmp_path):
    shutil.copytree(tree, tmp_path / "copy")
    path = tmp_path / "copy" / "train" / "eel" / "1.JPEG"
    path.unlink()
    make(path)
    sets = StreamingDataset(root=str(tmp_path / "copy"), size=24, validation=0, workers=0, broken="skip")
    batches = training(sets, 13, batch_size=1, augment=PLAIN)
    assert torch.cat([labels for _, labels in batches]).bincount().tolist() == [8, 4, 1]
    sets = StreamingDataset(root=str(tmp_path / "copy"), size=24, validation=0, workers=0, broken="stop")
    with pytest.raises(UserError, match=rf"eel/1\.JPEG: is not an image that can be read \({reason}\)"):
        list(training(sets, 13, batch_size=1, augment=PLAIN))
    with pytest.raises(ImageError, match=rf"eel/1\.JPEG: is not an image that can be read \({reason}\)"):
        read_image(path)
    data = load("imagefolder", str(tmp_path / "copy"), 16, skip=True)
    assert (len(data.train), data.unreadable["train"]) == (12, ["eel/1.JPEG"])


def make_sparse(path, size):
    path.touch()
    os.truncate(path, int(size))


def test_more_than_the_memory_holds_is_refused_before_it_is_decoded(tree):
    words = (
        r"data\.size=10000000: [0-9]+ images of \[10000000, 10000000, 3\] are [0-9]+ GB, and this machine has [0-9]+; "
    )
    with pytest.raises(UserError, match=words):
        load("imagefolder", str(tree), 10**7)


def test_images_have_the_size_that_the_configuration_names(tree):
    """data.size, in training and in the test, of both kinds."""
    photographs = ["data=imagenet", f"data.root={tree}", "data.workers=0", "augment.shorter_side=[36,40]"]
    for size, words in ((23, ["data=digits"]), (32, photographs)):
        sets = open_dataset(composed(*words, f"data.size={size}", "data.validation=0", "device=cpu"))
        assert training(sets, 1, batch_size=2)[0][0].shape == (2, 3, size, size)
        assert evaluating(sets, "test", 2)[0][0].shape == (2, 3, size, size)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", [b"", b"hello\n", None], ids=["zero bytes", "text", "half"])
def test_a_broken_file_stops_the_workers_and_is_named_in_one_line(content, workers, tree, tmp_path):
    shutil.copytree(tree, tmp_path / "copy")
    path = tmp_path / "copy" / "train" / "dog" / "2.JPEG"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    sets = streamed(tmp_path / "copy", workers=workers)
    with pytest.raises(UserError) as caught:
        training(sets, 2)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(sys.platform != "linux", reason="forks of a process with threads are safe on Linux alone")
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_share_what_is_listed_where_new_processes_are_no_forks(tree):
    """As with Python 3.14: a listing that cannot be sent is not sent."""
    before = multiprocessing.get_start_method(allow_none=True)
    sets = streamed(tree, workers=1)
    sets.parts["test"].unsendable = lambda: None
    multiprocessing.set_start_method("spawn", force=True)
    try:
        found = evaluating(sets, "test", 9)
    finally:
        multiprocessing.set_start_method(before, force=True)
    assert equal(found, evaluating(streamed(tree), "test", 9))


def test_a_wrong_tree_is_refused_when_it_is_opened(tree, tmp_path):
    shutil.copytree(tree, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "val" / "eel")
    with pytest.raises(UserError, match="class eel"):
        check_source("imagenet", str(tmp_path / "copy"))
    assert streamed(tmp_path / "copy").sizes == {"train": 0, "val": 0, "test": 6}


# What is subtracted


def test_the_mean_image_is_that_of_the_center_crops(tree):
    sets = StreamingDataset(root=str(tree), size=24, validation=3, workers=0, subtract="image")
    crops = [
        TF.center_crop(TF.resize(read_image(path), [round(24 * 256 / 224)], antialias=True), [24, 24])
        for path, _ in entries(sets.parts["train"])
    ]
    expected = torch.stack(crops).double().mean(0).permute(1, 2, 0)
    found = sets.mean_image()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    shutil.rmtree(cache_folder() / "decoded", ignore_errors=True)
    assert torch.equal(sets.mean_image(), found)  # from the cache
    whole = StreamingDataset(root=str(tree), size=24, validation=0, workers=0, subtract="image").mean_image()
    assert not torch.equal(whole, found)


def test_the_mean_of_some_images_is_of_such_from_all_classes(tree, monkeypatch):
    """Of 13 training images, sorted by class, four at even distances: the first, the last and two between."""
    monkeypatch.setattr(streaming, "MEAN_OF", 4)
    sets = StreamingDataset(root=str(tree), size=24, validation=0, workers=0, subtract="image")
    paths = [entries(sets.parts["train"])[index][0] for index in (0, 4, 8, 12)]
    assert [path.parent.name for path in paths] == ["cat", "cat", "dog", "eel"]
    crops = [TF.center_crop(TF.resize(read_image(path), [27], antialias=True), [24, 24]) for path in paths]
    expected = torch.stack(crops).double().mean(0).permute(1, 2, 0)
    torch.testing.assert_close(sets.mean_image().double(), expected, rtol=1e-6, atol=0)


def test_standard_input_is_over_the_std_after_all_else(tree):
    plain = StreamingDataset(root=str(tree), size=24, validation=0, workers=0)
    divided = StreamingDataset(root=str(tree), size=24, validation=0, workers=0, subtract="standard")
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    pairs = [*zip(training(plain, 2), training(divided, 2), strict=True)]
    pairs += zip(evaluating(plain, "test", 5), evaluating(divided, "test", 5), strict=True)
    for (images, labels), (others, same) in pairs:
        assert torch.equal(labels, same)
        torch.testing.assert_close(others, images / std, rtol=1e-6, atol=1e-7)


# Parts of a photograph, by area


def drawn(count, height, width):
    draws = torch.rand(count, 11, 2, generator=torch.Generator().manual_seed(1)).tolist()
    return [area_box(height, width, area=[0.08, 1], tries=row[:10], place=row[10]) for row in draws]


def test_parts_by_area_lie_inside_and_are_of_all_sizes_and_shapes():
    found = drawn(3000, 300, 400)
    areas = [down * across / 120_000 for _, _, down, across in found]
    ratios = [across / down for _, _, down, across in found]
    assert all(0 <= t <= 300 - h and 0 <= left <= 400 - w for t, left, h, w in found)
    assert {t == 0 for t, *_ in found} == {t + h == 300 for t, _, h, _ in found} == {True, False}
    assert 0.079 < min(areas) < 0.1 < 0.95 < max(areas) <= 1
    assert 0.74 < min(ratios) < 0.77 < 1.3 < max(ratios) < 1.35
    # before those that do not fit are drawn again, the logarithm of the ratio is uniform: small parts all fit
    small = [across < down for (_, _, down, across), area in zip(found, areas, strict=True) if area < 0.4]
    assert 0.45 < sum(small) / len(small) < 0.55


@pytest.mark.parametrize(
    ("shape", "expected"), [((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10)), ((60, 61), (0, 0, 60, 61))]
)
def test_where_no_part_fits_the_middle_is_taken(shape, expected):
    assert area_box(*shape, area=[2, 2], tries=[(0.5, 0.5)] * 10, place=(0.9, 0.9)) == expected


@pytest.mark.parametrize("place", range(10))
def test_the_first_part_of_ten_that_lies_inside_is_taken(place):
    """(1, 0): the whole area at 3:4, which is 115 high; (0.25, 0.5): a quarter, square."""
    tries = [(1.0, 0.0)] * place + [(0.25, 0.5), *[(0.01, 0.5)] * (9 - place)]
    assert area_box(100, 100, area=[0, 1], tries=tries, place=(0.5, 0.999)) == (25, 50, 50, 50)


def test_ten_parts_are_drawn_for_each_image(tree):
    augment = dataclasses.replace(PLAIN, shorter_side=None, area=[0.25, 1])
    sampler = _RandomViews(streamed(tree).parts["train"], 24, BatchOrder(3, 8, augment))
    boxes = [box.keywords for _, box in next(iter(sampler))]
    assert [len(box["tries"]) for box in boxes] == [10] * 8
    assert len({tuple(map(tuple, box["tries"])) for box in boxes}) == 8
    assert len({tuple(box["place"]) for box in boxes}) == 8


def test_a_batch_by_area_is_cut_from_its_photographs(tree):
    augment = dataclasses.replace(PLAIN, shorter_side=None, area=[0.25, 1])
    sets = streamed(tree)
    means = torch.stack([read_image(path).float().mean((1, 2)) for path, _ in entries(sets.parts["train"])])
    images, _ = training(sets, 1, augment=augment)[0]
    assert images.shape == (8, 3, 24, 24)
    colours = images.mean((2, 3)) * 255 + torch.tensor(IMAGENET_MEAN)
    assert (colours[:, None] - means).abs().amax(2).amin(1).max() < 60
    assert not torch.equal(training(sets, 1, start=1, augment=augment)[0][0], images)


@pytest.mark.parametrize(("protocol", "widest"), [("center", 24), ("tencrop", 24), ("multiscale", 17 * 69)])
def test_of_a_line_the_middle_is_seen(wide, protocol, widest, tmp_path):
    """60,001x1 with its shorter side at 69 (640 for 224) would be 4 million pixels wide."""
    shutil.copytree(wide, tmp_path / "tree")
    Image.new("RGB", (60_001, 1), (200, 200, 200)).save(tmp_path / "tree" / "test" / "a" / "0.png")
    sets = streamed(tmp_path / "tree")
    views = [view for found, _ in sets.eval_views(protocol, "test", sets.mean_image(), CPU, 2) for view, _ in found]
    assert max(view.shape[3] for view in views) <= widest
    assert any(view.shape[3] > 1000 for view in views) == (protocol == "multiscale")


def test_a_disk_that_fails_ends_the_run_as_one_that_can_go_on(tree, monkeypatch):
    """Exit code 1, for which max_restarts starts again; a file without leave to read it is wrong input, code 2."""
    for number, kind in ((errno.EIO, RunError), (errno.ESTALE, RunError), (errno.EACCES, UserError)):

        def refuse(path, _, number=number):
            raise OSError(number, os.strerror(number), path)

        monkeypatch.setattr(imagefolder, "read_regular", refuse)
        for workers in (0, 1):
            with pytest.raises(UserError, match="cannot be read") as caught:
                training(streamed(tree, workers=workers), 1)
            assert type(caught.value) is kind
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("shape", "threaded"), [((32, 32), False), ((400, 400), True)])
def test_small_files_are_decoded_in_one_thread(shape, threaded, tmp_path, monkeypatch):
    """Of 60,000 images of CIFAR-10's size, 16 threads decode a quarter of what one does."""
    for part, name in itertools.product(("train", "test"), ("cat", "dog")):
        photograph(tmp_path / "photos" / part / name / "0.png", shape, seed=0)
    threads = set()
    monkeypatch.setattr(
        "resnet_train.data.source.read_image", lambda path: threads.add(threading.get_ident()) or read_image(path)
    )
    assert len(load("imagefolder", str(tmp_path / "photos"), 16).train) == 2
    assert (threads != {threading.get_ident()}) == threaded
