"""The five most likely classes of pictures, which the net sees as evaluation shows them to it."""

import json
import math
import os

import pytest
import torch
from PIL import Image

from resnet_train.classification.predict import view
from resnet_train.config.compose import compose
from resnet_train.config.train import check_train
from resnet_train.data.augment import normalise
from resnet_train.data.decode import read_image
from resnet_train.data.imagenet_classes import imagenet_classes
from resnet_train.data.memory import MemoryDataset
from resnet_train.data.streaming import StreamingDataset
from resnet_train.engine import checkpoint
from resnet_train.engine.compute import compute_logits
from resnet_train.models import cifar_resnet, imagenet_resnet
from resnet_train.terminal import format_share

SIZES = [(50, 70), (97, 40), (33, 33), (300, 201)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A tree of two classes with pictures of several sizes."""
    root, draw = tmp_path_factory.mktemp("pictures") / "tree", torch.Generator().manual_seed(0)
    for part in ("train", "val"):
        for number, (width, height) in enumerate(SIZES):
            folder = root / part / ("cat", "dog")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=torch.uint8, generator=draw)
            Image.fromarray(pixels.numpy()).resize((width, height)).save(folder / f"{number}.png")
    return root


def configured(family, size):
    values = compose("train", ["data=imagenet", "depth=18"] if family == "imagenet" else ["data=imagefolder"])
    values["data"] |= {"size": size, "family": family}
    return check_train(values, needs_data=False)


def saved(path, net, found, classes):
    """A checkpoint of a net of random weights."""
    mean = torch.full((1, 1, 3), 110.0)
    values = {"config": found.plain(), "iteration": 3, "model": net.state_dict(), "mean": mean, "classes": classes}
    checkpoint.save(
        path, values | {"label": "photos", "digest": "", "measure": {"precision": "fp32", "compile": False}}
    )
    return mean


@pytest.mark.parametrize(("family", "size"), [("imagenet", 64), ("imagenet", 32), ("cifar", 32), ("cifar", 33)])
def test_the_views_are_those_of_the_evaluation(pictures, family, size, tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_TRAIN_DATA", str(tmp_path))
    root, found, mean, cpu = str(pictures), configured(family, size), torch.full((1, 1, 3), 110.0), torch.device("cpu")
    if family == "imagenet":
        sets = StreamingDataset(root=root, size=size, validation=0, workers=0)
    else:
        sets = MemoryDataset(name="imagefolder", root=root, size=size, validation=0)
    wanted, _ = next(sets.eval_batches("test", mean, cpu, len(SIZES)))
    files = sorted(pictures.glob("val/*/*.png"))
    seen = torch.stack([view(read_image(file), found) for file in files])
    assert torch.equal(normalise(seen, mean), wanted)


def test_probabilities_are_the_softmax_in_order_and_named(pictures, tmp_path, command_here):
    net, found, classes = imagenet_resnet(18, num_classes=7), configured("imagenet", 64), list(imagenet_classes())[:7]
    mean = saved(tmp_path / "net.pt", net, found, classes)
    files = sorted(pictures.glob("val/*/*.png"))
    text = command_here("classify", *files, "checkpoint=net.pt", "out=found.json", "device=cpu").splitlines()
    views = torch.stack([view(read_image(file), found) for file in files])
    with torch.no_grad():
        odds = compute_logits(net.eval(), normalise(views, mean), "fp32").softmax(1)
    result = json.loads((tmp_path / "found.json").read_text())
    assert (result["net"], result["iteration"]) == ("resnet-18-B", 3)
    assert [item["image"] for item in result["images"]] == list(map(str, files))
    for item, row in zip(result["images"], odds, strict=True):
        order = row.sort(descending=True).indices[:5].tolist()
        assert [top["class"] for top in item["top"]] == [classes[n] for n in order]
        assert [top["probability"] for top in item["top"]] == pytest.approx([row[n].item() for n in order], abs=1e-6)
        assert item["top"][0]["words"] == imagenet_classes()[classes[order[0]]]
    assert len(text) == 6 * len(files)
    first = result["images"][0]
    shown = f"  {100 * first['top'][0]['probability']:6.2f} %  {first['top'][0]['class']} {first['top'][0]['words']}"
    assert text[:2] == [first["image"], shown]


def test_fewer_than_five_classes_and_names_that_need_no_quotes(pictures, tmp_path, command_here):
    saved(tmp_path / "net.pt", cifar_resnet(20, num_classes=2), configured("cifar", 32), ["cat", "dog"])
    (tmp_path / "a =[b],$c.png").write_bytes((pictures / "val/cat/0.png").read_bytes())
    (tmp_path / "x=y.png").write_bytes((pictures / "val/cat/0.png").read_bytes())
    text = command_here("classify", "a =[b],$c.png", "./x=y.png", "checkpoint=net.pt", "device=cpu").splitlines()
    assert (text[0], text[3], len(text)) == ("a =[b],$c.png", "./x=y.png", 6)
    assert sum(float(line.split()[0]) for line in text[1:3]) == pytest.approx(100, abs=0.02)
    assert os.listdir(tmp_path).count("outputs") == 0


def test_a_net_that_gives_no_numbers_is_one_line(pictures, tmp_path, command_here):
    net = cifar_resnet(20, num_classes=2)
    net.fc.weight.data.fill_(3e38)
    net.fc.bias.data.fill_(3e38)
    saved(tmp_path / "net.pt", net, configured("cifar", 32), ["cat", "dog"])
    picture = str(pictures / "val/cat/0.png")
    told = command_here("classify", picture, "checkpoint=net.pt", "device=cpu", code=2)
    assert f"error: checkpoint=net.pt: gives numbers that are not finite for {picture}" in told
    assert "Traceback" not in told
    assert format_share(math.nan) == "not a number"


def test_names_of_files_and_classes_do_not_command_the_terminal(pictures, tmp_path, command_here):
    """They are printed escaped, and written as they are."""
    classes = ["cat\x1b[2J", "d\u202eog\n"]
    saved(tmp_path / "net.pt", cifar_resnet(20, num_classes=2), configured("cifar", 32), classes)
    name = "\x1b]0;mine\x07\x9b.png"
    (tmp_path / name).write_bytes((pictures / "val/cat/0.png").read_bytes())
    text = command_here("classify", name, "checkpoint=net.pt", "out=found.json", "device=cpu").splitlines()
    assert text[0] == r"\x1b]0;mine\x07\x9b.png"
    assert sorted(line.split()[-1] for line in text[1:]) == [r"cat\x1b[2J", r"d\u202eog\n"]
    (found,) = json.loads((tmp_path / "found.json").read_text())["images"]
    assert found["image"] == name
    assert sorted(row["class"] for row in found["top"]) == classes


def test_a_wrong_command_line_is_one_line_and_leaves_nothing(pictures, tmp_path, command_here):
    saved(tmp_path / "net.pt", cifar_resnet(20, num_classes=2), configured("cifar", 32), ["cat", "dog"])
    for name in ("text", "b", "c"):
        (tmp_path / f"{name}.jpg").write_text("no image")
    good, before = pictures / "val/cat/0.png", sorted(os.listdir(tmp_path))
    for words, told in [
        (["text.jpg", "checkpoint=net.pt"], "text.jpg: is not an image that can be read"),
        (
            [good, "text.jpg", "b.jpg", good, "c.jpg", "checkpoint=net.pt", "out=x.json"],
            "error: text.jpg: is not an image that can be read (none of JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM);"
            " and 2 more cannot be used: b.jpg, c.jpg\n",
        ),
        (["nosuch.jpg", "checkpoint=net.pt"], "nosuch.jpg: there is no such file"),
        ([pictures, "checkpoint=net.pt"], "tree: is a folder; name the images in it"),
        (["checkpoint=net.pt"], "name the images, as in resnet-classify"),
        ([good], "checkpoint: is needed; add checkpoint=…"),
        ([good, "checkpoint=text.jpg"], "checkpoint=text.jpg: is cut short or not a checkpoint"),
        ([good, "chekpoint=net.pt"], "did you mean checkpoint?"),
        ([good, "checkpoint=net.pt", "-m"], "use it without -m"),
        ([good, "checkpoint=net.pt", "--nosuch"], "--help shows what there is"),
    ]:
        assert told in command_here("classify", *words, code=2), words
    assert sorted(os.listdir(tmp_path)) == before


def test_the_classes_of_imagenet_are_a_thousand_in_order():
    classes = imagenet_classes()
    assert len(classes) == 1000
    assert list(classes) == sorted(classes)
    assert (classes["n01440764"], classes["n15075141"]) == ("tench", "toilet tissue")


def test_real_photographs_are_named_as_their_files_are(real_data):
    """The words beside WordNet's numbers, against 200 file names of ImageNet's own."""
    files = sorted(real_data("imagenet_sample").glob("*.JPEG"))
    assert len(files) == 200
    for file in files:
        number, _, words = file.stem.partition("_")
        assert imagenet_classes()[number].lower() == words.replace("_", " ").lower()
