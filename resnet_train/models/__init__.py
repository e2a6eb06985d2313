"""Networks."""

from resnet_train.models.resnet import cifar_resnet, imagenet_resnet

__all__ = ["cifar_resnet", "imagenet_resnet"]
