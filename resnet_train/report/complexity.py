"""Parameters and multiply-adds of the nets of tables 1 and 6, with VGG beside them. Needs torch once it is called."""

from __future__ import annotations

from resnet_train import paper
from resnet_train.report.tables import Cell, Table


def complexity_table() -> Table:
    """The table, counted on nets without weights in memory. Multiply-adds are of one image."""
    import torch
    from torchvision.models import vgg16, vgg19

    from resnet_train.models import cifar_resnet, imagenet_resnet
    from resnet_train.models.resnet import multiply_adds, parameters

    header = ["net", "image", "layers", "parameters", "paper: parameters", "multiply-adds", "paper: multiply-adds"]
    table = Table("complexity", "Parameters and multiply-adds", header)

    def add(name: str, net: torch.nn.Module, size: int, layers: int, published: float | None) -> int:
        count = multiply_adds(net, size)
        adds = paper.MULTIPLY_ADDS.get(name)
        row: list[Cell] = [name, f"{size}x{size}", layers, parameters(net)]
        row += [f"{published / 1e6:.2f} M" if published else None, count, f"{adds / 1e9:.1f} billion" if adds else None]
        table.rows.append(row)
        return count

    with torch.device("meta"):
        deep = 0
        nets = [(18, "none"), (18, "A"), (18, "B"), (34, "none"), (34, "A"), (34, "B"), (34, "C")]
        for depth, shortcut in [*nets, (50, "B"), (101, "B"), (152, "B")]:
            deep = add(_name(depth, shortcut), imagenet_resnet(depth, shortcut), 224, depth, None)
        add("vgg-16", vgg16(), 224, 16, None)
        vgg = add("vgg-19", vgg19(), 224, 19, None)
        for depth in (20, 32, 44, 56):
            add(f"plain-{depth}", cifar_resnet(depth, "none"), 32, depth, paper.PARAMETERS[depth])
        for depth, published in paper.PARAMETERS.items():
            add(f"resnet-{depth}-A", cifar_resnet(depth, "A"), 32, depth, published)
    table.notes = [
        f"152 layers are {152 / 19:.0f} times the depth of VGG-19, with {deep / 1e9:.1f} against {vgg / 1e9:.1f}"
        f" billion multiply-adds: {100 * deep / vgg:.0f} %.",
        "Convolutions and classifiers; the paper's figures are rounded, and of VGG-16 without the classifiers.",
        "VGG: torchvision's, with biases.",
    ]
    return table


def _name(depth: int, shortcut: str) -> str:
    return f"plain-{depth}" if shortcut == "none" else f"resnet-{depth}-{shortcut}"
