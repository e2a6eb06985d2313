"""VOC's rule against cases by hand and the devkit's own arithmetic in pixels; COCO's against pycocotools."""

import contextlib
import io
import logging
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from resnet_train.detection.annotations import Example
from resnet_train.detection.metrics import COCO_FIGURES, as_columns, coco_map, in_words, voc_ap, voc_curve, voc_map
from resnet_train.errors import RunError, UserError

BOX = [0, 0, 10, 10]
NOTHING = {"map07": None, "map10": None}


def edges(rows):
    """The boxes (n, 4) of rows that begin with one."""
    return torch.tensor(np.array([row[0] for row in rows]).reshape(-1, 4), dtype=torch.float32)


def example(objects, image_id=1, size=1000):
    """An image with `objects`: (box, label, ignored), and the area where it is not the box's."""
    boxes = edges(objects)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return Example(
        path=Path(f"{image_id}.jpg"),
        name=str(image_id),
        image_id=image_id,
        width=size,
        height=size,
        boxes=boxes,
        labels=torch.tensor([row[1] for row in objects], dtype=torch.int64),
        ignored=torch.tensor([row[2] for row in objects], dtype=torch.bool),
        areas=torch.tensor(
            [row[3] if len(row) > 3 else area for row, area in zip(objects, areas, strict=True)], dtype=torch.float32
        ),
    )


def detected(found):
    """torchvision's output for `found`: (box, score, label)."""
    return {
        "boxes": edges(found),
        "scores": torch.tensor([row[1] for row in found], dtype=torch.float32),
        "labels": torch.tensor([row[2] for row in found], dtype=torch.int64),
    }


def curve(objects, found, **options):
    """Recall and precision, as lists, of class 1 in one image. Objects: (box, difficult); found: (box, score)."""
    image = example([(box, 1, difficult) for box, difficult in objects])
    recall, precision = voc_curve(
        *as_columns([image], [detected([(box, score, 1) for box, score in found])]), 1, **options
    )
    return recall.tolist(), precision.tolist()


# VOC, by hand


def test_both_precisions_of_a_curve():
    # Five objects; right, wrong, right, wrong, right: two are never found. The greatest precision from a recall on is
    # 1 down to 1/5, 2/3 down to 2/5, 3/5 down to 3/5, then 0.
    recall, precision = np.array([1, 1, 2, 2, 3]) / 5, np.array([1, 1 / 2, 2 / 3, 2 / 4, 3 / 5])
    # At 0, .1, .2: 1; at .3, .4: 2/3; at .5, .6: 3/5; at .7 to 1: 0. (3 + 4/3 + 6/5) / 11 = 83/165
    assert voc_ap(recall, precision, points11=True) == pytest.approx(83 / 165, abs=1e-15)
    # 1/5 (1 + 2/3 + 3/5) = 34/75
    assert voc_ap(recall, precision, points11=False) == pytest.approx(34 / 75, abs=1e-15)


def test_precision_rises_to_the_best_that_comes_later():
    # Two objects; wrong, right, right: 0, 1/2, 2/3. From every recall on 2/3 is to be had.
    recall, precision = np.array([0, 1, 2]) / 2, np.array([0, 1 / 2, 2 / 3])
    assert voc_ap(recall, precision, points11=True) == pytest.approx(2 / 3, abs=1e-15)
    assert voc_ap(recall, precision, points11=False) == pytest.approx(2 / 3, abs=1e-15)


@pytest.mark.parametrize("total", [10, 20, 30, 70, 1000])
def test_a_recall_of_tenths_reaches_its_point(total):
    """0.1 * 3 is above 3 / 10: thresholds made that way would pass over it."""
    for tenths in range(11):
        recall = np.array([tenths * total // 10]) / total
        assert voc_ap(recall, np.ones(1), points11=True) == pytest.approx((tenths + 1) / 11, abs=1e-15)


@pytest.mark.parametrize("points11", [True, False])
def test_an_empty_curve_has_no_precision(points11):
    assert voc_ap(np.empty(0), np.empty(0), points11=points11) == 0


def test_a_second_detection_of_an_object_is_wrong():
    # 1 right of 1, then 1 right of 2.
    assert curve([(BOX, False)], [(BOX, 0.9), (BOX, 0.8)]) == ([1, 1], [1, 1 / 2])


def test_the_higher_score_takes_the_object():
    # The first in the list has a lower score and overlaps better: it comes second, and the object is taken.
    worse = [0, 0, 10, 12]  # 100 / 120
    assert curve([(BOX, False), ([50, 50, 60, 60], False)], [(BOX, 0.8), (worse, 0.9)]) == ([1 / 2, 1 / 2], [1, 1 / 2])


@pytest.mark.parametrize("times", [1, 2])
def test_a_difficult_object_counts_neither_way(times):
    # However often it is found: one object is to be found, it is found, and nothing else counts.
    far = [50, 50, 60, 60]
    assert curve([(BOX, False), (far, True)], [*[(far, 0.9)] * times, (BOX, 0.8)]) == ([1], [1])


def test_a_difficult_object_is_not_missed():
    assert curve([(BOX, False), ([50, 50, 60, 60], True)], [(BOX, 0.8)]) == ([1], [1])


def test_too_little_of_a_difficult_object_is_wrong():
    # 40 / 100 of it: wrong. Then the object: 1 of 2.
    found = [([50, 50, 60, 54], 0.9), (BOX, 0.8)]
    assert curve([(BOX, False), ([50, 50, 60, 60], True)], found) == ([0, 1], [0, 1 / 2])


def test_the_best_overlap_decides_though_the_object_is_taken():
    # The second detection, 10 x 9, overlaps the first object by 90 / 100 and the second, 10 x 7 and free, by 70 / 90.
    objects = [(BOX, False), ([0, 0, 10, 7], False)]
    assert curve(objects, [(BOX, 0.9), ([0, 0, 10, 9], 0.8)]) == ([1 / 2, 1 / 2], [1, 1 / 2])


def test_the_best_overlap_decides_though_the_object_is_difficult():
    # The same with a difficult object: not counted, and the free one stays to be found by the next.
    objects = [(BOX, True), ([0, 0, 10, 7], False)]
    assert curve(objects, [([0, 0, 10, 9], 0.9), ([0, 0, 10, 7], 0.8)]) == ([1], [1])


@pytest.mark.parametrize(("difficult", "found"), [((False, True), ([1], [1])), ((True, False), ([], []))])
def test_of_equal_overlaps_the_first_object_is_taken(difficult, found):
    # A plain and a difficult object in one place: found, if the plain one is the first, else not counted.
    assert curve([(BOX, kind) for kind in difficult], [(BOX, 0.9)]) == found


def test_the_first_of_two_objects_in_one_place_is_found_twice():
    assert curve([(BOX, False), (BOX, False)], [(BOX, 0.9), (BOX, 0.8)]) == ([1 / 2, 1 / 2], [1, 1 / 2])


@pytest.mark.parametrize(("height", "right"), [(20, 1), (20.01, 0)])
def test_half_is_enough(height, right):
    # 100 / 200 is exactly a half.
    assert curve([(BOX, False)], [([0, 0, 10, height], 0.9)]) == ([right], [right])


@pytest.mark.parametrize(("threshold", "right"), [(0.7, 1), (0.9, 0)])
def test_another_threshold(threshold, right):
    # 80 / 100
    assert curve([(BOX, False)], [([0, 0, 10, 8], 0.9)], threshold=threshold) == ([right], [right])


def test_boxes_that_only_touch_or_have_no_area_are_wrong():
    found = [([10, 0, 20, 10], 0.9), ([5, 5, 5, 5], 0.8), ([3, 3, 3, 8], 0.7), ([10, 0, 0, 10], 0.6)]
    assert curve([(BOX, False)], found) == ([0] * 4, [0] * 4)  # the last one's area is -100: no union to divide by


def test_the_other_image_and_the_other_class_do_not_count():
    images = [example([(BOX, 1, False)], 1), example([(BOX, 2, False)], 2)]
    found = [detected([(BOX, 0.9, 2)]), detected([(BOX, 0.8, 1)])]
    assert [values.tolist() for values in voc_curve(*as_columns(images, found), 1)] == [[0], [0]]


def test_of_equal_scores_the_first_example_goes_first():
    images, hit, miss = (
        [example([(BOX, 1, False)], number) for number in (2, 1)],
        (BOX, 0.5, 1),
        ([90, 90, 99, 99], 0.5, 1),
    )
    # Right, wrong, right; then, with the detections of the first image turned round, wrong, right, right.
    first, second = (
        voc_curve(*as_columns(images, [detected(rows), detected([hit])]), 1) for rows in ([hit, miss], [miss, hit])
    )
    assert first[1].tolist() == [1, 1 / 2, 2 / 3]
    assert second[1].tolist() == [0, 1 / 2, 2 / 3]


def test_a_class_without_objects_is_left_out_and_one_without_detections_is_0():
    images = [example([(BOX, 1, False), (BOX, 2, True), ([20, 0, 30, 10], 3, False)])]
    found = [detected([(BOX, 0.9, 1), (BOX, 0.8, 2), (BOX, 0.7, 4)])]
    assert voc_curve(*as_columns(images, found), 2) is None
    # 1 is found; 2 has but a difficult object; 3 is missed; 4 has none: (100 + 0) / 2
    assert voc_map(images, found, ["cat", "dog", "cow", "car"]) == {
        "map07": 50,
        "map10": 50,
        "per_class": {
            "cat": {"ap07": 100, "ap10": 100, "objects": 1},
            "dog": {"ap07": None, "ap10": None, "objects": 0},
            "cow": {"ap07": 0, "ap10": 0, "objects": 1},
            "car": {"ap07": None, "ap10": None, "objects": 0},
        },
    }


@pytest.mark.parametrize("images", [[], [example([])]], ids=["no images", "an empty image"])
def test_where_there_is_no_object_there_is_no_figure(images):
    found = [detected([(BOX, 0.9, 1)]) for _ in images]
    row = {"ap07": None, "ap10": None, "objects": 0}
    assert voc_map(images, found, 2) == {**NOTHING, "per_class": {"1": row, "2": row}}
    assert coco_map(images, found, 2) == dict.fromkeys(COCO_FIGURES)


# VOC, by the devkit's arithmetic: pixels from 1, both ends in the box, and exact fractions


def random_pixels(seed, classes=2):
    """Images as [(xmin, ymin, xmax, ymax), class, difficult] and detections as [pixels, score, class]; scores recur."""
    random = np.random.default_rng(seed)

    def pixels(near=None):
        start, length = random.integers(1, 25, 2), random.integers(0, 16, 2)
        if near is not None and random.random() < 0.8:
            start = (np.array(near[:2]) + random.integers(-2, 3, 2)).clip(1)
            length = (np.array(near[2:]) - near[:2] + random.integers(-2, 3, 2)).clip(0)
        return (*start.tolist(), *(start + length).tolist())

    images, found = [], []
    for _ in range(12):
        objects = [
            (pixels(), int(random.integers(1, classes + 1)), bool(random.random() < 0.25))
            for _ in range(random.integers(0, 7))
        ]
        near = [objects[i][0] for i in random.integers(0, len(objects), 12)] if objects else [None] * 3
        images.append(objects)
        found.append([(pixels(box), random.integers(0, 40) / 40, int(random.integers(1, classes + 1))) for box in near])
    return images, found


def devkit_outcomes(images, found, label):
    """VOCevaldet.m in whole numbers: the number of objects, and for each detection right, wrong or None."""
    taken, outcomes = set(), []
    queue = [(row, number) for number, rows in enumerate(found) for row in rows if row[2] == label]
    for (box, _, _), number in sorted(queue, key=lambda item: -item[0][1]):
        most, best = Fraction(-1), None
        for place, (other, kind, _) in enumerate(images[number]):
            width = min(box[2], other[2]) - max(box[0], other[0]) + 1
            height = min(box[3], other[3]) - max(box[1], other[1]) + 1
            if kind != label or width <= 0 or height <= 0:
                continue
            both = sum((b[2] - b[0] + 1) * (b[3] - b[1] + 1) for b in (box, other))
            overlap = Fraction(width * height, both - width * height)
            if overlap > most:
                most, best = overlap, place
        if most < Fraction(1, 2):
            outcomes.append("wrong")
        elif images[number][best][2]:
            outcomes.append(None)
        else:
            outcomes.append("wrong" if (number, best) in taken else "right")
            taken.add((number, best))
    return sum(kind == label and not difficult for objects in images for _, kind, difficult in objects), outcomes


def devkit_precisions(total, outcomes):
    """The two average precisions as fractions, straight from their definitions."""
    counted = [outcome for outcome in outcomes if outcome]
    rights = [counted[:n].count("right") for n in range(1, len(counted) + 1)]
    points = [(Fraction(right, total), Fraction(right, n)) for n, right in enumerate(rights, 1)]

    def best(least):
        return max((precision for recall, precision in points if recall >= least), default=Fraction(0))

    eleven = sum(best(Fraction(tenths, 10)) for tenths in range(11)) / 11
    area = sum(best(Fraction(step, total)) for step in range(1, total + 1)) / total
    return eleven, area


def continuous(box):
    """A box of pixels from 1, both ends in it, by its edges."""
    return [box[0] - 1, box[1] - 1, box[2], box[3]]


@pytest.mark.parametrize("seed", range(8))
def test_edges_give_what_the_devkit_gives_for_pixels(seed):
    images, found = random_pixels(seed)
    examples = [
        example([(continuous(box), *rest) for box, *rest in objects], number) for number, objects in enumerate(images)
    ]
    detections = [detected([(continuous(box), *rest) for box, *rest in rows]) for rows in found]
    means = []
    for label in (1, 2):
        total, outcomes = devkit_outcomes(images, found, label)
        assert {None, "right", "wrong"} <= set(outcomes)  # the set tries the rule
        counted = [outcome for outcome in outcomes if outcome]
        rights = [counted[:n].count("right") for n in range(1, len(counted) + 1)]
        recall, precision = voc_curve(*as_columns(examples, detections), label)
        assert recall.tolist() == [right / total for right in rights]
        assert precision.tolist() == [right / n for n, right in enumerate(rights, 1)]
        means.append(devkit_precisions(total, outcomes))
    found = voc_map(examples, detections, 2)
    for year, both in zip(("07", "10"), zip(*means, strict=True), strict=True):
        assert [found["per_class"][name][f"ap{year}"] for name in "12"] == pytest.approx(
            [100 * float(ap) for ap in both], abs=1e-12
        )
        assert found[f"map{year}"] == pytest.approx(100 * float(sum(both)) / 2, abs=1e-12)


# COCO


def random_set(seed, *, images=25, labels=(1, 2, 3), distinct=False):
    """Examples with crowds and without objects, of all sizes; detections near and far, also without and above 100."""
    random = np.random.default_rng(seed)

    def box(near=None):
        side = np.exp(random.uniform(np.log(4), np.log(300), 2))
        start = random.uniform(0, 500, 2)
        if near is not None and random.random() < 0.8:
            start, side = near[:2] + random.normal(0, 2, 2), (near[2:] - near[:2]) * random.uniform(0.85, 1.15, 2)
        return np.concatenate([start, start + side])

    examples, detections, ids = [], [], random.permutation(10 * images)[:images].tolist()
    for number, image_id in enumerate(ids):
        kinds = random.choice(labels, random.integers(0, 8)).tolist()
        boxes = [box() for _ in kinds]
        areas = [(corners[2:] - corners[:2]).prod() * random.uniform(0.5, 1) for corners in boxes]
        crowds = (random.random(len(kinds)) < 0.15).tolist()
        examples.append(example(list(zip(boxes, kinds, crowds, areas, strict=True)), image_id))
        found = []
        for _ in range(130 if number == 0 else random.integers(0, 30)):
            place = random.integers(0, len(kinds)) if kinds else None
            kind = kinds[place] if kinds and random.random() < 0.8 else int(random.choice(labels))
            near = boxes[place] if kinds else None
            found.append((box(near), random.integers(1, 30) / 30, 1 if number == 0 else kind))
        detections.append(detected(found))
    if distinct:
        scores = torch.from_numpy(random.permutation(sum(len(found["scores"]) for found in detections))).float()
        for found, part in zip(detections, scores.split([len(found["scores"]) for found in detections]), strict=True):
            found["scores"] = part / len(scores)
    return examples, detections


def by_pycocotools(examples, detections, category_ids):
    """The twelve figures of pycocotools in %, None for its -1."""

    def data_set(rows):
        made = COCO()
        made.dataset = {
            "images": [{"id": image.image_id} for image in examples],
            "categories": [{"id": number} for number in category_ids],
            "annotations": [{"id": number, **row} for number, row in enumerate(rows, 1)],
        }
        made.createIndex()
        return made

    def row(image, box, label, **more):
        left, top, right, bottom = map(float, box)
        sides = right - left, bottom - top
        known = {"area": sides[0] * sides[1], "iscrowd": 0, **more}
        return {
            "image_id": image.image_id,
            "category_id": category_ids[label - 1],
            "bbox": [left, top, *sides],
            **known,
        }

    truth = [
        row(image, box, label, area=float(area), iscrowd=int(ignored))
        for image in examples
        for box, label, area, ignored in zip(image.boxes, image.labels, image.areas, image.ignored, strict=True)
    ]
    found = [
        row(image, box, label, score=float(score))
        for image, those in zip(examples, detections, strict=True)
        for box, label, score in zip(those["boxes"], those["labels"], those["scores"], strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        judge = COCOeval(data_set(truth), data_set(found), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return [None if value == -1 else 100 * value for value in judge.stats]


def agrees(examples, detections, category_ids=(7, 3, 90)):
    """Our figures, which must be those of pycocotools."""
    ours = coco_map(examples, detections, ["cat", "dog", "cow"], list(category_ids))
    assert tuple(ours) == COCO_FIGURES
    theirs = by_pycocotools(examples, detections, category_ids)
    assert [value is None for value in ours.values()] == [value is None for value in theirs]
    known = [(a, b) for a, b in zip(ours.values(), theirs, strict=True) if b is not None]
    assert [a for a, _ in known] == pytest.approx([b for _, b in known], abs=1e-12)
    return ours


@pytest.mark.parametrize("seed", range(6))
def test_coco_is_pycocotools(seed):
    ours = agrees(*random_set(seed))
    assert None not in ours.values()
    assert len(set(ours.values())) == len(COCO_FIGURES)  # the set tells the figures apart


def test_coco_with_a_class_that_has_no_object():
    examples, _ = random_set(1, labels=(1, 3))
    _, detections = random_set(1)
    assert agrees(examples, detections)["map"] > 0


def test_coco_without_detections_is_0():
    examples, detections = random_set(2)
    assert set(agrees(examples, [detected([]) for _ in detections]).values()) == {0}


def test_coco_with_crowds_only_has_no_figure():
    _, detections = random_set(3)
    assert set(agrees([example([(BOX, 1, True)], number) for number in range(25)], detections).values()) == {None}


def test_coco_by_hand():
    # 78 / 100 of the object: right for .5, .55, …, .75, which are 6 of the 10; small, since it has less than 32 x 32.
    ours = coco_map([example([(BOX, 1, False)])], [detected([([0, 0, 10, 7.8], 0.9, 1)])], 1)
    assert ours["map"] == ours["small"] == ours["recall1"] == pytest.approx(60, abs=1e-12)
    assert ours["map50"] == ours["map75"] == pytest.approx(100, abs=1e-12)
    assert ours["medium"] is None
    assert ours["large"] is None


def test_coco_without_names_or_ids_is_the_same():
    examples, detections = random_set(4)
    assert coco_map(examples, detections, 3) == coco_map(examples, detections, ["a", "b", "c"], [1, 5, 9])


def test_coco_says_nothing(caplog, capfd):
    with caplog.at_level(logging.DEBUG):
        coco_map(*random_set(5), 3)
    assert caplog.records == []
    assert capfd.readouterr() == ("", "")


def test_without_the_package_it_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(UserError, match=r"^.*needs faster-coco-eval: pip install 'resnet-train\[detection\]'$"):
        coco_map([], [], 1)


# Both


def both(examples, detections):
    return voc_map(examples, detections, 3), coco_map(examples, detections, 3)


@pytest.mark.parametrize("seed", range(3))
def test_order_does_not_matter(seed):
    examples, detections = random_set(seed, distinct=True)
    random = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(examples), generator=random).tolist()
    shuffled = []
    for index in order:
        rows = torch.randperm(len(detections[index]["scores"]), generator=random)
        shuffled.append({name: values[rows] for name, values in detections[index].items()})
    assert both([examples[index] for index in order], shuffled) == both(examples, detections)


def test_detections_that_are_the_objects_give_100():
    examples, _ = random_set(0)
    found = [
        {"boxes": e.boxes[~e.ignored], "labels": e.labels[~e.ignored], "scores": torch.rand(int((~e.ignored).sum()))}
        for e in examples
    ]
    voc, coco = both(examples, found)
    figures = [
        voc["map07"],
        voc["map10"],
        *(coco[name] for name in COCO_FIGURES if name not in ("recall1", "recall10")),
    ]
    assert figures == pytest.approx([100] * len(figures), abs=1e-12)


def test_detections_of_half_precision_are_taken():
    """Scores under autocast may be bfloat16, which numpy does not know."""
    images, found = [example([(BOX, 1, False)])], detected([(BOX, 0.5, 1)])
    half = {**found, "scores": found["scores"].bfloat16()}
    assert voc_map(images, [half], 1)["map10"] == coco_map(images, [half], 1)["map50"] == pytest.approx(100)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("field", ["boxes", "scores"])
@pytest.mark.parametrize("measure", [voc_map, coco_map])
def test_a_detection_that_is_not_finite_is_an_error(bad, field, measure):
    images = [example([(BOX, 1, False)], number) for number in (4, 5)]
    found = [detected([(BOX, 0.9, 1)]) for _ in images]
    found[1][field].view(-1)[0] = bad
    with pytest.raises(RunError, match=r"^5: a box or score found is not finite; [^\n]+$"):
        measure(images, found, 1)


@pytest.mark.parametrize(
    ("data", "more", "words"),
    [
        ("voc", {}, "mAP 1.00 % by VOC 2007's rule, 2.00 % by VOC 2010's, 3.00 % by COCO's @[.5,.95]"),
        ("coco", {}, "mAP 3.00 % by COCO's rule @[.5,.95], 4.00 % @.5, 1.00 % by VOC 2007's"),
        (
            "coco",
            {"mask_map": 5, "mask_map50": 6},
            "mAP 3.00 % by COCO's rule @[.5,.95], 4.00 % @.5, 1.00 % by VOC 2007's; of masks 5.00 %, 6.00 % @.5",
        ),
    ],
)
def test_three_figures_are_told_in_words_that_of_the_data_s_own_rule_first(data, more, words):
    assert in_words({"map07": 1, "map10": 2, "map": 3, "map50": 4, "recall1": 9, **more}, data) == words
