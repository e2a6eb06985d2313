"""Whole runs of `resnet-localize` on real digits: what they leave, how they resume, alone and in two processes."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import time

import forked
import pytest
import torch
from conftest import as_one_of, metrics, needs, start

from resnet_train.classification.run import build as build_classifier
from resnet_train.config.compose import compose
from resnet_train.config.localization import check_localize
from resnet_train.config.train import check_train
from resnet_train.engine import checkpoint
from resnet_train.errors import UserError
from resnet_train.localization.build import load_predictor
from resnet_train.localization.evaluate import evaluate
from resnet_train.localization.loader import whole_images
from resnet_train.localization.predict import locate
from resnet_train.localization.run import build, open_data
from resnet_train.localization.tree import read_tree

needs("sklearn")
from digits_boxes import make_digits  # noqa: E402

CPU = torch.device("cpu")
WORDS = ["data.root=digits", "recipe=short", "init_from=net/checkpoints/last.pt", "crop=32", "anchors=[8,12,18]"]
WORDS += ["iterations=7", "batch_size=4", "log_every=3", "eval_every=4", "checkpoint_every=4", "proposals=4"]
WORDS += ["data.workers=0", "device=cpu", "precision=fp32"]
RCNN = ["stage=rcnn", "rpn=rpn/checkpoints/last.pt"]


def localize(folder, *words):
    """The command in `folder`."""
    named = {word.partition("=")[0] for word in words}
    drop = {"anchors"} if "stage=rcnn" in words else {"proposals"}
    rest = [word for word in WORDS if word.partition("=")[0] not in named | drop]
    return start(*rest, *words, entry="localize")


def done(folder, *words):
    found = forked.run(localize(folder, *words), cwd=folder, capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, ""), found.stderr
    return found.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Digits, a classifier of them as it begins, and a finished run of each stage; proposals are kept there."""
    folder = tmp_path_factory.mktemp("localization")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESNET_TRAIN_DATA", str(folder / "cache"))
        yield _finished(folder)


def _finished(folder):
    make_digits(folder / "digits", train=12, test=7, classes=3, side=(48, 64), digit=(16, 30))
    words = ["data=imagefolder", f"data.root={folder}/digits", "data.size=32", "depth=8", "batch_size=8"]
    classifier = build_classifier(check_train(compose("train", [*words, "device=cpu", "precision=fp32"])))
    checkpoint.save(folder / "net/checkpoints/last.pt", classifier.state())
    done(folder, "run_dir=rpn")
    done(folder, "run_dir=rcnn", *RCNN)
    return folder


def test_a_run_leaves_what_is_said(folder):
    for stage, method in (("rpn", "RPN"), ("rcnn", "RPN + R-CNN")):
        run = folder / stage
        names = {"checkpoints", "config.json", "curves.png", "environment.json", "metrics.jsonl", "summary.json"}
        assert {*os.listdir(run)} == names | {"tensorboard"}
        lines = metrics(run)
        assert [line["iteration"] for line in lines if line["split"] == "train"] == [3, 6, 7]
        assert [line["iteration"] for line in lines if line["split"] == "test"] == [4, 7]
        assert all(line["protocol"] == "center crop, true class given" for line in lines if line["split"] == "test")
        summary = json.loads((run / "summary.json").read_text())
        assert (summary["method"], summary["net"]) == (method, "resnet-8-A")
        assert summary["images"] == {"train": 12, "test": 7}
        assert summary["last"]["error"] == lines[-1]["error"]


@pytest.mark.parametrize("stage", ["rpn", pytest.param("rcnn", marks=pytest.mark.long)])
def test_a_killed_run_resumes_to_the_same_weights_and_figures(folder, stage):
    killed, words = folder / f"killed-{stage}", [f"run_dir=killed-{stage}", *(RCNN if stage == "rcnn" else [])]
    job = forked.Popen(localize(folder, *words), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (killed / "checkpoints/last.pt").exists():
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGKILL)
    job.wait()
    told = done(folder, *words)
    assert "resuming from iteration" in told
    assert (killed / "checkpoints/last.pt").read_bytes() == (folder / stage / "checkpoints/last.pt").read_bytes()
    assert metrics(killed) == metrics(folder / stage)


@pytest.mark.parametrize("stage", ["rpn", pytest.param("rcnn", marks=pytest.mark.long)])
def test_two_processes_learn_what_one_does(folder, tmp_path, monkeypatch, stage):
    """Up to rounding: the gradient of each half is summed by itself."""
    monkeypatch.setenv("RESNET_TRAIN_DATA", str(tmp_path / "cache"))
    for name in ("digits", "net", "rpn"):
        (tmp_path / name).symlink_to(folder / name)
    words = localize(folder, "run_dir=pair", *(RCNN if stage == "rcnn" else []))[3:]
    as_one_of(2, tmp_path, "from resnet_train.cli import localize; localize()", *words)
    one, two = (
        checkpoint.load(place / "checkpoints/last.pt", kind="localizer")
        for place in (folder / stage, tmp_path / "pair")
    )
    for name, value in one["model"].items():
        assert torch.allclose(value, two["model"][name], rtol=1e-4, atol=1e-5), name
    for lines in zip(metrics(folder / stage), metrics(tmp_path / "pair"), strict=True):
        (words, numbers), (others, theirs) = (apart(line) for line in lines)
        assert (words, numbers) == (others, pytest.approx(theirs, rel=1e-4))


def apart(line):
    """The words of a line of metrics, and its numbers."""
    words = {key: value for key, value in line.items() if isinstance(value, str)}
    return words, {key: value for key, value in line.items() if key not in words}


def test_the_test_of_a_checkpoint_gives_what_training_logged(folder, command_here, tmp_path):
    """In one process and, behind R-CNN, in two, of which one has four of seven images, the other three."""
    for stage in ("rpn", "rcnn"):
        last = json.loads((folder / stage / "summary.json").read_text())["last"]
        words = ["test", f"checkpoint={folder}/rpn/checkpoints/last.pt", "device=cpu", f"out={stage}.json"]
        if stage == "rpn":
            command_here("localize", *words)
        else:
            words.append(f"rcnn={folder}/rcnn/checkpoints/last.pt")
            as_one_of(2, tmp_path, "from resnet_train.cli import localize; localize()", *words)
        found = json.loads((tmp_path / f"{stage}.json").read_text())
        assert (found["error"], found["images"]) == (last["error"], 7)
        assert found["protocol"] == "center crop of 32"


def test_rcnn_is_not_left_out_and_a_test_needs_no_training_images(folder, command_here, tmp_path):
    """Objects as large as their images, which no anchor is; this R-CNN moves each box to the whole image."""
    boxes = "Annotations/CLS-LOC/val"
    shutil.copytree(folder / "digits/val", tmp_path / "digits/val")
    (tmp_path / "digits/val/__MACOSX").mkdir()
    for path in (folder / "digits" / boxes).iterdir():
        (tmp_path / "digits" / boxes).mkdir(parents=True, exist_ok=True)
        text = path.read_text()
        width, height = (int(text.split(f"<{side}>")[1].split("<")[0]) for side in ("width", "height"))
        whole = f"<xmin>0</xmin><ymin>0</ymin><xmax>{width - 1}</xmax><ymax>{height - 1}</ymax>"
        (tmp_path / "digits" / boxes / path.name).write_text(re.sub("<xmin>.*?</ymax>", whole, text))
    state = checkpoint.read(folder / "rcnn/checkpoints/last.pt")
    state["model"]["reg.bias"].view(-1, 4)[:, 2:] = 50
    torch.save(state, tmp_path / "rcnn.pt")
    words = [folder / "rpn/checkpoints/last.pt", "data.root=digits", "device=cpu", "out=test.json"]
    for more, error in (([], 100), (["rcnn=rcnn.pt"], 0)):
        told = command_here("localize", "test", *words, *more)
        assert json.loads((tmp_path / "test.json").read_text())["error"] == error
        assert "1 folders of val/ left out: no class of the checkpoint" in told


def test_rcnn_moves_the_boxes_of_the_rpn(folder):
    """Found by both runs as they end; their errors on seven images may be equal."""
    rpn, rcnn = (
        load_predictor(checkpoint.load(path, kind="localizer"), stage, CPU)[0]
        for stage in ("rpn", "rcnn")
        for path in [folder / stage / "checkpoints/last.pt"]
    )
    photos = read_tree(folder / "digits", broken="stop").test
    for example, image in whole_images(photos, range(len(photos)), workers=0, skip=False, device=CPU):
        alone, moved = (locate(rpn, behind, image, example.labels[:1] - 1) for behind in (None, rcnn))
        assert not torch.equal(alone, moved)


def test_dense_with_five_classes_and_rcnn(folder, command_here, tmp_path):
    """Beside its checkpoint, each other R-CNN, classifier or root with a file of its own."""
    rpn, rcnn, net = (folder / name / "checkpoints/last.pt" for name in ("rpn", "rcnn", "net"))
    words = [f"rcnn={rcnn}", f"classifier={net}", "dense=true", "scales=[32,40]", "device=cpu"]
    told = command_here("localize", "test", rpn, *words)
    (out,) = rpn.parent.glob("last-dense-32-40-rcnn-rcnn-*-top5-net-*-test.json")
    assert str(out) in told
    words = r"localization error (\S+ %) with the true class, \S+ % with the class that resnet-8-A names, whose own"
    assert re.search(words + r" classification error is \S+ %; on 7 images; ", told)  # nothing of five of three classes
    found = json.loads(out.read_text())
    wanted = "dense, shorter side at 32, 40; classes without mirror images"
    assert (found["method"], found["protocol"]) == ("RPN + R-CNN", wanted)
    assert found["class_error5"] == 0  # of three classes all are among the five
    assert found["error5"] == found["error"] <= found["error1"]
    assert (found["rcnn"]["proposals"], found["classifier"]["net"]) == (4, "resnet-8-A")
    for run in ("rpn", "rcnn", "net"):
        for place in ("a", "b"):
            (tmp_path / place / run / "checkpoints").mkdir(parents=True)
            shutil.copy(folder / run / "checkpoints/last.pt", tmp_path / place / run / "checkpoints")
    shutil.copytree(folder / "digits", tmp_path / "more/digits")
    out.unlink()
    seen = set()
    for place, root in (("a", folder / "digits"), ("b", folder / "digits"), ("a", tmp_path / "more/digits")):
        words = [f"rcnn={place}/rcnn/checkpoints/last.pt", f"classifier={place}/net/checkpoints/last.pt"]
        command_here("localize", "test", "a/rpn/checkpoints/last.pt", *words, f"data.root={root}", "device=cpu")
        seen.add(len(list((tmp_path / "a/rpn/checkpoints").glob("*.json"))))
    assert seen == {1, 2, 3}


def test_results_stand_in_a_table_of_their_own_and_of_the_papers_images_beside_its_own(folder, command_here, tmp_path):
    pytest.importorskip("bokeh")
    for name in ("rpn", "rcnn"):
        shutil.copytree(folder / name, tmp_path / "runs" / name)
    rpn, rcnn = (f"runs/{name}/checkpoints/last.pt" for name in ("rpn", "rcnn"))
    command_here("report", "runs", "out=report")
    assert "Ours: not measured yet" in (tmp_path / "report/report.md").read_text()
    command_here("localize", "test", rpn, "device=cpu")
    command_here("localize", "test", rpn, f"rcnn={rcnn}", f"classifier={folder}/net/checkpoints/last.pt", "device=cpu")
    command_here("report", "runs", "out=report")
    rows = (tmp_path / "report/localizers.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["method", "RPN", "RPN + R-CNN"]  # all are ours
    assert not (tmp_path / "report/table-14.csv").exists()
    assert '"localization error, true class given","localization error, top-1",classes named by,"its' in rows[0]
    assert "top-5" not in rows[0]  # of three classes
    told = (tmp_path / "report/report.md").read_text()
    assert "Localization on digits (7 test images, a small set): 2 runs" in told
    assert "RPN seed 0: iteration 7, R-CNN seed 0: iteration 7; 7 test images, a small set, on cpu" in told
    first = (tmp_path / "report/localizers.csv").read_text()
    path = next((tmp_path / "runs/rpn/checkpoints").glob("*rcnn*.json"))
    other = json.loads(path.read_text()) | {"data": "others", "iteration": 5, "images": 49_990}
    path.with_name("mine.json").write_text(json.dumps(other))
    command_here("report", "runs", "out=report")
    assert (tmp_path / "report/localizers.csv").read_text() == first
    rows = (tmp_path / "report/table-13-data-2.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:3]] == [["ours", "RPN + R-CNN"], ["paper", "VGG's"]]
    assert "paper,RPN,ResNet-101,center crop,13.3,,,,," in rows
    assert "paper,ResNet (2015),8.9,9.0" in (tmp_path / "report/table-14-data-2.csv").read_text().splitlines()
    told = (tmp_path / "report/report.md").read_text()
    assert "checkpoints/mine.json: RPN seed 0: iteration 5 of 7, unfinished" in told


def test_checkpoints_of_other_kinds_and_classes_are_told(folder, command_here, tmp_path):
    rpn, rcnn, net = (folder / name / "checkpoints/last.pt" for name in ("rpn", "rcnn", "net"))
    image = folder / "digits/val/0/0_00000.JPEG"
    for words in (["evaluate"], ["classify", image], ["detect", "predict", image]):
        told = command_here(*words, f"checkpoint={rpn}", code=2)
        assert "is a localizer's, which resnet-localize reads" in told
    told = command_here("localize", "test", net, code=2)
    assert "is a checkpoint of resnet-train, not of resnet-localize" in told
    told = command_here("localize", "test", rcnn, "device=cpu", code=2)
    assert "is of stage=rcnn; one of stage=rpn is needed" in told
    told = command_here("localize", "test", rpn, f"rcnn={rpn}", "device=cpu", code=2)
    assert "is of stage=rpn; one of stage=rcnn is needed" in told
    shutil.copytree(folder / "digits", tmp_path / "fewer")
    for name in "012":
        (tmp_path / "fewer/val" / name).rename(tmp_path / "fewer/val" / str(3 + int(name)))
    told = command_here("localize", "test", rpn, "data.root=fewer", "device=cpu", code=2)
    assert "fewer: val/ has other classes than the checkpoint, such as 3" in told
    state = checkpoint.read(net)
    torch.save(state | {"classes": ["0", "1", "x"]}, tmp_path / "other.pt")
    told = command_here("localize", "test", rpn, "classifier=other.pt", "device=cpu", code=2)
    assert "classifier=other.pt: has other classes than the RPN, such as 2" in told
    torch.save(checkpoint.read(rcnn) | {"classes": ["1", "0", "2"]}, tmp_path / "turned.pt")
    told = command_here("localize", "test", rpn, "rcnn=turned.pt", "device=cpu", code=2)
    assert "rcnn=turned.pt: has the same classes as the RPN in another order" in told
    torch.save(checkpoint.read(rpn) | {"format": 1}, tmp_path / "old.pt")
    assert "format 1" in command_here("localize", "test", "old.pt", "device=cpu", code=2)


def test_proposals_are_kept_and_init_from_is_told_before_they_are_made(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RESNET_TRAIN_DATA", str(tmp_path))
    words = [*(word for word in WORDS if not word.startswith("anchors")), *RCNN]
    config = check_localize(compose("localize", words), [])
    with pytest.raises(UserError, match="is a localizer's"):
        open_data(dataclasses.replace(config, init_from=config.rpn))
    assert not list(tmp_path.iterdir())
    (kept,) = (folder / "cache").glob("proposals/*.pt")  # by the run
    (tmp_path / "proposals").mkdir()
    copied = tmp_path / "proposals" / kept.name
    torch.save(checkpoint.read(kept) + 1, copied)
    assert torch.equal(open_data(config).proposals, checkpoint.read(copied))
    assert "proposals" not in capsys.readouterr().out
    copied.write_bytes(kept.read_bytes()[:-50])
    found = open_data(config).proposals
    assert "proposals of the RPN for 12 training images" in capsys.readouterr().out
    assert torch.equal(checkpoint.read(copied), found)
    torch.testing.assert_close(found, checkpoint.read(kept), rtol=0, atol=1e-3, equal_nan=True)


def test_an_image_whose_pixels_are_broken_stops_or_is_skipped(folder, command_here, tmp_path):
    for name in ("net", "rpn"):
        (tmp_path / name).symlink_to(folder / name)
    shutil.copytree(folder / "digits", tmp_path / "digits")
    for part in ("train", "val"):
        path = next((tmp_path / "digits" / part).glob("1/*.JPEG"))
        path.write_bytes(path.read_bytes()[:-300])  # its header is whole
    told = forked.run(localize(tmp_path, "run_dir=stop"), cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 2
    assert "is not an image that can be read" in told.stderr
    words = ["run_dir=skip", "data.broken=skip", "precision=bf16", *RCNN]
    told = forked.run(localize(tmp_path, *words), cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert "skipped: " in told.stderr
    assert json.loads((tmp_path / "skip/summary.json").read_text())["last"]["images"] == 6
    skipped = [line["skipped"] for line in metrics(tmp_path / "skip") if line["split"] == "train"]
    assert sum(skipped) in (2, 3)  # once in each pass over 12 images, of which 28 are drawn
    closing = "on 6 images (1 broken left out) at iteration 7, the last; broken training images were replaced by others"
    assert f"{closing} {sum(skipped)} times\n" in told.stdout


def test_a_mean_loss_does_not_depend_on_the_number_of_processes_before_a_resume(folder, monkeypatch):
    """Five iterations with a loss of one in each of two processes, the run resumed in one."""
    monkeypatch.chdir(folder)
    config = check_localize(compose("localize", [*WORDS, "log_every=10"]), [])
    task = build(config, open_data(config), CPU)
    sums = torch.full((2, len(task.names)), 5.0)
    task.load(task.state() | {"iteration": 5, "sums": sums})
    point = task.train_point()
    assert [point[name] for name in task.names] == [1.0] * len(task.names)


@pytest.mark.long
def test_it_learns(folder, tmp_path):
    """Some hundred iterations from the weights of a classifier: most of what it is not shown in training it finds."""
    make_digits(tmp_path / "digits", train=300, test=60, classes=3, side=(48, 64), digit=(16, 30))
    words = ["data=imagefolder", f"data.root={tmp_path}/digits", "data.size=32", "depth=8", "iterations=300"]
    words += ["batch_size=32", f"run_dir={tmp_path}/net", "compile=false", "device=cpu", "augment.flip=false"]
    assert forked.run(start(*words), cwd=folder, stdout=subprocess.DEVNULL).returncode == 0
    words = [word for word in WORDS if not word.startswith(("proposals", "init_from", "iterations", "batch_size"))]
    words += [f"data.root={tmp_path}/digits", f"init_from={tmp_path}/net/checkpoints/last.pt", "iterations=300"]
    config = check_localize(compose("localize", [*words, "batch_size=16", "lr=0.1"]), [])
    data = open_data(config)
    task = build(config, data, CPU)

    def error():
        rpn = task.predictor()
        return evaluate(rpn, None, data.test, device=CPU, workers=0, sides=[37])["error"]

    before = error()
    for batch in task.batches():
        task.step(batch, task.learning_rate())
    assert before > 70
    assert error() < 30
