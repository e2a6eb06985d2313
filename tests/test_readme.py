"""README's commands and its snippet run as they are printed, with words added that make them short."""

import glob
import json
import re
import shlex

import pytest
import torch
from conftest import ROOT
from PIL import Image

from resnet_train.data.cifar10 import CLASSES
from resnet_train.models import imagenet_resnet

TEXT = (ROOT / "README.md").read_text()
QUICKSTART = (ROOT / "docs/quickstart.md").read_text()
SHORT = "iterations=2 batch_size=4 eval_batch_size=5 log_every=1 eval_every=2 compile=false precision=fp32 device=cpu"
HERE = "data.root=tree device=cpu"
PHOTOS = "runs/photos/resnet-20-A/iterations-300+seed-0"
# What is added to each command: where the images lie that are not downloaded here, and a run of two iterations.
ADDED = {
    "resnet-train depth=110 data=cifar10": f"{SHORT} data.root=tree run_dir=runs/cifar10/resnet-110-A/seed-0",
    "resnet-eval checkpoint=runs/cifar10/resnet-110-A/seed-0/checkpoints/last.pt": "device=cpu",
    "resnet-report runs out=report": "",
    "resnet-eval checkpoint=results/cifar10/weights/resnet-56-A-seed-1.safetensors": f"{HERE} out=eval.json",
    "resnet-train data=imagefolder data.root=photos depth=20": SHORT,
    "resnet-train data=imagenet data.root=photos depth=18 init_from=resnet18.pth freeze=layer2 iterations=2000"
    " batch_size=64 schedule=cosine schedule.lr=0.01": f"{SHORT} data.workers=0 data.size=32"
    " augment.shorter_side=[32,40]",
    # docs/quickstart.md
    "resnet-train data=digits depth=20": f"{SHORT} run_dir=runs/digits/resnet-20-A/seed-0",
    "resnet-train data=imagefolder data.root=photos depth=20 iterations=300": f"{SHORT} run_dir={PHOTOS}",
    f"resnet-eval checkpoint={PHOTOS}/checkpoints/last.pt details=true": "device=cpu",
    f"resnet-classify photos/animals/001.jpg checkpoint={PHOTOS}/checkpoints/last.pt": "device=cpu",
    f"resnet-features photos/*/*.jpg checkpoint={PHOTOS}/checkpoints/last.pt out=features.npz": "device=cpu",
}


def draw(path, size):
    """A picture of noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = torch.randint(
        0, 256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(len(str(path)))
    )
    Image.fromarray(pixels.numpy()).save(path)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """What the reader has: images of CIFAR-10's classes and size, photographs, weights, a clone, and a picture."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESNET_TRAIN_DATA", str(tmp_path / "data"))
    for part in ("train", "test"):
        for number, name in enumerate(CLASSES):
            draw(tmp_path / f"tree/{part}/{name}/{number}.png", (32, 32))
    for number in range(14):
        draw(tmp_path / f"photos/{('cat', 'dog')[number % 2]}/{number}.jpg", (60, 50 + number))
    (tmp_path / "results").symlink_to(ROOT / "results")
    torch.save(imagenet_resnet(18).state_dict(), tmp_path / "resnet18.pth")
    draw(tmp_path / "cat.png", (32, 32))
    return tmp_path


def printed(text=TEXT):
    """The commands in the blocks of README, or of another page."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    lines = [line for kind, block in blocks if not kind for line in block.splitlines()]
    return [" ".join(shlex.split(line, comments=True)) for line in lines if line.startswith("resnet-")]


def test_every_command_is_known():
    assert list(dict.fromkeys(printed() + printed(QUICKSTART))) == list(ADDED)


@pytest.mark.long
def test_two_commands_of_the_readme_run_as_printed(place, command):
    pytest.importorskip("safetensors")
    run([line for line in printed() if "resnet-56-A" in line or "data=imagefolder" in line], command)
    assert json.loads((place / "eval.json").read_text())["net"] == "resnet-56-A"


@pytest.mark.long
def test_all_commands_of_the_readme_run_as_printed(place, command):
    pytest.importorskip("bokeh")
    pytest.importorskip("safetensors")
    run(printed(), command)
    assert (place / "report/index.html").is_file()
    runs = sorted(str(path.parent.relative_to(place)) for path in place.glob("runs/**/summary.json"))
    assert [run.split("/")[1:3] for run in runs] == [
        ["cifar10", "resnet-110-A"],
        ["photos", "resnet-18-B"],
        ["photos", "resnet-20-A"],
    ]


@pytest.mark.long
def test_all_commands_of_the_quickstart_run_as_printed(place, command):
    pytest.importorskip("bokeh")
    pytest.importorskip("sklearn")
    for number in range(1, 8):
        for name in ("animals", "things"):
            draw(place / f"photos/{name}/{number:03}.jpg", (48, 64))
    run(printed(QUICKSTART), command)
    assert (place / PHOTOS / "checkpoints/last-test-mistakes.html").is_file()
    assert "last-test-mistakes.html" in (place / "report/report.md").read_text()
    assert (place / "features.npz").is_file()


def run(lines, command):
    """Run these commands, one after another, with what `ADDED` adds to each; patterns of files as a shell has them."""
    for line in lines:
        name, *words = [found for word in shlex.split(line) for found in sorted(glob.glob(word)) or [word]]
        entry = {"eval": "evaluate"}.get(name.removeprefix("resnet-"), name.removeprefix("resnet-"))
        done = command(*words, *ADDED[line].split(), entry=entry, timeout=250)
        assert done.returncode == 0, (line, done.stderr)


def test_the_snippet_of_the_readme_runs_as_printed(place, capsys):
    pytest.importorskip("safetensors")
    (snippet,) = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() in CLASSES
