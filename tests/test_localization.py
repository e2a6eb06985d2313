"""Localization, each part beside a reference that is written out here; whole runs are in test_localization_runs.py."""

import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import needs
from PIL import Image
from torchvision.ops import box_iou

from resnet_train.config.compose import compose
from resnet_train.config.localization import check_localize, check_localize_test
from resnet_train.data import crops
from resnet_train.detection.annotations import BAD_ANNOTATION, CUT, NO_AREA, NO_IMAGE, OTHER_SIZE, UNKNOWN, UNREADABLE
from resnet_train.engine.boxes import fault_lines
from resnet_train.errors import RunError, UserError
from resnet_train.localization.evaluate import evaluate
from resnet_train.localization.loader import Crops, Regions, sample, training_batches
from resnet_train.localization.model import CODERS, Localizer, anchors_of, loss_parts, warp
from resnet_train.localization.predict import (
    Predictor,
    best,
    dense_sides,
    is_right,
    locate,
    propose,
    rescore,
    score_anchors,
    views,
)
from resnet_train.localization.tree import NO_BOX, NO_CLASS, SAME_NAME, TOO_LONG, read_tree
from resnet_train.models import cifar_resnet, imagenet_resnet

needs("sklearn")
from digits_boxes import make_digits, thing, write  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Three digits as classes."""
    folder = tmp_path_factory.mktemp("localization") / "digits"
    make_digits(folder, train=30, test=9, classes=3, side=(60, 80))
    return folder


def localizer(pooled=False, classes=4, shapes=3, depth=8):
    """A localizer with scores that are far apart: at random all are as likely."""
    torch.manual_seed(0)
    net = cifar_resnet(depth) if depth == 8 else imagenet_resnet(depth)
    found = Localizer(net, classes, shapes, pooled=pooled, mean=[0.5, 0.4, 0.3], std=[1, 1, 1])
    for layer in (found.cls, found.reg):
        torch.nn.init.normal_(layer.weight, std=0.3)
        torch.nn.init.normal_(layer.bias)
    return found.eval()


def trained(crop=32, proposals=5, **options):
    return Predictor(localizer(**options), "fp32", crop, 4, [8], proposals)


# --- The net ---------------------------------------------------------------------------------------------------------


def test_of_all_outputs_of_the_two_layers_those_of_the_asked_classes_are_computed():
    model, images = localizer(), torch.randint(256, (2, 20, 24, 3), dtype=torch.uint8)
    labels = torch.tensor([[2, 0], [1, 1]])
    scores, moves = model(images, labels)
    features = model._features((images / 255 - torch.tensor([0.5, 0.4, 0.3])).permute(0, 3, 1, 2))
    every_score = F.conv2d(features, model.cls.weight, model.cls.bias).view(2, 4, 3, 5, 6)
    every_move = F.conv2d(features, model.reg.weight, model.reg.bias).view(2, 4, 3, 4, 5, 6)
    for n in range(2):
        for k in range(2):
            wanted = every_score[n, labels[n, k]].permute(1, 2, 0).flatten()
            assert torch.allclose(scores[n, k], wanted, atol=1e-4)
            wanted = every_move[n, labels[n, k]].permute(2, 3, 0, 1).reshape(-1, 4)
            assert torch.allclose(moves[n, k], wanted, atol=1e-4)


def test_rcnn_has_one_output_a_class_behind_the_pooling():
    model, images = localizer(pooled=True, shapes=1), torch.randint(256, (3, 16, 16, 3), dtype=torch.uint8)
    scores, moves = model(images, torch.tensor([[0], [3], [1]]))
    assert (scores.shape, moves.shape) == ((3, 1, 1), (3, 1, 1, 4))


def test_only_the_true_class_learns_and_batch_norm_stays():
    model = localizer().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores, moves = model(torch.randint(256, (2, 16, 16, 3), dtype=torch.uint8), torch.tensor([[1], [1]]))
    (scores.sum() + moves.sum()).backward()
    assert [bool(rows.any()) for rows in model.cls.weight.grad.view(4, -1)] == [False, True, False, False]
    assert [bool(rows.any()) for rows in model.reg.weight.grad.view(4, -1)] == [False, True, False, False]
    norms = {name for name in before if "bn" in name or "downsample.1" in name}
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in norms)
    assert all(p.grad is None for name, p in model.named_parameters() if name in norms)


@pytest.mark.parametrize(("depth", "stride"), [(8, 4), (18, 32)])
def test_anchors_are_as_many_and_in_the_order_of_the_outputs(depth, stride):
    model = localizer(depth=depth, shapes=6)
    scores, _ = model(torch.zeros(1, 72, 100, 3, dtype=torch.uint8), torch.tensor([[0]]))
    anchors = anchors_of([16, 32], (72, 100), stride)
    assert len(anchors) == scores.shape[2]
    centers, sides = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    across = math.ceil(100 / stride)
    wanted = [[n % across * stride, n // across * stride] for n in range(len(anchors) // 6)]
    assert centers[::6].tolist() == wanted
    assert torch.allclose(sides.prod(1).sqrt()[:6].sort().values, torch.tensor([16.0] * 3 + [32.0] * 3), atol=1)
    assert torch.equal(sides[:6], sides[6:12])


# --- What is learnt --------------------------------------------------------------------------------------------------


def test_the_loss_is_that_which_is_written_out():
    torch.manual_seed(1)
    scores, moves, wanted = torch.randn(2, 3), torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    valid = torch.tensor([[True, True, False], [True, True, True]])
    positive = torch.tensor([[True, False, False], [False, True, False]])
    by_class = by_box = 0.0
    for n in range(2):
        for p in range(3):
            if valid[n, p]:
                odds = 1 / (1 + math.exp(-scores[n, p]))
                by_class -= math.log(odds if positive[n, p] else 1 - odds)
            if positive[n, p]:
                for off in (moves[n, p] - wanted[n, p]).abs().tolist():
                    by_box += off - 0.5 / 9 if off >= 1 / 9 else 0.5 * off * off * 9
    found = loss_parts(scores, moves, {"valid": valid, "positive": positive, "moves": wanted})
    assert found.tolist() == pytest.approx([by_class / 6, by_box / 6], rel=1e-5)


def test_half_of_eight_anchors_are_positive():
    anchors, boxes = anchors_of([32], (64, 64), 4), torch.tensor([[20.0, 20, 52, 52], [2, 3, 33, 36]])
    overlap = box_iou(boxes, anchors)
    seen = set()
    for number in range(20):
        places, target = sample(boxes, anchors, torch.Generator().manual_seed(number))
        assert target["valid"].tolist() == [True] * 8
        assert target["positive"].tolist() == [True] * 4 + [False] * 4
        assert len(set(places.tolist())) == 8
        assert (overlap[:, places[4:]] < 0.3).all()
        nearest = overlap[:, places[:4]].max(0)
        best_of_box = overlap[nearest.indices].max(1).values
        assert ((nearest.values >= 0.7) | (nearest.values == best_of_box)).all()
        back = CODERS["rpn"].decode_single(target["moves"][:4], anchors[places[:4]])
        assert torch.allclose(back, boxes[nearest.indices], atol=1e-3)
        assert not target["moves"][4:].any()
        seen.add(tuple(places.tolist()))
    assert len(seen) == 20


@pytest.mark.parametrize(("boxes", "positive", "taken"), [([[1.0, 1, 9, 20]], 1, 2), ([], 0, 4)])
def test_negative_anchors_do_not_prevail(boxes, positive, taken):
    anchors = anchors_of([32], (64, 64), 32)
    _, target = sample(torch.tensor(boxes).view(-1, 4), anchors, torch.Generator().manual_seed(0))
    assert target["positive"].tolist() == [True] * positive + [False] * (8 - positive)
    assert target["valid"].tolist() == [True] * taken + [False] * (8 - taken)


def test_a_box_that_meets_no_anchor_makes_none_positive():
    anchors = torch.tensor([[0.0, 0, 8, 8], [16, 16, 24, 24], [32, 0, 40, 8]])
    _, target = sample(torch.tensor([[50.0, 50, 60, 60]]), anchors, torch.Generator().manual_seed(0))
    assert (int(target["positive"].sum()), int(target["valid"].sum())) == (0, 3)


def bright(image):
    """The box around what is bright in an image (H, W, 3)."""
    rows, columns = (torch.nonzero((image[..., 0] > 128).any(axis))[:, 0] for axis in (1, 0))
    return [float(columns[0]), float(rows[0]), float(columns[-1]) + 1, float(rows[-1]) + 1]


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    """One bright rectangle on black, for training and test."""
    folder = tmp_path_factory.mktemp("square")
    pixels = torch.zeros(90, 120)
    pixels[30:60, 40:80] = 255
    for part in ("train", "val"):
        write(folder, part, "1", "a", pixels.numpy(), thing(1, 40, 30, 79, 59))
    return folder


@pytest.mark.parametrize("flip", [False, True])
def test_a_crops_boxes_are_where_its_objects_are(square, flip):
    photos = read_tree(square, broken="stop").train
    kind = Crops(anchors_of([16, 24, 36], (64, 64), 4), 64, flip)
    seen = 0
    for number in range(30):
        item = kind.item(photos[0], 0, 0, torch.Generator().manual_seed(number))
        assert (item.image.shape, item.image.dtype, item.label) == ((64, 64, 3), torch.uint8, 0)
        chosen = item.places[item.target["positive"]]
        for box in CODERS["rpn"].decode_single(item.target["moves"][: len(chosen)], kind.anchors[chosen]):
            assert box.tolist() == pytest.approx(bright(item.image), abs=1.5)
            seen += 1
    assert seen > 60


@pytest.mark.parametrize("flip", [False, True])
def test_regions_are_cut_where_they_were_proposed(square, flip):
    photos = read_tree(square, broken="stop").train
    proposals = torch.tensor([[[30.0, 20, 90, 70], [0, 0, 30, 40], [math.nan] * 4]])
    kind = Regions(proposals, 32, flip)
    for place, which in ((0, 0), (1, 1)):  # of the box has the first 0.4, so that none is positive
        assert not kind.item(photos[0], 0, place, torch.Generator().manual_seed(0)).target["positive"].any(), which
    kind = Regions(torch.tensor([[[36.0, 26, 88, 64], [0, 0, 30, 40]]]), 32, flip)
    for number in range(6):
        found = [kind.item(photos[0], 0, place, torch.Generator().manual_seed(number)) for place in (0, 1)]
        assert [item.target["positive"].tolist() for item in found] == [[True], [False]]
        assert not (found[1].image > 128).any()
        region = torch.tensor([[36.0, 26, 88, 64]])
        box = CODERS["rcnn"].decode_single(found[0].target["moves"], region)[0]
        left, top, right, bottom = bright(found[0].image)
        scale = torch.tensor([52 / 32, 38 / 32] * 2)
        if box[0] > 41:  # mirrored: the region as well
            mirror = 120 - torch.tensor([88.0, 26, 36, 64])
            region = torch.tensor([[mirror[0], 26, mirror[2], 64]])
            box = CODERS["rcnn"].decode_single(found[0].target["moves"], region)[0]
        shown = torch.tensor([left, top, right, bottom]) * scale + region[0, [0, 1, 0, 1]]
        assert torch.allclose(shown, box, atol=2)


def test_batches_depend_on_seed_and_iteration_alone(digits):
    photos = read_tree(digits, broken="stop").train
    boxes = torch.stack([torch.tensor([[0.0, 0, 40, 40], [10, 10, 59, 59], [2, 30, 30, 58]])] * len(photos))
    for kind in (Crops(anchors_of([16], (32, 32), 4), 32, True), Regions(boxes, 16, True)):

        def batches(first, workers=0, rank=0, world=1, kind=kind):
            options = {"seed": 3, "batch_size": 4, "workers": workers, "device": CPU, "rank": rank, "world": world}
            found = training_batches(photos, kind, iterations=range(first, 4), skip=False, **options)
            return [[b.images, b.labels, b.places, *b.target.values()] for b in found]

        def same(some, others):
            return all(torch.equal(a, b) for x, y in zip(some, others, strict=True) for a, b in zip(x, y, strict=True))

        whole = batches(0)
        assert same(batches(2), whole[2:])
        assert same(batches(0, workers=1), whole)
        dealt = [
            [torch.stack([a, b], 1).flatten(0, 1) for a, b in zip(one, other, strict=True)]
            for one, other in zip(batches(0, rank=0, world=2), batches(0, rank=1, world=2), strict=True)
        ]
        assert same(dealt, whole)
        assert not torch.equal(whole[0][0], whole[1][0])


# --- What is found ---------------------------------------------------------------------------------------------------


def test_the_center_is_that_of_classification_and_leads_back_to_the_image():
    image = torch.zeros(3, 61, 97, dtype=torch.uint8)
    image[:, 20:40, 35:65] = 255
    (view,) = views(image, 48, None)
    assert torch.equal(view.pixels, crops.center_view(image, 48).permute(1, 2, 0))
    box = torch.tensor(bright(view.pixels)) * view.scale + view.offset
    assert torch.allclose(box, torch.tensor([35.0, 20, 65, 40]), atol=1.5)
    (view,) = views(image, 48, [48])
    assert view.pixels.shape == (48, int(48 * 97 / 61), 3)
    assert torch.allclose(torch.tensor(bright(view.pixels)) * view.scale, torch.tensor([35.0, 20, 65, 40]), atol=1.5)


def test_a_dense_test_of_one_crops_size_is_that_of_the_center():
    image, rpn = torch.randint(256, (3, 60, 90), dtype=torch.uint8), trained()
    (view,), labels = views(image, rpn.crop, None), torch.tensor([0, 2])
    alone = view.pixels.permute(2, 0, 1).contiguous()
    boxes, scores = score_anchors(rpn, image, labels, None)
    dense, likely = score_anchors(rpn, alone, labels, [rpn.crop])
    assert torch.equal(scores, likely)
    inside = ((dense > 0) & (dense < rpn.crop)).all(2)  # the rest is cut at the edges of another image
    assert inside.any()
    assert torch.allclose((dense * view.scale + view.offset)[inside], boxes[inside], atol=1e-4)


def test_several_scales_are_looked_at_together_and_the_likeliest_box_is_the_answer():
    image, rpn, labels = torch.randint(256, (3, 40, 50), dtype=torch.uint8), trained(), torch.tensor([1, 3])
    boxes, scores = score_anchors(rpn, image, labels, [32, 40])
    parts = [score_anchors(rpn, image, labels, [side]) for side in (32, 40)]
    assert torch.equal(boxes, torch.cat([part[0] for part in parts], 1))
    assert torch.equal(locate(rpn, None, image, labels, [32, 40]), best(boxes, scores))
    assert torch.equal(best(boxes, scores)[1], boxes[1][scores[1].argmax()])
    assert dense_sides(224, None) == [224, 256, 384, 480, 640]
    assert dense_sides(224, [100]) == [100]


def test_proposals_are_the_likeliest_that_do_not_overlap():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 0, 10, 10], [20, 20, 30, 30], [5, 5, 5.5, 30], [0, 0, 3, 3]])
    scores = torch.tensor([0.5, 0.9, 0.7, 1.0, 0.1])
    assert torch.equal(propose(boxes, scores, 5, (40, 50)), boxes[[1, 2, 4]])  # narrower than a pixel; overlap of 0.9
    assert torch.equal(propose(boxes, scores, 1, (40, 50)), boxes[[1]])
    assert propose(boxes[3:4], scores[3:4], 5, (40, 50)).tolist() == [[0, 0, 50, 40]]


def test_rcnn_moves_the_rpns_proposals_and_takes_the_likeliest():
    image, rpn, rcnn = torch.randint(256, (3, 50, 60), dtype=torch.uint8), trained(), trained(pooled=True, shapes=1)
    labels = torch.tensor([3, 1])
    boxes, scores = score_anchors(rpn, image, labels, None)
    found = locate(rpn, rcnn, image, labels)
    for row, label in enumerate(labels):
        regions = propose(boxes[row], scores[row], 5, (50, 60))
        moved, again = rescore(rcnn, image, regions, label)
        assert len(regions) == len(moved) == 5
        alone = [rcnn.model(warp(image, region[None], 32), label.view(1, 1)) for region in regions]
        assert torch.allclose(again, torch.cat([one[0].flatten() for one in alone]), atol=1e-4)
        assert torch.equal(found[row], moved[again.argmax()])


def test_a_warped_region_is_what_is_inside_it():
    image = torch.arange(40, dtype=torch.uint8).repeat(3, 30, 1)  # as bright as a column's number
    half = warp(image, torch.tensor([[10.0, 5, 26, 21]]), 8)
    assert half[0, 0, :, 0].tolist() == pytest.approx([10.5 + 2 * n for n in range(8)], abs=0.6)


@pytest.mark.parametrize(
    ("answers", "right"),
    [
        ([(4, [0, 0, 10, 10])], True),
        ([(4, [0, 0, 10, 5])], True),  # half
        ([(4, [0, 0, 10, 4.9])], False),
        ([(3, [0, 0, 10, 10])], False),  # the place of another class
        ([(3, [0, 0, 10, 10]), (4, [50, 50, 60, 60])], False),  # each is half right
        ([(1, [0, 0, 1, 1])] * 4 + [(4, [20, 20, 40, 41])], True),  # the fifth, on the second box
        ([], False),
    ],
)
def test_ilsvrcs_rule(answers, right):
    labels = torch.tensor([label for label, _ in answers], dtype=torch.int64)
    boxes = torch.tensor([box for _, box in answers], dtype=torch.float32).view(-1, 4)
    truth = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]])
    assert is_right(labels, boxes, 4, truth) == right


# --- The tree --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """Two classes, two images each in train/ and one in val/."""
    for part, stems in (("train", "ab"), ("val", "c")):
        for label in (0, 1):
            for stem in stems:
                pixels = torch.full((30, 40), 100).numpy()
                write(tmp_path / "tree", part, f"n{label}", f"{label}{stem}", pixels, thing(f"n{label}", 0, 2, 9, 21))
    return tmp_path / "tree"


def xml(tree, name):
    return next(tree.glob(f"Annotations/CLS-LOC/**/{name}.xml"))


def add(tree, name, more):
    """Another object in an annotation."""
    xml(tree, name).write_text(xml(tree, name).read_text().replace("</annotation>", f"{more}</annotation>"))


def test_boxes_go_from_pixel_0_and_hold_their_last_pixel(tree):
    found = read_tree(tree, broken="stop")
    assert (found.classes, len(found.train), len(found.test), found.faults) == (["n0", "n1"], 4, 2, {})
    assert found.train[0].boxes.tolist() == [[0, 2, 10, 22]]
    assert [found.train[n].name for n in range(4)] == ["n0/0a.JPEG", "n0/0b.JPEG", "n1/1a.JPEG", "n1/1b.JPEG"]
    assert [int(found.train[n].labels[0]) for n in range(4)] == [1, 1, 2, 2]
    assert (found.test[1].width, found.test[1].height, found.test[1].path.exists()) == (40, 30, True)


def test_the_tree_may_lie_as_ilsvrc_packs_it_and_val_may_be_flat(tree):
    first = read_tree(tree, broken="stop")
    for path in list((tree / "val").glob("*/*")):
        path.rename(tree / "val" / path.name)
    for name in ("n0", "n1"):
        (tree / "val" / name).rmdir()
    (tree / "Data/CLS-LOC").mkdir(parents=True)
    for part in ("train", "val"):
        (tree / part).rename(tree / "Data/CLS-LOC" / part)
    found = read_tree(tree, broken="stop")
    assert torch.equal(found.test.labels, first.test.labels)
    assert torch.equal(found.test.boxes, first.test.boxes)
    (tree / "Data/CLS-LOC/train").rename(tree / "away")  # a test's classes are those of its checkpoint
    assert torch.equal(read_tree(tree, broken="stop", classes=["n0", "n1"]).test.labels, first.test.labels)
    (tree / "away").rename(tree / "Data/CLS-LOC/train")
    add(tree, "0c", thing("n1", 1, 2, 9, 9))
    with pytest.raises(UserError, match=r"0c.xml: has objects of several classes \(n0, n1\), and 0c.JPEG lies in no"):
        read_tree(tree, broken="stop")
    assert read_tree(tree, broken="skip").faults == {NO_CLASS: 1}


def test_any_number_of_boxes_and_images_without_are_counted(tree):
    add(tree, "0a", thing("n0", 5, 5, 9, 9))
    other = xml(tree, "1a").read_text().replace("<name>n1<", "<name>n0<")
    xml(tree, "1a").write_text(other)  # of its class there is none
    xml(tree, "1b").unlink()
    found = read_tree(tree, broken="stop")
    assert [len(found.train[n].boxes) for n in range(len(found.train))] == [2, 1]
    assert found.faults == {NO_BOX: 2}
    assert fault_lines(found) == [f"2 {NO_BOX}, the first: {xml(tree, '1a')} has none"]
    shutil.rmtree(tree / "val/n0")  # and its annotation
    xml(tree, "0c").unlink()
    assert [int(label) for label in read_tree(tree, broken="stop").test.labels] == [2]
    xml(tree, "1c").unlink()
    with pytest.raises(UserError, match=r"val/ has no image with a box of its class"):
        read_tree(tree, broken="stop")


@pytest.mark.parametrize("broken", ["stop", "skip"])
def test_further_images_of_one_name_are_counted(tree, broken):
    for name in ("0a.png", "0a.webp", "0b.png"):
        Image.new("RGB", (40, 30)).save(tree / "train/n0" / name)
    found = read_tree(tree, broken=broken)
    assert [found.train[n].name for n in range(len(found.train))][:2] == ["n0/0a.JPEG", "n0/0b.JPEG"]
    assert found.faults == {SAME_NAME: 3}
    first = f"{tree / 'train/n0/0a.png'}: its annotation is that of 0a.JPEG"
    assert fault_lines(found) == [f"3 {SAME_NAME}, the first: {first}"]


def faulty(text, old, new):
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize(
    ("old", "new", "kind", "words"),
    [
        ("<width>40<", "<width>41<", OTHER_SIZE, "has width 41 for 0a.JPEG, which is 40x30"),
        ("<xmax>9<", "<xmax>-3<", NO_AREA, "has no area, or its corners are swapped"),
        ("<xmax>9<", "<xmax>49<", CUT, None),
        ("<name>n0<", "<name>n2<", UNKNOWN, "is of an unknown class; known are n0, n1"),
        ("</size>", "", BAD_ANNOTATION, "is not XML that can be read"),
        ("<annotation>", "<!DOCTYPE a><annotation>", BAD_ANNOTATION, "declares a document type"),
    ],
)
def test_what_cannot_be_used_stops_with_its_name_or_is_counted(tree, old, new, kind, words):
    xml(tree, "0a").write_text(faulty(xml(tree, "0a").read_text(), old, new))
    if words:
        with pytest.raises(UserError) as told:
            read_tree(tree, broken="stop")
        assert "0a.xml" in str(told.value)
        assert words in str(told.value)
        assert "\n" not in str(told.value)
    found = read_tree(tree, broken="skip")
    assert found.faults[kind] == 1
    assert f"1 {kind}, the first: {xml(tree, '0a')}" in "".join(fault_lines(found))
    assert len(found.train) == (4 if kind == CUT else 3)


def test_images_that_cannot_be_used_stop_or_are_counted(tree):
    (tree / "train/n0/0b.JPEG").write_bytes(b"no image")
    (tree / "train/n1/1a.JPEG").unlink()
    Image.new("RGB", (700, 40)).save(tree / "train/n1/1b.JPEG")
    text = xml(tree, "1b").read_text().replace("<width>40<", "<width>700<").replace("<height>30<", "<height>40<")
    xml(tree, "1b").write_text(text)
    with pytest.raises(UserError, match=r"0b.JPEG: is not an image that can be read"):
        read_tree(tree, broken="stop")
    assert read_tree(tree, broken="skip").faults == {UNREADABLE: 1, NO_IMAGE: 1, TOO_LONG: 1}


# --- The command line ------------------------------------------------------------------------------------------------


def checked(*words, command="localize"):
    values = compose(command, [*words])
    check = check_localize if command == "localize" else lambda values, _: check_localize_test(values)
    return check(values, [word.split("=")[0] for word in words])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.root=tree"], "init_from"),
        (["init_from=x.pt"], "data.root: is needed: a folder with train/, val/ and Annotations/CLS-LOC/"),
        (["init_from=x.pt", "data.root=nowhere"], "data.root=nowhere: there is no such folder"),
        (["init_from=x.pt", "data.root=tree/train"], "has no train/, as ILSVRC's localization has"),
        (["init_from=x.pt", "data.root=tree", "stage=rcn"], "stage=rcn: allowed are rpn, rcnn; did you mean rcnn?"),
        (
            ["init_from=x.pt", "data.root=tree", "stage=rcnn"],
            "rpn: stage=rcnn learns from what an RPN proposes; add rpn=",
        ),
        (["init_from=x.pt", "data.root=tree", "stage=rcnn", "rpn=no.pt"], "rpn=no.pt: there is no such file"),
        (["init_from=x.pt", "data.root=tree", "rpn=x.pt"], "rpn=x.pt: is not used by stage=rpn; remove it"),
        (["init_from=x.pt", "data.root=tree", "stage=rcnn", "anchors=[8]"], "anchors=[8]: is not used by stage=rcnn"),
        (["init_from=x.pt", "data.root=tree", "anchors=[16,8]"], "must rise"),
        (["init_from=x.pt", "data.root=tree", "devices=3"], "batch_size=256: does not divide by 3 devices"),
    ],
)
def test_wrong_values_are_told(tree, monkeypatch, words, told):
    monkeypatch.chdir(tree.parent)
    with pytest.raises(UserError) as error:
        checked(*words)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_values_of_a_test_are_told(tree, monkeypatch):
    monkeypatch.chdir(tree.parent)
    torch.save({}, "last.pt")
    for words, told in (
        (["checkpoint=no.pt"], "checkpoint=no.pt: there is no such file"),
        (["checkpoint=last.pt", "rcnn=no.pt"], "rcnn=no.pt: there is no such file"),
        (["checkpoint=last.pt", "classifier=no.pt"], "classifier=no.pt: there is no such file"),
        (["checkpoint=last.pt", "scales=[64]"], "scales=[64]: are those of dense=true; add that"),
        (["checkpoint=last.pt", "dense=true", "scales=[64,32]"], "must rise"),
    ):
        with pytest.raises(UserError) as error:
            checked(*words, command="localize_test")
        assert told in str(error.value)


def test_weights_that_are_not_finite_are_told_with_the_image(digits):
    photos, rpn = read_tree(digits, broken="stop").test, trained()
    assert evaluate(rpn, None, photos, device=CPU, workers=0)["images"] == 9
    torch.nn.init.constant_(rpn.model.reg.weight, math.nan)
    with pytest.raises(RunError, match=r"0/0_00000.JPEG: a box found is not finite; try an earlier checkpoint"):
        evaluate(rpn, None, photos, device=CPU, workers=0)
