"""The captured step with an emulated CUDA graph: what is recorded is computed at a replay, and nothing else is.

The emulation knows no streams and no pool of memory, in which a real graph's tensors can be overwritten.
"""

import contextlib
import itertools

import pytest
import torch
from conftest import needs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resnet_train.classification.run import build
from resnet_train.classification.step import CapturedStep, step
from resnet_train.config.compose import compose
from resnet_train.config.train import check_train
from resnet_train.data.views import BatchOrder

needs("sklearn")
RATES = [2**-4] * 5 + [2**-5] * 2 + [2**-8] * 3  # exact in float32, in which a graph reads the rate


LOGGED = 7  # after which the sums begin anew


class Graph(TorchDispatchMode):
    """Operations as they were called within, on the tensors that they had then."""

    def __init__(self):
        super().__init__()
        self.calls, self.before = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result

    def __exit__(self, *error):
        """A capture computes nothing: what it has changed is put back. Storages of its own do not matter."""
        super().__exit__(*error)
        for storage, content in self.before.values():
            storage.copy_(content)

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, result in self.calls:
                for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Stream:
    def wait_stream(self, _):
        pass


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph)


def opened(*words):
    shared = ["data=digits", "depth=8", "device=cpu", "compile=false", "precision=fp32", "batch_size=32"]
    task = build(check_train(compose("train", [*shared, *words])))
    order = BatchOrder(0, 32, task.config.augment, 0)
    return task, order


def content(task):
    """All that a step changes."""
    momenta = [one["momentum_buffer"] for one in task.optimizer.state.values()]
    return [*task.model.state_dict().values(), *momenta, task.metrics.loss, task.metrics.wrong]


@pytest.mark.parametrize("words", [[], ["nesterov=true", "decay=weights"], ["arch=plain"], ["bn_images=8"]], ids=str)
def test_a_captured_step_is_the_step_with_each_iterations_draws_and_rate(words, emulated):
    plain, order = opened(*words)
    batches = plain.dataset.train_batches(plain.mean, plain.device, order)
    for (images, labels), lr in zip(itertools.islice(batches, len(RATES)), RATES, strict=True):
        step(plain, images, labels, lr)
        if plain.iteration == LOGGED:
            plain.metrics.reset()

    task, order = opened(*words)
    captured = CapturedStep(task, task.dataset.batch_maker(task.mean, task.device, task.config.augment.pad))
    draws = task.dataset.draw_batches(task.device, order)
    for number, (batch, lr) in enumerate(zip(itertools.islice(draws, len(RATES)), RATES, strict=True), 1):
        captured(batch, lr)
        assert (task.iteration, task.metrics.seen) == (number, 32 * (number - LOGGED * (number > LOGGED)))
        if number == LOGGED:
            task.metrics.reset()
        assert all((type(group["lr"]), group["lr"]) == (float, lr) for group in task.optimizer.param_groups)
        assert (captured.graph is None) == (number <= CapturedStep.UNCAPTURED)
    for one, other in zip(content(task), content(plain), strict=True):
        assert torch.equal(one, other)
