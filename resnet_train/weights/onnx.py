"""Networks as ONNX, from pixels to logits."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from resnet_train.errors import RunError, UserError
from resnet_train.models.resnet import ResNet
from resnet_train.weights import state_dicts

TOLERANCE = 1e-4  # of ONNX logits, in absolute terms and relative to the largest


class _FromPixels(nn.Module):
    """A net for images (N, 3, H, W) in 0 to 1, which subtracts the mean, (3, 1, 1) or (3, H, W)."""

    mean: Tensor

    def __init__(self, net: ResNet, mean: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", mean)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images - self.mean)


def to_onnx(net: ResNet, mean: Tensor, std: Sequence[float], size: int) -> tuple[float, bytes]:
    """Export to ONNX with a dynamic batch size; returns the largest error of its logits, and the file's content.

    Raises UserError and RunError.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch's exporter needs it)
    except ImportError as error:
        raise UserError(f"format=onnx: needs {error.name}: pip install 'resnet-train[onnx]'") from error
    net.load_state_dict(state_dicts.rescaled(net.state_dict(), std, state_dicts.UNDIVIDED))
    channels_first = mean.view(3, 1, 1) if mean.ndim == 1 else mean.permute(2, 0, 1)
    model = _FromPixels(net, channels_first).float().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from inside the exporter
        program = torch.onnx.export(
            model,
            (torch.rand(2, 3, size, size),),
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )
    assert program is not None
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    difference = 0.0
    for count in (1, 3):
        images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            expected = model(images).numpy()
        logits = session.run(None, {"images": images.numpy()})[0]
        difference = max(difference, float(np.abs(logits - expected).max()))
        if not difference <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
            raise RunError(f"the ONNX file's logits differ by {difference:.2g} from PyTorch's; it is not written")
    return difference, content
