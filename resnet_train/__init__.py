"""Train and evaluate the networks of "Deep Residual Learning for Image Recognition" (He et al. 2015).

From Python: `cifar_resnet` and `imagenet_resnet` build the paper's networks, `load` opens a trained one. torch is
imported at the first access to one of them, not with this package.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resnet_train.classification.predict import Classifier, load
    from resnet_train.models.resnet import cifar_resnet, imagenet_resnet

__version__ = "0.2.0"
__all__ = ["Classifier", "__version__", "cifar_resnet", "imagenet_resnet", "load"]

_MODULES = dict.fromkeys(("Classifier", "load"), "resnet_train.classification.predict")
_MODULES |= dict.fromkeys(("cifar_resnet", "imagenet_resnet"), "resnet_train.models.resnet")


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
