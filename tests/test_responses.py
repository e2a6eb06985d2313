"""Figure 7, and the gradients: what is gathered in one pass is what activations that are kept give."""

import csv

import pytest
import torch
import torch.nn.functional as F

from resnet_train import cli
from resnet_train.classification import responses
from resnet_train.models import cifar_resnet
from resnet_train.models.resnet import BasicBlock


def batches(images, size):
    """Full batches: what fills the last is wild, and has label -1."""
    for start in range(0, len(images), size):
        part = images[start : start + size]
        fill = torch.full((size - len(part), *images.shape[1:]), 1e3)
        yield torch.cat([part, fill]), torch.cat([torch.zeros(len(part)), -torch.ones(len(fill))]).long()


def kept(model, images):
    """Every response, and the logits: the forward pass written out."""
    found = []

    def respond(conv, bn, x):
        found.append(bn(conv(x)))
        return found[-1]

    x = respond(model.conv1, model.bn1, images).relu()
    for block in model.blocks():
        out = respond(block.conv1, block.bn1, x).relu()
        out = respond(block.conv2, block.bn2, out)
        x = (out + (x if block.downsample is None else block.downsample(x)) if block.residual else out).relu()
    return found, model.fc(x.mean((2, 3)))


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
        wanted = [response.double().std(correction=0).item() for response in kept(model.eval(), data[:images])[0]]
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


@pytest.mark.parametrize("shortcut", ["none", "A", "B"])
def test_gradients_are_those_of_a_training_pass(shortcut):
    model = trained(8, shortcut).double()
    data = [(torch.randn(n, 3, 16, 16).double(), torch.arange(n) % 10) for n in (7, 7)]
    by_response, by_weights = responses.gradient_norms(model, data, "fp64")
    of_images, of_batches = [], []
    weights = [weight for name, weight in model.named_parameters() if weight.ndim == 4 and "downsample" not in name]
    for images, labels in data:
        found, logits = kept(model.train(), images)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        parts = torch.autograd.grad(loss, [*found, *weights])
        of_images.append(torch.stack([part.flatten(1).norm(dim=1) for part in parts[: len(found)]]))
        of_batches.append(torch.stack([part.norm() / len(images) for part in parts[len(found) :]]))
    assert by_response == pytest.approx(torch.cat(of_images, 1).square().mean(1).sqrt().tolist(), rel=1e-9)
    assert by_weights == pytest.approx(torch.stack(of_batches, 1).square().mean(1).sqrt().tolist(), rel=1e-9)
    assert len(by_response) == len(by_weights) == 7  # 6n+1


def test_gradients_leave_the_net_alone_and_pass_what_is_frozen():
    model = trained(8, "A").eval()
    model.freeze("layer2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    norms = responses.gradient_norms(model, [(torch.randn(4, 3, 8, 8), torch.arange(4))], "fp32")
    assert all(norm > 0 for each in norms for norm in each)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert not model.conv1.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_are_taken_off():
    model = cifar_resnet(8, "A")
    responses.response_stds(model, batches(torch.randn(2, 3, 8, 8), 2), 2, "fp32")
    responses.gradient_norms(model, [(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))], "fp32")
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
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err.removeprefix("resnet-responses: starting\n")

    return run


def test_the_command_draws_and_writes(undisturbed, measure, tmp_path):
    code, told, errors = measure(f"checkpoint={undisturbed}/checkpoints/last.pt", "images=100", "out=found")
    assert (code, errors) == (0, "")
    assert "resnet-8-A on digits test, seed 0, iteration 61: 7 layers, 100 images" in told
    names = sorted(path.name for path in (tmp_path / "found").iterdir())
    pictures = ["figure-7.png", "figure-7.svg", "gradients.csv", "gradients.png", "gradients.svg"]
    assert names == [*pictures, "responses.csv"]
    rows = list(csv.DictReader((tmp_path / "found" / "responses.csv").read_text().splitlines()))
    assert [row["layer"] for row in rows][:3] == ["bn1", "layer1.0.bn1", "layer1.0.bn2"]
    assert len(rows) == 7
    assert rows[0]["note"] == ""  # digits are not the paper's: there is no length to fall short of
    assert all(float(row["std"]) > 0 for row in rows)
    gradients = list(csv.DictReader((tmp_path / "found" / "gradients.csv").read_text().splitlines()))
    assert [row["layer"] for row in gradients] == [row["layer"] for row in rows]
    assert all(float(row[by]) > 0 for row in gradients for by in ("by_response", "by_weights"))
    assert {(row["images"], row["batch"]) for row in gradients} == {("74", "37")}  # batch norm's, as in training


def test_a_picture_that_fails_is_a_warning(undisturbed, measure, tmp_path):
    for name in ("figure-7.svg", "gradients.png"):
        (tmp_path / "found" / name).mkdir(parents=True)
    (tmp_path / "found" / "responses.csv").write_text("net,seed,iteration,std\n")  # an earlier one, which is replaced
    code, told, errors = measure(f"checkpoint={undisturbed}/checkpoints/last.pt", "images=100", "out=found")
    assert (code, errors) == (0, "")
    assert all(f"warning: found/{name}: cannot be drawn (" in told for name in ("figure-7", "gradients"))
    assert told.endswith("\nfound/responses.csv, gradients.csv\n")
    for name in ("responses.csv", "gradients.csv"):
        assert len((tmp_path / "found" / name).read_text().splitlines()) == 8


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
        "checkpoint=other.pt images=10": "other.pt: does not match this network",
        f"checkpoint={whole} images=361": "images=361: digits test has 360",
        f"checkpoint={whole} out=cut.pt": "out=cut.pt: is not a folder",
        f"-m checkpoint={whole}": "-m: resnet-responses takes all checkpoints at once",
    }.items():
        code, _, told = measure(*words.split())
        assert code == 2, words
        assert named in told, (words, told)
        assert told.count("\n") == 1, told
        assert not (tmp_path / "responses").exists()
