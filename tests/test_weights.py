"""Weights from and for other programs: the logits are the same on either side."""

import functools
import json
import os
import pickle
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from resnet_train.classification.predict import view
from resnet_train.config.compose import compose
from resnet_train.config.train import check_train
from resnet_train.data.augment import IMAGENET_MEAN, IMAGENET_STD
from resnet_train.data.decode import read_image
from resnet_train.engine import checkpoint
from resnet_train.errors import UserError
from resnet_train.models import cifar_resnet, imagenet_resnet
from resnet_train.weights import state_dicts
from resnet_train.weights.source import load, read_source

MEAN, STD = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (state_dicts.MEAN, IMAGENET_STD))


def lived(net):
    """A net in float64 whose batch norms are not the identity, as after training; in evaluation mode."""
    torch.manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net.double().eval()


def logits(net, images):
    with torch.no_grad():
        return net(images)


def close(found, wanted):
    """Equal up to the rounding of float64."""
    assert wanted.std() > 0.01
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10 * wanted.abs().max().item())


def pictures(size, count=2):
    return torch.rand(count, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


# --- torchvision and timm ------------------------------------------------------------------------------------------


def timm_net(name):
    import timm

    return timm.create_model(name, pretrained=False)


OTHERS = {
    "torchvision resnet18": (lambda: torchvision.models.resnet18(weights=None), 18),
    "torchvision resnet50": (lambda: torchvision.models.resnet50(weights=None), 50),
    "timm resnet34": (lambda: timm_net("resnet34"), 34),
    "timm resnet50": (lambda: timm_net("resnet50"), 50),
}


@pytest.mark.parametrize("name", OTHERS)
def test_logits_are_those_of_the_other_program_both_ways(name):
    make, depth = OTHERS[name]
    theirs, images = lived(make()), pictures(64)
    wanted = logits(theirs, (images - MEAN) / STD)
    state, shape = state_dicts.to_our_names(theirs.state_dict(), "auto", name)
    assert shape == state_dicts.Shape("imagenet", depth, "B", 1000)
    ours = imagenet_resnet(depth, "B", bottleneck_stride="3x3").double().eval()
    ours.load_state_dict(state_dicts.rescaled(state, IMAGENET_STD, state_dicts.UNDIVIDED))
    close(logits(ours, images - MEAN), wanted)

    lived(ours)
    with torch.no_grad():
        ours.conv1.weight.mul_(0.7)
    fresh = make().double().eval()
    fresh.load_state_dict(state_dicts.rescaled(ours.state_dict(), state_dicts.UNDIVIDED, IMAGENET_STD))
    close(logits(fresh, (images - MEAN) / STD), logits(ours, images - MEAN))


@pytest.mark.parametrize("depth", [101, 152])
def test_the_deepest_are_recognised(depth):
    with torch.device("meta"):
        state = getattr(torchvision.models, f"resnet{depth}")(weights=None).state_dict()
    assert state_dicts.shape_of(state, "x") == state_dicts.Shape("imagenet", depth, "B", 1000)


@pytest.mark.parametrize(("shortcut", "seen"), [("A", "A"), ("B", "B"), ("C", "C"), ("none", "A")])
def test_our_own_are_recognised(shortcut, seen):
    with torch.device("meta"):
        nets = {
            ("cifar", 20): cifar_resnet(20, shortcut, num_classes=7),
            ("imagenet", 34): imagenet_resnet(34, shortcut),
        }
        nets["imagenet", 50] = imagenet_resnet(50, shortcut, bottleneck_stride="1x1")
    for (family, depth), net in nets.items():
        found = state_dicts.shape_of(net.state_dict(), "x")
        assert found == state_dicts.Shape(family, depth, seen, len(net.fc.weight))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: timm_net("resnet50d"), "it has conv1.0.weight"),
        (lambda: torchvision.models.wide_resnet50_2(weights=None), "looks like the ImageNet resnet-50-B"),
        (lambda: torchvision.models.resnext50_32x4d(weights=None), "layer1.0.conv1.weight (128x64x1x1 for 64x64x1x1)"),
        (lambda: torchvision.models.vgg11(weights=None), "features.0.weight"),
        (lambda: timm_net("seresnet50"), "it has layer1.0.se.fc1.weight"),
    ],
)
def test_other_nets_are_named(make, told):
    with torch.device("meta"):
        state = make().state_dict()
    with pytest.raises(UserError, match=r"^file: ") as refused:
        state_dicts.to_our_names(state, "auto", "file")
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400


def test_what_is_missing_is_named():
    state = cifar_resnet(8).state_dict()
    del state["layer3.0.bn2.running_var"]
    with pytest.raises(UserError, match=r"CIFAR resnet-8-A, but is not: it lacks layer3\.0\.bn2\.running_var$"):
        state_dicts.to_our_names(state, "auto", "file")


def test_old_files_without_counters_and_half_precision_are_taken():
    state = {k: v.bfloat16() for k, v in cifar_resnet(8).state_dict().items() if not k.endswith("num_batches_tracked")}
    found, _ = state_dicts.to_our_names(state, "auto", "file")
    cifar_resnet(8).load_state_dict(found)
    assert {value.dtype for value in found.values()} == {torch.float32, torch.int64}


# --- pytorch_resnet_cifar10 ----------------------------------------------------------------------------------------


class TheirBlock(nn.Module):
    """The block of pytorch_resnet_cifar10, written out: option A pads planes // 4 channels on each side."""

    def __init__(self, in_planes, planes, stride, option):
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut, self.planes = nn.Sequential(), planes
        self.pads = (stride != 1 or in_planes != planes) and option == "A"
        if (stride != 1 or in_planes != planes) and option == "B":
            projection = nn.Conv2d(in_planes, planes, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(planes))

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pads:
            short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.planes // 4, self.planes // 4), "constant", 0)
        else:
            short = self.shortcut(x)
        return F.relu(out + short)


class TheirNet(nn.Module):
    """The net of pytorch_resnet_cifar10, written out."""

    def __init__(self, n, option="A"):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        planes = 16
        for stage, channels in enumerate((16, 32, 64), 1):
            blocks = []
            for index in range(n):
                blocks.append(TheirBlock(planes, channels, 2 if stage > 1 and index == 0 else 1, option))
                planes = channels
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(F.avg_pool2d(x, x.shape[3]).flatten(1))


@pytest.mark.parametrize(("n", "option"), [(1, "A"), (3, "A"), (2, "B")])
def test_option_a_padded_on_both_sides_gives_the_same_logits(n, option):
    theirs, images = lived(TheirNet(n, option)), pictures(32, 5)
    wanted = logits(theirs, (images - MEAN) / STD)
    state = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    state, shape = state_dicts.to_our_names(state_dicts.tensors({"state_dict": state}, Path("x")), "auto", "x")
    assert shape == state_dicts.Shape("cifar", 6 * n + 2, option, 10)
    ours = cifar_resnet(6 * n + 2, option).double().eval()
    ours.load_state_dict(state_dicts.rescaled(state, IMAGENET_STD, state_dicts.UNDIVIDED))
    close(logits(ours, images - MEAN), wanted)


def test_without_the_other_order_of_channels_the_logits_would_differ():
    """The test above can fail: names alone do not make the net."""
    theirs, images = lived(TheirNet(1)), pictures(32)
    state = {name.replace("linear", "fc"): value for name, value in theirs.state_dict().items()}
    ours = cifar_resnet(8).double().eval()
    ours.load_state_dict(state)
    assert (logits(ours, images) - logits(theirs, images)).abs().max() > 0.1


# --- The command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(command_here):
    """`resnet-weights` as it is typed, in an empty folder: its output, or the one line of its error."""
    return functools.partial(command_here, "weights")


@pytest.mark.parametrize("std", [None, "[0.5,0.25,0.4]"])
def test_a_net_of_torchvisions_goes_through_the_command_and_back(weights, tmp_path, std):
    """With ImageNet's std the weights keep their bits; another goes into conv1, and comes out up to rounding."""
    theirs = lived(torchvision.models.resnet18(weights=None, num_classes=12)).float()
    torch.save(theirs.state_dict(), tmp_path / "odd =$name.pth")
    words = [] if std is None else [f"std={std}"]
    text = weights("import", "odd =$name.pth", "out=new/net.pt", "data.size=64", *words)
    assert "ImageNet resnet-18-B, 12 classes" in text
    assert ("in conv1 now" in text) == (std is not None)
    state = checkpoint.load(tmp_path / "new/net.pt")
    assert (state["config"]["data"]["size"], state["measure"]["precision"]) == (64, "fp32")
    assert state["config"]["normalise"] == ("standard" if std is None else "channels")
    images = pictures(64).float()
    ours = imagenet_resnet(18, num_classes=12).eval()
    ours.load_state_dict(state["model"])
    divisor = STD.float() if std is None else torch.tensor(json.loads(std)).view(1, 3, 1, 1)
    wanted = logits(theirs, (images - MEAN.float()) / divisor)
    found = logits(ours, (images - state["mean"].permute(2, 0, 1) / 255) / (divisor if std is None else 1))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())

    weights("export", "new/net.pt", "out=back.pth", *words)
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert list(back) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(back[name], value, rtol=0 if std is None else 1e-6, atol=0)
    described = json.loads((tmp_path / "back.pth.json").read_text())
    assert described["std"] == list(IMAGENET_STD if std is None else json.loads(std))
    assert described["mean"] == pytest.approx(state_dicts.MEAN, abs=1e-6)
    assert sorted(os.listdir(tmp_path)) == ["back.pth", "back.pth.json", "new", "odd =$name.pth"]


def test_classes_of_a_test_part_alone(weights, tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / f"photos/val/{name}").mkdir(parents=True)
        (tmp_path / f"photos/val/{name}/0.jpg").touch()
    torch.save(imagenet_resnet(18, num_classes=2).state_dict(), tmp_path / "net.pth")
    assert "2 classes (cat, dog" in weights("import", "net.pth", "out=net.pt", "data.root=photos")


def test_a_small_net_of_another_size_comes_back_by_itself(weights, tmp_path):
    words = ["data=digits", "data.size=16", "depth=8"]
    found = check_train(compose("train", words), needs_data=False)
    kept = {"config": found.plain(), "iteration": 6, "model": cifar_resnet(8).state_dict(), "label": "digits"}
    kept |= {"mean": torch.rand(16, 16, 3) * 255, "classes": [*"0123456789"], "digest": "0"}
    measure = {"precision": "fp32", "compile": False, "bn_images": 32}
    checkpoint.save(tmp_path / "net.pt", kept | {"measure": measure})
    weights("export", "net.pt", "out=out.pth")
    (tmp_path / "names.txt").write_text("\ufeff" + "\n".join("abcdefghij"), "utf-8")  # as Windows writes it
    assert "; 16 px, fp32; " in weights("import", "out.pth", "out=back.pt", "classes=names.txt")
    assert checkpoint.load(tmp_path / "back.pt")["classes"] == [*"abcdefghij"]


@pytest.mark.parametrize("out", ["out.pth", "out.safetensors"])
def test_what_comes_back_is_evaluated_as_it_was(weights, tmp_path, out):
    """At its size and in its precision; a result names its seed and iteration."""
    words = ["data=imagenet", "depth=18", "data.size=64", "seed=3", "iterations=700", "normalise=image"]
    found = check_train(compose("train", words), needs_data=False)
    net, measure = imagenet_resnet(18, num_classes=5), {"precision": "bf16", "compile": False, "bn_images": 32}
    kept = {"config": found.plain(), "iteration": 600, "model": net.state_dict(), "mean": torch.rand(64, 64, 3) * 255}
    kept |= {"classes": list("abcde"), "label": "photos", "digest": "0", "measure": measure}
    checkpoint.save(tmp_path / "net.pt", kept)
    weights("export", "net.pt", f"out={out}")
    assert "; 64 px, bf16; " in weights("import", out, "out=back.pt")
    back = checkpoint.load(tmp_path / "back.pt")
    config = back["config"]
    assert (config["data"]["size"], config["seed"], config["iterations"], back["iteration"]) == (64, 3, 700, 600)
    assert back["measure"]["precision"] == "bf16"
    assert "data.size=32: the mean image of" in weights("import", out, "out=b.pt", "data.size=32", code=2)
    assert "; 64 px, fp32; " in weights("import", out, "out=again.pt", "precision=fp32", "data.size=64")


@pytest.mark.parametrize(("normalise", "divided"), [("image", False), ("channels", False), ("standard", True)])
def test_what_a_recipe_does_to_pixels_goes_with_the_export(weights, tmp_path, normalise, divided):
    """The exported net and its description give the logits that evaluation gives, whichever recipe trained it."""
    values = compose("train", ["data=imagenet", "depth=18", f"normalise={normalise}", "data.size=64"])
    found = check_train(values, needs_data=False)
    net = lived(imagenet_resnet(18, num_classes=5)).float()
    mean = torch.rand(64, 64, 3) * 255 if normalise == "image" else torch.tensor(IMAGENET_MEAN).view(1, 1, 3)
    kept = {"config": found.plain(), "iteration": 1, "model": net.state_dict(), "mean": mean, "classes": list("abcde")}
    measure = {"precision": "fp32", "compile": False, "bn_images": 32}
    checkpoint.save(tmp_path / "net.pt", kept | {"label": "photos", "digest": "0", "measure": measure})
    images = pictures(64).float()
    pixels = images - mean.permute(2, 0, 1) / 255
    wanted = logits(net, pixels / STD.float() if divided else pixels)

    told = weights("export", "net.pt", "out=out.safetensors")
    assert ("note: torchvision subtracts" in told) == (normalise == "image")
    described = json.loads((tmp_path / "out.safetensors.json").read_text())
    theirs = imagenet_resnet(18, num_classes=5).eval()
    theirs.load_state_dict(state_dicts.read(tmp_path / "out.safetensors"))
    mean, std = torch.tensor(described["mean"]), torch.tensor(described["std"])
    mean = mean.permute(2, 0, 1) if mean.ndim == 3 else mean.view(3, 1, 1)
    close_to = {"rtol": 0, "atol": 1e-5 * wanted.abs().max().item()}
    torch.testing.assert_close(logits(theirs, (images - mean) / std.view(3, 1, 1)), wanted, **close_to)
    if divided:  # inside of the ONNX file
        weights("export", "net.pt", "out=out.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
        onnx_logits = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        torch.testing.assert_close(onnx_logits, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


def test_safetensors_out_and_in_is_the_same_net(weights, command_here, trained, tmp_path):
    weights("export", trained, "out=net.safetensors")
    described = json.loads((tmp_path / "net.safetensors.json").read_text())
    assert (described["net"], described["std"], len(described["mean"])) == ("resnet-8-A", [1, 1, 1], 32)
    weights("import", "net.safetensors", "out=net.pt", "data=digits")
    before, after = checkpoint.load(trained), checkpoint.load(tmp_path / "net.pt")
    assert before["classes"] == after["classes"] == [str(digit) for digit in range(10)]
    for one, other in ((before["model"], after["model"]), ({"mean": before["mean"]}, {"mean": after["mean"]})):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    results = []
    for name in (trained, tmp_path / "net.pt"):
        command_here("evaluate", f"checkpoint={name}", "out=found.json", "device=cpu")
        results.append(json.loads((tmp_path / "found.json").read_text()))
    assert results[0]["seen"] == 360
    assert all(results[0][key] == results[1][key] for key in ("wrong", "seen", "loss", "protocol", "data"))


def test_onnx_takes_any_number_of_images_in_0_to_1(weights, trained, tmp_path):
    path = trained
    weights("export", path, "out=net.onnx")
    assert sorted(os.listdir(tmp_path)) == ["net.onnx", "net.onnx.json"]
    state = checkpoint.load(path)
    net = cifar_resnet(8).eval()
    net.load_state_dict(state["model"])
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 7):
        images = pictures(32, count).float()
        wanted = logits(net, images - state["mean"].permute(2, 0, 1) / 255)
        found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_akamasters_file_through_the_command(weights, tmp_path):
    theirs = lived(TheirNet(1)).float()
    state = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    torch.save({"state_dict": state, "best_prec1": 91.5}, tmp_path / "net.th", _use_new_zipfile_serialization=False)
    assert "CIFAR resnet-8-A, 10 classes (airplane," in weights("import", "net.th", "out=net.pt")
    found = checkpoint.load(tmp_path / "net.pt")
    images = pictures(32).float()
    net = cifar_resnet(8).eval()
    net.load_state_dict(found["model"])
    wanted = logits(theirs, (images - MEAN.float()) / STD.float())
    torch.testing.assert_close(logits(net, images - MEAN.float()), wanted, rtol=0, atol=1e-4)


class Hostile:
    """Unpickled, it would leave a file."""

    def __reduce__(self):
        return os.system, ("touch harmed",)


def test_wrong_words_and_files_are_one_line_and_leave_nothing(weights, tmp_path, trained):
    last = str(trained)
    torch.save({"conv1.weight": Hostile()}, tmp_path / "hostile.pth")
    (tmp_path / "hostile.th").write_bytes(pickle.dumps(Hostile()))
    (tmp_path / "cut.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    (tmp_path / "two.txt").write_text("cat\ndog\n")
    torch.save(cifar_resnet(8).state_dict(), tmp_path / "net.pth")
    before = sorted(os.listdir(tmp_path))
    for words, told in [
        (["import", "hostile.pth", "out=x.pt"], "hostile.pth: is refused"),
        (["import", "hostile.th", "out=x.pt"], "hostile.th: is cut short or not a checkpoint"),
        (["import", "cut.safetensors", "out=x.pt"], "cut.safetensors: is cut short or no safetensors file"),
        (["import", last, "out=x.pt"], "is a checkpoint of resnet-train already"),
        (
            ["import", "net.pth", "out=x.pt", "classes=two.txt"],
            "classes=two.txt: names 2 classes, the net in net.pth has 10",
        ),
        (["import", "net.pth", "out=x.pt", "mean=[0.5]"], "mean=[0.5]: must be three numbers"),
        (["import", "net.pth", "out=x.pt", "std=[0,1,1]"], "std=0: must be above 0"),
        (["import", "net.pth", "out=x.pt", "arch=pain"], "arch=pain: allowed are resnet, plain; did you mean plain?"),
        (["import", "net.pth", "out=x.pt", "format=onnx"], "format=onnx: resnet-weights import has auto"),
        (["import", "nosuch.pth", "out=x.pt"], "file=nosuch.pth: there is no such file"),
        (["import", "net.pth"], "out: is needed"),
        (["improt", "net.pth", "out=x.pt"], "did you mean import?"),
        (["export", last, "out=x.jpg"], "out=x.jpg: ends in none of .pth .pt .safetensors .onnx"),
        (["export", last, "out=x.pth", "mean=[0,0,0]"], "mean: is not used by resnet-weights export"),
        (["export", "net.pth", "out=x.pth"], "is not a checkpoint of resnet-train"),
    ]:
        assert told in weights(*words, code=2), words
    assert sorted(os.listdir(tmp_path)) == before


def test_without_the_extras_a_line_says_what_to_install(weights, trained, tmp_path, monkeypatch):
    (tmp_path / "x.safetensors").write_bytes(b"")
    for modules, words, extra in [
        (["safetensors", "safetensors.torch"], ["import", "x.safetensors", "out=x.pt"], "safetensors"),
        (["safetensors", "safetensors.torch"], ["export", trained, "out=y.safetensors"], "safetensors"),
        (["onnxruntime"], ["export", trained, "out=y.onnx"], "onnx"),
    ]:
        with monkeypatch.context() as patch:
            for module in modules:
                patch.setitem(sys.modules, module, None)
            assert f"pip install 'resnet-train[{extra}]'" in weights(*words, code=2)
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_description_that_is_not_one_is_named(tmp_path):
    torch.save(cifar_resnet(8).state_dict(), tmp_path / "net.pth")
    (tmp_path / "net.pth.json").write_text('{"written_by": "resnet-train 0", "mean": "grey"}')
    with pytest.raises(UserError, match=r"net\.pth\.json: is not what resnet-weights export wrote"):
        read_source(tmp_path / "net.pth")
    told = {"written_by": "resnet-train 0", "arch": "resnet", "bottleneck_stride": "3x3", "size": 32, "classes": ["a"]}
    for key, value in {
        "mean": [float("nan"), 0, 0],
        "std": [1, float("inf"), 1],
        "size": 31,
        "classes": [1],
        "arch": "vgg",
    }.items():
        wrong = told | {"mean": [[[0.5, 0.5, 0.5]] * 32] * 32, "std": [1, 1, 1]} | {key: value}
        (tmp_path / "net.pth.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=r"net\.pth\.json: is not what"):
            read_source(tmp_path / "net.pth")
    (tmp_path / "net.pth.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"net\.pth\.json: is not what"):
        read_source(tmp_path / "net.pth")
    for others in ('{"written_by": "somebody"}', '{"hello": 1}', "[1]"):
        (tmp_path / "net.pth.json").write_text(others)
        assert read_source(tmp_path / "net.pth").std == IMAGENET_STD


def test_an_export_that_fails_leaves_the_pair_of_files_that_was_there(weights, tmp_path, trained, monkeypatch):
    weights("export", trained, "out=net.pth")
    before = {name: (tmp_path / name).read_bytes() for name in ("net.pth", "net.pth.json")}
    torch.save(cifar_resnet(8).state_dict(), tmp_path / "other.pth")
    weights("import", "other.pth", "out=other.pt", "mean=[0.1,0.2,0.3]", "std=[1,1,1]")
    (tmp_path / f"net.pth.{os.getpid()}.part").mkdir()  # where the weights are to be written
    assert "out=net.pth: cannot be written" in weights("export", "other.pt", "out=net.pth", code=2)
    assert before == {name: (tmp_path / name).read_bytes() for name in before}


@pytest.mark.parametrize(("classes", "told"), [(0, "has no rows"), (1, "has one row; a net has at least two classes")])
def test_a_net_of_less_than_two_classes_is_refused(classes, told, weights, tmp_path):
    """That of one by the import alone: a run that begins with its weights has a classifier of its own."""
    state = cifar_resnet(8).state_dict()
    state |= {"fc.weight": torch.zeros(classes, 64), "fc.bias": torch.zeros(classes)}
    torch.save(state, tmp_path / "net.pth")
    assert f"net.pth: its fc.weight {told}" in weights("import", "net.pth", "out=x.pt", code=2)
    if classes:
        assert read_source(tmp_path / "net.pth").count == classes


# --- What a file declares, and what it says ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("layer1.0.conv1.weight", torch.ones(16, 16, 3, 3, dtype=torch.int8), "is int8; allowed are float64, float32"),
        ("layer2.0.bn1.weight", torch.full((32,), float("nan")), "has values that are not finite"),
        ("fc.bias", torch.full((10,), float("-inf")), "has values that are not finite"),
        ("bn1.running_var", torch.full((16,), -1.0), "has values below 0, as no variance is"),
        ("bn1.num_batches_tracked", torch.tensor(float("nan")), "has values that are not finite"),
    ],
)
def test_weights_that_no_logits_come_from_are_named(name, value, told):
    state = cifar_resnet(8).state_dict() | {name: value}
    with pytest.raises(UserError, match=f"^file: {name} {told}"):
        state_dicts.to_our_names(state, "auto", "file")


def test_a_classifier_of_a_million_rows_in_a_small_file_is_refused(tmp_path):
    state, shared = cifar_resnet(8).state_dict(), torch.zeros(64 * 1000)
    rows = shared.view(1000, 64)
    torch.save(state | {"fc.weight": torch.zeros(64).expand(1_000_000, 64)}, tmp_path / "expanded.pth")
    torch.save(state | {"fc.weight": rows, "layer1.9.conv1.weight": rows, "x": rows}, tmp_path / "shared.pth")
    for name, told in (("expanded", "fc.weight declares 1000000x64 values"), ("shared", "declares weights of ")):
        with pytest.raises(UserError, match=rf"{name}\.pth: {told}"):
            read_source(tmp_path / f"{name}.pth")


@pytest.mark.parametrize("key", ["config", "classes", "mean", "nan"])
def test_a_checkpoint_that_declares_another_net_than_it_holds_is_one_line(
    key, weights, command_here, trained, tmp_path
):
    state = checkpoint.load(trained)
    changed = {
        "config": state["config"] | {"depth": 99_998},
        "classes": [str(number) for number in range(100_000)],
        "mean": torch.zeros(1_000_000),
        "nan": state["mean"] * float("nan"),
    }
    torch.save(state | {key.replace("nan", "mean"): changed[key]}, tmp_path / "x.pt")
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    told = {
        "config": "depth=99998: CIFAR nets have 6n+2 layers, 1202 at most",
        "classes": "fc.weight is 10x64, not 100000x64",
        "nan": "a mean of",
    }
    for words in (["classify", "x.png", "checkpoint=x.pt", "device=cpu"], ["weights", "export", "x.pt", "out=y.pth"]):
        assert told.get(key, "a mean of 1000000 float32") in command_here(*words, code=2), words
    with pytest.raises(UserError, match=r"does not match this network|CIFAR nets have 6n"):
        read_source(tmp_path / "x.pt")


def test_the_other_nets_of_timm_that_look_like_torchvisions_are_the_anti_aliased_ones():
    """What `check_architecture` is for: nothing in names and shapes tells them apart."""
    with torch.device("meta"):
        for name, depth in (("resnetblur18", 18), ("resnetblur50", 50), ("resnetaa50", 50)):
            state = timm_net(name).state_dict()
            assert state_dicts.shape_of(state, name) == state_dicts.Shape("imagenet", depth, "B", 1000)


@pytest.mark.parametrize(
    ("named", "inside", "beside", "told"),
    [
        ("resnetblur50-84f4748f.pth", {}, None, "its name"),
        ("resnet50_caffe.pth", {}, None, "its name"),
        ("x.pth", {"arch": "resnetblur50"}, None, "arch=resnetblur50"),
        ("x.pth", {"arch": "ResNetAA50"}, None, "arch=ResNetAA50"),
        ("resnet50.pth", {"architecture": "dilated_resnet50"}, None, "architecture=dilated_resnet50"),
        ("model.pth", {}, {"architecture": "resnetblur50", "num_classes": 1000}, "architecture=resnetblur50"),
        ("model.safetensors", {"architecture": "resnetaa50"}, None, "architecture=resnetaa50"),
        ("resnet50-11ad3fa6.pth", {}, None, True),
        ("tv_resnet50.bin", {}, None, True),
        ("x.pth", {"arch": "resnet50"}, None, True),
        ("model.pth", {}, {"architecture": "timm/resnet50.a1_in1k"}, True),
        ("model.pth", {"arch": "gluon_resnet50_v1b"}, [1], True),
        ("net.pth", {}, None, False),
        ("net.pth", {"arch": {"of": "other"}}, {"architectures": ["ResNetForImageClassification"]}, False),
    ],
)
def test_what_a_file_says_of_its_net_counts(named, inside, beside, told, tmp_path):
    path, state = tmp_path / named, {"conv1.weight": torch.zeros(1)}
    if beside is not None:
        (tmp_path / "config.json").write_text(json.dumps(beside))
    if path.suffix == ".safetensors":
        save_file(state, path, metadata=inside)
        inside = {}
    found = {**inside, "state_dict": state}
    if isinstance(told, bool):
        assert state_dicts.check_architecture(found, path) == told
        return
    with pytest.raises(UserError, match=rf"is another net by {told}, though .* format=torchvision$"):
        state_dicts.check_architecture(found, path)


def test_an_import_tells_what_it_assumes(weights, tmp_path):
    state, blur = imagenet_resnet(18, num_classes=2).bfloat16().state_dict(), "resnetblur18.pth"
    torch.save(state, tmp_path / blur)
    assert "is another net by its name" in weights("import", blur, "out=x.pt", code=2)
    text = weights("import", blur, "out=x.pt", "format=torchvision", "std=[1,1,1]")
    assert "assumed, for the file does not say: mean [0.485, 0.456, 0.406]\n" in text
    torch.save(cifar_resnet(8).state_dict(), tmp_path / "net.pth")
    text = weights("import", "net.pth", "out=x.pt", "mean=[0.5,0.5,0.5]")
    told = "torchvision's net, whose names and shapes it has; a residual net; std [0.229, 0.224, 0.225]\n"
    assert f"assumed, for the file does not say: {told}" in text
    assert "a residual net" not in weights("import", "net.pth", "out=x.pt", "arch=plain")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"net": s, "acc": 91.2, "epoch": 3},  # kuangliu's
        lambda s: {"model_state_dict": s, "optimizer_state_dict": {"state": {}}},
        lambda s: {"state_dict_ema": s},
        lambda s: {"model": {f"module._orig_mod.{name}": value for name, value in s.items()}},
        lambda s: {"state_dict": {f"model.{name}": value for name, value in s.items()}, "loops": {"fit": 1}},
        lambda s: {"state_dict": s, "state_dict_ema": {name: value * 2 for name, value in s.items()}},
    ],
)
def test_state_dicts_are_found_where_other_programs_put_them(wrap, tmp_path):
    state = cifar_resnet(8).state_dict()
    torch.save(wrap(state), tmp_path / "resnet8.pth")
    found = read_source(tmp_path / "resnet8.pth")
    assert found.model.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in found.model.items())
    ema = "state_dict_ema" in wrap(state) and "state_dict" in wrap(state)
    assert ("what it has under 'state_dict', not 'state_dict_ema'" in found.assumed) == ema


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"encoder": {"conv1.weight": torch.zeros(1)}, "acc": 91.2}, "it has 'encoder' (1 entries), 'acc' (float)"),
        ({"net": {"conv1.weight": 1.0}, 5: []}, "it has 'net' (1 entries), '5' (0 entries)"),
        ({str(n): n for n in range(9)}, "'5' (int) and 3 more"),
        ([1, 2], "it is a list"),
        ({}, "it is empty"),
    ],
)
def test_what_holds_no_state_dict_is_told(content, told, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(
        UserError, match=r"^.*x\.pth: is no state dict, which holds a tensor for each name; "
    ) as refused:
        read_source(tmp_path / "x.pth")
    assert str(refused.value).endswith(told)


def test_from_another_programs_file_to_our_command_the_logits_hold_ten_digits(weights, command_here, tmp_path):
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    for given in ([mean, std], [list(state_dicts.MEAN), list(IMAGENET_STD)]):
        theirs = lived(torchvision.models.resnet18(weights=None, num_classes=5))
        torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
        words = [
            f"{key}={json.dumps(value)}".replace(" ", "") for key, value in zip(("mean", "std"), given, strict=True)
        ]
        weights("import", "resnet18.pth", "out=net.pt", "data.size=64", "precision=fp64", *words)
        pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
        Image.fromarray(pixels.numpy()).resize((73, 73), 0).save(tmp_path / "x.png")  # whose center crop is 64x64
        command_here("classify", "x.png", "checkpoint=net.pt", "device=cpu", "out=x.json")
        (found,) = json.loads((tmp_path / "x.json").read_text())["images"]
        config = check_train(compose("train", ["data=imagenet", "depth=18", "data.size=64"]), needs_data=False)
        seen = view(read_image(tmp_path / "x.png"), config).permute(2, 0, 1)[None].double() / 255
        of_mean, of_std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in given)
        wanted = logits(theirs, (seen - of_mean) / of_std).softmax(1)[0]
        for row in found["top"]:
            assert row["probability"] == pytest.approx(wanted[int(row["class"])].item(), rel=1e-10)


# --- A .safetensors file in a checkpoint's place ----------------------------------------------------------------------


def test_an_export_is_evaluated_as_its_checkpoint_is(weights, command_here, trained, tmp_path):
    weights("export", trained, "out=w/net.safetensors")
    (tmp_path / "w/net.safetensors.json").unlink()  # the file alone is enough
    kept, found = checkpoint.load(trained), load(tmp_path / "w/net.safetensors")
    for part in ("model", "mean"):
        one, other = ({"": state[part]} if part == "mean" else state[part] for state in (kept, found))
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) and value.dtype == other[name].dtype for name, value in one.items())
    assert all(found[name] == kept[name] for name in ("classes", "digest", "label", "measure", "iteration"))
    Image.new("RGB", (40, 32), (200, 10, 90)).save(tmp_path / "x.png")
    results = []
    for name in (trained, "w/net.safetensors"):
        text = command_here("evaluate", f"checkpoint={name}", "out=found.json", "device=cpu")
        command_here("classify", "x.png", f"checkpoint={name}", "out=top.json", "device=cpu")
        results.append([json.loads((tmp_path / file).read_text()) for file in ("found.json", "top.json")])
        assert "note:" not in text
    for one, other in zip(*results, strict=True):
        assert one.keys() == other.keys()
        assert all(one[key] == other[key] for key in one if key != "checkpoint")
    assert results[0][0]["seen"] == 360
    weights("export", "w/net.safetensors", "out=again.safetensors")
    assert load(tmp_path / "again.safetensors")["config"] == found["config"]


def test_an_export_says_what_it_is_and_names_no_place_of_the_machine(weights, trained, tmp_path):
    state = checkpoint.load(trained)
    values = state["config"] | {"init_from": "/home/me/first.pt"}
    values["data"] = values["data"] | {"name": "imagefolder", "root": "/home/me/photos"}
    checkpoint.save(
        tmp_path / "net.pt",
        {key: v for key, v in state.items() if key != "format"} | {"config": values, "label": "photos"},
    )
    weights("export", "net.pt", "out=net.safetensors")
    with safe_open(tmp_path / "net.safetensors", "pt") as file:
        header = file.metadata()
    told = json.loads(header["resnet_train"])
    assert [told[key] for key in ("arch", "depth", "shortcut", "data", "seed", "iteration", "precision")] == [
        *("resnet", 8, "A", "photos", 0, 20, "fp32")
    ]
    assert (torch.tensor(told["mean"], dtype=torch.float64) * 255 - state["mean"]).abs().max() < 1e-10 * 255
    assert told["config"]["data"]["root"] is None
    assert "/home" not in str(header)


@pytest.mark.parametrize(("label", "name"), [("photos", "imagefolder"), ("digits", "digits"), ("cifar10", "cifar10")])
def test_an_import_of_an_export_is_of_the_data_that_it_was_trained_on(label, name, weights, trained, tmp_path):
    """Else a net of one's own photographs would be tested on CIFAR-10, which would be downloaded."""
    state = {key: value for key, value in checkpoint.load(trained).items() if key != "format"}
    checkpoint.save(tmp_path / "net.pt", state | {"label": label})
    weights("export", "net.pt", "out=net.pth")
    told = weights("import", "net.pth", "out=again.pt")
    again = checkpoint.load(tmp_path / "again.pt")
    assert (again["label"], again["config"]["data"]["name"]) == (label, name)
    assert "minus a mean image (of the channels: [" in told


WRONG = [
    *(("digest", "list", []), ("config", "list", []), ("measure", "str", "fp32"), ("iteration", "float", 1.5)),
    *(("iteration", "bool", True), ("classes", "int", 3), ("classes", "int", [1, 2]), ("data", "dict", {})),
    *(("digest", "NoneType", None), ("data", "list", [1])),
]


def test_a_part_of_another_type_is_named_in_a_header_and_in_a_checkpoint(weights, trained, tmp_path):
    weights("export", trained, "out=net.safetensors")
    tensors = state_dicts.read(tmp_path / "net.safetensors")
    told = json.loads(state_dicts.metadata(tmp_path / "net.safetensors")["resnet_train"])
    state = checkpoint.load(trained)
    for key, kind, value in WRONG:
        header = json.dumps(told | {key: value})
        save_file(tensors, tmp_path / "odd.safetensors", metadata={"resnet_train": header})
        with pytest.raises(UserError, match=rf"odd\.safetensors: .*\({key} (is|has a value) of type {kind}, not "):
            load(tmp_path / "odd.safetensors")
        if key != "data":
            torch.save(state | {key: value}, tmp_path / "odd.pt")
            with pytest.raises(
                UserError, match=rf"odd\.pt: is not a check.*: {key} (is|has a value) of type {kind}, not "
            ):
                load(tmp_path / "odd.pt")
    save_file(tensors, tmp_path / "a b.safetensors")
    with pytest.raises(UserError, match=r"resnet-weights import '.*/a b\.safetensors' out=net\.pt"):
        load(tmp_path / "a b.safetensors")


def test_other_safetensors_in_a_checkpoints_place_are_one_line(weights, command_here, trained, tmp_path):
    save_file(cifar_resnet(8).state_dict(), tmp_path / "bare.safetensors")
    weights("export", trained, "out=net.safetensors")
    tensors = state_dicts.read(tmp_path / "net.safetensors")
    told = json.loads(state_dicts.metadata(tmp_path / "net.safetensors")["resnet_train"])
    for name, header in {
        "nan": json.dumps(told | {"mean": [float("nan")] * 3}),
        "std": json.dumps(told | {"std": [1.0, 1.0, float("inf")]}),
        "deep": "[" * 100_000,
        "depth": json.dumps(told | {"config": told["config"] | {"depth": 99_998}}),
        "none": json.dumps(told | {"measure": {}}),
    }.items():
        save_file(tensors, tmp_path / f"{name}.safetensors", metadata={"resnet_train": header})
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "net.safetensors").read_bytes()[:-9])
    for name, line in {
        "bare": "bare.safetensors: holds weights, and not what resnet-weights export writes with them",
        "nan": "nan.safetensors: its header is not what resnet-weights export wrote",
        "std": "std.safetensors: its header is not what",
        "deep": "deep.safetensors: its header is not what",
        "depth": "the stored configuration cannot be read: depth=99998: CIFAR nets have 6n+2 layers, 1202 at most",
        "none": "none.safetensors: does not match this network",
        "cut": "cut.safetensors: is cut short or no safetensors file",
        "nosuch": "nosuch.safetensors: there is no such file",
    }.items():
        assert line in command_here("evaluate", f"checkpoint={name}.safetensors", "device=cpu", code=2), name


@pytest.mark.parametrize(("net", "images"), [(lambda: cifar_resnet(8), 64), (lambda: imagenet_resnet(18), 32)])
def test_precise_batch_norm_of_imported_weights_is_over_the_papers_groups(net, images, weights, tmp_path):
    torch.save(net().bfloat16().state_dict(), tmp_path / "net.pth")
    weights("import", "net.pth", "out=net.pt")
    assert checkpoint.load(tmp_path / "net.pt")["measure"]["bn_images"] == images
