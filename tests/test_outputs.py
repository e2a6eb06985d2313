"""What lies at `out`: an earlier result of the same command is replaced, anything else is refused and stays."""

import json
import os

import pytest

from resnet_train.config.paths import check_folder, check_out
from resnet_train.errors import UserError
from resnet_train.files import check_replaceable

FILES = [
    ("evaluate", "last.pt data=digits", "photo.jpg"),
    ("evaluate", "last.pt data=digits", "notes.md"),
    ("evaluate", "last.pt", "bench.json"),
    ("classify", "photo.jpg checkpoint=last.pt", "notes.md"),
    ("features", "photo.jpg checkpoint=last.pt", "other.npz"),
    ("features", "photo.jpg checkpoint=last.pt", "other.safetensors"),
    ("weights", "export last.pt format=torchvision", "notes.md"),
    ("weights", "export last.pt", "other.pth"),
    ("weights", "export last.pt", "other.onnx"),
    ("weights", "export last.pt", "other.safetensors"),
    ("weights", "export last.pt", "beside.safetensors"),  # with a .json of another's
    ("weights", "import other.pth", "last.pt"),  # trained, and not imported
    ("detect", "test last.pt", "notes.md"),
    ("localize", "test last.pt", "notes.md"),
    ("bench", "loop data=digits", "notes.md"),
    ("bench", "loop data=digits", "pipe"),  # as /dev/null, which a rename would replace
    ("report", "run", "folder"),
    ("responses", "last.pt", "folder"),
    ("detect", "predict photo.jpg checkpoint=last.pt", "folder"),
]
EXAMPLE = {"net": "a", "split": "test", "protocol": "b", "wrong": 1, "seen": 2, "checkpoint": "c", "images": []}


@pytest.fixture
def there(trained, tmp_path, monkeypatch):
    """A folder with files of other kinds, among them some that speak of a result."""
    import numpy as np
    import torch
    from safetensors.numpy import save_file

    monkeypatch.chdir(tmp_path)
    os.link(trained, tmp_path / "last.pt")
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "notes.md").write_text(f"```\n{json.dumps(EXAMPLE)}\n```\n")
    (tmp_path / "bench.json").write_text('{"bench": "loop", "rows": [], "machine": {}}')
    np.savez(tmp_path / "other.npz", features=np.zeros(2))
    save_file({"features": np.zeros(2)}, tmp_path / "other.safetensors", metadata={"layer": "fc"})
    torch.save({"conv1.weight": torch.zeros(2), "imported.weight": torch.zeros(2)}, tmp_path / "other.pth")
    (tmp_path / "other.onnx").write_bytes(b"\x08\x08")
    (tmp_path / "beside.safetensors.json").write_text("{}")
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "folder" / "figure-7.png").write_bytes(b"mine")
    return tmp_path


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("entry", "words", "out"), FILES, ids=[f"{e}-{o}" for e, _, o in FILES])
def test_another_file_or_folder_is_refused_and_stays(entry, words, out, there, command_here):
    before = contents(there)
    told = command_here(entry, *words.split(), f"out={out}", code=2)
    named = f"{out}.json" if out.startswith("beside") else out
    assert told == f"error: out={named}: exists and is no earlier result of this command; use another name\n"
    assert contents(there) == before


@pytest.mark.long
def test_an_earlier_result_is_replaced(there, command_here):
    """By the same command, whatever it writes, and by no other one."""
    from PIL import Image

    Image.new("RGB", (32, 32)).save(there / "black.png")
    commands = [
        ("evaluate", "last.pt device=cpu details=true out=e.json"),
        ("classify", "black.png checkpoint=last.pt device=cpu out=c.json"),
        *(("features", f"black.png checkpoint=last.pt device=cpu out=f{end}") for end in (".npz", ".safetensors")),
        *(("weights", f"export last.pt out=w{end}") for end in (".pth", ".safetensors")),
        ("weights", "import w.safetensors out=i.pt data=digits"),
        ("responses", "last.pt device=cpu images=10 out=r"),
        ("report", "complexity out=table"),
    ]
    for entry, words in commands * 2:
        command_here(entry, *words.split())
    (there / "e-predictions.csv").write_text("mine")
    told = command_here("evaluate", *commands[0][1].split(), code=2)
    assert told.startswith("error: out=e-predictions.csv: exists and is no earlier result")
    assert (there / "e-predictions.csv").read_text() == "mine"
    (there / "detections.json").write_text('{"checkpoint": "a", "net": "b", "score": 0.5, "images": []}')
    for out in ("c.json", "detections.json"):
        told = command_here("evaluate", "last.pt", "device=cpu", f"out={out}", code=2)
        assert told.startswith(f"error: out={out}: exists and is no earlier result")
    told = command_here("classify", "black.png", "checkpoint=last.pt", "out=detections.json", code=2)
    assert told.startswith("error: out=detections.json: exists and is no earlier result")


def test_an_empty_folder_and_no_file_are_written(tmp_path):
    (tmp_path / "empty").mkdir()
    check_folder(str(tmp_path / "empty"), "report.md", ["resnet-report"])
    check_out(str(tmp_path / "absent.json"), ["net"])
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(UserError, match="exists and is no earlier result"):
        check_replaceable(tmp_path / "link", ["net"])
