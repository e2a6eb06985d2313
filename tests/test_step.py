"""Activation checkpointing changes the memory and nothing else; a step asks the device for nothing."""

import contextlib
import copy
import itertools
import json
import signal

import pytest
import torch
import torch.nn.functional as F
from conftest import metrics
from test_golden import golden
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_train.classification.run import build
from resnet_train.classification.step import step
from resnet_train.data.views import BatchOrder
from resnet_train.engine import checkpoint
from resnet_train.engine.logger import MetricsLogger
from resnet_train.engine.loop import Clock, Stop, loop
from resnet_train.errors import SIGNALS
from resnet_train.models import cifar_resnet, imagenet_resnet
from resnet_train.models.batchnorm import update_statistics, use_group_batch_norm
from resnet_train.models.compile import compile_network, compiles_in_blocks

# What makes the processor wait for a GPU: reading a value, and shapes that depend on values.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")


def stepped(model, images, labels, recompute):
    """Gradients and buffers after two passes of one step and an update of the statistics."""
    model = copy.deepcopy(model).train()
    model.recompute = recompute
    for some, truth in zip(images.chunk(2), labels.chunk(2), strict=True):
        (F.cross_entropy(model(some), truth) / 2).backward()
    update_statistics(model, 4)
    return {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())


@pytest.mark.parametrize(
    ("make", "size"),
    [(lambda: cifar_resnet(14, "B"), 32), (lambda: cifar_resnet(8, "none"), 32), (lambda: imagenet_resnet(50), 64)],
)
def test_gradients_and_statistics_are_those_of_a_net_that_keeps_all(make, size):
    """Bit for bit, and the running statistics are counted once."""
    torch.manual_seed(0)
    model = make()
    use_group_batch_norm(model, 3)
    images, labels = torch.randn(12, 3, size, size), torch.arange(12) % 10
    kept, again = (stepped(model, images, labels, recompute) for recompute in (False, True))
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    assert all(value == 1 for name, value in again.items() if name.endswith("num_batches_tracked"))


@pytest.mark.long
def test_compiled_steps_of_two_processes_that_compute_again_are_those_of_one_that_does_not(command, tmp_path):
    """Compiled block by block, with gradients exchanged: the losses of the first three steps, and the statistics."""
    pytest.importorskip("sklearn")
    words = ["data=digits", "depth=8", "iterations=3", "batch_size=32", "bn_images=16", "log_every=1", "eval_every=3"]
    words += ["precision=fp32", "device=cpu", "schedule.lr=0.01"]
    ways = {"plain": [], "whole": ["compile=true"], "again": ["compile=true", "activation_checkpointing=true"]}
    losses = {}
    for name, more in ways.items():
        done = command(*words, *more, f"run_dir={name}", *(["devices=2"] if more else []), timeout=280)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [line["loss"] for line in lines]
        assert json.loads((tmp_path / name / "summary.json").read_text())["compile"] == bool(more)
    assert len(losses["plain"]) == 4
    assert losses["whole"] == pytest.approx(losses["plain"], rel=1e-4)
    assert losses["again"] == pytest.approx(losses["plain"], rel=1e-4)


@pytest.mark.parametrize(("depth", "captured", "whole"), [(56, True, True), (62, True, False), (62, False, True)])
def test_a_deep_net_is_compiled_block_by_block_where_the_calls_are_captured(depth, captured, whole):
    """Nothing is compiled here before a first step."""
    model = cifar_resnet(depth)
    blocks = compiles_in_blocks(model, depth, captured=captured)
    assert compile_network(model, torch.device("cpu"), blocks=blocks)
    assert (model._compiled_call_impl is not None) == whole
    assert all((block._compiled_call_impl is None) == whole for block in model.blocks())


def test_less_is_kept_for_the_backward_pass():
    """Counted in the bytes that autograd saves between the passes, the blocks' inputs aside."""
    torch.manual_seed(0)
    model = cifar_resnet(32, "A").train()
    use_group_batch_norm(model, 4)

    def saved(recompute):
        model.recompute, found = recompute, {}

        def pack(tensor):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(torch.randn(4, 3, 32, 32)).sum()
        assert loss.isfinite()
        return sum(found.values())

    assert saved(True) < saved(False) / 3


class Waits(TorchDispatchMode):
    """Collects the operations that would wait for a device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in WAITING:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def training(run):
    """The training batches of a run."""
    config = run.config
    return run.dataset.train_batches(run.mean, run.device, BatchOrder(0, config.batch_size, config.augment))


@pytest.mark.parametrize("extra", [[], ["device_batch_size=16"], ["activation_checkpointing=true"], ["nesterov=true"]])
def test_a_step_waits_for_nothing(extra):
    pytest.importorskip("sklearn")
    run = build(golden.composed([*golden.TINY, *extra]))
    with Waits() as waits:
        for images, labels in itertools.islice(training(run), 3):
            step(run, images, labels, 0.1)
    assert waits.found == []
    assert run.iteration == 3


@pytest.mark.parametrize("decay", ["all", "weights"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_steps_are_sgd_written_out(nesterov, decay):
    """Momentum and weight decay of three steps in float64; `weights` spares batch norm and the bias."""
    pytest.importorskip("sklearn")
    words = [f"nesterov={str(nesterov).lower()}", f"decay={decay}", "weight_decay=0.02", "momentum=0.8"]
    config = golden.composed([*(word for word in golden.TINY if word != "precision=fp32"), "precision=fp64", *words])
    run = build(config)
    net, velocity = copy.deepcopy(run.model).train(), {}
    for images, labels in itertools.islice(training(run), 3):
        step(run, images, labels, 0.1)
        net.zero_grad()
        F.cross_entropy(net(images.double()), labels).backward()
        for name, p in net.named_parameters():
            decayed = decay == "all" or name.endswith(("conv1.weight", "conv2.weight", "fc.weight"))
            gradient = p.grad + 0.02 * decayed * p.detach()
            velocity[name] = 0.8 * velocity.get(name, 0.0) + gradient
            p.data -= 0.1 * (gradient + 0.8 * velocity[name] if nesterov else velocity[name])
    for (name, found), expected in zip(run.model.named_parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, msg=name)


@pytest.fixture
def stop():
    """What ends a run at a signal; the handlers of the tests come back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield Stop()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("watch", "rates"),
    [
        ("train", [0.003] * 15 + [0.0003] * 10 + [0.00003] * 10 + [0.000003] * 5),
        ("val", [0.003] * 20 + [0.0003] * 10 + [0.00003] * 10),
    ],
)
def test_the_plateau_drops_the_rate_in_training_and_a_resumed_run_goes_on_so(watch, rates, stop, tmp_path):
    """No error falls by 100 points, so each 10 iterations after the first look (at 5 and at 10) bring a drop."""
    pytest.importorskip("sklearn")
    words = ["iterations=40", "schedule=plateau", "schedule.lr=0.003", "schedule.patience=0.25"]
    words += ["schedule.threshold=100", f"schedule.watch={watch}", "data.validation=137", "data.size=8"]
    words += ["log_every=5", "eval_every=10", "checkpoint_every=40", "keep_every=18", "eval_batch_size=200"]
    config = golden.composed([*(w for w in golden.TINY if not w.startswith(("iterations", "log_every"))), *words])

    def trained(name, state):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        run, used = build(config), []
        if state is not None:
            run.load(state)
        run.optimizer.register_step_pre_hook(lambda *_: used.append(run.optimizer.param_groups[0]["lr"]))
        record = MetricsLogger(tmp_path / name, {}, run.iteration, config.iterations)
        with contextlib.closing(record):
            loop(run, tmp_path / name, record, Clock(run.iteration), stop)
        return run.state(), used

    whole, used = trained("whole", None)
    assert used == pytest.approx(rates, rel=1e-12)
    logged = [line for line in metrics(tmp_path / "whole") if line["split"] == "train"]
    assert [line["lr"] for line in logged] == pytest.approx([rates[line["iteration"] - 1] for line in logged])
    assert len(logged) == 8
    cut, rest = trained("cut", checkpoint.load(tmp_path / "whole" / "checkpoints" / "iteration-0000018.pt"))
    assert rest == used[18:]
    assert cut["progress"] == whole["progress"]
    assert all(torch.equal(value, cut["model"][name]) for name, value in whole["model"].items())
    assert metrics(tmp_path / "cut") == [line for line in metrics(tmp_path / "whole") if line["iteration"] > 18]


def test_a_value_that_is_read_is_found():
    """The test above can fail."""
    with Waits() as waits:
        torch.ones(3).sum().item()
    assert waits.found == ["_local_scalar_dense"]


def test_the_best_checkpoint_is_never_newer_than_the_last(stop, tmp_path):
    """Else a run that is killed after it could, on a GPU, end with another best than best.pt."""
    pytest.importorskip("sklearn")
    words = ["iterations=6", "eval_every=2", "checkpoint_every=100", "schedule.lr=1e-9", "data.validation=137"]
    config = golden.composed([*(w for w in golden.TINY if not w.startswith(("iterations", "eval_every"))), *words])
    (tmp_path / "checkpoints").mkdir()
    run = build(config)
    record = MetricsLogger(tmp_path, {}, 0, config.iterations)
    with contextlib.closing(record):
        loop(run, tmp_path, record, Clock(0), stop)
    found = {file.stem: checkpoint.load(file)["iteration"] for file in (tmp_path / "checkpoints").glob("*.pt")}
    assert found == {"best": 2, "previous": 2, "last": 6}
