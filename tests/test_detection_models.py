"""The arrangement of appendix A: what is shared, what is computed on each region, what stays as it is."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import vgg16

from resnet_train.detection.models import Frame, Pool, resnet_detector, vgg_detector
from resnet_train.models import cifar_resnet, imagenet_resnet
from resnet_train.models.resnet import parameters

FRAME = Frame([16, 32, 64], 20, 8, 96, 128, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
LEVELS = Frame([16, 32, 64, 128, 256], 20, 8, 96, 128, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    net = imagenet_resnet(18)
    for module in net.modules():  # statistics as pre-training leaves them: not zero and one
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return net


def detector(net, frame=FRAME, **options):
    return resnet_detector(copy.deepcopy(net), 3, frame, **options)


def batch():
    torch.manual_seed(1)
    images = [torch.rand(3, 90, 120), torch.rand(3, 100, 80)]
    boxes = torch.tensor([[10.0, 10, 60, 70], [50, 20, 110, 80]])
    full = {"boxes": boxes, "labels": torch.tensor([1, 3])}
    return images, [full, {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}]


def rpn(channels, anchors):
    """The parameters of a region proposal network: a 3x3 layer, an objectness and four numbers for each anchor."""
    return channels * channels * 9 + channels + 5 * (channels * anchors + anchors)


def predictor(width, classes):
    """The parameters of class and box: of the background, too."""
    return 5 * (width + 1) * (classes + 1)


@pytest.mark.parametrize(
    ("depth", "channels", "width", "net"), [(18, 256, 512, 11_689_512), (101, 1024, 2048, 44_549_160)]
)
def test_a_resnet_detector_is_the_net_without_its_classifier_and_what_torchvision_adds(depth, channels, width, net):
    """`net`: the parameters of the net with 1,000 classes (torchvision's documentation)."""
    with torch.device("meta"):
        found = parameters(resnet_detector(imagenet_resnet(depth), 20, FRAME))
    assert found == net - (width + 1) * 1000 + rpn(channels, 9) + predictor(width, 20)


def test_the_vgg_detector_is_vgg16_without_its_last_layer_and_what_torchvision_adds():
    with torch.device("meta"):
        found = parameters(vgg_detector(20, FRAME))
    assert found == 138_357_544 - 4097 * 1000 + rpn(512, 9) + predictor(4096, 20)


def test_one_region_that_is_the_whole_image_gives_what_the_net_hands_its_classifier(resnet):
    """conv1 to conv4_x, then conv5_x and the average: nothing is lost or done twice at the seam."""
    found = detector(resnet).eval()
    images = torch.rand(2, 3, 224, 224)
    features = []
    handle = resnet.fc.register_forward_hook(lambda _, inputs, __: features.append(inputs[0]))
    with torch.no_grad():
        resnet.eval()(images)
        shared = found.backbone(images)
        torch.testing.assert_close(found.roi_heads.box_head(shared), features[0], rtol=0, atol=0)
        assert shared.shape == (2, 256, 14, 14)
    handle.remove()


def test_vgg_likewise():
    torch.manual_seed(0)
    net, found = vgg16(weights=None).eval(), vgg_detector(3, FRAME).eval()
    found.backbone.load_state_dict(found.backbone.state_dict() | pick(net, found.backbone))
    found.roi_heads.box_head.load_state_dict(pick(net, found.roi_heads.box_head))
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        shared = found.backbone(images)
        assert shared.shape == (1, 512, 14, 14)
        pooled = nn.functional.max_pool2d(shared, 2)  # the pooling that RoI pooling replaces
        torch.testing.assert_close(net.classifier[-1](found.roi_heads.box_head(pooled)), net(images))


def pick(net, part):
    return {name: net.state_dict()[name] for name in part.state_dict()}


def test_roi_pooling_by_hand():
    """Fast R-CNN: coordinates are rounded to cells of 16 pixels, ends included; each bin gives its largest value."""
    maps = torch.arange(16.0).view(1, 1, 4, 4)  # rows 0 1 2 3, 4 5 6 7, 8 9 10 11, 12 13 14 15
    found = Pool(2, 1 / 16)({"0": maps}, [torch.tensor([[0.0, 0, 48, 48], [15, 17, 33, 49]])], [(64, 64)])
    assert found[0, 0].tolist() == [[5, 7], [13, 15]]
    # 15/16 -> 1, 33/16 -> 2, 17/16 -> 1, 49/16 -> 3: columns 1 and 2, rows 1 to 3, the second of which is in both bins
    assert found[1, 0].tolist() == [[9, 10], [13, 14]]


def test_a_detector_cuts_regions_at_the_stride_of_its_map(resnet):
    """A region of 14 x 14 cells of 16 pixels: ResNet's 14 x 14 bins are the cells, VGG's 7 x 7 the largest of four."""
    torch.manual_seed(0)
    with torch.device("meta"):
        vgg = vgg_detector(3, FRAME)
    for found, bins in ((detector(resnet), 14), (vgg, 7)):
        maps, place = torch.rand(1, 2, 20, 20), 16.0 * torch.tensor([[3, 4, 16, 17]])  # ends included
        pooled = found.roi_heads.box_roi_pool({"0": maps}, [place], [(320, 320)])
        wanted = nn.functional.max_pool2d(maps[:, :, 4:18, 3:17], 14 // bins)
        torch.testing.assert_close(pooled, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(("frame", "pyramid"), [(FRAME, False), (LEVELS, True)])
def test_images_with_and_without_objects_give_finite_losses_and_boxes_inside(resnet, frame, pyramid):
    found = detector(resnet, frame, pyramid=pyramid)
    images, targets = batch()
    losses = found(images, targets)
    assert all(loss.isfinite() for loss in losses.values())
    found.eval()
    with torch.no_grad():
        for image, result in zip(images, found(images), strict=True):
            height, width = image.shape[1:]
            assert (result["boxes"] >= 0).all()
            assert (result["boxes"] <= torch.tensor([width, height, width, height])).all()


def test_coordinates_are_computed_in_float32_where_the_net_is_in_bf16(resnet):
    found = detector(resnet)
    seen = {}

    def note(name):
        return lambda _, __, out: seen.setdefault(name, out)

    found.backbone.register_forward_hook(note("features"))
    found.rpn.head.register_forward_hook(note("proposals"))
    found.roi_heads.box_predictor.register_forward_hook(note("boxes"))
    found.rpn.anchor_generator.register_forward_hook(note("anchors"))
    layer = []
    found.backbone.layer3.register_forward_hook(lambda _, __, out: layer.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        found(*batch())
    assert layer == [torch.bfloat16]
    values = [seen["features"], *seen["proposals"][0], *seen["proposals"][1], *seen["boxes"], *seen["anchors"]]
    assert {value.dtype for value in values} == {torch.float32}


def moved(found, steps=20):
    """The entries of the state that change in some steps."""
    found.train()
    before = {name: value.clone() for name, value in found.state_dict().items()}
    trained = [p for p in found.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9, weight_decay=1e-4)
    for _ in range(steps):
        sum(found(*batch()).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = found.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}, set(after)


@pytest.mark.parametrize("last", [None, "conv1", "layer1", "layer2", "layer3"])
def test_frozen_stages_and_batch_norm_stay_bit_for_bit_and_all_else_moves(resnet, last):
    found = detector(resnet)
    found.freeze(last, norm=True)
    stages = {None: (), "conv1": ("conv1.",)}.get(last) or (
        () if last is None else ("conv1.", *(f"layer{n}." for n in range(1, int(last[-1]) + 1)))
    )
    changed, all_names = moved(found, steps=20 if last == "layer1" else 2)
    norms = {
        f"{name}.{key}"
        for name, module in found.named_modules()
        if isinstance(module, nn.BatchNorm2d)
        for key in module.state_dict()
    }
    frozen = {name for name in all_names if name.startswith(tuple(f"backbone.{stage}" for stage in stages))}
    assert norms
    assert changed == all_names - norms - frozen


def test_vgg_is_frozen_by_the_papers_names_of_its_stages():
    with torch.device("meta"):
        found = vgg_detector(3, FRAME)
    found.freeze("layer1", norm=True)
    frozen = {name for name, p in found.named_parameters() if not p.requires_grad}
    # conv1_1, conv1_2, conv2_1 and conv2_2
    assert frozen == {f"backbone.features.{n}.{kind}" for n in (0, 2, 5, 7) for kind in ("weight", "bias")}


def test_without_weights_batch_norm_is_trained(resnet):
    found = detector(resnet)
    found.freeze(None, norm=False)
    changed, all_names = moved(found, steps=2)
    assert changed == all_names


def test_cifar_nets_and_other_anchors_are_refused(resnet):
    with pytest.raises(ValueError, match="ImageNet net"):
        resnet_detector(cifar_resnet(8), 3, FRAME)
    with pytest.raises(ValueError, match="five levels"):
        detector(resnet, FRAME, pyramid=True)
