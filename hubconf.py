"""For torch.hub: the networks of the paper, and nets that were trained here, from a file.

torch.hub.load("PATH/OF/resnet-train", "cifar_resnet", 20, source="local")
"""

from resnet_train import cifar_resnet, imagenet_resnet, load

dependencies = ["torch", "torchvision", "hydra", "omegaconf", "numpy", "PIL", "simplejpeg"]
__all__ = ["cifar_resnet", "imagenet_resnet", "load"]
