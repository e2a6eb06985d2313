"""`resnet-detect test` and the improvements of appendix B, each beside a reference that is written out here."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from test_detection import configured, tree  # noqa: F401  (a fixture)

from resnet_train.detection.ensemble import Ensemble
from resnet_train.detection.model import DetectorSettings, resnet_detector, vgg_detector
from resnet_train.detection.run import build, read_examples
from resnet_train.engine import checkpoint
from resnet_train.engine.compute import autocast
from resnet_train.models import imagenet_resnet

pytest.importorskip("faster_coco_eval")
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")
FRAME = DetectorSettings([16, 32], 20, 8, 64, 96, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
LEVELS = DetectorSettings([16, 32, 64, 128, 256], 20, 8, 64, 96, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])


def detector(kind="resnet", seed=0, **options):
    """One with scores that are far apart: at random all classes are as likely."""
    torch.manual_seed(seed)
    if kind == "vgg16":
        found = vgg_detector(3, FRAME)
    else:
        net = imagenet_resnet(18, init="fan_out")
        found = resnet_detector(net, 3, LEVELS if kind == "pyramid" else FRAME, pyramid=kind == "pyramid", **options)
    for layer in (found.roi_heads.box_predictor.cls_score, found.roi_heads.box_predictor.bbox_pred):
        torch.nn.init.normal_(layer.weight, std=0.2 if kind == "resnet" else 2)
    return found.eval()


@pytest.fixture(scope="module")
def image():
    torch.manual_seed(7)
    return torch.rand(3, 72, 100)


@pytest.fixture(scope="module")
def save(tree, tmp_path_factory):  # noqa: F811
    """The checkpoint of a detector that has not been trained, with scores that are far apart."""

    def make(name, *words):
        config = configured(tree, *words)
        task = build(config, read_examples(config), CPU)
        with torch.no_grad():
            task.model.roi_heads.box_predictor.cls_score.weight.normal_(std=0.3)
        path = tmp_path_factory.mktemp("saved") / f"{name}.pt"
        checkpoint.save(path, task.state())
        return path

    return make


@pytest.fixture(scope="module")
def saved(save):
    return save("one")


@pytest.fixture
def test(command_here, saved):
    """`resnet-detect test` of a checkpoint, here: the JSON that it writes to out=, or the line of its error."""

    def run(*words, code=0):
        last = [] if any(str(word).startswith("checkpoint=") for word in words) else [f"checkpoint={saved}"]
        told = command_here("detect", "test", *last, "device=cpu", "out=found.json", *words, code=code)
        return told if code else json.loads(Path("found.json").read_text())

    return run


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("kind", ["resnet", "pyramid", "vgg16"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_ensemble_of_one_is_that_one_bit_for_bit(kind, precision, image):
    model = detector(kind)
    with torch.no_grad():
        with autocast(image.device, precision):
            (wanted,) = model([image])
        (found,) = Ensemble([model], [precision])([image])
    assert len(wanted["boxes"]) > 2
    assert same(found, wanted)


def test_another_tree_is_tested_and_named(tree, test, tmp_path):  # noqa: F811
    """Here of two test images, in a list of another name, and without the training list."""
    copy = tmp_path / "other"
    shutil.copytree(tree, copy)
    (copy / "ImageSets/Main/train.txt").unlink()
    names = (copy / "ImageSets/Main/test.txt").read_text().split()[:2]
    (copy / "ImageSets/Main/test.txt").rename(copy / "ImageSets/Main/few.txt").write_text("\n".join(names))
    assert "data.test=test: " in test(f"data.root={copy}", code=2)
    found = test(f"data.root={copy}", "data.test=few")
    assert (found["data"], found["list"], found["images"]) == ("other", "few", 2)


def test_a_class_that_the_checkpoint_does_not_have_is_told_or_left_out(tree, test, tmp_path):  # noqa: F811
    copy = tmp_path / "other"
    shutil.copytree(tree, copy)
    name = (copy / "ImageSets/Main/test.txt").read_text().split()[0]
    path = copy / f"Annotations/{name}.xml"
    text = path.read_text()
    kind = text.partition("<name>")[2].partition("</name>")[0]
    path.write_text(text.replace(f"<name>{kind}<", "<name>zebra<", 1))
    told = test(f"data.root={copy}", code=2)
    assert "'zebra'): is of an unknown class; known are disc, square, star" in told
    assert test(f"data.root={copy}", "data.broken=skip")["faults"] == {"boxes left out: unknown class": 1}
