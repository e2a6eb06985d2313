"""What several test files need: the command as a user types it, a small whole run, and the shared real data."""

import fcntl
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch

from resnet_train import cli
from resnet_train.config.compose import compose
from resnet_train.config.train import check_train

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a script has begun the tests with &
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data" / "unpack"
# Odd on purpose: 61 iterations of 37 images cut 1,300 in mid-epoch, and no interval divides another.
TINY = [
    "data=digits",
    "data.validation=137",
    "depth=8",
    "iterations=61",
    "batch_size=37",
    "log_every=5",
    "eval_every=12",
]
TINY += ["eval_batch_size=50", "checkpoint_every=7", "device=cpu", "warmup.depth=8", "warmup.error=85"]
TINY += ["warmup.iterations=15"]


# What takes longest begins first, so that the workers of `make test`, who take file after file, end together.
LONGEST = ("distributed", "detection", "weights", "report", "fuzz", "golden", "bench", "cli", "hostile", "responses")
LONGEST += ("localization_runs", "detection_masks", "detection_improved")


def pytest_collection_modifyitems(items):
    """The files of `LONGEST` first, all else as it was."""
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


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
        return forked.run(start(*arguments, entry=entry), cwd=tmp_path, capture_output=True, text=True, **options)

    return run


@pytest.fixture
def command_here(tmp_path, monkeypatch, capsys):
    """An entry point as it is typed, but in this process, which has torch: its output, or the one line of its error.

    For commands that leave nothing behind in a process. They run in `tmp_path`.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def run(entry, *arguments, code=0):
        monkeypatch.setattr(sys, "argv", [f"resnet-{entry}", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            getattr(cli, entry)()
        told = capsys.readouterr()
        assert (ended.value.code or 0) == code, told.err
        lines = told.err.splitlines(keepends=True)
        lines = [line for line in lines if not line.endswith(": starting\n") and not line.startswith("skipped: ")]
        if not code:
            assert lines == []
            return told.out
        (error,) = lines
        assert error.startswith("error: ")
        return error

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A checkpoint of a ResNet-8 after some steps on digits."""
    pytest.importorskip("sklearn")
    from resnet_train.classification.run import build
    from resnet_train.classification.step import step
    from resnet_train.data.views import BatchOrder
    from resnet_train.engine import checkpoint

    words = ["data=digits", "depth=8", "batch_size=32", "precision=fp32", "device=cpu"]
    config = check_train(compose("train", words))
    folder = tmp_path_factory.mktemp("trained")
    found = build(config)
    batches = found.dataset.train_batches(found.mean, found.device, BatchOrder(0, 32, config.augment))
    for images, labels in itertools.islice(batches, 20):
        step(found, images, labels, 0.05)
    checkpoint.save(folder / "last.pt", found.state())
    return folder / "last.pt"


def start(*arguments, entry="train"):
    """The command line of an entry point, for subprocess."""
    return [
        sys.executable,
        "-c",
        f"from resnet_train.cli import {entry}\nif __name__ == '__main__': {entry}()",
        *arguments,
    ]


def needs(name):
    """Skip the file that says so where a package is not installed; to import it is left to what takes it."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"needs {name}", allow_module_level=True)


def as_one_of(processes, folder, text, *arguments):
    """Run `text` in each of several processes that begin as a launcher's; all have to end well."""
    store = str(Path(folder) / "store")
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RESNET_TRAIN_STORE": store}
    group |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    words = [sys.executable, "-c", f"import sys; sys.path.append({str(ROOT / 'tests')!r}); {text}", *arguments]
    jobs = [
        forked.Popen(
            words,
            cwd=folder,
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    told = [job.communicate()[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * processes, told


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """For each process of a test and for this one: sums are rounded alike, and the cores are not fought over.

    For small batches a second thread costs more than it gives, most on a busy machine.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """A finished run."""

    def make(folder):
        done = subprocess.run(start(*TINY, "run_dir=run"), cwd=folder, capture_output=True, text=True)  # and no fork
        assert (done.returncode, done.stderr) == (0, "")

    return once(tmp_path_factory, "undisturbed", make) / "run"


def once(tmp_path_factory, name, make):
    """A folder that `make` fills, in one of pytest-xdist's workers for all of them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            part = folder.with_suffix(".part")
            part.mkdir()
            make(part)
            part.rename(folder)
    return folder


def entries(part):
    """The path and the label of each file of a part."""
    return [(Path(path), label) for path, _, label in map(part.entry, range(len(part)))]


def metrics(folder):
    """The metrics without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "images_per_second", "waited")} for line in lines]


def curves(folder):
    """TensorBoard's points: {(writer, tag): [(iteration, value), …]}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for writer in sorted(folder.glob("tensorboard/*")):
        events = EventAccumulator(str(writer), size_guidance={"scalars": 0})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            if tag not in ("images_per_second", "waited"):
                found[writer.name, tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found


def differences(folder, other):
    """In what two finished runs differ: files byte for byte, metrics and curves without what depends on the clock."""
    files = [f"checkpoints/{name}.pt" for name in ("last", "previous", "best")]
    found = [name for name in files if (folder / name).read_bytes() != (other / name).read_bytes()]
    found += ["metrics"] if metrics(folder) != metrics(other) else []
    return found + (["curves"] if curves(folder) != curves(other) else [])


def stamp(folder):
    """When the last checkpoint was written."""
    try:
        return (folder / "checkpoints" / "last.pt").stat().st_mtime_ns
    except FileNotFoundError:
        return 0
