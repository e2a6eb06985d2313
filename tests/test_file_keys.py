"""The line of an error about a file that a key names begins with that key, whatever command it is."""

import sys

import pytest
import torch
from conftest import needs
from test_detection import make_tree

from resnet_train import cli
from resnet_train.engine import checkpoint
from resnet_train.errors import RunError, UserError, name_keys

needs("faster_coco_eval")
NET = "is a checkpoint of resnet-train, not of resnet-detect"
COMMANDS = [
    "evaluate",
    "features photo.png out=f.npz",
    "classify photo.png",
    "responses",
    "detect predict photo.png out=found",
    "detect test",
    "localize test",
]


@pytest.fixture
def files(tmp_path):
    """A file in torch's format that is no checkpoint, and a picture."""
    from PIL import Image

    torch.save([1], tmp_path / "odd.pt")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    return tmp_path


@pytest.mark.parametrize("words", COMMANDS)
def test_a_file_that_is_no_checkpoint_is_told_with_its_key(words, files, command_here):
    told = command_here(*words.split(), "checkpoint=odd.pt", "device=cpu", code=2)
    assert told.startswith("error: checkpoint=odd.pt: is not a checkpoint of resnet-train"), told


def test_so_is_a_file_of_weights(files, command_here):
    (files / "w.pth").write_bytes(b"no weights")
    told = command_here("weights", "import", "./w.pth", "out=w.pt", code=2)
    assert told.startswith("error: file=./w.pth: "), told


def test_a_checkpoint_of_another_command_or_with_other_parts_is_told_with_its_key(files, trained, command_here):
    words = ["detect", "predict", "photo.png", f"checkpoint={trained}", "device=cpu"]
    assert command_here(*words, code=2).startswith(f"error: checkpoint={trained}: {NET}")
    state = torch.load(trained, weights_only=True)
    state["model"].pop(next(iter(state["model"])))
    checkpoint.save(files / "less.pt", state)
    told = command_here("evaluate", "less.pt", "device=cpu", code=2)
    assert told.startswith("error: checkpoint=less.pt: does not match this network")


def test_only_what_begins_with_the_path_is_changed_and_an_error_stays_of_its_kind():
    class Config:
        init_from = "/tmp/x.pt"

        rpn = "./d//e.pt"
        rcnn = "two.pt"

    Config.checkpoint = ["a.pt", "b: c.pt", "two.pt"]
    for before, after in [
        ("b: c.pt: is damaged", "checkpoint=b: c.pt: is damaged"),
        ("/tmp/x.pt: is damaged", "init_from=/tmp/x.pt: is damaged"),
        ("init_from=/tmp/x.pt: is damaged", "init_from=/tmp/x.pt: is damaged"),
        ("/tmp/x.pt.part: is damaged", "/tmp/x.pt.part: is damaged"),
        ("d/e.pt: is damaged", "rpn=./d//e.pt: is damaged"),
        ("two.pt: is damaged", "two.pt: is damaged"),  # which of them is wrong is not known
    ]:
        for kind in (UserError, RunError):
            with pytest.raises(kind) as told, name_keys(Config):
                raise kind(before)
            assert str(told.value) == after
            assert type(told.value) is kind


@pytest.mark.parametrize(
    "words", [["data.root=tree", "data.train=[train]", "data.test=test"], ["test", "checkpoint=odd.pt"]]
)
def test_a_missing_package_is_told_before_anything_starts(words, files, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.chdir(files)
    make_tree(files / "tree", images=1, tested=1)
    with pytest.raises(SystemExit, match=r"^2$"):
        cli.main(cli.COMMANDS["detect"], cli.COMMANDS["test"], words=words)
    told = "error: resnet-detect needs faster-coco-eval: pip install 'resnet-train[detection]'\n"
    assert capsys.readouterr().err == told
