"""From a configuration to data and a network on a device: the one place that reads their keys."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from torch import nn

from resnet_train.config import Config
from resnet_train.data.sets import MemorySets, StreamedSets
from resnet_train.errors import UserError
from resnet_train.models import cifar_resnet, imagenet_resnet
from resnet_train.models.resnet import BasicBlock, Bottleneck

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WHOLE = 110  # deeper nets are compiled block by block: compiling the whole takes time in proportion to its depth


def network(config: Config, num_classes: int) -> nn.Module:
    """The network that the configuration names, initialised from torch's random state."""
    if config.data.family == "cifar":
        return cifar_resnet(
            config.depth, config.shortcut, num_classes=num_classes, init=config.init, zero_gamma=config.zero_gamma
        )
    return imagenet_resnet(
        config.depth,
        config.shortcut,
        num_classes=num_classes,
        bottleneck_stride=config.bottleneck_stride,
        init=config.init,
        zero_gamma=config.zero_gamma,
    )


def open_sets(config: Config) -> MemorySets | StreamedSets:
    """The data sets that the configuration names. Raises UserError for data that are not what they should be."""
    data = config.data
    if data.family == "cifar":
        return MemorySets(name=data.name, root=data.root, size=data.size, validation=data.validation)
    assert data.root is not None  # config.check has seen to it
    return StreamedSets(root=data.root, size=data.size, validation=data.validation, workers=data.workers)


def pick_device(name: str) -> torch.device:
    """auto, cpu or cuda as a device. Raises UserError where there is no GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no GPU here; take device=cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> str:
    """auto as bf16 where the processor computes with it and as fp32 elsewhere; others as they are."""
    if name == "fp16" and device.type == "cpu":
        raise UserError("precision=fp16: is for GPUs; on a CPU take bf16 or fp32")
    if name != "auto":
        return name
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bf16()
    return "bf16" if fast else "fp32"


def _cpu_has_bf16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and any(flag in cpuinfo.read_text() for flag in ("avx512_bf16", "amx_bf16", "bf16 "))


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Mixed precision for forward passes; does nothing in fp32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def compile_network(model: nn.Module, depth: int, device: torch.device) -> bool:
    """Compile in place, the whole net or, above 110 layers, block by block; False where there is no compiler.

    Shapes are fixed: the same batch gives the same kernels, in training and in every later evaluation.
    """
    try:
        torch.compile(torch.neg, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        print(f"compile=true: there is no working compiler ({reason}); going on without, slower", flush=True)
        return False
    if depth <= WHOLE:
        model.compile(dynamic=False)
        return True
    with contextlib.suppress(AttributeError):  # one kernel set for each shape and mode, however many blocks share it
        torch._dynamo.config.recompile_limit = 64
    for block in model.modules():
        if isinstance(block, (BasicBlock, Bottleneck)):
            block.compile(dynamic=False)
    return True
