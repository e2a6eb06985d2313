"""Laying out the official ILSVRC2012 archives, on a small set of such."""

import csv
import hashlib
import importlib.util
import io
import json
import os
import signal
import tarfile

import numpy as np
import pytest
import torch
from conftest import ROOT, as_one_of, metrics
from test_sets import photograph

from resnet_train.classification.evaluate import count_errors
from resnet_train.data.streaming import StreamingDataset
from resnet_train.errors import UserError
from resnet_train.models import imagenet_resnet

savemat = pytest.importorskip("scipy.io", reason="needs scipy").savemat
spec = importlib.util.spec_from_file_location("imagenet_layout", ROOT / "scripts" / "imagenet.py")
imagenet = importlib.util.module_from_spec(spec)
spec.loader.exec_module(imagenet)

# As in the official table, ids do not follow the order of wnids, and the inner nodes of the hierarchy are no classes.
CLASSES = {1: "n02119789", 2: "n02100735", 3: "n01440764", 4: "n00001740"}
TRUTH = [3, 1, 1, 2, 3, 2, 1]


def add(archive, name, content, **values):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in values.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


def packed(members, mode="w"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        for name, content in members.items():
            add(archive, name, content)
    return file.getvalue()


def images_of(wnid, count=5):
    return {f"{wnid}_{n}.JPEG": f"{wnid} {n} ".encode() * 3000 for n in range(count)}


@pytest.fixture
def archives(tmp_path):
    """Three classes of five images, seven validation images; the folder and the checksums."""
    folder = tmp_path / "archives"
    folder.mkdir()
    table = np.array(
        [(number, wnid, 0 if number < 4 else 3) for number, wnid in CLASSES.items()],
        dtype=[("ILSVRC2012_ID", object), ("WNID", object), ("num_children", object)],
    )
    meta = io.BytesIO()
    savemat(meta, {"synsets": table})
    devkit = {
        "ILSVRC2012_devkit_t12/data/meta.mat": meta.getvalue(),
        "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": "\n".join(map(str, TRUTH)).encode(),
    }
    train = {f"{CLASSES[n]}.tar": packed(images_of(CLASSES[n])) for n in (2, 3, 1)}
    val = {f"ILSVRC2012_val_{n:08d}.JPEG": f"val {n}".encode() for n in range(1, 8)}
    (folder / imagenet.DEVKIT).write_bytes(packed(devkit, "w:gz"))
    (folder / imagenet.TRAIN).write_bytes(packed(train))
    (folder / imagenet.VAL).write_bytes(packed(val))
    return folder


def sums(folder):
    return {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in imagenet.MD5}


def complete(out):
    """Whether all is where it belongs, and nothing else is there."""
    expected = {f"train/{CLASSES[n]}/{name}": text for n in (1, 2, 3) for name, text in images_of(CLASSES[n]).items()}
    for number, label in enumerate(TRUTH, 1):
        expected[f"val/{CLASSES[label]}/ILSVRC2012_val_{number:08d}.JPEG"] = f"val {number}".encode()
    found = {path.relative_to(out).as_posix(): path for path in out.glob("[!.]*/**/*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items()} == expected


def test_the_archives_are_laid_out(archives, tmp_path):
    imagenet.layout(archives, tmp_path / "out", sums(archives))
    assert complete(tmp_path / "out")


def test_other_archives_are_refused_before_anything_is_laid_out(archives, tmp_path):
    for name in imagenet.MD5:
        with pytest.raises(UserError, match=f"{name}: is damaged or not the official"):
            imagenet.layout(archives, tmp_path / "out", sums(archives) | {name: "0" * 32})
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".done"]
    md5 = sums(archives)
    (archives / imagenet.VAL).unlink()
    with pytest.raises(UserError, match=f"{imagenet.VAL}: .*No such file"):
        imagenet.layout(archives, tmp_path / "out", md5)


@pytest.mark.parametrize("after", [1, 6, 11, 16, 20])
def test_a_killed_layout_goes_on(after, archives, tmp_path):
    """Killed within the so-many-th image that it writes; classes that are there are not written again."""
    out, md5 = tmp_path / "out", sums(archives)
    child = os.fork()
    if not child:
        real, count = imagenet.shutil.copyfileobj, [0]

        def copy(source, target, size):
            count[0] += 1
            if count[0] == after:
                target.write(source.read(2))
                target.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target, size)

        imagenet.shutil.copyfileobj = copy
        imagenet.layout(archives, out, md5)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not complete(out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("train/*/*")}
    assert len(before) == min((after - 1) // 5, 3) * 5
    imagenet.layout(archives, out, md5)
    assert complete(out)
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())


EVIL = {
    "up": {"name": "../../evil.JPEG"},
    "absolute": {"name": "/tmp/evil.JPEG"},
    "deep": {"name": "a/evil.JPEG"},
    "link": {"name": "evil.JPEG", "type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
    "hard link": {"name": "evil.JPEG", "type": tarfile.LNKTYPE, "linkname": "/etc/passwd"},
    "device": {"name": "evil.JPEG", "type": tarfile.CHRTYPE},
}


@pytest.mark.parametrize("member", EVIL.values(), ids=EVIL)
@pytest.mark.parametrize("where", ["train", "val", "class"])
def test_members_are_never_written_outside_their_folder(where, member, archives, tmp_path):
    """Not even where the checksum would hold."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        add(archive, member["name"], b"", **{key: value for key, value in member.items() if key != "name"})
    name = imagenet.VAL if where == "val" else imagenet.TRAIN
    text = packed({f"{CLASSES[1]}.tar": file.getvalue()}) if where == "class" else file.getvalue()
    (archives / name).write_bytes(text)
    before = sorted(tmp_path.parent.rglob("evil*"))
    with pytest.raises(UserError, match="which is no"):
        imagenet.layout(archives, tmp_path / "out", sums(archives))
    assert sorted(tmp_path.parent.rglob("evil*")) == before


@pytest.mark.parametrize("name", list(imagenet.MD5))
def test_an_archive_cut_short_is_one_line(name, archives, tmp_path):
    data = (archives / name).read_bytes()
    (archives / name).write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(UserError) as caught:
        imagenet.layout(archives, tmp_path / "out", sums(archives))
    assert str(archives) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_in_the_test_ends_the_workers_of_training(tmp_path, command):
    """Training's loader is still open then, and its worker ignores signals."""
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            photograph(tmp_path / "tree" / part / name / "0.JPEG", (40, 50), 0)
    (tmp_path / "tree/val/dog/0.JPEG").write_bytes(b"no image")
    words = ["data=imagenet", "depth=18", "data.root=tree", "data.size=32", "augment.shorter_side=[36,40]"]
    words += ["batch_size=2", "iterations=2", "eval_every=1", "data.workers=1", "device=cpu", "precision=fp32"]
    done = command(*words, "normalise=channels", "run_dir=run", timeout=100)
    assert done.returncode == 2
    assert "tree/val/dog/0.JPEG: is not an image" in done.stderr
    assert done.stderr.endswith("; remove it, or train with data.broken=skip, which leaves such out\n")


def test_the_closing_line_says_how_often_broken_images_were_replaced(tmp_path, command):
    for part, count in (("train", 3), ("val", 1)):
        for name in ("cat", "dog"):
            for index in range(count):
                photograph(tmp_path / "tree" / part / name / f"{index}.JPEG", (40, 50), index)
    (tmp_path / "tree/train/dog/0.JPEG").write_bytes(b"no image")
    words = ["data=imagenet", "depth=18", "data.root=tree", "data.size=32", "augment.shorter_side=[36,40]"]
    words += ["batch_size=4", "iterations=3", "data.workers=0", "device=cpu", "precision=fp32", "data.broken=skip"]
    done = command(*words, "normalise=channels", "run_dir=run", "log_every=2", timeout=100)
    assert done.returncode == 0, done.stderr
    counts = [line["skipped"] for line in metrics(tmp_path / "run") if line["split"] == "train"]
    assert (len(counts), sum(counts)) == (2, 2)  # two passes of six
    assert "at iteration 3, the last; broken training images were replaced by others 2 times\n" in done.stdout


@pytest.mark.long
def test_broken_images_are_left_out_of_an_evaluation(tmp_path, command, command_here):
    """In training, of its checkpoint, in one process and in two; names stay with their rows."""
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            for index in range(4):
                photograph(tmp_path / "tree" / part / name / f"{index}.JPEG", (40, 50), index)
    broken = {"train": ["cat/1.JPEG", "dog/3.JPEG"], "val": ["cat/0.JPEG", "dog/3.JPEG"]}
    for part, names in broken.items():
        for name in names:
            (tmp_path / "tree" / part / name).write_bytes(b"no image")
    words = ["data=imagenet", "depth=18", "data.root=tree", "data.size=32", "augment.shorter_side=[36,40]"]
    words += ["batch_size=4", "iterations=2", "data.workers=1", "device=cpu", "precision=fp32", "data.broken=skip"]
    words += ["normalise=channels", "run_dir=run", "eval_every=1", "eval_batch_size=3"]
    done = command(*words, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "the last; images left out because they cannot be decoded: 2;" in done.stdout
    assert all(done.stderr.count(f"tree/val/{name}: is not an image") == 1 for name in broken["val"])
    assert [line["seen"] for line in metrics(tmp_path / "run") if line["split"] == "test"] == [6, 6]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["unreadable"], summary["last"]["test"]["seen"]) == ({"test": 2}, 6)

    wanted = [f"{name}/{index}.JPEG" for name in ("cat", "dog") for index in range(4)]
    last = "run/checkpoints/last.pt"
    for split, part, protocol in (("train", "train", "tencrop"), ("test", "val", "center")):
        kept = [name for name in wanted if name not in broken[part]]
        words = ["device=cpu", f"split={split}", "details=true", f"protocol={protocol}", "out=r.json"]
        told = command_here("evaluate", last, *words)
        assert "; images left out because they cannot be decoded: 2; r.json\n" in told
        result = json.loads((tmp_path / "r.json").read_text())
        assert (result["seen"], result["unreadable"]) == (6, 2)
        with (tmp_path / "r-predictions.csv").open(newline="") as file:
            rows = [(row["image"], row["label"]) for row in csv.DictReader(file)]
        assert rows == [(name, name.split("/")[0]) for name in kept]
    given = [f"checkpoint={last}", "device=cpu"]
    told = command_here("features", *given, "data=same", "out=f.npz")
    assert told.endswith(" float32; images left out because they cannot be decoded: 2; f.npz\n")
    command_here("features", *given, *(f"tree/val/{name}" for name in kept), "out=g.npz")
    with np.load(tmp_path / "f.npz") as found, np.load(tmp_path / "g.npz") as intact:
        assert found["images"].tolist() == kept
        assert [found["classes"][label] for label in found["labels"]] == [name.split("/")[0] for name in kept]
        np.testing.assert_allclose(found["features"], intact["features"], rtol=1e-4, atol=1e-6)
    two = ["device=cpu", "details=true", "out=two.json"]
    as_one_of(2, tmp_path, "from resnet_train.cli import evaluate; evaluate()", last, *two)
    assert json.loads((tmp_path / "two.json").read_text()) == result
    assert (tmp_path / "two-predictions.csv").read_text() == (tmp_path / "r-predictions.csv").read_text()


def test_an_evaluation_without_any_image_that_can_be_decoded_stops(tmp_path):
    for part in ("train", "val"):
        for name in ("cat", "dog"):
            photograph(tmp_path / "tree" / part / name / "0.JPEG", (40, 50), 0)
            if part == "val":
                (tmp_path / "tree/val" / name / "0.JPEG").write_bytes(b"no image")
    dataset = StreamingDataset(root=str(tmp_path / "tree"), size=32, validation=0, workers=0, broken="skip")
    batches = dataset.eval_batches("test", dataset.mean_image(), torch.device("cpu"), 3)
    with pytest.raises(UserError, match="none of the 2 images can be decoded"):
        count_errors(imagenet_resnet(18, num_classes=2), batches, "fp32", 2, skip=True)
