"""Masks: read, brought to the size of the training, learned, found, drawn and measured, on shapes drawn here."""

import contextlib
import copy
import io
import itertools
import json
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from conftest import as_one_of, metrics, start
from PIL import Image, ImageDraw
from pycocotools import mask as pycoco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.models.detection.transform import GeneralizedRCNNTransform, _resize_image_and_masks

from resnet_train.config.compose import compose
from resnet_train.config.detection import check_detect
from resnet_train.detection.annotations import Fault
from resnet_train.detection.coco import read_coco
from resnet_train.detection.draw import draw_detections
from resnet_train.detection.ensemble import Ensemble
from resnet_train.detection.evaluate import detections
from resnet_train.detection.loader import training_batches
from resnet_train.detection.masks import check_masks, mask_code, mask_of, paste, read_mask, training_masks
from resnet_train.detection.metrics import COCO_FIGURES, coco_map
from resnet_train.detection.model import DetectorSettings, resnet_detector
from resnet_train.detection.run import build, read_examples
from resnet_train.engine import checkpoint
from resnet_train.engine.compute import autocast
from resnet_train.engine.distributed import process_group, rank, world_size
from resnet_train.errors import UserError
from resnet_train.models import imagenet_resnet
from resnet_train.models.resnet import parameters

pytest.importorskip("faster_coco_eval")
# pycocotools' masks in numpy 2:
OLD = "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
pytestmark = pytest.mark.filterwarnings(OLD)
CPU = torch.device("cpu")
WIDTH, HEIGHT = 96, 72
CLASSES = ("disc", "kite")
FRAME = DetectorSettings([16, 32], 20, 8, 64, 96, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
LEVELS = DetectorSettings([16, 32, 64, 128, 256], 20, 8, 64, 96, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
NO_MASK = "boxes left out: no mask, or one that cannot be read"
WORDS = ["data=coco", "data.train=[train]", "data.test=val", "recipe=short", "depth=18", "masks=true", "iterations=3"]
WORDS += ["batch_size=2", "regions=8", "min_size=64", "max_size=96", "anchors=[16,32]", "proposals=100", "log_every=2"]
WORDS += ["data.workers=0", "device=cpu", "precision=fp32", "warmup=0"]
LEARNT = [f"roi_heads.{name}.weight" for name in ("box_predictor.cls_score", "box_predictor.bbox_pred")]
LEARNT += ["roi_heads.mask_predictor.mask_fcn_logits.weight", "rpn.head.cls_logits.weight", "rpn.head.bbox_pred.weight"]


def annotated(number, image, draw, picture):
    """A kite as a polygon, a disc as RLE or, now and then, a crowd of such."""
    left, top = int(draw.integers(2, 50)), int(draw.integers(2, 34))
    right, bottom = left + int(draw.integers(16, 40)), top + int(draw.integers(14, 34))
    middle = (left + right) / 2, (top + bottom) / 2
    row = {"id": number, "image_id": image, "bbox": [left, top, right - left, bottom - top], "iscrowd": 0}
    if number % 2:
        corners = [middle[0], top, right, middle[1], middle[0], bottom, left, middle[1]]
        picture.polygon([tuple(corners[place : place + 2]) for place in range(0, 8, 2)], (0, 0, 250))
        return {**row, "category_id": 7, "segmentation": [corners], "area": (right - left) * (bottom - top) / 2}
    picture.ellipse([left, top, right, bottom], (250, 0, 0))
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    inside = ((x - middle[0]) / (right - left)) ** 2 + ((y - middle[1]) / (bottom - top)) ** 2 <= 0.25
    text = pycoco_mask.encode(np.asfortranarray(inside.astype(np.uint8)))["counts"].decode()
    runs = np.diff(np.r_[0, np.flatnonzero(np.diff(inside.T.ravel().astype(int))) + 1, inside.size]).tolist()
    counts = text if number % 4 else runs
    more = {"iscrowd": int(number % 8 == 0), "area": float(inside.sum()), "category_id": 3}
    return {**row, **more, "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts}}


def make_tree(root):
    """A COCO tree: six training and four test images with one to three shapes, the last of each without any."""
    draw, number = np.random.default_rng(1), itertools.count(1)
    for name, count in (("train", 6), ("val", 4)):
        (root / name).mkdir(parents=True)
        content = {
            "images": [],
            "annotations": [],
            "categories": [{"id": 3, "name": "disc"}, {"id": 7, "name": "kite"}],
        }
        for image in range(1, count + 1):
            picture = Image.fromarray(draw.integers(90, 110, (HEIGHT, WIDTH, 3), dtype=np.uint8))
            shapes = 0 if image == count else int(draw.integers(1, 4))
            content["annotations"] += [
                annotated(next(number), image, draw, ImageDraw.Draw(picture)) for _ in range(shapes)
            ]
            content["images"].append({"id": image, "file_name": f"{image}.jpg", "width": WIDTH, "height": HEIGHT})
            picture.save(root / name / f"{image}.jpg", quality=95)
        (root / "annotations").mkdir(exist_ok=True)
        (root / f"annotations/instances_{name}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("masks") / "shapes")


def configured(tree, *words):
    own = {word.split("=")[0] for word in words}
    words = [*(word for word in WORDS if word.split("=")[0] not in own), f"data.root={tree}", *words]
    return check_detect(compose("detect", words), [word.split("=")[0] for word in words])


def read(root, broken="stop"):
    return read_coco(root, train=["train"], test="val", broken=broken, masks=True)


def detector(kind="c4", seed=0):
    """One with scores and masks that are far apart."""
    torch.manual_seed(seed)
    pyramid = kind == "pyramid"
    net, options = imagenet_resnet(18, init="fan_out"), {"pyramid": pyramid, "context": kind == "context"}
    found = resnet_detector(net, 2, LEVELS if pyramid else FRAME, masks=True, **options)
    nn.init.normal_(found.roi_heads.box_predictor.cls_score.weight, std=2 if pyramid else 0.2)
    nn.init.normal_(found.roi_heads.box_predictor.bbox_pred.weight, std=0.2)
    return sees_something(found).eval()


@torch.no_grad()
def sees_something(model):
    """A detector without training to which no region is background."""
    model.roi_heads.box_predictor.cls_score.weight[0] = 0
    model.roi_heads.box_predictor.cls_score.bias[0] = -100
    if model.roi_heads.has_mask():
        nn.init.normal_(model.roi_heads.mask_predictor.mask_fcn_logits.weight)
    return model


@pytest.fixture(scope="module")
def image():
    torch.manual_seed(7)
    return torch.rand(3, 72, 100)


# --- Reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("real", [False, True])
def test_masks_are_those_of_cocos_own_reader(tree, real, request, capsys):
    """Polygons, RLE of both kinds and crowds; pycocotools as the oracle."""
    root = request.getfixturevalue("real_data")("coco_tiny") if real else tree
    lists = ("train2017", "val2017") if real else ("train", "val")
    found = read_coco(root, train=[lists[0]], test=lists[1], broken="stop", masks=True)
    crowds, kinds = 0, set()
    for name, examples in zip(lists, (found.train, found.test), strict=True):
        api = COCO(root / f"annotations/instances_{name}.json")
        for example in examples:
            rows = api.loadAnns(api.getAnnIds(example.image_id))
            assert len(rows) == len(example.masks) == len(example.boxes)
            for row, text in zip(rows, example.masks, strict=True):
                assert np.array_equal(mask_of(text, (example.height, example.width)).numpy(), api.annToMask(row))
                kinds.add(type(row["segmentation"]))
                crowds += row["iscrowd"]
    assert crowds
    assert kinds == {list, dict}
    assert found.faults == {}


def test_without_masks_they_are_not_read_and_the_digest_is_that_of_the_boxes(tree):
    plain = read_coco(tree, train=["train"], test="val", broken="stop")
    assert {example.masks for example in plain.train} == {()}
    assert plain.digest != read(tree).digest


def test_edges_of_a_very_wide_image_have_a_limit_of_their_own():
    code = mask_code()
    wide = (1_000_000, 300)
    assert code.area({"size": wide[::-1], "counts": read_mask([[0, 0, 1000, 0, 1000, 300]], wide, "here")}) > 0
    outline = [0, 0, 1_000_000, 0, 1_000_000, 300, 0, 300]
    assert code.area({"size": wide[::-1], "counts": read_mask([outline], wide, "here")}) == 300_000_000
    with pytest.raises(Fault, match="here: the edges of its segmentation are too long for 1000000x300"):
        read_mask([outline] * 3, wide, "here")


SQUARE = [10, 5, 20, 5, 20, 15, 10, 15]


@pytest.mark.parametrize(
    ("segmentation", "words"),
    [
        (None, "has no segmentation"),
        ([], "has no segmentation"),
        ("11>2", "has no segmentation"),
        ([SQUARE, [1, 2, 3, 4]], "not of polygons, x, y of three points or more"),
        ([SQUARE[:7]], "not of polygons"),
        ([[*SQUARE[:7], "5"]], "not of polygons"),
        ([[*SQUARE[:7], True]], "not of polygons"),
        ([SQUARE[0]], "not of polygons"),
        ([[*SQUARE[:7], float("nan")]], "lies far outside of its image, 40x30"),
        ([[*SQUARE[:7], 1e9]], "lies far outside"),
        ([[-41, *SQUARE[1:]]], "lies far outside"),
        ([[0, 0, 40, 30] * 50], "the edges of its segmentation are too long for 40x30"),
        ([[0, 0, 40, 30] * 20] * 3, "the edges of its segmentation are too long for 40x30"),
        ({"size": [40, 30], "counts": [1200]}, "its RLE is not of the size [30, 40]"),
        ({"counts": [1200]}, "its RLE is not of the size"),
        ({"size": [30, 40]}, "its RLE is not one of 40x30 pixels"),
        ({"size": [30, 40], "counts": [1199]}, "its RLE is not one of"),
        ({"size": [30, 40], "counts": [1201]}, "its RLE is not one of"),
        ({"size": [30, 40], "counts": [-1, 1201]}, "its RLE is not one of"),
        ({"size": [30, 40], "counts": [0.5, 1199.5]}, "its RLE is not one of"),
        ({"size": [30, 40], "counts": "zzzzzzzzzz"}, "its RLE is not one of"),
        ({"size": [30, 40], "counts": "é"}, "its RLE is not one of"),
        ({"size": [30, 40], "counts": {}}, "its RLE is not one of"),
    ],
)
def test_a_mask_that_cannot_be_used_stops_or_is_left_out(tmp_path, segmentation, words):
    from test_detection_data import refused, write

    def content(*segmentations):
        rows = [
            {"id": number, "image_id": 1, "category_id": 1, "bbox": [10, 5, 10, 10], "segmentation": one}
            for number, one in enumerate(segmentations, 1)
        ]
        images = [{"id": 1, "file_name": "one.jpg", "width": 40, "height": 30}]
        return {"images": images, "categories": [{"id": 1, "name": "cat"}], "annotations": rows}

    write(tmp_path, content([SQUARE], segmentation, [SQUARE]), "train", ["one.jpg"])
    write(tmp_path, content([SQUARE]), "val", ["one.jpg"])
    with pytest.raises(UserError) as told:
        read(tmp_path)
    refused(told, "annotations[1] (id 2)", words, "data.broken=skip")
    found = read(tmp_path, "skip")
    assert found.faults == {NO_MASK: 1}
    assert len(found.train[0].boxes) == len(found.train[0].masks) == 2
    assert len(read_coco(tmp_path, train=["train"], test="val", broken="stop").train[0].boxes) == 3


def test_masks_for_data_without_any_are_refused_in_one_line(tree, tmp_path, command_here):
    words = [word for word in WORDS if not word.startswith("data")]
    told = command_here("detect", *words, "data=voc", f"data.root={tree}", code=2)
    assert "masks=true: data=voc has boxes alone; use data=coco, or remove it" in told
    told = command_here("detect", *words, "data=coco", f"data.root={tree}", "backbone=vgg16", code=2)
    assert "is not used by backbone=vgg16; remove it" in told
    for name in ("train", "val"):
        (tmp_path / name).symlink_to(tree / name)
        path = Path(f"annotations/instances_{name}.json")
        content = json.loads((tree / path).read_text())
        for row in content["annotations"]:
            del row["segmentation"]
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(json.dumps(content))
    for broken in ("stop", "skip"):
        with pytest.raises(
            UserError, match=r"masks=true: .*instances_train.json: has no segmentation in any annotation"
        ):
            read(tmp_path, broken)


def test_masks_come_at_the_size_of_the_training_as_torchvision_brings_them_there(tree):
    """Mirrored with their image or not; what torchvision does afterwards is then nothing."""
    examples = read(tree).train
    flips = set()
    batches = training_batches(
        examples, seed=0, batch_size=3, iterations=range(6), workers=0, device=CPU, masks=(64, 80), skip=False
    )
    for images, targets, _ in batches:
        for picture, target in zip(images, targets, strict=True):
            (example,) = [one for one in examples if (flip := shown(one, picture)) is not None]
            flip = shown(example, picture)
            flips.add(flip)
            kept = [text for text, ignored in zip(example.masks, example.ignored.tolist(), strict=True) if not ignored]
            whole = torch.zeros(len(kept), HEIGHT, WIDTH, dtype=torch.uint8)
            for place, text in enumerate(kept):
                whole[place] = mask_of(text, (HEIGHT, WIDTH))
            wanted = {"masks": whole.flip(2) if flip else whole}
            small, wanted = _resize_image_and_masks(picture.float(), 64, 80, wanted)
            assert target["masks"].dtype == torch.uint8
            assert target["masks"].shape == (len(target["boxes"]), *small.shape[1:])
            assert torch.equal(target["masks"], wanted["masks"])
    assert flips == {False, True}


def shown(example, picture):
    """Whether a picture is that of an example, mirrored; None if it is another's."""
    own = torch.from_numpy(np.array(Image.open(example.path))).permute(2, 0, 1)
    return False if torch.equal(own, picture) else True if torch.equal(own.flip(2), picture) else None


def test_more_masks_than_any_image_has_pixels_are_refused_before_they_are_made(tree):
    example = next(one for one in read(tree).train if not one.ignored.any() and len(one.boxes))
    check_masks(example, 64, 96)
    with pytest.raises(UserError, match=r"masks of 5333\d\dx400000 are above 300,000,000 pixels together"):
        check_masks(example, 400_000, 10**6)


# --- The branch -------------------------------------------------------------------------------------------------------


def batch(seed=1):
    torch.manual_seed(seed)
    images = [torch.rand(3, 90, 120), torch.rand(3, 100, 80)]
    boxes = torch.tensor([[10.0, 10, 60, 70], [50, 20, 110, 80]])
    full = {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": torch.ones(2, 64, 85, dtype=torch.uint8)}
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    return images, [full, {**none, "masks": torch.zeros(0, 80, 64, dtype=torch.uint8)}]


@pytest.mark.parametrize("depth", [18, 50])
def test_the_branch_adds_torchvisions_parameters_and_conv5_is_there_once(depth):
    width = 512 if depth == 18 else 2048
    with torch.device("meta"):
        plain, found = (resnet_detector(imagenet_resnet(depth), 80, FRAME, masks=masks) for masks in (False, True))
    assert parameters(found) - parameters(plain) == width * 256 * 4 + 256 + 257 * 81
    more = found.state_dict().keys() - plain.state_dict().keys()
    assert {name.rsplit(".", 1)[0] for name in more} == {
        "roi_heads.mask_predictor.conv5_mask",
        "roi_heads.mask_predictor.mask_fcn_logits",
    }


def test_behind_a_pyramid_it_is_torchvisions_by_name_and_shape():
    with torch.device("meta"):
        found = resnet_detector(imagenet_resnet(50), 90, LEVELS, pyramid=True, masks=True)
        theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)
    own, wanted = (
        {name: value.shape for name, value in model.state_dict().items() if ".mask" in name}
        for model in (found, theirs)
    )
    assert own == wanted
    pools = found.roi_heads.mask_roi_pool, theirs.roi_heads.mask_roi_pool
    assert pools[0].output_size == pools[1].output_size == (14, 14)


@pytest.mark.parametrize("kind", ["c4", "context"])
def test_in_training_the_branch_takes_conv5_of_the_regions_with_an_object(kind):
    """Those that the box head has computed: as if computed again, where batch norm is fixed."""
    model, seen = detector(kind), {}
    model.freeze(None, norm=True)
    model.train()
    heads = model.roi_heads
    select = heads.select_training_samples

    def remember(*arguments):
        seen["regions"] = select(*arguments)
        return seen["regions"]

    heads.select_training_samples = remember
    heads.mask_predictor.register_forward_hook(lambda _, given, __: seen.update(given=given[0]))
    heads.box_roi_pool.register_forward_hook(lambda _, given, __: seen.update(maps=given[0], shapes=given[2]))
    images, targets = batch()
    losses = model(images, targets)
    boxes, _, labels, _ = seen["regions"]
    positive = [own[kinds > 0] for own, kinds in zip(boxes, labels, strict=True)]
    assert 2 <= len(positive[0]) < len(boxes[0])
    assert len(positive[1]) == 0
    pool = heads.box_roi_pool.pool if kind == "context" else heads.box_roi_pool
    wanted = heads.box_head.conv5(pool(seen["maps"], positive, seen["shapes"]))
    torch.testing.assert_close(seen["given"], wanted, rtol=1e-5, atol=1e-5)
    losses["loss_mask"].backward()
    assert heads.box_head.layer4[0].conv1.weight.grad.abs().sum() > 0
    assert heads.box_head.maps is None


@pytest.mark.parametrize("kind", ["c4", "pyramid"])
def test_what_is_found_is_what_torchvision_would_paste(kind, image):
    """One mask after another gives the same as all of them at once."""
    model = detector(kind)
    usual = copy.deepcopy(model)
    old = model.transform
    usual.transform = GeneralizedRCNNTransform(old.min_size, old.max_size, old.image_mean, old.image_std).eval()
    picture = (image * 255).byte()
    with torch.no_grad():
        (wanted,) = usual([picture.float() / 255])
    (found,) = detections(model, [picture], "fp32")
    assert len(found["masks"]) == len(wanted["boxes"]) > 2
    masks = torch.stack([mask_of(text, image.shape[1:]) for text in found["masks"]])
    assert masks.any()
    assert torch.equal(masks, wanted["masks"][:, 0] >= 0.5)


@pytest.mark.parametrize("kind", ["c4", "context", "pyramid"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_ensemble_of_one_finds_its_masks_bit_for_bit(kind, precision, image):
    model = detector(kind)
    with torch.no_grad():
        with autocast(image.device, precision):
            (wanted,) = model([image])
        (found,) = Ensemble([model], [precision])([image])
    assert found.keys() == wanted.keys()
    assert len(found["masks"]) > 2
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert found["masks"].dtype == torch.float32


def test_the_masks_of_an_ensemble_are_the_means_over_the_final_boxes(image):
    """Refined and voted on; each member's masks of these boxes, as its own branch has them."""
    models = [detector(seed=seed) for seed in (0, 1)]
    with torch.no_grad():
        (found,) = Ensemble(models, ["fp32", "fp32"], refine=True)([image])
        masks = []
        for model in models:
            images, _ = model.transform([image])
            (shape,) = images.image_sizes
            ratio = torch.tensor([shape[1] / 100, shape[0] / 72]).repeat(2)
            maps = model.backbone(images.tensors)
            pooled = model.roi_heads.box_roi_pool({"0": maps}, [found["boxes"] * ratio], [shape])
            logits = model.roi_heads.mask_predictor(model.roi_heads.box_head.layer4(pooled))
            masks.append(logits.sigmoid()[torch.arange(len(logits)), found["labels"]])
    assert len(found["boxes"]) > 2
    torch.testing.assert_close(found["masks"][:, 0], (masks[0] + masks[1]) / 2, rtol=1e-3, atol=1e-3)


def test_no_proposals_and_no_objects_give_nothing_and_never_nan(image):
    for kind in ("c4", "context", "pyramid"):
        model = detector(kind)
        model.rpn.filter_proposals = lambda proposals, *_: ([one[:0] for one in proposals], [])
        (found,) = detections(model, [(image * 255).byte()], "fp32")
        assert [len(value) for value in found.values()] == [0, 0, 0, 0]
        with torch.no_grad():
            (found,) = Ensemble([model], ["fp32"], refine=True)([image])
        assert found["masks"].shape[0] == len(found["boxes"]) == 0


# --- Whole runs -------------------------------------------------------------------------------------------------------


def steps(task, count):
    for one in itertools.islice(task.batches(), count):
        task.step(one, task.learning_rate())
    return task


@pytest.mark.parametrize("more", [["precision=bf16"], ["pyramid=true", "anchors=[8,16,32,64,128]"]], ids=["c4", "fpn"])
def test_training_goes_on_from_a_checkpoint_to_the_same_weights(tree, tmp_path, more):
    config = configured(tree, *more)
    examples = read_examples(config)
    whole = steps(build(config, examples, CPU), 3)
    checkpoint.save(tmp_path / "last.pt", steps(build(config, examples, CPU), 2).state())
    state = checkpoint.load(tmp_path / "last.pt", kind="detector")
    again = steps(build(config, examples, CPU, state | {"path": "last.pt"}), 1)
    assert again.iteration == whole.iteration == 3
    assert all(torch.equal(value, whole.model.state_dict()[name]) for name, value in again.model.state_dict().items())
    values = whole.train_point()
    assert set(values) >= {"loss", "loss_mask"}
    assert all(np.isfinite(list(values.values())))
    assert values == pytest.approx(again.train_point())


def test_five_images_without_objects_in_a_row_and_no_proposals_are_no_nan(tree):
    """Also where the region proposals are none: a mean over nothing is not a loss."""
    config = configured(tree, "batch_size=1", "iterations=12")
    examples = read_examples(config)
    examples.train[:] = [one for one in examples.train if not len(one.boxes)] * 5
    task = build(config, examples, CPU)
    steps(task, 5)
    assert task.losses.isfinite().all()
    task.model.rpn.filter_proposals = lambda proposals, *_: ([one[:0] for one in proposals], [])
    steps(task, 1)
    assert task.losses.isfinite().all()
    assert all(value.isfinite().all() for value in task.model.state_dict().values())


@pytest.fixture(scope="module")
def save(tree, tmp_path_factory):
    """The checkpoint of a detector that has not been trained, with scores that are far apart; its logged test."""

    def make(name, *words):
        task = build(configured(tree, *words), read_examples(configured(tree, *words)), CPU)
        sees_something(task.model)
        nn.init.zeros_(task.model.roi_heads.box_predictor.bbox_pred.weight)
        if task.config.masks:  # the whole of their boxes
            nn.init.zeros_(task.model.roi_heads.mask_predictor.mask_fcn_logits.weight)
            nn.init.ones_(task.model.roi_heads.mask_predictor.mask_fcn_logits.bias)
        path = tmp_path_factory.mktemp("saved") / f"{name}.pt"
        checkpoint.save(path, task.state())
        return path, task

    return make


@pytest.fixture(scope="module")
def saved(save):
    return save("one")


@pytest.mark.long
def test_the_test_of_a_checkpoint_gives_box_and_mask_ap_as_logged_on_one_process_and_two(saved, command_here, tmp_path):
    path, task = saved
    (point,) = task.evaluate()
    assert set(point.values) >= {"map", "map50", "mask_map", "mask_map50"}
    assert point.values["map50"] > 0
    assert point.values["mask_map50"] is not None
    command = ("test", f"checkpoint={path}", "device=cpu")
    told = command_here("detect", *command, "out=alone.json")
    figures = [f"{point.values[key]:.2f}" for key in ("map", "map50", "map07", "mask_map", "mask_map50")]
    words = "mAP {} % by COCO's rule @[.5,.95], {} % @.5, {} % by VOC 2007's; of masks {} %, {} % @.5, on 4 images"
    assert words.format(*figures) in told
    as_one_of(2, tmp_path, "from resnet_train.cli import detect; detect()", *command, "out=pair.json")
    for name in ("alone.json", "pair.json"):
        found = json.loads((tmp_path / name).read_text())
        assert {key: found[key] for key in point.values} == point.values


def test_refinement_goes_with_masks_and_what_does_not_is_told(saved, save, command_here):
    path, _ = saved
    words = ("test", f"checkpoint={path}", "device=cpu", "out=found.json")
    command_here("detect", *words, "refine=true")
    assert json.loads(Path("found.json").read_text())["mask_map50"] is not None
    told = command_here("detect", *words, "scales=[48,96]", code=2)
    assert f"scales=[48,96]: {path} finds masks, which is for one scale; remove it" in told
    other, _ = save("plain", "masks=false")
    told = command_here("detect", *words[:1], f"checkpoint=[{path},{other}]", *words[2:], code=2)
    assert f"{path} has masks=true and {other} masks=false; an ensemble has the same in all its members" in told


def test_a_class_that_the_checkpoint_does_not_have_is_told(saved, tree, command_here, tmp_path):
    """COCO's are those of its JSON: one more, or one less."""
    path = Path("annotations/instances_val.json")
    (tmp_path / "other" / path).parent.mkdir(parents=True)
    (tmp_path / "other/val").symlink_to(tree / "val")
    content = json.loads((tree / path).read_text())
    content["categories"].append({"id": 9, "name": "zebra"})
    (tmp_path / "other" / path).write_text(json.dumps(content))
    words = ("test", f"checkpoint={saved[0]}", "device=cpu", "data.root=other")
    told = command_here("detect", *words, code=2)
    assert "data.test=val: has the class zebra, which the checkpoint does not; its classes are disc, kite" in told


def test_predictions_are_drawn_and_written_as_rle(saved, tree, command_here, tmp_path):
    picture = tree / "val/1.jpg"
    command_here("detect", "predict", picture, f"checkpoint={saved[0]}", "score=0.3", "out=found", "device=cpu")
    found = json.loads((tmp_path / "found/detections.json").read_text())
    assert found["masks"] == "run lengths, as pycocotools reads them"
    rows = found["images"][0]["found"]
    assert rows
    before, drawn = (np.array(Image.open(path).convert("RGB")) for path in (picture, tmp_path / "found/1.png"))
    inside = np.zeros((HEIGHT, WIDTH), bool)
    for row in rows:
        mask = pycoco_mask.decode(row["mask"]).astype(bool)
        assert mask.shape == (HEIGHT, WIDTH)
        lines, columns = np.nonzero(mask)
        left, top, right, bottom = row["box"]
        assert not len(lines) or (columns.min() >= left - 3 and columns.max() <= right + 3)  # M cells over the box
        assert not len(lines) or (lines.min() >= top - 3 and lines.max() <= bottom + 3)
        inside |= mask
    assert inside.any()
    times = found["images"][0]["enlarged"]
    before, inside = (part.repeat(times, 0).repeat(times, 1) for part in (before, inside))
    assert (before != drawn).any(2)[inside].mean() > 0.9


def test_a_drawn_mask_covers_its_pixels_half():
    image = torch.full((3, 20, 30), 100, dtype=torch.uint8)
    mask = np.zeros((20, 30), np.uint8, order="F")
    mask[5:10, 8:20] = 1
    found = {"boxes": torch.tensor([[8.0, 5, 20, 10]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
    text = pycoco_mask.encode(mask)["counts"]
    plain, drawn = (draw_detections(image, row, ["x"], 0.5) for row in (found, found | {"masks": [text]}))
    assert drawn.shape == (3, 16 * 20, 16 * 30)
    inside = torch.from_numpy(mask).bool().repeat_interleave(16, 0).repeat_interleave(16, 1)
    free = (plain == 100).all(0)  # neither the edge of the box nor its label
    assert (inside & free).sum() > 0.8 * inside.sum()
    assert (drawn[:, inside & free] == torch.tensor([50, 177, 82])[:, None]).all()  # half of 00ff40
    assert torch.equal(drawn[:, ~inside], plain[:, ~inside])


# --- COCO's figures ---------------------------------------------------------------------------------------------------


def by_pycocotools(path, examples, found, category_ids):
    """The twelve figures of masks in %, of the JSON as it is."""
    rows = [
        {
            "image_id": example.image_id,
            "category_id": category_ids[label - 1],
            "score": score,
            "segmentation": {"size": [example.height, example.width], "counts": text},
        }
        for example, one in zip(examples, found, strict=True)
        for label, score, text in zip(one["labels"].tolist(), one["scores"].tolist(), one["masks"], strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(path)
        judge = COCOeval(truth, truth.loadRes(rows), "segm")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return [None if value == -1 else 100 * value for value in judge.stats]


@pytest.mark.parametrize("seed", range(3))
def test_the_figures_of_masks_are_pycocotools(tree, seed):
    """Of masks moved and cut at random, beside crowds, with a class doubted now and then."""
    parts, draw, found = read(tree), np.random.default_rng(seed), []
    for example in parts.train:
        masks, labels = [], []
        for text, label in zip(example.masks, example.labels.tolist(), strict=True):
            for _ in range(draw.integers(0, 3)):
                mask = np.roll(mask_of(text, (HEIGHT, WIDTH)).numpy(), draw.integers(-4, 5, 2), (0, 1))
                mask[: draw.integers(0, 30)] = False
                masks.append(pycoco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"])
                labels.append(label if draw.random() < 0.8 else 3 - label)
        found.append(
            {
                "boxes": torch.tensor([[0.0, 0, 10, 10]]).repeat(len(masks), 1),
                "labels": torch.tensor(labels, dtype=torch.int64),
                "scores": torch.from_numpy(draw.permutation(len(masks)) + 1) / 20,
                "masks": masks,
            }
        )
    ours = coco_map(parts.train, found, parts.classes, parts.category_ids, masks=True)
    assert tuple(ours) == COCO_FIGURES
    theirs = by_pycocotools(tree / "annotations/instances_train.json", parts.train, found, parts.category_ids)
    assert [value is None for value in ours.values()] == [value is None for value in theirs]
    known = [(a, b) for a, b in zip(ours.values(), theirs, strict=True) if b is not None]
    assert [a for a, _ in known] == pytest.approx([b for _, b in known], abs=1e-9)
    assert 0 < ours["map50"] < 100


def test_masks_that_are_the_objects_own_are_all_right(tree):
    parts = read(tree)
    found = [
        {
            "boxes": example.boxes[kept],
            "labels": example.labels[kept],
            "scores": torch.ones(int(kept.sum())),
            "masks": [text for text, one in zip(example.masks, kept.tolist(), strict=True) if one],
        }
        for example in parts.train
        for kept in [~example.ignored]
    ]
    assert coco_map(parts.train, found, parts.classes, parts.category_ids, masks=True)["map"] == pytest.approx(100)


def test_pasting_by_hand():
    """A box of 4x4 pixels, of whose left half the branch is sure."""
    probabilities = torch.zeros(2, 1, 28, 28)
    probabilities[0, :, :, :14] = 1
    texts = paste(probabilities, torch.tensor([[2.0, 3, 6, 7]]).repeat(2, 1), (10, 12))
    first, second = (mask_of(text, (10, 12)) for text in texts)
    assert first[3:7, 2:4].all()
    assert not first[:, 5:].any()
    assert not second.any()
    assert paste(torch.zeros(0, 1, 28, 28), torch.zeros(0, 4), (10, 12)) == []


def test_a_mask_outside_of_its_image_in_part_is_cut():
    text = read_mask([[-4, -4, 4, -4, 4, 4, -4, 4]], (12, 10), "")
    assert mask_of(text, (10, 12)).nonzero().max() == 3
    assert training_masks([text], (10, 12), (20, 24), flip=True)[0, :8, -8:].all()


def one_step(tree, net, out):
    """Of the first batch: the regions sampled of each image, its objects, the losses, and gradients of some layers."""
    with process_group(CPU, 60):
        config = configured(tree, f"init_from={net}", "batch_size=4")
        task, regions, gradients = build(config, read_examples(config), CPU), [], {}
        if world_size() > 1:
            task.wrap_ddp()
        task.model.roi_heads.box_roi_pool.register_forward_hook(lambda _, given, __: regions.extend(given[1]))
        task.optimizer.register_step_pre_hook(
            lambda *_: gradients.update({name: task.model.get_parameter(name).grad.clone() for name in LEARNT})
        )
        batch = next(task.batches())
        task.step(batch, 0.01)
        objects = [len(target["boxes"]) for target in batch.targets]
        torch.save((regions, objects, task.train_point(), gradients), f"{out}/{rank()}-of-{world_size()}.pt")


def test_two_processes_sample_the_regions_and_compute_the_losses_and_gradients_of_one(tree, tmp_path):
    """Whichever process has an image, whatever else it has; a loss is a mean over the regions of the whole batch."""
    torch.manual_seed(0)
    torch.save(imagenet_resnet(18, init="fan_out").state_dict(), tmp_path / "net.pth")
    text = "from test_detection_masks import one_step; one_step(*sys.argv[1:])"
    for processes in (1, 2):
        as_one_of(processes, tmp_path, text, str(tree), str(tmp_path / "net.pth"), str(tmp_path))
    alone, first, second = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("0-of-1", "0-of-2", "1-of-2")
    )
    assert [len(one) for one in alone[0]] == [8] * 4
    assert not torch.allclose(alone[0][0], alone[0][1])
    dealt = [first[0][0], second[0][0], first[0][1], second[0][1]]
    torch.testing.assert_close(dealt, alone[0], rtol=0, atol=1e-2)
    assert alone[1] == [first[1][0], second[1][0], first[1][1], second[1][1]]
    assert sum(first[1]) != sum(second[1])
    assert first[2] == second[2] == pytest.approx(alone[2], rel=1e-4)
    torch.testing.assert_close(first[3], alone[3], rtol=1e-3, atol=1e-5)


@pytest.mark.long
def test_two_processes_train_masks_together_and_a_killed_run_goes_on(tree):
    """The whole command, from random weights; what is left is what an undisturbed run leaves."""
    from test_detection import kill_at_the_first_checkpoint

    words = [*WORDS, f"data.root={tree}", "devices=2", "iterations=6", "checkpoint_every=2", "batch_size=4"]
    done = forked.run(start(*words, "run_dir=whole", entry="detect"), cwd=tree.parent, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "of masks" in done.stdout
    kill_at_the_first_checkpoint(tree.parent / "killed", words, iterations=6)
    done = forked.run(start(*words, "run_dir=killed", entry="detect"), cwd=tree.parent, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "resuming from iteration" in done.stdout
    last = "checkpoints/last.pt"
    assert (tree.parent / "killed" / last).read_bytes() == (tree.parent / "whole" / last).read_bytes()
    assert metrics(tree.parent / "killed") == metrics(tree.parent / "whole")
