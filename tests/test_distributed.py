"""Several processes do what one does: the same mathematics, images, counts and files, and runs that change shape."""

import base64
import contextlib
import dataclasses
import datetime
import ipaddress
import json
import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice, takewhile
from pathlib import Path

import distributed_worker
import forked
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import as_one_of, entries, metrics, needs, start
from distributed_worker import CPU, DIGITS
from test_sets import SHAPES, equal, photograph
from torch import nn

from resnet_train.classification.load import pick_compile, pick_eval_batch, pick_workers
from resnet_train.classification.run import build
from resnet_train.config.augment import Augment
from resnet_train.config.compose import compose
from resnet_train.config.train import check_train
from resnet_train.data.memory import MemoryDataset
from resnet_train.data.streaming import StreamingDataset
from resnet_train.data.views import BatchOrder
from resnet_train.engine import checkpoint, limits
from resnet_train.engine.compute import _warn_of_unused_gpus, pick_device
from resnet_train.engine.launch import pick_processes
from resnet_train.errors import RunError, UserError
from resnet_train.models import cifar_resnet
from resnet_train.models.batchnorm import BatchNorm2d, GroupBatchNorm2d, update_statistics, use_group_batch_norm

needs("sklearn")
pytestmark = pytest.mark.timeout(1200)
# One thread for each process: kernels then add in one order, and what should be equal is so to the last bit.
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}
TORCHRUN = [sys.executable, "-c", "from torch.distributed.run import main; main()", "--standalone"]
TORCHRUN += ["--nproc-per-node=2", "--no-python"]
# 360 test images make seven batches and a rest, 137 for validation two.
LONG = [*DIGITS, "bn_images=32", "precision=fp64", "iterations=50", "log_every=1", "eval_every=25"]
LONG += ["eval_batch_size=50", "run_dir=run"]
LAUNCHED = pytest.param("torchrun", marks=pytest.mark.long)
FOUR = pytest.param(4, marks=pytest.mark.long)
# What should be as the one run of one process.
SHAPED = ("parts", "sweep/64", "sweep/32", LAUNCHED, "there and back")
EVALUATED = {"two by one": ("sweep/32", 1), "two by three": ("sweep/64", 3)}


def finished(*line):
    """A job for a folder: the command line, which has to end well; it gives what was printed."""

    def job(folder):
        done = forked.run(line, cwd=folder, env=ONE_THREAD, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return job


def stopped(folder, iteration, *more):
    """A run ended by SIGTERM once it has logged `iteration`: what it printed."""
    with forked.Popen(
        start(*LONG, *more), cwd=folder, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        printed = ""
        for line in process.stdout:
            printed += line
            if line.startswith(f"iteration {iteration}/50 train"):
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM, printed
    return printed


def there_and_back(folder):
    """One process, then two, then one."""
    return [stopped(folder, 5), stopped(folder, 12, "devices=2"), finished(*start(*LONG))(folder)]


JOBS = {
    "sweep": finished(
        *start("-m", *LONG, "devices=2", "device_batch_size=64,32", "run_dir=${device_batch_size}/run"),
    ),
    "there and back": there_and_back,
    "one": finished(*start(*LONG)),
    "parts": finished(*start(*LONG, "device_batch_size=32")),
    "several 2": lambda folder: as_one_of(2, folder, "import distributed_worker; distributed_worker.job('.')()"),
}

# Begun where a test asks for them: what takes new processes, each of which imports torch, or four.
LATER = {
    "torchrun": finished(*TORCHRUN, str(Path(sys.executable).parent / "resnet-train"), *LONG),
    "several 4": lambda folder: as_one_of(4, folder, "import distributed_worker; distributed_worker.job('.')()"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder and output of a job by its name. Two run at a time, all but those of LATER once the first is asked for."""
    base, jobs = tmp_path_factory.mktemp("runs"), {}

    def evaluated(name, devices):
        def job(folder):
            got(name)
            file = f"checkpoint={base / name}/run/checkpoints/last.pt"
            return finished(*start(file, f"devices={devices}", "out=result.json", entry="evaluate"))(folder)

        return job

    def got(name):
        if name in LATER and name not in jobs:
            begin(name, LATER[name])
        return base / name, jobs[name.split("/")[0]].result()

    def begin(name, job):
        (base / name).mkdir()
        jobs[name] = pool.submit(job, base / name)

    with ThreadPoolExecutor(2) as pool:
        for name, job in (JOBS | {name: evaluated(*what) for name, what in EVALUATED.items()}).items():
            begin(name, job)
        yield got
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds of what several are to find."""
    folder = tmp_path_factory.mktemp("alone")
    distributed_worker.job(folder)()
    return checkpoint.read(folder / "0.pt")


def found(runs, processes):
    """What each of several processes finds."""
    folder, _ = runs(f"several {processes}")
    return [checkpoint.read(folder / f"{rank}.pt") for rank in range(processes)]


def last(folder):
    """The last checkpoint."""
    return checkpoint.load(folder / "run/checkpoints/last.pt")


def apart(some, others):
    """The largest distance of two lists of tensors, each in relation to the norm of the other's."""
    pairs = [(a.double(), b.double()) for a, b in zip(some, others, strict=True)]
    return max(((a - b).norm() / b.norm()).item() if b.any() else a.norm().item() for a, b in pairs)


# Batch norm over groups


def test_groups_are_plain_batch_norms_one_after_another():
    """Forward and backward, bit for bit, and the statistics of each group."""
    torch.manual_seed(0)
    grouped, x = GroupBatchNorm2d(3, 4), torch.randn(12, 3, 5, 7, requires_grad=True)
    nn.init.uniform_(grouped.weight)
    nn.init.uniform_(grouped.bias)
    ours = grouped(x)
    theirs, sums = [], torch.zeros(2, 3)
    for group in x.split(4):
        plain = nn.BatchNorm2d(3, momentum=1.0)
        plain.weight, plain.bias = grouped.weight, grouped.bias
        theirs.append(plain(group))
        sums += torch.stack([plain.running_mean, plain.running_var])
    assert torch.equal(ours, torch.cat(theirs))
    assert torch.equal(grouped.sums, sums)
    given = [x, grouped.weight, grouped.bias]
    towards = torch.randn_like(ours)
    mine, plain = (torch.autograd.grad((out * towards).sum(), given) for out in (ours, torch.cat(theirs)))
    assert all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True))


@pytest.mark.parametrize("passes", [1, 3])
def test_running_statistics_move_once_per_step_to_the_mean_over_the_groups(passes):
    torch.manual_seed(0)
    grouped, mean, var = GroupBatchNorm2d(3, 4).double(), torch.zeros(3).double(), torch.ones(3).double()
    for number in range(1, 4):
        x = torch.randn(12, 3, 5, 7).double() * number + number
        for part in x.chunk(passes):
            grouped(part)
            assert torch.allclose(grouped.running_mean, mean, rtol=1e-12)  # not before the step is over
        update_statistics(grouped, 3)
        groups = x.view(3, 4, 3, 5, 7).transpose(1, 2).reshape(3, 3, -1)  # group, channel, values
        mean = 0.9 * mean + 0.1 * groups.mean(2).mean(0)
        var = 0.9 * var + 0.1 * groups.var(2, correction=1).mean(0)
        torch.testing.assert_close(grouped.running_mean, mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(grouped.running_var, var, rtol=1e-12, atol=0)
        assert grouped.num_batches_tracked == number
        assert not grouped.sums.any()


def test_one_group_of_the_whole_batch_is_plain_batch_norm():
    """Losses bit for bit; the running statistics round otherwise."""
    torch.manual_seed(0)
    plain = cifar_resnet(8, "B").double()
    grouped = cifar_resnet(8, "B").double()
    use_group_batch_norm(grouped, 12)
    grouped.double().load_state_dict(plain.state_dict())
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    assert sum(isinstance(module, GroupBatchNorm2d) for module in grouped.modules()) == norms == 9
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (plain, grouped)]
    for _ in range(3):
        images, labels = torch.randn(12, 3, 16, 16).double(), torch.randint(0, 10, (12,))
        losses = []
        for net, optimizer in zip((plain, grouped), optimizers, strict=True):
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        update_statistics(plain, 1)
        update_statistics(grouped, 1)
        assert losses[0] == losses[1]
    assert plain.state_dict().keys() == grouped.state_dict().keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(grouped.state_dict()[name], value, rtol=1e-12, atol=1e-15)


def by_hand(group):
    """Gradients and running statistics of the first step, from a plain net that takes one group after another."""
    run = build(distributed_worker.composed(*DIGITS, "precision=fp64"))
    norms = [module for module in run.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert {type(norm) for norm in norms} == {BatchNorm2d}
    images, labels = next(distributed_worker.batches(run))
    stats = []
    for norm in norms:
        norm.momentum = 1.0  # keeps nothing of the group before
    for some, truth in zip(images.double().split(group), labels.split(group), strict=True):
        (F.cross_entropy(run.model(some), truth) * group / 128).backward()
        stats.append([(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms])
    moved = []
    for index in range(len(norms)):
        means, variances = (torch.stack([found[index][kind] for found in stats]) for kind in (0, 1))
        moved += [0.1 * means.mean(0), 0.9 + 0.1 * variances.mean(0)]
    return [p.grad for p in run.model.parameters()], moved


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, FOUR])
def test_the_first_step_is_that_of_plain_batch_norms_written_out(runs, alone, processes):
    """In groups of 32, in parts too; and where each device is one group, in groups of its share."""
    mine = alone if processes == 1 else found(runs, processes)[0]
    for case, group in (("fp64", 32), ("fp64 in parts", 32), ("fp64 by device", 128 // processes)):
        gradients, statistics = by_hand(group)
        assert apart(mine[case]["gradients"], gradients) < 1e-12
        assert apart(list(mine[case]["statistics"].values()), statistics) < 1e-12
        tracked = [v for name, v in mine[case]["state"]["model"].items() if name.endswith("num_batches_tracked")]
        assert tracked == [distributed_worker.STEPS] * 7


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, FOUR])
def test_gradients_of_several_processes_are_those_of_one(runs, alone, processes):
    many = found(runs, processes)
    for case in ("fp32", "fp32 in parts"):
        assert apart(many[0][case]["gradients"], alone["fp32"]["gradients"]) < 1e-5
    for case in ("fp64", "fp64 in parts"):
        assert apart(many[0][case]["gradients"], alone["fp64"]["gradients"]) < 1e-12


@pytest.mark.slow
def test_gradients_of_an_accumulated_batch_are_those_of_the_whole(alone):
    assert apart(alone["fp32 in parts"]["gradients"], alone["fp32"]["gradients"]) < 1e-5
    assert apart(alone["fp64 in parts"]["gradients"], alone["fp64"]["gradients"]) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, FOUR])
def test_all_processes_hold_the_same_state(runs, processes, tmp_path):
    """Weights, running statistics, momentum and meters, to the last bit: any of them could write the checkpoint."""
    many = found(runs, processes)
    for case in distributed_worker.CASES:
        for rank, mine in enumerate(many):
            checkpoint.save(tmp_path / f"{rank}.pt", mine[case]["state"])
            assert (tmp_path / f"{rank}.pt").read_bytes() == (tmp_path / "0.pt").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, FOUR])
def test_meters_hold_the_sums_of_all_processes(runs, alone, processes):
    theirs = alone["fp64"]["state"]["metrics"]
    for case in ("fp64", "fp64 in parts"):
        mine = found(runs, processes)[0][case]["state"]["metrics"]
        assert mine["wrong"].sum(0).tolist() == theirs["wrong"].sum(0).tolist()
        assert mine["seen"] == theirs["seen"] == 128 * distributed_worker.STEPS
        assert mine["loss"].sum().item() == pytest.approx(theirs["loss"].sum().item(), rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, FOUR])
def test_meters_in_a_checkpoint_go_on_in_any_number_of_processes(runs, alone, processes):
    """Sums since the last logged point, left by one, two, three and four."""
    for mine in (alone, *found(runs, processes)):
        assert mine["taken over"] == {
            "1": [0, 0, 1, 100],
            "2": [1, 2, 4, 200],
            "3": [3, 6, 9, 300],
            "4": [6, 12, 16, 400],
        }


@pytest.mark.slow
def test_synchronised_batch_norm_is_refused_on_a_cpu_in_one_line(runs, alone):
    assert alone["refused"] is None  # one process has nothing to synchronise
    message = "UserError: bn_images=all: PyTorch's synchronised batch norm needs GPUs; use a number of images"
    first, second = (mine["refused"] for mine in found(runs, 2))
    assert first == (message, True)
    assert second == (message.replace("UserError", "RemoteError"), True)  # which is left to the first to tell


# The same images


def test_training_images_depend_on_the_seed_and_not_on_the_processes():
    """Which images, their crops and their flips."""
    sets = MemoryDataset(name="digits", root=None, size=16, validation=137)
    the_same_images(sets, Augment(4, True, None, None, colour_jitter=0.0, colour_noise=0.0))


@pytest.mark.parametrize("workers", [0, 1])
def test_photographs_depend_on_the_seed_and_not_on_the_processes(photographs, workers):
    """Which images, their scales, crops, flips and colours."""
    sets = StreamingDataset(root=str(photographs), size=24, validation=0, workers=workers)
    the_same_images(sets, Augment(0, True, [28, 40], None, colour_jitter=0.4, colour_noise=0.1))


def the_same_images(sets, augment):
    def training(seed, rank, world):
        order = BatchOrder(seed, 24, augment, 2, rank, world)
        batches = sets.train_batches(sets.mean_image(), CPU, order)
        found = [(images.clone(), labels.clone()) for images, labels in islice(batches, 2)]
        batches.close()
        return found

    whole = training(3, 0, 1)
    for world in (2, 3, 4):
        parts = [training(3, rank, world) for rank in range(world)]
        joined = [tuple(torch.cat(pieces) for pieces in zip(*batch, strict=True)) for batch in zip(*parts, strict=True)]
        assert {len(labels) for part in parts for _, labels in part} == {24 // world}
        assert equal(joined, whole)
    assert not equal(training(4, 0, 1), whole)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """13 to train and 9 to test, of three classes and seven shapes."""
    root, number = tmp_path_factory.mktemp("photographs"), count()
    for part, counts in (("train", (7, 4, 2)), ("val", (2, 4, 3))):
        for name, images in zip(("cat", "dog", "eel"), counts, strict=True):
            for index in range(images):
                seed = next(number)
                photograph(root / part / name / f"{index}.JPEG", SHAPES[seed % len(SHAPES)], seed)
    return root


# Evaluation


@pytest.mark.parametrize("batch_size", [50, 100, 200, 360, 500])
def test_evaluation_batches_are_dealt_whole(batch_size):
    sets = MemoryDataset(name="digits", root=None, size=8, validation=137)
    dealt_whole(sets, "test", batch_size, sets.parts["test"].labels.tolist())
    dealt_whole(sets, "val", batch_size, sets.parts["val"].labels.tolist())


@pytest.mark.parametrize("batch_size", [2, 4, 9, 10])
def test_evaluation_batches_of_photographs_are_dealt_whole(photographs, batch_size):
    sets = StreamingDataset(root=str(photographs), size=24, validation=0, workers=0)
    dealt_whole(sets, "test", batch_size, [label for _, label in entries(sets.parts["test"])])


def dealt_whole(sets, split, batch_size, labels):
    """Batches of one process, each whole at one of several; every image once, though some get no batch at all."""
    mean = sets.mean_image()
    whole = list(sets.eval_batches(split, mean, CPU, batch_size))
    assert [label for _, some in whole for label in some.tolist() if label >= 0] == labels
    for world in (1, 2, 3, 4):
        dealt = [list(sets.eval_batches(split, mean, CPU, batch_size, rank, world)) for rank in range(world)]
        assert sum(map(len, dealt)) == len(whole)
        assert equal([dealt[number % world][number // world] for number in range(len(whole))], whole)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, FOUR])
def test_counts_and_loss_are_those_of_one_process_exactly(runs, alone, processes):
    """In eight, three, two batches and one, so that some processes have more than others and some none."""
    assert [(name, outcome["seen"]) for name, outcome in alone["counts"].items()] == [
        ("test 50", 360),
        ("test 200", 360),
        ("val 50", 137),
        ("val 200", 137),
    ]
    for mine in found(runs, processes):
        assert mine["counts"] == alone["counts"]


@pytest.mark.slow
@pytest.mark.parametrize("name", EVALUATED)
def test_a_checkpoint_evaluated_by_others_gives_the_logged_figure(runs, name):
    """What two processes have written, one or three evaluate."""
    folder, printed = runs(name)
    result = json.loads((folder / "result.json").read_text())
    logged = metrics(runs(EVALUATED[name][0])[0] / "run")[-1]
    assert (logged["split"], logged["iteration"], logged["seen"]) == ("test", 50, 360)
    assert {k: result[k] for k in ("wrong", "seen", "error", "loss")} == {
        k: logged[k] for k in ("wrong", "seen", "error", "loss")
    }
    assert printed.count("\n") == 1
    assert os.listdir(folder) == ["result.json"]


# Whole runs


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPED)
def test_losses_of_50_iterations_are_those_of_one_process_to_nine_digits(runs, name):
    """Test and validation losses too, hence the running statistics; all errors and counts exactly."""
    theirs, mine = (metrics(runs(job)[0] / "run") for job in ("one", name))
    assert [line["iteration"] for line in theirs if line["split"] == "train"] == [*range(1, 51)]
    assert [line.pop("loss") for line in mine] == pytest.approx([line.pop("loss") for line in theirs], rel=1e-9, abs=0)
    assert mine == theirs


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPED)
def test_final_weights_are_those_of_one_process_to_nine_digits(runs, name):
    """Running statistics and momentum too."""
    theirs, mine = last(runs("one")[0]), last(runs(name)[0])
    assert mine["model"].keys() == theirs["model"].keys()
    assert apart(mine["model"].values(), theirs["model"].values()) < 1e-9
    momentum = [
        [entry["momentum_buffer"] for entry in state["optimizer"]["state"].values()] for state in (mine, theirs)
    ]
    assert len(momentum[0]) == 23
    assert apart(*momentum) < 1e-9
    tracked = [value for key, value in mine["model"].items() if key.endswith("num_batches_tracked")]
    assert tracked == [50] * 7
    assert mine["iteration"] == theirs["iteration"] == 50


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes(runs):
    """One, two and one again: each from where the last one stopped."""
    _, (first, second, third) = runs("there and back")
    stops = [int(text.split("stopped at iteration ")[1].split(",")[0]) for text in (first, second)]
    assert 5 <= stops[0] < stops[1] < 50
    assert "128 (batch norm over 32)" in first
    assert f"resuming from iteration {stops[0]}\n" in second
    assert "128 (64 in each of 2 processes, batch norm over 32)" in second
    assert f"resuming from iteration {stops[1]}\n" in third
    assert "note:" not in second + third  # batch norm's groups are what they were


def files(folder):
    """The files below, the names of events without host and time."""
    return sorted(str(path.relative_to(folder)).split(".tfevents.")[0] for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sweep/64", "sweep/32", LAUNCHED])
def test_several_processes_leave_the_files_of_one(runs, name):
    """The others write no directory, no log, no TensorBoard."""
    assert files(runs(name)[0]) == files(runs("one")[0])
    assert json.loads((runs(name)[0] / "run/environment.json").read_text())["processes"] == 2


def heads(printed):
    """What each line tells of, without the figures; not where it starts."""
    return [line.split(":")[0] for line in printed.splitlines() if ": starting" not in line]


@pytest.mark.long
def test_under_torchrun_one_process_prints(runs):
    theirs, mine = runs("one")[1], runs("torchrun")[1]
    assert len(set(heads(theirs))) == len(heads(theirs)) == 2 + 50 + 2 * 2 + 2
    assert heads(mine) == heads(theirs)
    assert "128 (64 in each of 2 processes, batch norm over 32); fp64 on cpu" in mine


@pytest.mark.slow
def test_jobs_of_a_sweep_with_two_devices_run_one_after_another(runs):
    """Each with its own directory."""
    folder, printed = runs("sweep")
    assert {"32", "64"} <= set(os.listdir(folder))
    assert heads(printed) == [*2 * heads(runs("one")[1]), "2 runs; side by side"]
    assert "64/run" in printed.splitlines()[0]


# Who can reach the processes


class Harm:
    """A pickle that makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def family(pid):
    """A process and all below it."""
    children = (
        child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    )
    return [pid, *(below for child in children for below in family(int(child)))]


def listening(pids):
    """Address and port of each socket, TCP or UDP, at which one of the processes can be reached."""
    links = {os.readlink(link) for pid in pids for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink()}
    found = []
    for name, open_to_all in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == open_to_all and f"socket:[{inode}]" in links:
                address, port = local.split(":")
                words = [bytes.fromhex(address[at : at + 8])[::-1] for at in range(0, len(address), 8)]
                found.append((ipaddress.ip_address(b"".join(words)), int(port, 16)))
    return found


def rewritten(port, mark):
    """The keys of torch's store at a port, if there is one, with harm put where the launcher reads its rendezvous."""
    with contextlib.suppress(RuntimeError):  # what is there speaks otherwise, and ends
        store = dist.TCPStore("127.0.0.1", port, None, False, datetime.timedelta(seconds=5), False)
        for key in (keys := store.list_keys()):
            if "torch.rendezvous." in key:
                store.set(key, base64.b64encode(pickle.dumps(Harm(mark))).decode())
        return keys
    return []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="sockets are found through /proc")
def test_two_processes_can_be_reached_from_this_machine_alone_and_keep_no_store_at_a_port(tmp_path):
    """While they train: what launcher, processes and helpers listen at, and what a stranger can do there."""
    words = [*DIGITS, "iterations=100000", "log_every=10", "eval_every=1000", "compile=false", "devices=2"]
    options = {"cwd": tmp_path, "env": ONE_THREAD, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with (
        ThreadPoolExecutor() as strangers,
        forked.Popen(start(*words, "run_dir=run"), **options) as job,
    ):
        before = list(takewhile(lambda line: not line.startswith("iteration 10/"), job.stdout))
        processes = family(job.pid)
        found = listening(processes)
        keys = [strangers.submit(rewritten, port, tmp_path / "mark") for _, port in found]
        after = list(islice(job.stdout, 20))  # the launcher has looked at its rendezvous, if it has one
        job.terminate()
        after += list(job.stdout)
    assert any("stopped at iteration" in line for line in after), [*before, *after]
    assert len(processes) >= 3
    assert found  # each other's
    assert [address for address, _ in found if not address.is_loopback] == []
    assert [key for port in keys for key in port.result()] == []
    assert not (tmp_path / "mark").exists()


# The command line under torchrun


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-m"], "error: -m: torchrun would start the sweep in each of its processes; use resnet-train -m devices=2"),
        (["devices=2"], "error: devices=2: is set by the launcher, such as torchrun; remove it"),
        (["max_restarts=3"], "error: max_restarts=3: is set by the launcher, such as torchrun; remove it"),
        (["batch_size=127"], "error: batch_size=127: does not divide by 2 devices; nearest: 128"),
    ],
)
def test_what_is_the_launchers_to_say_is_refused_under_torchrun(command, tmp_path, arguments, message):
    there = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    there |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    done = command(*DIGITS, *arguments, env=os.environ | there)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(message)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(("gpus", "local_rank", "taken"), [(8, 3, 3), (1, 0, 0), (1, 3, 0), (2, 1, 1), (2, 2, None)])
def test_a_process_takes_the_gpu_of_its_rank_or_the_only_one_it_sees(monkeypatch, gpus, local_rank, taken):
    """Slurm's --gpus-per-task shows each process its own alone. The GPUs are pretended."""
    chosen = []
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch, "ones", lambda *_, device: torch.zeros(1) if device == "cuda" and chosen else None)
    if taken is None:
        with pytest.raises(UserError, match="devices: torch sees 2 GPUs here; each process needs one"):
            pick_device("cuda")
    else:
        assert (pick_device("auto"), chosen) == (torch.device("cuda", taken), [taken])


NO_KERNEL = """CUDA error: no kernel image is available for execution on the device
Search for `cudaErrorNoKernelImageForDevice' in https://docs.nvidia.com/cuda/cuda-runtime-api for more information."""
NO_KERNEL_LINE = (
    "device=cuda: this torch is for sm_75, sm_90, and Tesla V100 is sm_70; install a build for it"
    " (docs/troubleshooting.md), or use device=cpu"
)
FULL = "CUDA out of memory. Tried to allocate 2.00 MiB"
ORDINAL = "CUDA error: invalid device ordinal"
BUSY = "CUDA error: all CUDA-capable devices are busy or unavailable"


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (NO_KERNEL, UserError, NO_KERNEL_LINE),
        (BUSY, UserError, f"device=cuda: GPU 0 cannot be used ({BUSY}); use device=cpu"),
        (FULL, RunError, f"device=cuda: GPU 0 is full, by other processes (nvidia-smi): {FULL}"),
        (ORDINAL, UserError, f"device=cuda: GPU 0 cannot be used ({ORDINAL}); use fewer devices="),
    ],
)
def test_a_gpu_that_torch_cannot_compute_with_is_one_line(text, kind, message, monkeypatch):
    """At the first operation on it. The GPU is pretended."""

    def fail(*_, **__):
        raise RuntimeError(text)

    for name, value in {
        "is_available": True,
        "device_count": 1,
        "set_device": None,
        "get_device_capability": (7, 0),
        "get_device_name": "Tesla V100",
        "get_arch_list": ["sm_75", "sm_90"],
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch, "ones", fail)
    with pytest.raises(UserError) as caught:
        pick_device("auto")
    assert type(caught.value) is kind
    assert str(caught.value) == message


def test_values_of_auto_by_the_device_and_the_machine(monkeypatch, tmp_path, capsys):
    config = check_train(compose("train", ["data=digits", "depth=8", "iterations=999", "eval_batch_size=auto"]))
    photos = dataclasses.replace(config, data=dataclasses.replace(config.data, workers="auto"))
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert (pick_compile(config, gpu), capsys.readouterr().out) == (True, "")
    assert not pick_compile(config, cpu)
    assert capsys.readouterr().out == "compile=auto: 999 iterations are too few to earn the time of compiling\n"
    assert pick_compile(dataclasses.replace(config, iterations=1000), cpu)
    assert not pick_compile(dataclasses.replace(config, bn_images="all"), gpu)
    assert [pick_eval_batch(config, device) for device in (cpu, gpu)] == [250, 2000]
    monkeypatch.setattr(limits, "CPU_QUOTA", tmp_path / "none")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(128)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_workers(photos) == 24
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert pick_workers(photos) == 16
    assert pick_workers(dataclasses.replace(photos, device="cpu")) == 4
    monkeypatch.setattr(limits, "CPU_QUOTA", tmp_path / "cpu.max")
    for text, cores in (("max 100000\n", 16), ("1600000 100000\n", 2), ("50000 100000\n", 1)):
        limits.CPU_QUOTA.write_text(text)
        assert pick_workers(photos) == cores


def test_gpus_that_the_driver_counts_and_torch_cannot_use_start_no_processes(monkeypatch, capsys):
    """A driver that is older than the build of torch: eight cards, and one process on the CPU, with the reason."""

    def init():
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update your GPU")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "init", init)
    reason = "(The NVIDIA driver on your system is too old (found version 11040))"
    assert pick_processes("auto", "auto") == 1
    _warn_of_unused_gpus.cache_clear()
    assert [pick_device("auto"), pick_device("auto")] == [torch.device("cpu")] * 2
    assert capsys.readouterr().out == (
        f"warning: device=auto: the CPU, as torch cannot use the 8 GPUs of this machine {reason}\n"
    )
    with pytest.raises(UserError) as caught:
        pick_processes("auto", "cuda")
    assert str(caught.value) == f"device=cuda: torch sees no GPU here {reason}; use device=cpu"


@pytest.mark.long
def test_reading_the_data_may_take_longer_than_a_lost_process_is_waited_for(tmp_path):
    text = "import distributed_worker; distributed_worker.slow(8, 12)"
    as_one_of(2, tmp_path, text)
    assert sorted(path.name for path in tmp_path.glob("read-*")) == ["read-0", "read-1"]


@pytest.mark.long
def test_several_processes_compile_what_they_compute(tmp_path):
    """torch cuts the net where DDP sends gradients."""
    few = [*DIGITS, "bn_images=32", "precision=fp64", "iterations=4", "log_every=1", "devices=2"]
    found = []
    for compiled in ("true", "false"):
        told = finished(*start(*few, f"compile={compiled}", f"run_dir=compile-{compiled}"))(tmp_path)
        assert ("compiled in" in told) == (compiled == "true")
        found.append([line["loss"] for line in metrics(tmp_path / f"compile-{compiled}") if line["split"] == "train"])
    assert found[0] == pytest.approx(found[1], rel=1e-9)
