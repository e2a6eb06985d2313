"""Compilation of networks."""

from __future__ import annotations

import contextlib
import logging
import warnings

import torch

from resnet_train.engine.distributed import is_main
from resnet_train.models.resnet import ResNet
from resnet_train.terminal import say

# The deepest nets that are compiled as a whole, which takes time in proportion to the depth. A step compiled block by
# block is slower on a CPU; in a CUDA graph, where calls cost nothing, it was slower with 20 layers and not with 110.
WHOLE = 110
WHOLE_CAPTURED = 56


def compiles_in_blocks(model: ResNet, depth: int, *, captured: bool = False) -> bool:
    """Whether a net is to be compiled block by block; `captured`: for steps that are one CUDA graph."""
    return model.recompute or depth > (WHOLE_CAPTURED if captured else WHOLE)


def compile_network(model: ResNet, device: torch.device, *, blocks: bool) -> bool:
    """Compile the net in place, as a whole or block by block; returns False if there is no compiler.

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
    if not blocks:
        model.compile(dynamic=False)
        return True
    with contextlib.suppress(AttributeError):  # blocks share code, one version per shape and mode
        torch._dynamo.config.recompile_limit = 64
    for block in model.blocks():
        block.compile(dynamic=False)
    return True
