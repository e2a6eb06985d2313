"""The networks against the paper, against torchvision, and against their own definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from resnet_train.engine.compute import compute_logits
from resnet_train.models import cifar_resnet, imagenet_resnet
from resnet_train.models.batchnorm import update_statistics
from resnet_train.models.resnet import BasicBlock, Bottleneck, BottleneckV1, PaddedIdentity, multiply_adds, parameters

SHORTCUTS = ("A", "B", "C", "none")
MEGA = {20: (0.27, 2), 32: (0.46, 2), 44: (0.66, 2), 56: (0.85, 2), 110: (1.7, 1), 1202: (19.4, 1)}  # table 6
MULTIPLY_ADDS = {18: 1.8e9, 34: 3.6e9, 50: 3.8e9, 101: 7.6e9, 152: 11.3e9}  # table 1
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}  # table 1


def on_meta(make, *args, **kwargs):
    """A net without storage: shapes only, made in no time."""
    with torch.device("meta"):
        return make(*args, **kwargs)


def blocks_of(net):
    return [m for m in net.modules() if isinstance(m, (BasicBlock, Bottleneck))]


def shapes(net):
    return {name: tuple(value.shape) for name, value in net.state_dict().items()}


def watched(net, modules, images):
    """(input, output) of each of `modules` in one forward pass."""
    seen = []
    hooks = [m.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output))) for m in modules]
    with torch.no_grad():
        net(images)
    for hook in hooks:
        hook.remove()
    return seen


# --- Sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "shortcut", "count"),
    [
        (20, "A", 269_722),
        (32, "A", 464_154),
        (44, "A", 658_586),
        (56, "A", 853_018),
        (56, "none", 853_018),
        (56, "B", 855_770),
        (110, "A", 1_727_962),
        (110, "B", 1_730_714),
        (1202, "A", 19_421_274),
    ],
)
def test_cifar_parameters(depth, shortcut, count):
    assert parameters(on_meta(cifar_resnet, depth, shortcut)) == count


@pytest.mark.parametrize("depth", MEGA)
def test_cifar_parameters_are_those_of_table_6(depth):
    mega, digits = MEGA[depth]
    assert round(parameters(on_meta(cifar_resnet, depth, "A")) / 1e6, digits) == mega


@pytest.mark.parametrize(
    ("make", "depth"),
    [(cifar_resnet, depth) for depth in MEGA if depth != 1202] + [(imagenet_resnet, 18), (imagenet_resnet, 34)],
)
def test_plain_and_option_a_have_the_same_parameters(make, depth):
    plain, residual = on_meta(make, depth, "none"), on_meta(make, depth, "A")
    assert parameters(plain) == parameters(residual)
    assert shapes(plain) == shapes(residual)


@pytest.mark.parametrize("depth", MULTIPLY_ADDS)
def test_multiply_adds_are_those_of_table_1(depth):
    assert multiply_adds(on_meta(imagenet_resnet, depth, "B"), 224) == pytest.approx(MULTIPLY_ADDS[depth], rel=0.02)


def test_multiply_adds_of_the_plain_34_layer_net():
    """Figure 3: 3.6 billion, the same as with option A, which computes nothing."""
    plain, option_a = (multiply_adds(on_meta(imagenet_resnet, 34, shortcut), 224) for shortcut in ("none", "A"))
    assert plain == option_a == pytest.approx(3.6e9, rel=0.02)


def test_multiply_adds_by_hand():
    """The 8-layer plain net on 32x32: its eight layers, written out."""
    first, same = 3 * 16 * 9 * 32**2, 2 * 16 * 16 * 9 * 32**2
    second = (16 * 32 + 32 * 32) * 9 * 16**2
    third = (32 * 64 + 64 * 64) * 9 * 8**2
    assert multiply_adds(on_meta(cifar_resnet, 8, "none"), 32) == first + same + second + third + 64 * 10


def test_multiply_adds_leave_the_net_as_it_was():
    net = cifar_resnet(8).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    multiply_adds(net, 32)
    assert net.training
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("n", [1, 3, 18])
def test_cifar_depth_is_the_number_of_weighted_layers(n):
    layers = [m for m in on_meta(cifar_resnet, 6 * n + 2, "A").modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(layers) == 6 * n + 2


@pytest.mark.parametrize("depth", BLOCKS)
def test_imagenet_depth_is_the_number_of_weighted_layers(depth):
    net = on_meta(imagenet_resnet, depth, "A")
    assert sum(isinstance(m, (nn.Conv2d, nn.Linear)) for m in net.modules()) == depth
    assert tuple(len(getattr(net, stage)) for stage in net.stages) == BLOCKS[depth]


@pytest.mark.parametrize("depth", [-4, 0, 2, 7, 18, 21, 51, 1200])
def test_bad_cifar_depth(depth):
    with pytest.raises(ValueError, match="6n\\+2"):
        cifar_resnet(depth)


@pytest.mark.parametrize("depth", [0, 20, 33, 56, 110])
def test_bad_imagenet_depth(depth):
    with pytest.raises(ValueError, match="one of"):
        imagenet_resnet(depth)


@pytest.mark.parametrize("make", [lambda: cifar_resnet(8, "D"), lambda: imagenet_resnet(18, "a")])
def test_bad_shortcut(make):
    with pytest.raises(ValueError, match="shortcut"):
        make()


def test_bad_init():
    with pytest.raises(ValueError, match="fan_avg"):
        cifar_resnet(8, init="fan_avg")


# --- Where the image is halved ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_cifar_feature_maps(shortcut):
    net = on_meta(cifar_resnet, 20, shortcut)
    found = [tuple(out.shape) for _, out in watched(net, blocks_of(net), torch.empty(2, 3, 32, 32, device="meta"))]
    assert found == 3 * [(2, 16, 32, 32)] + 3 * [(2, 32, 16, 16)] + 3 * [(2, 64, 8, 8)]


@pytest.mark.parametrize("stride", ["1x1", "3x3"])
@pytest.mark.parametrize(("depth", "width"), [(18, 64), (34, 64), (50, 256), (101, 256), (152, 256)])
def test_imagenet_feature_maps(depth, width, stride):
    net = on_meta(imagenet_resnet, depth, bottleneck_stride=stride)
    points = [net.conv1, net.maxpool, *blocks_of(net), net.avgpool, net.fc]
    found = [tuple(out.shape) for _, out in watched(net, points, torch.empty(2, 3, 224, 224, device="meta"))]
    stages = [
        (2, width * 2**stage, 56 // 2**stage, 56 // 2**stage)
        for stage, count in enumerate(BLOCKS[depth])
        for _ in range(count)
    ]
    assert found == [(2, 64, 112, 112), (2, 64, 56, 56), *stages, (2, width * 8, 1, 1), (2, 1000)]


@pytest.mark.parametrize("depth", [50, 101, 152])
@pytest.mark.parametrize(
    ("where", "kind", "halving"), [("1x1", BottleneckV1, (2, 1, 1)), ("3x3", Bottleneck, (1, 2, 1))]
)
def test_bottleneck_stride(depth, where, kind, halving):
    net = on_meta(imagenet_resnet, depth, bottleneck_stride=where)
    for stage in net.stages:
        for index, block in enumerate(getattr(net, stage)):
            assert type(block) is kind
            convs = (block.conv1, block.conv2, block.conv3)
            assert [conv.kernel_size for conv in convs] == [(1, 1), (3, 3), (1, 1)]
            expected = halving if stage != "layer1" and index == 0 else (1, 1, 1)
            assert [conv.stride for conv in convs] == [(s, s) for s in expected]


def test_the_papers_stride_is_the_default():
    assert all(type(block) is BottleneckV1 for block in blocks_of(on_meta(imagenet_resnet, 50)))


# --- Shortcuts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1)])
@pytest.mark.parametrize(("stride", "extra"), [(2, 3), (1, 3), (2, 0)])
def test_option_a_shortcut(stride, extra, size):
    x = torch.randn(2, 5, *size)
    out = PaddedIdentity(stride, extra)(x)
    picked = x[:, :, ::stride, ::stride]
    assert out.shape == (2, 5 + extra, *picked.shape[2:])
    assert torch.equal(out[:, :5], picked)
    assert not out[:, 5:].any()


@pytest.mark.parametrize(
    ("make", "depth", "count"), [(cifar_resnet, 8, 2), (imagenet_resnet, 18, 3), (imagenet_resnet, 50, 4)]
)
def test_option_a_in_place(make, depth, count):
    """Each shortcut of a net: every second pixel, then zero channels up to the block's width; no parameters."""
    net, found = make(depth, "A"), 0
    for block in blocks_of(net):
        width = (block.conv3 if isinstance(block, Bottleneck) else block.conv2).out_channels
        x = torch.randn(2, block.conv1.in_channels, 6, 6)
        stride = 2 if 2 in (block.conv1.stride[0], block.conv2.stride[0]) else 1
        if block.downsample is None:
            assert (stride, width) == (1, x.shape[1])
            continue
        found += 1
        zeros = torch.zeros(2, width - x.shape[1], 6 // stride, 6 // stride)
        assert torch.equal(block.downsample(x), torch.cat([x[:, :, ::stride, ::stride], zeros], dim=1))
        assert parameters(block.downsample) == 0
    assert found == count


NETS = [(cifar_resnet, 20), (imagenet_resnet, 18), (imagenet_resnet, 50)]


@pytest.mark.parametrize(("make", "depth"), NETS)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
def test_which_blocks_project(make, depth, shortcut):
    """B where the dimensions change, C in every block, A and none nowhere; a projection is a 1x1 and batch norm."""
    for block in blocks_of(on_meta(make, depth, shortcut)):
        width = (block.conv3 if isinstance(block, Bottleneck) else block.conv2).out_channels
        stride = block.conv1.stride[0] * block.conv2.stride[0]
        changes = stride == 2 or width != block.conv1.in_channels
        projects = shortcut == "C" or (shortcut == "B" and changes)
        assert isinstance(block.downsample, nn.Sequential) == projects
        assert (block.downsample is None) == (not projects and not (shortcut == "A" and changes))
        if projects:
            conv, norm = block.downsample
            assert isinstance(norm, nn.BatchNorm2d)
            assert (conv.in_channels, conv.out_channels) == (block.conv1.in_channels, width)
            assert (conv.kernel_size, conv.stride, conv.bias) == ((1, 1), (stride, stride), None)


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize(("make", "depth", "size"), [(cifar_resnet, 8, 32), (imagenet_resnet, 50, 64)])
def test_a_block_adds_its_shortcut_before_the_last_relu(make, depth, size, shortcut):
    """Each block again, from its layers; a plain net's blocks add nothing."""
    torch.manual_seed(0)
    net = make(depth, shortcut).eval()
    blocks = blocks_of(net)
    seen = watched(net, blocks, torch.randn(2, 3, size, size))
    assert len(seen) == len(blocks)
    for block, (x, out) in zip(blocks, seen, strict=True):
        with torch.no_grad():
            if isinstance(block, Bottleneck):
                y = block.bn3(block.conv3(F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))))))
            else:
                y = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
            way = 0 if shortcut == "none" else x if block.downsample is None else block.downsample(x)
            torch.testing.assert_close(out, F.relu(y + way))
            assert shortcut == "none" or not torch.equal(out, F.relu(y))


# --- Against torchvision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", BLOCKS)
def test_torchvision_gives_the_same_logits(depth):
    """Option B with the stride in the 3x3, all weights and statistics random; evaluation, then training mode."""
    torch.manual_seed(depth)
    theirs = getattr(torchvision.models, f"resnet{depth}")(weights=None)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    ours = on_meta(imagenet_resnet, depth, "B", bottleneck_stride="3x3").to_empty(device="cpu")
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)

    images = torch.randn(3, 3, 64, 64)
    for mode in (False, True):
        with torch.no_grad():
            expected, found = theirs.train(mode)(images), ours.train(mode)(images)
        assert expected.isfinite().all()
        assert expected.std() > 0
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())
    update_statistics(ours, 1)  # counts the training pass, which moved the statistics alike
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())


# --- Initialisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["fan_out", "fan_in"])
@pytest.mark.parametrize(("make", "depth"), [(cifar_resnet, 56), (imagenet_resnet, 50)])
def test_he_initialisation(make, depth, init):
    """std sqrt(2 / fan) in every convolution, projections too, to five standard errors; mean zero; normal."""
    torch.manual_seed(0)
    convs = [m for m in make(depth, "C", init=init).modules() if isinstance(m, nn.Conv2d)]
    whole = []
    for conv in convs:
        fan = conv.kernel_size[0] ** 2 * (conv.out_channels if init == "fan_out" else conv.in_channels)
        unit = conv.weight.detach().flatten() / math.sqrt(2 / fan)
        assert unit.std().item() == pytest.approx(1, abs=5 / math.sqrt(2 * len(unit)))
        assert unit.mean().item() == pytest.approx(0, abs=5 / math.sqrt(len(unit)))
        whole.append(unit)
    unit = torch.cat(whole)
    assert unit.std().item() == pytest.approx(1, abs=0.01)
    assert (unit.abs() > 2).float().mean().item() == pytest.approx(0.0455, abs=0.003)


def test_fan_in_is_the_default():
    """The first layer tells: its fans are 27 and 144."""
    torch.manual_seed(0)
    assert cifar_resnet(8).conv1.weight.std().item() == pytest.approx(math.sqrt(2 / 27), rel=0.2)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_whole_net_compiles_into_one_graph(precision):
    """Each break costs a launch of a graph of its own, and a compilation for each block of a net in one process."""
    net = torch.compile(cifar_resnet(8), backend="eager", fullgraph=True)
    logits = compute_logits(net, torch.randn(2, 3, 32, 32), precision)
    assert logits.shape == (2, 10)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("precision", ["bf16", "fp32", "fp64"])
def test_logits_are_not_rounded_to_bf16(precision):
    """Rounded logits tie, and then topk decides which answers are wrong."""
    torch.manual_seed(0)
    net = cifar_resnet(8).double() if precision == "fp64" else cifar_resnet(8)
    logits = compute_logits(net.eval(), torch.randn(64, 3, 32, 32), precision)
    assert logits.dtype == (torch.float64 if precision == "fp64" else torch.float32)
    assert (logits.bfloat16().to(logits.dtype) == logits).float().mean() < 0.1
    assert cifar_resnet(8, init="fan_in").conv1.weight.std().item() == pytest.approx(math.sqrt(2 / 27), rel=0.2)


@pytest.mark.parametrize(("make", "depth"), [(cifar_resnet, 20), (imagenet_resnet, 18)])
def test_the_rest_of_the_initialisation(make, depth):
    """Classifier: PyTorch's weights, bias zero. Batch norm: the identity. No convolution has a bias."""
    net = make(depth, "B")
    assert not net.fc.bias.any()
    bound = 1 / math.sqrt(net.fc.in_features)
    assert 0.95 * bound < net.fc.weight.abs().max() <= bound
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert not module.bias.any()
        assert not isinstance(module, nn.Conv2d) or module.bias is None


@pytest.mark.parametrize("shortcut", ["A", "B", "C"])
@pytest.mark.parametrize(("make", "depth", "size"), [(cifar_resnet, 20, 32), (imagenet_resnet, 50, 64)])
def test_zero_gamma_starts_each_block_as_its_shortcut(make, depth, size, shortcut):
    torch.manual_seed(0)
    net = make(depth, shortcut, zero_gamma=True).eval()
    blocks = blocks_of(net)
    seen = watched(net, blocks, torch.randn(2, 3, size, size))
    assert len(seen) == len(blocks)
    for block, (x, out) in zip(blocks, seen, strict=True):
        with torch.no_grad():
            expected = F.relu(x if block.downsample is None else block.downsample(x))
        assert torch.equal(out, expected)
        assert out.any()


@pytest.mark.parametrize(("make", "depth", "last"), [(cifar_resnet, 20, "bn2"), (imagenet_resnet, 50, "bn3")])
def test_zero_gamma_is_that_of_the_last_norm_of_each_block_alone(make, depth, last):
    """Also where an earlier one would give the same at the start."""
    net = make(depth, "C", zero_gamma=True)
    zero = {name for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.weight.any()}
    blocks = [name for name, m in net.named_modules() if isinstance(m, (BasicBlock, Bottleneck))]
    assert zero == {f"{name}.{last}" for name in blocks}
    assert all((m.weight == 1).all() for n, m in net.named_modules() if isinstance(m, nn.BatchNorm2d) and n not in zero)


# --- Gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_gradients_reach_the_first_of_1202_layers():
    torch.manual_seed(0)
    net = cifar_resnet(1202, "A")
    F.cross_entropy(net(torch.randn(2, 3, 32, 32)), torch.tensor([3, 7])).backward()
    gradient = net.conv1.weight.grad
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize(("make", "depth", "size"), [(cifar_resnet, 14, 32), (imagenet_resnet, 50, 64)])
def test_every_parameter_has_a_gradient(make, depth, size, shortcut):
    torch.manual_seed(0)
    net = make(depth, shortcut, num_classes=7)
    F.cross_entropy(net(torch.randn(3, 3, size, size)), torch.tensor([3, 6, 0])).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
