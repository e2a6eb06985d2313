"""A run that begins with weights from elsewhere, and stages that stay as they are."""

import itertools
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import needs
from torch import nn

from resnet_train.classification.run import begin_from, build, train
from resnet_train.classification.step import step
from resnet_train.config.compose import compose
from resnet_train.config.run_dir import check_run_dir
from resnet_train.config.train import check_train
from resnet_train.data.augment import IMAGENET_STD
from resnet_train.data.views import BatchOrder
from resnet_train.engine import checkpoint
from resnet_train.errors import SIGNALS, UserError
from resnet_train.models import cifar_resnet, imagenet_resnet
from resnet_train.models.build import build_network
from resnet_train.weights import state_dicts
from resnet_train.weights.source import check_same_net, read_source

needs("sklearn")
DIGITS = ["data=digits", "depth=8", "batch_size=32", "precision=fp32", "device=cpu"]


def configured(*words):
    return check_train(compose("train", [*DIGITS, *words]))


def begun(source, *words):
    """A run that has taken the weights of the file `source`, before its first step."""
    run = build(configured(f"init_from={source}", *words))
    begin_from(run, read_source(Path(source)))
    return run


def steps(run, count, look=lambda _: None):
    """Take steps; `look` sees the run between the gradients and the update of each."""
    run.optimizer.register_step_pre_hook(lambda *_: look(run))
    batches = run.dataset.train_batches(run.mean, run.device, BatchOrder(0, 32, run.config.augment))
    for images, labels in itertools.islice(batches, count):
        step(run, images, labels, 0.05)


def stage_of(name):
    return "conv1" if name.startswith("bn1.") else name.split(".")[0]


@pytest.mark.parametrize(
    ("words", "moved"),
    [
        (["freeze=conv1"], {"layer1", "layer2", "layer3", "fc"}),
        (["freeze=layer2", "bn_images=8"], {"layer3", "fc"}),
        (["freeze=layer2", "bn_images=8", "device_batch_size=16", "activation_checkpointing=true"], {"layer3", "fc"}),
        (["freeze=layer3", "decay=weights"], {"fc"}),
        ([], {"conv1", "layer1", "layer2", "layer3", "fc"}),
    ],
)
def test_frozen_stages_stay_bit_for_bit(trained, words, moved):
    before = checkpoint.load(trained)["model"]
    run = begun(trained, *words, "weight_decay=0.1")
    gradients = set()
    names = [(name, parameter) for name, parameter in run.model.named_parameters()]
    steps(run, 20, lambda _: gradients.update(stage_of(name) for name, p in names if p.grad is not None))
    after = run.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {stage_of(name) for name in changed} == gradients == moved
    assert changed == {name for name in before if stage_of(name) in moved}  # statistics and counters too
    held = {id(parameter) for group in run.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(p) for name, p in names if stage_of(name) in moved}


def test_evaluation_between_steps_leaves_frozen_batch_norm_as_it_is():
    net = cifar_resnet(8).train()
    net.freeze("layer1")
    net.eval()
    net.train()
    training = {stage_of(name) for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d) and m.training}
    assert training == {"layer2", "layer3"}


def test_the_weights_and_the_mean_are_those_of_the_source(trained):
    run, state = begun(trained, "seed=5"), checkpoint.load(trained)
    assert all(torch.equal(value, state["model"][name]) for name, value in run.model.state_dict().items())
    assert torch.equal(run.mean, state["mean"])


def test_an_export_begins_a_run_as_its_checkpoint_does(trained, tmp_path, command_here):
    command_here("weights", "export", trained, f"out={tmp_path}/net.safetensors")
    run, other = begun(tmp_path / "net.safetensors"), begun(trained)
    assert all(torch.equal(value, other.model.state_dict()[name]) for name, value in run.model.state_dict().items())
    assert torch.equal(run.mean, other.mean)
    assert run.mean.dtype == torch.float32


def test_the_mean_image_at_another_size_is_its_channel_averages(trained):
    run = begun(trained, "data.size=24")
    averages = checkpoint.load(trained)["mean"].mean((0, 1))
    assert run.mean.shape == (24, 24, 3)
    assert (run.mean == averages).all()
    steps(run, 1)


@pytest.mark.parametrize("classes", [[str(n) for n in range(7)], list("abcdefghij")])
def test_other_classes_get_the_fresh_classifier_of_the_seed(trained, tmp_path, classes):
    state = checkpoint.load(trained)
    torch.manual_seed(1)
    fc = nn.Linear(64, len(classes)).state_dict()
    model = state["model"] | {f"fc.{name}": value for name, value in fc.items()}
    checkpoint.save(tmp_path / "other.pt", state | {"classes": classes, "model": model})
    found = begun(tmp_path / "other.pt").model.state_dict()
    fresh = build(configured()).model.state_dict()
    assert all(torch.equal(value, model[name]) for name, value in found.items() if not name.startswith("fc."))
    assert all(torch.equal(value, fresh[name]) for name, value in found.items() if name.startswith("fc."))


def test_a_state_dict_begins_a_run_as_its_import_would(tmp_path):
    theirs = cifar_resnet(8)
    torch.save(theirs.state_dict(), tmp_path / "net.pth")
    run = begun(tmp_path / "net.pth")
    wanted = state_dicts.rescaled(theirs.state_dict(), IMAGENET_STD, state_dicts.UNDIVIDED)
    assert all(torch.equal(value, wanted[name]) for name, value in run.model.state_dict().items())
    assert (run.mean == torch.tensor(state_dicts.MEAN, dtype=torch.float64).mul(255).float()).all()
    steps(run, 1)


@pytest.mark.parametrize(
    ("make", "words", "told"),
    [
        (lambda: cifar_resnet(14), "", "is the CIFAR resnet-14-A, and this run's is the resnet-8-A; use depth=14"),
        (lambda: cifar_resnet(8, "B"), "", "use shortcut=B"),
        (lambda: cifar_resnet(8, "B"), "arch=plain", "use arch=resnet shortcut=B"),
        (lambda: imagenet_resnet(18), "", "is a net of the ImageNet family"),
        (lambda: cifar_resnet(8), "arch=plain", None),  # the parameters do not say whether it is one
    ],
)
def test_another_net_is_named(tmp_path, make, words, told):
    torch.save(make().state_dict(), tmp_path / "net.pth")
    source, asked = read_source(tmp_path / "net.pth"), configured(*words.split())
    if told is None:
        check_same_net(source, asked, "init_from=net.pth")
        return
    with pytest.raises(UserError, match=r"^init_from=net\.pth: ") as refused:
        check_same_net(source, asked, "init_from=net.pth")
    assert told in str(refused.value)


def test_torchvisions_bottlenecks_are_not_the_papers(tmp_path):
    torch.save(imagenet_resnet(50, num_classes=10).state_dict(), tmp_path / "net.pth")
    asked = check_train(compose("train", ["data=imagenet", "depth=50"]), needs_data=False)
    with pytest.raises(UserError, match=r"use bottleneck_stride=3x3$"):
        check_same_net(read_source(tmp_path / "net.pth"), asked, "init_from=net.pth")


@pytest.mark.parametrize("word", ["freeze=layer1", "freeze=layer4 init_from=/x.pt", "freeze=stage1"])
def test_what_cannot_be_frozen(word):
    with pytest.raises(UserError, match=r"^freeze="):
        configured(*word.split())


@pytest.fixture
def _signals():
    """The loop sets handlers of its own."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals")
def test_a_run_goes_on_exactly_without_the_file_it_began_with(trained, tmp_path, capsys):
    source = tmp_path / "source.pt"
    shutil.copy(trained, source)
    words = [f"init_from={source}", "freeze=layer1", "iterations=14", "log_every=7", "eval_every=7", "keep_every=7"]
    asked, run = configured(*words), tmp_path / "run"
    check_run_dir(run, asked)
    assert train(asked, run) == 0
    told = capsys.readouterr().out
    assert f"starts from the weights of {source} (CIFAR resnet-8-A)\nfrozen: all from the input to layer1\n" in told
    whole = (run / "checkpoints/last.pt").read_bytes()
    shutil.move(run / "checkpoints/iteration-0000007.pt", run / "checkpoints/last.pt")
    (run / "summary.json").unlink()
    source.unlink()
    check_run_dir(run, asked)
    assert train(asked, run) == 0
    assert "resuming from iteration 7" in capsys.readouterr().out
    assert (run / "checkpoints/last.pt").read_bytes() == whole
    with pytest.raises(UserError, match=r"init_from=.*source\.pt: there is no such file"):
        check_run_dir(tmp_path / "new", asked)
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("_signals")
def test_a_run_tells_what_it_assumes_of_its_source(tmp_path, capsys):
    torch.save(cifar_resnet(8).state_dict(), tmp_path / "net.pth")
    assert train(configured(f"init_from={tmp_path}/net.pth", "iterations=1"), tmp_path / "run") == 0
    assumed = "torchvision's net, whose names and shapes it has; a residual net; mean [0.485, 0.456, 0.406]; std [0.229"
    assert f"assumed, for the file does not say: {assumed}" in capsys.readouterr().out


@pytest.mark.usefixtures("_signals")
def test_a_source_that_does_not_fit_leaves_nothing(tmp_path):
    (tmp_path / "source.pt").write_bytes(b"no checkpoint")
    torch.save(build_network(configured("depth=14"), 10).state_dict(), tmp_path / "other.pth")
    for name in ("source.pt", "other.pth"):
        with pytest.raises(UserError, match=name):
            train(configured(f"init_from={tmp_path / name}", "iterations=2"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
