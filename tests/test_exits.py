"""What the machine refuses, and other processes that have gone: one line each that says what it is, and exit code 1."""

import contextlib
import errno
import gc
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from conftest import start
from torch import nn
from torch.utils.data import DataLoader, Dataset

from resnet_train import sweep
from resnet_train.console import exit_code
from resnet_train.engine import checkpoint
from resnet_train.engine.distributed import _join_error, process_group
from resnet_train.engine.limits import check_open_files, most_workers
from resnet_train.engine.loop import check_finite
from resnet_train.engine.resume import check_space
from resnet_train.errors import RunError, UserError, from_nccl_error, from_os_error, from_write_error, is_peer_failure
from resnet_train.files import check_replaceable, check_result, lock_directory, write_result


class Starved(Dataset):
    """Images that cannot be had."""

    def __init__(self, read):
        self.read = read

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.read()


def of_a_worker(read):
    """What DataLoader's own worker raises comes from it, or of its end."""
    return lambda: list(DataLoader(Starved(read), num_workers=1))


def with_few_files(job):
    """`job` with room for some more open files than there are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 12, hard))
    try:
        job()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def with_no_file_left(job):
    """`job` with as many open files as there may be, of which nothing closes one meanwhile."""
    gc.collect()
    with contextlib.ExitStack() as held:
        gc.disable()
        held.callback(gc.enable)
        with contextlib.suppress(OSError):
            while True:
                held.enter_context(open(os.devnull))
        job()


MEMORY = r"out of memory; smaller batches need less \(batch_size=, device_batch_size=, eval_batch_size=\): .+"
FILES = r"too many open files; raise the limit \(ulimit -n, now \d+\), or use fewer workers"
MISSING = "/no/such: No such file or directory; once it exists again, run the same command again"
WORKER = r"DataLoader worker \(.+\) exited unexpectedly; if it was killed for want of memory, use fewer workers"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a killed worker's, in a destructor
@pytest.mark.parametrize(
    ("job", "message"),
    [
        # First: it collects garbage, and what the others leave waits for five seconds each for its workers.
        (lambda: with_few_files(lambda: with_no_file_left(lambda: os.dup(2))), FILES),
        (lambda: torch.empty(1 << 50), MEMORY),
        (lambda: bytearray(1 << 62), MEMORY),
        (of_a_worker(lambda: torch.empty(1 << 50)), MEMORY),
        (of_a_worker(lambda: bytearray(1 << 62)), MEMORY),
        (of_a_worker(lambda: os.kill(os.getpid(), signal.SIGKILL)), WORKER),
        (
            of_a_worker(lambda: os.open("/no/such", os.O_RDONLY)),
            "/no/such: No such file or directory; once it exists again, .+",
        ),
        (
            lambda: with_few_files(of_a_worker(lambda: [torch.zeros(9) for _ in range(30)])),
            FILES,
        ),
    ],
)
def test_what_the_machine_refuses_is_one_line(job, message, capsys):
    with pytest.raises(SystemExit) as ended:
        exit_code(job)
    assert ended.value.code == 1
    assert re.fullmatch(f"error: {message}\n", capsys.readouterr().err)


def test_what_is_a_mistake_in_the_code_keeps_its_trace(capsys):
    with pytest.raises(SystemExit) as ended:
        exit_code(lambda: torch.zeros(2) @ torch.zeros(3))
    assert ended.value.code == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "what is on disk is intact; once there is space, "),
        (errno.EMFILE, "what is on disk is intact; with a higher limit of open files (ulimit -n, now "),
        (errno.ENOENT, "once it exists again, "),
        (errno.ENOTDIR, "once there is a folder, "),
        (errno.EACCES, "what is on disk is intact; once access is permitted, "),
        (errno.EIO, "what is on disk is intact; once that is fixed, "),
    ],
)
def test_the_remedy_is_that_of_the_fault(number, remedy):
    message = str(from_os_error(OSError(number, os.strerror(number), "run/x")))
    assert message.startswith(f"run/x: {os.strerror(number)}; {remedy}")
    assert message.endswith(", run the same command again")
    assert ("there is space" in message) == (number == errno.ENOSPC)


@pytest.mark.parametrize(("precision", "way"), [("bf16", ", or precision=fp32"), ("fp32", ""), ("fp64", "")])
def test_a_loss_that_is_not_finite_is_told_with_what_there_is_and_what_is_left_to_try(precision, way, tmp_path):
    """No checkpoint is named that was never written, and no precision that is in use."""
    task = SimpleNamespace(model=nn.Linear(2, 2), iteration=7, precision=precision, key_of_lr="schedule.lr")
    task.losses = torch.tensor([math.inf])

    def told():
        with pytest.raises(RunError) as error:
            check_finite(task, tmp_path)
        return str(error.value)

    begin, end = "the loss is not finite at iteration 7 or shortly before;", " use a lower schedule.lr= in a new run"
    assert told() == f"{begin}{end}{way}"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.pt").touch()
    assert told() == f"{begin} {tmp_path}/checkpoints holds the last good state;{end}{way}"


def test_a_checkpoint_that_cannot_be_written_is_told_with_the_way_out_and_with_what_is_left(tmp_path):
    path = tmp_path / "checkpoints/last.pt"

    def told():
        with pytest.raises(RunError) as error:
            with_few_files(lambda: with_no_file_left(lambda: checkpoint.save(path, {})))
        return str(error.value)

    begin = f"{path}: the checkpoint cannot be written (Too many open files); with a higher limit of open files"
    assert re.fullmatch(re.escape(begin) + r" \(ulimit -n, now \d+\), the same command resumes", told())
    checkpoint.save(path, {})
    assert told().endswith("), the same command resumes from the one before it, which is intact")
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"\(Not a directory\); once there is a folder, the same command resumes$"):
        checkpoint.save(tmp_path / "file/deep/last.pt", {})


def test_a_checkpoint_that_there_is_no_memory_for_is_not_called_damaged():
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"), checkpoint.checkpoint_errors("last.pt"):
        torch.empty(1 << 50)


def workers(job):
    """The processes that a launcher has started to train."""
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    return [pid for pid in children if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("devices", "number", "begun"),
    [(1, signal.SIGINT, 0), (2, signal.SIGUSR1, 0), (2, signal.SIGTERM, 2)],
)
def test_a_run_says_at_once_that_it_starts_and_that_nothing_was_kept_where_it_is_stopped_at_once(
    devices, number, begun, tmp_path
):
    """As soon as it has said so, or as its processes are there."""
    words = ["data=digits", "depth=8", "device=cpu", f"devices={devices}", "run_dir=run"]
    options = {"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    begin = subprocess.Popen if devices == 1 else forked.Popen  # one of them while torch is imported
    with begin(start(*words), start_new_session=True, **options) as job:
        first = job.stdout.readline()
        while begun and len(workers(job)) < begun:
            time.sleep(0.05)
        job.send_signal(number)
        out, err = job.communicate()
    assert first == f"run: starting{' on devices=2' if devices == 2 else ''}\n"
    assert out == "stopped before anything new was written; the same command starts where this one did\n"
    assert (job.returncode, err) == (128 + number, "")
    assert os.listdir(tmp_path) == []


def test_a_limit_of_open_files_that_a_worker_would_meet_is_named_before_the_start(tmp_path):
    """The worker would hang, and fill stderr for good. A limit that may be raised is."""
    for part in ("train/cat", "train/dog", "val/cat", "val/dog"):
        (tmp_path / "tree" / part).mkdir(parents=True)
        (tmp_path / "tree" / part / "0.png").write_text("no image")
    words = ["data=imagenet", "data.root=tree", "depth=18", "device=cpu", "run_dir=run"]

    def told(hard, workers):
        line = start(*words, f"data.workers={workers}")
        line[2] = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (24, {hard})); {line[2]}"
        done = forked.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=200)
        return done.returncode, done.stderr

    assert told(24, 1) == (
        1,
        "error: data.workers=1: need 72 open files, and the limit is 24; raise it (ulimit -n), or use fewer\n",
    )
    assert not (tmp_path / "run").exists()
    code, error = told("resource.getrlimit(resource.RLIMIT_NOFILE)[1]", 1)
    assert (code, "is not an image" in error) == (2, True)


# Starts a process that finds its input wrong, and would be started again twice.
WRONG_INPUT = """
import sys
from resnet_train.engine.launch import launch

def job():
    print("begun", flush=True)
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(launch(job, 1, 2))
"""


def test_processes_that_find_their_input_wrong_are_not_started_again(tmp_path):
    (tmp_path / "wrong.py").write_text(WRONG_INPUT)
    done = subprocess.run([sys.executable, "wrong.py"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "begun\n", "")


def test_data_that_the_system_refuses_to_a_sweep_are_one_line(tmp_path, monkeypatch, capfd):
    (tmp_path / "refused.py").write_text("def opened(config):\n    open('/proc/refused/x')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RunError, match=r"^/proc/refused/x: No such file or directory; once it exists again, "):
        sweep._digest("refused:opened", None)
    assert capfd.readouterr().err == ""


# Other processes, and NCCL. Its texts are put together as torch and NCCL do it (ProcessGroupNCCL, NCCLUtils.cpp).

START = (
    "NCCL error in: /torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:77, {}, NCCL version 2.27.5\n{}\nLast error:\n{}"
)
DUPLICATE = START.format(
    "invalid usage (run with NCCL_DEBUG=WARN for details)",
    "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.",
    "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000",
)
NO_ROOM = START.format(
    "unhandled cuda error (run with NCCL_DEBUG=INFO for details)",
    "ncclUnhandledCudaError: Call to CUDA function failed.",
    "Cuda failure 2 'out of memory'",
)
UNHANDLED = NO_ROOM.replace("2 'out of memory'", "719 'unspecified launch failure'")
GONE = START.format(
    "remote process exited or there was a network error",
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    "socketProgress: Connection closed by remote peer localhost<41213>",
)
OF_GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:18354: {}"


@pytest.mark.parametrize(
    ("text", "gone"),
    [
        (GONE, True),
        (OF_GLOO.format("Connection reset by peer"), True),
        (OF_GLOO.format("Connection closed by peer [127.0.0.1]:18354"), True),
        ("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 600000ms for recv operation to complete", True),
        (DUPLICATE, False),
        (NO_ROOM, False),
        (UNHANDLED, False),
        ("[enforce fail at gloo/transport/tcp/pair.cc:446] op.preamble.length <= op.nbytes. 8 vs 4", False),
        ("the server timed out: https://example.org/train.tar", False),
    ],
)
def test_only_an_error_that_says_so_is_taken_for_the_loss_of_a_process(text, gone):
    assert (is_peer_failure(RuntimeError(text)) is not None) == gone


def test_nccl_that_cannot_work_is_told_for_what_it_is(capsys):
    duplicate = _join_error(RuntimeError(DUPLICATE), "they did not meet")
    assert type(duplicate) is UserError
    assert str(duplicate) == (
        "NCCL: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000; each process needs a GPU of its"
        " own: start fewer (devices=)"
    )
    memory = _join_error(RuntimeError(NO_ROOM), "they did not meet")
    assert type(memory) is RunError
    assert re.fullmatch(MEMORY, str(memory))
    assert "NCCL cannot work here: Cuda failure 719" in str(from_nccl_error(RuntimeError(UNHANDLED)))
    lost = _join_error(RuntimeError(GONE), "they did not meet")
    assert type(lost) is RunError
    assert str(lost) == (
        "NCCL cannot connect the processes: socketProgress: Connection closed by remote peer localhost<41213>; see that"
        " the machines reach each other, and by which interface (NCCL_SOCKET_IFNAME, NCCL_DEBUG=INFO)"
    )


@pytest.fixture
def two_of_a_launcher(monkeypatch):
    """The environment of the first of two processes on one machine."""

    def described(**more):
        group = {
            "RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "0",
        }
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            monkeypatch.setenv(name, "")  # that it be as before in the end
            monkeypatch.delenv(name)
        for name, value in (group | more).items():
            monkeypatch.setenv(name, value)

    return described


def test_processes_of_one_machine_use_its_loopback_unless_told_otherwise(two_of_a_launcher, tmp_path):
    """Those of several machines need a network."""

    def interfaces():
        with pytest.raises(UserError, match=r"not meet|no such"), process_group(torch.device("cpu"), 1):
            pass
        return os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("NCCL_SOCKET_IFNAME")

    store = str(tmp_path / "store")
    two_of_a_launcher(RESNET_TRAIN_STORE=store)
    assert interfaces() == ("lo", "=lo")
    two_of_a_launcher(RESNET_TRAIN_STORE=store, GLOO_SOCKET_IFNAME="nosuch", NCCL_SOCKET_IFNAME="eth7")
    assert interfaces() == ("nosuch", "eth7")
    two_of_a_launcher(LOCAL_WORLD_SIZE="1")
    assert interfaces() == (None, None)


def test_an_interface_that_is_not_there_is_named(two_of_a_launcher, tmp_path):
    two_of_a_launcher(RESNET_TRAIN_STORE=str(tmp_path / "store"), GLOO_SOCKET_IFNAME="nosuch")
    message = "GLOO_SOCKET_IFNAME=nosuch: there is no such network interface; unset it, or name another"
    with pytest.raises(UserError, match=f"^{message}$"), process_group(torch.device("cpu"), 1):
        pass


def test_a_folder_that_its_holder_removes_is_made_and_held_again(tmp_path):
    """Else who had waited for it would hold one that is gone, and a third could make and hold it as well."""
    folder, held = tmp_path / "run", []

    def wait():
        with lock_directory(folder, "run_dir", "training", patience=20):
            with pytest.raises(UserError, match=r"another process is training there$"):
                lock_directory(folder, "run_dir", "training").__enter__()
            held.append(folder.is_dir())

    waiting = threading.Thread(target=wait)
    with lock_directory(folder, "run_dir", "training"):
        waiting.start()
        time.sleep(0.2)
        folder.rmdir()
    waiting.join()
    assert held == [True]


def test_a_folder_that_cannot_be_made_is_named():
    with pytest.raises(UserError, match=r"^run_dir=/proc/nosuch: cannot be made: "):
        lock_directory(Path("/proc/nosuch"), "run_dir", "training").__enter__()


def test_a_link_to_what_is_not_there_is_named(tmp_path):
    (tmp_path / "run").symlink_to("gone")
    for folder in (tmp_path / "run", tmp_path / "run" / "sub"):
        for made in (
            lambda: lock_directory(folder, "run_dir", "training").__enter__(),  # noqa: B023
            lambda: write_result(folder / "result.json", {}),  # noqa: B023
        ):
            with pytest.raises(UserError, match=f": {tmp_path}/run is a link to gone, which is not there$"):
                made()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"^run_dir=.*file: cannot be made: File exists$"):
        lock_directory(tmp_path / "file", "run_dir", "training").__enter__()


def test_a_lack_of_space_is_none_of_the_input(tmp_path, monkeypatch):
    """A queue starts again what ends with 1, and gives up what ends with 2."""
    model = torch.nn.Linear(300_000, 1, bias=False, device="meta")  # 22 MB: 10, and 5 times its weights and momentum
    for free, words in ((21_999_999, "21 MB are free there, 22"), (21_400_000, "21 MB are free there, 22")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        with pytest.raises(UserError) as error:
            check_space(tmp_path, model)
        assert (str(error.value), error.value.code) == (f"run_dir={tmp_path}: {words} are needed", 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=22_000_000))
    check_space(tmp_path, model)
    for number, code in ((errno.ENOSPC, 1), (errno.EDQUOT, 1), (errno.EACCES, 2), (errno.ENOTDIR, 2)):
        error = from_write_error("run_dir=run: cannot be made", OSError(number, os.strerror(number), "run"))
        assert (str(error), error.code) == (f"run_dir=run: cannot be made: {os.strerror(number)}", code)


def test_workers_by_themselves_are_no_more_than_the_limit_of_open_files_allows(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(128)))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    check_open_files("auto")
    assert most_workers() == 120
    with pytest.raises(RunError, match=r"^data\.workers=128: need 1088 open files, and the limit is 1024; "):
        check_open_files(128)


def test_a_folder_where_a_result_is_to_be_written_is_refused(tmp_path):
    """An empty one, too: before the work and not after it."""
    for check in (check_result, lambda out: check_replaceable(out, ["net"])):
        with pytest.raises(UserError, match=r"^out=.*: is a folder; name a file$"):
            check(tmp_path)


def test_two_processes_that_write_one_file_leave_it_whole(tmp_path):
    """Each in a file of its own, which then becomes the result; a check of one does not take the other's away."""
    text = """
import os, sys
from pathlib import Path
from resnet_train.files import check_result, put
path, content = Path(sys.argv[1]), os.urandom(1) * 1_000_000
for _ in range(100):
    check_result(path)
    put(path, content)
    read = path.read_bytes()
    assert read == read[:1] * 1_000_000, len(read)
"""
    processes = [subprocess.Popen([sys.executable, "-c", text, str(tmp_path / "result")]) for _ in range(2)]
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert os.listdir(tmp_path) == ["result"]
