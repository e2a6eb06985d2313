"""Compiling a network."""

from __future__ import annotations

import contextlib
import logging
import warnings

import torch

from resnet_train.engine.distributed import is_main
from resnet_train.models.resnet import ResNet
from resnet_train.terminal import say

WHOLE = 110  # deeper nets are compiled block by block: compiling the whole takes time in proportion to its depth


def compile_network(model: ResNet, depth: int, device: torch.device) -> bool:
    """Compile in place, the whole net or block by block; False where there is no compiler.

    Block by block above 110 layers, and where activations are computed again, which is done between blocks.

    Shapes are fixed: the same batch gives the same kernels, in training and in every later evaluation.
    """
    if device.type == "cpu":  # where it is of no use that there is a CUDA toolkit and no GPU
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # its advice; fp32 means fp32 here
    try:
        torch.compile(torch.neg, dynamic=False)(torch.zeros(8, device=device))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        if is_main():
            say(f"compile=true: there is no working compiler ({reason}); continuing without, slower")
        return False
    if depth <= WHOLE and not model.recompute:
        model.compile(dynamic=False)
        return True
    with contextlib.suppress(AttributeError):  # one kernel set for each shape and mode, however many blocks share it
        torch._dynamo.config.recompile_limit = 64
    for block in model.blocks():
        block.compile(dynamic=False)
    return True
