"""What docs/python.md and docs/evaluation.md show runs as it is printed."""

import os
import re
import shlex

import pytest
import torch
from conftest import ROOT
from PIL import Image

ENTRIES = {"resnet-features": "features", "resnet-eval": "evaluate"}


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """A folder with what the pages name: a checkpoint, two pictures, a folder of photographs, and a clone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "last.pt").write_bytes(trained.read_bytes())
    (tmp_path / "resnet-train").symlink_to(ROOT)
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    pixels = torch.randint(0, 256, (40, 60, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for name in ("cat.jpg", "dog.png", "photos/cats/1.jpg"):
        Image.fromarray(pixels.numpy()).save(tmp_path / name)
    return tmp_path


def blocks(page):
    """(kind, text) of each block of code."""
    return re.findall(r"```(\w*)\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)


@pytest.mark.parametrize(("page", "commands", "snippets"), [("python.md", 3, 5), ("evaluation.md", 2, 0)])
def test_commands_and_snippets_run_as_printed(page, commands, snippets, place, command_here, capsys):
    pytest.importorskip("safetensors")
    found, done = blocks(page), []
    lines = [line for kind, text in found if not kind for line in text.splitlines()]
    for line in lines:
        name, *words = shlex.split(line, comments=True)
        command_here(ENTRIES[name], *words)
    for kind, text in found:
        if kind == "python":
            names = {}
            exec(compile(text, page, "exec"), names)
            done.append(names)
    assert (len(lines), len(done)) == (commands, snippets)
    if page == "python.md":
        assert done[0]["photos"].fc.out_features == 3
        assert done[1]["logits"].shape == (2, 10)
        assert done[2]["image"].shape == (3, 32, 32)
        assert done[4]["features"].shape == (1437, 64)
        assert len(done[4]["classes"]) == 10
    else:
        written = set(re.findall(r"`(result[-.\w]+)`", (ROOT / "docs" / page).read_text()))
        assert len(written) == 5
        assert written <= set(os.listdir(place))
