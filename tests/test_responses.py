"""Figure 7: standard deviations gathered in one pass are those of activations that are kept."""

import csv

import pytest
import torch

from resnet_train import cli, responses
from resnet_train.models import cifar_resnet
from resnet_train.models.resnet import BasicBlock


def batches(images, size):
    """Full batches: what fills the last is wild, and has label -1."""
    for start in range(0, len(images), size):
        part = images[start : start + size]
        fill = torch.full((size - len(part), *images.shape[1:]), 1e3)
        yield torch.cat([part, fill]), torch.cat([torch.zeros(len(part)), -torch.ones(len(fill))]).long()


def kept(model, images):
    """The std of every response, computed from the whole of it: the forward pass written out."""
    found = []

    def respond(conv, bn, x):
        out = bn(conv(x))
        found.append(out.double().std(correction=0).item())
        return out

    x = respond(model.conv1, model.bn1, images).relu()
    for block in model.blocks():
        out = respond(block.conv1, block.bn1, x).relu()
        out = respond(block.conv2, block.bn2, out)
        x = (out + (x if block.downsample is None else block.downsample(x)) if block.residual else out).relu()
    return found


def trained(depth, shortcut):
    """A net whose batch norm does something."""
    torch.manual_seed(depth)
    model = cifar_resnet(depth, shortcut)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    tensor.add_(torch.rand_like(tensor))
    return model


@pytest.mark.parametrize("shortcut", ["none", "A", "B"])
@pytest.mark.parametrize("images", [10, 23])
def test_stds_are_those_of_kept_activations(shortcut, images):
    model, data = trained(14, shortcut), torch.randn(25, 3, 16, 16)
    found = responses.response_stds(model, batches(data, 10), images, "fp32")
    with torch.no_grad():
        wanted = kept(model.eval(), data[:images])
    assert list(found.values()) == pytest.approx(wanted, rel=1e-5)
    assert len(found) == 13  # 6n+1


def test_all_25_of_25_and_no_filler():
    model, data = trained(8, "A"), torch.randn(25, 3, 8, 8)
    one = responses.response_stds(model, batches(data, 25), 25, "fp32")
    several = responses.response_stds(model, batches(data, 10), 25, "fp32")
    assert list(several.values()) == pytest.approx(list(one.values()), rel=1e-6)


def test_moments_far_from_zero():
    """Where a sum of squares would cancel."""
    moments, values = responses.Moments(torch.device("cpu")), torch.randn(1000, dtype=torch.float64) + 1e8
    for part in values.split(300):
        moments.add(part)
    assert moments.std() == pytest.approx(values.std(correction=0).item(), rel=1e-6)


def test_hooks_are_taken_off():
    model = cifar_resnet(8, "A")
    responses.response_stds(model, batches(torch.randn(2, 3, 8, 8), 2), 2, "fp32")
    assert not any(module._forward_hooks for module in model.modules())


def test_1202_layers():
    model = cifar_resnet(1202, "A")
    found = responses.response_stds(model, batches(torch.randn(2, 3, 8, 8), 2), 2, "fp32")
    assert len(found) == 1201
    assert sum(isinstance(block, BasicBlock) for block in model.blocks()) == 600


@pytest.fixture
def measure(monkeypatch, tmp_path, capsys):
    """`resnet-responses` in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr("sys.argv", ["resnet-responses", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.responses()
        return stopped.value.code or 0, *capsys.readouterr()

    return run


def test_the_command_draws_and_writes(undisturbed, measure, tmp_path):
    code, told, errors = measure(f"checkpoint={undisturbed}/checkpoints/last.pt", "images=100", "out=found")
    assert (code, errors) == (0, "")
    assert "resnet-8-A on digits test, seed 0, iteration 61: 7 layers, 100 images" in told
    names = sorted(path.name for path in (tmp_path / "found").iterdir())
    assert names == ["figure-7.png", "figure-7.svg", "responses.csv"]
    rows = list(csv.DictReader((tmp_path / "found" / "responses.csv").read_text().splitlines()))
    assert [row["layer"] for row in rows][:3] == ["bn1", "layer1.0.bn1", "layer1.0.bn2"]
    assert len(rows) == 7
    assert rows[0]["note"] == ""  # digits are not the paper's: there is no length to fall short of
    assert all(float(row["std"]) > 0 for row in rows)


def test_wrong_words_are_one_line(undisturbed, measure, tmp_path):
    whole = undisturbed / "checkpoints" / "last.pt"
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:5000])
    state = torch.load(whole, weights_only=True)
    config = state["config"]
    photos = config | {"depth": 18, "data": config["data"] | {"family": "imagenet", "name": "imagenet"}}
    torch.save(state | {"config": photos}, tmp_path / "photos.pt")
    torch.save(state | {"config": config | {"depth": 14}}, tmp_path / "other.pt")
    for words, named in {
        "": "checkpoint: is needed",
        "checkpoint=nosuch.pt": "there is no such file",
        "checkpoint=cut.pt": "cut short or not a checkpoint",
        "checkpoint=photos.pt": "resnet-18-A for ImageNet; figure 7 is about CIFAR nets",
        "checkpoint=other.pt images=10": "other.pt: holds other things than a checkpoint of this net must",
        f"checkpoint={whole} images=361": "images=361: digits test has 360",
        f"checkpoint={whole} out=cut.pt": "out=cut.pt: is not a folder",
        f"-m checkpoint={whole}": "-m: resnet-responses takes all checkpoints at once",
    }.items():
        code, _, told = measure(*words.split())
        assert code == 2, words
        assert named in told, (words, told)
        assert told.count("\n") == 1, told
        assert not (tmp_path / "responses").exists()
