"""`resnet-detect test` and the improvements of appendix B, each beside a reference that is written out here."""

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_detection import configured, pretrained, tree  # noqa: F401  (fixtures)
from torchvision.ops import batched_nms, roi_pool

from resnet_train.config.compose import compose
from resnet_train.config.detection import check_detect, check_test
from resnet_train.detection.ensemble import Ensemble, union
from resnet_train.detection.model import DetectorSettings, resnet_detector, vgg_detector
from resnet_train.detection.multiscale import ImageFeatures, View, lower_scales, region_features
from resnet_train.detection.refine import vote
from resnet_train.detection.run import build, read_examples
from resnet_train.engine import checkpoint
from resnet_train.engine.compute import autocast
from resnet_train.errors import UserError
from resnet_train.models import imagenet_resnet

pytest.importorskip("faster_coco_eval")
CPU = torch.device("cpu")
FRAME = DetectorSettings([16, 32], 20, 8, 64, 96, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
LEVELS = DetectorSettings([16, 32, 64, 128, 256], 20, 8, 64, 96, [0.5, 0.4, 0.3], [0.2, 0.3, 0.4])


def detector(kind="resnet", seed=0, **options):
    """One with scores that are far apart: at random all classes are as likely."""
    torch.manual_seed(seed)
    if kind == "context":
        options["context"] = True
    if kind == "vgg16":
        found = vgg_detector(3, FRAME)
    else:
        net = imagenet_resnet(18, init="fan_out")
        found = resnet_detector(net, 3, LEVELS if kind == "pyramid" else FRAME, pyramid=kind == "pyramid", **options)
    for layer in (found.roi_heads.box_predictor.cls_score, found.roi_heads.box_predictor.bbox_pred):
        torch.nn.init.normal_(layer.weight, std=0.2 if kind in ("resnet", "context") else 2)
    return found.eval()


@pytest.fixture(scope="module")
def image():
    torch.manual_seed(7)
    return torch.rand(3, 72, 100)


@pytest.fixture(scope="module")
def save(tree, tmp_path_factory):  # noqa: F811
    """The checkpoint of a detector that has not been trained, with scores that are far apart."""

    def make(name, *words):
        config = configured(tree, "proposals=20", *words)
        task = build(config, read_examples(config), CPU)
        with torch.no_grad():
            task.model.roi_heads.box_predictor.cls_score.weight.normal_(std=0.3)
        path = tmp_path_factory.mktemp("saved") / f"{name}.pt"
        checkpoint.save(path, task.state())
        return path

    return make


@pytest.fixture(scope="module")
def saved(save):
    return save("one")


@pytest.fixture
def test(command_here, saved):
    """`resnet-detect test` of a checkpoint, here: the JSON that it writes to out=, or the line of its error."""

    def run(*words, code=0):
        last = [] if any(str(word).startswith("checkpoint=") for word in words) else [f"checkpoint={saved}"]
        told = command_here("detect", "test", *last, "device=cpu", "out=found.json", *words, code=code)
        return told if code else json.loads(Path("found.json").read_text())

    return run


def same(found, wanted):
    return found.keys() == wanted.keys() and all(torch.equal(found[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("kind", ["resnet", "context", "pyramid", "vgg16"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_ensemble_of_one_is_that_one_bit_for_bit(kind, precision, image):
    model = detector(kind)
    with torch.no_grad():
        with autocast(image.device, precision):
            (wanted,) = model([image])
        (found,) = Ensemble([model], [precision])([image])
    assert len(wanted["boxes"]) > 2
    assert same(found, wanted)


def test_another_tree_is_tested_and_named(tree, test, tmp_path):  # noqa: F811
    """Here of two test images, in a list of another name, and without the training list."""
    copy = tmp_path / "other"
    shutil.copytree(tree, copy)
    (copy / "ImageSets/Main/train.txt").unlink()
    names = (copy / "ImageSets/Main/test.txt").read_text().split()[:2]
    (copy / "ImageSets/Main/test.txt").rename(copy / "ImageSets/Main/few.txt").write_text("\n".join(names))
    assert "data.test=test: " in test(f"data.root={copy}", code=2)
    found = test(f"data.root={copy}", "data.test=few")
    assert (found["data"], found["list"], found["images"]) == ("other", "few", 2)


def test_a_class_that_the_checkpoint_does_not_have_is_told_or_left_out(tree, test, tmp_path):  # noqa: F811
    copy = tmp_path / "other"
    shutil.copytree(tree, copy)
    name = (copy / "ImageSets/Main/test.txt").read_text().split()[0]
    path = copy / f"Annotations/{name}.xml"
    text = path.read_text()
    kind = text.partition("<name>")[2].partition("</name>")[0]
    path.write_text(text.replace(f"<name>{kind}<", "<name>zebra<", 1))
    told = test(f"data.root={copy}", code=2)
    assert "'zebra'): is of an unknown class; known are disc, square, star" in told
    assert test(f"data.root={copy}", "data.broken=skip")["faults"] == {"boxes left out: unknown class": 1}


# --- Written out ------------------------------------------------------------------------------------------------------


def overlap(one, other):
    width = max(0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return width * height / (sum(areas) - width * height)


def suppressed(found):
    """(score, label, box), those with an overlap above 0.3 with a better one of their class left out, best first."""
    kept = []
    for score, label, box in sorted(found, key=lambda row: -row[0]):
        if all(label != other or overlap(box, better) <= 0.3 for _, other, better in kept):
            kept.append((score, label, box))
    return kept[:100]


def voted(kept, found):
    rows = []
    for score, label, box in kept:
        voters = [(weight, other) for weight, of, other in found if of == label and overlap(box, other) >= 0.5]
        total = sum(weight for weight, _ in voters)
        rows.append(
            (score, label, [sum(weight * other[edge] for weight, other in voters) / total for edge in range(4)])
        )
    return rows


def detected(scores, boxes):
    """The detections (score, label, box) above 0.05 of regions' scores (n, K + 1) and boxes (n, K + 1, 4)."""
    return [
        (score, label, box)
        for row, places in zip(scores.tolist(), boxes.tolist(), strict=True)
        for label, (score, box) in enumerate(zip(row, places, strict=True))
        if label and score > 0.05 and min(box[2] - box[0], box[3] - box[1]) >= 0.01
    ]


def look_at(model, image):
    """The feature map of an image, the size it was brought to and the proposals."""
    images, _ = model.transform([image])
    maps = model.backbone(images.tensors)
    (proposals,), _ = model.rpn(images, {"0": maps})
    return maps, images.image_sizes[0], proposals


def judged(model, features, regions, shape):
    """Scores and boxes of regions by their features, the boxes cut at the image."""
    logits, moves = model.roi_heads.box_predictor(features)
    boxes = model.roi_heads.box_coder.decode(moves, [regions])
    edge = torch.tensor([shape[1], shape[0], shape[1], shape[0]])
    return logits.softmax(1), boxes.minimum(edge).clamp(min=0)


def assert_found(found, rows, shape, image):
    """That what was found are these rows, whose boxes are in an image of another shape."""
    assert len(rows) > 2
    assert found["labels"].tolist() == [label for _, label, _ in rows]
    torch.testing.assert_close(found["scores"], torch.tensor([score for score, _, _ in rows]))
    factors = torch.tensor([image.shape[2] / shape[1], image.shape[1] / shape[0]] * 2)
    torch.testing.assert_close(found["boxes"], torch.tensor([box for _, _, box in rows]) * factors)


# --- Refinement -------------------------------------------------------------------------------------------------------


def test_votes_by_hand():
    """A box of another class, one too far and one below the overlap have no say; at an overlap of a half it begins."""
    boxes = [[0, 0, 10, 10], [1, 0, 11, 10], [0, 0, 10, 20], [0, 0, 10, 10], [0, 0, 10, 21], [30, 30, 40, 40]]
    scores, labels = torch.tensor([0.9, 0.6, 0.5, 0.8, 0.7, 0.4]), torch.tensor([1, 1, 1, 2, 1, 1])
    found = vote(torch.tensor(boxes).float(), scores, labels, torch.tensor([0, 3, 5]))
    first = [0.6 * 1 / 2, 0, (0.9 * 10 + 0.6 * 11 + 0.5 * 10) / 2, (0.9 * 10 + 0.6 * 10 + 0.5 * 20) / 2]
    torch.testing.assert_close(found, torch.tensor([first, boxes[3], boxes[5]]).float())


def test_votes_are_those_of_two_loops():
    torch.manual_seed(3)
    corners = torch.rand(60, 2) * 20
    boxes, scores = torch.cat([corners, corners + 10 + torch.rand(60, 2) * 10], 1), torch.rand(60) * 0.9 + 0.1
    labels = torch.randint(1, 4, (60,))
    found = list(zip(scores.tolist(), labels.tolist(), boxes.tolist(), strict=True))
    kept = batched_nms(boxes, scores, labels, 0.3)
    wanted = voted(suppressed(found), found)
    assert labels[kept].tolist() == [label for _, label, _ in wanted]
    torch.testing.assert_close(vote(boxes, scores, labels, kept), torch.tensor([box for _, _, box in wanted]))


def test_refinement_is_that_of_a_loop_over_one_map(image):
    """The 20 proposals and the 20 boxes that came of them, pooled from one map, suppressed together, then votes."""
    model, passes = detector(), []
    model.backbone.register_forward_hook(lambda *_: passes.append("map"))
    model.roi_heads.box_head.register_forward_hook(lambda *found: passes.append(len(found[2])))
    with torch.no_grad():
        (found,) = Ensemble([model], ["fp32"], refine=True)([image])
        assert passes == ["map", 20, 20]
        maps, shape, proposals = look_at(model, image)
        rows, regions = [], proposals
        for _ in range(2):
            whose = torch.cat([torch.zeros(len(regions), 1), regions], 1)
            features = model.roi_heads.box_head(roi_pool(maps, whose, 14, 1 / 16))
            scores, boxes = judged(model, features, regions, shape)
            rows += detected(scores, boxes)
            regions = torch.stack([box[1 + int(row[1:].argmax())] for row, box in zip(scores, boxes, strict=True)])
    assert_found(found, voted(suppressed(rows), rows), shape, image)


def test_refinement_is_named(test, tmp_path):
    found = test("refine=true")
    assert found["refine"]
    assert found["protocol"] == "every test image once, whole; boxes refined once, votes from an overlap of 0.5"


# --- Several scales ---------------------------------------------------------------------------------------------------


def nearest_two(areas):
    """The numbers of the two scales at which an area is nearest to 224x224, in order."""
    return sorted(sorted(range(len(areas)), key=lambda number: abs(areas[number] - 224 * 224))[:2])


def test_a_region_takes_the_two_scales_at_which_its_area_is_nearest_to_224_by_224():
    sides = [10, 100, 140, 223.9, 224, 300, 600]  # at a shorter side of 600
    areas = torch.tensor([[(side * scale / 600) ** 2 for scale in (200, 400, 600, 800, 1000)] for side in sides])
    assert lower_scales(areas).tolist() == [nearest_two(row)[0] for row in areas.tolist()]
    assert all(high == low + 1 for low, high in map(nearest_two, areas.tolist()))
    assert lower_scales(areas).tolist() == [3, 3, 3, 1, 1, 1, 0]
    assert lower_scales(torch.zeros(0, 5)).shape == (0,)


def test_of_two_scales_the_greater_of_each_feature_counts():
    """Hand-made maps, each of one number; a head that hands on what it is given."""
    model = detector()
    model.roi_heads.box_head = torch.nn.Flatten()
    views = [
        View({"0": torch.full((1, 256, side // 16, side // 16), value)}, (side, side))
        for side, value in ((192, 5.0), (384, 1.0), (576, 2.0), (768, -3.0))
    ]
    regions = torch.tensor([[0, 0, 550, 550], [100, 50, 324, 274], [64, 64, 96, 96], [0.0, 0, 190, 210]])
    found = region_features(model, ImageFeatures(regions, (576, 576), views), regions, (576, 576))
    areas = [float((box[2] - box[0]) * (box[3] - box[1])) for box in regions]
    taken = [nearest_two([area * (side / 576) ** 2 for side in (192, 384, 576, 768)]) for area in areas]
    assert taken == [[0, 1], [1, 2], [2, 3], [2, 3]]
    assert found.shape == (4, 256 * 14 * 14)
    assert [set(row.tolist()) for row in found] == [{5.0}, {2.0}, {2.0}, {2.0}]


def test_several_scales_are_those_of_a_loop_over_regions(image):
    """Proposals from the size of the training; each region by itself pooled from its two maps."""
    model, scales = detector(), (64, 160, 320, 480, 800)
    with torch.no_grad():
        (found,) = Ensemble([model], ["fp32"], scales=scales)([image])
        _, shape, proposals = look_at(model, image)
        maps = []
        for scale in scales:
            model.transform.min_size, model.transform.max_size = (scale,), 96 * scale / 64
            maps.append(look_at(model, image)[:2])
        features, taken = [], set()
        for region in proposals:
            seen = []
            for pixels, (height, width) in maps:
                place = region * torch.tensor([width / shape[1], height / shape[0]] * 2)
                whole = model.roi_heads.box_head(roi_pool(pixels, [place[None]], 14, 1 / 16))[0]
                seen.append(((place[2] - place[0]) * (place[3] - place[1]), whole))
            low, high = nearest_two([float(area) for area, _ in seen])
            taken.add(low)
            features.append(seen[low][1].maximum(seen[high][1]))
        rows = detected(*judged(model, torch.stack(features), proposals, shape))
    assert len(taken) > 1
    assert_found(found, suppressed(rows), shape, image)


def test_training_s_own_scale_among_others_is_not_computed_twice(image):
    model, passes = detector(), []
    model.backbone.register_forward_hook(lambda _, given, __: passes.append(tuple(given[0].shape[2:])))
    with torch.no_grad():
        Ensemble([model], ["fp32"], scales=(32, 64, 128))([image])
    assert passes == [(64, 96), (32, 64), (128, 192)]


def test_scales_are_named_and_an_image_smaller_than_the_smallest_is_enlarged(test):
    found = test("scales=[100,150]")
    assert found["scales"] == [100, 150]
    assert "; regions at two of the scales 100, 150, where their area is nearest to 224x224" in found["protocol"]
    assert all(0 <= found[key] <= 100 for key in ("map", "map07", "map10"))


def test_an_image_of_which_nothing_is_left_at_the_smallest_scale_is_told(tree, test, tmp_path):  # noqa: F811
    copy = tmp_path / "other"
    shutil.copytree(tree, copy)
    name = (copy / "ImageSets/Main/test.txt").read_text().split()[-1]  # which has no boxes
    Image.new("RGB", (80, 1)).save(copy / f"JPEGImages/{name}.jpg")
    path = copy / f"Annotations/{name}.xml"
    path.write_text(path.read_text().replace("<width>96</width><height>72</height>", ""))
    assert test(f"data.root={copy}")["images"] == 5
    told = test(f"data.root={copy}", "scales=[32,64]", code=2)
    assert f"{name}.jpg: is 80x1; brought to 48 pixels, nothing is left of its width" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["scales=[]"], "scales=[]: give two or more, as [200,400,600,800,1000]"),
        (["scales=[600]"], "scales=[600]: give two or more"),
        (["scales=[400,200]"], "scales=[400, 200]: must rise, as [200,400,600,800,1000] does"),
        (["scales=[200,200]"], "scales=[200, 200]: must rise"),
        (["scales=[16,200]"], "scales=16: must be at least 32"),
        (["scales=600"], "scales=600: must be a list, such as [256,480]"),
        (["scales=200,400"], "or write a list, as in scales=[…]"),
        (["refine=2"], "refine=2: must be true or false"),
        (["score=0.5"], "there is no key score"),
        (["data.root=nowhere"], "data.root="),
        (["data.test=tets"], "data.test=tets: "),
    ],
)
def test_what_a_test_cannot_be_is_told_in_one_line(test, words, told):
    assert told in test(*words, code=2)


# --- Ensembles --------------------------------------------------------------------------------------------------------


def test_the_union_has_each_box_once_in_order():
    one, two = torch.tensor([[0.0, 0, 1, 1], [0, 0, 2, 2]]), torch.tensor([[0.0, 0, 2, 2], [0, 0, 3, 3]])
    assert union([one, two, two]).tolist() == [[0, 0, 1, 1], [0, 0, 2, 2], [0, 0, 3, 3]]
    assert union([torch.zeros(0, 4), two]).tolist() == two.tolist()
    assert union([two, torch.zeros(0, 4)]).tolist() == two.tolist()
    assert union([torch.zeros(0, 4)] * 2).shape == (0, 4)
    many, more = torch.randint(0, 6, (2, 300, 4)).float()
    fresh = [box for box in more.tolist() if box not in many.tolist()]
    assert 0 < len(fresh) < 300
    assert union([many, more]).tolist() == many.tolist() + fresh


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.root=nowhere"], "data.root=nowhere: there is no such folder"),
        (["data.test=tset"], "has test, train; did you mean test?"),
    ],
)
def test_a_list_that_is_not_there_is_told_at_once(saved, tree, tmp_path, monkeypatch, words, told):  # noqa: F811
    """Of a checkpoint in its run's folder, which says where the pictures lie."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(saved, tmp_path / "run/checkpoints/last.pt")
    (tmp_path / "run/config.json").write_text(json.dumps({"data": {"root": str(tree)}}))
    with pytest.raises(UserError, match=re.escape(told)):
        check_test(compose("test", ["checkpoint=run/checkpoints/last.pt", *words]))


def test_the_lists_of_the_data_set_are_no_ones_mistake(tree, tmp_path):  # noqa: F811
    with pytest.raises(UserError) as error:
        check_detect(compose("detect", ["data=voc", f"data.root={tree}", "depth=18"]), ["data", "data.root", "depth"])
    assert str(error.value) == (
        f"data.train: the default, 2007_trainval, is not there; {tree} has test, train; say which, as in"
        " data.train=[train]"
    )


@pytest.mark.parametrize("options", [{}, {"refine": True, "scales": (48, 96)}])
def test_an_ensemble_of_the_same_net_twice_is_that_net(image, options):
    model = detector()
    with torch.no_grad():
        (wanted,) = Ensemble([model], ["fp32"], **options)([image])
        (found,) = Ensemble([model, model], ["fp32"] * 2, **options)([image])
    assert len(wanted["boxes"]) > 2
    assert same(found, wanted)


def test_an_ensemble_is_the_mean_over_the_union_of_proposals_before_anything_is_suppressed(image):
    """Of two that see the image at different sizes, in the pixels of the first."""
    models, passes = [detector(), detector(seed=5)], []
    models[1].transform.min_size, models[1].transform.max_size = (96,), 144
    for model in models:
        model.roi_heads.box_head.register_forward_hook(lambda *found: passes.append(len(found[2])))
    with torch.no_grad():
        (found,) = Ensemble(models, ["fp32", "fp32"])([image])
        assert passes == [40, 40]
        (first, shape, own), (second, other, more) = (look_at(model, image) for model in models)
        factors = torch.tensor([other[1] / shape[1], other[0] / shape[0]] * 2)
        regions, parts = torch.cat([own, more / factors]), []
        for model, maps, places in ((models[0], first, regions), (models[1], second, regions * factors)):
            whose = torch.cat([torch.zeros(40, 1), places], 1)
            features = model.roi_heads.box_head(roi_pool(maps, whose, 14, 1 / 16))
            parts.append(judged(model, features, regions, shape))
        scores, boxes = ((one + two) / 2 for one, two in zip(*parts, strict=True))
    rows = detected(scores, boxes)
    assert_found(found, suppressed(rows), shape, image)


@pytest.mark.parametrize("kind", ["resnet", "context", "pyramid", "vgg16"])
@pytest.mark.parametrize("options", [{}, {"refine": True}, {"refine": True, "scales": (48, 96)}])
def test_without_proposals_nothing_is_found_and_nothing_is_a_nan(image, kind, options):
    """Of one without any, and of one beside it: what the other proposes counts."""
    none, some = detector(kind), detector(kind, seed=5)
    none.rpn.min_size = 1e6
    with torch.no_grad():
        (found,) = Ensemble([none], ["fp32"], **options)([image])
        (both,) = Ensemble([none, some], ["fp32"] * 2, **options)([image])
    assert [len(value) for value in found.values()] == [0, 0, 0]
    assert found["boxes"].shape == (0, 4)
    assert len(both["boxes"]) > 0
    assert all(value.isfinite().all() for value in both.values())


def test_an_ensemble_names_its_members_and_its_file(save, saved, command_here):
    other = save("two", "seed=3", "min_size=48", "anchors=[16,24,64]")  # each has proposals of its own anchors
    words = ("test", saved, other, "device=cpu", "refine=true", "scales=[48,96]")
    told = command_here("detect", *words)
    (path,) = saved.parent.glob("ensemble-of-2-??????-refine-scales-48-96-test.json")
    assert "on tree test, every test image once, whole; 2 detectors on the union" in told
    found = json.loads(path.read_text())
    assert found["net"] == "ensemble of 2"
    assert [(one["checkpoint"], one["seed"], one["min_size"]) for one in found["members"]] == [
        (str(saved), 0, 64),
        (str(other), 3, 48),
    ]


def test_detectors_that_do_not_go_together_are_told(save, saved, tree, test, tmp_path):  # noqa: F811
    copy = tmp_path / "other"
    shutil.copytree(tree, copy)
    for path in copy.glob("Annotations/*.xml"):
        path.write_text(path.read_text().replace("disc", "moon"))
    told = test(f"checkpoint=[{saved},{save('classes', f'data.root={copy}')}]", f"data.root={tree}", code=2)
    assert "has classes=['disc','square','star'] and" in told
    assert "classes=['moon','square','star']; an ensemble has the same in all its members" in told
    shutil.copytree(tree, tmp_path / "same")
    assert "data.root=" in test(f"checkpoint=[{saved},{save('root', f'data.root={tmp_path}/same')}]", code=2)
    assert "is named twice" in test(f"checkpoint=[{saved},{saved}]", code=2)


# --- Global context ---------------------------------------------------------------------------------------------------


def test_the_context_of_a_region_is_its_whole_image_through_the_same_layers():
    """Three images of different sizes, of which one has no region: each is beside what pooling all of it gives."""
    model, plain = detector("context"), detector()
    plain.roi_heads.box_head.load_state_dict(model.roi_heads.box_head.state_dict())
    maps, shapes = {"0": torch.rand(3, 256, 6, 8)}, [(96, 128), (64, 80), (90, 90)]
    boxes = [torch.tensor([[0.0, 0, 40, 60], [20, 30, 128, 96]]), torch.tensor([[1.0, 2, 50, 60]]), torch.zeros(0, 4)]
    with torch.no_grad():
        found = model.roi_heads.box_head(model.roi_heads.box_roi_pool(maps, boxes, shapes))
        own = plain.roi_heads.box_head(plain.roi_heads.box_roi_pool(maps, boxes, shapes))
        wholes = [torch.tensor([[number, 0, 0, shape[1], shape[0]]]).float() for number, shape in enumerate(shapes)]
        context = [plain.roi_heads.box_head(roi_pool(maps["0"], whole, 14, 1 / 16)) for whole in wholes]
    assert found.shape == (3, 1024)
    torch.testing.assert_close(found[:, :512], own)
    torch.testing.assert_close(found[:, 512:], torch.cat([context[0], context[0], context[1]]))
    assert model.roi_heads.box_predictor.cls_score.in_features == 1024


def test_a_detector_with_context_begins_with_the_weights_of_a_net_and_learns(tree, pretrained):  # noqa: F811
    config = configured(tree, "context=true", f"init_from={pretrained}")
    assert config.net == "resnet-18-context"
    task = build(config, read_examples(config), CPU)
    weights = torch.load(pretrained, weights_only=True)
    assert torch.equal(task.model.roi_heads.box_head.layer4[0].conv1.weight, weights["layer4.0.conv1.weight"])
    before = task.model.roi_heads.box_predictor.cls_score.weight.clone()
    task.step(next(iter(task.batches())), 0.01)
    moved = (task.model.roi_heads.box_predictor.cls_score.weight != before).any(0)
    assert moved[:512].any()
    assert moved[512:].any()


def test_training_with_context_goes_on_from_a_checkpoint_to_the_same_weights(tree, tmp_path):  # noqa: F811
    config = configured(tree, "context=true", "iterations=3")
    examples = read_examples(config)

    def trained(task, steps):
        for batch in itertools.islice(task.batches(), steps):
            task.step(batch, task.learning_rate())
        return task

    whole = trained(build(config, examples, CPU), 3)
    checkpoint.save(tmp_path / "last.pt", trained(build(config, examples, CPU), 2).state())
    state = checkpoint.load(tmp_path / "last.pt", kind="detector")
    again = trained(build(config, examples, CPU, state | {"path": "last.pt"}), 1)
    assert again.iteration == whole.iteration == 3
    assert all(torch.equal(value, whole.model.state_dict()[name]) for name, value in again.model.state_dict().items())


def test_context_is_tested_with_all_else(save, test):
    path = save("context", "context=true")
    found = test(f"checkpoint={path}", "refine=true", "scales=[48,96]")
    assert found["net"] == "resnet-18-context"


def test_context_goes_with_conv5_on_each_region_alone(tree):  # noqa: F811
    with pytest.raises(UserError, match="context=true: is for conv5_x on each region"):
        configured(tree, "context=true", "pyramid=true", "anchors=[16,32,64,128,256]")
    with pytest.raises(UserError, match="context=true: is not used by backbone=vgg16"):
        configured(tree, "context=true", "backbone=vgg16")
