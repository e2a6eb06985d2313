"""Pictures of curves: whatever a data set or a display is called."""

import os
import subprocess
import sys

import pytest

from resnet_train.report import curves

POINTS = [{"iteration": n, "split": split, "error": 90.0 / n} for n in (1, 2) for split in ("train", "test")]


@pytest.mark.parametrize("name", ["a$_$b", "$\\frac{$", "\u4f60\u597d", "a\nb", "\udcff\x1b[31m", "%s{}"])
def test_a_name_is_text_and_no_mathematics(name, tmp_path):
    curves.draw({"resnet-8": POINTS}, f"resnet-8 on {name}", tmp_path / "curves.png", ("table 6", 5.0))
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_no_display_of_the_users_has_a_say(tmp_path):
    code = f"from resnet_train.report.curves import *; draw({{'a': {POINTS}}}, 'a', Path({str(tmp_path / 'a.png')!r}))"
    environment = os.environ | {"MPLBACKEND": "Qt4Agg"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "a.png").exists()
