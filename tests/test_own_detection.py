"""A folder as docs/detection.md has it, made here, and the two commands that it prints for it."""

import json
import re
import shlex

import pytest
from conftest import ROOT, needs
from test_detection import make_tree

needs("faster_coco_eval")
ADDED = {"resnet-detect data=voc": "iterations=2 data.workers=0 device=cpu", "resnet-detect predict": "device=cpu"}


@pytest.mark.long
def test_the_commands_for_ones_own_pictures_run_as_printed(tmp_path, command):
    """At a length of two iterations."""
    section = (ROOT / "docs/detection.md").read_text().split("## Your own pictures")[1].split("\n## ")[0]
    lines = [line for block in re.findall(r"^```\n(.*?)^```", section, re.M | re.S) for line in block.splitlines()]
    for file in [line.split()[0] for line in lines if line.startswith("photos/")]:
        assert (make_tree_once(tmp_path / "photos") / file.removeprefix("photos/")).is_file(), file
    printed = [line for line in lines if line.startswith("resnet-detect")]
    assert len(printed) == 2
    for line, added in zip(printed, ADDED.values(), strict=True):
        keys = {word.split("=")[0] for word in added.split()}
        kept = [word for word in shlex.split(line)[1:] if word.split("=")[0] not in keys]
        done = command(*kept, *added.split(), entry="detect", timeout=250)
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/summary.json").read_text())["images"] == {"train": 9, "test": 5}
    assert (tmp_path / "found/001.png").is_file()


def make_tree_once(folder):
    """The pictures and boxes of the other tests, under the names of the docs."""
    return folder if folder.exists() else make_tree(folder)
