"""Compilation of networks."""

from __future__ import annotations

import contextlib
import logging
import warnings

import torch

from resnet_train.engine.distributed import is_main
from resnet_train.models.resnet import ResNet
from resnet_train.terminal import say

WHOLE = 110  # layers; deeper nets are compiled block by block, as compilation time is proportional to depth
WHOLE_CAPTURED = 56  # in a CUDA graph, where a call for each block costs nothing


def compile_network(model: ResNet, depth: int, device: torch.device, *, captured: bool = False) -> bool:
    """Compile the net in place; returns False if there is no compiler.

    Nets above 110 layers, in a `captured` step above 56, and nets with activation checkpointing are compiled block by
    block.

    Shapes are static: the same batch gives the same kernels, in training and in every later evaluation.
    """
    if device.type == "cpu":  # silence the warning about a CUDA toolkit without a GPU
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # advice to use TF32; fp32 means fp32 here
    try:
        torch.compile(torch.neg, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        if is_main():
            say(f"compile=true: there is no working compiler ({reason}); continuing without, slower")
        return False
    if depth <= (WHOLE_CAPTURED if captured else WHOLE) and not model.recompute:
        model.compile(dynamic=False)
        return True
    with contextlib.suppress(AttributeError):  # blocks share code, one version per shape and mode
        torch._dynamo.config.recompile_limit = 64
    for block in model.blocks():
        block.compile(dynamic=False)
    return True
