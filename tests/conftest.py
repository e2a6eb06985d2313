"""What several test files need: the command as a user types it, and the shared real data."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data" / "unpack"


@pytest.fixture(scope="session")
def real_data():
    """The folder of a shared real data set by its name; skips where there is no ../shared."""

    def unpack(name):
        if not SHARED.exists():
            pytest.skip(f"{name}: there is no {SHARED}")
        return Path(subprocess.run([SHARED, name], check=True, capture_output=True, text=True).stdout.strip())

    return unpack


@pytest.fixture
def command(tmp_path):
    """Run `resnet-train` (or another entry point) in an empty folder: stdout, stderr and exit code."""

    def run(*arguments, entry="train", **options):
        return subprocess.run(start(*arguments, entry=entry), cwd=tmp_path, capture_output=True, text=True, **options)

    return run


def start(*arguments, entry="train"):
    """The command line of an entry point, for subprocess."""
    return [
        sys.executable,
        "-c",
        f"from resnet_train.cli import {entry}\nif __name__ == '__main__': {entry}()",
        *arguments,
    ]


@pytest.fixture(scope="session", autouse=True)
def _few_threads():
    """One thread for each process of a test: sums are rounded alike everywhere, and the cores are not fought over."""
    os.environ["OMP_NUM_THREADS"] = "1"
