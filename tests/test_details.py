"""What `resnet-eval details=true` leaves: every answer, the errors of classes, and a page of the mistakes."""

import base64
import csv
import io
import json
import os
import re
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import as_one_of
from PIL import Image
from test_classify import configured, saved

from resnet_train import load
from resnet_train.classification.command import evaluate_checkpoint
from resnet_train.classification.details import answers, in_order
from resnet_train.config.commands import check_eval
from resnet_train.config.compose import compose
from resnet_train.data import pack
from resnet_train.data.memory import MemoryDataset
from resnet_train.data.streaming import StreamingDataset
from resnet_train.models import cifar_resnet, imagenet_resnet
from resnet_train.report import mistakes
from resnet_train.terminal import format_share

FILES = ["classes.csv", "confusion.csv", "mistakes.html", "predictions.csv"]
EVIL = "<img src=x onerror=\"document.title='evil'\">"


def table(path):
    """A CSV file's header and rows."""
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    return header, rows


@pytest.fixture(scope="module")
def looked(trained, tmp_path_factory):
    """The files of an evaluation on digits, in one process, and in two."""
    base = tmp_path_factory.mktemp("looked")
    words = [f"checkpoint={trained}", "device=cpu", "details=true"]
    evaluate_checkpoint(check_eval(compose("eval", [*words, f"out={base / '1' / 'last.json'}"])))
    (base / "2").mkdir()
    as_one_of(2, base / "2", "from resnet_train.cli import evaluate; evaluate()", *words, "out=last.json")
    return base


def test_every_answer_is_the_nets(looked, trained):
    header, rows = table(looked / "1" / "last-predictions.csv")
    assert header == ["image", "label", "prediction", "probability"]
    dataset = MemoryDataset(name="digits", root=None, size=32, validation=0)
    images, labels = dataset.parts["test"].images, dataset.parts["test"].labels
    model = load(trained)
    odds = model.logits(torch.stack([model.transform(Image.fromarray(one.numpy())) for one in images])).softmax(1)
    assert [int(row[0]) for row in rows] == list(range(360))
    assert [int(row[1]) for row in rows] == labels.tolist()
    assert [int(row[2]) for row in rows] == odds.argmax(1).tolist()
    assert [float(row[3]) for row in rows] == pytest.approx(odds.max(1).values.tolist(), abs=1e-5)


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        *[(0.0, "0.00 %"), (0.632, "63.20 %"), (0.9951, "99.51 %"), (0.99996, "99.996 %"), (0.999998, "99.9998 %")],
        *[(1 - 2e-9, ">99.9999 %"), (0.99990001, "99.990 %"), (1.0, "100 %")],
    ],
)
def test_the_surest_are_told_apart(share, shown):
    assert format_share(share) == shown


def test_all_files_tell_the_same_count(looked):
    result = json.loads((looked / "1" / "last.json").read_text())
    _, rows = table(looked / "1" / "last-predictions.csv")
    assert 0 < result["wrong"] == sum(row[1] != row[2] for row in rows) < 360
    header, classes = table(looked / "1" / "last-classes.csv")
    assert header == ["class", "images", "wrong", "error (%)", "most often taken for", "times"]
    assert [sum(int(row[column]) for row in classes) for column in (1, 2)] == [360, result["wrong"]]
    header, pairs = table(looked / "1" / "last-confusion.csv")
    assert header == ["label", "prediction", "images"]
    counted = {tuple(row[:2]): int(row[2]) for row in pairs}
    assert counted == Counter((row[1], row[2]) for row in rows)
    for row in classes:
        others = [times for (label, answer), times in counted.items() if label == row[0] != answer]
        assert (int(row[2]), int(row[5] or 0)) == (sum(others), max(others, default=0))
        assert not others or counted[row[0], row[4]] == max(others)
        assert float(row[3]) == pytest.approx(100 * int(row[2]) / int(row[1]))


def test_the_page_has_the_surest_mistakes_as_pictures_and_needs_no_network(looked):
    page = (looked / "1" / "last-mistakes.html").read_text()
    _, rows = table(looked / "1" / "last-predictions.csv")
    wrong = sorted((row for row in rows if row[1] != row[2]), key=lambda row: (-float(row[3]), int(row[0])))
    tiles = re.findall(r'class="small" alt="[^"]*" src="data:image/png;base64,([^"]+)"><p>(.*?)</p>', page)
    assert len(tiles) == min(mistakes.MOST, len(wrong))
    images = MemoryDataset(name="digits", root=None, size=32, validation=0).parts["test"].images
    for (content, words), row in zip(tiles, wrong, strict=False):
        assert words == f"{row[1]}<br>taken for {row[2]}, {format_share(float(row[3]))}<br>{row[0]}"
        with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
            assert picture.tobytes() == images[int(row[0])].numpy().tobytes()
    assert page.count("data:image/svg+xml;base64,") == 2  # of classes, and of what is taken for what
    assert "default-src 'none'" in page
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)


def test_two_processes_leave_the_same_files(looked):
    assert sorted(os.listdir(looked / "1")) == sorted(os.listdir(looked / "2"))
    assert sorted(os.listdir(looked / "1")) == sorted(["last.json", *(f"last-{name}" for name in FILES)])
    for name in os.listdir(looked / "1"):
        assert (looked / "1" / name).read_bytes() == (looked / "2" / name).read_bytes(), name


def test_the_answer_is_the_one_that_is_counted_and_padding_is_left_out():
    logits = torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 0.0], [5.0, 0.0, 0.0]])
    found = answers(logits, torch.tensor([0, 2, -1]))
    assert (found.shape, found.dtype) == ((3, 3), torch.float64)
    assert found[:, 0].tolist() == [0, 2, -1]
    assert found[:, 1].tolist() == [float(logits.topk(3).indices[0, 0]), 1.0, 0.0]
    assert torch.equal(in_order([found, found], 5), torch.cat([found, found[:2]]))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A tree of two classes, one with a hostile name, and what it is called packed."""
    root, draw = tmp_path_factory.mktemp("photographs") / "tree", torch.Generator().manual_seed(0)
    for part, count in (("train", 4), ("val", 7)):
        for number in range(count):
            folder = root / part / ("cat", EVIL.replace("/", ""))[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(0, 256, (90, 80 + number, 3), dtype=torch.uint8, generator=draw)
            Image.fromarray(pixels.numpy()).save(folder / f"{number} {EVIL[1:9]}.JPEG")
    return root


@pytest.mark.parametrize("protocol", ["center", "tencrop"])
def test_names_of_photographs_are_text(photographs, tmp_path, command_here, monkeypatch, protocol):
    monkeypatch.setenv("RESNET_TRAIN_DATA", str(tmp_path / "data"))
    classes = sorted(path.name for path in (photographs / "val").iterdir())
    saved(tmp_path / "net.pt", imagenet_resnet(18, num_classes=2), configured("imagenet", 96), classes)
    words = ["net.pt", "data=imagenet", f"data.root={photographs}", "device=cpu", "details=true", "out=r.json"]
    told = command_here("evaluate", *words, f"protocol={protocol}")
    assert "; r.json\n" in told
    assert told.endswith("what it gets wrong: r-mistakes.html\n")
    _, rows = table(tmp_path / "r-predictions.csv")
    wanted = [f"{path.parent.name}/{path.name}" for path in sorted(photographs.glob("val/*/*"))]
    assert sorted(row[0] for row in rows) == sorted(wanted)
    assert all(row[0].split("/")[0] == row[1] for row in rows)
    page = (tmp_path / "r-mistakes.html").read_text()
    assert "<img src=x" not in page
    assert page.count("&lt;img src=x") > 1
    assert page.count("data:image/jpeg") == json.loads((tmp_path / "r.json").read_text())["wrong"]


def test_packed_images_have_the_names_that_they_had_as_files(photographs, tmp_path, monkeypatch):
    pytest.importorskip("litdata")
    monkeypatch.setenv("RESNET_TRAIN_DATA", str(tmp_path / "data"))
    out = tmp_path / "packed"
    pack.pack(root=str(photographs), out=out, shorter_side=64, quality=90, images=2, workers=0, broken="stop")
    both = [StreamingDataset(root=str(root), size=32, validation=1, workers=0) for root in (photographs, out)]
    for split in ("train", "val", "test"):
        files, packed = (dataset.names(split) for dataset in both)
        assert sorted(files) == sorted(packed)
        assert len(files) == both[0].sizes[split]
    assert both[1].names("test") == [both[1].parts["test"].read(n)[0].split(": ", 1)[1] for n in range(7)]


def test_a_held_out_part_has_the_names_of_its_images(tmp_path, monkeypatch):
    monkeypatch.setenv("RESNET_TRAIN_DATA", str(tmp_path / "data"))
    for part, count in (("train", 20), ("test", 2)):
        for number in range(count):
            folder = tmp_path / "tree" / part / f"class-{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number:02}.png")
    dataset = MemoryDataset(name="imagefolder", root=str(tmp_path / "tree"), size=8, validation=5)
    for split, count in (("train", 15), ("val", 5), ("test", 2)):
        names = dataset.names(split)
        assert len(names) == count
        for index, name in enumerate(names):
            assert name == f"class-{int(name[8:10]) % 2}/{name[8:]}"
            assert dataset.picture(split, index)[0, 0, 0] == int(name[8:10])


def test_a_thousand_classes(tmp_path, command_here, monkeypatch):
    monkeypatch.setenv("RESNET_TRAIN_DATA", str(tmp_path / "data"))
    classes = [f"class-{number:04}" for number in range(1000)]
    for name in classes:
        for part in ("train", "test"):
            (tmp_path / "tree" / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), (int(name[6:]) % 256, 9, 30)).save(tmp_path / "tree" / part / name / "a.png")
    saved(tmp_path / "net.pt", cifar_resnet(20, num_classes=1000), configured("cifar", 8), classes)
    words = ["net.pt", "data=imagefolder", "data.root=tree", "device=cpu", "details=true", "out=r.json"]
    command_here("evaluate", *words)
    _, rows = table(tmp_path / "r-confusion.csv")
    assert [row[0] for row in rows] == classes
    assert sum(int(row[2]) for row in rows) == 1000
    assert len(table(tmp_path / "r-classes.csv")[1]) == 1000
    page = (tmp_path / "r-mistakes.html").read_text()
    assert page.count("<tr>") <= 2 * (mistakes.FEW + 1)
    assert page.count('<div><img class="small"') == mistakes.MOST
    assert page.count("data:image/svg+xml") == 1
    assert len(page) < 1_000_000


def test_a_net_without_mistakes_has_a_page_too():
    result = {"protocol": "center crop", "batch_norm": "moving averages", "precision": "fp32"}
    result |= {"error": 0.0, "wrong": 0, "seen": 3, "split": "test"}
    page = mistakes.page("title", result, ["a.csv", "b.html"], ["cat", "dog", "none"], np.diag([2, 1, 0]), [])
    assert "There is no mistake." in page
    assert ">none</td>" in page


def test_a_folder_in_the_place_of_a_file_is_refused_before_anything_is_written(trained, tmp_path, command_here):
    (tmp_path / "r-mistakes.html").mkdir()
    told = command_here("evaluate", trained, "device=cpu", "details=true", "out=r.json", code=2)
    assert "out=r.json: details=true writes r-mistakes.html, which is a folder; use another name" in told
    assert os.listdir(tmp_path) == ["r-mistakes.html"]
    told = command_here("evaluate", trained, "device=cpu", "details=perhaps", code=2)
    assert "details=perhaps: " in told


def test_files_that_cannot_all_be_written_leave_those_that_were_there(trained, tmp_path, command_here):
    """The place where one of them is being written is taken."""
    words = [trained, "device=cpu", "details=true", "out=r.json"]
    command_here("evaluate", *words)
    before = {name: (tmp_path / f"r-{name}").read_bytes() for name in FILES}
    (tmp_path / f"r-classes.csv.{os.getpid()}.part").mkdir()
    told = command_here("evaluate", *words, "split=train", code=2)
    assert "cannot be written" in told
    (tmp_path / f"r-classes.csv.{os.getpid()}.part").rmdir()
    assert before == {name: (tmp_path / f"r-{name}").read_bytes() for name in FILES}
    assert sorted(os.listdir(tmp_path)) == sorted(["r.json", *(f"r-{name}" for name in FILES)])


def test_the_report_links_the_page(tmp_path, monkeypatch):
    pytest.importorskip("bokeh")
    from test_report import make, report_of

    folder = make(tmp_path / "runs" / 'a "run" #1')
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last-test-mistakes.html").write_text("page")
    make(tmp_path / "runs" / "other", seed=1)
    text = report_of(tmp_path / "runs", monkeypatch)
    page = (tmp_path / "runs" / "out" / "index.html").read_text()
    (link,) = re.findall(r'<a href="([^"]*)">resnet-20-A, seed 0: last-test</a>', page)
    assert link == "../a%20%22run%22%20%231/checkpoints/last-test-mistakes.html"
    assert f"- [resnet-20-A, seed 0: last-test]({link})" in text
    assert page.count("What they get wrong") == 1


@pytest.mark.parametrize("parts", [("train", "val"), ("train", "test"), ("",)])
def test_names_are_those_of_the_pictures_however_the_tree_is_divided(parts, tmp_path, monkeypatch):
    """With a part for the test under either name, or with class folders alone, of which a fifth is for the test."""
    monkeypatch.setenv("RESNET_TRAIN_DATA", str(tmp_path / "data"))
    for number in range(24):
        folder = tmp_path / "tree" / parts[number % len(parts)] / f"class-{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / f"{number:02}.png")
    dataset = MemoryDataset(name="imagefolder", root=str(tmp_path / "tree"), size=8, validation=0)
    for split in ("train", "test"):
        names = dataset.names(split)
        assert len(names) == dataset.sizes[split] > 0
        for index, name in enumerate(names):
            number = int(dataset.picture(split, index)[0, 0, 0])
            assert name == f"class-{number % 3}/{number:02}.png"
