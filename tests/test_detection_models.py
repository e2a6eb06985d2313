"""The arrangement of appendix A: what is shared, what is computed on each region, what stays as it is."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torchvision.models import vgg16

from resnet_train.detection.model import DetectorSettings, resnet_detector, vgg_detector
from resnet_train.detection.pooling import Pool
from resnet_train.models import cifar_resnet, imagenet_resnet
from resnet_train.models.batchnorm import update_statistics
from resnet_train.models.resnet import parameters

FRAME = DetectorSettings([16, 32, 64], 20, 8, 96, 128, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
LEVELS = DetectorSettings([16, 32, 64, 128, 256], 20, 8, 96, 128, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])


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


@pytest.mark.parametrize(
    "make", [lambda: resnet_detector(imagenet_resnet(18), 3, FRAME), lambda: vgg_detector(3, FRAME)]
)
def test_regions_are_pooled_at_the_stride_of_the_shared_layers(make):
    """A map as the layers give for 160x96 pixels, one of its cells lit: a region over that cell's pixels sees it."""
    with torch.device("meta"):
        found = make()
        shape = found.backbone(torch.empty(1, 3, 96, 160)).shape
    maps = torch.zeros(shape)
    maps[0, 0, 2, 7] = 1
    assert tuple(shape[2:]) == (6, 10)
    boxes = torch.tensor([[112.0, 32, 127, 47], [128, 48, 143, 63], [0, 0, 63, 63]])
    pooled = found.roi_heads.box_roi_pool(OrderedDict([("0", maps)]), [boxes], [(96, 160)])
    assert pooled[:, 0].amax((1, 2)).tolist() == [1, 0, 0]


# Which proposals and detections are left


def shifted(*lefts):
    """Boxes of 100x100 so far to the right: two that are s apart overlap by (100 - s) / (100 + s)."""
    return torch.tensor([[left, 0.0, left + 100, 100] for left in lefts])


def filtered(found, proposals, scores):
    """The proposals that the region proposal network hands on, of one image and one level, best first."""
    kept, _ = found.rpn.filter_proposals(proposals[None], scores[:, None], [(10_000, 10_000)], [len(proposals)])
    return kept[0]


def test_proposals_that_overlap_by_more_than_0_7_are_one(resnet):
    """0.709 goes, 0.695 stays (Ren et al. 2015, section 3.3)."""
    boxes = shifted(0, 17, 200, 218)
    kept = filtered(detector(resnet).eval(), boxes, torch.tensor([4.0, 3, 2, 1]))
    assert torch.equal(kept, boxes[[0, 2, 3]])


@pytest.mark.parametrize(("training", "before", "after"), [(True, 12_000, 2_000), (False, 6_000, 20)])
def test_so_many_proposals_are_looked_at_and_handed_on(training, before, after, resnet):
    """Faster R-CNN's 12,000 and 2,000 in training, 6,000 and the asked for in a test."""
    found = detector(resnet).train(training)
    apart = torch.arange(before + 2.0)[:, None] * torch.tensor([[0.5, 0, 0.5, 0]]) + torch.tensor([[0.0, 0, 0.4, 9]])
    scores = torch.linspace(5, -5, before + 2, dtype=torch.float64).float()
    assert len(scores.unique()) == before + 2
    assert torch.equal(filtered(found, apart, scores), apart[:after])
    one = torch.tensor([[0.0, 0, 50, 50]]).expand(before + 2, -1).clone()
    one[before - 1 :] = shifted(100, 300, 500)  # the last that is looked at, and two behind it
    assert torch.equal(filtered(found, one, scores), one[[0, before - 1]])


def test_detections_of_a_class_that_overlap_by_more_than_0_3_are_one(resnet):
    """0.316 goes, 0.282 stays; another class has nothing to do with it (Fast R-CNN)."""
    found = detector(resnet).eval()
    boxes = shifted(0, 52, 300, 356, 600, 652)
    logits = torch.full((6, 4), -9.0)
    for box, (label, value) in enumerate([(1, 9), (1, 8), (1, 7), (1, 6), (1, 5), (2, 4)]):
        logits[box, label] = value
    kept, scores, labels = found.roi_heads.postprocess_detections(logits, torch.zeros(6, 16), [boxes], [(1000, 1000)])
    assert torch.equal(kept[0], boxes[[0, 2, 3, 4, 5]])
    assert labels[0].tolist() == [1, 1, 1, 1, 2]
    assert scores[0].min() > 0.9


def test_so_many_regions_of_an_image_are_trained_on(resnet):
    """The asked for, a quarter of them on objects at the most."""
    found = detector(resnet).train()
    torch.manual_seed(0)
    proposals = [torch.cat([shifted(*range(40)), shifted(*range(500, 1500, 2))])]
    target = [{"boxes": shifted(10), "labels": torch.tensor([2])}]
    _, _, labels, _ = found.roi_heads.select_training_samples(proposals, target)
    assert labels[0].bincount().tolist() == [6, 0, 2]  # the 8 of FRAME


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


def test_regions_of_a_pyramid_are_cut_by_its_strides_whatever_image_comes_first(resnet):
    """torchvision guesses them from the first image that it sees; from one of 40 px they would be twice too large."""
    images = [torch.rand(3, 40, 60), torch.rand(3, 100, 80)]
    whole, found = detector(resnet, LEVELS, pyramid=True).eval(), []
    whole.transform.min_size, whole.transform.max_size = (40,), 128
    for order in (images, images[::-1]):
        net = copy.deepcopy(whole)
        with torch.no_grad():
            found.append({image.shape: net([image])[0]["boxes"] for image in order})
    assert list(net.roi_heads.box_roi_pool.scales) == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    for image in images:
        assert torch.equal(found[0][image.shape], found[1][image.shape])


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
        update_statistics(found, 1)
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
