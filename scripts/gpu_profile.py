"""What a training step costs on a GPU, and where its time goes: python scripts/gpu_profile.py DEPTH… [out=FILE.json]

For each CIFAR-10 net, batch 128, bf16, compiled, on random images: milliseconds of a step as the product makes it
(captured), of the same kernels launched one by one, and of the eager net; the GPU's own time and the number of kernels;
the time of the first steps, compilation included. Beside them the step of the conventional loop (`bench/baseline.py`:
eager, TF32, channels first, it waits for each loss), on a batch that lies on the GPU already.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_train.bench import baseline
from resnet_train.bench.synthetic import SyntheticDataset
from resnet_train.classification.run import build, compile_task
from resnet_train.classification.step import step
from resnet_train.classification.train import ClassificationTask
from resnet_train.config.compose import compose
from resnet_train.config.train import check_train
from resnet_train.data.views import BatchOrder
from resnet_train.engine.environment import environment_of
from resnet_train.models import cifar_resnet

STEPS = 300
LR = 0.1


def opened(depth: int, *, compiled: bool = True) -> ClassificationTask:
    """A run as resnet-train builds it, on random images."""
    config = check_train(compose("train", [f"depth={depth}", "device=cuda"]), needs_data=False)
    run = build(config, SyntheticDataset(family="cifar", size=32))
    if compiled:
        compile_task(run)
    return run


def timed(take: Callable[..., None], batches: Iterator[tuple[Tensor, ...]], steps: int = STEPS) -> tuple[float, float]:
    """Milliseconds of a step, and of the host alone: until the last step of many is on its way."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for batch in itertools.islice(batches, steps):
        take(*batch, LR)
    sent = time.perf_counter()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps * 1e3, (sent - start) / steps * 1e3


def kernels(take: Callable[..., None], batches: Iterator[tuple[Tensor, ...]]) -> tuple[float, float, list[str]]:
    """Milliseconds that the GPU is busy in a step, kernels and copies of a step, and the longest of them."""
    steps = 10
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for batch in itertools.islice(batches, steps):
            take(*batch, LR)
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    spent: Counter[str] = Counter()
    for event in events:
        spent[event.name[:80]] += event.self_device_time_total / steps
    longest = [f"{microseconds:8.1f} us {name}" for name, microseconds in spent.most_common(12)]
    return sum(spent.values()) / 1e3, len(events) / steps, longest


def profile(depth: int) -> dict[str, Any]:
    """All figures of one net."""
    found: dict[str, Any] = {"depth": depth}
    run = opened(depth)
    batches, take = run.batches(), lambda *batch: run.step(batch[:-1], batch[-1])
    start = time.perf_counter()
    for batch in itertools.islice(batches, 5):
        take(*batch, LR)
    torch.cuda.synchronize()
    found["first_steps_seconds"] = time.perf_counter() - start
    found["captured"] = dict(zip(("step_ms", "host_ms"), timed(take, batches), strict=True))
    busy, count, longest = kernels(take, batches)
    found["captured"] |= {"gpu_ms": busy, "kernels": count, "longest": longest}

    plain = run.dataset.train_batches(run.mean, run.device, BatchOrder(0, 128, run.config.augment))
    for name, one in (("compiled", run), ("eager", opened(depth, compiled=False))):
        take = functools.partial(step, one)
        timed(take, plain, 5)
        found[name] = dict(zip(("step_ms", "host_ms"), timed(take, plain, 100), strict=True))
        found[name] |= dict(zip(("gpu_ms", "kernels"), kernels(take, plain)[:2], strict=True))
    images, labels = next(plain)
    trainer, batch = baseline.Trainer(cifar_resnet(depth), run.device), (images.contiguous(), labels)

    def conventional(images: Tensor, labels: Tensor, lr: float) -> None:
        trainer.step(images, labels)

    timed(conventional, itertools.repeat(batch), 10)
    found["conventional"] = {"step_ms": timed(conventional, itertools.repeat(batch), 100)[0]}
    return found


def main() -> None:
    """Print the figures and, with out=, write them."""
    out = next((word.removeprefix("out=") for word in sys.argv[1:] if word.startswith("out=")), None)
    results = []
    for depth in (int(word) for word in sys.argv[1:] if word.isdigit()):
        results.append(profile(depth))
        print(json.dumps(results[-1], indent=1), flush=True)
    if out:
        Path(out).write_text(
            json.dumps({"nets": results, **environment_of("gpu_profile", torch.device("cuda"), digest="")}, indent=1)
        )


if __name__ == "__main__":
    main()
