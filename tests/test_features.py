"""What a layer gives for images, in one file: the numbers that the net computes, in the order of the images."""

import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from test_classify import configured, saved

from resnet_train import load
from resnet_train.classification.features import gather
from resnet_train.data.memory import MemoryDataset
from resnet_train.data.streaming import StreamingDataset
from resnet_train.errors import UserError
from resnet_train.models import imagenet_resnet


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A tree of three classes, 37 pictures to test: more than are taken at once."""
    root, draw = tmp_path_factory.mktemp("pictures") / "tree", torch.Generator().manual_seed(0)
    for part, count in (("train", 3), ("val", 37)):
        for number in range(count):
            folder = root / part / f"class-{number % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(0, 256, (40, 36 + number, 3), dtype=torch.uint8, generator=draw)
            Image.fromarray(pixels.numpy()).save(folder / f"{number:02}.png")
    return root


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """An ImageNet net of random weights for crops of 32 px."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("net") / "net.pt"
    saved(path, imagenet_resnet(18, num_classes=5), configured("imagenet", 32), [str(number) for number in range(5)])
    return path


def by_hand(model, images):
    """What the classifier sees, without a hook."""
    net = model.net
    with torch.no_grad():
        x = net.maxpool(F.relu(net.bn1(net.conv1(images))))
        for stage in net.stages:
            x = getattr(net, stage)(x)
        return x.mean((2, 3))


def test_features_are_what_the_classifier_sees_in_the_order_of_the_images(pictures, net, tmp_path, command_here):
    files = sorted(pictures.glob("val/*/*.png"), reverse=True)
    told = command_here("features", *files, f"checkpoint={net}", "out=f.npz", "device=cpu")
    assert told == "resnet-18-B, avgpool: 37 images, [37, 512] float32; f.npz\n"
    model = load(net)
    wanted = by_hand(model, torch.stack([model.transform(file) for file in files]))
    with np.load(tmp_path / "f.npz") as found:
        assert (found["features"].shape, found["features"].dtype) == ((37, 512), np.float32)
        np.testing.assert_allclose(found["features"], wanted, rtol=1e-4, atol=1e-5)
        assert found["images"].tolist() == list(map(str, files))
        assert (str(found["layer"]), str(found["net"]), int(found["iteration"])) == ("avgpool", "resnet-18-B", 3)
        assert "labels" not in found


def test_a_data_set_has_labels_and_names_and_the_same_numbers_in_either_format(pictures, net, tmp_path, command_here):
    words = [f"checkpoint={net}", "data=imagenet", f"data.root={pictures}", "device=cpu"]
    for name in ("f.npz", "f.safetensors"):
        command_here("features", *words, f"out={name}")
    dataset = StreamingDataset(root=str(pictures), size=32, validation=0, workers=0)
    model = load(net)
    wanted = by_hand(model, torch.stack([model.transform(pictures / "val" / name) for name in dataset.names("test")]))
    with np.load(tmp_path / "f.npz") as found, safe_open(tmp_path / "f.safetensors", "np") as other:
        assert set(other.keys()) == {"features", "labels"}
        for key in ("features", "labels"):
            assert np.array_equal(found[key], other.get_tensor(key))
        np.testing.assert_allclose(found["features"], wanted, rtol=1e-4, atol=1e-5)
        classes = found["classes"].tolist()
        assert [f"{classes[label]}" for label in found["labels"]] == [n.split("/")[0] for n in found["images"]]
        assert found["images"].tolist() == dataset.names("test")
        header = {key: json.loads(value) for key, value in other.metadata().items()}
        assert (header["images"], header["classes"]) == (found["images"].tolist(), classes)
        assert (header["layer"], header["split"], header["data"]) == ("avgpool", "test", dataset.label)


def test_every_layer_is_what_the_forward_pass_has_there(trained, tmp_path):
    model = load(trained)
    images = torch.stack([model.transform(Image.new("RGB", (8, 8), (60 * n, 9, 200 - 60 * n))) for n in range(4)])
    net, found = model.net, {}
    for layer, _ in net.named_modules():
        if layer:
            found[layer] = gather(model, layer, iter([(images[:3], None), (images[3:], None)]), 4)["features"]
    with torch.no_grad():
        x = net.bn1(net.conv1(images))
        stages = [net.layer1(F.relu(x))]
        stages += [net.layer2(stages[0])]
        wanted = {"bn1": x, "maxpool": F.relu(x), "layer1": stages[0], "layer2.0": stages[1], "fc": net(images)}
    for layer, values in wanted.items():
        np.testing.assert_allclose(found[layer], values, rtol=1e-4, atol=1e-5)
    assert found["layer3"].shape == (4, 64, 8, 8)
    assert found["avgpool"].shape == (4, 64)
    assert not net.avgpool._forward_hooks


def test_what_fills_a_batch_is_left_out_and_digits_have_indices(trained, tmp_path, command_here):
    words = ["data=same", "split=test", f"checkpoint={trained}", "device=cpu"]
    command_here("features", *words, "layer=fc", "out=a/f.npz")
    dataset = MemoryDataset(name="digits", root=None, size=32, validation=0)
    with np.load(tmp_path / "a" / "f.npz") as found:
        assert found["features"].shape == (360, 10)
        assert found["images"].tolist() == list(range(360))
        assert found["labels"].tolist() == dataset.parts["test"].labels.tolist()


def test_more_than_the_memory_holds_is_refused_before_it_is_computed(trained):
    model = load(trained)
    batches = iter([(model.transform(Image.new("RGB", (8, 8)))[None], None)])
    with pytest.raises(UserError, match=r"layer=conv1: 1,000,000,000,000 images of \[16, 32, 32\] are 65536000 GB"):
        gather(model, "conv1", batches, 10**12)


def test_a_wrong_command_line_is_one_line_and_leaves_nothing(pictures, net, trained, tmp_path, command_here):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "old.npz").write_text("features")
    good, before = pictures / "val/class-0/00.png", sorted(os.listdir(tmp_path))
    layers = "allowed are conv1, bn1, maxpool, layer1, layer2, layer3, layer4, avgpool, fc, and what is in the stages"
    here = [f"checkpoint={net}", "device=cpu"]
    for words, told in [
        ([good, *here, "out=x.npz", "layer=layr3"], layers + ", from layer1.0 to layer4.1.bn2; did you mean layer3?"),
        ([good, *here, "out=x.npz", "layer=layer9"], layers),
        ([good, *here, "out=x.npz", "layer=''"], "layer="),
        ([good, "text.jpg", *here, "out=x.npz"], "text.jpg: is not an image that can be read"),
        (["text.jpg", good, "old.npz", *here, "out=x.npz"], "; and 1 more cannot be used: old.npz"),
        (["nosuch.jpg", *here, "out=x.npz"], "nosuch.jpg: there is no such file"),
        ([pictures, *here, "out=x.npz"], "tree: is a folder; name the images in it"),
        ([*here, "out=x.npz"], "name the images, as in resnet-features"),
        ([good, *here], "out: is needed; add out=…"),
        ([good, *here, "out=x.csv"], "out=x.csv: must end in .safetensors or .npz"),
        ([good, *here, "out=old.npz"], "out=old.npz: exists and is no earlier result of this command; use another"),
        ([good, *here, "out=x.npz", "data=same"], "error: data: is not used with images"),
        ([good, *here, "out=x.npz", "split=train"], "split: is not used with images"),
        ([*here, "out=x.npz", "data=imagent"], "did you mean imagenet?"),
        ([*here, "out=x.npz", "data=imagenet"], "data.root"),
        (["data=same", f"checkpoint={trained}", "split=val", "out=x.npz"], "no part of the training set was held out"),
        ([good, "checkpoint=text.jpg", "out=x.npz"], "checkpoint=text.jpg: is cut short or not a checkpoint"),
        ([good, *here, "out=x.npz", "-m"], "use it without -m"),
    ]:
        assert told in command_here("features", *words, code=2), words
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "old.npz").read_text() == "features"
