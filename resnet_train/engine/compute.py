"""What a task computes with: device, precision, optimiser, gradients averaged over processes."""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resnet_train.engine.allocator import keep_freed_memory
from resnet_train.engine.distributed import local_rank
from resnet_train.errors import RunError, UserError, from_machine_error
from resnet_train.terminal import say

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device(name: str) -> torch.device:
    """auto, cpu or cuda as this process's device. Raises UserError where there is no GPU for it, or one out of order.

    Changes the process: of several GPUs it takes the one of its rank, and switches TF32 convolutions off; on a CPU it
    has the C library keep the memory that tensors free. Processes that share a GPU are refused by NCCL.
    """
    if name == "cuda":
        check_gpu(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu":
            _warn_of_unused_gpus()
    if name == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32
        gpus = torch.cuda.device_count()
        number = 0 if gpus == 1 else local_rank()  # Slurm's --gpus-per-task shows each process a GPU of its own alone
        if number >= gpus:
            raise UserError(f"devices: torch sees {gpus} GPUs here; each process needs one")
        _take_gpu(number)
        return torch.device("cuda", number)
    keep_freed_memory()
    return torch.device(name)


@functools.cache  # the device is picked more than once
def _warn_of_unused_gpus() -> None:
    gpus = torch.cuda.device_count()  # by the driver, not by torch
    if gpus and os.environ.get("RANK", "0") == "0":
        say(f"warning: device=auto: the CPU, as torch cannot use the {gpus} GPUs of this machine{_why_no_gpu()}")


def check_gpu(name: str | torch.device) -> None:
    """Raise UserError where torch sees no GPU for the device called `name`."""
    if not torch.cuda.is_available():
        raise UserError(f"device={name}: torch sees no GPU here{_why_no_gpu()}; use device=cpu")


def _why_no_gpu() -> str:
    """Torch's reason, in brackets: it is built without CUDA, or there is no driver, or one that is too old."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError, torch.cuda.DeferredCudaCallError) as error:
        sentence = re.split(r"\.\s", str(error).splitlines()[0])[0].rstrip(".")
        return f" ({sentence})"
    return ""


def _take_gpu(number: int) -> None:
    """Make a GPU that of this process, and use it. Raises UserError for one that torch's kernels do not run on."""
    try:
        torch.cuda.set_device(number)
        torch.ones(1, device="cuda").item()
    except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
        reason = str(error).splitlines()[0]
        if from_machine_error(error):
            raise RunError(f"device=cuda: GPU {number} is full, by other processes (nvidia-smi): {reason}") from error
        if "no kernel image" in reason:
            major, minor = torch.cuda.get_device_capability(number)
            card, kinds = torch.cuda.get_device_name(number), ", ".join(torch.cuda.get_arch_list())
            reason = f"this torch is for {kinds}, and {card} is sm_{major}{minor}; install a build for it"
            raise UserError(f"device=cuda: {reason} (docs/troubleshooting.md), or use device=cpu") from error
        advice = "use fewer devices=" if "ordinal" in reason else "use device=cpu"  # of MIG, CUDA shows one part alone
        raise UserError(f"device=cuda: GPU {number} cannot be used ({reason}); {advice}") from error


def find_device(name: str | torch.device) -> torch.device:
    """The device that torch calls `name` (cuda:1). Raises UserError for one that is not there."""
    try:
        device = torch.device(name)
        if device.type == "cuda":
            check_gpu(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name}: is not a device of torch here ({str(error).splitlines()[0]})") from error
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """auto as bf16 where the processor computes with it and as fp32 elsewhere; others as they are."""
    if name == "fp16" and device.type == "cpu":
        raise UserError("precision=fp16: is for GPUs; on a CPU use bf16 or fp32")
    if name != "auto":
        return name
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bf16()
    return "bf16" if fast else "fp32"


def precision_of(state: Mapping[str, Any], allowed: Collection[str] = tuple(DTYPES)) -> str:
    """The precision that a checkpoint was trained in. Raises KeyError and ValueError for none that is allowed."""
    precision = str(state["measure"]["precision"])
    if precision not in allowed:
        raise ValueError(f"precision {precision}")
    return precision


def _cpu_has_bf16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.exists() and any(flag in cpuinfo.read_text() for flag in ("avx512_bf16", "amx_bf16", "bf16 "))


Net = TypeVar("Net", bound=nn.Module)


def to_device(model: Net, device: torch.device, precision: str) -> Net:
    """`model` on `device`, channels last, its weights in float32, or in float64 for fp64."""
    dtype = torch.float64 if precision == "fp64" else torch.float32
    return model.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]


def sgd(
    groups: Iterable[dict[str, Any]], *, lr: float, momentum: float, nesterov: bool = False, precision: str
) -> torch.optim.SGD:
    """SGD with momentum over parameter groups, those without parameters left out; fused, so that it is one kernel."""
    optimizer = torch.optim.SGD(
        [group for group in groups if group["params"]], lr=lr, momentum=momentum, nesterov=nesterov, fused=True
    )
    if precision == "fp16" and momentum:  # where the scaler skips the first step, it would stay uninitialised
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def check_synchronised(device: torch.device) -> None:
    """Raise UserError where batch norm over the images of all processes cannot be had."""
    if device.type == "cpu":
        raise UserError("bn_images=all: PyTorch's synchronised batch norm needs GPUs; use a number of images")


def wrap_ddp(model: nn.Module, first: Callable[[nn.Module], Tensor]) -> nn.Module:
    """`model` with its gradients averaged over all processes; each keeps its own buffers.

    `first` is a first pass that nothing comes of: it gives a number to go backward from.
    """
    device = next(model.parameters()).device
    newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    net = DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        **{"forward_sync_buffers" if newer else "broadcast_buffers": False},  # type: ignore[arg-type]
    )
    # After its first pass it puts the gradients in another order, in which sums of more than two round otherwise. That
    # pass is made here, on nothing: else a run that is cut and resumed would differ from one that is not.
    buffers = [buffer.clone() for buffer in model.buffers()]
    first(net).backward()
    model.zero_grad(set_to_none=True)
    for buffer, before in zip(model.buffers(), buffers, strict=True):
        buffer.copy_(before)
    return net


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a forward pass computes in `precision`, bf16, fp16 or fp32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def compute_logits(net: nn.Module, images: Tensor, precision: str) -> Tensor:
    """A forward pass in `precision`; logits in float32, or in float64 for fp64."""
    if precision == "fp64":
        return net(images.double())
    with autocast(images.device, precision):
        return net(images).float()
