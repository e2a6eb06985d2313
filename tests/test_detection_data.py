"""VOC trees and COCO's JSON as boxes; what is wrong with one is told in one line, or counted, and is never a NaN."""

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from resnet_train.config.compose import compose
from resnet_train.config.detection import check_detect
from resnet_train.detection.annotations import load
from resnet_train.detection.coco import read_coco
from resnet_train.detection.voc import VOC_CLASSES, read_voc
from resnet_train.engine.boxes import fault_lines
from resnet_train.errors import UserError

WIDTH, HEIGHT = 40, 30
CUT = "boxes cut at the image's edge"
NO_AREA = "boxes left out: no area or swapped corners"
OUTSIDE = "boxes left out: outside of the image"
NO_NUMBER = "boxes left out: not a finite number"
UNKNOWN = "boxes left out: unknown class"
INCOMPLETE = "boxes left out: fields missing or of the wrong type"
BAD_ANNOTATION = "images left out: unreadable annotation"
NO_IMAGE = "images left out: no image file"
OTHER_SIZE = "images left out: not of the annotated size"
TWICE = "images left out: given twice"


def draw(path, mode="RGB", size=(WIDTH, HEIGHT)):
    """An image file of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 200 if mode in ("L", "P") else (200,) * len(mode)).save(path)


def refused(told, *words):
    """A UserError of one line that says all `words`."""
    message = str(told.value)
    assert "\n" not in message
    for word in words:
        assert str(word) in message


# --- Pascal VOC ------------------------------------------------------------------------------------------------------


def thing(box=(11, 6, 20, 15), name="dog", difficult=0, parts=""):
    """An object's XML; `box`: xmin, ymin, xmax, ymax as they are written."""
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    named = f"<name>{name}</name>" if name is not None else ""
    return f"<object>{named}<difficult>{difficult}</difficult><bndbox>{corners}</bndbox>{parts}</object>"


def annotation(*things, size=(WIDTH, HEIGHT), filename=""):
    """An annotation's XML."""
    given_size = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    return f"<annotation><filename>{filename}</filename>{given_size}{''.join(things)}</annotation>"


def add(tree, name, text, lists=()):
    """An image with its annotation, and its name in `lists`."""
    draw(tree / "JPEGImages" / f"{name}.jpg")
    for folder in ("Annotations", "ImageSets/Main"):
        (tree / folder).mkdir(parents=True, exist_ok=True)
    (tree / "Annotations" / f"{name}.xml").write_text(text)
    for key in lists:
        with (tree / "ImageSets/Main" / f"{key}.txt").open("a") as file:
            file.write(f"{name}\n")


@pytest.fixture
def tree(tmp_path):
    """A tree with a dog in each of a, b and c; c is the test."""
    for name, key in (("a", "trainval"), ("b", "trainval"), ("c", "test")):
        add(tmp_path / "tree", name, annotation(thing()), [key])
    return tmp_path / "tree"


def read(tree, broken="stop", train=("trainval",), test="test", classes=None):
    return read_voc(tree, train=list(train), test=test, classes=classes, broken=broken)


@pytest.mark.parametrize(
    ("part", "train", "test"), [("", "2007_trainval", "2007_test"), ("VOC2007", "trainval", "test")]
)
@pytest.mark.parametrize("broken", ["stop", "skip"])
def test_bccd_is_what_a_search_in_its_files_finds(real_data, part, train, test, broken):
    root = real_data("bccd") / part
    found = read(root, broken, [train], test)
    assert found.classes == ["Platelets", "RBC", "WBC"]
    assert found.category_ids == [1, 2, 3]
    assert found.faults == {}
    tree = real_data("bccd") / "VOC2007"
    for examples, name in ((found.train, "trainval"), (found.test, "test")):
        names = (tree / f"ImageSets/Main/{name}.txt").read_text().split()
        texts = [(tree / f"Annotations/{word}.xml").read_text() for word in names]
        kinds = Counter(kind for text in texts for kind in re.findall("<name>(.*?)</name>", text))
        assert Counter(found.classes[label - 1] for e in examples for label in e.labels.tolist()) == kinds
        assert [e.name for e in examples] == [word if part else f"VOC2007/{word}" for word in names]
        corners = [
            [re.findall(f"<{key}>(.*?)</{key}>", text) for key in ("xmin", "ymin", "xmax", "ymax")] for text in texts
        ]
        wanted = [torch.tensor(np.array(rows, dtype="float32").T - [1, 1, 0, 0]) for rows in corners]
        assert all(torch.equal(e.boxes, boxes.float()) for e, boxes in zip(examples, wanted, strict=True))
    assert [len(found.train), len(found.test)] == [292, 72]
    assert [e.image_id for e in (*found.train, *found.test)] == list(range(1, 365))
    assert load(found.test[0]).shape == (3, 480, 640)


def test_pixels_count_from_one_and_both_ends_are_in_the_box(tree):
    # Columns 3 to 7 are five pixels, from the edge at 2 to that at 7; the whole image is 1 to its width.
    add(tree, "a", annotation(thing((3, 2, 7, 2)), thing((1, 1, WIDTH, HEIGHT)), thing((40, 30, 40, 30))))
    example = read(tree).train[0]
    assert example.boxes.tolist() == [[2, 1, 7, 2], [0, 0, 40, 30], [39, 29, 40, 30]]
    assert example.areas.tolist() == [5, 1200, 1]
    kinds = [example.boxes.dtype, example.labels.dtype, example.ignored.dtype, example.areas.dtype]
    assert kinds == [torch.float32, torch.int64, torch.bool, torch.float32]
    assert read(tree).faults == {}


@pytest.mark.parametrize("broken", ["stop", "skip"])
def test_a_box_partly_outside_is_cut_and_counted(tree, broken):
    """Such as one of a tree that counts from 0."""
    add(tree, "a", annotation(thing((0, 0, 9, 9)), thing((31, 21, 41, 99)), thing((-5, -6, 500, 600)), thing()))
    found = read(tree, broken)
    assert found.train[0].boxes.tolist() == [[0, 0, 9, 9], [30, 20, 40, 30], [0, 0, 40, 30], [10, 5, 20, 15]]
    assert found.train[0].areas.tolist() == [81, 100, 1200, 100]
    assert found.faults == {CUT: 3}
    where = f"{tree}/Annotations/a.xml: object 1 ('dog'): the box from 0,0 to 9,9"
    assert fault_lines(found) == [f"3 {CUT}, the first: {where} leads out of its image, which is 40x30"]


@pytest.mark.parametrize("broken", ["stop", "skip"])
def test_a_box_of_which_the_cut_leaves_nothing_is_left_out_and_counted(tree, broken):
    # From 39.9999999 to 45: inside there is 1e-7 of a pixel, which is 0 in float32.
    add(tree, "a", annotation(thing((40.9999999, 2, 45, 9)), thing()))
    found = read(tree, broken)
    assert found.train[0].boxes.tolist() == [[10, 5, 20, 15]]
    assert found.faults == {NO_AREA: 1}


def test_a_box_of_a_fiftieth_of_a_pixel_is_one(tree):
    add(tree, "a", annotation(thing((40, 6, 39.02, 15)), thing((11, 30, 20, 29.02))))
    widths = (read(tree).train[0].boxes[:, 2:] - read(tree).train[0].boxes[:, :2]).tolist()
    assert widths == [pytest.approx([0.02, 10], abs=1e-5), pytest.approx([10, 0.02], abs=1e-5)]


def test_coordinates_may_have_fractions_and_blanks(tree):
    add(tree, "a", annotation(thing(("1.5", " 2.25\n", "+7", "8e0"))))
    assert read(tree).train[0].boxes.tolist() == [[0.5, 1.25, 7, 8]]


def test_difficult_objects_are_ignored_and_parts_are_no_objects(tree):
    head = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    plain = thing().replace("<difficult>0</difficult>", "")
    nested = thing().replace("<object>", f"<object><part>{head}{thing((1, 1, 2, 2), 'cat')}</part>{head}")
    add(tree, "a", annotation(thing(difficult=1, parts=head), nested, plain))
    found = read(tree)
    assert found.train[0].ignored.tolist() == [True, False, False]
    assert found.train[0].boxes.tolist() == [[10, 5, 20, 15]] * 3


def test_an_image_without_objects_is_a_negative(tree):
    add(tree, "b", annotation())
    add(tree, "d", annotation(), ["test"])
    found = read(tree)
    for example in (found.train[1], found.test[1]):
        assert [example.boxes.shape, example.labels.shape, example.ignored.shape, example.areas.shape] == [
            (0, 4),
            *[(0,)] * 3,
        ]
    assert found.faults == {}


def test_classes_are_vocs_or_those_of_the_training_images_or_as_given(tree):
    assert read(tree).classes == list(VOC_CLASSES)
    assert len(set(VOC_CLASSES)) == 20
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES)
    assert read(tree).train[0].labels.tolist() == [VOC_CLASSES.index("dog") + 1]
    add(tree, "b", annotation(thing(name="zebra"), thing(name=" an\n ant ")))
    found = read(tree)
    assert found.classes == ["an ant", "dog", "zebra"]
    assert found.category_ids == [1, 2, 3]
    assert found.train[1].labels.tolist() == [3, 1]
    given = ["zebra", "dog", "an ant", "yak"]
    assert read(tree, classes=given).classes == given
    assert read(tree, classes=given).train[1].labels.tolist() == [1, 3]
    with pytest.raises(UserError) as told:
        read(tree, classes=["dog", "dog"])
    refused(told, "data.classes: dog, dog: has a name twice")


@pytest.mark.parametrize("broken", ["stop", "skip"])
def test_a_class_that_is_misspelt_is_the_keys_fault_not_the_files(tree, broken):
    add(tree, "b", annotation(thing(name="cat"), thing()))
    with pytest.raises(UserError) as told:
        read(tree, broken, classes=["cat", "dgo"])
    refused(told, "data.classes: dgo: no training object is one; others are dog; did you mean dog?")


def test_classes_that_are_not_asked_for_can_be_left_out(tree):
    add(tree, "b", annotation(thing(name="cat"), thing((0, 1, 5, 5), name="cat"), thing()))
    found = read(tree, "skip", classes=["dog"])
    assert found.train[1].labels.tolist() == [1]
    assert found.faults == {UNKNOWN: 2}  # and the one outside of the edge is not counted as cut


@pytest.mark.parametrize(
    ("bad", "kind", "words"),
    [
        (thing((20, 6, 11, 15)), NO_AREA, "object 2 ('dog'): the box from 20,6 to 11,15 has no area, or its corners"),
        (thing((11, 15, 20, 6)), NO_AREA, "the box from 11,15 to 20,6"),
        (thing((11, 6, 10, 15)), NO_AREA, "the box from 11,6 to 10,15"),
        (thing((11, -6, 10, 15)), NO_AREA, "no area"),  # cut or not
        (thing((11, 6, 20, 5)), NO_AREA, "the box from 11,6 to 20,5"),
        (
            thing((11, 6, 10.00000001, 15)),
            NO_AREA,
            "object 2 ('dog'): the box from 11,6 to 10,15 is narrower than 0.01",
        ),
        (thing((11, 6, 20, 5.009)), NO_AREA, "is narrower than 0.01 pixels"),
        (thing((41, 1, 50, 9)), OUTSIDE, "object 2 ('dog'): the box from 41,1 to 50,9 lies outside"),
        (thing((1, 31, 9, 33)), OUTSIDE, "its image, which is 40x30"),
        (thing((-9, 1, 0, 9)), OUTSIDE, "lies outside"),
        (thing((1, -9, 9, 0)), OUTSIDE, "lies outside"),
        (thing(("nan", 1, 9, 9)), NO_NUMBER, "object 2 ('dog'): xmin is 'nan', not a finite number"),
        (thing((1, 1, "inf", 9)), NO_NUMBER, "xmax is 'inf'"),
        (thing((1, "-1e999", 9, 9)), NO_NUMBER, "ymin is '-1e999'"),
        (thing((1, 1, 9, "1e39")), NO_NUMBER, "ymax is '1e39'"),
        (thing((1, 1, 9, "nine")), NO_NUMBER, "ymax is 'nine'"),
        (thing((1, 1, "", 9)), INCOMPLETE, "object 2 ('dog'): has no xmax"),
        ("<object><name>dog</name></object>", INCOMPLETE, "object 2 ('dog'): has no xmin"),
        (thing(name=None), INCOMPLETE, "object 2 (''): has no name"),
        (thing(difficult="perhaps"), INCOMPLETE, "object 2 ('dog'): has difficult 'perhaps'; 0 and 1 are known"),
        (thing(name="dogs"), UNKNOWN, "object 2 ('dogs'): is of an unknown class; known are aeroplane, "),
    ],
)
def test_a_box_that_cannot_be_used_stops_or_is_left_out(tree, bad, kind, words):
    """In the test images, where classes are not learned from."""
    add(tree, "c", annotation(thing(), bad, thing((1, 1, 2, 2))))
    with pytest.raises(UserError) as told:
        read(tree)
    refused(told, tree / "Annotations/c.xml", words, "data.broken=skip")
    found = read(tree, "skip")
    assert found.test[0].boxes.tolist() == [[10, 5, 20, 15], [0, 0, 2, 2]]
    assert found.faults == {kind: 1}


def test_an_unknown_class_is_told_with_the_nearest(tree):
    add(tree, "c", annotation(thing(name="hors")))
    with pytest.raises(UserError) as told:
        read(tree)
    refused(told, "unknown class", "did you mean horse?")


def pipe(path):
    path.unlink()
    os.mkfifo(path)


LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
DOCTYPE = "<!DOCTYPE annotation [<!ENTITY e SYSTEM 'file:///etc/passwd'>]>" + annotation(thing(name="&e;"))
DAMAGE = {
    "no annotation": (
        lambda tree: (tree / "Annotations/b.xml").unlink(),
        "images left out: no annotation",
        "b.xml: is missing, and its image is listed",
    ),
    "no image": (lambda tree: (tree / "JPEGImages/b.jpg").unlink(), NO_IMAGE, "b.xml: there is no image"),
    "an annotation that is a pipe": (
        lambda tree: pipe(tree / "Annotations/b.xml"),
        BAD_ANNOTATION,
        "b.xml: is not XML that can be read ([Errno 22] not a regular file",
    ),
    "an image that is a pipe": (
        lambda tree: pipe(tree / "JPEGImages/b.jpg"),
        "images left out: unreadable",
        "b.jpg: is not an image that can be read (not a regular file)",
    ),
    "no XML": (
        lambda tree: (tree / "Annotations/b.xml").write_text(annotation(thing())[:-5]),
        BAD_ANNOTATION,
        "b.xml: is not XML that can be read",
    ),
    "empty": (lambda tree: (tree / "Annotations/b.xml").write_text(""), BAD_ANNOTATION, "b.xml: is not XML"),
    "bytes": (lambda tree: (tree / "Annotations/b.xml").write_bytes(bytes(range(256))), BAD_ANNOTATION, "b.xml"),
    "folder": (
        lambda tree: ((tree / "Annotations/b.xml").unlink(), (tree / "Annotations/b.xml").mkdir()),
        BAD_ANNOTATION,
        "b.xml: is not XML that can be read ([Errno 22] not a regular file",
    ),
    "encoding": (
        lambda tree: (tree / "Annotations/b.xml").write_text("<?xml version='1.0' encoding='no'?><annotation/>"),
        BAD_ANNOTATION,
        "b.xml: is not XML",
    ),
    "other root": (
        lambda tree: (tree / "Annotations/b.xml").write_text("<html><object/></html>"),
        BAD_ANNOTATION,
        "b.xml: is no annotation but 'html'",
    ),
    "entity": (lambda tree: (tree / "Annotations/b.xml").write_text(DOCTYPE), BAD_ANNOTATION, "a document type"),
    "entity in UTF-16": (
        lambda tree: (tree / "Annotations/b.xml").write_text(DOCTYPE, "utf-16"),
        BAD_ANNOTATION,
        "a document type",
    ),
    "laughs": (
        lambda tree: (tree / "Annotations/b.xml").write_text(
            f'<!DOCTYPE a [<!ENTITY l0 "ha">{LAUGHS}]><annotation>&l9;</annotation>'
        ),
        BAD_ANNOTATION,
        "a document type",
    ),
    "large": (
        lambda tree: (tree / "Annotations/b.xml").write_text(annotation(thing()) + " " * 10_000_000),
        BAD_ANNOTATION,
        "b.xml: is larger than 10,000,000 bytes",
    ),
    "size": (
        lambda tree: add(tree, "b", annotation(thing(), size=(HEIGHT, WIDTH))),
        OTHER_SIZE,
        "b.xml: has width 30 for b.jpg, which is 40x30",
    ),
    "height": (lambda tree: add(tree, "b", annotation(size=(0, 31))), OTHER_SIZE, "b.xml: has height 31 for b.jpg"),
    "size in words": (
        lambda tree: add(tree, "b", annotation(size=("wide", 1))),
        BAD_ANNOTATION,
        "b.xml: width is 'wide', not a finite number",
    ),
    "no JPEG": (
        lambda tree: (tree / "JPEGImages/b.jpg").write_text("<html>"),
        "images left out: unreadable",
        "b.jpg: is not an image that can be read (none of JPEG, PNG",
    ),
    "dangling": (
        lambda tree: ((tree / "JPEGImages/b.jpg").unlink(), (tree / "JPEGImages/b.jpg").symlink_to("nowhere")),
        "images left out: unreadable",
        "b.jpg: is not an image that can be read (No such file or directory)",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_an_image_that_cannot_be_used_stops_or_is_left_out(tree, name):
    damage, kind, words = DAMAGE[name]
    damage(tree)
    with pytest.raises(UserError) as told:
        read(tree)
    refused(told, tree, words, "data.broken=skip")
    found = read(tree, "skip")
    assert [e.name for e in (*found.train, *found.test)] == ["a", "c"]
    assert [e.image_id for e in (*found.train, *found.test)] == [1, 2]
    assert found.faults == {kind: 1}


@pytest.mark.parametrize("names", ["a\nb\na\n", "a\nb\nalias\n"])
def test_an_image_that_is_listed_twice_stops_or_is_taken_once(tree, names):
    """By its own name, or by that of a link to it."""
    add(tree, "alias", annotation(thing()))
    (tree / "JPEGImages/alias.jpg").unlink()
    (tree / "JPEGImages/alias.jpg").symlink_to("a.jpg")
    (tree / "ImageSets/Main/trainval.txt").write_text(names)
    with pytest.raises(UserError) as told:
        read(tree)
    refused(told, "is given twice in data.train (trainval)", tree / "JPEGImages")
    found = read(tree, "skip")
    assert [e.name for e in found.train] == ["a", "b"]
    assert found.test[0].image_id == 3
    assert found.faults == {TWICE: 1}


def test_a_list_may_have_flags_blanks_and_a_mark_at_its_beginning(tree):
    (tree / "ImageSets/Main/trainval.txt").write_bytes(b"\xef\xbb\xbfb  1\r\n\r\n\ta -1\n")
    assert [e.name for e in read(tree).train] == ["b", "a"]


def test_names_that_have_a_suffix_are_told_to_go_without(tree):
    (tree / "ImageSets/Main/trainval.txt").write_text("a.jpg\nb.jpg\n")
    with pytest.raises(UserError) as told:
        read(tree)
    refused(told, "a.jpg.xml: is missing, and its image is listed; names in lists go without .jpg; fix it")


@pytest.mark.parametrize("name", ["../c", "/etc/passwd", "..", ".", "x/a", "x\\a", "a\0"])
@pytest.mark.parametrize("broken", ["stop", "skip"])
def test_names_that_lead_elsewhere_are_refused(tree, name, broken):
    (tree / "ImageSets/Main/trainval.txt").write_text(f"a\n{name}\n")
    with pytest.raises(UserError) as told:
        read(tree, broken)
    refused(told, "trainval.txt", repr(name), "is not the name of an image in its folder")


def test_the_image_is_of_the_annotations_name_or_the_one_it_names(tree):
    """In this order: the JPEG of its own name, its own name with another ending, the file that it names.

    Endings are those that classification takes, in any case; where there are several, the one that it names goes first.
    """
    images, text = tree / "JPEGImages", annotation(thing(), filename="other.gif")
    add(tree, "a", text)
    draw(images / "other.gif", "P")
    others = ["a.JPG", "a.bmp", "a.jpeg", "a.pgm", "a.png", "a.tiff", "a.webp"]
    for name in others:
        draw(images / name, "L" if name == "a.pgm" else "RGB")
    for name in ("a.txt", ".a.jpg", "a.b.jpg", "ab.jpg"):
        (images / name).write_bytes(b"")
    for wanted in ("a.jpg", *others, "other.gif"):
        assert read(tree).train[0].path == images / wanted
        assert load(read(tree).train[0]).shape == (3, HEIGHT, WIDTH)
        (images / wanted).unlink()
    for name in ("a.bmp", "a.png"):
        draw(images / name)
    add(tree, "a", annotation(thing(), filename="a.png"))
    (images / "a.jpg").unlink()
    for wanted in ("a.png", "a.bmp"):
        assert read(tree).train[0].path == images / wanted
        (images / wanted).unlink()
    add(tree, "a", annotation(thing(), filename="../JPEGImages/b.jpg"))
    (images / "a.jpg").unlink()
    with pytest.raises(UserError, match=r"there is no image .*a\.jpg"):
        read(tree)


@pytest.mark.parametrize("size", [None, (0, 0), ("", "")])
def test_a_size_that_is_not_given_is_the_images(tree, size):
    add(tree, "a", annotation(thing(), size=size))
    example = read(tree).train[0]
    assert (example.width, example.height) == (WIDTH, HEIGHT)


@pytest.fixture
def devkit(tmp_path):
    """Two years with images of the same names."""
    root = tmp_path / "VOCdevkit"
    for year, name, lists in (
        ("2007", "1", ["trainval", "train"]),
        ("2007", "2", ["trainval"]),
        ("2007", "3", ["test"]),
        ("2012", "2", ["trainval"]),
        ("2012", "1", ["trainval"]),
    ):
        add(root / f"VOC{year}", name, annotation(thing((1, 1, int(year) % 100, int(name)))), lists)
    return root


def test_a_devkits_lists_are_joined_in_their_order(devkit):
    found = read(devkit, train=["2012_trainval", "2007_trainval"], test="2007_test")
    names = ["VOC2012/2", "VOC2012/1", "VOC2007/1", "VOC2007/2", "VOC2007/3"]
    assert [e.name for e in (*found.train, *found.test)] == names
    assert [e.image_id for e in (*found.train, *found.test)] == [1, 2, 3, 4, 5]
    assert [e.boxes.tolist() for e in found.train] == [[[0, 0, 12, 2]], [[0, 0, 12, 1]], [[0, 0, 7, 1]], [[0, 0, 7, 2]]]
    assert [e.path.parts[-3:] for e in found.test] == [("VOC2007", "JPEGImages", "3.jpg")]


def test_lists_that_share_images_stop_or_are_joined_once(devkit):
    words = {"train": ["2007_trainval", "2007_train"], "test": "2007_test"}
    with pytest.raises(UserError) as told:
        read(devkit, **words)
    refused(told, "1.jpg: is given twice in data.train (2007_train)")
    with pytest.raises(UserError, match="given twice"):
        read(devkit, train=["2007_trainval"] * 2, test="2007_test")
    found = read(devkit, "skip", **words)
    assert [e.name for e in found.train] == ["VOC2007/1", "VOC2007/2"]
    assert found.faults == {TWICE: 1}


@pytest.mark.parametrize("broken", ["stop", "skip"])
def test_a_test_of_training_images_is_none(devkit, broken):
    (devkit / "VOC2013").symlink_to("VOC2007")
    for test in ("2007_trainval", "2013_trainval"):
        with pytest.raises(UserError) as told:
            read(devkit, broken, train=["2012_trainval", "2007_train"], test=test)
        year = test.partition("_")[0]
        refused(told, f"data.test={test}: 1 of its images are trained on, such as VOC{year}/1; the test would not be")


def change(name, text):
    return lambda tree: (tree / name).write_text(text)


BEYOND = {
    "empty list": (change("ImageSets/Main/test.txt", " \n\n"), "test.txt: is empty"),
    "no text": (lambda tree: (tree / "ImageSets/Main/test.txt").write_bytes(b"\xff\xfe"), "is no list of images"),
    "no list": (
        lambda tree: (tree / "ImageSets/Main/test.txt").rename(tree / "ImageSets/Main/tests.txt"),
        "test.txt: there is no such list; there are tests, trainval; did you mean tests?",
    ),
    "no lists": (lambda tree: shutil.rmtree(tree / "ImageSets"), "there is no such list; there are none"),
    "no images": (lambda tree: shutil.rmtree(tree / "JPEGImages"), "JPEGImages: its images cannot be listed"),
    "negatives": (
        lambda tree: [add(tree, name, annotation()) for name in "ab"],
        "data.train: has no object to learn from",
    ),
    "no test": (
        lambda tree: add(tree, "c", annotation(thing(difficult=1))),
        "data.test: has no object to find in any image",
    ),
    "difficult": (
        lambda tree: [add(tree, name, annotation(thing(difficult=1))) for name in "ab"],
        "data.train: has no object to learn from",
    ),
}


@pytest.mark.parametrize("name", BEYOND)
@pytest.mark.parametrize("broken", ["stop", "skip"])
def test_what_nothing_can_be_made_of_is_refused_in_either_case(tree, name, broken):
    damage, words = BEYOND[name]
    damage(tree)
    with pytest.raises(UserError) as told:
        read(tree, broken)
    refused(told, words)


def test_where_all_is_left_out_there_is_nothing_to_test_on(tree):
    (tree / "Annotations/c.xml").unlink()
    with pytest.raises(UserError) as told:
        read(tree, "skip")
    refused(told, "data.test: test: has no image that can be used")
    add(tree, "c", annotation(thing()))
    for name in "ab":
        add(tree, name, annotation(thing((9, 9, 1, 1))))
    with pytest.raises(UserError) as told:
        read(tree, "skip")
    refused(told, "has no object to learn from")


def test_the_digest_is_of_what_is_read_and_of_nothing_else(tree, tmp_path):
    first = read(tree).digest
    assert re.fullmatch("[0-9a-f]{64}", first)
    shutil.copytree(tree, tmp_path / "elsewhere")
    assert read(tmp_path / "elsewhere").digest == first
    draw(tree / "JPEGImages/a.jpg", "L")  # other pixels, which are not read here
    assert read(tree).digest == first

    def changed(name, text, size=(WIDTH, HEIGHT), **options):
        copy = tmp_path / "copy"
        shutil.copytree(tree, copy)
        add(copy, name, text)
        draw(copy / f"JPEGImages/{name}.jpg", size=size)
        digest = read(copy, **options).digest
        shutil.rmtree(copy)
        return digest

    assert changed("a", annotation(thing())) == first
    others = [
        changed("a", annotation(thing((11, 6, 20, 16)))),
        changed("a", annotation(thing((12, 6, 21, 15)))),  # moved: of the same area
        changed("a", annotation(thing((11, 6, 20, 15.01)))),
        changed("a", annotation(thing(name="cat"))),
        changed("a", annotation(thing(), thing(difficult=1))),
        changed("a", annotation(thing(), thing())),
        changed("b", annotation()),
        changed("c", annotation(thing((1, 1, 2, 2)))),
        changed("a", annotation(thing(), size=None), size=(WIDTH + 1, HEIGHT)),
        changed("a", annotation(thing()), classes=["dog"]),
    ]
    (tree / "ImageSets/Main/trainval.txt").write_text("b\na\n")
    others.append(read(tree).digest)
    assert len({first, *others}) == 1 + len(others)


NUMBERS = st.one_of(
    st.integers(-5, 45).map(str),
    st.floats(-3, 43).map(repr),
    st.floats().map(repr),
    st.integers().map(str),
    st.sampled_from(["", "nan", "-inf", "1e308", "-1e308", "0x1", "1_0", "-0.0", "40.00000001", "1.9999999999", "٣"]),
    st.text("0123456789.e-+ ", max_size=6),
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    """A tree whose training image "a" is sound, and "b" is to be written."""
    tree = tmp_path_factory.mktemp("fuzzed")
    for name, key in (("a", "trainval"), ("b", "trainval"), ("c", "test")):
        add(tree, name, annotation(thing()), [key])
    return tree


def check_boxes(examples):
    for example in examples:
        left, top, right, bottom = example.boxes.unbind(1)
        assert ((left >= 0) & (left < right) & (right <= WIDTH)).all()
        assert ((top >= 0) & (top < bottom) & (bottom <= HEIGHT)).all()
        assert (WIDTH - right < WIDTH - left).all()  # in the mirror too
        assert torch.isfinite(example.areas).all()
        assert (example.areas >= 0).all()
        assert len(example.boxes) == len(example.labels) == len(example.ignored) == len(example.areas)


@settings(max_examples=300, deadline=None)
@given(boxes=st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=4))
def test_whatever_the_coordinates_are_what_comes_out_are_boxes(fuzzed, boxes):
    (fuzzed / "Annotations/b.xml").write_text(annotation(*map(thing, boxes)), "utf-8")
    found = read(fuzzed, "skip")
    check_boxes(found.train)
    left_out = sum(count for kind, count in found.faults.items() if kind != CUT)
    assert len(found.train[1].boxes) + left_out == len(boxes)
    assert set(found.faults) <= {CUT, NO_AREA, OUTSIDE, NO_NUMBER, INCOMPLETE}
    if left_out == found.faults.get(NO_AREA, 0) == 0:
        assert read(fuzzed).digest == found.digest
    elif set(found.faults) - {CUT, NO_AREA}:
        with pytest.raises(UserError, match=r"b\.xml: object \d \('dog'\)"):
            read(fuzzed)


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.tuples(*[st.integers(-10, 50)] * 4), min_size=1, max_size=6))
def test_whole_boxes_are_those_pixels_of_theirs_that_the_image_has(fuzzed, rows):
    """Painted pixel by pixel: a box is left out where it has none of the image's."""
    (fuzzed / "Annotations/b.xml").write_text(annotation(*map(thing, rows)))
    wanted = []
    for xmin, ymin, xmax, ymax in rows:
        columns = [x for x in range(1, WIDTH + 1) if xmin <= x <= xmax]
        lines = [y for y in range(1, HEIGHT + 1) if ymin <= y <= ymax]
        if columns and lines:
            wanted.append([columns[0] - 1, lines[0] - 1, columns[-1], lines[-1]])
    assert read(fuzzed, "skip").train[1].boxes.tolist() == wanted


# --- ImageNet detection -----------------------------------------------------------------------------------------------


def add_det(root, split, name, text):
    """An image of ILSVRC's tree with its annotation."""
    draw(root / "Data/DET" / split / f"{name}.JPEG")
    path = root / "Annotations/DET" / split / f"{name}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def det(tmp_path):
    """ILSVRC's tree: two training images of two classes in two folders, one a negative of one class, and two of val."""
    root = tmp_path / "ILSVRC"
    add_det(root, "train", "ILSVRC2013_train/n01/n01_1", annotation(thing(name="n01"), filename="n01_1"))
    add_det(root, "train", "ILSVRC2014_train_0000/b", annotation(thing(name="n01"), thing(name="n02"), filename="b"))
    for number in (1, 2):
        add_det(root, "val", f"v{number}", annotation(thing(name="n02"), filename=f"v{number}"))
    lists = root / "ImageSets/DET"
    lists.mkdir(parents=True)
    both = "ILSVRC2014_train_0000/b"
    (lists / "train_1.txt").write_text(f"ILSVRC2013_train/n01/n01_1 1\n{both} 0\n")
    (lists / "train_2.txt").write_text(f"{both} 1\nILSVRC2013_train_extra0/negative -1\n")
    (lists / "val.txt").write_text("v1 1\nv2 2\n")
    (lists / "val1.txt").write_text("v1 1\n")
    (lists / "val2.txt").write_text("v2 2\n")
    return root


def test_det_joins_the_lists_by_class_and_finds_images_in_their_folders(det):
    found = read_voc(det, train=["train", "val1"], test="val2", classes=None, broken="stop", det=True)
    names = ["train/ILSVRC2013_train/n01/n01_1", "train/ILSVRC2014_train_0000/b", "val/v1"]
    assert [example.name for example in found.train] == names
    assert [example.labels.tolist() for example in found.train] == [[1], [1, 2], [2]]
    assert [(example.name, example.path) for example in found.test] == [("val/v2", det / "Data/DET/val/v2.JPEG")]
    assert found.classes == ["n01", "n02"]
    assert not found.faults


def test_a_list_of_its_own_goes_before_those_by_class(det):
    (det / "ImageSets/DET/train.txt").write_text("ILSVRC2014_train_0000/b\n")
    found = read_voc(det, train=["train"], test="val", classes=None, broken="stop", det=True)
    assert [example.name for example in found.train] == ["train/ILSVRC2014_train_0000/b"]


@pytest.mark.parametrize("broken", ["stop", "skip"])
def test_an_image_twice_in_a_list_of_det_stops_or_is_taken_once(det, broken):
    (det / "ImageSets/DET/val1.txt").write_text("v1 1\nv1 2\n")
    given = {"train": ["val1"], "test": "val2", "classes": None, "broken": broken, "det": True}
    if broken == "stop":
        with pytest.raises(UserError, match="is given twice"):
            read_voc(det, **given)
    else:
        assert read_voc(det, **given).faults == {TWICE: 1}


@pytest.mark.parametrize("word", ["../../secret", "a//b", "a/./b"])
def test_names_in_det_that_lead_elsewhere_are_refused(det, word):
    (det / "ImageSets/DET/val1.txt").write_text(f"{word} 1\n")
    with pytest.raises(UserError, match="is not the name of an image in its folder"):
        read_voc(det, train=["val1"], test="val2", classes=None, broken="skip", det=True)


def test_a_list_of_det_that_is_not_there_is_told_with_those_that_are(det):
    words = ["data=det", f"data.root={det}", "data.test=val3"]
    with pytest.raises(UserError, match=re.escape(f"data.test=val3: {det} has train, val, val1, val2; did you mean")):
        check_detect(compose("detect", words), [word.split("=")[0] for word in words])


def test_a_list_by_class_is_taken_without_those_that_lack_it(det):
    found = read_voc(det, train=["train_2"], test="val", classes=None, broken="stop", det=True)
    assert [example.name for example in found.train] == ["train/ILSVRC2014_train_0000/b"]


def test_a_folder_of_det_that_is_missing_is_a_fault_of_its_images(det):
    shutil.rmtree(det / "Data/DET/train/ILSVRC2013_train")
    given = {"train": ["train", "val1"], "test": "val2", "classes": None, "det": True}
    with pytest.raises(UserError, match="there is no folder"):
        read_voc(det, broken="stop", **given)
    assert read_voc(det, broken="skip", **given).faults == {NO_IMAGE: 1}


@pytest.mark.parametrize(
    ("data", "train", "test"),
    [
        ("voc", ["2007_trainval", "2012_trainval"], "2007_test"),
        ("voc12", ["2007_trainval", "2007_test", "2012_trainval"], "2012_test"),
        ("coco", ["train2014"], "val2014"),
        ("coco_trainval", ["train2014", "valminusminival2014"], "minival2014"),
        ("det", ["train", "val1"], "val2"),
    ],
)
def test_the_lists_of_tables_7_to_12(data, train, test):
    found = compose("detect", [f"data={data}"])
    assert (found["data"]["train"], found["data"]["test"]) == (train, test)


# --- COCO ------------------------------------------------------------------------------------------------------------


def three():
    """Three images: two objects and a crowd in the first, none in the second, one in the third."""
    names = ("one.jpg", "two.jpg", "three.jpg")
    return {
        "images": [
            {"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT}
            for number, name in zip((7, 0, 9), names, strict=True)
        ],
        "categories": [{"id": 90, "name": "kite"}, {"id": 1, "name": "person"}, {"id": 18, "name": "dog"}],
        "annotations": [
            {"id": 5, "image_id": 9, "category_id": 18, "bbox": [0, 0, 40, 30], "area": 700.5, "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 90, "bbox": [1.5, 2, 3, 4.25], "area": 6, "iscrowd": 0},
            {"id": 3, "image_id": 7, "category_id": 1, "bbox": [10, 20, 30, 10], "area": 250, "iscrowd": 1},
            {"id": 4, "image_id": 7, "category_id": 1, "bbox": [5, 5, 2, 3], "segmentation": [[5, 5, 7, 5, 7, 8]]},
        ],
    }


def write(root, content, name="train2014", images=("one.jpg", "two.jpg", "three.jpg"), folder=None):
    """A list and its images; `content` as text is written as it is."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (root / f"annotations/instances_{name}.json").write_text(text)
    for image in images:
        draw((folder or root / name) / image)


@pytest.fixture
def coco(tmp_path):
    """`three` as training images and the same annotations, of other files, as test."""
    for name in ("train2014", "val2014"):
        write(tmp_path / "coco", three(), name)
    return tmp_path / "coco"


def read_json(root, broken="stop", train=("train2014",), test="val2014"):
    return read_coco(root, train=list(train), test=test, broken=broken)


def test_three_images_of_coco(coco):
    found = read_json(coco)
    assert found.classes == ["person", "dog", "kite"]
    assert found.category_ids == [1, 18, 90]
    assert found.faults == {}
    for examples, name in ((found.train, "train2014"), (found.test, "val2014")):
        assert [e.path for e in examples] == [coco / name / f"{word}.jpg" for word in ("one", "two", "three")]
        assert [e.name for e in examples] == ["one.jpg", "two.jpg", "three.jpg"]
        assert [e.image_id for e in examples] == [7, 0, 9]
        assert {(e.width, e.height) for e in examples} == {(WIDTH, HEIGHT)}
        first, second, third = examples
        assert first.boxes.tolist() == [[1.5, 2, 4.5, 6.25], [10, 20, 40, 30], [5, 5, 7, 8]]
        assert first.labels.tolist() == [3, 1, 1]
        assert first.ignored.tolist() == [False, True, False]
        assert first.areas.tolist() == [6, 250, 6]
        assert second.boxes.shape == (0, 4)
        assert third.boxes.tolist() == [[0, 0, 40, 30]]
        assert third.labels.tolist() == [2]
        assert third.areas.tolist() == [700.5]
        kinds = [first.boxes.dtype, first.labels.dtype, first.ignored.dtype, first.areas.dtype]
        assert kinds == [e.dtype for e in (second.boxes, second.labels, second.ignored, second.areas)]
        assert kinds == [torch.float32, torch.int64, torch.bool, torch.float32]
        assert load(first).shape == (3, HEIGHT, WIDTH)


def test_cocos_own_reader_reads_the_same(coco, capsys):
    """pycocotools as the oracle."""
    api = pytest.importorskip("pycocotools.coco").COCO(coco / "annotations/instances_train2014.json")
    capsys.readouterr()
    found = read_json(coco)
    for example in found.train:
        rows = api.loadAnns(api.getAnnIds(imgIds=[example.image_id]))
        assert [found.category_ids[label - 1] for label in example.labels.tolist()] == [r["category_id"] for r in rows]
        assert [[x, y, r - x, b - y] for x, y, r, b in example.boxes.tolist()] == [row["bbox"] for row in rows]


def test_images_may_lie_in_a_folder_of_their_own(tmp_path):
    for name in ("train", "val"):
        write(tmp_path, three(), name, folder=tmp_path / "images" / name)
    assert read_json(tmp_path, train=["train"], test="val").train[0].path == tmp_path / "images/train/one.jpg"


@pytest.mark.parametrize("broken", ["stop", "skip"])
def test_boxes_partly_outside_are_cut_and_counted(coco, broken):
    content = three()
    boxes = ([-1, -2, 5, 6], [39.9999999, 3, 5, 5], [30, 20, 10.5, 10.25], [0, 0, 40, 30])
    content["annotations"] = [
        {"id": number, "image_id": 7, "category_id": 1, "bbox": box} for number, box in enumerate(boxes)
    ]
    write(coco, content)
    found = read_json(coco, broken)
    assert found.train[0].boxes.tolist() == [[0, 0, 4, 4], [30, 20, 40, 30], [0, 0, 40, 30]]
    assert found.train[0].areas.tolist() == [16, 100, 1200]  # of what is left
    assert found.faults == {CUT: 2, NO_AREA: 1}
    file = coco / "annotations" / "instances_train2014.json"
    cut, left_out = fault_lines(found)
    assert cut.startswith(f"2 {CUT}, the first: {file}: annotations[0] (id 0): its bbox -1,-2,5,6 leads out of")
    assert left_out.startswith(f"1 {NO_AREA}, the first: {file}: annotations[1] (id 1): ")


NO_SUCH_IMAGE = "boxes left out: of an image that does not exist"
BOX_TWICE = "boxes left out: an id given twice"


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"bbox": [5, 5, -2, 3]}, NO_AREA, "its bbox 5,5,-2,3 has no area, or its corners are swapped"),
        ({"bbox": [5, 5, 2, 0.0]}, NO_AREA, "its bbox 5,5,2,0 has no area"),
        ({"bbox": [5, 5, 1e-9, 3]}, NO_AREA, "its bbox 5,5,1e-09,3 is narrower than 0.01 pixels"),
        ({"area": -1}, NO_AREA, "its area is -1"),
        ({"bbox": [40, 5, 2, 3]}, OUTSIDE, "its bbox 40,5,2,3 lies outside of its image, which is 40x30"),
        ({"bbox": [5, -9, 2, 9]}, OUTSIDE, "lies outside"),
        ({"bbox": [float("nan"), 5, 2, 3]}, NO_NUMBER, "its bbox or area is not of finite numbers: nan"),
        ({"bbox": [5, 5, float("inf"), 3]}, NO_NUMBER, "inf"),
        ({"bbox": [5, 10**400, 2, 3]}, NO_NUMBER, "finite"),
        ({"bbox": ["5", 5, 2, 3]}, NO_NUMBER, "finite"),
        ({"bbox": [None, 5, 2, 3]}, NO_NUMBER, "finite"),
        ({"bbox": [True, 5, 2, 3]}, NO_NUMBER, "finite"),
        ({"area": float("nan")}, NO_NUMBER, "nan"),
        ({"area": "large"}, NO_NUMBER, "large"),
        ({"bbox": [5, 5, 2]}, INCOMPLETE, "its bbox has not four numbers"),
        ({"bbox": None}, INCOMPLETE, "has no bbox (list)"),
        ({"bbox": {"x": 5}}, INCOMPLETE, "has no bbox (list)"),
        ({"iscrowd": "no"}, INCOMPLETE, "its iscrowd is not 0 or 1"),
        ({"iscrowd": None}, INCOMPLETE, "its iscrowd is not 0 or 1"),
        ({"id": None}, INCOMPLETE, "has no id (int)"),
        ({"id": "8"}, INCOMPLETE, "has no id (int)"),
        ({"image_id": [7]}, INCOMPLETE, "has no image_id (int)"),
        ({"image_id": 7.5}, INCOMPLETE, "has no image_id (int)"),
        ({"category_id": True}, INCOMPLETE, "has no category_id (int)"),
        ({"image_id": 8}, NO_SUCH_IMAGE, "its image_id 8 does not exist"),
        ({"category_id": 2}, UNKNOWN, "its category_id 2 does not exist"),
        ({"id": 2}, BOX_TWICE, "its id is that of another"),
    ],
)
def test_an_annotation_that_cannot_be_used_stops_or_is_left_out(coco, fields, kind, words):
    content = three()
    content["annotations"].append({"id": 8, "image_id": 7, "category_id": 1, "bbox": [5, 5, 2, 3]} | fields)
    write(coco, content)
    with pytest.raises(UserError) as told:
        read_json(coco)
    refused(told, "instances_train2014.json: annotations[4]", words, "data.broken=skip")
    found = read_json(coco, "skip")
    assert [len(e.boxes) for e in found.train] == [3, 0, 1]
    assert found.faults == {kind: 1}


@pytest.mark.parametrize("row", [None, 5, [], {}])
def test_a_row_that_is_none_stops_or_is_left_out(coco, row):
    for key, kind in (("annotations", INCOMPLETE), ("images", BAD_ANNOTATION)):
        content = three()
        content[key].append(row)
        write(coco, content)
        with pytest.raises(UserError) as told:
            read_json(coco)
        refused(told, f"train2014.json: {key}[")
        found = read_json(coco, "skip")
        assert [len(e.boxes) for e in found.train] == [3, 0, 1]
        assert found.faults == {kind: 1}


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"file_name": "four.jpg"}, NO_IMAGE, "there is no image 'four.jpg' in"),
        ({"file_name": "fo\nur.jpg"}, NO_IMAGE, "there is no image 'fo\\nur.jpg' in"),
        ({"file_name": "../train2014/extra.jpg"}, NO_IMAGE, "'../train2014/extra.jpg': lies outside of"),
        ({"file_name": "sub/../../val2014/one.jpg"}, NO_IMAGE, "'sub/../../val2014/one.jpg': lies outside of"),
        ({"file_name": "/etc/passwd"}, NO_IMAGE, "'/etc/passwd': lies outside of"),
        ({"file_name": ".."}, NO_IMAGE, "'..': lies outside of"),
        ({"file_name": ""}, NO_IMAGE, "there is no image '.' in"),
        ({"file_name": "sub/extra.jpg"}, NO_IMAGE, "there is no image 'sub/extra.jpg' in"),
        ({"file_name": "one.jpg/extra.jpg"}, NO_IMAGE, "there is no image 'one.jpg/extra.jpg' in"),
        ({"file_name": "n\0/\ud800.jpg"}, NO_IMAGE, "there is no image 'n\\x00/\\ud800.jpg' in"),
        ({"file_name": "n" * 5000 + "/x"}, NO_IMAGE, "there is no image 'nnn"),
        ({"width": 20_000, "height": 15_001}, OTHER_SIZE, "'extra.jpg': cannot be 20000x15001"),
        ({"id": 7}, TWICE, "'extra.jpg': has the id 7 of another"),
        ({"file_name": "one.jpg"}, TWICE, "one.jpg: is given twice in data.train"),
        ({"width": 0}, OTHER_SIZE, "'extra.jpg': cannot be 0x30"),
        ({"height": -1}, OTHER_SIZE, "cannot be 40x-1"),
        ({"height": 10**9}, OTHER_SIZE, "cannot be 40x1000000000"),
        ({"width": None}, BAD_ANNOTATION, "has no width (int)"),
        ({"height": "30"}, BAD_ANNOTATION, "has no height (int)"),
        ({"id": None}, BAD_ANNOTATION, "has no id (int)"),
        ({"file_name": 4}, BAD_ANNOTATION, "has no file_name (str)"),
    ],
)
def test_an_image_of_coco_that_cannot_be_used_stops_or_is_left_out(coco, fields, kind, words):
    """With its annotations, which are not counted on their own."""
    content = three()
    row = {"id": 11, "file_name": "extra.jpg", "width": WIDTH, "height": HEIGHT} | fields
    content["images"].append(row)
    if row["id"] == 11:
        content["annotations"].append({"id": 8, "image_id": 11, "category_id": 1, "bbox": [5, 5, 2, 3]})
    write(coco, content, images=["one.jpg", "two.jpg", "three.jpg", "extra.jpg"])
    with pytest.raises(UserError) as told:
        read_json(coco)
    refused(told, words, "data.broken=skip")
    found = read_json(coco, "skip")
    assert [(e.name, len(e.boxes)) for e in found.train] == [("one.jpg", 3), ("two.jpg", 0), ("three.jpg", 1)]
    orphans = {NO_SUCH_IMAGE: 1} if kind == BAD_ANNOTATION and fields.keys() != {"id"} else {}
    assert found.faults == {kind: 1} | orphans


def test_images_of_coco_may_lie_in_inner_folders(coco):
    content = three()
    rows = {row["file_name"]: row for row in content["images"]}
    rows["one.jpg"]["file_name"], rows["two.jpg"]["file_name"] = "a/one.jpg", "./a//b/../b/two.jpg"
    write(coco, content, images=["three.jpg"])
    folder = coco / "train2014"
    (folder / "a/b").mkdir(parents=True)
    shutil.move(folder / "one.jpg", folder / "a/one.jpg")
    shutil.move(folder / "two.jpg", folder / "a/b/two.jpg")
    found = read_json(coco)
    assert [e.name for e in found.train] == ["a/one.jpg", "a/b/two.jpg", "three.jpg"]
    assert [load(e).shape for e in found.train] == [(3, HEIGHT, WIDTH)] * 3
    assert found.faults == {}
    (coco / "val2014/two.jpg").unlink()
    (coco / "val2014/two.jpg").symlink_to(folder / "a/b/two.jpg")
    with pytest.raises(UserError) as told:
        read_json(coco)
    refused(told, "data.test=val2014: 1 of its images are trained on, such as two.jpg")


def without(key):
    content = three()
    del content[key]
    return content


def of_categories(*rows):
    return three() | {"categories": list(rows)}


PERSON = {"id": 1, "name": "person"}


@pytest.mark.parametrize("broken", ["stop", "skip"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is not JSON that can be read"),
        (json.dumps(three())[:-9], "is not JSON that can be read"),
        ("[" * 100_000, "is not JSON that can be read"),
        ("1" * 10_000, "is not JSON that can be read"),
        ("[]", "has no list 'images', as COCO's instances have"),
        (without("images"), "has no list 'images'"),
        (without("annotations"), "has no list 'annotations'"),
        (without("categories"), "has no list 'categories'"),
        (three() | {"images": {"id": 7}}, "has no list 'images'"),
        (of_categories(), "has no categories"),
        (of_categories(PERSON, {"id": 1, "name": "dog"}), "has two categories of one id or name"),
        (of_categories(PERSON, {"id": 2, "name": "person"}), "has two categories of one id or name"),
        (of_categories({"name": "person"}), "has no id (int) in a category"),
        (of_categories({"id": 1}), "has no name (str) in a category"),
        (three() | {"images": []}, "data.train: train2014: has no image that can be used"),
        (three() | {"annotations": []}, "data.train: has no object to learn from"),
        (three() | {"annotations": [three()["annotations"][2]]}, "has no object to learn from"),  # a crowd
    ],
)
def test_a_json_that_nothing_can_be_made_of_is_refused_in_either_case(coco, content, words, broken):
    write(coco, content)
    if broken == "skip" and content == three() | {"images": []}:
        words = "has no image that can be used"
    elif broken == "stop" and content == three() | {"images": []}:
        words = "does not exist"  # the image of the first annotation
    with pytest.raises(UserError) as told:
        read_json(coco, broken)
    refused(told, words)


def test_lists_of_coco_have_the_same_categories(coco):
    for rows in ([PERSON], [{**row, "name": row["name"].upper()} for row in three()["categories"]]):
        write(coco, of_categories(*rows), "val2014")
        with pytest.raises(UserError) as told:
            read_json(coco)
        refused(told, "instances_val2014.json: has other categories than", "instances_train2014.json")
    write(coco, of_categories(*reversed(three()["categories"])), "val2014")
    assert read_json(coco).classes == ["person", "dog", "kite"]


def test_lists_of_coco_are_joined(coco):
    write(coco, three(), "extra")
    found = read_json(coco, train=["train2014", "extra"])
    assert [e.path.parent.name for e in found.train] == ["train2014"] * 3 + ["extra"] * 3


def test_a_test_of_cocos_training_images_is_none(coco):
    with pytest.raises(UserError) as told:
        read_json(coco, train=["train2014", "val2014"])
    refused(told, "data.test=val2014: 3 of its images are trained on, such as one.jpg")
    (coco / "val2014/two.jpg").unlink()
    (coco / "val2014/two.jpg").symlink_to(coco / "train2014/two.jpg")
    with pytest.raises(UserError) as told:
        read_json(coco)
    refused(told, "data.test=val2014: 1 of its images are trained on, such as two.jpg")


def test_a_list_of_coco_that_is_not_there_is_told_with_the_nearest(coco):
    with pytest.raises(UserError) as told:
        read_json(coco, test="val2015")
    refused(told, "instances_val2015.json: there is no such list; there are train2014, val2014; did you mean val2014?")
    shutil.rmtree(coco / "val2014")
    with pytest.raises(UserError) as told:
        read_json(coco)
    refused(told, coco / "val2014", "its images cannot be listed")


def test_cocos_digest_is_of_what_is_read(coco, tmp_path):
    first = read_json(coco).digest
    shutil.copytree(coco, tmp_path / "elsewhere")
    assert read_json(tmp_path / "elsewhere").digest == first
    found = {first}
    for place, fields in enumerate(({"area": 701}, {"iscrowd": 1}, {"category_id": 90}, {"bbox": [1, 2, 3, 4]})):
        content = three()
        content["annotations"][place] |= fields
        write(coco, content)
        found.add(read_json(coco).digest)
    write(coco, of_categories({"id": 1, "name": "man"}, *three()["categories"][::2]))
    write(coco, of_categories({"id": 1, "name": "man"}, *three()["categories"][::2]), "val2014")
    assert len({*found, read_json(coco).digest}) == 6


VALUES = st.one_of(
    st.integers(-5, 45), st.floats(-3, 43), st.floats(), st.integers(), st.none(), st.booleans(), st.text(max_size=3)
)


@pytest.fixture(scope="module")
def fuzzed_coco(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzzed_coco")
    for name in ("train2014", "val2014"):
        write(root, three(), name)
    return root


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.tuples(st.lists(VALUES, min_size=3, max_size=5), VALUES, VALUES, VALUES), max_size=4))
def test_whatever_the_numbers_are_what_comes_out_are_boxes(fuzzed_coco, rows):
    content = three()
    for number, (bbox, area, crowd, image) in enumerate(rows):
        row = {"id": 100 + number, "image_id": 7, "category_id": 1, "bbox": bbox, "area": area, "iscrowd": crowd}
        content["annotations"].append(row | ({"image_id": image} if number == 3 else {}))
    (fuzzed_coco / "annotations/instances_train2014.json").write_text(json.dumps(content))
    found = read_json(fuzzed_coco, "skip")
    check_boxes(found.train)
    left_out = sum(count for kind, count in found.faults.items() if kind != CUT)
    assert sum(len(e.boxes) for e in found.train) + left_out == 4 + len(rows)


# --- Pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "ending", "colour"),
    [
        ("L", "jpg", [200, 200, 200]),
        ("L", "png", [200, 200, 200]),
        ("CMYK", "jpg", None),
        ("RGBA", "png", [200, 200, 200]),
        ("RGB", "jpg", [200, 200, 200]),
    ],
)
def test_grey_and_other_colours_come_as_rgb(tree, mode, ending, colour):
    (tree / "JPEGImages/a.jpg").unlink()
    path = tree / f"JPEGImages/a.{ending}"
    draw(path, mode)
    image = load(read(tree).train[0])
    assert image.dtype == torch.uint8
    assert image.shape == (3, HEIGHT, WIDTH)
    wanted = colour or np.array(Image.open(path).convert("RGB"))[0, 0].tolist()
    assert image[:, 0, 0].tolist() == wanted
    assert (image == image[:, :1, :1]).all()


def test_an_image_that_is_not_what_was_annotated_is_told_by_its_name(tree, coco):
    example = read(tree).train[0]
    draw(example.path, size=(HEIGHT, WIDTH))
    with pytest.raises(UserError) as told:
        load(example)
    refused(told, f"{example.path}: is 30x40, annotated as 40x30")
    example.path.write_bytes(example.path.read_bytes()[:300])
    with pytest.raises(UserError) as told:
        load(example)
    refused(told, f"{example.path}: is not an image that can be read")
    example.path.unlink()
    with pytest.raises(UserError) as told:
        load(example)
    refused(told, f"{example.path}: is not an image that can be read (No such file or directory)")
    draw(coco / "train2014/one.jpg", size=(WIDTH, HEIGHT + 1))  # COCO's sizes are the JSON's until then
    with pytest.raises(UserError) as told:
        load(read_json(coco).train[0])
    refused(told, "one.jpg: is 40x31, annotated as 40x30")


def test_paths_are_paths(tree, coco):
    assert all(isinstance(example.path, Path) for example in (*read(tree).train, *read_json(coco).train))
