"""Full disks, damaged and hostile files, strangers on the port and losses that are not finite: done to real commands.

Each costs one line and nothing else: what is on disk is whole, and the same command resumes to the same weights.
"""

import contextlib
import functools
import io
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from conftest import metrics, needs, start
from PIL import Image
from test_sets import photograph

from resnet_train.config.layout import CIFAR_FOLDER
from resnet_train.data.cifar10 import TEST_FILES, TRAIN_FILES
from resnet_train.detection import coco, voc
from resnet_train.engine import checkpoint
from resnet_train.engine.loop import check_finite
from resnet_train.engine.resume import load_newest
from resnet_train.errors import RunError, UserError
from resnet_train.report.report import _measured
from resnet_train.report.values import metrics_in
from resnet_train.weights import command
from resnet_train.weights.source import read_description

needs("sklearn")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RUN = [
    "data=digits",
    "depth=8",
    "iterations=61",
    "batch_size=36",
    "log_every=20",
    "eval_every=30",
    "eval_batch_size=120",
]
RUN += ["eval_batch_size=120", "checkpoint_every=7", "device=cpu", "precision=fp32"]
DATA, ONE_CLASS = SimpleNamespace(root=None), SimpleNamespace(count=1)  # as an import without data has them


def train(folder, *words, entry="train", **environment):
    """A command in `folder`, ended: returncode, stdout, stderr."""
    options = {"cwd": folder, "env": os.environ | environment, "capture_output": True, "text": True}
    return forked.run(start(*words, entry=entry), **options)


def error(done, code):
    """The one line of a command that ended with `code`, beside that which says that it starts."""
    assert done.returncode == code, done.stderr
    told = done.stderr.removeprefix("resnet-eval: starting\n")
    assert told.count("\n") == 1, told
    assert told.startswith("error: ")
    return told


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of an undisturbed run in one process or in two."""

    @functools.cache
    def run(devices):
        folder = tmp_path_factory.mktemp(f"devices-{devices}")
        done = train(folder, *RUN, f"devices={devices}", "run_dir=run")
        assert (done.returncode, done.stderr) == (0, "")
        return folder / "run"

    return run


def unfinished(run, folder):
    """A copy of a run in which only the summary is missing: its last.pt is of iteration 61, its previous.pt of 56."""
    shutil.copytree(run, folder / "run")
    (folder / "run/summary.json").unlink()
    return folder / "run"


def ended_alike(run, other):
    """Whether two runs have the same weights and the same metrics, but for what depends on the clock."""
    weights, others = (checkpoint.load(folder / "checkpoints/last.pt")["model"] for folder in (run, other))
    same = weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
    return same and metrics(run) == metrics(other) and (run / "summary.json").exists()


# --- A disk that fills -----------------------------------------------------------------------------------------------


@pytest.fixture
def disk():
    """Mount a file system of a given size on a folder, or give one that is mounted there another size."""
    mounted = []

    def mount(folder, size):
        if os.geteuid() != 0 or not shutil.which("mount"):
            pytest.skip("only root can mount a small disk")
        how = f"remount,size={size}" if folder in mounted else f"size={size}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in set(mounted):
        subprocess.run(["umount", folder], check=True)


@pytest.mark.long
@pytest.mark.parametrize("devices", [1, 2])
def test_a_disk_that_fills_while_a_checkpoint_is_written_loses_nothing(devices, finished, disk, tmp_path):
    """Every iteration's is kept until there is no room: more than 20 of 0.6 MB, fewer than 30."""
    run = disk(tmp_path, "15m") / "run"
    words = [*RUN, f"devices={devices}", f"run_dir={run}", "checkpoint_every=1", "keep_every=1"]
    assert "the checkpoint cannot be written" in error(train("/", *words), 1)
    assert not list(run.glob("checkpoints/*.part"))
    loaded = {path.name: checkpoint.load(path)["iteration"] for path in run.glob("checkpoints/*.pt")}
    assert 15 < loaded["last.pt"] < 30
    assert loaded["previous.pt"] == loaded["last.pt"] - 1
    assert all(loaded[f"iteration-{number:07d}.pt"] == number for number in range(1, loaded["last.pt"] + 1))
    if devices == 1:
        assert "MB are free there" in error(train("/", *words), 1)
    disk(tmp_path, "100m")
    done = train("/", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"resuming from iteration {loaded['last.pt']}\n" in done.stdout
    assert ended_alike(run, finished(devices))


@pytest.mark.long
def test_a_disk_that_fills_between_checkpoints_ends_two_processes(disk, tmp_path):
    """The first process alone meets it, in a line of metrics or an event of TensorBoard's."""
    run = disk(tmp_path, "30m") / "run"
    words = [*RUN, "devices=2", f"run_dir={run}", "checkpoint_every=25", "log_every=1"]
    with subprocess.Popen(
        start(*words), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as job:
        while not (run / "checkpoints/last.pt").exists():
            assert job.poll() is None
            time.sleep(0.001)
        os.killpg(job.pid, signal.SIGSTOP)
        with (tmp_path / "filler").open("wb", buffering=0) as filler:
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        filler.write(bytes(size))
        os.killpg(job.pid, signal.SIGCONT)
        told = job.communicate()[1]
    assert "cannot be written (No space left on device)" in error(
        subprocess.CompletedProcess(job.args, job.returncode, stderr=told), 1
    )
    assert checkpoint.load(run / "checkpoints/last.pt")["iteration"] == 25


def test_a_disk_that_is_full_for_tensorboard_is_told_without_its_trace(finished, disk, tmp_path):
    run = unfinished(finished(1), tmp_path)
    (run / "checkpoints/last.pt").unlink()
    (disk(run / "tensorboard", "8k") / "filler").write_bytes(bytes(8192))
    message = error(train(tmp_path, *RUN, "devices=1", "run_dir=run"), 1)
    assert message.startswith(
        "error: run: the record cannot be written (No space left on device); once there is space, "
    )
    assert load_newest(run / "checkpoints")[1]["iteration"] == 56


def test_workers_without_room_to_hand_over_images_are_one_line(tmp_path):
    """Of 64 kB of shared memory a batch of 30 images of 64 px takes more than there is."""
    small = (
        "import ctypes, subprocess, sys; own = ctypes.CDLL(None).unshare(0x20000) == 0;"  # CLONE_NEWNS
        " own and subprocess.run('mount --make-rprivate / && mount -t tmpfs -o size=64k tmpfs /dev/shm', shell=True)"
        ".returncode == 0 or sys.exit(77); "
    )
    for part, images in (("train", 20), ("val", 1)):
        for name in ("cat", "dog"):
            for number in range(images):
                photograph(tmp_path / "photos" / part / name / f"{number}.jpg", (80, 90), number)
    words = ["data=imagenet", "data.root=photos", "data.size=64", "data.workers=1", "depth=18", "batch_size=30"]
    words += ["iterations=2", "device=cpu", "compile=false", "run_dir=run"]
    line = start(*words)
    line[2] = small + line[2]
    done = forked.run(line, cwd=tmp_path, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("only root can make /dev/shm small, for one process")
    assert error(done, 1).startswith("error: /dev/shm, the memory that processes share, is full; make it larger ")


# --- Checkpoints that are damaged ------------------------------------------------------------------------------------


def flip(path):
    """One bit in the middle of the largest tensor."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    content[largest.header_offset + largest.file_size // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("devices", "damage", "reason"),
    [(1, flip, "is damaged"), pytest.param(2, cut, "is cut short", marks=pytest.mark.long)],
)
def test_of_a_damaged_checkpoint_the_one_before_is_taken(devices, damage, reason, finished, tmp_path):
    run = unfinished(finished(devices), tmp_path)
    damage(run / "checkpoints/last.pt")
    done = train(tmp_path, *RUN, f"devices={devices}", "run_dir=run")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("warning: ") == 1
    assert f"warning: run/checkpoints/last.pt: {reason}" in done.stdout
    assert "; resuming from previous.pt (iteration 56)\n" in done.stdout
    assert ended_alike(run, finished(devices))
    last, undisturbed = (folder / "checkpoints/last.pt" for folder in (run, finished(devices)))
    assert last.read_bytes() == undisturbed.read_bytes()


def test_where_both_checkpoints_are_damaged_the_run_is_left_as_it_is(finished, tmp_path):
    run = unfinished(finished(1), tmp_path)
    flip(run / "checkpoints/last.pt")
    cut(run / "checkpoints/previous.pt")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    message = error(train(tmp_path, *RUN, "devices=1", "run_dir=run"), 2)
    assert all(name in message for name in ("last.pt: is damaged", "previous.pt: is cut short", "resume=never"))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_any_flipped_bit_of_a_checkpoint_is_noticed_or_changes_nothing(finished, tmp_path):
    """Those of the directory at the file's end as well: for one, torch would read a tensor from memory as it is."""
    path = tmp_path / "small.pt"
    state = checkpoint.load(finished(1) / "checkpoints/last.pt")
    names = [name for name in state["model"] if "bias" in name]
    checkpoint.save(path, state | {"model": {name: state["model"][name] for name in names}, "optimizer": {}})
    content, whole = path.read_bytes(), checkpoint.load(path)
    directory = range(content.index(b"PK\1\2"), len(content))
    places = [*random.Random(0).sample(range(len(content)), 300), *random.Random(1).sample(directory, 300)]
    bits = [(place, random.Random(place).randrange(8)) for place in places]
    entry = directory.start
    while (entry := content.find(b"PK\1\2", entry + 1)) >= 0:
        bits.append((entry + 38, 4))  # a member's mark of being a folder
    noticed = 0
    for place, bit in bits:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        try:
            assert equal(checkpoint.load(path), whole), (place, bit)
        except UserError:
            noticed += 1
    assert noticed > 400


def equal(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


# --- Checkpoints and archives that mean harm -------------------------------------------------------------------------


class Harm:
    """A pickle that makes a file when it is read without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_hostile_checkpoint_is_refused_wherever_it_comes_from_and_does_not_run(finished, tmp_path):
    run, mark = unfinished(finished(1), tmp_path), tmp_path / "mark"
    state = checkpoint.load(finished(1) / "checkpoints/last.pt")
    torch.save(state | {"extra": Harm(mark)}, tmp_path / "hostile.pt")
    shutil.copy(tmp_path / "hostile.pt", run / "checkpoints/last.pt")
    (run / "checkpoints/previous.pt").unlink()
    for done, name in (
        (train(tmp_path, "checkpoint=hostile.pt", entry="evaluate"), "checkpoint=hostile.pt"),
        (train(tmp_path, *RUN, "run_dir=new", "resume=hostile.pt"), "resume=hostile.pt"),
        (train(tmp_path, *RUN, "run_dir=run"), "run/checkpoints/last.pt"),
    ):
        assert f"error: {name}: is refused: it holds more than tensors and plain values" in error(done, 2)
    assert not mark.exists()
    assert not (tmp_path / "new").exists()
    torch.load(tmp_path / "hostile.pt", weights_only=False)
    assert mark.exists()  # it does bite


def test_a_checkpoint_of_another_net_is_refused_before_it_replaces_one_that_fits(finished, tmp_path):
    run = unfinished(finished(1), tmp_path)
    before = (run / "checkpoints/last.pt").read_bytes()
    state = checkpoint.load(run / "checkpoints/previous.pt")
    name = next(iter(state["model"]))
    checkpoint.save(tmp_path / "other.pt", state | {"model": state["model"] | {name: torch.zeros(3)}})
    done = train(tmp_path, *RUN, "run_dir=run", "resume=other.pt")
    assert "does not match this network" in error(done, 2)
    assert (run / "checkpoints/last.pt").read_bytes() == before


def member(name, content=b"harm", **fields):
    entry = tarfile.TarInfo(name)
    for key, value in fields.items():
        setattr(entry, key, value)
    entry.size = 0 if fields else len(content)
    return entry, io.BytesIO(content)


def test_a_hostile_archive_writes_nothing(tmp_path):
    """Names that lead outside, links, and files written through them; then batches that are links and devices."""
    (tmp_path / "target").mkdir()
    batches = [f"{CIFAR_FOLDER}/{name}" for name in (*TRAIN_FILES, *TEST_FILES)]
    through = member(f"{CIFAR_FOLDER}/out", type=tarfile.SYMTYPE, linkname=str(tmp_path / "target"))
    names = ["../outside", str(tmp_path / "absolute"), f"{CIFAR_FOLDER}/out/through", f"{CIFAR_FOLDER}/../../up"]
    links = [
        member(batches[0], type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member(batches[1], type=tarfile.LNKTYPE, linkname=str(tmp_path / "secret")),
        member(batches[2], type=tarfile.CHRTYPE, devmajor=1, devminor=5),
        member(batches[3], type=tarfile.FIFOTYPE),
    ]
    (tmp_path / "secret").write_text("secret")
    archives = {"paths": [through, *map(member, names), *map(member, batches)], "links": [through, *links]}
    for name, entries in archives.items():
        with tarfile.open(tmp_path / name, "w:gz") as archive:
            for entry, content in entries:
                archive.addfile(entry, content)
    before = sorted(tmp_path.rglob("*"))
    for name in archives:
        done = train(tmp_path, "data=cifar10", f"data.root={name}", "device=cpu", RESNET_TRAIN_DATA=str(tmp_path / "c"))
        assert error(done, 2).startswith(f"error: data.root={tmp_path / name}: ")
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("metrics.jsonl", lambda path: metrics_in(path.parent)),
        ("instances_train2014.json", lambda path: coco._json(path, False)),
        ("train.txt", voc._lines),
        ("classes.txt", lambda path: command._classes(SimpleNamespace(data=DATA, classes=str(path)), ONE_CLASS)),
        ("responses.csv", lambda path: _measured([path.parent], path.name, "std")),
        ("net.pt.json", lambda path: read_description(path.with_name("net.pt"))),
    ],
)
def test_a_text_file_larger_than_the_memory_is_not_read(name, read, tmp_path):
    path = tmp_path / name
    path.touch()
    os.truncate(path, 2**40)
    (tmp_path / "net.pt").touch()
    with pytest.raises(UserError, match=rf"{name}: .*larger than [\d,]+ bytes"):
        read(path)


def test_names_do_not_command_the_terminal(tmp_path):
    """Of a folder of data, its classes, a run's directory and a result: all that is printed is escaped."""
    root, pixels = tmp_path / "data\x1b[2J", torch.zeros(9, 9, 3, dtype=torch.uint8).numpy()
    for part, name, number in itertools.product(("train", "test"), ("cat\x1b[31m", "dog\u202e"), range(4)):
        (root / part / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels + number).save(root / part / name / f"{number}.png")
    words = [
        "data=imagefolder",
        f'data.root="{root}"',
        'run_dir="run\x1b[1m"',
        "depth=8",
        "iterations=2",
        "batch_size=4",
    ]
    options = ["device=cpu", "precision=fp32", "compile=false", "log_every=1"]
    cache = {"RESNET_TRAIN_DATA": str(tmp_path / "cache")}
    shown = [train(tmp_path, *words, *options, **cache)]
    last = 'checkpoint="run\x1b[1m/checkpoints/last.pt"'
    shown += [train(tmp_path, last, "device=cpu", 'out="found\x1b[2J.json"', entry="evaluate", **cache)]
    for done in shown:
        assert done.returncode == 0, done.stderr
        assert r"data\x1b[2J" in done.stdout
        assert done.stdout.replace("\n", "").isprintable(), ascii(done.stdout)
    assert r"run\x1b[1m" in shown[0].stdout
    assert r"found\x1b[2J.json" in shown[1].stdout
    assert (tmp_path / "found\x1b[2J.json").exists()


# --- Processes that do not meet --------------------------------------------------------------------------------------


def test_processes_that_do_not_meet_end_with_what_to_do(tmp_path):
    """A port that is taken, a first process to which nobody comes, others where nobody listens, or a stranger.

    A machine that does not come at all is torchrun's to tell, before it starts any process of ours: with
    --rdzv-backend=c10d a RendezvousTimeoutError after the ten minutes of --rdzv-conf=join_timeout=600.
    """
    with socket.create_server(("localhost", 0)) as stranger, socket.socket() as silent:
        silent.bind(("localhost", 0))  # and does not listen
        taken, silence = stranger.getsockname()[1], silent.getsockname()[1]
        cases = {
            "taken": (0, taken, 60, f"error: MASTER_PORT={taken}: the port is taken; choose another "),
            "nobody": (0, 0, 2, "error: 2 processes did not meet at localhost:0 within timeout=2 s "),  # 0: any port
            "silence": (1, silence, 2, f"rank 1: 2 processes did not meet at localhost:{silence} within timeout=2 s "),
            "stranger": (1, taken, 2, f"2 processes did not meet at localhost:{taken} within timeout=2 s "),
        }
        jobs = {}
        for name, (rank, port, timeout, _) in cases.items():
            group = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            jobs[name] = forked.Popen(
                start(*RUN, f"timeout={timeout}", "run_dir=run"),
                cwd=tmp_path,
                env=os.environ | group,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        for name, job in jobs.items():
            told = job.communicate()[1]
            message = error(subprocess.CompletedProcess(job.args, job.returncode, stderr=told), 2)
            assert cases[name][3] in message
            assert any(advice in message for advice in ("choose another", "use another port", "reaches that address"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_launcher_that_counts_in_words_is_named(name, tmp_path):
    group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", name: "two"}
    assert f"{name}=two: must be a whole number" in error(train(tmp_path, *RUN, **group), 2)


# --- A loss that is not finite ---------------------------------------------------------------------------------------

# Trains with two processes; the second's logits, and they alone, are far out from the tenth batch on: its loss is then
# infinite, its gradients and all weights are not.
FAR_OUT = """
import functools, itertools, os
import torch
from resnet_train import cli
from resnet_train.config.compose import compose
from resnet_train.dispatch import prepare
from resnet_train.console import call, finish
from resnet_train.models.resnet import ResNet

def far_out(module, _, logits, batches=itertools.count()):
    if isinstance(module, ResNet) and module.training and next(batches) >= 10:
        return logits + 3e38 * torch.linspace(-1, 1, 10)

def job(config, directory):
    if os.environ["RANK"] == "1":
        torch.nn.modules.module.register_module_forward_hook(far_out)
    return call("resnet_train.classification.run:train", config, directory)

def train(words):
    config, directory = prepare(cli.COMMANDS["train"], compose("train", words), words, sweep=False)
    finish(functools.partial(job, config, directory), config)
"""


@pytest.mark.parametrize(("precision", "kept"), [("bf16", True), ("fp32", False)])
def test_of_a_loss_that_is_not_finite_the_advice_is_not_what_is_done_already(precision, kept, tmp_path):
    if kept:
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints/last.pt").touch()
    task = SimpleNamespace(model=torch.nn.Linear(2, 2), iteration=5, precision=precision, key_of_lr="lr")
    task.losses = torch.zeros(3)
    check_finite(task, tmp_path)
    task.losses = torch.tensor([1, torch.inf])
    with pytest.raises(RunError) as caught:
        check_finite(task, tmp_path)
    message = str(caught.value)
    assert ("holds the last good state" in message) == kept
    assert message.endswith("use a lower lr= in a new run" + (", or precision=fp32" if kept else ""))


def test_a_loss_that_is_not_finite_in_one_process_ends_all(tmp_path):
    (tmp_path / "far_out.py").write_text(FAR_OUT)
    words = [*RUN, "devices=2", "run_dir=run", "checkpoint_every=3"]
    text = "import sys; sys.path.append('.'); import far_out; far_out.train(sys.argv[1:])"
    done = forked.run([sys.executable, "-c", text, *words], cwd=tmp_path, capture_output=True, text=True)
    assert error(done, 1).startswith(
        "error: the loss is not finite at iteration 12 or shortly before; run/checkpoints "
    )
    for name, iteration in (("last.pt", 9), ("previous.pt", 6)):
        state = checkpoint.load(tmp_path / "run/checkpoints" / name)
        assert state["iteration"] == iteration
        assert all(value.isfinite().all() for value in state["model"].values())
        assert state["metrics"]["loss"].isfinite().all()
    assert not (tmp_path / "run/summary.json").exists()
