"""CIFAR-100 from an archive like the official one, with few images; and what its pickles may not do."""

import hashlib
import io
import pickle
import tarfile

import pytest
import torch

from resnet_train.config.compose import compose
from resnet_train.config.train import check_train
from resnet_train.data import source
from resnet_train.data.cifar10 import unpickle
from resnet_train.data.cifar100 import FILES, read_official
from resnet_train.errors import UserError

PIXELS = torch.randint(0, 256, (7, 3072), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
NAMES = [f"class {number:02}" for number in range(100)]
LABELS = [99, 0, 3, 98, 50, 7, 99]
PARTS = {"train": slice(0, 5), "test": slice(5, 7)}
RAW = {
    part: {"data": PIXELS[which], "fine_labels": LABELS[which], "coarse_labels": [0] * len(LABELS[which])}
    for part, which in PARTS.items()
}
RAW["meta"] = {"fine_label_names": NAMES, "coarse_label_names": ["animal", "plant"]}
CONTENT = {name: pickle.dumps(values, protocol=2) for name, values in RAW.items()}
MD5S = {name: hashlib.md5(content).hexdigest() for name, content in CONTENT.items()}


@pytest.fixture(params=["archive", "folder", "parent"])
def place(request, tmp_path):
    """The three forms that data.root= takes."""
    folder = tmp_path / "unpacked" / "cifar-100-python"
    folder.mkdir(parents=True)
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    with tarfile.open(tmp_path / "cifar-100-python.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    return {"archive": tmp_path / "cifar-100-python.tar.gz", "folder": folder, "parent": folder.parent}[request.param]


def test_its_images_are_the_planes_of_the_archive_and_its_classes_the_fine_ones(place):
    data = read_official(place, MD5S)
    assert data.classes == NAMES
    for part, which in PARTS.items():
        found = getattr(data, part)
        assert found.labels.tolist() == LABELS[which]
        planes = torch.from_numpy(PIXELS[which]).view(-1, 3, 32, 32)
        assert torch.equal(found.images, planes.permute(0, 2, 3, 1))


def test_what_is_not_the_official_file_is_refused_before_it_is_unpickled(place, monkeypatch, tmp_path):
    monkeypatch.setenv("RESNET_TRAIN_DATA", str(tmp_path / "data"))
    with pytest.raises(UserError) as told:
        source.load("cifar100", str(place), 32)
    assert str(told.value).startswith(f"data.root={place}: train is damaged or not the official file (its MD5 is not ")


def test_the_archive_of_cifar10_is_not_that_of_cifar100(tmp_path):
    with tarfile.open(tmp_path / "other.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("cifar-10-batches-py/data_batch_1"), io.BytesIO())
    with pytest.raises(UserError, match="is not CIFAR-100's python archive, or is damaged"):
        read_official(tmp_path / "other.tar.gz")


class Evil:
    """Runs a command when it is unpickled by anything that lets it."""

    def __reduce__(self):
        return exec, ("raise SystemExit",)


@pytest.mark.parametrize("protocol", range(5))  # the official files have 2
def test_a_pickle_makes_arrays_and_calls_nothing(protocol):
    found = unpickle(pickle.dumps({"data": PIXELS, "fine_labels": LABELS}, protocol=protocol))
    assert (found["data"] == PIXELS).all()
    assert found["fine_labels"] == LABELS
    with pytest.raises(pickle.UnpicklingError, match="exec is no part of an array"):
        unpickle(pickle.dumps(Evil(), protocol=protocol))


def test_a_run_is_cifar10s_recipe_under_its_own_name(place):
    words = ["data=cifar100", f"data.root={place}", "data.validation=5000"]
    config = check_train(compose("train", words), ["data", "data.root", "data.validation"])
    assert (config.data_label, config.recipe, config.iterations) == ("cifar100", "cifar100", 64_000)
    ten = compose("train", ["data=cifar10"])
    assert {**compose("train", ["data=cifar100"]), "data": ten["data"], "recipe": "cifar10"} == ten
    assert set(FILES) == set(RAW)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.root=."], "data.root=.: is not CIFAR-100's archive or its folder; others are data=imagefolder"),
        (["data.size=64"], "data.size=64: CIFAR is 32 px; for other sizes use data=imagefolder"),
        (["data.validation=50000"], "the training set has 50000 images; hold out fewer"),
        (["data.family=imagenet"], "data.family=imagenet: is for folders of photographs, not for data=cifar100"),
    ],
)
def test_what_it_cannot_be_is_told(words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        check_train(compose("train", ["data=cifar100", *words]))
    assert told in str(error.value)
