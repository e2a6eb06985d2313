"""Whole runs of `resnet-detect` on pictures made here: what they leave, how they go on, alone and in two processes."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from conftest import as_one_of, metrics, start
from PIL import Image
from torch import nn
from torchvision.models import vgg16

from resnet_train import cli
from resnet_train.config.compose import compose
from resnet_train.config.detection import check_detect
from resnet_train.data.sampler import batch_indices
from resnet_train.detection.annotations import Example, Examples
from resnet_train.detection.build import build_like_checkpoint, build_new
from resnet_train.detection.evaluate import evaluate
from resnet_train.detection.loader import mirrored, training_batches
from resnet_train.detection.metrics import coco_map, voc_map
from resnet_train.detection.predict import SHOWN
from resnet_train.detection.run import build, read_examples
from resnet_train.detection.run import detect as run_detector
from resnet_train.detection.train import describe_classes, learning_rate, step
from resnet_train.detection.voc import read_voc
from resnet_train.engine import checkpoint
from resnet_train.errors import UserError
from resnet_train.models import imagenet_resnet

pytest.importorskip("faster_coco_eval")
CPU = torch.device("cpu")
SHAPES = ("disc", "square", "star")
WORDS = ["data=voc", "data.root=tree", "data.train=[train]", "data.test=test", "recipe=short", "depth=18"]
WORDS += ["iterations=7", "batch_size=2", "regions=8", "min_size=64", "max_size=96", "log_every=3", "eval_every=4"]
WORDS += ["checkpoint_every=4", "anchors=[16,32]", "data.workers=0", "device=cpu", "precision=fp32", "warmup=3"]
WORDS += ["proposals=30"]  # of 144 anchors: conv5_x on each region is what a test costs


def make_tree(folder, images=9, tested=5):
    """A VOC-style tree of coloured rectangles, one to three in an image, the last of each list with none."""
    draw = np.random.default_rng(0)
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for number in range(images + tested):
        pixels = draw.integers(90, 110, (72, 96, 3), dtype=np.uint8)
        objects = ""
        for _ in range(0 if number in (images - 1, images + tested - 1) else draw.integers(1, 4)):
            kind, left, top = draw.integers(3), draw.integers(1, 60), draw.integers(1, 40)
            right, bottom = left + draw.integers(15, 34), top + draw.integers(15, 30)
            pixels[top - 1 : bottom, left - 1 : right] = np.eye(3, dtype=np.uint8)[kind] * 250
            box = f"<xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
            objects += f"<object><name>{SHAPES[kind]}</name><difficult>0</difficult><bndbox>{box}</bndbox></object>"
        Image.fromarray(pixels).save(folder / f"JPEGImages/{number:03d}.jpg", quality=95)
        size = "<size><width>96</width><height>72</height><depth>3</depth></size>"
        (folder / f"Annotations/{number:03d}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    for name, numbers in (("train", range(images)), ("test", range(images, images + tested))):
        (folder / f"ImageSets/Main/{name}.txt").write_text("".join(f"{number:03d}\n" for number in numbers))
    return folder


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    return make_tree(tmp_path_factory.mktemp("voc") / "tree")


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """A ResNet-18 as torchvision saves one."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("pretrained") / "resnet18.pth"
    # Over fan_out: with batch norm that stays the identity, as new weights have it, fan_in would let the loss run away.
    torch.save(imagenet_resnet(18, init="fan_out").state_dict(), path)
    return path


def configured(tree, *words):
    words = [word for word in WORDS if not any(word.split("=")[0] == other.split("=")[0] for other in words)] + [*words]
    words = [word.replace("root=tree", f"root={tree}") for word in words]
    if "backbone=vgg16" in words:
        words.remove("depth=18")
    return check_detect(compose("detect", words), [word.split("=")[0] for word in words])


def detect(folder, *words):
    """The command in `folder`, whose tree is beside it."""
    return forked.run(start(*WORDS, *words, entry="detect"), cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def whole(tree, pretrained):
    """A finished run, in the tree's parent folder."""
    words = start(*WORDS, "run_dir=whole", "seed=4", f"init_from={pretrained}", "freeze=layer1", entry="detect")
    done = subprocess.run(words, cwd=tree.parent, capture_output=True, text=True)  # a new process, and no fork
    assert (done.returncode, done.stderr) == (0, "")
    return tree.parent / "whole", done.stdout


def test_a_run_leaves_what_is_said(whole):
    folder, told = whole
    assert sorted(os.listdir(folder)) == [
        "checkpoints",
        "config.json",
        "curves.png",
        "environment.json",
        "metrics.jsonl",
        "summary.json",
        "tensorboard",
    ]
    assert (
        "starts from ImageNet resnet-18-B of resnet18.pth; batch norm stays as it has it; frozen up to layer1" in told
    )
    lines = metrics(folder)
    assert [line["iteration"] for line in lines if line["split"] == "train"] == [3, 6, 7]
    assert [line["iteration"] for line in lines if line["split"] == "test"] == [4, 7]
    assert all(line["data"] == "tree" and line["seed"] == 4 for line in lines)
    said = f"mAP {lines[-1]['map07']:.2f} % by VOC 2007's rule, {lines[-1]['map10']:.2f} % by VOC 2010's,"
    said += f" {lines[-1]['map']:.2f} % by COCO's @[.5,.95], on 5 images"
    assert f"\niteration 7/7 test: {said}\n" in told
    assert f"{said} at iteration 7, the last" in told
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["images"] == {"train": 9, "test": 5}
    assert summary["last"]["map10"] == lines[-1]["map10"]
    assert summary["last"]["per_class"].keys() == set(SHAPES)
    assert summary["backbone"]["pretrained"] == "ImageNet resnet-18-B of resnet18.pth"


def test_tensorboard_has_losses_maps_pictures_and_a_row_of_hyper_parameters(whole):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for writer in ("train", "test"):
        events = EventAccumulator(str(whole[0] / "tensorboard" / writer))
        events.Reload()
        found[writer] = events.Tags()
    assert {"loss", "loss_objectness", "lr"} <= set(found["train"]["scalars"])
    assert {"map07", "map10", "map", "map50"} <= set(found["test"]["scalars"])
    assert found["test"]["images"] == ["009", "010", "011", "012"]


def kill_at_the_first_checkpoint(folder, words, iterations):
    """Begin a run in `folder` and kill it, with half an interval of losses in it, once a checkpoint is there."""
    job = forked.Popen(
        start(*words, f"run_dir={folder.name}", entry="detect"), cwd=folder.parent, stdout=subprocess.DEVNULL
    )
    while not (folder / "checkpoints/last.pt").exists():
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert 0 < checkpoint.load(folder / "checkpoints/last.pt", kind="detector")["iteration"] < iterations


@pytest.mark.long
def test_a_killed_run_goes_on_to_the_same_weights_and_figures(whole, tree, pretrained):
    """Killed once a checkpoint is there, with half an interval of losses in it."""
    folder = tree.parent / "killed"
    words = ["run_dir=killed", "seed=4", f"init_from={pretrained}", "freeze=layer1"]
    kill_at_the_first_checkpoint(folder, [*WORDS, *words], iterations=7)
    done = detect(tree.parent, *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert "resuming from iteration" in done.stdout
    assert (folder / "checkpoints/last.pt").read_bytes() == (whole[0] / "checkpoints/last.pt").read_bytes()
    assert metrics(folder) == metrics(whole[0])


def test_what_is_frozen_is_that_of_the_source_bit_for_bit_and_all_else_has_moved(whole, pretrained):
    source = torch.load(pretrained, weights_only=True)
    state = checkpoint.load(whole[0] / "checkpoints/last.pt", kind="detector")["model"]
    for name, value in source.items():
        place = "roi_heads.box_head." if name.startswith("layer4") else "backbone."
        if not name.startswith("fc."):
            norm = "bn" in name or "downsample.1" in name
            frozen = norm or name.startswith(("conv1", "layer1"))
            assert torch.equal(state[place + name], value) == frozen, name


def test_the_test_of_a_checkpoint_gives_what_training_logged_to_the_last_digit(whole, command_here, tmp_path):
    """In one process and in two: of five images the one has three, the other two."""
    last = json.loads((whole[0] / "summary.json").read_text())["last"]
    assert last["map50"] > 0
    assert last.keys() >= {"map", "map07", "map10", "per_class", "protocol"}
    words = ("test", f"checkpoint={whole[0]}/checkpoints/last.pt", "device=cpu")
    told = command_here("detect", *words, "out=alone.json")
    assert "alone.json" in told
    as_one_of(2, tmp_path, "from resnet_train.cli import detect; detect()", *words)
    for path in (tmp_path / "alone.json", whole[0] / "checkpoints/last-test.json"):
        found = json.loads(path.read_text())
        assert {key: found[key] for key in last} == last
        assert (found["data"], found["list"], found["images"], found["faults"]) == ("tree", "test", 5, {})


@pytest.mark.long
def test_two_processes_train_together_from_random_weights(tree):
    """Each process has half of the batch; batch norm's averages are the first's in the file and in the test."""
    done = detect(tree.parent, "run_dir=pair", "devices=2", "iterations=2")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line["iteration"] for line in metrics(tree.parent / "pair")] == [2, 2]
    assert "starts from random weights" in done.stdout


def test_predictions_are_drawn_and_written(whole, tree, command_here, tmp_path):
    image = tree / "JPEGImages/003.jpg"
    last = whole[0] / "checkpoints/last.pt"
    for _ in range(2):  # the second replaces what the first has written
        told = command_here("detect", "predict", image, f"checkpoint={last}", "score=0", "out=found", "device=cpu")
    found = json.loads((tmp_path / "found/detections.json").read_text())
    rows = found["images"][0]["found"]
    assert f"{image}: {len(rows)} found with a score of" in told
    assert len(rows) > SHOWN
    assert told.count(": left ") + told.count("  left ") == SHOWN
    assert f"  and {len(rows) - SHOWN} more, in found/detections.json\n" in told
    assert {row["class"] for row in rows} <= set(SHAPES)
    for row in rows:
        left, top, right, bottom = row["box"]
        assert 0 <= left < right <= 96
        assert 0 <= top < bottom <= 72
    drawn, given = (np.array(Image.open(path).convert("RGB")) for path in (tmp_path / "found/003.png", image))
    assert drawn.shape == (5 * 72, 5 * 96, 3)
    assert (drawn != given.repeat(5, 0).repeat(5, 1)).any()
    assert "found/003.png, drawn 5 times as large\n" in told
    assert found["images"][0]["enlarged"] == 5
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_text("no image")
    told = command_here("detect", "predict", "a.jpg", image, "b.jpg", f"checkpoint={last}", "out=no", code=2)
    assert told.startswith("error: a.jpg: is not an image that can be read (")
    assert told.endswith("; and 1 more cannot be used: b.jpg\n")
    assert not (tmp_path / "no").exists()


def test_a_folder_is_no_image(tree, command_here, tmp_path):
    torch.save({}, tmp_path / "last.pt")
    folder = tree / "JPEGImages"
    told = command_here("detect", "predict", folder, "checkpoint=last.pt", code=2)
    assert f"{folder}: is a folder; name the images in it, as in {folder}/*.jpg" in told


def test_the_most_and_the_least_frequent_classes_are_told():
    """So that a misspelt class is seen."""
    box, names = torch.tensor([[0.0, 0, 8, 8]]), [f"class {number}" for number in range(12)]
    labels = torch.cat([torch.full((50 - number,), number + 1) for number in range(12)])
    many = torch.zeros(len(labels), dtype=torch.bool)
    example = Example(Path("a"), "a", 1, 9, 9, box.repeat(len(labels), 1), labels, many, labels.float())
    few = Examples(names[:2], [1, 2], [dataclasses.replace(example, labels=labels[labels < 3])], [], {}, "")
    assert describe_classes(few) == "classes: class 0 50, class 1 49"
    told = describe_classes(dataclasses.replace(few, classes=names, train=[example]))
    assert told.startswith("classes: class 0 50, class 1 49, class 2 48, class 3 47, class 4 46, 2 more, class 7 43, ")
    assert told.endswith(", class 11 39")


def test_pictures_of_one_name_are_refused_before_any_is_written(command_here, tmp_path):
    for name in ("one/x.png", "two/x.jpg"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    torch.save({}, tmp_path / "last.pt")
    told = command_here("detect", "predict", "one/x.png", "two/x.jpg", "checkpoint=last.pt", "out=found", code=2)
    assert "two/x.jpg: its picture and that of one/x.png would have one name; give them one each" in told
    assert not (tmp_path / "found").exists()


def test_a_picture_is_not_written_over_what_it_was_made_of(whole, tree, command_here, tmp_path):
    image = tmp_path / "cell.png"
    Image.open(tree / "JPEGImages/003.jpg").save(image)
    before, last = image.read_bytes(), whole[0] / "checkpoints/last.pt"
    told = command_here("detect", "predict", image, f"checkpoint={last}", "out=.", "device=cpu", code=2)
    assert "the picture of" in told
    assert image.read_bytes() == before


def test_a_picture_that_is_too_long_is_told_before_anything_is_written(whole, command_here, tmp_path):
    Image.new("RGB", (96, 96)).save(tmp_path / "good.png")
    Image.new("RGB", (2000, 1)).save(tmp_path / "line.png")
    last = whole[0] / "checkpoints/last.pt"
    told = command_here("detect", "predict", "good.png", "line.png", f"checkpoint={last}", "device=cpu", code=2)
    assert "is 2000x1; brought to 96 pixels, nothing is left of its width" in told
    assert not (tmp_path / "detections").exists()


def test_a_run_that_begins_again_leaves_nothing_of_the_one_before(whole, tree, pretrained):
    folder = tree.parent / "again"
    shutil.copytree(whole[0], folder)
    (folder / "summary.json").unlink()
    done = detect(
        tree.parent,
        "run_dir=again",
        "seed=4",
        f"init_from={pretrained}",
        "freeze=layer1",
        "resume=never",
        "iterations=1",
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [line["iteration"] for line in metrics(folder)] == [1, 1]
    assert os.listdir(folder / "checkpoints") == ["last.pt"]


def test_nothing_is_drawn_where_nothing_is_that_certain(whole, tree, command_here, tmp_path):
    last = whole[0] / "checkpoints/last.pt"
    words = ["predict", tree / "JPEGImages/003.jpg", f"checkpoint={last}", "device=cpu"]
    command_here("detect", *words, "score=0", "out=all")
    best = max(row["score"] for row in json.loads((tmp_path / "all/detections.json").read_text())["images"][0]["found"])
    told = command_here("detect", *words, "score=1")
    assert f": 0 found with a score of 1 or more (the best score is {best:.2g}), detections/003.png" in told
    assert json.loads((tmp_path / "detections/detections.json").read_text())["images"][0]["found"] == []


def test_checkpoints_of_nets_and_of_detectors_are_told_apart(whole, pretrained, tree, command_here, trained):
    last, image = whole[0] / "checkpoints/last.pt", tree / "JPEGImages/003.jpg"
    assert "is a detector's, which resnet-detect reads" in command_here("evaluate", f"checkpoint={last}", code=2)
    told = command_here("detect", "predict", image, f"checkpoint={trained}", code=2)
    assert "is a checkpoint of resnet-train, not of resnet-detect" in told


@pytest.mark.long
def test_it_learns(tree):
    """Coloured rectangles from random weights: what it finds in the training images is better than at the start."""
    config = configured(tree, "iterations=120", "batch_size=3", "regions=16", "warmup=10", "lr=0.02", "seed=1")
    examples = read_examples(config)
    run = build(config, examples, CPU)

    def measure():
        found = evaluate(
            run.model, examples.train, classes=SHAPES, category_ids=[1, 2, 3], precision="fp32", device=CPU, workers=0
        )
        return found[0]["map10"]

    before = measure()
    iterations = range(config.iterations)
    batches = training_batches(examples.train, seed=1, batch_size=3, iterations=iterations, workers=0, device=CPU)
    for images, targets, _ in batches:
        step(run, images, targets, learning_rate(run.iteration, config))
    assert before < 20
    assert measure() > 50


def test_batches_depend_on_seed_and_iteration_alone(tree):
    examples = read_voc(tree, train=["train"], test="test", classes=None, broken="stop").train

    def batches(first, workers=0, rank=0, world=1):
        options = {"seed": 3, "batch_size": 4, "workers": workers, "device": CPU, "rank": rank, "world": world}
        return list(training_batches(examples, iterations=range(first, 6), **options))

    def same(some, others):
        return all(
            torch.equal(image, other) and all(torch.equal(target[key], wanted[key]) for key in wanted)
            for (images, targets, *_), (images2, targets2, *_) in zip(some, others, strict=True)
            for image, other, target, wanted in zip(images, images2, targets, targets2, strict=True)
        )

    whole = batches(0)
    assert same(batches(4), whole[4:])
    assert same(batches(0, workers=1), whole)
    dealt = [
        ([a[0][0], b[0][0], a[0][1], b[0][1]], [a[1][0], b[1][0], a[1][1], b[1][1]])
        for a, b in zip(batches(0, rank=0, world=2), batches(0, rank=1, world=2), strict=True)
    ]
    assert same(dealt, whole)


def test_boxes_go_with_their_mirrored_image():
    assert mirrored(torch.tensor([[10.0, 5, 30, 20], [0, 0, 96, 72]]), 96).tolist() == [[66, 5, 86, 20], [0, 0, 96, 72]]


def test_the_rate_rises_and_falls_as_the_recipe_says(tree):
    config = configured(tree, "iterations=100", "warmup=4", "lr=0.4", "drops=[0.5,0.75]")
    rates = [learning_rate(iteration, config) for iteration in range(100)]
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert [rates[i] for i in (49, 50, 74, 75, 99)] == pytest.approx([0.4, 0.04, 0.04, 0.004, 0.004])


def test_the_papers_schedules():
    """Appendix A: VOC 0.001 for 60k and 0.0001 for 20k; COCO 0.001 for 240k and 0.0001 for 80k, 8 images."""
    voc, coco = (compose("detect", [f"data={name}"]) for name in ("voc", "coco"))
    assert (voc["iterations"], voc["lr"], voc["drops"], voc["momentum"], voc["weight_decay"]) == (
        80_000,
        0.001,
        [0.75],
        0.9,
        5e-4,
    )
    assert (coco["iterations"], coco["lr"], coco["drops"], coco["batch_size"]) == (320_000, 0.001, [0.75], 8)
    assert voc["data"]["train"] == ["2007_trainval", "2012_trainval"]
    assert voc["proposals"] == coco["proposals"] == 300


@pytest.mark.slow
def test_a_checkpoint_that_declares_more_classes_than_it_has_weights_for_is_refused_before_a_detector_is_made(tree):
    config = configured(tree)
    model, backbone = build_new(config, list(SHAPES))
    state = {"detector": dataclasses.asdict(backbone), "model": model.state_dict(), "classes": list("abc")}
    state["path"] = "last.pt"
    build_like_checkpoint(config, state)
    with pytest.raises(UserError, match=r"box_predictor\.cls_score\.weight is 4x512, not 1000001x512"):
        build_like_checkpoint(config, state | {"classes": ["a"] * 1_000_000})


@pytest.fixture
def files_read(monkeypatch):
    """The files that torch reads."""
    read, names = torch.load, []
    monkeypatch.setattr(torch, "load", lambda path, **options: [names.append(path.name), read(path, **options)][1])
    return names


def test_vgg16_begins_with_torchvisions_weights_and_another_net_is_refused(tree, pretrained, tmp_path, files_read):
    torch.manual_seed(0)
    state = vgg16(weights=None).state_dict()
    torch.save(state, tmp_path / "vgg16.pth")
    model, backbone = build_new(configured(tree, "backbone=vgg16", f"init_from={tmp_path}/vgg16.pth"), list(SHAPES))
    build_new(configured(tree, f"init_from={pretrained}"), list(SHAPES))
    assert files_read == ["vgg16.pth", "resnet18.pth"]  # each once
    own = model.state_dict()
    for name, value in state.items():
        place = "backbone." if name.startswith("features") else "roi_heads.box_head."
        assert name.startswith("classifier.6") or torch.equal(own[place + name], value)
    assert backbone.pretrained == "VGG-16 of vgg16.pth"
    with pytest.raises(UserError, match="is not torchvision's vgg16"):
        build_new(configured(tree, "backbone=vgg16", f"init_from={pretrained}"), list(SHAPES))


def test_weights_of_another_net_are_refused_and_leave_no_folder(tree, pretrained, tmp_path):
    with pytest.raises(UserError, match="holds ImageNet resnet-18-B; use depth=18"):
        build_new(configured(tree, f"init_from={pretrained}", "depth=34"), list(SHAPES))
    torch.save(imagenet_resnet(18, "none").state_dict(), tmp_path / "plain.pth")
    with pytest.raises(UserError, match="which may be a plain one; resnet-weights import FILE arch=resnet"):
        build_new(configured(tree, f"init_from={tmp_path / 'plain.pth'}"), list(SHAPES))
    for place in ("run", "runs/tree-detection/resnet-34/seed-0"):
        with pytest.raises(UserError, match="use depth=18"):
            run_detector(configured(tree, f"init_from={pretrained}", "depth=34"), tmp_path / place)
    assert os.listdir(tmp_path) == ["plain.pth"]


def test_pixels_are_those_of_the_source(tree, pretrained):
    """torchvision's weights: images in 0 to 1 minus ImageNet's mean, over its standard deviation."""
    model, _ = build_new(configured(tree, f"init_from={pretrained}"), list(SHAPES))
    assert model.transform.image_mean == pytest.approx([0.485, 0.456, 0.406])
    assert model.transform.image_std == pytest.approx([0.229, 0.224, 0.225])


def test_batch_norm_is_fixed_with_weights_and_trained_without(tree, pretrained):
    fixed, _ = build_new(configured(tree, f"init_from={pretrained}"), list(SHAPES))
    free, _ = build_new(configured(tree), list(SHAPES))
    for model, training in ((fixed.train(), False), (free.train(), True)):
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        assert {module.training for module in norms} == {training}
        assert {p.requires_grad for module in norms for p in module.parameters()} == {training}


def test_a_detector_goes_on_on_other_classes_by_their_names(tree, whole, tmp_path):
    last = whole[0] / "checkpoints/last.pt"
    state = checkpoint.load(last, kind="detector")
    state["classes"] = ["airplane", "square", "couch"]  # as COCO names them
    checkpoint.save(tmp_path / "coco.pt", state)
    names = ["sofa", "aeroplane", "person", "square"]
    model, backbone = build_new(configured(tree, f"init_from={tmp_path}/coco.pt"), names)
    assert backbone.detector == "the detector resnet-18 of coco.pt, trained on tree, 3 of 4 classes with it"
    new, old = model.state_dict(), state["model"]
    for part, each in (("cls_score", 1), ("bbox_pred", 4)):
        for kind in ("weight", "bias"):
            name = f"roi_heads.box_predictor.{part}.{kind}"
            ours, theirs = new.pop(name).unflatten(0, (-1, each)), old[name].unflatten(0, (-1, each))
            assert torch.equal(ours[[0, 1, 2, 4]], theirs[[0, 3, 1, 2]])
            assert not torch.equal(ours[3], theirs[3])
    assert all(torch.equal(new[name], old[name]) for name in new)


@pytest.mark.parametrize(
    ("word", "told"),
    [("depth=34", "depth=18"), ("anchors=[16,32,64]", "anchors=[16,32]"), ("context=true", "context=false")],
)
def test_a_detector_of_another_shape_is_refused_with_the_key(tree, whole, word, told):
    last = whole[0] / "checkpoints/last.pt"
    with pytest.raises(
        UserError, match=re.escape(f"init_from={last}: is a detector with {told}; use that, or another")
    ):
        build_new(configured(tree, f"init_from={last}", word), list(SHAPES))


def test_a_run_from_a_detector_says_so(tree, whole, tmp_path):
    last = whole[0] / "checkpoints/last.pt"
    shutil.copytree(tree, tmp_path / "tree")
    done = detect(tmp_path, f"init_from={last}", "freeze=layer1", "iterations=2", "run_dir=tuned")
    assert done.returncode == 0, done.stderr
    told = "starts from the detector resnet-18 of last.pt, trained on tree, 3 of 3 classes with it;"
    assert told + " batch norm stays as it has it; frozen up to layer1" in done.stdout


def test_two_evaluators_agree_on_perfect_detections(tree):
    examples = read_voc(tree, train=["train"], test="test", classes=None, broken="stop")
    found = [{"boxes": e.boxes, "labels": e.labels, "scores": torch.ones(len(e.boxes))} for e in examples.test]
    assert voc_map(examples.test, found, examples.classes)["map07"] == pytest.approx(100)
    assert coco_map(examples.test, found, examples.classes)["map"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["data.root=nowhere"], "data.root=nowhere: there is no such folder"),
        (
            ["data.root=tree/JPEGImages", "run_dir=new"],
            "has no ImageSets/Main/*.txt or VOC*/ImageSets/Main/*.txt",
        ),
        (["data.train=[trainn]"], "data.train=trainn: tree has test, train; did you mean train?"),
        (["data.train=[train]", "data.test=tset"], "data.test=tset: tree has test, train; did you mean test?"),
        (["depth=19"], "depth=19: ImageNet nets have 18, 34, 50, 101, 152 layers; nearest: 18"),
        (["backbone=vgg"], "backbone=vgg: allowed are resnet, vgg16; did you mean vgg16?"),
        (["freeze=layer1"], "freeze=layer1: would keep random weights; add init_from=, or remove it"),
        (["recipe=long"], "recipe=long: allowed are coco, short, voc"),
        (["batch_size=3", "devices=2"], "batch_size=3: does not divide by 2 devices; nearest: 4"),
        (["anchors=[64,32]"], "anchors=[64, 32]: must rise"),
        (["pyramid=true"], "pyramid=true has five levels"),
        (["max_size=50"], "max_size=50: is below min_size=64"),
        (["init_from=nothing.pt", "run_dir=new"], "init_from="),
        (["learning_rate=1"], "there is no key learning_rate; did you mean lr?"),
        (["iteration=5"], "there is no key iteration; did you mean iterations?"),
        (["data.train"], "'data.train': is not key=value; add a value"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(tree, monkeypatch, capsys, words, told):
    monkeypatch.chdir(tree.parent)
    given = [word for word in WORDS if word.split("=")[0] not in {other.split("=")[0] for other in words}]
    monkeypatch.setattr(sys, "argv", ["resnet-detect", *given, *words])
    with pytest.raises(SystemExit) as ended:
        cli.detect()
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert told in error
    assert error.count("\n") == 1
    assert not (tree.parent / "new").exists()


@pytest.fixture
def cut_tree(tree, tmp_path):
    """The tree with a training and a test image whose headers are whole and whose pixels are cut off."""
    shutil.copytree(tree, tmp_path / "cut")
    for name in ("002", "010"):
        path = tmp_path / f"cut/JPEGImages/{name}.jpg"
        path.write_bytes(path.read_bytes()[:700])
    return tmp_path / "cut"


def test_broken_pixels_stop_a_detector_with_their_name(cut_tree):
    config = configured(cut_tree)
    task = build(config, read_examples(config), CPU)
    with pytest.raises(UserError, match=r"002\.jpg: is not an image.*; remove it, or train with data\.broken=skip"):
        list(task.batches())
    with pytest.raises(UserError, match=r"010\.jpg: is not an image.*; remove it, or train with data\.broken=skip"):
        list(task.evaluate())


def test_broken_pixels_are_skipped_and_counted_where_asked(cut_tree, capsys):
    """In training the next image stands for the broken one; a test is of one image less, and says so."""
    config = configured(cut_tree, "data.broken=skip", "batch_size=3", "iterations=7")
    examples = read_examples(config)
    assert examples.faults == {}
    task = build(config, examples, CPU)
    place = next(index for index, one in enumerate(examples.train) if one.name == "002")
    times = sum(batch_indices(0, step, 3, 9).eq(place).sum().item() for step in range(6))
    assert times == 2
    for batch in itertools.islice(task.batches(), 6):
        assert [len(batch.images), len(batch.targets)] == [3, 3]
        task.step(batch, 0.01)
    assert task.state()["skipped"] == times
    resumed = build(config, examples, CPU, task.state() | {"path": "last.pt"})
    assert resumed.train_point()["skipped"] == task.train_point()["skipped"] == times
    assert task.train_point()["skipped"] == 0
    assert capsys.readouterr().err.count("skipped: ") == 1
    (point,) = task.evaluate()
    assert (point.values["images"], point.values["skipped"]) == (4, 1)
    assert "010.jpg: is not an image that can be read" in capsys.readouterr().err
    assert ", on 4 images (1 broken left out) at iteration 6" in task.conclude(task.summary([]))
    whole = evaluate(
        task.model,
        [one for one in examples.test if one.name != "010"],
        classes=SHAPES,
        category_ids=[1, 2, 3],
        precision="fp32",
        device=CPU,
        workers=0,
    )[0]
    assert whole == {name: task.measured[name] for name in whole}
    assert [name for name, _ in point.images] == ["009", "011", "012"]


def test_only_broken_pixels_are_told(cut_tree, tree):
    for path in cut_tree.glob("JPEGImages/*.jpg"):
        path.write_bytes(path.read_bytes()[:700])
    config = configured(cut_tree, "data.broken=skip")
    task = build(config, read_examples(config), CPU)
    with pytest.raises(UserError, match="; and so are the 8 after it"):
        next(task.batches())
    with pytest.raises(UserError, match=r"data\.test: has no image whose pixels can be read"):
        next(task.evaluate())
    shutil.copy(tree / "JPEGImages/013.jpg", cut_tree / "JPEGImages")  # the last, which has no object
    with pytest.raises(UserError, match=r"data\.test: no image whose pixels can be read has an object that counts"):
        next(task.evaluate())
